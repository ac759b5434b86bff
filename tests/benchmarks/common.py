"""What the benchmarks share: their options and their models."""

from __future__ import annotations

import argparse
from typing import Any

from sleb_cli.engine.device import CPU
from sleb_cli.engine.forward.placement import open_model, place_model
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.surgery.loading import Placement, load_tokenizer
from sleb_cli.engine.text.calibration import Calibration, calibrate
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins


def parser(doc: str | None, *places: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of these positional arguments, and of an option for each default, of its
    type.

    False makes a flag, and a list an option whose values are separated by commas.
    """
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for place in places:
        found.add_argument(place)
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            found.add_argument(flag, action="store_true")
        elif isinstance(default, list):
            kind = type(default[0])
            found.add_argument(
                flag, type=lambda text, kind=kind: [*map(kind, text.split(","))], default=default
            )
        else:
            found.add_argument(
                flag, type=type(default), default=default, help=f"default: {default}"
            )
    return found


def calibrated(name: str, text: str, samples: int, length: int) -> tuple[Any, Any, Calibration]:
    """Load the model of a benchmark and its blocks, and cut `text` into samples of this length."""
    quiet_libraries()
    architecture = architecture_of(name)
    computed = place_model(architecture, CPU, "auto", ignore, stream=False).dtype
    model = open_model(architecture, Placement(CPU, computed), ignore).model
    settings = resolve_calibration(architecture, text, samples, length, 0)
    (calibration,) = calibrate(
        [settings], load_tokenizer(architecture.source), lambda: model, ignore
    )
    return model, architecture.blocks_of(model), calibration


def architecture_of(model: object) -> Architecture:
    return read_architecture(locate_model(str(model), ignore), load_plugins(), ignore)
