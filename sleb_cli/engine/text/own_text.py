"""Calibration text that the model writes itself."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from sleb_cli.engine.device import dtype_name, in_smaller_pieces, input_device
from sleb_cli.engine.files.cache import KeptFiles
from sleb_cli.engine.forecast import announce
from sleb_cli.engine.model.generation import generate
from sleb_cli.engine.model.sampling import Sampler
from sleb_cli.engine.text.windows import adds_bos
from sleb_cli.engine.third_party import our_code
from sleb_cli.events import Notice, Notify, task
from sleb_cli.units import plural
from sleb_cli.version import __version__
from sleb_plugins import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from sleb_cli.engine.text.calibration import CalibrationSettings

_GIVE_TEXT = "Calibrate on a file or a data set: --calibration FILE."

# A larger batch is faster, since it reads the weights once for all its sequences; the KV cache limits it.
_MIN_BATCH, _MAX_BATCH, _TOKENS_PER_BATCH = 16, 64, 16384

TIMED_TOKENS = 8
"""Tokens of each sequence after which it is told how long all will take."""


def generate_own_text(model: Any, tokenizer: Any, settings: CalibrationSettings, notify: Notify) -> Tensor:
    """Let the model generate the sequences, sampled from its own distribution after BOS, or find them in the cache.

    The sequences include the BOS token only if the tokenizer adds it to every text.

    Raises:
        ModelError: the tokenizer has no token to start with.
        UnsupportedModelError: the model cannot generate text.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise ModelError(
            "The tokenizer has neither a BOS nor an EOS token, so the model cannot start a text.",
            hint=_GIVE_TEXT,
        )
    count, length, bos = settings.samples, settings.sequence_length, adds_bos(tokenizer)
    new = length - 1 if bos else length
    sampler = Sampler({tokenizer.eos_token_id} - {None})  # every sequence is one text
    batch_size = min(count, _MAX_BATCH, max(_MIN_BATCH, _TOKENS_PER_BATCH // length))
    key = {
        "model": settings.writer,
        "start": start,
        "shape": [count, length],
        "bos": bos,
        "forbidden": sampler.forbidden,
        "seed": settings.seed,
        "batch": batch_size,
        "dtype": str(model.dtype),
        "quantization": str(getattr(model.config, "quantization_config", None)),
        "device": input_device(model).type,
        "versions": [__version__, str(torch.__version__), transformers.__version__],
    }
    kept = KeptFiles("texts", "The text that the model wrote is", notify, can_write=settings.writer is not None)
    with suppress(SafetensorError):  # a broken file
        if content := kept.read(key):
            found = load(content)["tokens"].to(torch.int64)
            notify(Notice(f"Using {plural(count, 'sequence')} that the model wrote before, from the cache."))
            return found

    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, use_cache=True, pad_token_id=0)
    device, dtype = input_device(model), dtype_name(model.dtype)
    # MPS cannot tell the state of its random number generator by device.
    devices = [] if device.type in ("cpu", "mps") else [device]

    def refused(words: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{model.config.model_type} cannot generate text: {words}.", hint=_GIVE_TEXT)

    def write(size: int) -> Tensor:
        """Generate the sequences; they depend on the seed and on how many are generated at once."""

        def report(ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
            """Report each token as it is generated, and after the first ones, how long all will take; never stop."""
            with our_code():
                advance(len(ids))
                times.append(time.perf_counter())
                if len(times) == TIMED_TOKENS:
                    pace = (times[-1] - times[0]) / (TIMED_TOKENS - 1)
                    announce(notify, what, pace * new * -(-count // size), device)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        each_token = {
            "logits_processor": LogitsProcessorList([sampler]),
            "stopping_criteria": StoppingCriteriaList([report]),
        }
        what = f"Generating calibration text: {plural(count, 'sequence')} of {length:,} tokens in {dtype}"
        written: list[Tensor] = []
        times: list[float] = []
        with (
            task(notify, "Generating calibration text", count * new, "tokens") as advance,
            torch.random.fork_rng(devices=devices, device_type=device.type),
            torch.inference_mode(),
        ):
            torch.manual_seed(settings.seed)
            for first in range(0, count, size):
                prompt = torch.full((min(size, count - first), 1), start, device=device)
                ids: Tensor = generate(model, prompt, greedy, refused, **each_token)
                written.append(ids[:, -length:].cpu())
        return torch.cat(written).clone()

    def reduced(size: int) -> None:
        notify(Notice(f"Out of memory on {device}; generating {size} sequences at once."))

    found = in_smaller_pieces(write, batch_size, reduced)
    kept.write(key, save({"tokens": found.to(torch.int32)}))
    return found
