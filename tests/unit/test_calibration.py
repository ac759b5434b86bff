"""Sequences of tokens: where they are cut, what begins them, and which are drawn."""

import hashlib
import struct
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
import torch

from conftest import architecture_of, prose, train_tokenizer
from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.text.calibration import calibrate, draw
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.text.windows import cut_running_text, tokens_sha256
from sleb_cli.events import Notice
from sleb_cli.requests import SearchRequest
from sleb_cli.texts.named import NAMED, text_source
from sleb_cli.texts.source import Draw
from sleb_plugins import DataError, UsageError
from texts import write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizers():
    return {bos: train_tokenizer(bos=bos) for bos in (False, True)}


def test_drawing_follows_the_seed_and_keeps_the_texts_order():
    rows = draw(20, 5, seed=3)
    assert len(set(rows)) == 5
    assert rows == draw(20, 5, seed=3) == sorted(rows)
    assert rows != draw(20, 5, seed=4)
    assert draw(20, 99, seed=0) == list(range(20))
    # What is drawn is named by the hash of its little-endian int64.
    assert (
        tokens_sha256(torch.tensor([[1, 2]]))
        == hashlib.sha256(struct.pack("<2q", 1, 2)).hexdigest()
    )


@pytest.fixture
def hub(monkeypatch):
    """Answer `load_dataset` with a real data set made here, and note what was asked for."""
    asked = []
    rows = datasets.Dataset.from_dict(
        {"text": [prose(3, seed) for seed in range(1200)], "title": ["t"] * 1200}
    )

    def load_dataset(path, name=None, *, split, data_files=None):
        asked.append((path, name, split, data_files))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


WIKITEXT2, C4 = ("Salesforce/wikitext", "wikitext-2-raw-v1"), ("allenai/c4", None, "train")
C4_TRAIN = (*C4, "en/c4-train.00000-of-01024.json.gz")
C4_TEST = (*C4, "en/c4-validation.00000-of-00008.json.gz")
CONFIG = ("org/name", "cfg", "test", None)
OTHER = ("org/name", None, "test", None)


@pytest.mark.parametrize(
    ("source", "train", "test"),
    [
        ("wikitext2", (*WIKITEXT2, "train", None), (*WIKITEXT2, "test", None)),
        ("c4", C4_TRAIN, C4_TEST),
        ("org/name:cfg:test", CONFIG, CONFIG),
        ("org/name::test:title", OTHER, OTHER),
    ],
)
def test_each_source_reads_its_own_file_and_split_of_the_hub(hub, source, train, test):
    asked, _ = hub
    text_source(source).read(Draw(1, 10, 0))
    text_source(source).read_for_evaluation(2048)
    assert asked == [train, test]


def test_every_kind_of_text_is_in_help_and_on_its_page():
    page = (ROOT / "docs/calibration.md").read_text()
    (option,) = [each for each in fields(SearchRequest) if each.name == "calibration"]
    for name in [*NAMED, "answers:", ".txt", ".jsonl", "org/name"]:
        assert name in page
        assert name in str(option.metadata)


def test_texts_follow_their_protocols(hub):
    asked, rows = hub
    shuffled = rows.shuffle(seed=0)["text"][:128]
    assert text_source("wikitext2-sleb").read(Draw(128, 1, 0)).content == "\n\n".join(shuffled)
    assert text_source("c4-sleb").read(Draw(128, 1, 0)).content == " ".join(shuffled)
    assert text_source("wikitext2").read_for_evaluation(2048).content == "\n\n".join(rows["text"])
    c4 = text_source("c4").read_for_evaluation(2048)
    assert (c4.content, c4.limit) == (" ".join(rows["text"][:1100]), 256)
    # Documents are taken until there is enough, by default of the part for training.
    content = text_source("org/name").read(Draw(1, 100, 0)).content
    assert asked[-1] == ("org/name", None, "train", None)
    assert 800 <= len(content) < 800 + 400
    assert content != text_source("org/name").read(Draw(1, 100, 1)).content
    with pytest.raises(DataError, match="no column 'body'") as error:
        text_source("org/name:::body").read(Draw(1, 10, 0))
    assert "text, title" in error.value.hint


