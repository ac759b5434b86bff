"""What users can ask for: one request per verb, the same from the command line and from Python.

The fields of a request are the options of its command, with their help. None leaves a value to the plan that is
extended, to the model, or to the default that the help names. Nothing here imports torch, so that `sleb --help` is
instant.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from sleb_plugins.errors import UsageError

WorkloadName = Literal["prompt", "generation"]
"""What is timed: processing a prompt, or generating after one."""

Chat = Literal["all", "answers"]
"""Which tokens of conversations count: all, or those that the assistant writes."""

LoadIn = Literal["8bit", "4bit"]
"""In how few bits weights are held during a search."""

StrategyName = Literal["greedy", "refine", "beam", "oneshot", "contiguous", "last"]
"""How a search chooses blocks: see `engine/search/strategies.py`."""

TargetName = Literal[
    "ratio",
    "remove",
    "target_params",
    "target_memory",
    "target_speedup",
    "max_loss_increase",
    "max_perplexity_ratio",
]
"""The fields that say how far a search goes."""

TARGET_NAMES: tuple[TargetName, ...] = get_args(TargetName)

DEFAULT_PLAN = Path("plan.json")
DEFAULT_METRIC = "nll"
DEFAULT_STRATEGY: StrategyName = "greedy"
DEFAULT_BEAM_WIDTH = 4
DEFAULT_PROTECTED = 1
DEFAULT_CALIBRATION = "wikitext2"
DEMO_CALIBRATION = "self"
DEFAULT_SAMPLES = 16
DEMO_SAMPLES = 24
DEFAULT_LENGTH = 2048
DEMO_LENGTH = 64
DEFAULT_SAMPLE_TOKENS = 48
DEFAULT_SERVE_LENGTH = 4096
DEFAULT_SERVE_BATCH = 1
DEFAULT_WORKLOAD: WorkloadName = "generation"
DEFAULT_TEXT = "wikitext2"
DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_HEAL_MINUTES = 10.0
RECOVERY_TOKENS = 131_072
"""Recovery fits weights to the text, so it takes more than a search."""
RECOVERY_SELF_TOKENS = 32_768
"""If the model writes all the text: writing a token takes as long as fitting several."""
RECOVERY_LENGTH = 256
"""Shorter than in a search: the same number of tokens costs less and recovers as much."""

_MOST_SEED = 2**63 - 1
_MOST_THREADS = 4096
_MOST_PER_SECOND = 10**21
"""Operations and bytes per second: far more than any device has."""

AUTO = "auto"
TRANSFORMERS = "transformers"
"""The engine that is built in."""

_TARGET = "How far to go (choose one)"
_SERVING = "What a target counts and times"
_SCORING = "How blocks are chosen"
_CALIBRATION = "Calibration text"
_PROTECTION = "Blocks that stay"
_MACHINE = "Model and machine"
_OUTPUT = "Output"
_SUBJECT = "Which blocks go"
_CHECKPOINT = "Checkpoint"
_RECOVERY = "Recovery"
_QUALITY = "Texts and tasks"
_WORKLOAD = "Workload"
_TIMING = "Timing"
_ESTIMATE = "Prediction without weights"


def require_text(name: str) -> str:
    """Return a name that plans and results, which are UTF-8, can store.

    Raises:
        UsageError: the name is not text in the encoding of this system.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise UsageError(
            f"{name!a} is not valid {encoding}, so a plan cannot store it.",
            hint="Rename it, or use a link with another name. If it is valid elsewhere, set LC_ALL=C.UTF-8.",
        ) from error
    return name


@dataclass(frozen=True)
class Doc:
    """The help of a field, and its spelling on the command line.

    Attributes:
        help: one sentence.
        default: what help names as the default where the field's own is None.
        panel: the heading under which help lists it.
        flag: the option, where it is not the field's name: "--protect-kind".
        short: a one-letter option: "-o".
        metavar: what help calls the value, where the type says too little.
        argument: it is a positional argument.
        repeated: the option may be given more than once; other tuples are lists with commas.
        least: the smallest number that it may be.
        most: the largest one; by default, more than anyone could wait for.
    """

    help: str
    default: object = None
    panel: str | None = None
    flag: str | None = None
    short: str | None = None
    metavar: str | None = None
    argument: bool = False
    repeated: bool = False
    least: int = 0
    most: int = 10**12

    def require_in_range(self, option: str, number: float) -> None:
        """Check a value of the field.

        Raises:
            UsageError: it is NaN or out of range.
        """
        shown = f"{number:g}" if isinstance(number, float) else number
        if not number >= self.least:
            fault = "is too small" if number < self.least else "is not a number"
            raise UsageError(f"{option} {shown} {fault}.", hint=f"Use {self.least:,} or more.")
        if number > self.most:
            raise UsageError(f"{option} {shown} is too large.", hint=f"Use {self.most:,} or less.")


