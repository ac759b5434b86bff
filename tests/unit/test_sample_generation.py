"""The text that two models generate after a prompt, and how much of it is repeated."""

from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import llama_config, random_model, tokenizer_with, train_tokenizer
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.quality.sample_generation import PROMPT, QUESTION, generate_sample, repetition
from sleb_cli.events import Notice, TaskAdvanced
from sleb_plugins import UnsupportedModelError

NEW_TOKENS = 6


def sample(model, tokenizer, removed=(1,)):
    events = []
    with SkippableModel(model, model.model.layers) as skippable:
        return generate_sample(
            skippable, tokenizer, removed, NEW_TOKENS, None, events.append
        ), events


def test_both_models_generate_what_transformers_does_greedily(shared_data):
    folder = shared_data / "models" / "stories260K"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    found, _ = sample(model, tokenizer, (2,))
    prompt = tokenizer(PROMPT, return_tensors="pt")
    after = prompt.input_ids.shape[1]

    def greedy():
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=False)
        return ids[0, after:].tolist()

    dense = greedy()
    with SkippableModel(model, model.model.layers) as skippable:
        skippable.skip({2})
        pruned = greedy()
    assert (found.dense, found.pruned) == (tokenizer.decode(dense), tokenizer.decode(pruned))
    assert found.dense != found.pruned
    assert (found.dense_repetition, found.pruned_repetition) == (
        repetition(dense),
        repetition(pruned),
    )


@pytest.mark.parametrize(
    ("template", "prompt", "verb"),
    [
        ("{{ messages[0].content }}<s>", QUESTION, "answer"),
        ("{{ raise_exception('no') }}", PROMPT, "continue"),
    ],
)
def test_a_chat_model_answers_a_question(template, prompt, verb, monkeypatch):
    read = []
    model = random_model(llama_config(3))
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **options: read.append(ids) or generate(ids, **options)
    )
    tokenizer = tokenizer_with(template)
    found, _ = sample(model, tokenizer)
    assert (found.prompt, found.verb) == (prompt, verb)
    ends = tokenizer.decode(read[0][0]).removeprefix(prompt)
    assert ends == ("<s>" if verb == "answer" else "")


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_if_the_cache_does_not_work_the_text_is_the_same(fault, monkeypatch):
    tokenizer, model = train_tokenizer(bos=False), random_model(llama_config(4))
    expected, _ = sample(model, tokenizer)

    def generate(prompt, **options):
        if fault == "raises":
            raise ValueError("the cache has a hole")
        return torch.cat([prompt, prompt[:, :5]], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    found, _ = sample(model, tokenizer)
    assert found == expected
    assert found.dense != found.pruned


def test_it_ends_where_the_text_ends():
    tokenizer, model = train_tokenizer(bos=False), random_model(llama_config(3))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are as likely: the first one is taken
    tokenizer.eos_token = "<s>"
    found, events = sample(model, tokenizer)
    assert (found.dense, found.dense_repetition) == ("", 0.0)
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == 2 * NEW_TOKENS


@pytest.mark.parametrize("case", ["strange tokens", "does not run"])
def test_a_model_that_cannot_generate_gets_a_notice(case, monkeypatch):
    tokenizer = train_tokenizer(bos=False)
    model = random_model(
        llama_config(3, **({"vocab_size": 30} if case == "strange tokens" else {}))
    )
    if case == "does not run":
        broken = UnsupportedModelError("llama does not run.", hint="")
        monkeypatch.setattr(SkippableModel, "logits", Mock(side_effect=broken))
    found, events = sample(model, tokenizer)
    assert found is None
    assert len([event for event in events if isinstance(event, Notice)]) == 1
