"""What `search` is asked for: how far it goes, how blocks are chosen, and where the plan is
written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args

from sleb_cli.atomic import require_new_file, writing
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.checks.text_names import require_mixture
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import is_main_process
from sleb_cli.requests import (
    AUTO,
    DEFAULT_EXPERT_HOLDOUT,
    DEFAULT_EXPERT_METRIC,
    DEFAULT_METRIC,
    DEFAULT_PROTECTED,
    DEFAULT_STRATEGY,
    DEMO,
    TARGET_NAMES,
    SearchRequest,
    StrategyName,
    TargetName,
    journal_of,
    option_of,
    sibling,
)
from sleb_cli.texts.named import is_reference
from sleb_cli.units import dtype_in_full, parse_bytes, parse_count, parse_ratio
from sleb_plugins import (
    ExpertMetric,
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelMetric,
    OutputError,
    UsageError,
    WeightMetric,
)
from sleb_plugins.errors import did_you_mean

_RACE: set[StrategyName] = {"greedy", "refine"}
"""Strategies for which the scores of the surviving candidates of a race suffice."""


@dataclass(frozen=True)
class CheckedSearch:
    """A request that can be met as far as it is known without the model.

    Attributes:
        request: with the values of the extended plan, and with the defaults that no model decides.
        metric: scores the candidates.
        strategy: how blocks are chosen.
        memory: bytes for the search in addition to the model; None for a share of what is free.
        extended: the plan that is continued, if any.
    """

    request: SearchRequest
    metric: Metric
    strategy: StrategyName
    memory: int | None
    extended: Plan | None

    @property
    def named(self) -> NamedSubject:
        """The model, which must be the extended plan's."""
        extended = self.extended and self.extended.model_copy(update={"base_model": None})
        return NamedSubject(
            self.request, self.request.model, (), plan=extended, file=self.request.extend
        )


def check_search(request: SearchRequest, registry: Registry) -> CheckedSearch:
    """Check and complete a request.

    Raises:
        UsageError: a value is out of range, or the metric and the strategy do not fit together.
        PlanError: the extended plan is unreadable.
        DataError: a text is missing.
        OutputError: a plan or an unfinished search exists, or the plan cannot be written.
    """
    goal_of(request)
    extended = read_plan(request.extend) if request.extend is not None else None
    request = _fill_gaps(request, extended)
    metric, strategy = (
        registry.metric(str(request.metric)),
        strategy_name(request.strategy or "oneshot"),
    )
    if request.fast is None:
        # The demo is a first impression: it must not take long.
        request = replace(request, fast=request.model == DEMO and _can_race(metric, strategy))
    _require_fitting(request, metric, strategy)
    memory = None if request.memory is None else parse_bytes(str(request.memory), "--memory")
    dtype_in_full(request.dtype or AUTO)
    require_mixture(request.calibration)
    if is_main_process():
        _require_writable_plan(request)
    return CheckedSearch(request, metric, strategy, memory, extended)


def check_comparison(request: SearchRequest, registry: Registry) -> list[CheckedSearch]:
    """Check a request to compare: one search for each entry, each with a journal of its own.

    Raises:
        UsageError: the entries cannot be compared.
        SlebError: a subclass that fits, if one of the searches is impossible.
    """
    requests = [
        _search_for(request, metric, strategy, registry) for metric, strategy in _entries(request)
    ]
    if is_main_process():
        # An unfinished comparison was allowed to write the plan, and may have been killed just
        # after it did.
        replaces = request.resume and any(
            journal_of(search.plan_file).exists() for search in requests
        )
        requests = [replace(search, force=request.force or replaces) for search in requests]
        require_new_file(request.plan_file, force=request.force or replaces)
    return [check_search(search, registry) for search in requests]


def _entries(request: SearchRequest) -> list[tuple[str, StrategyName]]:
    """Read the entries of `--compare`: a metric, and the strategy to search with."""
    usual = request.strategy or DEFAULT_STRATEGY
    pairs = [
        (text if "@" in text else f"{text}@{usual}").rpartition("@") for text in request.compare
    ]
    entries = [(metric, strategy_name(strategy)) for metric, _, strategy in pairs]
    if len(entries) < 2 or len(set(entries)) < len(entries):
        problem = "names an entry twice" if len(entries) > 1 else "needs at least two entries"
        raise UsageError(
            f"--compare {','.join(request.compare)} {problem}.",
            hint="For example: --compare nll,cosine,angular@contiguous.",
        )
    return entries


def _search_for(
    request: SearchRequest, metric: str, strategy: StrategyName, registry: Registry
) -> SearchRequest:
    """Return the request of one compared search, with `--fast` only where candidates can race, and
    its own plan.
    """
    name = re.sub(r"[^\w.+@-]", "-", f"{metric}@{strategy}")
    return replace(
        request,
        metric=metric,
        strategy=strategy,
        fast=request.fast if _can_race(registry.metric(metric), strategy) else False,
        output=sibling(request.plan_file, f".{name}.json"),
        compare=(),
    )


def strategy_name(text: str) -> StrategyName:
    """Read the name of a strategy.

    Raises:
        UsageError: no strategy has this name.
    """
    names: tuple[StrategyName, ...] = get_args(StrategyName)
    for name in names:
        if name == text:
            return name
    raise UsageError(f"Unknown strategy {text!r}.", hint=did_you_mean(text, names))


