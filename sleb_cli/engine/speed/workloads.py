"""The timed workloads, prompt processing and generation, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.requests import BenchRequest, WorkloadName
from sleb_cli.results import Workload
from sleb_plugins import UnsupportedModelError, UsageError

SEED = 0


@dataclass(frozen=True)
class _Defaults:
    batch_size: int
    prompt_length: int
    new_tokens: int
    iterations: int
    warmup: int


# Accelerators use the settings of the paper (Song et al., ICML 2024, section 4.3); CPUs, settings that take minutes.
_ON_ACCELERATOR: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=2048, new_tokens=0, iterations=50, warmup=5),
    "generation": _Defaults(batch_size=64, prompt_length=64, new_tokens=128, iterations=10, warmup=2),
}
_ON_CPU: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=512, new_tokens=0, iterations=10, warmup=2),
    "generation": _Defaults(batch_size=4, prompt_length=64, new_tokens=32, iterations=7, warmup=1),
}


def choose_workloads(request: BenchRequest) -> tuple[WorkloadName, ...]:
    """Return the requested workloads; both by default."""
    if request.prompt == request.generation:
        return ("prompt", "generation")
    return ("prompt",) if request.prompt else ("generation",)


def resolve_workload(
    name: WorkloadName, request: BenchRequest, subject: Subject, device: torch.device, notify: Notify
) -> Workload:
    """Fill unset options with the defaults, with a notice if a CPU runs less than the paper's setting.

    Raises:
        UsageError: a number is out of range, or the text exceeds the model's positions.
    """
    standard = (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR)[name]

    def pick(field: str, least: int) -> int:
        asked: int | None = getattr(request, field)
        if asked is not None and asked < least:
            raise UsageError(f"--{field.replace('_', '-')} {asked} is too small.", hint=f"Use {least} or more.")
        value: int = getattr(standard, field) if asked is None else asked
        return value

    new_tokens = pick("new_tokens", 1) if name == "generation" else 0
    limit = subject.architecture.longest_sequence
    prompt_length = pick("prompt_length", 1)
    if request.prompt_length is None and limit:
        prompt_length = max(1, min(prompt_length, limit - new_tokens))
    choose_length(max(2, prompt_length + new_tokens), subject.architecture)
    workload = Workload(
        name=name,
        batch_size=pick("batch_size", 1),
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        iterations=pick("iterations", 1),
        warmup=pick("warmup", 0),
        seed=SEED,
    )
    if device.type == "cpu" and _is_smaller(workload, _ON_ACCELERATOR[name]):
        notify(Notice(f"{name}: {workload}, smaller than the paper's setting because this is a CPU."))
    return workload


def _is_smaller(workload: Workload, paper: _Defaults) -> bool:
    ours = workload.batch_size * (workload.prompt_length + workload.new_tokens)
    return ours < paper.batch_size * (paper.prompt_length + paper.new_tokens)


def runner(workload: Workload, model: Any) -> Callable[[], None]:
    """Return a function that runs one iteration on random token ids and does nothing besides."""
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch_size, workload.prompt_length)
    ids: Tensor = torch.randint(vocabulary, shape, generator=seeded).to(model.device)
    mask = torch.ones_like(ids)
    if not workload.new_tokens:
        return lambda: model(input_ids=ids, attention_mask=mask, use_cache=False)
    settings = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=workload.new_tokens, min_new_tokens=workload.new_tokens,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return lambda: generate(model, ids, settings, partial(_not_generating, model))


def _not_generating(model: Any, words: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.config.model_type} cannot generate text: {words}.", hint="Time the prompt alone: --prompt."
    )
