"""New values for the blocks that stay: `--recover` and `--heal`. `run.py` is where a recovery begins."""
