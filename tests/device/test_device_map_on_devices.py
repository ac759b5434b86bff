"""A model spread over two simulated devices, CPU memory and disk gives the CPU's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import calibration, evaluation, save_model, slow
from families import tiny_config

SPREAD = {
    "": 0,
    "model.layers.1": 1,
    "model.layers.2": 1,
    "model.layers.3": "cpu",
    "model.layers.4": "disk",
    "model.norm": 1,
    "lm_head": 0,
}
METRICS = ["nll", "cosine", "taylor", slow("kl"), slow("magnitude")]


@pytest.fixture
def device_map(tmp_path):
    """Write a device map, and return its path."""

    def write(places):
        path = tmp_path / "places.json"
        path.write_text(json.dumps(places))
        return path

    return write


@pytest.fixture
def search(run_sleb, text_file, tmp_path):
    """Search, and return the plan without what may differ: the device, and the machine and its time."""

    def run(model, *options):
        path = tmp_path / "plan.json"
        given = ["--remove", 2, "--force", "-q", *calibration(text_file, length=16)]
        result = run_sleb("search", model, *given, *options, "-o", path)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
        plan = json.loads(path.read_text())
        del plan["search"]["device"], plan["environment"]
        return plan

    return run


@pytest.mark.parametrize("options", [[], slow(["--strategy", "contiguous"]), slow(["--calibration", "self"])])
@pytest.mark.parametrize("metric", METRICS)
def test_the_plan_is_the_cpus(search, simulate, tiny_llama, device_map, metric, options):
    if options and metric not in ("nll", "cosine"):
        pytest.skip("the option changes nothing in how this metric meets devices")
    expected = search(tiny_llama, "--metric", metric, *options, "--device", "cpu")
    simulate()
    assert search(tiny_llama, "--metric", metric, *options, "--device-map", device_map(SPREAD)) == expected


@pytest.mark.parametrize("family", ["gemma3_text", *map(slow, ["mixtral", "opt", "xlnet"])])  # the last by whole passes
def test_the_plan_is_the_cpus_for_other_families(search, simulate, tmp_path, device_map, family):
    model = save_model(tmp_path / family, tiny_config(family))
    blocks = {"opt": "model.decoder.layers", "xlnet": "transformer.layer"}.get(family, "model.layers")
    expected = search(model, "--remove", 1, "--device", "cpu")
    simulate()
    places = device_map({"": 0, f"{blocks}.1": 1, f"{blocks}.2": "disk"})
    assert search(model, "--remove", 1, "--device-map", places) == expected


def test_the_checkpoint_is_the_cpus(run_sleb, search, simulate, tiny_llama, text_file, device_map, tmp_path):
    search(tiny_llama, "--device", "cpu")
    options = ["plan.json", "--recover", *calibration(text_file, samples=8)]
    assert run_sleb("apply", *options, "--device", "cpu", "-o", "expected").exit_code == 0
    simulate()
    result = run_sleb("apply", *options, "--device-map", device_map(SPREAD), "-o", "found")
    assert result.exit_code == 0, result.stderr
    expected, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "found"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    proofs = [
        json.loads((tmp_path / folder / "sleb_plan.json").read_text())["proof"] for folder in ("expected", "found")
    ]
    assert proofs[1].pop("device") == "sim"
    assert proofs[0].pop("device") == "cpu"
    assert proofs[0] == proofs[1]


def test_measurements_are_the_cpus(run_sleb, search, simulate, tiny_llama, text_file, device_map, tmp_path):
    search(tiny_llama, "--device", "cpu")
    options = [*evaluation(text_file), "-o", "eval.json"]
    texts = []
    for where in (["--device", "cpu"], None):
        if where is None:
            simulate()
            where = ["--device-map", device_map(SPREAD)]
        result = run_sleb("eval", "plan.json", *options, *where)
        assert result.exit_code == 0, result.stderr
        texts.append(json.loads((tmp_path / "eval.json").read_text())["texts"])
    assert texts[0] == texts[1]
