"""Results of several runs of `bench` in one file."""

import pytest

from sleb_cli.engine.speed.statistics import latency_statistics
from sleb_cli.kept_results import keep_result
from sleb_cli.records import ModelRecord
from sleb_cli.results import BenchResult, ModelSize, PrunedTiming, Timing, WarmupRecord, Workload, WorkloadResult
from sleb_plugins.engine import TimedRun

MODEL = ModelRecord(id="/m", revision=None, fingerprint="f" * 64, model_type="llama", family="llama", blocks=6)


def workload(**changes):
    given = {
        "name": "prompt", "engine": "transformers", "batch_size": 1, "prompt_length": 8, "new_tokens": 0,
        "iterations": 2, "warmup": 0, "cooldown": 0.0, "seed": 0, "compiled": False, "static_cache": False,
    }  # fmt: skip
    return Workload(**(given | changes))


def measured(seconds, *sizes, **changes):
    """Return a workload's result on the dense model and these sizes, all of which took so long."""
    found = workload(**changes)
    timing = latency_statistics(found, [TimedRun(seconds)] * 2) | dict.fromkeys(("memory", "energy", "work"))
    return WorkloadResult(
        workload=found,
        engine_version="5",
        attention="sdpa",
        warmup=WarmupRecord(runs=0, deviation=None, stable=None),
        dense=Timing(**timing),
        pruned=tuple(PrunedTiming(**timing, removals=size, speedup=1, interval=None, bound=None) for size in sizes),
    )


def size(*removals):
    blocks = 6 - len(removals)
    return ModelSize(removals=removals, blocks=blocks, parameters=blocks, weights_bytes=4, load_seconds=None)


def result(sizes, *workloads, **changes):
    given = {
        "schema_version": 1, "sleb_version": "0", "kind": "bench", "model": MODEL, "dtype": "float32", "device": "cpu",
        "threads": 2, "processor": "p", "governor": None, "torch": "2", "transformers": "5", "dense": size(),
        "pruned": tuple(size(*removals) for removals in sizes), "workloads": workloads,
    }  # fmt: skip
    return BenchResult(**(given | changes))


def test_workloads_are_kept_until_they_are_run_again():
    first = result([(1,)], measured(1.0, (1,)), measured(2.0, (1,), prompt_length=16))
    second = result(
        [(1,), (1, 2)], measured(3.0, (1,), (1, 2), iterations=5), measured(4.0, (1,), (1, 2), batch_size=2)
    )
    both = second.merged_with(first)
    assert [found.dense.e2els[0] for found in both.workloads] == [2.0, 3.0, 4.0]
    assert [size.removals for size in both.pruned] == [(1,), (1, 2)]
    assert BenchResult.model_validate_json(both.model_dump_json()) == both


def test_fewer_iterations_do_not_replace_more(tmp_path):
    file, heard = tmp_path / "plan.bench.json", []
    careful = result([(1,)], measured(1.0, (1,), iterations=5))
    keep_result(careful, file, heard.append)
    quick = result([(1, 2)], measured(2.0, (1, 2), iterations=1), measured(3.0, (1, 2), prompt_length=4, iterations=1))
    both = keep_result(quick, file, heard.append)
    assert [found.dense.e2els[0] for found in both.workloads] == [1.0, 3.0]
    assert [size.removals for size in both.pruned] == [(1,), (1, 2)]
    (notice,) = heard
    assert "keeps the earlier 5 runs of prompt 1x8, which say more than 1; --iterations 5 or more" in notice.text
    again = keep_result(result([(1,)], measured(4.0, (1,), iterations=5)), file, heard.append)
    assert [found.dense.e2els[0] for found in again.workloads] == [3.0, 4.0]
    assert len(heard) == 1


def test_a_size_goes_with_the_last_workload_that_has_it():
    first = result([(1,), (1, 2)], measured(1.0, (1,)), measured(2.0, (1, 2), prompt_length=16))
    second = result([(1, 2, 3)], measured(3.0, (1, 2, 3)))
    assert [size.removals for size in second.merged_with(first).pruned] == [(1, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    "changes", [{"new_tokens": 4}, {"engine": "vllm"}, {"compiled": True}, {"static_cache": True}, {"batch_size": 2}]
)
def test_other_settings_are_another_workload(changes):
    both = result([], measured(1.0, **changes)).merged_with(result([], measured(2.0)))
    assert [found.dense.e2els[0] for found in both.workloads] == [2.0, 1.0]


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"device": "cuda"}, {"threads": 1}, {"processor": "q"}, {"torch": "3"},
     {"model": MODEL.model_copy(update={"fingerprint": "0" * 64})}],
)  # fmt: skip
def test_what_another_setting_gave_is_left_out(changes):
    new = result([], measured(1.0), **changes)
    assert new.merged_with(result([(1,)], measured(2.0, (1,), batch_size=2))) is new
