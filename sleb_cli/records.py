"""What plans and results share: strict records, and the identity of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sleb_cli.atomic import to_json, write_text


def without_folders(name: str) -> str:
    """Return the last part of a local path, and any other name, such as a Hub id, unchanged."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if is_path else name


class Record(BaseModel):
    """Data written to disk: frozen, typed, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def to_data(self) -> dict[str, Any]:
        """Return the record as in JSON."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the record atomically: the whole file, or none."""
        write_text(path, to_json(self.to_data()))


class ModelRecord(Record):
    """The model; `id` is what the user named, a folder or file as an absolute path.

    In a checkpoint, which may be published, it is the name of that folder or file alone.
    """

    id: str
    revision: str | None
    fingerprint: str
    model_type: str
    family: str
    blocks: Annotated[int, Field(ge=1)]


Check = Literal["complete", "loads", "same logits", "generates", "saves again", "same bytes"]
"""What a proof can check in a checkpoint: see `engine/output/proof.py`."""


class Proof(Record):
    """What was checked in a checkpoint, in which data type and on which device, and how close the logits are.

    `reference` is what its logits were compared with: the dense model with these blocks skipped ("dense"), or the same
    with the recovered weights ("recovered"). `partial` says why not everything was checked, if so. The numbers are null
    if no logits were compared; differences are relative to the largest logit.
    """

    checks: tuple[Check, ...]
    reference: Literal["dense", "recovered"] = "dense"
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
