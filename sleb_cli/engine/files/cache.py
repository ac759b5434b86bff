"""The cache of models that were downloaded or converted."""

import math
import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from sleb_cli.atomic import Claim, claim, publish, remove_leftovers_of, scratch_folder, writing

_ELSEWHERE = "Choose another place for the cache with the environment variable SLEB_CACHE."


def cache_root() -> Path:
    """Return the user's cache folder for `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("sleb")


def existing_cache() -> Path:
    """Return the cache folder; it is made if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    root = cache_root()
    with writing(root, hint=_ELSEWHERE):
        root.mkdir(parents=True, exist_ok=True)
    return root


def scratch_in_cache(name: str) -> Claim:
    """Return a hidden folder in the cache, for temporary files as large as models.

    Raises:
        OutputError: it cannot be made.
    """
    with writing(root := existing_cache(), hint=_ELSEWHERE):
        return scratch_folder(root, name)


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `fill` it first, completely or not at all."""
    folder = cache_root() / name
    remove_leftovers_of(folder)
    if not folder.is_dir():
        with writing(folder, hint=_ELSEWHERE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # What another process is filling is waited for.
            with claim(folder, patience=math.inf) as place:
                if not folder.is_dir():
                    aside = place / name
                    aside.mkdir()
                    fill(aside)
                    publish(aside, folder)
    return folder
