"""Show the result of `sleb plugins`."""

from typing import Any

from sleb_cli.plugin_manager import Offer, Registry
from sleb_cli.tables.table import Column, tabulate
from sleb_cli.ui.console import print_json, print_warning
from sleb_cli.ui.tables import show_table
from sleb_plugins import FamilyAdapter


def show_plugins(registry: Registry, *, as_json: bool) -> None:
    """List every offer with its package; in JSON, also each plugin that failed to load."""
    if as_json:
        print_json(_to_data(registry))
        return
    columns: list[Column] = [
        ("kind", str),
        ("name", str),
        ("what", str),
        ("package", str),
        ("version", str),
    ]
    rows = []
    for offer in registry.offers:
        plugin = offer.plugin
        what = _describe(offer.value)
        rows.append([offer.kind, _usage(offer), what, plugin.package, plugin.version])
    show_table(tabulate("", columns, rows), title=False)
    for collision in registry.collisions:
        print_warning(collision)


def _to_data(registry: Registry) -> dict[str, Any]:
    offers = []
    for offer in registry.offers:
        offers.append(
            {
                "kind": offer.kind,
                "name": offer.name,
                "argument": _argument(offer),
                "what": _describe(offer.value),
                "package": offer.plugin.package,
                "version": offer.plugin.version,
            }
        )
    failures = []
    for failure in registry.failures:
        failures.append(
            {
                "plugin": failure.plugin.module,
                "package": failure.plugin.package,
                "version": failure.plugin.version,
                "reason": failure.reason,
            }
        )
    return {"offers": offers, "failures": failures, "collisions": list(registry.collisions)}


def _argument(offer: Offer) -> str:
    return offer.value.argument if offer.kind == "metric" else ""


def _usage(offer: Offer) -> str:
    argument = _argument(offer)
    if not argument:
        return offer.name
    if argument.startswith("["):  # optional: random[:SEED]
        return f"{offer.name}[:{argument[1:]}"
    return f"{offer.name}:{argument}"


def _describe(value: Any) -> str:
    if isinstance(value, FamilyAdapter):
        if value.refusal:
            return f"refused, because {value.refusal}"
        return ", ".join(sorted(value.model_types))
    return value.description if value else "transformers, without a plugin; the default"
