"""`sleb apply --recover` and `--heal`: new values for the kept blocks, and how much they recover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor, nn

from sleb_cli.engine.device import CPU, dtype_name, free_bytes
from sleb_cli.engine.files.cache import existing_cache
from sleb_cli.engine.forward.placement import Placement, device_of, open_dense, resolve_device_map
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import choose_to_stream, streamed_bytes
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery.closed_form import fitting_bytes, recover_in_closed_form
from sleb_cli.engine.recovery.file_tensors import file_tensors
from sleb_cli.engine.recovery.gguf_tensors import GgufTensors
from sleb_cli.engine.recovery.heal import (
    LEARNING_RATE,
    Case,
    HealBudget,
    Healed,
    choose_budget,
    heal,
)
from sleb_cli.engine.recovery.low_rank import RANK, rank_of, trained_numbers
from sleb_cli.engine.recovery.unfinished import Saved, SavedFits, Unfinished, other_state
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_pruned, load_tokenizer
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.calibration import (
    REFERENCE_PRESETS,
    SELF,
    CalibrationSettings,
    calibrate_splits,
    require_given_text,
    resolve_calibration,
    texts_sha256,
)
from sleb_cli.engine.text.mixture import parse_mixture
from sleb_cli.engine.text.portions import Portions
from sleb_cli.engine.text.sources import TextSplit
from sleb_cli.events import Notice, Notify, task
from sleb_cli.plan import CalibrationRecord, HealRecord, LossesRecord, Plan, RecoveryRecord
from sleb_cli.requests import (
    DEFAULT_CALIBRATION,
    RECOVERY_LENGTH,
    RECOVERY_SELF_TOKENS,
    RECOVERY_TOKENS,
    ApplyRequest,
)
from sleb_cli.units import format_bytes, plural
from sleb_cli.version import __version__
from sleb_plugins import DataError, MachineError, ModelError, UnsupportedModelError, UsageError

FITTED, DECIDING, REPORTED = TextSplit(0, 0.7), TextSplit(0.7, 0.9), TextSplit(0.9, 1)
"""The parts of a text that values are fitted to, that chooses among them, and that the recovery is measured on."""
FEWEST_SEQUENCES = 5
DECIDING_TOKENS, REPORTED_TOKENS = 8192, 8192
"""The most tokens that decide, since every fit runs the model on all of them, and that are reported on."""

TRAINED_BELOW = 4
"""Training starts this many blocks below the first gap; the blocks before that keep the dense model's inputs."""
SHARING_TOLERANCE = 1e-2

MATRIX = 2
"""How many dimensions a matrix has; the closed form fits nothing of more."""

HIDDEN_STATES = "hidden states"

TRAINING_BYTES = 20
"""Bytes per trained number, besides the models, in float32: its value, best value, gradient and two moments."""


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
    """The state before healing: sequences that decide and that are reported on, fitted values, the record so far."""

    deciding: Tensor
    reported: Tensor
    values: dict[str, Tensor]
    record: RecoveryRecord


def recover(
    subject: Subject,
    request: ApplyRequest,
    cast: torch.dtype | None,
    state: Unfinished,
    group: ProcessGroup,
    notify: Notify,
    gguf: GgufFile | None = None,
) -> Recovered:
    """Return new values for the kept blocks with which the pruned model comes closer to the dense one.

    Args:
        subject: the model and the removed blocks.
        request: how to recover.
        cast: the data type of the checkpoint; None for the model's own.
        state: where what is found is kept until the output is written.
        group: the processes that recover together.
        notify: the listener for events.
        gguf: the file that the model was read from, if the values are to be packed as there; None for a checkpoint.

    Raises:
        UnsupportedModelError: the model is quantized, or its files cannot take new values.
        MachineError: the model does not fit into memory.
        DataError: the text is too short.
        PlanError: the unfinished healing is a different one.
    """
    return _Recovery(subject, request, cast, state, group, notify, gguf).run()


