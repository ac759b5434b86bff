"""Every option of apply, eval, bench and export on trained models: values of any two options are tried together.

Set SLEB_GEMMA3 to a folder of Gemma 3 270M for a second model, whose blocks are of two kinds.
"""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from conftest import calibration, write_task
from gguf_models import convert_llama, metadata_of
from reference import plain_loss
from sleb_cli.__main__ import main
from sleb_cli.app import app
from sleb_cli.engine.output import proof

WINDOW = 64
SUBJECTS = ("MODEL --blocks 0,7", "PLAN", "PLAN --model MODEL --any-model")
"""A plan and a list name two blocks, so that --remove 1 has something to leave out."""

DTYPES = ("", "--dtype float32", "--dtype float16", "--dtype bfloat16")
COMMON = {"code": ("", "--trust-remote-code"), "screen": ("--json", "--json --quiet"), "force": ("", "--force")}

OPTIONS: dict[str, dict[str, Sequence[str]]] = {
    "apply": {
        "subject": SUBJECTS,
        "remove": ("", "--remove 1"),
        "dtype": DTYPES,
        "shards": ("", "--max-shard-size 40MB"),
        "proof": ("", "--no-verify", "--keep-failed failed"),
        "recovery": (
            "",
            "--recover --calibration TEXT --samples 5 --sequence-length 16",
            "--recover --heal --heal-tokens 64 --calibration TEXT --samples 5 --sequence-length 16",
            "--heal --heal-minutes 0.02 --calibration TEXT --samples 5 --sequence-length 16",
        ),
        "resume": ("", "--resume"),
        "seed": ("", "--seed 1"),
        "device": ("", "--device cpu"),
        "stream": ("", "--stream", "--no-stream"),
        "map": ("", "--device-map auto"),
        "source": ("", "--source GGUF"),
        "output": ("", "-o out", "-o out.gguf"),
        **COMMON,
    },
    "eval": {
        "subject": (*SUBJECTS, "MODEL"),
        "sizes": ("", "--remove 1,2", "--every 1"),
        "quality": (
            "--perplexity TEXT --sequence-length 64 --max-windows 2",
            "--tasks local_piqa --include-path TASKS --limit 4",
            "--perplexity TEXT --sequence-length 64 --max-windows 2 --tasks local_piqa --include-path TASKS --limit 4",
        ),
        "examples": ("", "--num-fewshot 1"),
        "chat": ("", "--apply-chat-template"),
        "flips": ("", "--show-flips 2"),
        "stride": ("", "--stride 16"),
        "bos": ("", "--bos"),
        "batch": ("", "--batch-size 2", "--batch-size auto"),
        "cache": ("", "--fresh"),
        "dtype": DTYPES,
        "device": ("", "--device cpu"),
        "stream": ("", "--stream", "--no-stream"),
        "map": ("", "--device-map auto"),
        "output": ("", "-o result.json"),
        **COMMON,
    },
    "bench": {
        "subject": (*SUBJECTS, "MODEL"),
        "sizes": ("", "--remove 1,2", "--every 1"),
        "workload": ("--prompt", "--generation", "--prompt --generation"),
        "batch": ("", "--batch-size 2", "--sweep batch=1,2"),
        "lengths": ("--prompt-length 8 --new-tokens 3", "--prompt-length 8 --sweep new=2,3"),
        "iterations": ("--iterations 1", "--iterations 2", ""),
        "warmup": ("--warmup 0", "--warmup 1", ""),
        "cooldown": ("", "--cooldown 0.01"),
        "cache": ("", "--static-cache"),
        "threads": ("", "--threads 1"),
        "dtype": DTYPES,
        "device": ("", "--device cpu"),
        "engine": ("", "--engine transformers"),
        "source": ("", "--source GGUF"),
        "estimate": ("", "--estimate"),
        "hardware": ("", "--device-flops 989e12 --device-bandwidth 3.35e12"),
        "output": ("", "-o result.json"),
        **COMMON,
        "screen": ("--json", "--json --quiet", "--markdown"),
    },
    "export": {
        "subject": SUBJECTS,
        "remove": ("", "--remove 1"),
        "format": [
            f"--to {name}"
            for name in (
                "report figures summary csv jsonl gguf hf vllm draft ollama llama-quantize mergekit indices".split()
            )
        ],
        "source": ("", "--source GGUF"),
        "output": ("", "-o out"),
        **COMMON,
    },
}  # fmt: skip

