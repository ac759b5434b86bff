"""GGUF files that lie: whatever they say, they are read within limits, or refused with a sentence."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import strategies as st

from conftest import prose
from faults import hostile_readers
from faults.conftest import counts
from faults.hostile_reading import draw, read_all, require_sentences, run_on
from faults.program import Program
from gguf_models import write_gguf, write_llama_gguf
from sleb_cli.engine.gguf.file import ARRAY, read_gguf

STRING, UINT32, INT32, FLOAT32, UINT64 = 8, 4, 5, 6, 10
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 255, 1 << 16, 1 << 20, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
HUGE = [1 << 32, (1 << 40) + 1, (1 << 62) + 3, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
WORDS = [
    b"", b"llama", b"gemma3", b"qwen3next", b"deepseek2", b"minicpm", b"model", b"mmproj", b"../canary/secret.txt",
    b"/etc/passwd", b"\x1b[31mred\x1b]0;title\x07", b"[bold red]markup[/]", b"\xff\xfe", b"a" * 300, b"x" * 100_000,
    b"\0",     "‮".encode(), b"1" * 5000,
]  # fmt: skip
KEYS = [
    "general.alignment", "general.architecture", "general.type", "general.license", "general.tags", "split.count",
    "split.no", "sleb.removed_blocks", "llama.block_count", "llama.nextn_predict_layers", "llama.vocab_size",
    "llama.leading_dense_block_count", "llama.n_deepstack_layers", "llama.attention.head_count_kv",
    "llama.attention.sliding_window_pattern", "llama.full_attention_interval", "llama.interleave_moe_layer_step",
    "llama.attention.shared_kv_layers", "llama.embedding_length", "tokenizer.ggml.tokens", "tokenizer.ggml.model",
    "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.chat_template", "xielu.alpha_n", "../x",
]  # fmt: skip
NAMES = [
    b"blk.0.attn_q.weight", b"blk.1.ffn_norm.weight", b"blk.4294967296.attn_q.weight", b"blk.-1.x", b"blk.00.x",
    b"blk." + b"9" * 5000 + b".x", "blk.٣.x".encode(), b"../../canary/secret.txt", b"/etc/passwd", b"", b"\0", b"\xff",
    b"n" * 255, b"output.weight", b"token_embd.weight",
]  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """A GGUF file in parts that need not agree."""

    entries: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    values: bytes
    version: int = 3
    order: str = "<"
    more_entries: int = 0
    more_tensors: int = 0
    alignment: int = 32

    def to_bytes(self) -> bytes:
        order = self.order
        count = [max(0, min(len(given) + more, (1 << 64) - 1)) for given, more in
                 ((self.tensors, self.more_tensors), (self.entries, self.more_entries))]  # fmt: skip
        parts = [b"GGUF", struct.pack(order + "IQQ", self.version, *count)]
        for key, type_, data in self.entries:
            parts += [struct.pack(order + "Q", len(key)), key, struct.pack(order + "I", type_), data]
        for name, shape, type_, offset in self.tensors:
            parts += [struct.pack(order + "Q", len(name)), name, struct.pack(order + "I", len(shape))]
            parts += [struct.pack(f"{order}{len(shape)}QIQ", *shape, type_, offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % self.alignment) + self.values


def parts_of(path: Path) -> Parts:
    """Take a whole file apart."""
    file = read_gguf(path)
    begin = min(tensor.start for tensor in file.tensors)
    return Parts(
        tuple((entry.key.encode(), entry.type, entry.data) for entry in file.entries),
        tuple((tensor.name.encode(), tensor.shape, tensor.type, tensor.start - begin) for tensor in file.tensors),
        path.read_bytes()[begin:],
    )


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(type_: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", type_, count) + data


def nested(depth: int) -> bytes:
    return array(ARRAY, 1, b"") * depth + array(UINT32, 0, b"")


numbers = st.sampled_from(NUMBERS + HUGE)
values = st.one_of(
    st.sampled_from(NUMBERS).map(lambda number: (UINT32, struct.pack("<I", number))),
    st.sampled_from([-1, -8, -(1 << 31), 3]).map(lambda number: (INT32, struct.pack("<i", number))),
    numbers.map(lambda number: (UINT64, struct.pack("<Q", number))),
    st.sampled_from([float("nan"), float("inf"), -0.5, 1e30]).map(lambda number: (FLOAT32, struct.pack("<f", number))),
    st.sampled_from([0, 1, 2, 255]).map(lambda byte: (7, bytes([byte]))),
    st.sampled_from(WORDS).map(lambda word: (STRING, text(word))),
    numbers.map(lambda size: (STRING, struct.pack("<Q", size) + b"short")),
    st.sampled_from([1, 2, 100, 20_000]).map(lambda depth: (ARRAY, nested(depth))),
    st.tuples(st.integers(0, 14), numbers).map(lambda said: (ARRAY, array(*said, b"\1" * 64))),
    st.lists(st.integers(-2, 9), max_size=8).map(
        lambda items: (ARRAY, array(INT32, len(items), struct.pack(f"<{len(items)}i", *items)))
    ),
    st.lists(st.sampled_from(WORDS), max_size=6).map(
        lambda items: (ARRAY, array(STRING, len(items), b"".join(map(text, items))))
    ),
    st.tuples(st.integers(0, 1 << 32 - 1), st.binary(max_size=40)),
)


@st.composite
def lies(draw_: st.DrawFn, whole: Parts) -> bytes:  # noqa: C901
    """Change some parts of a whole file, and then perhaps some bytes."""
    file = whole
    for _ in range(draw_(st.integers(1, 3))):
        entries, tensors = list(file.entries), list(file.tensors)
        entry, tensor = draw_(st.integers(0, len(entries) - 1)), draw_(st.integers(0, len(tensors) - 1))
        name, shape, type_, offset = tensors[tensor]
        match draw_(st.integers(0, 12)):
            case 0 | 1:
                entries[entry] = (entries[entry][0], *draw_(values))
            case 2 | 3 | 4:
                entries.insert(entry, (draw_(st.sampled_from(KEYS)).encode(), *draw_(values)))
            case 5:
                del entries[entry]
            case 6:
                entries.insert(entry, entries[draw_(st.integers(0, len(entries) - 1))])
            case 7:
                tensors[tensor] = (draw_(st.sampled_from(NAMES)), shape, type_, offset)
            case 8:
                tensors[tensor] = (name, tuple(draw_(st.lists(numbers, max_size=6))), type_, offset)
            case 9:
                tensors[tensor] = (name, shape, draw_(st.integers(0, 60)), offset)
            case 10:
                tensors[tensor] = (name, shape, type_, draw_(numbers))
            case 11:
                file = replace(
                    file, version=draw_(st.sampled_from([0, 1, 2, 3, 4, 1 << 16, 3 << 24, (1 << 32) - 1])),
                    order=draw_(st.sampled_from("<>")),
                )  # fmt: skip
            case 12:
                more = draw_(st.sampled_from([-1, 1, 1000, *HUGE]))
                file = replace(file, **{draw_(st.sampled_from(["more_entries", "more_tensors"])): more})
        if not entries or not tensors:
            break
        file = replace(file, entries=tuple(entries), tensors=tuple(tensors))
    data = file.to_bytes()
    if draw_(st.integers(0, 3)) == 0:
        data = draw_(damage(data))
    return data


@st.composite
def damage(draw_: st.DrawFn, whole: bytes) -> bytes:
    """Change bytes of a whole file: overwrite numbers and strings, cut, insert, repeat."""
    data = bytearray(whole)
    for _ in range(draw_(st.integers(1, 4))):
        place = draw_(st.integers(0, max(0, min(len(data), 6000) - 1)))
        match draw_(st.integers(0, 5)):
            case 0:
                data[place : place + 1] = draw_(st.binary(min_size=1, max_size=1))
            case 1:
                data[place : place + 8] = struct.pack("<Q", draw_(numbers))
            case 2:
                data[place : place + 4] = struct.pack("<I", draw_(st.sampled_from(NUMBERS)))
            case 3:
                del data[place:]
            case 4:
                data[place:place] = draw_(st.binary(max_size=64))
            case 5:
                end = draw_(st.integers(place, len(data)))
                data[place:place] = data[place:end]
    return bytes(data)


@pytest.fixture
def whole(tmp_path) -> Path:
    values_ = {"vocab_size": 4, "attention.head_count_kv": [1, 2, 2, 1], "leading_dense_block_count": 1}
    return write_gguf(tmp_path / "whole.gguf", "llama", 4, values_)


@counts(250, 2500)
def test_whatever_a_file_says_it_is_read_or_refused_with_a_sentence(program: Program, tmp_path, whole, count, tried):
    cases = [*draw(lies(parts_of(whole)), count * 3 // 4), *draw(damage(whole.read_bytes()), count // 4)]
    counted = require_sentences(
        read_all(program, hostile_readers.read_gguf_file, cases, tmp_path / "many", ".gguf"), cases
    )
    assert counted["taken"] > count // 20, counted  # or nothing after the first check was ever reached
    assert counted["refused"] > count // 3, counted
    tried("hostile GGUF files", len(cases))


def with_entry(file: Parts, key: str, type_: int, data: bytes) -> bytes:
    kept = [entry for entry in file.entries if entry[0] != key.encode()]
    return replace(file, entries=(*kept, (key.encode(), type_, data))).to_bytes()


def with_tensor(file: Parts, **changes: object) -> bytes:
    names = ("name", "shape", "type", "offset")
    first = dict(zip(names, file.tensors[0], strict=True)) | changes
    return replace(file, tensors=(tuple(first.values()), *file.tensors[1:])).to_bytes()


NAMED = {
    "arrays in arrays, deep": lambda f: with_entry(f, "x", ARRAY, nested(100_000)),
    "a string of 2^63 bytes": lambda f: with_entry(f, "x", STRING, struct.pack("<Q", 1 << 63)),
    "an array of 2^63 strings": lambda f: with_entry(f, "x", ARRAY, array(STRING, 1 << 63, b"")),
    "an array of 2^63 numbers": lambda f: with_entry(f, "x", ARRAY, array(UINT64, 1 << 63, b"")),
    "an alignment of 0": lambda f: with_entry(f, "general.alignment", UINT32, struct.pack("<I", 0)),
    "an alignment of 12": lambda f: with_entry(f, "general.alignment", UINT32, struct.pack("<I", 12)),
    "an alignment of 2^31": lambda f: with_entry(f, "general.alignment", UINT32, struct.pack("<I", 1 << 31)),
    "an alignment of 2^63": lambda f: with_entry(f, "general.alignment", UINT64, struct.pack("<Q", 1 << 63)),
    "an alignment in words": lambda f: with_entry(f, "general.alignment", STRING, text(b"many")),
    "an architecture that is a list": lambda f: with_entry(f, "general.architecture", ARRAY, nested(1)),
    "an architecture of 100 kB": lambda f: with_entry(f, "general.architecture", STRING, text(b"x" * 100_000)),
    "2^64 - 1 keys": lambda f: replace(f, more_entries=1 << 64).to_bytes(),
    "2^64 - 1 tensors": lambda f: replace(f, more_tensors=1 << 64).to_bytes(),
    "2^31 - 1 blocks": lambda f: with_entry(f, "llama.block_count", UINT32, struct.pack("<I", (1 << 31) - 1)),
    "2^63 blocks": lambda f: with_entry(f, "llama.block_count", UINT64, struct.pack("<Q", 1 << 63)),
    "NaN blocks": lambda f: with_entry(f, "llama.block_count", FLOAT32, struct.pack("<f", float("nan"))),
    "blocks in words": lambda f: with_entry(f, "llama.block_count", STRING, text(b"many")),
    "-5 blocks that predict": lambda f: with_entry(f, "llama.nextn_predict_layers", INT32, struct.pack("<i", -5)),
    "2^63 leading blocks": lambda f: with_entry(f, "llama.leading_dense_block_count", UINT64, b"\0" * 7 + b"\x80"),
    "2^63 deepstack blocks": lambda f: with_entry(f, "llama.n_deepstack_layers", UINT64, b"\0" * 7 + b"\x80"),
    "a period in words": lambda f: with_entry(f, "llama.full_attention_interval", STRING, text(b"x")),
    "a split in words": lambda f: with_entry(f, "split.count", STRING, text(b"3")),
    "a split in a list": lambda f: with_entry(f, "split.count", ARRAY, array(UINT32, 1, b"abcd")),
    "removed blocks in words": lambda f: with_entry(f, "sleb.removed_blocks", STRING, text(b"3")),
    "removed blocks below 0": lambda f: with_entry(f, "sleb.removed_blocks", ARRAY, array(INT32, 1, b"\xff" * 4)),
    "a block removed twice": lambda f: with_entry(f, "sleb.removed_blocks", ARRAY, array(INT32, 2, bytes(8))),
    "a key twice": lambda f: replace(f, entries=(*f.entries, f.entries[0])).to_bytes(),
    "a tensor twice": lambda f: replace(f, tensors=(*f.tensors, f.tensors[0])).to_bytes(),
    "a number of 5000 digits": lambda f: with_tensor(f, name=b"blk." + b"9" * 5000 + b".x"),
    "digits of another script": lambda f: with_tensor(f, name="blk.٣.attn_q.weight".encode()),
    "block 10^9": lambda f: with_tensor(f, name=b"blk.999999999.attn_q.weight"),
    "2^256 values": lambda f: with_tensor(f, shape=(1 << 63,) * 4),
    "a million dimensions": lambda f: with_tensor(f, shape=((1 << 64) - 1,) * 1_000_000),
    "an offset of 2^63": lambda f: with_tensor(f, offset=1 << 63),
    "an offset that is not aligned": lambda f: with_tensor(f, offset=1),
    "an offset in another tensor": lambda f: with_tensor(f, offset=f.tensors[1][3]),
    "a type that nobody knows": lambda f: with_tensor(f, type=4_000_000_000),
    "a part of a block of Q4_0": lambda f: with_tensor(f, shape=(3,), type=2),
    "version 1": lambda f: replace(f, version=1).to_bytes(),
    "version 2^32 - 1": lambda f: replace(f, version=(1 << 32) - 1).to_bytes(),
    "the other byte order, half": lambda f: f.to_bytes()[:4] + struct.pack(">I", 3) + f.to_bytes()[8:],
    "nothing": lambda f: b"",
    "only its name": lambda f: b"GGUF",
}  # fmt: skip


HARMLESS = {"2^63 leading blocks", "digits of another script"}
"""Read as they are: all blocks are leading ones, and a name that is not a block's."""


