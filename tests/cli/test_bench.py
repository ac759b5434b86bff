"""`sleb bench`, through `main()`."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from conftest import llama_config, save_model, slow
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.speed import benchmark, loaders, peak_memory
from sleb_cli.engine.speed.timing import Measured
from sleb_cli.engine.surgery.loading import load_pruned
from sleb_cli.results import WarmupRecord
from sleb_plugins.engine import TimedRun

QUICK = ["--iterations 5 --warmup 1 --batch-size 2 --prompt-length 8"]


@pytest.fixture
def bench(sleb):
    """Run a benchmark, require an exit code, and give the result."""

    return partial(sleb, "bench")


def test_both_workloads_on_each_size(bench, llama_plan, tmp_path, without_memory, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    llama_plan.rename(tmp_path / "plan.json")
    result = bench("--every 1", *QUICK, "--new-tokens 4 -o b.json")
    data = json.loads((tmp_path / "b.json").read_text())
    removals = json.loads((tmp_path / "plan.json").read_text())["removals"]
    assert [size["removals"] for size in data["pruned"]] == [removals[:1], removals]
    assert [size["blocks"] for size in (data["dense"], *data["pruned"])] == [6, 5, 4]
    per_block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    fewer = [data["dense"]["parameters"] - size["parameters"] for size in data["pruned"]]
    assert fewer == [per_block, 2 * per_block]
    assert data["dense"]["weights_bytes"] == 4 * data["dense"]["parameters"]
    assert [w["workload"]["name"] for w in data["workloads"]] == ["prompt", "generation"]
    for measured, new in zip(data["workloads"], (0, 4), strict=True):
        assert measured["warmup"] == {"runs": 1, "deviation": None, "stable": None}
        assert measured["attention"] == "sdpa"
        check_timing(measured["dense"], new)
        for pruned, size in zip(measured["pruned"], data["pruned"], strict=True):
            check_timing(pruned, new)
            assert pruned["removals"] == size["removals"]
            assert pruned["interval"]["low"] <= pruned["speedup"] <= pruned["interval"]["high"]
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if line[:1] in "┏┃┡│└├")
    assert all(
        sum(f" {model} " in line for line in lines) >= 3
        for model in ("dense", "without 1", "without 2")
    )
    assert all(words in result.stdout for words in ("generation 2x8+4", "speedup", "95%", "blocks"))
    assert "…" not in result.stdout


def check_timing(timing, new):
    assert len(timing["e2els"]) == len(timing["ttfts"]) == 5
    assert timing["tokens_per_second"] == pytest.approx(2 * 5 * (new or 8) / sum(timing["e2els"]))
    assert len(timing["itls"]) == (5 if new else 0)
    for number, steps in enumerate(timing["itls"]):
        first = timing["ttfts"][number]
        assert len(steps) == new - 1
        assert 0 < first <= first + sum(steps) <= timing["e2els"][number]


@pytest.mark.parametrize("more", [("--generation",), slow(("--blocks", "1,2"))])
def test_the_memory_is_that_of_a_process_of_its_own(bench, tiny_llama, more):
    before = torch.get_num_threads()
    options = [*QUICK, "--new-tokens 4 --threads", before + 1, "--json -q"]
    result = bench(tiny_llama, *more, *options)
    assert result.stderr == ""
    data = result.data
    assert (data["threads"], torch.get_num_threads()) == (before + 1, before)
    sizes = (data["dense"], *data["pruned"])
    assert all(size["load_seconds"] > 0 for size in sizes)
    for measured in data["workloads"]:
        new = measured["workload"]["new_tokens"]
        for size, timing in zip(sizes, (measured["dense"], *measured["pruned"]), strict=True):
            memory = timing["memory"]
            assert memory["peak_bytes"] > 10**6 + memory["weights_bytes"]
            assert memory["weights_bytes"] == size["weights_bytes"]
            # Two sequences of 8 + 3 tokens, keys and values of 16 float32 numbers each, in every
            # block.
            cache = 2 * 11 * 2 * 16 * 4 * size["blocks"] if new else 0
            assert memory["kv_cache_bytes"] == cache
            parts = memory["weights_bytes"] + cache + memory["rest_bytes"]
            assert parts == memory["peak_bytes"]


@pytest.mark.parametrize(
    ("workload", "compiled"),
    [
        ("--prompt", "torch.compile"),
        ("--generation", "transformers.PreTrainedModel.get_compiled_call"),
    ],
)
def test_a_model_that_cannot_be_compiled_is_said_so(
    bench, tiny_llama, without_memory, monkeypatch, workload, compiled
):
    fail = Mock(side_effect=RuntimeError("no compiler was found\nHere is how to install one"))
    monkeypatch.setattr(compiled, lambda *given, **options: fail)
    said = bench(tiny_llama, workload, *QUICK, "--compile", code=7).stderr
    assert "torch.compile does not work for this model on this machine: no compiler was" in said


def pack(model):
    """Put the numbers of projections into buffers, as GPTQ and AWQ do; one more is not stored."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            rows = module.out_features
            packed = torch.zeros(module.in_features // 8, rows, dtype=torch.int32)
            del module.weight
            module.register_buffer("qweight", packed)
            module.register_buffer("scales", torch.zeros(1, rows, dtype=torch.float16))
            module.register_buffer("workspace", torch.zeros(1000), persistent=False)
    return model


def test_packed_models_run_in_pairs_and_count_as_unpacked(
    bench, tmp_path, monkeypatch, without_memory
):
    together = []
    folder = save_model(tmp_path / "model", llama_config(4))

    def instantly(models, *given):
        together.append(list(models))
        warmup = WarmupRecord(runs=0, deviation=None, stable=None)
        return Measured(warmup, [dict.fromkeys(models, TimedRun(1.0))])

    def packed(*given):
        skippable = open_model(*given)
        pack(skippable.model)
        return skippable

    monkeypatch.setattr(Architecture, "is_quantized", True)
    monkeypatch.setattr(loaders, "open_model", packed)
    monkeypatch.setattr(loaders, "load_pruned", lambda *given, dense: pack(load_pruned(*given)))
    monkeypatch.setattr(benchmark, "time_in_turn", instantly)
    result = bench(folder, "--blocks 1,2 --remove 1,2 --prompt", *QUICK, "--json")
    assert together == [[(), (1,)], [(), (1, 2)]]
    data = result.data
    (measured,) = data["workloads"]
    assert len(measured["dense"]["e2els"]) == 2
    assert [timing["removals"] for timing in measured["pruned"]] == [[1], [1, 2]]
    projections = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    columns = 32 * 2 + 16 * 2 + 64 * 2 + 32
    norms = 2 * 32
    outside = 2 * 320 * 32 + 32
    for size, blocks in zip((data["dense"], *data["pruned"]), (4, 3, 2), strict=True):
        assert size["parameters"] == blocks * (projections + norms) + outside
        of_block = projections // 8 * 4 + columns * 2 + norms * 4
        assert size["weights_bytes"] == blocks * of_block + outside * 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_the_memory_is_measured(tiny_llama, tmp_path, number, code):
    command = [*"-m sleb_cli bench --prompt -o b.json".split(), str(tiny_llama)]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
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


def out_of_memory(*arguments):
    """Be the process that has no more memory."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tiny_llama, tmp_path):
    request = f"{str(tiny_llama)!r}, prompt=True, iterations=1, batch_size=1, prompt_length=8"
    (tmp_path / "script.py").write_text(
        f"import sleb_cli as sleb\nfound = sleb.bench(sleb.BenchRequest({request}))\n"
        "print(found.workloads[0].dense.memory.peak_bytes > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, "Traceback" in done.stderr) == ("True\n", False)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [killed, out_of_memory])
def test_times_are_kept_if_the_process_for_memory_ends(bench, tiny_llama, monkeypatch, measure):
    monkeypatch.setattr(peak_memory, "_measure", measure)
    result = bench(tiny_llama, "--prompt", *QUICK, "--json")
    timing = result.data["workloads"][0]["dense"]
    assert timing["memory"] is None
    assert len(timing["e2els"]) == 5
    assert "of the dense model is unknown: its process ran out of memory" in result.stderr
