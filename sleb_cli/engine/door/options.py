"""Options that only work with others, or only without them."""

from __future__ import annotations

from collections.abc import Sequence

from sleb_cli.requests import AUTO, ApplyRequest, EvalRequest, SearchRequest, SubjectRequest
from sleb_plugins import UsageError

Needs = dict[tuple[str, ...], tuple[str, ...]]
"""Options that do nothing without one of others."""


def first_given(request: SubjectRequest, names: Sequence[str]) -> str | None:
    """Return the first of these options that the user gave."""
    unset = type(request)()
    given = (name for name in names if getattr(request, name) != getattr(unset, name))
    return next((f"--{name.replace('_', '-')}" for name in given), None)


def require_what_they_need(request: SubjectRequest, needs: Needs) -> None:
    """Check that options which do nothing without one of others have one.

    Raises:
        UsageError: one has not.
    """
    for names, needed in needs.items():
        if (given := first_given(request, names)) and not first_given(request, needed):
            options = " or ".join(f"--{name}" for name in needed)
            raise UsageError(f"{given} requires {options}.", hint=f"Use both, or leave out {given}.")


def require_one_placement(request: SearchRequest | ApplyRequest | EvalRequest) -> None:
    """Check that --device-map is not combined with another option that places the model.

    Raises:
        UsageError: it is.
    """
    if request.device_map is None:
        return
    if request.stream:
        raise UsageError(
            "--device-map and --stream cannot be combined: each runs a model that does not fit.",
            hint="Use one of them: --stream reads each block once a step, a device map once a pass.",
        )
    if request.device not in (None, AUTO):
        raise UsageError("--device-map chooses the devices, so --device does not apply.", hint="Leave out one of them.")
