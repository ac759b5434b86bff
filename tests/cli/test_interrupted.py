"""An interrupted search loses nothing, and ends with the very plan that it would have had."""

import importlib
import json
import os
import random
import shutil
import sys
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

from conftest import calibration, slow
from sleb_cli import plugin_manager
from sleb_cli.engine.search import journal as journals
from sleb_cli.engine.search.journal import journal_of
from sleb_cli.plan import read_plan
from sleb_plugins import PluginError

# Enough batches that there is a middle to stop in.
LONG = ["--remove", "3", "--batch-size", "1"]
FOUR = ["--remove", "4"]


def plan_bytes(path):
    """Return the plan as it stands in the file, without the two lines that tell the time."""
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if not line.strip().startswith((b'"started"', b'"seconds"'))]
    assert len(lines) == len(kept) + 2
    return kept


@contextmanager
def journals_stay():
    """Let searches leave their journals, as if each were killed once its plan was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "delete_journal", lambda *of: None)
        yield


SEARCHES = {
    "exact": (),
    "fast": ("--fast",),
    "cosine": ("--metric", "cosine"),
    "refine": ("--strategy", "refine", "--protect-last", "0"),
    "refine-fast": ("--strategy", "refine", "--fast"),
    "beam": ("--strategy", "beam", "--beam-width", "2"),
    "contiguous": ("--strategy", "contiguous"),
    "contiguous-cosine": ("--strategy", "contiguous", "--metric", "cosine"),
    "oneshot": ("--strategy", "oneshot"),
    "last": ("--strategy", "last"),
    "holdout": ("--holdout", "0.25"),
}


@pytest.fixture(params=SEARCHES)
def options(request, text_file):
    return [*LONG, *SEARCHES[request.param], *map(str, calibration(text_file, samples=8))]


@pytest.fixture
def whole(run_sleb, tiny_llama, options, tmp_path):
    """The plan of a search that nobody interrupted, and its journal."""
    with journals_stay():
        assert run_sleb("search", tiny_llama, *options, "-o", "whole.json", "-q").exit_code == 0
    return plan_bytes(tmp_path / "whole.json"), journal_of(tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("points", [4, slow(50)])  # tests/faults kills the program at many more
def test_cut_off_anywhere_and_resumed_it_is_the_same_plan(run_sleb, tiny_llama, options, whole, tmp_path, points):
    plan, journal = whole
    header = journal.index(b"\n") + 1
    assert len(journal) > header + points
    path = tmp_path / "plan.json"
    for cut in random.Random(1).sample(range(header, len(journal)), points):
        journal_of(path).write_bytes(journal[:cut])
        result = run_sleb("search", tiny_llama, *options, "--resume", "--force", "-q")
        assert result.exit_code == 0, result.stderr
        assert plan_bytes(path) == plan
        assert not journal_of(path).exists()


def test_an_unfinished_search_is_not_overwritten_unasked(run_sleb, tiny_llama, text_file, tmp_path):
    options = [*LONG, *calibration(text_file)]
    journal = journal_of(tmp_path / "plan.json")
    journal.write_text("measured")
    result = run_sleb("search", tiny_llama, *options)
    assert result.exit_code == 8
    assert "plan.json.journal holds an unfinished search" in result.stderr
    assert "--resume" in result.stderr
    assert journal.read_text() == "measured"
    assert run_sleb("search", tiny_llama, *options, "--force").exit_code == 0
    assert not journal.exists()


def test_resuming_where_nothing_is_begins_at_the_beginning(run_sleb, tiny_llama, text_file, tmp_path):
    assert run_sleb("search", tiny_llama, *LONG, *calibration(text_file), "--resume").exit_code == 0
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.fixture
def left(run_sleb, tiny_llama, text_file, tmp_path):
    """The journal of a search of a copy of the model, and that search again."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")

    def again(*changes, model=folder):
        with journals_stay():
            return run_sleb("search", model, *LONG, *calibration(text_file), *changes, "--force")

    assert again("-q").exit_code == 0
    return journal_of(tmp_path / "plan.json"), again


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (["--metric", "cosine"], "search.metric: cosine, not nll"),
        (["--strategy", "refine"], "search.strategy: refine, not greedy"),
        (["--fast"], "search.fast: True, not False"),
        (["--seed", "1"], "calibration.seed: 1, not 0"),
        (["--dtype", "bf16"], "search.dtype: bfloat16, not float32"),
        (["--protect-first", "2"], "search.protect_first: 2, not 1"),
        (["--batch-size", "3"], "search.batch_size: 3, not 1"),
        (["--samples", "3"], "calibration.sequences: 3, not 4"),
    ],
)
def test_a_journal_of_another_search_is_refused(left, changes, difference):
    journal, again = left
    before = journal.read_bytes()
    result = again(*changes, "--resume")
    assert (result.exit_code, difference in result.stderr) == (3, True)
    assert journal.read_bytes() == before


