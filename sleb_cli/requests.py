"""What users can ask for: one request per verb, the same from the command line and from Python.

The fields of a request are the options of its command, with their help. None leaves a value to the
plan that is extended, to the model, or to the default that the help names. Nothing here imports
torch, so that `sleb --help` is instant.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sleb_cli.units import in_shell
from sleb_plugins.errors import UsageError, did_you_mean


def sibling(file: Path, suffix: str) -> Path:
    """Return plan.eval.json for plan.json."""
    return file.with_name(file.name.removesuffix(".json") + suffix)


def journal_of(plan: Path) -> Path:
    """Return the path of the journal of a search that writes this plan."""
    return plan.parent / f"{plan.name}.journal"  # `with_name` refuses "."


def option_of(name: str) -> str:
    """Return the command-line option of a field: --target-params."""
    return "--" + name.replace("_", "-")


WorkloadName = Literal["prompt", "generation", "texts", "query"]
"""What is timed: processing a prompt, or generating after one."""

Chat = Literal["all", "answers"]
"""Which tokens of conversations count: all, or those that the assistant writes."""

DeviceMap = Literal["auto", "balanced", "sequential"]
"""How accelerate chooses the places of a model's modules."""

RunCode = Literal["confined", "unconfined"]
"""How programs that a model writes are run: see `engine/quality/sandbox.py`."""

StrategyName = Literal["greedy", "refine", "oneshot", "contiguous"]
"""How a search chooses blocks: see `engine/search/strategies.py`."""

Unit = Literal["blocks", "experts"]
"""What a search removes: whole blocks, or the same number of experts from each."""

TargetName = Literal["ratio", "remove", "target_params", "target_memory", "max_perplexity_ratio"]
"""The fields that say how far a search goes."""

TARGET_NAMES: tuple[TargetName, ...] = get_args(TargetName)

DEFAULT_PLAN = Path("plan.json")
DEFAULT_METRIC = "nll"
DEFAULT_EXPERT_METRIC = "energy"
DEFAULT_READER_METRIC = "output"
DEFAULT_EXPERT_HOLDOUT = 0.1
"""What an expert knows that goes shows on text that it was not chosen on."""
DEFAULT_STRATEGY: StrategyName = "greedy"
DEFAULT_PROTECTED = 1
DEFAULTS: Mapping[Unit, Mapping[str, Any]] = {
    "blocks": {
        "metric": DEFAULT_METRIC,
        "strategy": DEFAULT_STRATEGY,
        "protect_first": DEFAULT_PROTECTED,
        "protect_last": DEFAULT_PROTECTED,
        "holdout": 0.0,
    },
    "experts": {"metric": DEFAULT_EXPERT_METRIC, "holdout": DEFAULT_EXPERT_HOLDOUT},
}
"""What a search takes for options that are not set, by what it removes."""
DEFAULT_CALIBRATION = "wikitext2"
DEMO_CALIBRATION = "self"
DEFAULT_SAMPLES = 16
DEFAULT_TEXTS = 256
"""Samples of a model that only reads: they are short."""
DEMO_SAMPLES = 24
DEFAULT_LENGTH = 2048
DEMO_LENGTH = 64
DEFAULT_SAMPLE_TOKENS = 48
DEFAULT_SERVE_LENGTH = 4096
DEFAULT_TEXT = "wikitext2"
DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_HEAL_MINUTES = 10.0
RECOVERY_HEAL_TOKENS = 32_768
"""`--recover` trains on this many tokens after its fit: a number, so that it can be repeated."""
RECOVERY_TOKENS = 131_072
"""Recovery fits weights to the text, so it takes more than a search."""
RECOVERY_SELF_TOKENS = 32_768
"""If the model writes all the text: writing a token takes as long as fitting several."""
RECOVERY_LENGTH = 256
"""Shorter than in a search: the same number of tokens costs less and recovers as much."""
HEALING_TEXTS = 4096
"""How many texts a model that only reads is healed on."""
READER_LENGTH = 128
"""The most tokens of such a text."""

