"""A model that changes while it is read: the change is named and nothing delivered, or it came too late to matter."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from faults.conftest import counts
from faults.place import COMMANDS, delivered
from faults.program import STOP, Fault, require


def edit(path):
    """Change a quarter of the bytes in place, without a change of size."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size * 2 // 3)
        file.write(bytes(size // 4))


def replace(path):
    """Put another file in its place, as programs do that save models."""
    aside = path.with_name("aside")
    shutil.copy(path, aside)
    edit(aside)
    aside.replace(path)


def other_config(path):
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))


CHANGES = {
    "edit": edit,
    "replace": replace,
    "append": lambda path: path.write_bytes(path.read_bytes() + b"\x00" * 100),
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "remove": Path.unlink,
    "other config": other_config,
}


def changed_at(place, name, at, change):
    """Run a command, do something at this call, and return how it ended."""
    place.reset()
    (running,) = place.launch(COMMANDS[name], fault=Fault(place.folder, at, STOP))
    return running.when_stopped(change)


@counts(2, 40)
@pytest.mark.parametrize("name", ["apply", "apply gguf", "search", "search --stream", "search gguf", "eval"])
def test_what_was_made_of_files_that_changed_is_not_delivered(place, name, count, tried):
    command, (calls, whole) = COMMANDS[name], place.undisturbed(name)
    source = place.folder / ("tiny.gguf" if "gguf" in name else "model/model.safetensors")
    changes = [change for change in CHANGES if "gguf" not in name or change != "other config"]
    reads = [at for at, call in enumerate(calls, start=1) if f"/{source.name}" in call.path]
    rng = random.Random(name)
    rng.shuffle(changes)
    for number in range(count):
        change = changes[number % len(changes)]
        # Most changes come just before the file is read once more, after its fingerprint was taken.
        at = rng.randint(reads[0], len(calls)) if number % 3 == 2 else rng.choice(reads[len(reads) // 2 :])
        finished = changed_at(place, name, at, lambda change=change: CHANGES[change](source))
        found, case = delivered(command, place.files()), (change, calls[at - 1], finished.stderr)
        if finished.exit_code:
            assert found == delivered(command, place.start), case
            if change != "truncate" or finished.exit_code != -signal.SIGBUS:  # a mapped file, of which a part is gone
                require(finished, (3, 4))
        elif found != delivered(command, whole):  # it only began to read when the file had changed
            shutil.rmtree(place.work)
            shutil.copytree(place.folder / "begin", place.work)
            place.run(*command.words)
            assert found == delivered(command, place.files()), case
    tried("sources that change under a run", count)


def test_a_text_is_read_once_so_a_later_change_is_no_change(place):
    calls, whole = place.undisturbed("search")
    last_read = max(at for at, call in enumerate(calls, start=1) if "/text.txt" in call.path)
    text = place.folder / "text.txt"
    require(changed_at(place, "search", last_read + 1, lambda: text.write_text("Something else.\n" * 400)))
    assert place.files() == whole