def test_a_journal_of_another_model_or_tokenizer_is_refused(left, tiny_gpt2, tmp_path):
    _, again = left
    result = again("--resume", model=tiny_gpt2)
    assert result.exit_code == 3
    assert "model.fingerprint" in result.stderr
    assert "model.model_type: gpt2, not llama" in result.stderr
    (tmp_path / "model" / "README.md").write_text("changes nothing")
    assert again("--resume").exit_code == 0
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    result = again("--resume")
    assert result.exit_code == 3
    assert "belongs to another search (behavior: " in result.stderr


def test_how_many_blocks_go_may_change_on_the_way(left, tmp_path):
    """What was measured does not depend on where the search will end."""
    _, again = left
    removals = read_plan(tmp_path / "plan.json").removals
    result = again("--remove", 2, "--resume", "--json")
    assert tuple(json.loads(result.stdout)["removals"]) == removals[:2]


def test_a_search_that_measures_nothing_leaves_nothing(run_sleb, tiny_llama, text_file, tmp_path):
    result = run_sleb("search", tiny_llama, *LONG, *calibration(text_file), "--memory", "1kB")
    assert result.exit_code == 7
    assert os.listdir(tmp_path) == []


@pytest.fixture
def acme(monkeypatch, tmp_path_factory):
    """Return a function that installs a version of a plugin, whose metric multiplies the loss, in place of another."""
    folder = tmp_path_factory.mktemp("acme")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def install(*, version="0.1", factor=1, data=""):
        (folder / "acme_base.py").write_text(
            "import sleb_plugins as sleb\nfrom torch.nn.functional import cross_entropy\n\n\n"
            f"class Scaled(sleb.LogitMetric):\n    def score_tokens(self, logits, targets, dense_logits):\n"
            f"        return {factor} * cross_entropy(logits, targets, reduction='none')\n"
        )
        (folder / "acme_metric.py").write_text(
            f"import sleb_plugins as sleb\nfrom acme_base import Scaled\n\n\n"
            f"class Loss(Scaled):\n    name = 'acme'\n\n    def fingerprint(self):\n        return {data!r}\n\n\n"
            "@sleb.hookimpl\ndef sleb_metrics():\n    return [Loss()]\n"
        )
        for module in ("acme_base", "acme_metric"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        package = SimpleNamespace(name="sleb-acme", version=version)
        ours = EntryPoint("acme", "acme_metric", "sleb")._for(package)
        monkeypatch.setattr(plugin_manager, "entry_points", lambda group: [*entry_points(group=group), ours])

    yield install
    for module in ("acme_base", "acme_metric"):
        sys.modules.pop(module, None)


class TestMetricThatChanges:
    """Scores of two versions of a metric are not comparable, so they never meet in one search or plan."""

    @pytest.mark.parametrize("metric", ["acme", "nll+0.5*acme"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"factor": -1}, "search.metrics.acme.code: "),
            ({"version": "0.2"}, "search.metrics.acme.version: 0.2, not 0.1"),
            ({"data": "words 2"}, "search.metrics.acme.fingerprint: words 2, not words 1"),
        ],
    )
    def test_neither_resumed_nor_extended(
        self, run_sleb, tiny_llama, text_file, tmp_path, acme, metric, change, message
    ):
        acme(data="words 1")
        options = ["search", tiny_llama, *LONG, *calibration(text_file), "--metric", metric, "-q"]
        with journals_stay():
            assert run_sleb(*options).exit_code == 0
        journal, plan = journal_of(tmp_path / "plan.json").read_bytes(), (tmp_path / "plan.json").read_bytes()
        acme(**{"data": "words 1", **change})
        for command in (
            [*options, "--resume", "--force"],
            ["search", tiny_llama, "--extend", "plan.json", *FOUR, "--force"],
        ):
            result = run_sleb(*command)
            assert result.exit_code == 3, result.stderr
            assert message in result.stderr
            assert "seed" not in result.stderr
        assert journal_of(tmp_path / "plan.json").read_bytes() == journal
        assert (tmp_path / "plan.json").read_bytes() == plan

    def test_one_that_does_not_change_goes_on(self, run_sleb, tiny_llama, text_file, tmp_path, acme):
        acme()
        options = ["search", tiny_llama, *LONG, *calibration(text_file), "--metric", "acme", "-q"]
        with journals_stay():
            assert run_sleb(*options).exit_code == 0
        acme()
        assert run_sleb(*options, "--resume", "--force").exit_code == 0
        assert read_plan(tmp_path / "plan.json").search.metrics["acme"].package == "sleb-acme"
        assert run_sleb("search", tiny_llama, "--extend", "plan.json", *FOUR, "-q").exit_code == 0

    def test_another_version_of_sleb_extends_its_plans(self, run_sleb, tiny_llama, text_file, tmp_path):
        assert run_sleb("search", tiny_llama, *LONG, *calibration(text_file), "-q").exit_code == 0
        plan = json.loads((tmp_path / "plan.json").read_text())
        plan["search"]["metrics"]["nll"] |= {"version": "0.0.1", "code": "another"}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        assert run_sleb("search", tiny_llama, "--extend", "plan.json", *FOUR, "-q").exit_code == 0

    def test_a_fingerprint_that_is_no_text_is_the_plugins_fault(self, run_sleb, tiny_llama, text_file, acme):
        acme(data=7)
        result = run_sleb("search", tiny_llama, *LONG, *calibration(text_file), "--metric", "acme")
        assert result.exit_code == PluginError.exit_code
        assert "The fingerprint of the metric 'acme' is 7, which is not a text" in result.stderr


