"""Lies that have a name, most of which once ended in a traceback or a hang: each ends well, or with a sentence."""

import json
import re
import struct
from functools import partial
from itertools import product

import pytest

from conftest import prose
from faults.bases import (
    APPLY,
    CHAT,
    CUT,
    CUT_GGUF,
    EVAL,
    HEAL,
    PLANNED,
    RESUME,
    ROWS,
    ROWS_OF_PLAN,
    SEARCH,
    STREAM,
)  # fmt: skip
from faults.conftest import often
from faults.hostile import FOLDER, PIPE, PLACE, Case, link, require_well, run_cases, sparse
from faults.lies import ARRAY, GGUFS, HARMLESS, STRING, UINT64, gguf_of, parse, to_text, weight_file

MODEL, DATA, PLAN, OUTPUT, ANY = (4,), (5,), (3,), (8,), range(2, 10)
DIGITS = int("9" * 4000)
LISTS = b'{"a": [' + b"[]," * 5_000_000 + b"0]}"


def special(file):
    """Return what is no file, by its kind."""
    return {"a pipe": PIPE, "a device": link("/dev/zero"), "a folder": FOLDER, "a loop": link(file)}.items()


def put(file, content):
    return lambda base: {file: content}


def changed(file, change):
    """Return a function that changes a document of JSON."""

    def make(base):
        data = json.loads((base / file).read_text())
        return {file: to_text(data | change(data))}

    return make


def config(**changes):
    return changed("model/config.json", lambda data: changes)


def weights(change):
    """Return a function that makes a weight file with another header."""

    def make(base):
        header, body = parse((base / "model" / "model.safetensors").read_bytes())
        return {"model/model.safetensors": weight_file(change(header), body)}

    return make


def entry(**changes):
    return weights(lambda header: header | {"model.norm.weight": header["model.norm.weight"] | changes})


def numbered(header):
    return header | {f"model.layers.{'9' * 5000}.weight": header.pop("model.norm.weight")}


def renamed(header):
    return header | {"model.layers.\x1b[2J\u202e\n.weight": header.pop("model.norm.weight")}


OUTSIDE = ("config.json", "tokenizer.json", "model.safetensors")
MODELS = {
    "end tokens that are lists": (SEARCH, put("model/generation_config.json", b'{"eos_token_id": [[]]}'), (0,), ""),
    "settings in settings": (
        APPLY,
        put("model/processor_config.json", b'{"a":' * 600 + b"1" + b"}" * 600),
        MODEL,
        "processor_config.json",
    ),
    "a block of 5000 digits": (APPLY, weights(numbered), (0, *MODEL), ""),
    "no blocks": (CUT, config(num_hidden_layers=0), MODEL, "llama"),
    "a billion blocks": (CUT, config(num_hidden_layers=10**9), MODEL, "num_hidden_layers"),
    "a billion labels": (CUT, config(num_labels=10**9), MODEL, "num_labels"),
    "more blocks than a float can hold": (CUT, config(n_layers=DIGITS), MODEL, "n_layers"),
    "a number of 4000 digits": (CUT, config(hidden_size=[DIGITS]), MODEL, "config"),
    "a long name of a type": (CUT, config(model_type="x" * 10**6), MODEL, "xxx"),
    "a shape of texts": (CUT, entry(shape=["16"]), MODEL, "model.safetensors"),
    "a shape of truths": (CUT, entry(shape=[True] * 4 + [16]), MODEL, "model.safetensors"),
    "a shape whose product takes hours": (CUT, entry(dtype="X", shape=[2**62] * 400_000), MODEL, "model.safetensors"),
    "commands for a terminal": (APPLY, weights(renamed), MODEL, "missing"),
    **{f"{name} by a link": (CUT, put(f"model/{name}", link(f"../outside/{name}")), MODEL, "link") for name in OUTSIDE},
    "templates by a link": (CHAT, put("model/additional_chat_templates", link("../outside")), MODEL, "link"),
    "a config that is a pipe": (CUT, put("model/config.json", PIPE), MODEL, "config.json"),
    "a config without end": (CUT, put("model/config.json", sparse(b"{", 2**40)), MODEL, "config.json"),
    "a config of lists": (CUT, put("model/config.json", LISTS), MODEL, "config.json"),
}
TEMPLATES = [
    "{{ messages.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '../x' %}", "{{ 1/0 }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/x') }}", "{{ self.__init__ }}", "{% raw %}", "{{", "x",
    "{% import 'os' as os %}{{ os.system('id') }}", "{{ lipsum.__globals__ }}", "{{ ''|attr('__class__') }}", "\ud800",
    "{{ raise_exception('\x1b[2Jno') }}", "{% if %}", "{{ messages[99].content }}", "{{ {}.update.__globals__ }}", "\0",
    "{{ messages.clear() }}", "{{ messages.append(1) }}", "{% set x = namespace() %}{{ x }}", "{{ '(' * 100000 }}", "",
    "{% generation %}x{% endgeneration %}", "{{" + "(" * 5000 + ")" * 5000 + "}}", "{{ [1]|sum(start=[])}}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip


TERABYTES = {
    "zeros as keys": struct.pack("<4sIQQ", b"GGUF", 3, 0, (1 << 64) - 1),
    "zeros as tensors": struct.pack("<4sIQQ", b"GGUF", 3, (1 << 64) - 1, 0),
    "one string": struct.pack("<4sIQQQIQ", b"GGUF", 3, 0, 1, 0, STRING, 1 << 40),
    **{f"zeros as 2^{power} of type {type_}": struct.pack("<4sIQQQIIQ", b"GGUF", 3, 0, 1, 0, ARRAY, type_, 1 << power)
       for type_, power in ((STRING, 40), (STRING, 22), (0, 40), (UINT64, 22))},
}  # fmt: skip
VERSIONED = b'{"schema_version": 1, '
PLANS = {
    "deep lists": b"[" * 1_000_000, "no object": b"[1]", "NaN": b"NaN", "nothing": b"", "spaces": b" " * 1_000_000,
    "a deep version": b'{"schema_version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a version of 5000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "a version that is true": b'{"schema_version": true}', "half of a surrogate pair": VERSIONED + b'"\\ud800": 1}',
    "5 million lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "500,000 objects": VERSIONED + b'"x": [' + b"{}," * 500_000 + b"{}]}",
    "2 million words": VERSIONED + b'"removals": [' + b'"",' * 2_000_000 + b"1]}",
    "500,000 unknown keys": VERSIONED + b",".join(b'"%x":1' % key for key in range(500_000)) + b"}",
    "a key of 10 MB": VERSIONED + b'"' + b"k" * 10_000_000 + b'": 1}',
}  # fmt: skip
CHANGED_PLANS = {
    "a string of 10 MB": lambda plan: {"sleb_version": ["k" * 10_000_000]},
    "100,000 steps": lambda plan: {"steps": plan["steps"][:1] * 100_000},
    "10^9 blocks": lambda plan: {"model": plan["model"] | {"blocks": 10**9}},
    "a step without what is held out": lambda plan: {"steps": [step | {"held_out": None} for step in plan["steps"]]},
    "a perplexity of 0": lambda plan: {"dense": {"loss": 1.0, "perplexity": 0.0}},
}


