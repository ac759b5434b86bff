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
from unittest.mock import Mock

import pytest

import sleb_cli
import sleb_plugins as sleb
from conftest import plan_bytes
from sleb_cli import plugin_manager
from sleb_cli.engine.search import journal as journals
from sleb_cli.plan import read_plan
from sleb_cli.requests import SearchRequest, journal_of
from sleb_plugins import OutputError, PluginError

# Enough batches that there is a middle to stop in.
LONG = "--remove 3 --batch-size 1"


def leaving(run, *options, **how):
    """Run what searches, and have it leave its journal, as if it were killed once its plan was
    written.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "delete_journal", lambda *of: None)
        return run(*options, **how)


SEARCHES = {
    "exact": "--holdout 0.25",
    "refine-fast": "--strategy refine --fast",
    "contiguous-cosine": "--strategy contiguous --metric cosine",
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_search_that_is_cut_off_and_resumed_makes_the_same_plan(search, tmp_path, options):
    path = tmp_path / "plan.json"
    leaving(search, LONG, options, samples=8)
    plan, journal = plan_bytes(path), journal_of(path).read_bytes()
    header = journal.index(b"\n") + 1
    for cut in random.Random(options).sample(range(header, len(journal)), 2):
        journal_of(path).write_bytes(journal[:cut])
        search(LONG, options, "--resume --force", samples=8)
        assert plan_bytes(path) == plan
        assert not journal_of(path).exists()


def test_an_unfinished_search_is_overwritten_if_asked(search, tmp_path):
    journal = journal_of(tmp_path / "plan.json")
    journal.write_text("measured")
    search("--remove 1 --force")
    assert not journal.exists()


def test_two_searches_never_write_one_plan(run_sleb, tiny_llama, text_file, tmp_path):
    """One that starts while another one runs is refused, whatever the first one has come to."""
    refused = []

    def search_again(event):
        if len(refused) < 3:  # while the model is read, loaded, and scored
            refused.append(run_sleb("search", tiny_llama, "--remove 2 --force"))

    plan = sleb_cli.search(
        SearchRequest(
            str(tiny_llama),
            calibration=str(text_file),
            samples=4,
            sequence_length=32,
            sample_tokens=6,
            remove=1,
            output=tmp_path / "plan.json",
        ),
        search_again,
    )
    assert len(refused) == 3
    for result in refused:
        assert result.exit_code == OutputError.exit_code
        assert "Another search is writing plan.json" in result.stderr
    assert read_plan(tmp_path / "plan.json") == plan
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_no_obstacle(search, monkeypatch):
    unsupported = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=unsupported))
    search(LONG)


OTHERS = {
    "--metric cosine": "search.metric: cosine, not nll",
    "--strategy refine": "search.strategy: refine, not greedy",
    "--fast": "search.fast: True, not False",
    "--batch-size 3": "search.batch_size: 3, not 1",
    "--samples 3": "calibration.sequences: 3, not 4",
}


def test_a_journal_of_another_search_is_refused(search, tiny_llama, tiny_gpt2, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    leaving(search, LONG, model=folder)
    journal, again = journal_of(tmp_path / "plan.json"), [LONG, "--resume --force"]
    before, removals = journal.read_bytes(), read_plan(tmp_path / "plan.json").removals
    for changes, difference in OTHERS.items():
        assert difference in search(*again, changes, model=folder, code=3).stderr
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages }}")
    refused = search(*again, model=folder, code=3).stderr
    assert "belongs to another search (now model.files: " in refused
    template.unlink()
    refused = search(*again, model=tiny_gpt2, code=3).stderr
    assert "model.files" in refused
    assert "model.model_type: gpt2, not llama" in refused
    assert journal.read_bytes() == before
    # What was measured depends neither on where the search will end, nor on what the model does not
    # read, nor on how much memory is free, which decides how large batches are.
    (folder / "README.md").write_text("changes nothing")
    search("--remove 2 --resume --force", model=folder)
    assert read_plan(tmp_path / "plan.json").removals == removals[:2]


@pytest.fixture
def acme(tmp_path_factory, monkeypatch):
    """The metric of a plugin of another package, with the file of its base class."""
    file = tmp_path_factory.mktemp("acme") / "acme_base.py"
    file.write_text("import sleb_plugins\n\n\nclass Base(sleb_plugins.ModelMetric):\n    pass\n")
    monkeypatch.syspath_prepend(file.parent)

    class Acme(importlib.import_module("acme_base").Base):
        name, data = "acme", "words 1"

        def score_model(self, model, tokenizer, sequences):
            return float(model(input_ids=sequences).logits.sum())

        def fingerprint(self):
            return self.data

    package = SimpleNamespace(metadata={"Name": "sleb-acme", "Version": "0.1"})
    plugin, ours = type(sys)("acme"), EntryPoint("acme", "acme", "sleb")._for(package)
    plugin.sleb_metrics = sleb.hookimpl(lambda: [Acme()])
    monkeypatch.setitem(sys.modules, "acme", plugin)
    installed = [*entry_points(group="sleb"), ours]
    monkeypatch.setattr(plugin_manager, "entry_points", lambda group: installed)
    return SimpleNamespace(metric=Acme, package=package, file=file)


def test_a_changed_metric_neither_resumes_nor_extends(search, tmp_path, acme, monkeypatch):
    """Scores of two versions of a metric are not comparable, so they never meet in one search or
    plan.
    """
    options = f"{LONG} --metric acme --force"
    resume, extend = [options, "--resume"], ["--extend plan.json --remove 4 --force"]
    leaving(search, options)
    plan = tmp_path / "plan.json"
    paths = (plan, journal_of(plan))
    before = [path.read_bytes() for path in paths]
    assert read_plan(plan).search.implementation.package == "sleb-acme"

    def require_refusal(message):
        for command in (resume, extend):
            refused = leaving(search, *command, code=3).stderr
            assert message in refused
            assert "seed" not in refused
        assert [path.read_bytes() for path in paths] == before

    with monkeypatch.context() as patch:
        patch.setitem(acme.package.metadata, "Version", "0.2")
        require_refusal("search.implementation.version: 0.2, not 0.1")
    with monkeypatch.context() as patch:
        patch.setattr(acme.metric, "data", "words 2")
        require_refusal("search.implementation.fingerprint: words 2, not words 1")
    code = acme.file.read_text()
    acme.file.write_text(f"{code}# changed\n")
    require_refusal("search.implementation.code: ")
    acme.file.write_text(code)
    leaving(search, *resume)
    leaving(search, *extend)
    monkeypatch.setattr(acme.metric, "data", 7)
    refused = leaving(search, options, code=PluginError.exit_code).stderr
    assert "The metric 'acme' of sleb-acme 0.1 returned 7 from fingerprint, not a str." in refused


OF_TWO = "--seed 3 --protect-first 0"


@pytest.fixture
def extend(search, sleb, tiny_llama):
    """Search for two removals, and give what extends that plan."""

    search(OF_TWO, "--remove 2 -o two.json")
    return lambda *options, model=tiny_llama, plan="two.json", code=0: (
        sleb("search", model, "--extend", plan, *options, code=code).stderr
    )


def test_an_extended_search_goes_on_where_the_plan_ended(search, extend, tmp_path):
    search(OF_TWO, "--remove 4 -o four.json")
    two, four = read_plan(tmp_path / "two.json"), read_plan(tmp_path / "four.json")
    assert "4 of 6 blocks, 2 of them already removed" in extend("--remove 4 -o more.json")
    assert plan_bytes(tmp_path / "more.json") == plan_bytes(tmp_path / "four.json")
    # The plan itself may grow, also one of another version of sleb; nothing is measured again.
    plan = json.loads((tmp_path / "two.json").read_text())
    plan["search"]["implementation"] |= {"version": "0.0.1", "code": "another"}
    (tmp_path / "two.json").write_text(json.dumps(plan))
    leaving(extend, "--ratio 0.5")
    assert read_plan(tmp_path / "two.json").steps == four.steps[:3]
    lines = journal_of(tmp_path / "two.json").read_text().splitlines()[1:]
    assert {tuple(json.loads(line)["removed"]) for line in lines} == {two.removals}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ("--remove 2", 2, "already at 4 of 6 blocks without the 2 removed blocks; the target is 4"),
        ("--remove 3 --metric cosine", 3, "search.metric: cosine, not nll"),
        ("--remove 3 --seed 0", 3, "calibration.seed: 0, not 3"),
        ("--remove 3 --protect-first 1", 3, "search.protect_first: 1, not 0"),
        ("--remove 3 --dtype bf16", 3, "search.dtype: bfloat16, not float32"),
    ],
)
def test_a_search_unlike_the_plan_does_not_extend_it(extend, tmp_path, changes, code, message):
    before = (tmp_path / "two.json").read_bytes()
    assert message in extend(changes, code=code)
    assert (tmp_path / "two.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["two.json"]


def test_another_model_or_text_does_not_extend_a_plan(search, extend, tiny_gpt2, tmp_path):
    assert "is a different model" in extend("--remove 3", model=tiny_gpt2, code=3)
    (tmp_path / "t.txt").write_text("river mountain snow water stone " * 400)
    search("--remove 1 --calibration t.txt -o one.json")
    (tmp_path / "t.txt").write_text("snow water mountain river lamp " * 400)
    assert "calibration.tokens_sha256" in extend("--remove 2", plan="one.json", code=3)