def test_every_lie_that_has_a_name_is_refused(program: Program, tmp_path, whole):
    cases = [make(parts_of(whole)) for make in NAMED.values()]
    ended = read_all(program, hostile_readers.read_gguf_file, cases, tmp_path / "named", ".gguf")
    require_sentences(ended, cases)
    assert {name for name, end in zip(NAMED, ended, strict=True) if end.how == "taken"} == HARMLESS


LARGE = {
    "zeros as keys": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 63),
    "zeros as tensors": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 63, 0),
    "zeros as strings": struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, ARRAY, STRING, 1 << 40),
    "zeros as many strings": struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, ARRAY, STRING, 1 << 22),
    "zeros as numbers": struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, ARRAY, 0, 1 << 40),
    "zeros as many numbers": struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, ARRAY, UINT64, 1 << 22),
    "one string": struct.pack("<4sIQQQIQ", b"GGUF", 3, 0, 1, 0, STRING, 1 << 40),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_file_of_terabytes_takes_neither_memory_nor_time(program: Program, tmp_path, what):
    file = tmp_path / "large.gguf"
    with file.open("wb") as target:
        target.write(LARGE[what])
        target.truncate(1 << 41)
    run_on(program, tmp_path, "apply", file, "--blocks", 1, "-o", "out.gguf", codes=[4])
    assert not (tmp_path / "out.gguf").exists()


