"""`sleb export --to table`, through `main()`: several plans side by side."""

import csv
import math
import statistics
import xml.etree.ElementTree as ET
from functools import partial

import pytest

from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured

PLANS = ("a/plan.json", "b/plan.json")


@pytest.fixture
def measured(tmp_path):
    """Write two plans, of which the first was measured at three sizes and timed, the second at one
    size.
    """
    found = []
    for folder, metric, every in (("a", "nll", 2), ("b", "cosine", 9)):
        (tmp_path / folder).mkdir()
        plan = make_plan(12, 6, text="mine.txt")
        plan = plan.model_copy(
            update={"search": plan.search.model_copy(update={"metric": metric, "fast": False})}
        )
        evaluation = make_evaluation(
            plan, texts=("mine.txt", "c4"), tasks=("piqa", "arc_easy", "sleb_sums"), every=every
        )
        write_measured(
            tmp_path / folder,
            plan,
            evaluation=evaluation,
            benchmark=make_benchmark(plan) if every == 2 else None,
        )
        found.append(evaluation)
    return found


@pytest.fixture
def table(sleb):
    return partial(sleb, "export", *PLANS, "--to", "table")


def test_markdown_has_a_row_per_plan_and_size_and_names_shared_settings_once(table, measured):
    lines = table().stdout.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert [row[:3] for row in rows[2:]] == [
        ["dense", "", "0"], *(["nll", "greedy", size] for size in "246"), ["cosine", "greedy", "6"]
    ]  # fmt: skip
    dense, cells = (dict(zip(rows[0], rows[at], strict=True)) for at in (2, 5))
    text, task = measured[0].texts[0], measured[0].tasks[0]
    assert dense["perplexity, mine.txt (searched on)"] == f"{text.dense.perplexity:.2f}"
    assert cells["perplexity, mine.txt (searched on)"].startswith(
        f"{text.pruned[2].perplexity:.2f} ("
    )
    assert cells["piqa, acc"].startswith(f"{task.pruned[2].value:.3f} (")
    assert dense["generation 1x64+32, times as fast"] == "1.00x"
    assert cells["plan"] == "a/plan.json"
    assert "- calibration: mine.txt: 16 x 2048 tokens (4 held out)" in lines


def test_csv_has_every_number_with_its_interval_and_every_setting(table, measured, tmp_path):
    assert table("-o", "table.csv").stdout == "wrote table.csv\n"
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    own, other = rows[3], rows[4]
    scores, tasks = measured[0].texts[1].pruned[2], measured[0].tasks[:2]
    assert float(own["perplexity, c4"]) == scores.perplexity
    ends = [float(own[f"perplexity, c4 {end}"]) / scores.perplexity for end in ("low", "high")]
    assert ends == pytest.approx([math.exp(-0.012), math.exp(0.012)])
    assert float(own["mean of tasks"]) == pytest.approx(
        statistics.fmean(task.pruned[2].value for task in tasks)
    )
    low, high = (float(own[f"piqa, acc {end}"]) for end in ("low", "high"))
    assert (low, high) == pytest.approx(
        (tasks[0].pruned[2].value - 0.04, tasks[0].pruned[2].value + 0.04)
    )
    assert (own["calibration"], own["evaluated in"]) == (
        other["calibration"],
        "bfloat16 on cpu, A processor",
    )
    speed = "generation 1x64+32, times as fast"
    assert (float(own[speed]) > 1, other[speed]) == (True, "")


def test_figures_of_different_texts_have_columns_of_their_own(table, measured, tmp_path):
    few = make_evaluation(make_plan(12, 6), items=20, every=9)
    write_measured(tmp_path / "b", make_plan(12, 6, text="c4"), evaluation=few)
    lines = table().stdout.splitlines()
    columns = ("piqa, acc, 400 items", "piqa, acc, 20 items", "calibration", "mean")
    assert [name for name in columns if name in lines[0]] == [*columns[:3]]
    tasks = [task.model_copy(update={"items_sha256": "1" * 64}) for task in few.tasks]
    write_measured(
        tmp_path / "a", make_plan(12, 6), evaluation=few.model_copy(update={"tasks": tuple(tasks)})
    )
    assert "| piqa, acc, 20 items 11111111 | " in table().stdout


def test_the_figure_names_what_it_shows(table, measured, tmp_path):
    pytest.importorskip("matplotlib")
    table("-o", "table.svg")
    shown = "".join(ET.parse(tmp_path / "table.svg").getroot().itertext())
    assert [
        name
        for name in ("dense", "nll, greedy", "cosine, greedy", "mean of tasks", "of 12 blocks")
        if name not in shown
    ] == []
