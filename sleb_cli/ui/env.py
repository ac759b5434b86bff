"""Show the result of `sleb env`, as text that can be pasted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sleb_cli.ui.tables import print_to_copy
from sleb_cli.units import format_bytes, plural

if TYPE_CHECKING:
    from sleb_cli.results import EnvResult


def show_environment(result: EnvResult) -> None:
    """Print one line for each part, its name first."""
    lines = list(_lines(result))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print_to_copy(f"{name:{width}}  {value}")


def _lines(result: EnvResult) -> Iterator[tuple[str, str]]:
    yield "sleb", result.sleb_version
    yield "python", result.python
    yield from ((name, version or "not installed") for name, version in result.packages.items())
    yield "platform", result.platform
    yield "processor", result.processor + (f" ({result.instructions})" if result.instructions else "")
    for own, computed in result.auto.items():
        yield f"{own} models", f"{computed} (no {own} units)" if computed != own else own
    threads = f", {plural(result.threads, 'thread')} used" if result.threads else ""
    yield "cores", f"{result.cores}{threads}"
    for each in result.accelerators:
        yield each.device, f"{each.name}, {format_bytes(each.free_bytes)} free of {format_bytes(each.memory_bytes)}"
    if not result.accelerators:
        yield "accelerators", "none"
    yield "memory", f"{_bytes(result.free_bytes)} free of {_bytes(result.memory_bytes)}"
    yield "cache", f"{result.cache or '?'} ({_bytes(result.cache_bytes)})"
    yield "plugins", ", ".join(f"{name} {version}" for name, version in result.plugins.items()) or "none"
    yield from (("failed plugin", each) for each in result.failed)
    yield from (("problem", each) for each in result.problems)


def _bytes(count: int | None) -> str:
    return "?" if count is None else format_bytes(count)
