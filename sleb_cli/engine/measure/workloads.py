"""What is timed: processing a prompt, or generating after one, with the settings of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.results import Workload
from sleb_plugins import UsageError

WorkloadName = Literal["prompt", "generation"]
SEED = 0


@dataclass(frozen=True)
class _Defaults:
    batch_size: int
    prompt_length: int
    new_tokens: int
    iterations: int
    warmup: int


# On an accelerator, the settings of the paper (Song et al., ICML 2024, section 4.3); on a CPU what ends within minutes.
_ON_ACCELERATOR: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=2048, new_tokens=0, iterations=50, warmup=5),
    "generation": _Defaults(batch_size=64, prompt_length=64, new_tokens=128, iterations=10, warmup=2),
}
_ON_CPU: dict[WorkloadName, _Defaults] = {
    "prompt": _Defaults(batch_size=1, prompt_length=512, new_tokens=0, iterations=10, warmup=2),
    "generation": _Defaults(batch_size=4, prompt_length=64, new_tokens=32, iterations=7, warmup=1),
}


@dataclass(frozen=True)
class BenchRequest:
    """What to time; None leaves a number to the workload and the device."""

    workloads: tuple[WorkloadName, ...]
    batch_size: int | None = None
    prompt_length: int | None = None
    new_tokens: int | None = None
    iterations: int | None = None
    warmup: int | None = None
    dtype: str = "auto"
    device: str = "auto"


def choose_workloads(*, prompt: bool, generation: bool) -> tuple[WorkloadName, ...]:
    """Give the workloads that were asked for; both, where none was."""
    if prompt == generation:
        return ("prompt", "generation")
    return ("prompt",) if prompt else ("generation",)


def resolve_workload(
    name: WorkloadName, request: BenchRequest, subject: Subject, device: torch.device, notify: Notify
) -> Workload:
    """Fill in what the user left open, and say where a CPU gets less to do than the paper's GPU.

    Raises:
        UsageError: a number is out of range, or the text would outgrow the model's positions.
    """
    standard = (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR)[name]

    def pick(field: str, least: int) -> int:
        asked: int | None = getattr(request, field)
        if asked is not None and asked < least:
            raise UsageError(f"--{field.replace('_', '-')} {asked} is too small.", hint=f"Take {least} or more.")
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
        notify(Notice(f"{name}: {workload}. On a CPU this is less than the paper's setting."))
    return workload


def _is_smaller(workload: Workload, paper: _Defaults) -> bool:
    ours = workload.batch_size * (workload.prompt_length + workload.new_tokens)
    return ours < paper.batch_size * (paper.prompt_length + paper.new_tokens)


def runner(workload: Workload, model: Any) -> Callable[[], None]:
    """Give a function that does one iteration of the workload: random token ids, nothing but the model's own work."""
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
    return lambda: model.generate(ids, attention_mask=mask, generation_config=settings)
