"""The timed workloads, prompt processing and generation, and their settings."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify
from sleb_cli.requests import BenchRequest, WorkloadName
from sleb_cli.results import Workload
from sleb_cli.units import plural
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

SEED = 0

_SWEPT = {"batch": "batch_size", "prompt": "prompt_length", "new": "new_tokens"}
"""What a sweep can vary, and the option for one value of it."""

_Defaults = dict[str, int]

# Accelerators use the settings of the paper (Song et al., ICML 2024, section 4.3); CPUs, settings that take minutes.
_ON_ACCELERATOR: dict[WorkloadName, _Defaults] = {
    "prompt": {"batch_size": 1, "prompt_length": 2048, "new_tokens": 0, "iterations": 50},
    "generation": {"batch_size": 64, "prompt_length": 64, "new_tokens": 128, "iterations": 10},
}
_ON_CPU: dict[WorkloadName, _Defaults] = {
    "prompt": {"batch_size": 1, "prompt_length": 512, "new_tokens": 0, "iterations": 10},
    "generation": {"batch_size": 4, "prompt_length": 64, "new_tokens": 32, "iterations": 10},
}


def resolve_workloads(
    request: BenchRequest, subject: Subject, device: torch.device, notify: Notify, least_new: int = 0
) -> tuple[Workload, ...]:
    """Return all workloads of a request: prompt and generation by default, and every point of its sweep.

    After every prompt there is room for `least_new` tokens.

    Raises:
        UsageError: a number is out of range, the sweep is malformed, or a text exceeds the model's positions.
    """
    both, points = request.prompt == request.generation, _sweep_points(request)
    names = [name for name in _ON_CPU if both or getattr(request, name)]
    found = [resolve_workload(name, point, subject, device, notify, least_new) for name in names for point in points]
    # Several points are the same prompt workload if only their new tokens differ.
    return tuple(dict.fromkeys(found))


def _sweep_points(request: BenchRequest) -> list[BenchRequest]:
    """Return a request for each combination of the sweep's values; without a sweep, the request itself."""
    values: dict[str, list[Any]] = {}
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
            values[field] = list(dict.fromkeys(map(int, numbers.split(","))))
        except ValueError as error:
            raise UsageError(
                f"--sweep {part!r} is not a name and a list of numbers.", hint="Write it like batch=1,8,32."
            ) from error
    return [replace(request, **dict(zip(values, point, strict=True))) for point in product(*values.values())]


def resolve_workload(
    name: WorkloadName,
    request: BenchRequest,
    subject: Subject,
    device: torch.device,
    notify: Notify,
    least_new: int = 0,
) -> Workload:
    """Fill in the defaults, with a notice if a CPU runs less than the paper's setting.

    Raises:
        UsageError: a number is out of range, or the text exceeds the model's positions.
    """
    paper = _ON_ACCELERATOR[name]
    defaults = _ON_CPU[name] if device.type == "cpu" else paper
    asked = {field: getattr(request, field) for field in defaults if name == "generation" or field != "new_tokens"}
    chosen = defaults | {field: value for field, value in asked.items() if value is not None}
    if request.compile and request.warmup == 0:
        raise UsageError("--warmup 0 is too small: the compilation would be timed.", hint="Use 1 or more.")
    limit = subject.architecture.longest_sequence
    new_tokens = max(chosen["new_tokens"], least_new)
    if limit and request.prompt_length is None:
        chosen["prompt_length"] = max(1, min(chosen["prompt_length"], limit - new_tokens))
    workload = Workload(
        name=name, engine=request.engine, **chosen, warmup=request.warmup, seed=SEED, compiled=request.compile
    )
    if limit and workload.prompt_length + new_tokens > limit:
        new = f" and {plural(new_tokens, 'new one')}" if new_tokens else ""
        raise UsageError(
            f"A prompt of {workload.prompt_length} tokens{new} exceeds the {limit} positions of "
            f"{subject.architecture.source.id}.",
            hint="Use a smaller --prompt-length" + (" or --new-tokens." if new else "."),
        )
    is_chosen = request.sweep or any(value is not None for field, value in asked.items() if field != "iterations")
    if device.type == "cpu" and _tokens(chosen) < _tokens(paper) and not is_chosen:
        notify(Notice(f"{name}: {workload}, less than the paper's setting because this is a CPU."))
    return workload


def _tokens(settings: _Defaults) -> int:
    return settings["batch_size"] * (settings["prompt_length"] + settings["new_tokens"])
