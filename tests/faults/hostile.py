"""Commands on hostile files: each ends well, or with a sentence, within limits, and touches nothing
outside.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from faults.program import Finished, Program, wrong_ending

SECRET = b"canary-that-must-stay-where-it-is-"
"""What the files outside hold, so that it is found wherever it goes."""
MEMORY, SECONDS = 2 << 30, 10
OWN = {"SLEB_CACHE": "cache", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "code", "TMPDIR": "tmp"}
NEW = re.compile(rf"(\.?out|{'|'.join(OWN.values())})([./]|$)|(plan|own)\.results")
"""What a case may change, or make: its output, and folders of its own."""
PIPE = os.mkfifo
"""A content that is no file: a named pipe that nobody writes to."""


def _make_link(target: str, path: Path) -> None:
    path.symlink_to(target)


link = partial(partial, _make_link)
"""A content that is a symbolic link to a target."""


def run_case(
    program: Program, base: Path, words: tuple[Any, ...], files: Mapping[str, Any], **limits: Any
) -> Finished:
    """Run a command in a copy of `base` in which files are replaced by bytes, or by what makes
    them; None removes one.

    Raises:
        AssertionError: it did not end well, or changed or read what it must not.
    """
    place = Path(tempfile.mkdtemp(dir=base.parent.parent)) / "place"
    shutil.copytree(base, place, symlinks=True)
    for name, content in files.items():
        _write(place / name, content)
    for name in OWN.values():
        (place / name).mkdir()
    before = _content(place)
    environment = {name: place / value for name, value in OWN.items()}
    with _touched(place / "outside") as touched:
        ended = program.run(*words, cwd=place, environment=environment, memory=MEMORY,
                            **{"processor": SECONDS} | limits, codes=None)  # fmt: skip
        wrong = [f"touched outside: {each}" for each in touched()]
    shown, after = ended.stdout + ended.stderr, _content(place)
    wrong += wrong_ending(ended.exit_code, ended.stderr, range(10))
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    wrong += [f"{name} is new or another" for name in changed if not NEW.match(name)]
    wrong += [f"{name} holds what was outside" for name in changed if after.get(name) == "secret"]
    if re.search(
        r"[^\n\x20-\x7e\x85\xa0-\u2029\u2030-\u2065\u206a-\ud7ff\ue000-\U0010ffff]", shown
    ):
        wrong.append("control characters")
    if len(ended.stderr) > 5000 or SECRET.decode() in shown:
        wrong.append("too much is said")
    if ended.exit_code and (place / "out").exists():
        wrong.append("a checkpoint was left by a run that failed")
    assert not wrong, (wrong, str(words), str(files)[:3000], shown[-1500:])
    shutil.rmtree(place.parent)
    return ended


def _write(path: Path, content: Any) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)


def _content(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a folder, "secret" for one that holds the canary; links are
    not followed.
    """
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and path.stat().st_size <= 64 << 20:
            data = path.read_bytes()
            found[name] = "secret" if SECRET in data else hashlib.md5(data).hexdigest()
        else:
            found[name] = f"{path.stat().st_mode} {path.is_file() and path.stat().st_size}"
    return found


@contextlib.contextmanager
def _touched(folder: Path) -> Iterator[Callable[[], set[bytes]]]:
    """Ask the kernel which files of a folder are opened, read or changed, by whatever name and
    library.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    events = 0xFE7  # all but that a file was closed
    assert libc.inotify_add_watch(fd, os.fsencode(folder), events) >= 0, os.strerror(
        ctypes.get_errno()
    )

    def names() -> set[bytes]:
        with contextlib.suppress(BlockingIOError):
            return set(
                re.findall(rb"[\w.-]{3,}", os.read(fd, 1 << 20))
            )  # what lies there, between numbers
        return set()

    yield names
    os.close(fd)
