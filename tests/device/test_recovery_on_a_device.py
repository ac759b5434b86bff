"""`sleb apply` on the simulated device writes the checkpoint that it writes on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import calibration, save_model
from families import tiny_config

HEAL = ["--recover", "--heal", "--heal-tokens", 1024]


@pytest.fixture
def apply(run_sleb, text_file, tmp_path):
    """Remove two blocks; return the weights and the record, without what differs between two runs."""

    def run(model, *options):
        text = calibration(text_file, samples=8) if "--recover" in options else []
        result = run_sleb(
            "apply", model, "--blocks", "1,3", *options, *text, "-o", "out", "--force", "--json"
        )
        assert result.exit_code == 0, result.stderr
        return load_file(tmp_path / "out" / "model.safetensors"), without_times(
            json.loads(result.stdout)
        )

    return run


def without_times(value):
    if isinstance(value, dict):
        return {
            key: without_times(item)
            for key, item in value.items()
            if key not in ("seconds", "device")
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same(found, expected, *, proof=True):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(weight, expected[0][name]) for name, weight in found[0].items())
    proofs = [record.pop("proof") for _, record in (found, expected)]
    assert proofs[0] == proofs[1] if proof else proofs[0]["checks"] == proofs[1]["checks"]
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("family", "float64"), [(None, False), pytest.param("gemma2", True, marks=pytest.mark.slow)]
)
def test_a_device_writes_the_checkpoint_of_the_cpu(
    apply, simulate, tiny_llama, tmp_path, family, float64
):
    model = save_model(tmp_path / "dense", tiny_config(family)) if family else tiny_llama
    expected = apply(model, *HEAL, "--device", "cpu")
    simulate(float64=float64)
    assert_same(apply(model, *HEAL, "--device", "sim:1"), expected, proof=False)


def test_a_spread_model_recovers_to_the_same_checkpoint(apply, simulate, tiny_llama, spread):
    expected = apply(tiny_llama, "--recover", "--device", "cpu")
    simulate()
    assert_same(apply(tiny_llama, "--recover", *spread(tiny_llama)), expected)
