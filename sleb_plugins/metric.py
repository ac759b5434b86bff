"""Metrics score a candidate removal; lower is always better. The five kinds differ in what they
look at.

A metric declares what it needs, and the engine decides how to compute that, so that one pass over
the calibration text can serve many candidates. Choose the first kind that can express your score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sleb_plugins.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Metric(ABC):
    """The base of all five kinds. Derive from one of the kinds, not from this class."""

    name: str
    description: str = ""
    unit: str = ""
    """What scores count, as written beside an axis: "nats per token"; by default the name."""
    argument: ClassVar[str] = ""
    """The argument after the name and a colon, as shown in help: `TASK`, or `[SEED]` if it is
    optional.
    """

    def with_argument(self, argument: str) -> Metric:
        """Return the metric for `NAME:ARGUMENT`; its `name` becomes that text, unless it has an
        equivalent one.

        It is called before any model is loaded.

        Raises:
            UsageError: the metric takes no argument, or not this one.
            DataError: the argument names something that does not exist.
        """
        raise UsageError(
            f"The metric {self.name!r} takes no argument, but {argument!r} was given.",
            hint=f"Write {self.name}.",
        )

    def fingerprint(self) -> str:
        """Return a short text that differs whenever the same metric could score differently.

        An interrupted search is resumed, and a plan extended, only while it stays the same; it is
        shown if it does not. The version of the metric's package and the source of its class are
        compared anyway, so this is for all else: data, settings, other packages. It is called once
        the argument is known, before any model is loaded.
        """
        return ""


class LogitMetric(Metric):
    """Scores the tokens that the model predicts without the candidate block."""

    needs_dense_logits: ClassVar[bool] = False
    """Whether `score_tokens` needs the logits of the dense model."""

    @abstractmethod
    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Score each position of a chunk independently; the engine averages over positions, then
        over sequences.

        A chunk is as much as fits in memory: part of a sequence, or parts of several.

        Args:
            logits: float32, [positions, vocabulary], of the model without the candidate.
            targets: int64, [positions], the token that follows each position.
            dense_logits: the same of the dense model; None unless `needs_dense_logits`.

        Returns:
            float32, [positions].
        """


class OutputMetric(Metric):
    """Scores what a model that only reads puts out: its distance from the dense model's output.

    The model decides what that is, so there is one such metric, and none can be added.
    """

    needs_dense_logits: ClassVar[bool] = True


class HiddenStateMetric(Metric):
    """Scores a block by the hidden states that enter and leave it, in the model after earlier
    removals.
    """

    @abstractmethod
    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """Score each position; both arguments are float32, [batch, positions, hidden size].

        Returns:
            float32, [batch, positions]: low if the block changes little.
        """


class WeightMetric(Metric):
    """Scores a block by its parameters alone."""

    @abstractmethod
    def score_block(self, block: nn.Module, number: int) -> float:
        """Score one block, low if it matters little; `number` is that in the original model."""


class ModelMetric(Metric):
    """Scores the whole model with the candidate skipped: the slowest kind, which can express
    anything.
    """

    @abstractmethod
    def score_model(self, model: nn.Module, tokenizer: Any, sequences: Tensor) -> float:
        """Score the model, in which the candidate and all earlier removals are skipped.

        Args:
            model: a causal language model of transformers, in inference mode, without a KV cache.
            tokenizer: its tokenizer.
            sequences: int64, [sequences, length], the calibration tokens on the model's device.
        """


@dataclass(frozen=True)
class ExpertUse:
    """How a block's experts were used on the calibration text: sums over the tokens that chose each
    one.

    All are float64, [experts]. The gate is the weight of an expert's output in the sum over the
    chosen ones, and the norm the Euclidean one of its output, before the gate.
    """

    tokens: Tensor
    """How many tokens chose it."""
    gates: Tensor
    norms: Tensor
    products: Tensor
    """Of gate x norm."""
    squared_norms: Tensor
    squared_products: Tensor


class ExpertMetric(Metric):
    """Scores the experts of a block, for `--unit experts`, by how the text used them."""

    @abstractmethod
    def score_experts(self, use: ExpertUse, block: int) -> Tensor:
        """Score each expert of a block: low if it matters little. `block` is its number in the
        original model.

        Returns:
            floating-point numbers, [experts].
        """


KINDS: Mapping[str, tuple[type[Metric], ...]] = {
    "blocks": (LogitMetric, HiddenStateMetric, WeightMetric, ModelMetric, OutputMetric),
    "experts": (ExpertMetric,),
}
"""The kinds of metrics, by what they score."""
