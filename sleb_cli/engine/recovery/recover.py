"""Run `sleb apply --recover` and `--heal`: find new values for kept blocks, and measure them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.pickles import TORCH_DTYPES
from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.files.weights import WeightFiles
from sleb_cli.engine.forward.offload import loaded
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.padded import ids_of
from sleb_cli.engine.recovery.outputs import OutputComparison
from sleb_cli.engine.recovery.saved_state import SavedState
from sleb_cli.engine.recovery.stage import Job, RecoverySettings, whole_model
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.engine.text.own_chat import CONVERSATIONS_TASK
from sleb_cli.engine.text.own_text import OWN_TEXT_TASK
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.windows import tokens_sha256, whole_mask
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_cli.events import Notice, Notify, task
from sleb_cli.keys import key_of
from sleb_cli.plan import ConversationsRecord, LossesRecord, RecoveryRecord
from sleb_cli.texts.named import is_written, writes_conversations
from sleb_cli.texts.written import SELF_CHAT
from sleb_plugins import DataError, ModelError, UnsupportedModelError, UsageError


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks, by the dense model's parameters and by the checkpoint's files."""

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord


def tasks_ahead(settings: RecoverySettings) -> list[str]:
    """List what takes long, in order."""
    tasks = []
    for name in settings.splits[0].shares:
        if is_written(name):
            tasks.append(CONVERSATIONS_TASK if writes_conversations(name) else OWN_TEXT_TASK)
    return tasks + [stage.task for stage in settings.stages]


def recover(settings: RecoverySettings, notify: Notify) -> Recovered:
    """Find new values with which the pruned model comes closer to the dense one, and measure them.

    Raises:
        UnsupportedModelError: the files cannot take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: an interrupted run's file is broken.
    """
    surgery = settings.surgery
    placement = settings.placement
    # The dense model goes with this function: the proof needs the memory.
    with open_model(surgery.architecture, placement, notify) as dense:
        train, validation, test, conversations = _draw_texts(settings, dense, notify)
        state = _find_state(settings, train, validation)
        job = Job(settings, dense, train, validation, state, notify)
        texts = [test]
        if conversations:
            texts.append(conversations)
        measurements = _Measurements(dense, texts, notify)

        values: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        measurements.add("dense", "dense", measurements.dense)
        with surgery.simulate(dense.model):
            measurements.add("pruned", "pruned", Variant(dense, surgery.removed))
        for stage in settings.stages:
            values, done = stage.run(job, values)
            with surgery.simulate(dense.model):
                measurements.add(stage.key, stage.model, Variant(dense, surgery.removed, values))
            fields |= stage.fields(done, measurements.losses[0][stage.key])
        if conversations:
            fields["conversations"] = ConversationsRecord(
                text=conversations.record, **measurements.losses[1]
            )
        record = RecoveryRecord(
            train_text=train.record,
            validation_text=validation.record,
            test_text=test.record,
            dense=measurements.losses[0]["dense"],
            pruned=measurements.losses[0]["pruned"],
            **fields,
        )
        tensors = file_tensors(dense, surgery, values, placement.rounded)
    return Recovered(values, tensors, record)


def _draw_texts(
    settings: RecoverySettings, dense: SkippableModel, notify: Notify
) -> tuple[Calibration, Calibration, Calibration, Calibration | None]:
    tokenizer = load_tokenizer(settings.surgery.architecture.source)

    def draw(splits: Sequence[CalibrationSettings]) -> list[Calibration]:
        return calibrate(splits, tokenizer, lambda: whole_model(dense), notify)

    train, validation, test = draw(settings.splits)
    # A chat model is also measured on answers that it writes. That takes longer than a fit, so only
    # where it writes anyway.
    asked = settings.splits[2]
    if not any(map(is_written, asked.shares)) or not tokenizer.chat_template:
        return train, validation, test, None
    own_answers = replace(asked, source=SELF_CHAT, shares={SELF_CHAT: Fraction(1)}, chat="answers")
    try:
        (conversations,) = draw([own_answers])
    except (UnsupportedModelError, UsageError, DataError) as error:
        notify(Notice(f"Not measured on conversations: {error.message}"))
        return train, validation, test, None
    return train, validation, test, conversations


