"""`sleb export --to report`, through `main()`: what is known of a plan, for people."""

import json
import re
import sys
from functools import partial
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import get_args
from urllib.parse import unquote

import pytest
from pydantic import BaseModel

from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured
from sleb_cli.events import ignore
from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.headline import every_size
from sleb_cli.plan import ClosedFormRecord, LossesRecord, RecoveryRecord
from sleb_cli.saved_results import keep_result, results_folder
from sleb_cli.tables.quality import task_names, text_names
from sleb_cli.units import format_perplexity


class Page:
    """A page as a reader sees it, and what it is made of."""

    def __init__(self, file):
        self.html = file.read_text(encoding="utf-8")
        body = re.sub(r"<style\b.*?</style>", "", self.html, flags=re.DOTALL)
        self.tags = re.findall(r"<(\w+)", body)
        self.text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))

    def values(self, name):
        return [unescape(value) for value in re.findall(rf'<[^>]*\b{name}="([^"]*)"', self.html)]

    @property
    def pictures(self):
        return [unquote(source.partition(",")[2]) for source in self.values("src")]


@pytest.fixture
def exported(sleb):
    """Export what is known of the plan in the current folder."""
    return partial(sleb, "export", "--to", "report")


@pytest.fixture
def report(exported, tmp_path):
    """Make the report of a plan and what was measured of it."""

    def report(plan, *options, **measured):
        write_measured(tmp_path, plan, **measured)
        assert exported(*options).stdout == "wrote plan.report.html\n"
        return Page(tmp_path / "plan.report.html")

    return report


def changed(result, change):
    """Return a result whose data `change` has edited."""
    data = result.to_data()
    change(data)
    return type(result).model_validate_json(json.dumps(data))


def numbers_of(plan, evaluation, benchmark):
    """Return the numbers of a plan and of its results as a page shows them."""
    numbers = []
    for step in plan.steps:
        numbers.append(f"{step.score:.4f} {format_perplexity(step.perplexity)}")
        numbers.append(format_perplexity(step.held_out.perplexity))
    for text in evaluation.texts:
        for scores in (text.dense, *text.pruned):
            numbers.append(format_perplexity(scores.perplexity))
    for task in evaluation.tasks:
        for scores in task.pruned:
            numbers += [f"{scores.difference:+.4f}", f"{scores.lost} {scores.gained}"]
    for result in benchmark.workloads:
        for timing in result.pruned:
            ends = timing.interval
            numbers.append(f"{timing.speedup:.2f}x {ends.low:.2f} to {ends.high:.2f}")
    return numbers


def test_a_report_is_one_accessible_file_with_every_number(report):
    plan = make_plan(30, 6, kinds=True)
    evaluation, benchmark = make_evaluation(plan, items=200), make_benchmark(plan)
    page = report(plan, evaluation=evaluation, benchmark=benchmark)
    assert len(page.html.encode()) < 1_000_000
    assert len(page.pictures) == 5
    assert all(source.startswith("data:image/svg+xml,") for source in page.values("src"))
    assert all(len(words) > 30 for words in page.values("alt"))
    assert not re.search(r"@import|<script|url\((?!%23)", page.html)  # within a picture, by an id
    assert "default-src 'none'" in page.html
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(page.values("href")) <= {f"#{name}" for name in ids}
    assert page.tags.count("table") == page.tags.count("caption") > 9
    narrow = page.values("srcset")
    assert len(narrow) == len(page.pictures)
    assert not any(" " in source for source in narrow)  # which would end it
    assert page.tags.count("th") == len(re.findall('<th scope="(?:col|row)"', page.html))
    numbers = numbers_of(plan, evaluation, benchmark)
    assert [number for number in numbers if f" {number} " not in page.text] == []
    assert "113.3M parameters remain of 134.5M" in page.text


def test_missing_parts_name_the_commands_that_fill_them(report):
    page = report(make_plan(12, 3))
    for words in ("eval plan.json --every 2 --tasks piqa,arc_easy", "bench plan.json --every 2"):
        assert f"sleb {words}" in page.text
    assert "sleb search --config plan.json" in page.text
    assert len(page.pictures) == 2


