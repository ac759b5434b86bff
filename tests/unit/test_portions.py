"""Portions of a text: what was never seen comes first, and what the model writes is used twice."""

from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from conftest import llama_config, prose, random_model, train_tokenizer
from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.portions import Portions
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.events import ignore
from sleb_cli.texts.data_set import DataSet
from sleb_cli.texts.source import Text, TextSplit

LENGTH = 32
TOKENIZER, MODEL = train_tokenizer(bos=False), random_model(llama_config(2))


def settings(source, samples=10):
    own = CalibrationSettings(
        str(source), parse_mixture(str(source)), samples, LENGTH, 3, None, samples_given=True
    )
    return replace(own, split=TextSplit(0, 0.7))


def used(portion):
    return [tuple(portion.sequences[row].tolist()) for row in portion.order]


@pytest.mark.parametrize(("sizes", "processes"), [((1,), 1), ((1, 2, 4, 8), 1), ((2, 4, 7), 3)])
def test_all_windows_of_a_file_come_once_the_fitted_ones_last(tmp_path, sizes, processes):
    (tmp_path / "text.txt").write_text(prose(300))
    fitted = settings(tmp_path / "text.txt")
    seen = {
        tuple(row.tolist())
        for row in calibrate([fitted], TOKENIZER, lambda: None, ignore)[0].sequences
    }
    draws = Portions(
        fitted, lambda portion: sizes[min(portion, len(sizes) - 1)], TOKENIZER, None, processes
    )
    parts = [draws.draw(number, ignore).sequences.tolist() for number in range(400)]
    assert len(parts[-1]) == sizes[-1]
    assert draws.draw(7, ignore, 2).sequences.tolist() == parts[7][:2]
    order = [tuple(row) for part in parts for row in part]
    windows = len(set(order))
    assert 40 < windows <= 200
    assert len(set(order[:windows])) == windows
    assert order[windows : 2 * windows] == order[:windows]
    assert set(order[windows - len(seen) : windows]) == seen


def test_what_the_model_writes_is_used_twice_far_apart(tmp_path):
    (tmp_path / "text.txt").write_text(prose(900))
    source = settings(f"{tmp_path / 'text.txt'}:0.75,self:0.25", samples=8)
    draws = Portions(source, lambda portion: 32, TOKENIZER, lambda: MODEL)
    portion, other = draws.draw(0, ignore), draws.draw(1, ignore)
    assert sorted(Counter(used(portion)).values()) == [1] * 24 + [2] * 4
    assert sorted(Counter(used(draws.draw(0, ignore, 8))).values()) == [1] * 6 + [2]
    first, second = portion.order[:16], portion.order[16:]
    assert {row for row in first if row >= 24} == {row for row in second if row >= 24}
    # What it wrote for the fitted text is taken first.
    known = calibrate([source], TOKENIZER, lambda: MODEL, ignore)[0].sequences_of("self")

    def drawn(number, rows):
        draws = Portions(source, lambda portion: 32, TOKENIZER, lambda: MODEL, 1, lambda _: rows)
        return used(draws.draw(number, ignore))

    enough = (torch.cat([known[0]] * 2), None)
    assert {tuple(row.tolist()) for row in known[0]} <= set(drawn(0, enough))
    assert drawn(0, known) == used(portion)  # too little
    assert drawn(1, enough) == used(other)
    # Each is new, whatever was drawn before it.
    assert not set(used(portion)) & set(used(other))
    assert used(
        Portions(source, lambda portion: 32, TOKENIZER, lambda: MODEL).draw(1, ignore)
    ) == used(other)


def test_a_short_text_is_used_whole_and_keeps_the_shares(tmp_path):
    (tmp_path / "short.txt").write_text(prose(60))
    draws = Portions(
        settings(tmp_path / "short.txt"), lambda portion: 10_000, TOKENIZER, lambda: None
    )
    portion = draws.draw(0, ignore)
    assert sorted(portion.order) == list(range(len(portion.sequences)))
    both = settings(f"{tmp_path / 'short.txt'}:0.5,self:0.5")
    mixed = Portions(both, lambda portion: 10_000, TOKENIZER, lambda: MODEL)
    given = len(portion.sequences)
    assert Counter(row < given for row in mixed.draw(0, ignore).order) == {
        True: given,
        False: given + given % 2,
    }


def test_data_sets_are_shuffled_by_the_portions_number(monkeypatch):
    read = Mock(side_effect=lambda draw: Text("org/name", prose(300, seed=draw.seed)))
    monkeypatch.setattr(DataSet, "read", read)
    draws = Portions(settings("org/name"), lambda portion: 5, TOKENIZER, lambda: None)
    first, second = used(draws.draw(0, ignore)), used(draws.draw(1, ignore))
    assert [call.args[0].seed for call in read.mock_calls] == [4, 5]
    assert not set(first) & set(second)
