"""The hooks of `sleb`.

A plugin implements some of them, and is found through the entry-point group `sleb`.
"""

from collections.abc import Iterable

import pluggy

from sleb_plugins.engine import Engine
from sleb_plugins.exporter import Exporter
from sleb_plugins.family import FamilyAdapter
from sleb_plugins.metric import Metric

hookspec = pluggy.HookspecMarker("sleb")
hookimpl = pluggy.HookimplMarker("sleb")


@hookspec
def sleb_families() -> Iterable[FamilyAdapter]:  # type: ignore[empty-body]
    """Offer model families; only one family may claim a `model_type`."""


@hookspec
def sleb_metrics() -> Iterable[Metric]:  # type: ignore[empty-body]
    """Offer metrics for `sleb search --metric NAME`."""


@hookspec
def sleb_exporters() -> Iterable[Exporter]:  # type: ignore[empty-body]
    """Offer formats for `sleb export --to NAME`."""


@hookspec
def sleb_engines() -> Iterable[Engine]:  # type: ignore[empty-body]
    """Offer inference engines for `sleb bench --engine NAME`."""
