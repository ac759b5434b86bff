"""Conversations as calibration sequences: what the template writes, and which tokens count."""

import json
from pathlib import Path

import datasets
import pytest

from chat_templates import PUBLISHED, PUBLISHED_TOKENIZERS, tokens_of
from conftest import architecture_of, tokenizer_with
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.chat import cut_answers, cut_conversations, render
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import Draw, Text
from sleb_plugins import DataError
from texts import talk, write_lines

PLAIN = (
    "{% for m in messages %}<s>{{ m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}GENERATION{{ m.content }}</s>END"
    "{% else %}{{ m.content }}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{{ 'assistant\\n' }}{% endif %}"
)
MARKED = PLAIN.replace("GENERATION", "{% generation %}").replace("END{", "{% endgeneration %}{")
PLAIN = PLAIN.replace("GENERATION", "").replace("END{", "{")


CONVERSATION = [
    {"role": "system", "content": "river mountain"},
    *talk("snow water stone", "bridge town", "mill fish", "field winter spring"),
]
WRITTEN = (
    "<s>system\nriver mountain</s>\n<s>user\nsnow water stone</s>\n<s>assistant\n"
    "⟦bridge town</s>⟧\n<s>user\nmill fish</s>\n<s>assistant\n⟦field winter spring</s>⟧\n"
)
LONG = talk("river " * 90, "stone")


def cut(template, conversations, length, *, answers=True, required=None):
    tokenizer = tokenizer_with(template)
    rendered = [render(tokenizer, each, "chat.jsonl", answers=answers) for each in conversations]
    return cut_conversations(rendered, "chat.jsonl", length, answers=answers, required=required)


def test_all_tokens_of_a_conversation_count():
    for template in (PLAIN, "{{ messages | length }}" + PLAIN):
        sequences, loss_mask = cut(template, [CONVERSATION], 40, answers=False)
        assert sequences.shape == (1, 40)
        assert loss_mask is None


@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by marks", "by the template's mask"])
def test_answers_count_up_to_the_token_that_ends_them(template, has_offsets, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", has_offsets)
    tokenizer = tokenizer_with(template)
    assert render(tokenizer, CONVERSATION, "", answers=True) == tokens_of(tokenizer, WRITTEN)


@pytest.mark.parametrize("name", PUBLISHED)
def test_answers_are_found_in_published_templates(name):
    template, tokenizer = PUBLISHED[name], PUBLISHED_TOKENIZERS[name]
    system = []
    if "stone" in template.opening + template.last:
        system = [{"role": "system", "content": "stone"}]
    # Older transformers does not take one of these fields for the other.
    noted = {"reasoning_content": "river", "thinking": "river"}
    cut = "<think>\nking\n</think>bridge" if "</think>" in template.text else "bridge"
    for expected, last, first in [
        (template.last, {"content": "field"}, {"content": "bridge"}),
        (template.thinking, {"content": "field", **noted}, {"content": "bridge"}),
        (
            template.inside,
            {"content": "<think>\nriver\n</think>\n\nfield"},
            {"content": cut, "thinking": "king"},
        ),
    ]:
        turn = [{"role": "user", "content": "snow"}, {"role": "assistant", **first}]
        later = [{"role": "user", "content": "mill"}, {"role": "assistant", **last}]
        one, several = [*system, *later], [*system, *turn, *later]
        for messages, text in ((one, expected), (several, template.earlier + expected)):
            found = render(tokenizer, messages, "", answers=True)
            assert found == tokens_of(tokenizer, template.opening + text)


ONLY_THOUGHT = "<think>\nriver\n</think>"
PHI4_ASKED = "<|im_start|>user<|im_sep|>snow<|im_end|><|im_start|>assistant<|im_sep|>"
PHI4_AGAIN = "⟦town<|im_end|>⟧<|im_start|>assistant<|im_sep|>⟦field<|im_end|>⟧"


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("qwen3", talk("mill", ONLY_THOUGHT), f"⟦{ONLY_THOUGHT}\n\n<|im_end|>⟧\n"),
        ("gemma3", talk("mill", "  snow\n"), "⟦snow<end_of_turn>⟧\n"),
        ("phi4", talk("mill", " snow snow\n"), "⟦ snow snow\n<|im_end|>⟧"),
        ("phi4", talk("mill", "assistant"), "⟦assistant<|im_end|>⟧"),
        ("phi4", talk("mill", "", "snow", "field"), f"⟦<|im_end|>⟧{PHI4_ASKED}⟦field<|im_end|>⟧"),
        ("phi4", [*talk("mill", "town"), *talk("field", first="assistant")], PHI4_AGAIN),
    ],
)  # fmt: skip
def test_all_of_an_answer_counts_whatever_its_words(name, messages, text):
    tokenizer = PUBLISHED_TOKENIZERS[name]
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, messages, "", answers=True) == tokens_of(tokenizer, opened + text)


