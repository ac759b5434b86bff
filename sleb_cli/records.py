"""What plans and results share: strict records, and how a model is named in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sleb_cli.atomic import to_json, write_text


class Record(BaseModel):
    """Something written to disk: frozen, typed, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def to_data(self) -> dict[str, Any]:
        """Give the record as JSON holds it."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the record so that the file is there whole or not at all."""
        write_text(path, to_json(self.to_data()))


class ModelRecord(Record):
    """The model that the plan is for; `id` is what the user named, a folder or file as absolute path."""

    id: str
    revision: str | None
    fingerprint: str
    model_type: str
    family: str
    blocks: Annotated[int, Field(ge=1)]


Check = Literal["complete", "loads", "same logits", "generates", "saves again", "same bytes"]
"""What a proof can check of a checkpoint: see `engine/proof.py`."""


class Proof(Record):
    """What was checked of a checkpoint, on which machine's terms, and how near it was.

    `reference` is what its logits were held against: the dense model with these blocks skipped ("dense"), or that with
    the recovered weights in memory ("recovered"). `partial` says why less than everything was checked, where it was
    less. The numbers are None where no logits were compared; differences are relative to the largest logit.
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
    """Name what differs between two records' data: "search.metric: nll, not cosine; …"; nothing, where they agree."""
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
