"""`sleb apply --heal` of plans of experts, through `main()`: routers alone are trained."""

import re
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from conftest import calibration, evaluation, prose, save_model, slow, weight_bytes_of, weights_of
from families import experts_config
from recovering import interrupt_healing
from sleb_cli.engine.recovery.language import Distillation
from sleb_cli.plan import read_plan

GATES = r".*\.gate\.weight"
ROUTERS = {
    "mixtral": GATES,
    "gpt_oss": r".*\.router\.(weight|bias)",
    "qwen3_moe": GATES,
    "deepseek_v3": GATES,
}
NIGHTLY = ["qwen3_moe", "deepseek_v3"]
FAMILIES = [slow(name) if name in NIGHTLY else name for name in ROUTERS]
TEXT = calibration("text.txt", samples=60)


@pytest.fixture
def healed(sleb, tmp_path):
    """Search a model for half of its experts, remove them, and heal what stays."""
    (tmp_path / "text.txt").write_text(prose(400))
    return partial(heal, sleb)


def heal(sleb, model, *options, **how):
    if not Path("plan.json").exists():
        search = "--unit experts --ratio 0.5 --sample-tokens 0 --holdout 0"
        sleb("search", model, search, *calibration("text.txt"))
    return sleb("apply plan.json --heal --heal-tokens 8192 -o out", *TEXT, *options, **how)


def changed_weights(sleb):
    """Return the names of the weights that healing changed."""
    sleb("apply plan.json -o plain --force")
    plain, healed = weights_of(Path("plain")), weights_of(Path("out"))
    assert plain.keys() == healed.keys()
    return {name for name, value in plain.items() if not torch.equal(value, healed[name])}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_routers_alone_change_and_predict_no_worse(sleb, healed, tmp_path, model_type):
    model = save_model(tmp_path / "model", experts_config(model_type))
    result = healed(model)
    assert "matches the recovered model in memory" in result.stdout
    changed = changed_weights(sleb)
    assert changed
    assert all(re.fullmatch(ROUTERS[model_type], name) for name in changed)
    plan = read_plan(tmp_path / "out" / "sleb_plan.json")
    recovery = plan.recovery
    # Random experts leave little to gain, and another text chose the point that is kept.
    assert recovery.heal.losses.divergence < 1.01 * recovery.pruned.divergence
    assert recovery.heal.rank is None
    assert plan.proof.logits_difference <= plan.proof.logits_tolerance
    assert "every expert" in plan.proof.checks
    card = (tmp_path / "out" / "README.md").read_text()
    assert "experts removed, the routers given new weights" in card
    assert "The routers were given new weights on text.txt" in card


def test_the_losses_are_those_of_the_checkpoint(sleb, healed, tmp_path):
    model = save_model(tmp_path / "model", experts_config("mixtral"))
    healed(model)
    text = evaluation(tmp_path / "text.txt")
    both = sleb("eval out/sleb_plan.json --json --model", model, *text)
    alone = sleb("eval out --json", *text)
    assert "with its own weights" in both.said
    assert "The routers were recovered on text.txt" in alone.said
    (pruned,) = both.data["texts"][0]["pruned"]
    assert pruned["losses"] == alone.data["texts"][0]["dense"]["losses"]
    other = sleb("eval out/sleb_plan.json --remove 2 --model", model, *text, code=2)
    assert "without 4 of the 8 experts of each block, and has no other size" in other.said


def test_an_interrupted_healing_resumes_to_the_same_bytes(healed, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", experts_config("mixtral"))
    healed(model, "-o whole")
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 3)
        healed(model, code=130)
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 1)
        other = healed(model, "--remove 3", code=130)
    assert "Continuing an interrupted healing" not in other.stderr
    assert "Continuing an interrupted healing, after 1,024 tokens" in healed(model).stderr
    assert weight_bytes_of(tmp_path / "whole") == weight_bytes_of(tmp_path / "out")


def test_without_a_gain_the_routers_stay(sleb, healed, tmp_path, monkeypatch):
    rising = count(1.0)
    monkeypatch.setattr(Distillation, "divergence", lambda *of: next(rising))
    healed(save_model(tmp_path / "model", experts_config("gpt_oss")))
    assert not changed_weights(sleb)


REFUSED = [
    ("--stream", "--heal and --stream cannot be combined: healing trains the model"),
    ("--recover", "--recover does not apply to plan.json, a plan that removes experts"),
    ("--source model.gguf", "new values are written to a checkpoint, not to a GGUF file"),
]


def test_what_cannot_be_healed_is_refused(healed, tmp_path):
    model = save_model(tmp_path / "model", experts_config("mixtral"))
    for options, words in REFUSED:
        assert words in healed(model, options, code=2).said
