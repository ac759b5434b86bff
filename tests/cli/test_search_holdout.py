"""`sleb search --holdout`: some sequences are never searched on, and show what the others hide."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import calibration_sequences
from reference import plain_loss
from sleb_cli.plan import read_plan


@pytest.mark.parametrize("options", [("--metric", "cosine"), ("--fast",), ("--strategy", "refine")])
def test_both_losses_are_those_of_the_model_on_either_part(
    search, tiny_llama, text_file, tmp_path, options
):
    shown = search("--remove 2 --holdout 0.3", *options, samples=10).stdout
    plan = read_plan(tmp_path / "plan.json")
    assert (plan.search.holdout, plan.search.held_out, plan.calibration.sequences) == (0.3, 3, 10)
    assert "10 x 32 tokens (3 of them held out)" in shown
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    sequences = calibration_sequences(tiny_llama, text_file, 10)
    with torch.inference_mode():
        for record, removed in zip([plan.dense, *plan.steps], [(), *plan.size_keys], strict=True):
            parts = sequences.split(7)
            searched, held_out = (
                plain_loss(model, model.model.layers, part, set(removed)) for part in parts
            )
            assert math.log(record.perplexity) == pytest.approx(searched, abs=1e-5)
            assert record.held_out.loss == pytest.approx(held_out, abs=1e-5)
            assert record.held_out.perplexity == pytest.approx(math.exp(held_out), rel=1e-5)
            grown = (held_out - plan.dense.held_out.loss) - (
                searched - math.log(plan.dense.perplexity)
            )
            assert record.held_out.generalization_gap == pytest.approx(grown, abs=1e-5)


def test_what_is_held_out_decides_nothing(found, text_file, tmp_path):
    words, plans = " silver wool market clock river mountain snow" * 60, []
    for tail in (words, " ".join(reversed(words.split(" ")))):
        (tmp_path / "t.txt").write_text(text_file.read_text()[:6000] + tail)
        plans.append(found("--holdout 0.5 --remove 2", text="t.txt", samples=60))
    steps = [[step.model_copy(update={"held_out": None}) for step in plan.steps] for plan in plans]
    assert plans[0].calibration.tokens_sha256 != plans[1].calibration.tokens_sha256
    assert steps[0] == steps[1]


def test_an_extended_plan_keeps_what_it_held_out(search, sleb, tiny_llama, tmp_path):
    for remove, name in ((2, "two"), (3, "three")):
        search("--holdout 0.2 --remove", remove, "-o", f"{name}.json", samples=10)
    sleb("search", tiny_llama, "--extend two.json --remove 3")
    extended, three = read_plan(tmp_path / "two.json"), read_plan(tmp_path / "three.json")
    assert extended.dense == three.dense
    assert [step.held_out.loss for step in extended.steps] == [
        step.held_out.loss for step in three.steps
    ]
    told = sleb("search", tiny_llama, "--extend three.json --remove 4 --holdout 0.5", code=3).stderr
    assert "search.holdout: 0.5, not 0.2" in told


def test_where_the_losses_part_the_search_warns(search, shared_data, tmp_path):
    """Searched on one word, which is guessed better without a block, and held out is what the model
    was trained on.
    """
    story = "Once upon a time, there was a little girl named Lily. "
    story += "She loved to play outside in the park. "
    (tmp_path / "text.txt").write_text("the " * 1600 + story * 40)
    model = shared_data / "models" / "stories260K"
    result = search("--remove 1 --holdout 0.3", model=model, text="text.txt", samples=40)
    step = read_plan(tmp_path / "plan.json").steps[0]
    assert step.held_out.overfits
    assert "The search overfits its calibration text from step 1" in result.stderr
    assert f"{step.held_out.generalization_gap:.3f} nats per token more" in result.stderr
    assert "held out" in result.stdout
