"""Quantities as people read them."""


def size(count: float) -> str:
    """Say a number of bytes, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
