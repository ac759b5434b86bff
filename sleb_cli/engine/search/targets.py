"""When a search stops: at a number of blocks, once the model is small or fast enough, or before it loses too much.

How much each block takes (`Sizes`), in parameters, bytes or seconds, is measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sleb_cli.engine.device import dtype_name, parse_dtype
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import Sizes, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import ServingRecord, TargetRecord
from sleb_cli.requests import DEFAULT_SERVE_LENGTH, REFINES, TARGET_NAMES, TargetName, TargetRequest
from sleb_cli.units import format_bytes, format_count, parse_bytes, parse_count, parse_ratio, plural
from sleb_plugins import UsageError

_LEAST: Mapping[TargetName, float] = {"target_speedup": 1.01, "max_perplexity_ratio": 1}
"""The smallest numbers that make sense."""


def chosen_target(request: TargetRequest) -> TargetName:
    """Return the one field of `TARGET_NAMES` that is given.

    Raises:
        UsageError: none is given, or several are, or a field that belongs to another target.
    """
    given = [name for name in TARGET_NAMES if getattr(request, name) is not None]
    if not given:
        raise UsageError(
            f"No target given: one of {', '.join(map(option_of, TARGET_NAMES))} is needed.",
            hint="For example: --ratio 0.2.",
        )
    if len(given) > 1:
        options = " and ".join(map(option_of, given))
        raise UsageError(f"{options} cannot be combined.", hint="Use one of them.")
    for name, target in REFINES.items():
        if getattr(request, name) is not None and given[0] != target:
            raise UsageError(f"{option_of(name)} requires {option_of(target)}.", hint=f"Leave out {option_of(name)}.")
    return given[0]


def option_of(name: str) -> str:
    """Return the command-line option of a field: --target-params."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class SizeTarget:
    """Stop once the model is small enough.

    Attributes:
        name: the field of the request.
        asked: what the user wrote.
        sizes: the size of each block, in the target's unit.
        most: the size that may remain.
        describe: formats a size: "1.19B parameters".
        serving: how the model will be served, if its memory is the target.
    """

    name: TargetName
    asked: str
    sizes: Sizes
    most: float
    describe: Callable[[float], str]
    serving: ServingRecord | None = None

    def met(self, removed: Collection[int]) -> bool:
        """Whether the model is small enough without these blocks."""
        return self._fits(self.sizes.without(removed))

    def removals(self, candidates: Sequence[int], removed: Collection[int] = ()) -> int:
        """Return how many removals meet the target whichever candidates are removed, including those in `removed`.

        Raises:
            UsageError: the target is already met, or cannot be met; the message names the nearest size.
        """
        size, goal = self.sizes.without(removed), self.describe(self.most)
        if self._fits(size):
            so_far = f" without the {len(removed)} removed blocks" if removed else ""
            raise UsageError(
                f"The model is already at {self.describe(size)}{so_far}; the target is {goal}.",
                hint="Nothing needs to be removed.",
            )
        # The smallest blocks first, which is the worst case; one block always stays.
        free = sorted(self.sizes.blocks[block] for block in candidates if block not in removed)
        free = free[: len(self.sizes.blocks) - 1 - len(removed)]
        left = list(accumulate(free, lambda rest, block: rest - block, initial=size))
        if not self._fits(left[-1]):
            raise UsageError(
                f"At most {plural(len(removed) + len(free), 'block')} can be removed, which leaves the model at "
                f"{self.describe(left[-1])}; the target is {goal}.",
                hint="Choose a target that can be met, or protect fewer blocks.",
            )
        return len(removed) + next(count for count, rest in enumerate(left) if self._fits(rest))

    def record(self, removed: Collection[int]) -> TargetRecord:
        """Return what was reached without these blocks."""
        dense, reached = self.sizes.without(()), self.sizes.without(removed)
        return TargetRecord(
            name=self.name, asked=self.asked, limit=self.most, dense=dense, reached=reached, serving=self.serving
        )

    def _fits(self, amount: float) -> bool:
        return amount <= self.most * (1 + 1e-12)  # tolerates rounding


