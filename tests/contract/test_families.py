"""What every family must pass: same numbers as the plain reference, and a checkpoint that proves
itself.
"""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import architecture_of, calibration, calibration_sequences, save_model, slow
from families import tiny_config
from reference import plain_search
from sleb_cli.engine.forward import prepare
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.engine.text.windows import adds_bos, tokens_sha256
from sleb_cli.events import ignore
from sleb_cli.units import parse_bytes

GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "llama, tied": GROUPED | {"tie_word_embeddings": True},
    "opt": {},
    "gpt2": {},
    "openai-gpt, blocks return lists": {},
    "mistral, sliding": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2, mixed kinds, softcap": GROUPED,
    "cohere2, mixed kinds, parallel, scaled logits": GROUPED | {"layer_types": None},
    "gpt_neox, parallel": {},
    "phi, parallel, head with bias": GROUPED,
    "mixtral, experts": GROUPED,
    "bloom, masks carry the batch size": {},
}
TRAINED = "stories260K, trained"
CLAIMED = {"llama", "opt"}
NIGHTLY = {
    "llama",
    "mistral, sliding",
    "qwen2",
    "qwen3",
    "gpt_neox, parallel",
    "phi, parallel, head with bias",
}
"""Those that other tests run too, or that differ little from another."""


@pytest.fixture(
    scope="module",
    params=[*(slow(name) if name in NIGHTLY else name for name in FAMILIES), TRAINED],
)
def folder(request, tmp_path_factory):
    if request.param == TRAINED:
        return request.getfixturevalue("shared_data") / "models" / "stories260K"
    model_type = request.param.partition(",")[0]
    config = tiny_config(model_type, num_hidden_layers=5, **FAMILIES[request.param])
    return save_model(
        tmp_path_factory.mktemp("family") / model_type, config, bos=model_type in ("opt", "gemma2")
    )


@pytest.fixture
def architecture(folder):
    return architecture_of(folder)


def require_reference(plan, architecture, text_file):
    """Cut the text and search the slow way, and hold a plan against it."""
    told, folder = plan["calibration"], architecture.source.folder
    assert told["bos"] == adds_bos(AutoTokenizer.from_pretrained(folder))
    sequences = calibration_sequences(folder, text_file, bos=told["bos"])
    assert told["tokens_sha256"] == tokens_sha256(sequences)
    model = open_model(architecture, Placement(torch.device("cpu"), torch.float32), ignore).model
    removals, steps = plain_search(
        model, architecture.blocks_of(model), sequences, len(plan["removals"])
    )
    assert plan["removals"] == removals
    for step, losses in zip(plan["steps"], steps, strict=True):
        assert step["scores"] == pytest.approx(
            {str(block): loss for block, loss in losses.items()}, abs=1e-5
        )
        assert step["score"] == step["scores"][str(step["block"])]


def test_searches_equal_the_plain_reference(run_sleb, folder, architecture, text_file, monkeypatch):
    options = ["--remove", 3, *calibration(text_file), "--batch-size", 2, "--json"]
    result = run_sleb("search", folder, *options)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["model"]["family"] in CLAIMED) == (plan["model"]["model_type"] in CLAIMED)
    assert "not been tested" not in result.stderr
    assert (plan["search"]["engine"], plan["search"]["engine_reason"]) == ("fork", None)
    require_reference(plan, architecture, text_file)

    # In little memory: one candidate a walk, nothing remembered, few logits at a time.
    refused = run_sleb("search", folder, *options, "--force", "--memory", "1kB")
    assert refused.exit_code == 7, refused.stderr
    needed = re.search(r"need ([\d.]+ .B) in addition to the model, but only 1 kB", refused.stderr)[
        1
    ]
    resolve, budgets = prepare.resolve_memory_budget, []
    watched = lambda *a, **k: budgets.append(resolve(*a, **k)) or budgets[-1]  # noqa: E731
    monkeypatch.setattr(prepare, "resolve_memory_budget", watched)
    least = parse_bytes(needed, "") + 500
    squeezed = json.loads(run_sleb("search", folder, *options, "--force", "--memory", least).stdout)
    assert budgets == [MemoryBudget(sequences=2, positions=16, branches=1, kept_branches=0)]
    require_reference(squeezed, architecture, text_file)


def test_blocks_that_cannot_be_forked_take_whole_passes(run_sleb, tmp_path, text_file):
    """XLNet swaps sequences and positions before its blocks."""
    folder = save_model(tmp_path / "xlnet", tiny_config("xlnet"))
    result = run_sleb("search", folder, "--remove", 2, *calibration(text_file), "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["search"]["engine"] == "plain"
    assert "[2, 32] tokens become [32, 2] states" in plan["search"]["engine_reason"]
    require_reference(plan, architecture_of(folder), text_file)


@pytest.mark.parametrize("blocks", [slow((1,)), slow((3, 0)), (2, 4, 1)])
@torch.inference_mode()
def test_the_checkpoint_is_proven_and_the_model_in_memory(
    run_sleb, folder, architecture, tmp_path, blocks
):
    named = ",".join(map(str, blocks))
    result = run_sleb("apply", folder, "--blocks", named, "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    proof = json.loads(result.stdout)["proof"]
    assert (proof["logits_difference"], proof["prompt"]) == (0, "text")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored.config.num_hidden_layers == 5 - len(blocks)
    built = load_pruned(
        plan_surgery(architecture, blocks), Placement(torch.device("cpu"), torch.float32), ignore
    )
    theirs, ours = stored.state_dict(), built.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    ids = torch.arange(2, 42)[None]
    assert torch.equal(stored(ids).logits, built(ids).logits)