ELSEWHERE = {
    "--help": "no work",
    "--output": "tried as -o",
    "--push": "needs the Hub: test_push.py",
    "--public": "needs the Hub: test_push.py",
    "--revision": "needs the Hub: test_hub.py",
    "--compile": "minutes a model: test_bench.py",
    "--chat": "needs a chat model: test_chat_model.py",
    "--config": "changes no work: test_config_file.py",
    "--save-config": "changes no work: test_config_file.py",
    "--run-code": "needs tasks of its own: test_eval.py",
    "--max-task-drop": "needs a task of its own: test_how_far.py",
}


Rule = tuple[str, str, str]
"""Two values that contradict each other, as patterns of the option and its words, and what is said of them."""


def holds(rule: Rule, values: Mapping[str, str]) -> bool:
    """Whether both are among these values."""
    words = [f"{option}={value}" for option, value in values.items()]
    return all(any(re.fullmatch(pattern, word) for word in words) for pattern in rule[:2])


FOLDER = "source="
GGUF = "source=.+"
REFUSED: dict[str, Sequence[Rule]] = {
    "apply": (
        ("recovery=(--recover (?!--heal).*)?", "resume=.+", "--resume requires --heal"),
        ("recovery=", "(seed|device)=.+", "requires --recover or --heal"),
        ("recovery=.*--heal.*", "stream=--stream", "--heal trains the model"),
        ("recovery=.*--heal.*", "map=.+", "--heal trains, so it needs all weights on its device"),
        ("stream=--stream", "map=.+", "--stream"),
        ("device=.+", "map=.+", "--device-map names the devices"),
        ("output=.*gguf", FOLDER, "can only be made from a GGUF file of the model"),
        ("output=-o out", GGUF, "does not end in .gguf"),
        ("(dtype|shards|stream|map)=.+", GGUF, "does not apply to a GGUF file"),
        ("recovery=.+", GGUF, "names one of another model"),
        ("subject=.*--any-model", GGUF, "--model does not apply with --source"),
    ),
    "eval": (
        ("subject=MODEL", "sizes=--remove.*", "No blocks given"),
        ("subject=MODEL", "sizes=--every.*", "needs a plan or --blocks"),
        ("quality=.*--tasks.*", "stream=--stream", "--tasks needs the whole model in memory"),
        ("stream=--stream", "map=.+", "--stream"),
        ("device=.+", "map=.+", "--device-map names the devices"),
    ),
    "bench": (
        ("subject=MODEL", "sizes=--remove.*", "No blocks given"),
        ("subject=MODEL", "sizes=--every.*", "needs a plan or --blocks"),
        (GGUF, "estimate=", "--source requires --engine"),
        (GGUF, "estimate=.+", "--source does not apply to --estimate"),
        ("hardware=.+", "estimate=", "--estimate"),
        ("(cache|iterations|warmup|cooldown)=.+", "estimate=.+", "does not apply to --estimate"),
        ("screen=--markdown", "estimate=.+", "--markdown does not apply to --estimate"),
        ("(threads|device)=.+", "hardware=.+", "does not apply to --device-flops"),
    ),
    "export": (
        (
            "format=--to (report|figures|summary|csv|jsonl|hf|vllm|draft|mergekit|indices)",
            GGUF,
            "--source does not apply to",
        ),
        ("format=--to gguf", FOLDER, "Name one with --source"),
        ("format=--to (report|figures|summary|csv|jsonl|draft)", "subject=MODEL.*", "describes a plan"),
    ),
}


Item = tuple[str, str]
"""An option and its value."""


def all_pairs(command: str) -> Iterator[tuple[dict[str, str], Rule | None]]:
    """Yield all values of any two options, and the rule by which they contradict each other, if they do."""
    items = [(option, value) for option, values in OPTIONS[command].items() for value in values]
    for one, other in combinations(items, 2):
        if one[0] != other[0]:
            values = dict((one, other))
            yield values, next((rule for rule in REFUSED[command] if holds(rule, values)), None)


def covering(command: str) -> Iterator[dict[str, str]]:
    """Yield few sets of values such that any two values that go together are in one of them."""
    wanted: dict[frozenset[Item], None] = {}
    refused: dict[frozenset[Item], None] = {}
    for values, rule in all_pairs(command):
        (refused if rule else wanted)[frozenset(values.items())] = None

    def completed(chosen: tuple[Item, ...]) -> tuple[Item, ...] | None:
        """Return a value for every option, each the one that adds the most pairs; None if none goes with the others."""
        able = {
            option: [
                item for item in product([option], values) if not any(frozenset({item, c}) in refused for c in chosen)
            ]
            for option, values in OPTIONS[command].items()
            if option not in dict(chosen)
        }
        if not able:
            return chosen
        items = able[min(able, key=lambda option: len(able[option]))]
        items.sort(key=lambda item: -sum(frozenset({item, other}) in wanted for other in chosen))
        return next(filter(None, (completed((*chosen, item)) for item in items)), None)

    while wanted:
        pair = next(iter(wanted))
        del wanted[pair]
        if found := completed(tuple(sorted(pair))):
            for covered in combinations(found, 2):
                wanted.pop(frozenset(covered), None)
            yield {option: dict(found)[option] for option in OPTIONS[command]}


