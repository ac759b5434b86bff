"""`sleb search --stream`: the same plan as in memory, from weights that are read once a step."""

import json
import os
import re
from dataclasses import replace

import pytest

from conftest import calibration, save_model
from families import tiny_config
from sleb_cli.engine.forward import holding, memory_budget, saved_walk, streaming
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import StreamedBlocks
from sleb_plugins import OutputError

FAMILIES = ["llama", "gemma3_text", "mixtral", "opt"]
WAYS = {
    "exact": [],
    "race": ["--fast"],
    "held out": ["--holdout", 0.3],
    "kl": ["--metric", "kl"],
    "mixed": ["--metric", "nll+0.5*kl"],
    "states": ["--metric", "cosine", "--strategy", "oneshot"],
    "spans": ["--metric", "angular", "--strategy", "contiguous"],
    "weights": ["--metric", "magnitude"],
    "refine": ["--strategy", "refine"],
}


def without_times(path):
    plan = json.loads(path.read_text())
    del plan["environment"]
    return plan


@pytest.fixture
def search(run_sleb, text_file, tmp_path):
    def run(model, name, *options, code=0):
        result = run_sleb("search", model, "--remove", 2, *calibration(text_file, 9), *options, "-o", f"{name}.json")
        assert result.exit_code == code, result.stderr
        return without_times(tmp_path / f"{name}.json") if code == 0 else result.stderr

    return run


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_is_that_of_the_model_in_memory(search, tiny_llama, way):
    assert search(tiny_llama, "streamed", "--stream", *WAYS[way]) == search(tiny_llama, "resident", *WAYS[way])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["exact", "race"])
def test_so_it_is_in_every_family(search, tmp_path, family, way):
    folder = save_model(tmp_path / "model", tiny_config(family))
    options = [*WAYS[way], "--dtype", "bfloat16"]
    assert search(folder, "streamed", "--stream", *options) == search(folder, "resident", *options)


@pytest.mark.parametrize("way", ["exact", "kl", "states", "spans"])
def test_hidden_states_that_do_not_fit_are_held_in_a_file(search, tiny_llama, way, monkeypatch):
    opened = []
    spill = holding.SpillFile
    monkeypatch.setattr(holding, "SpillFile", lambda *place: opened.append(place) or spill(*place))
    options = [*WAYS[way], "--batch-size", 1, "--samples", 12]
    spilled = search(tiny_llama, "streamed", "--stream", *options, "--memory", 300_000)
    assert opened
    assert spilled == search(tiny_llama, "resident", *options)


@pytest.mark.parametrize("way", ["exact", "race", "kl"])
def test_or_candidates_go_through_the_model_in_groups(search, tiny_llama, way, visits, monkeypatch):
    usual = replace(memory_budget.CPU_SETTINGS, head_positions=256, widened_bytes=2 << 20)  # what 760,000 bytes suit
    monkeypatch.setattr(memory_budget, "CPU_SETTINGS", usual)
    options = [*WAYS[way], "--batch-size", 1, "--samples", 12, "--sample-tokens", 0]
    grouped = search(tiny_llama, "streamed", "--stream", *options, "--memory", 760_000)
    groups = list(visits)
    assert grouped == search(tiny_llama, "resident", *options)
    visits.clear()
    search(tiny_llama, "at-once", "--stream", *options)
    assert len(groups) > len(visits)


def test_without_room_for_a_walk_the_search_goes_on(run_sleb, tiny_llama, text_file, monkeypatch):
    def full(path):
        raise OutputError(f"Cannot write {path}: the disk is full.", hint="Free some space.")

    monkeypatch.setattr(saved_walk, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(saved_walk, "SHARE", 1e9)
    monkeypatch.setattr(saved_walk, "new_file", full)
    result = run_sleb("search", tiny_llama, "--remove", 1, "--stream", *calibration(text_file), "-o", "plan.json")
    assert result.exit_code == 0
    assert result.stderr.count("the disk is full. A step that is interrupted will start again") == 1


@pytest.fixture
def visits(monkeypatch):
    """The blocks of each walk or pass through the weights."""
    visited, visit = [], StreamedBlocks.visit

    def counted(self, blocks):
        blocks = list(blocks)
        visited.extend([blocks] if blocks else [])
        return visit(self, blocks)

    monkeypatch.setattr(StreamedBlocks, "visit", counted)
    return visited


def test_a_step_reads_the_weights_once(search, tiny_llama, visits):
    plan = search(tiny_llama, "streamed", "--stream", "--batch-size", 2, "--sample-tokens", 0)
    *setting_up, dense, first, second = visits
    assert dense == first == list(range(6))
    assert second[-1] == 5
    assert second[0] >= plan["removals"][0]  # from the states that the first step has kept
    assert len(setting_up) <= 5


def test_it_streams_by_itself_what_does_not_fit(run_sleb, search, tiny_llama, text_file, monkeypatch):
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 100_000)
    assert search(tiny_llama, "streamed") == search(tiny_llama, "resident", "--no-stream")
    result = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file), "-o", "again.json")
    assert re.search(r"needs 305 kB of memory in float32, but only 100 kB are free on cpu", result.stderr)


REFUSED = {
    "taylor": (["--metric", "taylor"], "gradients"),
    "speed": (["--target-speedup", 1.2], "times the whole model"),
    "own text": (["--calibration", "self"], "write its own text"),
    "map": (["--device-map", "auto"], "two ways"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_the_whole_model_is_refused(run_sleb, tiny_llama, text_file, what):
    options, words = REFUSED[what]
    target = [] if "--target-speedup" in options else ["--remove", 1]
    result = run_sleb("search", tiny_llama, "--stream", *calibration(text_file), *target, *options)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


def test_a_search_that_ends_in_the_middle_of_a_walk_goes_on_from_there(search, tiny_llama, visits, monkeypatch):
    monkeypatch.setattr(saved_walk, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(saved_walk, "SHARE", 1e9)
    run_block, calls = SkippableModel.run_block, []

    def run(self, call, hidden):
        calls.append(call.block)
        if calls.count(0) > 18 and call.block == 4:  # nine batches of the dense model, and nine of the first step
            raise KeyboardInterrupt
        return run_block(self, call, hidden)

    options = ["--batch-size", 1, "--sample-tokens", 0]
    expected = search(tiny_llama, "resident", *options)
    monkeypatch.setattr(SkippableModel, "run_block", run)
    search(tiny_llama, "streamed", "--stream", *options, code=130)
    monkeypatch.setattr(SkippableModel, "run_block", run_block)
    visits.clear()
    assert search(tiny_llama, "streamed", "--stream", *options, "--resume") == expected
    assert visits[-2] == [4, 5]
    assert not [path for path in os.listdir() if "walk" in path]
