"""The arguments of a benchmark, and how two sides that take turns are timed and shown."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any


def parser(doc: str | None, *places: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of these positional arguments, and of an option for each default, of its type.

    False makes a flag, a type an option without a default, and a list one whose values are separated by commas.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for place in places:
        found.add_argument(place)
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            found.add_argument(flag, action="store_true")
        elif isinstance(default, type):
            found.add_argument(flag, type=default)
        elif isinstance(default, list):
            kind = type(default[0]) if default else str
            found.add_argument(flag, type=separated(kind), default=default, help=",".join(map(str, default)))
        else:
            found.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    return found


def separated(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def by_turns(rounds: int, sides: Sequence[Any]) -> Iterator[Any]:
    """Yield both sides in each round, and in every second one in reverse."""
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def show_ratio(seconds: dict[str, list[float]], goal: float) -> None:
    """Print the median seconds of both sides, and how many times those of the first the second takes."""
    for name, taken in seconds.items():
        print(f"{name:11} {statistics.median(taken):7.2f} s   ({' '.join(f'{each:.2f}' for each in taken)})")
    first, second = map(statistics.median, seconds.values())
    print(f"ratio       {second / first:7.2f}x  {compared(second / first <= goal)} {goal}x")


def compared(reached: bool) -> str:
    return "within the goal of" if reached else "MISSES the goal of"
