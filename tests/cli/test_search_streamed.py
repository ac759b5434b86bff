"""`sleb search --stream`: the same plan as in memory, from weights that are read once a step."""

from dataclasses import replace

import pytest

from conftest import save_model, slow
from families import tiny_config
from sleb_cli.engine.forward import memory_budget

WAYS = {
    "race": ["--fast"],
    "held out": ["--holdout 0.3"],
    "kl": ["--metric kl"],
    "states": ["--metric cosine --strategy oneshot"],
    "spans": ["--metric angular --strategy contiguous"],
    "weights": ["--metric magnitude"],
    "exact": ["--strategy refine"],
}
ONE_BY_ONE = ["--batch-size 1 --samples 12 --sample-tokens 0"]


@pytest.fixture
def plan_of(found):
    def run(*options, **how):
        return found("--remove 2", *options, samples=9, **how).model_copy(
            update={"environment": None}
        )

    return run


CASES = [*((None, way) for way in WAYS), ("gemma3_text", "race"), ("mixtral", "exact")]
NIGHTLY = [(None, "held out"), (None, "states"), (None, "weights"), ("gemma3_text", "race")]


@pytest.mark.parametrize(
    "case", [slow(case) if case in NIGHTLY else case for case in CASES], ids=str
)
def test_the_plan_is_that_of_the_model_in_memory(plan_of, tiny_llama, tmp_path, case):
    family, way = case
    model = save_model(tmp_path / "model", tiny_config(family)) if family else tiny_llama
    options = [*WAYS[way], *(["--dtype bfloat16"] if family else [])]
    assert plan_of("--stream", *options, model=model) == plan_of(*options, model=model)


@pytest.mark.parametrize("way", ["race", "kl"])
def test_candidates_go_through_the_model_in_groups(plan_of, way, visits, monkeypatch):
    usual = replace(
        memory_budget.CPU_SETTINGS, head_positions=256, widened_bytes=2 << 20
    )  # what 760,000 bytes suit
    monkeypatch.setattr(memory_budget, "CPU_SETTINGS", usual)
    grouped = plan_of("--stream", *WAYS[way], *ONE_BY_ONE, "--memory 760000")
    groups = list(visits)
    assert grouped == plan_of(*WAYS[way], *ONE_BY_ONE)
    visits.clear()
    plan_of("--stream", *WAYS[way], *ONE_BY_ONE)
    assert len(groups) > len(visits)


def test_states_of_one_candidate_must_fit(search):
    said = search("--remove 1 --stream", *ONE_BY_ONE, "--memory 300000", samples=9, code=7).stderr
    assert "The hidden states of all sequences need" in said


def test_a_step_reads_the_weights_once(plan_of, visits):
    plan = plan_of("--stream --batch-size 2 --sample-tokens 0")
    *setting_up, dense, first, second = visits
    assert dense == first == list(range(6))
    assert second[-1] == 5
    assert second[0] >= plan.removals[0]  # from the states that the first step has kept
    assert len(setting_up) <= 5
