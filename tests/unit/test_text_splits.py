"""What is fitted, what decides and what is reported on: no document is in two of them."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError

from conftest import llama_config, prose, random_model, train_tokenizer
from sleb_cli.engine.door.recovery import TEST, TRAIN, VALIDATION
from sleb_cli.engine.files.cache import cache_root
from sleb_cli.engine.text import calibration, writing
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_cli.events import Notice, ignore
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import WHOLE, Draw
from sleb_plugins import DataError
from texts import talk, text_settings, write_lines

SPLITS = (TRAIN, VALIDATION, TEST)
TOKENIZER, MODEL = train_tokenizer(bos=False), random_model(llama_config(2))


def read(source, split, seed=0, tokens=10**6):
    return text_source(str(source)).read(Draw(1, tokens, seed, split)).content


def test_a_running_text_is_divided_between_its_paragraphs():
    Path("text.txt").write_text(
        "\n\n".join(f"Paragraph {number}. " + prose(2, number) for number in range(100))
    )
    parts = [read("text.txt", split) for split in SPLITS]
    assert "".join(parts) == Path("text.txt").read_text()
    assert [part.startswith("Paragraph") for part in parts] == [True] * 3
    assert len(parts[0]) / len(parts[2]) == pytest.approx(7, rel=0.2)


@pytest.mark.parametrize("count", [20, 2])
def test_documents_of_a_file_stay_whole_unless_few(count):
    documents = [f"{number}: " + "\n\n".join([prose(12, number)] * 5) for number in range(count)]
    write_lines("text.jsonl", text=documents)
    parts = [read("text.jsonl", split) for split in SPLITS]
    assert all(parts)
    if count == 20:
        whole = documents[:14], documents[14:18], documents[18:]
        assert parts == ["\n\n".join(part) for part in whole]
    else:
        assert "".join(parts) == read("text.jsonl", WHOLE)


def test_no_seed_moves_a_document_to_another_part(monkeypatch):
    documents = [f"document {number} is about {number % 7}" for number in range(200)]
    rows = datasets.Dataset.from_dict({"text": documents})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    seen = [
        {doc for seed in range(5) for doc in read("org/name", split, seed).split("\n\n")}
        for split in SPLITS
    ]
    assert [len(found) for found in seen] == [140, 40, 20]
    assert set().union(*seen) == set(documents)
    assert seen[0] != set(documents[:140])  # not by their order
    reported = text_source("c4-sleb").read(Draw(500, 1, 3, TEST)).content
    assert set(reported.replace(" document", "\ndocument").split("\n")) == seen[2]
    # The lines of a running text stay in theirs.
    assert "\n\n".join(read("wikitext2", split) for split in SPLITS) == read("wikitext2", WHOLE)


@pytest.mark.parametrize("source", ["chat.jsonl", "org/chat"])
def test_no_conversation_is_in_two_parts(monkeypatch, source):
    talks = [talk(f"question {number}") for number in range(40)]
    write_lines("chat.jsonl", messages=talks)
    rows = datasets.Dataset.from_dict({"messages": talks})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    parts = [
        text_source(source).read(Draw(10**4, 100, 3, split, chat=True)).conversations
        for split in SPLITS
    ]
    assert [len(part) for part in parts] == [28, 8, 4]
    assert len({part[0]["content"] for found in parts for part in found}) == 40
    write_lines("chat.jsonl", messages=talks[:9])
    with pytest.raises(DataError, match=r"chat\.jsonl has 9 conversations, but needs at least 10"):
        text_source("chat.jsonl").read(Draw(1, 100, 0, TRAIN, chat=True))


def test_a_preset_goes_before_a_file_of_its_name(tmp_path, monkeypatch):
    Path("c4").write_text("a file")
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"text": ["river", None, "stone"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert set(read("c4", WHOLE).split("\n\n")) == {"river", "stone"}
    assert read("./c4", WHOLE) == "a file"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Dataset scripts are no longer supported"), DatasetGenerationError("broken")],
    ids=repr,
)
def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(DataError, match="The data set org/name:train:text cannot be loaded"):
        read("org/name", WHOLE)


def test_a_part_without_text_is_named():
    Path("text.txt").write_text("word " * 90)
    with pytest.raises(
        DataError, match=r"text.txt from \d+% to \d+% has \d+ tokens, less than one sequence of 32"
    ):
        calibrate(settings("text.txt", (1, 1, 1)), TOKENIZER, lambda: None, print)


def settings(source, counts, length=32):
    return [
        text_settings(source, count, length, split=split)
        for count, split in zip(counts, SPLITS, strict=True)
    ]


def test_a_split_too_small_for_every_source_leaves_some_out():
    Path("rain.txt").write_text(prose(400))
    Path("sun.txt").write_text(prose(400, seed=1))
    mixture = "rain.txt:0.9,sun.txt:0.1"
    parts = calibrate(settings(mixture, (14, 4, 2)), TOKENIZER, lambda: None, ignore)
    assert [len(part.sequences) for part in parts] == [14, 4, 2]
    assert [part.origins.count("sun.txt") for part in parts] == [1, 0, 0]


def test_the_model_writes_once_for_all_parts(monkeypatch):
    Path("text.txt").write_text(prose(400))
    generate = Mock(side_effect=calibration.generate_own_text)
    monkeypatch.setattr(calibration, "generate_own_text", generate)
    splits = settings("text.txt:0.75,self:0.25", (14, 4, 2))
    parts = calibrate(splits, TOKENIZER, lambda: MODEL, ignore)
    # Two sequences have no room for a quarter of the model's own, or half of one: it goes by the
    # largest remainder.
    assert [len(part.sequences) for part in parts] == [14, 4, 2]
    assert [call.args[2].samples for call in generate.mock_calls] == [
        sum(split.counts["self"] for split in splits)
    ]
    rows = [tuple(row.tolist()) for part in parts for row in part.sequences]
    assert len(set(rows)) == 20


def test_own_text_is_cached_by_all_that_it_depends_on(monkeypatch):
    model, events = random_model(llama_config(2)), []
    generate = Mock(side_effect=writing.generate)
    monkeypatch.setattr(writing, "generate", generate)

    def texts(writer="one", **changes):
        own = replace(text_settings("self", length=32, writer=writer), **changes)
        return generate_own_text(model, TOKENIZER, own, events.append)

    uncached = texts(None)
    for found in (texts(), texts()):
        torch.testing.assert_close(found, uncached, rtol=0, atol=0)
    assert generate.call_count == 2
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice == "Using 4 sequences that the model wrote before, from the cache."
    for other in ({"writer": "two"}, {"seed": 1}, {"samples": 3}, {"sequence_length": 31}):
        texts(**other)
    model.to(torch.bfloat16)
    texts()
    assert generate.call_count == 7
    for path in (cache_root() / "texts").iterdir():
        path.write_bytes(b"broken")
    texts()
    assert generate.call_count == 8


def test_out_of_memory_fewer_sequences_are_generated(monkeypatch):
    model, events = random_model(llama_config(2)), []
    forward, own = model.forward, text_settings("self", 8, 32)

    def short_of_memory(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", short_of_memory)
    assert generate_own_text(model, TOKENIZER, own, notify=events.append).shape == (8, 32)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told == [
        f"Out of memory on cpu; generating {count} sequences at a time." for count in (4, 2)
    ]