_MAX_SEED = 2**63 - 1
_MAX_THREADS = 4096

AUTO = "auto"
DEMO = "demo"
"""The model that is downloaded to try sleb out."""
TRANSFORMERS = "transformers"
"""The engine that is built in."""

RECOVERIES = ("recover", "heal")
"""The options that ask for a stage of a recovery, in the order of the stages."""

_TARGET = "Other targets (choose one)"
_SCORING = "How blocks are chosen"
_CALIBRATION = "Calibration text"
_FIT = "Speed and memory"
MACHINE = "Model and machine"
"""The last heading of help."""
OUTPUT = "Output"
_SUBJECT = "Blocks to remove"
_CHECKPOINT = "Checkpoint"
_RECOVERY = "Recovery"
_QUALITY = "Texts and tasks"
_WORKLOAD = "Workload"
_TIMING = "Timing"


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
            hint="Rename it, or use a link with another name. If it is valid elsewhere, set "
            "LC_ALL=C.UTF-8.",
        ) from error
    return name


@dataclass(frozen=True)
class Doc:
    """The help of a field, and its spelling on the command line.

    Attributes:
        help: one sentence.
        panel: the heading under which help lists it.
        default: what help names as the default where the field's own is None.
        metavar: what help calls the value, where the type says too little.
        argument: it is a positional argument.
        repeated: the option may be given more than once; other tuples are lists with commas.
        minimum: the smallest value allowed.
        maximum: the largest value allowed; by default, more than anyone could wait for.
    """

    help: str
    panel: str | None = None
    default: object = None
    metavar: str | None = None
    argument: bool = False
    repeated: bool = False
    minimum: float = 0
    maximum: float = 10**12


def option(help: str, panel: str | None = None, *, unset: Any = None, **spelling: Any) -> Any:
    """Return a field with this help, whose value is `unset` where none is given."""
    return field(default=unset, metadata={"doc": Doc(help, panel, **spelling)})


def _argument(help: str, metavar: str, *, repeated: bool = False) -> dict[str, Doc]:
    return {"doc": Doc(help, metavar=metavar, argument=True, repeated=repeated)}


_flag = partial(option, unset=False)
_count = partial(option, minimum=1)
_list = partial(option, metavar="LIST", unset=())
_repeated = partial(option, repeated=True, unset=())
_dtype = partial(
    option,
    "float32, bfloat16, float16, or auto (as stored, or float32 on a CPU that emulates that).",
    MACHINE,
    default=AUTO,
)
_device = partial(option, "cpu, cuda, cuda:1, mps, xpu, npu, or auto.", MACHINE, unset=AUTO)
_stream = partial(
    option,
    "Read the weights from disk block by block.",
    _FIT,
    default="if they do not fit",
)
_device_map = partial(
    option,
    "Let accelerate spread the model over devices, CPU memory and disk: auto, balanced or "
    "sequential.",
    _FIT,
    metavar="NAME",
)
_revision = partial(option, "Branch, tag or commit on the Hub.", MACHINE)
_trust_remote_code = partial(_flag, "Run Python code of the model.", MACHINE)
_experts_per_token = partial(
    option,
    "Let each token use only this many experts.",
    _SUBJECT,
    minimum=1,
)
_prompt = partial(
    option,
    "Begin texts with this prompt of an embedding model: query.",
    metavar="NAME",
    default="the model's own",
)
_force = partial(_flag, "Overwrite existing output.", OUTPUT)
_result_file = partial(option, "Write the result to this JSON file.")


_TYPES: dict[Any, tuple[str, Any]] = {
    str: ("a text", str),
    os.PathLike[str]: ("a plan", str),
    Path: ("a path", str),
    int: ("a whole number", int),
    float: ("a number", int | float),
    bool: ("True or False", bool),
}
"""What errors call the type of a field, and the type of values that it takes, paths being text."""


