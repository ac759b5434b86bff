"""The stream of text of a training: nothing comes twice, but for what the model writes."""

from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import pytest

from conftest import llama_config, prose, random_model, train_tokenizer
from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.recovery.language import TrainingText
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import ignore
from sleb_cli.texts.data_set import DataSet
from sleb_cli.texts.source import Text, TextSplit

LENGTH = 32
TOKENIZER = train_tokenizer(bos=False)


@pytest.fixture(scope="module")
def model():
    return random_model(llama_config(2))


def settings(source, samples):
    shares = parse_mixture(str(source))
    own = CalibrationSettings(
        str(source), shares, samples, LENGTH, 3, None, samples_given=True, length_given=True
    )
    return replace(own, split=TextSplit(0, 0.7))


def stream(source, samples, model=None):
    """Return the training text, and the text that was fitted."""
    fitted = settings(source, samples)
    (text,) = calibrate([fitted], TOKENIZER, lambda: model, ignore)
    return TrainingText(fitted, text, 2, TOKENIZER, lambda: model), text


def rows_of(sequences):
    return [tuple(row) for row in sequences.tolist()]


def test_all_windows_of_a_file_come_once(tmp_path):
    (tmp_path / "text.txt").write_text(prose(300))
    text, _ = stream(tmp_path / "text.txt", 10)
    order = []
    for number in range(40):
        portion = rows_of(text.portion(number, ignore)[0])
        assert len(portion) == 10
        order += portion
    windows = len(set(order))
    assert 40 < windows <= 200
    whole = windows - windows % 10  # another round begins within a portion
    assert len(set(order[:whole])) == whole
    assert rows_of(stream(tmp_path / "text.txt", 10)[0].portion(7, ignore)[0]) == order[70:80]


def test_what_the_model_writes_is_in_two_portions(tmp_path, model):
    (tmp_path / "text.txt").write_text(prose(900))
    source = f"{tmp_path / 'text.txt'}:0.75,self:0.25"
    text, fitted = stream(source, 32, model)
    known = rows_of(fitted.sequences_of("self")[0])
    portions = [rows_of(text.portion(number, ignore)[0]) for number in range(4)]
    counts = Counter(row for portion in portions for row in portion)
    written = {row for row, count in counts.items() if count == 2}
    assert sorted(counts.values()) == [1] * 96 + [2] * 16
    # What it wrote for the fitted text is taken first.
    for portion, is_known in zip(portions, (True, True, False, False), strict=True):
        own = written & set(portion)
        assert len(own) == 8
        assert (own == set(known)) == is_known
    # A portion does not depend on those before it.
    assert rows_of(stream(source, 32, model)[0].portion(2, ignore)[0]) == portions[2]


def test_a_short_text_comes_again_and_keeps_its_share(tmp_path, model):
    (tmp_path / "short.txt").write_text(prose(60))
    fitted = settings(f"{tmp_path / 'short.txt'}:0.5,self:0.5", 100)
    (text,) = calibrate([fitted], TOKENIZER, lambda: model, ignore)
    assert len(text.sequences) < 100
    for number in (0, 3):
        portion = TrainingText(fitted, text, 2, TOKENIZER, lambda: model).portion(number, ignore)[0]
        short = set(rows_of(text.sequences_of(str(tmp_path / "short.txt"))[0]))
        from_file = sum(row in short for row in rows_of(portion))
        assert from_file == len(portion) // 2


def test_data_sets_are_shuffled_by_the_portions_number(monkeypatch):
    read = Mock(side_effect=lambda draw: Text("org/name", prose(300, seed=draw.seed)))
    monkeypatch.setattr(DataSet, "read", read)
    text, _ = stream("org/name", 4)
    first, second = (rows_of(text.portion(number, ignore)[0]) for number in (0, 1))
    assert [call.args[0].seed for call in read.mock_calls] == [3, 4, 5]
    assert not set(first) & set(second)


def test_portions_are_of_whole_steps(tmp_path):
    (tmp_path / "text.txt").write_text(prose(300))
    fitted = settings(tmp_path / "text.txt", 10)
    (text,) = calibrate([fitted], TOKENIZER, lambda: None, ignore)
    for step, size in ((4, 8), (16, 16)):
        portion, _ = TrainingText(fitted, text, step, TOKENIZER, None).portion(0, ignore)
        assert len(portion) == size


def test_only_what_counted_counts(tmp_path, model):
    (tmp_path / "text.txt").write_text(prose(300))
    fitted = settings(f"{tmp_path / 'text.txt'}:0.5,self:0.5", 8)
    (text,) = calibrate([fitted], TOKENIZER, lambda: model, ignore)
    mask = text.sequences % 2 == 0
    masked = Calibration(text.sequences, text.record, mask, text.origins)
    sequences, counted = TrainingText(fitted, masked, 2, TOKENIZER, None).portion(0, ignore)
    own = set(rows_of(text.sequences_of("self")[0]))
    for row, of_row in zip(sequences, counted, strict=True):
        expected = row % 2 == 0 if tuple(row.tolist()) in own else row >= 0
        assert bool((of_row == expected).all())
