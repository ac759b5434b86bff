"""The timed workloads, prompt processing and generation, and their settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notice, Notify
from sleb_cli.requests import TRANSFORMERS, BenchRequest, WorkloadName
from sleb_cli.results import Workload
from sleb_plugins import UsageError
from sleb_plugins.errors import did_you_mean

SEED = 0

_SWEPT = {"batch": "batch_size", "prompt": "prompt_length", "new": "new_tokens"}
"""What a sweep can vary, and the option for one value of it."""


@dataclass(frozen=True)
class _Defaults:
    batch_size: int
    prompt_length: int
    new_tokens: int
    iterations: int


# Accelerators use the settings of the paper (Song et al., ICML 2024, section 4.3); CPUs, settings that take minutes.
_ON_ACCELERATOR: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=2048, new_tokens=0, iterations=50),
    "generation": _Defaults(batch_size=64, prompt_length=64, new_tokens=128, iterations=10),
}
_ON_CPU: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=512, new_tokens=0, iterations=10),
    "generation": _Defaults(batch_size=4, prompt_length=64, new_tokens=32, iterations=10),
}


def resolve_workloads(
    request: BenchRequest, subject: Subject, device: torch.device, notify: Notify
) -> tuple[Workload, ...]:
    """Return all workloads that the request names: prompt and generation by default, and every point of its sweep.

    Raises:
        UsageError: a number is out of range, the sweep says nothing sensible, or a text exceeds the model's positions.
    """
    points = sweep_requests(request)
    found = [resolve_workload(name, point, subject, device, notify) for name in _names(request) for point in points]
    # Several points are the same prompt workload if only their new tokens differ.
    return tuple(dict.fromkeys(found))


def _names(request: BenchRequest) -> tuple[WorkloadName, ...]:
    if request.prompt == request.generation:
        return ("prompt", "generation")
    return ("prompt",) if request.prompt else ("generation",)


def sweep_requests(request: BenchRequest) -> list[BenchRequest]:
    """Return a request for each combination of the sweep's values; without a sweep, the request itself.

    Raises:
        UsageError: a part is not like batch=1,8,32, or sweeps what another part or option sets.
    """
    values: dict[str, list[Any]] = {}
    for part in " ".join(request.sweep).split():
        name, _, numbers = part.partition("=")
        if name not in _SWEPT:
            hint = did_you_mean(name, list(_SWEPT), otherwise="Write it like batch=1,8,32 prompt=128,2048 new=64.")
            raise UsageError(f"--sweep cannot vary {name!r}.", hint=hint)
        field = _SWEPT[name]
        if field in values or getattr(request, field) is not None:
            other = "twice" if field in values else f"and --{field.replace('_', '-')}, too"
            raise UsageError(f"--sweep sets {name} {other}.", hint=f"Set it once: {name}=1,8.")
        values[field] = _read_numbers(part, numbers)
    combinations = product(*values.values())
    return [replace(request, **dict(zip(values, point, strict=True))) for point in combinations]


def _read_numbers(part: str, numbers: str) -> list[int]:
    try:
        read = [int(number) for number in numbers.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--sweep {part!r} is not a name with a list of numbers.", hint="Write it like batch=1,8,32."
        ) from error
    return list(dict.fromkeys(read))


def resolve_workload(
    name: WorkloadName, request: BenchRequest, subject: Subject, device: torch.device, notify: Notify
) -> Workload:
    """Fill unset options with the defaults, with a notice if a CPU runs less than the paper's setting.

    Raises:
        UsageError: a number is out of range, or the text exceeds the model's positions.
    """
    standard = (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR)[name]

    def pick(field: str) -> int:
        asked: int | None = getattr(request, field)
        value: int = getattr(standard, field) if asked is None else asked
        return value

    if request.compile and request.warmup == 0:
        raise UsageError("--warmup 0 is too small: the compilation would be timed.", hint="Use 1 or more.")
    new_tokens = pick("new_tokens") if name == "generation" else 0
    workload = Workload(
        name=name,
        engine=TRANSFORMERS,
        batch_size=pick("batch_size"),
        prompt_length=_fitting(pick("prompt_length"), new_tokens, request, subject),
        new_tokens=new_tokens,
        iterations=pick("iterations"),
        warmup=request.warmup,
        cooldown=request.cooldown,
        seed=SEED,
        compiled=request.compile,
        # transformers compiles the decoding only with such a cache.
        static_cache=name == "generation" and (request.static_cache or request.compile),
    )
    if device.type == "cpu" and _is_smaller(workload, _ON_ACCELERATOR[name]) and not request.sweep:
        notify(Notice(f"{name}: {workload}, smaller than the paper's setting because this is a CPU."))
    return workload


def _fitting(length: int, new_tokens: int, request: BenchRequest, subject: Subject) -> int:
    """Return the length of the prompt if the model has positions for all; a default is cut to what it has."""
    limit = subject.architecture.longest_sequence
    if request.prompt_length is None and limit:
        length = max(1, min(length, limit - new_tokens))
    if limit and length + new_tokens > limit:
        new = f" and {new_tokens} new ones" if new_tokens else ""
        raise UsageError(
            f"A prompt of {length} tokens{new} exceeds the {limit} positions of {subject.architecture.source.id}.",
            hint="Use a smaller --prompt-length" + (" or --new-tokens." if new else "."),
        )
    return length


def _is_smaller(workload: Workload, paper: _Defaults) -> bool:
    ours = workload.batch_size * (workload.prompt_length + workload.new_tokens)
    return ours < paper.batch_size * (paper.prompt_length + paper.new_tokens)
