"""The cache of models that were downloaded or converted."""

import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from sleb_cli.atomic import new_folder, writing


def cache_root() -> Path:
    """Return the user's cache folder for `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("sleb")


def existing_cache() -> Path:
    """Return the cache folder, for temporary files as large as models; it is made if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    root = cache_root()
    with writing(root, hint="Choose another place for the cache with the environment variable SLEB_CACHE."):
        root.mkdir(parents=True, exist_ok=True)
    return root


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `fill` it first, completely or not at all."""
    folder = cache_root() / name
    if not folder.is_dir():
        with writing(folder, hint="Choose another place for the cache with the environment variable SLEB_CACHE."):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # If two processes fill it at the same time, the later one replaces the same content.
            with new_folder(folder, replace=True) as aside:
                fill(aside)
    return folder
