"""`sleb export --to report`, `figures` and `summary`, through `main()`: what is known of a plan, for people."""

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import sleb_plugins as sleb
from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured
from sleb_cli import requests
from sleb_cli.__main__ import main
from sleb_cli.exporters.reproduce import DEFAULTS, DEMO_DEFAULTS
from sleb_cli.plan import ClosedFormRecord, LossesRecord, RecoveryRecord
from sleb_cli.results import BenchResult, EvalResult
from sleb_cli.units import format_perplexity, format_share

FIGURES = {
    "quality-and-speed-generation", "quality-and-speed-prompt", "perplexity", "divergence", "tasks", "differences",
    "speedup", "latency", "inter-token-latency", "memory", "search", "loss",
}  # fmt: skip


class Page(HTMLParser):
    """A page as a reader and as a browser sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.words, self._hidden = html, [], [], 0
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words).replace("\N{NO-BREAK SPACE}", " "))
        self.text = self.text.replace("\N{MINUS SIGN}", "-")

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def data(self):
        return json.loads(re.search(r'id="sleb-data">(.*?)</script>', self.html, re.DOTALL)[1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A plan of which everything was measured."""
    folder = tmp_path_factory.mktemp("measured")
    plan = make_plan(30, 6)
    evaluation, benchmark = make_evaluation(plan, items=200), make_benchmark(plan)
    return write_measured(folder, plan, evaluation=evaluation, benchmark=benchmark), evaluation, benchmark


@pytest.fixture(scope="module")
def page(measured):
    """Its report."""
    file, *_ = measured
    assert main(["export", str(file), "--to", "report", "-q"]) == 0
    return Page(file.with_suffix(".report.html").read_text(encoding="utf-8"))


def test_it_is_one_file_that_loads_nothing(page):
    assert len(page.html.encode()) < 1_000_000
    assert page.values("src") == []
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.values("href"))
    assert not re.search(r"@import|url\((?!#)", page.html)
    assert "default-src 'none'" in page.html


