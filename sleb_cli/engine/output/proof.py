"""The proof after save: a pruned checkpoint computes what the dense model with these blocks skipped computes.

A recovered checkpoint computes what the dense model computes with these blocks skipped and the new values in memory.

The checks, in order: the files are those that were planned, and complete; their bytes are the dense model's or the new
values; stock transformers loads them; the logits are the same; the model generates with the KV cache; it saves again.
If the dense model does not fit in memory, the proof is partial, and says so: transformers finds every weight of the
config in the files, but nothing is computed. What the proof cannot see is listed in docs/reference/commands.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from sleb_cli.atomic import free_space
from sleb_cli.engine.device import CPU, choose_device, choose_dtype, dtype_name, free_bytes, free_memory
from sleb_cli.engine.files.cache import cache_root
from sleb_cli.engine.files.copying import BUFFER_BYTES, reading
from sleb_cli.engine.files.shards import INDEX, NewTensor, Shard, index_of
from sleb_cli.engine.files.weights import TORCH_DTYPES, find_weights, read_tensors
from sleb_cli.engine.forward.offload import align
from sleb_cli.engine.forward.placement import Placement, blocks_on_disk, device_of, open_dense
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.streaming import converted_bytes, require_streamable, streamed_bytes, weight_bytes
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.loading import (
    DeviceMap,
    has_tokenizer,
    load_pretrained,
    load_tokenizer,
    loading_problem,
    prune_device_map,
)
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.third_party import no_verdict_by_the_disk, saving, translate_errors
from sleb_cli.events import CheckPassed, Notice, Notify, task
from sleb_cli.records import Check, Proof, differences
from sleb_cli.units import format_bytes
from sleb_plugins import ModelError, ProofError

PROMPT = (
    "A river begins as snow on a mountain. In spring the water runs down over the rocks, gathers in "
    "streams, and reaches the plain, where people built mills and towns along its banks. They asked "
    "how deep it was, who owned the fish, and why it flooded every ninth year. Nobody could answer "
    "all three questions, so they wrote down what they saw, measured it, and compared their notes."
)
PROMPT_TOKENS = 64
NEW_TOKENS = 8

LARGEST_SHARD_BYTES = 5 * 10**9
"""The largest file of a checkpoint that is saved again."""

TOLERANCE = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""The largest difference allowed between a logit and that of the model in memory, relative to the largest logit."""

CACHE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The same between decoding with and without the KV cache, whose shapes and so rounding differ."""


CheckResult = tuple[Check | None, str, dict[str, Any]]
"""A passed check (None: one that was left out), a sentence for the user, and its values in the proof's record."""

PEAK_SHARE = 1.2
"""The memory of a proof, relative to the dense model's weights: the two models are loaded one after the other."""

NOTHING_WRITTEN = (
    "Nothing was written. Try again, in case the disk or another program changed a file. If it fails again, please "
    "report the model; --keep-failed DIR keeps what was written."
)
"""The hint of a proof that fails."""

NEW_STREAMED_TOKENS = 2
"""New tokens if blocks stay on the disk, since each of them reads all."""


@dataclass(frozen=True)
class ProofSettings:
    """Where and in which data type the two models of a proof compute; `too_large` says why they cannot, if so.

    If the dense model is streamed, the blocks of the checkpoint stay on the disk, too, by accelerate's means.
    """

    placement: Placement
    too_large: str | None = None


def choose_proof_settings(
    architecture: Architecture,
    cast: torch.dtype | None,
    device_map: DeviceMap | None = None,
    stream: bool | None = None,
) -> ProofSettings:
    """Choose the fastest device with enough memory for the dense model, or else for two of its blocks.

    If a device map says where it is, that is the choice; `stream` says whether the user wants it to be streamed.

    Raises:
        UnsupportedModelError: the user wants it to be streamed, but the weights are quantized.
    """
    own = architecture.dtype
    if stream:
        require_streamable(architecture)
    if device_map is not None:
        device = device_of(device_map, None)
        return ProofSettings(Placement(device, cast or choose_dtype("auto", own, device), device_map=device_map))
    ways = [True] if stream else [False] if architecture.is_quantized or stream is False else [False, True]
    places = [
        Placement(device, cast or choose_dtype("auto", own, device), streamed)
        for streamed in ways
        for device in dict.fromkeys([choose_device("auto"), CPU])
    ]
    reasons = [_obstacle(architecture, place) for place in places]
    return next(
        (ProofSettings(place) for place, reason in zip(places, reasons, strict=True) if reason is None),
        ProofSettings(places[-1], reasons[-1]),
    )


