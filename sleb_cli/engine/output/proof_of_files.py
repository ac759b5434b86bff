"""Are the written files the planned ones, byte for byte? The part of a proof that needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sleb_cli.engine.files.copying import reading
from sleb_cli.engine.files.shards import INDEX, NewTensor, Shard, index_of
from sleb_cli.engine.files.tensors import read_tensors
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import disk_error, translate_errors
from sleb_cli.events import Notify, task
from sleb_cli.records import Check, differences
from sleb_plugins import ModelError, ProofError

PROMPT = (
    "A river begins as snow on a mountain. In spring the water runs down over the rocks, gathers "
    "in "
    "streams, and reaches the plain, where people built mills and towns along its banks. They "
    "asked "
    "how deep it was, who owned the fish, and why it flooded every ninth year. Nobody could answer "
    "all three questions, so they wrote down what they saw, measured it, and compared their notes."
)

CheckResult = tuple[Check | None, dict[str, Any]]
"""A passed check, or None for a skipped one, and its values in the proof's record."""


@dataclass(frozen=True)
class Planned:
    """The contents of a checkpoint, and what is not copied into it.

    Attributes:
        weights: the weight files by name; empty if it is made from a GGUF file, whose proof covers
            the rest.
        texts: the contents of the files with settings, by name.
        copies: the dense model's files that are copied unchanged, by relative path.
        left_out: the names of the dense model's files in other formats.
        outside: the names of links that lead out of its folder.
    """

    tensors: Sequence[NewTensor]
    weights: Mapping[str, Shard] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    outside: Sequence[str] = ()


def check_files(
    surgery: Surgery, folder: Path, tokenizer: Any, planned: Planned, notify: Notify
) -> Iterator[CheckResult]:
    """Check that the folder holds what was planned, byte for byte, even where no model reads it."""
    if planned.weights:
        _require_files(folder, planned)
    _require_tensors(folder, planned)
    yield "complete", {}
    _require_same_bytes(folder, planned.tensors, notify)
    yield "same bytes", {}
    if surgery.tokens is not None or (tokenizer is not None and planned.weights):
        yield from _require_same_tokens(surgery, folder, tokenizer, notify)


def _require_files(folder: Path, planned: Planned) -> None:
    written = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
    texts = {
        **planned.texts,
        **({INDEX: index_of(planned.weights)} if len(planned.weights) > 1 else {}),
    }
    expected = {*planned.weights, *texts, *planned.copies}
    if missing := sorted(expected - written):
        raise proof_error(f"{_listed(missing)} missing")
    if extra := sorted(written - expected):
        raise proof_error(
            f"{_listed(extra)} there, which belong to no pruned checkpoint of this model"
        )
    for name, text in texts.items():
        if (content := (folder / name).read_bytes()) != text.encode():
            raise proof_error(f"{name} is not what was written{_difference_clause(content, text)}")
    for name, original in planned.copies.items():
        with reading(original):
            digest = _digest(original)
        if _digest(folder / name) != digest:
            raise proof_error(f"{name} is not the dense model's")


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} files, such as {names[0]}, are"


def _difference_clause(content: bytes, text: str) -> str:
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        return ", nor readable JSON"
    first = differences({"": settings}, {"": json.loads(text)}).partition("; ")[0].removeprefix(".")
    return f": {first}" if first else ""


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _require_tensors(folder: Path, planned: Planned) -> None:
    """Check that every tensor is in the planned file, in its shape and data type, and that no file
    is truncated.
    """
    with model_errors_fail_proof():
        weights = find_weights(folder)
        written = {tensor.name: (tensor.dtype, tensor.shape) for tensor in weights.stored}
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned.tensors}
    both = expected.keys() & written.keys()
    for fault, names in {
        "are missing": expected.keys() - both,
        "have another type or shape": {name for name in both if written[name] != expected[name]},
        "are unexpected": written.keys() - both,
    }.items():
        if names:
            raise proof_error(f"{len(names)} tensors {fault}, such as {min(names)}")
    if planned.weights:
        for header in weights.headers:
            shard = planned.weights[header.path.name]
            if {tensor.name for tensor in header.tensors} != {
                tensor.name for tensor in shard.tensors
            }:
                raise proof_error(f"{header.path.name} holds other tensors than the index says")
            if header.metadata != shard.metadata:
                raise proof_error(
                    f"the metadata of {header.path.name} are {header.metadata}, not "
                    f"{shard.metadata}"
                )


