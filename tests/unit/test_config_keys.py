"""What keys of a config say about the blocks that stay: plain arithmetic."""

import pytest

from sleb_plugins.config_keys import (
    KEY_PRUNERS,
    KEY_REWRITERS,
    Kept,
    block_numbers,
    by_block,
    keyed_by_block,
    last_block,
    leading_blocks,
    means_blocks,
    numbers_from_one,
    trailing_blocks,
)

KEPT = Kept((0, 2, 3, 5), 6)  # without 1 and 4


@pytest.mark.parametrize(
    ("prune", "value", "pruned"),
    [
        (by_block, list("abcdef"), list("acdf")),
        (by_block, list("abc"), list("abc")),
        (block_numbers, [0, 1, 3, 4, 5], [0, 2, 3]),
        (by_block, "M-M*-E", "MM*E"),
        (
            numbers_from_one,
            {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3, 6], "head_dim": 8},
            {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "head_dim": 8},
        ),
        (keyed_by_block, {"1": "a", "2": "b", 5: "c"}, {"1": "b", "3": "c"}),
        (leading_blocks, 1, 1),
        (leading_blocks, 2, 1),
        (leading_blocks, 6, 4),
        (leading_blocks, 28, 28),  # Qwen2's max_window_layers, beyond the end: no block at all
        (trailing_blocks, 2, 1),
        (last_block, 5, 3),
        (last_block, -1, -1),
        (block_numbers, [[1], "x"], []),
        (numbers_from_one, {"kda_layers": ["x"]}, {"kda_layers": ["x"]}),
    ],
)
def test_values_of_known_keys_are_pruned(prune, value, pruned):
    assert prune(value, KEPT) == pruned


@pytest.mark.parametrize("key", KEY_PRUNERS)
def test_values_of_other_types_stay(key):
    assert [KEY_PRUNERS[key](value, KEPT) for value in ("x", 1.5, [])] == ["x", 1.5, []]


KINDS = ["global", "global", "local", "local"]


@pytest.mark.parametrize(
    ("key", "config", "expected"),
    [
        # Of 0..5, the odd ones have experts, but 3 is listed as dense: 1 and 5. Of these, 5 stays,
        # as number 3.
        (
            "decoder_sparse_step",
            {"mlp_only_layers": [3]},
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]},
        ),
        (
            "attention_types",
            {"attention_layers": ["global", "local"] * 3},
            {"attention_types": [[KINDS, 1]]},
        ),
        ("block_types", {"block_types": ["r", "r", "a"]}, {"block_types": ["r", "a", "r", "a"]}),
        ("scale_depth", {"scale_depth": 1.5**0.5}, {"scale_depth": pytest.approx(1.0, rel=1e-15)}),
    ],
)
def test_periods_runs_cycles_and_factors_are_written_out(key, config, expected):
    assert KEY_REWRITERS[key]({"decoder_sparse_step": 2} | config, KEPT) == expected


@pytest.mark.parametrize(
    ("key", "value", "does"),
    [
        ("novel_kinds", [1] * 6, True),
        ("novel_kinds", [1] * 5, False),
        ("novel_kinds", "abcdef", False),
        ("eos_token_id", [1] * 6, False),
        ("ssm_multipliers", [1] * 6, False),
    ],
)
def test_unknown_lists_as_long_as_the_model_are_by_block(key, value, does):
    assert means_blocks(key, value, 6) == does
