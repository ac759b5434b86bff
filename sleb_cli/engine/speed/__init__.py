"""Measure what a removal gains: speed, memory and energy."""
