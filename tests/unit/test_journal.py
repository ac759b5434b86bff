"""The journal without a model: whatever stops the program, what was measured before is there."""

import json
import random
import zlib

import pytest

from sleb_cli.engine.search.journal import Journal, journal_of
from sleb_plugins import OutputError, PlanError

SEARCH = {"model": {"fingerprint": "abc"}, "search": {"metric": "nll", "seed": 0}}


def opened(path, *, resume=False, search=SEARCH):
    journal = Journal(path)
    journal.open(search, resume=resume)
    return journal


@pytest.fixture
def path(tmp_path):
    return journal_of(tmp_path / "plan.json")


@pytest.fixture
def written(path):
    """A journal of 20 measurements."""
    journal = opened(path)
    for number in range(20):
        journal.add([number / 7, 1e-17 * number], [3, 1], block=number % 5, batch=number // 5)
    journal.close()
    return path


def test_it_lies_beside_the_plan(path):
    assert path.name == "plan.json.journal"


def test_measurements_come_back_bit_for_bit(written):
    journal = opened(written, resume=True)
    assert len(journal) == 20
    assert journal.find([3, 1], block=4, batch=3) == [19 / 7, 1e-17 * 19]
    assert journal.find([1, 3], block=4, batch=3) == [19 / 7, 1e-17 * 19]  # without 3 and 1, in whatever order
    assert journal.find([3, 4], block=1, batch=3) is None
    assert journal.find([3, 1], block=4) is None


def test_where_scores_are_of_sets_any_of_them_may_be_the_candidate(path):
    journal = Journal(path)
    journal.of_sets = True
    journal.open(SEARCH, resume=False)
    journal.add([1.5], [3, 1], block=7, batch=0)
    journal.add([2.5], [3, 1, 7], batch=0)  # a loss, which need not be the score
    journal.close()
    again = Journal(path)
    again.of_sets = True
    again.open(SEARCH, resume=True)
    for found in (journal, again):
        assert found.find([7, 3], block=1, batch=0) == [1.5]
        assert found.find([3, 7, 1], batch=0) == [2.5]
        assert found.find([3], block=1, batch=0) is None


def test_what_is_added_after_a_resumption_is_kept_too(written):
    journal = opened(written, resume=True)
    journal.add([0.5], [3, 1])
    journal.close()
    assert opened(written, resume=True).find([3, 1]) == [0.5]


def test_cut_off_anywhere_all_whole_lines_are_there(written, tmp_path):
    content = written.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    rng = random.Random(0)
    for cut in rng.sample(range(ends[0], len(content)), 50):
        written.write_bytes(content[:cut])
        journal = opened(written, resume=True)
        assert len(journal) == sum(end <= cut for end in ends) - 1
        journal.add([1.0], [9])
        journal.close()
        again = opened(written, resume=True)
        assert again.find([9]) == [1.0]
        again.close()


def test_a_damaged_line_ends_what_is_believed(written):
    lines = written.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"0", b"1", 1)
    written.write_bytes(b"".join(lines))
    journal = opened(written, resume=True)
    assert len(journal) == 4


@pytest.mark.parametrize(
    "line",
    [
        {"removed": [1], "block": 2, "scores": [1.0]},
        {"removed": [1], "batch": 2, "scores": [1.0]},
        {"removed": 1, "block": 2, "batch": 0, "scores": [1.0]},
        {"removed": [1], "block": 2, "batch": 0, "scores": ["1"]},
        {"removed": [1], "block": True, "batch": 0, "scores": [1.0]},
    ],
)
def test_a_whole_line_that_says_something_else_ends_what_is_believed(written, line):
    text = json.dumps(line).encode()
    whole = written.read_bytes()
    written.write_bytes(whole + b"%08x %s\n" % (zlib.crc32(text), text))
    before = dict(opened(written, resume=True).known)
    assert written.read_bytes() == whole
    assert before


@pytest.mark.parametrize("content", [b"\n", b"{}\n", b"12345678 {}\n", b"\xff\xfe"])
def test_what_is_no_journal_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(PlanError, match="is not a sleb journal"):
        opened(path, resume=True)
    assert path.read_bytes() == content


def test_two_searches_do_not_write_one_journal(written):
    journal = opened(written, resume=True)
    for resume in (True, False):
        with pytest.raises(OutputError, match="Another search is writing"):
            opened(written, resume=resume)
    journal.close()
    assert len(opened(written, resume=True)) == 20


def test_a_journal_of_another_search_is_refused_by_its_differences(written):
    other = {"model": {"fingerprint": "abd"}, "search": {"metric": "kl", "seed": 0, "fast": True}}
    with pytest.raises(PlanError) as caught:
        opened(written, resume=True, search=other)
    for words in ("model.fingerprint: abd, not abc", "search.metric: kl, not nll", "search.fast: True, not None"):
        assert words in caught.value.message
    assert "seed" not in caught.value.message
    assert len(opened(written, resume=True)) == 20


def test_an_unfinished_search_is_not_overwritten_unasked(written):
    with pytest.raises(OutputError, match="holds an unfinished search"):
        Journal(written).require(resume=False, force=False)
    Journal(written).require(resume=True, force=False)
    Journal(written).require(resume=False, force=True)
    assert len(opened(written)) == 0


def test_a_journal_with_nothing_measured_is_not_left_behind(path):
    opened(path).close()
    assert not path.exists()


@pytest.mark.parametrize("content", [None, b""])
def test_nothing_to_resume_begins_anew(path, content):
    if content is not None:
        path.write_bytes(content)
    journal = opened(path, resume=True)
    journal.add([1.0], [])
    journal.close()
    assert len(opened(path, resume=True)) == 1


def test_without_a_path_it_remembers_and_writes_nothing(tmp_path):
    journal = opened(None)
    journal.add([1.0], [], block=2)
    journal.close()
    assert journal.find([], block=2) == [1.0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_said(written, monkeypatch):
    import errno

    journal = opened(written, resume=True)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    journal._file = Full()
    with pytest.raises(OutputError, match="the disk is full"):
        journal.add([1.0], [])
