"""Kept results: a file for each measurement and setting, which readers join."""

import json

import pytest

from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.engine.output.measured import join_results, read_measurements
from sleb_cli.results import BenchResult, EvalResult
from sleb_cli.saved_results import delete_results, find_kept, keep_result, read_results

PLAN = make_plan(6, 3)
OTHER_SETTINGS = [
    {"dtype": "float16"},
    {"device": "cuda"},
    {"processor": "q"},
    {"torch": "3"},
    {"transformers": "6"},
    {"model": PLAN.model.model_copy(update={"fingerprint": "0"})},
    {"model": PLAN.model.model_copy(update={"code": "0"})},
]
PART = {"text": "a"}


def evaluation(*texts, **options):
    return make_evaluation(PLAN, texts=texts, tasks=(), **options)


def benchmark(*workloads, every=9, iterations=2):
    """Return a benchmark of prompts, each of so many sequences and tokens."""
    shapes = [("prompt", *workload, 0) for workload in workloads]
    return make_benchmark(
        PLAN,
        every=every,
        iterations=iterations,
        workloads=shapes,
    )


def test_sizes_of_a_task_that_has_changed_are_dropped():
    few, every = (
        make_evaluation(
            PLAN,
            texts=(),
            tasks=("piqa",),
            every=number,
        )
        for number in (9, 1)
    )
    changed_task = few.tasks[0].model_copy(update={"fingerprint": "other"})
    changed = few.model_copy(update={"tasks": (changed_task,)})
    sizes = (*every.tasks[0].pruned[:2], *few.tasks[0].pruned)
    assert few.merged_with(every).tasks[0].pruned == sizes
    assert changed.merged_with(every).tasks == changed.tasks


@pytest.mark.parametrize(
    ("result", "changes"),
    [
        (evaluation("a"), change)
        for change in [*OTHER_SETTINGS, {"behavior": "other"}, {"sleb_version": "1"}]
    ]
    + [(benchmark((1, 8)), change) for change in [*OTHER_SETTINGS, {"threads": 1}]],
)
def test_results_in_several_settings_are_kept_side_by_side(tmp_path, result, changes):
    folder, heard, other = tmp_path / "kept", [], result.model_copy(update=changes)
    for _ in range(2):
        for each in (result, other):
            keep_result(each, PART, folder, heard.append)
    assert len([*folder.iterdir()]) == 2
    for each in (result, other):
        assert find_kept(each, PART, folder, heard.append) == [each]
        assert find_kept(each, {"text": "b"}, folder, heard.append) == []
    kept = [*read_results(type(result), folder, heard.append).values()]
    assert kept == [result, other]
    assert join_results(kept) == other
    assert heard == []


def test_other_sizes_are_another_file(tmp_path):
    few, every = evaluation("a", every=9), evaluation("a", every=1)
    for each in (few, every):
        keep_result(each, PART, tmp_path, print)
    assert find_kept(few, PART, tmp_path, print) == [few, every]
    assert join_results([few, every]).sizes == every.sizes


def test_files_that_cannot_be_read_or_written_lose_nothing(tmp_path):
    heard = []
    unreadable = tmp_path / "eval-0.json"
    unreadable.write_text('{"kind": "eval"}')
    keep_result(evaluation(), PART, tmp_path, heard.append)
    assert [
        *read_results(
            EvalResult,
            tmp_path,
            heard.append,
        ).values()
    ] == [evaluation()]
    assert "eval-0.json: this version of sleb cannot read it (schema_version" in heard[0].text
    assert unreadable.read_text() == '{"kind": "eval"}'
    keep_result(evaluation(), PART, unreadable, heard.append)
    assert "not kept for reports" in heard[-1].text
    assert read_results(BenchResult, tmp_path / "none", heard.append) == {}


def test_only_results_are_deleted(tmp_path):
    for folder, more in ((tmp_path / "ours", []), (tmp_path / "shared", ["mine.json"])):
        keep_result(evaluation(), PART, folder, print)
        for name in more:
            (folder / name).write_text("{}")
        delete_results(folder)
        delete_results(folder)
        assert folder.exists() is bool(more)
    assert [file.name for file in folder.iterdir()] == more


def test_fewer_iterations_do_not_stand_for_more():
    long, quick = (
        benchmark((1, 8), iterations=5),
        benchmark(
            (1, 8),
            (1, 4),
            every=1,
            iterations=1,
        ),
    )
    both = join_results([long, quick])
    assert both.workloads == (long.workloads[0], quick.workloads[1])
    assert [size.removals for size in both.pruned] == list(PLAN.size_keys)
    again = benchmark((1, 8), iterations=5, every=1)
    assert join_results([long, quick, again]).workloads == (again.workloads[0], quick.workloads[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"new_tokens": 4},
        {"compiled": True},
        {"batch_size": 2},
        {"engine": "vllm"},
    ],
)
def test_other_settings_are_another_workload(changes):
    result = benchmark((1, 8))
    (one,) = result.workloads
    other = one.model_copy(update={"workload": one.workload.model_copy(update=changes)})
    joined = result.model_copy(update={"workloads": (other,)}).merged_with(result)
    assert joined.workloads == (one, other)


@pytest.mark.parametrize(("tensors", "is_read"), [("", True), ("-1", True), ("-2", False)])
def test_results_of_a_plan_are_of_its_model(tmp_path, tensors, is_read):
    fingerprint = f"{PLAN.model.fingerprint}{tensors}"  # an older plan has the first part alone
    model = PLAN.model.model_copy(update={"fingerprint": fingerprint})
    plan = PLAN.model_copy(update={"model": model})
    measured = model.model_copy(update={"fingerprint": f"{PLAN.model.fingerprint}-1"})
    result = evaluation("a").model_copy(update={"model": measured})
    keep_result(result, PART, tmp_path / "plan.results", [].append)
    found, _ = read_measurements(tmp_path / "plan.json", plan, [].append)
    assert (found is not None) == is_read


@pytest.mark.parametrize(("ranking", "unit"), [("0", "experts"), (None, "experts per token")])
def test_a_result_of_an_older_version_counts_experts(tmp_path, ranking, unit):
    data = evaluation("a").to_data() | {"experts": {"count": 8, "ranking": ranking}}
    file = tmp_path / "eval-0.json"
    file.write_text(json.dumps(data))
    order = read_results(EvalResult, tmp_path, print)[file].order
    assert (order.unit, order.count, order.ranking) == (unit, 8, ranking)
