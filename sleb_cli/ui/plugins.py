"""Load the plugins, with a warning for each broken one; show the result of `sleb plugins`."""

from typing import Any

from rich.markup import escape

from sleb_cli.plugin_manager import Registry
from sleb_cli.ui.console import print_json, print_note, print_warning, stdout
from sleb_cli.ui.tables import FittingTable
from sleb_plugins import FamilyAdapter


def show_loading(others: str) -> None:
    """Say whose code runs next, if any."""
    if others:
        print_note(others)


def show_plugins(registry: Registry, *, as_json: bool) -> None:
    """List every offer with its package, then each plugin that failed and why."""
    if as_json:
        print_json(_as_data(registry))
        return
    columns = ("kind", "name", "what", "package", "version")
    table = FittingTable(header_style="bold")
    table.optional = ("version", "package")
    for column in columns:
        table.add_column(column, no_wrap=column != "what")
    for row in _as_data(registry)["offers"]:
        shown = row | {"name": _usage(row)}
        table.add_row(*(escape(shown[key]) for key in columns))
    stdout().print(table)
    for failure in registry.failures:
        print_warning(f"The plugin {failure.plugin} failed to load: {failure.reason}.")
    for collision in registry.collisions:
        print_warning(collision)


def _as_data(registry: Registry) -> dict[str, Any]:
    offers = [
        {
            "kind": offer.kind,
            "name": offer.name,
            "argument": offer.value.argument if offer.kind == "metric" else "",
            "what": _family(offer.value) if offer.kind == "family" else offer.value.description,
            "package": offer.plugin.package,
            "version": offer.plugin.version,
        }
        for offer in registry.offers
    ]
    failures = [
        {
            "plugin": failure.plugin.module,
            "package": failure.plugin.package,
            "version": failure.plugin.version,
            "reason": failure.reason,
        }
        for failure in registry.failures
    ]
    return {"offers": offers, "failures": failures, "collisions": list(registry.collisions)}


def _usage(offer: dict[str, Any]) -> str:
    """Return the name with its argument, if it takes one: random[:SEED], task:TASK."""
    name, argument = offer["name"], offer["argument"]
    if argument.startswith("["):
        return f"{name}[:{argument[1:]}"
    return f"{name}:{argument}" if argument else f"{name}"


def _family(adapter: FamilyAdapter) -> str:
    if adapter.refusal:
        return f"refused, because {adapter.refusal}"
    return ", ".join(sorted(adapter.model_types))
