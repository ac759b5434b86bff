"""What is fitted, what decides and what is reported on: no document is in two of them."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError

from conftest import llama_config, prose, random_model, train_tokenizer
from sleb_cli.cache import cache_root
from sleb_cli.engine.door.recovery import SPLITS
from sleb_cli.engine.text import calibration, writing
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_cli.events import Notice, ignore
from sleb_cli.texts.named import text_source
from sleb_cli.texts.source import WHOLE, Draw
from sleb_plugins import DataError
from texts import talk, text_settings, write_lines

TRAIN, _, TEST = SPLITS
TOKENIZER = train_tokenizer(bos=False)


@pytest.fixture
def hub(monkeypatch):
    """Have one data set on the hub, of these columns."""

    def offer(**columns):
        rows = datasets.Dataset.from_dict(columns)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)

    return offer


def read(source, split, seed=0):
    return text_source(source).read(Draw(1, 10**6, seed, split)).content


def read_parts(source):
    return [read(source, split) for split in SPLITS]


def told(events):
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_running_text_is_divided_between_its_paragraphs():
    text = "\n\n".join(f"Paragraph {number}. " + prose(2, number) for number in range(100))
    Path("text.txt").write_text(text)
    parts = read_parts("text.txt")
    assert "".join(parts) == text
    assert all(part.startswith("Paragraph") for part in parts)
    assert len(parts[0]) / len(parts[2]) == pytest.approx(7, rel=0.2)


def test_documents_of_a_file_stay_whole_unless_few():
    documents = [f"{number}: " + "\n\n".join([prose(12, number)] * 5) for number in range(20)]
    write_lines("text.jsonl", text=documents)
    parts = (documents[:14], documents[14:18], documents[18:])
    assert read_parts("text.jsonl") == ["\n\n".join(part) for part in parts]
    write_lines("text.jsonl", text=documents[:2])
    few = read_parts("text.jsonl")
    assert all(few)
    assert "".join(few) == read("text.jsonl", WHOLE)


def test_no_seed_moves_a_document_to_another_part(hub):
    documents = [f"document {number} is about {number % 7}" for number in range(200)]
    hub(text=documents)
    seen = []
    for split in SPLITS:
        drawn = "\n\n".join(read("org/name", split, seed) for seed in range(5))
        seen.append(set(drawn.split("\n\n")))
    assert [len(found) for found in seen] == [140, 40, 20]
    assert set().union(*seen) == set(documents)
    assert seen[0] != set(documents[:140])  # not by their order
    reported = text_source("c4-sleb").read(Draw(500, 1, 3, TEST)).content
    assert set(reported.replace(" document", "\ndocument").split("\n")) == seen[2]
    # The lines of a running text stay in theirs.
    assert "\n\n".join(read_parts("wikitext2")) == read("wikitext2", WHOLE)


@pytest.mark.parametrize("source", ["chat.jsonl", "org/chat"])
def test_no_conversation_is_in_two_parts(hub, source):
    talks = [talk(f"question {number}") for number in range(40)]
    write_lines("chat.jsonl", messages=talks)
    hub(messages=talks)
    counts = []
    questions = set()
    for split in SPLITS:
        found = text_source(source).read(Draw(10**4, 100, 3, split, chat=True)).conversations
        counts.append(len(found))
        questions.update(message["content"] for (message,) in found)
    assert (counts, len(questions)) == ([28, 8, 4], 40)
    write_lines("chat.jsonl", messages=talks[:9])
    with pytest.raises(DataError, match=r"chat\.jsonl has 9 conversations, but needs at least 10"):
        text_source("chat.jsonl").read(Draw(1, 100, 0, TRAIN, chat=True))


def test_a_preset_goes_before_a_file_of_its_name(hub):
    Path("c4").write_text("a file")
    hub(text=["river", None, "stone"])
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


def calibrate_parts(source, counts, model=None):
    settings = []
    for count, split in zip(counts, SPLITS, strict=True):
        settings.append(text_settings(source, count, 32, split=split))
    parts = calibrate(settings, TOKENIZER, lambda: model, ignore)
    assert [len(part.sequences) for part in parts] == counts
    return parts


def test_a_part_without_text_is_named():
    Path("text.txt").write_text("word " * 90)
    message = (
        "text.txt is too short to be divided into training, validation and test sequences of "
        "32 tokens"
    )
    with pytest.raises(DataError, match=message):
        calibrate_parts("text.txt", [1, 1, 1])


def test_a_split_too_small_for_every_source_leaves_some_out():
    Path("rain.txt").write_text(prose(400))
    Path("sun.txt").write_text(prose(400, seed=1))
    parts = calibrate_parts("rain.txt:0.9,sun.txt:0.1", [14, 4, 2])
    assert [part.origins.count("sun.txt") for part in parts] == [1, 0, 0]


def test_the_model_writes_once_for_all_parts(monkeypatch):
    Path("text.txt").write_text(prose(400))
    generate = Mock(side_effect=calibration.generate_own_text)
    monkeypatch.setattr(calibration, "generate_own_text", generate)
    parts = calibrate_parts("text.txt:0.75,self:0.25", [14, 4, 2], random_model(llama_config(1)))
    own = sum(part.origins.count("self") for part in parts)
    assert [call.args[2].samples for call in generate.mock_calls] == [own]
    assert len(torch.cat([part.sequences for part in parts]).unique(dim=0)) == 20


def test_own_text_is_cached_by_all_that_it_depends_on(monkeypatch):
    model = random_model(llama_config(1))
    generate = Mock(side_effect=writing.generate)
    monkeypatch.setattr(writing, "generate", generate)
    events = []

    def texts(writer="one", **changes):
        own = replace(text_settings("self", length=24, writer=writer), **changes)
        return generate_own_text(model, TOKENIZER, own, events.append)

    uncached = texts(None)
    assert torch.equal(texts(), uncached)
    assert torch.equal(texts(), uncached)
    assert generate.call_count == 2
    assert told(events) == ["Using 4 sequences that the model wrote before, from the cache."]
    for other in ({"writer": "two"}, {"seed": 1}, {"samples": 3}, {"sequence_length": 23}):
        texts(**other)
    model.to(torch.bfloat16)
    texts()
    assert generate.call_count == 7
    for path in (cache_root() / "texts").iterdir():
        path.write_bytes(b"broken")
    texts()
    assert generate.call_count == 8


def test_out_of_memory_fewer_sequences_are_generated(monkeypatch):
    model = random_model(llama_config(1))
    events = []
    forward = model.forward

    def short_of_memory(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", short_of_memory)
    own = text_settings("self", 8, 32)
    assert generate_own_text(model, TOKENIZER, own, notify=events.append).shape == (8, 32)
    assert told(events) == [
        "Out of memory on cpu; generating 4 sequences at a time.",
        "Out of memory on cpu; generating 2 sequences at a time.",
    ]
