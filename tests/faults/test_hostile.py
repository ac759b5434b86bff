"""Files that lie: each is read, or refused with a sentence, and nothing outside is touched.

Most of these once ended in a traceback or a hang.
"""

import json
import os
import re
import shutil
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from conftest import llama_config, prose, save_model
from faults.arrangements import saving_always
from faults.conftest import often
from faults.hostile import FOLDER, PIPE, SECRET, link, run_case, sparse
from faults.lies import GGUFS, STRING, Runs, gguf_of, parse, saved_as, weight_file
from faults.program import KILL, Calls, Fault
from gguf_models import write_gguf
from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.atomic import to_json

MODEL, DATA, PLAN, OUTPUT, ANY, FINE = (4,), (5,), (3,), (8,), range(10), (0,)
TEXT = (
    "--calibration",
    "text.txt",
    "--samples",
    "2",
    "--sequence-length",
    "8",
    "--sample-tokens",
    "2",
)
CUT = ("apply", "model", "--blocks", "1", "-o", "out", "--no-verify")
APPLY = CUT[:-1]
SEARCH = ("search", "model", "--remove", "1", *TEXT, "-o", "out.json")
ROWS = (*SEARCH, "--calibration", "rows.jsonl")
CHAT = (*SEARCH, "--calibration", "chat.jsonl", "--chat", "all", "--sequence-length", "128")
EVAL = (
    "eval",
    "model",
    "--perplexity",
    "text.txt",
    "--sequence-length",
    "8",
    "--max-windows",
    "2",
    "-o",
    "out.json",
)
TABLE = ("export", "plan.json", "--to", "table")
RESUME = (*SEARCH, "--resume", "-o", "out.later.json")
HEAL = (*CUT, "-o", "out.healed", "--heal", "--heal-tokens", "64", *TEXT[:-2], "--samples", "8")
SHARDS, PICKLE = (("apply", model, *CUT[2:]) for model in ("shards", "pickle"))
CUT_GGUF = ("apply", "whole.gguf", "--blocks", "1", "-o", "out.gguf", "--no-verify")
OWN_PLAN = (
    ("apply", "own.json", "-o", "out", "--no-verify"), ("export", "own.json", "--to", "indices"),
    ("eval", "own.json", *EVAL[2:]),
    ("search", "model", "--extend", "own.json", "--remove", "2", "-o", "out.json", "--sample-tokens", "0"),
)  # fmt: skip
JOURNAL, HEALING = "out.later.json.journal", ".out.healed.recovery/**/healing*.safetensors"
WEIGHTS, INDEX = "model/model.safetensors", "shards/model.safetensors.index.json"
TEMPLATE = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
LISTS = {"vocab_size": 4, "attention.head_count_kv": [1, 2, 2, 1]}
LINES = [prose(3, seed) for seed in range(12)]
CODE = b"raise SystemExit('code was run')\n"


@pytest.fixture(scope="session")
def base(program, tmp_path_factory):
    """An honest folder in which commands work, with files outside of the model that nothing may
    touch.
    """
    top = tmp_path_factory.mktemp("hostile") / "bases" / "base"
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for name, size in (("model", "5GB"), ("shards", "12KB")):
        save_model(top / name, llama_config(3, **small), max_shard_size=size)
    outside = shutil.copytree(top / "model", top / "outside")
    for path in outside.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_note": SECRET.decode()}))
    save_file(
        load((outside / "model.safetensors").read_bytes()),
        outside / "model.safetensors",
        {"note": SECRET.decode()},
    )
    (outside / "note.txt").write_bytes(SECRET)
    (outside / "code.py").write_bytes(CODE)
    pickle = shutil.copytree(top / "model", top / "pickle")
    (pickle / "model.safetensors").unlink()
    torch.save(load_file(top / WEIGHTS), pickle / "pytorch_model.bin")
    (top / "model" / "chat_template.jinja").write_bytes(TEMPLATE)
    (top / "model" / "code.py").write_bytes(CODE)
    (top / "text.txt").write_text(prose(60))
    talk = [{"role": "user", "content": "river"}, {"role": "assistant", "content": prose(3)}]
    (top / "chat.jsonl").write_bytes(b"\n".join([json.dumps({"messages": talk}).encode()] * 4))
    (top / "rows.jsonl").write_bytes(
        b"\n".join(json.dumps({"text": line}).encode() for line in LINES)
    )
    plan = make_plan(8, 3, kinds=True)
    records = {"plan": plan, "plan.eval": make_evaluation(plan, items=20),
               "plan.bench": make_benchmark(plan, iterations=3, batches=(1,))}  # fmt: skip
    for name, record in records.items():
        (top / f"{name}.json").write_text(to_json(record.to_data()))
    write_gguf(top / "whole.gguf", "llama", 4, {**LISTS, "leading_dense_block_count": 1})
    program.run(*SEARCH, "--protect-first", 0, "-o", "own.json", cwd=top)
    # Killed as it gives something its name, a command leaves what it had saved.
    for command, at in ((RESUME, 1), (HEAL, 3)):
        program.run(
            *command, cwd=top, fault=Fault(top, at, KILL, Calls.RENAME), before=(saving_always,), codes=[-9]
        )  # fmt: skip
    return top


