"""Each option of each command changes what it leaves. What is kept is found again by all that it
depends on: with another option than before, a command starts anew.
"""

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest
from torch.nn import Embedding
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.main import get_command

from conftest import as_typed, calibration, llama_config, prose, save_model, write_task
from sleb_cli.__main__ import main
from sleb_cli.app import app
from sleb_cli.engine.recovery import saved_state
from sleb_cli.engine.search import journal
from sleb_cli.requests import (
    TARGET_NAMES,
    ApplyRequest,
    BenchRequest,
    EvalRequest,
    ExportRequest,
    SearchRequest,
    option_of,
)

REQUESTS = {
    "search": SearchRequest,
    "apply": ApplyRequest,
    "eval": EvalRequest,
    "bench": BenchRequest,
    "export": ExportRequest,
}

PLAN = {"subject": "found.json", "model": "other", "any_model": True}
TEXT = {"calibration": "self:0.5,text.txt:0.5", "sequence_length": 24}

FIRST = {
    "search": {
        "model": "other",
        "remove": 2,
        "samples": 8,
        "holdout": 0.25,
        "sample_tokens": 4,
        **TEXT,
    },
    "apply": {
        **PLAN,
        "recover": True,
        "heal_tokens": 512,
        "samples": 20,
        "output": "out",
        **TEXT,
    },
    "eval": {
        **PLAN,
        "perplexity": "text.txt",
        "sequence_length": 24,
        "max_windows": 4,
        "tasks": "words",
        "include_path": "tasks",
        "limit": 6,
    },
    "bench": {
        **PLAN,
        "prompt": True,
        "batch_size": 1,
        "prompt_length": 8,
        "iterations": 2,
        "warmup": 0,
        "output": "taken",
        "force": True,
    },
    "export": {**PLAN, "to": "mergekit"},
}
"""The options of the first run, which leaves all that it can."""

NEXT = dict(
    line.strip().split(" = ")
    for line in """
    model = model
    subject = other.json
    output = elsewhere
    extend = other.json
    source = no.gguf
    more = other.json
    to = indices
    revision = main
    include_path = other tasks
    keep_failed = failed
    engine = steady
    dtype = bfloat16
    device = xpu:9
    device_map = sequential
    memory = 600KB
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
    "protect_first protect_last protect dtype batch_size trust_remote_code"
).split()
"""The options with which an interrupted search is another one: `--resume` is refused, `--force`
begins anew.
"""

ELSEWHERE = dict(
    line.strip().split(" = ")
    for line in """
    search resume = test_a_search_that_is_cut_off_and_resumed_makes_the_same_plan
    search force = test_an_existing_plan_is_not_overwritten
    apply heal = test_recover_trains_briefly_where_that_is_possible
    apply keep_failed = test_a_failed_proof_says_where_and_keeps_the_evidence
    apply force = test_only_force_replaces_a_checkpoint_and_nothing_else
    eval run_code = test_programs_run_only_with_permission
    eval show_flips = test_a_task_file_of_ones_own
    eval force = test_what_was_measured_before_is_not_measured_again
    export force = test_only_force_replaces_a_page
    export trust_remote_code = test_the_code_of_a_plan_is_required_by_every_command
    """.strip().splitlines()
)
"""The tests of options that change nothing here."""

LEFT = {}
"""What commands left, by their options."""

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
        kept = value.keys() - {"environment", "seconds", "outliers", "stable"}
        return {name: without_times(value[name], command) for name in kept}
    if isinstance(value, list):
        return [without_times(each, command) for each in value]
    if isinstance(value, float) and command == "bench":
        return "a time"
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
        (folder / model / "code.py").touch()
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
    (folder / "taken").touch()
    return folder


@pytest.fixture
def enter(materials, monkeypatch):
    """Enter a copy of a folder, always at the same place."""

    def enter(source):
        here = materials.with_name("here")
        shutil.rmtree(here, ignore_errors=True)
        monkeypatch.setenv("SLEB_CACHE", str(here / "cache"))
        monkeypatch.chdir(shutil.copytree(source, here))
        return here

    return enter


@pytest.fixture
def alone(run, enter, materials, steady, spread, without_memory):
    """Run a command where none was before, and return its exit code, its result, the shapes and
    places of its batches, and the files that are there.
    """
    spread(materials / "other", 0)
    return partial(run_alone, run, enter, materials)


def run_alone(run, enter, materials, command, options):
    key = repr((command, options))
    if key not in LEFT:
        here = enter(materials)
        batches = set()
        with register_module_forward_pre_hook(partial(note_batch, batches)):
            code, result, _ = run(command, options)
        files = {path for path in here.rglob("*") if "cache" not in path.parts}
        LEFT[key] = code, without_times(result, command), batches, files
    return LEFT[key]


def note_batch(batches, module, inputs):
    if isinstance(module, Embedding):
        is_placed_by_accelerate = hasattr(module, "_hf_hook")
        batches.add((inputs[0].shape, is_placed_by_accelerate))


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


def without_echo(code, result, *others):
    """Return what a command left without the options that its result repeats."""
    echo = {"request", "search", "commands"}
    return code, {name: result[name] for name in result.keys() - echo}, *others


@pytest.mark.parametrize(("command", "name"), CASES, ids=map("-".join, CASES))
def test_an_option_changes_what_a_command_leaves(alone, command, name):
    first = alone(command, FIRST[command])
    assert first[0] == 0, first
    changed = alone(command, with_step(command, name))
    is_tested_elsewhere = f"{command} {name}" in ELSEWHERE
    assert (without_echo(*changed) == without_echo(*first)) == is_tested_elsewhere


def test_each_option_stands_in_a_request_or_is_of_every_command():
    commands = get_command(app).commands
    assert commands.keys() - {"plugins"} == REQUESTS.keys()
    for command, request in REQUESTS.items():
        names = {each.name for each in commands[command].params}
        assert names - {each.name for each in fields(request)} == {"json", "quiet", "config"}
    texts = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [test for test in ELSEWHERE.values() if f"def {test}(" not in texts] == []


@pytest.mark.parametrize(
    ("command", "name"),
    [case if case[0] == "eval" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=map("-".join, CASES),
)
def test_a_second_run_in_one_process_equals_a_first_run(
    run, enter, alone, after_first, command, name
):
    options = with_step(command, name)
    expected_code, expected, *_ = alone(command, options)
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
    assert without_times(result, command) == expected
