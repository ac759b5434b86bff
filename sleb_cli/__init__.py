"""The `sleb` program, and its commands as functions; `show_progress` gives these a listener."""

from typing import TYPE_CHECKING, Any

from sleb_cli.version import __version__

if TYPE_CHECKING:
    from sleb_cli.api import apply, bench, evaluate, export, search
    from sleb_cli.requests import (
        ApplyRequest,
        BenchRequest,
        EvalRequest,
        ExportRequest,
        SearchRequest,
    )
    from sleb_cli.ui.progress import show_progress

__all__ = [
    "ApplyRequest",
    "BenchRequest",
    "EvalRequest",
    "ExportRequest",
    "SearchRequest",
    "__version__",
    "apply",
    "bench",
    "evaluate",
    "export",
    "search",
    "show_progress",
]


def __getattr__(name: str) -> Any:
    """Import functions and requests when they are first used: `sleb --help` needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "show_progress":
        from sleb_cli.ui.progress import show_progress

        return show_progress
    from sleb_cli import api, requests

    return getattr(requests if name.endswith("Request") else api, name)
