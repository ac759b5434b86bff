"""`plan.json`: what is refused, and what survives a round trip."""

import json
import re
from pathlib import Path

import pytest

from sleb_cli.plan import LossesRecord, RecoveryRecord, read_plan
from sleb_plugins import PlanError

OLDER = Path(__file__).parents[1] / "older_plans"
"""Plans that sleb wrote at ba037724, for tiny models; results beside them name the ranking."""

EXPERTS = {0: (5, 6), 1: (0, 5), 2: (2, 5), 3: (3, 2), 4: (0, 6), 5: (3, 4)}
RANKING = "a3f1a8b516c901508e1e8ecee41dae82268834e22cf80dfd19ba6d24caf63f32"


@pytest.mark.parametrize(
    ("name", "sizes", "goes", "ranking"),
    [
        ("blocks", ["without block 1", "without blocks 1, 2"], ((1, 2), {}), None),
        (
            "experts",
            [
                "without 1 of the 8 experts of each block",
                "without 2 of the 8 experts of each block",
            ],
            ((), {"experts": EXPERTS}),
            RANKING,
        ),
    ],
)
def test_a_plan_of_an_older_version_is_read_and_written_as_it_was(
    tmp_path, name, sizes, goes, ranking
):
    plan = read_plan(OLDER / f"{name}.json")
    plan.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (OLDER / f"{name}.json").read_bytes()
    assert [plan.order.describe(key) for key in plan.size_keys] == sizes
    assert (plan.order.by_size(2), plan.order.ranking) == (goes, ranking)
    assert plan.first(1).size_keys == plan.size_keys[:1]


def test_a_plan_survives_a_round_trip(llama_plan, tmp_path):
    plan = read_plan(llama_plan)
    short = plan.first(1)
    assert (short.removals, short.steps, short.search.remove) == (
        plan.removals[:1],
        plan.steps[:1],
        1,
    )
    plan.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == llama_plan.read_bytes()
    assert list(json.loads(llama_plan.read_text())) == [
        "schema_version",
        "sleb_version",
        "request",
        "model",
        "calibration",
        "search",
        "score_unit",
        "dense",
        "removals",
        "steps",
        "sample_generation",
        "environment",
    ]


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("self:0.5,c4:0.5", "self:0.5,c4:0.5"),
        ("/home/jane/notes.txt", "notes.txt"),
        ("answers:/home/jane/asked.jsonl:0.5,c4:0.5", "answers:asked.jsonl:0.5,c4:0.5"),
        ("/home/a,b/c:d/notes.txt", "notes.txt"),
        ("/home/jane/corpus:default:test", "corpus:default:test"),
        ("deep/in/corpus/::test", "corpus::test"),
        (
            "/home/jane/notes.txt:1/3, deep/notes.jsonl:.5,org/name:a:1/6",
            "notes.txt:1/3,notes.jsonl:.5,org/name:a:1/6",
        ),
    ],
)
def test_a_title_has_no_folder_of_this_machine(llama_plan, source, title):
    plan = read_plan(llama_plan)
    text = plan.calibration.model_copy(update={"source": source})
    losses = LossesRecord(loss=1.0, divergence=0.0)
    recovery = RecoveryRecord(
        train_text=text, validation_text=text, test_text=text, dense=losses, pruned=losses
    )
    published = plan.model_copy(update={"calibration": text, "recovery": recovery}).published()
    found = published.recovery
    texts = (published.calibration, found.train_text, found.validation_text, found.test_text)
    assert {text.title, *(each.source for each in texts)} == {title}
    assert published.model.id == "tiny-llama"
    assert (published.request["calibration"], "model" in published.request) == (title, False)
    assert published.calibration.title == title


INVALID = {
    "surprise": ({"surprise": 1}, "surprise: unknown"),
    "no dense": ({"dense": None}, "dense: should be"),
    "words for a number": ({"model": {"blocks": "6"}}, "model.blocks"),
    "other removals": ({"removals": [1, 2, 3]}, "do not name the same blocks"),
    "a block too many": ({"model": {"blocks": 2}}, "does not have"),
    "no version": ({"schema_version": None}, "schema_version: should be 1"),
    "a later version": (
        {"schema_version": 2, "later": 1},
        "schema_version: should be 1.*newer sleb .* upgrade",
    ),
    "bytes": (b"\xff\xfe\x00", "it is not text"),
    "a list in a list, and so on": (b"[" * 10**6, "recursion limit"),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_an_invalid_plan_is_refused(llama_plan, changes, message):
    if isinstance(changes, bytes):
        llama_plan.write_bytes(changes)
    else:
        data = json.loads(llama_plan.read_text())
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(value, dict) else value
        llama_plan.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        read_plan(llama_plan)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")
