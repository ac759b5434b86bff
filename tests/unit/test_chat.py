"""Conversations as calibration sequences: what the template writes, and which tokens count."""

import json
from pathlib import Path

import datasets
import pytest

from chat_templates import PUBLISHED, PUBLISHED_TOKENIZERS, tokens_of
from conftest import architecture_of, tokenizer_with
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.chat import cut_answers, cut_conversations, pack, render
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.events import ignore
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

    def check(text, *messages):
        found = render(tokenizer, [*system, *messages], "", answers=True)
        assert found == tokens_of(tokenizer, template.opening + text)

    earlier = talk("snow", "bridge")
    thought = talk("snow", "bridge")
    thought[1]["thinking"] = "king"
    if "</think>" in template.text:
        thought[1]["content"] = "<think>\nking\n</think>bridge"
    noted = talk("mill", "field")
    # Older transformers does not take one of these fields for the other.
    noted[1] |= {"reasoning_content": "river", "thinking": "river"}
    for expected, turn, last in [
        (template.last, earlier, talk("mill", "field")),
        (template.thinking, earlier, noted),
        (template.inside, thought, talk("mill", "<think>\nriver\n</think>\n\nfield")),
    ]:
        check(expected, *last)
        check(template.earlier + expected, *turn, *last)


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
)
def test_all_of_an_answer_counts_whatever_its_words(name, messages, text):
    tokenizer = PUBLISHED_TOKENIZERS[name]
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, messages, "", answers=True) == tokens_of(tokenizer, opened + text)


@pytest.mark.parametrize(("most", "found"), [(None, 3), (2, 2), (9, 3)])
def test_windows_of_answers_know_their_conversations(most, found):
    tokenizer = tokenizer_with(PLAIN)
    talks = (CONVERSATION[:3], CONVERSATION) * 9
    first = render(tokenizer, talks[0], "", answers=True)
    both = [*first, *render(tokenizer, talks[1], "", answers=True)]
    ids = [token for token, _ in both]
    counted = [own for _, own in both[1:]]
    text = Text("talks", "", limit=3, conversations=talks)
    windows = cut_answers(tokenizer, text, len(ids), most)
    assert windows.ids.tolist() == [ids] * found
    assert windows.counted.tolist() == [counted] * found
    own = len(first) - 1
    clusters = [0] * own + [1] * (len(counted) - own)
    for row in range(found):
        assert windows.clusters[row].tolist() == [2 * row + number for number in clusters]
    assert windows.bos == "windows"
    with pytest.raises(DataError, match="too few for a sequence of 9000 with an answer in it"):
        cut_answers(tokenizer, text, 9000, most)


@pytest.mark.parametrize(
    ("conversations", "sequences"),
    [
        (["qA", "qA", "qA"], ["qAqA"]),
        (["qA", "qABC", "qA"], ["qAqA", "qaBC"]),
        (["qA", "qABC", "qA", "qA"], ["qAqA", "qaBC", "qAqA"]),
        (["qA", "qABCDE", "qA", "qA"], ["qAqA", "qaBC", "qAqA"]),
        (["qABCDE", "qAB", "qAB"], ["qABC", "qABq"]),
        (["qA", "qqA", "qA"], ["qAqq", "qqAq"]),
        (["qqq", "qqA", "qA"], ["qqAq"]),
    ],
)
def test_a_conversation_that_is_cut_begins_the_next_sequence(conversations, sequences):
    rendered = []
    for words in conversations:
        rendered.append([(word.lower(), word.isupper()) for word in words])
    packed = []
    for row in pack(rendered, 4):
        packed.append("".join(word.upper() if counts else word for word, counts, _ in row))
    assert packed == sequences
    assert pack(rendered, 4, 1) == pack(rendered, 4)[:1]


def test_the_tokens_of_a_cut_conversation_have_its_number_in_both_sequences():
    rendered = [[(1, True)] * 2, [(2, True)] * 4]
    numbers = []
    for row in pack(rendered, 4):
        numbers.append([number for _, _, number in row])
    assert numbers == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_each_sequence_begins_a_conversation_and_has_an_answer():
    tokenizer = tokenizer_with(PLAIN)
    short = talk("snow", "water")
    sequences, loss_mask = cut(PLAIN, [short, short, LONG, short, CONVERSATION, short], 60)
    found = [tokenizer.decode(row) for row in sequences]
    question = "<s>user\nsnow</s>\n<s>assistant\nwater</s>\n"
    assert found[0].startswith(question * 2 + "<s>user\nriver river")
    assert found[1].startswith(question + "<s>system\nriver mountain</s>")
    assert loss_mask[:, 1:].any(1).all()
    (only_questions_before,), _ = cut(PLAIN, [LONG, CONVERSATION], 60)
    assert tokenizer.decode(only_questions_before).startswith("<s>system\nriver mountain</s>")


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
    (calibration,) = calibrate([settings], tokenizer, pytest.fail, ignore)
    assert (calibration.record.bos, calibration.record.chat) == (True, "answers")

    def answers(text):
        pairs = zip(text.sequences, text.loss_mask, strict=True)
        return [tokenizer.decode(ids[own]) for ids, own in pairs]

    found = answers(calibration)
    assert [answer.split("</s>")[0] for answer in found] == ["river", "snow"] * 3
    shuffled = answers(calibration.shuffled())
    assert found != shuffled
    assert sorted(found) == sorted(shuffled)
