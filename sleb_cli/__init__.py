"""The `sleb` program, and its commands as functions; `show_progress` gives these a listener."""

from typing import TYPE_CHECKING, Any

from sleb_cli.version import __version__

if TYPE_CHECKING:
    from sleb_cli.api import apply, bench, evaluate, export, search
    from sleb_cli.plan import Plan, read_plan
    from sleb_cli.requests import (
        ApplyRequest,
        BenchRequest,
        EvalRequest,
        ExportRequest,
        SearchRequest,
    )
    from sleb_cli.results import ApplyResult, BenchResult, EvalResult, ExportResult, GgufResult
    from sleb_cli.ui.progress import show_progress

__all__ = [
    "ApplyRequest",
    "ApplyResult",
    "BenchRequest",
    "BenchResult",
    "EvalRequest",
    "EvalResult",
    "ExportRequest",
    "ExportResult",
    "GgufResult",
    "Plan",
    "SearchRequest",
    "__version__",
    "apply",
    "bench",
    "evaluate",
    "export",
    "read_plan",
    "search",
    "show_progress",
]


if not TYPE_CHECKING:  # or a type checker would take any name

    def __getattr__(name: str) -> Any:
        """Import what is used when it is first used: `sleb --help` needs none of it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"sleb_cli.{_room_of(name)}"), name)


def _room_of(name: str) -> str:
    if name in ("Plan", "read_plan"):
        return "plan"
    if name == "show_progress":
        return "ui.progress"
    if name.endswith("Request"):
        return "requests"
    return "results" if name.endswith("Result") else "api"
