"""Identify a model by its content, and notice files that change while they are read."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sleb_cli.engine.files.copying import reading
from sleb_plugins import ModelError, SlebError

HEAD_BYTES = 1 << 20
SAMPLE_BYTES = 4096
SAMPLES = 256

MAX_WHOLE_BYTES = 1 << 20
"""A tensor of fewer bytes is hashed whole: norms, biases and routers."""

# Keys that transformers may change when it saves the model again.
_VOLATILE = ("_name_or_path", "transformers_version")

Range = tuple[int, int]
"""The offset and the number of bytes of a tensor in its file."""


def fingerprint_samples(
    paths: Iterable[Path], config: dict[str, object] | None = None, *, header: int = 0
) -> str:
    """Return a SHA-256 over the config and each file's name, size, head and samples.

    The head is the first MiB, or `header` bytes if that is more; a safetensors file lists its
    tensors there. Behind it, 256 samples of 4 KiB are read at even distances. They change with any
    training of all weights, but miss most changes of norms and biases.
    """
    digest = hashlib.sha256()
    if config is not None:
        lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(lasting, sort_keys=True).encode())
    head = max(HEAD_BYTES, header)
    for path in sorted(paths):
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            digest.update(file.read(head))
            if size <= head:
                continue
            for sample in range(SAMPLES):
                file.seek(head + (size - head) * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint_tensors(path: Path, tensors: Iterable[Range]) -> str:
    """Return a SHA-256 over each tensor of a file: whole if it is small, else its two ends."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        for start, size in tensors:
            if size < MAX_WHOLE_BYTES:
                parts = [(start, size)]
            else:
                parts = [(start, SAMPLE_BYTES), (start + size - SAMPLE_BYTES, SAMPLE_BYTES)]
            for offset, count in parts:
                file.seek(offset)
                digest.update(file.read(count))
    return digest.hexdigest()


def join_fingerprints(samples: str, tensors: Iterable[str]) -> str:
    """Join the hash of a model's samples and the hashes of its tensors into its fingerprint.

    The first part alone is what older plans hold.
    """
    digest = hashlib.sha256("\0".join(tensors).encode())
    return f"{samples}-{digest.hexdigest()[:32]}"


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """Return a SHA-256 over each file's name in the folder and whole content."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        with reading(path):
            content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


class Watch:
    """Files that must stay as they are for as long as they are read."""

    def __init__(self, *paths: Path) -> None:
        self._stamps = {path: stamp_of(path) for path in paths}

    def add(self, *paths: Path) -> None:
        """Watch these files, too; call it before they are read."""
        for path in paths:
            if path not in self._stamps:
                self._stamps[path] = stamp_of(path)

    def require_unchanged(self) -> None:
        """Refuse to go on if a file was edited, removed or added since the watch began."""
        for path, stamp in self._stamps.items():
            if stamp_of(path) != stamp:
                raise ModelError(
                    f"{path} changed while it was read.",
                    hint="Run the command again when no program writes to it.",
                )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse a result of files that changed; if the work failed, name that as the reason."""
        try:
            yield
        except SlebError:
            self.require_unchanged()
            raise
        self.require_unchanged()


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return a file's size and time of change in ns; None if it is missing."""
    with reading(path), suppress(FileNotFoundError, NotADirectoryError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns  # no inode: some network file systems change it
    return None