def changed(file, **changes):
    """Return what changes a document of JSON."""
    return lambda base: {
        file: json.dumps(json.loads((base / file).read_bytes()) | changes).encode()
    }


def config(**changes):
    return changed("model/config.json", **changes)


def weights(change):
    """Return what gives the weight file another header."""

    def make(base):
        header, body = parse((base / WEIGHTS).read_bytes())
        return {WEIGHTS: weight_file(change(header), body)}

    return make


def entry(**changes):
    return weights(
        lambda header: header | {"model.norm.weight": header["model.norm.weight"] | changes}
    )


def renamed(name):
    return weights(lambda header: header | {name: header.pop("model.norm.weight")})


def in_gguf(make):
    return lambda base: {"whole.gguf": make(gguf_of(base / "whole.gguf")).to_bytes()}


def named(plan, **model):
    """Return what lets a plan say something else of its model."""
    return lambda base: changed(
        plan, model=json.loads((base / plan).read_bytes())["model"] | model
    )(base)


def special(file):
    """Return what is no file, by its kind."""
    return {
        "a pipe": PIPE,
        "a device": link("/dev/zero"),
        "a folder": FOLDER,
        "a loop": link(Path(file).name),
    }.items()


SHARD = "model-00001-of-00004.safetensors"
ODD_ROWS = [{"text": line.replace(" ", "\u2028", 3) + "\x85"} for line in LINES]
ODD_ROWS = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ODD_ROWS)
NESTED = b'{"a":' * 600 + b"1" + b"}" * 600
DIGITS = int("9" * 4000)
EMPTY = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 0)
TERABYTES = [
    struct.pack("<4sIQQ", b"GGUF", 3, 0, (1 << 64) - 1), struct.pack("<4sIQQ", b"GGUF", 3, (1 << 64) - 1, 0),
    EMPTY + struct.pack("<IQ", STRING, 1 << 40),
]  # fmt: skip
VERSIONED = b'{"schema_version": 1, '
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '../x' %}", "{{", "",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/x') }}", "{{ "
                                                                         "raise_exception('\x1b[2Jno') }}",
    "{{" + "(" * 5000 + ")" * 5000 + "}}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip
SHOWN = {
    "\x1b[31mred\x1b]0;title\x07\x9b2J": r"\x1b[31mred\x1b]0;title",
    "\u202e[bold]a\x00b": r"\u202e[bold]a\x00b",
}
TEXTS = {
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "number.jsonl": b"NaN", "empty.txt": b"",
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}", "half.jsonl": b'{"text": "\\ud800"}', "latin.txt": b"\xe9" * 100,
    "utf-16.txt": prose(40).encode("utf-16"), "packed.jsonl": b"\x1f\x8b\x08\0" + b"\0" * 100, "pipe.txt": PIPE,
    "gigabyte.txt": sparse(b"word " * 1000, 1 << 30), "gigabyte.jsonl": sparse(b'{"text": "', 1 << 30),
}  # fmt: skip
PLANS = {
    "deep lists": b"[" * 1_000_000, "NaN": b"NaN", "nothing": b"",
    "half of a surrogate pair": VERSIONED + b'"\\ud800": 1}',
    "a version of 5000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "a terabyte": sparse(b"", 1 << 40), **dict(special("plan.json")),
}  # fmt: skip
ELSEWHERE = {"id": "../outside", "family": "../outside/code.py", "revision": None}
# A name, a command, what makes the files, the exit codes, and what is said.
NAMED = {
    **{f"honest: {' '.join(words)}": (words, {}, FINE, "") for words in
       (CUT, APPLY, SEARCH, ROWS, CHAT, EVAL, TABLE, RESUME, HEAL, SHARDS, PICKLE, CUT_GGUF, *OWN_PLAN)},
    "settings in settings": (APPLY, {"model/processor_config.json": NESTED}, MODEL, "process"),
    "a block of 5000 digits": (APPLY, renamed(f"model.layers.{'9' * 5000}.weight"), (0, 4), ""),
    "no blocks": (CUT, config(num_hidden_layers=0), MODEL, "llama"),
    "a billion blocks": (CUT, config(num_hidden_layers=10**9), MODEL, "num_hidden_layers"),
    "a number of 4000 digits": (CUT, config(hidden_size=[DIGITS]), MODEL, "config"),
    "a shape of texts": (CUT, entry(shape=["16"]), MODEL, "model.safetensors"),
    "a shape whose product takes hours": (CUT, entry(dtype="X", shape=[2**62] * 400_000), MODEL, "model.safetensors"),
    "commands for a terminal": (APPLY, renamed("model.layers.\x1b[2J\u202e\n.weight"), MODEL, "missing"),
    "a config by a link": (CUT, {"model/config.json": link("../outside/config.json")}, MODEL, "link"),
    "templates by a link": (CHAT, {"model/additional_chat_templates": link("../outside")}, MODEL, "link"),
    "shards outside": (SHARDS, lambda base: {INDEX: json.dumps({"weight_map": dict.fromkeys(
        json.loads((base / INDEX).read_text())["weight_map"], "../outside/model.safetensors")}).encode()}, MODEL, ""),
    "a config that is a pipe": (CUT, {"model/config.json": PIPE}, MODEL, "config.json"),
    "a config without end": (CUT, {"model/config.json": sparse(b"{", 2**40)}, MODEL, "config.json"),
    **{f"template {t[:40]!r}": (CHAT, {"model/chat_template.jinja": t.encode()}, ANY, "") for t in TEMPLATES},
    **{f"GGUF: {name}": (CUT_GGUF, in_gguf(make), ANY, "") for name, make in GGUFS.items()},
    **{f"GGUF: {data}": (CUT_GGUF, {"whole.gguf": data}, MODEL, "whole.gguf") for data in (b"", b"GGUF\3\0\0\0\1")},
    **{f"GGUF: a terabyte, {number}": (CUT_GGUF, {"whole.gguf": sparse(head, 1 << 41)}, MODEL, "whole.gguf")
       for number, head in enumerate(TERABYTES)},
    **{f"GGUF: {name}": (CUT_GGUF, {"whole.gguf": content}, (2, 4), "") for name, content in special("whole.gguf")},
    **{f"plan: {name}": (TABLE, {"plan.json": content}, PLAN, "plan.json") for name, content in PLANS.items()},
    "plan: 100,000 steps": (TABLE, changed("plan.json", steps=[{}] * 100_000), PLAN, "plan.json"),
    "plan: 10^9 blocks": (TABLE, named("plan.json", blocks=10**9), PLAN, "plan.json"),
    # Beside a plan, they are left out.
    **{f"{kind}: {name}": (TABLE, {f"plan.{kind}.json": content}, FINE, "")
       for kind, (name, content) in product(("eval", "bench"), special("x"))},
    **{f"{words[0]}: {name!r} on the screen": (words, named("plan.json", id=f"/x/{name}", revision=None), MODEL, shown)
       for (name, shown), words in product(SHOWN.items(), (("apply",), ("export", "--to", "mergekit")))},
    # Whatever a plan names, what a command writes lies where it was started.
    **{f"{words[0]}: a plan that names places": (words, named("own.json", **ELSEWHERE), ANY, "") for words in OWN_PLAN},
    **{f"{file} leads outside": (words, {file: link("outside/note.txt")}, OUTPUT, "")
       for file, words in (("out.json.journal", SEARCH), (".out.recovery", (*HEAL, "-o", "out")))},
    **{f"a pickle that calls {of[0].__name__}": (PICKLE, {"pickle/pytorch_model.bin": saved_as(Runs(*of))}, MODEL, "")
       for of in ((os.system, "touch ../outside/x"), (torch.zeros, 10**13), (open, "../outside/note.txt"))},
    "a state of a recovery": (HEAL, lambda base: {next(base.glob(HEALING)).relative_to(base): bytes(999)}, ANY, ""),
    **{f"{file}: {data}": (SEARCH, {f"model/{file}": data}, MODEL, "")
       for file, data in product(("config.json", "tokenizer.json", "tokenizer_config.json"), (b"[1]", b'{"a": '))},
    "a journal of one line without end": (RESUME, {JOURNAL: sparse(b"00000000 ", 1 << 40)}, PLAN, JOURNAL),
    **{f"text: {name}": ((*SEARCH, "--calibration", name), {name: data}, DATA, name) for name, data in TEXTS.items()},
    "what ends a line elsewhere ends none": (ROWS, {"rows.jsonl": ODD_ROWS.encode()}, FINE, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", often(NAMED, list(NAMED)[::6]), ids=ascii)
def test_a_file_that_lies_is_read_or_refused_in_a_sentence(program, base, name):
    words, files, codes, says = NAMED[name]
    ended = run_case(program, base, words, files(base) if callable(files) else files)
    assert ended.exit_code in codes, ended.stderr
    assert re.search(re.escape(says), ended.stderr + ended.stdout), ended.stderr
