"""A table of plans."""
