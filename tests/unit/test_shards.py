"""Weight files, planned from headers and filled byte by byte."""

import json
import random
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from conftest import weights_of
from sleb_cli.engine.files import copying, shards
from sleb_cli.engine.files.pickles import TORCH_DTYPES
from sleb_cli.engine.files.shards import new_tensor, plan_shards, write_weights
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.files.weights import find_weights, read_header
from sleb_cli.events import TaskAdvanced, TaskStarted, ignore
from sleb_plugins import ModelError


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def save(folder, *files):
    """Save tensors in files with an index."""
    index = {}
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return find_weights(folder)


def file_of(header, data=b"1234"):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(weights, target, max_bytes=10**9, *, keep=None, prefix="", notify=ignore):
    """Write all tensors or those of these names, and say how many bytes each file holds."""
    kept = []
    for stored in weights.stored:
        if keep is None or stored.name in keep:
            kept.append(new_tensor(prefix + stored.name, stored, None, (), None))
    planned = plan_shards(weights, kept, max_bytes)
    write_weights(target, planned, notify)
    return [shard.size for shard in planned.values()]


def require_same(folder, expected):
    """Require these tensors, with their types, and no others."""
    torch.testing.assert_close(weights_of(folder), expected, rtol=0, atol=0)


def test_shards_hold_everything_once_and_no_more_than_they_may(tmp_path, target):
    first = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}
    second = {f"u{n}": torch.full((100,), float(n)) for n in range(5)}
    assert write(save(tmp_path, first, second), target, 1000) == [800, 800, 400] * 2
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    written = find_weights(target)
    assert index["weight_map"] == {each.name: each.path.name for each in written.stored}
    assert all(header.metadata == {"format": "pt"} for header in written.headers)
    require_same(target, first | second)


@pytest.mark.parametrize(
    ("keep", "max_bytes", "sizes"),
    [("ab", 10**9, [4040]), ("abc", 100, [40, 4000, 40]), ("bc", 100, [4000, 40])],
)
def test_one_shard_needs_no_index_and_a_large_tensor_its_own(
    tmp_path, target, keep, max_bytes, sizes
):
    weights = save(tmp_path, {"a": torch.ones(10), "b": torch.ones(1000), "c": torch.ones(10)})
    assert write(weights, target, max_bytes, keep=keep) == sizes
    assert (target / "model.safetensors.index.json").exists() == (len(sizes) > 1)


def test_any_data_type_goes_through_byte_for_byte(tmp_path, target):
    # As of a format of next year: F4 has half a byte an element, and X3 nobody knows.
    data = random.Random(0).randbytes(64)
    entries = [
        ("four", "F4", [5, 2], 0, 5),
        ("gone", "U8", [2], 5, 7),
        ("empty", "F32", [0, 7], 7, 7),
        ("näme \"'\\", "X3", [8], 7, 31),
        ("scalar", "F8_E8M0", [], 31, 32),
        ("wide", "I64", [4], 32, 64),
    ]
    metadata = {"format": "pt", "made by": "tomorrow"}
    header = {"__metadata__": metadata}
    expected = {}
    for name, dtype, shape, start, end in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        if name != "gone":
            expected[f"new.{name}"] = (dtype, tuple(shape), data[start:end])
    (tmp_path / "model.safetensors").write_bytes(file_of(header, data))
    write(find_weights(tmp_path), target, keep=header.keys() - {"gone"}, prefix="new.")
    content = (target / "model.safetensors").read_bytes()
    written = read_header(target / "model.safetensors")
    assert written.metadata == metadata
    found = {}
    for tensor in written.tensors:
        stored = content[tensor.start : tensor.start + tensor.size]
        found[tensor.name] = (tensor.dtype, tuple(tensor.shape), stored)
    assert found == expected
    first = written.tensors[0]
    assert (first.name, first.start % 8) == ("new.wide", 0)


