"""Draw docs/images/recovery.svg: what more healing gives back, from the table between the marks in docs/recovery.md."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parents[1]
MARKS = ("<!-- draw_recovery.py: begin -->", "<!-- draw_recovery.py: end -->")
TEXTS = ("encyclopaedia", "C4")
SHARE = re.compile(r"(\d+) \((\d+) to (\d+)\)")


def rows(document: str) -> list[list[str]]:
    """Return the cells of the table, without emphasis and without its head."""
    table = document.partition(MARKS[0])[2].partition(MARKS[1])[0].replace("*", "")
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "|" in line][2:]


def draw(table: list[list[str]], path: Path) -> None:
    """Draw the shares of the lost nats against the tokens healed on: a panel for each text, a line for each model."""
    figure, panels = pyplot.subplots(1, len(TEXTS), figsize=(9, 4), layout="constrained", sharey=True)
    for column, (panel, text) in enumerate(zip(panels, TEXTS, strict=True), 2):
        for model in dict.fromkeys(cells[0] for cells in table):
            own = [cells for cells in table if cells[0] == model]
            tokens = [int(cells[1].replace(",", "")) / 1000 for cells in own]
            shares = [[int(number) for number in SHARE.search(cells[column]).groups()] for cells in own]
            middle, low, high = zip(*shares, strict=True)
            above = [top - share for top, share in zip(high, middle, strict=True)]
            below = [share - bottom for share, bottom in zip(middle, low, strict=True)]
            panel.errorbar(tokens, middle, yerr=[below, above], marker=".", capsize=2, label=model)
        panel.set(title=text, xlabel="thousands of tokens healed on")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("% of the lost nats back")
    panels[0].legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(rows((DOCS / "recovery.md").read_text(encoding="utf-8")), DOCS / "images" / "recovery.svg")
