"""Whatever is wrong with a checkpoint when `sleb apply` has written it, its proof refuses it, and nothing is delivered.

Each kind of damage is done between writing and proof. It must be refused twice: because it is not what was planned,
and, where the model then computes something else, by transformers alone, as if the plan itself had been wrong.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from conftest import calibration, llama_config, opt_config, save_model, weights_of
from families import tiny_config
from faults.conftest import often
from faults.lies import GGUFS, STRING, UINT32, gguf_of, key, number, parse, text, weight_file
from gguf_models import write_gguf, write_llama_gguf
from sleb_cli.engine.output import apply_gguf, proof

KEPT = (0, 2, 3, 5)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BLOCK = re.compile(r"((?:.*layers|blk)\.)(\d+)(\..*)")
CONFIGS = {
    "llama": llama_config, "bfloat16": partial(llama_config, dtype=torch.bfloat16), "shards": llama_config,
    "gemma3": partial(tiny_config, "gemma3_text"), "opt": partial(opt_config, 6),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What damages a checkpoint at a path, made of a dense one; whether it then computes something else; and where."""

    do: Callable[..., object]
    computes: bool = True
    model: str = "llama"


def renumber(*places):
    """Return the name of the tensor at each block's new place."""
    return lambda name: BLOCK.sub(lambda match: f"{match[1]}{places[int(match[2])]}{match[3]}", name)


def swap(one, other):
    return lambda name: name.replace(one, other) if one in name else name.replace(other, one)


def anew(path):
    path.unlink(missing_ok=True)
    return path


def tensors(change):
    """Change the tensors of a checkpoint in one file, by name."""

    def do(made, dense):
        found = change(weights_of(made), weights_of(dense))
        held = {name: tensor.contiguous().clone() for name, tensor in found.items()}
        save_file(held, anew(made / WEIGHTS), {"format": "pt"})

    return do


def at(name, change):
    return tensors(lambda held, dense: held | {name: change(held[name])})


def taken(source):
    """Give each tensor the values of the one that `source` names."""
    return tensors(lambda held, dense: {name: held[source(name)] for name in held})


def content(file, change):
    """Change the bytes of a file, or remove it."""

    def do(made, dense):
        data = change((made / file).read_bytes() if (made / file).exists() else b"", dense)
        anew(made / file)
        if data is not None:
            (made / file).write_bytes(data)

    return do


def missing(file):
    return content(file, lambda data, dense: None)


def copied(file, source=None):
    return content(file, lambda data, dense: (dense / (source or file)).read_bytes())


def says(file, **changes):
    return content(file, lambda data, dense: json.dumps(json.loads(data) | changes).encode())


def of_json(file, change):
    return content(file, lambda data, dense: json.dumps(change(json.loads(data))).encode())


def both(*parts):
    return lambda *paths: [part(*paths) for part in parts]


def last_bit(values):
    values.view(torch.int32)[5] ^= 1
    return values


def header(change):
    def changed(data, dense):
        entries, body = parse(data)
        return weight_file({n: e if n == "__metadata__" else e | change(e) for n, e in entries.items()}, body)

    return content(WEIGHTS, changed)


def in_two_shards(made, dense):
    one, two = sorted(made.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(two).items()))
    save_file(load_file(one) | {name: tensor + 1}, anew(one), {"format": "pt"})


