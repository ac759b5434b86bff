"""Check that the written files are the planned ones, byte for byte, which needs no model."""

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
from sleb_cli.engine.files.weights import WeightFiles, find_weights
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notify, task
from sleb_cli.records import Check, differences
from sleb_plugins import ModelError, ProofError

PROMPT = (
    "A river begins as snow on a mountain. In spring the water runs down over the rocks, gathers "
    "in streams, and reaches the plain, where people built mills and towns along its banks. They "
    "asked how deep it was, who owned the fish, and why it flooded every ninth year. Nobody could "
    "answer all three questions, so they wrote down what they saw, measured it, and compared "
    "their notes."
)


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
) -> list[Check]:
    """Check that the folder holds what was planned, even where no model reads it."""
    if planned.weights:
        _require_files(folder, planned)
    with model_errors_fail_proof():
        weights = find_weights(folder)
    _require_names(weights, planned)
    _require_same_bytes(weights, planned.tensors, notify)
    checks: list[Check] = ["complete", "same bytes"]
    if surgery.tokens is not None or (tokenizer is not None and planned.weights):
        checks += _require_same_tokens(surgery, folder, tokenizer, notify)
    return checks


def _require_files(folder: Path, planned: Planned) -> None:
    """Check that all files are there and no other, and those without weights as planned."""
    texts = dict(planned.texts)
    if len(planned.weights) > 1:
        texts[INDEX] = index_of(planned.weights)
    expected = {*planned.weights, *texts, *planned.copies}
    written = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_file():
            written.add(path.relative_to(folder).as_posix())
    if missing := sorted(expected - written):
        raise proof_error(f"{_listed(missing)} missing")
    if extra := sorted(written - expected):
        raise proof_error(
            f"{_listed(extra)} there, which belong to no pruned checkpoint of this model"
        )
    for name, text in texts.items():
        content = (folder / name).read_bytes()
        if content != text.encode():
            raise proof_error(f"{name} is not what was written{_difference_clause(content, text)}")
    for name, original in planned.copies.items():
        with reading(original):
            digest = _digest(original)
        if _digest(folder / name) != digest:
            raise proof_error(f"{name} is not the dense model's")


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} files, such as {names[0]}, are"


def _difference_clause(content: bytes, text: str) -> str:
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        return ", nor readable JSON"
    every = differences({"": settings}, {"": json.loads(text)})
    first = every.partition("; ")[0].removeprefix(".")
    return f": {first}" if first else ""


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _require_names(weights: WeightFiles, planned: Planned) -> None:
    """Check that every tensor is there, in the planned file, and no other."""
    expected = {tensor.name for tensor in planned.tensors}
    written = {tensor.name for tensor in weights.stored}
    if missing := expected - written:
        raise proof_error(f"{len(missing)} tensors are missing, such as {min(missing)}")
    if unexpected := written - expected:
        raise proof_error(f"{len(unexpected)} tensors are unexpected, such as {min(unexpected)}")
    if not planned.weights:
        return
    for header in weights.headers:
        name = header.path.name
        shard = planned.weights[name]
        if {tensor.name for tensor in header.tensors} != {tensor.name for tensor in shard.tensors}:
            raise proof_error(f"{name} holds other tensors than the index says")
        if header.metadata != shard.metadata:
            raise proof_error(f"the metadata of {name} are {header.metadata}, not {shard.metadata}")


def _require_same_bytes(weights: WeightFiles, planned: Sequence[NewTensor], notify: Notify) -> None:
    """Check that each tensor has the bytes of the dense model's or of its new values."""
    # safetensors reads both sides (torch, pickles): it shares no code with what copied the bytes.
    different: list[NewTensor] = []
    paths = {tensor.name: tensor.path for tensor in weights.stored}
    with task(notify, "Comparing weights", sum(tensor.size for tensor in planned), "B") as advance:
        for (source, path), group in groupby(
            planned, key=lambda tensor: (tensor.stored.path, paths[tensor.name])
        ):
            tensors = list(group)
            if not path.samefile(source):
                different += _different_tensors(source, path, tensors)
            advance(sum(tensor.size for tensor in tensors))
    if not different:
        return
    first = different[0]
    whose = "its new values"
    if first.value is None:
        whose = f"those of {first.stored.name} in the dense model"
    others = ""
    if len(different) > 1:
        others = f" ({len(different)} of {len(planned)} tensors differ)"
    raise proof_error(f"the bytes of {first.name} are not {whose}{others}")


def _different_tensors(
    source: Path, path: Path, tensors: Sequence[NewTensor]
) -> Iterator[NewTensor]:
    """Yield the tensors of one file whose bytes, type or shape are not as planned."""
    written_values = read_tensors(path, [tensor.name for tensor in tensors])
    kept_names = [tensor.stored.name for tensor in tensors if tensor.value is None]
    dense_values = read_tensors(source, kept_names)
    for tensor in tensors:
        value = next(dense_values) if tensor.value is None else tensor.value
        expected = tensor.changed(value)
        with model_errors_fail_proof():
            written = next(written_values)
        is_alike = written.dtype is expected.dtype and written.shape == expected.shape
        if not is_alike or not torch.equal(_bits_of(written), _bits_of(expected)):
            yield tensor


def _bits_of(tensor: Tensor) -> Tensor:
    # Values would not do: NaN is not equal to itself, and -0 is equal to 0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _require_same_tokens(surgery: Surgery, folder: Path, dense: Any, notify: Notify) -> list[Check]:
    """Check that the checkpoint has the dense model's tokenizer and chat template."""
    trust = surgery.architecture.source.trust_remote_code
    with translate_errors(lambda words: proof_error(f"its tokenizer cannot be loaded: {words}")):
        pruned = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    texts = [PROMPT]
    for cut in surgery.cuts:
        texts += cut.texts(dense)
    pruned_ids, dense_ids = pruned(texts).input_ids, dense(texts).input_ids
    for text, ids, expected in zip(texts, pruned_ids, dense_ids, strict=True):
        if ids != surgery.token_ids(expected):
            raise proof_error(
                f"its tokenizer is not the dense model's, which reads {text[:40]!r} otherwise"
            )
    if pruned.chat_template != dense.chat_template:
        raise proof_error("its chat template is not the dense model's")
    checks: list[Check] = []
    for cut in surgery.cuts:
        checks += cut.tokenizer_checks(pruned, dense, notify)
    return checks


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
    """Turn a `ModelError` about the output into a failed proof."""
    try:
        yield
    except ModelError as error:
        raise proof_error(error.message.rstrip("."), kind) from error
