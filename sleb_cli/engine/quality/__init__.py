"""Measure what a removal costs: perplexity, divergence and tasks."""
