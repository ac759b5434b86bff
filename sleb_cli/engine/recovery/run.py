"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor, nn

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.cache import existing_cache
from sleb_cli.engine.forward.placement import open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.file_tensors import block_number, file_tensors
from sleb_cli.engine.recovery.gguf_tensors import GgufTensors
from sleb_cli.engine.recovery.heal import LEARNING_RATE, Case, HealBudget, Healed, heal
from sleb_cli.engine.recovery.low_rank import RANK, rank_of
from sleb_cli.engine.recovery.settings import RecoverySettings
from sleb_cli.engine.recovery.unfinished import Saved, SavedFits, Unfinished, other_state
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import REFERENCE_PRESETS, calibrate_splits, texts_sha256
from sleb_cli.engine.text.portions import Portions
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import CalibrationRecord, HealRecord, LossesRecord, RecoveryRecord
from sleb_cli.units import plural
from sleb_cli.version import __version__
from sleb_plugins import ModelError, UnsupportedModelError

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense model's inputs."""
SHARING_TOLERANCE = 1e-2

MATRIX = 2
"""How many dimensions a matrix has; the closed form fits nothing of more."""


@dataclass(frozen=True)
class Recovered:
    """New values of kept blocks.

    Attributes:
        parameters: the values by the dense model's parameter names.
        tensors: the values by the names in the pruned checkpoint's files.
        record: the text and the losses.
        packed: the tensors of a GGUF file with these values, by their names in the dense one; none for a checkpoint.
    """

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    record: RecoveryRecord
    packed: Mapping[str, GgufTensor]


@dataclass(frozen=True)
class _Start:
    """What healing starts from: sequences that decide and that are reported on, fitted values, the record so far."""

    deciding: Tensor
    reported: Tensor
    values: dict[str, Tensor]
    record: RecoveryRecord


