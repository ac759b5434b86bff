"""Real models, tiny; a real tokenizer; and the real command line, driven through `main()`."""

import os
import sys
import tempfile
from pathlib import Path

if sys.dont_write_bytecode:
    # Tests start many processes, and each would compile torch and transformers anew.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "NO"  # in models that tests load themselves
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="sleb-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from threads, and each core runs one test at a time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "120"

import torch

if not torch.cuda.is_available():
    # transformers has torch look for triton, which takes a second to import, compiles nothing for
    # a CPU, and ends the run with two screens about functions that its binding leaked.
    sys.modules["triton"] = None

import atexit
import gc
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import typer
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations import accelerate
from transformers.utils import logging

import simulated_device
from encoders import add_modules, bert_config, save_reader, word_pieces
from sleb_cli import plugin_manager
from sleb_cli.__main__ import main
from sleb_cli.cache import cache_root
from sleb_cli.engine import device as engine_device
from sleb_cli.engine.forward import placement
from sleb_cli.engine.forward.block_weights import Visit
from sleb_cli.engine.forward.streaming import StreamedBlocks
from sleb_cli.engine.memory import shortage
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.demo import demo_folder
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.speed import benchmark
from sleb_cli.engine.text.calibration import draw
from sleb_cli.engine.text.windows import cut_windows, tokens_sha256
from sleb_cli.events import ignore
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import load_plugins
from tiny_sizes import TINY

logging.disable_progress_bar()
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# A shell has what it starts in the background ignore it, and what that starts, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = (
    "river mountain snow water stone bridge town mill fish field winter spring road horse letter "
    "king garden tower "
    "bread lamp window paper wind harbour ship sailor island map star night morning bell clock "
    "market silver wool"
).split()


@cache
def _installed(path: tuple[str, ...], group: str) -> Any:
    return entry_points(group=group)


# All commands share one tree of options, and one look through what is installed: most of the time
# of a command that is refused.
typer.main.get_command = cache(typer.main.get_command)
plugin_manager.entry_points = lambda group: _installed(tuple(sys.path), group)

# Read before each test gets its own cache: where `sleb search demo` left the 135M model.
USERS_CACHE = cache_root()


@dataclass(frozen=True)
class Result:
    """What a command did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def data(self) -> Any:
        """What `--json` prints."""
        return json.loads(self.stdout)

    @property
    def said(self) -> str:
        """What stderr says, however its lines are broken."""
        return " ".join(self.stderr.split())


def as_typed(arguments: Iterable[object]) -> list[str]:
    """Return the words of a command: the first text and options may hold several, as typed."""
    words: list[str] = []
    for argument in arguments:
        if isinstance(argument, str) and (not words or argument.startswith("-")):
            words += argument.split()
        else:
            words.append(str(argument))
    return words


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Play a processor that computes in these data types besides float32; at first, in bfloat16."""

    def play(*dtypes: torch.dtype) -> None:
        monkeypatch.setattr(
            placement, "cpu_dtypes", lambda: {torch.float32, torch.float64, *dtypes}
        )

    play(torch.bfloat16)
    return play


@pytest.fixture(autouse=True)
def _little_to_collect() -> None:
    """Let the engine's `gc.collect()`, half of the time of a tiny model, pass over what was there
    before the test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_sleb(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `sleb` with these arguments, as `as_typed` takes them, in an empty folder, and return its
    exit code and both streams.
    """

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        words = as_typed(arguments)
        if words[:1] == ["search"] and "--sample-tokens" not in words:
            words += ["--sample-tokens", "6"]  # a whole sample takes longer than some searches
        code = main(words)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def search(
    run_sleb: Callable[..., Result], tiny_llama: Path, text_file: Path
) -> Callable[..., Result]:
    """Search a tiny model on a short text, and require an exit code."""

    def run(
        *options: object,
        model: Path = tiny_llama,
        text: object = text_file,
        samples: int = 4,
        code: int = 0,
    ) -> Result:
        result = run_sleb("search", model, *calibration(text, samples), *options)
        assert result.exit_code == code, result.stderr
        return result

    return run


@pytest.fixture
def found(search: Callable[..., Result], tmp_path: Path) -> Callable[..., Plan]:
    """Search, and return the plan."""

    def run(*options: object, **how: Any) -> Plan:
        search(*options, "--force", **how)
        return read_plan(tmp_path / "plan.json")

    return run


