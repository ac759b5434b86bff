"""The version of `sleb`."""

__version__ = "0.1.0"
