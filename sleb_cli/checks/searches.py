"""What `search` is asked for: how far it goes, how blocks are chosen, and where the plan is
written.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sleb_cli.atomic import require_new_file
from sleb_cli.checks.strategies import ONESHOT, STRATEGIES, Strategy
from sleb_cli.checks.subjects import NamedSubject, locate_planned_model
from sleb_cli.checks.text_names import require_mixture
from sleb_cli.names import require_path
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.processes import is_main_process
from sleb_cli.requests import (
    AUTO,
    DEFAULTS,
    DEMO,
    TARGET_NAMES,
    SearchRequest,
    TargetName,
    journal_of,
    option_of,
)
from sleb_cli.texts.named import is_reference
from sleb_cli.units import dtype_in_full, parse_bytes, parse_count, parse_ratio
from sleb_plugins import LogitMetric, Metric, ModelMetric, OutputError, OutputMetric, UsageError
from sleb_plugins.metric import KINDS


@dataclass(frozen=True)
class CheckedSearch:
    """A request that can be met as far as it is known without the model.

    Attributes:
        request: with the values of the extended plan, and with the defaults that no model decides.
        metric: scores the candidates; of a model that only reads, another is the default.
        metric_given: whether it was asked for.
        strategy: how blocks are chosen.
        memory: bytes for the search in addition to the model; None for a share of what is free.
        extended: the plan that is continued, if any.
    """

    request: SearchRequest
    metric: Metric
    metric_given: bool
    strategy: Strategy
    memory: int | None
    extended: Plan | None

    @property
    def named(self) -> NamedSubject:
        """The model, which must be the extended plan's."""
        extended = self.extended and self.extended.model_copy(update={"base_model": None})
        return NamedSubject(
            self.request, str(self.request.model), (), plan=extended, file=self.request.extend
        )


def check_search(request: SearchRequest, registry: Registry) -> CheckedSearch:
    """Check and complete a request.

    Raises:
        UsageError: no model is named, a value is out of range, or the metric and the strategy do
            not fit together.
        PlanError: the extended plan is unreadable, or does not say where its model is.
        DataError: a text is missing.
        OutputError: a plan or an unfinished search exists, or the plan cannot be written.
    """
    extended = None
    if request.extend is not None:
        extended = read_plan(request.extend)
        own = extended.model_copy(update={"base_model": None})
        model, revision = locate_planned_model(request.extend, own, request.model, request.revision)
        request = replace(request, model=model, revision=revision)
    if request.model is None:
        raise UsageError(
            "No model is named.",
            hint="Name a Hub id, a folder, a .gguf file, or demo: `sleb search demo --ratio 0.2`.",
        )
    goal_of(request)
    metric_given = request.metric is not None or extended is not None
    request = _fill_gaps(request, extended)
    metric = registry.metric(str(request.metric))
    strategy = STRATEGIES[request.strategy] if request.strategy else ONESHOT
    if request.fast is None:
        # The demo is a first impression: it must not take long.
        request = replace(request, fast=request.model == DEMO and _can_race(metric, strategy))
    _require_fitting(request, metric, strategy)
    memory = None if request.memory is None else parse_bytes(str(request.memory), "--memory")
    dtype_in_full(request.dtype or AUTO)
    require_mixture(request.calibration)
    require_path(str(request.model))
    if is_main_process():
        journal = journal_of(request.plan_file)
        # An unfinished search was allowed to write the plan, and may have been killed just after
        # it did.
        replaces = request.plan_file == request.extend or (request.resume and journal.exists())
        has_ended = request.resume and request.plan_file.is_file() and not journal.exists()
        if has_ended and not (request.force or replaces):
            raise OutputError(
                f"The search of {request.plan_file} has ended.",
                hint="Apply it with `sleb apply`, go on with --extend, or search again with "
                "--force.",
            )
        require_new_file(request.plan_file, force=request.force or replaces)
        if journal.exists() and not (request.resume or request.force):
            raise OutputError(
                f"{journal} holds an unfinished search.",
                hint="Continue it with --resume, or start over with --force.",
            )
    return CheckedSearch(request, metric, metric_given, strategy, memory, extended)


