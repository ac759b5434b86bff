"""Folders that lie: each ends well, or with one sentence and its exit code, and nothing outside is touched."""

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import time

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from conftest import gpt2_config, llama_config, prose, save_model
from faults.conftest import counts
from faults.hostile import PLACE, SECRET, Case, Fifo, Folder, Link, Sparse, failures, run_cases
from faults.hostile_reading import draw

DEEP = "@DEEP@"
"""Stands in a text of JSON for 100,000 nested lists."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Valid models: a Llama in one file and in several, a pickle, a GPT-2 without a family; and files outside them."""
    place = tmp_path_factory.mktemp("bases")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(place / "llama", llama_config(3, **small))
    save_model(place / "shards", llama_config(3, **small), max_shard_size="12KB")
    save_model(place / "gpt2", gpt2_config(3))
    save_model(place / "pickle", llama_config(3, **small))
    torch.save(load_file(place / "pickle" / "model.safetensors"), place / "pickle" / "pytorch_model.bin")
    (place / "pickle" / "model.safetensors").unlink()
    (place / "text.txt").write_text(prose(60))
    talk = [{"role": "user", "content": "river"}, {"role": "assistant", "content": prose(3)}]
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(4)))
    outside = place / "outside"
    outside.mkdir()
    (outside / "note.txt").write_bytes(SECRET)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((place / "llama" / name).read_text())
        (outside / name).write_text(json.dumps(values | {"_note": SECRET.decode()}))
    save_file(
        load_file(place / "llama" / "model.safetensors"), outside / "model.safetensors", {"note": SECRET.decode()}
    )
    (outside / "chat_template.jinja").write_bytes(SECRET)
    (outside / "code.py").write_text("import os\nraise SystemExit('code was run')\n")
    return {name: place / name for name in ("llama", "shards", "gpt2", "pickle")}


def check(program, bases, cases, tmp_path):
    begun = time.monotonic()
    outcomes = run_cases(program, bases, cases, tmp_path)
    spent = collections.Counter()
    for outcome in outcomes:
        spent[outcome.case.command] += outcome.seconds
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:3]
    print(len(outcomes), collections.Counter(o.code for o in outcomes), f"{time.monotonic() - begun:.1f} s", spent)
    for outcome in slowest:
        print("slow:", outcome.seconds, str(outcome.case)[:600])
    assert not any(outcome.wrong for outcome in outcomes), failures(outcomes)
    return outcomes


@pytest.mark.parametrize("command", ["weights", "read", "estimate", "apply", "search", "eval"])
@pytest.mark.parametrize("base", ["llama", "shards", "gpt2", "pickle"])
def test_what_is_harmless_works(program, bases, tmp_path, base, command):
    (outcome,) = check(program, bases, [Case(base, "no change", {}, command)], tmp_path)
    assert outcome.code == 0, outcome.said


def parse(data):
    """Return the header of a safetensors file, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def weight_file(header, data, length=None):
    text = header if isinstance(header, bytes) else to_text(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def to_text(value):
    """Return JSON, which Python's own parser takes with NaN and lone surrogates, too."""
    text = json.dumps(value).encode()
    for closed, ends in ((b"]" * 100_000, b"]"), (b"", b"[")):
        text = text.replace(b'"' + DEEP.encode() + ends + b'"', b"[" * 100_000 + closed)
    return text


