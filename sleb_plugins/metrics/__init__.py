"""The metrics that ship with `sleb`."""

from sleb_plugins.hookspecs import hookimpl
from sleb_plugins.metric import Metric
from sleb_plugins.metrics.cosine import CosineDistance
from sleb_plugins.metrics.nll import NegativeLogLikelihood


@hookimpl
def sleb_metrics() -> list[Metric]:
    """Offer the metrics that ship with `sleb`."""
    return [NegativeLogLikelihood(), CosineDistance()]
