"""The metrics that ship with `sleb`."""

from sleb_plugins.hookspecs import hookimpl
from sleb_plugins.metric import Metric
from sleb_plugins.metrics.angular import AngularDistance
from sleb_plugins.metrics.cosine import CosineDistance
from sleb_plugins.metrics.experts import Energy, Frequency, Reap
from sleb_plugins.metrics.kl import KlDivergence
from sleb_plugins.metrics.magnitude import Magnitude
from sleb_plugins.metrics.nll import NegativeLogLikelihood
from sleb_plugins.metrics.output import OutputDistance
from sleb_plugins.metrics.random import RandomScore


@hookimpl
def sleb_metrics() -> list[Metric]:
    """Offer the metrics that ship with `sleb`."""
    block_metrics = [
        NegativeLogLikelihood(),
        KlDivergence(),
        CosineDistance(),
        AngularDistance(),
        Magnitude(),
        OutputDistance(),
    ]
    return [*block_metrics, Energy(), Reap(), Frequency(), RandomScore()]
