"""Identify a model by its content, reading 2 MiB of each weight file however large it is."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

HEAD_BYTES = 1 << 20
SAMPLE_BYTES = 4096
SAMPLES = 256

# Keys that may differ when the same model is saved again.
_VOLATILE = ("_name_or_path", "transformers_version")


def fingerprint_files(paths: Iterable[Path], config: dict[str, object] | None = None) -> str:
    """Return a SHA-256 over the config and each file's name, size, first MiB and samples of the rest.

    The start of a safetensors file lists every tensor and its offset. The 256 samples of 4 KiB at even distances change
    with any training, but may miss an edit of single weights.
    """
    digest = hashlib.sha256()
    if config is not None:
        resolved = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(resolved, sort_keys=True).encode())
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEAD_BYTES))
            for sample in range(SAMPLES if size > HEAD_BYTES else 0):
                file.seek(HEAD_BYTES + (size - HEAD_BYTES) * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
