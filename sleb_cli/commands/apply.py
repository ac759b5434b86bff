"""stub for now."""
def apply() -> None:
    """x."""
