"""Whose mistake is it? What a plugin's method raises, or returns and cannot be used, names the
plugin.
"""

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


def blame(offer: T, who: str) -> T:
    """Return a copy of a plugin's offer whose errors name `who`."""
    if isinstance(offer, FamilyAdapter):
        return replace(
            offer,
            config_keys={key: _wrap(who, pruner) for key, pruner in offer.config_keys.items()},
        )
    return _wrap_methods(copy(offer), who)


def _wrap_methods(offer: T, who: str) -> T:
    # Only the methods of the contract: the plugin itself may catch what its other methods raise.
    bases = [base for base in type(offer).__mro__ if base.__module__.startswith("sleb_plugins.")]
    for name in {name for base in bases for name, value in vars(base).items() if callable(value)}:
        if not name.startswith("_"):
            # A metric that copied itself still has a wrapper that is bound to the original.
            if hasattr(vars(offer).get(name), "__wrapped__"):
                object.__delattr__(offer, name)
            object.__setattr__(offer, name, _wrap(who, getattr(offer, name), name))
    return offer


def _wrap(who: str, method: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    find_fault = _FAULTS.get(name)

    @wraps(method)
    def call(*given: Any, **options: Any) -> Any:
        try:
            result = method(*given, **options)
        except Exception as error:
            if isinstance(error, SlebError) or is_out_of_memory(error):
                raise
            frames = extract_tb(error.__traceback__)[1:]
            # The last line of the plugin's own file, even if a library raised further down.
            last = [frame for frame in frames if frame.filename == frames[0].filename][-1:]
            where = "".join(
                f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last
            )
            words = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
            raise PluginError(f"{who} raised {words}{where}.", hint=REPORT) from error
        if find_fault and not options and (needed := find_fault(result, *given)):
            raise PluginError(
                f"{who} returned {_in_words(result)} from {name}, not {needed}.", hint=REPORT
            )
        return _wrap_methods(result, who) if isinstance(result, LoadedModel) else result

    return call


def _fault_of_tokens(result: Any, *given: Any) -> str | None:
    from torch import Tensor

    shape, tensors = given[0].shape[:-1], [value for value in given if isinstance(value, Tensor)]
    # NaN is only the plugin's fault if the model itself computed finite numbers.
    if _has_shape(result, shape) and not (
        result.isnan().any() and all(tensor.isfinite().all() for tensor in tensors)
    ):
        return None
    return f"a number for each position: a tensor of shape {(*shape,)}"


def _fault_of_experts(result: Any, use: Any, block: int) -> str | None:
    if _has_shape(result, use.tokens.shape) and result.isfinite().all():
        return None
    return f"a finite number for each expert: a tensor of shape {(*use.tokens.shape,)}"


def _fault_of_run(result: Any, prompts: Any, new_tokens: int) -> str | None:
    if isinstance(result, TimedRun) and new_tokens in (0, len(result.token_seconds)):
        times = (result.seconds, *result.token_seconds)
        if (
            all(isinstance(seconds, int | float) and 0 <= seconds < math.inf for seconds in times)
            and result.seconds
        ):
            return None
    return f"a TimedRun of more than 0 seconds, with {new_tokens} token_seconds"


def _fault_unless(kind: Any, needed: str) -> Callable[..., str | None]:
    return lambda result, *given: (
        None if isinstance(result, kind) and result == result else needed
    )  # NaN is not itself


_FAULTS: dict[str, Callable[..., str | None]] = {
    "with_argument": _fault_unless(Metric, "a metric"),
    "fingerprint": _fault_unless(str, "a str"),
    "score_tokens": _fault_of_tokens,
    "score_block": _fault_unless(int | float, "a number (float or int)"),
    # NaN may be the model's fault.
    "score_model": lambda result, *given: (
        None if isinstance(result, int | float) else "a number (float or int)"
    ),
    "score_experts": _fault_of_experts,
    "export": _fault_unless(str, "a str"),
    "load": _fault_unless(LoadedModel, "a LoadedModel"),
    "run": _fault_of_run,
}
"""By method: describes what it should have returned, if it returned something else."""


def _has_shape(result: Any, shape: Any) -> bool:
    from torch import Tensor

    return isinstance(result, Tensor) and result.shape == shape and not result.is_complex()


def _in_words(result: Any) -> str:
    if hasattr(result, "shape"):
        nan = (
            " with NaN or infinity"
            if hasattr(result, "isfinite") and not result.isfinite().all()
            else ""
        )
        dtype = str(result.dtype).removeprefix("torch.")
        return f"a {dtype} {type(result).__name__} of shape {(*result.shape,)}{nan}"
    return f"a list of {len(result)}" if isinstance(result, list) else repr(result)[:80]
