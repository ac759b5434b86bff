"""How far a search goes: until so many blocks are gone, the model is small or fast enough, or it would lose too much.

All arithmetic. What a model takes by block (`Sizes`) is found out elsewhere: parameters, bytes, or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from sleb_cli.engine.sizes import Sizes
from sleb_plugins import UsageError

HOW_FAR = ("ratio", "remove", "target_params", "target_memory", "target_speedup", "max_loss_increase",
           "max_perplexity_ratio")  # fmt: skip
"""The fields of a request that say how far to go: one of them does."""

_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class TargetRequest:
    """How far to go, as the user gave it, and what some ways to say it need to know.

    `serve_dtype`, `serve_length` and `serve_batch` say how the model will be served; `workload`, what is to be faster.
    """

    ratio: str | None = None
    remove: int | None = None
    target_params: str | None = None
    target_memory: str | None = None
    target_speedup: str | None = None
    max_loss_increase: str | None = None
    max_perplexity_ratio: str | None = None
    serve_dtype: str | None = None
    serve_length: int | None = None
    serve_batch: int | None = None
    workload: Literal["prompt", "generation"] | None = None

    def chosen(self) -> str:
        """Give the one of `HOW_FAR` that the user said.

        Raises:
            UsageError: there is none, or more than one; or what belongs to another one was given.
        """
        given = [name for name in HOW_FAR if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"there are {_options(given, ' and ')}" if given else "there is none"
            raise UsageError(
                f"One of {_options(HOW_FAR, ', ')} says how far to go, and {found}.", hint="--ratio 0.2 is usual."
            )
        needs = {"serve_dtype": "target_memory", "serve_length": "target_memory", "serve_batch": "target_memory",
                 "workload": "target_speedup"}  # fmt: skip
        for name, target in needs.items():
            if getattr(self, name) is not None and given[0] != target:
                raise UsageError(
                    f"{option_of(name)} goes with {option_of(target)}.", hint=f"Leave out {option_of(name)}."
                )
        return given[0]


def option_of(name: str) -> str:
    """Give the option of the command line that fills a field: --target-params."""
    return "--target-workload" if name == "workload" else "--" + name.replace("_", "-")


def _options(names: Sequence[str], between: str) -> str:
    return between.join(map(option_of, names))


@dataclass(frozen=True)
class SizeTarget:
    """Ends a search as soon as what remains is small enough.

    Attributes:
        name: what is to become small: a field of the request.
        asked: what the user wrote.
        sizes: how much of it the model has, block by block.
        most: how much of it may remain.
        say: words for an amount of it: "1.19B parameters".
    """

    name: str
    asked: str
    sizes: Sizes
    most: float
    say: Callable[[float], str]

    def met(self, removed: Collection[int]) -> bool:
        """Whether the model is small enough without these blocks."""
        return self._fits(self.sizes.without(removed))

    def allows(self, increase: float) -> bool:
        """Whether a removal may raise the loss so far above the dense model's, in nats per token: any may."""
        return True

    def removals(self, candidates: Sequence[int], removed: Collection[int] = ()) -> int:
        """Give how many removals meet it whichever of the candidates go, those in `removed` among them.

        Raises:
            UsageError: it is met already, or cannot be; the sentence says what is the nearest.
        """
        has, goal = self.sizes.without(removed), self.say(self.most)
        if self._fits(has):
            so_far = f"Without the {len(removed)} blocks" if removed else "As it is"
            raise UsageError(
                f"{so_far}, the model is at {self.say(has)} already; the target is {goal}.",
                hint="Nothing needs to go. Ask for more.",
            )
        # The small ones first; and one block stays in any case.
        free = sorted(self.sizes.blocks[block] for block in candidates if block not in removed)
        free = free[: len(self.sizes.blocks) - 1 - len(removed)]
        left = list(accumulate(free, lambda rest, block: rest - block, initial=has))
        if not self._fits(left[-1]):
            raise UsageError(
                f"With {len(removed) + len(free)} blocks removed, the most that may go, the model is still at "
                f"{self.say(left[-1])}; the target is {goal}.",
                hint=f"Take {self.say(left[-1])} for {option_of(self.name)}, or protect fewer blocks.",
            )
        return len(removed) + next(count for count, rest in enumerate(left) if self._fits(rest))

    def _fits(self, amount: float) -> bool:
        return amount <= self.most * (1 + 1e-12)  # what rounding alone adds is not too much


@dataclass(frozen=True)
class LossTarget:
    """Ends a search before the removal that would raise the calibration loss too far.

    Attributes:
        name: a field of the request.
        asked: what the user wrote.
        most: nats per token that the loss may lie above the dense model's.
    """

    name: str
    asked: str
    most: float

    def met(self, removed: Collection[int]) -> bool:
        """Whether the search ends here: it goes on as long as it may."""
        return False

    def allows(self, increase: float) -> bool:
        """Whether a removal may raise the loss so far above the dense model's, in nats per token."""
        return increase <= self.most

    def removals(self, candidates: Sequence[int], removed: Collection[int] = ()) -> int:
        """Give how many removals there can be, those in `removed` among them; one block stays in any case."""
        return len({*candidates, *removed})


Target = SizeTarget | LossTarget


def loss_target(request: TargetRequest, name: str) -> LossTarget:
    """Read --max-loss-increase (nats per token) or --max-perplexity-ratio: its logarithm is the same in nats.

    Raises:
        UsageError: it is no number, or the loss would have to fall.
    """
    asked = getattr(request, name)
    if name == "max_loss_increase":
        return LossTarget(name, asked, parse_number(asked, name, least=0))
    return LossTarget(name, asked, math.log(parse_number(asked, name, least=1)))


def parse_number(text: str, name: str, *, least: float) -> float:
    """Read a number of at least `least`; "1.25x" is one.

    Raises:
        UsageError: it is none, or a smaller one.
    """
    try:
        number = float(text.lower().removesuffix("x"))
    except ValueError:
        number = math.nan
    if not (least <= number < math.inf):
        raise UsageError(f"{option_of(name)} {text} is not a number of {least:g} or more.", hint="Write it like 1.25.")
    return number


def parse_count(text: str, name: str) -> float:
    """Read "1.2B", "600M" or "135000000".

    Raises:
        UsageError: it is no such number above 0.
    """
    unit = text[-1:].lower()
    try:
        count = float(text[:-1] if unit in _COUNTS else text) * _COUNTS.get(unit, 1)
    except ValueError:
        count = math.nan
    if not (0 < count < math.inf):
        raise UsageError(f"{option_of(name)} {text} is no number of parameters.", hint="Write it like 1.2B or 600M.")
    return count


def fit_slope(removed: Sequence[int], share: Sequence[float]) -> float:
    """Give the share of the dense model's time that one block takes, by least squares through the dense model itself.

    `share` holds, for so many `removed` blocks, the pruned model's time as a share of the dense one's, measured side by
    side: 1 - slope x removed.
    """
    return sum(n * (1 - s) for n, s in zip(removed, share, strict=True)) / sum(n * n for n in removed)
