"""stub for now."""
def export() -> None:
    """x."""
