"""The proof after save: a pruned checkpoint does what the dense model with its blocks switched off does.

Where its blocks were given new values, it does what that model does with these values in memory.

Its checks, in order: the files are complete; stock transformers loads them; the logits are the same; it generates with
the KV cache; it saves again. Where the dense model does not fit into memory, the proof is partial, and says so: the
files are complete; transformers finds every weight of the config in them; and the bytes are the dense model's own.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name, free_bytes, free_memory
from sleb_cli.engine.files.shards import NewTensor, contents
from sleb_cli.engine.files.weights import SAFETENSORS, TORCH_DTYPES, StoredTensor, find_weights, read_json
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.surgery.loading import has_tokenizer, load_dense, load_tokenizer, misfit
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import translate_errors, translate_transformers_errors
from sleb_cli.events import CheckPassed, Notice, Notify, TaskAdvanced, TaskFinished, TaskStarted
from sleb_cli.records import Check, Proof
from sleb_cli.units import size as in_words
from sleb_plugins import ModelError, ProofError

PROMPT = (
    "A river begins as snow on a mountain. In spring the water runs down over the rocks, gathers in "
    "streams, and reaches the plain, where people built mills and towns along its banks. They asked "
    "how deep it was, who owned the fish, and why it flooded every ninth year. Nobody could answer "
    "all three questions, so they wrote down what they saw, measured it, and compared their notes."
)
PROMPT_TOKENS = 64
NEW_TOKENS = 8

TOLERANCE = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Largest difference of any logit from the model in memory, relative to the largest logit."""

CACHE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The same between decoding with the KV cache and without: other shapes, so other rounding."""


Found = tuple[Check | None, str, dict[str, Any]]
"""A check that was passed (None: one that had to be left out), in words, and what the proof's record says of it."""

PEAK_SHARE = 1.2
"""What a proof takes, relative to the dense model's weights: both models are in memory, but one after the other."""


@dataclass(frozen=True)
class Terms:
    """Where and in which data type a checkpoint is proven; `too_large` says why not by its logits, where not."""

    device: torch.device
    dtype: torch.dtype
    too_large: str | None


def proof_terms(architecture: Architecture, cast: torch.dtype | None) -> Terms:
    """Choose the fastest device that has the memory for the dense model."""
    best = choose_device("auto")
    for device in dict.fromkeys([best, torch.device("cpu")]):
        dtype = cast or choose_dtype("auto", architecture.config.dtype, device)
        needed = round(PEAK_SHARE * sum(_bytes_as(dtype, tensor) for tensor in architecture.source.weights.stored))
        # On its way to another device it passes through the memory of this machine.
        free = min(free_bytes(place) for place in {device, torch.device("cpu")})
        if needed <= free:
            return Terms(device, dtype, None)
    return Terms(device, dtype, f"the model needs {in_words(needed)} of memory, and {in_words(free)} are free")


@dataclass(frozen=True)
class Reference:
    """The model in memory that a checkpoint is held against: the dense one with its blocks switched off.

    Attributes:
        surgery: the removal.
        parameters: new values by the dense model's own parameter names, where it was recovered; else None.
    """

    surgery: Surgery
    parameters: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """What sentences call it."""
        return (
            "the dense model with these blocks skipped" if self.parameters is None else "the recovered model in memory"
        )

    def logits(self, ids: Tensor, dtype: torch.dtype, device: torch.device, notify: Notify) -> Tensor:
        """Load it, and give its logits, [1, positions, vocabulary]."""
        dense = load_dense(self.surgery.architecture, dtype, device, notify)
        for name, value in (self.parameters or {}).items():
            dense.get_parameter(name).data.copy_(value)
        _align(dense)
        with SkippableModel(dense, self.surgery.architecture.blocks_of(dense)) as skippable:
            return skippable.logits(ids, self.surgery.removed)


def prove(reference: Reference, folder: Path, kept: Sequence[NewTensor], terms: Terms, notify: Notify) -> Proof:
    """Check the checkpoint in `folder`, which is to hold the tensors `kept`; tell of each check as it is passed.

    Raises:
        ProofError: with the check that failed.
    """
    proof = Proof(
        checks=(),
        reference="dense" if reference.parameters is None else "recovered",
        partial=terms.too_large,
        dtype=dtype_name(terms.dtype),
        device=terms.device.type,
    )
    if terms.too_large:
        notify(Notice(f"The proof is partial: {terms.too_large}. Names, shapes and bytes are checked, no logits."))
        checks = chain(_complete(folder, kept), _fits(reference.surgery, folder), _same_bytes(folder, kept, notify))
    else:
        checks = chain(_complete(folder, kept), _runs(reference, folder, terms, notify))
    for check, words, found in checks:
        notify(CheckPassed(words) if check else Notice(words))
        proof = proof.model_copy(update={"checks": (*proof.checks, *([check] if check else [])), **found})
    return proof


