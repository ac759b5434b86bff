"""`sleb apply` on the simulated device writes the checkpoint that it writes on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import calibration, save_model
from families import tiny_config

HEAL = ["--recover", "--heal-tokens", 1024]


@pytest.fixture
def apply(run_sleb, text_file, tmp_path):
    """Remove two blocks; return the weights, and the record without what differs between runs."""

    def run(model, *options):
        text = calibration(text_file, samples=8)
        words = ("apply", model, "--blocks", "1,3", *options, *text, "-o", "out", "--force")
        result = run_sleb(*words, "--json")
        assert result.exit_code == 0, result.stderr
        weights = load_file(tmp_path / "out" / "model.safetensors")
        return weights, without_times(json.loads(result.stdout))

    return run


def without_times(value):
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = value.keys() - {"seconds", "device"}
    return {key: without_times(value[key]) for key in kept}


def require_same(found, expected, *, proof=True):
    weights, record = found
    expected_weights, expected_record = expected
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    if not proof:
        record["proof"] = record["proof"]["checks"]
        expected_record["proof"] = expected_record["proof"]["checks"]
    assert record == expected_record


@pytest.mark.parametrize(
    ("family", "float64"), [(None, False), pytest.param("gemma2", True, marks=pytest.mark.slow)]
)
def test_a_device_writes_the_checkpoint_of_the_cpu(
    apply, simulate, tiny_llama, tmp_path, family, float64
):
    model = save_model(tmp_path / "dense", tiny_config(family)) if family else tiny_llama
    expected = apply(model, *HEAL, "--device", "cpu")
    simulate(float64=float64)
    require_same(apply(model, *HEAL, "--device", "sim:1"), expected, proof=False)


def test_a_spread_model_recovers_to_the_same_checkpoint(apply, simulate, tiny_llama, spread):
    expected = apply(tiny_llama, "--recover", "--no-heal", "--device", "cpu")
    simulate()
    require_same(apply(tiny_llama, "--recover", *spread(tiny_llama)), expected)