def kinds_of(annotation: Any) -> list[Any]:
    """Return the members of a union but None, or the type alone."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [kind for kind in get_args(annotation) if kind is not NoneType]


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """Return a value in the type of its field; refuse one of another type."""
    if value is None and NoneType in get_args(annotation):
        return None
    value = _without_paths(value)
    wanted = []
    for kind in kinds_of(annotation):
        if get_origin(kind) is Sequence:
            words, type_ = _TYPES[get_args(kind)[0]]
            wanted.append(f"a list of {words.removeprefix('a ')}s")
            if isinstance(value, tuple) and all(_has_type(item, type_) for item in value):
                return value
        elif get_origin(kind) is Literal:
            choices = get_args(kind)
            wanted.append(f"one of {', '.join(choices)}")
            if value in choices:
                return value
            if isinstance(value, str):
                raise UsageError(
                    f"Unknown value {value!r} for {name}.", hint=did_you_mean(value, choices)
                )
        else:
            words, type_ = _TYPES[kind]
            wanted.append(words)
            if _has_type(value, type_):
                return Path(value) if kind is Path else value
    raise UsageError(f"{name} cannot be {value!r}.", hint=f"Give {' or '.join(wanted)}.")


def _without_paths(value: Any) -> Any:
    """Return a path, or a plan in a file, as text, and a list as a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return tuple(map(_without_paths, value))
    return value


