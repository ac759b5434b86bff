"""The search strategies and what each can do; `engine/search/strategies.py` has the algorithms."""

from collections.abc import Mapping
from dataclasses import dataclass

from sleb_cli.requests import StrategyName


@dataclass(frozen=True)
class Strategy:
    """What a strategy can do, and what it needs.

    Attributes:
        can_race: the scores of the surviving candidates of a race suffice.
        can_extend: it can start from the removals of a plan.
        swaps: at the last size it swaps removed and kept blocks, so the metric must score sets.
        removes_spans: what it removes is consecutive.
        measures_last: all sizes are chosen first, then measured together.
    """

    name: StrategyName
    can_race: bool = False
    can_extend: bool = False
    swaps: bool = False
    removes_spans: bool = False
    measures_last: bool = False


GREEDY = Strategy("greedy", can_race=True, can_extend=True)
ONESHOT = Strategy("oneshot", measures_last=True)

STRATEGIES: Mapping[str, Strategy] = {
    "greedy": GREEDY,
    "oneshot": ONESHOT,
    "contiguous": Strategy("contiguous", removes_spans=True, measures_last=True),
    "refine": Strategy("refine", can_race=True, swaps=True),
}
