"""`plan.json`: what is refused, and what survives a round trip."""

import json

import pytest

from sleb_cli.plan import LossesRecord, RecoveryRecord, read_plan
from sleb_plugins import PlanError


def test_a_plan_survives_a_round_trip(llama_plan, tmp_path):
    plan = read_plan(llama_plan)
    plan.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == llama_plan.read_bytes()
    assert read_plan(tmp_path / "again.json") == plan


def test_the_first_removals_are_the_plan_of_a_shorter_search(llama_plan):
    plan = read_plan(llama_plan)
    short = plan.first(1)
    assert short.removals == plan.removals[:1]
    assert short.steps == plan.steps[:1]
    assert short.search.remove == 1


def test_its_top_level_keys(llama_plan):
    assert list(json.loads(llama_plan.read_text())) == [
        "schema_version", "sleb_version", "model", "calibration", "search", "dense", "removals", "steps",
        "sample_generation",
            "environment",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("wikitext2", "wikitext2"),
        ("self:0.5,c4:0.5", "self:0.5,c4:0.5"),
        ("org/name:config:split:column", "org/name:config:split:column"),
        ("org/name:con/fig::a/b", "org/name:con/fig::a/b"),
        ("/home/jane/notes.txt", "notes.txt"),
        ("private/notes.md", "notes.md"),
        ("/home/jane/notes", "notes"),
        ("../notes", "notes"),
        ("~/notes.json", "notes.json"),
        ("/home/a,b/c:d/notes.txt", "notes.txt"),
        ("/home/jane/corpus:default:test", "corpus:default:test"),
        ("deep/in/corpus/::test", "corpus::test"),
        ("/home/jane/notes.txt:1/3, deep/notes.jsonl:.5,org/name:a:1/6", "notes.txt:1/3,notes.jsonl:.5,org/name:a:1/6"),
        ("self:1e-1,/home/jane/corpus:config:0.9", "self:1e-1,corpus:config:0.9"),
    ],
)
def test_a_title_has_no_folder_of_this_machine(llama_plan, source, title):
    plan = read_plan(llama_plan)
    text = plan.calibration.model_copy(update={"source": source})
    losses = LossesRecord(loss=1.0, divergence=0.0)
    recovery = RecoveryRecord(text=text, deciding_text=text, report_text=text, dense=losses, pruned=losses)
    published = plan.model_copy(update={"calibration": text, "recovery": recovery}).published()
    found = published.recovery
    texts = (published.calibration, found.text, found.deciding_text, found.report_text)
    assert {text.title, *(each.source for each in texts)} == {title}
    assert published.model.id == "tiny-llama"
    assert published.calibration.title == title


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("nll+0.5*kl", "nll+0.5*kl"),
        ("task:/home/jane/my.yaml:500", "task:my.yaml:500"),
        ("nll+0.5*task:/a/b.yaml+task:../c/d.yaml:9", "nll+0.5*task:b.yaml+task:d.yaml:9"),
    ],
)
def test_a_published_metric_has_no_folder_of_this_machine(llama_plan, metric, name):
    plan = read_plan(llama_plan)
    (record,) = plan.search.metrics.values()
    of_terms = {"metric": metric, "metrics": dict.fromkeys(metric.split("+"), record)}
    published = plan.model_copy(update={"search": plan.search.model_copy(update=of_terms)}).published()
    assert published.search.metric == name
    assert list(published.search.metrics) == name.split("+")


def change(path, **changes):
    data = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = data
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 2; this sleb reads up to 1"),
        ({"schema_version": "1"}, "not a sleb plan"),
        ({"schema_version": None}, "not a sleb plan"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"search__surprise": 1}, "search.surprise"),
        ({"dense": None}, "dense: Field required"),
        ({"model__blocks": "6"}, "model.blocks"),
        ({"removals": [1, 2, 3]}, "do not name the same blocks"),
        ({"steps__0__score": "low"}, "steps.0.score"),
        ({"model__blocks": 2}, "does not have"),
    ],
)
def test_a_plan_that_says_something_else_is_refused(llama_plan, changes, message):
    change(llama_plan, **changes)
    with pytest.raises(PlanError, match=message):
        read_plan(llama_plan)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "is not a sleb plan"),
        (b"null", "is not a sleb plan"),
        (b"3", "is not a sleb plan"),
        (b"\xff\xfe\x00", "it is not text"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        read_plan(path)


def test_a_truncated_plan_is_refused(llama_plan):
    llama_plan.write_bytes(llama_plan.read_bytes()[:-20])
    with pytest.raises(PlanError, match="not valid JSON"):
        read_plan(llama_plan)
