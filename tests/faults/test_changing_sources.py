"""A model that changes while it is read: the change is named and nothing delivered, or it came too late to matter."""

import json
import os
import random
import re
import shutil
import signal
from collections import Counter

import pytest

from conftest import calibration
from faults.conftest import counts
from faults.program import STOP, Calls, Fault
from gguf_models import write_llama_gguf


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


def append(path):
    with path.open("ab") as file:
        file.write(b"\x00" * 100)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def remove(path):
    path.unlink()


def other_config(path):
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))


CHANGES = [edit, replace, append, truncate, remove, other_config]
COMMANDS = {
    "apply": ("apply", "plan.json", "-o", "new"),
    "apply gguf": ("apply", "../tiny.gguf", "--blocks", "2,3", "-o", "new.gguf"),
    "search": ("search", "../model", "--remove", 1, "--sample-tokens", 4, "-o", "new.json", "--batch-size", 1),
    "search streamed": ("search", "../model", "--remove", 1, "--sample-tokens", 4, "-o", "new.json", "--stream"),
    "search gguf": ("search", "../tiny.gguf", "--remove", 1, "--sample-tokens", 4, "-o", "new.json"),
    "eval": ("eval", "plan.json", "--perplexity", "../text.txt", "--sequence-length", 32, "--max-windows", 4,
             "-o", "new.json"),
}  # fmt: skip
NAMES_CHANGE = re.compile(r"^error: .*(changed while it was read|became shorter|cannot be read)", re.MULTILINE)


@pytest.fixture
def place(program, tiny_llama, text_file, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "given")
    (tmp_path / "text.txt").write_text("".join(text_file.read_text().splitlines(keepends=True)[:40]))
    write_llama_gguf(tmp_path / "given.gguf")
    (tmp_path / "begin").mkdir()
    shutil.copytree(tmp_path / "given", tmp_path / "model")
    run = program.run(
        "search", "../model", "--remove", 2, "-o", "plan.json", "--sample-tokens", 4, *text(), cwd=tmp_path / "begin"
    )
    assert run.exit_code == 0, run.stderr
    return tmp_path


def text():
    return calibration("../text.txt")


def begin(place):
    for name in ("work", "cache", "model"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "begin", place / "work")
    shutil.copytree(place / "given", place / "model")
    shutil.copy(place / "given.gguf", place / "tiny.gguf")


def words_of(name):
    return (*COMMANDS[name], *(text() if name.startswith("search") else ()))


def delivered(place):
    """Return the bytes of what was delivered, and None if nothing was."""
    files = {
        str(path.relative_to(place)): re.sub(rb'"(started|seconds)": .*', b"", path.read_bytes())
        for path in sorted((place / "work").rglob("*"))
        if path.is_file() and "new" in str(path.relative_to(place / "work")) and ".journal" not in path.name
    }
    return files or None


@counts(2, 40)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_made_of_files_that_changed_is_not_delivered(program, place, name, count, tried):
    environment = {"SLEB_CACHE": str(place / "cache")}
    words = words_of(name)
    source = place / ("tiny.gguf" if "gguf" in name else "model/model.safetensors")
    changes = [change for change in CHANGES if "gguf" not in name or change is not other_config]

    def run(**options):
        return program.run(*words, cwd=place / "work", environment=environment, **options)

    begin(place)
    undisturbed = run(fault=Fault(place))
    whole = delivered(place)
    assert whole, undisturbed.stderr
    reads = [number for number, line in enumerate(undisturbed.calls, start=1) if f"/{source.name}" in line]
    last = len(undisturbed.calls)
    rng = random.Random(name)
    rng.shuffle(changes)
    ends = Counter()
    for number in range(count):
        change = changes[number % len(changes)]
        # Most changes come just before the file is read once more, after its fingerprint was taken.
        at = rng.randint(reads[0], last) if number % 3 == 2 else rng.choice(reads[len(reads) // 2 :])
        case = f"{change.__name__} at call {at} of {last}: {undisturbed.calls[at - 1]}"
        begin(place)
        running = program.start(
            *words, cwd=place / "work", environment=environment, fault=Fault(place, at, STOP, Calls.ALL)
        )
        assert running.wait_until_stopped(), case
        change(source)
        running.send(signal.SIGCONT)
        finished = running.wait()
        ends[f"{change.__name__}: {finished.exit_code}"] += 1
        found = delivered(place)
        if finished.exit_code == 0:
            begun_later = None
            if found != whole:  # it only began to read when the file had changed
                shutil.rmtree(place / "work")
                shutil.copytree(place / "begin", place / "work")
                run()
                begun_later = delivered(place)
            assert found in (whole, begun_later), f"{case}: {finished.stderr}"
            continue
        assert found is None, f"{case}: {list(found)} {finished.stderr}"
        if change is truncate and finished.exit_code == -signal.SIGBUS:  # a mapped file, of which a part is gone
            continue
        assert finished.exit_code in (3, 4), f"{case}: {finished.exit_code} {finished.stderr}"
        assert "Traceback" not in finished.stderr, f"{case}: {finished.stderr}"
        assert len(re.findall("^error: ", finished.stderr, re.MULTILINE)) == 1, f"{case}: {finished.stderr}"
        begin(place)
    print(f"\n{name}: {dict(ends)}")
    tried("sources that change under a run", count)


def test_a_text_is_read_once_so_a_later_change_is_no_change(program, place):
    begin(place)
    words = words_of("search")
    undisturbed = program.count(*words, cwd=place / "work", fault=Fault(place))
    whole = delivered(place)
    last_read = max(number for number, line in enumerate(undisturbed.calls, start=1) if "/text.txt" in line)
    begin(place)
    running = program.start(*words, cwd=place / "work", fault=Fault(place, last_read + 1, STOP))
    assert running.wait_until_stopped()
    (place / "text.txt").write_text("Something else.\n" * 400)
    running.send(signal.SIGCONT)
    assert running.wait().exit_code == 0
    assert delivered(place) == whole
