"""What lies: documents, bytes, weight files and GGUF files, made from honest ones."""

import copy
import io
import json
import math
import struct
import zlib
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from random import Random
from typing import Any

import gguf
import torch

VALUES = [
    -1, 0, 1, 2, 7, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**9, 10**100, int("9" * 4000), 0.5, -0.0, 1e-320,
    1e308, math.nan, math.inf, -math.inf, None, True, False, [], {}, [[]], [{}], [None] * 3, [1] * 1000, [1, "x"], "",
    "0", "-1", "1e9", "x" * 100_000, "a\0b", "\ud800", "\u202e\u2066", "\x1b[31mred\x1b]0;t\x07\x9b2J", "[red]x[/red]",
    "[/]", "%s%n", "{x}", "~", "/", "..", "../outside/model.safetensors", "../outside/config.json", "/proc/self/mem",
    "/dev/zero", "model.layers.1", "a\nb", "__import__('os').abort()", "-o", "demo", "org/name", "$(touch outside/x)",
    "<script>alert(1)</script>", [2**62, 4], [0, 2**63], ["4"], [True] * 4, "F64", "BF16", {"quant_method": "gptq"},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:(x+x+)+y"]}}}, "flash_attention_2",
    {"AutoConfig": "../outside/code.C"}, {"rope_type": "yarn", "factor": 1e308}, ["full_attention"] * 10**5, "%deep%",
    "%open%", "%digits%", "%exponent%", "%comment%",
]  # fmt: skip
RAW = {
    "%deep%": "[" * 100_000 + "]" * 100_000, "%open%": '{"a":' * 100_000, "%digits%": "9" * 5000, "%exponent%": "1e400",
    "%comment%": "/* */ 1",
}  # fmt: skip
"""What no library writes, by what stands for it."""
KEYS = """auto_map quantization_config text_config layer_types rope_scaling pad_token_id sliding_window pruned_heads
attn_implementation adapter_path tokenizer_class _name_or_path num_labels to_dict use_cache custom_generate stop_strings
__metadata__ __class__ self model.layers.999999999999.x ../x""".split()


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


def to_text(data: Any) -> bytes:
    """Return a document as JSON, with what no library writes in its place."""
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw, 2)
    return text.encode("utf-8", "surrogatepass")


def _places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items)[:60]:
        found += _places(value, (*here, key))
    return found


def lying(document: Any, rng: Random) -> Any:
    """Return a document in which a value or name is another, missing, added, doubled, or of another type."""
    data = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2])):
        if not (known := _places(data)):
            return rng.choice(VALUES)
        *parents, last = rng.choice(known)
        holder, value = reduce(getitem, parents, data), copy.deepcopy(rng.choice(VALUES))
        match rng.choice(["set"] * 5 + ["other", "text", "add", "rename", "remove"]):
            case "other":
                holder[last] = copy.deepcopy(reduce(getitem, rng.choice(known), data))
            case "text":
                holder[last] = str(holder[last])
            case "add" if isinstance(holder, dict):
                holder[rng.choice(KEYS)] = value
            case "rename" if isinstance(holder, dict):
                holder[rng.choice(KEYS)] = holder.pop(last)
            case "remove":
                del holder[last]
            case _:
                holder[last] = value
    return data


def damaged(data: bytes, rng: Random) -> bytes:
    """Return bytes that were overwritten, cut, flipped, doubled or filled with others."""
    place = rng.randrange(min(len(data), rng.choice([6000, 1 << 40])))
    end = place + rng.randint(1, 40)
    strange = rng.choice([b"{", b"]", b'"', b",", b"\0" * 8, b"\xff" * 8, b"\xff\xfe", b"\xed\xa0\x80", b"9" * 400])
    return rng.choice([
        data[:place], data[:place] + data[end:], data[:end] + data[place:], data[:place] + strange + data[place:],
        data[:place] + strange + data[place + len(strange) :], b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, strange,
    ])  # fmt: skip


