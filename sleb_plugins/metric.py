"""How a candidate removal is scored. Four kinds, by what they look at; lower is always better.

A metric says what it needs to see, and the engine decides how to show it: that is what lets one pass
over the calibration text serve many candidates. Choose the first kind that can express your score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from sleb_plugins.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Metric(ABC):
    """What all four kinds share. Derive from one of the kinds, not from this."""

    name: str
    description: str = ""
    argument: ClassVar[str] = ""
    """What may follow the name after a colon, as help shows it: `TASK`, or `[SEED]` where it may be left out."""

    def with_argument(self, argument: str) -> Metric:
        """Give the metric that `NAME:ARGUMENT` asks for; its `name` is that text, or another that means the same.

        Raises:
            UsageError: the metric takes no argument, or not this one.
            DataError: what the argument names is not there. It is said before any model is loaded.
        """
        raise UsageError(
            f"The metric {self.name!r} takes no argument, and {argument!r} was given.", hint=f"Write {self.name}."
        )


class LogitMetric(Metric):
    """Scores the tokens that the model predicts without the candidate block."""

    needs_dense_logits: ClassVar[bool] = False
    """Whether `score_tokens` is given the logits of the model with no block removed."""

    @abstractmethod
    def score_tokens(self, logits: Tensor, targets: Tensor, dense_logits: Tensor | None) -> Tensor:
        """Score each position of a chunk for itself; the engine averages over positions, then over sequences.

        A chunk is what fits into memory: part of a sequence, or parts of several.

        Args:
            logits: float32, [positions, vocabulary], of the model without the candidate.
            targets: int64, [positions], the token that follows each position.
            dense_logits: as `logits`, of the dense model; None unless `needs_dense_logits`.

        Returns:
            float32, [positions].
        """


class HiddenStateMetric(Metric):
    """Scores a block by what enters and what leaves it, in the model as it stands after earlier removals."""

    @abstractmethod
    def score_tokens(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """Score each position; both arguments are float32, [batch, positions, hidden size].

        Returns:
            float32, [batch, positions]: low where the block changes little.
        """


class WeightMetric(Metric):
    """Scores a block by its parameters alone."""

    needs_gradients: ClassVar[bool] = False
    """Whether each parameter's `.grad` holds the gradient of the mean calibration loss, in nats per token.

    Where the family allows it, those of one block exist at a time.
    """

    @abstractmethod
    def score_block(self, block: nn.Module, number: int) -> float:
        """Score one block, whose number in the original model is given: low where the block matters little."""


class ModelMetric(Metric):
    """Scores a whole model with the candidate switched off: the slow way, which can express anything."""

    @abstractmethod
    def score_model(self, model: nn.Module, tokenizer: Any, sequences: Tensor) -> float:
        """Score the model as given; the candidate and all earlier removals are switched off in it.

        Args:
            model: a causal language model of transformers, in inference mode, without KV cache.
            tokenizer: its tokenizer.
            sequences: int64, [sequences, length], the calibration tokens on the model's device.
        """
