"""Kinds of wrong checkpoints: what each does to a finished folder of a checkpoint, or to a finished GGUF file.

A kind is a function that damages what `sleb apply` has written but not yet proven. It is consistent with itself where
it can be: a moved tensor is moved in the index as well, and an extra block is counted in the config.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor

from faults.lies import UINT32, gguf_of, parse, to_text, weight_file

BLOCK = re.compile(r"(.*layers\.)(\d+)\.(.*)")
INDEX = "model.safetensors.index.json"
LLAMA, GEMMA, OPT, BF16, SHARDED = "llama", "gemma3", "opt", "llama in bfloat16", "llama in shards"
EVERY = (LLAMA, GEMMA, OPT, BF16, SHARDED)
ROPED = (LLAMA, GEMMA, BF16, SHARDED)
LLAMAS = (LLAMA, BF16, SHARDED)
ONE_FILE = (LLAMA, GEMMA, OPT, BF16)


@dataclass(frozen=True)
class Kind:
    """A kind of wrong checkpoint.

    Attributes:
        name: what is wrong.
        says: what the refusal names.
        do: what makes it so.
        models: the models that it fits, the best one first, if not all.
        computes: whether the checkpoint then computes something else, so that transformers alone can tell.
    """

    name: str
    says: str
    do: Callable[[Any], object]
    models: tuple[str, ...] = ()
    computes: bool = True


quiet = partial(Kind, computes=False)


@dataclass(frozen=True)
class Made:
    """A finished checkpoint, or GGUF file, at `path`, made of `dense` without the blocks `removed`.

    `other` is another model.
    """

    path: Path
    dense: Path
    removed: tuple[int, ...]
    other: Path | None = None
    rng: random.Random = field(default_factory=random.Random)

    def tensors(self) -> dict[str, Tensor]:
        return of_folder(self.path)

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    def shard(self) -> Path:
        return self.rng.choice(self.shards())

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write these tensors in place of the present ones: each to its file, new ones to the last."""
        files = self.shards()
        place = {name: file for file in files for name in load_file(file)}
        held: dict[Path, dict[str, Tensor]] = {file: {} for file in files}
        for name, tensor in tensors.items():
            held[place.get(name, files[-1])][name] = tensor.contiguous()
        for file, own in held.items():
            save_file(own, anew(file), metadata={"format": "pt"})
        if len(files) > 1:
            places = {name: file.name for file, own in held.items() for name in own}
            size = sum(tensor.nbytes for tensor in tensors.values())
            self.json(INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})

    def before(self, name: str) -> str:
        """Return the name that a tensor has in the dense model."""
        kept = [block for block in range(6) if block not in self.removed]
        return name if (block := number(name)) is None else numbered(name, kept[block])

    def pick(self, pattern: str) -> str:
        """Return the name of any tensor in which this pattern is found."""
        return self.rng.choice(sorted(name for name in self.tensors() if re.search(pattern, name)))

    def json(self, name: str, values: Any) -> None:
        anew(self.path / name).write_text(json.dumps(values, indent=2) + "\n")


def of_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def anew(path: Path) -> Path:
    """Forget a file that may be a link to the dense model's, so that only this folder changes."""
    path.unlink(missing_ok=True)
    return path


def number(name: str) -> int | None:
    match = BLOCK.fullmatch(name)
    return int(match[2]) if match else None


def numbered(name: str, block: int) -> str:
    return BLOCK.sub(rf"\g<1>{block}.\g<3>", name)


# Ways to damage a checkpoint. What changes something is given it, and the checkpoint.


def tensors(change):
    """Change the tensors by name."""

    def do(made):
        held = made.tensors()
        made.write(change(held, made) or held)

    return do


def edit(pattern, change):
    """Change the values of any tensor in which this pattern is found."""

    def do(made):
        name, held = made.pick(pattern), made.tensors()
        made.write(held | {name: change(held[name].clone(), made)})

    return do


def exchange(pattern, other):
    """Exchange any tensor in which this pattern is found with that of another name."""

    def do(made):
        name, held = made.pick(pattern), made.tensors()
        second = other(name)
        made.write(held | {name: held[second], second: held[name]})

    return do


def take(pattern, source):
    """Give any tensor in which this pattern is found the values that `source` returns for its name."""
    return lambda made: made.write(made.tensors() | {(name := made.pick(pattern)): source(name, made).clone()})


def rename(new):
    return tensors(lambda held, made: {new(name, made): tensor for name, tensor in held.items()})


