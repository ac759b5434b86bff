"""The journal without a model: whatever stops the program, what was measured before is there."""

import json
import random
import zlib
from contextlib import ExitStack

import pytest

from sleb_cli.engine.search import journal as module
from sleb_cli.engine.search.journal import journal_of, open_journal
from sleb_plugins import OutputError, PlanError

SEARCH = {"model": {"fingerprint": "abc"}, "search": {"metric": "nll", "seed": 0}}


def resumed(path, search=SEARCH, **options):
    return open_journal(path, search, resume=True, **options)


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
        assert journal.scores([3, 1], 4, range(9)) == [x for n in (4, 9, 14, 19) for x in (n / 7, 1e-17 * n)]
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


def test_a_damaged_line_ends_what_is_believed(written):
    lines = written.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"0", b"1", 1)
    written.write_bytes(b"".join(lines))
    assert kept(written) == 4


GOOD = {"removed": [1], "block": 2, "batch": 0, "scores": [1.0, None]}


@pytest.mark.parametrize(
    "wrong", [{}, {"batch": ...}, {"block": ...}, {"removed": 1}, {"scores": ["1"]}, {"scores": []}, {"block": True}]
)
def test_a_line_that_is_no_measurement_ends_it_too(written, wrong):
    text = json.dumps({name: value for name, value in (GOOD | wrong).items() if value is not ...}).encode()
    whole = written.read_bytes()
    written.write_bytes(whole + b"%08x %s\n" % (zlib.crc32(text), text))
    assert kept(written) == (20 if wrong else 21)
    assert not wrong or written.read_bytes() == whole


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"12345678 {}\n", b"\xff\xfe", b"%08x []\n" % zlib.crc32(b"[]")])
def test_what_is_no_journal_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(PlanError, match="is not a sleb journal"):
        kept(path)
    assert path.read_bytes() == content


def test_two_searches_do_not_write_one_journal(written):
    with resumed(written):
        for resume in (True, False):
            with pytest.raises(OutputError, match="Another search is writing"), ExitStack() as stack:
                stack.enter_context(open_journal(written, SEARCH, resume=resume))
    assert kept(written) == 20


def test_a_journal_of_another_format_is_refused(written, monkeypatch):
    for found in (0, 2):
        monkeypatch.setattr(module, "FORMAT", found)
        with pytest.raises(PlanError, match="Another version of sleb began"):
            kept(written)


def test_nothing_to_resume_begins_anew(path):
    path.write_bytes(b"")
    with resumed(path) as journal:
        journal.add([1.0], [])
    assert kept(path) == 1


def test_a_new_search_drops_the_old_and_keeps_nothing_empty(written):
    with open_journal(written, SEARCH) as journal:
        assert len(journal) == 0
    assert not written.exists()
