"""`sleb search --holdout`: some sequences are never searched on, and show what the others hide."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import calibration
from reference import plain_loss
from sleb_cli.engine.search.journal import journal_of
from sleb_cli.engine.text.calibration import draw
from sleb_cli.engine.text.windows import cut_windows
from sleb_cli.plan import read_plan


@pytest.mark.parametrize("options", [(), ("--metric", "cosine"), ("--fast",), ("--strategy", "refine")])
def test_both_losses_are_those_of_running_the_model_on_either_part(run_sleb, tiny_llama, text_file, tmp_path, options):
    settings = [*calibration(text_file, samples=10), "--remove", 2, "--holdout", "0.3"]
    result = run_sleb("search", tiny_llama, *settings, *options)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert (plan.search.holdout, plan.search.held_out, plan.calibration.sequences) == (0.3, 3, 10)
    assert "10 x 32 tokens (3 of them held out)" in result.stdout
    model, tokenizer = (kind.from_pretrained(tiny_llama) for kind in (AutoModelForCausalLM, AutoTokenizer))
    windows = cut_windows(tokenizer, text_file.read_text(), 32, bos=False)
    sequences = windows[draw(len(windows), 10, 0)]
    with torch.inference_mode():
        for record, removed in zip([plan.dense, *plan.steps], [(), *plan.by_size], strict=True):
            searched = plain_loss(model, model.model.layers, sequences[:7], set(removed))
            held_out = plain_loss(model, model.model.layers, sequences[7:], set(removed))
            assert math.log(record.perplexity) == pytest.approx(searched, abs=1e-5)
            assert record.held_out.loss == pytest.approx(held_out, abs=1e-5)
            assert record.held_out.perplexity == pytest.approx(math.exp(held_out), rel=1e-5)
            grown = (held_out - plan.dense.held_out.loss) - (searched - math.log(plan.dense.perplexity))
            assert record.held_out.generalization_gap == pytest.approx(grown, abs=1e-5)


def test_the_search_itself_is_that_of_the_others_alone(run_sleb, tiny_llama, text_file, tmp_path):
    """What is held out decides nothing: whatever stands there, the steps are the same."""
    words = " silver wool market clock river mountain snow" * 60
    plans = {}
    for name, tail in (("a", words), ("b", " ".join(reversed(words.split(" "))))):
        (tmp_path / f"{name}.txt").write_text(text_file.read_text()[:6000] + tail)
        settings = [*calibration(f"{name}.txt", samples=60), "--holdout", "0.5", "--remove", 2, "-o", f"{name}.json"]
        assert run_sleb("search", tiny_llama, *settings).exit_code == 0
        plans[name] = read_plan(tmp_path / f"{name}.json")
    strip = {"held_out": None}
    steps = [[step.model_copy(update=strip) for step in plan.steps] for plan in plans.values()]
    assert plans["a"].calibration.tokens_sha256 != plans["b"].calibration.tokens_sha256
    assert steps[0] == steps[1]


def test_without_it_no_number_speaks_of_it(run_sleb, tiny_llama, text_file):
    result = run_sleb("search", tiny_llama, *calibration(text_file), "--remove", 1, "--json")
    plan = json.loads(result.stdout)
    assert (plan["search"]["holdout"], plan["search"]["held_out"]) == (0.0, 0)
    assert plan["dense"]["held_out"] is plan["steps"][0]["held_out"] is None


def test_an_extended_plan_keeps_what_it_held_out(run_sleb, tiny_llama, text_file, tmp_path):
    settings = [*calibration(text_file, samples=10), "--holdout", "0.2"]
    for remove, name in ((2, "two"), (3, "three")):
        assert run_sleb("search", tiny_llama, *settings, "--remove", remove, "-o", f"{name}.json").exit_code == 0
    result = run_sleb("search", tiny_llama, "--extend", "two.json", "--remove", 3)
    assert result.exit_code == 0, result.stderr
    extended, three = read_plan(tmp_path / "two.json"), read_plan(tmp_path / "three.json")
    assert extended.dense == three.dense
    assert [step.held_out.loss for step in extended.steps] == [step.held_out.loss for step in three.steps]
    other = run_sleb("search", tiny_llama, "--extend", "three.json", "--remove", 4, "--holdout", "0.5")
    assert other.exit_code == 3
    assert "search.holdout: 0.5, not 0.2" in other.stderr


def test_resumed_it_measures_nothing_twice(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch):
    settings = [*calibration(text_file, samples=8), "--holdout", "0.25", "--remove", 2, "--batch-size", 2]
    monkeypatch.setattr("sleb_cli.engine.search.journal.delete_journal", lambda *of: None)
    assert run_sleb("search", tiny_llama, *settings, "-q").exit_code == 0
    journal = journal_of(tmp_path / "plan.json")
    before = journal.read_bytes()
    assert run_sleb("search", tiny_llama, *settings, "--resume", "--force", "-q").exit_code == 0
    assert journal.read_bytes() == before


def test_where_the_losses_part_the_search_warns(run_sleb, shared_data, tmp_path):
    """Searched on one word, which is guessed better without a block, and held out is what the model was trained on."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    (tmp_path / "text.txt").write_text("the " * 1600 + story * 40)
    settings = ["--calibration", "text.txt", "--sequence-length", 32, "--remove", 1, "--holdout", "0.3"]
    result = run_sleb("search", shared_data / "models" / "stories260K", *settings, "--samples", 40)
    assert result.exit_code == 0, result.stderr
    step = read_plan(tmp_path / "plan.json").steps[0]
    assert step.held_out.overfits
    assert "The search overfits its calibration text from step 1" in result.stderr
    assert f"{step.held_out.generalization_gap:.3f} nats per token more" in result.stderr
    assert "held out" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--holdout", "1"), "--holdout 1 is not a share"),
        (("--holdout", "-0.1"), "--holdout -0.1 is too small"),
        (("--holdout", "nan"), "--holdout nan is not a number"),
        (("--holdout", "x"), "--holdout"),
        (("--holdout", "0.2", "--samples", 1), "A single calibration sequence cannot be split"),
    ],
)
def test_what_cannot_be_held_out_is_refused(run_sleb, tiny_llama, text_file, options, message):
    result = run_sleb("search", tiny_llama, *calibration(text_file), "--remove", 1, *options)
    assert result.exit_code == 2
    assert message in result.stderr