def test_what_is_no_file_is_not_opened(program: Program, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name in ("pipe", "device", "folder", "loop"):
        for words in (("apply", f"{name}.gguf", "--blocks", 1, "-o", "out.gguf"), ("eval", f"{name}.gguf")):
            run_on(program, tmp_path, *words, codes=[2, 4] if name == "folder" else [4])


@counts(8, 100)
def test_commands_end_with_a_sentence(program: Program, tmp_path, count, tried):
    whole = parts_of(write_llama_gguf(tmp_path / "whole.gguf", 3))
    (tmp_path / "text.txt").write_text(prose(60))
    # Beside a file that is read, nothing else of its folder is: no code, and no settings.
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", null]}}')
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "code.C"}, "model_type": "x"}')
    (folder / "code.py").write_text(f"open({str(tmp_path / 'canary' / 'ran')!r}, 'w')\n")
    for number, case in enumerate(draw(lies(whole), count)):
        file = folder / f"{number}.gguf"
        file.write_bytes(case)
        words = (
            ["apply", file, "--blocks", 1, "-o", f"out-{number}.gguf"]
            if number % 2
            else ["eval", file, "--perplexity", "text.txt", "--sequence-length", 16, "--max-windows", 2]
        )
        run_on(program, tmp_path, *words, codes=[0, 2, 3, 4, 5, 7, 9])
        file.unlink()
    tried("hostile GGUF files", count)
