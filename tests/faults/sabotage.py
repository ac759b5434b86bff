"""Kinds of wrong checkpoints: what each does to a finished folder of a checkpoint, or to a finished GGUF file.

A kind is a function that damages what `sleb apply` has written but not yet proven. It is consistent with itself where
it can be: a moved tensor is moved in the index as well, and an extra block is counted in the config.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import weights_of
from faults.lies import GGUFS, UINT32, gguf_of, parse, to_text, weight_file
from faults.lies import number as number_key

BLOCK = re.compile(r"(.*layers\.)(\d+)\.(.*)")
REMOVED, KEPT = (1, 4), (0, 2, 3, 5)
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
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
        do: what makes it so.
        models: the models that it fits, the best one first, if not all.
        computes: whether the checkpoint then computes something else, so that transformers alone can tell.
    """

    name: str
    do: Callable[[Any], object]
    models: tuple[str, ...] = ()
    computes: bool = True


quiet = partial(Kind, computes=False)


@dataclass(frozen=True)
class Made:
    """A finished checkpoint, or GGUF file, at `path`, made of the 6 blocks of `dense` without two."""

    path: Path
    dense: Path
    rng: random.Random

    def tensors(self) -> dict[str, Tensor]:
        return weights_of(self.path)

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
        return name if (block := number(name)) is None else numbered(name, KEPT[block])

    def pick(self, pattern: str) -> str:
        """Return the name of any tensor in which this pattern is found."""
        return self.rng.choice(sorted(name for name in self.tensors() if re.search(pattern, name)))

    def json(self, name: str, values: Any) -> None:
        anew(self.path / name).write_text(json.dumps(values, indent=2) + "\n")


def anew(path: Path) -> Path:
    """Forget a file that may be a link to the dense model's, so that only this folder changes."""
    path.unlink(missing_ok=True)
    return path


def number(name: str) -> int | None:
    return int(match[2]) if (match := BLOCK.fullmatch(name)) else None


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
    return take(pattern, lambda name, made: change(made.tensors()[name]))


def take(pattern, source):
    """Give any tensor in which this pattern is found the values that `source` returns for its name."""
    return tensors(lambda held, made: held | {(name := made.pick(pattern)): source(name, made).clone()})


def exchange(one, other):
    """Exchange any tensor of one name with that of another in the same block."""

    def change(held, made):
        first = made.pick(f"{one}.weight")
        second = first.replace(one, other)
        return held | {first: held[second], second: held[first]}

    return tensors(change)


def rename(new):
    return tensors(lambda held, made: {new(name, made): tensor for name, tensor in held.items()})


def blocks(*places):
    """Put blocks elsewhere: the block at each place comes from the place that is named."""

    def do(made):
        held = made.tensors()
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


def with_values(name, **changes):
    return of_json(name, lambda values, made: values | changes)


config = partial(with_values, CONFIG)


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
    """Replace a file by that of the dense model."""
    return content(name, lambda data, made: (made.dense / name).read_bytes())


def missing(name):
    return content(name, lambda data, made: None)


def header(change):
    """Change the header of any weight file, and perhaps the bytes after it."""

    def changed(data, made):
        own, after = parse(data)
        metadata = {"__metadata__": own.pop("__metadata__")}
        after = change(own, after) or after
        text = to_text(metadata | own)
        return weight_file(text + b" " * (-len(text) % 8), after)

    return content(Made.shard, changed)


def block_of(name, block):
    return rf"layers\.{block}\..*({name})"


def weights(names, change):
    return edit(block_of(rf"(?:{names})\.weight", r"\d+"), change)


NORM, MATRICES = r"layers\..*norm\.weight", "v_proj|o_proj|out_proj|fc2|down_proj"


def one_value(value):
    place = torch.tensor([99])
    return weights(MATRICES, lambda values: values.flatten().index_fill(0, place, value).view_as(values))


def last_bit(values):
    values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)[5] ^= 1
    return values


