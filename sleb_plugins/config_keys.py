"""How configs speak of single blocks, as data: what each key means, and what it says of the blocks that stay.

A *reading* takes a key's value and the kept blocks, and gives the value that the pruned model's config needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb_plugins.errors import UsageError


@dataclass(frozen=True)
class Kept:
    """The blocks that stay, by their numbers in the original, in order; and how many the original has."""

    blocks: tuple[int, ...]
    count: int

    def below(self, block: int) -> int:
        """Say how many of the first `block` blocks stay."""
        return sum(kept < block for kept in self.blocks)


def kept_blocks(count: int, removals: Sequence[int]) -> Kept:
    """Give the blocks that stay of a model of `count`."""
    return Kept(tuple(block for block in range(count) if block not in removals), count)


def require_removable(removals: Sequence[int], count: int, model: str, *, further: str = "") -> None:
    """Make sure that a model of `count` blocks can be without these; `further` goes on saying which blocks there are.

    Raises:
        UsageError: a block is named twice, does not exist, or none would remain.
    """
    repeated = [block for block in removals if removals.count(block) > 1]
    if repeated:
        raise UsageError(f"Block {repeated[0]} is named twice.", hint="Name each block once.")
    absent = [block for block in removals if not 0 <= block < count]
    if absent:
        raise UsageError(
            f"There is no block {absent[0]}: {model} has {count} blocks, 0 to {count - 1}{further}.",
            hint="Blocks are numbered from 0, as in the original model.",
        )
    if len(removals) == count:
        raise UsageError(f"All {count} blocks would go.", hint="Keep at least one.")


KeyPruner = Callable[[Any, Kept], Any]


def by_block(values: Any, kept: Kept) -> Any:
    """One value for each block: take those of the blocks that stay. What is no list of so many means something else."""
    whole = isinstance(values, list | tuple) and len(values) == kept.count
    return [values[block] for block in kept.blocks] if whole else values


def by_letter(text: Any, kept: Kept) -> Any:
    """One letter for each block, as in Nemotron-H's "M-M*-"."""
    return "".join(by_block(list(text), kept)) if isinstance(text, str) and len(text) == kept.count else text


def block_numbers(numbers: Any, kept: Kept) -> list[int]:
    """Numbers of blocks, from 0: leave out the removed ones, and renumber the others."""
    return [kept.blocks.index(number) for number in numbers if number in kept.blocks]


def numbers_from_one(values: Any, kept: Kept) -> Any:
    """A mapping whose lists number blocks from 1, among other settings (Kimi-Linear)."""
    return {
        key: [number + 1 for number in block_numbers([block - 1 for block in value], kept)]
        if isinstance(value, list) and key.endswith("_layers")
        else value
        for key, value in values.items()
    }


def keyed_by_block(values: Any, kept: Kept) -> dict[str, Any]:
    """A mapping from the numbers of some blocks, as text or not, to settings of theirs."""
    new = {str(old): str(number) for number, old in enumerate(kept.blocks)}
    return {new[str(key)]: value for key, value in values.items() if str(key) in new}


def leading_blocks(count: int, kept: Kept) -> int:
    """How many blocks at the start are of one kind; a count beyond the last block stays what it is."""
    return kept.below(count) if count <= kept.count else count


def trailing_blocks(count: int, kept: Kept) -> int:
    """How many blocks at the end are of one kind."""
    return len(kept.blocks) - kept.below(kept.count - count)


def last_block(number: int, kept: Kept) -> int:
    """The number of the last block of a stretch, which may itself be removed; -1 means the last of all."""
    return kept.below(number + 1) - 1 if number >= 0 else number


