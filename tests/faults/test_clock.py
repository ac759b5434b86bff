"""A clock that is wrong or goes back decides nothing, and no record says that something took less than no time."""

import os
import re

import pytest

from faults.place import APPLY, evaluate, search
from faults.program import Limits

SEARCH = (*search(output="plan.json"), "--force")
BENCH = ("bench", "plan.json", "--prompt-length", 8, "--new-tokens", 2, "-o", "speed.json")
BELOW_ZERO = re.compile(rb'seconds[a-z_]*": (\[[^]]*)?-')


@pytest.mark.parametrize("more", [[], pytest.param([BENCH], marks=pytest.mark.faults)], ids=["", "bench"])
def test_a_clock_that_goes_back_changes_nothing(place, more):
    found = []
    for clock in (0, 3600):
        place.reset()
        for words in [SEARCH, APPLY, evaluate("-o", "scores.json"), *(more if clock else [])]:
            place.run(*words, clock_goes_back=clock, limits=Limits(seconds=600))
        records = [path.read_bytes() for path in place.work.glob("*.json")]
        assert any(b'seconds": ' in record for record in records)
        assert not any(BELOW_ZERO.search(record) for record in records)
        measured = ("work/speed.json", "work/plan.bench.json")
        found.append({name: content for name, content in place.files().items() if name not in measured})
    assert found[0] == found[1]


@pytest.mark.parametrize("when", [2**32, pytest.param(0, marks=pytest.mark.faults)], ids=["2106", "1970"])
def test_the_dates_of_files_decide_nothing(place, when):
    def run(*words):
        for path in place.folder.rglob("*"):
            os.utime(path, (when, when))
        return place.run(*words)

    def scores():
        run(*evaluate())
        return place.files()["work/plan.eval.json"]

    place.reset()
    run(*SEARCH)
    gguf = (*search(model="../tiny.gguf"), "--force")
    assert ["Converting" in run(*gguf).stderr for _ in range(2)] == [True, False]
    first = scores()
    assert scores() == first
    # What lies in the cache is used by what it holds: with another text of the same name and date, it is measured anew.
    text = place.folder / "text.txt"
    text.write_text(text.read_text()[::-1])
    assert scores() != first
