"""Load the model and the text of a search of blocks or experts, and record how it ran."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.environment import environment_record
from sleb_cli.engine.forward.decoding import check_decoding
from sleb_cli.engine.forward.memory_budget import available_memory
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.prepare import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.sample_generation import generate_sample
from sleb_cli.engine.search.journal import Journal, open_journal
from sleb_cli.engine.search.settings import BlockMethod, Search
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.events import Notice, Notify, Warned
from sleb_cli.keys import key_of
from sleb_cli.plan import CalibrationRecord, MetricRecord, Plan, SampleGeneration, SearchRecord
from sleb_cli.records import THIS_VERSION, differences
from sleb_cli.requests import DEMO, journal_of
from sleb_cli.texts.named import is_reference
from sleb_plugins import LogitMetric, ModelMetric, PlanError

# Enough tokens to show whether a model works with a KV cache.
PROMPT_TOKENS = 8
NEW_TOKENS = 2
FEW_TOKENS = 1000
"""With fewer, the differences between candidates are mostly chance."""


@dataclass(frozen=True)
class SearchInputs:
    """The model and the text of a search, when it began, and who runs it and hears of it."""

    started: float
    tokenizer: Any
    model: SkippableModel
    calibration: Calibration
    group: ProcessGroup
    notify: Notify


def load_inputs(search: Search, group: ProcessGroup, notify: Notify) -> SearchInputs:
    """Load the tokenizer, the text and the model."""
    started = time.monotonic()
    tokenizer = load_tokenizer(search.architecture.source)
    # Loaded at first use, so that a missing text is reported before gigabytes are read.
    model = cache(partial(_open_model, search, group, notify))
    calibration = group.from_main(
        lambda: calibrate([search.text], tokenizer, lambda: model().model, notify)[0]
    )
    if calibration.loss_mask is not None and not search.text.length_given:
        _say_if_few_count(int(calibration.loss_mask.sum()), search.text.source, notify)
    if search.extended:
        _require_continuation(search, search.extended, calibration)
    return SearchInputs(started, tokenizer, model(), calibration, group, notify)


def _open_model(search: Search, group: ProcessGroup, notify: Notify) -> SkippableModel:
    architecture = search.architecture
    placement = search.placement
    model = open_model(architecture, placement, notify)
    # Where the check would cost a read of the weights, or where rounding may choose other experts,
    # only the proof of `apply` tells.
    may_round = placement.dtype.itemsize < 4 and "expert" in str(architecture.text_config)
    if architecture.reading:
        return model
    if group.is_main and model.weights.resident and not placement.device_map and not may_round:
        _warn_without_kv_cache(model, search, notify)
    return model


def _warn_without_kv_cache(model: SkippableModel, search: Search, notify: Notify) -> None:
    """Warn now of a model that the proof of `apply` would refuse."""
    architecture = search.architecture
    length = PROMPT_TOKENS
    if architecture.longest_sequence:
        length = min(length, max(1, architecture.longest_sequence - NEW_TOKENS))
    # The first tokens are special in many families.
    vocabulary = architecture.text_config.vocab_size
    ids = (vocabulary // 2 + torch.arange(length, device=model.device)[None]) % vocabulary
    _, fault = check_decoding(model.model, ids, NEW_TOKENS, search.placement.dtype)
    if not fault:
        return
    with model:
        is_sound = bool(model.logits(ids, ()).isfinite().all())
    if is_sound:  # otherwise the search says more
        notify(
            Warned(
                f"{architecture.source.id} does not work with a KV cache: {fault}. Text that it "
                "writes, `sleb bench` and the proof of `sleb apply` need one; the search does not."
            )
        )


def _say_if_few_count(tokens: int, source: str, notify: Notify) -> None:
    if tokens < FEW_TOKENS:
        notify(
            Notice(
                f"Only {tokens} tokens of answers in {source} count, so the choice is partly "
                "chance. Search on more conversations, or on self-chat."
            )
        )


def _require_continuation(search: Search, plan: Plan, calibration: Calibration) -> None:
    method = search.method
    assert isinstance(method, BlockMethod)
    current: dict[str, Any] = {}
    for name in ("metric", "strategy", "protect_first", "protect_last", "fast", "holdout"):
        current[name] = search.options.get(name)
    current["dtype"] = dtype_name(search.placement.dtype)
    current["protect"] = method.removable.protection.blocks
    expected = {name: getattr(plan.search, name) for name in current}
    current["implementation"] = _comparable(method.implementation)
    expected["implementation"] = _comparable(plan.search.implementation)
    differing = differences(
        {"search": current, "calibration": calibration.record.to_data()},
        {"search": expected, "calibration": plan.calibration.to_data()},
    )
    if differing:
        raise PlanError(
            f"This search cannot continue the plan ({differing}).",
            hint="Leave out these options so that the plan sets them. Use the text it was "
            "calibrated on, and the same version of the metric.",
        )


def _comparable(implementation: MetricRecord | None) -> dict[str, Any] | None:
    if implementation is None:
        return None
    if implementation.package == "sleb":
        # Another version of sleb can extend the plan, so the code of its own metrics does not
        # count.
        return implementation.model_dump(exclude={"version", "code"})
    return implementation.model_dump()


def prepare_search(
    search: Search, inputs: SearchInputs, calibration: Calibration, min_batches: int = 1
) -> tuple[Passes, str | None]:
    """Prepare passes over these sequences; also return why candidates share no walk, if so."""
    return prepare_passes(
        inputs.model,
        calibration.sequences,
        inputs.notify,
        loss_mask=calibration.loss_mask,
        memory=partial(available_memory, group=inputs.group, limit=search.memory),
        batch_size=search.batch_size,
        min_batches=min_batches,
        walks_together=True,
    )


def search_record(search: Search, passes: Passes, held_out: int, **fields: Any) -> SearchRecord:
    """Record how a search runs; `held_out` counts sequences, and `fields` differ between blocks and
    experts.
    """
    method = search.method
    placement = search.placement
    return SearchRecord(
        strategy=method.strategy.name,
        metric=method.metric.name,
        implementation=method.implementation,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
        batch_size=passes.budget.sequences,
        holdout=method.holdout,
        held_out=held_out,
        **fields,
    )


def _repeating_options(
    search: Search, record: SearchRecord, text: CalibrationRecord
) -> dict[str, Any]:
    # Options that the machine chose are named, too: they decide the last digits.
    model = search.architecture.record
    decided = {
        "model": model.id,
        "revision": None if model.id == DEMO else model.revision,
        "calibration": text.source,
        "sample_tokens": search.sample_tokens,
        "dtype": record.dtype,
        "device": record.device,
        "batch_size": record.batch_size,
    }
    if not is_reference(text.source):  # their samples are rows of text, not sequences
        decided["samples"] = text.sequences
        decided["sequence_length"] = text.sequence_length
    options = {**search.options, **decided}
    return {name: options[name] for name in sorted(options) if options[name] is not None}


def open_search_journal(
    search: Search, inputs: SearchInputs, record: SearchRecord
) -> AbstractContextManager[Journal]:
    """Open the journal of this search, identified by everything that its measurements depend on."""
    architecture = search.architecture
    # Measurements do not depend on the number of removals, so a search for more blocks continues
    # with this journal.
    key = key_of(
        architecture.identity,
        dtype=record.dtype,
        device=record.device,
        calibration=inputs.calibration.record.to_data(),
        search=record.model_dump(mode="json", exclude={"remove", "target", "dtype", "device"}),
    )
    return open_journal(
        journal_of(search.plan_file),
        key,
        inputs.notify,
        resume=search.resume,
        group=inputs.group,
        whole_models=isinstance(search.method.metric, LogitMetric | ModelMetric),
        require_valid=architecture.source.watch.require_unchanged,
    )


def make_plan(search: Search, inputs: SearchInputs, record: SearchRecord, **findings: Any) -> Plan:
    """Make the plan of a search."""
    text = inputs.calibration.record
    seconds = time.monotonic() - inputs.started
    return Plan(
        **THIS_VERSION,
        request=_repeating_options(search, record, text),
        model=search.architecture.record,
        calibration=text,
        environment=environment_record(dict(search.plugins), search.placement.device, seconds),
        search=record,
        score_unit=str(search.method.metric.unit) or None,
        **findings,
    )


def write_sample(
    search: Search,
    inputs: SearchInputs,
    removals: tuple[int, ...],
    absent: AbstractContextManager[object] | None = None,
) -> SampleGeneration | None:
    """Let the dense and the pruned model write a few words, if the search is to record any."""
    tokens = search.sample_tokens
    if not tokens:
        return None
    return inputs.group.from_main(
        lambda: generate_sample(
            inputs.model,
            inputs.tokenizer,
            removals,
            tokens,
            search.architecture.longest_sequence,
            inputs.notify,
            absent,
        )
    )