def bare(record):
    """Return a record without all that may be null in it."""
    if isinstance(record, tuple):
        return tuple(map(bare, record))
    if not isinstance(record, BaseModel):
        return record
    values = {}
    for name, field in type(record).model_fields.items():
        may_be_null = NoneType in get_args(field.annotation)
        values[name] = None if may_be_null else bare(getattr(record, name))
    return record.model_copy(update=values)


def test_results_may_lack_whatever_is_optional(report):
    plan = bare(make_plan(12, 3))
    steps = tuple(step.model_copy(update={"scores": {}}) for step in plan.steps)
    plan = plan.model_copy(update={"steps": steps})
    odd = {"higher_is_better": False, "metric": "repetition", "items_sha256": "0" * 64}

    def of_odd_tasks(data):
        data["tasks"][0]["doc_ids"] = []
        data["tasks"][1].update(odd)

    evaluation = make_evaluation(plan, items=40, every=1, tasks=("group", "sleb_repetition"))
    benchmark = bare(make_benchmark(plan, every=1, batches=()))
    page = report(plan, evaluation=changed(bare(evaluation), of_odd_tasks), benchmark=benchmark)
    assert len(page.pictures) == 3
    assert "repetition, lower is better" in page.text
    for words in ("accuracy kept", "nan"):
        assert words not in page.text


def keep_nothing(data):
    (task,) = data["tasks"]
    task["use"] = "choosing"
    for scores in task["pruned"]:
        scores["difference"] = -task["dense"]["value"]


def test_a_size_that_keeps_nothing_is_listed():
    plan = make_plan(8, 2)

    evaluation = make_evaluation(plan, items=40, texts=(), tasks=("piqa",), every=1)
    evaluation = changed(evaluation, keep_nothing)
    table = every_size(Findings(plan, Path("plan.json"), evaluation, None))
    assert [row[1] for row in table.rows] == ["100%", "0.0%", "0.0%"]


def test_names_tell_apart_what_was_measured_twice():
    plan = make_plan(8, 2)
    found = make_evaluation(plan, items=400, texts=("a/test.txt", "b/test.txt"))
    first, other = found.texts
    other = other.model_copy(update={"tokens_sha256": "1" * 64})
    assert text_names((first, other)) == [
        "test.txt (tokens 00000000)",
        "test.txt (tokens 11111111)",
    ]
    short = other.model_copy(update={"text": first.text, "sequence_length": 512})
    again = short.model_copy(update={"tokens_sha256": "2" * 64})
    assert text_names((first, short, again)) == [
        "test.txt (windows of 2,048, tokens 00000000)",
        "test.txt (windows of 512, tokens 11111111)",
        "test.txt (windows of 512, tokens 22222222)",
    ]
    names = task_names((*found.tasks, *make_evaluation(plan, items=100, texts=()).tasks))
    assert len(set(names)) == len(names)
    assert any(name.endswith(", 400 items") for name in names)


# Without a loss, the dense model knows the text by heart.
@pytest.mark.parametrize(("loss", "back"), [(2.0, "60%"), (0.0, "12%")])
def test_a_recovered_plan_says_what_came_back(report, loss, back):
    plan = make_plan(8, 2)
    texts = dict.fromkeys(("train_text", "validation_text", "test_text"), plan.calibration)
    recovery = RecoveryRecord(
        **texts,
        dense=LossesRecord(loss=loss, divergence=0.0),
        pruned=LossesRecord(loss=2.5, divergence=0.4),
        closed_form=ClosedFormRecord(fits=()),
        closed_form_losses=LossesRecord(loss=2.2, divergence=0.1),
    )
    text = report(plan.model_copy(update={"recovery": recovery})).text
    where = f"on held-out text like that of the fit ({plan.calibration}), "
    left = "of the lost nats are back; 25% of the divergence from the dense model is left"
    assert f"{where}{back} {left}" in text
    assert "sleb eval plan.json --tasks" in text  # recovered weights have one size
    assert "the remaining blocks were given new weights" in text


