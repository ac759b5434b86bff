"""`sleb apply` on the simulated device writes the checkpoint that it writes on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import calibration, save_model
from families import tiny_config

RECOVER = ["--recover"]
HEAL = ["--recover", "--heal", "--heal-tokens", 2048]


@pytest.fixture
def apply(run_sleb, text_file, tmp_path):
    """Apply a plan on a device; return the weights and the record."""

    def run(model, device, *options):
        plan = tmp_path / "plan.json"
        if not plan.exists():
            found = run_sleb("search", model, "--remove", 2, "--sample-tokens", 1, *calibration(text_file), "-q")
            assert found.exit_code == 0, found.stderr
        given = [*calibration(text_file, samples=8), "--device", device] if options else []
        folder = tmp_path / f"on-{device.replace(':', '')}"
        result = run_sleb("apply", plan, *options, *given, "-o", folder)
        assert result.exit_code == 0, result.stderr
        return load_file(folder / "model.safetensors"), json.loads((folder / "sleb_plan.json").read_text())

    return run


def without_times(value):
    """Leave out what differs between two runs."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "device")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same(found, expected):
    weights, plan = found
    assert weights.keys() == expected[0].keys()
    assert all(torch.equal(weight, expected[0][name]) for name, weight in weights.items())
    checks = [record.pop("proof")["checks"] for record in (plan, expected[1])]
    assert checks[0] == checks[1]
    assert without_times(plan) == without_times(expected[1])


@pytest.mark.parametrize("options", [RECOVER, HEAL], ids=["recover", "heal"])
@pytest.mark.parametrize("float64", [True, False])
def test_the_checkpoint_is_the_cpus(apply, simulate, tiny_llama, float64, options):
    expected = apply(tiny_llama, "cpu", *options)
    simulate(float64=float64)
    assert_same(apply(tiny_llama, "sim:1", *options), expected)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_the_checkpoint_is_the_cpus_for_other_families(apply, simulate, tmp_path, family):
    model = save_model(tmp_path / "dense", tiny_config(family))
    expected = apply(model, "cpu", *HEAL)
    simulate(float64=False)
    assert_same(apply(model, "sim:1", *HEAL), expected)


def test_bytes_are_copied_whatever_the_device(apply, simulate, tiny_llama):
    expected = apply(tiny_llama, "cpu")
    simulate(float64=False)
    assert_same(apply(tiny_llama, "sim"), expected)
