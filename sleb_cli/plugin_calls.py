"""Calls of a plugin's methods: what they raise, or return that cannot be used, names the plugin."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar

from sleb_plugins import FamilyAdapter, LoadedModel, Metric, PluginError, SlebError, TimedRun
from sleb_plugins.errors import is_out_of_memory

T = TypeVar("T")

REPORT = "Report it to the plugin's author."


def named(offer: T, who: str) -> T:
    """Return a copy of what a plugin offers whose mistakes are said to be of `who`."""
    if isinstance(offer, FamilyAdapter):
        return replace(offer, config_keys={key: _called(who, pruner) for key, pruner in offer.config_keys.items()})
    return _with_calls(copy(offer), who)


def _with_calls(found: T, who: str) -> T:
    """Wrap the methods of the contract, and no others, which may raise what the plugin itself catches."""
    bases = [base for base in type(found).__mro__ if base.__module__.startswith("sleb_plugins.")]
    for name in {name for base in bases for name, value in vars(base).items() if callable(value)}:
        if not name.startswith("_"):
            if hasattr(vars(found).get(name), "__wrapped__"):  # of a metric that copied itself: bound to the original
                object.__delattr__(found, name)
            object.__setattr__(found, name, _called(who, getattr(found, name), name))
    return found


def _called(who: str, method: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    fault = _FAULTS.get(name)

    @wraps(method)
    def call(*given: Any, **options: Any) -> Any:
        try:
            found = method(*given, **options)
        except Exception as error:
            if isinstance(error, SlebError) or is_out_of_memory(error):
                raise
            frames = extract_tb(error.__traceback__)[1:]
            last = [frame for frame in frames if frame.filename == frames[0].filename][-1:]
            where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)
            words = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
            raise PluginError(f"{who} raised {words}{where}.", hint=REPORT) from error
        if fault and not options and (needed := fault(found, *given)):
            raise PluginError(f"{who} returned {_in_words(found)} from {name}, not {needed}.", hint=REPORT)
        return _with_calls(found, who) if isinstance(found, LoadedModel) else found

    return call


def _fault_of_tokens(found: Any, *given: Any) -> str | None:
    from torch import Tensor

    shape, tensors = given[0].shape[:-1], [each for each in given if isinstance(each, Tensor)]
    if _has_shape(found, shape) and not (found.isnan().any() and all(each.isfinite().all() for each in tensors)):
        return None
    return f"a number for each position: a tensor of shape {(*shape,)}"


def _fault_of_experts(found: Any, use: Any, block: int) -> str | None:
    if _has_shape(found, use.tokens.shape) and found.isfinite().all():
        return None
    return f"a finite number for each expert: a tensor of shape {(*use.tokens.shape,)}"


def _fault_of_run(found: Any, prompts: Any, new_tokens: int) -> str | None:
    if isinstance(found, TimedRun) and new_tokens in (0, len(found.token_seconds)):
        times = (found.seconds, *found.token_seconds)
        if all(isinstance(each, int | float) and 0 <= each < math.inf for each in times) and found.seconds:
            return None
    return f"a TimedRun of more than 0 seconds, with {new_tokens} token_seconds"


def _fault_unless(kind: Any, needed: str) -> Callable[..., str | None]:
    return lambda found, *given: None if isinstance(found, kind) and found == found else needed  # NaN is not itself


_FAULTS: dict[str, Callable[..., str | None]] = {
    "with_argument": _fault_unless(Metric, "a metric"),
    "fingerprint": _fault_unless(str, "a str"),
    "score_tokens": _fault_of_tokens,
    "score_block": _fault_unless(int | float, "a number (float or int)"),
    # Whose NaN may be the model's.
    "score_model": lambda found, *given: None if isinstance(found, int | float) else "a number (float or int)",
    "score_experts": _fault_of_experts,
    "export": _fault_unless(str, "a str"),
    "load": _fault_unless(LoadedModel, "a LoadedModel"),
    "run": _fault_of_run,
}
"""What a method should have returned, in words, if it returned something else."""


def _has_shape(found: Any, shape: Any) -> bool:
    from torch import Tensor

    return isinstance(found, Tensor) and found.shape == shape and not found.is_complex()


def _in_words(found: Any) -> str:
    if hasattr(found, "shape"):
        nan = " with NaN or infinity" if hasattr(found, "isfinite") and not found.isfinite().all() else ""
        dtype = str(found.dtype).removeprefix("torch.")
        return f"a {dtype} {type(found).__name__} of shape {(*found.shape,)}{nan}"
    return f"a list of {len(found)}" if isinstance(found, list) else repr(found)[:80]