def blocks(order):
    """Put blocks elsewhere: the block at each place comes from the place that `order` names."""

    def do(made):
        held, places = made.tensors(), order([0, 1, 2, 3])
        moved = {name: tensor for name, tensor in held.items() if number(name) is None}
        for new, old in enumerate(places):
            moved |= {numbered(name, new): tensor.clone() for name, tensor in held.items() if number(name) == old}
        made.write(moved)
        if len(places) != 4:
            kinds = json.loads((made.path / "config.json").read_text()).get("layer_types")
            more = {"layer_types": [kinds[old] for old in places]} if kinds else {}
            config(num_hidden_layers=len(places), **more)(made)

    return do


def of_json(name, change):
    """Change a document of JSON, in place or by what `change` returns."""

    def do(made):
        values = json.loads((made.path / name).read_text())
        made.json(name, change(values, made) or values)

    return do


def config(**changes):
    return of_json("config.json", lambda values, made: values | changes)


def tokenizer(change):
    return of_json("tokenizer.json", lambda values, made: change(values))


def content(which, change):
    """Change the bytes of a file: a name, or what `which` chooses; None removes it."""

    def do(made):
        path = made.path / which if isinstance(which, str) else which(made)
        data = change(path.read_bytes() if path.exists() else b"", made)
        anew(path)
        if data is not None:
            path.write_bytes(data)

    return do


def copied(name):
    return content(name, lambda data, made: (made.dense / name).read_bytes())


def missing(name):
    return content(name, lambda data, made: None)


def header(change):
    """Change the header of the weight file with the most tensors, and perhaps its bytes."""

    def do(made):
        path = max(made.shards(), key=lambda shard: len(load_file(shard)))
        entries, data = parse(path.read_bytes())
        own = {name: each for name, each in entries.items() if name != "__metadata__"}
        data = change(own, data) or data
        text = to_text(entries)
        anew(path).write_bytes(weight_file(text + b" " * (-len(text) % 8), data))

    return do


def block_of(name, block):
    return rf"layers\.{block}\..*({name})"


def norm(change):
    return edit(r"layers\..*norm\.weight", change)


def weights(names, change):
    return edit(block_of(rf"(?:{names})\.weight", r"\d+"), change)


MATRICES = "v_proj|o_proj|out_proj|fc2|down_proj"


def one_value(value):
    def change(values, made):
        values.view(-1)[made.rng.randrange(values.numel())] = value
        return values

    return weights(MATRICES, change)


def last_bit(values, made):
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    bits[made.rng.randrange(len(values))] ^= 1
    return values


def last_row(values, made):
    values[-1] += 1
    return values


def flipped(data, made):
    data, begin = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    data[made.rng.randrange(begin, len(data))] ^= 1 << made.rng.randrange(8)
    return bytes(data)


