"""Two runs on one output, one cache or one journal: both end well or one is refused, and what is there is whole."""

import json
import random

import pytest

from faults.conftest import counts, often
from faults.place import APPLY, APPLY_GGUF, HEAL, evaluate, search
from faults.program import require

OUTPUT = 8
# What two runs do, and whether both must end well.
PAIRS = {
    "apply": (APPLY, APPLY, False),
    "apply --force": ((*APPLY, "--force"), (*APPLY, "--force"), False),
    "apply --heal": (HEAL, HEAL, False),
    "apply gguf": (APPLY_GGUF, APPLY_GGUF, False),
    "search": (search(), search(), False),
    "search --force": (search("--force"), search("--force"), False),
    "search --resume": (search("--resume"), search("--resume"), False),
    "one cache": (search(model="../tiny.gguf", output="a.json"), search(model="../tiny.gguf", output="b.json"), True),
    "one result": (evaluate("-o", "scores.json"), evaluate("-o", "scores.json"), False),
    "results of one plan": (evaluate(), evaluate(text="other"), True),
}
FIRST = ("apply", "search", "one cache", "results of one plan")


@counts(1, 20)
@pytest.mark.parametrize("name", often(PAIRS, FIRST))
def test_two_runs_never_spoil_what_one_of_them_makes(place, name, count, tried):
    *pair, both = PAIRS[name]
    here = {"cwd": place.work, "environment": place.environment}
    place.reset()
    for words in pair if both else pair[:1]:
        place.run(*words)
    whole = place.files()
    for seed in range(count):
        place.reset()
        one = place.program.start(*pair[0], **here)
        one.ends_within(random.Random(seed).choice([0, random.Random(seed).uniform(0, 0.5)]))
        two = place.program.start(*pair[1], **here)
        codes = [require(run.wait(), (0,) if both else (0, OUTPUT)).exit_code for run in (one, two)]
        assert 0 in codes, seed
        found = place.files()
        assert found.keys() == whole.keys(), seed
        different = [path for path in whole if found[path] != whole[path] and not path.endswith(".eval.json")]
        assert not different, seed
        if name == "results of one plan":
            texts = json.loads((place.work / "plan.eval.json").read_text())["texts"]
            assert {text["text"] for text in texts} == {"../text.txt", "../other.txt"}
    tried("pairs of runs at once", count)
