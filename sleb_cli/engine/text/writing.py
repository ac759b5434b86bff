"""Let the model write text at temperature 1, many sequences at once, and cache it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from sleb_cli.cache import read_cached, write_cached
from sleb_cli.engine.device import as_float64, dtype_name, input_device
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.model.generation import continue_each, generate
from sleb_cli.engine.third_party import error_saying
from sleb_cli.events import Advance, Notice, Notify, task
from sleb_cli.keys import key_of
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError

T = TypeVar("T")

GIVE_TEXT = "Calibrate on a file or a data set: --calibration FILE."

# A larger batch is faster, since it reads the weights once for all its sequences; the KV cache
# limits it.
_MIN_BATCH = 16
_MAX_BATCH = 64
_TOKENS_PER_BATCH = 16384

Continue = Callable[..., list[list[int]]]
"""`continue_prompts` of a model."""


@dataclass(frozen=True)
class Writing:
    """An order for text.

    Attributes:
        title: the work in words, for the screen.
        noun: the name of one item of the result.
        count: about how many sequences are written.
        new: about how many tokens each has.
        seed: decides the text, together with the number of sequences that are written at once.
        model: identifies the model in the cache; None caches no text.
        key: everything else that the text depends on.
    """

    title: str
    noun: str
    count: int
    new: int
    seed: int
    model: str | None
    key: Mapping[str, Any]


def write_or_find(
    model: Any, writing: Writing, write: Callable[[Continue, int], list[T]], notify: Notify
) -> list[T]:
    """Return the items, plain JSON, that `write` makes, or made before, from the cache.

    It takes a function that continues prompts, and how many to continue at once, fewer if memory
    runs out.

    Raises:
        UnsupportedModelError: the model cannot generate text.
    """
    batch = max(_MIN_BATCH, _TOKENS_PER_BATCH // writing.new)
    batch = min(writing.count, _MAX_BATCH, batch)
    device = input_device(model)
    key = key_of(
        {"files": writing.model},
        dtype=dtype_name(model.dtype),
        device=device.type,
        quantization=str(getattr(model.config, "quantization_config", None)),
        shape=[writing.count, writing.new],
        seed=writing.seed,
        batch=batch,
        **writing.key,
    )
    cached: list[T] = read_cached("texts", key) or []
    if cached:
        count = plural(len(cached), writing.noun)
        notify(Notice(f"Using {count} that the model wrote before, from the cache."))
        return cached
    # MPS cannot tell the state of its random number generator by device.
    devices = [] if device.type in ("cpu", "mps") else [device]

    def run(size: int) -> list[T]:
        with (
            task(notify, writing.title, writing.count * writing.new, "tokens") as advance,
            torch.random.fork_rng(devices=devices, device_type=device.type),
            torch.inference_mode(),
        ):
            torch.manual_seed(writing.seed)
            return write(partial(continue_prompts, model, advance), size)

    texts = in_smaller_pieces(run, batch, device, notify, "generating {} sequences")
    if writing.model is not None:
        write_cached("texts", key, texts, "the text that the model wrote", notify)
    return texts


def continue_prompts(
    model: Any,
    advance: Advance,
    prompts: Sequence[Sequence[int]],
    new: int,
    forbidden: Collection[int] = (),
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Continue prompts of any lengths by at most `new` tokens; return the new tokens of each.

    They end with the first of the tokens in `ends`; `forbidden` ones are never drawn.
    """
    longest = max(map(len, prompts))
    padded = []
    attended = []
    for prompt in prompts:
        padding = [0] * (longest - len(prompt))
        padded.append([*padding, *prompt])
        attended.append([*padding, *[1] * len(prompt)])
    device = input_device(model)
    endings = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    written = continue_each(
        partial(_generate, model, forbidden, ends),
        torch.tensor(padded, device=device),
        torch.tensor(attended, device=device),
        new,
        lambda rows: partial(_have_ended, endings, advance),
    )
    return [_cut_after(tokens.tolist(), ends) for tokens in written]


def _have_ended(endings: Tensor, advance: Advance, added: Tensor) -> Tensor:
    # It is called for each token, so it moves the bar, too.
    advance(len(added))
    return torch.isin(added, endings).any(1)


def _generate(
    model: Any,
    forbidden: Collection[int],
    ends: Collection[int],
    ids: Tensor,
    settings: dict[str, Any],
    **options: Any,
) -> Any:
    # Greedy, since `draw_tokens` leaves one token to choose.
    greedy = GenerationConfig(
        do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None, **settings
    )
    refused = error_saying(
        UnsupportedModelError, f"{model.config.model_type} cannot generate text", GIVE_TEXT
    )
    drawing = LogitsProcessorList([partial(draw_tokens, forbidden=forbidden)])
    return generate(model, ids, greedy, refused, logits_processor=drawing, **options)


def draw_tokens(input_ids: Tensor, scores: Tensor, *, forbidden: Collection[int]) -> Tensor:
    """Draw a token for each row of logits [batch, vocabulary]; return logits that allow no other.

    Raises:
        ValueError: the logits are not finite.
    """
    # A tokenizer may have more tokens than the model.
    scores[:, [token for token in forbidden if token < scores.shape[-1]]] = -torch.inf
    # Sums in float32 would leave out the rarest tokens.
    ends = as_float64(scores.softmax(-1, dtype=torch.float32)).cumsum(-1)
    if not ends.isfinite().all():
        raise ValueError("its logits are not finite")
    # One random number for each row: `torch.multinomial` would take one for each token of the
    # vocabulary.
    share = torch.rand(len(ends), 1, dtype=torch.float64, device=ends.device)
    tokens = torch.searchsorted(ends, share * ends[:, -1:], right=True)
    tokens = tokens.clamp(max=scores.shape[-1] - 1)
    return torch.full_like(scores, -torch.inf).scatter_(-1, tokens.to(scores.device), 0.0)


def _cut_after(tokens: list[int], ends: Collection[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens
