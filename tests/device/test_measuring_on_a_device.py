"""`sleb eval` and `sleb bench` on the simulated device."""

import json

import pytest

from conftest import prose, save_model
from families import tiny_config


@pytest.fixture
def evaluate(run_sleb, tmp_path):
    (tmp_path / "test.txt").write_text(prose(60, seed=5))

    def run(model, *options):
        text = ["--perplexity", tmp_path / "test.txt", "--sequence-length", 32, "--batch-size", 3, "--max-windows", 5]
        result = run_sleb("eval", model, "--blocks", "1,2", *text, *options, "--json", "-q")
        assert (result.exit_code, result.stderr) == (0, "")
        data = json.loads(result.stdout)
        assert data.pop("device") == ("cpu" if "cpu" in options else "sim")
        assert data.pop("processor")
        return data

    return run


def test_perplexities_are_the_cpus(evaluate, simulate, tmp_path, spread):
    model = save_model(tmp_path / "dense", tiny_config("gemma3_text"))
    expected = evaluate(model, "--device", "cpu")
    for float64 in (False, True):
        simulate(float64=float64)
        assert evaluate(model, "--device", "sim:1") == expected
    assert evaluate(model, *spread(model)) == expected


def run_bench(run_sleb, model, *options):
    sizes = ["--batch-size", 2, "--prompt-length", 8, "--iterations", 2, "--warmup", 0, "--device", "sim:1"]
    result = run_sleb("bench", model, *sizes, *options, "--json", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    assert (data["device"], data["processor"]) == ("sim", "Simulated device")
    return data


def test_both_workloads_are_timed_on_both_models(run_sleb, simulate, tiny_llama, without_memory):
    simulate(float64=False)
    data = run_bench(run_sleb, tiny_llama, "--blocks", "1,2", "--new-tokens", 2)
    assert [measured["workload"]["name"] for measured in data["workloads"]] == ["prompt", "generation"]
    for measured in data["workloads"]:
        assert [len(timing["e2els"]) for timing in (measured["dense"], *measured["pruned"])] == [2, 2]
    assert [len(steps) for steps in data["workloads"][1]["dense"]["itls"]] == [1, 1]


@pytest.mark.slow
def test_the_memory_is_the_devices(run_sleb, simulate, tiny_llama):
    simulate(float64=False)
    data = run_bench(run_sleb, tiny_llama, "--generation", "--new-tokens", 2)
    memory = data["workloads"][0]["dense"]["memory"]
    assert memory["weights_bytes"] == data["dense"]["weights_bytes"]
    # Two sequences of 8 + 1 tokens, keys and values of 16 float32 numbers each, in every block.
    assert memory["kv_cache_bytes"] == 2 * 9 * 2 * 16 * 4 * 6
    assert 10_000 < memory["rest_bytes"] < 500_000
