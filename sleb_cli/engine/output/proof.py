"""Does the saved checkpoint compute what the dense model computes with these blocks skipped?

(With a recovery: and with the new values.) The checks, in order: the files are as planned; stock
transformers loads them; the logits are equal; it generates with the KV cache; it saves again. If
the dense model does not fit in memory, nothing is computed, and the proof says that it is partial.
docs/reference/commands.md lists what it cannot see.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, filterfalse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.atomic import free_space
from sleb_cli.engine.device import (
    CPU,
    choose_device,
    dtype_name,
    free_bytes,
    free_memory,
    has_float64,
)
from sleb_cli.engine.files.cache import cache_root
from sleb_cli.engine.forward.decoding import CACHE_TOLERANCES, check_decoding, relative_difference
from sleb_cli.engine.forward.memory_needs import converted_bytes, model_bytes
from sleb_cli.engine.forward.offload import align
from sleb_cli.engine.forward.placement import blocks_on_disk, choose_dtype, open_model, place_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import require_streamable
from sleb_cli.engine.memory import memory_shortage, shortage
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import PREDICTION
from sleb_cli.engine.output.proof_of_files import (
    PROMPT,
    CheckResult,
    Planned,
    check_files,
    model_errors_fail_proof,
    proof_error,
)
from sleb_cli.engine.surgery.loading import (
    DeviceMap,
    Placement,
    has_tokenizer,
    load_pretrained,
    load_tokenizer,
    loading_problem,
)
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import prefer_disk_error, saving, translate_errors
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.records import Proof
from sleb_cli.requests import AUTO
from sleb_cli.tables.checks import describe_reference
from sleb_cli.units import format_bytes
from sleb_plugins import ModelError, ProofError

PROMPT_TOKENS = 64
NEW_TOKENS = 8

MAX_SHARD_BYTES = 5 * 10**9
"""The largest file of a checkpoint that is saved again."""

TOLERANCES = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""The allowed difference of the logits, relative to the largest one; 0 in other data types."""

WIDER_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
"""The data type in which a proof is repeated if rounding may have changed a choice, such as a
router's.
"""

PEAK_SHARE = 1.2
"""The memory of a proof, relative to the dense model's weights: the two models are loaded one after
the other.
"""

NEW_STREAMED_TOKENS = 2
"""New tokens if blocks stay on the disk: each token reads all blocks."""


@dataclass(frozen=True)
class ProofPlacement(Placement):
    """Where and in which data type the two models of a proof run; `too_large` says why they cannot,
    if so.

    If the dense model is streamed, accelerate leaves the checkpoint's blocks on the disk, too.
    """

    too_large: str | None = None


def place_proof(
    architecture: Architecture,
    cast: torch.dtype | None,
    device_map: DeviceMap | None = None,
    stream: bool | None = None,
) -> ProofPlacement:
    """Choose the fastest device with enough memory for the dense model, or else for two of its
    blocks.

    `device_map` and `stream` are the user's choices, which take precedence.
    """

    def place_on(device: torch.device, *, streamed: bool) -> ProofPlacement:
        lack = partial(_describe_shortage, architecture, device, streamed=streamed)
        name = (
            "float16" if cast is torch.float16 else AUTO
        )  # only float16 itself overflows as the checkpoint would
        chosen = choose_dtype(architecture, name, device, lack, ignore, cast)
        obstacle = _obstacle(architecture, chosen, device, streamed=streamed)
        return ProofPlacement(
            device, chosen, streamed, rounded=None if cast is chosen else cast, too_large=obstacle
        )

    if stream:
        require_streamable(architecture)
    if device_map is not None:
        mapped = place_model(
            architecture, choose_device(AUTO), AUTO, ignore, device_map=device_map, cast=cast
        )
        return ProofPlacement(**vars(mapped))
    ways = (
        [True]
        if stream
        else [False]
        if architecture.is_quantized or stream is False
        else [False, True]
    )
    for streamed in ways:
        for device in dict.fromkeys([choose_device(AUTO), CPU]):
            placement = place_on(device, streamed=streamed)
            if placement.too_large is None:
                return placement
    return placement


