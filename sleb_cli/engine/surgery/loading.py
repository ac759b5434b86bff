"""Load a model: the dense one unchanged, or the pruned one with the same surgery as on disk."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoTokenizer, GenerationConfig

from sleb_cli.cache import scratch_in_cache
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, task
from sleb_plugins import ModelError
from sleb_plugins.errors import explain_out_of_memory

DeviceMap = str | Mapping[str, int | str]
"""Where the weights of each module are (the number of an accelerator, "cpu" or "disk"), or how to
choose that.
"""


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are, and in which data type it computes.

    Attributes:
        device: where tokens go in and logits come out, and, unless a device map says otherwise, all
            weights are.
        rounded: the narrower data type that weights are rounded to first, as in the checkpoint to
            be written.
        stream: whether the blocks stay in the files, and are read one at a time.
        device_map: the places of modules, as `accelerate` takes them; None for `device` alone.
    """

    device: torch.device
    dtype: torch.dtype
    stream: bool = False
    device_map: DeviceMap | None = None
    rounded: torch.dtype | None = None


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model", "tekken.json",
)  # fmt: skip
_POOLER = re.compile(r"(^|\.)pooler\.")
_tokenizers: WeakKeyDictionary[Watch, Any] = WeakKeyDictionary()
"""The tokenizers in use, by the watch over their files."""


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer, or return the one that was loaded for this source before."""
    if source.watch in _tokenizers:
        return _tokenizers[source.watch]
    if not has_tokenizer(source):
        raise ModelError(
            f"{source.id} has no tokenizer.",
            hint="Copy the tokenizer's files into the model's folder.",
        )
    source.watch.add(*(source.folder / name for name in _TOKENIZER_FILES))
    with translate_transformers_errors(f"the tokenizer of {source.id}"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code
        )
        tokenizer("a")  # a wrong setting, such as a length that is no number, may only show here
    _tokenizers[source.watch] = tokenizer
    return tokenizer


def has_tokenizer(source: ModelSource) -> bool:
    """Whether the folder holds a file of a tokenizer."""
    return any((source.folder / name).is_file() for name in _TOKENIZER_FILES)


def load_pretrained(
    loader: Any, folder: Path | None, what: str, placement: Placement, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers, each weight to its place; return it with its loading info."""
    with ExitStack() as stack:
        device_map: Any = {"": placement.device}
        offload_folder = None
        if placement.device_map is not None:
            device_map = placement.device_map
            # For weights that stay on disk in another form than in the files; the folder goes with
            # the model.
            offload_folder = stack.enter_context(scratch_in_cache("offload"))
        with translate_transformers_errors(what), warnings.catch_warnings():
            # accelerate warns of the names of tensors that belong to no submodule.
            warnings.filterwarnings("ignore", message="The following device_map keys")
            model, info = loader.from_pretrained(
                folder,
                dtype=placement.dtype,
                device_map=device_map,
                offload_folder=offload_folder,
                output_loading_info=True,
                use_kernels=False,
                **options,
            )
        weakref.finalize(model, stack.pop_all().close)
    return model, info


def load_complete(
    architecture: Architecture,
    loader: Any,
    folder: Path | None,
    what: str,
    placement: Placement,
    **options: Any,
) -> Any:
    """Load a model with transformers, for inference.

    Raises:
        ModelError: weights are missing, or have other shapes than the config says.
    """
    model, info = load_pretrained(
        loader, folder, what, placement, ignore_mismatched_sizes=True, **options
    )
    problem = loading_problem(architecture, info, "missing", "mismatched")
    if problem:
        raise misfit(architecture, problem)
    model.requires_grad_(False)
    if getattr(model, "hf_quantizer", None) is None and not hasattr(model, "_hf_hook"):
        model = model.to(placement.device)  # a family's own code may keep tensors elsewhere
    return model.eval()


def load_pruned(
    surgery: Surgery, placement: Placement, notify: Notify, *, dense: Any = None
) -> Any:
    """Load the model that `sleb apply` would write, without writing it.

    With `dense`, the dense model in the same data type on the same device, the two share weights;
    without it, they are read from the files. A device map names the places of the dense model's
    modules.
    """
    architecture = surgery.architecture
    source = architecture.source
    pruned = source.id
    if surgery.cuts:
        pruned += f" without {surgery.description}"
    with task(notify, f"Loading {pruned}"), explain_oom(source, placement):
        # Packed weights are taken apart by the code that loads them.
        if dense is not None and not architecture.is_quantized:
            tensors = dense.state_dict().items()
            placement = replace(placement, device_map=None)
        else:
            tensors = read_all(source.weights)
        remaining = {}
        for name, tensor, slices in surgery.tensors(tensors):
            for axis in slices:
                tensor = axis.cut(tensor)
            remaining[name] = tensor
        config = architecture.read_config(surgery.prune_config())
        model = load_complete(
            architecture,
            type(architecture.skeleton),
            None,
            pruned,
            placement,
            config=config,
            state_dict=remaining,
        )
        # transformers reads it only with weights of the same folder.
        read_generation_config(model, source.folder)
        return model


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model the generation config of a folder, if there is one."""
    file = folder / "generation_config.json"
    if file.is_file():
        with translate_transformers_errors(str(file)):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def explain_oom(source: ModelSource, placement: Placement) -> AbstractContextManager[None]:
    """Raise an `OutOfMemory` that names the model and the device if loading runs out of memory."""
    return explain_out_of_memory(
        f"{source.id} does not fit in the memory of {placement.device} in "
        f"{dtype_name(placement.dtype)}.",
        "Use a narrower --dtype, or a device with more memory.",
    )


def loading_problem(architecture: Architecture, info: dict[str, Any], *kinds: str) -> str | None:
    """Return a clause on the first of `kinds` of weights in transformers' loading info, or None.

    The kinds are "missing" (initialized at random), "unexpected" (not used) and "mismatched" (of
    another shape). Missing weights of a pooler are none if the model makes vectors, which do not
    depend on it.
    """
    for kind in kinds:
        names = []
        for key in info[f"{kind}_keys"]:
            name = key[0] if isinstance(key, tuple) else key
            if not (kind == "missing" and architecture.makes_vectors and _POOLER.search(str(name))):
                names.append(str(name))
        if names:
            return f"{len(names)} weights are {kind}, such as {min(names)}"
    return None


def misfit(architecture: Architecture, problem: str) -> ModelError:
    """Return an error that says how the weights do not fit the config."""
    return ModelError(
        f"The weights of {architecture.source.id} do not fit its config: {problem}.",
        hint="Copy or download the model again.",
    )