@dataclass
class Recovery:
    """A recovery that is decided.

    Attributes:
        subject: the model and the removed blocks.
        settings: how to recover.
        state: where what is found is kept until the output is written.
        group: the processes that recover together.
        notify: the listener for events.
        gguf: the file that the model was read from, if the values are to be packed as there; None for a checkpoint.
    """

    subject: Subject
    settings: RecoverySettings
    state: Unfinished
    group: ProcessGroup
    notify: Notify
    gguf: GgufFile | None = None

    def __post_init__(self) -> None:
        self.architecture, self.surgery = self.subject.architecture, self.subject.surgery
        self.path, self.removed = self.architecture.adapter.blocks_path, self.surgery.removed
        self.packed: GgufTensors | None = None

    def run(self) -> Recovered:
        """Return new values with which the pruned model comes closer to the dense one.

        Raises:
            UnsupportedModelError: the files cannot take new values.
            MachineError: the model does not fit into memory.
            DataError: the text is too short.
            PlanError: the unfinished healing is a different one.
        """
        settings = self.settings
        self.tokenizer = load_tokenizer(self.architecture.source)
        saved = self.state.read(self.identity) if settings.budget and settings.resume else None
        with open_dense(self.architecture, settings.placement, self.notify) as skippable:
            if self.gguf:
                self.packed = GgufTensors(self.gguf, skippable, self.path)
                self.packed.require(self._changeable())
            start = self._resumed(saved, skippable) if saved else self._closed_form(skippable)
            values, record = start.values, start.record
            if settings.budget:
                values, record = self._heal(skippable, settings.budget, start, saved)
            packed = self.packed.written if self.packed else {}
            return Recovered(values, file_tensors(skippable, self.surgery, values), record, packed)

    def _changeable(self) -> list[str]:
        """Return the names of the parameters that may get new values."""
        blocks = self.architecture.blocks_of(self.architecture.skeleton)
        return [
            f"{self.path}.{block}.{name}"
            for block in self.surgery.kept.blocks
            for name, parameter in blocks[block].named_parameters()
            if len(parameter.shape) <= MATRIX or (self.settings.budget and rank_of(parameter.shape))
        ]

    def _as_written(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values that the written file gives back."""
        return self.packed.store(values) if self.packed else values

    @property
    def _computation(self) -> dict[str, Any]:
        """What decides the values that are found on the same text."""
        return {
            "model": self.architecture.source.behavior,
            "sleb": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "dtype": dtype_name(self.settings.placement.dtype),
            "stored": dtype_name(self.settings.stored),
            "device": self.settings.placement.device.type,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a healing to be resumed.

        The text is compared by its tokens, and text of the model's own by all that it is generated from.
        """
        text, budget = self.settings.text, self.settings.budget
        return self._computation | {
            "removals": list(self.surgery.removals),
            "recover": self.settings.closed_form,
            "calibration": text.source,
            "text": texts_sha256(self.settings.splits, self.tokenizer),
            "samples": text.samples,
            "sequence_length": text.sequence_length,
            "seed": text.seed,
            "heal_minutes": budget.minutes if budget else None,
            "heal_tokens": budget.tokens if budget else None,
            "processes": self.group.size,
        }

    def _closed_form(self, skippable: SkippableModel) -> _Start:
        """Draw the text, measure the cost of the removal, and fit in closed form if requested."""
        settings, dense = self.settings, Variant(skippable)
        fitted, deciding, reported = self.group.from_main(
            lambda: calibrate_splits(settings.splits, self.tokenizer, lambda: _whole(skippable), self.notify)
        )
        record = RecoveryRecord(
            text=fitted.record,
            deciding_text=deciding.record,
            report_text=reported.record,
            dense=self._measure("dense", dense, reported.sequences),
            pruned=self._measure("pruned", Variant(skippable, self.removed), reported.sequences),
        )
        values: dict[str, Tensor] = {}
        if settings.closed_form:
            values, closed_form = recover_in_closed_form(
                skippable,
                self.removed,
                fitted.sequences,
                deciding.sequences,
                self.notify,
                stored=settings.stored,
                in_host_memory=settings.in_host_memory,
                spill_to=existing_cache() if settings.placement.stream else None,
                group=self.group,
                saved=self._saved_fits(fitted.record, deciding.record),
            )
            if not settings.budget:
                values = self._as_written(values)
            after = self._measure("recovered", Variant(skippable, self.removed, values), reported.sequences)
            record = record.model_copy(update={"closed_form": closed_form, "closed_form_losses": after})
        return _Start(deciding.sequences, reported.sequences, values, record)

    def _saved_fits(self, fitted: CalibrationRecord, deciding: CalibrationRecord) -> SavedFits:
        """Return the fits of this very recovery, on these tokens."""
        on = {"fitted": fitted.tokens_sha256, "deciding": deciding.tokens_sha256}
        saved = SavedFits(self.state.folder, self._computation | {"removed": sorted(self.removed)} | on)
        if self.group.is_main and (count := len(saved)):
            self.notify(Notice(f"Continuing with {plural(count, 'fit')} of an interrupted run."))
        return saved

    def _resumed(self, saved: Saved, skippable: SkippableModel) -> _Start:
        """Return what a saved healing began with.

        Raises:
            PlanError: it holds something else.
        """
        try:
            record = RecoveryRecord.model_validate_json(saved.data.get("record") or "")
        except (ValidationError, TypeError) as error:
            raise other_state("its record is missing, or is not what a healing saves") from error
        length = (None, self.settings.text.sequence_length)
        deciding, reported = (saved.tensor(name, length, torch.int64) for name in ("deciding", "reported"))
        vocabulary = self.architecture.text_config.vocab_size
        if any(int(rows.min()) < 0 or int(rows.max()) >= vocabulary for rows in (deciding, reported)):
            raise other_state(f"its tokens are not those of a vocabulary of {vocabulary}")
        own, values = dict(skippable.model.named_parameters()), {}
        for key in (key for key in saved.tensors if key.startswith("start.")):
            name = key.removeprefix("start.")
            if name not in own:
                raise other_state(f"the model has no {name[:60]}")
            values[name] = saved.tensor(key, own[name].shape, saved.tensors[key].dtype)
        return _Start(deciding, reported, values, record)

    def _heal(
        self, skippable: SkippableModel, budget: HealBudget, start: _Start, saved: Saved | None
    ) -> tuple[dict[str, Tensor], RecoveryRecord]:
        """Distill the dense model into the pruned one, which has the values from `start`."""
        place = self.settings.placement
        model = load_pruned(self.surgery, place.dtype, place.device, self.notify, dense=skippable.model)
        parameters = block_parameters(self.surgery, model)
        _place(model, parameters, start.values)
        kept = {f"start.{name}": value for name, value in start.values.items()}
        kept |= {"deciding": start.deciding, "reported": start.reported}

        def save(now: Saved) -> None:
            record = {"record": start.record.model_dump_json()}
            self.architecture.source.watch.require_unchanged()
            self.state.write(self.identity, Saved(now.data | record, now.tensors | kept))

        with SkippableModel(model, self.architecture.blocks_of(model)) as student:
            case = self._case(skippable, Variant(student), parameters, start, budget)
            for weight in case.weights.values():
                weight.data = weight.data.clone()  # so far it is the dense model's own
            healed = heal(case, budget, self.group, saved, save, self.notify)
        values = self._as_written(start.values | healed.values)
        after = self._measure("healed", Variant(skippable, self.removed, values), start.reported)
        return values, start.record.model_copy(update={"heal": self._heal_record(case, budget, healed, after)})

    def _case(
        self,
        skippable: SkippableModel,
        student: Variant,
        parameters: Mapping[str, nn.Parameter],
        start: _Start,
        budget: HealBudget,
    ) -> Case:
        # Training starts a few blocks below the first gap, or at the first fitted block if that is lower.
        blocks = [block for name in start.values if (block := block_number(self.path, name)) is not None]
        first = max(0, min([min(self.removed) - TRAINED_BELOW, *blocks]))
        teacher = Variant(skippable)
        if not can_share(teacher, student, first, start.deciding[:1].to(self.settings.placement.device)):
            first = 0
        return Case(
            teacher=teacher,
            student=student,
            first=first,
            weights={
                name: parameter
                for name, parameter in parameters.items()
                if rank_of(parameter.shape) and (block_number(self.path, name) or 0) >= first
            },
            portion=self._portions(skippable, budget).draw,
            stored=self.settings.stored,
            deciding=start.deciding,
        )

    def _heal_record(self, case: Case, budget: HealBudget, healed: Healed, after: LossesRecord) -> HealRecord:
        progress = healed.progress
        return HealRecord(
            minutes=budget.minutes,
            token_budget=budget.tokens,
            sequence_length=case.length,
            batch_size=case.batch * self.group.size,
            learning_rate=LEARNING_RATE,
            rank=RANK,
            tokens=progress.tokens,
            kept_tokens=progress.best_tokens,
            steps=progress.steps,
            seconds=progress.seconds,
            stopped=healed.stopped,
            losses=after,
        )

    def _portions(self, skippable: SkippableModel, budget: HealBudget) -> Portions:
        """Return the text to heal on, of the part of it that was fitted to."""
        fitted = self.settings.splits[0]
        uses = -(-budget.portion_tokens // fitted.sequence_length)
        uses = max(uses, *(math.ceil(1 / share) for share in fitted.shares.values()))
        if fitted.source in REFERENCE_PRESETS:  # its samples are rows of text: read no more than were fitted to
            uses = min(fitted.samples, uses)
        return Portions(fitted, uses, self.tokenizer, lambda: _whole(skippable))

    def _measure(self, what: str, variant: Variant, sequences: Tensor) -> LossesRecord:
        dense = Variant(variant.skippable) if variant.removed else variant
        with task(self.notify, f"Measuring the {what} model"):
            loss, divergence = losses(variant, dense, sequences, self.group)
        if not math.isfinite(loss + divergence):
            raise ModelError(
                f"The loss of the {what} model is {loss}.",
                hint="Use a wider data type, or other text.",
            )
        return LossesRecord(loss=loss, divergence=divergence)


def _whole(skippable: SkippableModel) -> Any:
    """Return the model with no block skipped."""
    skippable.skip(())
    return skippable.model


@torch.inference_mode()
def can_share(dense: Variant, pruned: Variant, first: int, ids: Tensor) -> bool:
    """Whether the pruned model may start at block `first` with the dense model's hidden states.

    It may not if blocks take more than hidden states from earlier blocks.
    """
    if not first:
        return False
    try:
        entering, _ = dense.entering_and_final_states(ids, first)
        found, expected = pruned.final_states(ids, (first, entering)), pruned.final_states(ids)
    except UnsupportedModelError:
        return False
    return float((found - expected).float().norm() / expected.float().norm()) < SHARING_TOLERANCE


def block_parameters(surgery: Surgery, pruned: Any) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters of a pruned model's blocks, by the dense model's parameter names."""
    path, blocks = surgery.architecture.adapter.blocks_path, surgery.architecture.blocks_of(pruned)
    return {
        f"{path}.{old}.{name}": parameter
        for new, old in enumerate(surgery.kept.blocks)
        for name, parameter in blocks[new].named_parameters()
        if parameter.is_floating_point()
    }


def _place(pruned: Any, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values by the dense model's names into the pruned one; outside the blocks, the names are the same."""
    for name, value in values.items():
        parameter = parameters[name] if name in parameters else pruned.get_parameter(name)
        parameter.data = value.to(parameter.device, parameter.dtype, copy=True)  # not into the dense model's own
