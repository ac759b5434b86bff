"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.forward.placement import Placement, open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.file_tensors import block_number, file_tensors
from sleb_cli.engine.recovery.heal import LEARNING_RATE, HealBudget, Healing, Progress
from sleb_cli.engine.recovery.low_rank import RANK, rank_of
from sleb_cli.engine.recovery.unfinished import FORMAT, Saved, Unfinished, fit_file
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.calibration import Calibration, Sequences, calibrate_splits, texts_sha256
from sleb_cli.engine.text.portions import Portions
from sleb_cli.engine.text.settings import REFERENCE_PRESETS, CalibrationSettings
from sleb_cli.engine.text.sources import SELF_CHAT
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ConversationsRecord, HealRecord, LossesRecord, RecoveryRecord
from sleb_cli.records import require_same_work
from sleb_cli.units import plural
from sleb_cli.version import __version__
from sleb_plugins import DataError, ModelError, UnsupportedModelError, UsageError

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense model's inputs."""
SHARING_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks.

    Attributes:
        parameters: the values by the dense model's parameter names.
        tensors: the values by the names in the pruned checkpoint's files.
        record: the text and the losses.
    """

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord


_Start = tuple[dict[str, Tensor], RecoveryRecord, dict[str, Calibration]]
"""What healing starts from: fitted values, the record so far, and texts: the validation and the reported ones."""


@dataclass
class Recovery:
    """A recovery that is decided.

    Attributes:
        subject: the model and the removed blocks.
        closed_form: whether its blocks are refitted.
        budget: when to stop healing; None heals nothing.
        resume: whether an interrupted healing is continued.
        placement: where the dense model is, and in which data type it computes.
        stored: the data type to which values are rounded.
        in_host_memory: whether hidden states wait there, because the device has too little.
        splits: the text to fit to, the text that decides and the text that is reported on.
        state: where what is found is kept until the output is written.
        group: the processes that recover together.
        notify: the listener for events.
    """

    subject: Subject
    closed_form: bool
    budget: HealBudget | None
    resume: bool
    placement: Placement
    stored: torch.dtype
    in_host_memory: bool
    splits: Sequence[CalibrationSettings]
    state: Unfinished
    group: ProcessGroup
    notify: Notify

    def run(self) -> Recovered:
        """Return new values with which the pruned model comes closer to the dense one.

        Raises:
            UnsupportedModelError: the files cannot take new values.
            MachineError: the model does not fit into memory.
            DataError: the text is too short.
            PlanError: the unfinished healing is a different one.
        """
        self.architecture, self.surgery = self.subject.architecture, self.subject.surgery
        self.path, self.removed = self.architecture.adapter.blocks_path, self.surgery.removed
        self.tokenizer = load_tokenizer(self.architecture.source)
        self.fitted: Calibration | None = None
        saved = None
        if self.resume and self.state.healing.exists():
            saved = Saved.read(self.state.healing)
            identity = saved.record("identity", dict[str, Any])
            require_same_work(self.state.folder, "healing", identity, self.identity, "plan, text and budget")
        with open_dense(self.architecture, self.placement, self.notify) as self.dense:
            start = self._resumed(saved) if saved else self._closed_form()
            values, record = self._heal(self.budget, start, saved) if self.budget else start[:2]
            tensors = file_tensors(self.dense, self.surgery, values, self.placement.rounded)
        del self.dense  # the proof needs the memory
        return Recovered(values, tensors, record)

    @property
    def _computation(self) -> dict[str, Any]:
        """What decides the values that are found on the same text."""
        return {
            "format": FORMAT,
            "model": self.architecture.source.content_hash,
            "sleb": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "dtype": dtype_name(self.placement.dtype),
            "stored": dtype_name(self.stored),
            "device": self.placement.device.type,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a healing to be resumed.

        The text is compared by its tokens, and text of the model's own by all that it is generated from.
        """
        text, budget = self.splits[0], self.budget
        return self._computation | {
            "removals": list(self.surgery.removals),
            "recover": self.closed_form,
            "calibration": text.source,
            "text": texts_sha256(self.splits, self.tokenizer),
            "samples": sum(split.samples for split in self.splits),
            "sequence_length": text.sequence_length,
            "seed": text.seed,
            "chat": text.chat,
            "heal_minutes": budget.minutes if budget else None,
            "heal_tokens": budget.tokens if budget else None,
            "processes": self.group.size,
        }

    def _fits(self, record: RecoveryRecord) -> Path:
        """Return the folder of the fits of this very recovery, on these tokens."""
        on = {"train": record.train_text.tokens_sha256, "validation": record.validation_text.tokens_sha256}
        on |= {"chat": record.train_text.chat} if record.train_text.chat else {}
        named = json.dumps(self._computation | {"removed": sorted(self.removed)} | on, sort_keys=True)
        return self.state.folder / f"fits-{hashlib.sha256(named.encode()).hexdigest()[:16]}"

    def _closed_form(self) -> _Start:
        """Draw the text, measure the cost of the removal, and fit in closed form if requested."""
        fitted, validation, reported = self.group.from_main(
            lambda: calibrate_splits(self.splits, self.tokenizer, self._whole, self.notify)
        )
        self.fitted = fitted
        texts = {"validation": validation, "reported": reported}
        if talks := self.group.from_main(self._conversations):
            texts["conversations"] = talks
        values = dict[str, Tensor]()
        (dense, own_dense), (pruned, own_pruned) = self._measure("dense", texts), self._measure("pruned", texts, values)
        record = RecoveryRecord(
            train_text=fitted.record,
            validation_text=validation.record,
            test_text=reported.record,
            dense=dense,
            pruned=pruned,
        )
        if talks and own_dense and own_pruned:
            own = ConversationsRecord(text=talks.record, dense=own_dense, pruned=own_pruned)
            record = record.model_copy(update={"conversations": own})
        if self.closed_form:
            saved = self._fits(record)
            if self.group.is_main and (count := len(list(saved.glob("*.safetensors")))):
                self.notify(Notice(f"Continuing with {plural(count, 'fit')} of an interrupted run."))
            values, closed_form = recover_in_closed_form(
                self.dense,
                self.removed,
                fitted.sequences,
                validation.sequences,
                self.notify,
                stored=self.stored,
                in_host_memory=self.in_host_memory,
                group=self.group,
                saved=saved,
                loss_mask=validation.loss_mask,
            )
            after, of_own = self._measure("recovered", texts, values)
            record = record.model_copy(update={"closed_form": closed_form, "closed_form_losses": after})
            record = _with_conversations(record, closed_form=of_own)
        return values, record, texts

    def _resumed(self, saved: Saved) -> _Start:
        """Return what a saved healing began with."""
        record: RecoveryRecord = saved.record("record", RecoveryRecord)
        values: dict[str, Tensor] = {}
        for fit in record.closed_form.fits if record.closed_form else ():
            values |= Saved.read(fit_file(self._fits(record), fit.block)).tensors
        texts = {"validation": record.validation_text, "reported": record.test_text}
        if record.conversations:
            texts["conversations"] = record.conversations.text
        found = {name: (text, saved.text(name, text)) for name, text in texts.items()}
        return values, record, {name: Calibration(ids, text, mask) for name, (text, (ids, mask)) in found.items()}

    def _heal(self, budget: HealBudget, start: _Start, saved: Saved | None) -> tuple[dict[str, Tensor], RecoveryRecord]:
        """Distill the dense model into the pruned one."""
        (values, record, texts), place = start, self.placement
        validation = texts["validation"]
        model = load_pruned(self.surgery, place.dtype, place.device, self.notify, dense=self.dense.model)
        path, blocks = self.path, self.architecture.blocks_of(model)
        parameters = {
            f"{path}.{old}.{name}": parameter
            for new, old in enumerate(self.surgery.kept.blocks)
            for name, parameter in blocks[new].named_parameters()
            if parameter.is_floating_point()
        }
        for name, value in values.items():  # outside the blocks, the names are the same in both models
            parameter = parameters[name] if name in parameters else model.get_parameter(name)
            parameter.data = value.to(parameter.device, parameter.dtype, copy=True)  # not into the dense model's own

        def save(progress: Progress, tensors: Mapping[str, Tensor]) -> None:
            self.architecture.source.watch.require_unchanged()
            records = {
                "identity": json.dumps(self.identity),
                "record": record.model_dump_json(),
                "progress": progress.model_dump_json(),
            }
            drawn = {name: text.sequences for name, text in texts.items()}
            drawn |= {f"{name}.mask": text.loss_mask for name, text in texts.items() if text.loss_mask is not None}
            Saved(self.state.healing, records, {**tensors, **drawn}).write()

        with SkippableModel(model, blocks) as pruned:
            teacher, student = Variant(self.dense), Variant(pruned)
            # Training starts a few blocks below the first gap, or at the first fitted block if that is lower.
            fitted = [block for name in values if (block := block_number(path, name)) is not None]
            first = max(0, min([min(self.removed) - TRAINED_BELOW, *fitted]))
            if first and not can_share(teacher, student, first, validation.sequences[:1].to(place.device)):
                first = 0
            weights = {
                name: parameter
                for name, parameter in parameters.items()
                if rank_of(parameter.shape) and (block_number(path, name) or 0) >= first
            }
            originals = [weight.data for weight in weights.values()]  # the dense model's own, where nothing was fitted
            for weight in weights.values():
                weight.data = weight.data.clone()
            portion = self._portions(budget).draw
            healing = Healing(
                teacher,
                student,
                first,
                weights,
                originals,
                self.stored,
                portion,
                validation.sequences,
                budget,
                self.group,
                save,
                self.notify,
                validation.loss_mask,
            )
            stopped = healing.run(saved)
        values = values | {name: weight.detach() for name, weight in weights.items()}
        progress = healing.progress
        after, of_own = self._measure("healed", texts, values)
        heal = HealRecord(
            minutes=budget.minutes,
            token_budget=budget.tokens,
            sequence_length=healing.length,
            batch_size=healing.batch * self.group.size,
            learning_rate=LEARNING_RATE,
            rank=RANK,
            tokens=progress.tokens,
            kept_tokens=progress.best_tokens,
            steps=progress.steps,
            seconds=progress.seconds,
            stopped=stopped,
            losses=after,
        )
        return values, _with_conversations(record.model_copy(update={"heal": heal}), healed=of_own)

    def _portions(self, budget: HealBudget) -> Portions:
        """Return the text to heal on, of the part of it that was fitted to."""
        fitted = self.splits[0]
        # Samples of a reference preset are rows of text: read no more than were fitted to.
        most = fitted.samples if fitted.source in REFERENCE_PRESETS else math.inf

        def uses(portion: int) -> int:
            return int(min(most, -(-budget.portion_tokens(portion) // fitted.sequence_length)))

        def written(source: str) -> Sequences:
            if self.fitted is None:  # a healing that continues
                self.fitted = calibrate_splits(self.splits, self.tokenizer, self._whole, self.notify)[0]
            return self.fitted.sequences_of(source)

        return Portions(fitted, uses, self.tokenizer, self._whole, self.group.size, written)

    def _whole(self) -> Any:
        """Return the dense model with no block skipped."""
        self.dense.skip(())
        return self.dense.model

    def _conversations(self) -> Calibration | None:
        """Return conversations of a chat model's own, of which the answers count; what is streamed writes none."""
        if self.placement.stream or not getattr(self.tokenizer, "chat_template", None):
            return None
        settings = replace(self.splits[2], source=SELF_CHAT, shares={SELF_CHAT: Fraction(1)}, chat="answers")
        try:
            return calibrate_splits([settings], self.tokenizer, self._whole, self.notify)[0]
        except (UnsupportedModelError, UsageError, DataError) as error:
            self.notify(Notice(f"Not measured on conversations: {error.message}"))
            return None

    def _measure(
        self, what: str, texts: Mapping[str, Calibration], values: Mapping[str, Tensor] | None = None
    ) -> tuple[LossesRecord, LossesRecord | None]:
        """Return the losses with these values (None: of the dense model) on what is reported, and on conversations."""
        dense, found = Variant(self.dense), list[LossesRecord]()
        variant = dense if values is None else Variant(self.dense, self.removed, values)
        with task(self.notify, f"Measuring the {what} model"):
            for text in (texts[name] for name in ("reported", "conversations") if name in texts):
                measured = losses(variant, dense, text.sequences, self.group, text.loss_mask)
                if not math.isfinite(sum(measured)):
                    hint = "Use a wider data type, or other text."
                    raise ModelError(f"The loss of the {what} model is {measured.loss}.", hint=hint)
                found.append(LossesRecord(**measured._asdict()))
        return found[0], (*found[1:], None)[0]


def _with_conversations(record: RecoveryRecord, **losses: LossesRecord | None) -> RecoveryRecord:
    """Return the record with the losses on conversations after a stage, if there are any."""
    if record.conversations is None:
        return record
    return record.model_copy(update={"conversations": record.conversations.model_copy(update=losses)})


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Whether the pruned model may start at block `first` with the dense model's hidden states.

    It may not if blocks take more than hidden states from earlier blocks.
    """
    try:
        entering, _ = dense.entering_and_final_states(ids, first)
        found, expected = pruned.final_states(ids, (first, entering)), pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    return float((found - expected).float().norm() / expected.float().norm()) < SHARING_TOLERANCE