# Of the kept blocks 0, 2, 3 and 5, block 1 of the checkpoint has the number of a removed one.
LAYER = "model.layers.1."
NORM, UP = f"{LAYER}input_layernorm.weight", f"{LAYER}mlp.up_proj.weight"
VALUES, EMBEDDING = "self_attn.v_proj", "model.embed_tokens.weight"
SHARD = "model-0000{}-of-0000{}.safetensors"
quiet = partial(Kind, computes=False)
CHECKPOINTS = {
    "two blocks have changed places": Kind(taken(renumber(1, 0, 2, 3))),
    "a block is there twice": Kind(taken(renumber(0, 0, 2, 3))),
    "the wrong block was removed": Kind(tensors(lambda held, dense: held | {n: dense[n] for n in held if LAYER in n})),
    "a block too few": Kind(both(says(CONFIG, num_hidden_layers=3),
                                 tensors(lambda held, dense: {n: held[n] for n in held if ".layers.3." not in n}))),
    "a norm is a bit larger": Kind(at(NORM, lambda values: values * 1.001)),
    "a norm differs by the last bit": quiet(at(NORM, last_bit)),
    "a tensor comes from the neighbour block": Kind(taken(lambda name: name.replace(f"1.{VALUES}", f"2.{VALUES}"))),
    "a tensor is one of the removed block": Kind(tensors(lambda held, dense: held | {UP: dense[UP]})),
    "keys and values are exchanged": Kind(taken(swap(f"1.{VALUES}", "1.self_attn.k_proj"))),
    "a tensor is transposed": Kind(at(f"{LAYER}self_attn.o_proj.weight", lambda values: values.T)),
    "a tensor has the shape of its transposed self": Kind(at(UP, lambda values: values.reshape(values.shape[::-1]))),
    "one value is NaN": Kind(at(UP, lambda values: values.index_fill(1, torch.tensor([9]), float("nan")))),
    "a tensor is missing": Kind(tensors(lambda held, dense: {n: held[n] for n in held if n != UP})),
    "a tensor is there that no model has": Kind(tensors(lambda held, dense: held | {"model.x": held[UP]})),
    "all tensors have their old numbers": Kind(tensors(lambda held, dense:
                                               {renumber(*KEPT)(name): held[name] for name in held})),
    "the embedding of an unseen token": quiet(at(EMBEDDING, lambda v: torch.cat([v[:-1], v[-1:] + 1]))),
    "the head is the embedding": Kind(tensors(lambda held, dense: held | {"lm_head.weight": held[EMBEDDING]})),
    "a bias is left out": Kind(tensors(lambda held, dense: {name: held[name] for name in held
                                       if name != "model.decoder.layers.1.fc1.bias"}), model="opt"),
    "a tied model has a head of its own": Kind(both(says(CONFIG, tie_word_embeddings=False), tensors(
        lambda held, dense: held | {"lm_head.weight": held[EMBEDDING].roll(1, 0)})), model="gemma3"),
    "the weights were cast": quiet(tensors(lambda held, dense: {name: held[name].half() for name in held})),
    "offsets are shifted": Kind(header(lambda entry: {"data_offsets": [end + 4 for end in entry["data_offsets"]]})),
    "bfloat16 is called float16": Kind(header(lambda entry: {"dtype": "F16"}), model="bfloat16"),
    "one bit is flipped": quiet(content(WEIGHTS, lambda data, dense: data[:-99] + bytes([data[-99] ^ 1]) + data[-98:])),
    "the weights are cut off": Kind(content(WEIGHTS, lambda data, dense: data[:-999])),
    "the weights are longer than they say": Kind(content(WEIGHTS, lambda data, dense: data + bytes(8))),
    "the weights are the page of a proxy": Kind(content(WEIGHTS, lambda data, dense: b"<html>403</html>\n" * 900)),
    "the config is the dense model's": Kind(copied(CONFIG)),
    "the config is cut off": Kind(content(CONFIG, lambda data, dense: data[:99])),
    "the config says a key twice": Kind(content(CONFIG, lambda data, dense:
                                        data.rstrip()[:-1] + b', "num_hidden_layers": 3}')),
    "a setting is missing": Kind(of_json(CONFIG, lambda data: {k: data[k] for k in data if k != "intermediate_size"})),
    "the epsilon is another": Kind(says(CONFIG, rms_norm_eps=0.1)),
    "the rope is another": Kind(says(CONFIG, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
    "the window is another": Kind(says(CONFIG, sliding_window=3), model="gemma3"),
    "the kinds of blocks are the first ones": Kind(of_json(CONFIG, lambda data: data | {
        "layer_types": data["layer_types"][::-1]}), model="gemma3"),
    "the end token is another": quiet(says(CONFIG, eos_token_id=7)),
    "there is code": quiet(both(says(CONFIG, auto_map={"AutoModelForCausalLM": "x.X"}),
                                content("x.py", lambda data, dense: b"print('here I am')"))),
    "quantization settings name the old blocks": quiet(copied("quantize_config.json")),
    "the tokenizer has other tokens": quiet(of_json("tokenizer.json", lambda data: data | {"added_tokens": []})),
    "texts begin with no start token": quiet(says("tokenizer.json", post_processor=None), model="opt"),
    "the chat template is another": quiet(content("chat_template.jinja", lambda data, dense: b"{{ messages }}")),
    "the license is missing": quiet(missing("LICENSE")),
    "the settings of generation are others": quiet(says("generation_config.json", eos_token_id=5)),
    "weights of another format are left beside": quiet(copied("pytorch_model.bin", WEIGHTS)),
    "an adapter is left beside": quiet(content("adapter_config.json", lambda data, dense: b'{"peft_type": "LORA"}')),
    "a shard is missing": Kind(missing(SHARD.format(2, 6)), model="shards"),
    "a shard is the dense model's": Kind(copied(SHARD.format(2, 6), SHARD.format(3, 6)), model="shards"),
    "a stale shard is left beside": quiet(copied(SHARD.format(9, 9), SHARD.format(3, 6)), model="shards"),
    "the index names the wrong shards": quiet(of_json(INDEX, lambda data: {"weight_map": dict(zip(
        data["weight_map"], reversed(data["weight_map"].values()), strict=True))}), model="shards"),
    "the index is missing": Kind(missing(INDEX), model="shards"),
    "the index is the dense model's": quiet(copied(INDEX), model="shards"),
    "a tensor is in two shards, differently": quiet(in_two_shards, model="shards"),
}  # fmt: skip


def changed(held, dense):
    """Return the names of tensors in blocks that have new values, and what all were before."""
    before = {name: dense[renumber(*KEPT)(name)] for name in held}
    return [name for name in sorted(held) if not torch.equal(held[name], before[name])], before


RECOVERED = {
    "no recovered tensor was written": tensors(lambda held, dense: changed(held, dense)[1]),
    "a recovered tensor is left out": tensors(lambda held, dense: held | {
        (name := changed(held, dense)[0][0]): changed(held, dense)[1][name]}),
    "recovered tensors were rounded": tensors(lambda held, dense: held | {
        name: held[name].bfloat16().float() for name in changed(held, dense)[0]}),
    "another tensor has another value": at(EMBEDDING, lambda values: values * 1.01),
}  # fmt: skip


def of_gguf(change):
    return lambda made, dense: made.write_bytes(change(gguf_of(made)).to_bytes())


def of_bytes(change):
    return lambda made, dense: made.write_bytes(change(made.read_bytes()))


def entry(ending, new):
    """Give the key of this ending another value, or remove it."""

    def change(file):
        kept = [each for each in file.entries if new is not None or not each[0].endswith(ending)]
        new_entries = [(name, kind, new if name.endswith(ending) else data) for name, kind, data in kept]
        return replace(file, entries=tuple(new_entries))

    return of_gguf(change)


def renamed(new):
    """Give tensors other names, or leave them out."""

    def change(file):
        named = [(new(name.decode()).encode(), *rest) for name, *rest in file.tensors]
        return replace(file, tensors=tuple(each for each in named if each[0]))

    return of_gguf(change)


def values(new):
    """Give tensors other bytes: `new` is given a name and all bytes by name."""

    def do(made, dense):
        data = bytearray(made.read_bytes())
        found = gguf.GGUFReader(made).tensors
        spans = {each.name: slice(each.data_offset, each.data_offset + each.n_bytes) for each in found}
        held = {name: bytes(data[span]) for name, span in spans.items()}
        for name, span in spans.items():
            data[span] = new(name, held)
        made.write_bytes(data)

    return do


def of_tensor(part, change):
    return values(lambda name, held: change(held[name]) if part in name else held[name])


FILES = {
    "a block too few": Kind(entry(b".block_count", struct.pack("<I", 3))),
    "the epsilon is another": Kind(entry(b"rms_epsilon", struct.pack("<f", 0.1))),
    "the end token is another": quiet(entry(b"eos_token_id", struct.pack("<I", 7))),
    "a key is missing": quiet(entry(b"rms_epsilon", None)),
    "a key is there twice": quiet(of_gguf(GGUFS["a key twice"])),
    "a key was added": quiet(of_gguf(number("general.sampled", UINT32, 1))),
    "the removed blocks are not recorded": quiet(entry(b"removed_blocks", None)),
    "the chat template is another": quiet(entry(b"chat_template", text(b"{{ }}"))),
    "the architecture is another": quiet(entry(b"general.architecture", text(b"qwen2"))),
    "two blocks have changed places": Kind(values(lambda name, held: held[renumber(1, 0, 2, 3)(name)])),
    "queries and keys are exchanged": Kind(renamed(swap("blk.2.attn_q.", "blk.2.attn_k."))),
    "a norm is doubled": Kind(of_tensor("blk.1.attn_norm", lambda data: (np.frombuffer(data, "<f4") * 2).tobytes())),
    "one bit is flipped": quiet(of_tensor("blk.2.attn_q", lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    "a tensor is missing": Kind(renamed(lambda name: "" if name == "blk.3.ffn_up.weight" else name)),
    "a tensor has its old number": Kind(renamed(lambda name: name.replace("blk.3.ffn_up", "blk.5.ffn_up"))),
    "two tensors have one name": quiet(renamed(lambda name: name.replace("blk.0.attn_q", "blk.1.attn_q"))),
    "the file is cut off": Kind(of_bytes(lambda data: data[:-999])),
    "the file is longer than it should be": quiet(of_bytes(lambda data: data + bytes(32))),
    "the file is empty": quiet(of_bytes(lambda data: b"")),
    "the file is of another version": quiet(of_gguf(lambda file: replace(file, version=2))),
    "a list by block is shifted": quiet(entry(b"head_count_kv", struct.pack("<IQ4i", 5, 4, 2, 3, 4, 1)), model="lists"),
    "the file is the dense model's": quiet(lambda made, dense: shutil.copyfile(dense, made)),
}
RECOVER = ["--recover", *calibration("text.txt", samples=10)]
STREAM = ["--stream"]
DAMAGED = [
    *((name, kind, "", way) for name, kind in CHECKPOINTS.items() for way in ((), STREAM)),
    *((name, Kind(do), "", (*RECOVER, *more)) for name, do in RECOVERED.items() for more in ((), STREAM)),
    *((name, kind, ".gguf", ()) for name, kind in FILES.items()),
]
CASES = [(*case, as_planned) for case in DAMAGED for as_planned in (False, True) if case[1].computes or not as_planned]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Make the dense model, or GGUF file, of a name: all biases count, and it has all files that a model may have."""
    folder, made = tmp_path_factory.mktemp("dense"), {}

    def make(name):
        if name in made:
            return made[name]
        path = made[name] = folder / name
        if name == "lists.gguf":
            values = {"attention.head_count_kv": [1, 2, 0, 3, 5, 4], "general.file_type": 0}
            return write_gguf(path, "llama", 6, values, alignment=32)
        if path.suffix:
            write_llama_gguf(path, 6)
            file = number("general.file_type", UINT32, 0)(gguf_of(path))
            path.write_bytes(key("tokenizer.chat_template", STRING, text(b"{{ messages }}"))(file).to_bytes())
            return path
        save_model(path, CONFIGS[name](), bos=name == "opt", **({"max_shard_size": "60KB"} if name == "shards" else {}))
        for file in path.glob("*.safetensors"):
            held = load(file.read_bytes())
            biases = {each: held[each] + 0.1 for each in held if each.endswith("bias")}
            save_file(held | biases, file, {"format": "pt"})
        (path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        (path / "LICENSE").write_text("Anyone may use this.\n")
        settings = {"quant_method": "gptq", "bits": 4, "ignore": ["lm_head", "model.layers.5.mlp.down_proj"]}
        if name in ("llama", "shards"):
            (path / "quantize_config.json").write_text(json.dumps(settings))
        return path

    return make


@pytest.fixture
def damaging(monkeypatch):
    """Damage what was written before it is proven; the proof compares it with the plan, or leaves that out."""

    def arrange(do, as_planned):
        pending = [do]

        def damage_and(check, source, path, *more):
            if pending:
                pending.pop()(path)
            return iter(()) if as_planned else check(source, path, *more)

        for module, name in ((proof, "_as_planned"), (apply_gguf, "_require_as_planned")):
            monkeypatch.setattr(module, name, partial(damage_and, getattr(module, name)))

    return arrange


def cut(dense, *options):
    return ("apply", dense, "--blocks", "1,4", "-o", f"out{dense.suffix}", *options)


def label(case):
    name, kind, suffix, options, as_planned = case
    return f"{name}, {kind.model}{suffix} {' '.join(map(str, options))}{' as planned' if as_planned else ''}"


@pytest.mark.parametrize("case", often(CASES, CASES[::9]), ids=label)
def test_what_is_damaged_is_refused(sleb, dense, damaging, text_file, tmp_path_factory, monkeypatch, case):
    _, kind, suffix, options, as_planned = case
    shutil.copy(text_file, "text.txt")
    # One cache for all of these tests, so that a GGUF file is converted once.
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    model = dense(f"{kind.model}{suffix}")
    damaging(lambda path: kind.do(path, model), as_planned)
    result = sleb(*cut(model, *options), code=9)
    assert len(re.findall(r"^error: .*\nhint: ", result.stderr, re.MULTILINE)) == 1
    assert not result.stdout
    assert set(os.listdir()) <= {".out.recovery", "hub", "text.txt"}


@pytest.mark.parametrize("model", often([*CONFIGS, "llama.gguf", "lists.gguf"], ["llama", "llama.gguf"]))
@pytest.mark.parametrize("as_planned", [False, True])
def test_what_is_undamaged_is_delivered(sleb, dense, damaging, model, as_planned):
    damaging(lambda path: None, as_planned)
    sleb(*cut(dense(model)))


@pytest.mark.faults
@pytest.mark.parametrize(("block", "old"), enumerate(KEPT))
@pytest.mark.parametrize(("model", "larger"), [("llama", 2**-20), ("bfloat16", 2**-4)])
def test_what_rounding_cannot_hide(sleb, dense, damaging, model, larger, block, old):
    """As docs/reference/commands.md says of logits, when the plan itself is wrong."""
    name = f"model.layers.{block}.input_layernorm.weight"
    damaging(lambda path: at(name, lambda values: values * (1 + larger))(path, dense(model)), True)
    assert re.search(rf"logits.*\b{block}\b.*\b{old}\b", sleb(*cut(dense(model)), code=9).stderr)


@pytest.mark.parametrize("as_planned", [False, True])
def test_what_rounding_hides_from_logits_but_not_from_bytes(sleb, dense, damaging, as_planned):
    name = "model.layers.3.input_layernorm.weight"
    damaging(lambda path: at(name, lambda values: values * (1 + 2**-7))(path, dense("bfloat16")), as_planned)
    sleb(*cut(dense("bfloat16")), code=0 if as_planned else 9)
