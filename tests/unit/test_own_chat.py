"""Conversations that a model writes: where its template lets it speak, and what is kept of it."""

import json
import random
import re
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from test_chat import tokens_of

import sleb_cli.engine.text.writing as text_writing
from chat_templates import PUBLISHED
from conftest import llama_config, random_model, tokenizer_with
from families import tiny_config
from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.chat import apply_template
from sleb_cli.engine.text.own_chat import _Writer
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import Notice, ignore
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import TextSplit
from sleb_plugins import DataError, UnsupportedModelError, UsageError

TURNS = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ "
    "m.content }}</s>"
    "{% endif %}{% endfor %}"
)
SYSTEM = "<s>system: mill</s>" + TURNS


@pytest.fixture
def model():
    """A random model that ends its messages soon, as a tenth of all tokens end them."""
    model = random_model(llama_config(2))
    model.generation_config.eos_token_id = [1, *range(40, 80)]
    return model


def settings(source, samples=4, length=48, **changes):
    own = CalibrationSettings(
        source, parse_mixture(source), samples, length, 0, None, samples_given=True
    )
    return replace(own, **changes)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def wrote(tokenizer, template_prompts, *says, count=2, length=40, size=4):
    """Let a model that says these in turn, over and over, write; return the conversations and what
    it was given.
    """
    if isinstance(tokenizer, str):
        tokenizer = tokenizer_with(tokenizer)
    writer, turns, given = (
        _Writer(random_model(llama_config(1)), tokenizer, "self-chat", length),
        cycle(says),
        [],
    )

    def more(prompts, new, forbidden, ends):
        given.extend(map(tokenizer.decode, prompts))
        said = [tokenizer(next(turns), add_special_tokens=False).input_ids[:new] for _ in prompts]
        said = [
            row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]
            for row in said
        ]
        assert 0 in forbidden  # <s>
        assert all(tokenizer.added_tokens_decoder[token].special for token in forbidden)
        assert not forbidden & {token for row in said for token in row}
        assert 1 <= new <= length - min(map(len, prompts))
        return said

    return writer.write(more, size, count, template_prompts), given, writer.dropped


def said_in(talk):
    return [(message["role"], message["content"]) for message in talk.messages]


@pytest.mark.parametrize(
    ("model_type", "caches"),
    [
        ("llama", True),
        ("gemma3_text", True),
        ("opt", True),
        ("mamba", False),
        ("qwen3_next", False),
    ],
)
def test_texts_that_have_ended_leave_the_others_as_they_are(monkeypatch, model_type, caches):
    model, ends, calls = random_model(tiny_config(model_type)), {*range(0, 320, 8)}, []
    noise = torch.randn(320, 320, generator=torch.Generator().manual_seed(0))
    # The next token depends on the model and on the last one, and on no other text.
    monkeypatch.setattr(
        text_writing, "draw_tokens", lambda ids, scores, forbidden: scores + noise[ids[:, -1]]
    )

    def watched(model, ids, *given, **options):
        calls.append((len(ids), bool(options.keys() & {"cache", "past_key_values"})))
        return generate(model, ids, *given, **options)

    monkeypatch.setattr(text_writing, "generate", watched)

    def written(some):
        return text_writing._continuing(model, lambda *_: None)(some, 24, ends=ends)

    draws = random.Random(0)
    prompts = [draws.choices(range(320), k=length) for length in (3, 9, 4, 4, 7, 2, 8, 5)]
    together, (first, *later) = written(prompts), calls
    assert first == (8, False)
    assert later[0][0] < 8
    assert {had_cache for _, had_cache in later} <= {caches}
    assert together == [written([prompt])[0] for prompt in prompts]


LONG = " ".join(f"snow{number}" for number in range(40))


@pytest.mark.parametrize(
    ("template", "asked", "answered", "question"),
    [
        (TURNS, "<s>user: ", "<s>user: river</s><s>assistant: ", "river</s>"),
        (
            SYSTEM,
            "<s>system: mill</s><s>user: ",
            "<s>system: mill</s><s>user: river</s><s>assistant: ",
            "river</s>",
        ),
        (WORDS, "[INST] ", "[INST] river [/INST]", "river [/INST] and [/INST] more"),
        (
            PUBLISHED["r1"].tokenizer,
            "<s><｜User｜>",
            "<s><｜User｜>river<｜Assistant｜><think>\n",
            "river<｜Assistant｜>",
        ),
    ],
    ids=[
        "a token ends a message",
        "a system prompt",
        "words end a message",
        "no special token ends a message",
    ],
)
def test_the_model_speaks_where_its_template_puts_words(template, asked, answered, question):
    found, given, _ = wrote(template, iter(()), question, LONG, count=1, size=1, length=60)
    assert given == [asked, answered]
    of_user, answer = said_in(found[0])
    assert (len(found), of_user) == (1, ("user", "river"))
    assert answer[0] == "assistant"
    assert LONG.startswith(answer[1])


