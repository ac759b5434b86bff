"""What large models cost: time, memory and bytes read, against reading, copying and computing alone.

    python tests/benchmarks/scale.py [--parts search,apply] [--work FOLDER] [--gib 12] [--limit 4GiB]

The parts, by default the first two:

    search     two removals by nll, and two by cosine, which does little but read
    apply      the checkpoint without two blocks, proven
    copy       the checkpoint without --blocks and not proven, and `cp -r` of the model, by turns --rounds times
    crossover  --model (default: demo) in memory and with --stream, by turns --rounds times, on
               --crossover-samples of --crossover-length: the plans must be equal

The model is a Llama of random bfloat16 weights, of the sizes --hidden, --intermediate and --vocabulary, made under
--work once (default: a new folder, deleted afterwards; three times the size must be free). `search` and `apply` run
under `ulimit -d`, which does not count the page cache, and nothing of the model is in the page cache at the start.

Their time is held against the larger of two others, measured in the same run: that of their files, read in order and
written, and that of their operations (`sleb_cli/engine/speed/work.py`) at the rate of such blocks in memory. A step
reads the files once; by cosine twice, since the loss of the result is a pass of its own. A step after a removal starts
at the removed block. `apply` writes what it writes, and reads both models once. `copy` times each process from its
start until its output is on disk (`sync -f`), and both find the model in the page cache if that is large enough.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from saved_work import architecture_of, parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sleb_cli.units import parse_bytes

GOAL = 1.3
CROSSOVER_GOAL = 1.1
COPY_GOAL_BYTES = 500 * 2**20
SHARD_BYTES = 2**30
CHUNK = 16 << 20
PROOF_TOKENS = 64
SLEB = (sys.executable, "-m", "sleb_cli")
IMPORTS = (sys.executable, "-c", "from transformers import LlamaForCausalLM")
WORDS = "river mountain snow water stone bridge town mill fish field winter spring road horse letter king".split()


def main() -> None:
    options = parser(
        __doc__, parts=["search", "apply"], work=Path, gib=12.0, hidden=4096, intermediate=11008, vocabulary=32000,
        limit="4GiB", metrics=["nll", "cosine"], samples=4, length=64, blocks="5,20,21", rounds=2,
        model="demo", crossover_samples=4, crossover_length=256, option=[],
    ).parse_args()  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.work, prefix="sleb-scale-") as place:
        if options.parts != ["crossover"]:
            benchmark = Benchmark(options, Path(place))
        for part in options.parts:
            crossover(options, Path(place)) if part == "crossover" else getattr(benchmark, part)()


# The model


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """Write a random Llama, shard by shard, unless it is there."""
    hidden, wide, vocabulary = options.hidden, options.intermediate, options.vocabulary
    block = 4 * hidden**2 + 3 * hidden * wide
    blocks = max(4, round((options.gib * 2**29 - 2 * vocabulary * hidden) / block))
    model = folder / f"llama-{blocks}x{hidden}x{wide}"
    if not (model / "text.txt").exists():
        shutil.rmtree(model, ignore_errors=True)
        write_llama(model, llama_config(options, num_hidden_layers=blocks))
        byte_tokenizer().save_pretrained(model)
        write_words(model / "text.txt")
    print(f"{blocks} blocks, hidden size {hidden}, MLP {wide}: {size_of(model) / 2**30:.2f} GiB", flush=True)
    return model


def llama_config(options: argparse.Namespace, **others: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, vocab_size=options.vocabulary,
        num_attention_heads=options.hidden // 128, dtype="bfloat16", bos_token_id=0, eos_token_id=1, **others,
    )  # fmt: skip


def write_llama(folder: Path, config: LlamaConfig) -> None:
    """Write a Llama of random bfloat16 weights, with its config and index."""
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).bfloat16().state_dict()
    # Slices of one pool at random places: drawing each number would take longer than writing it.
    pool = torch.empty(2 * max(tensor.numel() for tensor in tensors.values()), dtype=torch.bfloat16).normal_(0, 0.02)
    rng = random.Random(0)

    def values(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return torch.ones_like(tensor, device="cpu")
        begin = rng.randrange(len(pool) // 2)
        return pool[begin : begin + tensor.numel()].clone().view(tensor.shape)

    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: values(tensors[name]) for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def written_files(folder: Path) -> list[Path]:
    """Return the weight files that are not links to those of the model."""
    return [file for file in folder.glob("*.safetensors") if file.stat().st_nlink == 1]


def write_words(file: Path) -> Path:
    file.write_text(" ".join(random.Random(0).choices(WORDS, k=100_000)))
    return file


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
    config = llama_config(options)
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
class Run:
    """What a process did; `marks` are the lines that it wrote to stderr, with the second of each."""

    output: str
    marks: list[tuple[str, float]]
    seconds: float
    resident: int
    read: int

    def at(self, begins: str) -> float:
        """Return the second of the first line that begins so."""
        return next(second for line, second in self.marks if line.startswith(begins))


def run(command: Sequence[object]) -> Run:
    """Run a process and watch it.

    Raises:
        SystemExit: it failed.
    """
    start, marks = time.perf_counter(), []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            marks.append((line.strip(), time.perf_counter() - start))
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        seconds = time.perf_counter() - start
        if process.returncode:
            last = "\n".join(line for line, _ in marks[-8:])
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{last}")
        output.seek(0)
        return Run(output.read(), marks, seconds, usage.ru_maxrss * 1024, usage.ru_inblock * 512)


# What is measured


def by_turns(rounds: int, sides: Sequence[str]) -> Iterator[str]:
    """Yield both sides in each round, and in every second one in reverse."""
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def show_ratio(seconds: dict[str, list[float]], goal: float) -> float:
    """Print and return the median seconds of both sides, and how many times those of the first the second takes."""
    for name, taken in seconds.items():
        print(f"{name:11} {statistics.median(taken):7.2f} s   ({' '.join(f'{each:.2f}' for each in taken)})")
    first, second = map(statistics.median, seconds.values())
    print(f"ratio       {second / first:7.2f}x  {compared(second / first <= goal)} {goal}x")
    return second / first


def compared(reached: bool) -> str:
    return "within the goal of" if reached else "MISSES the goal of"


class Benchmark:
    """The model, and what the machine can do."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place = options, place
        self.folder = make_model(options.work or place, options)
        self.size = size_of(self.folder)
        self.architecture = architecture_of(self.folder)
        self.readings = [seconds_to_read(self.folder)]
        self.rate = cache(partial(flops_per_second, options))

    def run(self, name: str, *arguments: object) -> Run:
        """Run `sleb` under the limit; the disk is timed before and after, since others may use it, too."""
        limit = f'ulimit -d {parse_bytes(self.options.limit, "--limit") // 1024} && exec "$0" "$@"'
        found = run(["sh", "-c", limit, *SLEB, *arguments, "--json"])
        forget(self.folder)
        print(
            f"\n{name}: {found.seconds:.1f} s; read {found.read / 1e9:.1f} GB from disk, {found.read / self.size:.2f} "
            f"times the files\n  peak {found.resident / 2**30:.2f} GiB resident"
        )
        self.readings = [self.readings[-1], seconds_to_read(self.folder)]
        print(f"this disk reads the files in {self.readings[0]:.1f} s before and {self.readings[1]:.1f} s after")
        return found

    def search(self) -> None:
        options, text = self.options, self.folder / "text.txt"
        for metric in options.metrics:
            found = self.run(
                f"search by {metric}", "search", self.folder, "--stream", "--metric", metric, "--remove", 2,
                "--calibration", text, "--samples", options.samples, "--sequence-length", options.length,
                "--sample-tokens", 0, "-o", self.place / f"{metric}.json", *options.option,
            )  # fmt: skip
            plan = json.loads(found.output)
            print(f"removes {plan['removals']}, engine {plan['search']['engine']}")
            for step, (first, last) in enumerate(pairwise(["Search:", "step 1 of 2", "step 2 of 2"])):
                seconds = found.at(last) - found.at(first)
                tokens = min(plan["search"]["batch_size"], options.samples) * options.length
                computing = self.flops_of_step(plan, step, metric) / self.rate(tokens)
                reading = statistics.mean(self.readings) * (1 if metric == "nll" else 2)
                self.compare(f"step {step + 1}", seconds, reading, computing)

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
        block, head = self.flops(self.options.samples, self.options.length)
        return sum(passes) * block + heads * head

    def flops(self, batch: int, length: int) -> tuple[float, float]:
        """Return the operations of one block, and of the head, on `batch` texts of this length."""
        config, tokens = self.architecture.text_config, batch * length
        blocks = self.architecture.skeleton.model.layers[0].parameters()
        weights = sum(weight.numel() for weight in blocks if weight.dim() > 1)
        attention = 4 * tokens * length * config.hidden_size
        return 2 * tokens * weights + attention, 2 * tokens * config.hidden_size * config.vocab_size

    def compare(self, name: str, seconds: float, files: float, computing: float) -> None:
        """Hold a time against those for its files and for its arithmetic alone."""
        ratio = seconds / max(files, computing)
        print(
            f"{name}: {seconds:.1f} s; its files take {files:.1f} s, its arithmetic {computing:.1f} s: {ratio:.2f}x of "
            f"the larger, {compared(ratio <= GOAL)} {GOAL}x",
            flush=True,
        )

    def apply(self) -> None:
        block, output = self.architecture.block_count * 2 // 3, self.place / "pruned"
        found = self.run("apply", "apply", self.folder, "--blocks", f"{block},{block + 1}", "--stream", "-o", output)
        proof = json.loads(found.output)["proof"]
        print(f"proof: {', '.join(proof['checks'])}; {proof['partial'] or 'complete'}")
        first = next(second for line, second in found.marks if line.endswith("…"))  # after all imports
        flops, head = self.flops(1, PROOF_TOKENS)
        computing = 2 * (self.architecture.block_count * flops + head) / self.rate(PROOF_TOKENS)
        self.compare("apply", found.seconds - first, self.writing(output), computing)

    def writing(self, output: Path) -> float:
        """Return the seconds to copy what was written of a checkpoint, and to read it and the model; delete it."""
        written = written_files(output)
        size = sum(file.stat().st_size for file in written)
        largest = max(written, key=lambda file: file.stat().st_size)
        forget(output)
        start = time.perf_counter()
        shutil.copyfile(largest, self.place / "copy")
        with (self.place / "copy").open("rb") as file:
            os.fsync(file.fileno())
        rate = largest.stat().st_size / (time.perf_counter() - start)
        (self.place / "copy").unlink()
        both = self.size + size_of(output)
        shutil.rmtree(output)
        print(f"{size / 1e9:.1f} GB were written; this disk copies {rate / 1e9:.2f} GB/s")
        return size / rate + both / self.size * statistics.mean(self.readings)

    def copy(self) -> float:
        """Time `sleb apply` and `cp -r` by turns, and measure the memory of the former; return the ratio."""
        output, floor = self.place / "copied", run(IMPORTS)
        apply = [*SLEB, "apply", self.folder, "--blocks", self.options.blocks, "-o", output, "--no-verify", "-q"]
        sides = {"cp -r": ["cp", "-r", self.folder, output], "sleb apply": apply}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peak = written = 0
        for name in by_turns(self.options.rounds, list(sides)):
            start = time.perf_counter()
            found = run(sides[name])
            subprocess.run(["sync", "-f", output], check=True)
            seconds[name].append(time.perf_counter() - start)
            if name == "sleb apply":
                peak = max(peak, found.resident)
                written = sum(file.stat().st_size for file in written_files(output))
            shutil.rmtree(output)
            subprocess.run(["sync", "-f", self.place], check=True)  # the deletion is nobody's time
        ratio = show_ratio(seconds, GOAL)
        print(f"{written / 1e9:.2f} GB were written; {floor.seconds:.2f} s are the import of torch and transformers")
        print(
            f"peak memory {peak / 2**20:.0f} MiB {compared(peak < COPY_GOAL_BYTES)} {COPY_GOAL_BYTES / 2**20:.0f} MiB; "
            f"{floor.resident / 2**20:.0f} MiB of it are torch and transformers"
        )
        return ratio