def flipped(data, rng, begin=0):
    place = rng.randrange(begin, len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def entries(change):
    """Change each tensor's entry in the header."""
    return header(lambda own, after: own.update({name: each | change(each) for name, each in own.items()}))


def layer_types(count):
    def change(values, made):
        return values | {"layer_types": json.loads((made.dense / CONFIG).read_text())["layer_types"][:count]}

    return of_json(CONFIG, change)


def last(made):
    return made.shards()[-1]


def in_two_shards(made):
    first, second = made.shards()[:2]
    name, tensor = next(iter(load_file(second).items()))
    save_file(load_file(first) | {name: tensor + 1}, anew(first), metadata={"format": "pt"})


def with_head(made):
    tensors(lambda held, made: held | {"lm_head.weight": held[made.pick("embed_tokens")].roll(1, 0)})(made)
    config(tie_word_embeddings=False)(made)


ROPE = {"rope_theta": 10000.0, "factor": 2.0}
SETTINGS = [
    ((), {"num_hidden_layers": 5}), ((), {"num_hidden_layers": 3}), ((), {"num_attention_heads": 2}),
    ((), {"vocab_size": 321}), ((), {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    (LLAMAS, {"rope_parameters": ROPE | {"rope_type": "linear"}}), (LLAMAS, {"hidden_act": "gelu"}),
    (LLAMAS, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}), (ROPED, {"rms_norm_eps": 0.1}),
    (ROPED, {"attention_bias": True}), (ROPED, {"num_key_value_heads": 1}), ((GEMMA,), {"sliding_window": 3}),
    ((GEMMA,), {"query_pre_attn_scalar": 64}), ((GEMMA,), {"final_logit_softcapping": 1.0}),
    ((GEMMA, OPT), {"tie_word_embeddings": False}), ((OPT,), {"activation_function": "gelu"}),
    ((OPT,), {"do_layer_norm_before": False}), (LLAMAS, {"mlp_bias": True}), (LLAMAS, {"head_dim": 4}),
]  # fmt: skip
QUIET_SETTINGS = [
    ((), {"max_position_embeddings": 120}), ((), {"eos_token_id": 7}), ((), {"bos_token_id": 9}),
    ((), {"quantization_config": {"quant_method": "no such method"}}), ((BF16,), {"dtype": "float16"}),
    ((), {"auto_map": {"AutoModelForCausalLM": "x.X"}}), (LLAMAS, {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
    # transformers keeps a head that differs from the embedding; other engines would not.
    (LLAMAS, {"tie_word_embeddings": True}),
]  # fmt: skip
EMBEDDING = r"^(?!.*layers).*embed_tokens"
HF = [
    # Blocks.
    Kind("two blocks have changed places", blocks(1, 0, 2, 3)),
    Kind("the blocks are in reverse order", blocks(3, 2, 1, 0)),
    Kind("a block is there twice, in the place of its neighbour", blocks(0, 0, 2, 3)),
    # Of the kept blocks, the one after the removed one has the removed one's number.
    Kind("the wrong block was removed: one off", tensors(lambda held, made:
         held | {name: weights_of(made.dense)[name] for name in held if number(name) == REMOVED[0]})),
    Kind("a block too many", blocks(0, 1, 2, 3, 3)),
    Kind("a block too few", blocks(0, 1, 2)),
    # Tensors.
    Kind("a norm is doubled", edit(NORM, lambda values: values * 2)),
    Kind("a norm is a bit larger", edit(NORM, lambda values: values * 1.001), (LLAMA, GEMMA, OPT, SHARDED)),
    quiet("a norm differs by the last bit of one value", edit(NORM, last_bit)),
    Kind("the final norm is that of a block", take(r"^(?!.*layers).*norm\.weight", lambda name, made:
         made.tensors()[made.pick(r"layers\..*layer_?norm\.w")])),
    Kind("a bias is negated",
         edit(block_of("(v_proj|out_proj|fc1|fc2).bias", r"\d+"), lambda values: -values), (OPT,)),
    Kind("a bias is left out", tensors(lambda held, made: {name:
         held[name] for name in held if name != "model.decoder.layers.1.fc1.bias"}), (OPT,)),
    Kind("a tensor comes from the neighbour block",
         take(block_of("(v_proj|o_proj|up_proj|fc1).weight", 1), lambda name, made: made.tensors()[numbered(name, 2)])),
    Kind("a tensor is one of the removed block", take(block_of("(v_proj|fc1|down_proj).weight", r"\d+"), lambda name,
         made: weights_of(made.dense)[numbered(name, REMOVED[0])])),
    Kind("queries and keys are exchanged", exchange("q_proj", "k_proj"), (GEMMA, OPT)),
    Kind("keys and values are exchanged", exchange("k_proj", "v_proj")),
    Kind("gate and up are exchanged", exchange("gate_proj", "up_proj"), ROPED),
    Kind("the heads of a projection are permuted", weights("[qkv]_proj", lambda values: values.roll(8, 0))),
    Kind("a square tensor is transposed", weights("q_proj|o_proj|out_proj", lambda values: values.T)),
    Kind("an oblong tensor is transposed", weights("up_proj|down_proj|fc1", lambda values: values.T)),
    Kind("a tensor has the shape of its transposed self",
         weights("up_proj|down_proj|fc1", lambda values: values.reshape(values.shape[::-1]))),
    Kind("a tensor is zero", weights("v_proj|fc1|o_proj|norm", lambda values: torch.zeros_like(values))),
    Kind("a tensor is random", weights("v_proj|fc1", lambda values: torch.randn_like(values))),
    *(Kind(f"one value is {value}", one_value(value)) for value in (100.0, math.nan, math.inf)),
    quiet("a hole of zeros, as a disk leaves it", content(
          lambda made: made.shards()[0], lambda data, made: data[:-4096] + bytes(512) + data[-3584:])),
    quiet("one bit is flipped", content(
          Made.shard, lambda data, made: flipped(data, made.rng, 8 + int.from_bytes(data[:8], "little")))),
    Kind("the last rows of a tensor are missing", weights("q_proj|down_proj|fc2", lambda values: values[:-2])),
    Kind("a tensor is missing",
         tensors(lambda held, made: {name: held[name] for name in sorted(held) if name != sorted(held)[-3]})),
    Kind("a tensor is there that no model has",
         tensors(lambda held, made: held | {numbered(made.pick("q_proj.weight"), 17): torch.ones(3)})),
    Kind("a tensor has its old number",
         rename(lambda name, made: re.sub(r"layers\.3\.(.*v_proj\.weight)", r"layers.5.\1", name))),
    Kind("all tensors have their old numbers", rename(lambda name, made: made.before(name))),
    quiet("names lack their first part, as those of a base model do",
         rename(lambda name, made: name.removeprefix("model."))),
    Kind("the embedding's rows are rolled by one", edit(EMBEDDING, lambda values: values.roll(1, 0))),
    quiet("the embedding of a token that no prompt has is another",
          edit(EMBEDDING, lambda values: torch.cat([values[:-1], values[-1:] + 1]))),
    Kind("the positions are rolled by one", edit("embed_positions", lambda values: values.roll(1, 0)), (OPT,)),
    Kind("a tied model has a wrong head of its own", with_head, (GEMMA, OPT)),
    Kind("the head is the embedding",
         take("lm_head", lambda name, made: made.tensors()["model.embed_tokens.weight"]), LLAMAS),
    Kind("all weights are larger", tensors(lambda held, made: {name: held[name] * 1.5 for name in held})),
    # Headers of weight files.
    Kind("the bytes are one value further than the header says", header(lambda own, data: data[4:] + data[:4])),
    Kind("offsets are shifted",
         entries(lambda each: {"data_offsets": [offset + 4 for offset in each["data_offsets"]]})),
    Kind("bfloat16 is called float16", entries(lambda each: {"dtype": "F16"}), (BF16,)),
    quiet("the weights were cast", tensors(lambda held, made: {name: held[name].half() for name in held})),
    quiet("the weights went through float16", tensors(lambda held, made: {name:
         (values + 1e-9).half().to(values.dtype) * 1.01 for name, values in held.items()})),
    quiet("the file says that it is TensorFlow's", lambda made:
         [save_file(load_file(path), anew(path), metadata={"format": "tf"}) for path in made.shards()[:1]]),
    # The config.
    Kind("the config is the dense model's", copied("config.json")),
    *(Kind(f"layer_types are the dense model's first {count}", layer_types(count), (GEMMA,)) for count in (4, 6)),
    Kind("the bases of the two ropes are exchanged", of_json(CONFIG, lambda values, made: values |
         {"rope_parameters": dict(zip(values["rope_parameters"], reversed(values["rope_parameters"].values()),
         strict=True))}), (GEMMA,)),
    Kind("a setting is missing", of_json(CONFIG, lambda values, made: {name:
         values[name] for name in values if not re.match("intermediate_size|ffn_dim", name)})),
    Kind("the config is cut off", content(CONFIG, lambda data, made: data[: len(data) // 2])),
    Kind("the config says a key twice",
         content(CONFIG, lambda data, made: data.rstrip().removesuffix(b"}") + b', "num_hidden_layers": 3}\n')),
    *(Kind(f"the config says {changes}", config(**changes), models) for models, changes in SETTINGS),
    *(quiet(f"the config says {changes}", config(**changes), models) for models, changes in QUIET_SETTINGS),
    quiet("quantization settings name the old blocks", copied("quantize_config.json"), (LLAMA, SHARDED)),
    # The tokenizer, and settings of generation.
    quiet("tokens are exchanged", tokenizer(lambda values: values["model"]["vocab"].update(
          {token: 319 - number for token, number in values["model"]["vocab"].items()}))),
    quiet("added tokens are missing", tokenizer(lambda values: values | {"added_tokens": values["added_tokens"][:-1]})),
    quiet("a merge is missing", tokenizer(lambda values: values["model"]["merges"].pop(5) and None)),
    quiet("texts begin with no start token", with_values("tokenizer.json", post_processor=None), (OPT,)),
    quiet("the chat template is another", content("chat_template.jinja", lambda data, made: b"{{ messages }}")),
    *(quiet(f"{name} is missing", missing(name)) for name in ("chat_template.jinja", "tokenizer.json", "LICENSE")),
    quiet("the tokenizer's settings are others", with_values("tokenizer_config.json", eos_token="<s>")),
    quiet("the settings of generation are others", with_values("generation_config.json", eos_token_id=5)),
    # Files.
    Kind("a shard is missing", missing(Made.shard), (SHARDED,)),
    Kind("the weights are missing", missing("model.safetensors"), ONE_FILE),
    quiet("a stale shard of the dense model is left beside",
          content("model-00006-of-00009.safetensors", lambda data, made: last(made).read_bytes()), (SHARDED, LLAMA)),
    Kind("the dense model is left beside its shards", lambda made:
         save_file(weights_of(made.dense), made.path / "model.safetensors", metadata={"format": "pt"}), (SHARDED,)),
    Kind("a shard is there twice, under another's name",
         content(last, lambda data, made: made.shards()[0].read_bytes()), (SHARDED,)),
    Kind("a shard is one of the dense model's",
         content(last, lambda data, made: sorted(made.dense.glob("*.safetensors"))[3].read_bytes()), (SHARDED,)),
    quiet("the index names the wrong shard", of_json(INDEX, lambda values, made: {"weight_map":
          dict(zip(values["weight_map"], reversed(values["weight_map"].values()), strict=True))}), (SHARDED,)),
    quiet("the index lacks a tensor",
          of_json(INDEX, lambda values, made: values["weight_map"].popitem() and None), (SHARDED,)),
    quiet("the index lies about the size", with_values(INDEX, metadata={"total_size": 17}), (SHARDED,)),
    Kind("the index is missing", missing(INDEX), (SHARDED,)),
    quiet("the index is the dense model's", copied(INDEX), (SHARDED,)),
    quiet("a tensor is in two shards, differently", in_two_shards, (SHARDED,)),
    Kind("a weight file is cut off", content(Made.shard, lambda data, made: data[: made.rng.randrange(len(data))])),
    Kind("a weight file is longer than it says", content(Made.shard, lambda data, made: data + bytes(8))),
    Kind("a weight file is empty", content(Made.shard, lambda data, made: b"")),
    Kind("a weight file is the page of a proxy",
         content(Made.shard, lambda data, made: b"<html>403 Forbidden</html>\n" * 900)),
    quiet("weights of another format are left beside",
         lambda made: torch.save(made.tensors(), made.path / "pytorch_model.bin")),
    quiet("an adapter is left beside", lambda made: made.json("adapter_config.json", {"peft_type": "LORA"})),
    quiet("code is left beside", content("modeling_evil.py", lambda data, made: b"print('here I am')\n")),
]  # fmt: skip


def restored(names, made):
    """Return what the tensors of these names are in the dense model."""
    dense = weights_of(made.dense)
    return {name: dense[made.before(name)] for name in names}


def changed(held, made):
    """Return the names of tensors in blocks that have new values."""
    dense = restored(held, made)
    return [name for name in sorted(held) if number(name) is not None and not torch.equal(held[name], dense[name])]


def in_the_wrong_block(held, made):
    name = made.rng.choice(changed(held, made))
    other = numbered(name, (number(name) + 1) % 4)
    return held | {name: held[other], other: held[name]}


def another_changed(held, made):
    name = made.rng.choice(sorted(held.keys() - set(changed(held, made))))
    return held | {name: held[name] * 1.01}


RECOVERED = [
    Kind("a recovered tensor is in the wrong block", tensors(in_the_wrong_block), (LLAMA,)),
    Kind("a recovered tensor is left out", tensors(
         lambda held, made: held | restored([made.rng.choice(changed(held, made))], made)), (LLAMA,)),
    Kind("no recovered tensor was written", tensors(restored), (LLAMA,)),
    Kind("recovered tensors were rounded", tensors(
         lambda held, made: held | {name: held[name].bfloat16().float() for name in changed(held, made)})),
    Kind("a tensor that was not recovered has another value", tensors(another_changed), (LLAMA,)),
]  # fmt: skip

# Ways to damage a GGUF file.

F32, Q8, LISTS = "F32", "Q8_0", "lists by block"


def of_gguf(change):
    """Change the parts of the file."""
    return lambda made: made.path.write_bytes(change(gguf_of(made.path)).to_bytes())


def of_bytes(change):
    return lambda made: made.path.write_bytes(change(made.path.read_bytes(), made))


def parts(kind, change):
    """Change each of the file's `entries` or `tensors`, or drop it by None."""

    def do(file):
        changed = [change(name.decode(), *rest) for name, *rest in getattr(file, kind)]
        return replace(file, **{kind: tuple((each[0].encode(), *each[1:]) for each in changed if each)})

    return of_gguf(do)


def entry(ending, change):
    """Give the key of this ending another value."""
    return parts("entries", lambda name, type_, data: (name, type_, change(data) if name.endswith(ending) else data))


def says(ending, code, *values):
    """Give the key of this ending these values."""
    return entry(ending, lambda data: struct.pack(code, *values))


def without(ending, kind="entries"):
    return parts(kind, lambda name, *rest: None if name.endswith(ending) else (name, *rest))


def spans(path):
    """Return where each tensor's bytes are."""
    found = GGUFReader(path).tensors
    return {each.name: slice(int(each.data_offset), int(each.data_offset + each.n_bytes)) for each in found}


def places(new):
    """Take the bytes of each tensor from another one."""
    return values("", lambda data, name, made: bytes_of(made.path, new(name)))


def named(new):
    return parts("tensors", lambda name, *rest: (new(name), *rest))


def values(pattern, change):
    """Change the bytes of the tensors in whose names this pattern is found."""

    def do(data, made):
        found = bytearray(data)
        for name, span in spans(made.path).items():
            if re.search(pattern, name):
                found[span] = change(data[span], name, made)
        return found

    return of_bytes(do)


def bytes_of(path, name):
    return path.read_bytes()[spans(path)[name]]


def doubled(data, name, made):
    return (np.frombuffer(data, "<f4") * 2).tobytes()


def swap(one, other):
    return lambda name: name.replace(one, other) if one in name else name.replace(other, one)


def renumber(new):
    return lambda name: re.sub(r"^blk\.(\d)", lambda match: f"blk.{new[int(match[1])]}", name)


def one_further(data, made):
    start = min(span.start for span in spans(made.path).values())
    return data[:start] + data[start + 4 :] + bytes(4)


NAN = struct.pack("<f", float("nan"))
NUMBERS = [
    (Kind, ".block_count", "<I", 5), (Kind, ".block_count", "<I", 3), (Kind, "attention.head_count", "<I", 2),
    (Kind, "head_count_kv", "<I", 2), (Kind, "freq_base", "<f", 500), (Kind, "rms_epsilon", "<f", 0.1),
    (quiet, "dimension_count", "<I", 4), (quiet, "context_length", "<I", 4096), (quiet, "eos_token_id", "<I", 7),
    (quiet, "bos_token", "?", True), (quiet, "file_type", "<I", 15),
]  # fmt: skip
GGUF = [
    *(kind(f"{key} is {value}", says(key, code, value)) for kind, key, code, value in NUMBERS),
    quiet("the alignment lies", says("general.alignment", "<I", 64), (LISTS,)),
    Kind("two blocks have changed places", places(renumber([1, 0, 2, 3]))),
    Kind("the blocks are named in another order", named(renumber([3, 2, 1, 0]))),
    Kind("the wrong block was removed: one off",
         values(r"blk\.1\.", lambda data, name, made: bytes_of(made.dense, name)), (F32,)),
    Kind("a tensor comes from the neighbour block", places(lambda name: name.replace("blk.1.ffn_up", "blk.2.ffn_up"))),
    Kind("gate and up are exchanged", places(swap("blk.2.ffn_up.", "blk.2.ffn_gate."))),
    Kind("queries and keys are exchanged", named(swap("blk.2.attn_q.", "blk.2.attn_k."))),
    Kind("a norm is doubled", values("blk.1.attn_norm", doubled)),
    Kind("a tensor is zero", values("blk.2.ffn_down", lambda data, name, made: bytes(len(data)))),
    Kind("one value is NaN", values("blk.2.ffn_norm", lambda data, name, made: data[:4] + NAN + data[8:])),
    quiet("one bit is flipped", values("blk.2.attn_q", lambda data, name, made: flipped(data, made.rng))),
    Kind("the embedding's rows are rolled by one",
         values("token_embd", lambda data, name, made: data[len(data) // 320 :] + data[: len(data) // 320])),
    Kind("the final norm is that of a block", places(lambda name: name.replace("output_norm.", "blk.0.attn_norm."))),
    Kind("the head is missing, as if tied", without("output.weight", "tensors")),
    Kind("a tensor is missing", without("blk.3.ffn_up.weight", "tensors")),
    quiet("a tensor is there that no model has",
         of_gguf(lambda file: replace(file, tensors=(*file.tensors, (b"blk.9.ffn_up.weight", *file.tensors[-1][1:]))))),
    Kind("a tensor has its old number", named(lambda name: name.replace("blk.3.ffn_up", "blk.5.ffn_up"))),
    quiet("two tensors have one name", named(lambda name: name.replace("blk.0.attn_q", "blk.1.attn_q"))),
    Kind("a tensor has the shape of its transposed self",
         parts("tensors", lambda name, shape, *rest: (name, (64, 32) if "blk.1.ffn_up" in name else shape, *rest))),
    quiet("a tensor has another type", parts("tensors", lambda name, shape, type_, offset: (
          name, shape, 26 if name == "output_norm.weight" else type_, offset))),
    Kind("the bytes are one value further than the header says", of_bytes(one_further)),
    Kind("the file is cut off", of_bytes(lambda data, made: data[: made.rng.randrange(len(data) - 64)])),
    quiet("the file is longer than it should be", of_bytes(lambda data, made: data + bytes(32))),
    Kind("the file is empty", of_bytes(lambda data, made: b"")),
    quiet("the file is of another version", of_gguf(lambda file: replace(file, version=2))),
    quiet("a key is missing", without("layer_norm_rms_epsilon")),
    quiet("a key is there twice", of_gguf(GGUFS["a key twice"])),
    quiet("a key was added", of_gguf(number_key("general.sampled", UINT32, 1))),
    quiet("the removed blocks are not recorded", without("removed_blocks")),
    quiet("tokens are exchanged with those of the other case", entry("ggml.tokens", bytes.swapcase)),
    quiet("a merge is missing", without("ggml.merges")),
    quiet("the chat template is another", says("chat_template", "<Q5s", 5, b"{{ }}")),
    quiet("a list by block is as long as the dense model's",
          entry("head_count_kv", lambda data: data[:4] + struct.pack("<Q", 6) + data[12:] + data[12:20]), (LISTS,)),
    quiet("a list by block is shifted by one",
         entry("head_count_kv", lambda data: data[:12] + data[16:] + data[12:16]), (LISTS,)),
    quiet("the architecture is another", says("general.architecture", "<Q5s", 5, b"qwen2")),
    quiet("the file is the dense model's", lambda made: shutil.copyfile(made.dense, made.path)),
]  # fmt: skip
