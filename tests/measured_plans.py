"""Plans of any size with plausible results, through the real records: what reports are tested on."""

import math
import random
import shutil
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sleb_cli.engine.speed.timing import Measured, workload_result
from sleb_cli.events import ignore
from sleb_cli.plan import (
    CalibrationRecord,
    DenseRecord,
    DropRecord,
    EnvironmentRecord,
    HeldOutRecord,
    Plan,
    RaceRecord,
    SampleGeneration,
    SearchRecord,
    Step,
)
from sleb_cli.records import ModelRecord
from sleb_cli.results import (
    BenchResult,
    DivergenceRecord,
    EvalResult,
    FlipRecord,
    Interval,
    MemoryRecord,
    ModelSize,
    PrunedTaskScores,
    PrunedTextScores,
    TaskResult,
    TaskScores,
    TextResult,
    TextScores,
    WarmupRecord,
    Workload,
    WorkloadResult,
)
from sleb_cli.saved_results import keep_result, results_folder
from sleb_plugins.engine import TimedRun

SHA = "0" * 64


def make_plan(
    blocks: int, remove: int, *, name: str = "acme/Tiny-1B", text: str = "wikitext2", raced: bool = True,
    kinds: bool = False, seed: int = 0,
) -> Plan:  # fmt: skip
    """Return a plan in which blocks of the middle cost least."""
    rng = random.Random(seed)
    cost = {
        b: 0.02 + 0.1 * abs(b / blocks - 0.6) ** 2 + rng.uniform(0, 0.03) for b in range(blocks)
    }
    if blocks > 3:
        cost[1] = 1.5
    removed: list[int] = []
    steps, loss = [], 2.4
    for size in range(1, remove + 1):
        candidates = [b for b in range(1, blocks - 1) if b not in removed]
        scores = {b: loss + cost[b] * (1 + 0.25 * size) for b in candidates}
        ranked = sorted(scores, key=scores.__getitem__)
        block, count = ranked[0], max(1, len(ranked) // 3) if raced else len(ranked)
        behind = {b: scores[b] - scores[block] for b in ranked[count:]}
        dropped = {
            b: DropRecord(sequences=4, behind=score, errors=3.5) for b, score in behind.items()
        }
        loss = scores[block]
        removed.append(block)
        race = RaceRecord(margin=0.01, dropped=dropped) if raced else None
        kind = ("mamba" if block % 3 else "attention") if kinds else ""
        held_out = _held_out(
            loss + 0.03 * size,
            overfits=size > 4,
            generalization_gap=0.02 * size,
            standard_error=0.02,
        )
        measured = {b: scores[b] for b in sorted(ranked[:count])}
        step = Step(
            block=block,
            kind=kind,
            score=loss,
            perplexity=math.exp(loss),
            scores=measured,
            race=race,
        )
        steps.append(step.model_copy(update={"held_out": held_out}))
    return Plan(
        schema_version=1,
        sleb_version="0.1.0",
        request={"model": name, "calibration": text, "remove": remove, "fast": raced},
        model=ModelRecord(
            id=name, revision="3f1c2d" + "0" * 34, fingerprint=SHA, model_type="llama", family="llama", blocks=blocks
        ),
        calibration=CalibrationRecord(
            source=text, seed=0, sequences=16, sequence_length=2048, bos=False, tokens_sha256="f" * 64
        ),
        search=SearchRecord(
            strategy="greedy", metric="nll", remove=remove, protect_first=1, protect_last=1,
            dtype="bfloat16", device="cpu", batch_size=1, fast=raced, holdout=0.25, held_out=4, engine="fork",
            engine_reason=None,
        ),
        dense=DenseRecord(loss=2.4, perplexity=math.exp(2.4), held_out=_held_out(2.41)),
        removals=tuple(removed),
        steps=tuple(steps),
        sample_generation=SampleGeneration(
            prompt="The river", new_tokens=16, dense=" flows past the old mill and into the sea, "
                                                     "where",
            pruned=" flows past the mill and the mill and the mill and", dense_repetition=0.0, pruned_repetition=0.6,
        ),
        environment=EnvironmentRecord(
            python="3.11.9", torch="2.6.0", transformers="5.0.0", platform="Linux", processor="A "
                                                                                              "processor",
            plugins={}, started="2025-05-01T10:00:00+00:00", seconds=93.2,
        ),
    )  # fmt: skip


def _held_out(loss: float, **options: Any) -> HeldOutRecord:
    return HeldOutRecord(loss=loss, perplexity=math.exp(loss), **options)


def make_evaluation(
    plan: Plan, *, texts: tuple[str, ...] = ("wikitext2", "c4"), tasks: tuple[str, ...] = ("piqa", "arc_easy"),
    every: int = 2, items: int = 400, seed: int = 0,
) -> EvalResult:  # fmt: skip
    """Return what `sleb eval --every` could say of a plan."""
    sizes = _sizes(plan, every)
    return EvalResult(
        schema_version=1, sleb_version="0.1.0", model=plan.model, dtype="bfloat16", device="cpu", kind="eval",
        sizes=sizes, torch="2.6.0", transformers="5.0.0", processor="A processor",
        texts=tuple(_text(name, sizes, seed + number) for number, name in enumerate(texts)),
        tasks=tuple(_task(name, sizes, items, seed + number) for number, name in enumerate(tasks)),
    )  # fmt: skip


def _sizes(plan: Plan, every: int) -> tuple[tuple[int, ...], ...]:
    most = len(plan.removals)
    return tuple(plan.size_keys[size - 1] for size in sorted({most, *range(every, most, every)}))


def _text(name: str, sizes: tuple[tuple[int, ...], ...], seed: int) -> TextResult:
    rng = random.Random(f"{name}{seed}")
    windows = [2.7 + rng.uniform(0, 0.6) + rng.gauss(0, 0.3) for _ in range(24)]

    def scores(losses: list[float]) -> dict[str, object]:
        return {"perplexity": math.exp(statistics.fmean(losses)), "losses": tuple(losses)}

    def pruned(removals: tuple[int, ...]) -> PrunedTextScores:
        rise = 0.035 * len(removals) ** 1.25
        divergence = DivergenceRecord(
            mean=rise * 0.8, standard_error=rise * 0.02, median=rise * 0.4, p90=rise * 2, p99=rise * 6,
            maximum=rise * 20, probability_change_rms=min(0.3, rise * 0.3), same_top=max(0.3, 1 - rise * 0.6),
            accepted=max(0.3, 1 - rise * 0.5),
        )  # fmt: skip
        return PrunedTextScores(
            **scores([loss + rise for loss in windows]), removals=removals, log_ratio=rise, standard_error=0.006,
            interval=Interval(low=rise - 0.012, high=rise + 0.012), divergence=divergence,
        )  # fmt: skip

    return TextResult(
        text=name, windows=24, sequence_length=2048, bos="none", tokens=24 * 2047,
        clusters=24, clustered_by="windows", tokens_sha256=SHA, dense=TextScores(**scores(windows)),
        pruned=tuple(map(pruned, sizes)),
    )  # fmt: skip


def _around(value: float, reach: float) -> Interval:
    return Interval(low=value - reach, high=value + reach)


def _task(name: str, sizes: tuple[tuple[int, ...], ...], items: int, seed: int) -> TaskResult:
    rng = random.Random(f"{name}{seed}")
    right = int(rng.uniform(0.5, 0.75) * items)

    def scores(count: int) -> dict[str, object]:
        value = count / items
        values = tuple([1.0] * count + [0.0] * (items - count))
        return {"value": value, "stderr": 0.02, "interval": _around(value, 0.04), "items": values}

    def pruned(removals: tuple[int, ...]) -> PrunedTaskScores:
        lost, gained = (int(share * len(removals) * items) for share in (0.025, 0.008))
        difference = (gained - lost) / items
        flip = FlipRecord(
            doc_id=3,
            prompt="To open a jar,",
            target=" twist it",
            dense=" twist it",
            pruned=" hit it",
        )
        return PrunedTaskScores(
            **scores(right + gained - lost), removals=removals, difference=difference, standard_error=0.02,
            retention=(right + gained - lost) / right, difference_interval=_around(difference, 0.04),
            mcnemar_p=min(1.0, 2.0 ** -(abs(lost - gained) / 2)), lost=lost, gained=gained, items_needed=3100,
            flips=(flip,),
        )  # fmt: skip

    return TaskResult(
        task=name, metric="acc", filter="none", version="1.0", num_fewshot=0, higher_is_better=True,
        doc_ids=tuple(range(items)), items_sha256=SHA, dense=TaskScores(**scores(right)),
        pruned=tuple(map(pruned, sizes)),
    )  # fmt: skip


def make_benchmark(
    plan: Plan, *, every: int = 2, iterations: int = 20, batches: tuple[int, ...] = (1, 8),
    workloads: Sequence[tuple[str, int, int, int]] = (),
) -> BenchResult:  # fmt: skip
    """Return what `sleb bench --every` could say of a plan: of workloads by name, batch, prompt and
    new tokens.
    """
    sizes = _sizes(plan, every)
    workloads = workloads or [
        ("prompt", 1, 512, 0),
        *(("generation", batch, 64, 32) for batch in batches),
    ]
    per_block, rest = 3_540_000, 28_300_000

    def size(removals: tuple[int, ...]) -> ModelSize:
        blocks = plan.model.blocks - len(removals)
        parameters = rest + per_block * blocks
        return ModelSize(
            removals=removals,
            blocks=blocks,
            parameters=parameters,
            weights_bytes=2 * parameters,
            load_seconds=0.4,
        )

    return BenchResult(
        schema_version=1, sleb_version="0.1.0", model=plan.model, dtype="bfloat16", device="cpu", kind="bench",
        threads=8, processor="A processor", governor="performance", torch="2.6.0", transformers="5.0.0",
        dense=size(()), pruned=tuple(map(size, sizes)),
        workloads=tuple(_workload(plan, sizes, iterations, *workload) for workload in workloads),
    )  # fmt: skip


def _workload(
    plan: Plan,
    sizes: tuple[tuple[int, ...], ...],
    iterations: int,
    name: str,
    batch: int,
    prompt: int,
    new: int,
) -> WorkloadResult:
    rng = random.Random(f"{name}{batch}x{prompt}")
    blocks, models = plan.model.blocks, ((), *sizes)

    def run(removals: tuple[int, ...]) -> TimedRun:
        base = (0.2 + 0.02 * batch) * (1 - 0.88 * len(removals) / blocks)
        times = [
            base * rng.lognormvariate(0, 0.015),
            *(base / 8 * rng.lognormvariate(0, 0.03) for _ in range(new - 1)),
        ]
        arrivals = tuple(accumulate(times))
        return TimedRun(arrivals[-1], arrivals if new else ())

    def memory(removals: tuple[int, ...]) -> MemoryRecord:
        kept, rest = blocks - len(removals), 250_000_000
        weights, cache = 2 * (28_300_000 + 3_540_000 * kept), kept * 1_000_000 * batch
        peak = weights + cache + rest
        return MemoryRecord(
            peak_bytes=peak, weights_bytes=weights, kv_cache_bytes=cache, rest_bytes=rest
        )

    workload = Workload(
        name=name, engine="transformers", batch_size=batch, prompt_length=prompt, new_tokens=new,
        iterations=iterations, warmup=None, compiled=False,
    )  # fmt: skip
    rounds = [{removals: run(removals) for removals in models} for _ in range(iterations)]
    measured = Measured(WarmupRecord(runs=4, deviation=0.012, stable=True), rounds)
    memories = {removals: memory(removals) for removals in models}
    return workload_result(workload, [measured], memories, engine_version=None, attention="sdpa")


def write_measured(
    folder: Path,
    plan: Plan,
    *,
    evaluation: EvalResult | None = None,
    benchmark: BenchResult | None = None,
) -> Path:
    """Write a plan and what was measured of it, and return the plan's file."""
    file = folder / "plan.json"
    plan.write(file)
    shutil.rmtree(results_folder(file), ignore_errors=True)
    for result in filter(None, (evaluation, benchmark)):
        keep_result(result, {}, results_folder(file), ignore)
    return file