class _Measurements:
    """The losses of models by their keys, on each of some texts."""

    def __init__(self, dense: SkippableModel, texts: Sequence[Calibration], notify: Notify) -> None:
        self.dense = Variant(dense)
        compare = OutputComparison if dense.ending.output else DenseComparison
        self._comparisons = [compare(self.dense, text) for text in texts]
        self.losses: list[dict[str, LossesRecord]] = [{} for _ in texts]
        self._notify = notify

    def add(self, key: str, name: str, variant: Variant) -> None:
        """Measure a model on all texts; its name is for messages."""
        with task(self._notify, f"Measuring the {name} model"):
            for comparison, losses in zip(self._comparisons, self.losses, strict=True):
                measured = comparison.losses(variant)
                if not math.isfinite(sum(measured)):
                    raise ModelError(
                        f"The loss of the {name} model is {measured.loss}.",
                        hint="Use a wider data type, or other text.",
                    )
                losses[key] = LossesRecord(loss=measured.loss, divergence=measured.divergence)


def _find_state(
    settings: RecoverySettings, train: Calibration, validation: Calibration
) -> SavedState:
    surgery = settings.surgery
    placement = settings.placement
    key = key_of(
        surgery.architecture.identity,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
        stored=dtype_name(settings.stored),
        rounded=dtype_name(placement.rounded) if placement.rounded else None,
        removed=sorted(surgery.removed),
        others=surgery.other_cuts,
        texts=[_text_key(train), _text_key(validation)],
        chat=settings.splits[0].chat,
    )
    return SavedState(settings.output, key, surgery.architecture.source.watch)


def _text_key(text: Calibration) -> list[str | int]:
    ids = ids_of(text.sequences)
    counted = whole_mask(ids, text.loss_mask)
    return [tokens_sha256(ids), *ids.shape, tokens_sha256(counted)]


def file_tensors(
    skippable: SkippableModel,
    surgery: Surgery,
    values: Mapping[str, Tensor],
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the checkpoint's changed tensors by their names there, given values by parameter.

    `rounded` is the data type that the dense model's values were rounded to, if to any.

    Raises:
        UnsupportedModelError: such a tensor is stored quantized, or not as transformers would write
            it.
    """
    architecture = surgery.architecture
    path = architecture.adapter.blocks_path
    names = architecture.block_names(surgery.kept)
    weights = architecture.source.weights
    by_prefix: dict[str, dict[str, Tensor]] = {}  # by block, or by tensor outside the blocks
    for name, value in values.items():
        block = names.block_of(name)
        prefix = name if block is None else f"{path}.{block}"
        by_prefix.setdefault(prefix, {})[name] = value
    changed: dict[str, Tensor] = {}
    for prefix in sorted(by_prefix):
        new = by_prefix[prefix]
        block = names.block_of(prefix)
        if block is None:
            module = skippable.model.get_submodule(prefix.rpartition(".")[0])
            with loaded(module):
                changed |= _changed_tensors(skippable.model, weights, prefix, new, rounded)
        else:
            with skippable.loaded(block):
                changed |= _changed_tensors(skippable.model, weights, prefix, new, rounded)
    return {name: value for name, value, _ in surgery.tensors(changed.items())}


def _changed_tensors(
    model: Any,
    weights: WeightFiles,
    prefix: str,
    values: Mapping[str, Tensor],
    rounded: torch.dtype | None,
) -> dict[str, Tensor]:
    # The prefix is a block, all of whose values are here, or one tensor.
    old: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == prefix or name.startswith(f"{prefix}."):
            old[name] = tensor
    new = dict(old)
    for name, value in values.items():
        new[name] = value.to(old[name].device, old[name].dtype)
    before = _by_file_names(model, weights, old)
    after = _by_file_names(model, weights, new)
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    stored = {tensor.name: tensor for tensor in weights.stored if tensor.name in changed}
    for name, tensor in stored.items():
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{name} is stored quantized ({tensor.dtype}), so new values cannot be written to "
                f"it.",
                hint="Recover the model it was quantized from, and quantize the result.",
            )
    # The files must hold the old values under each name, so that it means the same tensor there.
    old_in_files = dict(read_all(weights, stored.keys()))
    for name in changed:
        dtype = before[name].dtype
        old_value = old_in_files.get(name)
        if old_value is None or not torch.equal(
            old_value.to(rounded or dtype).to(dtype), before[name].cpu()
        ):
            raise UnsupportedModelError(
                f"The weight files do not store {name} as transformers writes it, so it cannot "
                f"take new values.",
                hint="Load the model with transformers, save it again, and recover that copy.",
            )
    return changed


def _by_file_names(
    model: Any, weights: WeightFiles, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    # Files may fuse tensors. Their names lack the prefix if they hold a base model, and have one
    # more if they hold a model with a head.
    stored = {tensor.name for tensor in weights.stored}
    prefix = f"{model.base_model_prefix}."
    named: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        in_file = name
        for other in (name.removeprefix(prefix), prefix + name):
            if in_file not in stored and other in stored:
                in_file = other
        named[in_file] = tensor
    return named
