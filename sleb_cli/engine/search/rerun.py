"""Repeat the search of a plan from what it recorded, and tell whether it found the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from sleb_cli.engine.door.subject import place_of_model
from sleb_cli.plan import Plan
from sleb_cli.records import differences
from sleb_cli.requests import RerunRequest, SearchRequest
from sleb_cli.results import RerunResult
from sleb_cli.version import __version__


def request_of(plan: Plan, request: RerunRequest) -> SearchRequest:
    """Return the request of a plan's search.

    Raises:
        PlanError: it does not say where its model is.
    """
    model, revision = place_of_model(request.plan, plan, request.model, None)
    values = {name: value for name, value in plan.asked.items() if value is not None} | {"revision": revision}
    return SearchRequest(
        model,
        **values,
        trust_remote_code=request.trust_remote_code,
        resume=request.resume,
        output=request.new_plan,
        force=request.force,
    )


def compare(plan: Plan, again: Plan, request: RerunRequest) -> RerunResult:
    """Compare a plan with that of the same search."""
    before, after = plan.environment, again.environment
    of_both = ("python", "torch", "transformers", "platform", "processor", "plugins")
    changed = differences(
        {name: getattr(after, name) for name in of_both} | {"sleb": __version__},
        {name: getattr(before, name) for name in of_both} | {"sleb": plan.sleb_version},
    )
    sizes = enumerate(zip_longest(plan.by_size, again.by_size), start=1)
    return RerunResult(
        schema_version=1,
        sleb_version=__version__,
        kind="rerun",
        model=again.model,
        output=str(request.new_plan),
        removals=again.removals,
        same_tokens=plan.calibration.tokens_sha256 == again.calibration.tokens_sha256,
        first_other_step=next((number for number, (old, new) in sizes if old != new), None),
        largest_change=max(_changes(plan, again)),
        environment=changed,
    )


def _changes(plan: Plan, again: Plan) -> Iterator[float]:
    """Yield how far the scores of the same candidates differ, as long as the same blocks are gone."""
    yield abs(plan.dense.loss - again.dense.loss)
    for old, new, before, after in zip(plan.steps, again.steps, plan.by_size, again.by_size, strict=False):
        for block, score in old.scores.items():
            other = new.scores.get(block)
            if score is not None and other is not None:
                yield abs(score - other)
        if before != after:
            return