def _obstacle(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, *, streamed: bool
) -> str | None:
    """Say why the two models of a proof cannot run one after the other, if they cannot."""
    if lacking := _describe_shortage(architecture, device, dtype, streamed=streamed):
        return f"{'two of its blocks at a time need' if streamed else 'the model needs'} {lacking}"
    if not streamed:
        return None
    lacking = shortage(
        converted_bytes(architecture, dtype),
        free_space(cache_root()),
        "converted weights to the disk",
    )
    return lacking and f"transformers would write {lacking}"


def _describe_shortage(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, *, streamed: bool
) -> str | None:
    needed = PEAK_SHARE * model_bytes(architecture, dtype, stream=streamed)
    return memory_shortage(round(needed), device, whole=True)


def prove(
    surgery: Surgery,
    folder: Path,
    planned: Planned,
    placement: ProofPlacement,
    notify: Notify,
    new_values: Mapping[str, Tensor] | None = None,
) -> Proof:
    """Prove the checkpoint in `folder`, and record each check that passes.

    `new_values` of recovered blocks are by the dense model's parameter names; None without a
    recovery.

    Raises:
        ProofError: a check failed.
        OSError: the disk failed, which is no verdict about the checkpoint.
    """
    if (
        placement.stream and not placement.too_large
    ):  # since it was placed, the checkpoint has filled the disk
        lacking = _obstacle(surgery.architecture, placement.dtype, placement.device, streamed=True)
        placement = replace(placement, too_large=lacking)
    proof = Proof(
        checks=(),
        reference="recovered"
        if new_values is not None
        else next((cut.reference for cut in surgery.cuts), "whole"),
        partial=placement.too_large,
        dtype=dtype_name(placement.dtype),
        device=placement.device.type,
    )
    source = surgery.architecture.source
    with prefer_disk_error(ProofError):
        tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
        if placement.too_large:
            reason = f"{placement.too_large}. Names, shapes and bytes are checked, but no logits"
            notify(Notice(f"The proof is partial: {reason}."))
        elif placement.stream:
            notify(
                Notice(
                    "The proof leaves the blocks on disk, so it reads all weights about eight "
                    "times."
                )
            )
        compared = describe_reference(proof.reference)
        models = _Models(
            surgery, folder, placement, new_values, compared, tokenizer, planned, notify
        )
        for check, values in chain(
            check_files(surgery, folder, tokenizer, planned, notify), models.checks()
        ):
            passed = (
                [check] if check and check not in proof.checks else []
            )  # in a wider data type, some pass again
            proof = proof.model_copy(update={"checks": (*proof.checks, *passed), **values})
            if not check:
                notify(Notice(f"The proof is partial: {proof.partial}."))
    return proof


class _RepeatWider(Exception):
    """Logits differ, maybe by rounding: compare again with `wider`, the models in a wider data
    type.
    """

    def __init__(self, wider: _Models) -> None:
        super().__init__()
        self.wider = wider


