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
    """Apply a plan; return the weights and the record, without what differs between two runs."""

    def run(model, *options):
        plan, out = tmp_path / "plan.json", tmp_path / "out"
        if not plan.exists():
            found = run_sleb("search", model, "--remove", 2, "--sample-tokens", 1, *calibration(text_file), "-q")
            assert found.exit_code == 0, found.stderr
        text = calibration(text_file, samples=8) if "--recover" in options else []
        result = run_sleb("apply", plan, *options, *text, "-o", out, "--force")
        assert result.exit_code == 0, result.stderr
        record = json.loads((out / "sleb_plan.json").read_text())
        return load_file(out / "model.safetensors"), without_times(record)

    return run


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "device")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same(found, expected, *, proof=True):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(weight, expected[0][name]) for name, weight in found[0].items())
    proofs = [record["proof"] for _, record in (found, expected)]
    assert proofs[0] == proofs[1] if proof else proofs[0]["checks"] == proofs[1]["checks"]
    assert found[1] | {"proof": None} == expected[1] | {"proof": None}


@pytest.mark.parametrize(
    ("family", "options", "float64"), [("llama", RECOVER, True), ("gemma2", HEAL, False)], ids=["recovered", "healed"]
)
def test_the_checkpoint_is_the_cpus(apply, simulate, tmp_path, spread, family, options, float64):
    model = save_model(tmp_path / "dense", tiny_config(family))
    expected = apply(model, *options, "--device", "cpu")
    simulate(float64=float64)
    assert_same(apply(model, *options, "--device", "sim:1"), expected, proof=False)
    if options == RECOVER:
        assert_same(apply(model, *options, *spread()), expected)


def test_bytes_are_copied_whatever_the_device(apply, simulate, tiny_llama):
    expected = apply(tiny_llama)
    simulate(float64=False)
    assert_same(apply(tiny_llama), expected, proof=False)
