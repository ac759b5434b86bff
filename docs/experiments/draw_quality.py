"""Draw docs/experiments/quality.svg from the table in quality.md: python
docs/experiments/draw_quality.py [FILE].
"""

from __future__ import annotations

import sys
from pathlib import Path

from sleb_cli.exporters.table.figure import draw_figure
from sleb_cli.exporters.table.rows import PlanTable, Row
from sleb_cli.units import format_perplexity

PAGE = Path(__file__).with_name("quality.md")
TEXTS = ("perplexity, encyclopaedia", "perplexity, C4")
SIZES = (3, 6, 9)
SLEB = "greedy, nll (SLEB)"


def read_rows(page: str) -> list[Row]:
    """Read the perplexities of each method at each size; "=" stands for SLEB's."""
    table = page.partition("| method ")[2].partition("\n\n")[0].replace("*", "")
    methods = {}
    for line in table.splitlines()[2:]:
        method, *cells, _ = (cell.strip() for cell in line.strip("|").split("|"))
        methods[method] = dict(zip((0,) if method == "dense" else SIZES, cells, strict=False))
    rows = []
    for method, cells in methods.items():
        for size, cell in cells.items():
            values = (methods[SLEB][size] if cell == "=" else cell).split(", ")
            if cell:
                estimates = {
                    text: (float(value), None) for text, value in zip(TEXTS, values, strict=True)
                }
                rows.append(
                    {"metric": method, "removed": size, "removed from": "30 blocks"} | estimates
                )
    return rows


def main() -> None:
    """Write the figure."""
    file = Path(sys.argv[1]) if sys.argv[1:] else PAGE.with_suffix(".svg")
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    file.write_bytes(draw_figure("svg", PlanTable(rows, dict.fromkeys(TEXTS, format_perplexity))))


if __name__ == "__main__":
    main()
