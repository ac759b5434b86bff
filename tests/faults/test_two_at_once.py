"""Two runs on one output, one cache or one journal: both end well or one is refused, and what is there is whole."""

import json
import random

import pytest

from faults.conftest import counts, often
from faults.place import APPLY, APPLY_GGUF, HEAL, evaluate, search
from faults.program import require

OUTPUT = 8
# What both runs do, or what each does, and then both must end well.
PAIRS = {
    "apply": [APPLY], "apply --force": [(*APPLY, "--force")], "apply --heal": [HEAL], "apply gguf": [APPLY_GGUF],
    "search": [search()], "search --force": [search("--force")], "search --resume": [search("--resume")],
    "one cache": [search(model="../tiny.gguf", output=f"{name}.json") for name in "ab"],
    "one result": [evaluate("-o", "scores.json")], "results of one plan": [evaluate(), evaluate(text="other")],
}  # fmt: skip
FIRST = ("apply", "search", "one cache", "results of one plan")


@counts(1, 20)
@pytest.mark.parametrize("name", often(PAIRS, FIRST))
def test_two_runs_never_spoil_what_one_of_them_makes(place, name, count, tried):
    words = PAIRS[name]
    both = len(words) > 1
    here = {"cwd": place.work, "environment": place.environment}
    place.reset()
    for each in words:
        place.run(*each)
    whole = place.files()
    for seed in range(count):
        place.reset()
        rng = random.Random(seed)
        one = place.program.start(*words[0], **here)
        one.ends_within(rng.choice([0, rng.uniform(0, 0.5)]))
        two = place.program.start(*words[-1], **here)
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
