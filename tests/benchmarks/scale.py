"""What a model larger than memory costs: time, memory and bytes read, against reading its files and against its FLOPs.

    python tests/benchmarks/scale.py [PART …] [--work FOLDER] [--gib 12] [--limit 4GiB] [--samples 4] [--length 64]

The parts, by default all but the last two, in this order:

    search     two removals by nll, and two by cosine, which does little but read
    apply      the checkpoint without these blocks, proven
    recover    the same with --recover
    crossover  --model (default: demo) in memory and with --stream, by turns: the plans must be equal
    project    large models on other machines, by arithmetic alone

The model is a Llama of random bfloat16 weights, made under --work once (default: a new folder, deleted afterwards;
three times the size must be free). `sleb` runs under a hard limit of memory: a control group, else
`ulimit -d`, which does not count the page cache. Nothing of the model is in the page cache at the start.

A time is held against the larger of two others, measured in the same run: that of its files, read in order and written,
and that of its operations (`sleb_cli/engine/speed/work.py`) at the rate of such blocks in memory. A step reads the
files once; by cosine twice, since the loss of the result is a pass of its own. A step after a removal starts at the
removed block. `apply` writes what it writes, and reads both models once; recovery solves its fits in float64 besides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from made_models import compared, size_of, write_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.passes import BESIDE_CANDIDATES
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.sizes import Sizes
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.recovery.closed_form import RIDGES
from sleb_cli.engine.speed.estimate import measure_rate
from sleb_cli.engine.speed.work import count_work
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.units import parse_bytes

GOAL = 1.3
CROSSOVER_GOAL = 1.1
PARTS = ("search", "apply", "recover", "crossover", "project")
SHARD_BYTES = 2**30
CHUNK = 16 << 20
PROOF_TOKENS = 64
WORDS = "river mountain snow water stone bridge town mill fish field winter spring road horse letter king".split()


def main() -> None:
    options = read_options()
    if parts := [part for part in PARTS[:3] if part in options.parts]:
        under_a_limit(parts, options)
    if "crossover" in options.parts:
        crossover(options)
    if "project" in options.parts:
        project()


def under_a_limit(parts: Sequence[str], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.work, prefix="sleb-scale-") as place:
        folder = make_model(options.work or Path(place), options)
        with limited_to(parse_bytes(options.limit, "--limit")) as limit:
            benchmark = Benchmark(options, folder, Path(place), limit)
            for part in parts:
                getattr(benchmark, part)()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--work", type=Path, help="where the model is made, and found the next time")
    parser.add_argument("--gib", type=float, default=12.0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--limit", default="4GiB")
    parser.add_argument("--metrics", default="nll,cosine", help="searched by each; the first plan is applied")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--recover-samples", type=int, default=16)
    parser.add_argument(
        "--option", action="append", default=[], help="one more option of `sleb search`: --option=--fast"
    )
    parser.add_argument("--model", default="demo", help="for the crossover")
    parser.add_argument("--rounds", type=int, default=2, help="of the crossover")
    parser.add_argument("--crossover-samples", type=int, default=4)
    parser.add_argument("--crossover-length", type=int, default=256)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; choose from {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS[:3])
    return options


# The model


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """Write a random Llama, shard by shard, unless it is there."""
    hidden, wide, vocabulary = options.hidden, options.intermediate, options.vocabulary
    block = 4 * hidden**2 + 3 * hidden * wide
    blocks = max(4, round((options.gib * 2**29 - 2 * vocabulary * hidden) / block))
    model = folder / f"llama-{blocks}x{hidden}x{wide}"
    if not (model / "text.txt").exists():
        start = time.perf_counter()
        shutil.rmtree(model, ignore_errors=True)
        write_llama(model, blocks, hidden, wide, vocabulary, SHARD_BYTES)
        byte_tokenizer().save_pretrained(model)
        (model / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=100_000)))
        print(f"made in {time.perf_counter() - start:.0f} s")
    print(f"{blocks} blocks, hidden size {hidden}, MLP {wide}: {size_of(model) / 2**30:.2f} GiB", flush=True)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# The machine


def flops_per_second(options: argparse.Namespace, tokens: int) -> float:
    """Return the operations per second of blocks in memory, on so many tokens: what streaming can reach at best.

    Three blocks take turns, so that no cache holds their weights, as in a walk.
    """
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_attention_heads=options.hidden // 128
    )
    config._attn_implementation = "sdpa"
    blocks = [LlamaDecoderLayer(config, 0).bfloat16().eval() for _ in range(3)]
    hidden = torch.randn(-(-tokens // options.length), options.length, options.hidden).bfloat16()
    tables = LlamaRotaryEmbedding(config)(hidden, torch.arange(options.length)[None])
    times = []
    with torch.inference_mode():
        for turn in range(15):
            start = time.perf_counter()
            blocks[turn % 3](hidden, position_embeddings=tables)
            times.append(time.perf_counter() - start)
    weights = sum(weight.numel() for weight in blocks[0].parameters())
    found = 2 * hidden.shape[:2].numel() * weights / statistics.median(times[3:])
    print(
        f"{tokens} tokens through a block: {found / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads", flush=True
    )
    return found


def doubles_per_second() -> float:
    """Return the operations per second of a product in float64."""
    return measure_rate(torch.float64, CPU).flops_per_second


def seconds_to_read(folder: Path) -> float:
    """Read all weight files, which are in no cache, one after the other."""
    forget(folder)
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.perf_counter() - start
    forget(folder)
    return seconds


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The limit


@contextmanager
def limited_to(size: int) -> Iterator[tuple[str, ...]]:
    """Yield words that hold the command behind them to an amount of memory: by a control group, or else by ulimit."""
    group = Path("/sys/fs/cgroup") / f"sleb-scale-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.max").write_text(str(size))
        (group / "memory.swap.max").write_text("0")
    except OSError:
        if group.exists():
            group.rmdir()
        print("limit: ulimit -d, without the page cache", flush=True)
        yield "sh", "-c", f'ulimit -d {size // 1024} && exec "$0" "$@"'
        return
    try:
        print("limit: a control group", flush=True)
        yield "sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")
    finally:
        group.rmdir()


# A run


@dataclass(frozen=True)
class Mark:
    """A line that a process wrote to stderr: when, and how many bytes it had read by then."""

    line: str
    seconds: float
    read: int


@dataclass
class Run:
    """What a process did."""

    output: str = ""
    marks: list[Mark] = field(default_factory=list)
    seconds: float = 0.0
    resident: int = 0
    anonymous: int = 0
    read: int = 0

    def show(self, name: str, size: int) -> None:
        """Print what the process took, and what each of its tasks did."""
        print(
            f"\n{name}: {self.seconds:.1f} s; read {self.read / 1e9:.1f} GB from disk, {self.read / size:.2f} times "
            f"the files\n  peak {self.resident / 2**30:.2f} GiB resident, "
            f"{self.anonymous / 2**30:.2f} GiB of it not in files"
        )
        for mark, after in pairwise([*self.tasks, Mark("", self.seconds, self.read)]):
            taken, read = after.seconds - mark.seconds, (after.read - mark.read) / 1e9
            print(f"  {taken:7.1f} s {read:7.1f} GB  from: {mark.line[:80]}", flush=True)

    @property
    def tasks(self) -> list[Mark]:
        """The marks from the first task on, after all imports."""
        first = next((n for n, mark in enumerate(self.marks) if mark.line.endswith("…")), 0)
        return self.marks[first:]

    @property
    def working_seconds(self) -> float:
        """The seconds without imports."""
        return self.seconds - self.tasks[0].seconds

    def between(self, first: str, last: str) -> tuple[float, int]:
        """Return the seconds and the bytes read between two lines, named by how they begin."""
        start, end = (next(mark for mark in self.marks if mark.line.startswith(text)) for text in (first, last))
        return end.seconds - start.seconds, end.read - start.read


def run(arguments: Sequence[object], limit: Sequence[str] = ()) -> Run:
    """Run `sleb` and watch it.

    Raises:
        SystemExit: it failed.
    """
    command = [*limit, sys.executable, "-m", "sleb_cli", *map(str, arguments)]
    found, start = Run(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    readers = [
        threading.Thread(target=lambda: setattr(found, "output", process.stdout.read())),
        threading.Thread(target=lambda: collect(found, process, start)),
    ]
    for reader in readers:
        reader.start()
    # Not waited for yet: a process that has ended still tells what it read.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        found.anonymous = max(found.anonymous, 1024 * proc_number(process.pid, "status", "RssAnon"))
        time.sleep(0.02)
    found.seconds = time.perf_counter() - start
    found.read = proc_number(process.pid, "io", "read_bytes")
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    for reader in readers:
        reader.join()
    found.resident = usage.ru_maxrss * 1024
    if process.returncode:
        raise SystemExit(
            f"sleb {arguments[0]} ended with {process.returncode}:\n"
            + "\n".join(mark.line for mark in found.marks[-8:])
        )
    return found


def collect(found: Run, process: subprocess.Popen[str], start: float) -> None:
    for line in process.stderr:
        found.marks.append(
            Mark(line.strip(), time.perf_counter() - start, proc_number(process.pid, "io", "read_bytes"))
        )


def proc_number(pid: int, file: str, name: str) -> int:
    """Return a number from /proc/PID; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


