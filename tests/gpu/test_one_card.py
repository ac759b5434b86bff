"""What a machine with a real accelerator can show, in ten minutes: `pytest -m gpu -n0 -s`. See
docs/gpu.md.

The same tests run on the simulated device, on a tiny model, with `-m slow`: so they cannot rot.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import calibration_sequences
from reference import plain_loss
from sleb_cli.engine.device import choose_device

REAL = pytest.param("real", marks=pytest.mark.gpu)


@dataclass(frozen=True)
class Card:
    """A device and what to run on it: a model, the sequences to calibrate on, and whether its times
    mean anything.
    """

    device: torch.device
    model: Path
    samples: int
    length: int
    is_real: bool

    @property
    def backend(self) -> Any:
        return torch.get_device_module(self.device.type)

    def calibration(self, text_file):
        sizes = ["--samples", self.samples, "--sequence-length", self.length]
        return ["--calibration", text_file, *sizes]


@pytest.fixture(params=[REAL, pytest.param("simulated", marks=pytest.mark.slow)])
def card(request, tiny_llama):
    if request.param == "simulated":
        request.getfixturevalue("simulate")(memory=2**30)
        return Card(torch.device("sim:1"), tiny_llama, samples=8, length=16, is_real=False)
    device = choose_device("auto")
    if device.type == "cpu":
        pytest.skip("this machine has no accelerator that torch can use")
    return Card(device, request.getfixturevalue("smollm2"), samples=16, length=256, is_real=True)


@pytest.fixture
def run(run_sleb, card, text_file):
    """Run a command on the card; return what it printed as JSON, and the seconds it took."""

    def run_command(verb, *options, device=None):
        words = [verb, card.model, *options, "--device", device or card.device]
        if verb in ("search", "apply"):
            words += card.calibration(text_file)
        start = time.perf_counter()
        result = run_sleb(*words, "--json", "-q")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout), time.perf_counter() - start

    return run_command


@pytest.fixture
def show(capfd):
    """Print a figure, whatever pytest captures."""

    def print_line(line):
        with capfd.disabled():
            print(f"\n  {line}", end="")

    return print_line


def search(run, *options, remove=2, **where):
    return run("search", "--remove", remove, "--sample-tokens", 4, *options, "--force", **where)


def test_in_float32_it_finds_the_cpus_blocks(run, card):
    there, _ = search(run, "--dtype", "float32")
    here, _ = search(run, "--dtype", "float32", device="cpu")
    assert there["removals"] == here["removals"]
    assert there["dense"]["loss"] == pytest.approx(here["dense"]["loss"], rel=1e-4)
    for one, other in zip(there["steps"], here["steps"], strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_it_finishes(run, card, show, dtype):
    plan, seconds = search(run, "--dtype", dtype)
    assert len(set(plan["removals"])) == 2
    assert all(math.isfinite(step["perplexity"]) for step in plan["steps"])
    show(f"{dtype}: removed {plan['removals']} in {seconds:.1f} s")


def test_a_race_ends_where_the_exact_search_does(run, card):
    exact, _ = search(run, "--dtype", "float32", "--batch-size", 1)
    raced, _ = search(run, "--dtype", "float32", "--batch-size", 1, "--fast")
    assert raced["steps"][-1]["score"] < exact["steps"][-1]["score"] + 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_search_keeps_to_its_memory(run, card, show, dtype):
    allowed = 2 * 10**9 if card.is_real else 16 * 10**6
    card.backend.empty_cache()
    card.backend.reset_peak_memory_stats(card.device)
    search(run, "--dtype", dtype, "--memory", f"{allowed // 10**6}MB")
    peak = card.backend.max_memory_allocated(card.device)
    parameters = AutoModelForCausalLM.from_pretrained(card.model).num_parameters()
    weights = parameters * (4 if dtype == "float32" else 2)
    beside = (peak - weights) / 1e6
    show(f"{dtype}: {beside:.1f} MB beside the model, of {allowed / 1e6:.0f} allowed")
    assert peak > weights
    assert peak <= 1.05 * weights + allowed


def test_recovery_and_healing_each_lower_the_divergence(run, card, show, tmp_path):
    tokens = 65536 if card.is_real else 1024
    options = f"--blocks 2,3 --recover --heal-tokens {tokens} -o out"
    data, seconds = run("apply", *options.split())
    recovery = data["recovery"]
    show(f"recovered and healed in {seconds:.1f} s")
    if card.is_real:
        assert recovery["heal"]["losses"]["divergence"] < recovery["pruned"]["divergence"]


@pytest.mark.slow
def test_the_speedup_is_measured_beside_the_ratio_of_the_blocks(run, card, show):
    options = ["--blocks", "2,3"]
    if not card.is_real:
        few = "--batch-size 1 --prompt-length 8 --iterations 1 --warmup 0 --prompt"
        options += few.split()
    data, _ = run("bench", *options)
    blocks = data["dense"]["blocks"] / data["pruned"][0]["blocks"]
    for measured in data["workloads"]:
        (pruned,) = measured["pruned"]
        assert pruned["memory"]["weights_bytes"] == data["pruned"][0]["weights_bytes"]
        label = measured["workload"]["name"]
        interval = pruned["interval"]
        between = f" ({interval['low']:.3f} to {interval['high']:.3f})" if interval else ""
        show(f"{label}: {pruned['speedup']:.3f} times as fast{between}; {blocks:.3f} by blocks")
        assert pruned["speedup"] > 0


@torch.inference_mode()
def test_the_search_is_faster_than_the_plain_algorithm(run, card, text_file, show):
    plan, seconds = search(run, "--dtype", "float32", remove=1)
    loaded = AutoModelForCausalLM.from_pretrained(card.model, dtype=torch.float32)
    model = loaded.to(card.device).eval()
    sequences = calibration_sequences(card.model, text_file, card.samples, card.length)
    sequences = sequences.to(card.device)
    scores = plan["steps"][0]["scores"]
    measured = sorted(scores, key=int)[:4]
    start = time.perf_counter()
    for block in measured:
        loss = plain_loss(model, model.model.layers, sequences, {int(block)})
        assert scores[block] == pytest.approx(loss, rel=1e-3)
    plain_seconds = (time.perf_counter() - start) / len(measured)
    searched = sequences.numel() * len(scores) / seconds
    show(f"search: {searched:.0f} tokens/s with loading and its sample")
    show(f"plain algorithm, without: {sequences.numel() / plain_seconds:.0f} tokens/s")


def test_the_second_card_finds_the_same(run, card):
    if card.backend.device_count() < 2:
        pytest.skip("this machine has one accelerator")
    first, _ = search(run, device=f"{card.device.type}:0")
    second, _ = search(run, device=f"{card.device.type}:1")
    assert first["removals"] == second["removals"]


def test_processes_with_a_card_each_find_what_one_finds(run, card, text_file, tmp_path):
    count = card.backend.device_count()
    if not card.is_real or count < 2:
        pytest.skip("this machine does not have two accelerators that torch can use")
    alone, _ = search(run, "--batch-size", 2)
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {count} -m sleb_cli search"
    options = "--remove 2 --sample-tokens 4 --batch-size 2 -o shared.json"
    words = [*launch.split(), card.model, *card.calibration(text_file), *options.split()]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "shared.json").read_text())
    assert together["removals"] == alone["removals"]
    assert together["steps"] == alone["steps"]
