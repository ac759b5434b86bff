"""Prove that a saved checkpoint computes what the dense model computes without the removed parts.

Three checks, in order: the files hold the planned bytes; stock transformers loads them, and the
logits equal the dense model's; the checkpoint generates with the KV cache. For a model that only
reads, its outputs take the place of logits, and stock sentence-transformers, if it is installed,
that of generation. If logits differ, both models are compared in a wider data type, which decides:
a fault shows there, and the rounding of a narrow type does not. If the dense model does not fit in
memory, no logits are compared, and the proof says that it is partial. docs/reference/commands.md
lists what a proof cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sleb_cli.engine.device import dtype_name, free_memory, hint_for_nonfinite
from sleb_cli.engine.forward.decoding import CACHE_TOLERANCES, check_decoding, relative_difference
from sleb_cli.engine.forward.ending import Reader, ending_of
from sleb_cli.engine.forward.offload import align
from sleb_cli.engine.forward.placement import blocks_on_disk, open_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.block_names import PREDICTION
from sleb_cli.engine.model.padded import PaddedTexts, Tokens, ids_of
from sleb_cli.engine.output import stock_vectors
from sleb_cli.engine.output.proof_of_files import (
    PROMPT,
    Planned,
    check_files,
    model_errors_fail_proof,
    proof_error,
)
from sleb_cli.engine.output.proof_placement import ProofPlacement, obstacle, place_wider
from sleb_cli.engine.surgery.loading import (
    has_tokenizer,
    load_pretrained,
    load_tokenizer,
    loading_problem,
)
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.text.passages import Item, pad_texts, shape_of
from sleb_cli.engine.third_party import translate_errors
from sleb_cli.events import Notice, Notify, task
from sleb_cli.records import Check, Proof, Reference
from sleb_cli.tables.checks import describe_reference
from sleb_plugins import ModelError, ProofError

TEXTS = (PROMPT, *PROMPT.split(". "))
"""The texts for models that read: of several lengths, so that most are padded."""

PROMPT_TOKENS = 64
PROOF_TASK = "Proving the checkpoint"
NEW_TOKENS = 8
NEW_STREAMED_TOKENS = 2
"""New tokens if blocks stay on the disk: each token reads all blocks."""

TOLERANCES = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""The allowed difference of the logits, relative to the largest one; 0 in other data types."""


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
    architecture = surgery.architecture
    if placement.stream and not placement.too_large:
        # Since it was placed, the checkpoint has filled the disk.
        lacking = obstacle(architecture, placement.dtype, placement.device, stream=True)
        placement = replace(placement, too_large=lacking)
    reference: Reference = surgery.cuts[0].reference if surgery.cuts else "whole"
    if new_values is not None:
        reference = "recovered"
    # Not inference mode, in which tensors made outside of it cannot take the place of others.
    with torch.no_grad():
        tokenizer = None
        if has_tokenizer(architecture.source):
            tokenizer = load_tokenizer(architecture.source)
        if placement.too_large:
            reason = f"{placement.too_large}. Names, shapes and bytes are checked, but no logits"
            notify(Notice(f"The proof is partial: {reason}."))
        elif placement.stream:
            how = "leaves the blocks on disk, so it reads all weights about eight times"
            notify(Notice(f"The proof {how}."))
        checks = check_files(surgery, folder, tokenizer, planned, notify)
        models = _Models(surgery, folder, placement, new_values or {}, reference, tokenizer, notify)
        numbers: dict[str, Any] = {}
        if placement.too_large:
            models.load_checkpoint()
            checks.append("loads")
        else:
            cast = next((tensor.cast for tensor in planned.tensors if tensor.cast), None)
            with task(notify, PROOF_TASK):
                models, comparison = _compare(models, cast)
            numbers = {
                "prompt": "random tokens" if tokenizer is None else "text",
                "prompt_tokens": models.prompt().numel(),
                "logits_difference": comparison.difference,
                "logits_tolerance": models.allowed,
                "vectors_difference": comparison.vectors_difference,
            }
            checks += ["loads", models.compared]
            checks += [cut.extra_check for cut in surgery.cuts if cut.extra_check]
            if architecture.reading is None:
                numbers["new_tokens"] = models.new_tokens
                numbers["cache_difference"] = comparison.cache_difference
                numbers["cache_tolerance"] = CACHE_TOLERANCES.get(models.placement.dtype, 0.0)
                checks.append("generates")
            elif comparison.vectors_difference is not None:
                checks.append("same vectors")
    return Proof(
        checks=tuple(checks),
        reference=reference,
        partial=placement.too_large,
        dtype=dtype_name(models.placement.dtype),
        device=models.placement.device.type,
        **numbers,
    )


