"""`sleb bench --estimate`, through `main()`: from a config, without weights."""

import json
import shutil

import pytest

from conftest import llama_config
from sleb_cli.engine.model import source

H100 = ["--device-flops", "989e12", "--device-bandwidth", "3.35e12"]
QUICK = ["--batch-size", 2, "--prompt-length", 8, "--new-tokens", 3]


@pytest.fixture
def config_only(tiny_llama, tmp_path):
    """The tiny Llama without its weights."""
    folder = tmp_path / ("5" * 40)
    folder.mkdir()
    shutil.copy(tiny_llama / "config.json", folder)
    return folder


def estimated(run_sleb, *arguments):
    result = run_sleb("bench", *arguments, "--estimate", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_sweep_takes_each_shape_in_turn(run_sleb, config_only):
    sweep = ["--sweep", "batch=1,2 prompt=4,8", "--sweep", "new=2,3"]
    found = estimated(run_sleb, config_only, *sweep, *H100)["workloads"]
    assert [tuple(workload.values()) for workload in found] == [
        *(("prompt", batch, length, 0) for batch in (1, 2) for length in (4, 8)),
        *(("generation", batch, length, new) for batch in (1, 2) for length in (4, 8) for new in (2, 3)),
    ]


def test_what_the_screen_says(run_sleb, config_only, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = [*H100, "--generation", "--sweep", "batch=1,2", "--prompt-length", 8, "--new-tokens", 4]
    result = run_sleb("bench", config_only, "--estimate", *options, "--remove", "1,3")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    (size,) = (line for line in lines if line.startswith("│ -3 "))
    assert [cell.strip() for cell in size.split("│")[1:-1]] == ["-3", "3", "48.35k", "193 kB", "9.22 kB"]
    assert all(f"│ generation {batch}x8+4 │ dense " in result.stdout for batch in (1, 2))
    assert sum("│ -3 " in line and "x │" in line for line in lines) >= 1
    assert "a device of 989 TFLOP/s and 3.35 TB/s" in result.stdout
    assert "average" in result.stdout
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.slow
def test_sizes_agree_with_the_benchmark(run_sleb, tiny_llama, config_only, without_memory):
    blocks = ["--blocks", "4,1,2", "--every", 1]
    predicted = estimated(run_sleb, config_only, *blocks, *QUICK, *H100)
    result = run_sleb("bench", tiny_llama, *blocks, *QUICK, "--iterations", 1, "--warmup", 0, "--json", "-q")
    measured = json.loads(result.stdout)
    ours, theirs = ([data["dense"], *data["pruned"]] for data in (predicted, measured))
    for name in ("parameters", "weights_bytes", "removals"):
        assert [size[name] for size in ours] == [size[name] for size in theirs]
    assert [size["removed"] for size in ours] == [len(size["removals"]) for size in theirs]
    for number, workload in enumerate(measured["workloads"]):
        assert predicted["dense"]["timings"][number]["work"] == workload["dense"]["work"]
        assert [size["timings"][number]["bound"] for size in predicted["pruned"]] == pytest.approx(
            [timing["bound"] for timing in workload["pruned"]]
        )


def test_rates_are_measured_here(run_sleb, config_only):
    data = estimated(run_sleb, config_only, *QUICK, "--threads", 1)
    assert data["device"] == "cpu"
    assert "1 thread" in data["processor"]
    assert data["flops_per_second"] > 1e8
    assert data["bytes_per_second"] > 1e7
    for number in range(2):
        speedups = [size["timings"][number]["speedup"] for size in data["pruned"]]
        assert [size["removed"] for size in data["pruned"]] == [1, 2, 3]
        assert 1 < speedups[0] < speedups[1] < speedups[2] < 2


def test_the_model_of_a_plan_may_have_lost_its_weights(run_sleb, llama_plan, config_only, tmp_path):
    data = estimated(run_sleb, llama_plan, "--model", config_only, *QUICK, *H100)
    # Keys and values of 16 float32 numbers each, of two sequences of 8 + 3 tokens, in every block.
    sizes = [data["dense"], *data["pruned"]]
    assert [size["kv_cache_bytes"] for size in sizes] == [2 * 16 * 4 * 2 * 11 * blocks for blocks in (6, 5, 4)]
    for size in data["pruned"]:
        for timing in size["timings"]:
            assert 1 < timing["speedup"] < 6 / size["blocks"]
            assert timing["speedup"] <= timing["bound"] + 1e-9
    work, seconds = (data["dense"]["timings"][0][name] for name in ("work", "seconds"))
    assert seconds == pytest.approx(max(work["prefill_flops"] / 989e12, work["prefill_bytes"] / 3.35e12))
    assert [size["removed"] for size in data["pruned"]] == [1, 2]
    assert data["pruned"][1]["removals"] == json.loads(llama_plan.read_text())["removals"]
    deeper = tmp_path / "deeper"
    llama_config(7).save_pretrained(deeper)
    config = json.loads((deeper / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (deeper / "config.json").write_text(json.dumps(config))
    result = run_sleb("bench", llama_plan, "--model", deeper, "--estimate")
    assert (result.exit_code, "is a different model (blocks" in result.stderr) == (3, True)


def test_of_a_hub_model_only_the_config_is_downloaded(run_sleb, config_only, monkeypatch):
    asked = []

    def download(model, *, revision, allow_patterns, tqdm_class):
        asked.append((model, revision, allow_patterns))
        return str(config_only)

    monkeypatch.setattr(source, "snapshot_download", download)
    data = estimated(run_sleb, "org/tiny", "--revision", "v1", *QUICK, *H100)
    assert asked == [("org/tiny", "v1", ["config.json", "*.py"])]
    assert data["model"]["id"] == "org/tiny"


def test_without_weights_all_else_refuses(run_sleb, config_only):
    assert run_sleb("bench", config_only).exit_code == 4
    assert run_sleb("apply", config_only, "--blocks", "1", "-o", "out").exit_code == 4
