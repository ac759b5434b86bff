"""Random scores: the baseline that every metric must beat."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sleb_plugins.errors import UsageError
from sleb_plugins.metric import ExpertMetric, ExpertUse, WeightMetric

if TYPE_CHECKING:
    from torch import Tensor, nn


class RandomScore(WeightMetric, ExpertMetric):
    """A number between 0 and 1 for each block, or each expert of one, drawn from the seed and its
    number alone.
    """

    name = "random"
    description = "random number from a seed (default: 0) and the number of the block or expert"
    argument = "[SEED]"

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed or 0
        if seed is not None:
            self.name = f"random:{seed}"

    def with_argument(self, argument: str) -> RandomScore:
        """Return the metric with this seed.

        Raises:
            UsageError: it is not a whole number of 0 or more.
        """
        if not (argument.isascii() and argument.isdigit()):
            raise UsageError(
                f"The seed of random:{argument} is not a whole number.",
                hint="Write it like random:7.",
            )
        return RandomScore(int(argument))

    def score_block(self, block: nn.Module, number: int) -> float:
        """Return the block's random number."""
        return random.Random(f"{self.seed}:{number}").random()

    def score_experts(self, use: ExpertUse, block: int) -> Tensor:
        """Return a random number for each expert of a block."""
        drawn = [
            random.Random(f"{self.seed}:{block}:{expert}").random()
            for expert in range(len(use.tokens))
        ]
        return use.tokens.new_tensor(drawn)
