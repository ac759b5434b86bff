"""Quantities as people read them."""


def count(number: float) -> str:
    """Say a number of parameters: 134.5M, 1.19B."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.3g}B" if number < 10 else f"{number:.4g}B"


def size(count: float) -> str:
    """Say a number of bytes, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