def test_useless_conversations_are_dropped_and_counted():
    questions = [
        "town</s>",
        "town</s>",
        "river " * 6 + "</s>",
        "</s>",
        "mill stone water",
        "bridge</s>",
    ]
    found, _, dropped = wrote(TURNS, iter(()), *questions, LONG, LONG, count=2, size=6)
    assert [said_in(talk)[0][1] for talk in found] == ["town", "bridge"]
    assert dropped == 4
    assert all(said_in(talk)[1][1].startswith("snow0 snow1") for talk in found)


def test_a_short_conversation_gets_a_second_turn():
    says = [
        "town</s>",
        " stone</s>",
        "fish</s>",
        LONG,
        LONG,
    ]  # the second question to a new conversation has no end
    found, _, _ = wrote(TURNS, iter(()), *says, count=1, length=80, size=1)
    assert [role for role, _ in said_in(found[0])] == ["user", "assistant"] * 2
    tokenizer = tokenizer_with(TURNS)
    turns = "<s>user: town</s><s>assistant: ⟦ stone</s>⟧<s>user: fish</s><s>assistant: ⟦" + LONG
    assert found[0].tokens[:60] == tokens_of(tokenizer, turns)[:60]


ONLY_LAST = (
    "{% for m in messages %}<s>{{ m.role }}: {% if loop.last or m.role == 'user' %}{{ m.content "
    "}}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end", "answer"),
    [
        (ONLY_LAST, "</s>", "stone</s>"),
        (PUBLISHED["qwen3"].tokenizer, "<|im_end|>", "<think>\nking\n</think>\n\nstone<|im_end|>"),
        (PUBLISHED["phi4"].tokenizer, "<|im_end|>", "stone</s>"),
        (PUBLISHED["r1"].tokenizer, "<｜Assistant｜>", "king\n</think>\n\nstone</s>"),
    ],
)
def test_no_second_turn_where_the_template_would_change_the_first(template, end, answer):
    says = [each for number in range(40) for each in (f"town{number}{end}", answer)]
    found, _, _ = wrote(template, iter(()), *says, count=2, length=90, size=1)
    assert {len(talk.messages) for talk in found} == {2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_thoughts_and_answers_stay_as_the_model_wrote_them(name):
    template = PUBLISHED[name]
    own = [re.search("⟦(.*)⟧", text, re.DOTALL)[1] for text in (template.thinking, template.inside)]
    answer = "river\n</think>\n\nfield</s>" if name == "r1" else own["river" not in own[0]]
    answer = answer.replace("</s>", "") if name == "phi4-mini" else answer  # whose template adds it
    asked, tokenizer = [{"role": "user", "content": "mill"}], template.tokenizer
    found, given, _ = wrote(tokenizer, cycle([asked]), answer, count=1, length=120, size=2)
    assert given[0] == apply_template(
        tokenizer, asked, "", tokenize=False, add_generation_prompt=True
    )
    assert (given, found) == (given[:1] * len(found), found[:1] * len(given))
    space = "\n" if template.last.endswith("\n") else ""
    assert found[0].tokens == tokens_of(tokenizer, f"{given[0]}⟦{answer}⟧{space}")


def test_a_model_that_writes_nothing_usable_is_refused(model, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match="none of 64 conversations that the model wrote can be used"
    ):
        wrote(TURNS, iter(()), "never ends", count=1, size=2)
    (tmp_path / "p.txt").write_text("river " * 60)
    asked = settings("answers:p.txt", chat="answers")
    with pytest.raises(UnsupportedModelError, match="or do not fit 48 tokens"):
        calibrate([asked], tokenizer_with(TURNS), lambda: model, ignore)


@pytest.mark.parametrize(
    ("template", "length", "message"),
    [
        (None, 48, "self-chat needs a chat template, but the tokenizer has none"),
        (
            TURNS,
            20,
            "self-chat does not fit sequences of 20 tokens: the chat template alone takes 6",
        ),
        ("{{ messages | length }}", 48, "does not show where the words of a user begin"),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            48,
            "does not show where the words of a user begin",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(model, template, length, message):
    with pytest.raises(UsageError, match=message):
        calibrate(
            [settings("self-chat", length=length)], tokenizer_with(template), lambda: model, ignore
        )


def test_learned_positions_end_with_the_sequence():
    model, length = random_model(tiny_config("gpt2")), 128
    assert model.config.max_position_embeddings == length
    written = settings("self-chat", length=length)
    (found,) = calibrate([written], tokenizer_with(TURNS), lambda: model, ignore)
    assert found.sequences.shape == (4, length)
    # An answer that positions end within its sequence is no answer; that of the longest prompt of a
    # batch is.
    prompts = [[{"role": "user", "content": words}] for words in ("town", "fish " * 15)]
    says = " ".join(f"snow{number}" for number in range(99))
    found, _, dropped = wrote(TURNS, cycle(prompts), says, count=1, length=length, size=2)
    assert ([said_in(talk)[0][1] for talk in found], dropped) == ([prompts[1][0]["content"]], 1)


def test_sequences_begin_conversations_and_are_cached_and_split(model):
    tokenizer, events = tokenizer_with(TURNS), []
    splits = [settings("self-chat", count, chat="answers", writer="m") for count in (4, 2)]
    found, again = (calibrate(splits, tokenizer, lambda: model, events.append) for _ in range(2))
    for text, same in zip(found, again, strict=True):
        assert text.sequences.tolist() == same.sequences.tolist()
        assert all(tokenizer.decode(row).startswith("<s>user: ") for row in text.sequences)
        assert text.loss_mask[:, 1:].any(1).all()
        assert not text.loss_mask.all()
    assert not {*map(tuple, found[0].sequences.tolist())} & {
        *map(tuple, found[1].sequences.tolist())
    }
    told = [event.text for event in events if isinstance(event, Notice)]
    assert re.match(r"self-chat: the model wrote \d+ conversations", told[0])
    assert told[1].endswith("that the model wrote before, from the cache.")


def test_all_tokens_of_plain_text_count(model, tmp_path):
    (tmp_path / "text.txt").write_text("river snow " * 400)
    mixed = settings("self-chat:0.5,text.txt:0.5", chat="answers")
    (found,) = calibrate([mixed], tokenizer_with(TURNS), lambda: model, ignore)
    assert [bool(row.all()) for row in found.loss_mask] == [
        origin == "text.txt" for origin in found.origins
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\n\n".join(f"word{number}" for number in range(20))),
        ("p.jsonl", "\n".join(json.dumps({"prompt": f"word{number}"}) for number in range(20))),
        (
            "p.jsonl",
            "\n".join(
                json.dumps({"messages": talk(f"word{number}", "no")}) for number in range(20)
            ),
        ),
    ],
    ids=["lines", "prompts", "messages"],
)
def test_prompts_are_read_and_answered_each_in_one_part(model, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    parts = [
        text_source(f"answers:{name}").prompts(TextSplit(*ends)) for ends in ((0, 0.7), (0.7, 1))
    ]
    assert [[{"role": "user", "content": f"word{number}"}] for number in range(20)] == parts[
        0
    ] + parts[1]
    tokenizer = tokenizer_with(TURNS)
    splits = [
        settings(f"answers:{name}", 3, split=TextSplit(*ends)) for ends in ((0, 0.7), (0.7, 1))
    ]
    for text, prompts in zip(
        calibrate(splits, tokenizer, lambda: model, ignore), parts, strict=True
    ):
        begins = tuple(f"<s>user: {prompt[0]['content']}</s><s>assistant: " for prompt in prompts)
        assert all(tokenizer.decode(row).startswith(begins) for row in text.sequences)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\ntwo", r"p\.txt has 2 prompts, but needs at least 10\."),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"messages": [{"role": "assistant", "content": "a"}]}',
            r"Line 2 of p\.jsonl",
        ),
        (
            "p.jsonl",
            '{"messages": [{"role": "system", "content": "a"}]}',
            r"Line 1 of p\.jsonl .* there is no prompt",
        ),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        text_source(f"answers:{name}").prompts(TextSplit(0, 0.7))
