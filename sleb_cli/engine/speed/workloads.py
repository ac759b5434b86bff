"""The timed workloads and their settings: prompts and generation; texts and a query to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sleb_cli.requests import TRANSFORMERS, WorkloadName
from sleb_cli.results import Workload
from sleb_cli.units import plural
from sleb_plugins import UsageError

# Accelerators use the settings of the paper (Song et al., ICML 2024, section 4.3); CPUs, settings
# that take minutes.
_ON_ACCELERATOR: Mapping[WorkloadName, Mapping[str, Any]] = {
    "prompt": {"batch_size": 1, "prompt_length": 2048, "new_tokens": 0, "iterations": 50},
    "generation": {"batch_size": 64, "prompt_length": 64, "new_tokens": 128, "iterations": 10},
    "texts": {"prompt_length": 128, "new_tokens": 0, "iterations": 50},
    "query": {"batch_size": 1, "prompt_length": 16, "new_tokens": 0, "iterations": 50},
}
_ON_CPU: Mapping[WorkloadName, Mapping[str, Any]] = {
    "prompt": {"batch_size": 1, "prompt_length": 512, "new_tokens": 0, "iterations": 10},
    "generation": {"batch_size": 4, "prompt_length": 64, "new_tokens": 32, "iterations": 10},
    "texts": {"prompt_length": 128, "new_tokens": 0, "iterations": 10},
    "query": {"batch_size": 1, "prompt_length": 16, "new_tokens": 0, "iterations": 50},
}

TEXTS_AT_ONCE: tuple[int, ...] = (1, 8, 32)
"""The batch sizes at which models that only read are timed."""


def make_workload(
    name: WorkloadName,
    device: torch.device,
    positions: int | None,
    *,
    least_new_tokens: int = 0,
    **chosen: Any,
) -> Workload:
    """Return a workload with the fields `chosen`; the others suit the device and the model.

    It fits into the model's `positions`, with room for at least `least_new_tokens` after every
    prompt.
    """
    of_device = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
    fields: dict[str, Any] = {"engine": TRANSFORMERS, "warmup": None, "compiled": False}
    fields |= of_device[name]
    fields |= chosen
    new_tokens = max(fields["new_tokens"], least_new_tokens)
    if positions and "prompt_length" not in chosen:
        fields["prompt_length"] = max(1, min(fields["prompt_length"], positions - new_tokens))
    if positions and fields["prompt_length"] + new_tokens > positions:
        tokens = f"{fields['prompt_length']} tokens"
        hint = "Use a smaller --prompt-length."
        if new_tokens:
            tokens = f"{tokens} and {plural(new_tokens, 'new one')}"
            hint = "Use a smaller --prompt-length or --new-tokens."
        raise UsageError(
            f"A prompt of {tokens} exceeds the model's {positions} positions.", hint=hint
        )
    return Workload(name=name, **fields)