@dataclass(frozen=True)
class PerplexityTarget:
    """Stop before the removal that would raise the perplexity of the calibration text too far.

    Attributes:
        asked: what the user wrote.
        limit: the largest allowed multiple of the dense model's perplexity.
    """

    asked: str
    limit: float
    name: TargetName = "max_perplexity_ratio"

    def allows(self, increase: float) -> bool:
        """Whether the loss may rise by this much above the dense model's, in nats per token."""
        return increase <= math.log(self.limit)

    def record(self, increase: float, next_increase: float | None) -> TargetRecord:
        """Return what was reached, and with one more removal, from increases of the loss in nats per token."""
        following = None if next_increase is None else perplexity_ratio(next_increase)
        reached = perplexity_ratio(increase)
        return TargetRecord(
            name=self.name, asked=self.asked, limit=self.limit, dense=1.0, reached=reached, next=following
        )


def perplexity_ratio(increase: float) -> float:
    """Return how many times as high perplexity is if the loss rises by `increase` nats per token."""
    return math.exp(min(increase, 700))


Target = SizeTarget | PerplexityTarget


def resolve_target(request: TargetRequest, architecture: Architecture, dtype: str, notify: Notify) -> Target | None:
    """Return the target, or None for --target-speedup, which must be timed first.

    `dtype` is the data type in which the model will be served.

    Raises:
        UsageError: there is not exactly one target, or it is not a number.
        UnsupportedModelError: the size of the KV cache is unknown.
    """
    name = chosen_target(request)
    asked = str(getattr(request, name))
    if name in ("ratio", "remove"):
        blocks = architecture.block_count
        remove = math.ceil(parse_ratio(asked) * blocks) if name == "ratio" else int(asked)
        count = Sizes(0, (1,) * blocks)
        return SizeTarget(name, asked, count, max(0, blocks - remove), lambda n: f"{n:g} of {blocks} blocks")
    if name == "target_params":
        most = parse_count(asked, option_of(name))
        sizes = count_parameters(architecture)
        return SizeTarget(name, asked, sizes, most, lambda n: f"{format_count(n)} parameters")
    if name == "target_memory":
        return _memory_target(request, architecture, dtype, notify)
    number = parse_number(asked, name)
    return None if name == "target_speedup" else PerplexityTarget(asked, number)


def _memory_target(request: TargetRequest, architecture: Architecture, dtype: str, notify: Notify) -> SizeTarget:
    """Count the weights and the KV cache as served: by default, one sequence of up to 4,096 tokens."""
    most = parse_bytes(str(request.target_memory), "--target-memory")
    served = parse_dtype(dtype, architecture.dtype)
    length = choose_length(request.serve_length, architecture, DEFAULT_SERVE_LENGTH, "--serve-length")
    serving = ServingRecord(dtype=dtype_name(served), length=length)
    packed = architecture.is_quantized
    weights = stored_bytes(architecture) if packed else count_parameters(architecture) * served.itemsize
    cache = cache_bytes(architecture, served, length=length, batch=1)
    form = "packed as in the checkpoint" if packed else f"in {serving.dtype}"
    notify(
        Notice(
            f"Memory counts the weights {form} ({format_bytes(weights.without(()))}) and a KV cache in "
            f"{serving.dtype} for {length} tokens ({format_bytes(cache.without(()))})."
        )
    )
    return SizeTarget("target_memory", str(request.target_memory), weights + cache, most, format_bytes, serving)


def parse_number(text: str, name: TargetName) -> float:
    """Read the number of a target; "1.25x" is 1.25.

    Raises:
        UsageError: the text is not a number, or is below the least that makes sense.
    """
    try:
        number = float(text.lower().removesuffix("x"))
    except ValueError:
        number = math.nan
    least = _LEAST[name]
    if not (least <= number < math.inf):
        raise UsageError(
            f"{option_of(name)} {text} is not a number of {least:g} or more.", hint=f"For example: {least + 0.25:g}."
        )
    return number
