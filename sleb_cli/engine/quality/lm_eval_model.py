"""A plan's model as a model type of lm-eval: `lm-eval run --model sleb --model_args plan=plan.json --tasks piqa`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sleb_cli.engine.device import choose_device, choose_dtype
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject, resolve_subject
from sleb_cli.events import Event, Notice, Warned
from sleb_cli.plugin_manager import load_plugins, named_before_loading
from sleb_cli.requests import AUTO, OneSizeRequest
from sleb_plugins import UsageError

_log = logging.getLogger("lm_eval.sleb")


@register_model("sleb")
class SlebLM(HFLM):  # type: ignore[misc]
    """The pruned model of a plan, or of a model and blocks, in memory: the one that `sleb apply` writes.

    Args:
        plan: a plan's file.
        model: a model, dense without `blocks`; with `plan`, where its model is now.
        blocks: the blocks to remove from `model`, joined by `+`, since lm-eval reads a comma as its own: 5+4+9.
        remove: remove only the first so many.
        revision: a branch, tag or commit of a model on the Hub.
        dtype: float32, bfloat16, float16, or auto.
        device: as for `sleb eval`; where there is no CUDA, lm-eval's default is this machine's own.
        trust_remote_code: run Python code that comes with the model.
        options: those of lm-eval's model type `hf` that concern no loading, such as `batch_size` and `max_length`.

    Raises:
        SlebError: the plan or the model cannot be read, or does not fit into memory.
    """

    def __init__(
        self,
        plan: str | None = None,
        model: str | None = None,
        blocks: str | int | None = None,
        remove: int | None = None,
        revision: str | None = None,
        dtype: str = AUTO,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        request = OneSizeRequest(
            model if plan is None else plan,
            model=None if plan is None else model,
            blocks=_blocks(blocks),
            remove=remove,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if others := named_before_loading():
            _tell(Notice(others))
        subject = resolve_subject(request, load_plugins(), _tell)
        where = choose_device(AUTO if device is None or _is_missing_cuda(device) else device)
        super().__init__(
            pretrained=_load(subject, dtype, where),
            tokenizer=load_tokenizer(subject.architecture.source),
            trust_remote_code=trust_remote_code,
            **options,
        )


def _blocks(named: str | int | None) -> tuple[int, ...] | None:
    if named is None:
        return None
    try:
        return tuple(int(block) for block in str(named).split("+"))
    except ValueError as error:
        raise UsageError(f"blocks={named} is not a list of numbers.", hint="Write it like blocks=5+4+9.") from error


def _is_missing_cuda(device: str) -> bool:
    return device.startswith("cuda") and not torch.cuda.is_available()


def _load(subject: Subject, dtype: str, device: torch.device) -> Any:
    architecture = subject.architecture
    chosen = choose_dtype(dtype, architecture.dtype, device)
    if subject.surgery.removals:
        return load_pruned(subject.surgery, chosen, device, _tell)
    return load_dense(architecture, chosen, device, _tell)


def _tell(event: Event) -> None:
    if isinstance(event, Notice | Warned):
        _log.warning(event.text)
