"""The keys by which saved numbers are found again: all that they depend on."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from sleb_cli.version import __version__

Key = Mapping[str, Any]


def key_of(
    model: Mapping[str, str | None],
    *,
    dtype: str,
    device: str,
    versions: Mapping[str, str] | None = None,
    **depends: Any,
) -> Key:
    """Return the key of numbers computed with a model.

    Args:
        model: hashes of the files that decide a number.
        dtype: the data type of the computation.
        device: the kind of device: cpu, cuda.
        versions: of sleb, torch and transformers; the installed ones by default.
        **depends: whatever else changes the numbers, as JSON.
    """
    installed = {
        "sleb": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return {
        "versions": versions or installed,
        "model": model,
        "dtype": dtype,
        "device": device,
        **depends,
    }


def name_of(key: Key) -> str:
    """Return 64 hexadecimal digits for a key, to name files."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
