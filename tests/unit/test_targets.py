"""How far a search goes, on plain arithmetic; what blocks take, against counting."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from conftest import llama_config, save_model
from families import tiny_config
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.sizes import Sizes, cache_bytes, count_parameters, stored_bytes
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.search.choices import Protection
from sleb_cli.engine.search.context import SearchContext
from sleb_cli.engine.search.speedup import SpeedupTimer
from sleb_cli.engine.search.targets import (
    SizeTarget,
    chosen_target,
    fit_slope,
    longest_run,
    loss_target,
    parse_number,
)
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import TargetRequest
from sleb_plugins import UnsupportedModelError, UsageError


def at_most(most, blocks, outside=100.0):
    return SizeTarget(
        "target_params", "as asked", Sizes(outside, blocks), most, lambda amount: f"{amount:g} parameters"
    )


def test_equal_blocks_are_counted_exactly():
    target = at_most(170, (10.0,) * 10)
    assert target.removals(range(1, 9)) == 3
    assert not target.met({1, 2})
    assert target.met({1, 2, 3})
    assert target.allows(9.0)
    assert at_most(171, (10.0,) * 10).removals(range(1, 9)) == 3
    assert at_most(169, (10.0,) * 10).removals(range(1, 9)) == 4


def test_of_unequal_blocks_as_many_as_it_takes_if_the_small_ones_go():
    target = at_most(130, (10.0, 1.0, 20.0, 2.0, 10.0))
    assert target.removals([1, 2, 3]) == 3
    assert not target.met({1, 3})
    assert target.met({2})


def test_blocks_that_are_gone_count():
    assert at_most(170, (10.0,) * 10).removals(range(1, 9), removed=(4, 5)) == 3
    # Without block 1, the smallest: 2 and 20 must go for 120, and block 1 does not go twice.
    assert at_most(130, (10.0, 1.0, 20.0, 2.0, 10.0)).removals([1, 2, 3], removed=(1,)) == 3
    with pytest.raises(UsageError, match="already at 170 parameters without the 3 removed blocks; the target is 170"):
        at_most(170, (10.0,) * 10).removals(range(1, 9), removed=(4, 5, 6))


def test_what_is_met_already_or_cannot_be_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="The model is already at 200 parameters; the target is 200"):
        at_most(200, (10.0,) * 10).removals(range(1, 9))
    with pytest.raises(
        UsageError, match="still at 120 parameters with 8 blocks removed, the maximum; the target is 119"
    ):
        at_most(119, (10.0,) * 10).removals(range(1, 9))
    with pytest.raises(UsageError, match="with 9 blocks removed"):  # one always stays
        at_most(100, (10.0,) * 10).removals(range(10))


def test_a_perplexity_ratio_is_a_loss():
    ratio = loss_target(TargetRequest(max_perplexity_ratio="1.2"), "max_perplexity_ratio")
    assert ratio.most == math.log(1.2)
    assert ratio.allows(0.18)
    assert not ratio.allows(0.19)
    assert loss_target(TargetRequest(max_loss_increase="0"), "max_loss_increase").allows(0)
    assert ratio.removals([1, 2, 3], (4,)) == 4


def test_what_a_loss_reached_is_recorded_in_the_unit_that_was_asked_for():
    ratio = loss_target(TargetRequest(max_perplexity_ratio="1.2"), "max_perplexity_ratio").record(math.log(1.1), 900)
    assert (ratio.limit, ratio.dense) == (1.2, 1)
    assert (ratio.reached, ratio.next) == pytest.approx((1.1, math.exp(700)))
    loss = loss_target(TargetRequest(max_loss_increase="0.2"), "max_loss_increase").record(0.1, None)
    assert (loss.limit, loss.dense, loss.reached, loss.next) == (0.2, 0, 0.1, None)


@pytest.mark.parametrize("text", ["0.9", "nan", "inf", "-2", "x", "fast"])
def test_what_is_no_factor(text):
    with pytest.raises(UsageError, match=r"--target-speedup .* is not a number of 1.01 or more"):
        parse_number(text, "target_speedup", least=1.01)
    assert parse_number("1.25x", "target_speedup", least=1.01) == 1.25


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TargetRequest(), "No target given"),
        (TargetRequest(ratio="0.2", target_params="1B"), "--ratio and --target-params are different targets"),
        (TargetRequest(remove=2, serve_length=128), "--serve-length requires --target-memory"),
        (TargetRequest(remove=2, target_workload="prompt"), "--target-workload requires --target-speedup"),
    ],
)
def test_one_way_to_say_how_far(request_, message):
    with pytest.raises(UsageError, match=message):
        chosen_target(request_)


def test_a_slope_is_fitted_through_the_dense_model():
    assert fit_slope([2, 4], [0.9, 0.8]) == pytest.approx(0.05)
    removed, share = [1, 5, 9], [0.97, 0.8, 0.7]
    slopes = [k / 10000 for k in range(1, 1000)]
    errors = [sum((1 - slope * n - s) ** 2 for n, s in zip(removed, share, strict=True)) for slope in slopes]
    assert fit_slope(removed, share) == pytest.approx(slopes[errors.index(min(errors))], abs=1e-4)


def architecture(folder):
    return read_architecture(locate_model(str(folder), lambda event: None), load_plugins(), lambda event: None)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_bytes_are_those_of_the_pruned_model(tmp_path, tied):
    folder = save_model(tmp_path / "m", llama_config(5, tie_word_embeddings=tied))
    for removed in ((), (1,), (1, 3)):
        pruned = AutoModelForCausalLM.from_config(llama_config(5 - len(removed), tie_word_embeddings=tied))
        expected = sum(parameter.numel() for parameter in pruned.parameters())
        assert count_parameters(architecture(folder)).without(removed) == expected
        assert stored_bytes(architecture(folder)).without(removed) == 4 * expected


def test_blocks_that_differ_are_counted_each(tmp_path):
    folder = save_model(tmp_path / "m", tiny_config("qwen3_moe"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = tuple(sum(weight.numel() for weight in block.parameters()) for block in model.model.layers)
    assert len(set(expected)) > 1
    assert count_parameters(architecture(folder)).blocks == expected


def caches(folder, length, batch=1):
    return cache_bytes(architecture(folder), torch.bfloat16, length=length, batch=batch)


def test_the_cache_is_keys_and_values_of_each_block(tmp_path, tiny_llama, tiny_gpt2):
    # two bytes x keys and values x 2 key-value heads x head size 8 x length
    assert caches(tiny_llama, 100, batch=3) == Sizes(0, (2 * 2 * 2 * 8 * 100 * 3,) * 6)
    assert caches(tiny_gpt2, 50) == Sizes(0, (2 * 2 * 32 * 50,) * 5)


def test_a_window_holds_no_more_than_the_window(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    blocks = caches(save_model(tmp_path / "g", config), 100).blocks
    a_token = 2 * 2 * 2 * 8
    assert blocks[1] == 100 * a_token
    assert blocks[0] == blocks[2]
    assert 15 * a_token <= blocks[0] <= 16 * a_token


def test_a_family_whose_cache_cannot_be_told_is_refused(tmp_path):
    config = tiny_config("openai-gpt")
    folder = save_model(tmp_path / "old", config)
    with pytest.raises(UnsupportedModelError, match="size of the KV cache of openai-gpt is unknown: it is not kept"):
        caches(folder, 16)


def context(folder, notify):
    return SearchContext(architecture(folder), Protection(1, 1), torch.float32, torch.device("cpu"), notify)


def test_a_quantized_checkpoint_is_counted_as_packed_or_as_it_will_be_served(tmp_path):
    folder = save_model(tmp_path / "m", llama_config(4, dtype="bfloat16"))
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    notes = []
    target = context(folder, notes.append).target(TargetRequest(target_memory="1kB", serve_length=10))
    parameters, a_cache = count_parameters(architecture(folder)), 2 * 2 * 8 * 10 * 4 * 4
    assert target.sizes.without(()) == stored_bytes(architecture(folder)).without(()) + a_cache
    assert "weights packed as in the checkpoint" in notes[0].text
    served = TargetRequest(target_memory="1kB", serve_length=10, serve_dtype="float32")
    assert context(folder, notes.append).target(served).sizes.without(()) == 4 * parameters.without(()) + a_cache
    assert "weights in float32" in notes[1].text


def test_the_longest_run_is_the_first_of_equals():
    assert longest_run([1, 2, 4, 5, 6, 8, 9, 10]) == [4, 5, 6]
    assert longest_run([3]) == [3]


class Told(SpeedupTimer):
    """A stopwatch that is told what it would measure: a twentieth of the time for each block."""

    def share(self, removals):
        timed.append(tuple(removals))
        return 1 - 0.05 * len(removals)


timed = []


@pytest.mark.parametrize("most", [4, 2])
def test_as_many_blocks_are_timed_as_may_go_together(tiny_llama, most):
    def candidates(removed):
        if len(removed) == most:
            raise UnsupportedModelError("No more.", hint="Fewer.")
        return [block for block in (1, 2, 3, 4) if block not in removed]

    timed.clear()
    request = TargetRequest(target_speedup="1.1", target_workload="prompt")
    timer = Told(context(tiny_llama, lambda event: None), lambda: None, request, ProcessGroup())
    target = timer.target(candidates)
    assert [len(removals) for removals in timed] == [1, 2]
    assert timed[1][:1] == timed[0] == (3,)
    assert target.sizes.without({1, 2}) == pytest.approx(0.9)
    assert target.removals([1, 2, 3, 4]) == 2
