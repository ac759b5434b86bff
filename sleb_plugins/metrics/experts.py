"""Metrics of experts: how much of what a block's experts add to the hidden states comes from each
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_plugins.metric import ExpertMetric, ExpertUse

if TYPE_CHECKING:
    from torch import Tensor


class Energy(ExpertMetric):
    """The sum of (gate x norm of the output)^2 over the tokens that chose the expert.

    If the outputs of different experts are about orthogonal, it is the squared error that the
    hidden states would have without the expert. On the text that it is summed on, it finds about
    what an exact search by the loss finds.
    """

    name = "energy"
    description = "sum of (gate x norm)^2 of the expert's outputs (for --unit experts, the default)"

    def score_experts(self, use: ExpertUse, block: int) -> Tensor:
        """Return the sums."""
        return use.squared_products


class Reap(ExpertMetric):
    """The mean of gate x norm of the output, over the tokens that chose the expert (REAP, arXiv
    2510.13999, section 4).

    A mean spares rare experts, which costs more on the text of the search, and less on others.
    """

    name = "reap"
    description = "mean gate x norm of the expert's outputs (for --unit experts)"

    def score_experts(self, use: ExpertUse, block: int) -> Tensor:
        """Return the means; 0 for an expert that no token chose."""
        return use.products / use.tokens.clamp(min=1)


class Frequency(ExpertMetric):
    """How many tokens chose the expert: the baseline of most papers on the pruning of experts."""

    name = "frequency"
    description = "how many tokens chose the expert (for --unit experts)"

    def score_experts(self, use: ExpertUse, block: int) -> Tensor:
        """Return the counts."""
        return use.tokens
