"""What plans and results share: strict records, and the identity of a model."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sleb_cli.atomic import to_json, write_text
from sleb_cli.names import without_folders
from sleb_cli.units import format_bytes
from sleb_cli.version import __version__

LARGEST = 64 << 20
"""The largest record that is read, in bytes."""

# A list of three bytes takes hundreds in memory, and pydantic keeps an error for each wrong item.
MOST_PARTS, MOST_ITEMS, MOST_FAULTS = 1 << 19, 1 << 21, 1000

MOST_BLOCKS = 4096
"""More than any model has."""

Perplexity = Annotated[float, Field(gt=0)]


_FAULTS = {"missing": "missing", "extra_forbidden": "unknown"}


class UnreadableRecord(ValueError):
    """A file is not a record; the message says why."""


def why_not_read(path: Path, most: int | None = None) -> str | None:
    """Return why a path should not be opened ("it is a folder"); None if it is a file of at most `most` bytes.

    Opening a pipe can block, and a device can be endless.

    Raises:
        OSError: the file is missing or out of reach.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(found.st_mode):
        return "it is a pipe or a device, not a file"
    if most is not None and found.st_size > most:
        return f"it has {format_bytes(found.st_size)}, more than the limit of {format_bytes(most)}"
    return None


def read_text(path: Path, most: int = LARGEST) -> str:
    """Return the text of a record, which may come from anyone.

    Raises:
        FileNotFoundError: the file is missing.
        UnreadableRecord: the file cannot be read, is not text, or is too large.
    """
    try:
        if reason := why_not_read(path, most):
            raise UnreadableRecord(reason)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableRecord(error.strerror or "it cannot be opened") from error
    except UnicodeDecodeError as error:
        raise UnreadableRecord("it is not text") from error
    if sum(map(text.count, ("{", "[", '":'))) > MOST_PARTS or text.count(",") > MOST_ITEMS:
        raise UnreadableRecord("it has more items than any record of sleb")
    return text


def first_fault(error: ValidationError, whole: str) -> str:
    """Return the first fault and its place in a few words; `whole` names the data itself."""
    if error.error_count() > MOST_FAULTS:  # pydantic lists all errors or none
        return f"{whole} has {error.error_count():,} faults"
    first = error.errors(include_url=False)[0]
    is_number = first["type"] == "literal_error" and isinstance(first["input"], int) and abs(first["input"]) < 1000
    found = f", not {first['input']}" if is_number else ""
    place = [str(part) if len(str(part)) <= 40 else f"{str(part)[:40]}…" for part in first["loc"]]
    words = _FAULTS.get(first["type"]) or first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"{'.'.join(place) or whole}: {words.rstrip('.')}{found}"


THIS_VERSION: Mapping[str, Any] = {"schema_version": 1, "sleb_version": __version__}
"""The fields of a new `VersionedRecord`."""


@dataclass(frozen=True)
class Public:
    """Marks a field that may name something local; `name` returns the name without folders."""

    name: Callable[[str], str]


class Record(BaseModel):
    """Data written to disk: frozen, typed, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def read(cls, path: Path, whole: str) -> Self:
        """Read and check a record; `whole` names the data in the message of an error.

        Raises:
            FileNotFoundError: the file is missing.
            UnreadableRecord: it cannot be read, or is not such a record.
        """
        try:
            return cls.model_validate_json(read_text(path))
        except ValidationError as error:
            raise UnreadableRecord(first_fault(error, whole)) from error

    def to_data(self) -> dict[str, Any]:
        """Return the record as in JSON."""
        return self.model_dump(mode="json")

    def published(self) -> Self:
        """Return the record as it may be published: local models and texts are named without their folders."""
        fields = type(self).model_fields.items()
        return self.model_copy(update={name: _published(getattr(self, name), field.metadata) for name, field in fields})

    def write(self, path: Path) -> None:
        """Write the record atomically: the whole file, or none."""
        write_text(path, to_json(self.to_data()))


def _published(value: Any, metadata: Sequence[object]) -> Any:
    if isinstance(value, Record):
        return value.published()
    if isinstance(value, tuple):
        return tuple(_published(each, metadata) for each in value)
    return next((mark.name(value) for mark in metadata if isinstance(mark, Public)), value)


class VersionedRecord(Record):
    """A record that is a file of its own."""

    schema_version: Literal[1]
    sleb_version: str


class ModelRecord(Record):
    """The model; `id` is what the user named, a folder or file as an absolute path.

    In a checkpoint, which may be published, it is the name of that folder or file alone. `revision` is a commit of the
    Hub. `code` is a SHA-256 over the Python files that come with the model, if the user let them run. `dtype` is the
    data type of its weights, which need not be the one that sleb computes in.
    """

    id: Annotated[str, Public(without_folders)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    fingerprint: str
    model_type: str
    family: str
    blocks: Annotated[int, Field(ge=1, le=MOST_BLOCKS)]
    code: str | None = None
    dtype: str | None = None

    def computed_in(self, dtype: str) -> str:
        """Return a data type for display, with that of the weights if it is another one."""
        return dtype if self.dtype in (None, dtype) else f"{dtype} (weights: {self.dtype})"


Check = Literal[
    "complete", "same bytes", "same tokens", "spells others", "loads", "same logits", "every expert", "generates",
    "saves again",
]  # fmt: skip
"""What a proof can check in a checkpoint: see `engine/output/proof.py`."""


Reference = Literal["dense", "recovered", "whole", "fewer experts", "fewer experts per token"]
"""What logits are compared with: see `Proof`."""


class Proof(Record):
    """What was checked in a checkpoint, in which data type and on which device, and how close the logits are.

    `reference` is what its logits were compared with: the dense model with these blocks skipped ("dense"), the same
    with the recovered weights ("recovered"), the dense model if only tokens go ("whole"), or the dense model whose
    routers cannot choose these experts ("fewer experts") or choose fewer ("fewer experts per token"). `partial` says
    why not everything was checked, if so. The numbers are null if no logits were compared; differences are relative to
    the largest logit.
    """

    checks: tuple[Check, ...]
    reference: Reference = "dense"
    partial: str | None
    dtype: str
    device: str
    prompt: Literal["text", "random tokens"] | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    logits_difference: float | None = None
    logits_tolerance: float | None = None
    cache_difference: float | None = None
    cache_tolerance: float | None = None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the differences between two records' data, or an empty string: "search.metric: nll, not cosine; …"."""
    left, right = _flat(found), _flat(expected)
    return "; ".join(
        f"{name}: {left.get(name)}, not {right.get(name)}"
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
