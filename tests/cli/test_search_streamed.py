"""`sleb search --stream`: the same plan as in memory, from weights that are read once a step."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from conftest import calibration, save_model
from families import tiny_config
from sleb_cli.engine.forward import memory_budget, saved_walk, streaming
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_plugins import OutputError

WAYS = {
    "race": ["--fast"],
    "held out": ["--holdout", 0.3],
    "kl": ["--metric", "kl"],
    "states": ["--metric", "cosine", "--strategy", "oneshot"],
    "spans": ["--metric", "angular", "--strategy", "contiguous"],
    "weights": ["--metric", "magnitude"],
    "exact": ["--strategy", "refine"],
}
ONE_BY_ONE = ["--batch-size", 1, "--samples", 12, "--sample-tokens", 0]


@pytest.fixture
def search(run_sleb, text_file, tmp_path):
    def run(model, *options, code=0):
        given = ["--remove", 2, *calibration(text_file, 9), "-o", "plan.json", "--force"]
        result = run_sleb("search", model, *given, *options)
        assert result.exit_code == code, result.stderr
        if code:
            return None
        plan = json.loads((tmp_path / "plan.json").read_text())
        del plan["environment"]
        return plan

    return run


CASES = [(None, way, ()) for way in WAYS] + [
    (family, way, ("--dtype", "bfloat16")) for family, way in (("gemma3_text", "race"), ("mixtral", "exact"))
]


@pytest.mark.parametrize(("family", "way", "options"), CASES)
def test_the_plan_is_that_of_the_model_in_memory(search, tiny_llama, tmp_path, family, way, options):
    model = save_model(tmp_path / "model", tiny_config(family)) if family else tiny_llama
    assert search(model, "--stream", *WAYS[way], *options) == search(model, *WAYS[way], *options)


@pytest.mark.parametrize("way", ["kl", "spans"])
def test_hidden_states_that_do_not_fit_wait_in_a_file(search, tiny_llama, way, monkeypatch):
    files, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *given, **how: files.append(given) or from_file(*given, **how))
    spilled = search(tiny_llama, "--stream", *WAYS[way], *ONE_BY_ONE, "--memory", 300_000)
    assert files
    assert spilled == search(tiny_llama, *WAYS[way], *ONE_BY_ONE)


@pytest.mark.parametrize("way", ["race", "kl"])
def test_or_candidates_go_through_the_model_in_groups(search, tiny_llama, way, visits, monkeypatch):
    usual = replace(memory_budget.CPU_SETTINGS, head_positions=256, widened_bytes=2 << 20)  # what 760,000 bytes suit
    monkeypatch.setattr(memory_budget, "CPU_SETTINGS", usual)
    grouped = search(tiny_llama, "--stream", *WAYS[way], *ONE_BY_ONE, "--memory", 760_000)
    groups = list(visits)
    assert grouped == search(tiny_llama, *WAYS[way], *ONE_BY_ONE)
    visits.clear()
    search(tiny_llama, "--stream", *WAYS[way], *ONE_BY_ONE)
    assert len(groups) > len(visits)


def test_a_step_reads_the_weights_once(search, tiny_llama, visits):
    plan = search(tiny_llama, "--stream", "--batch-size", 2, "--sample-tokens", 0)
    *setting_up, dense, first, second = visits
    assert dense == first == list(range(6))
    assert second[-1] == 5
    assert second[0] >= plan["removals"][0]  # from the states that the first step has kept
    assert len(setting_up) <= 5


def test_a_model_that_does_not_fit_is_streamed(run_sleb, search, tiny_llama, text_file, monkeypatch):
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 100_000)
    assert search(tiny_llama) == search(tiny_llama, "--no-stream")
    result = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file), "-o", "again.json")
    assert re.search(r"needs 305 kB of memory in float32, but only 100 kB are free on cpu", result.stderr)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--remove", 1, "--metric", "taylor"], "gradients"),
        (["--target-speedup", 1.2], "times the whole model"),
        (["--remove", 1, "--calibration", "self"], "write its own text"),
        (["--remove", 1, "--device-map", "auto"], "two ways"),
    ],
)
def test_what_needs_the_whole_model_is_refused(run_sleb, tiny_llama, text_file, options, words):
    result = run_sleb("search", tiny_llama, "--stream", *calibration(text_file), *options)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


@pytest.fixture
def saved_after_each_block(monkeypatch):
    monkeypatch.setattr(saved_walk, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(saved_walk, "SHARE", 1e9)


@pytest.mark.usefixtures("saved_after_each_block")
def test_if_the_disk_is_full_the_search_continues(run_sleb, tiny_llama, text_file, monkeypatch):
    def full(path):
        raise OutputError(f"Cannot write {path}: the disk is full.", hint="Free some space.")

    monkeypatch.setattr(saved_walk, "new_file", full)
    result = run_sleb("search", tiny_llama, "--remove", 1, "--stream", *calibration(text_file), "-o", "plan.json")
    assert result.exit_code == 0
    assert result.stderr.count("the disk is full. If this step is interrupted, it starts again from its first") == 1


@pytest.mark.usefixtures("saved_after_each_block")
def test_an_interrupted_walk_continues_where_it_was(search, tiny_llama, visits, monkeypatch):
    run_block, calls = SkippableModel.run_block, []

    def run(self, call, hidden):
        calls.append(call.block)
        if calls.count(0) > 18 and call.block == 4:  # nine batches of the dense model, and nine of the first step
            raise KeyboardInterrupt
        return run_block(self, call, hidden)

    options = ["--batch-size", 1, "--sample-tokens", 0]
    expected = search(tiny_llama, *options)
    monkeypatch.setattr(SkippableModel, "run_block", run)
    search(tiny_llama, "--stream", *options, code=130)
    monkeypatch.setattr(SkippableModel, "run_block", run_block)
    visits.clear()
    assert search(tiny_llama, "--stream", *options, "--resume") == expected
    assert visits[-2] == [4, 5]
    assert not [path for path in os.listdir() if "walk" in path]
