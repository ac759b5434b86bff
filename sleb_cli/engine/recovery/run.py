"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sleb_cli.asked.text_names import REFERENCE_PRESETS, SELF_CHAT
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.forward.placement import Placement, open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.file_tensors import block_number, file_tensors
from sleb_cli.engine.recovery.heal import LEARNING_RATE, HealBudget, Healing
from sleb_cli.engine.recovery.low_rank import RANK, rank_of
from sleb_cli.engine.recovery.stage import RecoverySettings
from sleb_cli.engine.recovery.unfinished import Unfinished, fit_file, fits_in, read_saved, short_hash, write_saved
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.text.calibration import Calibration, calibrate_splits
from sleb_cli.engine.text.portions import Portions
from sleb_cli.engine.text.settings import CalibrationSettings
from sleb_cli.engine.text.windows import tokens_sha256, whole_mask
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import ClosedFormRecord, ConversationsRecord, FitRecord, HealRecord, LossesRecord, RecoveryRecord
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


def recover(settings: RecoverySettings, group: ProcessGroup, notify: Notify) -> Recovered:
    """Return new values with which the pruned model comes closer to the dense one.

    Raises:
        UnsupportedModelError: the files cannot take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: what an interrupted run saved is broken.
    """
    return _Recovery(**vars(settings), group=group, notify=notify).run()


