"""Show the result of `sleb plugins`."""

from typing import Any

from sleb_cli.plugin_manager import Registry
from sleb_cli.tables.table import Columns, tabulate
from sleb_cli.ui.console import print_json, print_warning
from sleb_cli.ui.tables import show_table
from sleb_plugins import FamilyAdapter


def show_plugins(registry: Registry, *, as_json: bool) -> None:
    """List every offer with its package; in JSON, also each plugin that failed to load."""
    if as_json:
        failures = [
            {"plugin": failure.plugin.module, "package": failure.plugin.package, "version": failure.plugin.version,
             "reason": failure.reason}
            for failure in registry.failures
        ]  # fmt: skip
        print_json(
            {
                "offers": _offers(registry),
                "failures": failures,
                "collisions": list(registry.collisions),
            }
        )
        return
    rows = [
        [row["kind"], _usage(row), row["what"], row["package"], row["version"]]
        for row in _offers(registry)
    ]
    columns: Columns = [(name, str) for name in ("kind", "name", "what", "package", "version")]
    show_table(tabulate("", columns, rows), title=False)
    for collision in registry.collisions:
        print_warning(collision)


def _offers(registry: Registry) -> list[dict[str, str]]:
    return [
        {
            "kind": offer.kind,
            "name": offer.name,
            "argument": offer.value.argument if offer.kind == "metric" else "",
            "what": _describe(offer.value),
            "package": offer.plugin.package,
            "version": offer.plugin.version,
        }
        for offer in registry.offers
    ]


def _usage(offer: dict[str, str]) -> str:
    name, argument = offer["name"], offer["argument"]
    if argument.startswith("["):  # optional: random[:SEED]
        return f"{name}[:{argument[1:]}"
    return f"{name}:{argument}" if argument else name


def _describe(offer: Any) -> str:
    if isinstance(offer, FamilyAdapter):
        return (
            f"refused, because {offer.refusal}"
            if offer.refusal
            else ", ".join(sorted(offer.model_types))
        )
    return offer.description if offer else "transformers, without a plugin; the default"
