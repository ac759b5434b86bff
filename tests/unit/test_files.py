"""Files that appear whole or not at all; shards; fingerprints."""

import errno
import hashlib
import json
import os
import random
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sleb_cli import atomic
from sleb_cli.atomic import (
    claimed,
    lock_folder,
    new_file,
    remove_leftovers,
    require_new_file,
    write_text,
)
from sleb_cli.engine.files.copying import links_outside
from sleb_cli.engine.files.fingerprint import fingerprint_samples
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.third_party import saving
from sleb_cli.records import same_fingerprint
from sleb_plugins import ModelError, OutputError


def write_claimed(path, text):
    with claimed(path, replace=True) as aside:
        aside.write_text(text)


def test_a_file_is_written_whole_and_alone(tmp_path):
    (tmp_path / "b").write_text("one")
    for text in ("one", "two"):
        write_text(tmp_path / "a", text)
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    for text in ("one", "two"):
        with claimed(tmp_path / "a", replace=True) as aside:
            aside.mkdir()
            (aside / "x").write_text(text)
    for name in ("a", "b"):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path / name, replace=True) as aside:
            aside.mkdir()
            (aside / "x").touch()
            raise ZeroDivisionError
    assert (tmp_path / "a" / "x").read_text() == "two"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("force", [False, True])
def test_devices_and_pipes_are_never_replaced(tmp_path, force):
    os.mkfifo("pipe")
    Path("device").symlink_to("/dev/null")
    Path("stdout").symlink_to("/proc/self/fd/1")
    for name in ("pipe", "device", "stdout"):
        for write in (require_new_file, lambda path, force: write_text(path, "new")):
            with pytest.raises(OutputError, match="is a device, a pipe or a socket") as caught:
                write(tmp_path / name, force=force)
            assert "--force" not in caught.value.hint
    assert stat.S_ISFIFO(Path("pipe").lstat().st_mode)
    assert Path("device").readlink() == Path("/dev/null")
    assert sorted(os.listdir()) == ["device", "pipe", "stdout"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with (
        pytest.raises(OutputError, match="already exists"),
        new_file(tmp_path / "a", replace=False) as aside,
    ):
        aside.write_text("new")
        (tmp_path / "a").write_text("of someone else")
    assert (tmp_path / "a").read_text() == "of someone else"
    with pytest.raises(OutputError, match="already exists"), claimed(tmp_path / "b") as aside:
        aside.mkdir()
        (tmp_path / "b").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("clean_up", [lambda path: write_claimed(path, "new"), remove_leftovers])
@pytest.mark.parametrize("was_replacing", [False, True])
def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path, clean_up, was_replacing):
    folder = tmp_path / ".a.partial"
    (folder / "a").mkdir(parents=True)
    (tmp_path / ".a.partial.lock").touch()
    (folder / "a" / "half").write_text("half")
    if was_replacing:
        (tmp_path / ".a.partial.old").write_text("one")
    (tmp_path / ".a.b.partial.lock").touch()  # killed before it had a folder
    clean_up(tmp_path / "a")
    remove_leftovers(tmp_path / "a", ".*")
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files in ([{"a": "new"}, {"a": "one"}] if was_replacing else [{"a": "new"}, {}])


def test_a_place_that_another_process_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PATIENCE_SECONDS", 0.0)
    with lock_folder(tmp_path / "a") as folder:
        (folder / "a").write_text("half")
        remove_leftovers(tmp_path / "a")
        with pytest.raises(OutputError, match="Another sleb process is writing"):
            write_claimed(tmp_path / "a", "new")
        assert (folder / "a").read_text() == "half"
    assert os.listdir(tmp_path) == []


def test_links_and_folders_of_other_programs_are_never_emptied(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".a.partial").symlink_to(tmp_path / "precious")
    (tmp_path / ".a.partial.lock").touch()
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "of another program").touch()
    for name in ("a", "b"):
        remove_leftovers(tmp_path / name)
    with pytest.raises(OutputError, match=r"\.a\.partial is not a folder"):
        write_claimed(tmp_path / "a", "new")
    assert os.listdir(tmp_path / "precious") == ["file"]
    assert os.listdir(tmp_path / ".b.partial") == ["of another program"]


DECIDING = """generation_config.json tokenizer.json vocab.txt merges.txt spiece.model qwen.tiktoken
    bpe.codes additional_chat_templates/tool.jinja adapter_config.json model.py sub/more.py"""
BESIDE = """README.md log.txt plan.json plan.results/eval-0.json sleb_results/eval-0.json
    trainer_state.json t.py.old"""


@pytest.mark.parametrize("name", [*DECIDING.split(), *BESIDE.split()])
@pytest.mark.parametrize("trusted", [True, False])
def test_the_content_hash_covers_every_file_that_affects_results(tmp_path, name, trusted):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    sources = []
    hashes = set()
    for content in (None, "one", "three"):
        if content:
            (tmp_path / name).write_text(content)
        sources.append(ModelSource("m", tmp_path, trust_remote_code=trusted))
        hashes.add(sources[-1].content_hash)
    decides = name in DECIDING.split() and (trusted or not name.endswith(".py"))
    assert len(hashes) == (3 if decides else 1)
    assert len({source.fingerprint for source in sources}) == 1, "a plan stays that of this model"
    if decides:
        with pytest.raises(ModelError, match="changed while it was read"):
            sources[1].watch.require_unchanged()