@pytest.mark.parametrize(
    ("searched_on", "measured_on", "is_same"),
    [
        ("wikitext2", "wikitext2", False),  # of which calibration reads another split
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", "wikitext2", True),
        ("wikitext2-sleb", "Salesforce/wikitext:wikitext-2-raw-v1:train", True),
        ("allenai/c4:en:validation", "c4", True),
        ("c4", "diary.txt", False),
        ("diary.txt", "/home/jane/diary.txt", True),
        ("self:0.5,diary.txt:0.5", "diary.txt", True),
        ("acme/news::train", "acme/news", True),
        ("acme/news", "acme/news::test", False),
    ],
)
def test_a_text_that_was_searched_on_is_called_so(searched_on, measured_on, is_same):
    plan = make_plan(8, 2, text=searched_on)
    evaluation = make_evaluation(plan, items=40, tasks=(), texts=(measured_on,))
    (name,) = Findings(plan, Path("plan.json"), evaluation, None).text_names
    remark = " (searched on)" if is_same else ""
    assert name == measured_on.removeprefix("/home/jane/") + remark


@pytest.mark.parametrize(
    ("runs", "label"),
    [((5, 5, 5), "1x256+8"), ((5, 5, 1), "1x64+8"), ((1, 3, 3), "1x256+8")],
)
def test_the_headline_names_the_largest_workload_with_an_interval(runs, label):
    plan = make_plan(8, 2)
    workloads = []
    for length, count in zip((4, 64, 256), runs, strict=True):
        shape = ("generation", 1, length, 8)
        workloads += make_benchmark(plan, iterations=count, workloads=[shape]).workloads
    benchmark = make_benchmark(plan).model_copy(update={"workloads": tuple(workloads)})
    ((result, timing),) = Findings(plan, Path("plan.json"), None, benchmark).main_workloads
    assert result.workload.label.endswith(label)
    assert (timing.interval is None) == (max(runs) < 5)


def test_too_few_runs_have_no_interval(report):
    plan = make_plan(8, 2)
    page = report(plan, benchmark=make_benchmark(plan, iterations=3))
    assert "3 runs, too few for an interval" in page.text


def test_the_headline_judges_each_kind_of_use(report):
    plan = make_plan(8, 3)
    evaluation = make_evaluation(plan, every=1, tasks=("piqa", "sleb_sums"))
    evaluation = changed(evaluation, lambda data: data["tasks"][0].update(use="choosing"))
    text = report(plan, evaluation=evaluation, benchmark=make_benchmark(plan)).text
    assert re.search(
        r"This size is worth it for generation 8x64\+32 \(1\.\d\dx\); prompt 1x512", text
    )
    assert "This size is not worth it for choosing an answer; canaries." in text
    table = text.partition("Every measured size")[2].partition("prompt 1x512: one")[0]
    perplexities = [evaluation.texts[0].dense, *evaluation.texts[0].pruned]
    for model, scores in zip(
        ("dense", "without 1", "without 2", "without 3"), perplexities, strict=True
    ):
        assert f" {model} {format_perplexity(scores.perplexity)} " in table
    for use, task in zip(("choosing an answer", "canaries"), evaluation.tasks, strict=True):
        assert f"For {use}: {1 - task.pruned[2].retention:.0%} lost." in text


def test_a_speedup_whose_interval_has_1_is_no_verdict(report):
    plan = make_plan(8, 2)
    benchmark = make_benchmark(plan, workloads=[("generation", 8, 64, 32)])
    wide = {"low": 0.61, "high": 1.64}
    benchmark = changed(
        benchmark, lambda data: data["workloads"][0]["pruned"][0].update(interval=wide)
    )
    text = report(plan, benchmark=benchmark).text
    assert "It may be faster or slower in generation 8x64+32 (0.61x to 1.64x)" in text
    assert "worth it for" not in text


