"""`sleb bench`, through `main()`."""

import json
import os
import signal
import statistics
import subprocess
import sys

import pytest
import torch

from conftest import llama_config, save_model
from sleb_cli.engine.speed import benchmark, peak_memory

QUICK = ["--iterations", 3, "--warmup", 1, "--batch-size", 2, "--prompt-length", 8]


def test_both_workloads_on_both_models(run_sleb, llama_plan, tmp_path):
    llama_plan.rename(tmp_path / "plan.json")
    result = run_sleb("bench", *QUICK, "--new-tokens", 4, "-o", "b.json")
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert [w["workload"]["name"] for w in data["workloads"]] == ["prompt", "generation"]
    for measured, tokens in zip(data["workloads"], (2 * 8, 2 * 4), strict=True):
        for name in ("dense", "pruned"):
            timing = measured[name]
            assert len(timing["seconds"]) == 3
            assert timing["median_seconds"] == statistics.median(timing["seconds"])
            assert timing["tokens_per_second"] == pytest.approx(tokens / timing["median_seconds"])
            assert timing["peak_memory_bytes"] > 10**6
        assert measured["speedup"] == pytest.approx(
            measured["dense"]["median_seconds"] / measured["pruned"]["median_seconds"]
        )
    assert data["dense"]["blocks"] - data["pruned"]["blocks"] == 2
    per_block = (data["dense"]["parameters"] - data["pruned"]["parameters"]) / 2
    assert per_block == 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert data["dense"]["weights_bytes"] == 4 * data["dense"]["parameters"]
    for word in ("generation, median", "tokens/s", "peak memory", "parameters", "fastest to slowest"):
        assert word in result.stdout
    assert "smaller than the paper's setting" in result.stderr


def test_one_workload_on_the_dense_model(run_sleb, tiny_llama):
    result = run_sleb("bench", tiny_llama, "--prompt", *QUICK, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [w["workload"]["name"] for w in data["workloads"]] == ["prompt"]
    assert data["pruned"] is None
    assert data["workloads"][0]["speedup"] is None
    assert result.stderr == ""


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_count_as_many_parameters_as_they_stand_for(run_sleb, tmp_path, monkeypatch, tied):
    folder = save_model(tmp_path / "model", llama_config(4, tie_word_embeddings=tied))

    def pack(model):
        """Put the numbers of each projection into buffers, as GPTQ and AWQ do; one more is not stored."""
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                rows = module.out_features
                del module.weight
                module.register_buffer("qweight", torch.zeros(module.in_features // 8, rows, dtype=torch.int32))
                module.register_buffer("scales", torch.zeros(1, rows, dtype=torch.float16))
                module.register_buffer("workspace", torch.zeros(1000), persistent=False)
        return model

    load_dense, load_pruned = benchmark.load_dense, benchmark.load_pruned
    monkeypatch.setattr(benchmark, "load_dense", lambda *given: pack(load_dense(*given)))
    monkeypatch.setattr(benchmark, "load_pruned", lambda *given, dense: pack(load_pruned(*given)))
    monkeypatch.setattr(benchmark, "time_in_turn", lambda workload, models, notify: {name: [1.0] for name in models})
    monkeypatch.setattr(benchmark, "peak_memory_alone", lambda *given: None)
    result = run_sleb("bench", folder, "--blocks", "1", "--prompt", *QUICK, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    projections, columns, norms = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64, 32 * 2 + 16 * 2 + 64 * 2 + 32, 2 * 32
    outside = (1 if tied else 2) * 320 * 32 + 32
    for name, blocks in (("dense", 4), ("pruned", 3)):
        assert data[name]["parameters"] == blocks * (projections + norms) + outside
        packed = projections // 8 * 4 + columns * 2 + norms * 4
        assert data[name]["weights_bytes"] == blocks * packed + outside * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--iterations", 0), "--iterations 0"),
        (("--warmup", -1), "--warmup -1"),
        (("--generation", "--new-tokens", 0), "--new-tokens 0"),
        (("--generation", "--prompt-length", 100, "--new-tokens", 100), "128 positions"),
        (("--prompt", "--prompt-length", 129), "128 positions"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, tiny_llama, options, message):
    result = run_sleb("bench", tiny_llama, *options)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_the_memory_is_measured(tiny_llama, tmp_path, number, code):
    command = [sys.executable, "-m", "sleb_cli", "bench", str(tiny_llama), "--prompt", "-o", "b.json"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stderr:
            if line.startswith("Peak memory"):
                os.killpg(process.pid, number)  # as a terminal does: the child is told too
                break
        rest = process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == []


def killed(*arguments):
    """Be the process that the system ends for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_times_are_kept_where_the_process_for_the_memory_is_killed(run_sleb, tiny_llama, monkeypatch):
    monkeypatch.setattr(peak_memory, "_measure", killed)
    result = run_sleb("bench", tiny_llama, "--prompt", *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    timing = json.loads(result.stdout)["workloads"][0]["dense"]
    assert timing["peak_memory_bytes"] is None
    assert len(timing["seconds"]) == 3
    assert "could not be measured: the process was killed" in result.stderr
