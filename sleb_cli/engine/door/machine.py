"""Options that say where a model runs."""

from __future__ import annotations

from sleb_cli.requests import AUTO, ApplyRequest, EvalRequest, SearchRequest
from sleb_plugins import UsageError


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