def _has_type(value: Any, type_: Any) -> bool:
    """Whether a value has this type; True and False are no numbers."""
    return isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request without empty values, whose values have the types of their fields, and whose
    numbers are in range.

    A list may stand for a tuple, a path for a text or the other way round, and a plan for its file.

    Raises:
        UsageError: a value is of another type, empty, or out of range.
    """

    def __post_init__(self) -> None:
        annotations = get_type_hints(type(self))
        for option in fields(self):
            doc: Doc = option.metadata["doc"]
            name = str(doc.metavar) if doc.argument else option_of(option.name)
            value = _typed(name, getattr(self, option.name), annotations[option.name])
            object.__setattr__(self, option.name, value)
            # As of a variable of a shell that is not set.
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise UsageError(f"{name} has an empty value.", hint="Write one, or leave it out.")
            if isinstance(value, int | float) and not isinstance(value, bool):
                _require_in_range(name, value, doc)

    def command(self, verb: str) -> str:
        """Return the command with these options, other than for its output."""
        words = ["sleb", verb]
        for option in fields(self):
            value = getattr(self, option.name)
            doc: Doc = option.metadata["doc"]
            if value == option.default or option.name in ("output", "force"):
                continue
            if isinstance(value, bool):
                words.append(option_of(option.name if value else f"no_{option.name}"))
                continue
            if not isinstance(value, tuple):
                texts = [str(value)]
            elif doc.repeated:
                texts = list(value)
            else:
                texts = [",".join(map(str, value))]
            for text in texts:
                if not doc.argument:
                    words.append(option_of(option.name))
                words.append(in_shell(text))
        return " ".join(words)


def _require_in_range(name: str, value: float, doc: Doc) -> None:
    given = f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    if value > doc.maximum:
        raise UsageError(f"{given} is too large.", hint=f"Use {doc.maximum:,} or less.")
    if value < doc.minimum:
        raise UsageError(f"{given} is too small.", hint=f"Use {doc.minimum:,} or more.")
    if math.isnan(value):
        raise UsageError(f"{given} is not a number.", hint=f"Use {doc.minimum:,} or more.")


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Request):
    """How many blocks to search for, by one field of `TARGET_NAMES`, how, and on which text."""

    model: str | None = field(
        default=None,
        kw_only=False,
        metadata=_argument(
            "A Hub id, a folder, a .gguf file, or demo; with --extend, the plan's.", "MODEL"
        ),
    )
    unit: Unit = option(
        "Remove blocks, or experts of each block.",
        _SCORING,
        unset="blocks",
        metavar="NAME",
    )
    ratio: str | float | None = option("Remove this share, rounded up: 0.2.")
    remove: int | None = option("Remove so many blocks, or experts of each.")
    target_params: str | int | None = option("Leave so many parameters: 1.2B.", _TARGET)
    target_memory: str | int | None = option(
        "Fit weights and KV cache in this much memory: 6GiB.", _TARGET
    )
    serve_length: int | None = option(
        "Tokens in that KV cache.",
        _TARGET,
        default=f"{DEFAULT_SERVE_LENGTH}, or the model's limit",
        minimum=2,
    )
    max_perplexity_ratio: str | float | None = option(
        "Keep perplexity within this multiple of the dense model's: 1.2.",
        _TARGET,
    )
    metric: str | None = option(
        "Score candidates by this: see `sleb plugins`.",
        _SCORING,
        default=f"{DEFAULT_METRIC}; {DEFAULT_EXPERT_METRIC} for experts; output for models that "
        "only read",
    )
    strategy: StrategyName | None = option(
        "greedy; refine (greedy, then swaps); oneshot (all scored once); or contiguous (a span).",
        _SCORING,
        default=DEFAULT_STRATEGY,
        metavar="NAME",
    )
    fast: bool | None = option(
        "Stop scoring a candidate once little is expected of it.",
        _FIT,
        default="no; yes for demo",
    )
    calibration: str | None = option(
        "wikitext2, c4, wikitext2-sleb, c4-sleb, a .txt or .jsonl file, "
        "org/name[:config][:split][:column]; self, self-chat or answers:FILE, which the model "
        "writes; or a mixture: self:0.5,c4:0.5.",
        default=f"{DEFAULT_CALIBRATION}; {DEMO_CALIBRATION} for demo",
    )
    samples: int | None = _count(
        "Number of sequences.",
        _CALIBRATION,
        default=f"{DEFAULT_SAMPLES}; {DEFAULT_TEXTS} if it only reads; {DEMO_SAMPLES} for demo",
    )
    sequence_length: int | None = option(
        "Tokens per sequence.",
        _CALIBRATION,
        default=f"{DEFAULT_LENGTH}, or the model's limit; {DEMO_LENGTH} for demo",
        minimum=2,
    )
    seed: int | None = option(
        "Seed of samples and races.",
        _CALIBRATION,
        default=0,
        maximum=_MAX_SEED,
    )
    chat: Chat | None = option(
        "Count all tokens of conversations (`messages`), or only the answers.",
        _CALIBRATION,
        metavar="NAME",
        default="answers",
    )
    prompt: str | None = _prompt(panel=_CALIBRATION)
    holdout: float | None = option(
        "Hold out this share of the sequences: 0.2.",
        _CALIBRATION,
        default=f"0; {DEFAULT_EXPERT_HOLDOUT} for experts",
        maximum=0.99,
    )
    sample_tokens: int | None = option(
        "Tokens that both models write at the end.",
        _CALIBRATION,
        default=DEFAULT_SAMPLE_TOKENS,
    )
    protect_first: int | None = option(
        "Protect so many at the start.", _SCORING, default=DEFAULT_PROTECTED
    )
    protect_last: int | None = option(
        "Protect so many at the end.", _SCORING, default=DEFAULT_PROTECTED
    )
    protect: Sequence[int] | None = option(
        "Also protect these blocks: 5,11.", _SCORING, metavar="LIST"
    )
    protect_kind: Sequence[str] = _repeated(
        "Protect all blocks of this kind: full_attention. May be repeated.",
        _SCORING,
        metavar="KIND",
    )
    dtype: str | None = _dtype()
    device: str = _device()
    memory: str | int | None = option(
        "Memory for the search besides the model: 8GiB.",
        _FIT,
        default="a share of what is free",
    )
    batch_size: int | None = _count("Sequences per forward pass.", _FIT, default="by device")
    stream: bool | None = _stream()
    device_map: DeviceMap | None = _device_map()
    revision: str | None = _revision()
    trust_remote_code: bool = _trust_remote_code()
    extend: Path | None = option(
        "Remove more than this plan, with its settings.", OUTPUT, metavar="PLAN"
    )
    resume: bool = _flag("Continue an interrupted search.")
    output: Path | None = option(
        "Write the plan here.", default=f"{DEFAULT_PLAN}, or the extended plan"
    )
    force: bool = _force()

    @property
    def plan_file(self) -> Path:
        """Where the plan is written; an extended plan may replace the one that it contains."""
        return self.output or self.extend or DEFAULT_PLAN

    @property
    def options(self) -> dict[str, Any]:
        """The options that repeat the search, where they are set."""
        options = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in REPEATED_OPTIONS and value != option.default:
                options[option.name] = value
        return options


REPEATED_OPTIONS = {option.name for option in fields(SearchRequest)} - {
    "extend", "resume", "output", "force", "trust_remote_code", "memory", "stream", "device_map"
}  # fmt: skip
"""The options of a search that its plan holds: those that decide what it finds.

