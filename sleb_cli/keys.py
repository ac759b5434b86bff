"""The keys of what is kept and found again: all that it depends on, put together here and nowhere else."""

from __future__ import annotations

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
    """Return the key of what is computed of a model.

    Args:
        model: hashes of its files that decide a number.
        dtype: the data type it is computed in.
        device: the kind of device: cpu, cuda.
        versions: those of sleb, torch and transformers, if they are not the installed ones.
        **depends: whatever else another value of would give another result, as JSON holds it.
    """
    installed = {"sleb": __version__, "torch": version("torch"), "transformers": version("transformers")}
    return {"versions": versions or installed, "model": model, "dtype": dtype, "device": device, **depends}


def name_of(key: Key) -> str:
    """Return 64 hexadecimal digits that stand for a key, in the names of files."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
