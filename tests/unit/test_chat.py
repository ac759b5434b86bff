"""Conversations as calibration sequences: written by the chat template, and which of their tokens
count.
"""

import json
import re
from itertools import cycle

import datasets
import pytest

from chat_templates import PUBLISHED
from conftest import architecture_of, tokenizer_with
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.chat import cut_answers, cut_conversations, render
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import Text
from sleb_plugins import DataError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}GENERATION{{ m.content }}</s>ENDGENERATION{% else %}{{ "
    "m.content }}</s>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<s>{{ 'assistant\\n' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("ENDGENERATION", "").replace("GENERATION", "")
MARKED = TEMPLATE.replace("ENDGENERATION", "{% endgeneration %}").replace(
    "GENERATION", "{% generation %}"
)

CONVERSATION = [
    {"role": "system", "content": "river mountain"},
    {"role": "user", "content": "snow water stone"},
    {"role": "assistant", "content": "bridge town"},
    {"role": "user", "content": "mill fish"},
    {"role": "assistant", "content": "field winter spring"},
]


def cut(template, conversations, length, *, answers=False, required=None):
    tokenizer = tokenizer_with(template)
    rendered = [render(tokenizer, each, "chat.jsonl", answers=answers) for each in conversations]
    return cut_conversations(rendered, "chat.jsonl", length, answers=answers, required=required)


def written(tokenizer, conversation):
    """Write it by hand."""
    text = "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in conversation)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_all_tokens_of_a_conversation_count():
    for template in (PLAIN, "{{ messages | length }}" + PLAIN):
        sequences, loss_mask = cut(template, [CONVERSATION], 40)
        assert sequences.shape == (1, 40)
        assert loss_mask is None


@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize(
    "template", [PLAIN, MARKED], ids=["by prompts", "by the template's own marks"]
)
def test_answers_count_up_to_the_token_that_ends_them(template, has_offsets, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", has_offsets)
    tokenizer = tokenizer_with(template)
    ids = written(tokenizer, CONVERSATION)
    sequences, loss_mask = cut(template, [CONVERSATION], len(ids), answers=True)
    assert sequences.tolist() == [ids]
    assert tokenizer.decode(sequences[0][loss_mask[0]]) == "bridge town</s>field winter spring</s>"
    assert tokenizer.decode(sequences[0][~loss_mask[0]]).count("<s>assistant\n") == 2


@pytest.mark.parametrize("template", PUBLISHED.values(), ids=PUBLISHED)
def test_answers_are_found_in_published_templates(template):
    tokenizer, cuts = template.tokenizer, "</think>" in template.text
    system = (
        [{"role": "system", "content": "stone"}]
        if "stone" in template.opening + template.last
        else []
    )
    thought, cut = "<think>\nriver\n</think>\n\nfield", "<think>\nking\n</think>bridge"
    noted = {
        "reasoning_content": "river",
        "thinking": "river",
    }  # older transformers does not take one for the other
    for expected, last, first in [
        (template.last, {"content": "field"}, {"content": "bridge"}),
        (template.thinking, {"content": "field", **noted}, {"content": "bridge"}),
        (
            template.inside,
            {"content": thought},
            {"content": cut if cuts else "bridge", "thinking": "king"},
        ),
    ]:
        turn = [{"role": "user", "content": "snow"}, {"role": "assistant", **first}]
        later = [{"role": "user", "content": "mill"}, {"role": "assistant", **last}]
        one, several = [*system, *later], [*system, *turn, *later]
        assert render(tokenizer, one, "", answers=True) == tokens_of(
            tokenizer, template.opening + expected
        )
        text = template.opening + template.earlier + expected
        assert render(tokenizer, several, "", answers=True) == tokens_of(tokenizer, text)


def tokens_of(tokenizer, text):
    """Return the tokens of a text, and whether they stand in brackets."""
    pieces = [(piece, at % 2 == 1) for at, piece in enumerate(re.split("[⟦⟧]", text))]
    return [
        (t, own)
        for piece, own in pieces
        for t in tokenizer(piece, add_special_tokens=False).input_ids
    ]


PHI4_ASKED = "<|im_start|>user<|im_sep|>snow<|im_end|><|im_start|>assistant<|im_sep|>"


@pytest.mark.parametrize(
    ("name", "contents", "text"),
    [
        ("qwen3", ["<think>\nriver\n</think>"], "⟦<think>\nriver\n</think>\n\n<|im_end|>⟧\n"),
        ("gemma3", ["  snow\n"], "⟦snow<end_of_turn>⟧\n"),
        ("phi4", [" snow snow\n"], "⟦ snow snow\n<|im_end|>⟧"),
        ("phi4", ["assistant"], "⟦assistant<|im_end|>⟧"),
        ("phi4", ["", "snow", "field"], f"⟦<|im_end|>⟧{PHI4_ASKED}⟦field<|im_end|>⟧"),
        (
            "phi4",
            ["town", None, "field"],
            "⟦town<|im_end|>⟧<|im_start|>assistant<|im_sep|>⟦field<|im_end|>⟧",
        ),
    ],
)
def test_all_of_an_answer_counts_whatever_its_words(name, contents, text):
    tokenizer, roles = PUBLISHED[name].tokenizer, cycle(["assistant", "user"])
    turns = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    talk = [
        {"role": "user", "content": "mill"},
        *(turn for turn in turns if turn["content"] is not None),
    ]
    opened = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, talk, "", answers=True) == tokens_of(tokenizer, opened + text)


@pytest.mark.parametrize(("most", "found"), [(None, 3), (2, 2), (9, 3)])
def test_windows_of_answers_know_their_conversations(most, found):
    tokenizer, talks = tokenizer_with(PLAIN), [CONVERSATION[:3], CONVERSATION] * 9
    numbered = [
        (number, *each)
        for number, talk in enumerate(talks)
        for each in render(tokenizer, talk, "", answers=True)
    ]
    size = sum(number < 2 for number, _, _ in numbered)
    windows = cut_answers(
        tokenizer, Text("talks", "", limit=3, conversations=tuple(talks)), size - 1, most
    )
    rows = [numbered[at * size : (at + 1) * size - 1] for at in range(found)]
    assert windows.ids.tolist() == [[token for _, token, _ in row] for row in rows]
    assert windows.counted.tolist() == [[own for _, _, own in row[1:]] for row in rows]
    assert windows.clusters.tolist() == [[number for number, _, _ in row[1:]] for row in rows]
    assert windows.bos == "windows"
    with pytest.raises(DataError, match="too few for a sequence of 9000 with an answer in it"):
        cut_answers(tokenizer, windows.text, 9000, most)


LONG = [{"role": "user", "content": "river " * 90}, {"role": "assistant", "content": "stone"}]


def test_each_sequence_begins_a_conversation_and_has_an_answer():
    tokenizer = tokenizer_with(PLAIN)
    short = [{"role": "user", "content": "snow"}, {"role": "assistant", "content": "water"}]
    sequences, loss_mask = cut(
        PLAIN, [short, short, LONG, short, CONVERSATION, short], 60, answers=True
    )
    first, second = (
        written(tokenizer, short) * 2 + written(tokenizer, LONG),
        written(tokenizer, short + CONVERSATION),
    )
    assert sequences.tolist() == [first[:60], second[:60]]
    assert loss_mask[:, 1:].any(1).all()
    only_questions, _ = cut(PLAIN, [LONG, CONVERSATION], 60, answers=True)
    assert only_questions.tolist() == [written(tokenizer, CONVERSATION)[:60]]


@pytest.mark.parametrize(
    ("template", "conversations", "length", "options", "message"),
    [
        (PLAIN, [], 40, {}, r"chat\.jsonl have 0 tokens, too few for a sequence of 40 tokens"),
        (PLAIN, [LONG], 40, {"required": 2}, "text for 1 sequences of 40 tokens, not for 2"),
        (
            "{{ raise_exception('no user') }}",
            [CONVERSATION],
            40,
            {},
            r"conversation of chat\.jsonl: no user",
        ),
        (
            PLAIN.replace("messages", "messages[-1:]"),
            [CONVERSATION],
            40,
            {"answers": True},
            "answers cannot be found",
        ),
        (
            PLAIN.replace("content", "content[:9]"),
            [CONVERSATION],
            40,
            {"answers": True},
            "changes words",
        ),
    ],
)
def test_conversations_that_cannot_be_cut_are_refused(
    template, conversations, length, options, message
):
    with pytest.raises(DataError, match=message):
        cut(template, conversations, length, **options)


@pytest.mark.parametrize(
    "line",
    ["{", '{"text": "a"}', '{"messages": []}', '{"messages": ["a"]}', '{"messages": [{"role": '
                                                                      '"user"}]}',
     '{"messages": [{"role": "user", "content": "\\ud800"}]}'],
)  # fmt: skip
def test_a_line_that_is_no_conversation_is_named(tmp_path, line):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n\n" + line)
    with pytest.raises(DataError, match=r"ine 3 of chat\.jsonl"):
        text_source("chat.jsonl").conversations(samples=1, length=10, seed=0)


def test_a_data_set_gives_its_column_of_messages(monkeypatch):
    talk = [
        *CONVERSATION[:-1],
        {**CONVERSATION[-1], "thinking": "king"},
    ]  # a field that other messages lack
    rows = datasets.Dataset.from_dict({"messages": [talk] * 50, "other": [[]] * 50})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    found = text_source("org/chat").conversations(samples=1, length=30, seed=0)
    characters = sum(len(message["content"]) for message in CONVERSATION)
    assert found == [talk] * -(-2 * 30 * 8 // min(characters, 30 * 8))
    with pytest.raises(DataError, match="A row of org/chat:train:other cannot be read: messages"):
        text_source("org/chat:::other").conversations(samples=1, length=30, seed=0)


def test_the_mask_stays_with_its_sequences(tiny_llama, tmp_path):
    tokenizer = tokenizer_with(PLAIN)
    for name, word in (("a.jsonl", "river"), ("b.jsonl", "snow")):
        answer = {"role": "assistant", "content": word}
        turns = [
            [{"role": "user", "content": "mill " * (number % 5)}, answer] for number in range(40)
        ]
        (tmp_path / name).write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    settings = resolve_calibration(
        architecture_of(tiny_llama), "a.jsonl:0.5,b.jsonl:0.5", 6, 48, chat="answers"
    )
    (calibration,) = calibrate([settings], tokenizer, pytest.fail, lambda event: None)
    assert (calibration.record.bos, calibration.record.chat) == (True, "answers")
    pairs = list(zip(calibration.sequences, calibration.loss_mask, strict=True))
    assert [tokenizer.decode(ids[own]).split("</s>")[0] for ids, own in pairs] == [
        "river",
        "snow",
    ] * 3
    before, after = (
        [*zip(each.sequences.tolist(), each.loss_mask.tolist(), strict=True)]
        for each in (calibration, calibration.shuffled())
    )
    assert len({str(own) for _, own in before}) > 2
    assert after != before
    assert sorted(after) == sorted(before)
