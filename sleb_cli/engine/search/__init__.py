"""The search for the blocks that a model can best do without; `planning` is where it begins."""
