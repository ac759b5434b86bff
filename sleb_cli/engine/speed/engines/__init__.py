"""The inference engines that ship with `sleb`, besides transformers, which is built in."""

from sleb_cli.engine.speed.engines.llama_cpp import LlamaCpp
from sleb_cli.engine.speed.engines.vllm import Vllm
from sleb_plugins.engine import Engine
from sleb_plugins.hookspecs import hookimpl


@hookimpl
def sleb_engines() -> list[Engine]:
    """Offer the engines that ship with `sleb`."""
    return [LlamaCpp(), Vllm()]
