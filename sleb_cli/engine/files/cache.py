"""The cache: models that were downloaded or converted, and files that save work done before."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from sleb_cli.atomic import held, new_file, publish, remove_leftovers, remove_leftovers_of, scratch_folder, writing
from sleb_cli.engine.files.copying import local_path
from sleb_cli.events import Notice, Notify
from sleb_plugins import OutputError

_ELSEWHERE = "Set the environment variable SLEB_CACHE to another folder."


def cache_root() -> Path:
    """Return the user's cache folder for `sleb`; the environment variable SLEB_CACHE overrides it."""
    chosen = os.environ.get("SLEB_CACHE")
    return local_path(chosen).absolute() if chosen else user_cache_path("sleb")


def existing_cache() -> Path:
    """Return the cache folder; it is made if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    root = cache_root()
    with writing(root, hint=_ELSEWHERE):
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextmanager
def scratch_in_cache(name: str) -> Iterator[Path]:
    """Yield a hidden folder in the cache, for temporary files as large as models.

    Raises:
        OutputError: it cannot be made.
    """
    with ExitStack() as stack:
        with writing(root := existing_cache(), hint=_ELSEWHERE):
            folder = stack.enter_context(scratch_folder(root, name))
        yield folder


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `fill` it first, completely or not at all."""
    folder = cache_root() / name
    remove_leftovers_of(folder)
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


class KeptFiles:
    """Files in one folder of the cache, each under a hash of all that its content depends on. They only save time.

    `what` names them in the sentence that says, once, that they cannot be written.
    """

    def __init__(self, folder: str, what: str, notify: Notify, *, can_write: bool = True) -> None:
        self._folder, self._what, self._notify, self._can_write = cache_root() / folder, what, notify, can_write
        remove_leftovers(self._folder)

    def read(self, key: Mapping[str, Any]) -> bytes | None:
        """Return the content that is kept under this key, if any."""
        try:
            return self._path(key).read_bytes()
        except OSError:
            return None

    def write(self, key: Mapping[str, Any], content: bytes) -> None:
        """Keep the content under this key, if the cache can be written."""
        if not self._can_write:
            return
        path = self._path(key)
        try:
            with writing(path, hint=_ELSEWHERE):
                path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as aside:
                aside.write_bytes(content)
        except OutputError as error:
            self._can_write = False
            self._notify(Notice(f"{self._what} not cached: {error.message}"))

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