# What is measured


class Benchmark:
    """The model, the limit, and what the machine can do."""

    def __init__(self, options: argparse.Namespace, folder: Path, place: Path, limit: Sequence[str]) -> None:
        self.options, self.folder, self.place, self.limit = options, folder, place, limit
        self.size = size_of(folder)
        self.architecture = read_architecture(locate_model(str(folder), ignore), load_plugins(), ignore)
        self.readings = [seconds_to_read(folder)]
        self.rates: dict[int, float] = {}
        self.text = ["--calibration", folder / "text.txt", "--sequence-length", options.length]

    def rate(self, tokens: int) -> float:
        if tokens not in self.rates:
            self.rates[tokens] = flops_per_second(self.options, tokens)
        return self.rates[tokens]

    @property
    def subject(self) -> tuple[object, ...]:
        """What is applied: the first plan, or if none was searched for, two blocks."""
        plan, block = self.place / f"{self.options.metrics.split(',')[0]}.json", self.architecture.block_count * 2 // 3
        return (plan,) if plan.exists() else (self.folder, "--blocks", f"{block},{block + 1}")

    def run(self, name: str, *arguments: object) -> Run:
        """Run `sleb` under the limit; the disk is timed before and after, since others may use it, too."""
        found = run([*arguments, "--json"], self.limit)
        forget(self.folder)
        found.show(name, self.size)
        self.readings = [self.readings[-1], seconds_to_read(self.folder)]
        print(f"this disk reads the files in {self.readings[0]:.1f} s before and {self.readings[1]:.1f} s after")
        return found

    def search(self) -> None:
        for metric in self.options.metrics.split(","):
            settings = ["--metric", metric, "--remove", 2, "--samples", self.options.samples, "--sample-tokens", 0]
            output = ["-o", self.place / f"{metric}.json", *self.options.option]
            found = self.run(f"search by {metric}", "search", self.folder, "--stream", *self.text, *settings, *output)
            plan = json.loads(found.output)
            print(f"removes {plan['removals']}, engine {plan['search']['engine']}")
            names = ["Search:", "step 1 of 2", "step 2 of 2"]
            for step, (first, last) in enumerate(pairwise(names)):
                seconds, read = found.between(first, last)
                tokens = min(plan["search"]["batch_size"], self.options.samples) * self.options.length
                computing = self.flops_of_step(plan, step, metric) / self.rate(tokens)
                reading = statistics.mean(self.readings) * (1 if metric == "nll" else 2)
                self.compare(f"step {step + 1}", seconds, read, reading, computing)

    def flops_of_step(self, plan: dict[str, Any], step: int, metric: str) -> float:
        """Return the operations of a step: of its block passes, and of a head for each candidate and the result."""
        removed, count = plan["removals"][:step], self.architecture.block_count
        candidates = [block for block in range(1, count - 1) if block not in removed]
        if metric == "nll":
            passes = walk(count, removed, candidates, start=removed[-1] if removed else 0)
            heads = len(candidates)
        else:  # by hidden states: the model once, and the loss of the result
            passes = [2 * (block not in removed) for block in range(count)]
            heads = 1
        flops = self.flops_of_pass(self.options.samples)
        return sum(each * one for each, one in zip(passes, flops.blocks, strict=True)) + heads * flops.outside

    def flops_of_pass(self, samples: int) -> Sizes:
        """Return the operations of all sequences in each block and in the head."""
        return count_work(self.architecture, samples, self.options.length, 0, torch.bfloat16).prefill_flops

    def compare(self, name: str, seconds: float, read: int, files: float, computing: float) -> None:
        """Hold a time against those for its files and for its arithmetic alone."""
        ratio = seconds / max(files, computing)
        print(
            f"{name}: {seconds:.1f} s, {read / 1e9:.1f} GB read; its files take {files:.1f} s, its arithmetic "
            f"{computing:.1f} s: {ratio:.2f}x of the larger, {compared(ratio <= GOAL)} {GOAL}x",
            flush=True,
        )

    def apply(self) -> None:
        found = self.run("apply", "apply", *self.subject, "--stream", "-o", self.place / "pruned")
        result = json.loads(found.output)
        proof = result["proof"]
        print(f"proof: {', '.join(proof['checks'])}; {proof['partial'] or 'complete'}")
        self.compare("apply", found.working_seconds, found.read, self.writing("pruned"), self.seconds_of_proof())

    def recover(self) -> None:
        text = ["--recover", "--samples", self.options.recover_samples, *self.text, "-o", self.place / "recovered"]
        found = self.run("apply --recover", "apply", *self.subject, "--stream", *text)
        result = json.loads(found.output)
        fits = result["recovery"]["closed_form"]["fits"]
        print(f"fitted {[fit['block'] for fit in fits]}; proof: {', '.join(result['proof']['checks'])}")
        passes = 2 * sum(self.flops_of_pass(self.options.recover_samples).blocks)
        passes /= self.rate(self.options.recover_samples * self.options.length)
        solving = sum(map(self.flops_of_fit, fits)) / doubles_per_second()
        computing = passes + solving + self.seconds_of_proof()
        print(f"arithmetic: {passes:.1f} s for one pass of both models, {solving:.1f} s to solve")
        self.compare("apply --recover", found.working_seconds, found.read, self.writing("recovered"), computing)

    def flops_of_fit(self, fit: dict[str, Any]) -> float:
        """Return the operations to solve for each ridge of a fit, and to judge it, in float64."""
        hidden, wide = self.options.hidden, self.options.intermediate
        widths = [wide if "down_proj" in name else hidden for name in fit["weights"] if "proj" in name]
        return sum(len(RIDGES) * (width**3 / 3 + 4 * width**2 * hidden) for width in widths)

    def seconds_of_proof(self) -> float:
        """Return the time of a prompt in both models."""
        flops = count_work(self.architecture, 1, PROOF_TOKENS, 0, torch.bfloat16).prefill_flops
        return 2 * (sum(flops.blocks) + flops.outside) / self.rate(PROOF_TOKENS)

    def writing(self, name: str) -> float:
        """Return the seconds to copy what was written of a checkpoint, and to read it and the model; delete it."""
        written = [file for file in (self.place / name).glob("*.safetensors") if file.stat().st_nlink == 1]
        size = sum(file.stat().st_size for file in written)
        largest = max(written, key=lambda file: file.stat().st_size)
        forget(self.place / name)
        start = time.perf_counter()
        shutil.copyfile(largest, self.place / "copy")
        with (self.place / "copy").open("rb") as file:
            os.fsync(file.fileno())
        rate = largest.stat().st_size / (time.perf_counter() - start)
        (self.place / "copy").unlink()
        both = self.size + size_of(self.place / name)
        shutil.rmtree(self.place / name)
        print(f"{size / 1e9:.1f} GB were written; this disk copies {rate / 1e9:.2f} GB/s")
        return size / rate + both / self.size * statistics.mean(self.readings)