def _complete(folder: Path, kept: Sequence[NewTensor]) -> Iterator[Found]:
    """Every tensor is in the files, in its shape, where the index says; each file is as long as its header says."""
    try:
        weights = find_weights(folder)
        found = {tensor.name: (tensor.dtype, tensor.shape, tensor.path.name) for tensor in weights.stored}
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in kept}
    if missing := sorted(expected.keys() - found.keys()):
        raise _failed(f"{len(missing)} tensors are missing, {missing[0]} first")
    if wrong := sorted(name for name in expected if found[name][:2] != expected[name]):
        raise _failed(f"{len(wrong)} tensors have another type or shape, {wrong[0]} first")
    if extra := sorted(found.keys() - expected.keys()):
        raise _failed(f"{len(extra)} tensors are unexpected, {extra[0]} first")
    if len(weights.names) > 1:
        index = read_json(folder / f"{SAFETENSORS}.index.json")["weight_map"]
        if index != {name: file for name, (_, _, file) in found.items()}:
            raise _failed("the index does not say where its tensors are")
    yield "complete", f"complete: {len(found)} tensors in {len(weights.names)} files", {}


def _fits(surgery: Surgery, folder: Path) -> Iterator[Found]:
    """Stock transformers builds the model without memory for its weights, and finds each in the files."""
    _load_stock(folder, surgery, device_map="meta")
    yield "loads", "transformers builds it and finds every weight in the files, in its shape, and no other", {}


def _same_bytes(folder: Path, kept: Sequence[NewTensor], notify: Notify) -> Iterator[Found]:
    """Each tensor's bytes are those of the dense model, both read from the disk again."""
    task = "Comparing weights"
    notify(TaskStarted(task, sum(tensor.size for tensor in kept), "B"))
    written = {tensor.name: tensor for tensor in find_weights(folder).stored}
    for source, group in groupby(kept, key=lambda tensor: tensor.stored.path):
        for tensor, parts in contents(source, list(group)):
            ours = written[tensor.name]
            with ours.path.open("rb", buffering=0) as file:
                file.seek(ours.start or 0)
                for part in parts:
                    if file.read(len(part)) != part:
                        raise _failed(f"the bytes of {tensor.name} are not those of {tensor.stored.name}")
                    notify(TaskAdvanced(task, len(part)))
    notify(TaskFinished(task))
    yield "same bytes", "its bytes are those of the dense model's kept blocks", {}


@torch.inference_mode()
def _runs(reference: Reference, folder: Path, terms: Terms, notify: Notify) -> Iterator[Found]:
    """It does what the model in memory does, and can be saved again."""
    surgery = reference.surgery
    dtype, device = terms.dtype, terms.device
    limit = surgery.architecture.longest_sequence or PROMPT_TOKENS + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, max(1, limit // 2))
    prompt, ids = _prompt(surgery, max(1, min(PROMPT_TOKENS, limit - new_tokens)), device)
    expected = reference.logits(ids, dtype, device, notify)
    free_memory()
    task = "Proving the checkpoint"
    notify(TaskStarted(task))
    model = _load_stock(folder, surgery, dtype=dtype)
    _align(model)
    model = model.to(device).eval()
    yield "loads", "stock transformers loads it, with no weight missing and none left over", {}
    with translate_errors(lambda words: _failed(f"it does not run: {words}")):
        found = model(input_ids=ids, use_cache=False).logits
    difference, allowed = _relative_difference(found, expected), TOLERANCE.get(dtype, 0.0)
    if not difference <= allowed:
        raise _failed(
            f"its logits differ from those of {reference.name} by {difference:.2g} of the largest, "
            f"where {allowed:.2g} is allowed in {dtype_name(dtype)}"
        )
    how = "bitwise equal to" if difference == 0 else f"within {difference:.1g} of"
    words = f"its logits on {ids.shape[1]} prompt tokens are {how} those of {reference.name}"
    yield "same logits", words, {
        "prompt": prompt, "prompt_tokens": ids.shape[1], "logits_difference": difference, "logits_tolerance": allowed
    }  # fmt: skip
    difference, allowed = _decode(model, ids, new_tokens, dtype), CACHE_TOLERANCE.get(dtype, 0.0)
    yield "generates", "it generates with the KV cache", {
        "new_tokens": new_tokens, "cache_difference": difference, "cache_tolerance": allowed
    }  # fmt: skip
    # In a list, so that the model can go before it is loaded again: two at once may not fit.
    models = [model]
    del model
    yield from _saves_again(models, surgery, folder, dtype)
    notify(TaskFinished(task))


def _saves_again(models: list[Any], surgery: Surgery, folder: Path, dtype: torch.dtype) -> Iterator[Found]:
    """Stock transformers saves it, config and all, and finds the same model in what it saved."""
    model = models.pop()
    needed, free = sum(tensor.nbytes for tensor in model.state_dict().values()), shutil.disk_usage(folder).free
    if needed > free:
        reason = f"saving it again needs {in_words(needed)} on the disk, and {in_words(free)} are free"
        yield None, f"The proof is partial: {reason}.", {"partial": reason}
        return
    # A generation config that contradicts itself cannot be saved; that would be the dense model's own fault.
    model.generation_config = GenerationConfig()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".again-") as place:
        with translate_errors(lambda words: _failed(f"transformers does not save it again: {words}")):
            model.save_pretrained(place)
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        del model
        free_memory()
        again = _load_stock(Path(place), surgery, dtype=dtype)
        after = {name: tensor.shape for name, tensor in again.state_dict().items()}
    if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise _failed(f"saved again, it has {len(different)} other weights, {different[0]} first")
    yield "saves again", "it saves again, to the same weights", {}


