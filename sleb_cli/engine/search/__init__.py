"""Which blocks to remove. `run.py` is the entry point."""
