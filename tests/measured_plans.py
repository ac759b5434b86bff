"""Plans of any size with plausible results, through the real records, to test reports on."""

import math
import random
import shutil
import statistics
from itertools import accumulate

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
)
from sleb_cli.saved_results import keep_result, results_folder
from sleb_plugins.engine import TimedRun

SHA = "0" * 64
DENSE_LOSS = 2.4
PARAMETERS_OF_A_BLOCK = 3_540_000
OTHER_PARAMETERS = 28_300_000
VERSIONS = {"torch": "2.6.0", "transformers": "5.0.0"}
MACHINE = {"dtype": "bfloat16", "device": "cpu", "processor": "A processor", **VERSIONS}


def make_plan(
    blocks, remove, *, name="acme/Tiny-1B", text="wikitext2", raced=True, kinds=False, seed=0
):
    """Return a plan in which blocks of the middle cost least."""
    rng = random.Random(seed)
    cost = [0.02 + 0.1 * (b / blocks - 0.6) ** 2 + rng.uniform(0, 0.03) for b in range(blocks)]
    if blocks > 3:
        cost[1] = 1.5
    loss = DENSE_LOSS
    removed = []
    steps = []
    for size in range(1, remove + 1):
        scores = {}
        for block in range(1, blocks - 1):
            if block not in removed:
                scores[block] = loss + cost[block] * (1 + 0.25 * size)
        steps.append(_step(scores, size, raced, kinds))
        loss = steps[-1].score
        removed.append(steps[-1].block)
    return Plan(
        schema_version=1,
        sleb_version="0.1.0",
        request={"model": name, "calibration": text, "remove": remove, "fast": raced},
        model=ModelRecord(
            id=name,
            revision="3f1c2d" + "0" * 34,
            fingerprint=SHA,
            model_type="llama",
            family="llama",
            blocks=blocks,
        ),
        calibration=CalibrationRecord(
            source=text,
            seed=0,
            sequences=16,
            sequence_length=2048,
            bos=False,
            tokens_sha256="f" * 64,
        ),
        search=SearchRecord(
            strategy="greedy",
            metric="nll",
            remove=remove,
            protect_first=1,
            protect_last=1,
            dtype="bfloat16",
            device="cpu",
            batch_size=1,
            fast=raced,
            holdout=0.25,
            held_out=4,
            engine="fork",
            engine_reason=None,
        ),
        dense=DenseRecord(
            loss=DENSE_LOSS, perplexity=math.exp(DENSE_LOSS), held_out=_held_out(2.41)
        ),
        removals=tuple(removed),
        steps=tuple(steps),
        sample_generation=SampleGeneration(
            prompt="The river",
            new_tokens=16,
            dense=" flows past the old mill and into the sea, where",
            pruned=" flows past the mill and the mill and the mill and",
            dense_repetition=0.0,
            pruned_repetition=0.6,
        ),
        environment=EnvironmentRecord(
            python="3.11.9",
            platform="Linux",
            processor="A processor",
            plugins={},
            started="2025-05-01T10:00:00+00:00",
            seconds=93.2,
            **VERSIONS,
        ),
    )


