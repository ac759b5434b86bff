"""Load a model: the dense one unchanged, or the pruned one with the same surgery as on disk."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, task
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
    """Turn off the progress bars and warnings of transformers, which would disturb ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer.

    Raises:
        ModelError: the model has none.
    """
    if not has_tokenizer(source):
        raise ModelError(f"{source.id} has no tokenizer.", hint="Copy the tokenizer's files into the model's folder.")
    with translate_transformers_errors(f"the tokenizer of {source.id}"):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        tokenizer("a")  # a wrong setting, such as a length that is no number, may only show here
        return tokenizer


def has_tokenizer(source: ModelSource) -> bool:
    """Whether the folder holds a file of a tokenizer."""
    return any((source.folder / name).is_file() for name in _TOKENIZER_FILES)


def load_dense(architecture: Architecture, dtype: torch.dtype, device: torch.device, notify: Notify) -> Any:
    """Load the dense model.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
    """
    source = architecture.source
    with task(notify, f"Loading {source.id}"):
        source.weights.tensor_names()  # its errors name the broken file
        with translate_transformers_errors(f"the weights of {source.id}"):
            model, info = architecture.auto_class.from_pretrained(
                source.folder,
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    return _ready(model, info, architecture, device)


def load_pruned(surgery: Surgery, dtype: torch.dtype, device: torch.device, notify: Notify) -> Any:
    """Load the model that `sleb apply` would write, without writing it.

    Raises:
        ModelError: the remaining weights do not fit the pruned config.
    """
    architecture = surgery.architecture
    with task(notify, f"Loading {architecture.source.id} without {len(surgery.removals)} blocks"):
        pruned = surgery.names.prune(architecture.source.weights.tensors())
        tensors = {name: cut.of_tensor(tensor) if (cut := surgery.cut(name)) else tensor for name, tensor in pruned}
        config = architecture.read_config(surgery.prune_config())
        with translate_transformers_errors(f"{architecture.source.id} without blocks {sorted(surgery.removed)}"):
            model, info = type(architecture.skeleton).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    return _ready(model, info, architecture, device)


def loading_problem(info: dict[str, Any], *kinds: str) -> str | None:
    """Return a clause on the first of `kinds` of weights in transformers' loading info, or None if there are none.

    The kinds are "missing" (initialized anew), "unexpected" (not used) and "mismatched" (of another shape).
    """
    for kind in kinds:
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        if keys:
            return f"{len(keys)} weights are {kind}, such as {keys[0]}"
    return None


def _ready(model: Any, info: dict[str, Any], architecture: Architecture, device: torch.device) -> Any:
    problem = loading_problem(info, "missing", "mismatched")
    if problem:
        raise ModelError(
            f"The weights of {architecture.source.id} do not fit its config: {problem}.",
            hint="Copy or download the model again.",
        )
    model.requires_grad_(False)
    return model.to(device).eval()
