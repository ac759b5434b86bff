"""`sleb search` on the simulated device writes the plan that it writes on the CPU, to the last
digit.
"""

import json

import pytest

from conftest import calibration, save_model, slow
from families import tiny_config
from sleb_cli.engine.forward import prepare

SEARCHES = {
    "nll": (),
    "kl": ("--metric", "kl"),
    "cosine": ("--metric", "cosine"),
    "held out, fast": ("--holdout", 0.25, "--fast", "--batch-size", 1),
    "a sample": ("--sample-tokens", 6),
    "streamed spans": ("--stream", "--metric", "angular", "--strategy", "contiguous"),
    "bfloat16": ("--dtype", "bfloat16"),
}


@pytest.fixture
def plan_of(search, tmp_path, text_file):
    """Search with nothing on stderr, and return the plan."""
    (tmp_path / "prose.txt").symlink_to(text_file)

    def run_search(*options):
        result, plan = search(*options, "-q")
        assert result.stderr == ""
        return plan

    return run_search


ON_ONE = ["--device", "sim:1"]
NIGHTLY = ["kl", "a sample", "bfloat16"]
ONE_STEP = ["kl", "cosine", "bfloat16"]
# The last is searched by whole passes.
FAMILIES = [("mixtral", "nll"), ("xlnet", "nll")]


CASES = [*(slow((None, name)) if name in NIGHTLY else (None, name) for name in SEARCHES), *FAMILIES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_the_cpus(plan_of, simulate, tiny_llama, tmp_path, spread, case):
    family, name = case
    model = save_model(tmp_path / family, tiny_config(family)) if family else tiny_llama
    options = [*SEARCHES[name], *(["--remove", 1] if family or name in ONE_STEP else [])]
    expected = plan_of(model, *options, "--device", "cpu")
    simulate(float64=False)
    assert plan_of(model, *options, *ON_ONE) == expected
    if (family, name) == (None, "nll"):
        simulate(float64=True)
        assert plan_of(model, *options, *ON_ONE) == expected
        assert plan_of(model, *options, *spread(model)) == expected


def test_auto_chooses_the_device(run_sleb, simulate, tiny_llama, text_file, tmp_path):
    simulate()
    result = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file), "-q")
    assert result.exit_code == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["search"]["device"], plan["environment"]["processor"]) == (
        "sim",
        "Simulated device",
    )
    result = run_sleb("search", tiny_llama, "--remove", 1, "--device", "sim:2", "-o", "other.json")
    assert result.exit_code == 7
    assert "There is no sim:2: this machine has 2 sim devices." in result.stderr


@pytest.mark.slow
def test_hidden_states_wait_in_host_memory_if_need_be(plan_of, simulate, tiny_llama, monkeypatch):
    options = ("--stream", "--batch-size", 1, "--samples", 24)
    expected = plan_of(tiny_llama, *options, "--device", "cpu")
    held = []
    monkeypatch.setattr(
        prepare, "to_cpu", lambda hidden: held.append(hidden.device.type) or hidden.cpu()
    )
    simulate(memory=600_000)
    assert plan_of(tiny_llama, *options, "--device", "sim") == expected
    assert "sim" in held