Dtype = Annotated[
    str | None,
    Doc("float32, bfloat16, float16, or auto (the checkpoint's own).", default=AUTO, panel=_MACHINE),
]
Device = Annotated[str, Doc("cpu, cuda, cuda:1, mps, xpu, npu, or auto.", panel=_MACHINE)]
Stream = Annotated[
    bool | None,
    Doc(
        "Read the weights from disk block by block, for a model larger than memory.",
        default="if it does not fit",
        flag="--stream/--no-stream",
        panel=_MACHINE,
    ),
]
DeviceMap = Annotated[
    str | None,
    Doc(
        "Spread the model over several devices, and over CPU memory and disk: auto, balanced, sequential, or a JSON "
        "file from module names to devices.",
        metavar="MAP",
        panel=_MACHINE,
    ),
]
Revision = Annotated[str | None, Doc("Branch, tag or commit of a model on the Hub.", panel=_MACHINE)]
TrustRemoteCode = Annotated[bool, Doc("Run Python code that comes with the model.", panel=_MACHINE)]
Force = Annotated[bool, Doc("Overwrite existing output.", panel=_OUTPUT)]
ResultFile = Annotated[Path | None, Doc("Write the result to this JSON file.", short="-o", panel=_OUTPUT)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request, whose numbers are all in the range of their fields.

    Raises:
        UsageError: one is not.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value: Any = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                hint.__metadata__[0].require_in_range(f"--{name.replace('_', '-')}", value)


@dataclass(frozen=True, kw_only=True)
class TargetRequest(Request):
    """How far a search goes: one field of `TARGET_NAMES`, and what some of them need to know."""

    ratio: Annotated[str | float | None, Doc("Remove this share of the blocks, rounded up: 0.2.", panel=_TARGET)] = None
    remove: Annotated[int | None, Doc("Remove this number of blocks.", panel=_TARGET)] = None
    target_params: Annotated[
        str | int | None, Doc("Remove blocks until at most this many parameters remain: 1.2B.", panel=_TARGET)
    ] = None
    target_memory: Annotated[
        str | int | None, Doc("Remove blocks until weights and KV cache fit into this: 6GiB.", panel=_TARGET)
    ] = None
    target_speedup: Annotated[
        str | float | None,
        Doc("Remove blocks until the model runs this many times faster, timed on this machine: 1.25.", panel=_TARGET),
    ] = None
    max_loss_increase: Annotated[
        str | float | None,
        Doc("Remove blocks while the loss rises by at most this many nats per token: 0.1.", panel=_TARGET),
    ] = None
    max_perplexity_ratio: Annotated[
        str | float | None,
        Doc("Remove blocks while perplexity stays within this multiple of the dense model's: 1.2.", panel=_TARGET),
    ] = None
    serve_dtype: Annotated[
        str | None,
        Doc("With --target-memory: data type in which the model will be served.", default="--dtype", panel=_SERVING),
    ] = None
    serve_length: Annotated[
        int | None,
        Doc(
            "With --target-memory: tokens per sequence in the KV cache.",
            default=f"{DEFAULT_SERVE_LENGTH}, or the model's limit",
            panel=_SERVING,
            least=2,
        ),
    ] = None
    serve_batch: Annotated[
        int | None,
        Doc("With --target-memory: sequences in the KV cache.", default=DEFAULT_SERVE_BATCH, panel=_SERVING, least=1),
    ] = None
    target_workload: Annotated[
        WorkloadName | None, Doc("With --target-speedup: what to time.", default=DEFAULT_WORKLOAD, panel=_SERVING)
    ] = None


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest(Request):
    """Which text to calibrate on; a mixture names the share of each source."""

    calibration: Annotated[
        str | None,
        Doc(
            "wikitext2, c4, wikitext2-sleb, c4-sleb, self (written by the model), a .txt or .jsonl file, "
            "org/name[:config][:split][:column], or a mixture: self:0.5,c4:0.5.",
            default=f"{DEFAULT_CALIBRATION}; {DEMO_CALIBRATION} for demo",
            panel=_CALIBRATION,
        ),
    ] = None
    samples: Annotated[
        int | None,
        Doc("Number of sequences.", default=f"{DEFAULT_SAMPLES}; {DEMO_SAMPLES} for demo", panel=_CALIBRATION, least=1),
    ] = None
    sequence_length: Annotated[
        int | None,
        Doc(
            "Tokens per sequence.",
            default=f"{DEFAULT_LENGTH}, or the model's limit; {DEMO_LENGTH} for demo",
            panel=_CALIBRATION,
            least=2,
        ),
    ] = None
    seed: Annotated[
        int | None,
        Doc(
            "Seed for drawing and writing text, and for the order of a race.",
            default=0,
            panel=_CALIBRATION,
            most=_MOST_SEED,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SearchRequest(CalibrationRequest, TargetRequest):
    """Which blocks to search for, and how."""

    model: Annotated[str, Doc("A Hub id, a folder, a .gguf file, or demo.", metavar="MODEL", argument=True)] = field(
        kw_only=False
    )
    metric: Annotated[
        str | None,
        Doc(
            "Score candidates by this metric or weighted sum, such as nll+0.5*kl; see `sleb plugins`.",
            default=DEFAULT_METRIC,
            panel=_SCORING,
        ),
    ] = None
    strategy: Annotated[
        StrategyName | None,
        Doc(
            "greedy; refine (greedy, then swaps); beam; oneshot (score every block once); contiguous (best span); "
            "or last.",
            default=DEFAULT_STRATEGY,
            metavar="NAME",
            panel=_SCORING,
        ),
    ] = None
    beam_width: Annotated[
        int | None, Doc("Sets of blocks that a beam keeps.", default=DEFAULT_BEAM_WIDTH, panel=_SCORING, least=1)
    ] = None
    compare: Annotated[
        tuple[str, ...],
        Doc(
            "Search once per METRIC or METRIC@STRATEGY and write the best plan: nll,cosine,angular@contiguous.",
            metavar="LIST",
            panel=_SCORING,
        ),
    ] = ()
    fast: Annotated[
        bool | None,
        Doc(
            "Race the candidates: stop scoring one once it is clearly behind.",
            default="no; yes for demo",
            flag="--fast/--no-fast",
            panel=_SCORING,
        ),
    ] = None
    chat: Annotated[
        Chat | None,
        Doc("Calibrate on conversations (a field or column `messages`), and count these tokens.", panel=_CALIBRATION),
    ] = None
    holdout: Annotated[
        float | None,
        Doc(
            "Share of the sequences to hold out of the search, to detect overfitting: 0.2.",
            default=0,
            panel=_CALIBRATION,
        ),
    ] = None
    skip_bad_sequences: Annotated[
        bool,
        Doc("Skip sequences on which the dense model computes NaN or infinity.", panel=_CALIBRATION),
    ] = False
    sample_tokens: Annotated[
        int | None,
        Doc(
            "Tokens that both models generate at the end, to reveal a collapse; 0 for none.",
            default=DEFAULT_SAMPLE_TOKENS,
            panel=_CALIBRATION,
        ),
    ] = None
    protect_first: Annotated[
        int | None, Doc("Protect this many blocks at the start.", default=DEFAULT_PROTECTED, panel=_PROTECTION)
    ] = None
    protect_last: Annotated[
        int | None, Doc("Protect this many blocks at the end.", default=DEFAULT_PROTECTED, panel=_PROTECTION)
    ] = None
    protect: Annotated[
        tuple[int, ...] | None, Doc("Also protect these blocks: 5,11.", metavar="LIST", panel=_PROTECTION)
    ] = None
    protect_kinds: Annotated[
        tuple[str, ...],
        Doc(
            "Protect all blocks of this kind: full_attention. May be repeated.",
            flag="--protect-kind",
            metavar="KIND",
            panel=_PROTECTION,
            repeated=True,
        ),
    ] = ()
    dtype: Dtype = None
    device: Device = AUTO
    memory: Annotated[
        str | int | None,
        Doc("Memory for the search, besides the model: 8GiB.", default="a share of what is free", panel=_MACHINE),
    ] = None
    batch_size: Annotated[
        int | None, Doc("Sequences per forward pass.", default="by device", panel=_MACHINE, least=1)
    ] = None
    stream: Stream = None
    device_map: DeviceMap = None
    load_in: Annotated[
        LoadIn | None,
        Doc("Hold the weights in 8 or 4 bits during the search.", metavar="8bit|4bit", panel=_MACHINE),
    ] = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    extend: Annotated[
        Path | None,
        Doc("Continue from a finished plan, with its settings and text.", metavar="PLAN", panel=_OUTPUT),
    ] = None
    resume: Annotated[bool, Doc("Continue an interrupted search.", panel=_OUTPUT)] = False
    output: Annotated[
        Path | None,
        Doc("Write the plan here.", default=f"{DEFAULT_PLAN}, or the extended plan", short="-o", panel=_OUTPUT),
    ] = None
    force: Force = False

    @property
    def plan_file(self) -> Path:
        """Where the plan is written; an extended plan may replace the old one, which it contains."""
        return self.output or self.extend or DEFAULT_PLAN


@dataclass(frozen=True, kw_only=True)
class SubjectRequest(Request):
    """A plan, or a model and the blocks to remove from it."""

    subject: Annotated[
        str | None,
        Doc(
            f"A plan (default: ./{DEFAULT_PLAN}), or a model with --blocks.",
            metavar="PLAN|MODEL",
            argument=True,
        ),
    ] = field(default=None, kw_only=False)
    blocks: Annotated[
        tuple[int, ...] | None,
        Doc("Remove these blocks from MODEL, in this order: 5,4,9.", metavar="LIST", panel=_SUBJECT),
    ] = None
    model: Annotated[str | None, Doc("Where the plan's model is now, if it moved.", panel=_SUBJECT)] = None
    any_model: Annotated[bool, Doc("Use the plan on a model it was not made for.", panel=_SUBJECT)] = False
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, kw_only=True)
class OneSizeRequest(SubjectRequest):
    """One size of the pruned model, by default the smallest."""

    remove: Annotated[
        int | None,
        Doc("Remove only N blocks: the plan's step N, or the first N of --blocks.", metavar="N", panel=_SUBJECT),
    ] = None

    @property
    def most_removals(self) -> int | None:
        """The number of removals; None for all."""
        return self.remove


@dataclass(frozen=True, kw_only=True)
class SizesRequest(SubjectRequest):
    """Sizes of the pruned model to compare with the dense one, by default the smallest."""

    remove: Annotated[
        tuple[int, ...],
        Doc(
            "Measure these sizes, each without N blocks: the plan's step N, or the first N of --blocks: 2,4,6.",
            metavar="LIST",
            panel=_SUBJECT,
        ),
    ] = ()
    every: Annotated[
        int | None, Doc("Measure every N-th size, and the smallest.", metavar="N", panel=_SUBJECT, least=1)
    ] = None

    @property
    def most_removals(self) -> int | None:
        """The number of removals of the smallest model; None for all."""
        return max(self.remove, default=None)


@dataclass(frozen=True, kw_only=True)
class ApplyRequest(OneSizeRequest, CalibrationRequest):
    """A checkpoint or GGUF file to be written, and how the blocks that stay are recovered."""

    source: Annotated[
        Path | None,
        Doc("Remove the blocks from this GGUF file of the model, quantized or not.", metavar="GGUF", panel=_CHECKPOINT),
    ] = None
    dtype: Annotated[str | None, Doc("Cast the weights: float32, bfloat16, float16.", panel=_CHECKPOINT)] = None
    max_shard_size: Annotated[
        str | int | None, Doc("Largest weight file: 5GB, 512MiB.", default=DEFAULT_SHARD_SIZE, panel=_CHECKPOINT)
    ] = None
    no_verify: Annotated[bool, Doc("Skip the proof after saving.", panel=_CHECKPOINT)] = False
    keep_failed: Annotated[
        Path | None, Doc("If the proof fails, keep the output in this folder.", metavar="DIR", panel=_CHECKPOINT)
    ] = None
    recover: Annotated[
        bool, Doc("Refit the blocks around each gap to the dense model, in closed form.", panel=_RECOVERY)
    ] = False
    heal: Annotated[
        bool, Doc("Train the remaining blocks to predict what the dense model predicts.", panel=_RECOVERY)
    ] = False
    heal_minutes: Annotated[
        float | None, Doc("Stop healing after this time.", default=f"{DEFAULT_HEAL_MINUTES:g}", panel=_RECOVERY)
    ] = None
    heal_tokens: Annotated[
        int | None, Doc("Stop healing after this many tokens instead, reproducibly.", panel=_RECOVERY, least=1)
    ] = None
    resume: Annotated[bool, Doc("Continue an interrupted healing.", panel=_RECOVERY)] = False
    calibration: Annotated[
        str | None,
        Doc(
            "Text to recover on, as for `sleb search`.",
            default="the plan's text and a quarter self",
            panel=_RECOVERY,
        ),
    ] = None
    samples: Annotated[
        int | None,
        Doc(
            "Number of sequences; a fifth of them choose the fits, and a tenth are for the report.",
            default=f"{RECOVERY_TOKENS:,} tokens, or {RECOVERY_SELF_TOKENS:,} of self",
            panel=_RECOVERY,
            least=1,
        ),
    ] = None
    sequence_length: Annotated[
        int | None,
        Doc(
            "Tokens per sequence.",
            default=f"{RECOVERY_LENGTH}, or the model's limit",
            panel=_RECOVERY,
            least=2,
        ),
    ] = None
    seed: Annotated[
        int | None, Doc("Seed for drawing and writing text.", default=0, panel=_RECOVERY, most=_MOST_SEED)
    ] = None
    device: Annotated[
        str | None, Doc("Device to recover on: cpu, cuda, cuda:1, mps, xpu, npu.", default=AUTO, panel=_RECOVERY)
    ] = None
    stream: Stream = None
    device_map: DeviceMap = None
    push: Annotated[
        str | None, Doc("Upload the checkpoint to the Hub, private.", metavar="ORG/NAME", panel=_OUTPUT)
    ] = None
    public: Annotated[bool, Doc("With --push: make it public.", panel=_OUTPUT)] = False
    output: Annotated[
        Path | None,
        Doc(
            "Write this folder, or this file if it ends in .gguf.",
            default="named after the model",
            short="-o",
            panel=_OUTPUT,
        ),
    ] = None
    force: Force = False


@dataclass(frozen=True, kw_only=True)
class EvalRequest(SizesRequest):
    """What to measure of a model's quality."""

    perplexity: Annotated[
        tuple[str, ...],
        Doc(
            "Texts, separated by commas: wikitext2, c4, files, org/name[:config][:split][:column].",
            default=f"{DEFAULT_TEXT}, unless --tasks",
            metavar="LIST",
            panel=_QUALITY,
        ),
    ] = ()
    tasks: Annotated[
        tuple[str, ...],
        Doc(
            "lm-eval tasks and groups, or sleb, canaries, leaderboard-v1, leaderboard-v2, separated by commas: "
            "piqa,canaries.",
            metavar="LIST",
            panel=_QUALITY,
        ),
    ] = ()
    limit: Annotated[int | None, Doc("Use only the first items of each task.", panel=_QUALITY, least=1)] = None
    num_fewshot: Annotated[int | None, Doc("Examples in the prompt.", default="the task's own", panel=_QUALITY)] = None
    apply_chat_template: Annotated[bool, Doc("Format tasks with the chat template.", panel=_QUALITY)] = False
    include_path: Annotated[Path | None, Doc("Folder with your own task files.", panel=_QUALITY)] = None
    show_flips: Annotated[
        int | None, Doc("Show up to N items of each task that only one model gets right.", metavar="N", panel=_QUALITY)
    ] = None
    sequence_length: Annotated[
        int | None,
        Doc(
            "Tokens per perplexity window.", default=f"{DEFAULT_LENGTH}, or the model's limit", panel=_QUALITY, least=2
        ),
    ] = None
    max_windows: Annotated[
        int | None,
        Doc("Use only the first windows of each text.", default="all, or the text's protocol", panel=_QUALITY, least=1),
    ] = None
    stride: Annotated[
        int | None,
        Doc(
            "Tokens from one perplexity window to the next; overlapping windows give more context.",
            default="the window's length",
            panel=_QUALITY,
        ),
    ] = None
    bos: Annotated[bool, Doc("Begin every perplexity window with the BOS token.", panel=_QUALITY)] = False
    batch_size: Annotated[
        str | int,
        Doc("Text windows or task requests per forward pass; auto suits the device.", panel=_QUALITY),
    ] = AUTO
    fresh: Annotated[bool, Doc("Measure again instead of reading the cache.", panel=_QUALITY)] = False
    dtype: Dtype = None
    device: Device = AUTO
    stream: Stream = None
    device_map: DeviceMap = None
    output: ResultFile = None
    force: Force = False

    @property
    def items_per_batch(self) -> str | int:
        """The requests of tasks per forward pass: a number, or `auto`.

        Raises:
            UsageError: it is neither.
        """
        if self.batch_size == AUTO:
            return AUTO
        size = str(self.batch_size)
        if not re.fullmatch(r"[1-9]\d{,11}", size, re.ASCII):
            raise UsageError(f"--batch-size {size} is not a number of 1 to 999,999,999,999.", hint="Use 8, or auto.")
        return int(size)


@dataclass(frozen=True, kw_only=True)
class BenchRequest(SizesRequest):
    """What to time, or to predict."""

    prompt: Annotated[bool, Doc("Time prompt processing (prefill).", panel=_WORKLOAD)] = False
    generation: Annotated[bool, Doc("Time generation (prefill and decode).", default="both", panel=_WORKLOAD)] = False
    batch_size: Annotated[
        int | None, Doc("Prompts per batch.", default="by workload and device", panel=_WORKLOAD, least=1)
    ] = None
    prompt_length: Annotated[
        int | None, Doc("Tokens per prompt.", default="by workload and device", panel=_WORKLOAD, least=1)
    ] = None
    new_tokens: Annotated[
        int | None, Doc("Tokens to generate per prompt.", default="by workload and device", panel=_WORKLOAD, least=1)
    ] = None
    sweep: Annotated[
        tuple[str, ...],
        Doc(
            'Time each combination: "batch=1,8,32 prompt=128,2048 new=64". May be repeated.',
            metavar="TEXT",
            panel=_WORKLOAD,
            repeated=True,
        ),
    ] = ()
    iterations: Annotated[
        int | None, Doc("Timed runs of each model.", default="by workload and device", panel=_TIMING, least=1)
    ] = None
    warmup: Annotated[
        int | None, Doc("Untimed runs of each model first.", default="until times are stable", panel=_TIMING)
    ] = None
    cooldown: Annotated[float, Doc("Seconds to pause before each run.", panel=_TIMING, most=24 * 3600)] = 0.0
    compile: Annotated[bool, Doc("Run the models through torch.compile.", panel=_MACHINE)] = False
    static_cache: Annotated[
        bool, Doc("Generate with a KV cache of fixed size; --compile always does.", panel=_MACHINE)
    ] = False
    threads: Annotated[
        int | None, Doc("CPU threads.", default="torch's choice", panel=_MACHINE, least=1, most=_MOST_THREADS)
    ] = None
    dtype: Dtype = None
    device: Device = AUTO
    output: ResultFile = None
    force: Force = False
    engine: Annotated[
        str,
        Doc("transformers, llama.cpp, vllm, or a plugin's engine: see `sleb plugins`.", panel=_MACHINE),
    ] = TRANSFORMERS
    source: Annotated[
        Path | None,
        Doc("A GGUF file of the model, for engines that read GGUF.", metavar="GGUF", panel=_MACHINE),
    ] = None
    estimate: Annotated[
        bool,
        Doc("Predict speed and memory from the model's config, without weights.", panel=_ESTIMATE),
    ] = False
    device_flops: Annotated[
        float | None,
        Doc(
            "With --estimate: operations per second of the device to predict for, such as 989e12.",
            default="measured here",
            metavar="NUMBER",
            panel=_ESTIMATE,
            least=1,
            most=_MOST_PER_SECOND,
        ),
    ] = None
    device_bandwidth: Annotated[
        float | None,
        Doc(
            "With --estimate: bytes per second of its memory, such as 3.35e12.",
            default="measured here",
            metavar="NUMBER",
            panel=_ESTIMATE,
            least=1,
            most=_MOST_PER_SECOND,
        ),
    ] = None

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Check that these fields have their defaults.

        Raises:
            UsageError: one does not; `why` ends the message: "requires --engine".
        """
        unset = BenchRequest()
        for name in names:
            if getattr(self, name) != getattr(unset, name):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {why}.", hint=f"Leave out {flag}.")


@dataclass(frozen=True, kw_only=True)
class ExportRequest(OneSizeRequest):
    """A format that another tool reads."""

    to: Annotated[
        str,
        Doc(
            "report, figures, summary; gguf, hf, vllm, llama-quantize, mergekit, indices; or a plugin's format.",
            metavar="FORMAT",
            panel=_OUTPUT,
        ),
    ]
    source: Annotated[
        Path | None,
        Doc("A GGUF file of the model, for gguf and llama-quantize.", metavar="GGUF", panel=_OUTPUT),
    ] = None
    output: Annotated[
        Path | None,
        Doc(
            "Write this file or folder.",
            default="text to stdout, files named after the model",
            short="-o",
            panel=_OUTPUT,
        ),
    ] = None
    force: Force = False
