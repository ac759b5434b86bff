"""`--dry-run`: what a command would do and write, after the checks of the real run. No weights are loaded.

How fast the model would run is measured on two blocks like its own, with random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from sleb_cli.engine.device import dtype_name, free_bytes
from sleb_cli.engine.forecast import Load
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.pace import measure_pace
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.placement import Placement
from sleb_cli.engine.forward.predictions import Predictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import streamed_bytes, weight_bytes
from sleb_cli.engine.gguf.file import gguf_size
from sleb_cli.engine.gguf.surgery import block_count
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.sizes import count_parameters
from sleb_cli.engine.output.apply import names_in_checkpoint, plan_files
from sleb_cli.engine.output.apply_gguf import plan_gguf
from sleb_cli.engine.output.delivery import Delivery
from sleb_cli.engine.output.engine_files import engine_source
from sleb_cli.engine.output.resolve import ToGguf, resolve_apply
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.evaluation import place_evaluation, read_evaluation_text, texts_of
from sleb_cli.engine.quality.lm_eval_tasks import find_tasks
from sleb_cli.engine.quality.tasks import PRESETS, names_of
from sleb_cli.engine.quality.token_scores import score_tokens
from sleb_cli.engine.search.compare import parse_entries, resolve_compared
from sleb_cli.engine.search.held_out import count_held_out
from sleb_cli.engine.search.race import LOOKS
from sleb_cli.engine.search.resolve import ResolvedSearch, resolve_search
from sleb_cli.engine.search.run import is_exact, search_loads, sets_by_size
from sleb_cli.engine.speed.benchmark import resolve_benchmark, threads
from sleb_cli.engine.speed.estimate import measure_rate, seconds_of_work
from sleb_cli.engine.speed.work import count_work
from sleb_cli.engine.surgery.loading import has_tokenizer, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.engine.text.calibration import CalibrationSettings, calibrate
from sleb_cli.engine.text.sources import is_file
from sleb_cli.engine.text.windows import choose_length
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notify, ignore, task
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import ApplyRequest, BenchRequest, EvalRequest, SearchRequest
from sleb_cli.results import DryRunResult
from sleb_cli.version import __version__
from sleb_plugins import Engine, ModelError, ModelMetric, UnsupportedModelError

USUAL_WARMUP = 4
"""How many untimed runs a benchmark usually takes until times are stable."""

Command = Literal["search", "apply", "eval", "bench"]


def dry_search(request: SearchRequest, registry: Registry, notify: Notify) -> DryRunResult:
    """Say what a search would do; raises as it would."""
    group = ProcessGroup()
    if request.compare:
        searches = resolve_compared(request, parse_entries(request), registry, notify, group, dry=True)
    else:
        searches = [resolve_search(request, registry, notify, group, dry=True)]
    first, settings = searches[0], searches[0].calibration
    sequences = _sequences(settings, first.architecture, notify)
    work, seconds = [f"{settings.source}: {sequences} x {settings.sequence_length} tokens"], None
    if first.target is not None:  # otherwise the model must be timed first
        searched = sequences - count_held_out(sequences, first.request.holdout or 0)
        evaluations = searched * sum(sum(sets_by_size(each)) for each in searches)
        at_most = "" if all(map(is_exact, searches)) else "at most "
        work.append(f"{at_most}{evaluations:,} evaluations of a candidate on a sequence")
        seconds = _seconds_of_searches(searches, searched, notify)
    return _result(
        "search",
        first.architecture,
        first.placement,
        removed=first.remove if first.target is not None else None,
        work=work,
        seconds=seconds,
        files=[request.plan_file],
    )


def _sequences(settings: CalibrationSettings, architecture: Architecture, notify: Notify) -> int:
    """Count the sequences of a text: of a file, those that it has; of any other, as many as asked for."""
    if all(map(is_file, settings.shares)) and has_tokenizer(architecture.source):
        return len(calibrate(settings, load_tokenizer(architecture.source), lambda: None, notify).sequences)
    return settings.samples


def _seconds_of_searches(searches: Sequence[ResolvedSearch], sequences: int, notify: Notify) -> float | None:
    first = searches[0]
    model = _random_model(first.architecture, first.placement, notify)
    if model is None or any(isinstance(each.metric, ModelMetric) for each in searches):
        return None
    request, length = first.request, first.calibration.sequence_length
    asked = None if request.memory is None else str(request.memory)
    seconds = 0.0
    with model:
        for search in searches:
            passes, _ = prepare_passes(
                model,
                torch.zeros(sequences, length, dtype=torch.int64, device=model.device),
                ignore,
                memory=lambda device: available_memory(device, asked),
                batch_size=request.batch_size,
                min_batches=LOOKS if search.request.fast else 1,
            )
            if not passes.forks:
                return None
            pace = measure_pace(model, passes.batches[0], passes.scoring(search.metric))
            seconds += pace.seconds(*search_loads(search, passes, bool(request.holdout)))
    return seconds


def dry_apply(request: ApplyRequest, registry: Registry, notify: Notify) -> DryRunResult:
    """Say what `apply` would write; raises as it would."""
    asked = resolve_apply(request, registry, notify, ProcessGroup(), dry=True)
    if isinstance(asked, ToGguf):
        pruned = plan_gguf(asked.file, asked.removals, asked.to).pruned()
        return DryRunResult(
            schema_version=1,
            sleb_version=__version__,
            kind="dry-run",
            command="apply",
            model=str(asked.file.path),
            blocks=block_count(asked.file),
            removed=len(asked.removals),
            work=tuple(_recovery(asked.to)),
            written_bytes=gguf_size(pruned),
            seconds=_healing_seconds(asked.to),
            files=(str(asked.to.place),),
        )
    subject = asked.subject
    if subject.architecture.source.config_only:
        raise ModelError(
            f"The weights of {subject.architecture.source.id} have not been downloaded, so what would be "
            "written is unknown.",
            hint="Download the model first (`hf download`), or leave out --dry-run for a GGUF file.",
        )
    planned, *_ = plan_files(subject.surgery, asked.to.place, asked.dtype, asked.shard_bytes)
    names = names_in_checkpoint(subject, planned, recovers=asked.to.recovery is not None)
    return _result(
        "apply",
        subject.architecture,
        asked.to.recovery.placement if asked.to.recovery else asked.settings.placement,
        removed=len(subject.surgery.removals),
        work=_recovery(asked.to),
        written_bytes=sum(shard.size for shard in (planned.weights or {}).values()),
        seconds=_healing_seconds(asked.to),
        files=[asked.to.place / name for name in names],
    )


def _recovery(to: Delivery) -> list[str]:
    """Describe the text of a recovery, if there is one."""
    if to.recovery is None:
        return []
    fitted, samples = to.recovery.splits[0], sum(split.samples for split in to.recovery.splits)
    return [f"{fitted.source}: {samples} x {fitted.sequence_length} tokens to recover on"]


def _healing_seconds(to: Delivery) -> float | None:
    """Return the time that healing is given, if that is known and nothing else takes longer."""
    recovery = to.recovery
    if recovery is None or recovery.closed_form or not recovery.budget or recovery.budget.minutes is None:
        return None
    return recovery.budget.minutes * 60


def dry_eval(subject: Subject, request: EvalRequest, files: Sequence[Path], notify: Notify) -> DryRunResult:
    """Say what an evaluation would measure; raises as it would."""
    architecture, surgeries = subject.architecture, subject.sizes(request)
    placement = place_evaluation(subject, request, notify, ProcessGroup())
    tasks = names_of(request)
    if tasks:
        find_tasks(tasks, request, also=PRESETS)
    length, windows = choose_length(request.sequence_length, architecture), dict[str, int | None]()
    for name in texts_of(request):
        windows[name] = request.max_windows
        if is_file(name) and has_tokenizer(architecture.source):
            tokenizer = load_tokenizer(architecture.source)
            windows[name] = len(read_evaluation_text(name, request, tokenizer, architecture).ids)
    models = [(), *(surgery.removals for surgery in surgeries)]
    texts = [f"{name}: {count or 'all'} windows of {length:,} tokens" for name, count in windows.items()]
    return _result(
        "eval",
        architecture,
        placement,
        removed=len(subject.surgery.removals),
        sizes=surgeries,
        work=[*texts, *tasks],
        seconds=None if tasks else _seconds_of_texts(architecture, placement, request, length, windows, models, notify),
        files=files,
    )


def _seconds_of_texts(
    architecture: Architecture,
    placement: Placement,
    request: EvalRequest,
    length: int,
    windows: dict[str, int | None],
    models: Sequence[tuple[int, ...]],
    notify: Notify,
) -> float | None:
    counts = [count for count in windows.values() if count]
    model = _random_model(architecture, placement, notify) if len(counts) == len(windows) else None
    if model is None:
        return None
    size = None if request.items_per_batch == "auto" else int(request.items_per_batch)
    with model:
        ids = torch.zeros(max(counts), length, dtype=torch.int64, device=model.device)
        passes, _ = prepare_passes(model, ids, ignore, batch_size=size)
        if not passes.forks:
            return None
        pairs = min(2, len(models))
        pace = measure_pace(
            model,
            passes.batches[0],
            lambda hidden, ids: score_tokens(ids, [Predictions(model, ids, hidden)] * pairs, passes.budget.positions),
        )
    tokens = sum(counts) * length
    blocks = sum(architecture.block_count - len(removals) for removals in models)
    return pace.seconds(Load(blocks * tokens, len(models) / pairs * tokens))


def dry_bench(
    subject: Subject, request: BenchRequest, files: Sequence[Path], engine: Engine | None, notify: Notify
) -> DryRunResult:
    """Say what a benchmark would time; raises as it would."""
    architecture = subject.architecture
    if engine:
        engine_source(subject, engine, request, notify, dry=True)
    place, workloads, surgeries = resolve_benchmark(subject, request, notify, engine)
    seconds: float | None = None
    if engine is None and not request.compile:
        with threads(request.threads), task(notify, "Predicting the speed"):
            rate, seconds = measure_rate(place.dtype, place.device), 0.0
            for workload in workloads:
                shape = workload.batch_size, workload.prompt_length, workload.new_tokens
                try:
                    batch = seconds_of_work(count_work(architecture, *shape, place.dtype), rate)
                except UnsupportedModelError:
                    seconds = None
                    break
                runs = workload.iterations + (USUAL_WARMUP if workload.warmup is None else workload.warmup)
                each = (batch.without(removals) for removals in ((), *(surgery.removals for surgery in surgeries)))
                seconds += runs * sum(one + workload.cooldown for one in each)
    return _result(
        "bench",
        architecture,
        place,
        removed=len(subject.surgery.removals),
        sizes=surgeries,
        work=[f"{workload.name}: {workload}, {workload.iterations} runs" for workload in workloads],
        seconds=seconds,
        files=files,
    )


def _result(
    command: Command,
    architecture: Architecture,
    place: Placement,
    *,
    removed: int | None,
    work: Sequence[str],
    files: Sequence[Path],
    sizes: Sequence[Surgery] = (),
    written_bytes: int | None = None,
    seconds: float | None = None,
) -> DryRunResult:
    needed = (streamed_bytes if place.stream else weight_bytes)(architecture, place.dtype)
    return DryRunResult(
        schema_version=1,
        sleb_version=__version__,
        kind="dry-run",
        command=command,
        model=architecture.source.id,
        blocks=architecture.block_count,
        removed=removed,
        sizes=tuple(len(surgery.removals) for surgery in sizes),
        work=tuple(work),
        dtype=dtype_name(place.dtype),
        device=place.device.type,
        memory_bytes=needed,
        free_bytes=free_bytes(place.device),
        written_bytes=written_bytes,
        seconds=seconds,
        files=tuple(map(str, files)),
    )


def _random_model(architecture: Architecture, place: Placement, notify: Notify) -> SkippableModel | None:
    """Build the model with two of its blocks and random weights; None if that is not how it would run."""
    count = architecture.block_count
    removed = tuple(block for block in range(count) if block not in (count // 3, 2 * count // 3))
    size = count_parameters(architecture).without(removed) * place.dtype.itemsize
    is_plain = not (place.stream or place.device_map or place.load_in or architecture.is_quantized)
    if not is_plain or size > free_bytes(place.device):
        return None
    try:
        config = architecture.read_config(plan_surgery(architecture, removed).prune_config())
    except UnsupportedModelError:
        return None
    with (
        task(notify, "Timing two blocks with random weights"),
        translate_transformers_errors(f"the config of {architecture.source.id}"),
        place.device,
    ):
        model = architecture.auto_class.from_config(
            config, dtype=place.dtype, trust_remote_code=architecture.source.trust_remote_code
        )
    model.requires_grad_(False).eval()
    return SkippableModel(model, architecture.blocks_of(model), device=place.device)
