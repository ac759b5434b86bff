"""Resolve a request of `sleb bench`: to the models and workloads to time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sleb_cli.checks.clashes import given
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.checks.verbs import points_of
from sleb_cli.engine.device import choose_device
from sleb_cli.engine.door.named_model import needs_language_head, plan_surgeries, resolve_subject
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.demo import demo_gguf
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.output.apply_gguf import require_same_kind_of_model
from sleb_cli.engine.speed.benchmark import Benchmark
from sleb_cli.engine.speed.workloads import TEXTS_AT_ONCE, make_workload
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import AUTO, DEMO, BenchRequest, WorkloadName
from sleb_cli.results import Workload
from sleb_plugins import Engine, UsageError

_SHAPE = ("batch_size", "prompt_length", "new_tokens")
_OF_LANGUAGE_MODEL: Mapping[WorkloadName, Sequence[str]] = {
    "prompt": ("batch_size", "prompt_length"),
    "generation": _SHAPE,
}
"""The workloads of a language model, and the options that decide the shape of each."""


def resolve_bench(
    request: BenchRequest,
    named: NamedSubject,
    engine: Engine | None,
    source: ModelSource,
    registry: Registry,
    notify: Notify,
) -> Benchmark:
    """Read the model, and decide which workloads to time on which device."""
    device = choose_device(request.device)
    subject = resolve_subject(named, source, registry, notify)
    architecture = subject.architecture
    if architecture.reading:
        workloads = _workloads_of_reader(request, architecture, device)
    else:
        workloads = _workloads(request, engine, device, architecture.longest_sequence, notify)
    pruned = plan_surgeries(subject, named.sizes)
    dtype = place_model(architecture, device, request.dtype or AUTO, notify, stream=False).dtype
    engine_source = None
    if engine:
        engine_source = _engine_source(subject, engine, request, notify)
    plugins = registry.behind(family=architecture.record.family, engine=request.engine)
    placement = Placement(device, dtype)
    return Benchmark(
        subject, pruned, workloads, placement, plugins, request.threads, engine, engine_source
    )


def _engine_source(subject: Subject, engine: Engine, request: BenchRequest, notify: Notify) -> Path:
    """Return the file or folder of the dense model that an engine reads."""
    if engine.reads == "checkpoint":
        return subject.architecture.source.folder
    model = subject.architecture.record
    if request.source is not None:
        if not request.any_model:
            require_same_kind_of_model(model, read_gguf(request.source), notify)
        return request.source
    if model.id == DEMO:
        return demo_gguf(notify)
    if model.id.endswith(".gguf"):
        return Path(model.id)
    raise UsageError(
        f"{engine.name} reads GGUF files, but {model.id} is a checkpoint.",
        hint="Name a GGUF file of the model with --source; llama.cpp's convert_hf_to_gguf.py makes "
        "one.",
    )


def _workloads(
    request: BenchRequest,
    engine: Engine | None,
    device: torch.device,
    positions: int | None,
    notify: Notify,
) -> tuple[Workload, ...]:
    """Return prompt and generation, or the one that is asked for, at every point of the sweep."""
    # Points that differ only in their new tokens are one prompt workload, so a dict drops
    # repetitions.
    workloads: dict[Workload, None] = {}
    least = engine.least_new_tokens if engine else 0
    for name, point in product(_OF_LANGUAGE_MODEL, points_of(request)):
        if not getattr(point, name) and point.prompt != point.generation:
            continue
        chosen = _chosen(point, _OF_LANGUAGE_MODEL[name])
        workload = make_workload(name, device, positions, least_new_tokens=least, **chosen)
        workloads[workload] = None
        if device.type == "cpu" and not point.sweep and chosen.keys().isdisjoint(_SHAPE):
            notify(
                Notice(f"{workload.label}: less than the paper's setting, because this is a CPU.")
            )
    return tuple(workloads)


def _workloads_of_reader(
    request: BenchRequest, architecture: Architecture, device: torch.device
) -> tuple[Workload, ...]:
    """Return texts in each number and length that is asked for, and one query."""
    limit = architecture.longest_sequence
    workloads: dict[Workload, None] = {}
    for point in points_of(request):
        refused = given(point, "prompt generation new_tokens engine=*")
        if refused:
            raise UsageError(
                needs_language_head(refused[0], architecture),
                hint=f"Leave out {refused[0]}.",
            )
        batch_sizes = TEXTS_AT_ONCE
        if point.batch_size:
            batch_sizes = (point.batch_size,)
        for batch_size in batch_sizes:
            chosen = _chosen(point, ["prompt_length"])
            texts = make_workload("texts", device, limit, batch_size=batch_size, **chosen)
            workloads[texts] = None
    query = make_workload("query", device, limit, **_chosen(request, []))
    return (*workloads, query)


def _chosen(request: BenchRequest, shape: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a workload that a request sets, with these of its shape."""
    chosen: dict[str, Any] = {"engine": request.engine, "compiled": request.compile}
    for field in (*shape, "iterations", "warmup"):
        value = getattr(request, field)
        if value is not None:
            chosen[field] = value
    return chosen
