"""How blocks are skipped in memory, and how all candidates are scored in one walk through the
blocks.
"""