def _require_same_tokens(
    surgery: Surgery, folder: Path, theirs: Any, notify: Notify
) -> Iterator[CheckResult]:
    """Check that the checkpoint has the dense model's tokenizer and chat template."""
    trust = surgery.architecture.source.trust_remote_code
    with translate_errors(lambda words: proof_error(f"its tokenizer cannot be loaded: {words}")):
        ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    texts = [PROMPT, *(text for cut in surgery.cuts for text in cut.texts(theirs))]
    for text, ids, expected in zip(
        texts, ours(texts).input_ids, theirs(texts).input_ids, strict=True
    ):
        if ids != surgery.token_ids(expected):
            raise proof_error(
                f"its tokenizer is not the dense model's, which reads {text[:40]!r} otherwise"
            )
    if ours.chat_template != theirs.chat_template:
        raise proof_error("its chat template is not the dense model's")
    for cut in surgery.cuts:
        for check in cut.tokenizer_checks(ours, theirs, notify):
            yield check, {}


def _require_same_bytes(folder: Path, planned: Sequence[NewTensor], notify: Notify) -> None:
    """Check that each tensor has the bytes of the dense model's or of its new values."""
    # safetensors reads both sides (torch, pickles): it shares no code with what copied the bytes.
    different: list[NewTensor] = []
    with task(notify, "Comparing weights", sum(tensor.size for tensor in planned), "B") as advance:
        with model_errors_fail_proof():
            written = {tensor.name: tensor.path for tensor in find_weights(folder).stored}
        for (source, path), group in groupby(
            planned, key=lambda tensor: (tensor.stored.path, written[tensor.name])
        ):
            tensors = list(group)
            if not path.samefile(source):
                written_values = read_tensors(path, [tensor.name for tensor in tensors])
                dense = read_tensors(
                    source, [tensor.stored.name for tensor in tensors if tensor.value is None]
                )
                for tensor in tensors:
                    expected = tensor.changed(next(dense) if tensor.value is None else tensor.value)
                    with model_errors_fail_proof():
                        ours = next(written_values)
                    if not torch.equal(_bits_of(ours), _bits_of(expected)):
                        different.append(tensor)
            advance(sum(tensor.size for tensor in tensors))
    if different:
        first, others = different[0], f" ({len(different)} of {len(planned)} tensors differ)"
        whose = (
            f"those of {first.stored.name} in the dense model"
            if first.value is None
            else "its new values"
        )
        raise proof_error(
            f"the bytes of {first.name} are not {whose}{others if len(different) > 1 else ''}"
        )


def _bits_of(tensor: Tensor) -> Tensor:
    # Values would not do: NaN is not equal to itself, and -0 is equal to 0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def proof_error(what: str, kind: str = "checkpoint") -> ProofError:
    """Make the error of a failed proof; `kind` is "checkpoint" or "GGUF file"."""
    return ProofError(
        f"The pruned {kind} failed its proof: {what}.",
        hint="Nothing was written. Try again, in case the disk or another program changed a file. "
        "If it fails again, "
        "please report the model; --keep-failed DIR keeps the output.",
    )


@contextmanager
def model_errors_fail_proof(kind: str = "checkpoint") -> Iterator[None]:
    """Turn a `ModelError` about the output into a failed proof, or into the disk error behind it."""
    try:
        yield
    except ModelError as error:
        raise disk_error(error) or proof_error(error.message.rstrip("."), kind) from error
