"""What lies: hypothesis strategies for documents, bytes, weight files, GGUF files and texts, made from honest ones."""

import copy
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
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
    "-o", "--push", "demo", "org/name", "$(touch outside/x)", "<script>alert(1)</script>", "[link=file:///x]x[/link]",
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


def drawn(strategy: Any, count: int) -> list[Any]:
    """Return this many cases of a strategy, always the same ones."""
    cases: list[Any] = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
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


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a place of a document."""
    for key in path:
        data = data[key]
    return data


def to_text(data: Any) -> bytes:
    """Return a document as JSON, with what no library writes in its place."""
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw, 2)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def lying(draw: st.DrawFn, document: Any, values: Any = None, keys: Any = None) -> Any:  # noqa: C901
    """Draw a document in which a few values or names are others, missing, doubled, or of another type."""
    # As defaults, hypothesis would spell out both at every call.
    values, keys = hostile if values is None else values, words if keys is None else keys
    data = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not (known := places(data)):
            break
        *parents, last = draw(st.sampled_from(known))
        holder, value = at(data, tuple(parents)), draw(values)
        match draw(st.sampled_from(["set"] * 4 + ["add", "remove", "rename", "spell", "list", "copy", "scale"])):
            case "remove":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(keys)] = value
            case "rename" if isinstance(holder, dict):
                holder[draw(keys)] = holder.pop(last)
            case "add" | "rename":
                holder.insert(last, value)
            case "spell":
                holder[last] = str(holder[last])
            case "list":
                holder[last] = [holder[last]]
            case "copy":
                holder[last] = copy.deepcopy(at(data, draw(st.sampled_from(known[:40]))))
            case "scale" if type(holder[last]) in (int, float):
                holder[last] *= draw(st.sampled_from([-1, 2, 1000, 0]))
            case _:
                holder[last] = value
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
        data = draw(
            st.sampled_from(
                [
                    data[:place],
                    data[:place] + data[end:],
                    data[:end] + data[place:],
                    data[:place] + bytes([255 & ~byte for byte in data[place : place + 1]]) + data[place + 1 :],
                    *(data[:place] + each + data[place:] for each in strange),
                    *(data[:place] + each + data[place + len(each) :] for each in strange),
                    b"\xef\xbb\xbf" + data,
                    b"\xff\xfe" + data,
                ]
            )
        )
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
    try:
        said = draw(documents(json.loads(metadata[name])))
    except ValueError:
        said = draw(damaged(metadata[name].encode()))
    return metadata | {name: said.decode("utf-8", "replace")}


# GGUF files.

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts that need not agree: keys, types and values; tensors' names, shapes, types and offsets."""

    entries: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    values: bytes
    version: int = 3
    order: str = "<"
    more_entries: int = 0
    more_tensors: int = 0

    def to_bytes(self) -> bytes:
        given = ((self.tensors, self.more_tensors), (self.entries, self.more_entries))
        counts = [max(0, min(len(parts) + more, (1 << 64) - 1)) for parts, more in given]
        order = self.order
        parts = [b"GGUF", struct.pack(order + "IQQ", self.version, *counts)]
        for key, type_, data in self.entries:
            parts += [struct.pack(order + "Q", len(key)), key, struct.pack(order + "I", type_), data]
        for name, shape, type_, offset in self.tensors:
            parts += [struct.pack(order + "Q", len(name)), name, struct.pack(order + "I", len(shape))]
            parts += [struct.pack(f"{order}{len(shape)}QIQ", *shape, type_, offset)]
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


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(type_: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", type_, count) + data


def nested(depth: int) -> bytes:
    return array(ARRAY, 1, b"") * depth + array(UINT32, 0, b"")


U32 = [0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 255, 1 << 16, 1 << 20, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
U64 = [1 << 32, (1 << 40) + 1, (1 << 62) + 3, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
u64 = st.sampled_from(U32 + U64)
strings = words.map(lambda word: word.encode("utf-8", "replace")) | st.sampled_from([b"llama", b"gemma3", b"\xff\xfe"])
gguf_values = st.one_of(
    st.sampled_from(U32).map(lambda number: (UINT32, struct.pack("<I", number))),
    st.sampled_from([-1, -8, -(1 << 31), 3]).map(lambda number: (INT32, struct.pack("<i", number))),
    u64.map(lambda number: (UINT64, struct.pack("<Q", number))),
    st.sampled_from([math.nan, math.inf, -0.5, 1e30]).map(lambda number: (FLOAT32, struct.pack("<f", number))),
    st.sampled_from([0, 1, 2, 255]).map(lambda byte: (BOOL, bytes([byte]))),
    strings.map(lambda word: (STRING, text(word))),
    u64.map(lambda size: (STRING, struct.pack("<Q", size) + b"short")),
    st.sampled_from([1, 2, 100, 20_000]).map(lambda depth: (ARRAY, nested(depth))),
    st.tuples(st.integers(0, 14), u64).map(lambda said: (ARRAY, array(*said, b"\1" * 64))),
    st.lists(strings, max_size=6).map(lambda items: (ARRAY, array(STRING, len(items), b"".join(map(text, items))))),
    st.tuples(st.integers(0, (1 << 32) - 1), st.binary(max_size=40)),
)
KEYS = """general.alignment general.architecture general.type general.license general.tags split.count split.no
sleb.removed_blocks llama.block_count llama.nextn_predict_layers llama.vocab_size llama.leading_dense_block_count
llama.n_deepstack_layers llama.attention.head_count_kv llama.attention.sliding_window_pattern ../x
llama.full_attention_interval llama.interleave_moe_layer_step llama.attention.shared_kv_layers llama.embedding_length
tokenizer.ggml.tokens tokenizer.ggml.model tokenizer.ggml.merges tokenizer.ggml.scores tokenizer.chat_template
""".split()
TENSORS = [
    b"blk.0.attn_q.weight", b"blk.1.ffn_norm.weight", b"blk.4294967296.attn_q.weight", b"blk.-1.x", b"blk.00.x",
    b"\xff", b"blk." + b"9" * 5000 + b".x", "blk.٣.x".encode(), b"../outside/note.txt", b"", b"\0", b"n" * 255,
]  # fmt: skip


@st.composite
def gguf_files(draw: st.DrawFn, whole: Gguf) -> bytes:  # noqa: C901
    """Draw a GGUF file of which some parts, and then perhaps some bytes, are others."""
    file = whole
    for _ in range(draw(st.integers(1, 3))):
        entries, tensors = list(file.entries), list(file.tensors)
        entry, tensor = draw(st.integers(0, len(entries) - 1)), draw(st.integers(0, len(tensors) - 1))
        name, shape, type_, offset = tensors[tensor]
        match draw(st.integers(0, 10)):
            case 0 | 1:
                entries[entry] = (entries[entry][0], *draw(gguf_values))
            case 2 | 3:
                entries.insert(entry, (draw(st.sampled_from(KEYS)).encode(), *draw(gguf_values)))
            case 4 if len(entries) > 1:
                del entries[entry]
            case 5:
                entries.insert(entry, draw(st.sampled_from(entries)))
            case 6:
                tensors[tensor] = (draw(st.sampled_from(TENSORS)), shape, type_, draw(u64 | st.just(offset)))
            case 7:
                tensors[tensor] = (name, tuple(draw(st.lists(u64, max_size=6))), type_, offset)
            case 8:
                tensors[tensor] = (name, shape, draw(st.integers(0, 60)), offset)
            case 9:
                version = draw(st.sampled_from([0, 1, 2, 3, 4, 1 << 16, 3 << 24, (1 << 32) - 1]))
                file = replace(file, version=version, order=draw(st.sampled_from("<>")))
            case 10:
                more = draw(st.sampled_from([-1, 1, 1000, *U64]))
                file = replace(file, **{draw(st.sampled_from(["more_entries", "more_tensors"])): more})
        file = replace(file, entries=tuple(entries), tensors=tuple(tensors))
    data = file.to_bytes()
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


# Texts.

PIECES = [
    "\0",
    "\u2028",
    "\x85",
    " ",
    "\t",
    "\n",
    "\r",
    "\ufeff",
    "\U0010ffff",
    "\u0300",
    "<s>",
    "</s>",
    "word",
    "é",
    "λ",
    "🦙",
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]
HEADS = [b"PAR1", b"\x1f\x8b\x08\0", b"PK\3\4", b"%PDF-1.7", b"\x93NUMPY"]


def texts(whole: bytes) -> Any:
    """Draw texts in other encodings, with what no text holds, or with nothing in them."""
    pieces = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
    return st.one_of(
        st.builds(lambda said, encoding: (said * 20).encode(encoding, "replace"), pieces, st.sampled_from(ENCODINGS)),
        st.builds(bytes.__add__, st.sampled_from(HEADS), st.binary()),
        damaged(whole),
        damaged(whole),
    )


@st.composite
def rows(draw: st.DrawFn, whole: list[Any]) -> bytes:
    """Draw lines of JSON, of which none to two lie."""
    lines = [to_text(row) for row in whole]
    for _ in range(draw(st.integers(0, 2))):
        lines[draw(st.integers(0, len(lines) - 1))] = to_text(draw(lying(whole[0])))
    ends = [b"\n"] * 8 + [b"\r\n", "\u2028".encode(), b"\n\n", b""]
    data = draw(st.sampled_from(ends)).join(lines)
    return draw(damaged(data)) if draw(st.integers(0, 4)) == 0 else data