class _Recovery:
    def __init__(
        self,
        subject: Subject,
        request: ApplyRequest,
        cast: torch.dtype | None,
        state: Unfinished,
        group: ProcessGroup,
        notify: Notify,
        gguf: GgufFile | None,
    ) -> None:
        self.subject, self.request, self.state, self.group, self.notify = subject, request, state, group, notify
        self.gguf = gguf
        self.architecture, self.surgery = subject.architecture, subject.surgery
        self.budget = choose_budget(request.heal_minutes, request.heal_tokens) if request.heal else None
        _require_plain(self.architecture)
        device_map = resolve_device_map(request, self.architecture)
        self.device = device_of(device_map, request.device)
        own = cast or self.architecture.dtype or torch.float32
        # Values are rounded to what every file can hold, which may be narrower than what the config says.
        written = [cast] if cast else self.architecture.source.weights.float_dtypes
        self.stored = min([*written, own], key=lambda dtype: dtype.itemsize)
        # Twice rounded, to bfloat16 and then to float16, the values that are written would not be those measured.
        self.dtype = torch.float32 if own is torch.float16 and self.device == CPU else own
        stream = device_map is None and group.from_main(self._stream)
        self.settings = _resolve_settings(request, subject, stream=stream)
        self.placement = Placement(self.device, self.dtype, stream, device_map)
        self.in_host_memory = self._require_memory()

    def _stream(self) -> bool:
        """Whether to stream the model, as asked or because it does not fit beside the sums of a fit.

        Raises:
            UsageError: it is to be streamed and healed.
        """
        if self.request.stream and self.request.heal:
            raise UsageError(
                "--heal trains the model, so all of it must be in memory, and --stream reads it block by block.",
                hint="Leave out --stream, or recover without training: --recover --stream.",
            )
        sums = _sums_bytes(self.surgery)
        asked = False if self.request.heal else self.request.stream
        return choose_to_stream(self.architecture, self.dtype, self.device, asked, self.notify, beside=sums)

    def _require_memory(self) -> bool:
        """Check that everything fits into memory; return whether hidden states do only in that of the host."""
        needed = _needed_bytes(self.surgery, self.placement, self.settings, self.request)
        if sum(needed.values()) > free_bytes(self.device) and self.placement.stream and self.device != CPU:
            _require_free(CPU, {HIDDEN_STATES: needed.pop(HIDDEN_STATES)}, self.request)
            _require_free(self.device, needed, self.request)
            return True
        _require_free(self.device, needed, self.request)
        return False

    def run(self) -> Recovered:
        self.tokenizer = load_tokenizer(self.architecture.source)
        saved = self.state.read(self.identity) if self.request.heal and self.request.resume else None
        with open_dense(self.architecture, self.placement, self.notify) as skippable:
            self.packed = self._packed(skippable) if self.gguf else None
            start = self._resumed(saved, skippable) if saved else self._closed_form(skippable)
            values, record = start.values, start.record
            if self.budget:
                values, record = self._heal(skippable, self.budget, start, saved)
            packed = self.packed.written if self.packed else {}
            return Recovered(values, file_tensors(skippable, self.surgery, values), record, packed)

    def _packed(self, skippable: SkippableModel) -> GgufTensors:
        """Return the tensors of the GGUF file, after checking that it holds whatever may get new values.

        Raises:
            UnsupportedModelError: it does not.
        """
        assert self.gguf is not None
        path = self.architecture.adapter.blocks_path
        packed = GgufTensors(self.gguf, skippable, path)
        skeleton = self.architecture.blocks_of(self.architecture.skeleton)
        for block in self.surgery.kept.blocks:
            shapes = {name: parameter.shape for name, parameter in skeleton[block].named_parameters()}
            packed.require(
                f"{path}.{block}.{name}"
                for name, shape in shapes.items()
                if len(shape) <= MATRIX or (self.request.heal and rank_of(shape))
            )
        return packed

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
            "dtype": dtype_name(self.dtype),
            "stored": dtype_name(self.stored),
            "device": self.device.type,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a healing to be resumed.

        The text is compared by its tokens, and text of the model's own by all that it is generated from.
        """
        text, budget = self.settings, self.budget
        return self._computation | {
            "removals": list(self.surgery.removals),
            "recover": self.request.recover,
            "calibration": text.source,
            "text": texts_sha256(self._splits(), self.tokenizer),
            "samples": text.samples,
            "sequence_length": text.sequence_length,
            "seed": text.seed,
            "heal_minutes": budget.minutes if budget else None,
            "heal_tokens": budget.tokens if budget else None,
            "processes": self.group.size,
        }

    def _closed_form(self, skippable: SkippableModel) -> _Start:
        """Draw the text, measure the cost of the removal, and fit in closed form if requested."""
        skippable.skip(())
        fitted, deciding, reported = self.group.from_main(
            lambda: calibrate_splits(self._splits(), self.tokenizer, lambda: skippable.model, self.notify)
        )
        removed, dense = self.surgery.removed, Variant(skippable)
        record = RecoveryRecord(
            text=fitted.record,
            deciding_text=deciding.record,
            report_text=reported.record,
            dense=self._measure("dense", dense, dense, reported.sequences),
            pruned=self._measure("pruned", Variant(skippable, removed), dense, reported.sequences),
        )
        values: dict[str, Tensor] = {}
        if self.request.recover:
            values, closed_form = recover_in_closed_form(
                skippable,
                removed,
                fitted.sequences,
                deciding.sequences,
                self.notify,
                stored=self.stored,
                in_host_memory=self.in_host_memory,
                spill_to=existing_cache() if self.placement.stream else None,
                group=self.group,
                saved=self._saved_fits(fitted.record, deciding.record),
            )
            if not self.budget:
                values = self._as_written(values)
            after = self._measure("recovered", Variant(skippable, removed, values), dense, reported.sequences)
            record = record.model_copy(update={"closed_form": closed_form, "closed_form_losses": after})
        return _Start(deciding.sequences, reported.sequences, values, record)

    def _saved_fits(self, fitted: CalibrationRecord, deciding: CalibrationRecord) -> SavedFits:
        """Return the fits of this very recovery, on these tokens."""
        saved = self.state.fits(
            self._computation
            | {
                "removed": sorted(self.surgery.removed),
                "fitted": fitted.tokens_sha256,
                "deciding": deciding.tokens_sha256,
            }
        )
        if self.group.is_main and (count := len(saved)):
            self.notify(Notice(f"Continuing with {plural(count, 'fit')} of an interrupted run."))
        return saved

    def _splits(self) -> list[CalibrationSettings]:
        """Return the settings of the text to fit, the text that decides and the text that is reported on."""
        settings = self.settings
        deciding = max(1, min(settings.samples // 5, DECIDING_TOKENS // settings.sequence_length))
        reported = max(1, min(settings.samples // 10, REPORTED_TOKENS // settings.sequence_length))
        counts = (settings.samples - deciding - reported, deciding, reported)
        return [
            replace(settings, samples=samples, split=split)
            for samples, split in zip(counts, (FITTED, DECIDING, REPORTED), strict=True)
        ]

    def _resumed(self, saved: Saved, skippable: SkippableModel) -> _Start:
        """Return what a saved healing began with.

        Raises:
            PlanError: it holds something else.
        """
        try:
            record = RecoveryRecord.model_validate_json(saved.data.get("record") or "")
        except (ValidationError, TypeError) as error:
            raise other_state("its record is missing, or is not what a healing saves") from error
        length = (None, self.settings.sequence_length)
        deciding, reported = (saved.tensor(name, length, torch.int64) for name in ("deciding", "reported"))
        vocabulary = self.architecture.text_config.vocab_size
        if any(int(rows.min()) < 0 or int(rows.max()) >= vocabulary for rows in (deciding, reported)):
            raise other_state(f"its tokens are not those of a vocabulary of {vocabulary}")
        own = dict(skippable.model.named_parameters())
        values = {}
        for name in (name for name in saved.tensors if name.startswith("start.")):
            parameter = own.get(name.removeprefix("start."))
            if parameter is None:
                raise other_state(f"the model has no {name.removeprefix('start.')[:60]}")
            values[name.removeprefix("start.")] = saved.tensor(name, parameter.shape, saved.tensors[name].dtype)
        return _Start(deciding, reported, values, record)

    def _heal(
        self, skippable: SkippableModel, budget: HealBudget, start: _Start, saved: Saved | None
    ) -> tuple[dict[str, Tensor], RecoveryRecord]:
        """Distill the dense model into the pruned one, which has the values from `start`."""
        model = load_pruned(self.surgery, self.dtype, self.device, self.notify, dense=skippable.model)
        parameters = block_parameters(self.surgery, model)
        _place(model, parameters, start.values)
        start_tensors = {f"start.{name}": value for name, value in start.values.items()}
        start_tensors |= {"deciding": start.deciding, "reported": start.reported}

        def save(now: Saved) -> None:
            record = {"record": start.record.model_dump_json()}
            self.architecture.source.watch.require_unchanged()
            self.state.write(self.identity, Saved(now.data | record, now.tensors | start_tensors))

        with SkippableModel(model, self.architecture.blocks_of(model)) as student:
            case = self._case(skippable, Variant(student), parameters, start, budget)
            for weight in case.weights.values():
                weight.data = weight.data.clone()  # so far it is the dense model's own
            healed = heal(case, budget, self.group, saved, save, self.notify)
        values = self._as_written(start.values | healed.values)
        after = self._measure(
            "healed", Variant(skippable, self.surgery.removed, values), Variant(skippable), start.reported
        )
        return values, start.record.model_copy(update={"heal": self._heal_record(case, budget, healed, after)})

    def _case(
        self,
        skippable: SkippableModel,
        student: Variant,
        parameters: Mapping[str, nn.Parameter],
        start: _Start,
        budget: HealBudget,
    ) -> Case:
        teacher, first = Variant(skippable), self._first_trained(start.values)
        if not can_share(teacher, student, first, start.deciding[:1].to(self.device)):
            first = 0
        weights = {name: parameter for name, parameter in parameters.items() if rank_of(parameter.shape)}
        return Case(
            teacher=teacher,
            student=student,
            first=first,
            weights={name: weights[name] for name in self._names_from(first, weights)},
            portion=self._portions(skippable, budget).draw,
            stored=self.stored,
            deciding=start.deciding,
        )

    def _heal_record(self, case: Case, budget: HealBudget, healed: Healed, after: LossesRecord) -> HealRecord:
        progress = healed.progress
        return HealRecord(
            minutes=budget.minutes,
            token_budget=budget.tokens,
            sequence_length=self.settings.sequence_length,
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

    def _first_trained(self, values: Mapping[str, Tensor]) -> int:
        """Return the first block to train: a few below the first gap, or the first fitted one if that is lower."""
        fitted = [block for block in range(self.architecture.block_count) if self._names_of(block, values)]
        return max(0, min([min(self.surgery.removed) - TRAINED_BELOW, *fitted]))

    def _names_of(self, block: int, names: Iterable[str]) -> list[str]:
        """Return the names of the parameters of a block."""
        return [name for name in names if name.startswith(f"{self.architecture.adapter.blocks_path}.{block}.")]

    def _names_from(self, first: int, names: Iterable[str]) -> list[str]:
        """Return the names of the parameters of the blocks from `first` on."""
        below = {name for block in range(first) for name in self._names_of(block, names)}
        return [name for name in names if name not in below]

    def _portions(self, skippable: SkippableModel, budget: HealBudget) -> Portions:
        """Return the text to heal on, of the part of it that was fitted to."""

        def dense() -> Any:
            skippable.skip(())
            return skippable.model

        fitted = self._splits()[0]
        uses = -(-budget.portion_tokens // fitted.sequence_length)
        uses = max(uses, *(math.ceil(1 / part.share) for part in fitted.parts))
        if fitted.source in REFERENCE_PRESETS:  # its samples are rows of text: read no more than were fitted to
            uses = min(fitted.samples, uses)
        return Portions(fitted, uses, self.tokenizer, dense)

    def _measure(self, what: str, variant: Variant, dense: Variant, sequences: Tensor) -> LossesRecord:
        with task(self.notify, f"Measuring the {what} model on text that decided nothing"):
            loss, divergence = losses(variant, dense, sequences, self.group)
        if not math.isfinite(loss + divergence):
            raise ModelError(
                f"The loss of the {what} model on text that decided nothing is {loss}.",
                hint="Use a wider data type, or other text.",
            )
        return LossesRecord(loss=loss, divergence=divergence)


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


def _require_plain(architecture: Architecture) -> None:
    if architecture.is_quantized:
        raise UnsupportedModelError(
            f"{architecture.source.id} is quantized, so its blocks cannot be recovered.",
            hint="Recover the model it was quantized from, and quantize the result.",
        )


def _needed_bytes(
    surgery: Surgery, placement: Placement, settings: CalibrationSettings, request: ApplyRequest
) -> dict[str, int]:
    """Return the memory that recovery takes, by what for; pruning alone needs only a buffer.

    Of a model that a device map spreads out, only the rest is counted.
    """
    dense, architecture, dtype = surgery.architecture.skeleton, surgery.architecture, placement.dtype
    width = architecture.text_config.hidden_size
    needed: dict[str, int] = {}
    if placement.stream:
        needed["two blocks and what is outside of them"] = streamed_bytes(architecture, dtype)
    elif placement.device_map is None:
        needed["the model"] = sum(parameter.numel() for parameter in dense.parameters()) * dtype.itemsize
    # What enters the model and a block on all the text, in the dense and in the recovered model, and what leaves it.
    needed[HIDDEN_STATES] = 4 * settings.samples * settings.sequence_length * width * dtype.itemsize
    if request.recover:
        needed["the sums of a fit"] = _sums_bytes(surgery)
    if request.heal:
        shapes = [parameter.shape for block in _kept_blocks(surgery) for parameter in block.parameters()]
        # The weights that are trained and their original values; what is not trained, both models share.
        needed["the trained weights"] = 2 * sum(map(math.prod, shapes)) * dtype.itemsize
        needed["the state of training"] = sum(map(trained_numbers, shapes)) * TRAINING_BYTES
    return needed


def _sums_bytes(surgery: Surgery) -> int:
    width = surgery.architecture.text_config.hidden_size
    return max(fitting_bytes(block, width) for block in _kept_blocks(surgery))


def _kept_blocks(surgery: Surgery) -> list[nn.Module]:
    blocks = surgery.architecture.blocks_of(surgery.architecture.skeleton)
    return [blocks[block] for block in surgery.kept.blocks]


def _require_free(device: torch.device, needed: Mapping[str, int], request: ApplyRequest) -> None:
    total, free = sum(needed.values()), free_bytes(device)
    if total <= free:
        return
    parts = ", ".join(f"{format_bytes(size)} for {what}" for what, size in needed.items())
    hint = "Use fewer --samples, leave out --recover, or use a machine with more memory."
    if request.heal:
        hint = (
            "Leave out --heal, or use a machine with more memory. Processes that `accelerate launch` starts share the "
            "work, but each of them needs all of this."
        )
    raise MachineError(
        f"{'Healing' if request.heal else 'Recovery'} needs {format_bytes(total)} of memory on {device.type} "
        f"({parts}), and only {format_bytes(free)} are free.",
        hint=hint,
    )


def _resolve_settings(request: ApplyRequest, subject: Subject, *, stream: bool) -> CalibrationSettings:
    """Fill unset options with the defaults; fitting weights takes more text than a search.

    Raises:
        DataError: the text is too short.
        UsageError: a streamed model is to write it.
    """
    architecture = subject.architecture
    length = request.sequence_length or min(RECOVERY_LENGTH, architecture.longest_sequence or RECOVERY_LENGTH)
    source = request.calibration or _default_source(subject.plan, stream=stream)
    settings = resolve_calibration(replace(request, calibration=source, sequence_length=length), architecture)
    if stream:
        require_given_text(settings)
    if not (settings.samples_given or settings.source in REFERENCE_PRESETS):
        tokens = RECOVERY_SELF_TOKENS if settings.source == SELF else RECOVERY_TOKENS
        settings = replace(settings, samples=max(FEWEST_SEQUENCES, tokens // length))
    if settings.samples < FEWEST_SEQUENCES:
        raise DataError(
            f"{settings.samples} sequences are too few to recover on: some decide, and others are reported on.",
            hint=f"Use --samples {FEWEST_SEQUENCES} or more.",
        )
    return settings


def _default_source(plan: Plan | None, *, stream: bool) -> str:
    """Return the default text to recover on: the plan's, if it is general, with a quarter of the model's own.

    A streamed model writes no text: each token would read all of it.
    """
    searched = plan.calibration if plan else None
    own = DEFAULT_CALIBRATION if stream else SELF
    if searched is None or searched.chat or searched.source == SELF:
        return own
    source = searched.source.removesuffix("-sleb")
    parts = [part.source for part in parse_mixture(source)]
    if stream:
        return own if SELF in parts else source
    return source if len(parts) > 1 else f"{source}:0.75,{SELF}:0.25"
