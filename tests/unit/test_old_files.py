"""What earlier versions wrote, and later ones may write: read, read in today's words, or refused by name.

`tests/data/README.md` says what the examples are, and how to add one.
"""

import json
import shutil
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from safetensors import safe_open

from sleb_cli.engine.forward.saved_walk import SavedWalk
from sleb_cli.engine.recovery import unfinished
from sleb_cli.engine.recovery.unfinished import Unfinished
from sleb_cli.engine.search.journal import Journal
from sleb_cli.plan import Plan, read_plan
from sleb_cli.records import Record
from sleb_cli.results import BenchResult, EstimateResult, EvalResult
from sleb_plugins import PlanError

DATA = Path(__file__).resolve().parents[1] / "data"
MODEL, TEXT = DATA / "models" / "tiny-llama", DATA / "text.txt"
PLANS = sorted(DATA.glob("plans/*/*.json"))
CHECKPOINTS = sorted(DATA.glob("checkpoints/*/sleb_plan.json"))
# Recovery chose by other numbers then, and kept no others.
NOT_READ = [path for path in CHECKPOINTS if path.parent.name in ("06-healed", "08-recovered", "11-recovered")]
NOT_READ += [path for path in CHECKPOINTS if path.parent.name in ("12-healed", "14-recovered")]
FORMS = DATA / "forms.json"
FORMATS = ("format-1",)
"""The examples of journals and walks that have a format of today."""

HEALING = {"--heal": None, "--heal-tokens": 400, "--calibration": TEXT, "--samples": 60, "--sequence-length": 16}


def named(paths):
    return pytest.mark.parametrize("path", [pytest.param(path, id="-".join(path.parts[-2:])) for path in paths])


def read(path):
    return json.loads(path.read_text())


def test_every_kind_has_examples():
    assert len({path.parent for path in PLANS}) == 18
    assert len(CHECKPOINTS) == 12
    assert len(NOT_READ) == 5


@named([*PLANS, *(path for path in CHECKPOINTS if path not in NOT_READ)])
def test_a_plan_says_what_it_said(path, tmp_path):
    plan, said = read_plan(path), read(path)
    assert list(plan.removals) == said["removals"]
    assert plan.model.fingerprint == said["model"]["fingerprint"]
    assert plan.calibration.tokens_sha256 == said["calibration"]["tokens_sha256"]
    assert plan.search.engine == said["search"]["engine"]
    assert plan.search.strategy == said["search"].get("strategy", said["search"].get("algorithm"))
    assert [step.score for step in plan.steps] == [step["score"] for step in said["steps"]]
    for step, old in zip(plan.steps, said["steps"], strict=True):
        swaps = [swap.to_data() for swap in step.swaps]
        assert swaps == old.get("swaps", old.get("exchanges", []))
        held = old.get("held_out") and list(old["held_out"].values())
        assert (step.held_out and list(step.held_out.to_data().values())) == held
    sample = said.get("sample_generation", said.get("canary"))
    assert (plan.sample_generation and plan.sample_generation.to_data()) == sample
    if "proof" in said:
        assert plan.proof.checks == tuple(said["proof"]["checks"])
        assert plan.proof.reference == said["proof"].get("reference", "dense").replace("gated", "dense")
    # Written again, it is in today's words, and is the same plan.
    plan.write(tmp_path / "again.json")
    assert read_plan(tmp_path / "again.json") == plan
    assert read(tmp_path / "again.json").keys() <= set(Plan.model_fields)


@named(NOT_READ)
def test_a_recovery_that_was_recorded_otherwise_is_refused_by_name(path, run_sleb):
    result = run_sleb("export", path, "--to", "indices")
    assert result.exit_code == 3
    assert f"An earlier version of sleb wrote {path}, and recorded its recovery in a form" in result.stderr
    assert "recover again with `sleb apply PLAN --recover`" in result.stderr


@pytest.mark.parametrize("number", ["01", "07", "10", "13", "17"])  # between them, a key got another name
def test_an_old_plan_is_applied(number, run_sleb, tmp_path):
    path = DATA / "plans" / number / "plan.json"
    result = run_sleb("apply", path, "--model", MODEL, "-o", tmp_path / "smaller", "-q")
    assert result.exit_code == 0, result.stderr
    copy = read_plan(tmp_path / "smaller" / "sleb_plan.json")
    assert copy.removals == read_plan(path).removals
    assert "same logits" in copy.proof.checks


def test_the_oldest_plan_is_exported_reported_and_evaluated(run_sleb, tmp_path):
    plan = tmp_path / "plan.json"
    shutil.copy(PLANS[1], plan)
    assert run_sleb("export", plan, "--to", "indices", "--model", MODEL).stdout.strip() == "3,2"
    assert run_sleb("export", plan, "--to", "report", "-o", tmp_path / "report.html").exit_code == 0
    result = run_sleb("eval", plan, "--model", MODEL, "--perplexity", TEXT, "--sequence-length", 16, "--json")
    assert result.exit_code == 0, result.stderr
    # As the version that wrote it measured then.
    before = read(DATA / "results" / "01" / "eval.json")["pruned"]["perplexities"][0]["perplexity"]
    assert json.loads(result.stdout)["texts"][0]["pruned"][-1]["perplexity"] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", ["01/plan", "02/fast", "09/plan", "14/plan", "17/plan"])