def document(data: bytes, rng: Random) -> bytes:
    return to_text(lying(json.loads(data), rng)) if rng.random() < 0.8 else damaged(data, rng)


def lines(data: bytes, rng: Random) -> bytes:
    each = data.splitlines()
    number = rng.randrange(len(each))
    return b"\n".join([*each[:number], document(each[number], rng), *each[number + 1 :]])


def journal(data: bytes, rng: Random) -> bytes:
    """Return a journal whose lines have the right checksums, and say what they like."""
    said = lines(b"\n".join(line[9:] for line in data.splitlines()), rng).split(b"\n")
    return b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in said)


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def weight_file(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else to_text(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def weights(data: bytes, rng: Random) -> bytes:
    """Return a weight file whose header, or what it says of itself, lies."""
    header, body = parse(data)
    length = rng.choice([0, 7, 2**20, 10**8, 2**31, 2**63 - 1, 2**64 - 1])
    deep = rng.choice([b"[" * 10**5, b'{"a":' * 10**5, b'{"a":[' + b"[]," * 300_000 + b"0]}", b"", b"{}"])
    name = rng.choice(list(header))
    twice = to_text(header)[:-1] + b"," + to_text({name: header[name]})[1:]
    lies = [weight_file(lying(header, rng), body)] * 6
    return rng.choice([*lies, weight_file(header, body, length), weight_file(deep, body), weight_file(twice, body),
                       weight_file(header, body[: rng.randrange(len(body))]), damaged(data, rng)])  # fmt: skip


# GGUF files.

UINT32, INT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 5, 6, 8, 9, 10
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
    ("llama.block_count", UINT32, (1 << 31) - 1), ("llama.block_count", FLOAT32, math.nan),
    ("llama.nextn_predict_layers", INT32, -5), ("llama.leading_dense_block_count", UINT64, 1 << 63),
]  # fmt: skip
LISTED = {
    "general.architecture": array(ARRAY, 1, b"") + array(UINT32, 0, b""), "x": array(STRING, 1 << 63, b""),
    "deep": array(ARRAY, 1, b"") * 100_000, "split.count": array(UINT32, 1, b"abcd"),
    REMOVED: array(INT32, 2, bytes(8)), "sleb.removed": array(UINT64, 1 << 63, b""),
}  # fmt: skip
IN_WORDS = ["general.alignment", "llama.block_count", "split.count", REMOVED]
TENSORS = {
    "a number of 5000 digits": {"name": b"blk." + b"9" * 5000 + b".x"}, "2^256 values": {"shape": (1 << 63,) * 4},
    "block 10^9": {"name": b"blk.999999999.attn_q.weight"}, "an offset of 2^63": {"offset": 1 << 63},
    "a million dimensions": {"shape": ((1 << 64) - 1,) * 1_000_000}, "an unknown type": {"type": 4_000_000_000},
    "a part of a block of Q4_0": {"shape": (3,), "type": 2}, "an offset that is not aligned": {"offset": 1},
}  # fmt: skip
GGUFS = {
    **{f"{name} is {value}": number(name, type_, value) for name, type_, value in NUMBERED},
    **{f"a list: {name}": key(name, ARRAY, data) for name, data in LISTED.items()},
    **{f"{name} in words": key(name, STRING, text(b"many")) for name in IN_WORDS},
    **{f"a tensor: {name}": tensor(**changes) for name, changes in TENSORS.items()},
    "an architecture of 100 kB": key("general.architecture", STRING, text(b"x" * 100_000)),
    "version 1": lambda file: replace(file, version=1),
    "a key twice": lambda file: replace(file, entries=(*file.entries, file.entries[0])),
    "a tensor twice": lambda file: replace(file, tensors=(*file.tensors, file.tensors[0])),
    "an offset in another tensor": lambda file: tensor(offset=file.tensors[1][3])(file),
}
"""What makes a GGUF file lie, by name."""
