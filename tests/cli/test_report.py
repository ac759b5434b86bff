"""`sleb export --to report`, `figures` and `summary`, through `main()`: what is known of a plan, for people."""

import csv
import json
import re
import shlex
import sys
from html import unescape
from itertools import pairwise
from types import NoneType
from typing import get_args
from urllib.parse import unquote

import pytest
from pydantic import BaseModel

import sleb_plugins as sleb
from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured
from sleb_cli import exporters
from sleb_cli.__main__ import main
from sleb_cli.exporters.draft import best_draft
from sleb_cli.plan import ClosedFormRecord, LossesRecord, RecoveryRecord
from sleb_cli.tables.quality import task_names, text_names
from sleb_cli.units import format_perplexity

FIGURES = {
    "quality-and-speed-generation", "quality-and-speed-prompt", "perplexity", "divergence", "tasks", "differences",
    "speedup", "latency", "inter-token-latency", "memory", "search", "loss",
}  # fmt: skip


class Page:
    """A page as a reader sees it, and what it is made of."""

    def __init__(self, file):
        self.html = file.read_text(encoding="utf-8")
        body = re.sub(r"<(script|style)\b.*?</\1>", "", self.html, flags=re.DOTALL)
        self.tags = re.findall(r"<(\w+)", body)
        words = unescape(re.sub(r"<[^>]*>", " ", body))
        self.text = re.sub(r"\s+", " ", words).replace("\N{MINUS SIGN}", "-")

    def values(self, name):
        return [unescape(value) for value in re.findall(rf'<[^>]*\b{name}="([^"]*)"', self.html)]

    @property
    def figures(self):
        return {name.removeprefix("figure-") for name in self.values("id") if name.startswith("figure-")}

    @property
    def pictures(self):
        return [unquote(source.partition(",")[2]) for source in self.values("src")]

    @property
    def data(self):
        return json.loads(re.search(r'id="sleb-data">(.*?)</script>', self.html, re.DOTALL)[1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A plan of which everything was measured."""
    folder = tmp_path_factory.mktemp("measured")
    plan = make_plan(30, 6, kinds=True)
    evaluation, benchmark = make_evaluation(plan, items=200), make_benchmark(plan)
    return write_measured(folder, plan, evaluation=evaluation, benchmark=benchmark), evaluation, benchmark


@pytest.fixture(scope="module")
def page(measured):
    """Its report."""
    file, *_ = measured
    assert main(["export", str(file), "--to", "report", "-q"]) == 0
    return Page(file.with_suffix(".report.html"))


@pytest.fixture
def exported(run_sleb):
    """Export what is known of the plan in the current folder."""

    def export(to, *options, code=0):
        result = run_sleb("export", "--to", to, *options)
        assert result.exit_code == code, result.stderr
        return result

    return export


@pytest.fixture
def report(exported, tmp_path):
    """Make the report of a plan and what was measured of it."""

    def report(plan, **measured):
        write_measured(tmp_path, plan, **measured)
        exported("report")
        return Page(tmp_path / "plan.report.html")

    return report


def test_a_report_is_one_accessible_file_that_loads_nothing(page):
    assert len(page.html.encode()) < 1_000_000
    assert all(source.startswith("data:image/svg+xml,") for source in page.values("src"))
    assert all(address.startswith("#") for address in page.values("href"))
    assert not re.search(r"@import|url\((?!%23)", page.html)  # within a picture, by an id
    assert "default-src 'none'" in page.html
    headings = [tag for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (headings[0], headings.count("h1")) == ("h1", 1)
    assert all(int(after[1]) <= int(before[1]) + 1 for before, after in pairwise(headings))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {address.removeprefix("#") for address in page.values("href")} <= set(ids)
    assert page.figures == FIGURES
    assert len(page.values("alt")) == len(page.pictures) == len(FIGURES)
    assert all(len(words) > 30 for words in page.values("alt"))
    assert page.tags.count("table") == page.tags.count("caption") > 8
    assert page.tags.count("th") == len(re.findall('<th scope="(?:col|row)"', page.html))
    assert '<html lang="en">' in page.html


def test_a_report_shows_the_numbers_of_the_files_and_holds_them_without_samples(page, measured):
    file, evaluation, benchmark = measured
    plan, evaluated, benched = (
        json.loads(file.with_suffix(s).read_text()) for s in (".json", ".eval.json", ".bench.json")
    )
    for step in plan["steps"]:
        assert f" {step['score']:.4f} {format_perplexity(step['perplexity'])} " in page.text
        assert f" {format_perplexity(step['held_out']['perplexity'])} " in page.text
    for text in evaluation.texts:
        for scores in (text.dense, *text.pruned):
            assert f" {format_perplexity(scores.perplexity)} " in page.text
    for task in evaluation.tasks:
        for scores in task.pruned:
            assert f" {scores.difference:+.4f} " in page.text
            assert f" {scores.retention:.1%} {scores.lost} {scores.gained} " in page.text
    for result in benchmark.workloads:
        for timing in result.pruned:
            interval = f"{timing.interval.low:.2f} to {timing.interval.high:.2f}"
            assert f" {timing.speedup:.2f}x {interval} " in page.text
    assert "113.3M parameters remain of 134.5M" in page.text
    assert "Removed blocks by kind" in page.text
    for text in evaluated["texts"]:
        for scores in (text["dense"], *text["pruned"]):
            del scores["losses"]
    assert page.data["plan"] == plan
    assert page.data["evaluation"]["texts"] == evaluated["texts"]
    assert page.data["benchmark"]["pruned"] == benched["pruned"]


def test_missing_parts_name_the_commands_that_fill_them(exported, tmp_path):
    write_measured(tmp_path, make_plan(12, 3))
    result = exported("report")
    assert "not measured yet: speed and memory; sleb bench plan.json --every 2" in result.stdout
    page = Page(tmp_path / "plan.report.html")
    assert "sleb eval plan.json --every 2 --tasks piqa,arc_easy" in page.text
    assert "sleb bench plan.json --every 2" in page.text
    assert page.figures == {"search", "loss"}


def changed(result, change):
    """Return a result whose data `change` has edited."""
    data = result.to_data()
    change(data)
    return type(result).model_validate_json(json.dumps(data))


def bare(record):
    """Return a record without all that may be null in it."""
    if isinstance(record, tuple):
        return tuple(map(bare, record))
    if not isinstance(record, BaseModel):
        return record
    kinds = {name: get_args(field.annotation) for name, field in type(record).model_fields.items()}
    values = {name: None if NoneType in kind else bare(getattr(record, name)) for name, kind in kinds.items()}
    return record.model_copy(update=values)


def test_results_may_lack_whatever_is_optional(report, exported):
    plan = bare(make_plan(12, 3))
    # Each size on its own, as a refinement may find them.
    sizes = [plan.removals[:1], (plan.removals[2], plan.removals[1]), (*plan.removals[1:], plan.removals[0])]
    steps = [
        step.model_copy(update={"scores": {}, "removals": removals, "block": removals[-1]})
        for step, removals in zip(plan.steps, sizes, strict=True)
    ]
    plan = plan.model_copy(update={"steps": tuple(steps), "removals": sizes[-1]})

    def of_odd_tasks(data):
        data["tasks"][0] |= {"doc_ids": []}
        data["tasks"][1] |= {"higher_is_better": False, "metric": "repetition", "items_sha256": "0" * 64}

    evaluation = make_evaluation(plan, items=40, every=1, tasks=("group", "sleb_lists"))
    benchmark = bare(make_benchmark(plan, every=1, batches=()))
    page = report(plan, evaluation=changed(bare(evaluation), of_odd_tasks), benchmark=benchmark)
    assert page.figures == FIGURES - {"search", "inter-token-latency", "memory", "quality-and-speed-generation"}
    assert "accuracy kept" not in page.text
    assert "repetition, lower is better" in page.text
    assert "sleb search acme/Tiny-1B --remove 3" in page.text
    assert "nan" not in page.text
    assert "without 3 of 12 blocks" in exported("summary").stdout


def recovery_of(plan):
    """Return what `sleb apply --recover` could say of a plan."""
    figures = (2.0, 0.0, 1.0), (2.5, 0.4, 0.6), (2.2, 0.1, 0.9)
    losses = [LossesRecord(loss=loss, divergence=kl, accepted=kept) for loss, kl, kept in figures]
    texts = dict.fromkeys(["train_text", "validation_text", "test_text"], plan.calibration)
    closed_form = ClosedFormRecord(fits=())
    return RecoveryRecord(
        **texts, dense=losses[0], pruned=losses[1], closed_form=closed_form, closed_form_losses=losses[2]
    )


def test_names_tell_apart_what_was_measured_twice():
    plan = make_plan(8, 2)
    all_items = make_evaluation(plan, items=400, texts=("a/test.txt", "b/test.txt"))
    some = make_evaluation(plan, items=100, texts=())
    both = all_items.model_copy(update={"tasks": (*all_items.tasks, *some.tasks)})
    (_, other), first = both.texts, both.texts[0]
    assert text_names((first, other.model_copy(update={"tokens_sha256": "1" * 64}))) == [
        "test.txt (tokens 00000000)", "test.txt (tokens 11111111)",
    ]  # fmt: skip
    names = task_names(both.tasks)
    assert len(set(names)) == len(names)
    assert any(name.endswith(", 400 items") for name in names)


def test_a_recovered_plan_says_what_came_back(report):
    plan = make_plan(8, 2)
    recovery = recovery_of(plan)
    text = report(plan.model_copy(update={"recovery": recovery})).text
    assert recovery.summary in text
    assert "sleb eval plan.json --tasks" in text  # recovered weights have one size
    assert "the others were given new weights" in text
    drawn = f"--samples {3 * plan.calibration.sequences}"
    assert f"sleb apply plan.json --recover --calibration wikitext2 {drawn} \\ --sequence-length 2048" in text


@pytest.mark.parametrize(
    ("searched_on", "measured_on", "remark"),
    [
        ("wikitext2", "wikitext2", ""),  # of which calibration reads another split
        ("c4", "diary.txt", ""),
        ("diary.txt", "/home/jane/diary.txt", " (searched on)"),
        ("self:0.5,diary.txt:0.5", "diary.txt", " (searched on)"),
        ("self:0.5,c4:0.5", "wikitext2", ""),
        ("acme/news::train", "acme/news", " (searched on)"),
        ("acme/news", "acme/news::test", ""),
    ],
)
def test_a_text_that_was_searched_on_is_called_so(exported, tmp_path, searched_on, measured_on, remark):
    plan = make_plan(8, 2, text=searched_on)
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40, tasks=(), texts=(measured_on,)))
    said = " ".join(exported("summary").stdout.split())
    assert f"Its perplexity on {measured_on.rpartition('jane/')[2]}{remark} rises" in said


def test_one_text_read_in_several_ways_has_several_names(report):
    plan = make_plan(12, 4, text="diary.txt")

    def also_short(data):
        (text,) = data["texts"]
        for scores in text["pruned"]:  # within a decade, where axes are labelled between powers of ten, too
            scores["divergence"] |= {"median": 0.21, "mean": 0.3, "p90": 0.5, "p99": 0.7}
        data["texts"] += [text | {"sequence_length": 512, "tokens_sha256": digit * 64} for digit in "12"]

    evaluation = changed(make_evaluation(plan, items=40, tasks=(), texts=("diary.txt",)), also_short)
    page = report(plan, evaluation=evaluation)
    for length, tokens in (("2,048", "0"), ("512", "1"), ("512", "2")):
        assert page.text.count(f"diary.txt (windows of {length}, tokens {tokens * 8}, searched on)") > 3
    assert "Perplexity on text" in page.text
    assert "not searched on" not in page.text
    pictures = "".join(page.pictures)
    assert "$" not in pictures
    assert ">0.5</text>" in pictures


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({4: 5, 64: 5, 256: 5}, " times as fast (95% interval {}), with 1 prompt of 256 tokens and 8 new tokens"),
        ({4: 5, 64: 5, 256: 1}, " times as fast (95% interval {}), with 1 prompt of 64 tokens and 8 new tokens"),
        ({4: 1, 64: 1, 256: 1}, " in 1 run, too few for an interval, with 1 prompt of 256 tokens and 8 new tokens"),
        ({4: 1, 64: 3, 256: 3}, " in 3 runs, too few for an interval, with 1 prompt of 256 tokens and 8 new tokens"),
    ],
    ids=["largest", "with an interval", "one run", "few runs"],
)
def test_the_headline_names_the_largest_workload(exported, tmp_path, runs, said):
    plan = make_plan(8, 2)
    swept = [
        make_benchmark(plan, iterations=count, workloads=[("generation", 1, length, 8)])
        for length, count in runs.items()
    ]
    workloads = [result for benchmark in swept for result in benchmark.workloads]
    intervals = [f"{ends.low:.2f} to {ends.high:.2f}" for result in workloads if (ends := result.pruned[-1].interval)]
    write_measured(tmp_path, plan, benchmark=swept[0].model_copy(update={"workloads": tuple(workloads)}))
    assert said.format(intervals[-1] if intervals else "") in " ".join(exported("summary").stdout.split())


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((0.0, 0.01, 0.02), "Use it where 95% of the accuracy is enough."),
        (
            (0.0, 0.02, 0.2),
            "To keep 95% of the accuracy, remove 2 blocks, the most of any measured size that keeps it.",
        ),
        ((0.1, 0.2, 0.2), "remove fewer blocks than were measured, or recover it: `sleb apply --recover --heal`."),
    ],
)
def test_the_headline_says_what_to_do(exported, tmp_path, lost, said):
    plan = make_plan(8, 3)

    def differ(data):
        for task in data["tasks"]:
            for entry, loss in zip(task["pruned"], lost, strict=True):
                entry["difference"] = -loss * task["dense"]["value"]

    write_measured(tmp_path, plan, evaluation=changed(make_evaluation(plan, every=1, items=40), differ))
    assert said in " ".join(exported("summary").stdout.split())


def test_what_a_text_says_is_never_markup(report):
    evil = "</script><script>alert(1)</script><b>"
    plan = make_plan(8, 2, name="<script>Tiny<b>")
    sample = plan.sample_generation.model_copy(update={"pruned": evil, "prompt": evil})
    plan = plan.model_copy(update={"sample_generation": sample})

    def flip(data):
        data["tasks"][0]["pruned"][-1]["flips"][0] |= {"prompt": evil, "pruned": evil}

    evaluation = make_evaluation(plan, items=40, tasks=(f"task{evil}",), texts=(f"text $x^2$ {evil}",))
    page = report(plan, evaluation=changed(evaluation, flip))
    assert page.html.count("<script") == 2
    assert not any("<b>" in text or "<script" in text for text in (page.html.replace("<script", "", 2), *page.pictures))
    assert evil in page.text
    assert page.data["plan"]["model"]["id"] == plan.model.id


def test_local_folders_stay_private(exported, tmp_path):
    plan = make_plan(8, 2, name="/home/jane/models/mine", text="/home/jane/texts/diary.txt")
    evaluation = make_evaluation(plan, items=40, texts=("/home/jane/texts/other.txt",))
    write_measured(tmp_path, plan, evaluation=evaluation)
    for name in ("report", "summary"):
        exported(name, "-o", name)
        text = (tmp_path / name).read_text()
        assert "jane" not in text
        assert {"diary.txt", "other.txt"} <= set(re.findall(r"\w+\.txt", text))
    assert "jane" not in exported("summary", "--json").stdout


@pytest.mark.parametrize(("own", "damaged"), [("0" * 64, "1" * 64), ("{", "")], ids=["another model", "not JSON"])
def test_results_that_do_not_belong_are_left_out(exported, tmp_path, own, damaged):
    plan = make_plan(8, 2)
    kept = write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40)).with_suffix(".eval.json")
    kept.write_text(kept.read_text().replace(own, damaged, 1))
    result = exported("summary", "--json")
    assert "warning: Ignoring plan.eval.json: " in result.stderr
    document = json.loads(result.stdout)["document"]
    assert document["evaluation"] is None
    assert document["missing"][0]["command"] == "sleb eval plan.json --every 2"


def test_only_results_of_the_sizes_of_the_plan_count(exported, tmp_path):
    plan, other = make_plan(12, 4), make_plan(12, 4, seed=2)
    # Both remove block 7 first, and what was measured of that stays.
    assert [set(removals) in map(set, plan.by_size) for removals in other.by_size] == [True, False, False, False]
    write_measured(tmp_path, plan, evaluation=make_evaluation(other, items=40, every=1))
    result = exported("summary", "--json")
    assert "Ignoring 3 sizes in plan.eval.json that plan.json does not have." in result.stderr
    assert json.loads(result.stdout)["document"]["evaluation"]["sizes"] == [[7]]
    # A plan that is cut is about fewer.
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40), benchmark=make_benchmark(plan))
    result = exported("summary", "--remove", 2)
    assert result.stderr == ""
    assert "acme/Tiny-1B without 2 of 12 blocks" in result.stdout
    assert "sleb apply plan.json --remove 2" in result.stdout


def test_only_force_replaces_pages_and_figures_and_never_other_files(exported, tmp_path):
    plan = make_plan(3, 1, raced=False)
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40), benchmark=make_benchmark(plan))
    page, folder = tmp_path / "plan.report.html", tmp_path / "plan.figures"
    page.write_text("mine")
    folder.mkdir()
    (folder / "loss.png").write_text("an older one")
    assert "plan.report.html already exists" in exported("report", code=8).stderr
    assert "plan.figures already exists" in exported("figures", code=8).stderr
    assert page.read_text() == "mine"
    exported("report", "--force")
    exported("figures", "--force")
    assert "wrote again.html" in exported("report", "-o", "again.html").stdout
    assert page.read_text().startswith("<!doctype html>")
    assert page.read_text() == (tmp_path / "again.html").read_text()
    pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert pictures.keys() == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    for name, content in pictures.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml"), name
        assert name.endswith("png") or (b"<dc:title>" in content and b"<text" in content)
    (folder / "diary.txt").write_text("mine")
    assert "holds other files, such as diary.txt" in exported("figures", "--force", code=8).stderr


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_it_says_how_to_install_it(exported, tmp_path, monkeypatch, package):
    write_measured(tmp_path, make_plan(6, 1))
    monkeypatch.setitem(sys.modules, package, None)
    said = exported("report", code=7).stderr
    assert f"This needs {package}." in said
    assert "pip install 'sleb[report]'" in said
    exported("summary")


def test_the_summary_fits_80_columns(run_sleb, measured):
    file, evaluation, benchmark = measured
    result = run_sleb("export", file, "--to", "summary")
    assert max(len(line) for line in result.stdout.splitlines() if str(file) not in line) <= 80
    words = " ".join(result.stdout.split())
    text, timing = evaluation.texts[0], benchmark.workloads[-1].pruned[-1]
    before, after = (format_perplexity(scores.perplexity) for scores in (text.dense, text.pruned[-1]))
    assert f"Its perplexity on wikitext2 rises from {before} to {after}" in words
    interval = f"{timing.interval.low:.2f} to {timing.interval.high:.2f}"
    assert f"It generates text {timing.speedup:.2f} times as fast (95% interval {interval})" in words


def test_a_checkpoint_of_ours_has_a_summary_other_models_none(exported, run_sleb, llama_plan, tiny_llama):
    assert "describes a plan" in exported("summary", tiny_llama, "--blocks", "1", code=2).stderr
    assert run_sleb("apply", llama_plan, "-o", "pruned").exit_code == 0
    said = exported("summary", "pruned").stdout
    assert "tiny-llama without 2 of 6 blocks" in said
    assert "sleb eval pruned/sleb_plan.json --every 2" in said


def test_the_command_it_names_finds_the_same_plan(run_sleb, llama_plan, tiny_llama, text_file, tmp_path):
    document = json.loads(run_sleb("export", llama_plan, "--to", "summary", "--json").stdout)["document"]
    command, apply = (shlex.split(line) for line in document["commands"])
    # A published plan names what is local without its folders.
    words = [{tiny_llama.name: str(tiny_llama), text_file.name: str(text_file)}.get(word, word) for word in command]
    words[words.index("-o") + 1] = "again.json"
    result = run_sleb(*words[1:])
    assert result.exit_code == 0, result.stderr
    again, plan = (json.loads(path.read_text()) for path in (tmp_path / "again.json", llama_plan))
    for name in ("removals", "steps", "search", "calibration"):
        assert again[name] == plan[name]
    assert apply == ["sleb", "apply", str(llama_plan)]


class Greedy(sleb.FileExporter):
    """A plugin that claims to need no model, and writes one."""

    name = "wants-more"
    needs_model = False

    def export(self, pruning, output, writer):
        writer.write_checkpoint(output)


def test_an_exporter_that_needs_no_model_gets_none(exported, tmp_path, monkeypatch):
    offered = [*exporters.sleb_exporters(), Greedy()]
    monkeypatch.setattr(exporters, "sleb_exporters", sleb.hookimpl(lambda: offered))
    write_measured(tmp_path, make_plan(6, 1))
    assert "declares that it needs none" in exported("wants-more", code=6).stderr


def test_rows_hold_every_number_of_the_records(exported, tmp_path):
    plan = make_plan(12, 6)
    evaluation, benchmark = make_evaluation(plan, items=40), make_benchmark(plan)
    write_measured(tmp_path, plan, evaluation=evaluation, benchmark=benchmark)
    rows = list(csv.DictReader(exported("csv").stdout.splitlines()))
    lines = [json.loads(line) for line in exported("jsonl").stdout.splitlines()]
    assert [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines] == rows

    def found(kind, figure, removals, of):
        (row,) = (
            row
            for row in lines
            if (row["kind"], row["figure"], row["removals"], row["of"]) == (kind, figure, removals, of)
        )
        return row["value"], row["low"], row["high"]

    all_six, text, task = "+".join(map(str, plan.removals)), evaluation.texts[0], evaluation.tasks[0]
    scores, answers, workload = text.pruned[-1], task.pruned[-1], benchmark.workloads[0]
    timing = workload.pruned[-1]
    name = next(row["of"] for row in lines if row["kind"] == "text")
    timed = next(row["of"] for row in lines if row["kind"] == "workload")
    assert found("text", "perplexity", "", name) == (text.dense.perplexity, None, None)
    assert found("text", "log_ratio", all_six, name) == (scores.log_ratio, scores.interval.low, scores.interval.high)
    assert found("text", "divergence_accepted", all_six, name)[0] == scores.divergence.accepted
    assert found("task", f"{task.metric} difference", all_six, task.task)[0] == answers.difference
    assert found("workload", "speedup", all_six, timed)[:2] == (timing.speedup, timing.interval.low)
    assert found("size", "parameters", all_six, plan.model.id.rpartition("/")[2])[0] == benchmark.pruned[-1].parameters
    assert found("step", "score", all_six, plan.search.metric)[0] == plan.steps[-1].score
    candidates = [row for row in lines if row["kind"] == "candidate" and row["removed"] == 6]
    assert {int(row["of"]): row["value"] for row in candidates} == plan.steps[-1].scores
    assert {row["removed"] for row in lines if row["kind"] == "step"} == set(range(7))


def test_a_draft_pays_if_more_is_kept_than_its_tokens_cost(exported, tmp_path):
    plan = make_plan(12, 6)
    write_measured(tmp_path, plan)
    assert "Not measured: how many of its tokens are kept. Run `sleb eval plan.json`." in exported("draft").stdout
    evaluation, benchmark = make_evaluation(plan, items=40), make_benchmark(plan)
    write_measured(tmp_path, plan, evaluation=evaluation, benchmark=benchmark)
    found = json.loads(exported("draft", "--json").stdout)["document"]
    generation = next(each for each in benchmark.workloads if each.workload.new_tokens)
    cost = generation.pruned[-1].tpot_ms.median / generation.dense.tpot_ms.median
    assert (found["accepted"], found["cost"]) == (evaluation.texts[0].pruned[-1].divergence.accepted, cost)
    accepted, tokens = found["accepted"], found["tokens"]
    assert found["speedup"] == pytest.approx((1 - accepted ** (tokens + 1)) / (1 - accepted) / (tokens * cost + 1))
    # Its recovered checkpoint is what drafts, and what was measured of that counts.
    write_measured(tmp_path, plan.model_copy(update={"recovery": recovery_of(plan)}))
    assert json.loads(exported("draft", "--json").stdout)["document"]["accepted"] == 0.9


def test_a_draft_of_a_gguf_file_has_the_names_of_the_files(exported, tmp_path):
    plan = make_plan(12, 6)
    model = plan.model.model_copy(update={"id": "/models/tiny.gguf"})
    write_measured(tmp_path, plan.model_copy(update={"model": model}))
    lines = json.loads(exported("draft", "--json").stdout)["document"]["lines"]
    assert "-m tiny.gguf -md tiny-sleb-6-blocks.gguf" in lines["llama.cpp"]
    assert 'from_pretrained("tiny-sleb-6-blocks")' in lines["transformers"]


@pytest.mark.parametrize("cost", [0.05, 0.3, 0.6, 0.95])
def test_the_best_draft_is_the_fastest_of_all_lengths(cost):
    for accepted in (0.0, 0.2, 0.5, 0.8, 1.0):
        # Round by round: a token is kept if all before it are, and the dense model adds one.
        speeds = [
            (1 + sum(accepted ** (kept + 1) for kept in range(length))) / (1 + length * cost) for length in range(1, 17)
        ]
        tokens, speedup = best_draft(accepted, cost)
        assert speedup == pytest.approx(max(speeds))
        assert speeds[tokens - 1] == pytest.approx(speedup)
        assert (speedup > 1) == (accepted > cost)  # Leviathan et al., corollary 3.9
