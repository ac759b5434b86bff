"""`sleb search`: from a model to a plan."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import Any

import torch

from sleb_cli import __version__
from sleb_cli.engine.architecture import Architecture, read_architecture
from sleb_cli.engine.calibration import (
    Calibration,
    CalibrationRequest,
    CalibrationSettings,
    calibrate,
    settle_calibration,
)
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.gates import GatedModel
from sleb_cli.engine.greedy import count_to_remove, greedy_search, parse_ratio
from sleb_cli.engine.loading import (
    choose_device,
    choose_dtype,
    dtype_name,
    load_dense,
    load_tokenizer,
    quiet_libraries,
)
from sleb_cli.engine.scoring import Scoring
from sleb_cli.engine.source import locate_model
from sleb_cli.events import BlockRemoved, Notify, SearchStarted, TaskFinished, TaskStarted
from sleb_cli.plan import DenseRecord, Plan, SearchRecord, Step
from sleb_cli.plugin_manager import Registry
from sleb_plugins import Metric, ModelError, UnsupportedModelError, UsageError

# Sequences are scored together as long as they hold no more tokens than this.
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class SearchRequest:
    """Everything that decides a search, as the user gave it."""

    model: str
    ratio: str | None
    remove: int | None
    calibration: CalibrationRequest
    metric: str = "nll"
    protect_first: int = 1
    protect_last: int = 1
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Settled:
    """A request after everything that can be checked without the weights was checked."""

    architecture: Architecture
    metric: Metric
    remove: int
    ratio: Fraction | None
    calibration: CalibrationSettings
    device: torch.device
    dtype: torch.dtype


def plan_removals(request: SearchRequest, registry: Registry, notify: Notify) -> Plan:
    """Search greedily for the blocks that the model can best do without.

    Raises:
        SlebError: of the class that fits, for anything the request asks that cannot be.
    """
    started = time.monotonic()
    quiet_libraries()
    settled = _settle(request, registry, notify)
    architecture = settled.architecture
    tokenizer = load_tokenizer(architecture.source)
    # Loaded at first use: a text that is missing should be said before gigabytes are read.
    model = cache(partial(load_dense, architecture, settled.dtype, settled.device, notify))
    calibration = calibrate(settled.calibration, tokenizer, model, notify)
    dense, steps, how = _search(settled, request, model(), tokenizer, calibration, notify)
    return Plan(
        schema_version=1,
        sleb_version=__version__,
        model=architecture.record,
        calibration=calibration.record,
        search=how,
        dense=dense,
        removals=tuple(step.block for step in steps),
        steps=tuple(steps),
        environment=environment_record(registry.third_party(), settled.device, time.monotonic() - started),
    )


def _settle(request: SearchRequest, registry: Registry, notify: Notify) -> _Settled:
    if (request.ratio is None) == (request.remove is None):
        raise UsageError("Say how many blocks to remove: --ratio or --remove, one of the two.", hint="--ratio 0.2")
    ratio = parse_ratio(request.ratio) if request.ratio is not None else None
    if request.batch_size is not None and request.batch_size < 1:
        raise UsageError(f"--batch-size {request.batch_size} is too small.", hint="Take 1 or more.")
    metric = registry.metric(request.metric)
    device = choose_device(request.device)
    source = locate_model(request.model, notify, revision=request.revision, trust_remote_code=request.trust_remote_code)
    architecture = read_architecture(source, registry, notify)
    if architecture.block_count < 2:
        raise UnsupportedModelError(
            f"The number of blocks of {source.id} is {architecture.block_count}: nothing can be removed.",
            hint="Name a deeper model.",
        )
    remove = count_to_remove(
        architecture.block_count,
        ratio=ratio,
        remove=request.remove,
        protect_first=request.protect_first,
        protect_last=request.protect_last,
    )
    return _Settled(
        architecture=architecture,
        metric=metric,
        remove=remove,
        ratio=ratio,
        calibration=settle_calibration(request.calibration, architecture),
        device=device,
        dtype=choose_dtype(request.dtype, architecture, device),
    )


def _search(
    settled: _Settled,
    request: SearchRequest,
    model: Any,
    tokenizer: Any,
    calibration: Calibration,
    notify: Notify,
) -> tuple[DenseRecord, list[Step], SearchRecord]:
    architecture, sequences = settled.architecture, calibration.sequences.to(settled.device)
    batch_size = request.batch_size or max(1, TOKENS_PER_BATCH // sequences.shape[1])
    with GatedModel(model, architecture.blocks_of(model)) as gated:
        scoring = Scoring(gated, torch.split(sequences, batch_size), tokenizer, notify)
        notify(TaskStarted(task := "Measuring the dense model"))
        dense_loss = scoring.loss(())
        if not math.isfinite(dense_loss):
            raise ModelError(
                f"The loss of {architecture.source.id} itself is {dense_loss} in {dtype_name(settled.dtype)}.",
                hint="Use a wider data type: --dtype float32.",
            )
        score, engine, reason = scoring.scorer(settled.metric)
        notify(TaskFinished(task))
        notify(SearchStarted(architecture.block_count, settled.remove, _evaluations(settled, request, scoring)))
        steps: list[Step] = []
        for choice in greedy_search(
            score,
            architecture.block_count,
            settled.remove,
            protect_first=request.protect_first,
            protect_last=request.protect_last,
        ):
            removed = [*(step.block for step in steps), choice.block]
            # For nll the winner's score is the loss that is asked for here.
            loss = choice.scores[choice.block] if settled.metric.name == "nll" else scoring.loss(removed)
            step = Step(
                block=choice.block,
                score=choice.scores[choice.block],
                perplexity=_perplexity(loss, choice.block),
                scores=choice.scores,
            )
            steps.append(step)
            notify(BlockRemoved(len(steps), step.block, step.score, step.perplexity))
    how = SearchRecord(
        algorithm="greedy",
        metric=settled.metric.name,
        remove=settled.remove,
        ratio=request.ratio,
        protect_first=request.protect_first,
        protect_last=request.protect_last,
        dtype=dtype_name(settled.dtype),
        device=settled.device.type,
        batch_size=batch_size,
        engine=engine,
        engine_reason=reason,
    )
    return DenseRecord(loss=dense_loss, perplexity=math.exp(dense_loss)), steps, how


def _evaluations(settled: _Settled, request: SearchRequest, scoring: Scoring) -> int:
    first = settled.architecture.block_count - request.protect_first - request.protect_last
    return sum(first - step for step in range(settled.remove)) * scoring.sequences


def _perplexity(loss: float, block: int) -> float:
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise ModelError(
            f"Without block {block}, the calibration loss is {loss} nats per token: no perplexity can be given.",
            hint="A wider data type may help: --dtype float32.",
        )
    return perplexity
