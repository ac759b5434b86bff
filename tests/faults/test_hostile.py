"""Files that lie: each is read, or refused with a sentence, and nothing outside is touched.

Most of these once ended in a traceback or a hang.
"""

import json
import os
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from conftest import llama_config, prose, save_model
from faults.arrangements import saving_always
from faults.conftest import often
from faults.hostile import PIPE, SECRET, link, run_case
from faults.lies import Runs, parse, saved_as, weight_file
from faults.program import KILL, Calls, Fault
from gguf_models import write_gguf
from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.atomic import to_json

MODEL = (4,)
DATA = (5,)
PLAN = (3,)
OUTPUT = (8,)
FINE = (0,)
ANY = range(10)


def split(line):
    return tuple(line.split())


TEXT = split("--calibration text.txt --sequence-length 8")
FEW = split("--samples 2 --sample-tokens 2")
CUT = split("apply model --blocks 1 -o out --no-verify")
APPLY = split("apply model --blocks 1 -o out")
SEARCH = (*split("search model --remove 1 -o out.json"), *TEXT, *FEW)
ROWS = (*SEARCH, "--calibration", "rows.jsonl")
CHAT = (*SEARCH, *split("--calibration chat.jsonl --chat all --sequence-length 128"))
MEASURE = split("--perplexity text.txt --sequence-length 8 --max-windows 2 -o out.json")
EVAL = ("eval", "model", *MEASURE)
TABLE = split("export plan.json --to table")
RESUME = (*SEARCH, "--resume", "-o", "out.later.json")
HEAL = (*CUT, "-o", "out.healed", *split("--heal --heal-tokens 64 --samples 8"), *TEXT)
SHARDS = split("apply shards --blocks 1 -o out --no-verify")
PICKLE = split("apply pickle --blocks 1 -o out --no-verify")
CUT_GGUF = split("apply whole.gguf --blocks 1 -o out.gguf --no-verify")
OWN_PLAN = (
    split("apply own.json -o out --no-verify"),
    split("export own.json --to indices"),
    ("eval", "own.json", *MEASURE),
    split("search model --extend own.json --remove 2 -o out.json --sample-tokens 0"),
)
HEALING = ".out.healed.*.recovery"
RESULTS = ("plan.results/eval-0.json", "plan.results/bench-0.json")
WEIGHTS = "model/model.safetensors"
INDEX = "shards/model.safetensors.index.json"
TEMPLATE = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
LISTS = {"vocab_size": 4, "attention.head_count_kv": [1, 2, 2, 1]}
CODE = b"raise SystemExit('code was run')\n"


@pytest.fixture(scope="session")
def base(program, tmp_path_factory):
    """An honest folder in which commands work, with files outside of the model that nothing may
    touch.
    """
    top = tmp_path_factory.mktemp("hostile") / "bases" / "base"
    small = {"hidden_size": 16, "intermediate_size": 24}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for name, size in (("model", "5GB"), ("shards", "12KB")):
        save_model(top / name, llama_config(3, **small), max_shard_size=size)
    outside = shutil.copytree(top / "model", top / "outside")
    for path in outside.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_note": SECRET.decode()}))
    tensors = load((outside / "model.safetensors").read_bytes())
    save_file(tensors, outside / "model.safetensors", {"note": SECRET.decode()})
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
    rows = [json.dumps({"text": prose(3, seed)}) for seed in range(12)]
    (top / "rows.jsonl").write_text("\n".join(rows))
    plan = make_plan(8, 3, kinds=True)
    (top / "plan.results").mkdir()
    records = {
        "plan.json": plan,
        RESULTS[0]: make_evaluation(plan, items=20),
        RESULTS[1]: make_benchmark(plan, iterations=3, batches=(1,)),
    }
    for name, record in records.items():
        (top / name).write_text(to_json(record.to_data()))
    write_gguf(top / "whole.gguf", "llama", 4, {**LISTS, "leading_dense_block_count": 1})
    program.run(*SEARCH, "--protect-first", 0, "-o", "own.json", cwd=top)
    # Killed as it gives something its name, a command leaves what it had saved.
    for command, at in ((RESUME, 1), (HEAL, 3)):
        fault = Fault(top, at, KILL, Calls.RENAME)
        program.run(*command, cwd=top, fault=fault, before=(saving_always,), codes=[-9])
    return top


def changed(file, **changes):
    """Return what changes a document of JSON."""
    return lambda base: {
        file: json.dumps(json.loads((base / file).read_bytes()) | changes).encode()
    }


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


def named(plan, **model):
    """Return what lets a plan say something else of its model."""
    return lambda base: changed(
        plan, model=json.loads((base / plan).read_bytes())["model"] | model
    )(base)


