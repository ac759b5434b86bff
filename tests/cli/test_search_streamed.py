"""`sleb search --stream`: the same plan as in memory, from weights that are read once a step."""

import os
from dataclasses import replace

import pytest
import torch

from conftest import save_model
from families import tiny_config
from sleb_cli.engine.forward import memory_budget, saved_walk
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
def plan_of(found):
    def run(*options, **how):
        return found("--remove", 2, *options, samples=9, **how).model_copy(update={"environment": None})

    return run


CASES = [(None, way, ()) for way in WAYS] + [
    (family, way, ("--dtype", "bfloat16")) for family, way in (("gemma3_text", "race"), ("mixtral", "exact"))
]


@pytest.mark.parametrize(("family", "way", "options"), CASES)
def test_the_plan_is_that_of_the_model_in_memory(plan_of, tiny_llama, tmp_path, family, way, options):
    model = save_model(tmp_path / "model", tiny_config(family)) if family else tiny_llama
    options = [*WAYS[way], *options]
    assert plan_of("--stream", *options, model=model) == plan_of(*options, model=model)


@pytest.mark.parametrize("way", ["kl", "spans"])
def test_hidden_states_that_do_not_fit_wait_in_a_file(plan_of, way, monkeypatch):
    files, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *given, **how: files.append(given) or from_file(*given, **how))
    spilled = plan_of("--stream", *WAYS[way], *ONE_BY_ONE, "--memory", 300_000)
    assert files
    assert spilled == plan_of(*WAYS[way], *ONE_BY_ONE)


@pytest.mark.parametrize("way", ["race", "kl"])
def test_or_candidates_go_through_the_model_in_groups(plan_of, way, visits, monkeypatch):
    usual = replace(memory_budget.CPU_SETTINGS, head_positions=256, widened_bytes=2 << 20)  # what 760,000 bytes suit
    monkeypatch.setattr(memory_budget, "CPU_SETTINGS", usual)
    grouped = plan_of("--stream", *WAYS[way], *ONE_BY_ONE, "--memory", 760_000)
    groups = list(visits)
    assert grouped == plan_of(*WAYS[way], *ONE_BY_ONE)
    visits.clear()
    plan_of("--stream", *WAYS[way], *ONE_BY_ONE)
    assert len(groups) > len(visits)


def test_a_step_reads_the_weights_once(plan_of, visits):
    plan = plan_of("--stream", "--batch-size", 2, "--sample-tokens", 0)
    *setting_up, dense, first, second = visits
    assert dense == first == list(range(6))
    assert second[-1] == 5
    assert second[0] >= plan.removals[0]  # from the states that the first step has kept
    assert len(setting_up) <= 5


@pytest.fixture
def saved_after_each_block(monkeypatch):
    monkeypatch.setattr(saved_walk, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(saved_walk, "SHARE", 1e9)


@pytest.mark.usefixtures("saved_after_each_block")
def test_if_the_disk_is_full_the_search_continues(search, monkeypatch):
    def full(path):
        raise OutputError(f"Cannot write {path}: the disk is full.", hint="Free some space.")

    monkeypatch.setattr(saved_walk, "new_file", full)
    said = search("--remove", 1, "--stream").stderr
    assert said.count("the disk is full. If this step is interrupted, it starts again from its first") == 1


@pytest.mark.usefixtures("saved_after_each_block")
def test_an_interrupted_walk_continues_where_it_was(search, plan_of, visits, monkeypatch):
    run_block, calls = SkippableModel.run_block, []

    def run(self, call, hidden):
        calls.append(call.block)
        if calls.count(0) > 18 and call.block == 4:  # nine batches of the dense model, and nine of the first step
            raise KeyboardInterrupt
        return run_block(self, call, hidden)

    options = ["--batch-size", 1, "--sample-tokens", 0]
    expected = plan_of(*options)
    monkeypatch.setattr(SkippableModel, "run_block", run)
    search("--remove", 2, "--force", "--stream", *options, samples=9, code=130)
    monkeypatch.setattr(SkippableModel, "run_block", run_block)
    visits.clear()
    assert plan_of("--stream", *options, "--resume") == expected
    assert visits[-2] == [4, 5]
    assert not [path for path in os.listdir() if "walk" in path]