def walk(count: int, removed: Sequence[int], candidates: Sequence[int], start: int) -> list[int]:
    """Return how many branches of a walk go through each block, if all of them are known where it starts."""
    passes = [0] * count
    for block in range(start, count):
        if block not in removed:
            base = any(candidate >= block for candidate in candidates) and block < candidates[-1]
            passes[block] = base + sum(candidate < block for candidate in candidates)
    return passes


def crossover(options: argparse.Namespace) -> None:
    """Time the search of a model that fits, in memory and streamed, by turns, and compare the plans."""
    seconds: dict[str, list[float]] = {"--no-stream": [], "--stream": []}
    plans = []
    with tempfile.TemporaryDirectory(dir=options.work, prefix="sleb-scale-") as place:
        text = Path(place) / "text.txt"
        text.write_text(" ".join(random.Random(0).choices(WORDS, k=100_000)))
        settings = ["--calibration", text, "--samples", options.crossover_samples, "--remove", 2]
        settings += ["--sequence-length", options.crossover_length, "--sample-tokens", 0, "--json", *options.option]
        for number in range(options.rounds):
            for flag in seconds if number % 2 == 0 else reversed(seconds):
                output = Path(place) / f"{len(plans)}.json"
                found = run(["search", options.model, flag, *settings, "-o", output])
                seconds[flag].append(found.between("Search:", "step 2 of 2")[0])
                plans.append({**json.loads(found.output), "environment": None})
    for flag, taken in seconds.items():
        print(f"{options.model} {flag:11} {statistics.median(taken):7.2f} s   ({' '.join(f'{t:.2f}' for t in taken)})")
    ratio = statistics.median(seconds["--stream"]) / statistics.median(seconds["--no-stream"])
    print(f"ratio {ratio:.2f}x, {compared(ratio <= CROSSOVER_GOAL)} {CROSSOVER_GOAL}x")
    print(f"plans {differing(plans) or 'equal'}")


