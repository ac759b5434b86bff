"""Results of several runs in one file: merged by what was measured, and never lost."""

import pytest

from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.results import EvalResult
from sleb_cli.saved_results import find_saved, read_saved, save_result

PLAN = make_plan(6, 3)
OTHER_SETTINGS = [
    {"dtype": "float16"}, {"device": "cuda"}, {"processor": "q"}, {"torch": "3"}, {"transformers": "6"},
    *({"model": PLAN.model.model_copy(update={key: "0"})} for key in ("fingerprint", "code")),
]  # fmt: skip


def evaluation(*texts, **options):
    return make_evaluation(PLAN, texts=texts, tasks=(), **options)


def benchmark(*workloads, every=9, iterations=2):
    """Return a benchmark of prompts, each of so many sequences and tokens."""
    shapes = [("prompt", *workload, 0) for workload in workloads]
    return make_benchmark(PLAN, every=every, iterations=iterations, workloads=shapes)


def test_sizes_of_a_task_that_has_changed_are_dropped():
    few, every = (
        make_evaluation(PLAN, texts=(), tasks=("piqa",), every=number) for number in (9, 1)
    )
    changed = few.model_copy(
        update={"tasks": (few.tasks[0].model_copy(update={"fingerprint": "other"}),)}
    )
    assert few.merged_with(every).tasks[0].pruned == (
        *every.tasks[0].pruned[:2],
        *few.tasks[0].pruned,
    )
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
    file, heard, other = tmp_path / "kept.json", [], result.model_copy(update=changes)
    third = result.model_copy(update={"device": "another"})
    for _ in range(2):
        for each in (result, other, third):
            save_result(each, file, heard.append)
            assert read_saved(type(result), file, heard.append) == each
            assert find_saved(each, file, heard.append) == each
    assert len(list(tmp_path.iterdir())) == 3
    assert all(find_saved(each, file, heard.append) == each for each in (result, other, third))
    moved = f"{file} held results for a different model or setting, which are now in kept."
    assert len(heard) == 5
    assert all(notice.text.startswith(moved) for notice in heard)


def test_files_that_cannot_be_read_or_written_lose_nothing(tmp_path):
    file, heard = tmp_path / "plan.eval.json", []
    file.write_text('{"kind": "eval"}')
    save_result(evaluation(), file, heard.append)
    assert "plan.eval.json: this version of sleb cannot read it (schema_version" in heard[0].text
    assert (tmp_path / "plan.eval.json.old").read_text() == '{"kind": "eval"}'
    file.write_text("{}")
    save_result(evaluation(), file, heard.append)
    assert (tmp_path / "plan.eval.json.old").read_text() == '{"kind": "eval"}'
    assert (tmp_path / "plan.eval.2.json.old").read_text() == "{}"
    assert read_saved(EvalResult, file, heard.append) is not None
    assert (
        save_result(evaluation(), tmp_path / "none" / "plan.eval.json", heard.append)
        == evaluation()
    )
    assert "not kept for reports" in heard[-1].text


def test_fewer_iterations_do_not_replace_more(tmp_path):
    file, heard = tmp_path / "plan.bench.json", []
    long, quick = benchmark((1, 8), iterations=5), benchmark((1, 8), (1, 4), every=1, iterations=1)
    save_result(long, file, heard.append)
    both = save_result(quick, file, heard.append)
    assert both.workloads == (long.workloads[0], quick.workloads[1])
    assert [size.removals for size in both.pruned] == list(PLAN.size_keys)
    (notice,) = heard
    assert "keeps the earlier 5 runs of prompt 1x8" in notice.text
    assert "use --iterations 5 or more" in notice.text
    again = benchmark((1, 8), iterations=5, every=1)
    assert save_result(again, file, heard.append).workloads == (
        again.workloads[0],
        quick.workloads[1],
    )
    assert len(heard) == 1


@pytest.mark.parametrize(
    "changes", [{"new_tokens": 4}, {"engine": "vllm"}, {"compiled": True}, {"batch_size": 2}]
)
def test_other_settings_are_another_workload(changes):
    result = benchmark((1, 8))
    (one,) = result.workloads
    other = one.model_copy(update={"workload": one.workload.model_copy(update=changes)})
    assert result.model_copy(update={"workloads": (other,)}).merged_with(result).workloads == (
        one,
        other,
    )
