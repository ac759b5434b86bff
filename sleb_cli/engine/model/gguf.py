"""A GGUF file as a Hugging Face folder, converted once, so that other code reads one format."""

from importlib.metadata import version
from pathlib import Path

from sleb_cli.cache import cached_folder
from sleb_cli.engine.files.fingerprint import (
    Watch,
    fingerprint_samples,
    fingerprint_tensors,
    join_fingerprints,
)
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.events import Notify
from sleb_cli.keys import name_of

# Raise it when a file would become another folder than before.
CONVERSION = 3


def gguf_folder(path: Path, notify: Notify) -> Path:
    """Return the folder of a GGUF file, converted on first use and kept in the cache."""
    watch = Watch(path)

    def fill(folder: Path) -> None:
        from sleb_cli.engine.model.gguf_conversion import convert_gguf  # which imports torch

        with watch.unchanged():
            convert_gguf(path, folder, notify)

    # All that the folder depends on: the file, with its whole header, and the versions of the code
    # that converts it.
    tensors = read_gguf(path).tensors
    header = min((tensor.start for tensor in tensors), default=0)
    samples = fingerprint_samples([path], header=header)
    ranges = [(tensor.start, tensor.size) for tensor in tensors]
    made_by = {package: version(package) for package in ("transformers", "gguf")}
    name = name_of(
        {
            "file": join_fingerprints(samples, [fingerprint_tensors(path, ranges)]),
            "conversion": CONVERSION,
            **made_by,
        }
    )
    return cached_folder(f"gguf-{name[:16]}", fill)