A plan, which may be anyone's, grants no trust and names no place to write.
"""


@dataclass(frozen=True, kw_only=True)
class SubjectRequest(Request):
    """A plan, or a model and the blocks to remove from it."""

    subject: str | os.PathLike[str] | None = field(
        default=None,
        kw_only=False,
        metadata=_argument(
            f"A plan (default: ./{DEFAULT_PLAN}), or a model with --blocks.", "PLAN|MODEL"
        ),
    )
    blocks: Sequence[int] | None = option(
        "Remove these blocks from MODEL, in this order: 5,4,9 or 12-15.", _SUBJECT, metavar="LIST"
    )
    model: str | None = option("The plan's model, if it has moved.", _SUBJECT)
    any_model: bool = _flag("Allow a model that the plan was not made for.", _SUBJECT)
    revision: str | None = _revision()
    trust_remote_code: bool = _trust_remote_code()


@dataclass(frozen=True, kw_only=True)
class OneSizeRequest(SubjectRequest):
    """One size of the pruned model, by default the smallest."""

    remove: int | None = option(
        "Remove only the first N blocks, or experts of each block.",
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class SizesRequest(SubjectRequest):
    """Sizes of the pruned model to compare with the dense one, by default the smallest."""

    remove: Sequence[int] = _list(
        "Measure the model without the first 2, 4 and 6 blocks or experts: 2,4,6.",
    )
    every: int | None = _count("Measure every N-th size, and the smallest.", _SUBJECT, metavar="N")


@dataclass(frozen=True, kw_only=True)
class ApplyRequest(OneSizeRequest):
    """A checkpoint or GGUF file to be written, and how the blocks that stay are recovered."""

    experts_per_token: int | None = _experts_per_token()
    source: Path | None = option(
        "Remove the blocks or experts from this GGUF file of the model, quantized or not.",
        _CHECKPOINT,
        metavar="GGUF",
    )
    scripts: Sequence[str] = _list(
        "Keep only the tokens of these scripts, as Unicode names them: latin,greek. ASCII, symbols "
        "and bytes stay.",
        _CHECKPOINT,
    )
    dtype: str | None = option("Cast the weights to float32, bfloat16 or float16.", _CHECKPOINT)
    max_shard_size: str | int | None = option(
        "Largest weight file: 5GB, 512MiB.", _CHECKPOINT, default=DEFAULT_SHARD_SIZE
    )
    no_verify: bool = _flag("Skip the proof after saving.", _CHECKPOINT)
    keep_failed: Path | None = option(
        "If the proof fails, keep the output in this folder.", _CHECKPOINT, metavar="DIR"
    )
    recover: bool = _flag(
        "Refit the block before each gap to match the dense model, then heal briefly."
    )
    heal: bool | None = option(
        "Train the remaining blocks, or routers, to match the dense model.",
        default="briefly with --recover",
    )
    heal_minutes: float | None = option(
        "Stop healing after this many minutes.",
        _RECOVERY,
        default=f"{DEFAULT_HEAL_MINUTES:g} with --heal",
        minimum=0.001,
    )
    heal_tokens: int | None = option(
        "Heal for a fixed number of tokens, for reproducible results.",
        _RECOVERY,
        default=f"{RECOVERY_HEAL_TOKENS:,} with --recover alone",
        minimum=1,
    )
    calibration: str | None = option(
        "Text to recover on, as for `sleb search`.",
        _RECOVERY,
        default="the plan's text, with a quarter of self or self-chat",
    )
    samples: int | None = _count(
        "Number of sequences, up to a fifth of them for validation and up to a tenth for the test.",
        _RECOVERY,
        default=f"{RECOVERY_TOKENS:,} tokens, or {RECOVERY_SELF_TOKENS:,} if the model writes them "
        f"all, down to a quarter with a few --heal-minutes; {HEALING_TEXTS:,} texts of a model "
        "that only reads",
    )
    sequence_length: int | None = option(
        "Tokens per sequence.",
        _RECOVERY,
        default=f"{RECOVERY_LENGTH}, or the model's limit; at most {READER_LENGTH} of texts of a "
        "model that only reads",
        minimum=2,
    )
    seed: int | None = option(
        "Seed for sampling and generating text.", _RECOVERY, default=0, maximum=_MAX_SEED
    )
    chat: Chat | None = option(
        "Read conversations, as for `sleb search`.",
        _RECOVERY,
        default="all, in conversations that the model writes",
    )
    prompt: str | None = _prompt(panel=_RECOVERY)
    device: str = option(
        "Device to recover on: cpu, cuda, cuda:1, mps, xpu, npu.", _RECOVERY, unset=AUTO
    )
    stream: bool | None = _stream()
    device_map: DeviceMap | None = _device_map()
    output: Path | None = option(
        "Write this folder, or this file if it ends in .gguf.",
        default="named after the model",
    )
    force: bool = _force()

    @property
    def recoveries(self) -> tuple[str, ...]:
        """The stages of the recovery that it asks for."""
        return tuple(name for name in RECOVERIES if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EvalRequest(SizesRequest):
    """What to measure of a model's quality."""

    against: str | None = option(
        "Compare MODEL with the one it was made from: a folder, Hub id or GGUF file.",
        metavar="MODEL",
    )
    experts_per_token: int | None = _experts_per_token()
    perplexity: Sequence[str] = _list(
        "Measure perplexity on these texts: wikitext2, c4, files, "
        "org/name[:config][:split][:column]. In conversations "
        "(`messages`), only the answers count.",
        default=f"{DEFAULT_TEXT}, unless --tasks or --corpus",
    )
    tasks: Sequence[str] = _list(
        "Run these lm-eval tasks and groups, or sleb, canaries, leaderboard-v1, leaderboard-v2: "
        "piqa,canaries.",
    )
    corpus: str | None = option(
        "Measure a model that only reads, on a .txt or .jsonl file (`text`, and `query` or "
        "`label`), or a folder in BEIR's form.",
        _QUALITY,
        metavar="PATH",
    )
    limit: int | None = _count("Use only this many items from the start of each task.", _QUALITY)
    num_fewshot: int | None = option(
        "Few-shot examples in the prompt.", _QUALITY, default="the task's own"
    )
    apply_chat_template: bool = _flag("Format prompts with the chat template.", _QUALITY)
    include_path: Path | None = option("Folder with your own task files.", _QUALITY)
    run_code: RunCode | None = option(
        "Run programs that the model writes, as humaneval_instruct does: confined by bubblewrap "
        "(Linux), without a "
        "network, other processes or your files; or unconfined, with all your rights.",
        _QUALITY,
        metavar="HOW",
        default="confined if HF_ALLOW_CODE_EVAL=1",
    )
    show_flips: int | None = option(
        "Show up to N items of each task that only one model gets right.", _QUALITY, metavar="N"
    )
    sequence_length: int | None = option(
        "Tokens per perplexity window.",
        _QUALITY,
        default=f"{DEFAULT_LENGTH}, or the model's limit",
        minimum=2,
    )
    max_windows: int | None = _count(
        "Use only this many windows from the start of each text.",
        _QUALITY,
        default="all, or the text's protocol",
    )
    bos: bool = _flag("Begin every perplexity window with the BOS token.", _QUALITY)
    prompt: str | None = _prompt(panel=_QUALITY)
    batch_size: str | int = option(
        "Text windows or task requests per forward pass; auto suits the device.",
        _QUALITY,
        unset=AUTO,
    )
    dtype: str | None = _dtype()
    device: str = _device()
    stream: bool | None = _stream()
    device_map: DeviceMap | None = _device_map()
    output: Path | None = _result_file()
    force: bool = _flag("Overwrite existing output, and measure everything again.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class BenchRequest(SizesRequest):
    """What to time."""

    experts_per_token: int | None = _experts_per_token()
    prompt: bool = _flag("Time prompt processing (prefill).")
    generation: bool = _flag("Time generation (prefill and decode).", default="both")
    batch_size: int | None = _count(
        "Prompts per batch.",
        _WORKLOAD,
        default="1; generation: 64, or 4 on a CPU; texts: 1, 8 and 32",
    )
    prompt_length: int | None = _count(
        "Tokens per prompt.", _WORKLOAD, default="2048, or 512 on a CPU; generation: 64; texts: 128"
    )
    new_tokens: int | None = _count(
        "Tokens to generate per prompt.", _WORKLOAD, default="128, or 32 on a CPU"
    )
    sweep: Sequence[str] = _repeated(
        'Time each combination: "batch=1,8,32 prompt=128,2048 new=64". May be repeated.',
        _WORKLOAD,
        metavar="TEXT",
    )
    iterations: int | None = _count(
        "Timed runs of each model.",
        _TIMING,
        default="50, or 10 on a CPU; generation: 10; query: 50",
    )
    warmup: int | None = option(
        "Untimed runs of each model before timing.", _TIMING, default="until times are stable"
    )
    compile: bool = _flag("Run the models through torch.compile.", MACHINE)
    threads: int | None = _count(
        "CPU threads.", MACHINE, default="torch's choice", maximum=_MAX_THREADS
    )
    dtype: str | None = _dtype()
    device: str = _device()
    output: Path | None = _result_file()
    force: bool = _force()
    engine: str = option(
        "transformers, llama.cpp, vllm, or a plugin's engine: see `sleb plugins`.",
        unset=TRANSFORMERS,
    )
    source: Path | None = option(
        "A GGUF file of the model, for engines that read GGUF.", MACHINE, metavar="GGUF"
    )


@dataclass(frozen=True, kw_only=True)
class ExportRequest(OneSizeRequest):
    """A format that another tool or a reader takes."""

    more: Sequence[str] = field(
        default=(),
        kw_only=False,
        metadata=_argument("More plans, for --to table.", "PLAN", repeated=True),
    )
    to: str = option(
        "report, table, llama-quantize, mergekit, indices, or a plugin's format.",
        unset=MISSING,
        metavar="FORMAT",
    )
    source: Path | None = option("A GGUF file of the model, for llama-quantize.", metavar="GGUF")
    output: Path | None = option(
        "Write this file; a table ends in .md, .csv or .tex, a figure in .svg or .pdf.",
        default="text to stdout, or a file named after the plan",
    )
    force: bool = _force()
