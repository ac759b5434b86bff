"""What keys of a config say about the blocks that stay: plain arithmetic."""

import pytest

from sleb_plugins.config_keys import (
    KEY_PRUNERS,
    KEY_REWRITERS,
    Kept,
    block_numbers,
    by_block,
    by_letter,
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
        (by_block, tuple("abcdef"), list("acdf")),
        (by_block, list("abc"), list("abc")),
        (by_block, 64, 64),
        (block_numbers, [0, 1, 3, 4, 5], [0, 2, 3]),
        (block_numbers, [], []),
        (by_letter, "M-M*-E", "MM*E"),
        (by_letter, "M-", "M-"),
        (numbers_from_one, {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3, 6], "head_dim": 8},
         {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "head_dim": 8}),
        (keyed_by_block, {"1": "a", "2": "b", 5: "c"}, {"1": "b", "3": "c"}),
        (leading_blocks, 0, 0),
        (leading_blocks, 1, 1),
        (leading_blocks, 2, 1),
        (leading_blocks, 6, 4),
        (leading_blocks, 28, 28),  # Qwen2's max_window_layers, beyond the end: no block at all
        (trailing_blocks, 0, 0),
        (trailing_blocks, 2, 1),
        (trailing_blocks, 3, 2),
        (last_block, 5, 3),
        (last_block, 4, 2),
        (last_block, -1, -1),
        (block_numbers, [[1], "x"], []),
        (numbers_from_one, {"kda_layers": ["x"]}, {"kda_layers": ["x"]}),
        (numbers_from_one, [1], [1]),
        (keyed_by_block, [1], [1]),
        (leading_blocks, [1], [1]),
        (trailing_blocks, {}, {}),
    ],
)  # fmt: skip
def test_pruners(prune, value, pruned):
    assert prune(value, KEPT) == pruned


@pytest.mark.parametrize("key", KEY_PRUNERS)
@pytest.mark.parametrize("value", ["x", 1.5])
def test_a_value_of_another_type_stays(key, value):
    assert KEY_PRUNERS[key](value, KEPT) == value


@pytest.mark.parametrize("key", KEY_PRUNERS)
def test_removing_nothing_changes_nothing(key):
    everything = Kept(tuple(range(6)), 6)
    prune = KEY_PRUNERS[key]
    values = {
        by_block: list("abcdef"), by_letter: "abcdef", block_numbers: [1, 4], keyed_by_block: {"2": "x"},
        numbers_from_one: {"kda_layers": [1, 6]},
    }  # fmt: skip
    value = values.get(prune, 3)
    assert prune(value, everything) == value


def test_a_period_of_experts_becomes_a_list():
    config = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    # Of 0..5, the odd ones have experts, but 3 is listed as dense: 1 and 5. Of these, 5 stays, as number 3.
    assert KEY_REWRITERS["decoder_sparse_step"](config, KEPT) == {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 1, 2],
    }


def test_runs_and_cycles_of_kinds_are_written_out():
    config = {"attention_layers": ["global", "local"] * 3, "block_types": ["r", "r", "a"]}
    kinds = ["global", "global", "local", "local"]
    assert KEY_REWRITERS["attention_types"](config, KEPT) == {"attention_types": [[kinds, 1]]}
    assert KEY_REWRITERS["block_types"](config, KEPT) == {"block_types": ["r", "a", "r", "a"]}


def test_minicpm_keeps_its_factor():
    scale = KEY_REWRITERS["scale_depth"]({"scale_depth": 1.4}, KEPT)["scale_depth"]
    assert scale / 4**0.5 == pytest.approx(1.4 / 6**0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("key", "value", "does"),
    [
        ("novel_kinds", [1] * 6, True),
        ("novel_kinds", [1] * 5, False),
        ("novel_kinds", "abcdef", False),
        ("eos_token_id", [1] * 6, False),
        ("mrope_section", [1] * 6, False),
        ("ssm_multipliers", [1] * 6, False),
    ],
)
def test_unknown_lists_as_long_as_the_model_are_by_block(key, value, does):
    assert means_blocks(key, value, 6) == does
