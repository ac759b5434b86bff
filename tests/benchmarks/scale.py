"""What a model larger than memory costs: time, memory and bytes read, against reading its files and against its FLOPs.

    python tests/benchmarks/scale.py [--parts search,apply] [--work FOLDER] [--gib 12] [--limit 4GiB]

The parts, by default all but the last:

    search     two removals by nll, and two by cosine, which does little but read
    apply      the checkpoint without these blocks, proven
    crossover  --model (default: demo) in memory and with --stream, by turns --rounds times, on
               --crossover-samples of --crossover-length: the plans must be equal

The model is a Llama of random bfloat16 weights, of the sizes --hidden, --intermediate and --vocabulary, made under
--work once (default: a new folder, deleted afterwards; three times the size must be free). The first of --metrics finds
the plan that is applied. `sleb` runs under `ulimit -d`, which does not count the page cache. Nothing of the model is in
the page cache at the start.

A time is held against the larger of two others, measured in the same run: that of its files, read in order and written,
and that of its operations (`sleb_cli/engine/speed/work.py`) at the rate of such blocks in memory. A step reads the
files once; by cosine twice, since the loss of the result is a pass of its own. A step after a removal starts at the
removed block. `apply` writes what it writes, and reads both models once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from arguments import by_turns, compared, parser, show_ratio
from made_models import size_of, write_llama
from saved_work import architecture_of, require_known
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sleb_cli.engine.speed.work import count_work
from sleb_cli.units import parse_bytes

GOAL = 1.3
CROSSOVER_GOAL = 1.1
PARTS = ("search", "apply", "crossover")
SHARD_BYTES = 2**30
CHUNK = 16 << 20
PROOF_TOKENS = 64
WORDS = "river mountain snow water stone bridge town mill fish field winter spring road horse letter king".split()


def main() -> None:
    options = read_options()
    if parts := [part for part in PARTS[:2] if part in options.parts]:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="sleb-scale-") as place:
            folder = make_model(options.work or Path(place), options)
            kibibytes = parse_bytes(options.limit, "--limit") // 1024
            limited = ["sh", "-c", f'ulimit -d {kibibytes} && exec "$0" "$@"']
            benchmark = Benchmark(options, folder, Path(place), limited)
            for part in parts:
                getattr(benchmark, part)()
    if "crossover" in options.parts:
        crossover(options)


def read_options() -> argparse.Namespace:
    found = parser(
        __doc__, parts=list(PARTS[:2]), work=Path, gib=12.0, hidden=4096, intermediate=11008, vocabulary=32000,
        limit="4GiB", metrics=["nll", "cosine"], samples=4, length=64,
        model="demo", rounds=2, crossover_samples=4, crossover_length=256,
    )  # fmt: skip
    found.add_argument("--option", action="append", default=[], help="of `sleb search`: --option=--fast")
    options = found.parse_args()
    require_known(found, "part", options.parts, PARTS)
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
        write_words(model / "text.txt")
        print(f"made in {time.perf_counter() - start:.0f} s")
    print(f"{blocks} blocks, hidden size {hidden}, MLP {wide}: {size_of(model) / 2**30:.2f} GiB", flush=True)
    return model


def write_words(file: Path) -> None:
    file.write_text(" ".join(random.Random(0).choices(WORDS, k=100_000)))


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
    print(f"{tokens} tokens through a block: {found / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads", flush=True)
    return found


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
    read: int = 0

    def show(self, name: str, size: int) -> None:
        """Print what the process took, and what each of its tasks did."""
        print(
            f"\n{name}: {self.seconds:.1f} s; read {self.read / 1e9:.1f} GB from disk, {self.read / size:.2f} times "
            f"the files\n  peak {self.resident / 2**30:.2f} GiB resident"
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
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    found.seconds = time.perf_counter() - start
    for reader in readers:
        reader.join()
    found.resident, found.read = usage.ru_maxrss * 1024, usage.ru_inblock * 512
    if process.returncode:
        raise SystemExit(
            f"sleb {arguments[0]} ended with {process.returncode}:\n"
            + "\n".join(mark.line for mark in found.marks[-8:])
        )
    return found


def collect(found: Run, process: subprocess.Popen[str], start: float) -> None:
    for line in process.stderr:
        found.marks.append(Mark(line.strip(), time.perf_counter() - start, bytes_read(process.pid)))


def bytes_read(pid: int) -> int:
    """Return what a process has read from disk; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


# What is measured


class Benchmark:
    """The model, the limit, and what the machine can do."""

    def __init__(self, options: argparse.Namespace, folder: Path, place: Path, limit: Sequence[str]) -> None:
        self.options, self.folder, self.place, self.limit = options, folder, place, limit
        self.size = size_of(folder)
        self.architecture = architecture_of(folder)
        self.readings = [seconds_to_read(folder)]
        self.rate = cache(partial(flops_per_second, options))
        self.text = ["--calibration", folder / "text.txt", "--sequence-length", options.length]

    @property
    def subject(self) -> tuple[object, ...]:
        """What is applied: the first plan, or if none was searched for, two blocks."""
        plan, block = self.place / f"{self.options.metrics[0]}.json", self.architecture.block_count * 2 // 3
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
        for metric in self.options.metrics:
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
        flops = count_work(
            self.architecture, self.options.samples, self.options.length, 0, torch.bfloat16
        ).prefill_flops
        return sum(each * one for each, one in zip(passes, flops.blocks, strict=True)) + heads * flops.outside

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
        write_words(text)
        settings = ["--calibration", text, "--samples", options.crossover_samples, "--remove", 2]
        settings += ["--sequence-length", options.crossover_length, "--sample-tokens", 0, "--json", *options.option]
        for flag in by_turns(options.rounds, list(seconds)):
            found = run(["search", options.model, flag, *settings, "-o", Path(place) / f"{len(plans)}.json"])
            seconds[flag].append(found.between("Search:", "step 2 of 2")[0])
            plans.append({**json.loads(found.output), "environment": None})
    show_ratio(seconds, CROSSOVER_GOAL)
    print("plans", "equal" if all(plan == plans[0] for plan in plans) else "DIFFER")


if __name__ == "__main__":
    main()