def hole(data, made):
    start = made.rng.randrange(len(data) // 2, len(data) - 512)
    return data[:start] + bytes(512) + data[start + 512 :]


def same_shape(own, data):
    names = [name for name in own if name.endswith(("q_proj.weight", "o_proj.weight", "v_proj.weight", "fc1.weight"))]
    first, second = next((a, b) for a in names for b in names if a < b and own[a]["shape"] == own[b]["shape"])
    own[first]["data_offsets"], own[second]["data_offsets"] = own[second]["data_offsets"], own[first]["data_offsets"]


def shifted(own, data):
    for entry in own.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


def called_float16(own, data):
    for entry in own.values():
        entry["dtype"] = "F16"


def shared(own, data):
    first, second = list(own)[:2]
    own[second]["data_offsets"] = own[first]["data_offsets"]


def exchange_tokens(values):
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def shard_for_shard(first, last):
    """Put the bytes of one shard in place of another's."""
    return lambda made: anew(last(made)).write_bytes(first(made).read_bytes())


def exchanged_shards(made):
    first, *_, last = made.shards()
    one, other = first.read_bytes(), last.read_bytes()
    anew(first).write_bytes(other)
    anew(last).write_bytes(one)


def in_two_shards(made):
    first, second = made.shards()[:2]
    name, tensor = next(iter(load_file(second).items()))
    save_file(load_file(first) | {name: tensor + 1}, anew(first), metadata={"format": "pt"})


def of_index(change):
    """Change where the index says any tensor is."""

    def do(values, made):
        places = values["weight_map"]
        change(places, made.rng.choice(sorted(places)), made)

    return of_json(INDEX, do)


def another_shard(places, name, made):
    places[name] = next(path.name for path in made.shards() if path.name != places[name])


def old_number(name, made):
    return made.before(name)


def with_head(made):
    tensors(lambda held, made: held | {"lm_head.weight": held[made.pick("embed_tokens")].roll(1, 0)})(made)
    config(tie_word_embeddings=False)(made)


def with_dense(made):
    save_file(of_folder(made.dense), made.path / "model.safetensors", metadata={"format": "pt"})


ROPE = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
LAYERS, TRUNCATED, CONFIG = r"bytes of \S*layers\.", "truncated", r"config\.json is not what was written"
NOT_ITS, SHAPE, TOKENS = r"bytes of \S*", "another type or shape", r"tokenizer\.json is not the dense model's"
EMBEDDING = r"^(?!.*layers).*embed_tokens"
STALE = "model-00006-of-00009.safetensors"
CHANGED = [
    ("the config counts a block too many", (), dict(num_hidden_layers=5)),
    ("the config counts a block too few", (), dict(num_hidden_layers=3)),
    ("the base of the rope is another", LLAMAS, dict(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
    ("the rope is scaled", LLAMAS, dict(rope_parameters=ROPE)),
    ("the sliding window is another", (GEMMA,), dict(sliding_window=3)),
    ("the norm's epsilon is another", ROPED, dict(rms_norm_eps=0.1)),
    ("the head count is halved", (), dict(num_attention_heads=2)),
    ("the count of key heads is another", ROPED, dict(num_key_value_heads=1)),
    ("the activation is another", LLAMAS, dict(hidden_act="gelu")),
    ("the activation of OPT is another", (OPT,), dict(activation_function="gelu")),
    ("the scale of attention is another", (GEMMA,), dict(query_pre_attn_scalar=64)),
    ("logits are capped", (GEMMA,), dict(final_logit_softcapping=1.0)),
    ("norms come after the block", (OPT,), dict(do_layer_norm_before=False)),
    ("attention has biases", ROPED, dict(attention_bias=True)),
    ("the vocabulary is larger", (), dict(vocab_size=321)),
]
QUIETLY = [
    ("the rope is scaled beyond the prompt", LLAMAS, dict(rope_parameters=ROPE | {"rope_type": "dynamic"})),
    ("the window of a long text is another", (), dict(max_position_embeddings=120)),
    ("the end token is another", (), dict(eos_token_id=7)),
    ("the start token is another", (), dict(bos_token_id=9)),
    ("the config calls bfloat16 float16", (BF16,), dict(dtype="float16")),
    ("the config says that weights are quantised", (), dict(quantization_config={"quant_method": "no such method"})),
    ("the config names code to run", (), dict(auto_map={"AutoModelForCausalLM": "x.X"})),
]
HF = [
    # Blocks.
    Kind("two blocks have changed places", LAYERS, blocks(lambda order: [1, 0, 2, 3])),
    Kind("the blocks are in reverse order", LAYERS, blocks(lambda order: order[::-1])),
    Kind("a block is there twice, in the place of its neighbour", LAYERS, blocks(lambda order: [0, 0, 2, 3])),
    # Of the kept blocks, the one after the removed one has the removed one's number.
    Kind("the wrong block was removed: one off", LAYERS, tensors(lambda held, made: held | {
        name: of_folder(made.dense)[name] for name in held if number(name) == made.removed[0]})),
    Kind("a block too many", rf"{CONFIG}|unexpected", blocks(lambda order: [*order, 3])),
    Kind("a block too few", rf"{CONFIG}|missing", blocks(lambda order: order[:-1])),
    # Tensors.
    Kind("a norm is doubled", r"bytes of \S*norm", norm(lambda values, made: values * 2)),
    Kind("a norm is larger by one part in 1000", r"bytes of \S*norm", norm(lambda values, made: values * 1.001),
         (LLAMA, GEMMA, OPT, SHARDED)),
    quiet("a norm differs by the last bit of one value", r"bytes of \S*norm", norm(last_bit)),
    Kind("the final norm is that of a block", r"bytes of \S*norm", take(
        r"^(?!.*layers).*norm\.weight", lambda name, made: made.tensors()[made.pick(r"layers\..*layer_?norm\.w")])),
    Kind("a bias is negated", NOT_ITS + "bias", edit(block_of("(v_proj|out_proj|fc1|fc2).bias", r"\d+"),
         lambda values, made: -values), (OPT,)),
    Kind("a bias is left out", r"missing, such as \S*bias", tensors(lambda held, made: {
        name: held[name] for name in held if name != "model.decoder.layers.1.fc1.bias"}), (OPT,)),
    Kind("a tensor comes from the neighbour block", LAYERS, take(
        block_of("(v_proj|o_proj|up_proj|fc1).weight", 1), lambda name, made: made.tensors()[numbered(name, 2)])),
    Kind("a tensor is one of the removed block", LAYERS, take(
        block_of("(v_proj|fc1|down_proj).weight", r"\d+"),
        lambda name, made: of_folder(made.dense)[numbered(name, made.removed[0])])),
    Kind("queries and keys are exchanged", NOT_ITS + "[qk]_proj", exchange(
        "q_proj.weight", lambda name: name.replace("q_proj", "k_proj")), (GEMMA, OPT)),
    Kind("keys and values are exchanged", NOT_ITS + "[kv]_proj", exchange(
        "k_proj.weight", lambda name: name.replace("k_proj", "v_proj"))),
    Kind("gate and up are exchanged", NOT_ITS + "(gate|up)_proj", exchange(
        "gate_proj.weight", lambda name: name.replace("gate_proj", "up_proj")), ROPED),
    Kind("the heads of a projection are permuted", NOT_ITS + "[qkv]_proj",
         weights("[qkv]_proj", lambda values, made: values.roll(8, 0))),
    Kind("a square tensor is transposed", NOT_ITS + "(q|o|out)_proj",
         weights("q_proj|o_proj|out_proj", lambda values, made: values.T)),
    Kind("an oblong tensor is transposed", SHAPE, weights("up_proj|down_proj|fc1", lambda values, made: values.T)),
    Kind("a tensor has the shape of its transposed self", SHAPE,
         weights("up_proj|down_proj|fc1", lambda values, made: values.reshape(values.shape[::-1]))),
    Kind("a tensor is zero", LAYERS, weights("v_proj|fc1|o_proj|norm", lambda values, made: torch.zeros_like(values))),
    Kind("a tensor is random", LAYERS, weights("v_proj|fc1", lambda values, made: torch.randn_like(values))),
    Kind("one value is 100", LAYERS, one_value(100.0)),
    Kind("one value is NaN", LAYERS, one_value(float("nan"))),
    Kind("one value is infinite", LAYERS, one_value(float("inf"))),
    quiet("a hole of zeros, as a disk leaves it", "bytes of ", content(lambda made: made.shards()[0], hole)),
    quiet("one bit is flipped", rf"bytes of |{SHAPE}|missing|truncated",
          content(lambda made: made.shards()[-1], flipped)),
    Kind("the last rows of a tensor are missing", SHAPE,
         weights("q_proj|down_proj|fc2", lambda values, made: values[:-2])),
    Kind("a tensor is missing", "1 tensors are missing", tensors(lambda held, made: {
        name: held[name] for name in sorted(held) if name != sorted(held)[-3]})),
    Kind("a tensor is there that no model has", "1 tensors are unexpected", tensors(
        lambda held, made: held | {numbered(made.pick("q_proj.weight"), 17): torch.ones(3)})),
    Kind("a tensor has its old number", "1 tensors are missing", rename(
        lambda name, made: re.sub(r"layers\.3\.(.*v_proj\.weight)", r"layers.5.\1", name))),
    Kind("all tensors have their old numbers", "tensors are missing", rename(old_number)),
    quiet("names lack their first part, as those of a base model do", "tensors are missing",
          rename(lambda name, made: name.removeprefix("model."))),
    Kind("the embedding's rows are rolled by one", NOT_ITS + "embed",
         edit(EMBEDDING, lambda values, made: values.roll(1, 0))),
    quiet("the embedding of a token that no prompt has is another", NOT_ITS + "embed", edit(EMBEDDING, last_row)),
    Kind("the positions are rolled by one", NOT_ITS + "embed_positions",
         edit("embed_positions", lambda values, made: values.roll(1, 0)), (OPT,)),
    Kind("a tied model has a wrong head of its own", "config|unexpected, such as lm_head", with_head, (GEMMA, OPT)),
    Kind("a tied model is said to be untied", "tie_word_embeddings: False, not True",
         config(tie_word_embeddings=False), (GEMMA, OPT)),
    # transformers keeps a head that differs from the embedding; other engines would not.
    quiet("an untied model is said to be tied", "tie_word_embeddings: True, not False",
          config(tie_word_embeddings=True), LLAMAS),
    Kind("the head is the embedding", "bytes of lm_head", take(
        "lm_head", lambda name, made: made.tensors()["model.embed_tokens.weight"]), LLAMAS),
    Kind("all weights are those of another training", "bytes of ", tensors(
        lambda held, made: {name: of_folder(made.other)[name] for name in held}), (LLAMA,)),
    # Headers of weight files.
    Kind("two tensors' bytes are exchanged in the header", "bytes of ", header(same_shape)),
    Kind("the bytes are one value further than the header says", "bytes of |truncated",
         header(lambda own, data: data[4:] + data[:4])),
    Kind("offsets are shifted", TRUNCATED, header(shifted)),
    quiet("two tensors share their bytes", TRUNCATED, header(shared)),
    Kind("bfloat16 is called float16", SHAPE, header(called_float16), (BF16,)),
    quiet("the weights were cast", SHAPE, tensors(lambda held, made: {name: held[name].half() for name in held})),
    quiet("the weights went through float16", "bytes of ", tensors(lambda held, made: {
        name: (values + 1e-9).half().to(values.dtype) * 1.01 for name, values in held.items()})),
    quiet("the file says that it is TensorFlow's", "metadata of model", lambda made: [
        save_file(load_file(path), anew(path), metadata={"format": "tf"}) for path in made.shards()[:1]]),
    # The config.
    Kind("the config is the dense model's", CONFIG + ".*: 6, not 4", copied("config.json")),
    Kind("layer_types are the dense model's", CONFIG + ": layer_types", of_json(
        "config.json", lambda values, made: values | {"layer_types": dense_kinds(made)}), (GEMMA,)),
    Kind("layer_types are those of the first blocks", CONFIG + ": layer_types", of_json(
        "config.json", lambda values, made: values | {"layer_types": dense_kinds(made)[:4]}), (GEMMA,)),
    Kind("the bases of the two ropes are exchanged", CONFIG + ": rope_parameters", of_json(
        "config.json", lambda values, made: values | {"rope_parameters": dict(
            zip(values["rope_parameters"], reversed(values["rope_parameters"].values()), strict=True))}), (GEMMA,)),
    Kind("a setting is missing", rf"{CONFIG}: (intermediate_size|ffn_dim): None", of_json(
        "config.json", lambda values, made: {name: values[name] for name in values if not re.match(
            "intermediate_size|ffn_dim", name)})),
    Kind("the config is cut off", CONFIG + ", nor readable JSON",
         content("config.json", lambda data, made: data[: len(data) // 2])),
    Kind("the config is that of another family", CONFIG,
         config(model_type="gpt2", architectures=["GPT2LMHeadModel"])),
    Kind("the config says a key twice", CONFIG, content(
        "config.json", lambda data, made: data.rstrip().removesuffix(b"}") + b', "num_hidden_layers": 3}\n')),
    *(Kind(name, rf"{CONFIG}: {next(iter(changes))}", config(**changes), models) for name, models, changes in CHANGED),
    *(quiet(name, rf"{CONFIG}: {next(iter(changes))}", config(**changes), models) for name, models, changes in QUIETLY),
    quiet("quantization settings name the old blocks", "quantize_config.json is not what was written",
          copied("quantize_config.json"), (LLAMA, SHARDED)),
    # The tokenizer, and settings of generation.
    quiet("the tokenizer is another model's", TOKENS, content(
        "tokenizer.json", lambda data, made: (made.other / "tokenizer.json").read_bytes())),
    quiet("two tokens are exchanged", TOKENS, tokenizer(exchange_tokens)),
    quiet("added tokens are missing", TOKENS, tokenizer(
        lambda values: values | {"added_tokens": values["added_tokens"][:-1]})),
    quiet("a merge is missing", TOKENS, tokenizer(lambda values: values["model"]["merges"].pop(5) and None)),
    quiet("texts begin with no start token", TOKENS,
          tokenizer(lambda values: values | {"post_processor": None}), (OPT,)),
    quiet("the chat template is another", r"chat_template\.jinja is not the dense model's",
          content("chat_template.jinja", lambda data, made: b"{{ messages }}")),
    *(quiet(f"{name} is missing", rf"{re.escape(name)} is missing", missing(name))
      for name in ("chat_template.jinja", "tokenizer.json", "LICENSE")),
    quiet("the tokenizer's settings are others", r"tokenizer_config\.json is not", of_json(
        "tokenizer_config.json", lambda values, made: values | {"eos_token": "<s>"})),
    quiet("the settings of generation are others", r"generation_config\.json is not",
          of_json("generation_config.json", lambda values, made: values | {"temperature": 0.1, "eos_token_id": 5})),
    # Files.
    Kind("a shard is missing", r"model-0000\d-of-0000\d\.safetensors is missing",
         content(Made.shard, lambda data, made: None), (SHARDED,)),
    Kind("the weights are missing", r"model.*safetensors is missing",
         lambda made: [path.unlink() for path in made.shards()], ONE_FILE),
    quiet("a stale shard of the dense model is left beside", rf"{STALE} is there",
          shard_for_shard(lambda made: made.shards()[-1], lambda made: made.path / STALE), (SHARDED, LLAMA)),
    Kind("the dense model is left beside its shards", r"model\.safetensors is there", with_dense, (SHARDED,)),
    Kind("a shard is there twice, under another's name", r"missing|bytes of|holds other tensors",
         shard_for_shard(lambda made: made.shards()[0], lambda made: made.shards()[-1]), (SHARDED,)),
    quiet("two shards have each other's name", "holds other tensors", exchanged_shards, (SHARDED,)),
    Kind("a shard is one of the dense model's", r"holds other tensors|missing|bytes of", shard_for_shard(
        lambda made: sorted(made.dense.glob("*.safetensors"))[3], lambda made: made.shards()[-1]), (SHARDED,)),
    quiet("the index names the wrong shard", rf"{INDEX} is not what was written: weight_map\.",
          of_index(another_shard), (SHARDED,)),
    quiet("the index lacks a tensor", rf"{INDEX} is not what was written: weight_map\.",
          of_index(lambda places, name, made: places.pop(name)), (SHARDED,)),
    quiet("the index lies about the size", rf"{INDEX} is not what was written: metadata.total_size: 17", of_json(
        INDEX, lambda values, made: values | {"metadata": {"total_size": 17}}), (SHARDED,)),
    Kind("the index is missing", rf"{INDEX} is missing", missing(INDEX), (SHARDED,)),
    quiet("the index is the dense model's", rf"{INDEX} is not what was written", copied(INDEX), (SHARDED,)),
    quiet("a tensor is in two shards, differently", "holds other tensors", in_two_shards, (SHARDED,)),
    Kind("a weight file is cut off", TRUNCATED, content(
        Made.shard, lambda data, made: data[: made.rng.randrange(len(data))])),
    Kind("a weight file is longer than it says", TRUNCATED, content(Made.shard, lambda data, made: data + bytes(8))),
    Kind("a weight file is empty", TRUNCATED, content(Made.shard, lambda data, made: b"")),
    Kind("a weight file is the page of a proxy", TRUNCATED, content(
        Made.shard, lambda data, made: b"<html>403 Forbidden</html>\n" * 900)),
    quiet("weights of another format are left beside", r"pytorch_model\.bin is there",
          lambda made: torch.save(made.tensors(), made.path / "pytorch_model.bin")),
    quiet("an adapter is left beside", r"adapter_config\.json is there",
          lambda made: made.json("adapter_config.json", {"peft_type": "LORA"})),
    quiet("code is left beside", r"modeling_evil\.py is there",
          content("modeling_evil.py", lambda data, made: b"print('here I am')\n")),
]  # fmt: skip


def dense_kinds(made):
    return json.loads((made.dense / "config.json").read_text())["layer_types"]


def changed(made: Made) -> list[str]:
    """The names of tensors with new values."""
    dense, kept = of_folder(made.dense), made.tensors()
    return [name for name in sorted(kept) if not torch.equal(kept[name], dense[made.before(name)])]


def in_blocks(names):
    return [name for name in names if number(name) is not None]


def in_the_wrong_block(held, made):
    name = made.rng.choice(in_blocks(changed(made)))
    other = numbered(name, (number(name) + 1) % 4)
    return held | {name: held[other], other: held[name]}


def one_left_out(held, made):
    name = made.rng.choice(changed(made))
    return held | {name: of_folder(made.dense)[made.before(name)]}


def another_changed(held, made):
    name = made.rng.choice(in_blocks(sorted(set(held) - set(changed(made)))))
    return held | {name: held[name] * 1.01}


RECOVERED = [
    Kind("a recovered tensor is in the wrong block", r"bytes of \S+ are not ", tensors(in_the_wrong_block), (LLAMA,)),
    Kind("a recovered tensor is left out", r"bytes of \S+ are not its new values", tensors(one_left_out), (LLAMA,)),
    Kind("no recovered tensor was written", r"bytes of \S+ are not its new values", tensors(
        lambda held, made: {name: of_folder(made.dense)[made.before(name)] for name in held}), (LLAMA,)),
    Kind("recovered tensors were rounded", r"bytes of \S+ are not its new values", tensors(
        lambda held, made: held | {name: held[name].bfloat16().float() for name in changed(made)}), (LLAMA,)),
    Kind("a tensor that was not recovered has another value", r"bytes of \S+ are not those of",
         tensors(another_changed), (LLAMA,)),
]  # fmt: skip

# Ways to damage a GGUF file.

F32, Q8, LISTS = "F32", "Q8_0", "lists by block"


def of_gguf(change):
    """Change the parts of the file."""
    return lambda made: made.path.write_bytes(change(gguf_of(made.path)).to_bytes())


def of_bytes(change):
    return lambda made: made.path.write_bytes(change(made.path.read_bytes(), made))


def entries(change):
    return of_gguf(lambda file: replace(file, entries=tuple(change(file.entries))))


def entry(key, change):
    """Give the key of this ending another value."""

    def do(found):
        assert any(name.endswith(key.encode()) for name, _, _ in found), key
        return [(name, type_, change(data) if name.endswith(key.encode()) else data) for name, type_, data in found]

    return entries(do)


def u32(value):
    return lambda data: struct.pack("<I", value)


def f32(value):
    return lambda data: struct.pack("<f", value)


def without(*endings):
    return entries(lambda found: [each for each in found if not each[0].endswith(endings)])


def spans(path):
    """Return where each tensor's bytes are."""
    found = GGUFReader(path).tensors
    return {each.name: slice(int(each.data_offset), int(each.data_offset + each.n_bytes)) for each in found}


def places(new):
    """Take the bytes of each tensor from another one."""

    def change(data, made):
        where, found = spans(made.path), bytearray(data)
        for name, span in where.items():
            found[span] = data[where[new(name)]]
        return found

    return of_bytes(change)


def named(new):
    return of_gguf(lambda file: replace(
        file, tensors=tuple((new(name.decode()).encode(), *rest) for name, *rest in file.tensors)))  # fmt: skip


def tensor_of(pattern, **changes):
    """Change the shape or the type of a tensor."""

    def change(name, shape, type_, offset):
        own = changes if name.decode() == pattern else {}
        return name, own.get("shape", lambda: shape)(), own.get("type", type_), offset

    return of_gguf(lambda file: replace(file, tensors=tuple(change(*each) for each in file.tensors)))


def values(pattern, change):
    """Change the bytes of the tensors in whose names this pattern is found."""

    def do(data, made):
        found = bytearray(data)
        for name, span in spans(made.path).items():
            if re.search(pattern, name):
                found[span] = change(data[span], name, made)
        return found

    return of_bytes(do)


def in_dense(data, name, made):
    return made.dense.read_bytes()[spans(made.dense)[name]]


def doubled(data, name, made):
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    return struct.pack(f"<{len(numbers)}f", *(2 * each for each in numbers))


def swapped_tokens(data):
    end = 20 + int.from_bytes(data[12:20], "little")
    stop = end + 8 + int.from_bytes(data[end : end + 8], "little")
    return data[:12] + data[end:stop] + data[12:end] + data[stop:]


def dense_heads(made):
    found = next(data for key, _, data in gguf_of(made.dense).entries if key.endswith(b"head_count_kv"))
    entry("head_count_kv", lambda data: found)(made)


def bit_of(data, name, made):
    place = made.rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << made.rng.randrange(8)]) + data[place + 1 :]


def swap(one, other):
    return lambda name: name.replace(one, other) if one in name else name.replace(other, one)


def renumber(new):
    return lambda name: re.sub(r"^blk\.(\d)", lambda match: f"blk.{new[int(match[1])]}", name)


def one_further(data, made):
    start = min(span.start for span in spans(made.path).values())
    return data[:start] + data[start + 4 :] + bytes(4)


def drop(name):
    return of_gguf(lambda file: replace(file, tensors=tuple(each for each in file.tensors if each[0] != name)))


NAN, DIFFERS = struct.pack("<f", float("nan")), "differs from the expected"
TEMPLATE = struct.pack("<Q", 5) + b"{{ }}"
GGUF = [
    Kind("the file counts a block too many", "block_count is another", entry(".block_count", u32(5))),
    Kind("the file counts a block too few", "block_count is another", entry(".block_count", u32(3))),
    Kind("the base of the rope is another", "freq_base is another", entry("freq_base", f32(500))),
    quiet("the rope turns fewer values", "dimension_count is another", entry("dimension_count", u32(4))),
    Kind("the norm's epsilon is another", "epsilon is another", entry("rms_epsilon", f32(0.1))),
    Kind("the head count is halved", "head_count is another", entry("attention.head_count", u32(2))),
    Kind("the count of key heads is another", "head_count_kv is another", entry("head_count_kv", u32(2))),
    quiet("the context is longer", "context_length is another", entry("context_length", u32(4096))),
    quiet("the end token is another", "eos_token_id is another", entry("eos_token_id", u32(7))),
    quiet("texts begin with a start token", "add_bos_token is another", entry("bos_token", lambda data: b"\1")),
    quiet("the file type lies", "file_type is another", entry("file_type", u32(15))),
    quiet("the alignment lies", f"alignment is another|{DIFFERS}|cannot read|truncated", entry(
        "general.alignment", u32(64)), (LISTS,)),
    Kind("two blocks have changed places", "tensor blk.0", places(renumber([1, 0, 2, 3]))),
    Kind("the blocks are named in another order", "tensor blk.", named(renumber([3, 2, 1, 0]))),
    Kind("the wrong block was removed: one off", "tensor blk.1", values(r"blk\.1\.", in_dense), (F32,)),
    Kind("a tensor comes from the neighbour block", "tensor blk.1.ffn_up", places(
        lambda name: name.replace("blk.1.ffn_up", "blk.2.ffn_up"))),
    Kind("gate and up are exchanged", "tensor blk.2.ffn_(up|gate)", places(
        swap("blk.2.ffn_up.", "blk.2.ffn_gate."))),
    Kind("queries and keys are exchanged", "tensor blk.2.attn_[qk]", named(
        swap("blk.2.attn_q.", "blk.2.attn_k."))),
    Kind("a norm is doubled", "tensor blk.1.attn_norm", values("blk.1.attn_norm", doubled)),
    Kind("a tensor is zero", "tensor blk.2.ffn_down", values(
        "blk.2.ffn_down", lambda data, name, made: bytes(len(data)))),
    Kind("one value is NaN", "tensor blk.2.ffn_norm", values(
        "blk.2.ffn_norm", lambda data, name, made: data[:4] + NAN + data[8:])),
    quiet("one bit is flipped", DIFFERS, values("blk.2.attn_q", bit_of)),
    Kind("the embedding's rows are rolled by one", "tensor token_embd", values(
        "token_embd", lambda data, name, made: data[len(data) // 320 :] + data[: len(data) // 320])),
    Kind("the final norm is that of a block", "tensor output_norm", places(
        lambda name: name.replace("output_norm.", "blk.0.attn_norm."))),
    Kind("the head is missing, as if tied", "tensors, not", drop(b"output.weight")),
    Kind("a tensor is missing", "tensors, not", drop(b"blk.3.ffn_up.weight")),
    quiet("a tensor is there that no model has", "tensors, not", of_gguf(lambda file: replace(
        file, tensors=(*file.tensors, (b"blk.9.ffn_up.weight", *file.tensors[-1][1:]))))),
    Kind("a tensor has its old number", "tensor blk.5", named(
        lambda name: name.replace("blk.3.ffn_up", "blk.5.ffn_up"))),
    quiet("two tensors have one name", f"{DIFFERS}|cannot read", named(
        lambda name: name.replace("blk.0.attn_q", "blk.1.attn_q"))),
    Kind("a tensor has the shape of its transposed self", "tensor blk.1.ffn_up", tensor_of(
        "blk.1.ffn_up.weight", shape=lambda: (64, 32))),
    quiet("a tensor has another type", f"{DIFFERS}|cannot read|truncated", tensor_of(
        "output_norm.weight", type=26)),
    Kind("the bytes are one value further than the header says", DIFFERS, of_bytes(one_further)),
    Kind("the file is cut off", "cannot read it|truncated", of_bytes(
        lambda data, made: data[: made.rng.randrange(len(data) - 64)])),
    quiet("the file is longer than it should be", "bytes, not", of_bytes(lambda data, made: data + bytes(32))),
    Kind("the file is empty", "cannot read it", of_bytes(lambda data, made: b"")),
    quiet("the file is of another version", "version 2, not 3|cannot read it", of_gguf(
        lambda file: replace(file, version=2))),
    quiet("a key is missing", "epsilon is missing", without(b"layer_norm_rms_epsilon")),
    quiet("a key is there twice", "metadata differ|cannot read", entries(
        lambda found: [*found, next(each for each in found if each[0].endswith(b"block_count"))])),
    quiet("a key was added", "general.sampled is unexpected", entries(
        lambda found: [*found, (b"general.sampled", UINT32, struct.pack("<I", 1))])),
    quiet("the removed blocks are not recorded", "sleb.removed_blocks is missing", without(b"removed_blocks")),
    quiet("two tokens are exchanged", "tokenizer.ggml.tokens is another", entry("ggml.tokens", swapped_tokens)),
    quiet("a merge is missing", "tokenizer.ggml.merges is missing", without(b"ggml.merges")),
    quiet("the chat template is another", "chat_template is another", entry(
        "chat_template", lambda data: TEMPLATE)),
    quiet("a list by block is the dense model's", "head_count_kv is another", dense_heads, (LISTS,)),
    quiet("a list by block is shifted by one", "head_count_kv is another", entry(
        "head_count_kv", lambda data: data[:12] + data[16:] + data[12:16]), (LISTS,)),
    quiet("the architecture is another", "architecture is another|missing|differ", entry(
        "general.architecture", lambda data: struct.pack("<Q", 5) + b"qwen2")),
    quiet("the file is the dense model's", "differ", lambda made: shutil.copyfile(made.dense, made.path)),
]  # fmt: skip