def differing(plans: list[dict[str, Any]]) -> str:
    """Name what differs between plans."""
    keys = [key for key in plans[0] if any(plan[key] != plans[0][key] for plan in plans)]
    return f"DIFFER in {', '.join(keys)}" if keys else ""


# Other machines, by arithmetic

SEQUENCES, LENGTH = 128, 2048
UTILISATION = 0.4
"""Of a device's published peak: what large products reach, with all that happens between them."""
RACED = 0.21
"""The share of evaluations in a race, as measured on SmolLM2-135M (docs/search.md)."""
RACE_READS = 3
"""How often a step of a race reads a streamed model (docs/scale.md)."""
DEPTH = 0.7
"""Where blocks are taken to go, relative to the model's depth."""


@dataclass(frozen=True)
class LargeModel:
    """A published config; `inner` is the width of an MLP, or of one of its experts."""

    name: str
    blocks: int
    hidden: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    experts: int = 1
    active_experts: int = 1
    head_size: int = 128

    def block_weights(self, experts: int) -> int:
        attention = 2 * self.hidden * self.head_size * (self.heads + self.key_value_heads)
        return attention + experts * 3 * self.hidden * self.inner

    @property
    def block_bytes(self) -> int:
        return 2 * self.block_weights(self.experts)

    @property
    def outer_bytes(self) -> int:
        """Embeddings and head."""
        return 2 * 2 * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        return self.blocks * self.block_bytes + self.outer_bytes

    @property
    def token_flops(self) -> float:
        """Of a token in a block: two for each weight it meets, and causal attention to half of the positions."""
        return 2 * self.block_weights(self.active_experts) + 2 * LENGTH * self.heads * self.head_size

    @property
    def branch_bytes(self) -> int:
        """The hidden states of all tokens at one depth."""
        return 2 * SEQUENCES * LENGTH * self.hidden

    @property
    def streamed_bytes(self) -> int:
        """Everything outside the blocks, two blocks, and one sequence inside a block."""
        inside = LENGTH * (6 * self.hidden + 4 * (8 * self.hidden + 4 * self.inner))
        return self.outer_bytes + 2 * self.block_bytes + inside

    @property
    def step_bytes(self) -> int:
        """The hidden states of all branches of a step that keeps none from the step before."""
        return (self.blocks + BESIDE_CANDIDATES) * self.branch_bytes

    @property
    def remove(self) -> int:
        return math.ceil(self.blocks / 5)

    def search(self, *, reuse: bool) -> Work:
        """Return the work of the exact search by nll, whose steps may begin where the last removal was."""
        removed: list[int] = []
        passes = heads = 0
        for _ in range(self.remove):
            candidates = [block for block in range(1, self.blocks - 1) if block not in removed]
            passes += sum(walk(self.blocks, removed, candidates, start=removed[-1] if removed and reuse else 0))
            heads += len(candidates)
            removed.append(min(candidates, key=lambda block: abs(block - DEPTH * self.blocks)))
        return Work(passes, heads, self.remove)

    def race(self, *, reuse: bool) -> Work:
        """Return the work of a race, which does not spare the base branch."""
        exact = self.search(reuse=reuse)
        passes = RACED * exact.passes + (1 - RACED) * self.remove * self.blocks / 2
        return Work(passes, RACED * exact.heads, RACE_READS * self.remove)

    def cosine(self) -> Work:
        """Return the work of a search by hidden states: each step one pass for the scores, another for the loss."""
        return Work(2 * sum(self.blocks - step for step in range(self.remove)), self.remove, 2 * self.remove)

    def flops(self, work: Work) -> float:
        head = 2 * self.hidden * self.vocabulary
        return SEQUENCES * LENGTH * (work.passes * self.token_flops + work.heads * head)


