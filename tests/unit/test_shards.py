"""Weight files, planned from headers and filled byte by byte."""

import errno
import json
import os
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleb_cli.engine.files import copying, shards
from sleb_cli.engine.files.copying import clone_or_link, copy_file
from sleb_cli.engine.files.shards import new_tensor, plan_shards, write_weights
from sleb_cli.engine.files.slices import Cut
from sleb_cli.engine.files.weights import TORCH_DTYPES, find_weights, read_header
from sleb_cli.events import TaskAdvanced, TaskStarted
from sleb_plugins import ModelError
from sleb_plugins.config_keys import Kept


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def save(folder, *files, **options):
    """Save tensors in one file, or in several with an index."""
    names = ["model.safetensors"] if len(files) == 1 else [f"part-{number}.safetensors" for number in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"} | options)
    if len(files) > 1:
        index = {"weight_map": {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return find_weights(folder)


def write(weights, target, max_bytes=10**9, *, names=None, dtype=None, events=None):
    """Write all tensors, or those that `names` gives a name to, and say how many bytes each file holds."""
    kept = [
        new_tensor((names or {}).get(stored.name, stored.name), stored, dtype)
        for stored in weights.stored
        if names is None or stored.name in names
    ]
    planned = plan_shards(weights, kept, max_bytes)
    write_weights(target, planned, 0, (events if events is not None else []).append)
    return [shard.size for shard in planned.values()]


def everything(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_shards_hold_everything_once_and_no_more_than_they_may(source, target):
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(10)}
    assert write(save(source, tensors), target, 1000) == [800] * 5
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert index["weight_map"] == {tensor.name: tensor.path.name for tensor in find_weights(target).stored}
    assert all(header.metadata == {"format": "pt"} for header in find_weights(target).headers)
    assert same(everything(target), tensors)


@pytest.mark.parametrize(
    ("names", "max_bytes", "sizes"), [("ab", 10**9, [4040]), ("abc", 100, [40, 4000, 40]), ("bc", 100, [4000, 40])]
)
def test_one_shard_needs_no_index_and_a_large_tensor_its_own(source, target, names, max_bytes, sizes):
    weights = save(source, {"a": torch.ones(10), "b": torch.ones(1000), "c": torch.ones(10)})
    assert write(weights, target, max_bytes, names={name: name for name in names}) == sizes
    assert (target / "model.safetensors.index.json").exists() == (len(sizes) > 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_data_type_goes_through_byte_for_byte(source, target, dtype):
    # As of a format of next year: F4 has half a byte an element, X3 nobody knows; and one tensor is empty.
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
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    weights = find_weights(source)
    names = {name: f"new.{name}" for name in weights.tensor_names() if name != "gone"}
    write(weights, target, names=names, dtype=dtype)
    header["empty"]["dtype"] = "BF16" if dtype else "F32"  # all that is cast, and no byte changes
    written = read_header(target / "model.safetensors")
    assert written.metadata == {"format": "pt", "made by": "tomorrow"}
    content = (target / "model.safetensors").read_bytes()
    found = {t.name: (t.dtype, list(t.shape), content[t.start : t.start + t.size]) for t in written.tensors}
    expected = {
        f"new.{name}": (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name not in ("gone", "__metadata__")
    }
    assert found == expected
    assert written.tensors[0].name == "new.wide"
    assert written.tensors[0].start % 8 == 0


def test_unchanged_files_are_taken_over_and_the_rest_joined(source, target):
    files = [{f"{part}.{n}": torch.full((100,), float(n)) for n in range(4)} for part in "abcdef"]
    weights = save(source, *files)
    # a and e are left alone, of b and c one tensor each remains, of d three; f loses nothing but gets other names.
    names = {name: name for part in (files[0], files[4]) for name in part} | {"b.0": "b.0", "c.1": "c.1"}
    names |= {"d.0": "d.0", "d.1": "d.1", "d.2": "d.2"} | {name: f"x{name}" for name in files[5]}
    assert write(weights, target, names=names) == [1600, 800, 1200, 1600, 1600]
    first, second, third, fourth, fifth = sorted(target.glob("*.safetensors"))
    assert first.read_bytes() == (source / "part-0.safetensors").read_bytes()
    assert fourth.read_bytes() == (source / "part-4.safetensors").read_bytes()
    assert [set(load_file(path)) for path in (second, third, fifth)] == [
        {"b.0", "c.1"},
        {"d.0", "d.1", "d.2"},
        {f"x{name}" for name in files[5]},
    ]


def test_files_are_joined_up_to_the_largest_of_the_source(source, target):
    files = [
        {f"{part}.{n}": torch.full((100,), float(n)) for n in range(count)}
        for part, count in zip("abcdef", (2, 2, 2, 4, 4, 2), strict=True)
    ]
    weights = save(source, *files)
    names = {name: name for tensors in files for name in tensors if name not in ("b.1", "e.0", "f.1")}
    assert write(weights, target, names=names) == [800, 400, 800, 1600, 1600]
    for number, path in enumerate(sorted(target.glob("*.safetensors"))):
        unchanged = path.read_bytes() == (source / f"part-{number}.safetensors").read_bytes()
        assert unchanged == (number in (0, 2, 3))


def test_room_is_asked_for_what_is_written(source, target, monkeypatch):
    asked = []
    monkeypatch.setattr(shards, "require_space", lambda folder, size: asked.append((folder, size)))
    weights = save(source, {"a": torch.ones(100)}, {"b": torch.ones(50), "c": torch.ones(50)})
    kept = [new_tensor(stored.name, stored, None) for stored in weights.stored if stored.name != "c"]
    monkeypatch.setattr(copying, "_reflink", lambda *arguments: False)
    write_weights(target, plan_shards(weights, kept, 10**9), 7, lambda event: None)
    assert asked == [(target, 200 + 7)]  # the first file is a link


def test_a_smaller_limit_divides_unchanged_files(source, target):
    files = [{f"{part}.{n}": torch.full((100,), float(n)) for n in range(4)} for part in "ab"]
    assert write(save(source, *files), target, 800) == [800] * 4
    assert same(everything(target), files[0] | files[1])


@pytest.mark.parametrize("refuses", [errno.EXDEV, errno.EIO, None], ids=["another disk", "fault", "nothing done"])
def test_bytes_the_system_cannot_copy_come_through_a_buffer(source, target, monkeypatch, refuses):
    calls = []

    def refuse(*arguments):
        calls.append(arguments)
        if refuses is None:
            return 0
        raise OSError(refuses, "no")

    monkeypatch.setattr(copying, "_copy_file_range", refuse)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    tensors = {f"t{n}": torch.rand(777) for n in range(5)}
    events = []
    write(save(source, tensors), target, names={name: f"x{name}" for name in tensors}, events=events)
    assert calls
    assert same(everything(target), {f"x{name}": tensor for name, tensor in tensors.items()})
    (total,) = [event.total for event in events if isinstance(event, TaskStarted)]
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == total == 5 * 777 * 4


def test_a_full_disk_is_no_reason_to_try_another_way(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(copying, "_copy_file_range", full)
    monkeypatch.setattr(copying, "read_range", None)
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(OSError, match="full") as caught:
        copy_file(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.ENOSPC


def test_a_source_that_shrinks_meanwhile_is_noticed(source, target):
    weights = save(source, {"a": torch.ones(1000), "b": torch.ones(1000)})
    assert weights.headers
    os.truncate(source / "model.safetensors", 6000)
    with pytest.raises(ModelError, match="became shorter"):
        write(weights, target, names={"b": "b"})


def test_without_reflinks_and_links_nothing_is_shared(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EXDEV, "another disk")

    (tmp_path / "a").write_bytes(b"x" * 5000)
    if copying._reflink(tmp_path / "a", tmp_path / "own"):
        (tmp_path / "own").write_bytes(b"y")
        assert (tmp_path / "a").read_bytes() == b"x" * 5000
    monkeypatch.setattr(copying, "_reflink", lambda *arguments: False)
    assert clone_or_link(tmp_path / "a", tmp_path / "b") == "hard link"
    assert (tmp_path / "b").stat().st_nlink == 2
    monkeypatch.setattr(os, "link", refuse)
    assert clone_or_link(tmp_path / "a", tmp_path / "c") is None
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("read_at_once", [1 << 20, 5], ids=["whole", "in parts"])
def test_a_cast_changes_floating_point_numbers_only(source, target, monkeypatch, read_at_once):
    monkeypatch.setattr(copying, "BUFFER_BYTES", read_at_once)
    tensors = {
        "f32": torch.rand(3, 5), "f16": torch.rand(7).half(), "i32": torch.arange(4, dtype=torch.int32),
        "f8": torch.rand(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 2),
    }  # fmt: skip
    write(save(source, tensors), target, dtype=torch.bfloat16)
    expected = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    assert same(everything(target), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("read_at_once", [1 << 20, 40], ids=["whole", "in parts"])
def test_slices_and_new_values_are_written_in_the_given_type(source, target, monkeypatch, dtype, pickled, read_at_once):
    monkeypatch.setattr(copying, "BUFFER_BYTES", read_at_once)
    tensors = {
        "cut": torch.rand(3, 8), "whole numbers": torch.arange(24, dtype=torch.int32).reshape(3, 8),
        "empty": torch.empty(0, 8), "plain": torch.rand(5), "new": torch.rand(4, 2), "new and cut": torch.rand(2, 4),
    }  # fmt: skip
    torch.save(tensors, source / "pytorch_model.bin") if pickled else save(source, tensors)
    weights, cut = find_weights(source), Cut(1, Kept((0, 2), 4))
    values = {name: tensor.double() + 1 for name, tensor in tensors.items() if "new" in name}
    planned = [
        replace(
            new_tensor(f"x.{stored.name}", stored, dtype, cut if stored.shape[1:] in [(8,), (4,)] else None),
            value=values.get(stored.name),
        )
        for stored in weights.stored
    ]
    expected = {f"x.{name}": values.get(name, tensor) for name, tensor in tensors.items()}
    for name, tensor in expected.items():
        kept = {8: [0, 1, 4, 5], 4: [0, 2]}.get(tensor.shape[-1] if tensor.dim() == 2 else 0)
        kind = dtype if dtype and tensor.is_floating_point() else tensors[name.removeprefix("x.")].dtype
        expected[name] = (tensor if kept is None else tensor[:, kept]).to(kind)
    uncut = [tensor for tensor in planned if tensor.cut is None and tensor.value is None]
    anew = replace(uncut[0], name="anew", value=torch.rand(uncut[0].stored.shape))
    expected["anew"] = anew.value.to(dtype)
    for some in (planned, [tensor for tensor in planned if tensor.value is None], [anew]):
        wanted = {tensor.name: expected[tensor.name] for tensor in some}
        folder = target / str(len(some))
        folder.mkdir()
        write_weights(folder, plan_shards(weights, some, 10**9), 0, lambda event: None)
        assert same(everything(folder), wanted)


def test_types_of_a_pickle_are_named_as_safetensors_reads_them(source, target):
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    torch.save(tensors, source / "pytorch_model.bin")
    write(find_weights(source), target)
    with safe_open(target / "model.safetensors", "pt") as opened:
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.tolist()) == (tensor.dtype, tensor.tolist())
            assert opened.get_slice(name).get_dtype() == name


def test_shared_and_strided_tensors_of_a_pickle_are_written_apart(source, target):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[1], "e": torch.arange(3), "f": torch.tensor(True)}
    torch.save(tensors, source / "pytorch_model.bin")
    write(find_weights(source), target)
    assert same(everything(target), tensors)


def test_tensors_that_two_files_hold_come_from_the_later_one(source, target):
    weights = save(source, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2)})
    assert sorted(weights.tensor_names()) == ["a", "b"]
    write(weights, target)
    assert same(everything(target), {"a": torch.ones(2), "b": torch.zeros(2)})


def test_each_header_is_read_once(source, target, monkeypatch):
    weights = save(source, {"a": torch.ones(2)}, {"b": torch.ones(2)})
    opened = []
    monkeypatch.setattr(
        "sleb_cli.engine.files.weights.read_header", lambda path: opened.append(path) or read_header(path)
    )
    assert weights.tensor_names() == weights.tensor_names() == ["a", "b"]
    write(weights, target)
    assert opened == weights.paths


def spoiled(entry=None, *, length=None, data=b"1234", header=None):
    text = json.dumps({"a": entry} if header is None else header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


WHOLE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WRONG = [
    {"shape": [2]}, {"shape": ["x"]}, {"shape": None}, {"shape": {}}, {"shape": [True]}, {"shape": [-1, -1]},
    {"dtype": 5}, {"data_offsets": [4, 0]}, {"data_offsets": [0]}, {"data_offsets": [0, float("inf")]},
    {"data_offsets": [0, 4.0]},
]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"short", b"\0" * 100, spoiled(WHOLE)[:-1], spoiled(WHOLE, data=b"12345")),
        *(spoiled(WHOLE, length=length) for length in (10**12, 5)),
        *(spoiled(WHOLE | wrong) for wrong in WRONG),
        spoiled(WHOLE | {"data_offsets": [1, 5]}, data=b"12345"),
        spoiled({"shape": [1]}),
        spoiled(header=[1]),
        spoiled(header={"a": WHOLE, "b": WHOLE}),
        spoiled(header={"a": WHOLE, "b": WHOLE}, data=b"12345678"),
        *(spoiled(header={"a": WHOLE, "__metadata__": metadata}) for metadata in (5, {"format": 5})),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_what_is_no_safetensors_file_is_said_to_be_so(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="truncated, or is not a safetensors file"):
        find_weights(tmp_path).tensor_names()


def test_a_type_that_safetensors_cannot_store_is_refused(source):
    torch.save({"fine": torch.ones(1), "odd": torch.ones(2, dtype=torch.complex128)}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds odd as torch\.complex128, torch\.strided, which"):
        find_weights(source).tensor_names()
