"""On models that were trained, where a removal means something."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import calibration
from reference import plain_loss, plain_search
from sleb_cli.engine.text.calibration import draw
from sleb_cli.engine.text.windows import adds_bos, cut_windows

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day she saw a "
    "big dog. The dog was sad because it had lost its ball. Lily helped the dog to find the ball, and they were happy.",
    "Tom had a red car. He liked to push it and make it go fast. His mom said, be careful with your car. Tom did not "
    "listen, and the car hit the wall. Tom was sad. His mom gave him a hug, and they fixed the car together.",
]


def test_a_search_finds_what_plain_pytorch_finds(run_sleb, shared_data, tmp_path):
    folder, text = shared_data / "models" / "stories260K", tmp_path / "stories.txt"
    text.write_text("\n\n".join(STORIES * 3))
    settings = [*calibration(text, 6, 64), "--remove", 3, "--dtype", "float32", "--json"]
    result = run_sleb("search", folder, *settings)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = cut_windows(tokenizer, text.read_text(), 64, bos=adds_bos(tokenizer))
    sequences = windows[draw(len(windows), 6, 0)]
    removals, steps = plain_search(model, model.model.layers, sequences, 3)
    assert plan["removals"] == removals
    assert plan["dense"]["loss"] == pytest.approx(plain_loss(model, model.model.layers, sequences, set()), abs=1e-5)
    for step, losses in zip(plan["steps"], steps, strict=True):
        assert step["scores"] == pytest.approx({str(block): loss for block, loss in losses.items()}, abs=1e-5)
    assert plan["calibration"]["bos"] is True
    assert plan["dense"]["perplexity"] < 10
    result = run_sleb("apply", "--remove", 1, "-o", "out", "--json")
    assert json.loads(result.stdout)["proof"]["logits_difference"] == 0


@pytest.mark.slow
def test_smollm2_from_plan_to_checkpoint(run_sleb, smollm2, shared_data, tmp_path):
    """The chain as the README shows it, with known blocks: the checkpoint's own perplexity is what eval says."""
    text = tmp_path / "test.txt"
    text.write_text((shared_data / "text" / "enwiki_test.txt").read_text()[:12_000])
    options = ["--perplexity", text, "--sequence-length", 512, "--dtype", "float32", "--json"]
    result = run_sleb("eval", smollm2, "--blocks", "14,4", *options)
    assert result.exit_code == 0, result.stderr
    (measured,) = json.loads(result.stdout)["texts"]
    dense, pruned = (found["perplexity"] for found in (measured["dense"], *measured["pruned"]))
    assert 10 < dense < pruned < 60
    assert run_sleb("apply", smollm2, "--blocks", "14,4", "-o", "out").exit_code == 0
    (stored,) = json.loads(run_sleb("eval", "out", *options).stdout)["texts"]
    assert stored["dense"]["perplexity"] == pytest.approx(pruned, rel=1e-6)
