"""The `sleb` program: the command line, and the engine behind it."""

__version__ = "0.1.0"