@dataclass(frozen=True)
class _Models:
    """The checkpoint as transformers loads it, and its reference, the dense model with the removed
    parts skipped.

    For the fields, see `prove`; `reference` describes the reference in messages.
    """

    surgery: Surgery
    folder: Path
    placement: ProofPlacement
    new_values: Mapping[str, Tensor] | None
    reference: str
    tokenizer: Any
    planned: Planned
    notify: Notify

    # not inference mode, in which tensors made outside of it cannot take the place of others
    @torch.no_grad()
    def checks(self) -> Iterator[CheckResult]:
        """Check that the checkpoint loads, computes what its reference computes, generates and
        saves again.
        """
        try:
            yield from self._checks()
            return
        except _RepeatWider as error:
            wider = error.wider
        free_memory()  # only here: the error's traceback held the model
        yield from wider.checks()

    def _checks(self) -> Iterator[CheckResult]:
        if self.placement.too_large:
            self._load()
            yield "loads", {}
            return
        ids, new_tokens = self._prompt()
        pruned_ids = torch.tensor([self.surgery.token_ids(ids[0].tolist())], device=ids.device)
        with task(self.notify, "Proving the checkpoint"):
            model, difference, outputs, extra = self._compare_logits(ids, pruned_ids)
            yield "loads", {}
            self._widen(difference, self._allowed)
            if not difference <= self._allowed:  # also if it is NaN
                # Seen once in many runs, without a cause: other rounding. A wrong checkpoint
                # differs twice.
                self.notify(
                    Notice(
                        f"Logits differ by {difference:.2g}, maybe by rounding: they are compared "
                        f"again."
                    )
                )
                del model
                free_memory()
                model, difference, outputs, extra = self._compare_logits(ids, pruned_ids)
            if not difference <= self._allowed:
                states = self._states(model, pruned_ids)
                del model  # before the dense model is loaded again
                free_memory()
                raise self._other_logits(difference, ids, states)
            yield "same logits", {
                "dtype": dtype_name(self.placement.dtype),
                "prompt": "random tokens" if self.tokenizer is None else "text", "prompt_tokens": ids.shape[1],
                "logits_difference": difference, "logits_tolerance": self._allowed,
            }  # fmt: skip
            yield from self._compare_extra_outputs(outputs, extra)
            allowed = CACHE_TOLERANCES.get(self.placement.dtype, 0.0)
            with self._break_ties():
                cache_difference, fault = check_decoding(
                    model, pruned_ids, new_tokens, self.placement.dtype
                )
            if cache_difference is not None:  # it generates
                self._widen(cache_difference, allowed, decoding=True)
            if fault:
                del model  # before the dense model is loaded again
                free_memory()
                self._require_dense_decoding(ids, new_tokens)
                raise proof_error(fault)
            yield (
                "generates",
                {
                    "new_tokens": new_tokens,
                    "cache_difference": cache_difference,
                    "cache_tolerance": allowed,
                },
            )
            if (
                not self.planned.weights
            ):  # made from a GGUF file, so transformers has saved it already
                yield "saves again", {}
                return
            if reason := self._no_room_for(model):
                yield None, {"partial": reason}
                return
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".again-") as again:
                before = _save(model, Path(again))
                del model  # before it is loaded again: both may not fit in memory
                free_memory()
                after = _shapes(replace(self, folder=Path(again))._load())
            if before != after:
                raise proof_error(
                    f"saved again, it has other weights, such as {min(before ^ after)[0]}"
                )
            yield "saves again", {}

    def _compare_logits(
        self, ids: Tensor, pruned_ids: Tensor
    ) -> tuple[Any, float, list[Mapping[str, Tensor]], list[Mapping[str, Tensor]]]:
        """Return the loaded checkpoint, how far its logits are from the reference's, and the extra
        outputs of both.
        """
        expected, extra = self._expected_logits(ids)
        free_memory()
        model = self._load()
        with self._extra_outputs(model, pruned=True) as outputs:
            return model, relative_difference(_logits(model, pruned_ids), expected), outputs, extra

    @property
    def _allowed(self) -> float:
        allowed = TOLERANCES.get(self.placement.dtype, 0.0)
        return max([allowed, *(cut.tolerance for cut in self.surgery.cuts)])

    def _widen(self, difference: float, allowed: float, *, decoding: bool = False) -> None:
        """Repeat the proof in a wider data type if too much differs, rounding may be why, and there
        is memory.
        """
        placement, architecture = self.placement, self.surgery.architecture
        dtype = WIDER_DTYPES.get(placement.dtype)
        # Decoding rounds otherwise than a prompt does, which can change a router's choice, whatever
        # was removed.
        may_round = any(cut.tolerance for cut in self.surgery.cuts) or (
            decoding and placement.dtype.itemsize < 4
        )
        fixed = architecture.is_quantized or placement.device_map or not may_round
        if difference <= allowed or fixed or dtype is None:
            return
        if dtype is torch.float64 and not has_float64(placement.device.type):
            return
        if _obstacle(architecture, dtype, placement.device, streamed=placement.stream):
            return
        name = dtype_name(dtype)
        self.notify(
            Notice(
                f"Logits differ by {difference:.2g}, maybe by rounding: the proof runs again in "
                f"{name}."
            )
        )
        cast = placement.rounded or next(
            (tensor.cast for tensor in self.planned.tensors if tensor.cast), None
        )
        raise _RepeatWider(replace(self, placement=replace(placement, dtype=dtype, rounded=cast)))

    def _states(self, model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        with SkippableModel(model, self.surgery.architecture.blocks_of(model)) as whole:
            return _block_states(whole, ids)

    def _no_room_for(self, model: Any) -> str | None:
        """Say why the disk has no room to save the model again, if it has none; casts the model to
        need less.
        """
        dtype, stored = (
            self.placement.dtype,
            self.placement.rounded or self.surgery.architecture.dtype,
        )
        if (stored or dtype).itemsize < dtype.itemsize and not hasattr(model, "_hf_hook"):
            model.to(stored)  # half of the bytes: only names and shapes are compared
        needed, free = (
            sum(tensor.nbytes for tensor in model.state_dict().values()),
            free_space(self.folder),
        )
        if needed <= free:
            return None
        return f"saving it again needs {format_bytes(needed)} on the disk, but only {format_bytes(free)} is free"

    def _prompt(self) -> tuple[Tensor, int]:
        """Return the ids of the prompt, [1, positions], and the number of new tokens."""
        limit = self.surgery.architecture.longest_sequence or PROMPT_TOKENS + NEW_TOKENS
        new_tokens = min(
            NEW_STREAMED_TOKENS if self.placement.stream else NEW_TOKENS, max(1, limit // 2)
        )
        room, device = max(1, min(PROMPT_TOKENS, limit - new_tokens)), self.placement.device
        if self.tokenizer is not None:
            return torch.tensor(
                [self.tokenizer(PROMPT).input_ids[:room]], device=device
            ), new_tokens
        vocabulary = self.surgery.architecture.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, room), generator=torch.Generator().manual_seed(0))
        return ids.to(device), new_tokens

    @contextmanager
    def _opened_reference(self) -> Iterator[SkippableModel]:
        """Load the dense model with the new values, and without removed experts and tokens."""
        with (
            open_model(self.surgery.architecture, self.placement, self.notify) as skippable,
            skippable.replaced(self.new_values or {}),
        ):
            skippable.align()
            _make_float64_runnable(skippable.model)
            with self.surgery.simulate(skippable.model):
                yield skippable

    @contextmanager
    def _break_ties(self) -> Iterator[None]:
        with ExitStack() as stack:
            for cut in self.surgery.cuts:
                stack.enter_context(cut.break_ties())
            yield

    @contextmanager
    def _extra_outputs(self, model: Any, *, pruned: bool) -> Iterator[list[Mapping[str, Tensor]]]:
        """Make both models choose alike; yield, by cut, the outputs that logits may not show, by
        name.
        """
        with ExitStack() as stack, self._break_ties():
            yield [
                stack.enter_context(cut.extra_outputs(model, pruned=pruned))
                for cut in self.surgery.cuts
            ]

    def _compare_extra_outputs(
        self, outputs: Sequence[Mapping[str, Tensor]], expected: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[CheckResult]:
        for cut, ours, theirs in zip(self.surgery.cuts, outputs, expected, strict=True):
            for name, output in theirs.items():
                if not (
                    output.numel() and relative_difference(ours[name], output) <= self._allowed
                ):
                    raise proof_error(
                        f"{name} that stay make something else than in the dense model"
                    )
            if cut.extra_check:
                yield cut.extra_check, {}

    def _expected_logits(self, ids: Tensor) -> tuple[Tensor, list[Mapping[str, Tensor]]]:
        """Return the logits of the reference, and the outputs that they may not show."""
        with (
            self._opened_reference() as skippable,
            self._extra_outputs(skippable.model, pruned=False) as extra,
        ):
            expected = skippable.logits(ids, self.surgery.removed)
        if not bool(expected.isfinite().all()):
            dtype = self.placement.dtype
            raise ModelError(
                f"{self.reference.capitalize()} computes NaN or infinity in {dtype_name(dtype)}.",
                hint="Choose another data type with --dtype: float16 overflows above 65,504; "
                "bfloat16 and float32 do "
                "not."
                if dtype == torch.float16
                else "Check the model's weights.",
            )
        remaining = (
            expected if self.surgery.tokens is None else expected[..., list(self.surgery.tokens)]
        )
        return remaining, extra

    def _require_dense_decoding(self, ids: Tensor, new_tokens: int) -> None:
        """Check that the dense model decodes: if not, the checkpoint is not to blame."""
        with self._opened_reference() as skippable, self._break_ties():
            skippable.skip(())
            _, fault = check_decoding(skippable.model, ids, new_tokens, self.placement.dtype)
        if fault:
            raise ModelError(
                f"{self.surgery.architecture.source.id} does not work with a KV cache, whatever is "
                f"removed: {fault}.",
                hint="Report it to its author or to transformers. --no-verify writes the "
                "checkpoint without a proof.",
            )

    def _load(self) -> Any:
        """Load the checkpoint with stock transformers where the dense model was, or on the meta
        device.
        """
        architecture, placement = self.surgery.architecture, self.placement
        if placement.too_large:
            placement = replace(placement, device=torch.device("meta"))
        elif placement.stream:
            on_disk = blocks_on_disk(architecture, len(self.surgery.kept.blocks), placement.device)
            placement = replace(placement, device_map=on_disk)
        trust = architecture.source.trust_remote_code
        with model_errors_fail_proof():
            model, info = load_pretrained(
                architecture.auto_class, self.folder, "it", placement, trust_remote_code=trust
            )
        info["unexpected_keys"] = [*filterfalse(self._is_prediction, info["unexpected_keys"])]
        if problem := loading_problem(info, "missing", "unexpected", "mismatched"):
            raise proof_error(problem)
        align(model)
        _make_float64_runnable(model)
        return model.eval()

    def _is_prediction(self, name: str) -> bool:
        # transformers does not load modules for multi-token prediction; they stay unless blocks are
        # renumbered.
        block = self.surgery.architecture.block_names(self.surgery.kept).block_of(name)
        return not self.surgery.removed and bool(
            PREDICTION.search(name) or (block or 0) >= self.surgery.kept.count
        )

    def _other_logits(
        self, difference: float, ids: Tensor, states: Sequence[tuple[Tensor, Tensor]]
    ) -> ProofError:
        return proof_error(
            f"its logits differ from those of {self.reference} by {difference:.2g} of the largest "
            f"({dtype_name(self.placement.dtype)} allows {self._allowed:.2g}); "
            f"{self._first_difference(ids, states)}"
        )

    def _first_difference(self, ids: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> str:
        """Name the first block whose output differs by more than rounding, or else at all."""
        with self._opened_reference() as skippable:
            expected = _block_states(skippable, ids, self.surgery.removed)
        if relative_difference(states[0][0], expected[0][0]):
            return "the input of the first block already differs"
        both = zip(
            states, expected, strict=False
        )  # a wrong checkpoint may have another number of blocks
        differences = [relative_difference(ours[1], theirs[1]) for ours, theirs in both]
        for allowed in (self._allowed, 0.0):
            for block, difference in enumerate(differences):
                if not difference <= allowed:
                    return (
                        f"its block {block}, which is block {self.surgery.kept.blocks[block]} of "
                        f"the dense model, is "
                        f"the first whose output differs, by {difference:.2g}"
                    )
        return "every block's output is the same, so the final norm or the head differs"


def _make_float64_runnable(model: Any) -> None:
    # The grouped kernels for experts do not support float64.
    if model.dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _logits(model: Any, ids: Tensor) -> Tensor:
    with translate_errors(lambda words: proof_error(f"it does not run: {words}")):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _block_states(
    model: SkippableModel, ids: Tensor, removed: Collection[int] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Return the hidden states before and after each block but the removed ones, on the CPU."""
    states: list[tuple[Tensor, Tensor]] = []
    model.run_with_hook(
        ids,
        removed,
        lambda block, entering, leaving: states.append((entering.cpu(), leaving.cpu())),
    )
    return states


def _save(model: Any, folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Save the model with stock transformers; return the names and shapes of its weights."""
    # transformers refuses to save an inconsistent generation config, which would be the dense
    # model's fault.
    model.generation_config = GenerationConfig()
    with (
        translate_errors(
            lambda words: proof_error(f"transformers does not save it again: {words}")
        ),
        saving(folder),
        warnings.catch_warnings(
            action="ignore"
        ),  # transformers warns about the memory that a shard takes
    ):
        # While a shard of an offloaded model is written, it is in memory as a whole.
        model.save_pretrained(folder, max_shard_size=min(MAX_SHARD_BYTES, free_bytes(CPU) // 2))
    return _shapes(model)


def _shapes(model: Any) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
