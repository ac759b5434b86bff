"""`sleb export --to table`, through `main()`: several plans side by side."""

import csv
import math
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured
from sleb_cli.exporters.lines import Line
from sleb_cli.exporters.report.drawing import draw_by_size
from sleb_cli.exporters.table.figure import draw_figure
from sleb_cli.exporters.table.rows import PlanTable, _seen_in

OLDER = Path(__file__).parents[1] / "older_plans"
MINE = "perplexity, mine.txt (searched on)"
SPEED = "generation 1x64+32, times as fast"


@pytest.fixture
def measured(tmp_path):
    """Write two plans: the first was measured at three sizes and timed, the second at one size."""
    found = []
    for folder, metric, every in (("a", "nll", 2), ("b", "cosine", 9)):
        plan = make_plan(12, 6, text="mine.txt", raced=False)
        search = plan.search.model_copy(update={"metric": metric})
        plan = plan.model_copy(update={"search": search})
        tasks = ("piqa", "arc_easy", "sleb_sums")
        evaluation = make_evaluation(plan, texts=("mine.txt", "c4"), tasks=tasks, every=every)
        benchmark = make_benchmark(plan) if every == 2 else None
        (tmp_path / folder).mkdir()
        write_measured(tmp_path / folder, plan, evaluation=evaluation, benchmark=benchmark)
        found.append(evaluation)
    return found


@pytest.fixture
def table(sleb):
    """Export the table of both plans."""
    return lambda *options: (
        sleb("export", "a/plan.json", "b/plan.json", "--to table", *options).stdout
    )


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_a_row_per_plan_and_size_and_names_shared_settings_once(table, measured):
    lines = table().splitlines()
    names, _, *rows = [cells(line) for line in lines if line.startswith("|")]
    assert [row[:3] for row in rows] == [
        ["dense", "", "0"],
        ["nll", "greedy", "2"],
        ["nll", "greedy", "4"],
        ["nll", "greedy", "6"],
        ["cosine", "greedy", "6"],
    ]
    text = measured[0].texts[0]
    task = measured[0].tasks[0]
    dense = dict(zip(names, rows[0], strict=True))
    pruned = dict(zip(names, rows[3], strict=True))
    assert dense[MINE] == f"{text.dense.perplexity:.2f}"
    assert pruned[MINE].startswith(f"{text.pruned[2].perplexity:.2f} (")
    assert pruned["piqa, acc"].startswith(f"{task.pruned[2].value:.3f} (")
    assert dense[SPEED] == "1.00x"
    assert pruned["plan"] == "a/plan.json"
    assert "- calibration: mine.txt: 16 x 2048 tokens (4 held out)" in lines


def test_csv_has_every_number_with_its_interval_and_every_setting(table, measured, tmp_path):
    assert table("-o", "table.csv") == "wrote table.csv\n"
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    own, other = rows[3:]
    text = measured[0].texts[1].pruned[2]
    tasks = [task.pruned[2].value for task in measured[0].tasks[:2]]
    expected = {
        "perplexity, c4": text.perplexity,
        "perplexity, c4 low": text.perplexity * math.exp(-0.012),
        "perplexity, c4 high": text.perplexity * math.exp(0.012),
        "mean of tasks": statistics.fmean(tasks),
        "piqa, acc low": tasks[0] - 0.04,
        "piqa, acc high": tasks[0] + 0.04,
    }
    assert {name: float(own[name]) for name in expected} == pytest.approx(expected)
    assert own["evaluated in"] == "bfloat16 on cpu, A processor"
    assert own["calibration"] == other["calibration"]
    assert float(own[SPEED]) > 1
    assert other[SPEED] == ""


def test_figures_of_different_texts_have_columns_of_their_own(table, measured, tmp_path):
    few = make_evaluation(make_plan(12, 6), items=20, every=9)
    write_measured(tmp_path / "b", make_plan(12, 6, text="c4"), evaluation=few)
    names = cells(table().splitlines()[0])
    assert {"piqa, acc, 400 items", "piqa, acc, 20 items", "calibration"} <= set(names)
    assert "mean of tasks" not in names
    tasks = tuple(task.model_copy(update={"items_sha256": "1" * 64}) for task in few.tasks)
    others = few.model_copy(update={"tasks": tasks})
    write_measured(tmp_path / "a", make_plan(12, 6), evaluation=others)
    assert "piqa, acc, 20 items 11111111" in cells(table().splitlines()[0])


