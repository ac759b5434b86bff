"""Time and peak memory of `sleb apply`, next to a plain copy of the folder, in one run on the same data.

    python tests/benchmarks/apply.py [--folder FOLDER] [--gib 8] [--shards 16] [--blocks 5,20,41] [--rounds 3]

Writes a Llama of 64 blocks in bfloat16 with random weights to a new folder under FOLDER (default: the temporary one of
the system; it needs 2.9 times the size), and deletes it afterwards. Each round times `cp -r` and `sleb apply
--no-verify`, each as a process of its own from its start until its output is on disk (`sync -f`), in alternating order;
with --dtype, ours casts. Both find the source in the page cache if the cache is large enough. Peak memory is of the
process (`ru_maxrss`). A process that only imports torch and transformers is shown for comparison.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import by_turns, compared, parser, show_ratio
from made_models import size_of, write_llama

BLOCKS = 64
HIDDEN = 1024
VOCABULARY = 4096
GOAL_RATIO = 1.3
GOAL_BYTES = 500 * 2**20
IMPORTS = "from transformers import LlamaForCausalLM"


def main() -> None:
    options = parser(
        __doc__, folder=Path, gib=8.0, shards=16, blocks="5,20,41,42,50,57", rounds=3, dtype=str
    ).parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sleb-benchmark-") as place:
        source = Path(place) / "model"
        size = make_model(source, options.gib, options.shards)
        print(f"{size / 1e9:.2f} GB, {BLOCKS} blocks, {options.shards} files, without {options.blocks}", flush=True)
        start, floor = run([sys.executable, "-c", IMPORTS], Path(place))
        copy, ours = Path(place) / "copy", Path(place) / "pruned"
        apply = [sys.executable, "-m", "sleb_cli", "apply", str(source), "--blocks", options.blocks, "-o", str(ours)]
        apply += ["--no-verify", "--json", "-q", *(["--dtype", options.dtype] if options.dtype else [])]
        sides = [("cp -r", ["cp", "-r", str(source), str(copy)], copy), ("sleb apply", apply, ours)]
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in sides}
        peak = written = 0
        for name, command, output in by_turns(options.rounds, sides):
            taken, memory = run(command, output)
            seconds[name].append(taken)
            if output == ours:
                peak = max(peak, memory)
                written = sum(path.stat().st_size for path in ours.iterdir() if path.stat().st_nlink == 1)
            shutil.rmtree(output)
            run(["sync", "-f", place], Path(place))  # the deletion is nobody's time
    show_ratio(seconds, GOAL_RATIO)
    print(f"            {written / 1e9:.2f} GB were written; {start:.2f} s are the import of torch and transformers")
    print(
        f"peak memory {peak / 2**20:7.0f} MiB {compared(peak < GOAL_BYTES)} {GOAL_BYTES / 2**20:.0f} MiB; "
        f"{floor / 2**20:.0f} MiB of it are torch and transformers"
    )


def run(command: list[str], output: Path) -> tuple[float, int]:
    """Run a command until its output is on disk; return the seconds and its peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    subprocess.run(["sync", "-f", str(output)], check=True)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def make_model(folder: Path, gib: float, shards: int) -> int:
    """Write a random Llama, and return its size in bytes."""
    # Four matrices of attention, and three of the MLP, whose width sets the size.
    elements = gib * 2**30 / 2 / BLOCKS
    width = max(8, round((elements - 4 * HIDDEN**2) / (3 * HIDDEN)))
    write_llama(folder, BLOCKS, HIDDEN, width, VOCABULARY, int(gib * 2**30 / shards))
    return size_of(folder)


if __name__ == "__main__":
    main()
