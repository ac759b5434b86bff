"""Measure what a removal gains: speed and memory."""
