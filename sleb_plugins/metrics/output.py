"""How far what a model that reads puts out is from the dense model's."""

from __future__ import annotations

from sleb_plugins.metric import OutputMetric


class OutputDistance(OutputMetric):
    """1 - cosine of vectors, KL divergence of classes, squared difference of scores."""

    name = "output"
    description = "distance from the dense model's vectors, classes or scores (models that read)"
    unit = "distance"
