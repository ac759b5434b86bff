"""The model as searched: architecture, protected blocks, data type, device; and what a target means for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleb_cli.engine.device import choose_dtype, dtype_name
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import Sizes, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.targets import (
    SizeTarget,
    Target,
    chosen_target,
    count_to_remove,
    loss_target,
    option_of,
    parse_number,
    parse_ratio,
)
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.events import Notice, Notify
from sleb_cli.plan import ServingRecord
from sleb_cli.requests import DEFAULT_SERVE_BATCH, DEFAULT_SERVE_LENGTH, TargetName, TargetRequest
from sleb_cli.units import format_bytes, format_count, parse_bytes, parse_count

LEAST_SPEEDUP = 1.01


@dataclass(frozen=True)
class SearchContext:
    """The model as searched, for which targets are resolved."""

    architecture: Architecture
    protection: Protection
    dtype: torch.dtype
    device: torch.device
    notify: Notify

    @property
    def free(self) -> int:
        """How many blocks may be removed; at least one always stays."""
        blocks = self.architecture.block_count
        return min(len(self.protection.candidates(blocks, ())), blocks - 1)

    def target(self, request: TargetRequest) -> Target | None:
        """Return the target, or None for --target-speedup, which must be timed first.

        Raises:
            UsageError: there is not exactly one target, it is not a number, or too few blocks can be removed.
            UnsupportedModelError: the size of the KV cache is unknown.
        """
        name = chosen_target(request)
        if name in ("ratio", "remove"):
            return self._count(name, request)
        if name == "target_params":
            asked = str(request.target_params)
            sizes = count_parameters(self.architecture)
            most = parse_count(asked, option_of(name))
            return SizeTarget(name, asked, sizes, most, lambda n: f"{format_count(n)} parameters")
        if name == "target_memory":
            return self._memory(request)
        if name == "target_speedup":
            parse_number(str(request.target_speedup), name, least=LEAST_SPEEDUP)
            return None
        return loss_target(request, name)

    def _count(self, name: TargetName, request: TargetRequest) -> SizeTarget:
        blocks = self.architecture.block_count
        ratio = parse_ratio(str(request.ratio)) if request.ratio is not None else None
        remove = count_to_remove(blocks, self.protection, ratio=ratio, remove=request.remove)
        each = Sizes(0, (1,) * blocks)
        return SizeTarget(name, str(getattr(request, name)), each, blocks - remove, lambda n: f"{n:g} blocks")

    def _memory(self, request: TargetRequest) -> SizeTarget:
        asked = str(request.target_memory)
        most = parse_bytes(asked, "--target-memory")
        serving = self.serving(request)
        dtype = getattr(torch, serving.dtype)
        packed = self.architecture.is_quantized and request.serve_dtype is None
        weights = stored_bytes(self.architecture) if packed else count_parameters(self.architecture) * dtype.itemsize
        cache = cache_bytes(self.architecture, dtype, length=serving.length, batch=serving.batch)
        form = "packed as in the checkpoint" if packed else f"in {serving.dtype}"
        self.notify(
            Notice(
                f"Memory counts the weights {form} ({format_bytes(weights.without(()))}) and a KV cache in "
                f"{serving.dtype} for {serving.batch} x {serving.length} tokens ({format_bytes(cache.without(()))})."
            )
        )
        return SizeTarget("target_memory", asked, weights + cache, most, format_bytes)

    def serving(self, request: TargetRequest) -> ServingRecord:
        """Return how the model will be served; by default one sequence of up to 4,096 tokens, in the search's dtype."""
        named = request.serve_dtype
        dtype = choose_dtype(named, self.architecture.dtype, self.device) if named else self.dtype
        length = choose_length(request.serve_length, self.architecture, DEFAULT_SERVE_LENGTH, "--serve-length")
        return ServingRecord(dtype=dtype_name(dtype), length=length, batch=request.serve_batch or DEFAULT_SERVE_BATCH)