HOSTILE_NUMBERS = [
    -1, 0, 1, 2, 7, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**9, 10**18, 10**100,
    int("9" * 4000), 0.5, -0.0, 1e-320, 1e308, 3.0, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
HOSTILE_TEXTS = [
    "", " ", "0", "1", "3", "-1", "1e9", "NaN", "true", "null", "x" * 10_000, "\0", "a\0b", "\ud800",
    "\x1b[2J\x1b]0;x\x07",
    "\u202e\u2066", "é" * 50, "[red]x[/red]", "[/]", "%s%n", "{x}", "../x", "../outside/model.safetensors",
    "../outside/config.json", PLACE + "/outside", PLACE + "/outside/model.safetensors", "/proc/self/mem", "/dev/zero",
    ".",
    "..", "/", "~", "model.layers.1", "a\nb", "\r", "con", "__import__('os').abort()", "file:///etc/passwd", "x/y/z",
]  # fmt: skip
hostile_numbers = st.sampled_from(HOSTILE_NUMBERS)
hostile_texts = st.sampled_from(HOSTILE_TEXTS)
hostile_values = st.one_of(
    hostile_numbers,
    hostile_texts,
    st.sampled_from(
        [None, True, False, [], {}, [[]], [{}], {"": {}}, [None] * 3, [1] * 1000, ["x"] * 3, [[1, 2], [3]]]
    ),
    st.sampled_from([DEEP + "]", DEEP + "["]),
    st.lists(hostile_numbers, max_size=4),
    st.lists(hostile_texts, max_size=4),
    st.dictionaries(hostile_texts, hostile_numbers, max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)


def places_in(value, path=()):
    """Yield the paths of all values in a document of JSON; of a long list or table, those of a few."""
    yield path
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, part in items if len(items) < 60 else items[:20]:
            yield from places_in(part, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def changed(draw, document, values=hostile_values, keys=hostile_texts):  # noqa: C901
    """Draw a document of JSON in which a few values or names are others, missing, or of another type."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        paths = list(places_in(document))
        path, value = draw(st.sampled_from(paths)), json.loads(json.dumps(draw(values)))
        if not path:
            if draw(st.integers(0, 19)) == 0:
                return value
            path = draw(st.sampled_from(paths[1:] or paths))
        if not path:
            return value
        inside, key = at(document, path[:-1]), path[-1]
        how = draw(st.sampled_from(["set", "set", "set", "set", "remove", "rename", "spell", "list", "add", "copy"]))
        if how == "remove":
            del inside[key]
        elif how == "rename" and isinstance(inside, dict):
            inside[draw(keys)] = inside.pop(key)
        elif how == "spell":
            inside[key] = str(inside[key])
        elif how == "list":
            inside[key] = [inside[key]]
        elif how == "copy":
            inside[key] = json.loads(json.dumps(at(document, draw(st.sampled_from(paths[:40])))))
        elif how == "add" and isinstance(inside[key], list):
            inside[key].append(value)
        elif how == "add" and isinstance(inside[key], dict):
            inside[key][draw(keys)] = value
        else:
            inside[key] = value
    return document


@st.composite
def spoiled_bytes(draw, data):
    """Draw bytes of a file that was cut, flipped, doubled or filled with others."""
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        where = draw(st.one_of(st.integers(0, min(400, len(data)) - 1), st.integers(0, len(data) - 1)))
        how = draw(st.sampled_from(["cut", "flip", "fill", "double", "drop", "insert"]))
        length = draw(st.integers(1, 40))
        if how == "cut":
            data = data[:where]
        elif how == "flip":
            data = data[:where] + bytes([data[where] ^ 1 << draw(st.integers(0, 7))]) + data[where + 1 :]
        elif how == "fill":
            data = data[:where] + draw(st.sampled_from([b"\0", b"\xff", b"[", b'"'])) * length + data[where + length :]
        elif how == "double":
            data = data[:where] + data[where : where + length] + data[where:]
        elif how == "drop":
            data = data[:where] + data[where + length :]
        else:
            data = data[:where] + draw(st.binary(min_size=1, max_size=8)) + data[where:]
    return data


DTYPES = [
    "F32",
    "F64",
    "BF16",
    "F16",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "F8_E8M0",
    "F6_E2M3",
    "X",
    "",
    "f32",
    None,
    5,
    "F128",
]


@st.composite
def headers(draw, data):  # noqa: C901
    """Draw a weight file with a header that lies."""
    header, body = parse(data)
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    entry = header[name]
    begin, end = entry["data_offsets"]
    how = draw(
        st.sampled_from(
            ["length", "offsets", "shift", "overlap", "hole", "dtype", "shape", "rename", "any", "metadata", "double",
             "sparse", "tail", "bytes", "empty", "deep", "many", "huge"]
        )
    )  # fmt: skip
    if how == "length":
        length = draw(
            st.sampled_from([0, 1, 7, 8, 2**20, 10**8, 2**31, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 9000)
        )
        return weight_file(header, body, length)
    if how == "offsets":
        entry["data_offsets"] = draw(
            st.lists(hostile_numbers | st.integers(-9, len(body) + 9), max_size=3) | hostile_values
        )
    elif how == "shift":
        by = draw(st.sampled_from([-4, -1, 1, 4, 64, len(body)]))
        entry["data_offsets"] = [begin + by, end + by]
    elif how == "overlap":
        entry["data_offsets"] = header[draw(st.sampled_from(names))]["data_offsets"]
    elif how == "hole":
        del header[name]
    elif how == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif how == "shape":
        entry["shape"] = draw(
            st.sampled_from(
                [
                    [2**32, 2**32],
                    [2**62, 4],
                    [0, 2**63],
                    [-1, -4],
                    [0],
                    [],
                    [1.5],
                    ["4"],
                    [True] * 4,
                    [[4]],
                    None,
                    [2**64 + 1],
                ]
            )
            | st.lists(st.integers(-2, 64), max_size=5)
            | st.just([*entry["shape"], 1, 1])
            | st.just([1] * 100 + entry["shape"])
            | st.just(entry["shape"][::-1])
        )
    elif how == "rename":
        blocks = ["model.layers.7.mlp.up_proj.weight", "model.layers.999999999999.x"]
        header[draw(hostile_texts | st.sampled_from(["lm_head.weight", "__metadata__", *blocks]))] = header.pop(name)
    elif how == "any":
        header = draw(changed(header))
    elif how == "metadata":
        header["__metadata__"] = draw(hostile_values)
    elif how == "double":
        other = draw(st.sampled_from([entry, header[draw(st.sampled_from(names))], {}, None]))
        text = to_text(header)
        text = text[:-1] + b"," + to_text({name: other})[1:]
        return weight_file(text, body)
    elif how == "sparse":
        size = draw(st.sampled_from([2**30, 10**9, 2**33, 2**40]))
        length = draw(st.sampled_from([None, 10**8, 10**8 + 1, size - 8, 2**30]))
        return Sparse(weight_file(header, body, length), size)
    elif how == "tail":
        body += draw(st.sampled_from([b"\0", b"x" * 1000])) if draw(st.booleans()) else b""
        body = body[: draw(st.integers(0, len(body)))]
    elif how == "bytes":
        return draw(spoiled_bytes(data))
    elif how == "empty":
        return draw(
            st.sampled_from([b"", b"\0", b"\0" * 8, b"\0" * 9, b"{}", weight_file({}, b""), weight_file(b"", b"")])
        )
    elif how == "deep":
        text = draw(
            st.sampled_from(
                [b"[" * 10**5, b'{"a":' * 10**5, b"[" * 10**7, b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"]
            )
        )
        return weight_file(text, body)
    elif how == "many":
        part = draw(st.sampled_from([b"[],", b"{},", b'{"":0},', b'"ab",', b"1e1,", b"99999,"]))
        text = b'{"a":[' + part * (draw(st.sampled_from([10**5, 10**6])) * 10 // len(part)) + b"0]}"
        return weight_file(text, b"")
    else:
        entry["shape"] = [draw(st.sampled_from([10**9, 2**40]))]
        entry["data_offsets"] = [begin, begin + 4 * entry["shape"][0]]
    return weight_file(header, body)


@st.composite
def weight_cases(draw, bases):
    """Draw a folder whose weight file, or one of them, lies."""
    base = draw(st.sampled_from(["llama", "llama", "shards", "gpt2"]))
    name = draw(st.sampled_from(sorted(path.name for path in bases[base].glob("*.safetensors"))))
    command = draw(st.sampled_from(["weights"] * 12 + ["read"] * 3 + ["apply"] * 2 + ["eval"]))
    return Case(base, "a header that lies", {name: draw(headers((bases[base] / name).read_bytes()))}, command)


@counts(150, 1500)
def test_weight_files_that_lie(program, bases, tmp_path, count, tried):
    check(program, bases, draw(weight_cases(bases), count), tmp_path)
    tried("hostile weight files", count)


SHARDS = [
    "../outside/model.safetensors", "../outside/../outside/model.safetensors", "sub/../../outside/model.safetensors",
    PLACE + "/outside/model.safetensors", "/proc/self/mem", "/dev/zero", "/dev/stdin", "", ".", "..", "/",
    "config.json",
    "model.safetensors.index.json", "tokenizer.json", "none.safetensors", "a\0b", "\0", "x" * 300, "x/" * 3000,
    "\ud800",
    "\x1b[2J", "away", "away/model.safetensors", "link.safetensors", "loop.safetensors", "pipe.safetensors",
    "folder.safetensors", "model.safetensors", "./model-00001-of-00004.safetensors", "pytorch_model.bin", "C:\\x", "~",
]  # fmt: skip
BESIDE = {
    "away": Link("../outside"),
    "link.safetensors": Link("../outside/model.safetensors"),
    "loop.safetensors": Link("loop.safetensors"),
    "pipe.safetensors": Fifo(),
    "folder.safetensors": Folder(),
    "model.safetensors": None,
}


@st.composite
def index_cases(draw, bases):
    """Draw a folder whose index of weight files names others, or other tensors in them."""
    index = json.loads((bases["shards"] / "model.safetensors.index.json").read_text())
    files = {name: content for name, content in BESIDE.items() if draw(st.booleans())}
    shards = sorted(set(index["weight_map"].values()))
    how = draw(st.sampled_from(["place", "place", "swap", "lack", "any", "bytes", "all", "file", "number"]))
    tensor = draw(st.sampled_from(sorted(index["weight_map"])))
    if how == "place":
        index["weight_map"][tensor] = draw(st.sampled_from(SHARDS) | hostile_texts)
    elif how == "swap":
        index["weight_map"][tensor] = draw(st.sampled_from(shards))
    elif how == "lack":
        del index["weight_map"][tensor]
        index["weight_map"][draw(hostile_texts)] = draw(st.sampled_from(shards))
    elif how == "any":
        index = draw(changed(index))
    elif how == "all":
        index["weight_map"] = dict.fromkeys(index["weight_map"], draw(st.sampled_from(SHARDS)))
    elif how == "file":
        files[draw(st.sampled_from(shards))] = draw(
            st.sampled_from(
                [None, b"", Link("../outside/model.safetensors"), Link(shards[0]), Fifo(), Folder(), Link("..")]
            )
        )
    elif how == "number":
        index["weight_map"] = {draw(st.sampled_from(["a", tensor])): shards[0]}
    text = to_text(index)
    if how == "bytes":
        text = draw(spoiled_bytes(text))
    files["model.safetensors.index.json"] = text
    command = draw(st.sampled_from(["weights"] * 6 + ["read"] * 4 + ["apply"] * 2 + ["eval"]))
    return Case("shards", f"an index with another {how}", files, command)


@counts(60, 700)
def test_an_index_that_leads_elsewhere(program, bases, tmp_path, count, tried):
    check(program, bases, draw(index_cases(bases), count), tmp_path)
    tried("hostile indices", count)


MODEL_TYPES = sorted(CONFIG_MAPPING_NAMES)
KEYS = [
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling",
    "layer_types",
    "tie_word_embeddings", "model_type", "architectures", "auto_map", "quantization_config", "_name_or_path",
    "text_config",
    "torch_dtype", "dtype", "transformers_version", "id2label", "num_labels", "pad_token_id", "bos_token_id",
    "eos_token_id",
    "sliding_window", "use_cache", "hidden_act", "is_encoder_decoder", "is_decoder", "attn_implementation",
    "pruned_heads",
    "_attn_implementation", "_attn_implementation_internal", "attention_bias", "mlp_bias", "pretraining_tp",
    "adapter_path",
    "tokenizer_class", "chunk_size_feed_forward", "output_attentions", "return_dict", "problem_type",
    "base_model_tp_plan",
    "use_return_dict", "name_or_path", "attribute_map", "sub_configs", "to_dict", "vision_config",
    "num_nextn_predict_layers",
    "torchscript", "initializer_range", "per_layer_config", "_commit_hash", "label2id", "no_split_modules",
    "keys_to_ignore",
    "n_layer", "n_embd", "n_head", "n_positions", "n_inner", "gguf_file", "subfolder", "cache_dir", "revision",
    "code_revision",
    "trust_remote_code", "device_map", "state_dict", "from_tf", "force_download", "local_files_only", "token",
    "__class__",
    "__init__", "__dict__", "self", "kwargs", "cls",
]  # fmt: skip
SETTINGS = [
    {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "fp8"},
    {"bits": 4},
    {"quant_method": ["x"]}, {"quant_method": "awq", "modules_to_not_convert": ["model.layers.1.x", ".*(a+)+$"]},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:(x+x+)+y"]}}},
    {"quant_method": "mxfp4"},
    {"quant_method": "torchao"}, {"quant_method": "quanto"}, {"quant_method": "hqq"}, {"quant_method": "../x"}, "gptq",
    {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, {"AutoConfig": "../outside/code.C"},
    {"AutoConfig": "org/repo--code.C"}, {"AutoTokenizer": ["code.T", None]},
    {"AutoModelForCausalLM": "../outside/code--x.y"},
    {"rope_type": "yarn", "factor": 1e308}, {"rope_type": "llama3"}, {"rope_type": "longrope",
    "long_factor": [1] * 10**4},
    {"rope_type": "dynamic", "factor": "2"}, {"rope_type": ["x"]}, {"rope_type": "linear", "factor": 0}, {"type": "x"},
    {"full_attention": {"rope_type": "default"}}, {"0": [0, 1]}, ["full_attention"], ["full_attention"] * 3,
    ["sliding_attention"] * 2 + ["x"], ["full_attention"] * 10**5, [None] * 3, [["x"]] * 3, "full_attention",
    {"num_hidden_layers": 10**9}, {"model_type": "llama", "num_hidden_layers": 3}, {"model_type": "x"},
    {str(10**9): "x"},
    "float8_e4m3fn", "complex64", "int8", "float64", "torch.float32", "os.system", "flash_attention_2",
    "flex_attention",
    "kernels-community/flash-attn", "org/repo@main:function", "paged|x", "eager", "gelu", "silu", "LlamaTokenizer",
    "ByT5Tokenizer",
]  # fmt: skip


@st.composite
def config_cases(draw, bases):
    """Draw a folder whose config asks for what the weights do not hold, or for too much."""
    base = draw(st.sampled_from(["llama", "llama", "gpt2", "shards"]))
    config = json.loads((bases[base] / "config.json").read_text())
    how = draw(st.sampled_from(["key", "key", "key", "keys", "any", "bytes", "type", "big", "count", "self"]))
    values = hostile_values | st.sampled_from(SETTINGS)
    if how in ("key", "keys"):
        for _ in range(1 if how == "key" else 3):
            config[draw(st.sampled_from(KEYS) | st.sampled_from(sorted(config)))] = draw(values)
    elif how == "any":
        config = draw(changed(config, values, hostile_texts | st.sampled_from(KEYS)))
    elif how == "type":
        config["model_type"] = draw(st.sampled_from(MODEL_TYPES))
        if draw(st.booleans()):
            config |= draw(st.dictionaries(st.sampled_from(KEYS), values, max_size=2))
    elif how == "big":
        key = draw(st.sampled_from([key for key, value in config.items() if isinstance(value, int) and value > 2]))
        config[key] = draw(st.sampled_from([10**5, 10**6, 10**9, 10**12, 10**18, 2**63 - 1, 2**63, 2**64]))
    elif how == "count":
        key = "n_layer" if base == "gpt2" else "num_hidden_layers"
        # A hundred blocks are no lie, and an honest estimate of them may take longer than a case has.
        config[key] = draw(st.sampled_from([0, -1, 1, 2, 4, 5, 30, 10**4, 10**9, 3.0, "3", True, None, [3], 2**64]))
    elif how == "self":
        config = {
            key: draw(values) for key in draw(st.lists(st.sampled_from(sorted(config)), unique=True, max_size=9))
        } | {"model_type": config["model_type"]}
    text = to_text(config)
    if how == "bytes":
        text = draw(spoiled_bytes(text))
    # What the defaults of another type make may honestly be a huge model, and is not measured.
    measured = [] if how == "type" else ["estimate"] * 2
    command = draw(st.sampled_from(["read"] * 8 + measured + ["apply"] * 4 + ["search"] + ["eval"]))
    files = {"config.json": text, "code.py": b"raise SystemExit('code was run')\n"}
    return Case(base, f"a config with another {how}", files, command)


@counts(100, 1500)
def test_configs_that_ask_too_much(program, bases, tmp_path, count, tried):
    check(program, bases, draw(config_cases(bases), count), tmp_path)
    tried("hostile configs", count)


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]
TEMPLATES = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 9**9**9 }}", "{{ messages.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 'x' * 10**10 }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/x') }}", "{{ self.__init__ }}", "{% include '../x' %}",
    "{% import 'os' as os %}{{ os.system('id') }}", "{{ lipsum.__globals__ }}", "{{ ''|attr('__class__') }}",
    "{{ raise_exception('\x1b[2Jno') }}", "{% raw %}", "{{", "{% if %}", "{{ messages[99].content }}", "{{ 1/0 }}",
    "{{ '%999999999s' % 'x' }}", "{{ '{:>999999999}'.format('x') }}", "{{ 'x'|center(10**9) }}",
    "{{ messages.clear() }}",
    "{{ messages.append(1) }}", "{{ strftime_now('%Y' * 10**6) }}", "{% set x = namespace() %}{{ x }}", "\0", "\ud800",
    "", "x",
    "{% generation %}x{% endgeneration %}", "{{ messages|tojson(indent=10**9) }}", "{{ {}.update.__globals__ }}",
    "{{ range(10**9)|list }}", "{{ '(' * 100000 }}", "{{" + "(" * 5000 + ")" * 5000 + "}}", "{{ [1]|sum(start=[])}}",
]  # fmt: skip


@st.composite
def tokenizer_cases(draw, bases):
    """Draw a folder whose tokenizer, chat template or settings of generation are others."""
    base = draw(st.sampled_from(["llama", "gpt2"]))
    command = draw(st.sampled_from(["read"] * 10 + ["search", "eval", "apply"]))
    how = draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "bytes", "other", "generation", "ids"]))
    files = {}
    if how in TOKENIZER_FILES:
        files[how] = to_text(draw(changed(json.loads((bases[base] / how).read_text()))))
    elif how == "bytes":
        name = draw(st.sampled_from([*TOKENIZER_FILES, "generation_config.json"]))
        files[name] = draw(spoiled_bytes((bases[base] / name).read_bytes()))
    elif how == "other":
        name = draw(
            st.sampled_from(
                ["special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
                "spiece.model",
                 "vocab.txt", "chat_template.jinja", "chat_template.json", "processor_config.json",
                 "adapter_config.json",
                 "preprocessor_config.json", "tekken.json", "tiktoken.model", "additional_chat_templates/x.jinja"]
            )
        )  # fmt: skip
        files[name] = draw(
            st.binary(max_size=50)
            | hostile_values.map(to_text)
            | st.dictionaries(
                hostile_texts | st.sampled_from(["bos_token", "base_model_name_or_path"]), hostile_values
            ).map(to_text)
            | st.sampled_from([Link("../outside/tokenizer.json"), Link("loop"), Fifo(), Folder(), Link("/dev/zero")])
        )
        if draw(st.booleans()):
            files["tokenizer.json"] = None
    elif how == "generation":
        settings = {
            "max_length": 1,
            "eos_token_id": [1],
            "temperature": 0.0,
            "top_p": 2.0,
            "num_beams": 10**9,
            "_from_model_config": 1,
        }
        settings |= draw(st.dictionaries(st.sampled_from(GENERATION), hostile_values, max_size=4))
        files["generation_config.json"] = to_text(draw(st.just(settings) | changed(settings)))
        command = draw(st.sampled_from(["apply", "apply", "eval", "search"]))
    else:
        tokenizer = json.loads((bases[base] / "tokenizer.json").read_text())
        huge = draw(st.sampled_from([-1, 320, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 1.5, "1"]))
        token = draw(st.sampled_from(["added", "vocab", "merge"]))
        if token == "added":
            tokenizer["added_tokens"][-1]["id"] = huge
        elif token == "vocab":
            tokenizer["model"]["vocab"][draw(st.sampled_from(["a", "river", ""]))] = huge
        else:
            tokenizer["model"]["merges"].append(
                draw(st.sampled_from(["a", "a b c", ["x", "y"], [], 5, ["a", "\ud800"]]))
            )
        files["tokenizer.json"] = to_text(tokenizer)
    return Case(base, f"another {how}", files, command)


GENERATION = [
    "max_length", "eos_token_id", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty",
    "cache_implementation",
    "bad_words_ids", "transformers_version", "stop_strings", "watermarking_config", "assistant_tokens",
    "custom_generate",
    "compile_config", "guidance_scale", "do_sample", "max_new_tokens", "forced_eos_token_id", "pad_token_id",
    "use_cache",
]  # fmt: skip


@counts(60, 1000)
def test_tokenizers_and_settings_that_are_no_such_thing(program, bases, tmp_path, count, tried):
    check(program, bases, draw(tokenizer_cases(bases), count), tmp_path)
    tried("hostile tokenizers and settings", count)


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_do_more_than_they_should(program, bases, tmp_path, template):
    text = template.encode("utf-8", "surrogatepass")
    check(program, bases, [Case("llama", "a chat template", {"chat_template.jinja": text}, "chat")], tmp_path)


class Code:
    """Pickles to a call that would run code."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles(data):
    """Return bytes of weight files that hold more than tensors, or less."""
    weights = torch.load(io.BytesIO(data), weights_only=True)
    some = dict(list(weights.items())[:3])
    contents = [
        weights | {"a": Code(os.system, "echo run > ../outside/run")},
        weights | {"a": Code(open, "../outside/note.txt")},
        weights | {"a": Code(eval, "__import__('os').abort()")},
        weights | {"a": Code(exec, "raise SystemExit('code was run')")},
        weights | {"a": Code(torch.load, "../outside/model.safetensors")},
        weights | {"a": Code(torch.Tensor, 10**13)},
        weights | {"a": Code(torch.zeros, 10**13)},
        weights | {"a": Code(bytearray, 10**11)},
        weights | {"a": 5}, weights | {5: torch.ones(1)}, list(weights.values()), torch.ones(1), None, "x", {}, some,
        weights | {"../outside/x": torch.ones(1)}, weights | {"a": {"b": torch.ones(1)}}, {"state_dict": weights},
        weights | {"a": torch.ones(1).expand(10**12)}, weights | {"a": torch.ones(4).to_sparse()},
        weights | {"lm_head.weight": torch.ones(1).expand(320, 16)}, collections.OrderedDict(weights),
        weights | {"a": torch.ones(2, dtype=torch.complex128)}, weights | {"a": torch.empty(4, device="meta")},
        weights | {"model.norm.weight": torch.nn.Parameter(torch.ones(16))},
    ]  # fmt: skip
    for content in contents:
        for old in (False, True):
            file = io.BytesIO()
            with contextlib.suppress(Exception):  # the old format does not hold every kind
                torch.save(content, file, _use_new_zipfile_serialization=not old)
                yield file.getvalue()
    yield pickle.dumps(weights | {"a": Code(os.system, "echo run > ../outside/run")})
    yield b"cos\nsystem\n(S'echo run > ../outside/run'\ntR."
    yield b"\x80\x02]" + b"]" * 10**6
    yield b"\x80\x02" + b"(" * 10**6 + b"."
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**62)


@st.composite
def pickle_cases(draw, data, known):
    """Draw a folder whose weights are a pickle of another kind."""
    content = draw(st.sampled_from(known) | st.one_of(st.just(data), st.sampled_from(known)).flatmap(spoiled_bytes))
    return Case("pickle", "another pickle", {"pytorch_model.bin": content}, draw(st.sampled_from(["weights", "apply"])))


@counts(40, 400)
def test_a_pickle_is_never_run(program, bases, tmp_path, count, tried):
    data = (bases["pickle"] / "pytorch_model.bin").read_bytes()
    known = list(pickles(data))
    check(program, bases, draw(pickle_cases(data, known), count), tmp_path)
    tried("hostile pickles", count)


READ = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "special_tokens_map.json", "chat_template.jinja", "added_tokens.json", "model.safetensors.index.json", "README.md",
    "tokenizer.model", "pytorch_model.bin", "quantize_config.json", "code.py", "LICENSE", "adapter_config.json",
    "additional_chat_templates", "additional_chat_templates/x.jinja", "processor_config.json", "sub", "sub/x.json",
    ".x",
]  # fmt: skip
LINKS = [
    "../outside/{name}", "../outside", PLACE + "/outside/{name}", "..", ".", "{name}", "loop/{name}", "/dev/zero",
    "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/", "none", "sub/../../outside/{name}", "away/{name}",
    "/proc/self/root" + PLACE + "/outside/{name}", "config.json",
]  # fmt: skip


@st.composite
def link_cases(draw, bases):
    """Draw a folder in which links, pipes and folders stand in place of files."""
    files = {}
    for name in draw(st.lists(st.sampled_from(READ), min_size=1, max_size=3, unique=True)):
        target = draw(st.sampled_from(LINKS)).format(name=name.rpartition("/")[2])
        files[name] = draw(st.sampled_from([Link(target)] * 6 + [Fifo(), Folder(), b"", None]))
    if draw(st.booleans()):
        files |= {"away": Link("../outside"), "loop": Link("loop")}
    # A folder has to be there before what lies in it, and not as a link.
    for name in [name for name in files if "/" in name and name.split("/")[0] in files]:
        del files[name]
    command = draw(st.sampled_from(["read"] * 4 + ["apply"] * 4 + ["search", "eval", "chat"]))
    return Case(draw(st.sampled_from(["llama", "shards"])), "links", files, command)


@counts(50, 400)
def test_links_pipes_and_folders(program, bases, tmp_path, count, tried):
    check(program, bases, draw(link_cases(bases), count), tmp_path)
    tried("hostile links, pipes and folders", count)


def config(base, **changes):
    """Return a function that makes `config.json` of a base with these changes."""
    return lambda bases: {"config.json": to_text(json.loads((bases[base] / "config.json").read_text()) | changes)}


def entry(**changes):
    """Return a function that makes a weight file in whose header one entry has these changes."""

    def make(bases):
        header, body = parse((bases["llama"] / "model.safetensors").read_bytes())
        header["model.norm.weight"] |= changes
        return {"model.safetensors": weight_file(header, body)}

    return make


def named(name):
    """Return a function that makes a weight file in which a tensor has this name."""

    def make(bases):
        header, body = parse((bases["llama"] / "model.safetensors").read_bytes())
        header[name] = header.pop("model.norm.weight")
        return {"model.safetensors": weight_file(header, body)}

    return make


def twice(bases):
    header, body = parse((bases["llama"] / "model.safetensors").read_bytes())
    text = to_text(header)[:-1] + b', "model.norm.weight": ' + to_text(header["model.norm.weight"]) + b"}"
    return {"model.safetensors": weight_file(text, body)}


def files(**contents):
    """Return a function that puts these files in place; `_json` stands for a suffix."""
    return lambda bases: {name.replace("_json", ".json"): content for name, content in contents.items()}


FOUND = {
    "end tokens that are lists": ("search", files(generation_config_json=b'{"eos_token_id": [[]]}'), 0, ""),
    "no blocks": ("read", config("llama", num_hidden_layers=0), 4, "because it has none"),
    "a billion blocks": ("read", config("llama", num_hidden_layers=10**9), 4, "sets num_hidden_layers"),
    "a billion labels": ("read", config("llama", num_labels=10**9), 4, "sets num_labels to more"),
    "a billion blocks, no weights": ("estimate", config("llama", num_hidden_layers=10**9), 4, "sets num_hidden_layers"),
    "more blocks than a float can hold": ("read", config("llama", n_layers=int("9" * 4000)), 4, "sets n_layers"),
    "a number of 4000 digits": ("read", config("llama", hidden_size=[int("9" * 4000)]), 4, "cannot read the config"),
    "a long name of a type": ("read", config("llama", model_type="x" * 10**6), 4, "no model of type"),
    "a shape of texts": ("weights", entry(shape=["16"]), 4, "not a safetensors file"),
    "a shape of truths": ("weights", entry(shape=[True] * 4 + [16]), 4, "not a safetensors file"),
    "a shape whose product takes hours": ("weights", entry(dtype="X", shape=[2**62] * 400_000), 4, "not a safetensors"),
    "a name twice": ("weights", twice, 4, "not a safetensors file"),
    "commands for a terminal": ("apply", named("model.layers.\x1b[2J\u202e\n.weight"), 4, "are missing"),
    "a config by a link": ("read", files(config_json=Link("../outside/config.json")), 4, "is a link out of"),
    "a tokenizer by a link": ("read", files(tokenizer_json=Link("../outside/tokenizer.json")), 4, "is a link out of"),
    "weights by a link": (
        "apply", lambda bases: {"model.safetensors": Link("../outside/model.safetensors")}, 4, "is a link out of"
    ),
    "templates by a link": (
        "chat", lambda bases: {"additional_chat_templates": Link("../outside")}, 4, "is a link out of"
    ),
    "a pickle of one byte": ("weights", lambda bases: {"pytorch_model.bin": b"R"}, 4, "not safe to read"),
    "a pickle without its end": ("apply", lambda bases: {"pytorch_model.bin": b"\x80\x02}q"}, 4, "not safe to read"),
    "a config that is a pipe": ("read", files(config_json=Fifo()), 4, "a pipe or a device"),
    "a config without end": ("read", files(config_json=Sparse(b"{", 2**40)), 4, "not readable JSON"),
    "a config of lists alone": ("read", files(config_json=b'{"a": [' + b"[]," * 5_000_000 + b"0]}"), 4, "not readable"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_found(program, bases, tmp_path, what):
    command, make, code, words = FOUND[what]
    base = "pickle" if "pickle" in what else "llama"
    (outcome,) = check(program, bases, [Case(base, what, make(bases), command)], tmp_path)
    assert outcome.code == code, outcome.said
    assert words in outcome.said