@pytest.mark.parametrize(("most", "found"), [(None, 3), (2, 2), (9, 3)])
def test_windows_of_answers_know_their_conversations(most, found):
    tokenizer, talks = tokenizer_with(PLAIN), [CONVERSATION[:3], CONVERSATION] * 9
    rendered = [render(tokenizer, each, "", answers=True) for each in talks]
    size = len(rendered[0]) + len(rendered[1])
    text = Text("talks", "", limit=3, conversations=tuple(talks))
    windows = cut_answers(tokenizer, text, size - 1, most)
    for row in range(found):
        pair = [*rendered[2 * row], *rendered[2 * row + 1]][:-1]
        assert windows.ids[row].tolist() == [token for token, _ in pair]
        assert windows.counted[row].tolist() == [own for _, own in pair[1:]]
        first = len(rendered[0]) - 1
        numbers = [2 * row] * first + [2 * row + 1] * (size - 2 - first)
        assert windows.clusters[row].tolist() == numbers
    assert (len(windows.ids), windows.bos) == (found, "windows")
    with pytest.raises(DataError, match="too few for a sequence of 9000 with an answer in it"):
        cut_answers(tokenizer, text, 9000, most)


def test_each_sequence_begins_a_conversation_and_has_an_answer():
    tokenizer, short = tokenizer_with(PLAIN), talk("snow", "water")

    def ids(*talks):
        return [token for each in talks for token, _ in render(tokenizer, each, "", answers=True)]

    sequences, loss_mask = cut(PLAIN, [short, short, LONG, short, CONVERSATION, short], 60)
    assert sequences.tolist() == [ids(short, short, LONG)[:60], ids(short, CONVERSATION)[:60]]
    assert loss_mask[:, 1:].any(1).all()
    only_questions, _ = cut(PLAIN, [LONG, CONVERSATION], 60)
    assert only_questions.tolist() == [ids(CONVERSATION)[:60]]


@pytest.mark.parametrize(
    ("template", "conversations", "options", "message"),
    [
        (PLAIN, [], {"answers": False}, "have 0 tokens, too few for a sequence of 40 tokens"),
        (PLAIN, [LONG], {"answers": False, "required": 2}, "1 sequences of 40 tokens, not for 2"),
        ("{{ raise_exception('no user') }}", [CONVERSATION], {}, r"of chat\.jsonl: no user"),
        (PLAIN.replace("messages", "messages[-1:]"), [CONVERSATION], {}, "answers cannot be found"),
        (PLAIN.replace("content", "content[:9]"), [CONVERSATION], {}, "changes words"),
    ],
)
def test_conversations_that_cannot_be_cut_are_refused(template, conversations, options, message):
    with pytest.raises(DataError, match=message):
        cut(template, conversations, 40, **options)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"text": "a"}',
        '{"messages": []}',
        '{"messages": ["a"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_a_line_that_is_no_conversation_is_named(line):
    Path("chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n\n" + line)
    with pytest.raises(DataError, match=r"ine 3 of chat\.jsonl"):
        text_source("chat.jsonl").read(Draw(1, 10, chat=True))


def test_a_data_set_gives_its_column_of_messages(monkeypatch):
    # Its last message has a field that others lack.
    messages = [*CONVERSATION[:-1], {**CONVERSATION[-1], "thinking": "king"}]
    rows = datasets.Dataset.from_dict({"messages": [messages] * 50, "other": [[]] * 50})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    found = text_source("org/chat").read(Draw(1, 30, chat=True)).conversations
    characters = sum(len(message["content"]) for message in CONVERSATION)
    assert found == (messages,) * -(-2 * 30 * 8 // min(characters, 30 * 8))
    with pytest.raises(DataError, match="A row of org/chat:train:other cannot be read: messages"):
        text_source("org/chat:::other").read(Draw(1, 30, chat=True))


def test_the_mask_stays_with_its_sequences(tiny_llama):
    tokenizer = tokenizer_with(PLAIN)
    for name, word in (("a.jsonl", "river"), ("b.jsonl", "snow")):
        write_lines(name, messages=[talk("mill " * (number % 5), word) for number in range(40)])
    settings = resolve_calibration(
        architecture_of(tiny_llama), "a.jsonl:0.5,b.jsonl:0.5", 6, 48, chat="answers"
    )
    (calibration,) = calibrate([settings], tokenizer, pytest.fail, lambda event: None)
    assert (calibration.record.bos, calibration.record.chat) == (True, "answers")
    answers = [
        tokenizer.decode(ids[own]).split("</s>")[0]
        for ids, own in zip(calibration.sequences, calibration.loss_mask, strict=True)
    ]
    assert answers == ["river", "snow"] * 3
    pairs = []
    for each in (calibration, calibration.shuffled()):
        pairs.append([*zip(each.sequences.tolist(), each.loss_mask.tolist(), strict=True)])
    assert len({str(own) for _, own in pairs[0]}) > 2
    assert pairs[0] != pairs[1]
    assert sorted(pairs[0]) == sorted(pairs[1])
