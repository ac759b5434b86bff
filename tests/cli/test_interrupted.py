"""An interrupted search loses nothing, and ends with the very plan that it would have had."""

import errno
import importlib
import json
import os
import random
import shutil
import sys
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

import sleb_cli
import sleb_plugins as sleb
from sleb_cli import plugin_manager
from sleb_cli.engine.search import journal as journals
from sleb_cli.plan import read_plan
from sleb_cli.requests import SearchRequest, journal_of
from sleb_plugins import OutputError, PluginError

# Enough batches that there is a middle to stop in.
LONG = ["--remove", "3", "--batch-size", "1"]
FOUR = ["--remove", "4"]


def plan_bytes(path):
    """Return the plan as it stands in the file, without the two lines that tell the time."""
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if not line.strip().startswith((b'"started"', b'"seconds"'))]
    assert len(lines) == len(kept) + 2
    return kept


def leaving(run, *options, **how):
    """Run what searches, and have it leave its journal, as if it were killed once its plan was
    written.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "delete_journal", lambda *of: None)
        return run(*options, **how)


SEARCHES = {
    "exact": ("--holdout", "0.25"),
    "refine-fast": ("--strategy", "refine", "--fast"),
    "contiguous-cosine": ("--strategy", "contiguous", "--metric", "cosine"),
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_search_that_is_cut_off_and_resumed_makes_the_same_plan(search, tmp_path, options):
    options, path = [*LONG, *options, "-q"], tmp_path / "plan.json"
    leaving(search, *options, samples=8)
    plan, journal = plan_bytes(path), journal_of(path).read_bytes()
    header = journal.index(b"\n") + 1
    for cut in random.Random(str(options)).sample(range(header, len(journal)), 2):
        journal_of(path).write_bytes(journal[:cut])
        search(*options, "--resume", "--force", samples=8)
        assert plan_bytes(path) == plan
        assert not journal_of(path).exists()


def test_an_unfinished_search_is_not_overwritten_unasked(search, tmp_path):
    journal = journal_of(tmp_path / "plan.json")
    journal.write_text("measured")
    refused = search(*LONG, code=8).stderr
    assert "plan.json.journal holds an unfinished search" in refused
    assert "--resume" in refused
    assert journal.read_text() == "measured"
    search("--remove", 1, "--force")
    assert not journal.exists()


def test_two_searches_never_write_one_plan(search, run_sleb, tiny_llama, text_file, tmp_path):
    """One that starts while another one runs is refused, whatever the first one has come to."""
    refused = []

    def search_again(event):
        if len(refused) < 3:  # while the model is read, loaded, and scored
            refused.append(run_sleb("search", tiny_llama, "--remove", 2, "--force"))

    request = SearchRequest(
        str(tiny_llama),
        calibration=str(text_file),
        samples=4,
        sequence_length=32,
        sample_tokens=6,
        remove=1,
        output=tmp_path / "plan.json",
    )
    plan = sleb_cli.search(request, search_again)
    assert {result.exit_code for result in refused} == {OutputError.exit_code}
    assert all("Another search is writing plan.json" in result.stderr for result in refused)
    assert read_plan(tmp_path / "plan.json") == plan
    assert os.listdir(tmp_path) == ["plan.json"]
    assert "already exists" in search("--remove", 1, code=OutputError.exit_code).stderr


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_no_obstacle(search, monkeypatch):
    def without(*of):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    search(*LONG)


OTHERS = {
    ("--metric", "cosine"): "search.metric: cosine, not nll",
    ("--strategy", "refine"): "search.strategy: refine, not greedy",
    ("--fast",): "search.fast: True, not False",
    ("--batch-size", 3): "search.batch_size: 3, not 1",
    ("--samples", 3): "calibration.sequences: 3, not 4",
}


def test_a_journal_of_another_search_is_refused(search, tiny_llama, tiny_gpt2, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    leaving(search, *LONG, "-q", model=folder)
    journal, again = journal_of(tmp_path / "plan.json"), [*LONG, "--resume", "--force"]
    before, removals = journal.read_bytes(), read_plan(tmp_path / "plan.json").removals
    for changes, difference in OTHERS.items():
        assert difference in search(*again, *changes, model=folder, code=3).stderr
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "belongs to another search (model.files: " in search(*again, model=folder, code=3).stderr
    (folder / "chat_template.jinja").unlink()
    refused = search(*again, model=tiny_gpt2, code=3).stderr
    assert "model.files" in refused
    assert "model.model_type: gpt2, not llama" in refused
    assert journal.read_bytes() == before
    # What was measured depends neither on where the search will end, nor on what the model does not
    # read, nor on how much memory is free, which decides how large batches are.
    (folder / "README.md").write_text("changes nothing")
    search("--remove", 2, "--resume", "--force", model=folder)
    assert read_plan(tmp_path / "plan.json").removals == removals[:2]


def test_a_changed_metric_neither_resumes_nor_extends(
    search, tmp_path, tmp_path_factory, monkeypatch
):
    """Scores of two versions of a metric are not comparable, so they never meet in one search or
    plan.
    """
    base, package = (
        tmp_path_factory.mktemp("acme") / "acme_base.py",
        SimpleNamespace(name="sleb-acme", version="0.1"),
    )
    base.write_text("import sleb_plugins\n\n\nclass Base(sleb_plugins.ModelMetric):\n    pass\n")
    monkeypatch.syspath_prepend(base.parent)

    class Acme(importlib.import_module("acme_base").Base):
        name, data = "acme", "words 1"

        def score_model(self, model, tokenizer, sequences):
            return float(model(input_ids=sequences).logits.sum())

        def fingerprint(self):
            return self.data

    plugin, ours = type(sys)("acme"), EntryPoint("acme", "acme", "sleb")._for(package)
    plugin.sleb_metrics = sleb.hookimpl(lambda: [Acme()])
    monkeypatch.setitem(sys.modules, "acme", plugin)
    monkeypatch.setattr(
        plugin_manager, "entry_points", lambda group: [*entry_points(group=group), ours]
    )
    options, extend = [*LONG, "--metric", "acme", "-q"], ["--extend", "plan.json", *FOUR, "--force"]
    leaving(search, *options)
    paths = (tmp_path / "plan.json", journal_of(tmp_path / "plan.json"))
    before = [path.read_bytes() for path in paths]
    assert read_plan(paths[0]).search.implementation.package == "sleb-acme"

    def require_refusal(message):
        for command in ([*options, "--resume", "--force"], extend):
            refused = leaving(search, *command, code=3).stderr
            assert message in refused
            assert "seed" not in refused
        assert [path.read_bytes() for path in paths] == before

    with monkeypatch.context() as patch:
        patch.setattr(package, "version", "0.2")
        require_refusal("search.implementation.version: 0.2, not 0.1")
    with monkeypatch.context() as patch:
        patch.setattr(Acme, "data", "words 2")
        require_refusal("search.implementation.fingerprint: words 2, not words 1")
    code = base.read_text()
    base.write_text(f"{code}# changed\n")
    require_refusal("search.implementation.code: ")
    base.write_text(code)
    leaving(search, *options, "--resume", "--force")
    leaving(search, *extend)
    monkeypatch.setattr(Acme, "data", 7)
    refused = leaving(search, *options, "--force", code=PluginError.exit_code).stderr
    assert "The metric 'acme' of sleb-acme 0.1 returned 7 from fingerprint, not a str." in refused


OF_TWO = ["--seed", 3, "--protect-first", 0]


@pytest.fixture
def extend(search, sleb, tiny_llama):
    """Search for two removals, and give what extends that plan."""

    search(*OF_TWO, "--remove", 2, "-o", "two.json")
    return lambda *options, model=tiny_llama, plan="two.json", code=0: (
        sleb("search", model, "--extend", plan, *options, code=code).stderr
    )


def test_an_extended_search_goes_on_where_the_plan_ended(search, extend, tmp_path):
    search(*OF_TWO, "--remove", 4, "-o", "four.json")
    two, four = read_plan(tmp_path / "two.json"), read_plan(tmp_path / "four.json")
    assert "4 of 6 blocks, 2 of them already removed" in extend("--remove", 4, "-o", "more.json")
    assert plan_bytes(tmp_path / "more.json") == plan_bytes(tmp_path / "four.json")
    # The plan itself may grow, also one of another version of sleb; nothing is measured again.
    plan = json.loads((tmp_path / "two.json").read_text())
    plan["search"]["implementation"] |= {"version": "0.0.1", "code": "another"}
    (tmp_path / "two.json").write_text(json.dumps(plan))
    leaving(extend, "--ratio", "0.5")
    assert read_plan(tmp_path / "two.json").steps == four.steps[:3]
    lines = journal_of(tmp_path / "two.json").read_text().splitlines()[1:]
    assert {tuple(json.loads(line)["removed"]) for line in lines} == {two.removals}


def test_a_search_unlike_the_plan_does_not_extend_it(search, extend, tiny_gpt2, tmp_path):
    before, three = (tmp_path / "two.json").read_bytes(), ("--remove", 3)
    for changes, code, message in (
        (
            ("--remove", 2),
            2,
            "already at 4 of 6 blocks without the 2 removed blocks; the target is 4 of 6 blocks",
        ),
        ((*three, "--metric", "cosine"), 3, "search.metric: cosine, not nll"),
        ((*three, "--seed", 0), 3, "calibration.seed: 0, not 3"),
        ((*three, "--protect-first", 1), 3, "search.protect_first: 1, not 0"),
        ((*three, "--dtype", "bf16"), 3, "search.dtype: bfloat16, not float32"),
    ):
        assert message in extend(*changes, code=code)
    assert "is a different model" in extend(*three, model=tiny_gpt2, code=3)
    assert (tmp_path / "two.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["two.json"]
    (tmp_path / "t.txt").write_text("river mountain snow water stone " * 400)
    search("--remove", 1, "--calibration", "t.txt", "-o", "one.json")
    (tmp_path / "t.txt").write_text("snow water mountain river lamp " * 400)
    assert "calibration.tokens_sha256" in extend("--remove", 2, plan="one.json", code=3)
