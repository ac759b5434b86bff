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
ON_CPU = Placement(torch.device("cpu"), torch.float32)
CLAIMED = {"llama", "opt"}
NIGHTLY = {"llama", "mistral, sliding", "qwen2", "qwen3", "gpt_neox, parallel"}
NIGHTLY |= {"phi, parallel, head with bias"}
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
    told = plan["calibration"]
    folder = architecture.source.folder
    assert told["bos"] == adds_bos(AutoTokenizer.from_pretrained(folder))
    sequences = calibration_sequences(folder, text_file, bos=told["bos"])
    assert told["tokens_sha256"] == tokens_sha256(sequences)
    model = open_model(architecture, ON_CPU, ignore).model
    count = len(plan["removals"])
    removals, steps = plain_search(model, architecture.blocks_of(model), sequences, count)
    assert plan["removals"] == removals
    for step, losses in zip(plan["steps"], steps, strict=True):
        expected = {str(block): loss for block, loss in losses.items()}
        assert step["scores"] == pytest.approx(expected, abs=1e-5)
        assert step["score"] == step["scores"][str(step["block"])]


def test_searches_equal_the_plain_reference(sleb, folder, architecture, text_file, monkeypatch):
    options = (
        "search",
        folder,
        "--remove",
        3,
        *calibration(text_file),
        "--batch-size",
        2,
        "--json",
    )
    result = sleb(*options)
    plan = json.loads(result.stdout)
    assert (plan["model"]["family"] in CLAIMED) == (plan["model"]["model_type"] in CLAIMED)
    assert "not been tested" not in result.stderr
    assert (plan["search"]["engine"], plan["search"]["engine_reason"]) == ("fork", None)
    require_reference(plan, architecture, text_file)

    # In little memory: one candidate a walk, nothing remembered, few logits at a time.
    refused = sleb(*options, "--force", "--memory", "1kB", code=7).stderr
    needed = re.search(r"need ([\d.]+ .B) in addition to the model, but only 1 kB", refused)[1]
    least = parse_bytes(needed, "") + 500
    budgets = []
    resolve = prepare.resolve_memory_budget

    def watched(*arguments, **settings):
        budgets.append(resolve(*arguments, **settings))
        return budgets[-1]

    monkeypatch.setattr(prepare, "resolve_memory_budget", watched)
    squeezed = json.loads(sleb(*options, "--force", "--memory", least).stdout)
    assert budgets == [MemoryBudget(sequences=2, positions=16, branches=1, kept_branches=0)]
    require_reference(squeezed, architecture, text_file)


def test_blocks_that_cannot_be_forked_take_whole_passes(search, tmp_path, text_file):
    """XLNet swaps sequences and positions before its blocks."""
    folder = save_model(tmp_path / "xlnet", tiny_config("xlnet"))
    plan = json.loads(search("--remove", 2, "--json", model=folder).stdout)
    assert plan["search"]["engine"] == "plain"
    assert "[2, 32] tokens become [32, 2] states" in plan["search"]["engine_reason"]
    require_reference(plan, architecture_of(folder), text_file)


@pytest.mark.parametrize("blocks", [slow((1,)), slow((3, 0)), (2, 4, 1)])
@torch.inference_mode()
def test_the_checkpoint_is_proven_and_the_model_in_memory(
    sleb, folder, architecture, tmp_path, blocks
):
    named = ",".join(map(str, blocks))
    result = sleb("apply", folder, "--blocks", named, "-o", "out", "--json")
    proof = json.loads(result.stdout)["proof"]
    assert (proof["logits_difference"], proof["prompt"]) == (0, "text")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored.config.num_hidden_layers == 5 - len(blocks)
    built = load_pruned(plan_surgery(architecture, blocks), ON_CPU, ignore)
    theirs = stored.state_dict()
    ours = built.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name])
    ids = torch.arange(2, 42)[None]
    assert torch.equal(stored(ids).logits, built(ids).logits)
