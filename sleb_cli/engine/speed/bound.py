"""The speedup that floating-point operations and bytes allow, whatever the machine."""

from __future__ import annotations

from collections.abc import Collection

from sleb_cli.engine.speed.work import Work


def speedup_bound(work: Work, removed: Collection[int]) -> float:
    """Return how many times faster a batch can become without these blocks.

    Each phase takes the time of its operations or of its bytes, whichever is longer on the machine; no sum of such
    times shrinks by more than the term that shrinks most.
    """
    costs = [work.prefill, *([work.decode] if work.decode else [])]
    terms = [term for cost in costs for term in (cost.flops, cost.bytes)]
    return max(term.without(()) / term.without(removed) for term in terms)
