"""`sleb apply --recover` through the program: new values of all kinds of blocks are written, proven and better."""

import json

import pytest

from conftest import save_model
from families import tiny_config

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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recovery_pays_and_its_checkpoint_is_proven(run_sleb, model_type, tmp_path):
    model = save_model(tmp_path / "model", tiny_config(model_type))
    result = run_sleb(
        "apply", model, "--blocks", "2,3", "--recover", "--samples", 60, "--sequence-length", 32, "-o", "out", "--json"
    )
    assert result.exit_code == 0, result.stderr
    applied = json.loads(result.stdout)
    recovery, proof = applied["recovery"], applied["proof"]
    assert recovery["closed_form_losses"]["loss"] < recovery["pruned"]["loss"]
    assert any(fit["kept"] for fit in recovery["closed_form"]["fits"])
    assert (proof["reference"], proof["partial"], proof["logits_difference"]) == ("recovered", None, 0.0)