def test_every_part_is_there_with_a_heading_and_words_for_each_picture(page):
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(int(after[1]) <= int(before[1]) + 1 for before, after in pairwise(headings))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert {picture["aria-labelledby"].removesuffix("-title") for picture in pictures} == FIGURES
    assert all(picture["role"] == "img" for picture in pictures)
    assert {picture[name] for picture in pictures for name in ("aria-labelledby", "aria-describedby")} <= set(ids)
    referred = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page.html)
    assert {name for pair in referred for name in pair if name} <= set(ids)
    tables = [tag for tag, _ in page.tags if tag == "table"]
    assert len(tables) == [tag for tag, _ in page.tags].count("caption") > 8
    assert all(attributes["scope"] in ("col", "row") for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_the_numbers_shown_are_those_of_the_files(page, measured):
    file, evaluation, benchmark = measured
    plan = json.loads(file.read_text())
    for step in plan["steps"]:
        assert f" {step['score']:.4f} {format_perplexity(step['perplexity'])} " in page.text
        assert f" {format_perplexity(step['held_out']['perplexity'])} " in page.text
    for text in evaluation.texts:
        for scores in (text.dense, *text.pruned):
            assert f" {format_perplexity(scores.perplexity)} " in page.text
    for task in evaluation.tasks:
        worst = task.pruned[-1]
        assert f" {worst.lost} {worst.gained} " in page.text
        assert f" {100 * worst.difference:+.1f} " in page.text
        assert f" {format_share(worst.retention)} " in page.text
    for result in benchmark.workloads:
        for timing in result.pruned:
            interval = f"{timing.interval.low:.2f} to {timing.interval.high:.2f}"
            assert f" {timing.speedup:.2f}x {interval} {timing.bound:.2f}x " in page.text
    assert "113.3M parameters remain of 134.5M" in page.text


def test_its_data_are_those_of_the_files_without_the_samples(page, measured):
    file, *_ = measured
    assert page.data["plan"] == json.loads(file.read_text())
    evaluated = json.loads(file.with_suffix(".eval.json").read_text())
    for text in evaluated["texts"]:
        for scores in (text["dense"], *text["pruned"]):
            del scores["losses"]
    assert page.data["evaluation"]["texts"] == evaluated["texts"]
    benched = json.loads(file.with_suffix(".bench.json").read_text())
    assert page.data["benchmark"]["pruned"] == benched["pruned"]


def test_the_same_files_make_the_same_page(run_sleb, page, measured, tmp_path):
    file, *_ = measured
    result = run_sleb("export", file, "--to", "report", "-o", "again.html")
    assert result.exit_code == 0, result.stderr
    assert "wrote again.html" in result.stdout
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.html


def test_an_existing_file_is_replaced_only_by_force(run_sleb, tmp_path):
    file = write_measured(tmp_path, make_plan(6, 1))
    (tmp_path / "plan.report.html").write_text("mine")
    result = run_sleb("export", "--to", "report")
    assert (result.exit_code, "plan.report.html already exists" in result.stderr) == (8, True)
    assert (tmp_path / "plan.report.html").read_text() == "mine"
    assert run_sleb("export", file, "--to", "report", "--force").exit_code == 0
    assert "<!doctype html>" in (tmp_path / "plan.report.html").read_text()


def test_missing_parts_name_the_command_that_fills_them(run_sleb, tmp_path):
    write_measured(tmp_path, make_plan(12, 3))
    result = run_sleb("export", "--to", "report")
    assert result.exit_code == 0, result.stderr
    assert "not measured yet: speed and memory; sleb bench plan.json --every 2" in result.stdout
    page = Page((tmp_path / "plan.report.html").read_text())
    assert "sleb eval plan.json --every 2 --tasks piqa,arc_easy" in page.text
    assert "sleb bench plan.json --every 2" in page.text
    assert {attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "svg"} == {
        "search-title",
        "loss-title",
    }


def test_results_may_lack_whatever_is_optional(run_sleb, tmp_path):
    plan = make_plan(12, 3, raced=False)
    steps = [step.model_copy(update={"held_out": None, "scores": {}}) for step in plan.steps]
    # Each size on its own, as a beam finds them.
    sizes = [plan.removals[:1], (plan.removals[2], plan.removals[1]), (*plan.removals[1:], plan.removals[0])]
    steps = [
        step.model_copy(update={"removals": removals, "block": removals[-1]})
        for step, removals in zip(steps, sizes, strict=True)
    ]
    dense = plan.dense.model_copy(update={"held_out": None})
    changes = {"steps": tuple(steps), "removals": sizes[-1], "dense": dense, "sample_generation": None}
    plan = plan.model_copy(update=changes)
    evaluation = make_evaluation(plan, items=40, every=1, tasks=("group", "sleb_repetition")).to_data()
    for text in evaluation["texts"]:
        for scores in (text["dense"], *text["pruned"]):
            scores |= {"word_perplexity": None, "byte_perplexity": None, "bits_per_byte": None}
        for scores in text["pruned"]:
            scores |= {"standard_error": None, "interval": None}
            scores["divergence"]["standard_error"] = None
    group, canary = evaluation["tasks"]
    group |= {"items_sha256": None, "doc_ids": []}
    canary |= {"higher_is_better": False, "metric": "repetition"}
    canary["dense"] |= {"stderr": None, "interval": None}
    absent = ("stderr", "interval", "retention", "standard_error", "difference_interval", "mcnemar_p", "lost", "gained")
    for task in (group, canary):
        for scores in task["pruned"]:
            scores |= dict.fromkeys([*absent, "items_needed"])
    benchmark = make_benchmark(plan, every=1, batches=()).to_data()
    benchmark["governor"] = None
    for model in (benchmark["dense"], *benchmark["pruned"]):
        model["load_seconds"] = None
    for result in benchmark["workloads"]:
        result["warmup"] |= {"deviation": None, "stable": None}
        for timing in (result["dense"], *result["pruned"]):
            timing |= {"memory": None, "energy": None, "work": None}
        for timing in result["pruned"]:
            timing["bound"] = None
    records = (EvalResult, evaluation), (BenchResult, benchmark)
    evaluation, benchmark = (record.model_validate_json(json.dumps(data)) for record, data in records)
    write_measured(tmp_path, plan, evaluation=evaluation, benchmark=benchmark)
    result = run_sleb("export", "--to", "report")
    assert result.exit_code == 0, result.stderr
    page = Page((tmp_path / "plan.report.html").read_text())
    shown = {attributes["aria-labelledby"].removesuffix("-title") for tag, attributes in page.tags if tag == "svg"}
    assert shown == FIGURES - {"search", "inter-token-latency", "memory", "quality-and-speed-generation"}
    assert "accuracy kept" not in page.text
    assert "repetition (lower is better)" in page.text
    assert "sleb search acme/Tiny-1B --remove 3" in page.text
    assert "nan" not in page.text
    assert run_sleb("export", "--to", "summary").exit_code == 0


def test_a_recovered_plan_says_what_came_back(run_sleb, tmp_path):
    plan = make_plan(8, 2)
    losses = [LossesRecord(loss=loss, divergence=kl) for loss, kl in ((2.0, 0.0), (2.5, 0.4), (2.2, 0.1))]
    texts = dict.fromkeys(["text", "deciding_text", "report_text"], plan.calibration)
    closed_form = ClosedFormRecord(fits=())
    recovery = RecoveryRecord(
        **texts, dense=losses[0], pruned=losses[1], closed_form=closed_form, closed_form_losses=losses[2]
    )
    write_measured(tmp_path, plan.model_copy(update={"recovery": recovery}))
    assert run_sleb("export", "--to", "report").exit_code == 0
    text = Page((tmp_path / "plan.report.html").read_text()).text
    assert f"{format_share(recovery.nats_back)} of the loss that the removal cost is back" in text
    assert f"{format_share(recovery.divergence_left)} of the divergence from the dense model is left" in text
    assert "the others were given new weights" in text
    assert "sleb apply plan.json --recover --calibration wikitext2 --sequence-length 2048" in text


def changed(result, change):
    """Return a result whose data `change` has edited."""
    data = json.loads(json.dumps(result.to_data()))
    change(data)
    return type(result).model_validate_json(json.dumps(data))


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
def test_a_text_that_was_searched_on_is_called_so(run_sleb, tmp_path, searched_on, measured_on, remark):
    plan = make_plan(8, 2)
    plan = plan.model_copy(update={"calibration": plan.calibration.model_copy(update={"source": searched_on})})
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40, tasks=(), texts=(measured_on,)))
    summary = " ".join(run_sleb("export", "--to", "summary").stdout.split())
    assert f"Its perplexity on {measured_on.rpartition('jane/')[2]}{remark} rises" in summary


