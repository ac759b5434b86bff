"""Errors of plugins name the plugin.

The methods that `sleb_plugins` asks plugins for are called through `_Call`. What they raise, or
return by mistake, becomes a `PluginError`.
"""

import math
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar

from sleb_cli.processes import Terminated
from sleb_plugins import (
    ExpertUse,
    FamilyAdapter,
    LoadedModel,
    Metric,
    PluginError,
    SlebError,
    TimedRun,
)
from sleb_plugins.errors import is_out_of_memory

T = TypeVar("T")

REPORT = "Report it to the plugin's author."

_METHODS = (
    # Metrics.
    "with_argument", "fingerprint", "score_tokens", "score_block", "score_model", "score_experts",
    "export",  # exporters
    "version", "load", "run", "close",  # engines, and the models that they load
)  # fmt: skip

_NUMBER = "a number (float or int)"
_RETURNED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "with_argument": (Metric, "a metric"),
    "fingerprint": (str, "a str"),
    "score_block": ((int, float), _NUMBER),
    "score_model": ((int, float), _NUMBER),
    "export": (str, "a str"),
    "load": (LoadedModel, "a LoadedModel"),
}
"""The type that a method returns, and its name in errors."""


def blame(offer: T, who: str) -> T:
    """Return a copy of a plugin's offer whose errors name `who`."""
    if isinstance(offer, FamilyAdapter):
        pruners = {key: _Call(who, pruner) for key, pruner in offer.config_keys.items()}
        return replace(offer, config_keys=pruners)
    # The calls are bound to the original, so a plugin never meets them in its own object: it may
    # copy that, and catch what its methods raise.
    return _with_calls(copy(offer), offer, who)


def _with_calls(stand_in: T, offer: T, who: str) -> T:
    for name in _METHODS:
        if hasattr(offer, name):
            object.__setattr__(stand_in, name, _Call(who, getattr(offer, name), name))
    return stand_in


@dataclass(frozen=True)
class _Call:
    """A function of a plugin; `name` is its method's, if it is one."""

    who: str
    function: Callable[..., Any]
    name: str = ""

    def __call__(self, *given: Any) -> Any:
        try:
            result = self._result(given)
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:  # a plugin may call sys.exit
            if isinstance(error, SlebError) or is_out_of_memory(error):
                raise
            raise PluginError(f"{self.who} raised {_describe(error)}.", hint=REPORT) from error
        needed = _needed_instead(self.name, result, given)
        if needed:
            returned = _in_words(result)
            raise PluginError(
                f"{self.who} returned {returned} from {self.name}, not {needed}.", hint=REPORT
            )
        if isinstance(result, Metric):
            return blame(result, self.who)
        if isinstance(result, LoadedModel):
            return _with_calls(result, result, self.who)
        return result

    def _result(self, given: tuple[Any, ...]) -> Any:
        if not self.name.startswith("score_"):
            return self.function(*given)
        # The engine goes on with what it gave, whatever the plugin writes into its copies.
        copies = map(_copy, given)
        return _readable(self.function(*copies))


def _copy(value: Any) -> Any:
    """Copy tensors, but no model or block, which would take its memory twice."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, ExpertUse):
        return deepcopy(value)
    return value


def _readable(scores: Any) -> Any:
    """Return scores as the engine computes with them: neither sparse nor booleans."""
    import torch

    if not isinstance(scores, torch.Tensor):
        return scores
    dense = scores.to_dense()
    return dense.float() if dense.dtype is torch.bool else dense


def _describe(error: BaseException) -> str:
    """Name an error and the last line of the plugin's own file that led to it."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
    frames = extract_tb(error.__traceback__)[2:]  # the first two are ours
    if not frames:
        return words
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{words} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def _needed_instead(name: str, result: Any, given: tuple[Any, ...]) -> str | None:
    """Describe what a method should have returned, if it returned something else."""
    if name in _RETURNED:
        kind, words = _RETURNED[name]
        if name == "export" and given[0].output:
            kind, words = (str, bytes), "a str or bytes"  # a file may hold what no terminal shows
        # The NaN of a whole model may be the model's fault.
        is_nan = name == "score_block" and result != result
        if isinstance(result, str) and result != result.encode(errors="replace").decode():
            return "text of whole characters"
        return None if isinstance(result, kind) and not is_nan else words
    if name == "score_tokens":
        return _needed_tokens(result, given)
    if name == "score_experts":
        shape = given[0].tokens.shape
        if _has_shape(result, shape) and result.isfinite().all():
            return None
        return f"a finite number for each expert: a tensor of shape {(*shape,)}"
    if name == "run":
        return _needed_run(result, given[1])
    return None


def _needed_tokens(result: Any, given: tuple[Any, ...]) -> str | None:
    from torch import Tensor

    shape = given[0].shape[:-1]
    if _has_shape(result, shape):
        # NaN is only the plugin's fault if the model itself computed finite numbers.
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not result.isnan().any() or not all(tensor.isfinite().all() for tensor in tensors):
            return None
    return f"a number for each position: a tensor of shape {(*shape,)}"


def _needed_run(result: Any, new_tokens: int) -> str | None:
    if isinstance(result, TimedRun) and new_tokens in (0, len(result.token_seconds)):
        times = (result.seconds, *result.token_seconds)
        are_times = all(
            isinstance(seconds, int | float) and 0 <= seconds < math.inf for seconds in times
        )
        if are_times and result.seconds > 0:
            return None
    return f"a TimedRun of more than 0 seconds, with {new_tokens} token_seconds"


def _has_shape(result: Any, shape: Any) -> bool:
    from torch import Tensor

    return isinstance(result, Tensor) and result.shape == shape and not result.is_complex()


def _in_words(result: Any) -> str:
    if isinstance(result, list):
        return f"a list of {len(result)}"
    if not hasattr(result, "shape"):
        return repr(result)[:80]
    dtype = str(result.dtype).removeprefix("torch.")
    words = f"a {dtype} {type(result).__name__} of shape {(*result.shape,)}"
    if hasattr(result, "isfinite") and not result.isfinite().all():
        words += " with NaN or infinity"
    return words