def called(name, plan):
    return {"model": plan["model"] | {"id": name, "revision": None}}


def elsewhere(plan):
    place = f"{PLACE}/outside"
    return {
        "sleb_version": f"{place}/version",
        "calibration": plan["calibration"] | {"source": f"{place}/text.txt"},
        "search": plan["search"] | {"device": place},
        "environment": plan["environment"] | {"plugins": {f"{place}/plugin.py": place}},
        "model": plan["model"] | {"family": f"{place}/family.py", "revision": None},
    }


SHOWN = {
    "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title", "\x9b2J": r"\x9b2J", "[/]": "[/]",
    "[bold red]markup[/]": "[bold red]markup[/]", "\u202eevil": r"\u202eevil", "a\x00b": r"a\x00b",
}  # fmt: skip
TEXTS = {
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}", "half.jsonl": b'{"text": "\\ud800"}', "list.jsonl": b"[1]",
    "number.jsonl": b"NaN", "null.jsonl": b'{"text": null}', "object.jsonl": b'{"text": {}}', "blank.jsonl": b"\n \n\n",
    "empty.txt": b"", "spaces.txt": b" \n\t" * 10_000, "mark.txt": b"\xef\xbb\xbf", "latin.txt": b"\xe9" * 100,
    "utf-16.txt": prose(40).encode("utf-16"), "surrogate.txt": b"\xed\xa0\x80" * 100,
    "packed.jsonl": b"\x1f\x8b\x08\0" + b"\0" * 100,
    **{f"{name[2:]}.txt": content for name, content in special("loop.txt")},
    "gigabyte.txt": sparse(b"word " * 1000, 1 << 30), "gigabyte.jsonl": sparse(b'{"text": "', 1 << 30),
}  # fmt: skip
LINES = ["\u2028".join(row["text"].split(" ", 3)) + "\x85" for row in ROWS]
TASKS = {
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "task: x\n",
    "code": "task: x\ndoc_to_text: !!python/object/apply:os.system ['touch outside/ran']\n",
    "no data": "task: x\ndataset_path: nowhere\noutput_type: loglikelihood\n",
}


def made(make):
    return lambda base: {"whole.gguf": make(gguf_of(base / "whole.gguf")).to_bytes()}


# Cases: the name, the base, the command, what makes its files, the exit codes, and a pattern that is said.


def harmless():
    for base, words in product(("llama", "shards", "gpt2", "pickle"), (CUT, APPLY, SEARCH, EVAL)):
        said = "pytorch_model.bin" if base == "pickle" and words == CUT else ""
        yield f"an honest {base}, {words[0]} {words[-1]}", base, words, None, (0,), said
    others = {"chat": CHAT, "files": CUT_GGUF, "journal": RESUME, "walk": STREAM, "healing": (*HEAL, "--resume")}
    for base, words in (*others.items(), ("files", ROWS_OF_PLAN), *(("planned", words) for words in PLANNED)):
        yield f"an honest {base}, {words[:3]}", base, words, None, (0,), ""


