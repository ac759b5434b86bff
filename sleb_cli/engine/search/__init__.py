"""Which blocks go. `run.py` is where a search begins."""
