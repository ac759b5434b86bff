"""How far a search goes: until so many blocks are gone, the model is small or fast enough, or it would lose too much.

All arithmetic. What a model takes by block (`Sizes`) is found out elsewhere: parameters, bytes, or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import get_args

from sleb_cli.engine.model.sizes import Sizes
from sleb_cli.engine.search.choices import Protection
from sleb_cli.plan import ServingRecord, TargetName, TargetRecord, Workload
from sleb_plugins import UsageError

HOW_FAR: tuple[TargetName, ...] = get_args(TargetName)
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
    workload: Workload | None = None

    def chosen(self) -> TargetName:
        """Give the one of `HOW_FAR` that the user said.

        Raises:
            UsageError: there is none, or more than one; or what belongs to another one was given.
        """
        given = [name for name in HOW_FAR if getattr(self, name) is not None]
        if not given:
            raise UsageError(f"How far to go? One of {_options(HOW_FAR, ', ')} says it.", hint="--ratio 0.2 is usual.")
        if len(given) > 1:
            raise UsageError(f"{_options(given, ' and ')} each say how far to go.", hint="Give one of them.")
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

    name: TargetName
    asked: str
    sizes: Sizes
    most: float
    say: Callable[[float], str]

    @property
    def counts_blocks(self) -> bool:
        """Whether it is only about how many blocks go."""
        return self.name in ("ratio", "remove")

    @property
    def blocks_are_alike(self) -> bool:
        """Whether it makes no difference which blocks go."""
        return len(set(self.sizes.blocks)) == 1

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
                hint="Nothing needs to go.",
            )
        # The small ones first; and one block stays in any case.
        free = sorted(self.sizes.blocks[block] for block in candidates if block not in removed)
        free = free[: len(self.sizes.blocks) - 1 - len(removed)]
        left = list(accumulate(free, lambda rest, block: rest - block, initial=has))
        if not self._fits(left[-1]):
            raise UsageError(
                f"With {len(removed) + len(free)} blocks removed, the most that may go, the model is still at "
                f"{self.say(left[-1])}; the target is {goal}.",
                hint="Ask for what can be had, or protect fewer blocks.",
            )
        return len(removed) + next(count for count, rest in enumerate(left) if self._fits(rest))

    def record(self, removed: Collection[int], serving: ServingRecord | None = None) -> TargetRecord:
        """Say what was reached without these blocks."""
        dense, reached = self.sizes.without(()), self.sizes.without(removed)
        return TargetRecord(
            name=self.name, asked=self.asked, limit=self.most, dense=dense, reached=reached, serving=serving
        )

    def _fits(self, amount: float) -> bool:
        return amount <= self.most * (1 + 1e-12)  # what rounding alone adds is not too much


@dataclass(frozen=True)
class LossTarget:
    """Ends a search before the removal that would raise the calibration loss too far.

    Attributes:
        name: a field of the request.
        asked: what the user wrote.
        limit: what that is: nats per token above the dense model, or times its perplexity.
    """

    name: TargetName
    asked: str
    limit: float

    @property
    def most(self) -> float:
        """Nats per token that the loss may lie above the dense model's."""
        return math.log(self.limit) if self.name == "max_perplexity_ratio" else self.limit

    def met(self, removed: Collection[int]) -> bool:
        """Whether the search ends here: it goes on as long as it may."""
        return False

    def allows(self, increase: float) -> bool:
        """Whether a removal may raise the loss so far above the dense model's, in nats per token."""
        return increase <= self.most

    def removals(self, candidates: Sequence[int], removed: Collection[int] = ()) -> int:
        """Give how many removals there can be, those in `removed` among them; one block stays in any case."""
        return len({*candidates, *removed})

    def record(self, increase: float, next_increase: float | None) -> TargetRecord:
        """Say what was reached, in nats per token above the dense model or as a ratio of perplexities, as was asked."""
        ratio = self.name == "max_perplexity_ratio"

        def said(nats: float) -> float:
            return math.exp(min(nats, 700)) if ratio else nats

        return TargetRecord(
            name=self.name,
            asked=self.asked,
            limit=self.limit,
            dense=said(0.0),
            reached=said(increase),
            next=None if next_increase is None else said(next_increase),
        )


Target = SizeTarget | LossTarget


def loss_target(request: TargetRequest, name: TargetName) -> LossTarget:
    """Read --max-loss-increase or --max-perplexity-ratio.

    Raises:
        UsageError: it is no number, or the loss would have to fall.
    """
    asked = str(getattr(request, name))
    return LossTarget(name, asked, parse_number(asked, name, least=0 if name == "max_loss_increase" else 1))


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


def longest_run(blocks: Sequence[int]) -> list[int]:
    """Give the longest of the runs of consecutive blocks, the first of equals."""
    runs: list[list[int]] = [[]]
    for block in blocks:
        if runs[-1] and block != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(block)
    return max(runs, key=len)


def fit_slope(removed: Sequence[int], share: Sequence[float]) -> float:
    """Give the share of the dense model's time that one block takes, by least squares through the dense model itself.

    `share` holds, for so many `removed` blocks, the pruned model's time as a share of the dense one's, measured side by
    side: 1 - slope x removed.
    """
    return sum(n * (1 - s) for n, s in zip(removed, share, strict=True)) / sum(n * n for n in removed)


def count_to_remove(blocks: int, protection: Protection, *, ratio: Fraction | None, remove: int | None) -> int:
    """Give how many blocks go: `remove`, or ceil(ratio x blocks).

    Raises:
        UsageError: none would go, or more than the protected blocks leave.
    """
    if min(protection.first, protection.last) < 0:
        raise UsageError("A negative number of blocks cannot be protected.", hint="Take 0 or more.")
    count = math.ceil(ratio * blocks) if ratio is not None else remove or 0
    available = min(len(protection.candidates(blocks, ())), blocks - 1)  # one stays in any case
    if count < 1:
        raise UsageError(f"{count} blocks to remove leaves nothing to search.", hint="Remove at least 1.")
    if count > available:
        among = f", and {len(protection.blocks)} by name" if protection.blocks else ""
        raise UsageError(
            f"{count} of {blocks} blocks cannot go: {available} may, "
            f"with {protection.first} protected at the start and {protection.last} at the end{among}.",
            hint=f"Remove {available} or fewer, or protect fewer." if available else "Protect fewer blocks.",
        )
    return count


def parse_ratio(text: str) -> Fraction:
    """Read a ratio exactly as written, so that 0.2 of 35 blocks is 7.

    Raises:
        UsageError: the text is no number above 0 and below 1.
    """
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio < 1:
        raise UsageError(f"The ratio {text} is not between 0 and 1.", hint="0.2 removes a fifth of the blocks.")
    return ratio
