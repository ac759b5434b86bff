"""Weight files, planned from headers and filled byte by byte."""

import json
import random

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


def file_of(header, *, length=None, data=b"1234"):
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write(weights, target, max_bytes=10**9, *, keep=None, prefix="", notify=ignore):
    """Write all tensors or those of these names, and say how many bytes each file holds."""
    keep = weights.tensor_names() if keep is None else keep
    kept = [
        new_tensor(prefix + stored.name, stored, None, (), None)
        for stored in weights.stored
        if stored.name in keep
    ]
    planned = plan_shards(weights, kept, max_bytes)
    write_weights(target, planned, notify)
    return [shard.size for shard in planned.values()]


def require_same(folder, expected):
    """Require these tensors, with their types, and no others."""
    torch.testing.assert_close(weights_of(folder), expected, rtol=0, atol=0)


def test_shards_hold_everything_once_and_no_more_than_they_may(tmp_path, target):
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(10)}
    parts = [{name: tensors[name] for name in list(tensors)[start : start + 5]} for start in (0, 5)]
    assert write(save(tmp_path, *parts), target, 1000) == [800, 800, 400] * 2
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert index["weight_map"] == {
        tensor.name: tensor.path.name for tensor in find_weights(target).stored
    }
    assert all(header.metadata == {"format": "pt"} for header in find_weights(target).headers)
    require_same(target, tensors)


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
    # As of a format of next year: F4 has half a byte an element, X3 nobody knows; and one tensor is
    # empty.
    data = random.Random(0).randbytes(64)
    header = {
        "__metadata__": {"format": "pt", "made by": "tomorrow"},
        "four": {"dtype": "F4", "shape": [5, 2], "data_offsets": [0, 5]},
        "gone": {"dtype": "U8", "shape": [2], "data_offsets": [5, 7]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [7, 7]},
        "näme \"'\\": {"dtype": "X3", "shape": [8], "data_offsets": [7, 31]},
        "scalar": {"dtype": "F8_E8M0", "shape": [], "data_offsets": [31, 32]},
        "wide": {"dtype": "I64", "shape": [4], "data_offsets": [32, 64]},
    }
    (tmp_path / "model.safetensors").write_bytes(file_of(header, data=data))
    write(find_weights(tmp_path), target, keep=header.keys() - {"gone"}, prefix="new.")
    written = read_header(target / "model.safetensors")
    assert written.metadata == {"format": "pt", "made by": "tomorrow"}
    content = (target / "model.safetensors").read_bytes()
    found = {
        t.name: (t.dtype, list(t.shape), content[t.start : t.start + t.size])
        for t in written.tensors
    }
    expected = {
        f"new.{name}": (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name not in ("gone", "__metadata__")
    }
    assert found == expected
    assert written.tensors[0].name == "new.wide"
    assert written.tensors[0].start % 8 == 0


def test_tensors_stay_in_the_files_of_the_source(tmp_path, target, monkeypatch):
    events = []
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    files = [{f"{part}.{n}": torch.rand(100) for n in range(4)} for part in "abcd"]
    weights = save(tmp_path, *files)
    keep = {*weights.tensor_names()} - {"b.1", *(f"c.{n}" for n in range(4))}
    assert write(weights, target, keep=keep, notify=events.append) == [1600, 1200, 1600]
    require_same(
        target, {name: tensor for file in files for name, tensor in file.items() if name in keep}
    )
    (total,) = [event.total for event in events if isinstance(event, TaskStarted)]
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == total == 4400


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_slices_and_new_values_are_written_in_the_given_type(tmp_path, target, dtype, pickled):
    tensors = {
        "cut": torch.rand(3, 8), "whole numbers": torch.arange(24, dtype=torch.int32).reshape(3, 8),
        "empty": torch.empty(0, 8), "plain": torch.rand(5), "new": torch.rand(4, 2), "new and cut": torch.rand(2, 8),
        "f16": torch.rand(7).half(), "f8": torch.rand(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(1.5),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin") if pickled else save(tmp_path, tensors)
    weights, cut = find_weights(tmp_path), (Slices(1, 4, (0, 2)),)
    values = {name: tensor.double() + 1 for name, tensor in tensors.items() if "new" in name}
    planned = [
        new_tensor(f"x.{t.name}", t, dtype, cut if t.shape[1:] == (8,) else (), values.get(t.name))
        for t in weights.stored
    ]
    expected = {}
    for name, tensor in tensors.items():
        value = values.get(name, tensor)
        value = value[:, [0, 1, 4, 5]] if value.shape[1:] == (8,) else value
        expected[f"x.{name}"] = value.to(
            dtype if dtype and tensor.is_floating_point() else tensor.dtype
        )
    write_weights(target, plan_shards(weights, planned, 10**9), lambda event: None)
    require_same(target, expected)


def test_slices_along_the_first_axis_are_ranges_of_bytes(tmp_path, target, monkeypatch):
    tensors = {
        "rows": torch.rand(8, 3),
        "pairs": torch.rand(16, 2).half(),
        "columns of one": torch.rand(1, 8),
    }
    weights, kept, copied = save(tmp_path, tensors), [0, 1, 2, 5, 7], []

    def copy(source, start, size, *others):
        copied.append(size)
        copying.copy_range(source, start, size, *others)

    monkeypatch.setattr(copying, "BUFFER_BYTES", 5)
    monkeypatch.setattr(shards, "copy_range", copy)
    monkeypatch.setattr(
        shards, "read_tensors", lambda path, names: pytest.fail("read") if names else iter(())
    )
    planned = [
        new_tensor(t.name, t, None, (Slices("one" in t.name, 8, kept),), None)
        for t in weights.stored
    ]
    write_weights(target, plan_shards(weights, planned, 10**9), ignore)
    pairs = tensors["pairs"].reshape(8, 4)[kept].reshape(10, 2)
    require_same(
        target,
        {
            "rows": tensors["rows"][kept],
            "pairs": pairs,
            "columns of one": tensors["columns of one"][:, kept],
        },
    )
    assert sorted(copied) == sorted([36, 12, 12, 24, 8, 8, 12, 4, 4])


def test_tensors_of_a_pickle_are_written_apart_in_their_types(tmp_path, target):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "b": base,
        "c": base.T,
        "d": base[1],
        "e": torch.arange(3),
        "f": torch.tensor(True),
    }
    tensors |= {name: torch.ones(3).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    write(find_weights(tmp_path), target)
    require_same(target, tensors)


def test_tensors_that_two_files_hold_come_from_the_later_one(tmp_path, target):
    weights = save(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2)})
    write(weights, target)
    require_same(target, {"a": torch.ones(2), "b": torch.zeros(2)})


WHOLE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WRONG = [
    {"shape": [2]},
    {"shape": ["x"]},
    {"dtype": 5},
    {"data_offsets": [4, 0]},
    {"data_offsets": [0, 4.0]},
]


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            file_of({"a": WHOLE})[:-1],
            file_of({"a": WHOLE}, data=b"12345"),
            file_of({"a": WHOLE}, length=10**12),
        ),
        *(file_of({"a": WHOLE | wrong}) for wrong in WRONG),
        file_of([1]),
        file_of({"a": WHOLE, "b": WHOLE}, data=b"12345678"),
        *(file_of({"a": WHOLE, "__metadata__": metadata}) for metadata in (5, {"format": 5})),
    ],
)
def test_a_broken_safetensors_file_is_called_one(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="truncated, or is not a safetensors file"):
        find_weights(tmp_path).tensor_names()


def test_a_type_that_safetensors_cannot_store_is_refused(tmp_path):
    torch.save(
        {"fine": torch.ones(1), "odd": torch.ones(2, dtype=torch.complex128)},
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(ModelError, match=r"holds odd as torch\.complex128, torch\.strided, which"):
        find_weights(tmp_path).tensor_names()