VERSIONED = b'{"schema_version": 1, '
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '../x' %}",
    "{{",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/x') }}",
    "{{ raise_exception('\x1b[2Jno') }}",
]
SHOWN = {
    "\x1b[31mred\x1b]0;title\x07\x9b2J": r"\x1b[31mred\x1b]0;title",
    "\u202e[bold]a\x00b": r"\u202e[bold]a\x00b",
}
TEXTS = {
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number.jsonl": b"NaN",
    "half.jsonl": b'{"text": "\\ud800"}',
    "empty.txt": b"",
    "latin.txt": b"\xe9" * 100,
}
PLANS = {
    "deep lists": b"[" * 1_000_000,
    "NaN": b"NaN",
    "nothing": b"",
    "half of a surrogate pair": VERSIONED + b'"\\ud800": 1}',
}
ELSEWHERE = {"id": "../outside", "family": "../outside/code.py", "revision": None}
HONEST = [CUT, APPLY, SEARCH, ROWS, CHAT, EVAL, TABLE, RESUME, HEAL, SHARDS, PICKLE, CUT_GGUF]
HONEST += OWN_PLAN
CALLS = (
    (os.system, "touch ../outside/x"),
    (torch.zeros, 10**13),
    (open, "../outside/note.txt"),
)


def outside_shards(base):
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    outside = dict.fromkeys(weight_map, "../outside/model.safetensors")
    return {INDEX: json.dumps({"weight_map": outside}).encode()}


def model_cases():
    """Yield a name, a command, what makes the files, the exit codes, and what is said."""
    for words in HONEST:
        yield f"honest: {' '.join(words)}", words, {}, FINE, ""
    yield "a shape of texts", CUT, entry(shape=["16"]), MODEL, "model.safetensors"
    name = "model.layers.\x1b[2J\u202e\n.weight"
    yield "commands for a terminal", APPLY, renamed(name), MODEL, "missing"
    config = {"model/config.json": link("../outside/config.json")}
    yield "a config by a link", CUT, config, MODEL, "link"
    templates = {"model/additional_chat_templates": link("../outside")}
    yield "templates by a link", CHAT, templates, MODEL, "link"
    yield "shards outside", SHARDS, outside_shards, MODEL, ""
    yield "a config that is a pipe", CUT, {"model/config.json": PIPE}, MODEL, "config.json"
    yield "a config that is a list", SEARCH, {"model/config.json": b"[1]"}, MODEL, ""
    for key in ("num_hidden_layers", "num_local_experts"):
        huge = changed("model/config.json", **{key: 2**31})
        for words in (APPLY, SEARCH, EVAL):
            yield f"{words[0]}: a huge {key}", words, huge, MODEL, "cannot hold"
    yield "half a tokenizer", SEARCH, {"model/tokenizer.json": b'{"a": '}, MODEL, ""
    for template in TEMPLATES:
        files = {"model/chat_template.jinja": template.encode()}
        yield f"template {template[:40]!r}", CHAT, files, ANY, ""
    for data in (b"", b"GGUF\3\0\0\0\1"):
        yield f"GGUF: {data}", CUT_GGUF, {"whole.gguf": data}, MODEL, "whole.gguf"
    for function, *arguments in CALLS:
        pickle = {"pickle/pytorch_model.bin": saved_as(Runs(function, *arguments))}
        yield f"a pickle that calls {function.__name__}", PICKLE, pickle, MODEL, ""


def other_cases():
    """Yield cases of plans, texts and what an earlier command left."""
    for name, content in PLANS.items():
        yield f"plan: {name}", TABLE, {"plan.json": content}, PLAN, "plan.json"
    for file in RESULTS:  # beside a plan, they are left out
        yield f"half of {file}", TABLE, {file: b'{"kind": '}, FINE, ""
    for name, shown in SHOWN.items():
        for words in (("apply",), ("export", "--to", "mergekit")):
            plan = named("plan.json", id=f"/x/{name}", revision=None)
            yield f"{words[0]}: {name!r} on the screen", words, plan, MODEL, shown
    # Whatever a plan names, what a command writes lies where it was started.
    for words in OWN_PLAN:
        plan = named("own.json", **ELSEWHERE)
        yield f"{words[0]}: a plan that names places", words, plan, ANY, ""
    journal = {"out.json.journal": link("outside/note.txt")}
    yield "a journal leads outside", SEARCH, journal, OUTPUT, ""
    contents = {"is broken": bytes(999), "leads outside": link("outside/note.txt")}
    for name, content in contents.items():
        yield f"a state of a recovery {name}", HEAL, partial(state, content), PLAN, ""
    for name, data in TEXTS.items():
        yield f"text: {name}", (*SEARCH, "--calibration", name), {name: data}, DATA, name


def state(content, base):
    return {next(base.glob(HEALING)).relative_to(base): content}


NAMED = {name: case for name, *case in (*model_cases(), *other_cases())}


@pytest.mark.parametrize("name", often(NAMED, list(NAMED)[::6]), ids=ascii)
def test_a_file_that_lies_is_read_or_refused_in_a_sentence(program, base, name):
    words, files, codes, says = NAMED[name]
    ended = run_case(program, base, words, files(base) if callable(files) else files)
    assert ended.exit_code in codes, ended.stderr
    assert re.search(re.escape(says), ended.stderr + ended.stdout), ended.stderr