def goal_of(request: SearchRequest) -> tuple[TargetName, Fraction | float]:
    """Return the target that is given, and its number.

    Raises:
        UsageError: none is given, or it is not a number.
    """
    for name in TARGET_NAMES:
        value = getattr(request, name)
        if value is not None:
            return name, _GOALS[name](str(value), option_of(name))
    raise UsageError(
        f"No target given: one of {', '.join(map(option_of, TARGET_NAMES))} is needed.",
        hint="For example: --ratio 0.2.",
    )


def _parse_perplexity_ratio(text: str, option: str) -> float:
    """Read "1.25" or "1.25x"."""
    try:
        ratio = float(text.lower().removesuffix("x"))
    except ValueError:
        ratio = math.nan
    if not 1 <= ratio < math.inf:
        raise UsageError(
            f"{option} {text} is not a number of 1 or more.", hint="For example: 1.25."
        )
    return ratio


_GOALS: dict[TargetName, Callable[[str, str], Fraction | float]] = {
    "ratio": lambda text, option: parse_ratio(text),
    "remove": lambda text, option: int(text),
    "target_params": parse_count,
    "target_memory": parse_bytes,
    "max_perplexity_ratio": _parse_perplexity_ratio,
}
"""How the number of each target is read, given the option that sets it."""


def _fill_gaps(request: SearchRequest, extended: Plan | None) -> SearchRequest:
    """Fill unset options from the extended plan, or from the defaults."""
    values: dict[str, Any] = {**DEFAULTS[request.unit], "seed": 0}
    if extended is not None:
        search = extended.search
        text = extended.calibration
        of_search = {*values, "fast", "dtype", "batch_size"} - {"seed"}
        values = {name: getattr(search, name) for name in of_search}
        values |= {name: getattr(text, name) for name in ("chat", "seed", "sequence_length")}
        values |= {"calibration": text.source, "protect": search.protect or None}
        values["prompt"] = extended.request.get("prompt")
        if not is_reference(text.source):  # whose samples count rows of text, not sequences
            values["samples"] = text.sequences
    unset = {name: value for name, value in values.items() if getattr(request, name) is None}
    return replace(request, **unset)


def _can_race(metric: Metric, strategy: Strategy) -> bool:
    """Whether candidates can be compared sequence by sequence until one wins."""
    return isinstance(metric, LogitMetric | OutputMetric) and strategy.can_race


def _require_fitting(request: SearchRequest, metric: Metric, strategy: Strategy) -> None:
    """Check that the metric, the unit, the strategy and the way to search fit together."""
    if not isinstance(metric, KINDS[request.unit]):
        usual = DEFAULTS[request.unit]["metric"]
        raise UsageError(
            f"{metric.name} does not score {request.unit}.", hint=f"Use another, such as {usual}."
        )
    if request.fast and not _can_race(metric, strategy):
        unfit = metric.name
        if isinstance(metric, LogitMetric | OutputMetric):
            unfit = f"--strategy {strategy.name}"
        raise UsageError(
            f"--fast does not apply to {unfit}, which does not compare candidates sequence by "
            f"sequence.",
            hint="Leave out --fast.",
        )
    if strategy.swaps and not isinstance(metric, LogitMetric | OutputMetric | ModelMetric):
        raise UsageError(
            f"--strategy {strategy.name} compares sets of blocks, but {metric.name} scores single "
            f"blocks.",
            hint="Use a metric of the whole model, such as nll, or --strategy greedy.",
        )
    if request.extend is not None and not strategy.can_extend:
        raise UsageError(
            f"--extend works with --strategy greedy only, not with {strategy.name}.",
            hint="Search again for the number of blocks you want.",
        )
