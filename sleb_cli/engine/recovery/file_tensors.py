"""Turn a model's new values into tensors of its weight files, which may rename and fuse them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.files.pickles import TORCH_DTYPES
from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.files.weights import WeightFiles
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_plugins import UnsupportedModelError


def file_tensors(
    skippable: SkippableModel,
    surgery: Surgery,
    values: Mapping[str, Tensor],
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the checkpoint's changed tensors by their names there, given values by parameter.

    `rounded` is the data type that the dense model's values were rounded to, if to any.

    Raises:
        UnsupportedModelError: such a tensor is stored quantized, or not as transformers would write
            it.
    """
    architecture = surgery.architecture
    path = architecture.adapter.blocks_path
    names = architecture.block_names(surgery.kept)
    weights = architecture.source.weights
    by_prefix: dict[str, dict[str, Tensor]] = {}  # by block, or by tensor outside the blocks
    for name, value in values.items():
        block = names.block_of(name)
        prefix = name if block is None else f"{path}.{block}"
        by_prefix.setdefault(prefix, {})[name] = value
    changed: dict[str, Tensor] = {}
    for prefix in sorted(by_prefix):
        new = by_prefix[prefix]
        block = names.block_of(prefix)
        if block is None:
            module = skippable.model.get_submodule(prefix.rpartition(".")[0])
            with loaded(module):
                changed |= _changed_tensors(skippable.model, weights, prefix, new, rounded)
        else:
            with skippable.loaded(block):
                changed |= _changed_tensors(skippable.model, weights, prefix, new, rounded)
    return {name: value for name, value, _ in surgery.tensors(changed.items())}


def _changed_tensors(
    model: Any,
    weights: WeightFiles,
    prefix: str,
    values: Mapping[str, Tensor],
    rounded: torch.dtype | None,
) -> dict[str, Tensor]:
    # The prefix is a block, all of whose values are here, or one tensor.
    old: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == prefix or name.startswith(f"{prefix}."):
            old[name] = tensor
    new = dict(old)
    for name, value in values.items():
        new[name] = value.to(old[name].device, old[name].dtype)
    before = _by_file_names(model, weights, old)
    after = _by_file_names(model, weights, new)
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    stored = {tensor.name: tensor for tensor in weights.stored if tensor.name in changed}
    for name, tensor in stored.items():
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{name} is stored quantized ({tensor.dtype}), so new values cannot be written to "
                f"it.",
                hint="Recover the model it was quantized from, and quantize the result.",
            )
    # The files must hold the old values under each name, so that it means the same tensor there.
    old_in_files = dict(read_all(weights, stored.keys()))
    for name in changed:
        dtype = before[name].dtype
        old_value = old_in_files.get(name)
        if old_value is None or not torch.equal(
            old_value.to(rounded or dtype).to(dtype), before[name].cpu()
        ):
            raise UnsupportedModelError(
                f"The weight files do not store {name} as transformers writes it, so it cannot "
                f"take new values.",
                hint="Load the model with transformers, save it again, and recover that copy.",
            )
    return changed


def _by_file_names(
    model: Any, weights: WeightFiles, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    # Files may fuse tensors. Their names lack the prefix if they hold a base model, and have one
    # more if they hold a model with a head.
    stored = {tensor.name for tensor in weights.stored}
    prefix = f"{model.base_model_prefix}."
    named: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        in_file = name
        for other in (name.removeprefix(prefix), prefix + name):
            if in_file not in stored and other in stored:
                in_file = other
        named[in_file] = tensor
    return named