def test_one_text_read_in_two_ways_has_two_names_and_axes_have_plain_numbers(run_sleb, tmp_path):
    plan = make_plan(12, 4)
    calibration = plan.calibration.model_copy(update={"source": "diary.txt"})
    plan = plan.model_copy(update={"calibration": calibration})

    def also_short(data):
        (text,) = data["texts"]
        for scores in text["pruned"]:  # within a decade, where axes are labelled between powers of ten, too
            scores["divergence"] |= {"median": 0.21, "mean": 0.3, "p90": 0.5, "p99": 0.7}
        data["texts"].append(text | {"sequence_length": 512, "tokens_sha256": "1" * 64})
        data["texts"].append(text | {"sequence_length": 512, "tokens_sha256": "2" * 64})

    evaluation = changed(make_evaluation(plan, items=40, tasks=(), texts=("diary.txt",)), also_short)
    write_measured(tmp_path, plan, evaluation=evaluation)
    assert run_sleb("export", "--to", "report").exit_code == 0
    page = Page((tmp_path / "plan.report.html").read_text())
    names = [
        "diary.txt (windows of 2,048, tokens 00000000, searched on)",
        "diary.txt (windows of 512, tokens 11111111, searched on)",
        "diary.txt (windows of 512, tokens 22222222, searched on)",
    ]
    for name in names:
        assert page.text.count(name) > 6  # in sentences, tables and legends
    assert "Perplexity on text" in page.text
    assert "not searched on" not in page.text
    assert "$" not in page.text
    assert " 0.5 " in page.text


