"""What is kept is found again by all that it depends on: with another option than before, a command
starts anew.
"""

import json
import shutil
from dataclasses import fields
from typing import get_type_hints

import pytest

from conftest import as_typed, calibration, llama_config, prose, save_model, write_task
from sleb_cli.__main__ import main
from sleb_cli.engine.recovery import saved_state
from sleb_cli.engine.search import journal
from sleb_cli.requests import (
    TARGET_NAMES,
    ApplyRequest,
    BenchRequest,
    EvalRequest,
    SearchRequest,
    option_of,
)

REQUESTS = {
    "search": SearchRequest,
    "apply": ApplyRequest,
    "eval": EvalRequest,
    "bench": BenchRequest,
}

TEXT = {"calibration": "self:0.5,text.txt:0.5", "sequence_length": 24}

FIRST = {
    "search": {
        "model": "model",
        "remove": 2,
        "samples": 8,
        "holdout": 0.25,
        "sample_tokens": 4,
        **TEXT,
    },
    "apply": {
        "subject": "found.json",
        "recover": True,
        "heal": True,
        "heal_tokens": 512,
        "samples": 20,
        "output": "out",
        **TEXT,
    },
    "eval": {
        "subject": "found.json",
        "perplexity": "text.txt",
        "sequence_length": 24,
        "max_windows": 4,
        "tasks": "words",
        "include_path": "tasks",
        "limit": 6,
    },
    "bench": {
        "subject": "found.json",
        "prompt": True,
        "batch_size": 1,
        "prompt_length": 8,
        "iterations": 2,
        "warmup": 0,
    },
}
"""The options of the first run, which leaves all that it can."""

NEXT = dict(
    line.strip().split(" = ")
    for line in """
    model = other
    subject = other.json
    output = elsewhere
    extend = other.json
    source = no.gguf
    revision = main
    include_path = other tasks
    keep_failed = failed
    engine = steady
    dtype = bfloat16
    device = cpu
    device_map = auto
    memory = 1GB
    threads = 2
    batch_size = 3
    unit = experts
    ratio = 0.5
    target_params = 40K
    target_memory = 100KB
    max_perplexity_ratio = 3
    serve_length = 64
    metric = cosine
    prompt = query
    corpus = text.txt
    strategy = contiguous
    calibration = text.txt
    seed = 1
    chat = answers
    holdout = 0.4
    blocks = 2,3
    every = 1
    protect = 2
    protect_kind = full_attention
    protect_first = 2
    protect_last = 2
    scripts = latin
    max_shard_size = 20KB
    experts_per_token = 1
    perplexity = text.txt,other.txt
    tasks = words,letters
    num_fewshot = 1
    run_code = confined
    show_flips = 3
    sweep = batch=1,2 prompt=8
    new_tokens = 3
    remove = 1
    against = other
    """.strip().splitlines()
)
"""What an option becomes that is neither a flag nor a number of the first run."""

TIMED = {"heal_minutes"}
"""How far these go is for a clock to say."""

ANOTHER_SEARCH = (
    "model metric strategy fast calibration samples sequence_length seed holdout "
    "protect_first protect_last protect dtype batch_size"
).split()
"""The options with which an interrupted search is another one: `--resume` is refused, `--force`
begins anew.
"""

CASES = [
    (command, each.name)
    for command in REQUESTS
    for each in fields(REQUESTS[command])
    if each.name not in TIMED
]


def with_step(command, name):
    """Return the options of the first run with one of them changed."""
    options = dict(FIRST[command])
    now = options.get(name, False)
    if type(now) is int:
        value = now + 1
    elif get_type_hints(REQUESTS[command])[name] in (bool, bool | None):
        value = not now
    else:
        value = NEXT[name]
    if name in TARGET_NAMES:
        options = {key: each for key, each in options.items() if key not in TARGET_NAMES}
    return options | {name: value}


def without_times(value, command):
    """Return a result without what differs from run to run."""
    if isinstance(value, dict):
        timed = {"environment", "seconds"}
        if command == "bench":
            timed |= {"dense", "pruned", "warmup"}
        kept = value.keys() - timed
        return {name: without_times(value[name], command) for name in kept}
    if isinstance(value, list):
        return [without_times(each, command) for each in value]
    # The last digits depend on the size of batches, and on whether the model is streamed.
    return pytest.approx(value, rel=2e-5) if isinstance(value, float) else value


@pytest.fixture
def run(run_sleb, monkeypatch):
    """Run a command that leaves all that it found, and return its exit code, its result and what it
    says.
    """
    monkeypatch.setattr(journal, "delete_journal", lambda *of: None)
    monkeypatch.setattr(saved_state, "delete_states", lambda output: None)
    monkeypatch.setattr(saved_state, "SECONDS_BETWEEN_SAVES", 0.0)

    def run(command, options):
        found = [command]
        for each in fields(REQUESTS[command]):
            value = options.get(each.name, False)
            if value is False:
                continue
            if not each.metadata["doc"].argument:
                found.append(option_of(each.name))
            if value is not True:
                found.append(value)
        result = run_sleb(*found, "--json")
        return result.exit_code, json.loads(result.stdout or "null"), result.stderr

    return run


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    """Two of each: models, plans, texts, folders of tasks."""
    folder = tmp_path_factory.mktemp("materials")
    for seed, (model, plan) in enumerate({"model": "found", "other": "other"}.items()):
        save_model(folder / model, llama_config(), seed=seed)
        text = folder / ("other.txt" if seed else "text.txt")
        text.write_text(prose(300, seed=seed))
        how = [*calibration(text, samples=2, length=16), "--sample-tokens 0 --quiet"]
        words = ["search", folder / model, "--remove 2", *how, "-o", folder / f"{plan}.json"]
        assert main(as_typed(words)) == 0
        for name in ("words", "letters"):
            questions = [(f"{name} {number}", (number + seed) % 3) for number in range(12)]
            rows = [
                {"q": q, "choices": ["river", "stone", "mill"], "gold": gold}
                for q, gold in questions
            ]
            write_task(folder / ("other tasks" if seed else "tasks"), name, rows)
    return folder


@pytest.fixture
def enter(tmp_path, monkeypatch):
    """Enter a copy of a folder, always at the same place."""

    def enter(source):
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "here" / "cache"))
        monkeypatch.chdir(shutil.copytree(source, tmp_path / "here"))
        return tmp_path / "here"

    return enter


@pytest.fixture
def after_first(run, enter, materials, tmp_path_factory):
    """Return a folder in which the first run of a command was."""

    def after_first(command):
        folder = materials.with_name(f"{materials.name}-{command}")
        if not folder.exists():
            here = enter(materials)
            code, _, said = run(command, FIRST[command])
            assert code == 0, said
            shutil.rmtree("out", ignore_errors=True)
            shutil.copytree(here, folder)
        return folder

    return after_first


@pytest.mark.parametrize(
    ("command", "name"),
    [case if case[0] == "eval" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=map("-".join, CASES),
)
def test_a_second_run_in_one_process_equals_a_first_run(
    run, enter, after_first, materials, steady, without_memory, command, name
):
    options = with_step(command, name)
    enter(materials)
    expected_code, expected, _ = run(command, options)
    enter(after_first(command))
    if command == "search":
        code, result, said = run(command, options | {"resume": True, "force": True})
        is_another = "plan.json.journal belongs to another search" in said
        assert is_another == (name in ANOTHER_SEARCH), said
        if is_another:
            code, result, said = run(command, options | {"force": True})
    else:
        code, result, said = run(command, options)
    assert code == expected_code, said
    assert without_times(result, command) == without_times(expected, command)
