"""stub for now."""
def bench() -> None:
    """x."""
