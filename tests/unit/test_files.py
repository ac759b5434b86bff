"""Files that appear whole or not at all; shards; fingerprints."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sleb_cli.atomic import new_folder, require_new_file, to_json, write_text
from sleb_cli.engine.files.fingerprint import HEAD_BYTES, fingerprint_files
from sleb_cli.engine.files.weights import find_weights
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