def models():
    for name, (words, make, codes, says) in MODELS.items():
        yield name, "llama", words, make, codes, says
    for template in TEMPLATES:
        data = template.encode("utf-8", "surrogatepass")
        yield f"template {template[:40]!r}", "llama", CHAT, put("model/chat_template.jinja", data), range(10), ""


def ggufs():
    for name, make in GGUFS.items():
        yield name, "files", CUT_GGUF, made(make), (0,) if name in HARMLESS else ANY, ""
    for data in (b"", b"GGUF", b"GGUF\3\0\0\0\1"):
        yield f"a GGUF file of {data}", "files", CUT_GGUF, put("whole.gguf", data), MODEL, "whole.gguf"
    for name, head in TERABYTES.items():
        yield name, "files", CUT_GGUF, put("whole.gguf", sparse(head, 1 << 41)), MODEL, "whole.gguf"
    for (name, content), words in product(special("whole.gguf"), (CUT_GGUF, ("eval", "whole.gguf"))):
        make = put("whole.gguf", content)
        yield f"{words[0]}: a GGUF file that is {name}", "files", words, make, (2, 4), ""


def records():
    for name, content in (*PLANS.items(), *special("plan.json"), ("a terabyte", sparse(b"", 1 << 40))):
        yield f"a plan: {name}", "files", ROWS_OF_PLAN, put("plan.json", content), PLAN, "plan.json"
    for kind, (name, content) in product(("eval", "bench"), special("x")):  # beside a plan, they are left out
        yield f"{kind}: {name}", "files", ROWS_OF_PLAN, put(f"plan.{kind}.json", content), (0,), ""
    for name, change in CHANGED_PLANS.items():
        yield f"a plan: {name}", "files", ROWS_OF_PLAN, changed("plan.json", change), PLAN, "plan.json"
    for (name, shown), command in product(SHOWN.items(), (("apply",), ("export", "--to", "indices"))):
        make = changed("plan.json", partial(called, f"/x/{name}"))
        yield f"{command[-1]}: {shown} on the screen", "files", command, make, MODEL, re.escape(shown)
    for words in PLANNED:  # whatever a plan names, what a command writes lies where it was started
        yield f"{words[0]}: a plan that names places", "planned", words, changed("plan.json", elsewhere), range(10), ""
    for target, more in product(("note.txt", "new"), ((), ("--resume",), ("--force",))):
        for file, command in (("out.json.journal", SEARCH), (".out.recovery", HEAL)):
            make = put(file, link("outside" if command is HEAL and target == "note.txt" else f"outside/{target}"))
            yield f"{file} leads to {target} {more}", "llama", (*command, *more), make, OUTPUT, ""
    endless = put("out.json.journal", sparse(b"00000000 ", 1 << 40))
    yield "a journal of one line without end", "llama", RESUME, endless, PLAN, "out.json.journal"


def texts():
    for name, content in TEXTS.items():
        yield f"search on {name}", "llama", (*SEARCH, "--calibration", name), put(name, content), DATA, name
        if not isinstance(content, bytes):
            yield f"eval on {name}", "llama", ("eval", "model", "--perplexity", name), put(name, content), DATA, name
    lines = "\r\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in LINES)
    words, rows = (*SEARCH, "--calibration", "rows.jsonl"), put("rows.jsonl", b"\xef\xbb\xbf" + lines.encode())
    yield "what ends a line elsewhere ends none", "llama", words, rows, (0,), ""
    for name, content in TASKS.items():
        words = ("eval", "model", "--tasks", "x", "--include-path", "tasks", "--limit", "2", "-o", "out.json")
        yield f"a task: {name}", "llama", words, put("tasks/x.yaml", content.encode()), DATA, ""


NAMED = {name: rest for name, *rest in (*harmless(), *models(), *ggufs(), *records(), *texts())}


@pytest.fixture(scope="module")
def outcomes(program, bases, request, tmp_path_factory):
    """How the cases ended, which run together: a process for each would take most of the time."""
    chosen = [each.callspec.params["name"] for each in request.session.items if each.module is request.module]
    cases = []
    for base, words, make, codes, says in map(NAMED.get, chosen):
        seconds = 60 if "--tasks" in words else 10  # lm-eval reads all its own tasks, too
        cases.append(Case(words, make(bases[base]) if make else {}, bases[base], codes, says, seconds))
    return dict(zip(chosen, run_cases(program, cases, tmp_path_factory.mktemp("named")), strict=True))


@pytest.mark.parametrize("name", often(NAMED, list(NAMED)[::3]), ids=ascii)
def test_each_lie_that_has_a_name_ends_well(outcomes, name):
    require_well([outcomes[name]])
