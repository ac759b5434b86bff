"""Conversations that a model writes: where its template lets it speak, and what is kept of it."""

import random
import re
from itertools import cycle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import sleb_cli.engine.text.writing as text_writing
from chat_templates import PUBLISHED, PUBLISHED_TOKENIZERS, tokens_of
from conftest import llama_config, random_model, tokenizer_with
from families import tiny_config
from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.chat import apply_template
from sleb_cli.engine.text.own_chat import _Writer
from sleb_cli.events import Notice, ignore
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import TextSplit
from sleb_plugins import DataError, UnsupportedModelError, UsageError
from texts import talk, text_settings, write_lines

TURNS = tokenizer_with(
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SYSTEM = tokenizer_with("<s>system: mill</s>" + TURNS.chat_template)
WORDS = tokenizer_with(
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LONG = " ".join(f"snow{number}" for number in range(99))


@pytest.fixture(scope="module")
def model():
    """A random model that ends its messages soon, as a tenth of all tokens end them."""
    model = random_model(llama_config(2))
    model.generation_config.eos_token_id = [1, *range(40, 80)]
    return model


def written(tokenizer, conversations):
    return [tokenizer.decode([token for token, _ in each]) for each in conversations]


def wrote(tokenizer, prompts, *says, count=1, length=60, size=1):
    """Let a model that says these in turn, over and over, write conversations.

    Return them, what it was given each time, and how many were dropped.
    """
    turns = cycle(says)
    given = []

    def more(prompts, new, forbidden, ends):
        given.extend(map(tokenizer.decode, prompts))
        said = []
        for _ in prompts:
            words = []
            for token in tokenizer(next(turns), add_special_tokens=False).input_ids[:new]:
                words.append(token)
                if token in ends:
                    break
            said.append(words)
            assert not forbidden & set(words)
        assert 0 in forbidden  # <s>
        assert all(tokenizer.added_tokens_decoder[token].special for token in forbidden)
        assert 1 <= new <= length - min(map(len, prompts))
        return said

    model = random_model(llama_config(1))
    writer = _Writer(model, tokenizer, "self-chat", length, more)
    return writer.write(count, size, prompts), given, writer.dropped


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt", "mamba", "qwen3_next"])
def test_texts_that_have_ended_leave_the_others_as_they_are(monkeypatch, model_type):
    model = random_model(tiny_config(model_type))
    noise = torch.randn(320, 320, generator=torch.Generator().manual_seed(0))
    # The next token depends on the model and on the last one, and on no other text.
    draw = lambda ids, scores, forbidden: scores + noise[ids[:, -1]]  # noqa: E731
    monkeypatch.setattr(text_writing, "draw_tokens", draw)
    watched = Mock(side_effect=generate)
    monkeypatch.setattr(text_writing, "generate", watched)

    def continued(prompts):
        ends = set(range(0, 320, 8))
        return text_writing.continue_prompts(model, lambda *_: None, prompts, 24, ends=ends)

    draws = random.Random(0)
    prompts = [draws.choices(range(320), k=length) for length in (3, 9, 4, 4, 7, 2, 8, 5)]
    together = continued(prompts)
    _, *later = watched.mock_calls
    assert len(later[0].args[1]) < 8
    has_cache = not later[0].kwargs.keys().isdisjoint({"cache", "past_key_values"})
    assert has_cache == (model_type not in ("mamba", "qwen3_next"))
    assert together == [continued([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("tokenizer", "opening", "asked", "question"),
    [
        (TURNS, "<s>user: ", "<s>user: river</s><s>assistant: ", "river</s>"),
        (SYSTEM, "<s>system: mill</s><s>user: ", "river</s><s>assistant: ", "river</s>"),
        (WORDS, "[INST] ", "[INST] river [/INST]", "river [/INST] and [/INST] more"),
        (
            PUBLISHED_TOKENIZERS["r1"],
            "<s><｜User｜>",
            "river<｜Assistant｜><think>\n",
            "river<｜Assistant｜>",
        ),
    ],
    ids=["a token ends it", "a system prompt", "words end it", "no special token ends it"],
)
def test_the_model_speaks_where_its_template_puts_words(tokenizer, opening, asked, question):
    (found,), (first, second), _ = wrote(tokenizer, iter(()), question, LONG)
    assert first == opening
    assert second.startswith(opening)
    assert second.endswith(asked)
    assert tokenizer.decode([token for token, own in found if not own]) == second
    answer = tokenizer.decode([token for token, own in found if own])
    assert LONG.startswith(answer)
    assert tokenizer.decode([token for token, _ in found]) == second + answer


def test_useless_conversations_are_dropped_and_counted():
    questions = ["town</s>", "town</s>", "river " * 6 + "</s>", "</s>", "mill stone", "bridge</s>"]
    found, _, dropped = wrote(TURNS, iter(()), *questions, LONG, LONG, count=2, length=40, size=6)
    assert dropped == 4
    for text, word in zip(written(TURNS, found), ("town", "bridge"), strict=True):
        assert text.startswith(f"<s>user: {word}</s><s>assistant: snow0 snow1")


@pytest.mark.parametrize("name", PUBLISHED)
def test_thoughts_and_answers_stay_as_the_model_wrote_them(name):
    template, tokenizer = PUBLISHED[name], PUBLISHED_TOKENIZERS[name]
    asked = talk("mill")
    found, given, _ = wrote(tokenizer, cycle([asked]), template.written, length=120, size=2)
    prompt = apply_template(tokenizer, asked, "", tokenize=False, add_generation_prompt=True)
    assert set(given) == {prompt}
    space = "\n" if template.last.endswith("\n") else ""
    for conversation in found:
        assert conversation == tokens_of(tokenizer, f"{prompt}⟦{template.written}⟧{space}")


def test_a_model_that_writes_nothing_usable_is_refused(model):
    with pytest.raises(
        UnsupportedModelError, match="none of 64 conversations that the model wrote can be used"
    ):
        wrote(TURNS, iter(()), "never ends", size=2)
    Path("p.txt").write_text("river " * 60)
    asked = text_settings("answers:p.txt", chat="answers")
    with pytest.raises(UnsupportedModelError, match="or do not fit 48 tokens"):
        calibrate([asked], TURNS, lambda: model, ignore)


NOT_SHOWN = "does not show where the words of a user begin"


@pytest.mark.parametrize(
    ("template", "length", "message"),
    [
        (None, 48, "self-chat needs a chat template, but the tokenizer has none"),
        (TURNS.chat_template, 20, "of 20 tokens: the chat template alone takes 6"),
        ("{{ messages | length }}", 48, NOT_SHOWN),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", 48, NOT_SHOWN),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(model, template, length, message):
    own = text_settings("self-chat", length=length)
    with pytest.raises(UsageError, match=message):
        calibrate([own], tokenizer_with(template), lambda: model, ignore)


def test_learned_positions_end_with_the_sequence():
    model = random_model(tiny_config("gpt2"))
    assert model.config.max_position_embeddings == 128
    (found,) = calibrate([text_settings("self-chat", length=128)], TURNS, lambda: model, ignore)
    assert found.sequences.shape == (4, 128)
    # An answer that positions end within its sequence is no answer; that of the longest prompt of a
    # batch is.
    long = "fish " * 15
    prompts = cycle([talk("town"), talk(long)])
    found, _, dropped = wrote(TURNS, prompts, LONG, length=128, size=2)
    assert written(TURNS, found)[0].startswith(f"<s>user: {long}</s>")
    assert dropped == 1


def test_sequences_begin_conversations_and_are_cached_and_split(model):
    events = []
    splits = [text_settings("self-chat", count, chat="answers", writer="m") for count in (4, 2)]
    found = calibrate(splits, TURNS, lambda: model, events.append)
    again = calibrate(splits, TURNS, lambda: model, events.append)
    rows = torch.cat([text.sequences for text in found])
    assert torch.equal(rows, torch.cat([text.sequences for text in again]))
    texts = {TURNS.decode(row) for row in rows}
    assert len(texts) == 6
    assert all(text.startswith("<s>user: ") for text in texts)
    for text in found:
        assert text.loss_mask[:, 1:].any(1).all()
        assert not text.loss_mask.all()
    wrote, read = [event.text for event in events if isinstance(event, Notice)]
    begun, used, dropped = map(int, re.findall(r"(\d+) (?:conv|are used|did not end)", wrote))
    assert begun == used + dropped
    assert read.endswith("that the model wrote before, from the cache.")


def test_all_tokens_of_plain_text_count(model):
    Path("text.txt").write_text("river snow " * 400)
    mixed = text_settings("self-chat:0.5,text.txt:0.5", chat="answers")
    (found,) = calibrate([mixed], TURNS, lambda: model, ignore)
    for mask, origin in zip(found.loss_mask, found.origins, strict=True):
        assert bool(mask.all()) == (origin == "text.txt")


@pytest.mark.parametrize("name", ["lines.txt", "prompts.jsonl", "messages.jsonl"])
def test_prompts_are_read_and_answered_each_in_one_part(model, name):
    words = [f"word{number}" for number in range(20)]
    Path("lines.txt").write_text("\n\n".join(words))
    write_lines("prompts.jsonl", prompt=words)
    write_lines("messages.jsonl", messages=[talk(word, "no") for word in words])
    read = []
    for split in (TextSplit(0, 0.7), TextSplit(0.7, 1)):
        prompts = text_source(f"answers:{name}").prompts(split)
        read += prompts
        drawn = text_settings(f"answers:{name}", 3, split=split)
        (text,) = calibrate([drawn], TURNS, lambda: model, ignore)
        begins = tuple(f"<s>user: {asked['content']}</s><s>assistant: " for (asked,) in prompts)
        assert all(TURNS.decode(row).startswith(begins) for row in text.sequences)
    assert read == [talk(word) for word in words]


LINE = '{"messages": [{"role": "ROLE", "content": "a"}]}'
OF_ASSISTANT = '{"prompt": "a"}\n' + LINE.replace("ROLE", "assistant")
OF_SYSTEM = LINE.replace("ROLE", "system")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\ntwo", r"p\.txt has 2 prompts, but needs at least 10\."),
        ("p.jsonl", OF_ASSISTANT, r"Line 2 of p\.jsonl"),
        ("p.jsonl", OF_SYSTEM, r"Line 1 of p\.jsonl .* there is no prompt"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(name, content, message):
    Path(name).write_text(content)
    with pytest.raises(DataError, match=message):
        text_source(f"answers:{name}").prompts(TextSplit(0, 0.7))
