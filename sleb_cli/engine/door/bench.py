"""The door of `sleb bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sleb_cli.atomic import require_new_file
from sleb_cli.engine.device import choose_device, free_bytes
from sleb_cli.engine.door.options import require_what_they_need
from sleb_cli.engine.door.subject import resolve_subject, sizes
from sleb_cli.engine.forward.placement import choose_dtype
from sleb_cli.engine.forward.streaming import weight_bytes
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.model.demo import demo_gguf
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.output.apply_gguf import require_same_kind_of_model
from sleb_cli.engine.speed.benchmark import Benchmark
from sleb_cli.engine.speed.workloads import make_workload
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import AUTO, TRANSFORMERS, BenchRequest, WorkloadName
from sleb_cli.results import Workload
from sleb_plugins import Engine, UsageError
from sleb_plugins.errors import did_you_mean

_SWEPT = {"batch": "batch_size", "prompt": "prompt_length", "new": "new_tokens"}
"""What a sweep can vary, and the option for one value of it."""


def resolve_bench(request: BenchRequest, registry: Registry, notify: Notify) -> Benchmark:
    """Check the options, and find the engine, the plan and the model.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        PlanError: the plan was made for another model, or `--source` holds another one.
        MachineError: the engine is not installed.
    """
    if request.output is not None:
        require_new_file(request.output, force=request.force)
    if request.compile and request.warmup == 0:
        raise UsageError("--warmup 0 is too small: the compilation would be timed.", hint="Use 1 or more.")
    engine: Engine | None = None if request.engine == TRANSFORMERS else registry.choose("engine", request.engine).value
    if engine:
        engine.version()  # before the model is looked for, so that a missing engine is named at once
        others = ["dtype"] if engine.reads == "gguf" else ["source"]
        _refuse(request, ["device", "compile", *others], f"does not apply to --engine {engine.name}")
    else:
        _refuse(request, ["source"], "requires --engine")
    if request.prompt:
        require_what_they_need(request, {("new_tokens",): ("generation",)})
    device = choose_device(request.device)
    subject = resolve_subject(request, registry, notify)
    architecture = subject.architecture
    workloads = _workloads(request, device, architecture.longest_sequence, engine, notify)
    surgeries = sizes(subject, request)
    needed = partial(weight_bytes, architecture)
    dtype = choose_dtype(architecture, request.dtype or AUTO, device, needed, free_bytes, notify)
    source = _engine_source(subject, engine, request, notify) if engine else None
    return Benchmark(subject, surgeries, workloads, dtype, device, request.threads, engine, source)


def _refuse(request: BenchRequest, names: Sequence[str], why: str) -> None:
    """Check that these options have their defaults; `why` ends the message: "requires --engine"."""
    for name in names:
        if getattr(request, name) != getattr(BenchRequest(), name):
            raise UsageError(f"--{name} {why}.", hint=f"Leave out --{name}.")


def _engine_source(subject: Subject, engine: Engine, request: BenchRequest, notify: Notify) -> Path:
    """Return the model's own file or folder that an engine reads."""
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
        hint="Name a GGUF file of the model with --source; llama.cpp's convert_hf_to_gguf.py makes one.",
    )


def _workloads(
    request: BenchRequest, device: torch.device, positions: int | None, engine: Engine | None, notify: Notify
) -> tuple[Workload, ...]:
    """Return all workloads of a request: prompt and generation by default, and every point of its sweep."""
    found: dict[Workload, None] = {}  # several points are the same prompt workload if only their new tokens differ
    names: tuple[WorkloadName, ...] = ("prompt", "generation")
    both = request.prompt == request.generation
    for name in (name for name in names if both or getattr(request, name)):
        for point in _sweep(request):
            fields = [*_SWEPT.values(), "iterations", "warmup"]
            asked = {field: value for field in fields if (value := getattr(point, field)) is not None}
            if name == "prompt":
                asked.pop("new_tokens", None)
            least = engine.least_new_tokens if engine else 0
            options: dict[str, Any] = asked | {"engine": request.engine, "compiled": request.compile}
            workload = make_workload(name, device, positions, least_new_tokens=least, **options)
            found[workload] = None
            if device.type == "cpu" and not request.sweep and not asked.keys() & _SWEPT.values():
                notify(Notice(f"{workload.label}: less than the paper's setting, because this is a CPU."))
    return tuple(found)


def _sweep(request: BenchRequest) -> Iterator[BenchRequest]:
    """Yield a request for each combination of the sweep's values; without a sweep, the request itself."""
    values: dict[str, list[int]] = {}
    for part in " ".join(request.sweep).split():
        name, _, numbers = part.partition("=")
        if name not in _SWEPT:
            hint = did_you_mean(name, list(_SWEPT), otherwise="Write it like batch=1,8,32 prompt=128,2048 new=64.")
            raise UsageError(f"--sweep cannot vary {name!r}.", hint=hint)
        field = _SWEPT[name]
        if field in values or getattr(request, field) is not None:
            other = "twice" if field in values else f"and so does --{field.replace('_', '-')}"
            raise UsageError(f"--sweep sets {name} {other}.", hint=f"Set it once: {name}=1,8.")
        try:
            values[field] = list(map(int, numbers.split(",")))
        except ValueError as error:
            raise UsageError(
                f"--sweep {part!r} is not a name and a list of numbers.", hint="Write it like batch=1,8,32."
            ) from error
    for point in product(*values.values()):
        yield replace(request, **dict(zip(values, point, strict=True)))  # type: ignore[arg-type]