@dataclass
class _Recovery:
    subject: Subject
    closed_form: bool
    budget: HealBudget | None
    placement: Placement
    stored: torch.dtype
    on_host: bool
    splits: Sequence[CalibrationSettings]
    state: Unfinished
    kept_bytes: int
    group: ProcessGroup
    notify: Notify

    def run(self) -> Recovered:
        self.architecture, self.surgery = self.subject.architecture, self.subject.surgery
        self.removed, self.tokenizer = self.surgery.removed, load_tokenizer(self.architecture.source)
        values: dict[str, Tensor] = {}
        closed_form, heal = None, dict[str, Any]()
        with open_dense(self.architecture, self.placement, self.notify) as self.dense:
            self.train, self.validation, *tests = self.group.from_main(self._draw)
            measured = {"dense": self._measure(tests, "dense"), "pruned": self._measure(tests, "pruned", values)}
            saved = self._saved()
            if self.closed_form:
                values, closed_form = self._fit(saved)
                measured["closed_form"] = self._measure(tests, "recovered", values)
            if self.budget:
                values, heal = self._heal(self.budget, values, saved)
                measured["healed"] = self._measure(tests, "healed", values)
            tensors = file_tensors(self.dense, self.surgery, values, self.placement.rounded)
        del self.dense  # the proof needs the memory
        return Recovered(values, tensors, self._record(tests, measured, closed_form, heal))

    def _draw(self) -> list[Calibration]:
        """Return the texts: training, validation, test, and conversations of a chat model's own, if there are any.

        Of conversations, the answers count; what is streamed writes none.
        """
        texts = calibrate_splits(self.splits, self.tokenizer, self._whole, self.notify)
        if self.placement.stream or not getattr(self.tokenizer, "chat_template", None):
            return texts
        settings = replace(self.splits[2], source=SELF_CHAT, shares={SELF_CHAT: Fraction(1)}, chat="answers")
        try:
            return [*texts, *calibrate_splits([settings], self.tokenizer, self._whole, self.notify)]
        except (UnsupportedModelError, UsageError, DataError) as error:
            self.notify(Notice(f"Not measured on conversations: {error.message}"))
            return texts

    def _whole(self) -> Any:
        """Return the dense model with no block skipped."""
        self.dense.skip(())
        return self.dense.model

    def _measure(
        self, texts: Sequence[Calibration], what: str, values: Mapping[str, Tensor] | None = None
    ) -> list[LossesRecord]:
        """Return the losses with these values (None: of the dense model) on each text."""
        dense, found = Variant(self.dense), list[LossesRecord]()
        variant = dense if values is None else Variant(self.dense, self.removed, values)
        with task(self.notify, f"Measuring the {what} model"):
            for text in texts:
                measured = losses(variant, dense, text.sequences, self.group, text.loss_mask)
                if not math.isfinite(sum(measured)):
                    hint = "Use a wider data type, or other text."
                    raise ModelError(f"The loss of the {what} model is {measured.loss}.", hint=hint)
                found.append(LossesRecord(**measured._asdict()))
        return found

    def _saved(self) -> Path:
        """Return the folder of what was found before of this very recovery, on these texts."""
        return self.state.of(
            dtype_name(self.placement.dtype),
            model=self.architecture.source.content_hash,
            sleb=__version__,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            stored=dtype_name(self.stored),
            rounded=dtype_name(self.placement.rounded) if self.placement.rounded else None,
            device=self.placement.device.type,
            removed=sorted(self.removed),
            texts=[text_key(text) for text in (self.train, self.validation)],
            chat=self.splits[0].chat,
        )

    def _fit(self, saved: Path) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        """Fit in closed form, or take over what an interrupted run fitted, perhaps all of it."""
        whole = saved / "closed-form.safetensors"
        if self.group.is_main and (count := fits_in(saved)):
            self.notify(Notice(f"Continuing with {plural(count, 'fit')} of an interrupted run."))
        if self.group.from_main(whole.exists):
            record, values = read_saved(whole, ClosedFormRecord)
            for fit in record.fits:
                values |= read_saved(fit_file(saved, fit.block), FitRecord)[1]
            return values, record
        values, record = recover_in_closed_form(
            self.dense,
            self.removed,
            self.train.sequences,
            self.validation,
            self.notify,
            stored=self.stored,
            on_host=self.on_host,
            group=self.group,
            saved=saved,
        )
        if self.group.is_main:
            write_saved(whole, record, {})
        return values, record

    def _heal(
        self, budget: HealBudget, values: Mapping[str, Tensor], saved: Path
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Distill the dense model into the pruned one; return all values, and the fields of a `HealRecord`."""
        dtype, device, path = self.placement.dtype, self.placement.device, self.architecture.adapter.blocks_path
        model = load_pruned(self.surgery, dtype, device, self.notify, dense=self.dense.model)
        blocks = self.architecture.blocks_of(model)
        parameters = {
            f"{path}.{old}.{name}": parameter
            for new, old in enumerate(self.surgery.kept.blocks)
            for name, parameter in blocks[new].named_parameters()
            if parameter.is_floating_point()
        }
        for name, value in values.items():  # outside the blocks, the names are the same in both models
            parameter = parameters[name] if name in parameters else model.get_parameter(name)
            parameter.data = value.to(parameter.device, parameter.dtype, copy=True)  # not into the dense model's own
        with SkippableModel(model, blocks) as pruned:
            teacher, student = Variant(self.dense), Variant(pruned)
            # Training starts a few blocks below the first gap, or at the first fitted block if that is lower.
            fitted = [block for name in values if (block := block_number(path, name)) is not None]
            first = max(0, min([min(self.removed) - TRAINED_BELOW, *fitted]))
            if first and not can_share(teacher, student, first, self.validation.sequences[:1].to(device)):
                first = 0
            weights = {
                name: parameter
                for name, parameter in parameters.items()
                if rank_of(parameter.shape) and (block_number(path, name) or 0) >= first
            }
            originals = [weight.data for weight in weights.values()]  # the dense model's own, where nothing was fitted
            for weight in weights.values():
                weight.data = weight.data.clone()
            healing = Healing(
                teacher,
                student,
                first,
                list(weights.values()),
                originals,
                self.stored,
                self._portions(budget),
                self.validation,
                budget,
                saved / f"healing-{self._identity(budget)}.safetensors",
                self.architecture.source.watch,
                self.group,
                self.notify,
            )
            stopped = healing.run()
        healed = {name: weight.detach() for name, weight in weights.items()}
        progress = healing.progress
        return {**values, **healed}, {
            "minutes": budget.minutes,
            "token_budget": budget.tokens,
            "sequence_length": healing.length,
            "batch_size": healing.batch * self.group.size,
            "learning_rate": LEARNING_RATE,
            "rank": RANK,
            "tokens": progress.tokens,
            "kept_tokens": progress.best_tokens,
            "steps": progress.steps,
            "seconds": progress.seconds,
            "stopped": stopped,
        }

    def _identity(self, budget: HealBudget) -> str:
        """Return what stands for all that a healing depends on, besides its folder."""
        text = self.splits[0]
        return short_hash(
            recover=self.closed_form,
            calibration=text.source,
            samples=text.samples,
            seed=text.seed,
            minutes=budget.minutes,
            tokens=budget.tokens,
            processes=self.group.size,
        )

    def _portions(self, budget: HealBudget) -> Portions:
        """Return the text to heal on, of the part of it for training."""
        train = self.splits[0]
        # Samples of a reference preset are rows of text: read no more than were fitted to.
        most = train.samples if train.source in REFERENCE_PRESETS else math.inf

        def uses(portion: int) -> int:
            return int(min(most, -(-budget.portion_tokens(portion) // train.sequence_length)))

        return Portions(train, uses, self.tokenizer, self._whole, self.group.size, self.train.sequences_of)

    def _record(
        self,
        tests: Sequence[Calibration],
        measured: Mapping[str, Sequence[LossesRecord]],
        closed_form: ClosedFormRecord | None,
        heal: Mapping[str, Any],
    ) -> RecoveryRecord:
        by_text = zip(*measured.values(), strict=True)
        on_test, *talks = (dict(zip(measured, each, strict=True)) for each in by_text)
        return RecoveryRecord(
            train_text=self.train.record,
            validation_text=self.validation.record,
            test_text=tests[0].record,
            dense=on_test["dense"],
            pruned=on_test["pruned"],
            closed_form=closed_form,
            closed_form_losses=on_test.get("closed_form"),
            heal=HealRecord(**heal, losses=on_test["healed"]) if heal else None,
            conversations=ConversationsRecord(text=tests[1].record, **talks[0]) if talks else None,
        )


def text_key(text: Calibration) -> list[str | int]:
    """Return what stands for a text: its tokens, how they are cut into sequences, and which of them count."""
    counted = whole_mask(text.sequences, text.loss_mask)
    return [tokens_sha256(text.sequences), *text.sequences.shape, tokens_sha256(counted)]


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
