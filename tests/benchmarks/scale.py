"""What a large model costs: `sleb apply` against `cp -r`, and a search with `--stream` against the same one in memory.

    python tests/benchmarks/scale.py [--parts copy,crossover] [--work FOLDER] [--gib 12]

The parts:

    copy       the checkpoint without --blocks and not proven, and `cp -r` of the model, by turns --rounds times
    crossover  --model (default: demo) in memory and with --stream, by turns --rounds times, on
               --crossover-samples of --crossover-length: the plans must be equal

The model of `copy` is a Llama of random bfloat16 weights, of the sizes --hidden, --intermediate and --vocabulary, made
under --work once (default: a new folder, deleted afterwards; twice the size must be free). Each process is timed from
its start until its output is on disk (`sync -f`), and both find the model in the page cache if that is large enough.
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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from saved_work import parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOAL = 1.3
CROSSOVER_GOAL = 1.1
COPY_GOAL_BYTES = 500 * 2**20
SHARD_BYTES = 2**30
SLEB = (sys.executable, "-m", "sleb_cli")
IMPORTS = (sys.executable, "-c", "from transformers import LlamaForCausalLM")
WORDS = "river mountain snow water stone bridge town mill fish field winter spring road horse letter king".split()


def main() -> None:
    options = parser(
        __doc__, parts=["copy", "crossover"], work=Path, gib=12.0, hidden=4096, intermediate=11008, vocabulary=32000,
        blocks="5,20,21", rounds=2,
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