@pytest.fixture
def simulate(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., simulated_device.Backend]]:
    """Make the simulated accelerator available as `--device sim`, here and in processes that the
    test starts.
    """
    if reason := simulated_device.why_not():
        pytest.skip(reason)
    with ExitStack() as until_the_end, pytest.MonkeyPatch.context() as patch:

        def start(**settings: Any) -> simulated_device.Backend:
            simulated_device.for_children(tmp_path_factory.mktemp("backend"), patch, **settings)
            engine_device.has_float64.cache_clear()
            return until_the_end.enter_context(simulated_device.simulate(**settings))

        yield start
    engine_device.has_float64.cache_clear()


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """Return options that spread a model over so many devices, CPU memory and disk."""

    def options(model: Path, devices: int = 2) -> list[object]:
        size = 4 * sum(
            tensor.numel()
            for file in model.glob("*.safetensors")
            for tensor in load_file(file).values()
        )
        room = dict.fromkeys([*range(devices), "cpu"], size // 2)
        monkeypatch.setattr(accelerate, "accelerate_max_memory", lambda asked=None: dict(room))
        return ["--device-map", "sequential"]

    return options


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The blocks of each walk or pass through the weights of a streamed model."""
    visited: list[list[int]] = []
    visit = StreamedBlocks.visit

    def counted(self: StreamedBlocks, blocks: Sequence[int]) -> Visit:
        if blocks:
            visited.append(list(blocks))
        return visit(self, blocks)

    monkeypatch.setattr(StreamedBlocks, "visit", counted)
    return visited


@pytest.fixture
def sleb(run_sleb: Callable[..., Result]) -> Callable[..., Result]:
    """Run a command, which must end with this exit code, and give the result."""

    def run(*words: object, code: int = 0) -> Result:
        result = run_sleb(*words)
        assert result.exit_code == code, result.stderr
        return result

    return run


@pytest.fixture
def apply(sleb: Callable[..., Result]) -> Callable[..., Result]:
    """Apply something, by default to the folder `out`, and require an exit code."""
    return lambda *words, output="out", **how: sleb("apply", *words, "-o", output, **how)


def prose(sentences: int, seed: int = 0) -> str:
    """Return text that looks like sentences, the same for the same seed."""
    rng = random.Random(seed)
    lines = [
        " ".join(rng.choices(WORDS, k=rng.randint(5, 12))).capitalize() + "."
        for _ in range(sentences)
    ]
    return "\n".join(" ".join(lines[start : start + 6]) for start in range(0, sentences, 6))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(400))
    return path


def train_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; with `bos`, it begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(200)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with this chat template."""
    tokenizer = train_tokenizer(bos=False)
    tokenizer.chat_template = template
    return tokenizer


def architecture_of(folder: Path) -> Architecture:
    return read_architecture(locate_model(str(folder), ignore), load_plugins(), ignore)


def shortage_at(free: int) -> Callable[..., str | None]:
    """Return a `memory_shortage` of a device with so many free bytes."""
    return lambda needed, device, of="memory", **whole: shortage(needed, free, of)


def save_model(
    folder: Path, config: Any, *, seed: int = 0, bos: bool = False, **options: Any
) -> Path:
    """Save a random model of the real class, with weights large enough that every block matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder, **options)
    train_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name, however many files hold them, which may be
    written over.
    """
    files = folder.glob("model*.safetensors")
    return {name: tensor.clone() for path in files for name, tensor in load_file(path).items()}


def weight_bytes_of(folder: Path) -> dict[str, bytes]:
    """Return the weight files of a checkpoint by name, byte for byte."""
    return {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}


def beside_weights(names: Iterable[str]) -> set[str]:
    """Leave out the names of a checkpoint's weight files and of their index."""
    return {name for name in names if not name.startswith("model")}


def random_model(config: Any) -> Any:
    """Return a random model of the real class in memory, with weights large enough that every block
    matters.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.15)
    return model


def llama_config(blocks: int = 6, **changes: Any) -> LlamaConfig:
    """A Llama of some thousand parameters."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(num_hidden_layers=blocks, **(settings | changes))


def opt_config(blocks: int = 5) -> OPTConfig:
    """An OPT of some thousand parameters, with learned positions."""
    return OPTConfig(
        vocab_size=320,
        hidden_size=32,
        ffn_dim=64,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        num_hidden_layers=blocks,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def gpt2_config(blocks: int = 5, n_positions: int = 128) -> GPT2Config:
    """A GPT-2 of some thousand parameters: no adapter claims it, and its count key is n_layer."""
    return GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=blocks,
        n_head=4,
        n_positions=n_positions,
        bos_token_id=0,
        eos_token_id=1,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 6 blocks, in float32."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", llama_config())


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT with 5 blocks, whose tokenizer adds a BOS."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-opt", opt_config(), bos=True)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with 5 blocks."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", gpt2_config())


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with 6 blocks that embeds, as sentence-transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    prompts = {"query": "question: ", "document": "passage: "}
    return add_modules(save_reader(folder, word_pieces(prose(200))), prompts=prompts)


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with 6 blocks that scores pairs of texts."""
    return _save_classifier(tmp_path_factory.mktemp("models") / "tiny-reranker", 1)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with 6 blocks that puts texts into three classes."""
    return _save_classifier(tmp_path_factory.mktemp("models") / "tiny-classifier", 3)