def _obstacle(architecture: Architecture, place: Placement) -> str | None:
    """Return why the two models of a proof cannot run one after the other, or None if they can."""
    bytes_of = streamed_bytes if place.stream else weight_bytes
    needed, free = round(PEAK_SHARE * bytes_of(architecture, place.dtype)), free_bytes(place.device)
    if needed > free:
        what = "two of its blocks at a time need" if place.stream else "the model needs"
        return f"{what} {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    written = converted_bytes(architecture, place.dtype) if place.stream else 0
    if written and written > (left := free_space(cache_root())):
        return (
            f"transformers would write {format_bytes(written)} of converted weights to the disk, and "
            f"{format_bytes(left)} are free"
        )
    return None


@dataclass(frozen=True)
class Reference:
    """The model in memory that a checkpoint is compared with: the dense one with these blocks skipped.

    Attributes:
        surgery: the removal.
        parameters: the new values of a recovered model by the dense model's parameter names; None if not recovered.
    """

    surgery: Surgery
    parameters: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return (
            "the dense model with these blocks skipped" if self.parameters is None else "the recovered model in memory"
        )

    @contextmanager
    def opened(self, settings: ProofSettings, notify: Notify) -> Iterator[SkippableModel]:
        """Load it, with its new values in place."""
        with (
            open_dense(self.surgery.architecture, settings.placement, notify) as skippable,
            skippable.replaced(self.parameters or {}),
        ):
            skippable.align()
            yield skippable


@dataclass(frozen=True)
class Planned:
    """What a checkpoint must hold.

    Attributes:
        tensors: exactly these tensors.
        weights: the weight files by name; None if another program wrote the folder, with whatever files.
        texts: the contents of the files with settings, by name.
        copies: the dense model's files that are copied unchanged, by their relative paths.
    """

    tensors: Sequence[NewTensor]
    weights: Mapping[str, Shard] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


def prove(reference: Reference, folder: Path, planned: Planned, settings: ProofSettings, notify: Notify) -> Proof:
    """Check the checkpoint in `folder`, which must hold what was planned, and report each check that passes.

    Raises:
        ProofError: a check failed.
        OSError: the disk failed, which is no verdict about the checkpoint.
    """
    source = reference.surgery.architecture.source
    proof = Proof(
        checks=(),
        reference="dense" if reference.parameters is None else "recovered",
        partial=settings.too_large,
        dtype=dtype_name(settings.placement.dtype),
        device=settings.placement.device.type,
    )
    with no_verdict_by_the_disk(ProofError):
        tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
        if settings.too_large:
            reason = settings.too_large
            notify(Notice(f"The proof is partial: {reason}. Names, shapes and bytes are checked, but no logits."))
            checks = _fits(reference.surgery, folder)
        else:
            if settings.placement.stream:
                notify(Notice("The proof leaves the blocks on disk, so it reads all weights about eight times."))
            checks = _runs(reference, folder, tokenizer, settings, notify)
        for check, sentence, values in chain(_as_planned(source, folder, tokenizer, planned, notify), checks):
            notify(CheckPassed(sentence) if check else Notice(sentence))
            proof = proof.model_copy(update={"checks": (*proof.checks, *([check] if check else [])), **values})
    return proof


def _as_planned(
    source: ModelSource, folder: Path, tokenizer: Any, planned: Planned, notify: Notify
) -> Iterator[CheckResult]:
    """Check that the folder holds what was planned, byte for byte: whatever a model computes, or never reads."""
    _require_files(folder, planned)
    yield _complete(folder, planned)
    if tokenizer is not None:
        _require_same_tokens(source, folder, tokenizer)
    yield _same_bytes(folder, planned.tensors, notify)


def _require_files(folder: Path, planned: Planned) -> None:
    """Check that each file is there, and no other, and that all but the weights have the planned contents."""
    if planned.weights is None:
        return
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    texts = {**planned.texts, **({INDEX: index_of(planned.weights)} if len(planned.weights) > 1 else {})}
    expected = {*planned.weights, *texts, *planned.copies}
    if missing := sorted(expected - found):
        raise _failed(f"{_listed(missing)} missing")
    if extra := sorted(found - expected):
        raise _failed(f"{_listed(extra)} there, which belong to no pruned checkpoint of this model")
    for name, text in texts.items():
        if (content := (folder / name).read_bytes()) != text.encode():
            raise _failed(f"{name} is not what was written{_difference(content, text)}")
    for name, original in planned.copies.items():
        if not _same_content(folder / name, original):
            raise _failed(f"{name} is not the dense model's")


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} files, such as {names[0]}, are"