@pytest.mark.parametrize(
    ("iterations", "said"),
    [
        (
            {4: 5, 64: 5, 256: 5},
            " {low:.2f} to {high:.2f}), with 1 prompt of 256 tokens and 8 new tokens",
        ),
        ({4: 5, 64: 5, 256: 1}, " {low:.2f} to {high:.2f}), with 1 prompt of 64 tokens and 8 new tokens"),
        ({4: 1, 64: 1, 256: 1}, " in 1 run, too few for an interval, with 1 prompt of 256 tokens and 8 new tokens"),
        ({4: 1, 64: 3, 256: 3}, " in 3 runs, too few for an interval, with 1 prompt of 256 tokens and 8 new tokens"),
    ],
    ids=["largest", "with an interval", "one run", "few runs"],
)
def test_the_headline_names_the_largest_workload_that_was_measured_well(run_sleb, tmp_path, iterations, said):
    plan = make_plan(8, 2)

    def swept(data):
        _, generation = data["workloads"]
        data["workloads"] = []
        for length, count in iterations.items():
            result = json.loads(json.dumps(generation))
            result["workload"] |= {"batch_size": 1, "prompt_length": length, "new_tokens": 8, "iterations": count}
            for timing in (result["dense"], *result["pruned"]):
                timing |= {name: timing[name][:count] for name in ("e2els", "ttfts", "itls")}
            for timing in result["pruned"]:
                timing["speedup"] = 1 + length / 1000
                timing["interval"] = {"low": length / 1000, "high": 2.0} if count >= 5 else None
            data["workloads"].append(result)

    write_measured(tmp_path, plan, benchmark=changed(make_benchmark(plan, every=1, batches=(1,)), swept))
    words = " ".join(run_sleb("export", "--to", "summary").stdout.split())
    assert said.format(low=int(re.search(r"of (\d+) tokens", said)[1]) / 1000, high=2.0) in words


def test_what_a_text_says_is_never_markup(run_sleb, tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    plan = make_plan(8, 2, name="<script>Tiny<b>")
    sample = plan.sample_generation.model_copy(update={"pruned": evil, "prompt": evil})
    plan = plan.model_copy(update={"sample_generation": sample})
    evaluation = make_evaluation(plan, items=40, tasks=(f"task{evil}",), texts=(f"text $x^2$ {evil}",)).to_data()
    flip = evaluation["tasks"][0]["pruned"][-1]["flips"][0]
    flip["prompt"] = flip["pruned"] = evil
    evaluation = EvalResult.model_validate_json(json.dumps(evaluation))
    write_measured(tmp_path, plan, evaluation=evaluation)
    result = run_sleb("export", "--to", "report")
    assert result.exit_code == 0, result.stderr
    page = Page((tmp_path / "plan.report.html").read_text())
    assert page.html.count("<script") == 2
    assert "<b>" not in page.html
    assert evil in page.text
    assert page.data["plan"]["model"]["id"] == plan.model.id


def test_local_folders_stay_private(run_sleb, tmp_path):
    plan = make_plan(8, 2, name="/home/jane/models/mine")
    calibration = plan.calibration.model_copy(update={"source": "/home/jane/texts/diary.txt"})
    search = plan.search.model_copy(update={"metric": "task:/home/jane/tasks/own.yaml:50"})
    plan = plan.model_copy(update={"calibration": calibration, "search": search})
    evaluation = make_evaluation(plan, items=40, texts=("/home/jane/texts/other.txt",))
    evaluation = evaluation.model_copy(update={"lm_eval": ("/home/jane/plan.lm-eval/results.json",)})
    file = write_measured(tmp_path, plan, evaluation=evaluation)
    for name, output in (("report", "plan.report.html"), ("summary", "summary.txt")):
        assert run_sleb("export", file.name, "--to", name, "-o", output).exit_code == 0
        text = (tmp_path / output).read_text()
        assert "jane" not in text
        assert "diary.txt" in text
        assert "other.txt" in text
    assert "jane" not in run_sleb("export", file.name, "--to", "summary", "--json").stdout


@pytest.mark.parametrize("damage", ["another model", "not JSON", "not of this version"])
def test_results_that_do_not_belong_are_left_out_with_a_warning(run_sleb, tmp_path, damage):
    plan = make_plan(8, 2)
    file = write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40))
    kept = file.with_suffix(".eval.json")
    data = json.loads(kept.read_text())
    if damage == "another model":
        data["model"]["fingerprint"] = "1" * 64
    elif damage == "not of this version":
        data["schema_version"] = 7
    kept.write_text("{" if damage == "not JSON" else json.dumps(data))
    result = run_sleb("export", "--to", "summary", "--json")
    assert result.exit_code == 0, result.stderr
    assert "warning: plan.eval.json is left out" in result.stderr
    document = json.loads(result.stdout)["document"]
    assert document["evaluation"] is None
    assert document["missing"][0]["command"] == "sleb eval plan.json --every 2"