@dataclass(frozen=True)
class _Comparison:
    """What both models have shown in one data type; differences are relative to the largest logit
    or output.

    Attributes:
        vectors_difference: None if sentence-transformers did not run.
        cache_difference: None if the checkpoint was not asked to generate, or does not.
        failed: the check that failed, if any.
        fault: a clause that says how.
    """

    difference: float
    cache_difference: float | None = None
    vectors_difference: float | None = None
    failed: Check | None = None
    fault: str = ""


def _compare(models: _Models, cast: torch.dtype | None) -> tuple[_Models, _Comparison]:
    """Compare both models, and while they differ, again in a wider data type, which decides."""
    comparison = models.compare()
    while comparison.failed:
        wider = place_wider(models.surgery.architecture, models.placement, cast)
        if wider is None:
            raise models.error(comparison)
        name = dtype_name(wider.dtype)
        if wider.too_large:
            cannot = f"{name}, which would tell rounding from a fault, is out of reach"
            raise models.error(comparison, f"{cannot}: {wider.too_large}")
        decides = f"{name} decides, in a second comparison"
        models.notify(Notice(f"Maybe by rounding, {comparison.fault}: {decides}."))
        models = replace(models, placement=wider)
        comparison = models.compare()
    return models, comparison


@dataclass(frozen=True)
class _Models:
    """The checkpoint as transformers loads it, and its reference, the dense model.

    Only one of them is in memory at a time. For the fields, see `prove`.
    """

    surgery: Surgery
    folder: Path
    placement: ProofPlacement
    new_values: Mapping[str, Tensor]
    reference: Reference
    tokenizer: Any
    notify: Notify

    @property
    def allowed(self) -> float:
        """The allowed difference of the logits."""
        tolerances = [cut.tolerance for cut in self.surgery.cuts]
        return max([TOLERANCES.get(self.placement.dtype, 0.0), *tolerances])

    @property
    def compared(self) -> Literal["same logits", "same outputs"]:
        """The name of the comparison."""
        return "same logits" if self.surgery.architecture.reading is None else "same outputs"

    @property
    def new_tokens(self) -> int:
        """The number of tokens to generate."""
        new_tokens = NEW_STREAMED_TOKENS if self.placement.stream else NEW_TOKENS
        return min(new_tokens, max(1, self._limit // 2))

    @property
    def _limit(self) -> int:
        return self.surgery.architecture.longest_sequence or PROMPT_TOKENS + NEW_TOKENS

    def prompt(self) -> Tokens:
        """Return the ids of the prompt, [1, positions], or texts for a model that reads."""
        architecture = self.surgery.architecture
        shape = shape_of(architecture, self._limit, None)
        if shape and self.tokenizer is not None:
            texts: list[Item] = list(TEXTS)
            if architecture.record.output == "scores":
                texts = [(TEXTS[1], text) for text in TEXTS]
            padded = pad_texts(self.tokenizer, texts, shape).trimmed()
            return padded.to(self.placement.device)
        room = min(PROMPT_TOKENS, max(1, self._limit - self.new_tokens))
        if self.tokenizer is not None:
            ids = torch.tensor([self.tokenizer(PROMPT).input_ids[:room]])
        else:
            vocabulary = architecture.config.get_text_config().vocab_size
            random = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (1, room), generator=random)
        ids = ids.to(self.placement.device)
        return PaddedTexts(ids, torch.ones_like(ids)) if shape else ids

    def pruned_prompt(self) -> Tokens:
        """Return the prompt in the checkpoint's vocabulary."""
        prompt = self.prompt()
        rows = [self.surgery.token_ids(row) for row in ids_of(prompt).tolist()]
        ids = torch.tensor(rows, device=self.placement.device)
        return ids if isinstance(prompt, Tensor) else replace(prompt, ids=ids)

    def compare(self) -> _Comparison:
        """Run the reference, then the checkpoint, and compare what they compute."""
        with ExitStack() as stack:
            for cut in self.surgery.cuts:
                stack.enter_context(cut.break_ties())
            expected, expected_outputs = self._run_reference()
            model = self.load_checkpoint()
            ids = self.pruned_prompt()
            logits, outputs = self._run(model, lambda: self._outputs(model, ids), pruned=True)
            difference = relative_difference(logits, expected)
            dtype = self.placement.dtype
            if not difference <= self.allowed:  # or it is NaN
                fault = (
                    f"its {self.compared.removeprefix('same ')} differ from those of "
                    f"{describe_reference(self.reference)} by {difference:.2g} of the "
                    f"largest ({dtype_name(dtype)} allows {self.allowed:.2g})"
                )
                return _Comparison(difference, failed=self.compared, fault=fault)
            for name, expected_output in expected_outputs.items():
                output = outputs[name]
                if not expected_output.numel() or not output.numel():
                    raise proof_error(f"{name} never ran, so they were not compared")
                if not relative_difference(output, expected_output) <= self.allowed:
                    fault = f"{name} that stay compute other values than in the dense model"
                    return _Comparison(difference, failed="every expert", fault=fault)
            if isinstance(ids, PaddedTexts):
                del model
                return self._compare_vectors(difference, expected)
            cached, clause = check_decoding(model, ids, self.new_tokens, dtype)
            if clause:
                return _Comparison(difference, cached, failed="generates", fault=clause)
            return _Comparison(difference, cached)

    def _compare_vectors(self, difference: float, expected: Tensor) -> _Comparison:
        """Compare the vectors that sentence-transformers computes from text, if it can."""
        architecture = self.surgery.architecture
        is_elsewhere = self.placement.stream or self.placement.device_map is not None
        if not architecture.makes_vectors or self.tokenizer is None or is_elsewhere:
            return _Comparison(difference)
        if not stock_vectors.is_installed():
            self.notify(
                Notice(
                    "sentence-transformers is not installed: its vectors were computed by "
                    "transformers and sleb's own pooling. To have it load the checkpoint, too: "
                    "pip install 'sleb[encoders]'."
                )
            )
            return _Comparison(difference)
        free_memory()
        trust = architecture.source.trust_remote_code
        vectors = stock_vectors.compute(
            self.folder, list(TEXTS), self.placement, trust_remote_code=trust
        )
        distance = relative_difference(vectors.to(expected.device), expected)
        allowed = TOLERANCES.get(self.placement.dtype, stock_vectors.TOLERANCE)
        if distance <= allowed:
            return _Comparison(difference, vectors_difference=distance)
        fault = f"in sentence-transformers its vectors differ by {distance:.2g} of the largest"
        return _Comparison(difference, failed="same vectors", fault=fault)

    def _run(
        self, model: Any, logits_of: Callable[[], Tensor], *, pruned: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits, and by name the outputs that logits may not show."""
        with ExitStack() as stack:
            watched = []
            for cut in self.surgery.cuts:
                watched.append(stack.enter_context(cut.extra_outputs(model, pruned=pruned)))
            logits = logits_of()
        outputs: dict[str, Tensor] = {}
        for named in watched:
            outputs.update(named)
        return logits, outputs

    def _run_reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        ids = self.prompt()
        with self._opened_reference() as dense:
            logits, outputs = self._run(
                dense.model,
                lambda: dense.ending.of_model(dense, ids, self.surgery.removed),
                pruned=False,
            )
        if not bool(logits.isfinite().all()):
            reference = describe_reference(self.reference).capitalize()
            dtype = self.placement.dtype
            raise ModelError(
                f"{reference} computes NaN or infinity in {dtype_name(dtype)}.",
                hint=hint_for_nonfinite(dtype),
            )
        if self.surgery.tokens is not None and isinstance(ids, Tensor):
            logits = logits[..., list(self.surgery.tokens)]
        return logits, outputs

    @contextmanager
    def _opened_reference(self) -> Iterator[SkippableModel]:
        """Load the dense model with the new values, and without removed experts and tokens."""
        free_memory()  # of the model that was loaded before
        with (
            open_model(self.surgery.architecture, self.placement, self.notify) as dense,
            dense.replaced(self.new_values),
        ):
            dense.align()
            _make_float64_runnable(dense.model)
            with self.surgery.simulate(dense.model):
                yield dense

    def load_checkpoint(self) -> Any:
        """Load the checkpoint with stock transformers, where the dense model was.

        If the dense model is too large, the checkpoint is loaded on the meta device.
        """
        free_memory()  # of the model that was loaded before
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
        unexpected = [name for name in info["unexpected_keys"] if not self._is_unused(name)]
        info["unexpected_keys"] = unexpected
        if problem := loading_problem(architecture, info, "missing", "unexpected", "mismatched"):
            raise proof_error(problem)
        align(model)
        _make_float64_runnable(model)
        return model.eval()

    def _is_unused(self, name: str) -> bool:
        kept = self.surgery.kept
        block_of = self.surgery.architecture.block_names(kept).block_of
        # The files may hold a head that this class does not load, neither of the dense model.
        if self.surgery.architecture.reading is not None and block_of(name) is None:
            return True
        # transformers does not load modules for multi-token prediction; they stay unless blocks are
        # renumbered.
        if self.surgery.removed:
            return False
        return bool(PREDICTION.search(name)) or (block_of(name) or 0) >= kept.count

    def _outputs(self, model: Any, tokens: Tokens) -> Tensor:
        if isinstance(tokens, Tensor):
            return _logits(model, tokens)
        with _errors_fail_proof():
            output = model(**tokens.inputs())
        ending = ending_of(self.surgery.architecture, self.placement.device)
        assert isinstance(ending, Reader)
        return ending.outputs(output, tokens)

    def error(self, comparison: _Comparison, besides: str = "") -> ProofError:
        """Return the error of a fault that decides, with where the models begin to differ.

        Raises:
            ModelError: the dense model does not generate either, so the checkpoint is not to blame.
        """
        clauses = [comparison.fault]
        if comparison.failed == self.compared:
            clauses.append(self._first_difference())
        if comparison.failed == "generates":
            self._require_dense_decoding()
        if besides:
            clauses.append(besides)
        return proof_error("; ".join(clauses))

    def _first_difference(self) -> str:
        """Name the first block whose output differs by more than rounding, or else at all."""
        states = self._checkpoint_states()
        with self._opened_reference() as dense:
            expected = _block_states(dense, self.prompt(), self.surgery.removed)
        if relative_difference(states[0][0], expected[0][0]):
            return "the input of the first block already differs"
        differences = []
        # A wrong checkpoint may have another number of blocks.
        for (_, ours), (_, theirs) in zip(states, expected, strict=False):
            differences.append(relative_difference(ours, theirs))
        for allowed in (self.allowed, 0.0):
            for block, difference in enumerate(differences):
                if not difference <= allowed:
                    return (
                        f"its block {block}, which is block {self.surgery.kept.blocks[block]} of "
                        f"the dense model, is the first whose output differs, by {difference:.2g}"
                    )
        return "every block's output is the same, so the final norm or the head differs"

    def _checkpoint_states(self) -> list[tuple[Tensor, Tensor]]:
        model = self.load_checkpoint()
        with SkippableModel(model, self.surgery.architecture.blocks_of(model)) as whole:
            return _block_states(whole, self.pruned_prompt())

    def _require_dense_decoding(self) -> None:
        with self._opened_reference() as dense:
            dense.skip(())
            _, fault = check_decoding(
                dense.model, ids_of(self.prompt()), self.new_tokens, self.placement.dtype
            )
        if fault:
            raise ModelError(
                f"{self.surgery.architecture.source.id} does not work with a KV cache, whatever is "
                f"removed: {fault}.",
                hint="Report it to its author or to transformers. --no-verify writes the "
                "checkpoint without a proof.",
            )


def _make_float64_runnable(model: Any) -> None:
    # The grouped kernels for experts do not support float64.
    if model.dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _logits(model: Any, ids: Tensor) -> Tensor:
    with _errors_fail_proof():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _errors_fail_proof() -> AbstractContextManager[None]:
    return translate_errors(lambda words: proof_error(f"it does not run: {words}"))


def _block_states(
    model: SkippableModel, ids: Tokens, removed: Collection[int] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Return the hidden states before and after each block but the removed ones, on the CPU."""
    states: list[tuple[Tensor, Tensor]] = []
    model.run_with_hook(
        ids,
        removed,
        lambda block, entering, leaving: states.append((entering.cpu(), leaving.cpu())),
    )
    return states
