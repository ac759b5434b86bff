"""The work of a workload by block: floating-point operations, and bytes read. Nothing here reads weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import ConditionsHold, Sizes, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.results import WorkRecord
from sleb_plugins import UnsupportedModelError

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
_ACTIVE_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


class Work(NamedTuple):
    """The work of one batch, by block: floating-point operations and bytes read.

    Prefill reads the prompts, from which the first new token comes; all further ones are decoded.
    """

    prefill_flops: Sizes
    prefill_bytes: Sizes
    decode_flops: Sizes
    decode_bytes: Sizes

    def record(self, removed: Collection[int]) -> WorkRecord:
        """Return the work of the model without these blocks."""
        return WorkRecord(**{name: sizes.without(removed) for name, sizes in self._asdict().items()})

    def bound(self, removed: Collection[int]) -> float:
        """Return how many times faster a batch can become without these blocks, on any machine.

        Each phase takes the time of its operations or of its bytes, whichever is longer on the machine; no sum of such
        times shrinks by more than the term that shrinks most.
        """
        return max(sizes.without(()) / sizes.without(removed) for sizes in self if sizes.without(()))


def count_work(architecture: Architecture, batch: int, prompt_length: int, new_tokens: int, dtype: torch.dtype) -> Work:
    """Count the work of `batch` prompts of this length, with `new_tokens` generated after each, in this data type.

    Operations are those of matrix products and attention, which is counted whole, as without a causal mask. Without new
    tokens, the head reads every position and no cache is kept; otherwise it reads the last one. Bytes are those of the
    weights, read once per step, and of the KV cache. Embeddings are looked up, so only the rows that are used count,
    but a tied head reads all of them. Of the experts in a mixture, each token uses the number that the config names;
    so many tokens as are read together are taken to choose independently, which gives the expected number of different
    experts whose weights are read.

    Raises:
        UnsupportedModelError: the size of the KV cache is unknown.
    """
    flops = _flops(architecture, prompt_length, all_logits=not new_tokens) * batch
    read = _weights_read(architecture, dtype, batch * prompt_length)
    if new_tokens:
        read += cache_bytes(architecture, dtype, length=prompt_length, batch=batch)
    steps = new_tokens - 1
    if steps < 1:
        nothing = Sizes(0.0, (0.0,) * architecture.block_count)
        return Work(flops, read, nothing, nothing)
    # The cache holds prompt_length + 1 to prompt_length + steps tokens; these are the middle one or two.
    lengths = {prompt_length + (steps + 1) // 2, prompt_length + steps // 2 + 1}
    cache = _mean([cache_bytes(architecture, dtype, length=length, batch=batch) for length in lengths])
    # A new token has its share of the work of reading them all, each attending to all.
    step = _mean([_flops(architecture, length, all_logits=True) * (1 / length) for length in lengths]) * batch
    return Work(flops, read, step * steps, (_weights_read(architecture, dtype, batch) + cache) * steps)


def _mean(sizes: Sequence[Sizes]) -> Sizes:
    return reduce(add, sizes) * (1 / len(sizes))


def _flops(architecture: Architecture, length: int, *, all_logits: bool) -> Sizes:
    """Return the operations of reading `length` tokens: as counted on the meta device, but at least 2 per weight used.

    Where the family does not run there, the latter is all there is.
    """
    used, counted = _matrix_elements(architecture), _counted_flops(architecture, length, all_logits=all_logits)
    least = Sizes(2 * used.outside * (length if all_logits else 1), tuple(2 * length * count for count in used.blocks))
    if counted is None:
        return least
    return Sizes(max(counted.outside, least.outside), tuple(map(max, counted.blocks, least.blocks)))


def _counted_flops(architecture: Architecture, length: int, *, all_logits: bool) -> Sizes | None:
    """Count the operations on the meta device; None if the family does not run there."""
    # A copy, since the choice of how experts are applied would stay in the config.
    model: Any = architecture.build(copy.deepcopy(architecture.config)).to(torch.bfloat16).eval()
    text = torch.zeros(1, length, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    conditions_hold = ConditionsHold()  # type: ignore[no-untyped-call]
    no_run = UnsupportedModelError("", hint="")
    try:
        with translate_errors(lambda words: no_run):
            with suppress(ValueError):  # a family without experts, or with its own way
                model.set_experts_implementation("batched_mm")  # one product for each token and expert, which counts
            with torch.no_grad(), conditions_hold, counter:
                model(input_ids=text, use_cache=False, **({} if all_logits else {"logits_to_keep": 1}))
    except UnsupportedModelError:
        return None
    found = {name: float(sum(by_operation.values())) for name, by_operation in counter.get_flop_counts().items()}
    path = f"{type(model).__name__}.{architecture.adapter.blocks_path}"
    blocks = tuple(found.get(f"{path}.{block}", 0.0) for block in range(architecture.block_count))
    return Sizes(found.get("Global", 0.0) - sum(blocks), blocks)


def _matrix_elements(architecture: Architecture) -> Sizes:
    """Count the weights that one token is multiplied with: no tables to look up, and only the experts it chooses."""
    matrices = (each for each in _weights(architecture) if each.tensor.dim() > 1 and not each.is_table)
    return _by_block(architecture, ((each.block, each.tensor.numel() * (each.active or 1)) for each in matrices))


def _weights_read(architecture: Architecture, dtype: torch.dtype, tokens: int) -> Sizes:
    """Return the bytes of weights that are read to process so many tokens at once."""
    read = _by_block(architecture, ((weight.block, weight.elements_read(tokens)) for weight in _weights(architecture)))
    if not architecture.is_quantized or architecture.source.config_only:
        return read * dtype.itemsize
    # Packed weights: the share that is read of what is stored.
    stored, all_of_them = stored_bytes(architecture), count_parameters(architecture)
    shares = zip(read.blocks, all_of_them.blocks, stored.blocks, strict=True)
    outside = read.outside / all_of_them.outside * stored.outside if all_of_them.outside else 0
    return Sizes(outside, tuple(part / whole * size if whole else 0 for part, whole, size in shares))


@dataclass(frozen=True)
class _Weight:
    """A parameter: its block, None outside; whether it is a table to look up; the share of experts per token."""

    tensor: Tensor
    block: int | None
    is_table: bool
    active: float | None

    def elements_read(self, tokens: int) -> float:
        """Return how many elements are read to process so many tokens at once."""
        elements = self.tensor.numel()
        if self.is_table:
            return min(elements, tokens * elements / len(self.tensor))
        return elements * (1 - (1 - self.active) ** tokens) if self.active else elements


def _weights(architecture: Architecture) -> Iterator[_Weight]:
    """Yield each parameter once; a table that is also multiplied with, such as a tied head, is no table."""
    model: Any = architecture.skeleton
    path = architecture.adapter.blocks_path
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    multiplied = {id(tensor) for module in others for tensor in module.parameters(recurse=False)}
    share = _active_share(architecture.text_config)
    parts = (model.get_decoder(), model.get_output_embeddings()) if architecture.text_key else ()
    text = {id(tensor) for part in parts if part is not None for tensor in part.parameters()}
    for name, tensor in model.named_parameters():
        if architecture.text_key and id(tensor) not in text:  # of the tower of another modality, which reads no text
            continue
        inside = name.startswith(f"{path}.")
        yield _Weight(
            tensor=tensor,
            block=int(name.removeprefix(f"{path}.").partition(".")[0]) if inside else None,
            is_table=id(tensor) not in multiplied,
            active=share if inside and "experts" in name.split(".") else None,
        )


def _active_share(config: Any) -> float | None:
    """Return the share of the experts that one token uses, or None if the config names no experts."""
    experts, active = _first_number(config, _EXPERT_COUNTS), _first_number(config, _ACTIVE_COUNTS)
    return min(1.0, active / experts) if experts and active else None


def _first_number(config: Any, keys: Sequence[str]) -> int | None:
    """Return the first of these settings that is a positive number, in the config or its part for the MLP (DBRX)."""
    values = (getattr(part, key, None) for part in (config, getattr(config, "ffn_config", None)) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _by_block(architecture: Architecture, sizes: Iterator[tuple[int | None, float]]) -> Sizes:
    found: dict[int | None, float] = defaultdict(float)
    for block, size in sizes:
        found[block] += size
    return Sizes(found[None], tuple(found[block] for block in range(architecture.block_count)))