def test_a_search_goes_on_from_an_old_plan(name, run_sleb, tmp_path):
    old, output = DATA / "plans" / f"{name}.json", tmp_path / "longer.json"
    shutil.copy(TEXT, tmp_path / "text.txt")
    result = run_sleb("search", MODEL, "--extend", old, "--remove", 3, "-o", output, "-q")
    assert result.exit_code == 0, result.stderr
    longer, short = read_plan(output), read_plan(old)
    assert longer.removals[:2] == short.removals
    assert longer.steps[:2] == short.steps


def test_a_plan_without_a_record_of_a_plugin_s_metric_is_not_extended(run_sleb, tmp_path):
    old = read(DATA / "plans" / "01" / "plan.json")
    old["search"]["metric"] = "taylor"
    (tmp_path / "old.json").write_text(json.dumps(old))
    result = run_sleb(
        "search", MODEL, "--extend", tmp_path / "old.json", "--metric", "nll", "--remove", 3, "--calibration", TEXT
    )
    assert result.exit_code == 3
    assert "search.metric: nll, not taylor" in result.stderr


# Journals, healing states and walks.


def of_today(name):
    return name in FORMATS


@pytest.mark.parametrize("path", sorted(DATA.glob("journals/*")), ids=lambda path: path.stem)
def test_a_journal_is_read_or_refused_by_name(path, run_sleb, tmp_path):
    journal = tmp_path / "plan.json.journal"
    shutil.copy(path, journal)
    if of_today(path.stem):
        search = json.loads(path.read_bytes().splitlines()[0].partition(b" ")[2])
        opened = Journal(journal)
        opened.open({name: value for name, value in search.items() if name != "format"}, resume=True)
        assert len(opened) == len(path.read_bytes().splitlines()) - 1
        opened.close()
        return
    command = ["search", MODEL, "--remove", 2, "--calibration", TEXT, "--samples", 8, "--sequence-length", 16]
    command += ["--dtype", "float32", "-o", tmp_path / "plan.json", "-q"]
    result = run_sleb(*command, "--resume")
    assert result.exit_code == 3
    assert f"{journal} holds a search that an earlier version of sleb began." in result.stderr
    assert "Finish it with that version, or start over with --force." in result.stderr
    assert journal.read_bytes() == path.read_bytes()
    assert run_sleb(*command, "--force").exit_code == 0
    assert not journal.exists()


@pytest.mark.parametrize("path", sorted(DATA.glob("heal_states/*/*")), ids=lambda path: path.parent.name)
def test_a_healing_state_is_read_or_refused_by_name(path, run_sleb, tmp_path):
    state = tmp_path / ".out.recovery" / "healing.safetensors"
    state.parent.mkdir()
    shutil.copy(path, state)
    if path.parent.name == f"format-{unfinished.FORMAT}":
        with safe_open(path, framework="pt") as file:
            identity = json.loads(file.metadata()["sleb"])["identity"]
        saved = Unfinished(tmp_path / "out").read({name: value for name, value in identity.items() if name != "format"})
        assert saved.data["progress"]["tokens"] == 2048
        assert saved.tensors
        return
    options = [word for option in HEALING.items() for word in option if word is not None]
    plan = DATA / "plans" / "17" / "plan.json"
    result = run_sleb("apply", plan, "--model", MODEL, "-o", tmp_path / "out", *options, "--resume")
    assert result.exit_code == 3
    assert f"{state.parent} holds a healing that an earlier version of sleb began." in result.stderr
    assert state.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted(DATA.glob("walks/*")), ids=lambda path: path.name)
