"""What lies: hypothesis strategies for documents, bytes, weight files, GGUF files and texts, made from honest ones."""

import copy
import io
import json
import math
import struct
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import gguf
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from faults.hostile import PLACE

NUMBERS = [
    -1, 0, 1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**9, 10**18, 10**100,
    int("9" * 4000), 0.5, -0.0, 1e-320, 1e308, 3.0, math.nan, math.inf, -math.inf,
]  # fmt: skip
WORDS = [
    "", " ", "0", "1", "3", "-1", "1e9", "NaN", "true", "null", "x" * 100_000, "\0", "a\0b", "\ud800", "\u202e\u2066",
    "\x1b[31mred\x1b]0;title\x07\x9b2J", "é" * 50, "[red]x[/red]", "[/]", "%s%n", "{x}", "../x", "~", "/", ".", "..",
    "../outside/model.safetensors", "../outside/config.json", PLACE + "/outside/model.safetensors", "/proc/self/mem",
    "/dev/zero", "model.layers.1", "a\nb", "\r", "con", "__import__('os').abort()", "file:///etc/passwd", "x/y/z",
    "-o", "demo", "org/name", "$(touch outside/x)", "<script>alert(1)</script>", "[link=file:///x]x[/link]",
]  # fmt: skip
RAW = {
    "%deep list%": "[" * 100_000 + "]" * 100_000, "%deep object%": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "%open list%": "[" * 100_000, "%digits%": "9" * 5000, "%exponent%": "1e400", "%comment%": "/* */ 1",
    "%cut%": '"never ends',
}  # fmt: skip
"""What no library writes, by what stands for it."""
numbers, words = st.sampled_from(NUMBERS), st.sampled_from(WORDS)
hostile = st.one_of(
    numbers,
    words,
    st.sampled_from(list(RAW)),
    st.sampled_from([None, True, False, [], {}, [[]], [{}], [None] * 3, [1] * 1000, [1, "x"], [[1, 2], [3]]]),
    st.lists(numbers | words, max_size=4),
    st.dictionaries(words, numbers, max_size=3),
).map(copy.deepcopy)  # documents are changed further


class Runs:
    """A pickle of it calls `function` when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def saved_as(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def drawn(strategy: Any, count: int) -> list[Any]:
    """Return this many cases of a strategy, always the same ones."""
    cases: list[Any] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def collect(case: Any) -> None:
        cases.append(case)

    collect()
    return cases


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where the values of a document are, by keys and numbers; of long lists and tables, the first ones."""
    found = [here] if here else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items)[:60]:
        found += places(value, (*here, key))
    return found


def to_text(data: Any) -> bytes:
    """Return a document as JSON, with what no library writes in its place."""
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw, 2)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def lying(draw: st.DrawFn, document: Any, values: Any = None, keys: Any = None) -> Any:
    """Draw a document in which a few values or names are others, missing, doubled, or of another type."""
    # As defaults, hypothesis would spell out both at every call.
    values, keys = hostile if values is None else values, words if keys is None else keys
    data = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not (known := places(data)):
            break
        *parents, last = draw(st.sampled_from(known))
        holder, lie = reduce(getitem, parents, data), draw(values)
        match draw(st.sampled_from(["set"] * 7 + ["add", "remove", "rename"])):
            case "remove":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(keys)] = lie
            case "rename" if isinstance(holder, dict):
                holder[draw(keys)] = holder.pop(last)
            case "add" | "rename":
                holder.insert(last, lie)
            case _:
                old, other = holder[last], reduce(getitem, draw(st.sampled_from(known[:40])), data)
                scaled = old * draw(st.sampled_from([-1, 2, 1000, 0])) if type(old) in (int, float) else lie
                holder[last] = draw(st.sampled_from([lie, lie, lie, scaled, str(old), [old], copy.deepcopy(other)]))
    return data


def documents(document: Any, **options: Any) -> Any:
    """Draw documents of JSON that lie, and some that are damaged."""
    lies = lying(document, **options).map(to_text)
    return st.one_of(lies, lies, lies, damaged(to_text(document)))


@st.composite
def damaged(draw: st.DrawFn, data: bytes, head: int = 6000) -> bytes:
    """Draw bytes that were overwritten, cut, flipped, doubled or filled with others."""
    for _ in range(draw(st.integers(1, 3))):
        size = max(1, len(data))
        place = draw(st.integers(0, min(size, head) - 1) | st.integers(0, size - 1))
        end = place + draw(st.integers(1, 40))
        strange = [b"{", b"]", b'"', b",", b"\0" * 8, b"\xff" * 8, b"\xff\xfe", b"\xed\xa0\x80", b"9" * 400]
        changed = [
            data[:place], data[:place] + data[end:], data[:end] + data[place:],
            data[:place] + bytes([255 & ~byte for byte in data[place : place + 1]]) + data[place + 1 :],
            *(data[:place] + each + data[place:] for each in strange),
            *(data[:place] + each + data[place + len(each) :] for each in strange),
            b"\xef\xbb\xbf" + data, b"\xff\xfe" + data,
        ]  # fmt: skip
        data = draw(st.sampled_from(changed))
    return data


