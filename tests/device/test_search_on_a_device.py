"""`sleb search` on the simulated device writes the plan that it writes on the CPU, to the last
digit.
"""

import json

import pytest

from conftest import calibration, save_model, slow
from families import tiny_config
from sleb_cli.engine.forward import prepare

CASES = [
    # A family, or None for the tiny Llama, and options.
    (None, ""),
    slow((None, "--remove 1 --metric kl")),
    (None, "--remove 1 --metric cosine"),
    (None, "--holdout 0.25 --fast --batch-size 1"),
    slow((None, "--sample-tokens 6")),
    (None, "--stream --metric angular --strategy contiguous"),
    slow((None, "--remove 1 --dtype bfloat16")),
    ("mixtral", "--remove 1"),
    ("xlnet", "--remove 1"),  # searched by whole passes
]
ON_ONE = ("--device", "sim:1")


@pytest.fixture
def plan_of(search, tmp_path, text_file):
    """Search with nothing on stderr, and return the plan."""
    (tmp_path / "prose.txt").symlink_to(text_file)

    def run_search(*options):
        result, plan = search(*options, "-q")
        assert result.stderr == ""
        return plan

    return run_search


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_the_cpus(plan_of, simulate, tiny_llama, tmp_path, spread, case):
    family, options = case
    options = options.split()
    model = save_model(tmp_path / family, tiny_config(family)) if family else tiny_llama
    expected = plan_of(model, *options, "--device", "cpu")
    simulate(float64=False)
    assert plan_of(model, *options, *ON_ONE) == expected
    if case == (None, ""):
        simulate(float64=True)
        assert plan_of(model, *ON_ONE) == expected
        assert plan_of(model, *spread(model)) == expected


def test_auto_chooses_the_device(run_sleb, simulate, tiny_llama, text_file):
    simulate()
    words = ("search", tiny_llama, "--remove", 1, *calibration(text_file), "--json")
    plan = json.loads(run_sleb(*words).stdout)
    assert plan["search"]["device"] == "sim"
    assert plan["environment"]["processor"] == "Simulated device"
    result = run_sleb(*words, "--device", "sim:2", "-o", "other.json")
    assert result.exit_code == 7
    assert "There is no sim:2: this machine has 2 sim devices." in result.stderr


@pytest.mark.slow
def test_hidden_states_wait_in_host_memory_if_need_be(plan_of, simulate, tiny_llama, monkeypatch):
    options = ("--stream", "--batch-size", 1, "--samples", 24)
    expected = plan_of(tiny_llama, *options, "--device", "cpu")
    held = []

    def to_cpu(hidden):
        held.append(hidden.device.type)
        return hidden.cpu()

    monkeypatch.setattr(prepare, "to_cpu", to_cpu)
    simulate(memory=600_000)
    assert plan_of(tiny_llama, *options, "--device", "sim") == expected
    assert "sim" in held
