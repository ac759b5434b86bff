"""Bring a model into memory: the dense one as it is, or the pruned one by the same surgery as on disk."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, TaskFinished, TaskStarted
from sleb_plugins import ModelError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off the screen while ours is on it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer.

    Raises:
        ModelError: the model comes without one.
    """
    if not has_tokenizer(source):
        raise ModelError(f"{source.id} has no tokenizer.", hint="Put the tokenizer's files into the model's folder.")
    with translate_transformers_errors(f"the tokenizer of {source.id}"):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)


def has_tokenizer(source: ModelSource) -> bool:
    """Whether the folder holds any file that a tokenizer is read from."""
    return any((source.folder / name).is_file() for name in _TOKENIZER_FILES)


def load_dense(architecture: Architecture, dtype: torch.dtype, device: torch.device, notify: Notify) -> Any:
    """Load the model as it is.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
    """
    task = f"Loading {architecture.source.id}"
    notify(TaskStarted(task))
    # Our own reader says plainly where a file is broken.
    architecture.source.weights.tensor_names()
    with translate_transformers_errors(f"the weights of {architecture.source.id}"):
        model, info = architecture.auto_class.from_pretrained(
            architecture.source.folder,
            dtype=dtype,
            trust_remote_code=architecture.source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    notify(TaskFinished(task))
    return _ready(model, info, architecture, device)


def load_pruned(surgery: Surgery, dtype: torch.dtype, device: torch.device, notify: Notify) -> Any:
    """Load the model that `sleb apply` would write, without writing it.

    Raises:
        ModelError: the weights that remain do not fit the pruned config.
    """
    architecture = surgery.architecture
    task = f"Loading {architecture.source.id} without {len(surgery.removals)} blocks"
    notify(TaskStarted(task))
    pruned = surgery.names.prune(architecture.source.weights.tensors())
    tensors = {name: cut.of_tensor(tensor) if (cut := surgery.cut(name)) else tensor for name, tensor in pruned}
    with translate_transformers_errors(f"{architecture.source.id} without blocks {sorted(surgery.removed)}"):
        model, info = type(architecture.skeleton).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=architecture.read_config(surgery.prune_config()),
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    notify(TaskFinished(task))
    return _ready(model, info, architecture, device)


def misfit(info: dict[str, Any], *kinds: str) -> str | None:
    """Say which weights transformers made up ("missing"), left over ("unexpected") or found in another shape.

    `info` is its loading info; None means that there are none of these kinds.
    """
    for kind in kinds:
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        if keys:
            return f"{len(keys)} weights are {kind}, {keys[0]} first"
    return None


def _ready(model: Any, info: dict[str, Any], architecture: Architecture, device: torch.device) -> Any:
    found = misfit(info, "missing", "mismatched")
    if found:
        raise ModelError(
            f"The weights of {architecture.source.id} do not fit its config: {found}.",
            hint="Copy or download the model again.",
        )
    model.requires_grad_(False)
    return model.to(device).eval()
