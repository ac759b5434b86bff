"""How far a search goes, on plain arithmetic; what blocks take, against counting."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from conftest import architecture_of, llama_config, save_model
from families import tiny_config
from sleb_cli.engine.door.search import parse_target
from sleb_cli.engine.model.sizes import PerBlock, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.search.targets import PerplexityTarget, SizeTarget
from sleb_cli.events import ignore
from sleb_cli.requests import SearchRequest
from sleb_plugins import UnsupportedModelError, UsageError

EQUAL, UNEQUAL = (10.0,) * 10, (10.0, 1.0, 20.0, 2.0, 10.0)


def at_most(most, blocks):
    return SizeTarget(
        "target_params", PerBlock(100, blocks), most, lambda amount: f"{amount:g} parameters"
    )


@pytest.mark.parametrize(
    ("most", "blocks", "candidates", "removed", "count"),
    [
        (170, EQUAL, range(1, 9), (), 3),
        (169, EQUAL, range(1, 9), (), 4),
        (130, UNEQUAL, [1, 2, 3], (), 3),  # as many as it takes if the small ones go
        (170, EQUAL, range(1, 9), (4, 5), 3),
        # Without block 1, the smallest: 2 and 20 must go for 120, and block 1 does not go twice.
        (130, UNEQUAL, [1, 2, 3], (1,), 3),
        (
            170,
            EQUAL,
            range(1, 9),
            (4, 5, 6),
            "already at 170 .* without the 3 removed blocks; the target is 170",
        ),
        (100, EQUAL, range(10), (), "At most 9 blocks can be removed"),  # one always stays
    ],
)
def test_how_many_removals_meet_a_size(most, blocks, candidates, removed, count):
    target = at_most(most, blocks)
    if isinstance(count, int):
        assert target.removals(candidates, removed) == count
        return
    with pytest.raises(UsageError, match=count):
        target.removals(candidates, removed)


def test_the_ratio_of_a_huge_loss_is_a_number():
    found = PerplexityTarget(1.2).record((), math.log(1.1), 900)
    assert (found.limit, found.reached, found.next) == pytest.approx((1.2, 1.1, math.exp(700)))


def target_of(architecture=None, blocks=6, notify=ignore, **asked):
    request = SearchRequest("a model", dtype="float32", **asked)
    return parse_target(request, architecture or SimpleNamespace(block_count=blocks), notify)


@pytest.mark.parametrize(
    ("ratio", "blocks", "count"),
    [("0.2", 35, 7), ("0.07", 100, 7), ("0.21", 30, 7), ("1/3", 30, 10)],
)
def test_the_ratio_is_exact(ratio, blocks, count):
    assert target_of(blocks=blocks, ratio=ratio).removals(range(blocks)) == count


def test_a_ratio_must_lie_between_0_and_1():
    for text in ("0", "1", "1.2", "-0.1", "nan", "inf", "x", "1/0"):
        with pytest.raises(UsageError, match="not between 0 and 1"):
            target_of(ratio=text)
    assert target_of(max_perplexity_ratio="1.25x").limit == 1.25


@pytest.mark.parametrize(
    "config",
    [llama_config(5), llama_config(5, tie_word_embeddings=True), tiny_config("qwen3_moe")],
    ids=["llama", "tied", "blocks that differ"],
)
def test_parameters_and_bytes_are_those_of_the_pruned_model(tmp_path, config):
    read = architecture_of(save_model(tmp_path / "m", config))
    for removed in ((), (0,), (1,), (1, 3)):
        pruned = AutoModelForCausalLM.from_config(config)
        pruned.model.layers = nn.ModuleList(
            block for n, block in enumerate(pruned.model.layers) if n not in removed
        )
        expected = sum(parameter.numel() for parameter in pruned.parameters())
        assert count_parameters(read).without(removed) == expected
        assert stored_bytes(read).without(removed) == 4 * expected


def caches(folder, length):
    return cache_bytes(architecture_of(folder), torch.bfloat16, length)


def test_a_window_holds_no_more_than_the_window(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks, a_token = caches(save_model(tmp_path / "g", config), 100).blocks, 2 * 2 * 2 * 8
    assert blocks[1] == 100 * a_token
    assert 15 * a_token <= blocks[0] == blocks[2] <= 16 * a_token


def test_a_family_whose_cache_cannot_be_told_is_refused(tmp_path):
    folder = save_model(tmp_path / "old", tiny_config("openai-gpt"))
    with pytest.raises(
        UnsupportedModelError, match="size of the KV cache of openai-gpt is unknown: it is not kept"
    ):
        caches(folder, 16)


def test_a_quantized_checkpoint_counts_as_packed(tmp_path):
    folder = save_model(tmp_path / "m", llama_config(4, dtype="bfloat16"))
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    model, notes = architecture_of(folder), []
    a_cache = 2 * 2 * 8 * 10 * 2 * 4
    target = target_of(model, notify=notes.append, target_memory="1kB", serve_length=10)
    assert target.sizes.without(()) == stored_bytes(model).without(()) + a_cache
    assert "weights packed as in the checkpoint" in notes[-1].text
