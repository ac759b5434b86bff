"""Where models made ready once are kept for the next time."""

import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from sleb_cli.atomic import new_folder, writing


def cache_root() -> Path:
    """Give the user's cache folder for `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("sleb")


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Give the cached folder `name`, filled first where it is missing; a killed fill leaves nothing behind it."""
    folder = cache_root() / name
    if not folder.is_dir():
        with writing(folder, hint="Choose another place for the cache with the environment variable SLEB_CACHE."):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may fill it at once: the later one replaces equal with equal.
            with new_folder(folder, replace=True) as aside:
                fill(aside)
    return folder
