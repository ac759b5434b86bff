"""The settings of a search, resolved from its request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sleb_cli.checks.strategies import ONESHOT, Strategy
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.targets import Target
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.plan import MetricRecord, Plan, TargetRecord
from sleb_plugins import ExpertMetric, Metric


@dataclass(frozen=True)
class Method:
    """How blocks are chosen.

    Attributes:
        implementation: the metric's code and versions, on which scores depend.
        fast: whether candidates race.
        holdout: the share of the sequences that is held out.
        target: where the search ends.
        remove: the largest number of removals that it may need.
    """

    metric: Metric
    implementation: MetricRecord
    strategy: Strategy
    removable: Removable
    fast: bool
    holdout: float
    target: Target
    remove: int


@dataclass(frozen=True)
class ExpertMethod:
    """How experts are chosen.

    Attributes:
        implementation: the metric's code and versions, on which scores depend.
        fewer: how many experts of each block go.
        holdout: the share of the sequences that is held out.
        target: the size to reach, unless a number of experts is given.
    """

    metric: ExpertMetric
    implementation: MetricRecord
    fewer: int
    holdout: float
    target: TargetRecord | None
    strategy: ClassVar[Strategy] = ONESHOT


@dataclass(frozen=True)
class Search:
    """A search after every check that needs no weights.

    Attributes:
        memory: bytes for the search in addition to the model; None for a share of the free ones.
        batch_size: sequences in a batch; None chooses by the device.
        extended: the plan that it continues, if any.
        options: the options that repeat the search, by field, where they have a value.
        plugins: the versions of other packages that offer plugins.
        sample_tokens: how many tokens both models generate at the end.
    """

    architecture: Architecture
    placement: Placement
    memory: int | None
    batch_size: int | None
    text: CalibrationSettings
    method: Method | ExpertMethod
    extended: Plan | None
    plan_file: Path
    resume: bool
    options: Mapping[str, Any]
    plugins: Mapping[str, str]
    sample_tokens: int