@pytest.fixture
def calibrated(tiny_llama, tokenizers):
    """Calibrate the tiny Llama; the tokenizer adds a BOS or does not."""
    architecture = architecture_of(tiny_llama)

    def calibrated(source, samples=None, length=64, *, bos=False, notify=print):
        settings = resolve_calibration(architecture, source, samples, length)
        return calibrate([settings], tokenizers[bos], pytest.fail, notify)[0]

    return calibrated


@pytest.mark.parametrize("share", ["", ":1"])
def test_a_preset_calibrates_on_every_window_of_its_text(hub, tokenizers, calibrated, share):
    calibration = calibrated(f"wikitext2-sleb{share}", bos=True)
    text = text_source("wikitext2-sleb").read(Draw(128, 1, 0)).content
    assert torch.equal(calibration.sequences, cut_running_text(tokenizers[True], text, 64))
    assert calibration.record.bos is False


def test_a_local_file_before_a_data_set_of_that_name(tmp_path):
    Path("org").mkdir()
    (tmp_path / "org" / "name").write_text("some text")
    assert text_source("org/name").read(Draw(1, 1, 0)).content == "some text"
    write_lines("a.jsonl", text=["one", "two"])
    assert text_source("a.jsonl").read(Draw(1, 1, 0)).content == "one\n\ntwo"
    Path("a:0.5,b:0.5").write_text("some text")
    assert [*parse_mixture("a:0.5,b:0.5")] == ["a:0.5,b:0.5"]


def test_a_mixture_interleaves_what_each_source_gives_alone(calibrated):
    Path("a.txt").write_text(prose(300, seed=1))
    Path("b.txt").write_text(prose(300, seed=2))
    mixed = calibrated("a.txt:0.75,b.txt:0.25", 8)
    a, b = calibrated("a.txt", 6).sequences, calibrated("b.txt", 2).sequences
    assert torch.equal(
        mixed.sequences, torch.stack([a[0], a[1], a[2], b[0], a[3], a[4], a[5], b[1]])
    )
    assert mixed.record.source == "a.txt:0.75,b.txt:0.25"
    assert mixed.record.tokens_sha256 == tokens_sha256(mixed.sequences)


def test_a_share_is_at_the_end_of_a_source():
    for source, shares in {
        "c4:1": {"c4": 1},
        "org/name:2024:test": {"org/name:2024:test": 1},
        "org/name:cfg:test:text:0.25, self:0.75": {"org/name:cfg:test:text": 0.25, "self": 0.75},
        "/a/b.txt:1/3,c:1/3,d:1/3": dict.fromkeys(("/a/b.txt", "c", "d"), Fraction(1, 3)),
    }.items():
        assert parse_mixture(source) == shares


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("c4:0.5", "sum to 0.5"),
        ("c4,self", "c4 has no share"),
        ("c4:0.5,c4:0.5", "names c4 twice"),
        (
            "c4:0.5,wikitext2-sleb:0.5",
            "wikitext2-sleb cannot be mixed: it is drawn as in the reference",
        ),
        ("c4:0.9,self:0.1", "none would be from self"),
    ],
)
def test_an_invalid_mixture_is_refused(calibrated, source, message):
    with pytest.raises(UsageError, match=message):
        calibrated(source, 2)


def test_the_scarcest_source_limits_a_mixture_by_default(calibrated):
    Path("a.txt").write_text(prose(300, seed=1))
    Path("b.txt").write_text(prose(20, seed=2))
    count, events = len(calibrated("b.txt").sequences), []
    assert 1 < count < 8
    mixed = calibrated("a.txt:0.5,b.txt:0.5", notify=events.append)
    assert torch.equal(mixed.sequences, calibrated("a.txt:0.5,b.txt:0.5", 2 * count + 1).sequences)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert f"b.txt has text for only {count} sequences of 64 tokens" in notice
    assert f"{2 * count + 1} sequences, not 16" in notice
    with pytest.raises(
        DataError, match=rf"b\.txt has text for {count} sequences of 64 tokens, not for 8"
    ):
        calibrated("a.txt:0.5,b.txt:0.5", 16)
    with pytest.raises(UsageError, match=r"none would be from a\.txt"):
        calibrated("a.txt:1/100,b.txt:99/100")