def goal_of(request: SearchRequest) -> tuple[TargetName, Fraction | float]:
    """Return the target that is given, and its number.

    Raises:
        UsageError: none is given, or it is not a number.
    """
    given = [
        (name, str(value)) for name in TARGET_NAMES if (value := getattr(request, name)) is not None
    ]
    if not given:
        raise UsageError(
            f"No target given: one of {', '.join(map(option_of, TARGET_NAMES))} is needed.",
            hint="For example: --ratio 0.2.",
        )
    ((name, text),) = given
    return name, _GOALS[name](text, option_of(name))


def _parse_multiple(text: str, option: str, minimum: float) -> float:
    """Read "1.25" or "1.25x"."""
    try:
        number = float(text.lower().removesuffix("x"))
    except ValueError:
        number = math.nan
    if not (minimum <= number < math.inf):
        raise UsageError(
            f"{option} {text} is not a number of {minimum:g} or more.",
            hint=f"For example: {minimum + 0.25:g}.",
        )
    return number


_GOALS: dict[TargetName, Callable[[str, str], Fraction | float]] = {
    "ratio": lambda text, option: parse_ratio(text),
    "remove": lambda text, option: int(text),
    "target_params": parse_count,
    "target_memory": parse_bytes,
    "target_speedup": partial(_parse_multiple, minimum=1.01),
    "max_perplexity_ratio": partial(_parse_multiple, minimum=1),
}
"""How the number of each target is read, given the option that sets it."""


def _fill_gaps(request: SearchRequest, extended: Plan | None) -> SearchRequest:
    """Fill unset options from the extended plan, or from the defaults."""
    values: dict[str, Any] = {
        "metric": DEFAULT_METRIC,
        "strategy": DEFAULT_STRATEGY,
        "protect_first": DEFAULT_PROTECTED,
        "protect_last": DEFAULT_PROTECTED,
        "holdout": 0.0,
        "seed": 0,
    }
    if request.unit == "experts":
        values = {
            "metric": DEFAULT_EXPERT_METRIC,
            "holdout": DEFAULT_EXPERT_HOLDOUT,
            "seed": 0,
            "fast": False,
        }
    if extended is not None:
        search, text = extended.search, extended.calibration
        of_search = {*values, "fast", "dtype", "batch_size"} - {"seed"}
        values = {name: getattr(search, name) for name in of_search}
        values |= {name: getattr(text, name) for name in ("chat", "seed", "sequence_length")}
        values |= {"calibration": text.source, "protect": search.protect or None}
        if not is_reference(text.source):  # whose samples count rows of text, not sequences
            values["samples"] = text.sequences
    return replace(
        request, **{name: value for name, value in values.items() if getattr(request, name) is None}
    )


def _can_race(metric: Metric, strategy: StrategyName) -> bool:
    """Whether candidates can be compared sequence by sequence until one wins."""
    return isinstance(metric, LogitMetric) and strategy in _RACE


def _require_fitting(request: SearchRequest, metric: Metric, strategy: StrategyName) -> None:
    """Check that the metric, the unit, the strategy and the way to search fit together."""
    of_blocks = (LogitMetric, HiddenStateMetric, WeightMetric, ModelMetric)
    usual, kinds = (
        (DEFAULT_EXPERT_METRIC, ExpertMetric)
        if request.unit == "experts"
        else (DEFAULT_METRIC, of_blocks)
    )
    if not isinstance(metric, kinds):
        raise UsageError(
            f"{metric.name} does not score {request.unit}.", hint=f"Use another, such as {usual}."
        )
    if request.fast and not _can_race(metric, strategy):
        unfit = f"--strategy {strategy}" if isinstance(metric, LogitMetric) else metric.name
        raise UsageError(
            f"--fast does not apply to {unfit}, which does not compare candidates sequence by "
            f"sequence.",
            hint="Leave out --fast.",
        )
    if strategy == "refine" and not isinstance(metric, LogitMetric | ModelMetric):
        raise UsageError(
            f"--strategy refine compares sets of blocks, but {metric.name} scores single blocks.",
            hint="Use a metric of the whole model, such as nll, or --strategy greedy.",
        )
    if request.extend is not None and strategy != "greedy":
        raise UsageError(
            f"--extend works with --strategy greedy only, not with {strategy}.",
            hint="Search again for the number of blocks you want.",
        )


@contextmanager
def claim_plan(plan: Path) -> Iterator[None]:
    """Keep other searches from writing this plan and its journal, from the first check to the end.

    Raises:
        OutputError: another search has claimed it, or it cannot be written.
    """
    if not is_main_process():
        yield
        return
    from filelock import FileLock, Timeout  # takes 50 ms to import

    require_new_file(plan, force=True)
    file = plan.parent / f".{plan.name}.lock"
    claim = FileLock(file, timeout=0)  # the system releases it if this process is killed
    try:
        with writing(plan):
            claim.acquire()
    except Timeout as error:
        raise OutputError(
            f"Another search is writing {plan}.",
            hint="Wait until it ends, or choose another plan with -o.",
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file
            file.unlink()
        claim.release()


def _require_writable_plan(request: SearchRequest) -> None:
    """Check that the plan can be written and overwrites nothing."""
    journal = journal_of(request.plan_file)
    # An unfinished search was allowed to write the plan, and may have been killed just after it
    # did.
    replaces = request.plan_file == request.extend or (request.resume and journal.exists())
    require_new_file(request.plan_file, force=request.force or replaces)
    if journal.exists() and not (request.resume or request.force):
        raise OutputError(
            f"{journal} holds an unfinished search.",
            hint="Continue it with --resume, or start over with --force.",
        )