CASES = [
    pytest.param(command, values, id=f"{command} {' '.join(filter(None, values.values()))}")
    for command in OPTIONS
    for values in covering(command)
] + [
    pytest.param(command, values, id=f"{command} refuses {' '.join(filter(None, values.values()))}")
    for command in OPTIONS
    for values, rule in all_pairs(command)
    if rule
]


@dataclass(frozen=True)
class Trained:
    """A trained model, with what its cases take as their arguments, and what it computes by transformers alone."""

    folder: Path
    arguments: Mapping[str, object]
    losses: dict[frozenset[int], float]

    @property
    def overflows_float16(self) -> bool:
        """Whether its hidden states exceed 65,504."""
        return str(json.loads((self.folder / "config.json").read_text())["model_type"]).startswith("gemma3")

    def loss(self, removed: Iterable[int]) -> float:
        """Return the loss of the first two windows of the text without these blocks, in float32."""
        key = frozenset(removed)
        if key not in self.losses:
            self.losses[key] = self.loss_of(self.folder, key)
        return self.losses[key]

    def loss_of(self, folder: Path, skipped: Iterable[int] = ()) -> float:
        """Return that loss of another checkpoint."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(self.folder)(Path(str(self.arguments["TEXT"])).read_text()).input_ids
        return plain_loss(model, model.model.layers, torch.tensor(tokens[: 2 * WINDOW]).view(2, WINDOW), set(skipped))


def gemma3() -> Path:
    if not (named := os.environ.get("SLEB_GEMMA3")):
        pytest.skip("SLEB_GEMMA3 does not name a folder of Gemma 3 270M")
    return Path(named)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def trained(request, shared_data, tmp_path_factory):
    folder = request.getfixturevalue("smollm2") if request.param == "smollm2" else gemma3()
    place = tmp_path_factory.mktemp("trained")
    text, plan = place / "text.txt", place / "plan.json"
    text.write_text((shared_data / "text" / "enwiki_test.txt").read_text()[:20_000])
    words = ["search", folder, "--remove", 2, "--metric", "magnitude", "--strategy", "oneshot", "--sample-tokens", 0]
    assert main([str(word) for word in [*words, *calibration(text, 1, 8), "-o", plan, "-q"]]) == 0
    items = map(json.loads, (shared_data / "tasks" / "piqa.jsonl").read_text().splitlines())
    write_task(place / "tasks", "local_piqa", items, doc_to_text="{{query}}Answer:")
    arguments = {"MODEL": folder, "PLAN": plan, "TEXT": text, "TASKS": place / "tasks"}
    if request.param == "smollm2":
        arguments["GGUF"] = convert_llama(folder, place / "model.gguf", Type.F16)
    return Trained(folder, arguments, {})


@pytest.mark.slow
@pytest.mark.parametrize(("command", "values"), CASES)
def test_options_together(run_sleb, trained, tmp_path, monkeypatch, without_memory, command, values):
    monkeypatch.setattr(proof, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(proof, "NEW_TOKENS", 2)
    words = [word for value in values.values() for word in shlex.split(value)]
    if "GGUF" in words and "GGUF" not in trained.arguments:
        pytest.skip("there is no GGUF file of this model")
    values = {option: values.get(option, choices[0]) for option, choices in OPTIONS[command].items()}
    words = [word for value in values.values() for word in shlex.split(value)]
    arguments = {**trained.arguments, "PLAN": shutil.copy(trained.arguments["PLAN"], tmp_path)}
    words = [str(arguments.get(word, word)) for word in words]
    result = run_sleb(command, *words)
    if rules := [rule for rule in (*REFUSED[command], *refused_by(trained)) if holds(rule, values)]:
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2
        assert any(sentence in said for _, _, sentence in rules), said
        return
    if result.exit_code == 4 and "float16" in words and trained.overflows_float16:
        assert re.search("NaN|nan|infinity", result.stderr), result.stderr
        return
    assert result.exit_code == 0, result.stderr
    removed = removed_by(trained, values)
    CHECKS[command](trained, values, result, removed)


def refused_by(trained):
    """Return what this model refuses, beyond what contradicts itself."""
    has_template = AutoTokenizer.from_pretrained(trained.folder).chat_template
    return [] if has_template else [("chat=.+", "quality=.*--tasks.*", "chat template")]


def removed_by(trained, values):
    """Return the blocks that go, in order."""
    if named := re.search("--blocks (\\S+)", values["subject"]):
        blocks = [int(block) for block in named[1].split(",")]
    else:
        plan = json.loads(Path(trained.arguments["PLAN"]).read_text())
        blocks = [] if values["subject"] == "MODEL" else plan["removals"]
    return blocks[:1] if values.get("remove") else blocks


def check_files(trained, values, written, removed):
    """Check a checkpoint or GGUF file as `apply` writes it."""
    if written["kind"] == "gguf":
        assert metadata_of(Path(written["file"]))["sleb.removed_blocks"] == removed
        assert written["verified"] == (values.get("proof") != "--no-verify")
    else:
        own = json.loads((trained.folder / "config.json").read_text())["dtype"]
        dtype = (values.get("dtype") or f"--dtype {own}").split()[1]
        files = list(Path(written["folder"]).glob("*.safetensors"))
        for path in files:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                assert {file.get_tensor(name).dtype for name in names} == {getattr(torch, dtype)}
            assert not values.get("shards") or path.stat().st_size < 40_100_000 or len(names) == 1
        assert len(files) > 1 or not values.get("shards")
        found, dense = trained.loss_of(written["folder"]), trained.loss(())
        if values.get("recovery"):
            assert dense - 0.1 < found < trained.loss(removed) + 1.5  # 80 tokens promise no gain
        else:
            assert found == pytest.approx(trained.loss(removed), rel=1e-3)
    assert (written["proof"] is None) == (values.get("proof") == "--no-verify")
    if written["proof"]:
        assert written["proof"]["logits_difference"] == 0
    if values.get("recovery"):
        assert math.isfinite(written["recovery"]["pruned"]["loss"])


def check_apply(trained, values, result, removed):
    written = json.loads(result.stdout)
    assert written["removals"] == removed
    check_files(trained, values, written, removed)


def check_eval(trained, values, result, removed):
    data = json.loads(result.stdout)
    sizes = [removed[:count] for count in (range(1, len(removed) + 1) if values["sizes"] else [len(removed)])]
    assert data["sizes"] == [size for size in sizes if size]
    assert (len(data["texts"]), len(data["tasks"]) > 0) == ("TEXT" in values["quality"], "--tasks" in values["quality"])
    for text in data["texts"]:
        for scores in (text["dense"], *text["pruned"]):
            expected = trained.loss(scores.get("removals", ()))
            plain = not values["stride"] and not values["bos"]
            within = 1.0 if not plain else 1e-4 if "float32" in values["dtype"] else 0.03
            assert math.log(scores["perplexity"]) == pytest.approx(expected, abs=within * max(1, expected))
    for task in data["tasks"]:
        assert task["doc_ids"] == [0, 1, 2, 3]
        assert task["num_fewshot"] == (1 if values["examples"] else 0)
        for scores in (task["dense"], *task["pruned"]):
            assert scores["value"] == pytest.approx(sum(scores["items"]) / 4)
    assert Path("result.json").exists() == bool(values["output"])


def check_bench(trained, values, result, removed):
    if values["screen"] == "--markdown":
        assert result.stdout.startswith("|")
        return
    data = json.loads(result.stdout)
    assert data["kind"] == ("estimate" if values["estimate"] else "bench")
    if not values["estimate"]:
        counts = range(1, len(removed) + 1) if values["sizes"] else [len(removed)]
        for workload in data["workloads"]:
            assert [len(pruned["removals"]) for pruned in workload["pruned"]] == [count for count in counts if count]
            for timing in (workload["dense"], *workload["pruned"]):
                assert len(timing["e2els"]) == int(values["iterations"].removeprefix("--iterations ") or 10)
                assert all(0 < seconds < math.inf for seconds in timing["e2els"])
    assert Path("result.json").exists() == bool(values["output"])


def check_export(trained, values, result, removed):
    data = json.loads(result.stdout)
    assert data["exporter"] == values["format"].split()[1]
    for written in data["written"]:
        assert written["removals"] == removed
        check_files(trained, values, written, removed)
    files = [Path(file) for file in data["files"]]
    assert data["written"] or data["text"] or (files and all(file.exists() for file in files))


CHECKS = {"apply": check_apply, "eval": check_eval, "bench": check_bench, "export": check_export}


@pytest.mark.parametrize("command", OPTIONS)
def test_no_option_is_left_out(command):
    """A new option is added to the table, or is tried elsewhere."""
    parameters = get_command(app).commands[command].params
    spellings = [{*names} for p in parameters for names in (p.opts, p.secondary_opts) if names and names[0][0] == "-"]
    words = {word for values in OPTIONS[command].values() for value in values for word in value.split()}
    tried = {word for word in words if word.startswith("-")}
    assert [names for names in spellings if not names & (tried | ELSEWHERE.keys())] == []
    assert tried <= set().union(*spellings)
