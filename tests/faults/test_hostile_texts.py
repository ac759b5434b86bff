"""Texts and task files that are not what they should be: read within limits, or refused with a sentence."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import strategies as st

from conftest import calibration, prose
from faults import hostile_readers
from faults.conftest import counts
from faults.hostile_json import damaged, lying
from faults.hostile_reading import draw, read_all, require_sentences, run_on
from faults.program import Program

WHOLE = prose(40).encode()
ROWS = [{"text": prose(3, seed)} for seed in range(12)]
CHAT = [
    {"messages": [{"role": "user", "content": prose(1, seed)}, {"role": "assistant", "content": prose(2, seed)}]}
    for seed in range(6)
]


@st.composite
def plain_texts(draw_: st.DrawFn) -> bytes:
    """Draw texts in other encodings, with what no text holds, or with nothing in them."""
    match draw_(st.integers(0, 5)):
        case 0:
            text = draw_(st.text(alphabet=st.characters(), max_size=300)) * draw_(st.integers(1, 20))
            encoding = draw_(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]))
            return text.encode(encoding, "surrogatepass")
        case 1:
            return draw_(st.binary(max_size=2000))
        case 2:
            pieces = [
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
                "a",
            ]
            return "".join(draw_(st.lists(st.sampled_from(pieces), max_size=30))).encode() * draw_(st.integers(0, 50))
        case 3:
            return draw_(st.sampled_from([b"PAR1", b"\x1f\x8b\x08\0", b"PK\3\4", b"%PDF-1.7", b"\x93NUMPY"])) + draw_(
                st.binary()
            )
    return draw_(damaged(WHOLE))


@st.composite
def rows(draw_: st.DrawFn, whole: list) -> bytes:
    """Draw lines of JSON, some of which lie."""
    lines = [json.dumps(row) for row in whole]
    for _ in range(draw_(st.integers(1, 2))):
        lines[draw_(st.integers(0, len(lines) - 1))] = draw_(lying(whole[0]))
    data = draw_(st.sampled_from(["\n"] * 8 + ["\r\n", "\u2028", "\n\n", ""])).join(lines)
    data = data.encode("utf-8", "surrogatepass")
    return draw_(damaged(data)) if draw_(st.integers(0, 4)) == 0 else data


@counts(60, 500)
@pytest.mark.parametrize("kind", ["text", "rows", "chat"])
def test_whatever_a_text_is_it_is_read_or_refused(program: Program, tmp_path, tiny_llama, count, kind, tried):
    strategy, suffix, reader = {
        "text": (plain_texts(), ".txt", hostile_readers.read_text),
        "rows": (rows(ROWS), ".jsonl", hostile_readers.read_text),
        "chat": (rows(CHAT), ".jsonl", hostile_readers.read_conversations),
    }[kind]
    (tmp_path / "a" / "cases").mkdir(parents=True)
    (tmp_path / "a" / "cases" / "model").symlink_to(tiny_llama)
    whole = {"text": WHOLE, "rows": b"\n".join(json.dumps(row).encode() for row in ROWS)}
    whole["chat"] = b"\n".join(json.dumps(row).encode() for row in CHAT)
    cases = [whole[kind], *draw(strategy, count - 1)]
    counted = require_sentences(read_all(program, reader, cases, tmp_path / "a", suffix), cases)
    assert counted["taken"] > 0, counted
    assert counted["refused"] > count // 4, counted
    tried("hostile texts", len(cases))


NAMED = {
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
    "half.jsonl": b'{"text": "\\ud800"}',
    "list.jsonl": b"[1]",
    "number.jsonl": b"NaN",
    "null.jsonl": b'{"text": null}',
    "object.jsonl": b'{"text": {}}',
    "blank.jsonl": b"\n \n\n",
    "empty.txt": b"",
    "spaces.txt": b" \n\t" * 10_000,
    "mark.txt": b"\xef\xbb\xbf",
    "utf-16.txt": prose(40).encode("utf-16"),
    "latin.txt": "\xe9".encode("latin-1") * 100,
    "surrogate.txt": b"\xed\xa0\x80" * 100,
    "packed.jsonl": b"\x1f\x8b\x08\0" + b"\0" * 100,
}


@pytest.mark.parametrize("name", NAMED)
def test_every_text_that_is_none_is_refused_by_name(program: Program, tmp_path, tiny_llama, name):
    (tmp_path / name).write_bytes(NAMED[name])
    finished = run_on(program, tmp_path, "search", tiny_llama, "--remove", 1, *calibration(tmp_path / name), codes=[5])
    assert name in finished.stderr


def test_what_ends_a_line_elsewhere_ends_none_of_a_jsonl_file(program: Program, tmp_path, tiny_llama):
    lines = [
        json.dumps({"text": prose(40, n).replace(" ", "\u2028", 3) + "\x85"}, ensure_ascii=False) for n in range(3)
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    words = ["search", tiny_llama, "--remove", 1, "--sample-tokens", 4, *calibration(tmp_path / "rows.jsonl")]
    run_on(program, tmp_path, *words, codes=[0])


@pytest.mark.parametrize("what", ["a line of 1 GB", "1 GB of rows"])
def test_a_text_that_does_not_fit_into_memory_is_refused_by_its_size(program: Program, tmp_path, tiny_llama, what):
    file = tmp_path / ("large.jsonl" if "rows" in what else "large.txt")
    with file.open("wb") as target:
        target.write(b'{"text": "' if "rows" in what else b"word " * 1000)
        target.truncate(1 << 30)  # the rest is NULs, which are text
    for words in (
        ["search", tiny_llama, "--remove", 1, *calibration(file)],
        ["eval", tiny_llama, "--perplexity", file, "--sequence-length", 16],
    ):
        finished = run_on(program, tmp_path, *words, codes=[5])
        assert re.search(r"large\.\w+ has 1\.07 GB of text, and memory is free for about \d", finished.stderr)


def test_what_is_no_file_is_not_opened(program: Program, tmp_path, tiny_llama):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe.txt", "device.txt", "folder.txt", "loop.jsonl"):
        for words in (
            ["search", tiny_llama, "--remove", 1, *calibration(tmp_path / name)],
            ["eval", tiny_llama, "--perplexity", tmp_path / name],
        ):
            finished = run_on(program, tmp_path, *words, codes=[5])
            assert name in finished.stderr


TASKS = {
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "task: x\n",
    "code": "task: x\ndoc_to_text: !!python/object/apply:os.system ['touch ../canary/ran']\n",
    "no data": "task: x\ndataset_path: ../canary\noutput_type: loglikelihood\n",
}


@pytest.mark.parametrize("what", TASKS)
def test_task_files_that_cannot_be_loaded(program: Program, tmp_path, tiny_llama, what):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "x.yaml").write_text(TASKS[what])
    words = ["eval", tiny_llama, "--tasks", "x", "--include-path", folder, "--limit", 2]
    run_on(program, tmp_path, *words, codes=[5], processor_seconds=60)  # lm-eval reads all its own tasks, too