def _step(scores, size, raced, kinds):
    ranked = sorted(scores, key=scores.__getitem__)
    block = ranked[0]
    loss = scores[block]
    race = None
    if raced:
        kept = max(1, len(ranked) // 3)
        dropped = {}
        for b in ranked[kept:]:
            dropped[b] = DropRecord(sequences=4, behind=scores[b] - loss, errors=3.5)
        ranked = ranked[:kept]
        race = RaceRecord(margin=0.01, dropped=dropped)
    kind = ""
    if kinds:
        kind = "mamba" if block % 3 else "attention"
    gap = {"generalization_gap": 0.02 * size, "standard_error": 0.02, "overfits": size > 4}
    return Step(
        block=block,
        kind=kind,
        score=loss,
        perplexity=math.exp(loss),
        scores={b: scores[b] for b in sorted(ranked)},
        race=race,
        held_out=_held_out(loss + 0.03 * size, **gap),
    )


def _held_out(loss, **gap):
    return HeldOutRecord(loss=loss, perplexity=math.exp(loss), **gap)


def make_evaluation(
    plan,
    *,
    texts=("wikitext2", "c4"),
    tasks=("piqa", "arc_easy"),
    every=2,
    items=400,
    seed=0,
):
    """Return what `sleb eval --every` could say of a plan."""
    sizes = _sizes(plan, every)
    return EvalResult(
        kind="eval",
        schema_version=1,
        sleb_version="0.1.0",
        model=plan.model,
        sizes=sizes,
        texts=tuple(_text(name, sizes, seed + number) for number, name in enumerate(texts)),
        tasks=tuple(_task(name, sizes, items, seed + number) for number, name in enumerate(tasks)),
        **MACHINE,
    )


def _sizes(plan, every):
    most = len(plan.size_keys)
    return tuple(plan.size_keys[size - 1] for size in sorted({most, *range(every, most, every)}))


def _around(value, reach):
    return Interval(low=value - reach, high=value + reach)


def _text(name, sizes, seed):
    rng = random.Random(f"{name}{seed}")
    losses = [2.7 + rng.uniform(0, 0.6) + rng.gauss(0, 0.3) for _ in range(24)]
    pruned = []
    for removals in sizes:
        rise = 0.035 * len(removals) ** 1.25
        divergence = DivergenceRecord(
            mean=rise * 0.8,
            standard_error=rise * 0.02,
            median=rise * 0.4,
            p90=rise * 2,
            p99=rise * 6,
            maximum=rise * 20,
            probability_change_rms=min(0.3, rise * 0.3),
            same_top=max(0.3, 1 - rise * 0.6),
            accepted=max(0.3, 1 - rise * 0.5),
        )
        scores = PrunedTextScores(
            removals=removals,
            log_ratio=rise,
            standard_error=0.006,
            interval=_around(rise, 0.012),
            divergence=divergence,
            **_text_scores([loss + rise for loss in losses]),
        )
        pruned.append(scores)
    return TextResult(
        text=name,
        windows=24,
        sequence_length=2048,
        bos="none",
        tokens=24 * 2047,
        clusters=24,
        clustered_by="windows",
        tokens_sha256=SHA,
        dense=TextScores(**_text_scores(losses)),
        pruned=tuple(pruned),
    )


def _text_scores(losses):
    return {"perplexity": math.exp(statistics.fmean(losses)), "losses": tuple(losses)}


def _task(name, sizes, items, seed):
    right = int(random.Random(f"{name}{seed}").uniform(0.5, 0.75) * items)
    pruned = []
    for removals in sizes:
        lost = int(0.025 * len(removals) * items)
        gained = int(0.008 * len(removals) * items)
        scores = PrunedTaskScores(
            removals=removals,
            difference=(gained - lost) / items,
            difference_interval=_around((gained - lost) / items, 0.04),
            standard_error=0.02,
            retention=(right + gained - lost) / right,
            mcnemar_p=min(1.0, 2.0 ** -(abs(lost - gained) / 2)),
            lost=lost,
            gained=gained,
            items_needed=3100,
            **_task_scores(right + gained - lost, items),
        )
        pruned.append(scores)
    return TaskResult(
        task=name,
        metric="acc",
        filter="none",
        version="1.0",
        num_fewshot=0,
        higher_is_better=True,
        doc_ids=tuple(range(items)),
        items_sha256=SHA,
        dense=TaskScores(**_task_scores(right, items)),
        pruned=tuple(pruned),
    )


def _task_scores(right, items):
    value = right / items
    values = (1.0,) * right + (0.0,) * (items - right)
    return {"value": value, "stderr": 0.02, "interval": _around(value, 0.04), "items": values}


def make_benchmark(plan, *, every=2, iterations=20, batches=(1, 8), workloads=()):
    """Return what `sleb bench --every` could say of a plan: of workloads by name, batch, prompt and
    new tokens.
    """
    sizes = _sizes(plan, every)
    if not workloads:
        generation = [("generation", batch, 64, 32) for batch in batches]
        workloads = [("prompt", 1, 512, 0), *generation]
    blocks = plan.model.blocks
    return BenchResult(
        kind="bench",
        schema_version=1,
        sleb_version="0.1.0",
        model=plan.model,
        threads=8,
        governor="performance",
        dense=_model_size(blocks, ()),
        pruned=tuple(_model_size(blocks, removals) for removals in sizes),
        workloads=tuple(_workload(blocks, sizes, iterations, *each) for each in workloads),
        **MACHINE,
    )


def _model_size(blocks, removals):
    kept = blocks - len(removals)
    parameters = OTHER_PARAMETERS + PARAMETERS_OF_A_BLOCK * kept
    return ModelSize(
        removals=removals,
        blocks=kept,
        parameters=parameters,
        weights_bytes=2 * parameters,
        load_seconds=0.4,
    )


def _workload(blocks, sizes, iterations, name, batch, prompt, new):
    models = ((), *sizes)
    rng = random.Random(f"{name}{batch}x{prompt}")
    rounds = []
    for _ in range(iterations):
        runs = {}
        for removals in models:
            seconds = (0.2 + 0.02 * batch) * (1 - 0.88 * len(removals) / blocks)
            times = [seconds * rng.lognormvariate(0, 0.015)]
            for _ in range(new - 1):
                times.append(seconds / 8 * rng.lognormvariate(0, 0.03))
            arrivals = tuple(accumulate(times))
            runs[removals] = TimedRun(arrivals[-1], arrivals if new else ())
        rounds.append(runs)
    workload = Workload(
        name=name,
        engine="transformers",
        batch_size=batch,
        prompt_length=prompt,
        new_tokens=new,
        iterations=iterations,
        warmup=None,
        compiled=False,
    )
    measured = Measured(WarmupRecord(runs=4, deviation=0.012, stable=True), rounds)
    memory = {removals: _memory(blocks - len(removals), batch) for removals in models}
    return workload_result(workload, [measured], memory, engine_version=None, attention="sdpa")


def _memory(kept, batch):
    weights = 2 * (OTHER_PARAMETERS + PARAMETERS_OF_A_BLOCK * kept)
    cache = kept * 1_000_000 * batch
    rest = 250_000_000
    return MemoryRecord(
        peak_bytes=weights + cache + rest,
        weights_bytes=weights,
        kv_cache_bytes=cache,
        rest_bytes=rest,
    )


def write_measured(folder, plan, *, evaluation=None, benchmark=None):
    """Write a plan and what was measured of it, and return the plan's file."""
    file = folder / "plan.json"
    plan.write(file)
    shutil.rmtree(results_folder(file), ignore_errors=True)
    for result in filter(None, (evaluation, benchmark)):
        keep_result(result, {}, results_folder(file), ignore)
    return file
