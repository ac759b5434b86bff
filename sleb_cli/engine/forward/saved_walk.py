"""A walk through the blocks on disk, so that a search that is interrupted in the middle of a step loses little of it.

One walk through a streamed model may take hours. Between two blocks, its hidden states are all that it needs to go on.
They are saved whenever that takes a small share of the time since they were saved last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sleb_cli.atomic import new_file, remove_leftovers
from sleb_cli.engine.files.weights import DTYPE_NAMES
from sleb_cli.engine.forward.fork import Walk

SHARE = 0.05
"""The largest share of the time that saving may take."""
FEWEST_SECONDS = 20.0
"""A walk is not saved more often."""
FORMAT = "2"
"""A walk in another format is ignored. Raise it when the same file would mean something else."""
BYTES_PER_SECOND = 5e8
"""How fast the first save is expected to be."""

Key = tuple[int, int]
"""The number of a batch, and of the first sequence in it of a part that passes through the model on its own."""


@dataclass
class SavedWalk:
    """The file that holds a walk.

    Attributes:
        path: the file, whose name ends in the number of this process. Those of all processes are read.
        identity: what hidden states depend on, except for the removed blocks; walks of another identity are ignored.
    """

    path: Path
    identity: str = ""
    _saved: float = field(default_factory=time.monotonic)
    _seconds: float | None = None

    def save(self, depth: int, removed: Sequence[int], walks: Mapping[Key, Walk]) -> None:
        """Save walks that are about to enter the block at `depth`, if it is worth the time."""
        waited = time.monotonic() - self._saved
        if waited < FEWEST_SECONDS:
            return
        tensors = {
            f"{batch}.{part}.{at}.{branch}": hidden
            for (batch, part), walk in walks.items()
            for at, branch, hidden in walk.progress(depth)
        }
        expected = self._seconds or sum(tensor.nbytes for tensor in tensors.values()) / BYTES_PER_SECOND
        if waited < expected / SHARE:
            return
        begun = time.monotonic()
        with new_file(self.path) as aside, aside.open("wb") as file:
            _write(file, tensors, self._metadata(removed))
        self._saved = time.monotonic()
        self._seconds = self._saved - begun

    def restore(self, removed: Sequence[int]) -> Iterator[tuple[Key, int, int, Tensor]]:
        """Yield what saved walks without these blocks had reached: batch and part, depth, branch and hidden states."""
        expected = self._metadata(removed)
        for path in self._files():
            # A file that is damaged, or is something else, only costs the time that it would have saved.
            with suppress(SafetensorError, ValueError, OSError), safe_open(path, framework="pt") as file:
                for name in file.keys() if file.metadata() == expected else ():
                    batch, part, depth, branch = map(int, name.split("."))
                    yield (batch, part), depth, branch, file.get_tensor(name)  # which stays in the file, mapped

    def delete(self) -> None:
        """Delete the files, once their walk has ended."""
        remove_leftovers(self.path.parent, self._pattern)
        for path in self._files():
            path.unlink(missing_ok=True)

    def _metadata(self, removed: Sequence[int]) -> dict[str, str]:
        return {"format": FORMAT, "identity": self.identity, "removed": json.dumps(sorted(removed))}

    def _files(self) -> list[Path]:
        found = self.path.parent.glob(self._pattern)
        return sorted(path for path in found if path.is_file() and not path.is_symlink())

    @property
    def _pattern(self) -> str:
        return f"{escape(self.path.stem)}.*[0-9]"


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file one tensor after another: the library's own writer would hold a second copy of all."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