def _save_classifier(folder: Path, classes: int) -> Path:
    config = bert_config(num_labels=classes)
    return save_reader(folder, word_pieces(prose(200)), config, AutoModelForSequenceClassification)


@pytest.fixture(scope="session")
def _found_plan(
    tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    plan = tmp_path_factory.mktemp("plans") / "llama-plan.json"
    few = ["--sample-tokens", 6, "-q"]
    words = ["search", tiny_llama, "--remove", 2, *calibration(text_file), "-o", plan, *few]
    assert main([str(word) for word in words]) == 0
    return plan


@pytest.fixture
def llama_plan(_found_plan: Path, tmp_path: Path) -> Path:
    """A plan of two removals for the tiny Llama, found by a real search."""
    return Path(shutil.copy(_found_plan, tmp_path))


def plan_bytes(path: Path) -> list[bytes]:
    """Return the plan as it stands in the file, without the two lines that tell the time."""
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if not line.strip().startswith((b'"started"', b'"seconds"'))]
    assert len(lines) == len(kept) + 2
    return kept


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the processes that measure the memory, most of the time of a tiny benchmark."""
    monkeypatch.setattr(
        benchmark, "measure_alone", lambda _, __, workloads, ___: (None, [None] * len(workloads))
    )


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tiny sizes of tiny_sizes.py instead of the usual ones."""
    for name, sizes in TINY.items():
        module = import_module(f"sleb_cli.engine.{name}")
        for size, value in sizes.items():
            usual = getattr(module, size)
            monkeypatch.setattr(
                module, size, replace(usual, **value) if isinstance(value, dict) else value
            )


@pytest.fixture
def as_plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let modules of these names be plugins, beside the installed ones."""

    def add(*names: str) -> None:
        ours = [EntryPoint(name, name, "sleb") for name in names]
        monkeypatch.setattr(
            plugin_manager, "entry_points", lambda group: [*entry_points(group=group), *ours]
        )

    return add


@pytest.fixture
def steady(as_plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer the engine of the example plugin, whose times follow from the bytes of the files."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "example_plugin")
    as_plugins("sleb_example")


def slow(value: Any) -> Any:
    """Return a parameter of a test that runs with the slow ones."""
    return pytest.param(value, marks=pytest.mark.slow)


def write_task(folder: Path, name: str, rows: Iterable[dict[str, Any]], **settings: Any) -> Path:
    """Write a task file and its items as lm-eval reads them; by default, multiple choice of q,
    choices and gold.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    } | settings
    file = folder / f"{name}.yaml"
    written = {key: value for key, value in task.items() if value is not None}
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    return file


def calibration(text: object, samples: int = 4, length: int = 32) -> list[object]:
    """Return options for a calibration that takes no time."""
    return ["--calibration", text, "--samples", samples, "--sequence-length", length]


def evaluation(text: Path) -> list[object]:
    """Return options for an evaluation that takes no time, and takes nothing from the cache."""
    return ["--perplexity", text, "--sequence-length", 32, "--max-windows", 4, "--force"]


def calibration_sequences(
    model: Path, text: Path, samples: int = 4, length: int = 32, *, bos: bool = False
) -> torch.Tensor:
    """Return the tokens that a search with `calibration` measures on, drawn the slow way."""
    windows = cut_windows(AutoTokenizer.from_pretrained(model), text.read_text(), length, bos=bos)
    return windows[draw(len(windows), samples, 0)]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, tasks and models beside the checkout; without them, tests that need them are
    skipped.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder does not lie beside this checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The trained 135M model, if `sleb search demo` has fetched it; otherwise, tests that need it
    are skipped.
    """
    if not any(USERS_CACHE.glob("demo-gguf-*/*.gguf")):
        pytest.skip("the demo model is not in the cache: run `sleb search demo --ratio 0.2` once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEB_CACHE", str(USERS_CACHE))
        return demo_folder(ignore)


def tokens_of_test_text(model, text, record):
    """Return the tokens of the last tenth of the text of a record, cut the slow way."""
    content = text.read_text()
    start = content.index("\n", round(0.9 * len(content))) + 1
    windows = cut_windows(AutoTokenizer.from_pretrained(model), content[start:], 32, bos=False)
    drawn = windows[draw(len(windows), record["test_text"]["sequences"], 0)]
    assert tokens_sha256(drawn) == record["test_text"]["tokens_sha256"]
    return drawn