def walk(count: int, removed: Sequence[int], candidates: Sequence[int], start: int) -> list[int]:
    """Return how many branches of a walk go through each block, if all of them are known where it starts."""
    passes = [0] * count
    for block in range(start, count):
        if block not in removed:
            base = any(candidate >= block for candidate in candidates) and block < candidates[-1]
            passes[block] = base + sum(candidate < block for candidate in candidates)
    return passes


def crossover(options: argparse.Namespace, place: Path) -> float:
    """Time the search of a model that fits, in memory and streamed, by turns; compare the plans, return the ratio."""
    seconds: dict[str, list[float]] = {"--no-stream": [], "--stream": []}
    plans = []
    settings = ["--calibration", write_words(place / "text.txt"), "--samples", options.crossover_samples, "--remove", 2]
    settings += ["--sequence-length", options.crossover_length, "--sample-tokens", 0, "--json", *options.option]
    for flag in by_turns(options.rounds, list(seconds)):
        found = run([*SLEB, "search", options.model, flag, *settings, "-o", place / f"{len(plans)}.json"])
        seconds[flag].append(found.at("step 2 of 2") - found.at("Search:"))
        plans.append({**json.loads(found.output), "environment": None})
    ratio = show_ratio(seconds, CROSSOVER_GOAL)
    print("plans", "equal" if all(plan == plans[0] for plan in plans) else "DIFFER")
    return ratio


if __name__ == "__main__":
    main()