class TestExtend:
    @pytest.fixture(autouse=True)
    def _plan(self, run_sleb, tiny_llama, text_file):
        self.settings = [*calibration(text_file), "--seed", 3, "--protect-first", 0]
        assert run_sleb("search", tiny_llama, *self.settings, "--remove", 2, "-o", "two.json").exit_code == 0

    def test_it_goes_on_where_the_plan_ended_with_its_settings(self, run_sleb, tiny_llama, tmp_path):
        assert run_sleb("search", tiny_llama, *self.settings, "--remove", 4, "-o", "four.json").exit_code == 0
        result = run_sleb("search", tiny_llama, "--extend", "two.json", "--remove", 4, "-o", "more.json")
        assert result.exit_code == 0, result.stderr
        assert "4 of 6 blocks, 2 of them already removed" in result.stderr
        assert plan_bytes(tmp_path / "more.json") == plan_bytes(tmp_path / "four.json")

    def test_without_an_output_the_plan_itself_grows(self, run_sleb, tiny_llama, tmp_path):
        two = json.loads((tmp_path / "two.json").read_text())
        result = run_sleb("search", tiny_llama, "--extend", "two.json", "--ratio", "0.5")
        assert result.exit_code == 0, result.stderr
        three = json.loads((tmp_path / "two.json").read_text())
        assert three["removals"][:2] == two["removals"]
        assert three["steps"][:2] == two["steps"]
        assert len(three["removals"]) == 3
        assert sorted(os.listdir(tmp_path)) == ["two.json"]

    def test_nothing_that_was_searched_is_searched_again(self, run_sleb, tiny_llama, tmp_path):
        with journals_stay():
            run_sleb("search", tiny_llama, "--extend", "two.json", "--remove", 3)
        lines = journal_of(tmp_path / "two.json").read_text().splitlines()[1:]
        removals = json.loads((tmp_path / "two.json").read_text())["removals"]
        assert {tuple(json.loads(line[9:])["removed"]) for line in lines} == {tuple(removals[:2])}

    @pytest.mark.parametrize(
        ("changes", "code", "message"),
        [
            (["--remove", 2], 2, "two.json already has 2 removals, and the target is 2"),
            (["--remove", 3, "--metric", "cosine"], 3, "search.metric: cosine, not nll"),
            (["--remove", 3, "--seed", 0], 3, "calibration.seed: 0, not 3"),
            (["--remove", 3, "--protect-first", 1], 3, "search.protect_first: 1, not 0"),
            (["--remove", 3, "--dtype", "bf16"], 3, "search.dtype: bfloat16, not float32"),
        ],
    )
    def test_what_does_not_go_on_is_refused(self, run_sleb, tiny_llama, tmp_path, changes, code, message):
        before = (tmp_path / "two.json").read_bytes()
        result = run_sleb("search", tiny_llama, "--extend", "two.json", *changes)
        assert result.exit_code == code, result.stderr
        assert message in result.stderr
        assert (tmp_path / "two.json").read_bytes() == before
        assert os.listdir(tmp_path) == ["two.json"]

    def test_a_text_that_has_changed_is_noticed(self, run_sleb, tiny_llama, tmp_path):
        (tmp_path / "t.txt").write_text("river mountain snow water stone " * 400)
        run_sleb("search", tiny_llama, "--remove", 1, *calibration("t.txt"), "-o", "one.json")
        (tmp_path / "t.txt").write_text("snow water mountain river lamp " * 400)
        result = run_sleb("search", tiny_llama, "--extend", "one.json", "--remove", 2)
        assert result.exit_code == 3
        assert "calibration.tokens_sha256" in result.stderr

    def test_another_model_is_refused(self, run_sleb, tiny_gpt2):
        result = run_sleb("search", tiny_gpt2, "--extend", "two.json", "--remove", 3)
        assert result.exit_code == 3
        assert "is a different model" in result.stderr