def test_the_figure_names_what_it_shows(table, measured, tmp_path):
    pytest.importorskip("matplotlib")
    table("-o", "table.svg")
    shown = "".join(ET.parse(tmp_path / "table.svg").getroot().itertext())
    for name in ("dense", "nll, greedy", "cosine, greedy", "mean of tasks", "of 12 blocks"):
        assert name in shown


def test_a_text_that_only_some_plans_were_searched_on_is_named_so(table, measured, tmp_path):
    plan = make_plan(12, 6, text="other.txt", raced=False)
    mine = make_evaluation(plan, texts=("mine.txt",), tasks=(), every=9)
    write_measured(tmp_path / "b", plan, evaluation=mine)
    names = cells(table().splitlines()[0])
    assert "perplexity, mine.txt (searched on by some plans)" in names


def test_a_text_that_no_plan_was_measured_on_has_no_remark(measured):
    assert _seen_in([], measured[0].texts[0]) == []


def test_no_cell_of_a_csv_file_is_a_formula(sleb, measured, tmp_path):
    (tmp_path / "a").rename(tmp_path / "=1+1")
    sleb("export", "./=1+1/plan.json", "b/plan.json", "--to table -o table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["plan"] for row in rows[3:]] == ["'=1+1/plan.json", "b/plan.json"]


def test_blocks_and_experts_share_no_axis(sleb, measured, tmp_path):
    pytest.importorskip("matplotlib")
    experts = OLDER / "experts.json"
    told = sleb("export", "a/plan.json", experts, "--to table -o table.svg", code=2).stderr
    assert "these plans remove blocks and experts of each block" in told
    row = {"removed": 2, "removed from": "8 experts of each block", "piqa": (0.7, None)}
    drawn = draw_figure("svg", PlanTable([row], {"piqa": str})).decode()
    assert "By experts of each block removed.<" in drawn


def test_the_points_of_a_panels_only_line_stand_at_their_sizes():
    figure = pytest.importorskip("matplotlib.figure")
    for others in (0, 1, 4):
        axis = figure.Figure().subplots()
        empty = [Line("other", {}) for _ in range(others)]
        draw_by_size(axis, [*empty, Line("nll", {0: (0.7, None), 2: (0.6, None)})])
        assert list(axis.containers[-1].lines[0].get_xdata()) == [0, 2]


def test_papers_have_latex_and_pdf_also_of_plans_without_an_evaluation(sleb, tmp_path):
    pytest.importorskip("matplotlib")
    plan = make_plan(12, 6, text="my_50%.txt", raced=False)
    write_measured(tmp_path, plan)
    (tmp_path / "b").mkdir()
    evaluation = make_evaluation(plan, texts=("my_50%.txt",), tasks=(), every=9)
    write_measured(tmp_path / "b", plan, evaluation=evaluation)
    sleb("export plan.json b/plan.json --to table -o table.tex")
    latex = (tmp_path / "table.tex").read_text()
    assert r"\begin{tabular}[b]{@{}r@{}}perplexity, \\ searched on\end{tabular} &" in latex
    assert r"}perplexity, \\ my\_50\%.txt \\ \scriptsize (searched on)\end{tabular}" in latex
    # Beside a plan without an evaluation, the search's own perplexity stands for both.
    assert latex.count(f"& {plan.steps[0].perplexity:.2f} &") == 2
    value = evaluation.texts[0].pruned[0].perplexity
    # The value, not its interval, stands level with the method.
    assert rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{value:.2f} \\ \scriptsize (" in latex
    assert "batch" not in latex
    sleb("export plan.json --to table -o figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_latex_has_the_plan_of_each_row_as_a_comment(sleb, measured, tmp_path):
    sleb("export a/plan.json b/plan.json --to table -o table.tex")
    latex = (tmp_path / "table.tex").read_text()
    header = latex.partition(r"\toprule")[2].partition(r"\midrule")[0]
    assert "plan" not in header
    assert r" \\ % a/plan.json" in latex
    assert r" \\ % b/plan.json" in latex


def test_a_figure_needs_a_measurement(sleb, tmp_path):
    plan = make_plan(12, 6)
    # As of a model that only reads.
    dense = plan.dense.model_copy(update={"perplexity": None})
    steps = tuple(step.model_copy(update={"perplexity": None}) for step in plan.steps)
    write_measured(tmp_path, plan.model_copy(update={"dense": dense, "steps": steps}))
    told = sleb("export plan.json --to table -o table.svg", code=2).said
    assert "Nothing was measured of these plans." in told