def test_a_saved_walk_is_read_or_only_costs_its_time(path, tmp_path):
    shutil.copy(path, tmp_path / "plan.json.journal.walk.0")
    with safe_open(path, framework="pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = {tuple(map(int, name.split(".")[:2])): tuple(tensor.shape) for name, tensor in tensors.items()}
    found = {}

    class At(dict):
        def __missing__(self, depth):
            return self.setdefault(depth, {})

    class States:
        at = At()

    class All(dict):
        def __missing__(self, key):
            return found.setdefault(key, States())

    walk = SavedWalk(tmp_path / "plan.json.journal.walk.0", said["identity"])
    walk.restore(json.loads(said["removed"]), All(), shapes, {tensor.dtype for tensor in tensors.values()})
    assert bool(found) == of_today(path.name.partition(".")[0])
    assert tensors


# Results.


@pytest.mark.parametrize(
    ("path", "kind", "since"),
    [
        ("19/eval", EvalResult, {}),
        ("18/eval", EvalResult, {"behavior": None}),
        ("18/bench", BenchResult, {}),
        ("18/estimate", EstimateResult, {}),
    ],
)
def test_results_are_read_with_what_is_new_since(path, kind, since):
    text = (DATA / "results" / f"{path}.json").read_text()
    assert kind.model_validate_json(text).to_data() == json.loads(text) | since


@pytest.mark.parametrize("kind", ["eval", "bench"])
def test_what_is_kept_beside_a_plan_is_shown_or_left_out_with_a_word(kind, run_sleb, tmp_path):
    shutil.copy(DATA / "plans" / "17" / "plan.json", tmp_path / "plan.json")
    kept = tmp_path / f"plan.{kind}.json"
    shutil.copy(DATA / "results" / "17" / f"{kind}.json", kept)
    today = run_sleb("export", tmp_path / "plan.json", "--to", "summary")
    assert (today.exit_code, today.stderr) == (0, "")
    shutil.copy(DATA / "results" / "01" / f"{kind}.json", kept)
    before = run_sleb("export", tmp_path / "plan.json", "--to", "summary")
    assert before.exit_code == 0
    assert f"{kept.name} is left out, because it cannot be read" in before.stderr.replace("\n", " ")
    assert len(before.stdout) < len(today.stdout)


def test_a_speedup_of_too_few_rounds_for_an_interval_is_reported_without(run_sleb, tmp_path):
    shutil.copy(DATA / "plans" / "17" / "plan.json", tmp_path / "plan.json")
    shutil.copy(DATA / "results" / "17" / "bench.json", tmp_path / "plan.bench.json")
    (timing,) = read(tmp_path / "plan.bench.json")["workloads"][0]["pruned"]
    assert timing["interval"] is None
    result = run_sleb("export", tmp_path / "plan.json", "--to", "report", "-o", "report.html")
    assert result.exit_code == 0, result.stderr
    assert f"{timing['speedup']:.2f}" in (tmp_path / "report.html").read_text()


def test_results_of_another_version_are_moved_aside_not_overwritten(run_sleb, tmp_path):
    shutil.copy(DATA / "plans" / "17" / "plan.json", tmp_path / "plan.json")
    old, kept = DATA / "results" / "01" / "eval.json", tmp_path / "plan.eval.json"
    shutil.copy(old, kept)
    command = ["eval", tmp_path / "plan.json", "--model", MODEL, "--perplexity", TEXT, "--sequence-length", 16]
    result = run_sleb(*command)
    assert result.exit_code == 0
    assert "is now plan.eval.json.old" in " ".join(result.stderr.split())
    assert (tmp_path / "plan.eval.json.old").read_bytes() == old.read_bytes()
    assert EvalResult.model_validate_json(kept.read_text())


# The future.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "has schema_version 2; this sleb reads up to 1"),
        ({"outlook": "fine"}, "outlook: Extra inputs are not permitted"),
    ],
)
def test_a_plan_from_the_future_is_refused_by_name(change, words, run_sleb, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(read(DATA / "plans" / "17" / "plan.json") | change))
    result = run_sleb("apply", path, "--model", MODEL)
    assert result.exit_code == 3
    assert words in result.stderr
    assert "pgrade" in result.stderr


@pytest.mark.parametrize(("found", "words"), [(2, "a newer version"), (None, "an earlier version")])
def test_a_journal_of_another_format_says_of_which_side(found, words, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sleb_cli.engine.search.journal.FORMAT", found)
        journal = Journal(tmp_path / "journal")
        journal.open({}, resume=False)
        journal.add([1.0], [3])
        journal.close()
    with pytest.raises(PlanError, match=words):
        Journal(tmp_path / "journal").open({}, resume=True)


# A form that changes.


def test_the_forms_are_those_of_the_examples():
    assert forms() == read(FORMS), (
        "The form of plans or results has changed. See tests/data/README.md: keep an example of what was written "
        "before, let it be read or refused by name, raise its version if an earlier sleb would take the new form for "
        "something else, and write the new form with `python tests/unit/test_old_files.py`."
    )


def forms():
    return {kind.__name__: form(kind) for kind in (Plan, EvalResult, BenchResult)}


def form(kind, found=None):
    """Return the keys of a record and of those in it, each with what it may be, and whether it may be missing."""
    found = {} if found is None else found
    if kind.__name__ not in found:
        keys = found[kind.__name__] = {}
        hints = get_type_hints(kind)
        for name, field in kind.model_fields.items():
            keys[name] = shown(hints[name], found) + ("" if field.is_required() else ", or missing")
    return found


def shown(kind, found):
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return shown(parts[0], found)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " or ".join(shown(part, found) for part in parts)
    if origin in (tuple, dict):
        return f"{origin.__name__} of " + ", ".join(shown(part, found) for part in parts if part is not Ellipsis)
    if isinstance(kind, type) and issubclass(kind, Record):
        form(kind, found)
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))


if __name__ == "__main__":
    FORMS.write_text(json.dumps(forms(), indent=1) + "\n")
