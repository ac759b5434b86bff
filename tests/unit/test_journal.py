"""The journal without a model: whatever stops the program, what was measured before is there."""

import json
import random

import pytest

from sleb_cli.engine.search import journal as module
from sleb_cli.engine.search.journal import open_journal
from sleb_cli.requests import journal_of
from sleb_plugins import PlanError

SEARCH = {"model": {"fingerprint": "abc"}, "search": {"metric": "nll", "seed": 0}}


def resumed(path):
    return open_journal(path, SEARCH, resume=True)


def kept(path):
    """How many measurements a journal has."""
    with resumed(path) as journal:
        return len(journal)


@pytest.fixture
def path(tmp_path):
    return journal_of(tmp_path / "plan.json")


@pytest.fixture
def written(path):
    """A journal of 20 measurements."""
    with open_journal(path, SEARCH) as journal:
        for number in range(20):
            journal.add([number / 7, 1e-17 * number], [3, 1], block=number % 5, batch=number // 5)
    return path


def test_measurements_come_back_bit_for_bit(written):
    assert written.name == "plan.json.journal"
    with resumed(written) as journal:
        assert len(journal) == 20
        for removed in ([3, 1], [1, 3]):  # in whatever order
            assert journal.find(removed, block=4, batch=3) == [19 / 7, 1e-17 * 19]
        assert journal.scores([3, 1], 4, range(9)) == [
            x for n in (4, 9, 14, 19) for x in (n / 7, 1e-17 * n)
        ]
        assert journal.find([3, 4], block=1, batch=3) is None
        assert journal.find([3, 1], block=4) is None
        journal.add([0.5], [3, 1])
    with resumed(written) as journal:
        assert journal.find([3, 1]) == [0.5]


def test_cut_off_anywhere_all_whole_lines_are_there(written):
    content = written.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in random.Random(0).sample(range(ends[0], len(content)), 50):
        written.write_bytes(content[:cut])
        with resumed(written) as journal:
            assert len(journal) == sum(end <= cut for end in ends) - 1
            journal.add([1.0], [9])
        with resumed(written) as journal:
            assert journal.find([9]) == [1.0]


def line(**changes):
    """Return a line of the file; what is `...` is left out."""
    document = {"removed": [1], "block": 2, "batch": 0, "scores": [1.0, None]} | changes
    kept = {name: value for name, value in document.items() if value is not ...}
    return json.dumps(kept).encode() + b"\n"


@pytest.mark.parametrize(
    "wrong",
    [line(batch=...), line(removed=1), line(scores=None), line()[:-2] + b"\n", bytes(40) + b"\n"],
)
def test_a_journal_is_read_up_to_the_first_bad_line(written, wrong):
    believed = written.read_bytes() + line()
    written.write_bytes(believed + wrong + line(batch=1))
    assert kept(written) == 21
    assert written.read_bytes() == believed


@pytest.mark.parametrize(
    "content", [b"\n", b"[]\n", b"{}", b"12345678 {}\n", b"\xff\xfe", bytes(9)]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(PlanError, match="is not a sleb journal"):
        kept(path)
    assert path.read_bytes() == content


def test_a_journal_of_another_format_is_refused(written, monkeypatch):
    for found in (1, 3):
        monkeypatch.setattr(module, "FORMAT", found)
        with pytest.raises(PlanError, match="Another version of sleb began"):
            kept(written)


def test_nothing_to_resume_begins_anew(path):
    path.write_bytes(b"")
    with resumed(path) as journal:
        journal.add([1.0], [])
    assert kept(path) == 1
