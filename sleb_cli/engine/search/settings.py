"""The settings of a search, resolved from its request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.checks.strategies import Strategy
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.search.removable import Removable
from sleb_cli.engine.search.targets import Target
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.plan import MetricRecord, Plan
from sleb_plugins import Metric


@dataclass(frozen=True)
class Method:
    """How what goes is chosen; each unit has a kind of its own.

    Attributes:
        implementation: the metric's code and versions, on which scores depend.
        holdout: the share of the sequences that is held out.
    """

    metric: Metric
    implementation: MetricRecord
    strategy: Strategy
    holdout: float


@dataclass(frozen=True)
class BlockMethod(Method):
    """How blocks are chosen.

    Attributes:
        fast: whether candidates race.
        target: where the search ends.
        remove: the largest number of removals that it may need.
    """

    removable: Removable
    fast: bool
    target: Target
    remove: int


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
    method: Method
    extended: Plan | None
    plan_file: Path
    resume: bool
    options: Mapping[str, Any]
    plugins: Mapping[str, str]
    sample_tokens: int