KEY_PRUNERS: Mapping[str, KeyPruner] = {
    **dict.fromkeys(
        [
            "layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers",
            "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "layer_rope_theta",
            "activation_sparsity_pattern", "indexer_types", "block_configs", "ffn_multipliers",
        ],
        by_block,
    ),
    **dict.fromkeys(
        [
            "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers",
            "rope_scaling_layers", "ple_layer_ids", "local_layer_ids", "global_attention_blocks",
        ],
        block_numbers,
    ),
    **dict.fromkeys(
        [
            "first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers",
            "moe_layer_start_index", "num_first_full_attention_layers",
        ],
        leading_blocks,
    ),
    **dict.fromkeys(["num_kv_shared_layers", "num_last_full_attention_layers"], trailing_blocks),
    "moe_layer_end_index": last_block,
    "per_layer_config": keyed_by_block,
    "hybrid_override_pattern": by_letter,
    "linear_attn_config": numbers_from_one,
}  # fmt: skip
"""What the keys mean that configs of transformers use; a family's own `config_keys` go before these."""

SLICED: Mapping[str, int] = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
"""Endings of the names of tensors outside of the blocks that hold a slice for each block, and along which axis."""


def sliced_axis(name: str) -> int | None:
    """Give the axis along which a tensor of this name holds a slice for each block, or None where it does not."""
    return next((axis for ending, axis in SLICED.items() if name.endswith(ending)), None)


PERIOD_KEYS = (
    "full_attention_interval", "attn_layer_period", "expert_layer_period", "decoder_sparse_step",
    "interleave_moe_layer_step", "no_rope_layer_interval", "sliding_window_pattern", "global_attn_every_n_layers",
    "moe_layer_interval", "moe_layer_freq", "layer_group_size", "cross_attention_interval",
)  # fmt: skip
"""Keys by which a block's kind follows from its number, where the config has no list to say it."""

PREDICTION_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "n_predict")
"""Keys that count blocks for multi-token prediction, which checkpoints number on after the last block."""

NOT_BY_BLOCK = (
    "_token_id", "_token_ids", "_tokens", "_section", "_limit", "_multipliers", "_group_size", "_sizes",
    "architectures",
)  # fmt: skip
"""Endings of keys whose lists are never one value for each block, however long they are."""


def means_blocks(key: str, value: Any, count: int) -> bool:
    """Say whether an unknown key looks like one value for each block: a list of their number."""
    return isinstance(value, list | tuple) and len(value) == count and not key.endswith(NOT_BY_BLOCK)


OBSTACLES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "scale_attn_by_inverse_layer_idx": (bool, "each block divides its attention scores by its number"),
    "rescale_every": (bool, "every so many blocks, the hidden states are halved"),
    "indexer_types": (lambda kinds: "shared" in kinds, "blocks hand the indices they attend to on to the next ones"),
}
"""Keys whose values can make a block depend on its number or on another block, with that as a clause."""


def explicit_experts(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Turn `decoder_sparse_step` into `mlp_only_layers` (Qwen-MoE): every n-th block has experts, unless listed."""
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    numbers = [new for new, old in enumerate(kept.blocks) if old in dense or (old + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": numbers}


def explicit_attention(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Write GPT-Neo's runs of attention kinds as one run of the kinds that stay."""
    return {"attention_types": [[by_block(config["attention_layers"], kept), 1]]}


def explicit_cycle(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Write out the cycle of kinds that RecurrentGemma repeats over its blocks."""
    cycle = config["block_types"]
    return {"block_types": [cycle[block % len(cycle)] for block in kept.blocks]}


def same_scale(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Keep the factor scale_depth / sqrt(blocks) of MiniCPM, which would grow as blocks go."""
    return {"scale_depth": config["scale_depth"] * (len(kept.blocks) / kept.count) ** 0.5}


KeyRewriter = Callable[[Mapping[str, Any], Kept], dict[str, Any]]

KEY_REWRITERS: Mapping[str, KeyRewriter] = {
    "decoder_sparse_step": explicit_experts,
    "attention_types": explicit_attention,
    "block_types": explicit_cycle,
    "scale_depth": same_scale,
}
"""Keys whose meaning needs others to change with them; each gives the keys that it writes."""
