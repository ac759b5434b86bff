"""How fast this machine runs a model's parts: measured in about a second, on matrices of the model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sleb_cli.engine.device import synchronize
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.model.sizes import ConditionsHold, Sizes
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import UnsupportedModelError


@dataclass(frozen=True)
class _Effort:
    """How much is measured.

    Attributes:
        matrix: elements; of a larger matrix, its first rows are measured.
        working_set: bytes of different weights that are read in turn, so that they come from where a model's would:
            from memory, or from a cache that holds the whole model.
        flops: of one run.
    """

    matrix: int
    working_set: int
    flops: float


# Each about a tenth of a second.
_ON_CPU = _Effort(matrix=2**24, working_set=2**28, flops=2e10)
_ON_ACCELERATOR = _Effort(matrix=2**27, working_set=2**31, flops=1e13)


@dataclass(frozen=True)
class Rate:
    """How fast products with one kind of matrix are: operations and bytes of weights per second."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, read: float) -> float:
        """Return the time for so many operations on so many bytes."""
        return max(flops / self.flops_per_second, read / self.bytes_per_second)


@dataclass(frozen=True)
class Rates:
    """How fast the blocks of a model and the rest are, and the seconds that each call costs besides."""

    blocks: Rate
    outside: Rate
    overhead: Sizes


@torch.inference_mode()
def measure_rate(
    architecture: Architecture, part: Literal["block", "head"], tokens: int, dtype: torch.dtype, device: torch.device
) -> Rate:
    """Return how fast a block, the middle one, or the head reads so many tokens together."""
    blocks = architecture.blocks_of(architecture.skeleton)
    inside = {id(tensor) for tensor in blocks.parameters()}
    matrices = list(_matrices(blocks[len(blocks) // 2]))
    if part == "head":
        outer = (tensor for tensor in architecture.skeleton.parameters() if id(tensor) not in inside)
        matrices = [max((tensor for tensor in outer if tensor.dim() == 2), key=Tensor.numel)]
    weights_bytes = sum(tensor.numel() for tensor in architecture.skeleton.parameters()) * dtype.itemsize
    return _measure([tensor.shape for tensor in matrices], tokens, weights_bytes, dtype, device)


def _matrices(block: nn.Module) -> Iterator[Tensor]:
    """Yield the weights that tokens are multiplied with; of experts in one tensor, the first."""
    for tensor in block.parameters():
        if tensor.dim() in (2, 3):
            yield tensor[0] if tensor.dim() == 3 else tensor


def _measure(
    shapes: Sequence[torch.Size], tokens: int, weights_bytes: int, dtype: torch.dtype, device: torch.device
) -> Rate:
    effort = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
    sizes = [(max(1, min(rows, effort.matrix // columns)), columns) for rows, columns in shapes]
    elements = sum(rows * columns for rows, columns in sizes)
    tokens = max(1, min(tokens, int(effort.flops / (2 * elements))))
    copies = min(
        min(weights_bytes, effort.working_set) // (elements * dtype.itemsize), effort.flops // (2 * elements * tokens)
    )
    weights = [torch.full(size, 0.01, dtype=dtype, device=device) for _ in range(max(1, int(copies))) for size in sizes]
    inputs = {columns: torch.full((tokens, columns), 0.01, dtype=dtype, device=device) for _, columns in sizes}

    def run() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    seconds = fastest(run, device) / max(1, int(copies))
    return Rate(2 * elements * tokens / seconds, elements * dtype.itemsize / seconds)


def fastest(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Return the seconds of the fastest of some runs, which others disturb least."""
    run()
    found = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


SMALL = (1, 5)
"""The blocks of the small models whose calls are timed."""

_SMALL_TOKENS = 8


@torch.inference_mode()
def measure_overhead(
    architecture: Architecture, batch: int, dtype: torch.dtype, device: torch.device, *, generates: bool
) -> Sizes:
    """Return the seconds that one call of the model costs besides arithmetic, in each block and outside the blocks.

    Measured on Llamas too small for their arithmetic to count, and scaled by how many operations the blocks start.
    """
    fewer, more = (_seconds_per_call(_small_llama(n), batch, dtype, device, generates=generates) for n in SMALL)
    block = max(0.0, more - fewer) / (SMALL[1] - SMALL[0])
    outside = max(0.0, fewer - SMALL[0] * block)
    small = _small_llama(1)
    started = count_operations(small, small.model.layers)
    counted = count_operations(architecture.skeleton, architecture.blocks_of(architecture.skeleton))
    if started is None or counted is None:
        return Sizes(outside, (block,) * architecture.block_count)
    return Sizes(outside, tuple(block * count / started.blocks[0] for count in counted.blocks))


def _small_llama(blocks: int) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=blocks
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def _seconds_per_call(model: Any, batch: int, dtype: torch.dtype, device: torch.device, *, generates: bool) -> float:
    model = model.to(dtype).to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    ids = torch.zeros(batch, 4, dtype=torch.long, device=device)
    if not generates:
        return fastest(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False), device)
    settings = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=_SMALL_TOKENS, min_new_tokens=_SMALL_TOKENS, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return fastest(lambda: generate(model, ids, settings, _no_refusal), device) / _SMALL_TOKENS


def _no_refusal(words: str) -> UnsupportedModelError:
    raise AssertionError(words)


def count_operations(model: Any, blocks: nn.ModuleList) -> Sizes | None:
    """Count the operations that a call starts, on the meta device; None if the family does not run there."""
    counter, conditions_hold = _Counter(), ConditionsHold()  # type: ignore[no-untyped-call]
    hooks = [block.register_forward_pre_hook(counter.enter) for block in blocks]
    hooks += [block.register_forward_hook(counter.leave) for block in blocks]
    failed = UnsupportedModelError("", hint="")
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        with translate_errors(lambda words: failed), torch.no_grad(), conditions_hold, counter:
            model(input_ids=ids, use_cache=False)
    except UnsupportedModelError:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    inside = tuple(float(counter.inside.get(block, 0)) for block in blocks)
    return Sizes(counter.count - sum(inside), inside)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and those in each block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.inside: dict[nn.Module, int] = {}

    def enter(self, block: nn.Module, _: Any) -> None:
        self.inside[block] = self.inside.get(block, 0) - self.count

    def leave(self, block: nn.Module, _: Any, __: Any) -> None:
        self.inside[block] += self.count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