@dataclass(frozen=True)
class Work:
    """How often all tokens go through a block and through the head, and how often a streamed model is read."""

    passes: float
    heads: float
    reads: int


@dataclass(frozen=True)
class Place:
    """A machine, or several of 8 devices.

    Attributes:
        devices: how many.
        peak: operations per second of each.
        memory: bytes of each.
        host: bytes of memory of the machine for each.
        read: bytes per second that reach each: from its disk, or over its link if the page cache holds the weights.
    """

    name: str
    devices: int
    peak: float
    memory: float
    host: float
    read: float


LARGE = (
    LargeModel("Llama-2-70B", 80, 8192, 64, 8, 28672, 32000),
    LargeModel("Qwen3-235B-A22B", 94, 4096, 64, 4, 1536, 151936, experts=128, active_experts=8),
    LargeModel("Llama-3.1-405B", 126, 16384, 128, 8, 53248, 128256),
)
PLACES = (
    Place("laptop, NVMe", 1, 25e12, 32e9, 32e9, 5e9),
    Place("one 24 GB GPU", 1, 165e12, 24e9, 64e9, 7e9),
    Place("8 x 80 GB", 8, 989e12, 80e9, 256e9, 50e9),
    Place("64 x 80 GB", 64, 989e12, 80e9, 256e9, 50e9),
)