# Weight files.

ENTRIES = [
    [2**32, 2**32], [2**62, 4], [0, 2**63], [-1, -4], [0], [], [1.5], ["4"], [True] * 4, [[4]], None, [2**64 + 1],
    [1] * 100, [8], [16], [16, 16], [4, 2, 8], [10**9], [0, 64], [64, 128], [-4, 60], [0, 10**13], "F32", "F64", "BF16",
    "F16", "I64", "U8", "BOOL", "C64", "F8_E8M0", "X", "f32", "1",
]  # fmt: skip
"""Shapes, offsets and types."""
NAMES = ["model.layers.7.mlp.up_proj.weight", "model.layers.999999999999.x", "lm_head.weight", "__metadata__", *WORDS]
LENGTHS = [0, 1, 7, 8, 2**20, 10**8, 2**31, 2**63 - 1, 2**63, 2**64 - 1]


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def weight_file(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else to_text(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


DEEP = [b"[" * 10**5, b'{"a":' * 10**5, b"[" * 10**7, b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"]
MANY = [b'{"a":[' + part * (10**6 // len(part)) + b"0]}" for part in (b"[],", b"{},", b'{"":0},', b'"ab",', b"1e1,")]
EMPTY = [b"", b"\0", b"\0" * 8, b"\0" * 9, b"{}", weight_file({}, b""), weight_file(b"", b"")]


def weight_files(data: bytes) -> Any:
    """Draw weight files whose header, or what it says of itself, lies."""
    header, body = parse(data)
    names = [name for name in header if name != "__metadata__"]
    said = header.get("__metadata__") or {"x": "1"}
    headers = lying(header, st.sampled_from(ENTRIES) | hostile, st.sampled_from(NAMES))
    short = st.dictionaries(st.sampled_from(names), st.sampled_from(names), min_size=1, max_size=1)
    return st.one_of(
        headers.map(lambda lie: weight_file(lie, body)),
        (inside(said) | hostile).map(lambda lie: weight_file(header | {"__metadata__": lie}, body)),
        short.map(lambda pair: weight_file(header | {one: header[two] for one, two in pair.items()}, body)),
        short.map(lambda pair: weight_file(twice(header, *pair), body)),
        st.sampled_from(LENGTHS).map(lambda length: weight_file(header, body, length)),
        st.integers(-len(body), -1).map(lambda end: weight_file(header, body[:end])),
        st.sampled_from(DEEP + MANY).map(lambda text: weight_file(text, body)),
        st.sampled_from(EMPTY),
        damaged(data),
    )


def twice(header: dict[str, Any], name: str) -> bytes:
    """Return a header in which a name is there twice."""
    return to_text(header)[:-1] + b"," + to_text({name: header[name]})[1:]


@st.composite
def inside(draw: st.DrawFn, metadata: dict[str, str]) -> Any:
    """Draw metadata in which a text that is JSON lies."""
    name = draw(st.sampled_from(sorted(metadata)))
    is_json = metadata[name][:1] in ("[", "{")
    lies = documents(json.loads(metadata[name])) if is_json else damaged(metadata[name].encode())
    return metadata | {name: draw(lies).decode("utf-8", "replace")}


# GGUF files.

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
CODES = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", STRING: "<Q", UINT64: "<Q"}


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts that need not agree: keys, types and values; tensors' names, shapes, types and offsets."""

    entries: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    values: bytes
    version: int = 3

    def to_bytes(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.entries))]
        for key, type_, data in self.entries:
            parts += [text(key), struct.pack("<I", type_), data]
        for name, shape, type_, offset in self.tensors:
            parts += [text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % 32) + self.values


def gguf_of(path: Path) -> Gguf:
    """Take a whole file apart, as the format's own library reads it."""
    reader = gguf.GGUFReader(path)
    entries = []
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            _, key, type_, *value = [bytes(part.tobytes()) for part in field.parts]
            entries.append((key, int.from_bytes(type_, "little"), b"".join(value)))
    begin = min(tensor.data_offset for tensor in reader.tensors)
    tensors = [
        (tensor.name.encode(), tuple(map(int, tensor.shape)), int(tensor.tensor_type), int(tensor.data_offset - begin))
        for tensor in reader.tensors
    ]
    return Gguf(tuple(entries), tuple(tensors), path.read_bytes()[begin:])


REMOVED = "sleb.removed_blocks"


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(type_: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", type_, count) + data


def nested(depth: int) -> bytes:
    return array(ARRAY, 1, b"") * depth + array(UINT32, 0, b"")


def key(name, type_, data):
    """Return a function that gives a GGUF file this key, in the place of one of that name."""
    name = name.encode()

    def make(file):
        entries = {each[0]: each for each in file.entries} | {name: (name, type_, data)}
        return replace(file, entries=tuple(entries.values()))

    return make


def number(name, type_, value):
    return key(name, type_, struct.pack(CODES[type_], value))


def tensor(**changes):
    """Return a function that changes the first tensor of a GGUF file."""

    def make(file):
        first = dict(zip(("name", "shape", "type", "offset"), file.tensors[0], strict=True)) | changes
        return replace(file, tensors=(tuple(first.values()), *file.tensors[1:]))

    return make


NUMBERED = [
    ("x", STRING, 1 << 63), *(("general.alignment", UINT32, size) for size in (0, 12, 1 << 31)),
    ("general.alignment", UINT64, 1 << 63), ("llama.block_count", UINT32, (1 << 31) - 1),
    ("llama.block_count", UINT64, 1 << 63), ("llama.block_count", FLOAT32, math.nan),
    ("llama.nextn_predict_layers", INT32, -5), ("llama.leading_dense_block_count", UINT64, 1 << 63),
    ("llama.n_deepstack_layers", UINT64, 1 << 63), ("general.license", UINT32, 7),
]  # fmt: skip
LISTED = {
    "an architecture": ("general.architecture", nested(1)), "arrays in arrays, deep": ("x", nested(100_000)),
    "2^63 strings": ("x", array(STRING, 1 << 63, b"")), "2^63 numbers": ("x", array(UINT64, 1 << 63, b"")),
    "a split": ("split.count", array(UINT32, 1, b"abcd")), "one removed twice": (REMOVED, array(INT32, 2, bytes(8))),
    "removed below 0": (REMOVED, array(INT32, 1, b"\xff" * 4)),
    "what nobody reads": ("general.tags", array(STRING, 2, text(b"a") + text(b"b"))),
}  # fmt: skip
IN_WORDS = ["general.alignment", "llama.block_count", "llama.full_attention_interval", "split.count", REMOVED]
TENSORS = {
    "a number of 5000 digits": {"name": b"blk." + b"9" * 5000 + b".x"}, "2^256 values": {"shape": (1 << 63,) * 4},
    "digits of another script": {"name": "blk.٣.attn_q.weight".encode()}, "an offset of 2^63": {"offset": 1 << 63},
    "block 10^9": {"name": b"blk.999999999.attn_q.weight"}, "an offset that is not aligned": {"offset": 1},
    "a million dimensions": {"shape": ((1 << 64) - 1,) * 1_000_000}, "an unknown type": {"type": 4_000_000_000},
    "a part of a block of Q4_0": {"shape": (3,), "type": 2},
}  # fmt: skip
GGUFS = {
    **{f"{name} is {value}": number(name, type_, value) for name, type_, value in NUMBERED},
    **{f"a list: {name}": key(own, ARRAY, data) for name, (own, data) in LISTED.items()},
    **{f"{name} in words": key(name, STRING, text(b"many")) for name in IN_WORDS},
    "an architecture of 100 kB": key("general.architecture", STRING, text(b"x" * 100_000)),
    **{f"a tensor: {name}": tensor(**changes) for name, changes in TENSORS.items()},
    "version 1": lambda file: replace(file, version=1),
    "version 2^32 - 1": lambda file: replace(file, version=(1 << 32) - 1),
    "a key twice": lambda file: replace(file, entries=(*file.entries, file.entries[0])),
    "a tensor twice": lambda file: replace(file, tensors=(*file.tensors, file.tensors[0])),
    "an offset in another tensor": lambda file: tensor(offset=file.tensors[1][3])(file),
}
"""What makes a GGUF file lie, by name."""
HARMLESS = [name for name in GGUFS if any(word in name for word in ("leading", "script", "license", "nobody"))]
"""Read as they are: all blocks are leading ones, and a name that is not a block's."""


@st.composite
def gguf_files(draw: st.DrawFn, whole: Gguf) -> bytes:
    """Draw a GGUF file that lies in some ways, and of which perhaps some bytes are others."""
    file = whole
    for name in draw(st.lists(st.sampled_from(HARMLESS) | st.sampled_from(list(GGUFS)), min_size=1, max_size=3)):
        file = GGUFS[name](file)
    data = file.to_bytes()
    return draw(damaged(data)) if draw(st.booleans()) else data


# Texts.

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]
HEADS = [b"PAR1", b"\x1f\x8b\x08\0", b"PK\3\4", b"%PDF-1.7", b"\x93NUMPY"]


def texts(whole: bytes) -> Any:
    """Draw texts in other encodings, with what no text holds, or with nothing in them."""
    strange = st.text().map(lambda said: whole.decode() + said)
    encoded = st.builds(str.encode, strange, st.sampled_from(ENCODINGS), st.just("replace"))
    return st.one_of(encoded, st.builds(bytes.__add__, st.sampled_from(HEADS), st.binary()), *[damaged(whole)] * 2)


@st.composite
def rows(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw lines of JSON, of which none to two lie."""
    lines = whole.splitlines()
    row = json.loads(lines[0])
    for _ in range(draw(st.integers(0, 2))):
        lines[draw(st.integers(0, len(lines) - 1))] = to_text(draw(lying(row)))
    ends = [b"\n"] * 8 + [b"\r\n", "\u2028".encode(), b"\n\n", b""]
    data = draw(st.sampled_from(ends)).join(lines)
    return draw(damaged(data)) if draw(st.integers(0, 4)) == 0 else data