def _bytes_as(dtype: torch.dtype, tensor: StoredTensor) -> int:
    own = TORCH_DTYPES.get(tensor.dtype)
    plain = own is not None and own.is_floating_point and own.itemsize > 1
    return math.prod(tensor.shape) * dtype.itemsize if plain else tensor.size


def _prompt(surgery: Surgery, room: int, device: torch.device) -> tuple[Literal["text", "random tokens"], Tensor]:
    """Give the prompt's kind and tokens, [1, tokens]: real text where the model has a tokenizer."""
    architecture = surgery.architecture
    if has_tokenizer(architecture.source):
        ids = load_tokenizer(architecture.source)(PROMPT).input_ids[:room]
        return "text", torch.tensor([ids], device=device)
    vocabulary = architecture.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    return "random tokens", torch.randint(vocabulary, (1, room), generator=seeded).to(device)


def _load_stock(folder: Path, surgery: Surgery, **options: Any) -> Any:
    try:
        with translate_transformers_errors("it"):
            model, info = surgery.architecture.auto_class.from_pretrained(
                folder,
                trust_remote_code=surgery.architecture.source.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    found = misfit(info, "missing", "unexpected", "mismatched")
    if found:
        raise _failed(found)
    return model


def _align(model: Any) -> None:
    """Put every weight at an address that the fast kernels like; elsewhere they may round otherwise."""
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _decode(model: Any, ids: Tensor, new_tokens: int, dtype: torch.dtype) -> float:
    """Generate with the KV cache and without, and compare the logits of each step up to the first other choice.

    Without means by `generate` too: some families count positions otherwise there than in a plain pass.
    """
    runs = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            do_sample=False, use_cache=use_cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        how = "with the KV cache" if use_cache else "without a KV cache"
        with translate_errors(partial(_not_generating, how)):
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found = generated.sequences.shape[1] - ids.shape[1]
        if found != new_tokens:
            raise _failed(f"it generated {found} tokens {how}, not {new_tokens}")
        runs.append(torch.cat(generated.logits))
    cached, whole = runs
    # After a tie that fell the other way, the two go on from different texts.
    alike = int((cached.argmax(-1) == whole.argmax(-1)).cumprod(0).sum())
    difference = _relative_difference(cached[: alike + 1], whole[: alike + 1])
    if not difference <= CACHE_TOLERANCE.get(dtype, 0.0):
        raise _failed(f"with the KV cache its logits differ by {difference:.2g} of the largest from those without")
    return difference


def _not_generating(how: str, words: str) -> ProofError:
    return _failed(f"it does not generate {how}: {words}")


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the largest expected logit; NaN, which passes no check, for NaN logits."""
    if found.shape != expected.shape:
        return float("nan")
    scale = expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / scale)


def _failed(what: str) -> ProofError:
    return ProofError(
        f"The pruned checkpoint failed its proof: {what}.",
        hint="Nothing was delivered. Report the model to us; --no-verify writes the checkpoint without proof.",
    )