def project() -> None:
    """Print what large models need, and how long they take, as Markdown."""
    tokens = SEQUENCES * LENGTH
    print(f"{SEQUENCES} x {LENGTH} = {tokens:,} tokens, a fifth of the blocks removed, at {DEPTH:.0%} of the depth")
    table("", "weights", "one block", "outside", "streamed, at least", "a branch", "a step")
    for model in LARGE:
        sizes = (model.weight_bytes, model.block_bytes, model.outer_bytes, model.streamed_bytes, model.branch_bytes)
        row(model.name, *(f"{size / 1e9:.1f} GB" for size in sizes), f"{model.step_bytes / 1e9:,.0f} GB")
    table("", "removed", "a pass of a block", "passes", "exact", "passes, reused", "exact", "`--fast`", "`cosine`")
    for model in LARGE:
        plain, reused = (model.search(reuse=reuse) for reuse in (False, True))
        works = (plain, reused, model.race(reuse=True), model.cosine())
        cells = [f"{model.flops(work):.1e} FLOP" for work in works]
        cells = [f"{plain.passes:,}", cells[0], f"{reused.passes:,}", *cells[1:]]
        row(model.name, f"{model.remove} of {model.blocks}", f"{tokens * model.token_flops:.1e} FLOP", *cells)
    table("", "", "weights", "a step's states", "exact", "`--fast`", "`cosine`")
    for model in LARGE:
        for place in PLACES:
            for way in ways(model, place):
                works = (model.search(reuse=way.reuse), model.race(reuse=way.reuse), model.cosine())
                rate = way.computing * UTILISATION * place.peak
                moved = (model.remove * way.moving, RACED * model.remove * way.moving, 0)
                seconds = [
                    max(model.flops(work) / rate, work.reads * way.reading + more)
                    for work, more in zip(works, moved, strict=True)
                ]
                row(model.name, place.name, way.weights, way.states, *map(duration, seconds))