def _difference(content: bytes, text: str) -> str:
    """Return a clause on the first setting that differs, or nothing if the file is no longer readable JSON."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return ", nor readable JSON"
    what = differences({"": found}, {"": json.loads(text)}).partition("; ")[0].removeprefix(".")
    return f": {what}" if what else ""


def _same_content(path: Path, source: Path) -> bool:
    with ExitStack() as files:
        ours = files.enter_context(path.open("rb"))
        with reading(source):
            theirs = files.enter_context(source.open("rb"))
        part: bytes | None = None
        while part != b"":
            with reading(source):
                part = theirs.read(BUFFER_BYTES)
            if ours.read(BUFFER_BYTES) != part:
                return False
    return True


def _complete(folder: Path, planned: Planned) -> CheckResult:
    """Check that every tensor is in the planned file, in its shape and data type, and that no file is truncated."""
    try:
        weights = find_weights(folder)
        found = {tensor.name: (tensor.dtype, tensor.shape, tensor.path.name) for tensor in weights.stored}
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned.tensors}
    if missing := sorted(expected.keys() - found.keys()):
        raise _failed(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if wrong := sorted(name for name in expected if found[name][:2] != expected[name]):
        raise _failed(f"{len(wrong)} tensors have another type or shape, such as {wrong[0]}")
    if extra := sorted(found.keys() - expected.keys()):
        raise _failed(f"{len(extra)} tensors are unexpected, such as {extra[0]}")
    if planned.weights is not None:
        for header in weights.headers:
            shard = planned.weights[header.path.name]
            if {tensor.name for tensor in header.tensors} != {tensor.name for tensor in shard.tensors}:
                raise _failed(f"{header.path.name} holds other tensors than the index says")
            if header.metadata != shard.metadata:
                raise _failed(f"the metadata of {header.path.name} are {header.metadata}, not {shard.metadata}")
    files = "1 file" if len(weights.names) == 1 else f"{len(weights.names)} files"
    return "complete", f"complete: {len(found)} tensors in {files}", {}


def _require_same_tokens(source: ModelSource, folder: Path, theirs: Any) -> None:
    """Check that the checkpoint's tokenizer and chat template are there and the dense model's, whatever was planned."""
    with translate_errors(lambda words: _failed(f"its tokenizer cannot be loaded: {words}")):
        ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    if ours(PROMPT).input_ids != theirs(PROMPT).input_ids or ours.chat_template != theirs.chat_template:
        raise _failed("its tokenizer is not the dense model's")


def _same_bytes(folder: Path, planned: Sequence[NewTensor], notify: Notify) -> CheckResult:
    """Check that each tensor's bytes are those of the dense model or the new values.

    Both sides are read by safetensors (pickles by torch), cut and cast as tensors, so by none of the code that wrote.
    """
    different: list[NewTensor] = []
    with task(notify, "Comparing weights", sum(tensor.size for tensor in planned), "B") as advance:
        written = {tensor.name: tensor.path for tensor in find_weights(folder).stored}
        for (source, path), group in groupby(planned, key=lambda tensor: (tensor.stored.path, written[tensor.name])):
            tensors = list(group)
            if not path.samefile(source):
                found = read_tensors(path, [tensor.name for tensor in tensors])
                dense = read_tensors(source, [tensor.stored.name for tensor in tensors if tensor.value is None])
                for tensor in tensors:
                    expected = next(dense) if tensor.value is None else tensor.value
                    if tensor.value is None and tensor.cut:
                        expected = tensor.cut.of_tensor(expected)
                    expected = expected.to(CPU, TORCH_DTYPES.get(tensor.dtype, expected.dtype))
                    if not torch.equal(_bits_of(next(found)), _bits_of(expected)):
                        different.append(tensor)
            advance(sum(tensor.size for tensor in tensors))
    if different:
        first, others = different[0], f" ({len(different)} of {len(planned)} tensors differ)"
        whose = f"those of {first.stored.name} in the dense model" if first.value is None else "its new values"
        raise _failed(f"the bytes of {first.name} are not {whose}{others if len(different) > 1 else ''}")
    return "same bytes", "its bytes are those of the dense model's kept blocks, or the recovered ones", {}


def _bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes, which tell NaN and -0 apart, too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _fits(surgery: Surgery, folder: Path) -> Iterator[CheckResult]:
    """Check that stock transformers, on the meta device, finds each weight in the files."""
    _load(folder, surgery, None)
    yield "loads", "transformers builds it and finds every weight in the files, in its shape, and no other", {}


@torch.no_grad()  # not inference mode, in which tensors made outside of it cannot take the place of others
def _runs(
    reference: Reference, folder: Path, tokenizer: Any, settings: ProofSettings, notify: Notify
) -> Iterator[CheckResult]:
    """Check that the checkpoint computes what the model in memory computes, generates, and can be saved again."""
    surgery, place = reference.surgery, settings.placement
    allowed = TOLERANCE.get(place.dtype, 0.0)
    limit = surgery.architecture.longest_sequence or PROMPT_TOKENS + NEW_TOKENS
    new_tokens = min(NEW_STREAMED_TOKENS if place.stream else NEW_TOKENS, max(1, limit // 2))
    room = max(1, min(PROMPT_TOKENS, limit - new_tokens))
    if tokenizer is None:
        vocabulary = surgery.architecture.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, room), generator=torch.Generator().manual_seed(0)).to(place.device)
    else:
        ids = torch.tensor([tokenizer(PROMPT).input_ids[:room]], device=place.device)
    with reference.opened(settings, notify) as skippable:
        expected = skippable.logits(ids, surgery.removed)
    del skippable
    if not bool(expected.isfinite().all()):
        raise ModelError(
            f"{reference.name.capitalize()} computes NaN or infinity in {dtype_name(place.dtype)}.",
            hint="Choose another data type with --dtype: float16 ends at 65,504, bfloat16 and float32 do not."
            if place.dtype == torch.float16
            else "Check the model's weights.",
        )
    free_memory()
    with task(notify, "Proving the checkpoint"):
        model = _load(folder, surgery, settings).eval()
        align(model)
        yield "loads", "stock transformers loads it, with no weight missing and none left over", {}
        with translate_errors(lambda words: _failed(f"it does not run: {words}")):
            found = model(input_ids=ids, use_cache=False).logits
        difference = _relative_difference(found, expected)
        if not difference <= allowed:
            with SkippableModel(model, surgery.architecture.blocks_of(model)) as whole:
                states = _block_states(whole, ids)
            del whole, model
            free_memory()
            with reference.opened(settings, notify) as skippable:
                where = _first_difference(surgery, states, _block_states(skippable, ids, surgery.removed), allowed)
            raise _failed(
                f"its logits differ from those of {reference.name} by {difference:.2g} of the largest "
                f"({dtype_name(place.dtype)} allows {allowed:.2g}); {where}"
            )
        how = "bitwise equal to" if difference == 0 else f"within {difference:.1g} of"
        yield "same logits", f"its logits on {ids.shape[1]} prompt tokens are {how} those of {reference.name}", {
            "prompt": "random tokens" if tokenizer is None else "text", "prompt_tokens": ids.shape[1],
            "logits_difference": difference, "logits_tolerance": allowed,
        }  # fmt: skip
        cache_allowed = CACHE_TOLERANCE.get(place.dtype, 0.0)
        yield "generates", "it generates with the KV cache", {
            "new_tokens": new_tokens, "cache_difference": _decode(model, ids, new_tokens, cache_allowed),
            "cache_tolerance": cache_allowed,
        }  # fmt: skip
        # Passed in a list, so that the model can be freed before it is loaded again: both may not fit in memory.
        models = [model]
        del model
        yield from _saves_again(models, surgery, folder, settings)


def _block_states(model: SkippableModel, ids: Tensor, removed: Collection[int] = ()) -> list[tuple[Tensor, Tensor]]:
    """Return the hidden states that enter and leave each block but the removed ones, on the CPU."""
    found: list[tuple[Tensor, Tensor]] = []
    model.run_with_hook(ids, removed, lambda block, entering, leaving: found.append((entering.cpu(), leaving.cpu())))
    return found


def _first_difference(
    surgery: Surgery,
    found: Sequence[tuple[Tensor, Tensor]],
    expected: Sequence[tuple[Tensor, Tensor]],
    allowed: float,
) -> str:
    """Return a clause on the first block whose output differs by more than rounding, or else at all."""
    if _relative_difference(found[0][0], expected[0][0]):
        return "what enters the first block differs already"
    both = zip(found, expected, strict=False)  # a wrong checkpoint may have another number of blocks
    differences = [_relative_difference(ours[1], theirs[1]) for ours, theirs in both]
    for most in (allowed, 0.0):
        for block, difference in enumerate(differences):
            if not difference <= most:
                return (
                    f"its block {block}, which is block {surgery.kept.blocks[block]} of the dense model, is the first "
                    f"whose output differs, by {difference:.2g}"
                )
    return "every block's output is the same, so the final norm or the head differs"


def _saves_again(models: list[Any], surgery: Surgery, folder: Path, settings: ProofSettings) -> Iterator[CheckResult]:
    """Check that stock transformers saves the model with its config, and loads the same model from that."""
    model = models.pop()
    needed, free = sum(tensor.nbytes for tensor in model.state_dict().values()), shutil.disk_usage(folder).free
    if needed > free:
        reason = f"saving it again needs {format_bytes(needed)} on the disk, and {format_bytes(free)} are free"
        yield None, f"The proof is partial: {reason}.", {"partial": reason}
        return
    # A generation config that contradicts itself cannot be saved, which would be the dense model's fault.
    model.generation_config = GenerationConfig()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".again-") as place:
        with (
            translate_errors(lambda words: _failed(f"transformers does not save it again: {words}")),
            saving(Path(place)),
            warnings.catch_warnings(action="ignore"),  # transformers warns of what a shard takes in memory
        ):
            # A shard of an offloaded model is held in memory while it is written.
            model.save_pretrained(place, max_shard_size=min(LARGEST_SHARD_BYTES, free_bytes(CPU) // 2))
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        del model
        free_memory()
        again = _load(Path(place), surgery, settings)
        after = {name: tensor.shape for name, tensor in again.state_dict().items()}
    if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise _failed(f"saved again, it has {len(different)} other weights, such as {different[0]}")
    yield "saves again", "it saves again, with the same weights", {}


def _load(folder: Path, surgery: Surgery, settings: ProofSettings | None) -> Any:
    """Load the checkpoint as the settings say; without them, only its names and shapes."""
    architecture, device, device_map = surgery.architecture, torch.device("meta"), None
    options: dict[str, Any] = {"trust_remote_code": architecture.source.trust_remote_code}
    if settings:
        place = settings.placement
        device, options["dtype"] = place.device, place.dtype
        on_disk = blocks_on_disk(architecture, device) if place.stream else place.device_map
        device_map = prune_device_map(surgery, on_disk)
    try:
        model, info = load_pretrained(architecture.auto_class, folder, "it", device, device_map, **options)
    except ModelError as error:
        raise _failed(error.message.rstrip(".")) from error
    if problem := loading_problem(info, "missing", "unexpected", "mismatched"):
        raise _failed(problem)
    return model


def _decode(model: Any, ids: Tensor, new_tokens: int, allowed: float) -> float:
    """Generate with and without the KV cache, and compare the logits of each step up to the first different token.

    Both runs use `generate`, because some families count positions differently in a plain forward pass.
    """
    runs = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            do_sample=False, use_cache=use_cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        how = "with the KV cache" if use_cache else "without a KV cache"

        def fails(words: str, how: str = how) -> ProofError:
            return _failed(f"it does not generate {how}: {words}")

        generated = generate(model, ids, settings, fails)
        found = generated.sequences.shape[1] - ids.shape[1]
        if found != new_tokens:
            raise _failed(f"it generated {found} tokens {how}, not {new_tokens}")
        runs.append(torch.cat(generated.logits))
    cached, whole = runs
    # After a tie that was broken differently, the two runs continue different texts.
    alike = int((cached.argmax(-1) == whole.argmax(-1)).cumprod(0).sum())
    difference = _relative_difference(cached[: alike + 1], whole[: alike + 1])
    if not difference <= allowed:
        raise _failed(f"with the KV cache its logits differ by {difference:.2g} of the largest from those without")
    return difference


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected logit; NaN, which fails every check, for NaN logits."""
    if found.shape != expected.shape:
        return float("nan")
    scale = expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / scale)


def _failed(what: str) -> ProofError:
    return ProofError(f"The pruned checkpoint failed its proof: {what}.", hint=NOTHING_WRITTEN)
