"""What plans and results share: strict records, the model's identity, and the proof."""

import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from sleb_cli.atomic import to_json, write_text
from sleb_cli.names import without_folders
from sleb_cli.requests import DEMO
from sleb_cli.version import __version__

Perplexity = Annotated[float, Field(gt=0)]

_FAULTS = {"missing": "missing", "extra_forbidden": "unknown"}


class UnreadableRecord(ValueError):
    """A file is not a record; the message says why."""


def why_not_read(path: Path) -> str | None:
    """Say why a path should not be opened ("it is a folder"), unless it is a file.

    Raises:
        OSError: the file is missing or out of reach.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(status.st_mode):  # opening a pipe can block, and a device can be endless
        return "it is a pipe or a device, not a file"
    return None


def read_text(path: Path) -> str:
    """Read the text of a record.

    Raises:
        FileNotFoundError: the file is missing.
        UnreadableRecord: the file cannot be read, or is not text.
    """
    try:
        reason = why_not_read(path)
        if reason:
            raise UnreadableRecord(reason)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableRecord(error.strerror or "it cannot be opened") from error
    except UnicodeDecodeError as error:
        raise UnreadableRecord("it is not text") from error


def first_fault(error: ValidationError, whole: str) -> str:
    """Describe the first fault and its location; `whole` names the data itself."""
    first = error.errors(include_url=False)[0]
    location = ".".join(map(str, first["loc"])) or whole
    words = _FAULTS.get(first["type"])
    if words is None:
        words = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if first["type"] == "literal_error" and isinstance(first["input"], int):
        words += f", not {first['input']}"  # of a version
    return f"{location}: {words.rstrip('.')}"


THIS_VERSION: Mapping[str, Any] = {"schema_version": 1, "sleb_version": __version__}
"""The fields of a new `VersionedRecord`."""


@dataclass(frozen=True)
class Public:
    """Marks a field that may name local files; `name` returns the value without folders."""

    name: Callable[[str], str]


class Record(BaseModel):
    """Data written to disk: frozen, typed, and strict about unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )
    left_out_if_none: ClassVar[frozenset[str]] = frozenset()
    """Fields that only some records have, and that are not written if they are None or empty."""

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        for name in self.left_out_if_none:
            if name in data and data[name] in (None, (), []):
                del data[name]
        return data

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
        except (MemoryError, RecursionError) as error:
            raise UnreadableRecord("it is too large to be read") from error

    def to_data(self) -> dict[str, Any]:
        """Return the record as in JSON."""
        return self.model_dump(mode="json")

    def published(self) -> Self:
        """Return the record without the folders of local models and texts."""
        fields = type(self).model_fields.items()
        return self.model_copy(
            update={name: _published(getattr(self, name), field.metadata) for name, field in fields}
        )

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        write_text(path, to_json(self.to_data()))


def _published(value: Any, metadata: Sequence[object]) -> Any:
    if isinstance(value, Record):
        return value.published()
    if isinstance(value, tuple):
        return tuple(_published(item, metadata) for item in value)
    for mark in metadata:
        if isinstance(mark, Public):
            return mark.name(value)
    return value


class VersionedRecord(Record):
    """A record that is a file of its own."""

    schema_version: Literal[1]
    sleb_version: str


OutputKind = Literal["vectors", "scores", "classes"]
"""What a model that only reads puts out for a text."""


class ModelRecord(Record):
    """The model; `id` is the name of a Hub model, or the absolute path of a folder or file.

    In a checkpoint, which may be published, `id` has no folders. `revision` is a commit of the Hub.
    `code` is a SHA-256 of the Python files that come with the model, if the user let them run.
    `dtype` is the data type of its weights. `output` is left out for a language model.
    """

    left_out_if_none = frozenset({"output"})

    id: Annotated[str, Public(without_folders)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    fingerprint: str
    model_type: str
    family: str
    blocks: Annotated[int, Field(ge=1)]
    code: str | None = None
    dtype: str | None = None
    output: OutputKind | None = None

    @property
    def has_place(self) -> bool:
        """Whether `id` tells where the model is, on the Hub or on this machine."""
        return self.revision is not None or self.id == DEMO or Path(self.id).is_absolute()

    def computed_in(self, dtype: str) -> str:
        """Write a data type of computation, and the weights' own if it differs."""
        return dtype if self.dtype in (None, dtype) else f"{dtype} (weights: {self.dtype})"


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model; those in older plans lack the second part."""
    pairs = zip(one.split("-"), other.split("-"), strict=False)
    return all(digest == other_digest for digest, other_digest in pairs)


Check = Literal[
    "complete", "same bytes", "same tokens", "spells others", "loads", "same logits",
    "every expert", "generates", "same outputs", "same vectors",
    "saves again",
]  # fmt: skip
"""What a proof can check in a checkpoint: see `engine/output/proof.py`.

Older versions also checked "saves again".
"""

Reference = Literal["dense", "recovered", "whole", "fewer experts", "fewer experts per token"]
"""What logits are compared with: see `Proof`."""


class Proof(Record):
    """What was checked in a checkpoint, and how close its logits are.

    `reference` is what they were compared with: the dense model with these blocks skipped
    ("dense"), also with the recovered weights ("recovered"), the dense model if only tokens go
    ("whole"), or the dense model whose routers cannot choose these experts ("fewer experts") or
    choose fewer ("fewer experts per token"). `partial` says why some checks were skipped. Numbers
    are null if no logits were compared; differences are relative to the largest logit. Of a model
    that only reads, its outputs are compared in place of logits, and `vectors_difference` is that
    of the vectors which sentence-transformers computes from text.
    """

    left_out_if_none = frozenset({"vectors_difference"})

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
    vectors_difference: float | None = None


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Describe how the data of two records differ: "search.metric: nll, not cosine; …"."""
    left = _flat(actual)
    right = _flat(expected)
    clauses = []
    for name in left | right:
        if left.get(name) != right.get(name):
            clauses.append(f"{name}: {left.get(name)}, not {right.get(name)}")
    return "; ".join(clauses)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
