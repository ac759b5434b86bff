"""Tables of measurements for the README and the guides: Cog calls `table`, and `figures.toml` has
the numbers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
# Decimals keep their digits: as a float, 40.55 is a little less, and its first decimal 5.
FIGURES: dict[str, Any] = tomllib.loads(TEXT, parse_float=Decimal)
CONSTANTS: dict[str, list[str]] = FIGURES.pop("constants", {})
"""By page, numbers that look measured and are not."""


@dataclass(frozen=True)
class Measure:
    """What was measured of one model, by what was done to it."""

    title: str
    format: str
    values: dict[str, Any]
    dense: str
    of: int | None

    def cell(self, row: str) -> str:
        """Write a value, and its interval if there is one."""
        if row not in self.values:
            return ""
        value, *interval = self._listed(row)
        return self._shown(row, value) + (f" ({interval[0]} to {interval[1]})" if interval else "")

    def forms(self, row: str) -> Iterator[str]:
        """Yield the ways in which a sentence may write a value."""
        value, *interval = self._listed(row)
        yield from (self._shown(row, value), str(value), *(f"{end}%" for end in interval))
        if self.format == "share":
            yield f"{value} of {self.of}"

    def _listed(self, row: str) -> list[Any]:
        value = self.values[row]
        return value if isinstance(value, list) else [value]

    def _shown(self, row: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if self.format == "perplexity":
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
        if self.format != "share":
            return self.format.format(value)
        if row == self.dense:
            return f"{value:,} of {self.of:,}" if self.of else str(value)
        return f"{value / self._listed(self.dense)[0]:.0%}"


def _measures(model: dict[str, Any]) -> dict[str, Measure]:
    found = {name: each for name, each in model.items() if isinstance(each, dict)}
    dense = model.get("dense", "")
    return {
        name: Measure(
            each["title"], each.get("format", "{}"), each["values"], dense, each.get("of")
        )
        for name, each in found.items()
    }


MEASURES = {name: _measures(model) for name, model in FIGURES.items()}


def table(columns: str, **rows: str) -> str:
    """Write a table of these measures; `rows` has, by model, a line for each thing that was done to
    it (none: all).

    Raises:
        KeyError: a measure or a row is not in `figures.toml`.
    """
    names = columns.split()
    shown = {
        name: [MEASURES[model][name] for model in rows if name in MEASURES[model]] for name in names
    }
    if absent := [name for name, measures in shown.items() if not measures]:
        raise KeyError(absent)
    lines = [["", *(measures[0].title for measures in shown.values())], ["---"] * (len(names) + 1)]
    for model, text in rows.items():
        done = [line.strip() for line in text.strip().splitlines()] or all_rows(model, names)
        for at, row in enumerate(done):
            if not any(row in measure.values for measure in MEASURES[model].values()):
                raise KeyError(f"{model}: {row}")
            first = (
                label(row, done[:at])
                if at or len(rows) == 1
                else f"{FIGURES[model]['model']}, {row}"
            )
            cells = [
                MEASURES[model][name].cell(row) if name in MEASURES[model] else "" for name in names
            ]
            lines.append([first, *cells])
    return "".join(
        f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines
    )


def all_rows(model: str, names: list[str]) -> list[str]:
    """Order all rows: the dense model, then as they come, but "24 blocks, recovered" below "24
    blocks".
    """
    measures = [MEASURES[model][name] for name in names if name in MEASURES[model]]
    rows = dict.fromkeys(chain.from_iterable(measure.values for measure in measures))
    place = {row: -1 if row == measures[0].dense else at for at, row in enumerate(rows)}

    def path(row: str) -> list[int]:
        return [
            place[above] for above in sorted(rows, key=len) if f"{row}, ".startswith(f"{above}, ")
        ]

    return sorted(rows, key=path)


def label(row: str, above: list[str]) -> str:
    """Shorten "24 blocks, recovered" to "and recovered" below a row that begins "24 blocks"."""
    for at, other in reversed([*enumerate(above)]):
        if all(between.startswith(f"{other}, ") for between in [*above[at + 1 :], row]):
            return f"and {row.removeprefix(other)[2:]}"
    return row