def test_tensors_stay_in_the_files_of_the_source(tmp_path, target, monkeypatch):
    events = []
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    files = [{f"{part}.{n}": torch.rand(100) for n in range(4)} for part in "abcd"]
    weights = save(tmp_path, *files)
    kept = files[0] | files[1] | files[3]
    del kept["b.1"]
    assert write(weights, target, keep=kept, notify=events.append) == [1600, 1200, 1600]
    require_same(target, kept)
    (total,) = [event.total for event in events if isinstance(event, TaskStarted)]
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == total == 4400


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_slices_and_new_values_are_written_in_the_given_type(tmp_path, target, dtype, pickled):
    tensors = {
        "cut": torch.rand(3, 8),
        "whole numbers": torch.arange(24, dtype=torch.int32).reshape(3, 8),
        "empty": torch.empty(0, 8),
        "plain": torch.rand(5),
        "new": torch.rand(4, 2),
        "new and cut": torch.rand(2, 8),
        "f16": torch.rand(7).half(),
        "f8": torch.rand(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5),
    }
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save(tmp_path, tensors)
    planned = []
    expected = {}
    weights = find_weights(tmp_path)
    for stored in weights.stored:
        before = tensors[stored.name]
        new = before.double() + 1 if "new" in stored.name else None
        after = before if new is None else new
        slices = ()
        if stored.shape[1:] == (8,):
            slices = (Slices(1, 4, (0, 2)),)
            after = after[:, [0, 1, 4, 5]]
        planned.append(new_tensor(f"x.{stored.name}", stored, dtype, slices, new))
        own = before.dtype
        expected[f"x.{stored.name}"] = after.to(dtype or own if own.is_floating_point else own)
    write_weights(target, plan_shards(weights, planned, 10**9), ignore)
    require_same(target, expected)


def test_slices_along_the_first_axis_are_ranges_of_bytes(tmp_path, target, monkeypatch):
    rows = torch.rand(8, 3)
    pairs = torch.rand(16, 2).half()
    columns = torch.rand(1, 8)
    weights = save(tmp_path, {"rows": rows, "pairs": pairs, "columns": columns})
    kept = [0, 1, 2, 5, 7]
    copy = Mock(side_effect=copying.copy_range)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 5)
    monkeypatch.setattr(shards, "copy_range", copy)
    planned = []
    for stored in weights.stored:
        slices = Slices(stored.name == "columns", 8, kept)
        planned.append(new_tensor(stored.name, stored, None, (slices,), None))
    write_weights(target, plan_shards(weights, planned, 10**9), ignore)
    pairs = pairs.reshape(8, 4)[kept].reshape(10, 2)
    require_same(target, {"rows": rows[kept], "pairs": pairs, "columns": columns[:, kept]})
    copied = sorted(call.args[2] for call in copy.mock_calls)
    assert copied == [4, 4, 8, 8, 12, 12, 12, 24, 36]


def test_tensors_of_a_pickle_are_written_apart_in_their_types(tmp_path, target):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[1]}
    for name, dtype in TORCH_DTYPES.items():
        tensors[name] = torch.ones(3).to(dtype)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    write(find_weights(tmp_path), target)
    require_same(target, tensors)


def test_tensors_that_two_files_hold_come_from_the_later_one(tmp_path, target):
    weights = save(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2)})
    write(weights, target)
    require_same(target, {"a": torch.ones(2), "b": torch.zeros(2)})


def one(**wrong):
    """Return a header of one tensor, with something wrong about it."""
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | wrong}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        file_of(one())[:-1],
        file_of(one(), b"12345"),
        (10**12).to_bytes(8, "little") + file_of(one())[8:],
        file_of(one(shape=[2])),
        file_of(one(shape=["x"])),
        file_of(one(dtype=5)),
        file_of(one(data_offsets=[4, 0])),
        file_of(one(data_offsets=[0, 4.0])),
        file_of([1]),
        file_of({"a": one()["a"], "b": one()["a"]}, b"12345678"),
        file_of(one() | {"__metadata__": 5}),
        file_of(one() | {"__metadata__": {"format": 5}}),
    ],
)
def test_a_broken_safetensors_file_is_called_one(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="truncated, or is not a safetensors file"):
        find_weights(tmp_path).tensor_names()


def test_a_type_that_safetensors_cannot_store_is_refused(tmp_path):
    tensors = {"fine": torch.ones(1), "odd": torch.ones(2, dtype=torch.complex128)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds odd as torch\.complex128, torch\.strided, which"):
        find_weights(tmp_path).tensor_names()
