"""Results of several runs in one file: merged by what was measured, and never lost."""

import pytest

from sleb_cli.engine.speed.timing import latency_statistics
from sleb_cli.kept_results import beside_plan, keep_result, read_kept
from sleb_cli.records import ModelRecord
from sleb_cli.results import (
    BenchResult,
    DivergenceRecord,
    EvalResult,
    ModelSize,
    PrunedTextScores,
    PrunedTiming,
    TextResult,
    TextScores,
    Timing,
    WarmupRecord,
    Workload,
    WorkloadResult,
)
from sleb_plugins.engine import TimedRun

MODEL = ModelRecord(id="/m", revision=None, fingerprint="f" * 64, model_type="llama", family="llama", blocks=6)
HEADER = {
    "schema_version": 1, "sleb_version": "0", "model": MODEL, "dtype": "float32", "device": "cpu", "processor": "p",
    "torch": "2", "transformers": "5",
}  # fmt: skip
SCORES = {
    "word_perplexity": None, "byte_perplexity": None, "bits_per_byte": None, "calibration_error": 0.1, "losses": (1.0,),
}  # fmt: skip
APART = DivergenceRecord(
    mean=0.1, standard_error=None, median=0.1, p90=0.2, p99=0.3, maximum=1, probability_change_rms=0.1, same_top=0.9
)
OTHER_SETTINGS = [
    {"dtype": "bfloat16"}, {"device": "cuda"}, {"processor": "q"}, {"torch": "3"}, {"transformers": "6"},
    {"model": MODEL.model_copy(update={"fingerprint": "0"})}, {"model": MODEL.model_copy(update={"code": "0"})},
]  # fmt: skip


def text(name, sizes, perplexity=10.0, tokens=None):
    apart = {"log_ratio": 0.1, "standard_error": None, "interval": None, "divergence": APART}
    return TextResult(
        text=name, windows=1, sequence_length=8, stride=None, bos="none", tokens=7, words=3, bytes=9, clusters=1,
        clustered_by="windows", tokens_sha256=tokens or name, dense=TextScores(**SCORES, perplexity=perplexity),
        pruned=tuple(
            PrunedTextScores(**SCORES, **apart, perplexity=perplexity + len(size), removals=size) for size in sizes
        ),
    )  # fmt: skip


def evaluation(*texts, sizes=((1,),), **changes):
    return EvalResult(**(HEADER | {"kind": "eval", "sizes": sizes, "texts": texts, "tasks": ()} | changes))


def timed(seconds, *sizes, **changes):
    """Return a workload's result in which the dense model and each size took so many seconds."""
    given = {
        "name": "prompt", "engine": "transformers", "batch_size": 1, "prompt_length": 8, "new_tokens": 0,
        "iterations": 2, "warmup": 0, "cooldown": 0.0, "seed": 0, "compiled": False, "static_cache": False,
    }  # fmt: skip
    workload = Workload(**(given | changes))
    timing = latency_statistics(workload, [TimedRun(seconds)] * 2) | dict.fromkeys(("memory", "energy", "work"))
    return WorkloadResult(
        workload=workload,
        engine_version="5",
        attention="sdpa",
        warmup=WarmupRecord(runs=0, deviation=None, stable=None),
        dense=Timing(**timing),
        pruned=tuple(PrunedTiming(**timing, removals=size, speedup=1, interval=None, bound=None) for size in sizes),
    )


def benchmark(*workloads, **changes):
    sizes = dict.fromkeys(timing.removals for found in workloads for timing in found.pruned)
    dense, *pruned = (
        ModelSize(removals=size, blocks=6, parameters=6, weights_bytes=4, load_seconds=None) for size in ((), *sizes)
    )
    given = {"kind": "bench", "threads": 2, "governor": None, "dense": dense, "pruned": tuple(pruned)}
    return BenchResult(**(HEADER | given | {"workloads": workloads} | changes))


