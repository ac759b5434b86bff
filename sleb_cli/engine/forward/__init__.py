"""How blocks are skipped in a living model, and how all candidates are scored in one walk."""
