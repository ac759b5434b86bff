"""Resolve `sleb eval --against`: what two models have in common, and how a text is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.quality.bits_per_byte import ByteWindows, cut_by_bytes
from sleb_cli.engine.quality.models import Models
from sleb_cli.engine.quality.vocabularies import SharedTokens, read_alike, share_tokens
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.windows import EvaluationWindows, choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.order import OTHER
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import EvalRequest
from sleb_cli.results import ComparedRecord
from sleb_cli.units import plural
from sleb_plugins import DataError, UsageError


def with_other(
    subject: Subject, source: ModelSource, registry: Registry, notify: Notify
) -> Subject:
    """Add the model that is compared with the subject's.

    Raises:
        UsageError: only one of them is a language model, or they put out different things.
    """
    other = read_architecture(source, registry, notify)
    dense = subject.architecture
    if _does(other) != _does(dense):
        raise UsageError(
            f"{other.source.id} {_does(other)}, but {dense.source.id} {_does(dense)}.",
            hint="Compare two language models, or two that put out the same.",
        )
    return replace(subject, other=other)


def _does(architecture: Architecture) -> str:
    output = architecture.record.output
    if output is None:
        return "is a language model"
    if output == "classes":
        return f"puts out {architecture.config.num_labels} classes"
    return f"puts out {output}"


def shared_tokens(subject: Subject, request: EvalRequest, notify: Notify) -> SharedTokens | None:
    """Match the vocabularies of the two models; None if their tokenizers differ.

    Raises:
        UsageError: a corpus is to be read, and they differ, or the models would read it otherwise.
        ModelError: one has no tokenizer.
    """
    dense, other = subject.pair
    shared = share_tokens(
        (load_tokenizer(dense.source), dense), (load_tokenizer(other.source), other)
    )
    names = f"{other.source.name} and {dense.source.name}"
    if request.corpus is not None and not (shared and shared.is_whole):
        raise UsageError(
            f"The tokenizers of {names} differ, so they cannot read the same texts.",
            hint="Measure each by itself, without --against.",
        )
    if request.corpus is not None:
        _require_same_reading(subject)
    if request.apply_chat_template and not same_chat_template(subject):
        notify(Notice(f"{names} have different chat templates: each is asked in its own."))
    return shared


def _require_same_reading(subject: Subject) -> None:
    """Raise a UsageError if two models read texts, or compare or name their outputs, otherwise."""
    dense, other = subject.pair
    wanted = _reading_of(dense)
    found = _reading_of(other)
    for what in wanted | found:
        if found.get(what) != wanted.get(what):
            raise UsageError(
                f"The {what} is {found.get(what)!r} in {other.source.id}, but "
                f"{wanted.get(what)!r} in {dense.source.id}.",
                hint="Give both the same, or measure each by itself, without --against.",
            )


def _reading_of(architecture: Architecture) -> dict[str, Any]:
    """Return what outputs for a corpus depend on, and what they mean, by its name."""
    reading = architecture.reading
    assert reading is not None
    settings = {
        "setting do_lower_case": reading.lower_case,
        "setting prompts": {name: prompt for name, prompt in reading.prompts.items() if prompt},
        "default prompt": reading.prompts.get(reading.prompt or "", ""),
        "setting similarity_fn_name": reading.similarity,
    }
    if reading.output == "classes":
        for number, name in architecture.config.id2label.items():
            settings[f"name of class {number}"] = name
    return settings


def choose_shared_length(subject: Subject, request: EvalRequest) -> int:
    """Return the sequence length: in a comparison, one that both models have positions for.

    Raises:
        UsageError: a model has fewer positions than are asked for.
    """
    models = filter(None, (subject.architecture, subject.compared))
    return min(choose_length(request.sequence_length, model) for model in models)


def compare_texts(
    texts: Sequence[EvaluationWindows], models: Models, request: EvalRequest
) -> tuple[tuple[EvaluationWindows, ...], tuple[tuple[ByteWindows, ByteWindows], ...]]:
    """Return the windows that both models read alike, and other texts in the tokens of each.

    Raises:
        UsageError: a text of conversations is not read alike.
        DataError: a model predicts nothing of what both read.
    """
    alike = []
    by_bytes = []
    for windows in texts:
        same = _read_alike(windows, models)
        if same:
            alike.append(same)
        else:
            by_bytes.append(_cut_by_bytes(windows, models, request))
            source = windows.text.source
            models.notify(Notice(f"The tokenizers differ: {source} is compared by bits per byte."))
    if alike and models.shared and len(models.shared.dense) < max(vocabulary_sizes(models.subject)):
        count = f"{len(models.shared.dense):,}"
        models.notify(Notice(f"Compared on the {count} tokens that both models have."))
    return tuple(alike), tuple(by_bytes)


def _read_alike(windows: EvaluationWindows, models: Models) -> EvaluationWindows | None:
    if models.shared is None:
        return None
    dense = models.tokenizer(())
    alike = read_alike(windows, models.shared, dense, models.tokenizer(OTHER))
    if alike and len(alike.ids) < len(windows.ids):
        share = f"{len(alike.ids):,} of {len(windows.ids):,} windows"
        text = f"Both models read {share} of {windows.text.source} in the same tokens; only these "
        models.notify(Notice(f"{text}are compared."))
    return alike


def _cut_by_bytes(
    windows: EvaluationWindows, models: Models, request: EvalRequest
) -> tuple[ByteWindows, ByteWindows]:
    cut = partial(
        cut_by_bytes,
        text=windows.text,
        length=choose_shared_length(models.subject, request),
        bos=request.bos,
        most=request.max_windows,
    )
    pair = (cut(models.tokenizer(())), cut(models.tokenizer(OTHER)))
    end = min(read.end for read in pair)
    for read, model in zip(pair, models.subject.pair, strict=True):
        if not read.bytes[read.starts < end].any():
            raise DataError(
                f"Both models read only {plural(end, 'character')} of {windows.text.source}, of "
                f"which {model.source.name} predicts nothing.",
                hint="Raise --max-windows or --sequence-length, or use more text.",
            )
    return pair


def describe_other(subject: Subject, shared: SharedTokens | None) -> ComparedRecord:
    """Record the other model, and what is known of the pair."""
    before, after = map(_files_bytes, subject.pair)
    _, other = subject.pair
    return ComparedRecord(
        model=other.record,
        files_bytes=(before, after),
        tokens=vocabulary_sizes(subject),
        shared_tokens=len(shared.dense) if shared else None,
        same_chat_template=same_chat_template(subject),
    )


def vocabulary_sizes(subject: Subject) -> tuple[int, int]:
    """Count the tokens of the tokenizers of two models that are compared."""
    dense, other = [load_tokenizer(model.source).get_vocab() for model in subject.pair]
    return len(dense), len(other)


def same_chat_template(subject: Subject) -> bool:
    """Whether two models that are compared have the same chat template, or none."""
    templates = []
    for model in subject.pair:
        tokenizer = load_tokenizer(model.source)
        templates.append(getattr(tokenizer, "chat_template", None) or None)
    return bool(templates[0] == templates[1])


def _files_bytes(architecture: Architecture) -> int:
    """Return the bytes of a model's files of weights."""
    source = architecture.source
    files: Sequence[Path] = source.weights.paths
    if source.id.endswith(".gguf"):
        files = [Path(source.id)]  # not what it was converted to
    return sum(file.stat().st_size for file in files)
