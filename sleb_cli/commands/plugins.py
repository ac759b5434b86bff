"""stub for now."""
def plugins() -> None:
    """x."""
