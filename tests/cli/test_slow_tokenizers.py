"""Models whose tokenizer is plain Python, without a fast version."""

import json
import math
import string

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, CTRLTokenizer

from conftest import calibration, evaluation, llama_config, save_model
from reference import plain_loss
from sleb_cli.plan import read_plan


def with_tokenizer(folder, tokenizer):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    assert not AutoTokenizer.from_pretrained(folder).is_fast
    return folder


def plain_perplexity(folder, text):
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[: 4 * 32]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return math.exp(plain_loss(model, model.model.layers, torch.tensor(ids).view(4, 32), set()))


def test_a_slow_tokenizer_goes_from_plan_to_checkpoint(search, sleb, text_file, tmp_path):
    """The model has more tokens than its tokenizer, which cannot decode them."""
    config = llama_config(5, vocab_size=400, bos_token_id=None)
    folder = with_tokenizer(save_model(tmp_path / "bytes", config), ByT5Tokenizer())
    search("--remove 2 --sample-tokens 20", model=folder)
    assert read_plan(tmp_path / "plan.json").sample_generation
    sleb("apply -o out --recover --no-heal", *calibration(text_file, samples=10))
    for each in (folder, tmp_path / "out"):
        result = sleb("eval", each, *evaluation(text_file), "--json")
        measured = result.data["texts"][0]
        assert measured["tokens"] == 4 * 31
        assert measured["dense"]["perplexity"] == pytest.approx(
            plain_perplexity(each, text_file.read_text())
        )


def test_models_with_slow_tokenizers_are_compared(sleb, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[: 4 * 32 - 1])  # the tokenizer appends EOS
    config = llama_config(3, vocab_size=400, bos_token_id=None)
    parent = with_tokenizer(save_model(tmp_path / "parent", config), ByT5Tokenizer())
    other = with_tokenizer(save_model(tmp_path / "other", config, seed=1), ByT5Tokenizer())
    result = sleb("eval", other, "--against", parent, *evaluation(text), "--json")
    (measured,) = result.data["texts"]
    assert measured["windows"] == 4
    assert measured["pruned"][0]["perplexity"] == pytest.approx(
        plain_perplexity(other, text.read_text()), rel=1e-4
    )


def test_tasks_that_write_need_a_token_that_ends_a_text(sleb, tmp_path):
    vocabulary = {"<unk>": 0} | {letter: n for n, letter in enumerate(string.printable.strip(), 1)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    letters = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    folder = with_tokenizer(save_model(tmp_path / "letters", llama_config(3)), letters)
    result = sleb("eval", folder, "--tasks sleb_sums --limit 2", code=2)
    assert "sleb_sums has the model write text, but the tokenizer has no EOS token" in result.stderr
