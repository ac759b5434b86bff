"""Load a model: the dense one unchanged, or the pruned one with the same surgery as on disk."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from sleb_cli.engine.device import dtype_name, translate_out_of_memory
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, task
from sleb_plugins import ModelError
from sleb_plugins.formats import plural

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
    """Load the dense model, its weights straight to the device.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
        OutOfMemory: they do not fit into the device's memory.
    """
    source = architecture.source
    with task(notify, f"Loading {source.id}"), _fits(source, dtype, device):
        source.weights.tensor_names()  # its errors name the broken file
        with translate_transformers_errors(f"the weights of {source.id}"):
            model, info = architecture.auto_class.from_pretrained(
                source.folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        return _ready(model, info, architecture, device)


def load_pruned(
    surgery: Surgery, dtype: torch.dtype, device: torch.device, notify: Notify, *, dense: Any = None
) -> Any:
    """Load the model that `sleb apply` would write, without writing it.

    With `dense`, the dense model in the same data type on the same device, the two share the weights of the kept blocks
    and of what is outside the blocks; without it, they are read from the files.

    Raises:
        ModelError: the remaining weights do not fit the pruned config.
        OutOfMemory: they do not fit into the device's memory.
    """
    source = surgery.architecture.source
    with (
        task(notify, f"Loading {source.id} without {plural(len(surgery.removals), 'block')}"),
        _fits(source, dtype, device),
    ):
        # Packed weights are taken apart by the code that loads them.
        if dense is not None and not surgery.architecture.is_quantized:
            tensors = _prune(surgery, dense.state_dict().items())
            model = _with_tensors(surgery, tensors, dtype, device)
            loaded = model.state_dict()
            if all(name in loaded and _is_same(loaded[name], tensor) for name, tensor in tensors.items()):
                return model
            # transformers reads the files of this family in a way that it does not apply to its own tensors.
            del model, tensors, loaded
        return _with_tensors(surgery, _prune(surgery, source.weights.tensors()), dtype, device)


def _prune(surgery: Surgery, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    pruned = surgery.names.prune(tensors)
    return {name: cut.of_tensor(tensor) if (cut := surgery.cut(name)) else tensor for name, tensor in pruned}


def _is_same(loaded: Tensor, tensor: Tensor) -> bool:
    return loaded.data_ptr() == tensor.data_ptr() or torch.equal(loaded, tensor)


def _with_tensors(surgery: Surgery, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> Any:
    """Build the pruned model from these tensors by their names in it; those already on the device are not copied."""
    architecture = surgery.architecture
    config = architecture.read_config(surgery.prune_config())
    with translate_transformers_errors(f"{architecture.source.id} without blocks {sorted(surgery.removed)}"):
        model, info = type(architecture.skeleton).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    folder = architecture.source.folder
    if (folder / "generation_config.json").is_file():  # read by transformers only with weights of the same folder
        with translate_transformers_errors(f"{folder / 'generation_config.json'}"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return _ready(model, info, architecture, device)


def _fits(source: ModelSource, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    return translate_out_of_memory(
        f"{source.id} does not fit into the memory of {device} in {dtype_name(dtype)}.",
        "Use a narrower --dtype, or a device with more memory (--device cpu).",
    )


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
    if not architecture.is_quantized:
        model = model.to(device)  # what a family's own code keeps elsewhere
    return model.eval()
