"""Bring a model into memory: the dense one as it is, or the pruned one by the same surgery as on disk."""

from __future__ import annotations

import gc
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from sleb_cli.engine.architecture import Architecture
from sleb_cli.engine.foreign import transformers_reads
from sleb_cli.engine.source import ModelSource
from sleb_cli.engine.surgery import Surgery
from sleb_cli.events import Notify, TaskFinished, TaskStarted
from sleb_plugins import MachineError, ModelError, UsageError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}

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


def choose_device(name: str) -> torch.device:
    """Resolve `auto`, or check that the named device is there.

    Raises:
        UsageError: no such kind of device.
        MachineError: this machine, or this build of torch, does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"There is no device {name!r}.", hint="Devices are auto, cpu, cuda, cuda:1, mps.") from error
    if not available.get(device.type, False):
        raise MachineError(f"This machine has no usable {name} device.", hint="Use --device auto, or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA devices.",
            hint="They are numbered from cuda:0.",
        )
    return device


def choose_dtype(name: str, architecture: Architecture, device: torch.device) -> torch.dtype:
    """Resolve `auto`: the checkpoint's own data type, but bfloat16 for float16 on a CPU, which is slow at it.

    Raises:
        UsageError: no such data type.
    """
    if name == "auto":
        own = architecture.config.dtype or torch.float32
        return torch.bfloat16 if own is torch.float16 and device.type == "cpu" else own
    full = _SHORT.get(name, name)
    if full not in _DTYPES:
        raise UsageError(f"There is no data type {name!r}.", hint=f"Choose auto, {', '.join(_DTYPES)}.")
    return _DTYPES[full]


def dtype_name(dtype: torch.dtype) -> str:
    """Give the name as configs and plans write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer.

    Raises:
        ModelError: the model comes without one.
    """
    if not has_tokenizer(source):
        raise ModelError(f"{source.id} has no tokenizer.", hint="Put the tokenizer's files into the model's folder.")
    with transformers_reads(f"the tokenizer of {source.id}"):
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
    with transformers_reads(f"the weights of {architecture.source.id}"):
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
    pruned = surgery.prune_tensors(architecture.source.weights.tensors())
    tensors = {name: cut.of_tensor(tensor) if (cut := surgery.cut(name)) else tensor for name, tensor in pruned}
    with transformers_reads(f"{architecture.source.id} without blocks {sorted(surgery.removed)}"):
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


def free_memory() -> None:
    """Let go of models that nobody holds any more: two at once may not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
