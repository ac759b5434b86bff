"""Which model is this, by its content, and do its files change while they are read?"""

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

# Keys that transformers may change when it saves the model again.
_VOLATILE = ("_name_or_path", "transformers_version")


def fingerprint_files(
    paths: Iterable[Path], config: dict[str, object] | None = None, *, header: int = 0
) -> str:
    """Return a SHA-256 over the config and each file's name, size, first MiB (or `header`) and
    samples of the rest.

    The start of a safetensors file lists every tensor and its offset. The 256 samples of 4 KiB at
    even distances change with any training, but may miss an edit of single weights.
    """
    digest, head = hashlib.sha256(), max(HEAD_BYTES, header)
    if config is not None:
        resolved = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(resolved, sort_keys=True).encode())
    for path in sorted(paths):
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            digest.update(file.read(head))
            for sample in range(SAMPLES if size > head else 0):
                file.seek(head + (size - head) * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


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
        self._stamps = {path: _stamp(path) for path in paths}

    def add(self, *paths: Path) -> None:
        """Watch these files, too; call it before they are read."""
        self._stamps |= {path: _stamp(path) for path in paths if path not in self._stamps}

    def require_unchanged(self) -> None:
        """Refuse to go on if a file was replaced, edited, removed or added since the watch began."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise ModelError(
                    f"{path} changed while it was read.",
                    hint="Run the command again when no program writes to it.",
                )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse a result of files that changed meanwhile, and give that as the reason if the work
        failed.
        """
        try:
            yield
        except SlebError:
            self.require_unchanged()
            raise
        self.require_unchanged()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a file's size and time of change in ns; None if it is missing."""
    with reading(path), suppress(FileNotFoundError, NotADirectoryError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns  # no inode: some network file systems change it
    return None
