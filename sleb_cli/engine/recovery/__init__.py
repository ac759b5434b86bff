"""New values for the blocks that stay: `--recover` and `--heal`.

`recover.py` is where a recovery begins.
"""
