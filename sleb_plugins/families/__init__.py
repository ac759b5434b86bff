"""The model families that ship with `sleb`; every other one is read by its structure."""

from sleb_plugins.family import FamilyAdapter
from sleb_plugins.hookspecs import hookimpl

LLAMA = FamilyAdapter("llama", frozenset({"llama"}), blocks_path="model.layers")
OPT = FamilyAdapter("opt", frozenset({"opt"}), blocks_path="model.decoder.layers")


@hookimpl
def sleb_families() -> list[FamilyAdapter]:
    """Offer the families that ship with `sleb`."""
    return [LLAMA, OPT]
