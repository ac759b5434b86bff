"""Files that appear whole or not at all; shards; fingerprints."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sleb_cli.atomic import new_folder, require_new_file, to_json, write_text
from sleb_cli.engine.files.copying import leads_out
from sleb_cli.engine.files.fingerprint import HEAD_BYTES, fingerprint_files
from sleb_cli.engine.files.weights import find_weights, read_json
from sleb_plugins import ModelError, OutputError


def test_a_file_is_written_whole_and_alone(tmp_path):
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "one"
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    write_text(tmp_path / "a", "one")
    (tmp_path / "b").write_text("one")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("place", "message"), [("no/a", "folder does not exist"), ("file/a", "not a folder"), (".", "is a folder")]
)
def test_a_place_that_cannot_be_written(tmp_path, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message):
        require_new_file(tmp_path / place, force=False)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as aside:
        (aside / "x").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    for text in ("one", "two"):
        with new_folder(tmp_path / "a", replace=True) as aside:
            (aside / "x").write_text(text)
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a", replace=True):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "x").read_text() == "two"
    assert os.listdir(tmp_path) == ["a"]


def test_json_is_readable_and_equal():
    data = {"a": [1, 2], "b": {"1": 0.5, "2": 1.5}, "c": {"x": "é", "y": []}, "d": [{"e": {}}], "f": None}
    text = to_json(data)
    assert json.loads(text) == data
    assert text.startswith('{\n  "a": [\n    1,\n    2\n  ],\n')
    assert '"x": "é"' in text
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("nan")})


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match="lacks 1 of its 2 weight files, such as model-2"):
        find_weights(tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not safe to read"):
        list(find_weights(tmp_path).tensors())
    assert not (tmp_path / "evil").exists()


def test_a_fingerprint_sees_changes_at_both_ends_and_not_the_place(tmp_path):
    content = bytearray(os.urandom(3 * HEAD_BYTES))
    prints = set()
    for number, position in enumerate((None, 5, HEAD_BYTES, 2 * HEAD_BYTES)):
        if position is not None:
            content[position] ^= 1
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "w"
        path.write_bytes(content)
        prints.add(fingerprint_files([path], {"a": 1, "transformers_version": str(number)}))
    assert len(prints) == 4
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "w").write_bytes(content)
    assert fingerprint_files([tmp_path / "copy" / "w"], {"a": 1}) in prints
    assert fingerprint_files([tmp_path / "copy" / "w"], {"a": 2}) not in prints


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x.safetensors", "away/x.safetensors", "/x", "a\0/b"])
def test_a_shard_outside_the_folder_is_not_read(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "away").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    name = str(tmp_path / "x.safetensors") if name == "/x" else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="names a weight file outside its folder"):
        find_weights(folder)


def test_a_shard_in_a_folder_within_or_linked_from_another_disk_is_read(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / "sub" / "1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "disk.safetensors")
    (folder / "2.safetensors").symlink_to(tmp_path / "disk.safetensors")
    index = {"weight_map": {"a": "sub/1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(find_weights(folder).tensor_names()) == ["a", "b"]


@pytest.mark.parametrize(
    "weight_map", [["x"], None, 3, "x", {"a": 1}, {"a": None}, {"a": ["x"]}, {"a": 1, "b": "x"}, {"a": "x" * 300}]
)
def test_an_index_that_is_none_is_refused(tmp_path, weight_map):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"does not map tensors to names of files|File name too long|lacks 1 of"):
        find_weights(tmp_path)


@pytest.mark.parametrize("content", ['{"a": ' + "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\xff", "[1]"])
def test_json_that_python_does_not_take_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"is not readable JSON|is not a JSON object"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_place_of_a_json_file_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory"):
        read_json(tmp_path / "config.json")


def test_a_pickle_whose_keys_are_no_names_is_refused(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not safe to read"):
        find_weights(tmp_path).tensor_names()


def test_what_leads_out_of_a_folder(tmp_path):
    folder = tmp_path / "snapshots" / "abc"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "private").touch()
    targets = {"blob": "../../blobs/x", "inside": "sub/y", "out": "../../private", "up": "..", "loop": "loop"}
    for name, target in targets.items():
        (folder / name).symlink_to(target)
    (tmp_path / "alias").symlink_to(folder)
    for place in (folder, tmp_path / "alias"):
        assert [name for name in targets if leads_out(place / name, place)] == ["out", "up"]