def test_commands_name_a_model_where_the_plan_has_only_its_name(report):
    plan = make_plan(8, 2)
    local = plan.model.model_copy(update={"id": "tiny", "revision": None})
    text = report(plan.model_copy(update={"model": local})).text
    assert "sleb eval plan.json --model FOLDER --every 2" in text
    assert "sleb search FOLDER --config plan.json -o again.json" in text
    placed = plan.model.model_copy(update={"id": "/models/tiny", "revision": None})
    text = report(plan.model_copy(update={"model": placed}), "--force").text
    assert "sleb search --config plan.json -o again.json" in text


def test_what_a_text_says_is_never_markup_nor_mathematics(report):
    evil = "</script><script>alert(1)</script><b>"
    plan = make_plan(8, 2, name="<script>Tiny<b>")
    sample = plan.sample_generation.model_copy(update={"pruned": evil, "prompt": evil})
    plan = plan.model_copy(update={"sample_generation": sample})
    names = {"tasks": (f"task{evil}",), "texts": ("$x^2$", evil)}
    page = report(plan, evaluation=make_evaluation(plan, items=40, **names))
    assert not any(re.search("<b>|<script", text) for text in (page.html, *page.pictures))
    assert evil in page.text
    assert "$x^2$" in "".join(page.pictures)


def test_local_folders_stay_private(report):
    plan = make_plan(8, 2, name="/home/jane/models/mine", text="/home/jane/texts/diary.txt")
    evaluation = make_evaluation(plan, items=40, texts=("/home/jane/texts/other.txt",))
    page = report(plan, evaluation=evaluation)
    assert "jane" not in page.html
    assert {"diary.txt", "other.txt"} <= set(re.findall(r"\w+\.txt", page.text))


@pytest.mark.parametrize(
    ("own", "damaged"), [("0" * 64, "1" * 64), ("{", "")], ids=["another model", "not JSON"]
)
def test_results_that_do_not_belong_are_left_out(exported, tmp_path, own, damaged):
    plan = make_plan(8, 2)
    file = write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40))
    (results,) = results_folder(file).iterdir()
    results.write_text(results.read_text().replace(own, damaged, 1))
    assert "warning: Ignoring " in exported().stderr
    assert "sleb eval plan.json --every 2" in Page(tmp_path / "plan.report.html").text


def test_only_results_of_the_sizes_of_the_plan_count(exported, report, tmp_path):
    plan, other = make_plan(12, 4), make_plan(12, 4, seed=2)
    sizes = list(map(set, plan.size_keys))
    # Both remove block 7 first, and what was measured of that stays.
    assert [set(removals) in sizes for removals in other.size_keys] == [True, False, False, False]
    file = write_measured(tmp_path, plan, evaluation=make_evaluation(other, items=40, every=1))
    keep_result(make_evaluation(other, items=40, every=9), {}, results_folder(file), ignore)
    assert "Ignoring 1 result in plan.results: " in exported().stderr
    # A plan that is cut is about fewer.
    page = report(plan, "--remove 2 --force", evaluation=make_evaluation(plan, items=40))
    assert "Tiny-1B without 2 of 12 blocks" in page.text


def test_only_force_replaces_a_page(exported, tmp_path):
    write_measured(tmp_path, make_plan(3, 1, raced=False))
    page = tmp_path / "plan.report.html"
    page.write_text("mine")
    assert "plan.report.html already exists" in exported(code=8).stderr
    assert page.read_text() == "mine"
    exported("--force")
    assert exported("-o again.html").stdout == "wrote again.html\n"
    assert page.read_text().startswith("<!doctype html>")
    assert page.read_text() == (tmp_path / "again.html").read_text()


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_an_error_with_the_install_command(
    exported, tmp_path, monkeypatch, package
):
    write_measured(tmp_path, make_plan(6, 1))
    monkeypatch.setitem(sys.modules, package, None)
    said = exported(code=7).said
    assert f"This needs {package}." in said
    assert "pip install 'sleb[report]'" in said


def test_a_checkpoint_of_ours_has_a_report(exported, sleb, llama_plan, tmp_path):
    sleb("apply", llama_plan, "-o pruned --no-verify")
    exported("pruned")
    page = Page(tmp_path / "pruned" / "sleb_plan.report.html")
    assert "tiny-llama without 2 of 6 blocks" in page.text
