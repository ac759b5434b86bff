"""`sleb bench --estimate`, through `main()`: from a config, without weights."""

import json
import shutil

import pytest

from conftest import llama_config
from sleb_cli.engine.model import source

H100 = ["--device-flops", "989e12", "--device-bandwidth", "3.35e12"]
QUICK = ["--batch-size", 2, "--prompt-length", 8, "--new-tokens", 3]
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000,
    "max_position_embeddings": 4096, "dtype": "float16",
}  # fmt: skip


@pytest.fixture
def llama_70b(tmp_path):
    """The config of Llama-2-70B, alone in a folder."""
    folder = tmp_path / "llama-2-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


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
def test_a_model_that_fits_no_machine(run_sleb, llama_70b):
    data = estimated(run_sleb, llama_70b, *H100)
    per_block = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    parameters = 68_976_648_192  # the published number
    dense, (prompt, generation) = data["dense"], data["workloads"]
    assert (dense["blocks"], dense["parameters"], dense["weights_bytes"]) == (80, parameters, 2 * parameters)
    assert (data["dtype"], data["device"], data["processor"]) == ("float16", "described", None)
    assert dense["kv_cache_bytes"] == 2 * 80 * 1024 * (64 + 128) * 64 * 2
    assert [size["removed"] for size in data["pruned"]] == list(range(4, 41, 4))
    for size in data["pruned"]:
        assert size["removals"] is None
        assert size["parameters"] == parameters - size["removed"] * per_block
        assert size["kv_cache_bytes"] == dense["kv_cache_bytes"] * size["blocks"] // 80
        for timing in size["timings"]:
            assert 1 < timing["speedup"] < 80 / size["blocks"]
            assert timing["speedup"] <= timing["bound"] + 1e-9
    assert prompt == {"name": "prompt", "batch_size": 1, "prompt_length": 2048, "new_tokens": 0}
    assert generation == {"name": "generation", "batch_size": 64, "prompt_length": 64, "new_tokens": 128}
    # The operations of a prompt: two for each weight and token, and attention.
    expected = 2 * 2048 * (parameters - 32000 * 8192 - 161 * 8192) + 80 * 4 * 2048**2 * 8192
    assert dense["timings"][0]["work"]["prefill_flops"] == pytest.approx(expected)
    assert dense["timings"][0]["seconds"] == pytest.approx(expected / 989e12)
    # Generation is bound by reading the weights and the cache, at every step but the first.
    read = 2 * (parameters - 32000 * 8192) + dense["kv_cache_bytes"] * (64 + 64) / 192
    first = 2 * 64 * 64 * 80 * per_block / 989e12
    assert dense["timings"][1]["seconds"] == pytest.approx(first + 127 * read / 3.35e12, rel=0.01)


def test_a_sweep_takes_each_shape_in_turn(run_sleb, config_only):
    sweep = ["--sweep", "batch=1,2 prompt=4,8", "--sweep", "new=2,3"]
    found = estimated(run_sleb, config_only, *sweep, *H100)["workloads"]
    assert [tuple(workload.values()) for workload in found] == [
        *(("prompt", batch, length, 0) for batch in (1, 2) for length in (4, 8)),
        *(("generation", batch, length, new) for batch in (1, 2) for length in (4, 8) for new in (2, 3)),
    ]


def test_what_the_screen_says(run_sleb, config_only, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--estimate", *H100, "--generation", "--sweep", "batch=1,2", "--prompt-length", 8, "--new-tokens", 4]
    result = run_sleb("bench", config_only, *options, "--remove", "1,3")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    (size,) = (line for line in lines if line.startswith("│ -3 "))
    assert [cell.strip() for cell in size.split("│")[1:-1]] == ["-3", "3", "48.35k", "193 kB", "9.22 kB"]
    for batch in (1, 2):
        assert any(f"│ generation {batch}x8+4 │ dense " in line for line in lines)
    assert sum("│ -3 " in line and "x │" in line for line in lines) >= 1
    assert "a device of 989 TFLOP/s and 3.35 TB/s" in result.stdout
    assert "average" in result.stdout
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.slow
def test_sizes_agree_with_the_benchmark(run_sleb, tiny_llama, config_only):
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


def test_without_weights_all_else_refuses(run_sleb, config_only, tiny_llama):
    assert run_sleb("bench", config_only).exit_code == 4
    assert run_sleb("apply", config_only, "--blocks", "1", "-o", "out").exit_code == 4
    result = run_sleb("bench", tiny_llama, *H100)
    assert (result.exit_code, "--device-flops requires --estimate" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-flops", "1e12"], "--device-bandwidth is missing"),
        (["--device-bandwidth", "1e12"], "--device-flops is missing"),
        (["--remove", "6"], "Cannot remove 6 of 6 blocks"),
        (["--engine", "vllm"], "--engine does not apply to --estimate"),
        (["--compile"], "--compile does not apply to --estimate"),
        (["--cooldown", 1], "--cooldown does not apply to --estimate"),
        ([*H100, "--threads", 2], "--threads does not apply to --device-flops"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, config_only, options, message):
    result = run_sleb("bench", config_only, "--estimate", *options)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