def test_texts_and_sizes_of_two_runs_are_both_kept(tmp_path):
    file, heard = beside_plan(tmp_path / "plan.json", "eval"), []
    assert file.name == "plan.eval.json"
    keep_result(evaluation(text("a", [(1,), (1, 3)]), sizes=((1,), (1, 3))), file, heard.append)
    again = evaluation(text("a", [(1, 3), (1, 3, 2)], 20.0), text("a", [(1,)], tokens="others"), text("b", [(1,)]))
    both = keep_result(again, file, heard.append)
    assert read_kept(EvalResult, file, heard.append) == both
    assert heard == []
    assert [found.text for found in both.texts] == ["a", "a", "b"]
    assert [(size.removals, size.perplexity) for size in both.texts[0].pruned] == [
        ((1,), 11.0), ((1, 3), 22.0), ((1, 3, 2), 23.0),
    ]  # fmt: skip
    assert both.texts[0].dense.perplexity == 20
    assert both.sizes == ((1,), (1, 3))


@pytest.mark.parametrize(
    ("new", "changes"),
    [(evaluation, change) for change in [*OTHER_SETTINGS, {"behavior": "other"}, {"sleb_version": "1"}]]
    + [(benchmark, change) for change in [*OTHER_SETTINGS, {"threads": 1}]],
)
def test_results_in_another_setting_are_moved_aside(tmp_path, new, changes):
    file, heard = tmp_path / "kept.json", []
    keep_result(new(), file, heard.append)
    assert keep_result(new(**changes), file, heard.append) == new(**changes)
    assert "kept.json holds results of another model or in another setting" in heard[0].text
    assert "kept.json is now kept.json.old" in heard[1].text
    assert read_kept(type(new()), tmp_path / "kept.json.old", heard.append) == new()


def test_a_file_that_cannot_be_read_is_moved_aside(tmp_path):
    file, heard = tmp_path / "plan.eval.json", []
    file.write_text('{"kind": "eval"}')
    keep_result(evaluation(), file, heard.append)
    assert "plan.eval.json is left out: it cannot be read by this version of sleb (schema_version" in heard[0].text
    assert (tmp_path / "plan.eval.json.old").read_text() == '{"kind": "eval"}'
    assert read_kept(EvalResult, file, heard.append) is not None


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path):
    heard = []
    assert keep_result(evaluation(), tmp_path / "none" / "plan.eval.json", heard.append) == evaluation()
    assert "not kept for reports" in heard[0].text


def seconds(result):
    return [found.dense.e2els[0] for found in result.workloads]


def test_a_workload_that_is_run_again_replaces_the_earlier_one():
    first = benchmark(timed(1.0, (1,)), timed(2.0, (1,), prompt_length=16))
    second = benchmark(timed(3.0, (1, 2), iterations=5), timed(4.0, (1, 2), batch_size=2))
    both = second.merged_with(first)
    assert seconds(both) == [3.0, 2.0, 4.0]
    assert [size.removals for size in both.pruned] == [(1,), (1, 2)]
    assert [size.removals for size in second.merged_with(benchmark(timed(1.0, (1,)))).pruned] == [(1, 2)]


def test_fewer_iterations_do_not_replace_more(tmp_path):
    file, heard = tmp_path / "plan.bench.json", []
    keep_result(benchmark(timed(1.0, (1,), iterations=5)), file, heard.append)
    quick = benchmark(timed(2.0, (1, 2), iterations=1), timed(3.0, (1, 2), prompt_length=4, iterations=1))
    both = keep_result(quick, file, heard.append)
    assert seconds(both) == [1.0, 3.0]
    assert [size.removals for size in both.pruned] == [(1,), (1, 2)]
    (notice,) = heard
    assert "keeps the earlier 5 runs of prompt 1x8" in notice.text
    assert "use --iterations 5 or more" in notice.text
    assert seconds(keep_result(benchmark(timed(4.0, (1,), iterations=5)), file, heard.append)) == [4.0, 3.0]
    assert len(heard) == 1


@pytest.mark.parametrize(
    "changes", [{"new_tokens": 4}, {"engine": "vllm"}, {"compiled": True}, {"static_cache": True}, {"batch_size": 2}]
)
def test_other_settings_are_another_workload(changes):
    assert seconds(benchmark(timed(1.0, **changes)).merged_with(benchmark(timed(2.0)))) == [2.0, 1.0]
