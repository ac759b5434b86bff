"""Operations and bytes of a workload, counted by hand for tiny models."""

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import llama_config, save_model
from families import tiny_config
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.speed.work import count_work
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins

HIDDEN, VOCABULARY, KEYS = 32, 320, 16
BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * 64
NORMS = 2 * HIDDEN


def architecture(folder, config):
    source = locate_model(str(save_model(folder / "model", config)), ignore)
    return read_architecture(source, load_plugins(), ignore)


def test_a_prompt(tmp_path):
    work = count_work(architecture(tmp_path, llama_config(3)), 2, 16, 0, torch.float32)
    attention = 2 * 2 * 16 * 16 * HIDDEN
    assert work.prefill_flops.blocks == (2 * (2 * 16 * BLOCK + attention),) * 3
    assert work.prefill_flops.outside == 2 * 16 * 2 * HIDDEN * VOCABULARY
    assert work.prefill_bytes.blocks == (4 * (BLOCK + NORMS),) * 3
    looked_up = 2 * 16 * HIDDEN
    assert work.prefill_bytes.outside == 4 * (HIDDEN * VOCABULARY + HIDDEN + looked_up)
    assert work.decode_flops.without(()) == work.decode_bytes.without(()) == 0
    assert work.bound((1,)) == max(
        term.without(()) / term.without((1,)) for term in (work.prefill_flops, work.prefill_bytes)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_generation(tmp_path, tied):
    work = count_work(architecture(tmp_path, llama_config(3, tie_word_embeddings=tied)), 2, 16, 5, torch.bfloat16)
    head = HIDDEN * VOCABULARY
    assert work.prefill_flops.outside == 2 * 2 * head  # of the last position alone
    cache_of_prompt = 2 * 16 * 2 * KEYS
    assert work.prefill_bytes.blocks == (2 * (BLOCK + NORMS + cache_of_prompt),) * 3
    context = 16 + 2.5  # the mean of 17 to 20
    attention = 2 * 2 * context * HIDDEN
    assert work.decode_flops.blocks == pytest.approx((4 * 2 * (2 * BLOCK + attention),) * 3)
    assert work.decode_flops.outside == pytest.approx(4 * 2 * 2 * head)
    assert work.decode_bytes.blocks == (4 * 2 * (BLOCK + NORMS + 2 * context * 2 * KEYS),) * 3
    looked_up = 0 if tied else 2 * HIDDEN
    assert work.decode_bytes.outside == 4 * 2 * (head + HIDDEN + looked_up)
    assert 1 < work.bound((1,)) < 3 / 2
    assert count_work(architecture(tmp_path, llama_config(3)), 2, 16, 1, torch.bfloat16).decode_bytes.without(()) == 0


def test_a_head_of_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    read = architecture(tmp_path, llama_config(3))
    assert count_work(read, 1, 16, 0, torch.float32).prefill_bytes.outside > 0


def test_of_the_experts_only_those_that_are_chosen_count(tmp_path):
    read = architecture(tmp_path, tiny_config("mixtral"))
    config = read.config
    expert = 3 * config.hidden_size * config.intermediate_size
    others = sum(p.numel() for name, p in read.skeleton.named_parameters() if ".0." in name and "experts" not in name)
    work = count_work(read, 1, 4, 2, torch.float32)
    cache = 2 * config.hidden_size
    assert work.decode_bytes.blocks[0] == pytest.approx(4 * (others + 2 * expert + 5 * cache))
    # Four tokens that choose two of four experts each leave one out in one case of 16.
    assert work.prefill_bytes.blocks[0] == pytest.approx(4 * (others + 4 * expert * 15 / 16 + 4 * cache))
    assert 2 * 2 * expert < work.decode_flops.blocks[0] < 2 * (2 * expert + others) * 1.2


def test_what_the_counter_cannot_run_takes_two_per_weight(tmp_path, monkeypatch):
    read = architecture(tmp_path, llama_config(3))
    monkeypatch.setattr("sleb_cli.engine.speed.work._counted_flops", lambda *given, all_logits: None)
    work = count_work(read, 2, 16, 0, torch.float32)
    assert work.prefill_flops.blocks == (2 * 2 * 16 * BLOCK,) * 3
    assert work.prefill_flops.outside == 2 * 2 * 16 * HIDDEN * VOCABULARY