@dataclass(frozen=True)
class Way:
    """How a model lies on a place, how many devices compute at a time, and the seconds to read it once.

    `moving` is what an exact step takes beside that: reading again for each group, or spilling hidden states.
    """

    weights: str
    states: str
    reuse: bool
    computing: int
    reading: float = 0.0
    moving: float = 0.0


def ways(model: LargeModel, place: Place) -> Iterator[Way]:
    each = math.ceil(model.weight_bytes / (0.8 * place.memory))
    if each <= min(8, place.devices):
        yield Way(f"spread over {each}", "of a batch", reuse=False, computing=place.devices // each)
    if model.streamed_bytes <= place.memory:
        # As `_hold_all` in sleb_cli/engine/forward/passes.py chooses.
        branch, reading = model.branch_bytes / place.devices, model.weight_bytes / place.read
        branches = max(0, int(place.host / 2 / branch) - BESIDE_CANDIDATES)
        grouped = model.blocks / branches * reading / 2 if branches else math.inf
        spilled = model.blocks**2 * branch / place.read
        if branches >= model.blocks:
            yield Way("streamed", "in memory", True, place.devices, reading)
        elif grouped < spilled:
            groups = math.ceil(model.blocks / branches)
            yield Way("streamed", f"in {groups} groups", False, place.devices, reading, grouped)
        else:
            states = f"{model.blocks * branch / 1e9:,.0f} GB on disk"
            yield Way("streamed", states, False, place.devices, reading, spilled)
    else:
        print(f"| {model.name} | {place.name} | too large, even streamed | | | | |")


def table(*titles: str) -> None:
    print()
    row(*titles)
    print("|---" * len(titles) + "|")


def row(*cells: str) -> None:
    print("".join(f"| {cell} ".replace("  ", " ") for cell in cells) + "|")


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
