"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.file_tensors import file_tensors
from sleb_cli.engine.recovery.stage import Job, RecoverySettings, whole_model
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.engine.text.windows import tokens_sha256, whole_mask
from sleb_cli.events import Notice, Notify, task
from sleb_cli.keys import key_of
from sleb_cli.plan import ConversationsRecord, LossesRecord, RecoveryRecord
from sleb_cli.texts.written import SELF_CHAT
from sleb_plugins import DataError, ModelError, UnsupportedModelError, UsageError


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks, by parameter name in the dense model and by name in the pruned
    checkpoint's files.
    """

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord


def recover(settings: RecoverySettings, group: ProcessGroup, notify: Notify) -> Recovered:
    """Find new values with which the pruned model comes closer to the dense one, and measure them.

    Raises:
        UnsupportedModelError: the files cannot take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: an interrupted run's file is broken.
    """
    surgery, placement = settings.surgery, settings.placement
    values: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    # The dense model goes with this function: the proof needs the memory.
    with open_model(surgery.architecture, placement, notify) as dense:
        train, validation, *tests = group.from_main(partial(_draw_texts, settings, dense, notify))
        job = Job(
            settings,
            dense,
            train,
            validation,
            _folder_for(settings, train, validation),
            group,
            notify,
        )
        whole, pruned = Variant(dense), partial(Variant, dense, surgery.removed)
        measure = partial(_measure, [DenseComparison(whole, text, group) for text in tests], notify)
        measured = {"dense": measure("dense", whole), "pruned": measure("pruned", pruned(values))}
        for stage in settings.stages:
            values, fields_with = stage.run(job, values)
            measured[stage.measured] = measure(stage.model, pruned(values))
            fields |= fields_with(measured[stage.measured][0])
        tensors = file_tensors(dense, surgery, values, placement.rounded)
    test, *conversations = (
        {name: losses[text] for name, losses in measured.items()} for text in range(len(tests))
    )
    record = RecoveryRecord(
        train_text=train.record,
        validation_text=validation.record,
        test_text=tests[0].record,
        dense=test["dense"],
        pruned=test["pruned"],
        conversations=ConversationsRecord(text=tests[1].record, **conversations[0])
        if conversations
        else None,
        **fields,
    )
    return Recovered(values, tensors, record)


def _draw_texts(
    settings: RecoverySettings, dense: SkippableModel, notify: Notify
) -> list[Calibration]:
    tokenizer = load_tokenizer(settings.surgery.architecture.source)
    draw = partial(
        calibrate, tokenizer=tokenizer, load_model=partial(whole_model, dense), notify=notify
    )
    texts = draw(settings.splits)
    # A chat model is also measured on answers that it writes, unless each token would read all of
    # its weights.
    if settings.placement.stream or not getattr(tokenizer, "chat_template", None):
        return texts
    own_answers = replace(
        settings.splits[2], source=SELF_CHAT, shares={SELF_CHAT: Fraction(1)}, chat="answers"
    )
    try:
        return [*texts, *draw([own_answers])]
    except (UnsupportedModelError, UsageError, DataError) as error:
        notify(Notice(f"Not measured on conversations: {error.message}"))
        return texts


def _measure(
    comparisons: Iterable[DenseComparison], notify: Notify, name: str, variant: Variant
) -> list[LossesRecord]:
    records = list[LossesRecord]()
    with task(notify, f"Measuring the {name} model"):
        for comparison in comparisons:
            measured = comparison.losses(variant)
            if not math.isfinite(sum(measured)):
                hint = "Use a wider data type, or other text."
                raise ModelError(f"The loss of the {name} model is {measured.loss}.", hint=hint)
            records.append(LossesRecord(**measured._asdict()))
    return records


def _folder_for(settings: RecoverySettings, train: Calibration, validation: Calibration) -> Path:
    placement = settings.placement
    return settings.state.folder_for(
        key_of(
            settings.surgery.architecture.identity,
            dtype=dtype_name(placement.dtype),
            device=placement.device.type,
            stored=dtype_name(settings.stored),
            rounded=dtype_name(placement.rounded) if placement.rounded else None,
            removed=sorted(settings.surgery.removed),
            texts=[_text_key(text) for text in (train, validation)],
            chat=settings.splits[0].chat,
        )
    )


def _text_key(text: Calibration) -> list[str | int]:
    counted = whole_mask(text.sequences, text.loss_mask)
    return [tokens_sha256(text.sequences), *text.sequences.shape, tokens_sha256(counted)]
