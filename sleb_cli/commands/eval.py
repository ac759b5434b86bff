"""stub for now."""
def eval_() -> None:
    """x."""
