"""`sleb apply --recover` through the program: new values of all kinds of blocks are written, proven
and better.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import evaluation, save_model, slow
from families import tiny_config
from reference import plain_loss
from sleb_cli.engine.text.windows import cut_windows

FAMILIES = {
    "gpt2": "its weights lie the other way round, and have biases",
    "gpt_neox": "attention and MLP in parallel",
    "gemma2": "norms behind attention and MLP",
    "olmo2": "nothing but norms behind attention and MLP",
    "mixtral": "experts, so only attention can be fitted",
    "deepseek_v3": "shared experts beside routed ones, merged in memory",
    "mamba": "no attention",
    "granite": "a multiplier behind the weights",
    "opt": "joins sequences before its MLP",
}


NIGHTLY = ["gpt_neox", "olmo2", "granite", "opt"]


@pytest.mark.parametrize(
    "model_type", [slow(name) if name in NIGHTLY else name for name in FAMILIES]
)
def test_recovery_pays_and_its_checkpoint_is_proven(sleb, model_type, tmp_path):
    model = save_model(tmp_path / "model", tiny_config(model_type))
    few = (
        "--blocks 2,3 --recover --heal-tokens 8192 --samples 60 --sequence-length 32 -o out --json"
    )
    applied = json.loads(sleb("apply", model, *few.split()).stdout)
    recovery = applied["recovery"]
    proof = applied["proof"]
    assert recovery["heal"]["losses"]["divergence"] < recovery["pruned"]["divergence"]
    assert any(fit["error_left"] < 1 for fit in recovery["closed_form"]["fits"])
    assert (proof["reference"], proof["partial"]) == ("recovered", None)
    assert proof["logits_difference"] == 0


@pytest.mark.parametrize(("model_type", "options"), [("mixtral", ()), ("qwen3_moe", ("--stream",))])
@torch.inference_mode()
def test_experts_merged_in_memory_are_measured_as_they_compute(
    sleb, text_file, tmp_path, model_type, options
):
    folder = save_model(tmp_path / "model", tiny_config(model_type))
    words = ("eval", folder, "--blocks", "2,3", *evaluation(text_file), *options, "--json")
    measured = json.loads(sleb(*words).stdout)["texts"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = cut_windows(tokenizer, text_file.read_text(), 32, bos=False)[:4]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for removed, found in ((set(), measured["dense"]), ({2, 3}, measured["pruned"][0])):
        loss = plain_loss(model, model.model.layers, windows, removed)
        assert math.log(found["perplexity"]) == pytest.approx(loss, abs=1e-5)