@pytest.mark.parametrize("sizes", [(10, 3 * 2**20 + 7), (2**20,), (2**20 + 1,), (2**20 + 300_000,)])
def test_a_fingerprint_stays_so_that_plans_know_their_models(tmp_path, sizes):
    config = {"b": 1, "a": {"d": 2, "c": 3}}
    digest = hashlib.sha256(b'{"a": {"c": 3, "d": 2}, "b": 1}')
    paths = []
    for number, size in enumerate(sizes):
        content = random.Random(size).randbytes(size)
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(content)
        digest.update(b"%d.safetensors\0%d\0" % (number, size) + content[: 2**20])
        if size > 2**20:
            starts = [2**20 + (size - 2**20) * sample // 256 for sample in range(256)]
            digest.update(b"".join(content[start : start + 4096] for start in starts))
    config |= {"_name_or_path": "elsewhere", "transformers_version": "9"}
    assert fingerprint_samples(reversed(paths), config) == digest.hexdigest()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("changed", ["norm", "router", "first rows", "last rows", "inside"])
def test_a_fingerprint_knows_weights_that_no_sample_meets(tmp_path, kind, changed):
    # The first and the last mebibyte of a file are read whole; between, there are samples.
    first = torch.zeros(12, 2**17)
    norm = torch.ones(64)
    router = torch.zeros(8, 64)
    last = torch.zeros(12, 2**17)
    tensors = {"a": first, "norm": norm, "router": router, "z": last}

    def source():
        write = torch.save if kind.endswith(".bin") else save_file
        write(tensors, tmp_path / kind)
        (tmp_path / "config.json").write_text("{}")
        return ModelSource("m", tmp_path)

    before = source()
    known = (before.fingerprint, before.content_hash)
    places = {
        "norm": norm[5:6],
        "router": router[3],
        "first rows": last[0, 900:1000],
        "last rows": first[-1, -900:],
        "inside": last[1, 70_000:70_100],
    }
    places[changed].fill_(0.5)
    after = source()
    assert same_fingerprint(known[0], known[0].split("-")[0]), "an older plan knows its model"
    # A change inside a large tensor may lie between all samples; the time of change tells it.
    assert same_fingerprint(known[0], after.fingerprint) == (changed == "inside")
    assert after.content_hash != known[1]


@pytest.mark.parametrize(
    ("message", "maps"),
    [
        (
            "names a weight file outside its folder",
            [
                {"a": "../x"},
                {"a": "sub/../../x"},
                {"a": "away/x"},
                {"a": "link"},
                {"a": "/etc/passwd"},
                {"a": "a\0/b"},
            ],
        ),
        ("does not map tensors", [["x"], None, 3, "x", {"a": 1}, {"a": None}, {"a": ["x"]}]),
        ("File name too long", [{"a": "x" * 300}]),
        ("lacks 1 of its 2 weight files, such as no", [{"a": "sub/1.safetensors", "b": "no"}]),
        ("lists no weight files", [{}]),
    ],
)
def test_an_index_names_files_of_its_folder(tmp_path, message, maps):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    save_file({"a": torch.ones(1)}, folder / "sub" / "1.safetensors")
    (folder / "away").symlink_to(tmp_path)
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "2.safetensors").symlink_to("sub/1.safetensors")
    index = folder / "model.safetensors.index.json"
    for wrong in maps:
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ModelError, match=message):
            find_weights(folder)
    inside = {"a": "sub/1.safetensors", "b": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": inside}))
    assert find_weights(folder).tensor_names() == ["a"]


def test_links_that_lead_out_of_a_folder_are_found(tmp_path):
    folder = tmp_path / "snapshots" / "abc"
    alias = tmp_path / "alias"
    blobs = tmp_path / "blobs"
    folder.mkdir(parents=True)
    alias.symlink_to(folder)
    blobs.mkdir()
    for name, target, is_out in [
        ("blob", "../../blobs/x", False),
        ("inside", "sub/y", False),
        ("loop", "loop", False),
        ("up", "..", True),
        ("out", "../../private", True),
    ]:
        (folder / name).symlink_to(target)
        assert links_outside(folder / name, folder) is is_out
        assert links_outside(alias / name, alias) is is_out
    # As an archive may hold it: everything would be the cache's own.
    blobs.rmdir()
    blobs.symlink_to("/")
    assert links_outside(folder / "out", folder)


def test_a_failed_write_of_safetensors_is_an_error_of_the_output():
    with (
        pytest.raises(OutputError, match=r"Cannot write a: No space left \(os error 28\)\."),
        saving(Path("a")),
    ):
        raise SafetensorError("No space left (os error 28)")


@pytest.mark.parametrize(("code", "is_written"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_folders_is_no_obstacle(
    tmp_path, monkeypatch, code, is_written
):
    flush = os.fsync

    def refusing(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))
        flush(file)

    monkeypatch.setattr(os, "fsync", refusing)
    with nullcontext() if is_written else pytest.raises(OutputError):
        write_text(tmp_path / "a.txt", "words")
        with claimed(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / "b.txt").write_text("more")
        assert (tmp_path / "folder" / "b.txt").read_text() == "more"