def test_results_of_other_removals_are_left_out(run_sleb, tmp_path):
    plan, other = make_plan(12, 4), make_plan(12, 4, seed=2)
    # Both remove block 7 first, and what was measured of that stays.
    assert [set(removals) in map(set, plan.by_size) for removals in other.by_size] == [True, False, False, False]
    write_measured(tmp_path, plan, evaluation=make_evaluation(other, items=40, every=1))
    result = run_sleb("export", "--to", "summary", "--json")
    assert "What plan.eval.json says of 3 other removals than those of plan.json is left out" in result.stderr
    assert json.loads(result.stdout)["document"]["evaluation"]["sizes"] == [[7]]


def test_a_plan_cut_to_fewer_removals_is_about_that_size(run_sleb, tmp_path):
    plan = make_plan(12, 4)
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40), benchmark=make_benchmark(plan))
    result = run_sleb("export", "--to", "summary", "--remove", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "acme/Tiny-1B without 2 of 12 blocks" in result.stdout
    assert "sleb apply plan.json --remove 2" in result.stdout


def test_figures_are_svg_and_png(run_sleb, tmp_path):
    plan = make_plan(3, 1, raced=False)
    write_measured(tmp_path, plan, evaluation=make_evaluation(plan, items=40), benchmark=make_benchmark(plan))
    result = run_sleb("export", "--to", "figures", "-o", "pictures")
    assert result.exit_code == 0, result.stderr
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {f"{name}.{kind}" for name in FIGURES - {"perplexity"} for kind in ("svg", "png")}
    for path in (tmp_path / "pictures").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml"), path
        if path.suffix == ".svg":
            assert b"<title>" in content
            assert b"<desc>" in content
            assert b"<text" in content


def test_a_folder_with_other_files_is_never_replaced(run_sleb, tmp_path):
    write_measured(tmp_path, make_plan(6, 1))
    (tmp_path / "plan.figures").mkdir()
    result = run_sleb("export", "--to", "figures")
    assert (result.exit_code, "plan.figures already exists" in result.stderr) == (8, True)
    (tmp_path / "plan.figures" / "loss.png").write_text("an older one")
    assert run_sleb("export", "--to", "figures", "--force").exit_code == 0
    assert (tmp_path / "plan.figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "plan.figures" / "diary.txt").write_text("mine")
    result = run_sleb("export", "--to", "figures", "--force")
    assert (result.exit_code, "holds other files, such as diary.txt" in result.stderr) == (8, True)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_it_says_how_to_install_it(run_sleb, tmp_path, monkeypatch, package):
    write_measured(tmp_path, make_plan(6, 1))
    monkeypatch.setitem(sys.modules, package, None)
    result = run_sleb("export", "--to", "report")
    assert (result.exit_code, "pip install 'sleb[report]'" in result.stderr) == (7, True), result.stderr
    assert run_sleb("export", "--to", "summary").exit_code == 0


def test_the_summary_fits_80_columns(run_sleb, measured):
    file, evaluation, benchmark = measured
    result = run_sleb("export", file, "--to", "summary")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if str(file) not in line) <= 80
    words = " ".join(result.stdout.split())
    text, timing = evaluation.texts[0], benchmark.workloads[1].pruned[-1]
    before, after = (format_perplexity(scores.perplexity) for scores in (text.dense, text.pruned[-1]))
    assert f"Its perplexity on wikitext2 rises from {before} to {after}" in words
    interval = f"{timing.interval.low:.2f} to {timing.interval.high:.2f}"
    assert f"It generates text {timing.speedup:.2f} times as fast (95 % interval {interval})" in words


def test_a_model_has_no_report_but_a_checkpoint_of_ours_has(run_sleb, llama_plan, tiny_llama, tmp_path):
    result = run_sleb("export", tiny_llama, "--blocks", "1", "--to", "summary")
    assert (result.exit_code, "describes a plan" in result.stderr) == (2, True)
    assert run_sleb("apply", llama_plan, "-o", "pruned").exit_code == 0
    result = run_sleb("export", "pruned", "--to", "summary")
    assert result.exit_code == 0, result.stderr
    assert "tiny-llama without 2 of 6 blocks" in result.stdout
    assert "sleb eval pruned/sleb_plan.json --every 2" in result.stdout


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


def test_the_defaults_it_leaves_out_are_those_of_the_search():
    assert DEFAULTS == {
        "metric": requests.DEFAULT_METRIC,
        "strategy": requests.DEFAULT_STRATEGY,
        "protect_first": requests.DEFAULT_PROTECTED,
        "protect_last": requests.DEFAULT_PROTECTED,
        "seed": 0,
        "samples": requests.DEFAULT_SAMPLES,
        "sequence_length": requests.DEFAULT_LENGTH,
        "sample_tokens": requests.DEFAULT_SAMPLE_TOKENS,
        "calibration": requests.DEFAULT_CALIBRATION,
        "fast": False,
    }
    demo = {
        "samples": requests.DEMO_SAMPLES,
        "sequence_length": requests.DEMO_LENGTH,
        "calibration": requests.DEMO_CALIBRATION,
        "fast": True,
    }
    assert DEFAULTS | demo == DEMO_DEFAULTS


class Greedy(sleb.FileExporter):
    """A plugin that claims to need no model, and writes one."""

    name = "wants-more"
    needs_model = False

    def export(self, pruning, output, writer):
        writer.write_checkpoint(output)


def test_an_exporter_that_needs_no_model_gets_none(run_sleb, tmp_path, monkeypatch):
    from sleb_plugins import exporters

    offered = [*exporters.sleb_exporters(), Greedy()]
    monkeypatch.setattr(exporters, "sleb_exporters", sleb.hookimpl(lambda: offered))
    write_measured(tmp_path, make_plan(6, 1))
    result = run_sleb("export", "--to", "wants-more")
    assert (result.exit_code, "says that it needs none" in result.stderr) == (6, True)


@pytest.mark.slow
def test_a_large_report_stays_small(run_sleb, tmp_path):
    plan = make_plan(80, 32, kinds=True)
    evaluation = make_evaluation(plan, items=3000, tasks=tuple(f"task_{number}" for number in range(9)), every=4)
    write_measured(tmp_path, plan, evaluation=evaluation, benchmark=make_benchmark(plan, every=2, iterations=50))
    assert Path("plan.eval.json").stat().st_size > 3_000_000
    result = run_sleb("export", "--to", "report")
    assert result.exit_code == 0, result.stderr
    page = Page((tmp_path / "plan.report.html").read_text())
    assert len(page.html.encode()) < 1_000_000
    assert "Removed blocks by kind" in page.text
