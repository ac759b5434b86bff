"""The cache: models that were downloaded or converted, and files that save work done before."""

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from sleb_cli.atomic import (
    lock_folder,
    new_file,
    publish,
    remove_leftovers,
    scratch_folder,
    writing,
)
from sleb_cli.events import Notice, Notify
from sleb_cli.keys import Key, name_of
from sleb_cli.names import local_path
from sleb_plugins import OutputError

_ELSEWHERE = "Set the environment variable SLEB_CACHE to another folder."


def cache_root() -> Path:
    """Return the cache folder of `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return local_path(chosen).absolute() if chosen else user_cache_path("sleb")


@contextmanager
def scratch_in_cache(name: str) -> Iterator[Path]:
    """Yield a hidden folder in the cache, for temporary files as large as models."""
    root = cache_root()
    with ExitStack() as stack:
        with writing(root, hint=_ELSEWHERE):
            root.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(root, name))
        yield folder


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `fill` it first, whole or not at all."""
    folder = cache_root() / name
    remove_leftovers(folder)
    if not folder.is_dir():
        with writing(folder, hint=_ELSEWHERE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Another process may be filling it, and be done when the wait ends.
            with lock_folder(folder, patience=math.inf) as scratch:
                if not folder.is_dir():
                    aside = scratch / name
                    aside.mkdir()
                    fill(aside)
                    publish(aside, folder)
    return folder


def read_cached(kind: str, key: Key) -> Any:
    """Read what `write_cached` saved under a key; None if it is missing or damaged."""
    with suppress(OSError, ValueError, EOFError, zlib.error):
        return json.loads(gzip.decompress(_cached(kind, key).read_bytes()))
    return None


def write_cached(kind: str, key: Key, content: Any, title: str, notify: Notify) -> None:
    """Save content that JSON can hold, called `title`; if the disk refuses, only say so."""
    file = _cached(kind, key)
    try:
        with writing(file, hint=_ELSEWHERE):
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as aside:
                aside.write_bytes(gzip.compress(json.dumps(content).encode(), 1, mtime=0))
    except OutputError as error:
        notify(Notice(f"Cannot cache {title}: {error.message}"))


def _cached(kind: str, key: Key) -> Path:
    return cache_root() / kind / f"{name_of(key)}.json.gz"
