"""The cache: models that were downloaded or converted, and files that save work done before."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from sleb_cli.atomic import held, publish, remove_leftovers, scratch_folder, write_text, writing
from sleb_cli.names import local_path

_ELSEWHERE = "Set the environment variable SLEB_CACHE to another folder."


def cache_root() -> Path:
    """Return the user's cache folder for `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return local_path(chosen).absolute() if chosen else user_cache_path("sleb")


@contextmanager
def scratch_in_cache(name: str) -> Iterator[Path]:
    """Yield a hidden folder in the cache, for temporary files as large as models.

    Raises:
        OutputError: it cannot be made.
    """
    root = cache_root()
    with ExitStack() as stack:
        with writing(root, hint=_ELSEWHERE):
            root.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(root, name))
        yield folder


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `fill` it first, completely or not at all."""
    folder = cache_root() / name
    remove_leftovers(folder)
    if not folder.is_dir():
        with writing(folder, hint=_ELSEWHERE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with held(folder, patience=math.inf) as place:
                if not folder.is_dir():
                    aside = place / name
                    aside.mkdir()
                    fill(aside)
                    publish(aside, folder)
    return folder


def write_cached(path: Path, content: str) -> None:
    """Write a file of the cache.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path, hint=_ELSEWHERE):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
