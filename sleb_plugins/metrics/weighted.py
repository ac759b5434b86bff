"""Weighted sums of metrics: how they are written and computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleb_plugins.errors import PluginError, UsageError
from sleb_plugins.metric import HiddenStateMetric, LogitMetric, Metric, ModelMetric, WeightMetric

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Term:
    """One metric of a sum, as it was written: `0.5*task:piqa`."""

    weight: float
    name: str
    argument: str | None


def parse_terms(text: str) -> list[Term]:
    """Read `nll+0.5*kl`, `random:7`, or a plain name.

    Raises:
        UsageError: a weight is not a number above 0, or a name is missing.
    """
    terms = []
    for part in text.split("+"):
        before, star, after = part.rpartition("*")
        name, colon, argument = after.strip().partition(":")
        try:
            weight = float(before) if star else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < 1e12:  # beyond, its name would hold a plus
            raise UsageError(f"The metric {text!r} cannot be read at {part!r}.", hint="Write a sum like nll+0.5*kl.")
        terms.append(Term(weight, name, argument if colon else None))
    return terms


def weighted_sum(terms: Sequence[tuple[float, Metric]]) -> Metric:
    """Return one metric that computes this sum in a single pass; a lone metric of weight 1 is returned as it is.

    Raises:
        UsageError: the metrics are of different kinds.
    """
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    for kind, (_, made) in _SUMS.items():
        if all(isinstance(metric, kind) for _, metric in terms):
            sum_of_kind: Metric = made(terms)
            return sum_of_kind
    seen = [(metric.name, what) for _, metric in terms for kind, (what, _) in _SUMS.items() if isinstance(metric, kind)]
    raise UsageError(
        f"{' and '.join(name for name, _ in seen)} cannot be summed: "
        f"{', '.join(f'{name} looks at {what}' for name, what in seen)}.",
        hint="Sum metrics of one kind, such as nll+0.5*kl.",
    )


def terms_of(metric: Metric) -> list[Metric]:
    """Return the metrics of a sum, in order; any other metric is its only term."""
    return [term for _, term in metric.terms] if isinstance(metric, _Sum) else [metric]


def require_shape(name: str, scores: Any, shape: Any) -> None:
    """Check that a metric returned one score for each position.

    Raises:
        PluginError: the shape of `scores` is not `shape`.
    """
    found = getattr(scores, "shape", None)
    if found != shape:
        raise PluginError(
            f"The metric {name!r} returned scores of shape {found} instead of {list(shape)}, one for each position.",
            hint="Report it to the author of the metric.",
        )


def require_number(name: str, score: Any) -> float:
    """Return what a metric returned as a float.

    Raises:
        PluginError: it is not a number.
    """
    if not isinstance(score, int | float):
        raise PluginError(
            f"The metric {name!r} returned {score!r}, which is not a number.",
            hint="Report it to the author of the metric.",
        )
    return float(score)


class _Sum(Metric):
    """The name and the addition that all kinds of sums share."""

    def __init__(self, terms: Sequence[tuple[float, Any]]) -> None:
        self.terms = terms
        self.name = "+".join(metric.name if weight == 1 else f"{weight:.12g}*{metric.name}" for weight, metric in terms)

    def fingerprint(self) -> str:
        """Return the fingerprints of all terms."""
        return "; ".join(text for _, metric in self.terms if (text := metric.fingerprint()))

    def _total(self, shape: Any, score: Callable[[Any], Any]) -> Any:
        """Add up the scores of all terms after checking their shapes: a wrong one would be broadcast."""
        scores = [score(metric) for _, metric in self.terms]
        for (_, metric), found in zip(self.terms, scores, strict=True):
            require_shape(metric.name, found, shape)
        return sum(weight * found for (weight, _), found in zip(self.terms, scores, strict=True))

    def _sum(self, score: Callable[[Any], Any]) -> float:
        return math.fsum(weight * require_number(metric.name, score(metric)) for weight, metric in self.terms)


class _LogitSum(_Sum, LogitMetric):
    @property
    def needs_dense_logits(self) -> bool:  # type: ignore[override]
        """Whether any of the metrics does."""
        return any(metric.needs_dense_logits for _, metric in self.terms)

    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Any:
        return self._total(
            targets.shape, lambda m: m.score_tokens(logits, targets, dense_logits if m.needs_dense_logits else None)
        )


class _HiddenStateSum(_Sum, HiddenStateMetric):
    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Any:
        return self._total(entering.shape[:-1], lambda metric: metric.score_tokens(entering, leaving))


class _WeightSum(_Sum, WeightMetric):
    @property
    def needs_gradients(self) -> bool:  # type: ignore[override]
        """Whether any of the metrics does."""
        return any(metric.needs_gradients for _, metric in self.terms)

    def score_block(self, block: nn.Module, number: int) -> float:
        return self._sum(lambda metric: metric.score_block(block, number))


class _ModelSum(_Sum, ModelMetric):
    def score_model(self, model: nn.Module, tokenizer: Any, sequences: Tensor) -> float:
        return self._sum(lambda metric: metric.score_model(model, tokenizer, sequences))


_SUMS: dict[type[Metric], tuple[str, Any]] = {
    LogitMetric: ("logits", _LogitSum),
    HiddenStateMetric: ("hidden states", _HiddenStateSum),
    WeightMetric: ("weights", _WeightSum),
    ModelMetric: ("the whole model", _ModelSum),
}
"""What each kind of metric looks at, and its sums."""
