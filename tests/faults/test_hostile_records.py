"""Plans, journals, results and saved states that lie: read within limits, or refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from typing import Any

import pytest
from hypothesis import strategies as st

from conftest import calibration
from faults import hostile_readers
from faults.conftest import counts
from faults.hostile_json import damaged, hostile, lying, written
from faults.hostile_reading import draw, read_all, require_sentences, run_on
from faults.program import Program
from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.atomic import to_json

PLAN = make_plan(8, 3, kinds=True)


def documents(data: Any, count: int) -> list[bytes]:
    """Return documents of which most lie, and others are damaged."""
    lies = [text.encode("utf-8", "surrogatepass") for text in draw(lying(data), count * 4 // 5)]
    return [*lies, *draw(damaged(to_json(data).encode()), count - len(lies))]


@counts(120, 1000)
def test_plans(program: Program, tmp_path, count, tried):
    cases = documents(PLAN.to_data(), count)
    counted = require_sentences(
        read_all(program, hostile_readers.read_plan_file, cases, tmp_path / "a", ".json"), cases
    )
    assert counted["refused"] > count // 2 > counted["taken"] > 0, counted
    tried("hostile plans", len(cases))


@counts(40, 400)
@pytest.mark.parametrize("kind", ["eval", "bench"])
def test_results(program: Program, tmp_path, count, kind, tried):
    whole = {
        "eval": lambda: make_evaluation(PLAN, items=20),
        "bench": lambda: make_benchmark(PLAN, iterations=3, batches=(1,)),
    }[kind]()
    cases = documents(whole.to_data(), count)
    reader = {"eval": hostile_readers.read_evaluation, "bench": hostile_readers.read_benchmark}[kind]
    (tmp_path / "a" / "cases").mkdir(parents=True)
    (tmp_path / "a" / "cases" / "plan").write_text(to_json(PLAN.to_data()))
    (tmp_path / "a" / "cases" / f"whole.{kind}").write_text(to_json(whole.to_data()))
    require_sentences(read_all(program, reader, cases, tmp_path / "a", ".json"), cases)
    tried("hostile results", len(cases))


def line(text: str) -> bytes:
    """Return a line of a journal with the right checksum."""
    data = text.encode("utf-8", "surrogatepass")
    return b"%08x %s\n" % (zlib.crc32(data), data)


MEASURED = [
    {"removed": [3, 1], "block": 4, "batch": 0, "scores": [2.5, 1.25]},
    {"removed": [], "block": None, "batch": None, "scores": [2.5]},
    {"removed": [2], "block": 5, "batch": 3, "scores": [0.5]},
]


@st.composite
def journals(draw_: st.DrawFn) -> bytes:
    """Draw journals whose lines have the right checksums, and say what they like."""
    lines = [written(hostile_readers.JOURNAL), *map(written, MEASURED)]
    for _ in range(draw_(st.integers(1, 2))):
        place = draw_(st.integers(0, len(lines) - 1))
        whole = [hostile_readers.JOURNAL, *MEASURED][place] if place < 4 else MEASURED[0]
        lines[place] = draw_(st.one_of(lying(whole), hostile.map(written)))
    data = b"".join(map(line, lines))
    return draw_(damaged(data)) if draw_(st.integers(0, 4)) == 0 else data


@counts(50, 500)
def test_journals(program: Program, tmp_path, count, tried):
    cases = draw(journals(), count)
    counted = require_sentences(read_all(program, hostile_readers.read_journal, cases, tmp_path / "a", ".j"), cases)
    assert counted["taken"] > count // 10, counted
    assert counted["refused"] > count // 10, counted
    tried("hostile journals", len(cases))


def safetensors(metadata: Any, tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    values = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(values), len(values) + len(data)]}
        values += data
    text = written(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + values


floats = st.sampled_from([b"\0\0\0\0", b"\0\0\x80?", b"\0\0\xc0\x7f", b"\0\0\x80\x7f"])  # 0, 1, NaN, infinity
shapes = st.sampled_from([[8], [2, 4, 8], [], [0], [64], [4, 2, 8], [1, 1, 1, 8], [2, 4, 9]])


@st.composite
def tensors(draw_: st.DrawFn, names: list[str], whole: dict[str, tuple[str, list[int], bytes]]) -> Any:
    """Draw tensors of other names, types and shapes than those of a whole file."""
    found = dict(whole)
    for _ in range(draw_(st.integers(0, 2))):
        shape, dtype = draw_(shapes), draw_(st.sampled_from(["F32", "F32", "F32", "BF16", "I64", "F64", "U8"]))
        size = {"F32": 4, "BF16": 2, "I64": 8, "F64": 8, "U8": 1}[dtype]
        count = 1
        for side in shape:
            count *= side
        found[draw_(st.sampled_from(names))] = (dtype, shape, (draw_(floats) * 2 * count)[: size * count])
    if draw_(st.integers(0, 5)) == 0:
        found.pop(next(iter(found)))
    return found


PROGRESS = {
    "scale": 1.0, "steps": 3, "tokens": 12, "seconds": 1.5, "portion": 0, "position": 2, "checks": 1, "stale": 0,
    "best_divergence": 0.5, "best_tokens": 12,
}  # fmt: skip
HEALING = {"best": ("F32", [8], b"\0" * 32), "deciding": ("I64", [2, 4], bytes(64))}


@st.composite
def healings(draw_: st.DrawFn) -> bytes:
    data = {"identity": hostile_readers.HEALING, "progress": PROGRESS, "record": "{}"}
    text = draw_(st.one_of(lying(data), st.just(json.dumps(data)), hostile.map(written)))
    found = draw_(tensors(["best", "deciding", "trained.values", "start.x", "../x"], HEALING))
    metadata = draw_(st.one_of(st.just({"sleb": text}), st.just({"sleb": text}), hostile))
    whole = safetensors(metadata, found)
    return draw_(damaged(whole)) if draw_(st.integers(0, 4)) == 0 else whole


@counts(50, 500)
def test_states_of_healings(program: Program, tmp_path, count, tried):
    cases = draw(healings(), count)
    counted = require_sentences(read_all(program, hostile_readers.read_healing, cases, tmp_path / "a", ".s"), cases)
    assert counted["refused"] > counted["taken"] > 0, counted
    tried("hostile states of healing", len(cases))


@st.composite
def walks(draw_: st.DrawFn) -> bytes:
    names = [
        "0.0.1.-1",
        "0.0.3.2",
        "0.1.1.1",
        "9.0.1.1",
        "0.0.1",
        "x",
        "0.0.0.0.0",
        "-1.-1.-1.-1",
        "9" * 5000 + ".0.0.0",
    ]
    whole = {"0.0.2.-1": ("F32", [2, 4, 8], bytes(256))}
    metadata = draw_(
        st.one_of(st.just(hostile_readers.WALK), st.just(hostile_readers.WALK), lying(hostile_readers.WALK))
    )
    if isinstance(metadata, str):
        metadata = {"identity": metadata}
    data = safetensors(metadata, draw_(tensors(names, whole)))
    return draw_(damaged(data)) if draw_(st.integers(0, 4)) == 0 else data


@counts(30, 300)
def test_saved_walks(program: Program, tmp_path, count, tried):
    cases = draw(walks(), count)
    counted = require_sentences(read_all(program, hostile_readers.read_walk, cases, tmp_path / "a", ".w"), cases)
    assert counted == {"taken": count}  # it only costs the time that it would have saved
    tried("hostile saved walks", len(cases))


NAMED = {
    "deep lists": b"[" * 1_000_000,
    "a deep version": b'{"schema_version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a version of 5000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "a version that is true": b'{"schema_version": true}',
    "half of a surrogate pair": b'{"schema_version": 1, "\\ud800": 1}',
    "a version in words": b'{"schema_version": "1"}',
    "no object": b"[1]",
    "NaN": b"NaN",
    "nothing": b"",
    "spaces": b" " * 1_000_000,
    "5 million lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "500,000 objects": b'{"schema_version": 1, "x": [' + b"{}," * 500_000 + b"{}]}",
    "2 million words": b'{"schema_version": 1, "removals": [' + b'"",' * 2_000_000 + b"1]}",
    "500,000 unknown keys": b'{"schema_version": 1' + b"".join(b',"%x":1' % key for key in range(500_000)) + b"}",
    "a key of 10 MB": b'{"schema_version": 1, "' + b"k" * 10_000_000 + b'": 1}',
    "a string of 10 MB": json.dumps(PLAN.to_data() | {"sleb_version": ["k" * 10_000_000]}).encode(),
    "100,000 steps": json.dumps(
        PLAN.to_data() | {"steps": [{"block": 1, "score": 1.0, "perplexity": 2.0, "scores": {}}] * 100_000}
    ).encode(),
    "10^9 blocks": json.dumps(PLAN.to_data() | {"model": PLAN.model.to_data() | {"blocks": 10**9}}).encode(),
    "a step without what is held out": json.dumps(
        PLAN.to_data() | {"steps": [step | {"held_out": None} for step in PLAN.to_data()["steps"]]}
    ).encode(),
    "a perplexity of 0": json.dumps(PLAN.to_data() | {"dense": {"loss": 1.0, "perplexity": 0.0}}).encode(),
}


def test_every_lie_of_a_plan_that_has_a_name_is_refused(program: Program, tmp_path):
    cases = list(NAMED.values())
    ended = read_all(program, hostile_readers.read_plan_file, cases, tmp_path / "named", ".json")
    require_sentences(ended, cases)
    assert [name for name, end in zip(NAMED, ended, strict=True) if end.how != "refused"] == []


def test_what_is_no_file_or_too_large_is_not_read(program: Program, tmp_path, tiny_llama):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "device", "folder", "loop", "large"):
        finished = run_on(program, tmp_path, "apply", f"{name}.json", codes=[3])
        assert f"{name}.json" in finished.stderr
    assert "it has 1099.51 GB, more than the limit of 67.1 MB" in finished.stderr
    (tmp_path / "plan.json").write_text(to_json(PLAN.to_data()))
    for name in ("pipe", "device", "folder", "large"):  # beside a plan, they are left out
        for kind in ("eval", "bench"):
            (tmp_path / f"plan.{kind}.json").unlink(missing_ok=True)
            (tmp_path / f"plan.{kind}.json").symlink_to(tmp_path / f"{name}.json")
        finished = run_on(program, tmp_path, "export", "--to", "summary", codes=[0])
        assert finished.stderr.count("is left out, because it cannot be read") == 2


@pytest.fixture
def plan(run_sleb, tiny_llama, text_file, tmp_path) -> dict[str, Any]:
    """A plan of the tiny Llama, as data."""
    words = ["--remove", 2, *calibration(text_file), "-o", "whole.json", "-q"]
    assert run_sleb("search", tiny_llama, *words).exit_code == 0
    return json.loads((tmp_path / "whole.json").read_text())


@counts(8, 80)
def test_commands_that_read_a_plan_end_with_a_sentence(program: Program, tmp_path, plan, text_file, count, tried):
    for number, case in enumerate(documents(plan, count)):
        (tmp_path / "plan.json").write_bytes(case)
        words = [
            ["apply", "plan.json", "-o", f"out-{number}"],
            ["export", "plan.json", "--to", "indices"],
            ["eval", "plan.json", "--perplexity", text_file, "--sequence-length", 16, "--max-windows", 2],
            ["search", "--extend", "plan.json", "--remove", 3, "--force"],
            ["bench", "plan.json", "--estimate", "--device-flops", 1e12, "--device-bandwidth", 1e11],
        ][number % 5]
        run_on(program, tmp_path, *words, codes=[0, 2, 3, 4, 5, 6, 7, 8, 9])
        for made in ("plan.eval.json", "plan.bench.json", "plan.json.journal"):
            (tmp_path / made).unlink(missing_ok=True)
    tried("hostile plans", count)


def test_a_plan_names_no_place_to_write(program: Program, tmp_path, plan, tiny_llama, text_file):
    """Whatever a plan names, what a command writes lies where it was started."""
    folder, elsewhere = tmp_path / "here", tmp_path / "here" / "canary"
    folder.mkdir()
    shutil.copytree(tiny_llama, folder / "model")
    texts = {
        "sleb_version": str(elsewhere / "version"),
        "calibration": plan["calibration"] | {"source": str(elsewhere / "text.txt")},
        "search": plan["search"] | {"metric": f"task:{elsewhere}/task.yaml", "device": str(elsewhere)},
        "environment": plan["environment"] | {"plugins": {str(elsewhere / "plugin.py"): str(elsewhere)}},
        "model": plan["model"] | {"family": str(elsewhere / "family.py"), "revision": None},
    }
    (folder / "plan.json").write_text(json.dumps(plan | texts))
    before = {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    for words in (
        ["apply", "--model", "model", "-o", "out"],
        ["export", "--to", "summary"],
        ["export", "--to", "report", "-o", "report.html"],
        ["eval", "--model", "model", "--perplexity", text_file, "--sequence-length", 16, "--max-windows", 2],
        ["search", "--extend", "plan.json", "--remove", 3, "--force"],
    ):
        run_on(program, folder, *words, codes=[0, 2, 3, 4, 5, 6])
    assert {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()} == before
    made = {path.name for path in folder.iterdir()} - {"plan.json", "model", "canary", "cache", "hub"}
    assert made <= {"out", "report.html", "plan.eval.json", "sleb-results"}, made
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "whole.json", "cache", "hub", "canary"}


@pytest.mark.parametrize("name", ["plan.json.journal", ".out.recovery"])
def test_a_link_in_the_place_of_a_journal_or_a_state_is_not_followed(
    program: Program, tmp_path, tiny_llama, text_file, name
):
    canary = tmp_path / "canary"
    (tmp_path / name).symlink_to(canary if name == ".out.recovery" else canary / "secret.txt")
    words = {
        "plan.json.journal": ["search", tiny_llama, "--remove", 1, *calibration(text_file)],
        ".out.recovery": ["apply", tiny_llama, "--blocks", 2, "--heal", "--heal-tokens", 64, "-o", "out"],
    }[name]
    for more in ([], ["--resume"], ["--force"]):
        run_on(program, tmp_path, *words, *more, codes=[8])
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(canary / "new")  # a link that leads nowhere yet
    for more in ([], ["--resume"], ["--force"]):
        run_on(program, tmp_path, *words, *more, codes=[8])


def test_a_line_of_a_journal_may_be_long_without_end(program: Program, tmp_path, tiny_llama, text_file):
    words = ["search", tiny_llama, "--remove", 1, *calibration(text_file)]
    journal = tmp_path / "plan.json.journal"
    journal.write_bytes(b"00000000 ")
    with journal.open("r+b") as file:
        file.truncate(1 << 40)
    finished = run_on(program, tmp_path, *words, "--resume", codes=[3])
    assert "is not a sleb journal" in finished.stderr


def test_what_a_plan_says_is_inert_on_the_screen(program: Program, tmp_path, plan):
    for words, shown in {
        "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title",
        "\x9b2J": r"\x9b2J",
        "[bold red]markup[/]": "[bold red]markup[/]",
        "\u202eevil": r"\u202eevil",
        "a\x00b": r"a\x00b",
        "[/]": "[/]",
    }.items():
        (tmp_path / "plan.json").write_text(json.dumps(plan | {"model": plan["model"] | {"id": f"/x/{words}"}}))
        for command in (["apply"], ["export", "--to", "indices"]):
            finished = run_on(program, tmp_path, *command, codes=[4])
            assert f"There is no folder /x/{shown}." in finished.stderr
            assert not set(finished.stderr + finished.stdout) & set("\x07\x9b\u202e\x00\x1b"), finished.stderr
        finished = run_on(program, tmp_path, "export", "--to", "summary", codes=[0])
        assert finished.stdout.startswith(shown.rpartition("/")[2]), finished.stdout
        assert not set(finished.stderr + finished.stdout) & set("\x07\x9b\u202e\x00\x1b"), finished.stdout
