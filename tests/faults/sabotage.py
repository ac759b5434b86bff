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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleb_cli.engine.gguf.file import Entry, GgufFile, read_gguf, write_gguf

BLOCK = re.compile(r"(.*layers\.)(\d+)\.(.*)")

LLAMA, GEMMA, OPT, BF16, SHARDED = "llama", "gemma3", "opt", "llama in bfloat16", "llama in shards"
EVERY = (LLAMA, GEMMA, OPT, BF16, SHARDED)
ROPED = (LLAMA, GEMMA, BF16, SHARDED)
LLAMAS = (LLAMA, BF16, SHARDED)


@dataclass(frozen=True)
class Kind:
    """A kind of wrong checkpoint.

    Attributes:
        name: what is wrong.
        do: what makes it so.
        models: the models that it fits, the best one first.
        says: what the refusal names.
        computes: whether the checkpoint then computes something else, so that transformers alone can tell.
    """

    name: str
    do: Callable[[Any], None]
    models: tuple[str, ...]
    says: str
    computes: bool


HF: list[Kind] = []
RECOVERED: list[Kind] = []
GGUF: list[Kind] = []


def hf(name: str, says: str, *models: str, computes: bool = False) -> Callable[[Callable[[Made], None]], None]:
    """Register a kind for checkpoints."""
    return lambda do: HF.append(Kind(name, do, models or EVERY, says, computes))


def recovered(name: str, says: str) -> Callable[[Callable[[Made], None]], None]:
    """Register a kind for recovered checkpoints."""
    return lambda do: RECOVERED.append(Kind(name, do, (LLAMA,), says, computes=True))


def in_gguf(name: str, says: str, *models: str, computes: bool = False) -> Callable[[Callable[[MadeGguf], None]], None]:
    """Register a kind for GGUF files."""
    return lambda do: GGUF.append(Kind(name, do, models or (F32, Q8), says, computes))


@dataclass(frozen=True)
class Made:
    """A finished checkpoint in `folder`, made from `dense` without the blocks `removed`; `other` is another model."""

    folder: Path
    dense: Path
    other: Path
    removed: tuple[int, ...]
    rng: random.Random = field(default_factory=random.Random)

    def tensors(self) -> dict[str, Tensor]:
        return of_folder(self.folder)

    def of_dense(self) -> dict[str, Tensor]:
        return of_folder(self.dense)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors in place of the present ones: each to its file, new ones to the last."""
        files = sorted(self.folder.glob("*.safetensors"))
        place = {name: file for file in files for name in load_file(file)}
        held: dict[Path, dict[str, Tensor]] = {file: {} for file in files}
        for name, tensor in tensors.items():
            held[place.get(name, files[-1])][name] = tensor.contiguous()
        for file, own in held.items():
            anew(file)
            save_file(own, file, metadata={"format": "pt"})
        if len(files) > 1:
            weight_map = {name: file.name for file, own in held.items() for name in own}
            total = sum(tensor.nbytes for tensor in tensors.values())
            self.json(
                "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )

    def edit(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        tensors = self.tensors()
        tensors[name] = change(tensors[name].clone())
        self.write(tensors)

    def rename(self, new_name: Callable[[str], str]) -> None:
        self.write({new_name(name): tensor for name, tensor in self.tensors().items()})

    def blocks(self, order: Callable[[list[int]], list[int]]) -> None:
        """Put blocks elsewhere: the block at each place comes from the place that `order` names."""
        tensors = self.tensors()
        count = len({int(match[2]) for name in tensors if (match := BLOCK.fullmatch(name))})
        order_ = order(list(range(count)))
        moved = {name: tensor for name, tensor in tensors.items() if not BLOCK.fullmatch(name)}
        for new, old in enumerate(order_):
            moved |= {numbered(name, new): tensor.clone() for name, tensor in tensors.items() if number(name) == old}
        self.write(moved)
        if len(order_) != count:
            self.config(num_hidden_layers=len(order_))
            kinds = self.settings("config.json").get("layer_types")
            if kinds:
                self.config(layer_types=[kinds[old] for old in order_])

    def a(self, *parts: str, block: int | None = None) -> str:
        """Return the name of a tensor of any block, or of this one, that one of `parts` occurs in."""
        names = [name for name in sorted(self.tensors()) if any(part in name for part in parts)]
        names = [name for name in names if number(name) is not None and block in (None, number(name))]
        return self.rng.choice(names)

    def outside(self, *parts: str) -> str:
        """Return the name of the tensor outside the blocks that one of `parts` occurs in."""
        return next(n for n in self.tensors() if number(n) is None and any(part in n for part in parts))

    def settings(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def json(self, name: str, values: Any) -> None:
        anew(self.folder / name).write_text(json.dumps(values, indent=2) + "\n")

    def config(self, **changes: Any) -> None:
        self.json("config.json", self.settings("config.json") | changes)

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def raw(self, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> None:
        """Change the header and the bytes of the weight file with the most tensors."""
        path = max(self.shards(), key=lambda shard: len(load_file(shard)))
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header, data = change(json.loads(content[8:end]), content[end:])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        anew(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


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


# Blocks.


@hf("two blocks have changed places", r"bytes of \S*layers\.", computes=True)
def _(made):
    made.blocks(lambda order: [order[1], order[0], *order[2:]])


@hf("the blocks are in reverse order", r"bytes of \S*layers\.", computes=True)
def _(made):
    made.blocks(lambda order: order[::-1])


@hf("a block is there twice, in the place of its neighbour", r"bytes of \S*layers\.", computes=True)
def _(made):
    made.blocks(lambda order: [order[0], order[0], *order[2:]])


@hf("the wrong block was removed: one off", r"bytes of \S*layers\.", computes=True)
def _(made):
    wrong, tensors = made.removed[0], made.tensors()
    dense = made.of_dense()
    # Of the kept blocks, the one after the removed one has the removed one's number.
    tensors |= {name: dense[name] for name in tensors if number(name) == wrong}
    made.write(tensors)


@hf("a block too many", r"config\.json is not what was written|unexpected", computes=True)
def _(made):
    made.blocks(lambda order: [*order, order[-1]])


@hf("a block too few", r"config\.json is not what was written|missing", computes=True)
def _(made):
    made.blocks(lambda order: order[:-1])


# Tensors.


@hf("a norm is doubled", r"bytes of \S*norm", computes=True)
def _(made):
    made.edit(made.a("norm.weight"), lambda values: values * 2)


@hf("a norm is larger by one part in 1000", r"bytes of \S*norm", LLAMA, GEMMA, OPT, SHARDED, computes=True)
def _(made):
    made.edit(made.a("norm.weight"), lambda values: values * 1.001)


@hf("a norm differs by the last bit of one value", r"bytes of \S*norm")
def _(made):
    def last_bit(values):
        bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
        bits[made.rng.randrange(len(values))] ^= 1
        return values

    made.edit(made.a("norm.weight"), last_bit)


@hf("the final norm is that of a block", r"bytes of \S*norm", computes=True)
def _(made):
    tensors = made.tensors()
    tensors[made.outside("norm.weight")] = tensors[made.a("layernorm.weight", "layer_norm.weight")].clone()
    made.write(tensors)


@hf("a bias is negated", r"bytes of \S*bias", OPT, computes=True)
def _(made):
    made.edit(made.a("v_proj.bias", "out_proj.bias", "fc1.bias", "fc2.bias"), lambda values: -values)


@hf("a bias is left out", r"missing, such as \S*bias", OPT, computes=True)
def _(made):
    name = made.a("fc1.bias")
    made.write({other: tensor for other, tensor in made.tensors().items() if other != name})


@hf("a tensor comes from the neighbour block", r"bytes of \S*layers\.", computes=True)
def _(made):
    tensors, name = made.tensors(), made.a("v_proj.weight", "o_proj.weight", "up_proj.weight", "fc1.weight", block=1)
    tensors[name] = tensors[numbered(name, 2)].clone()
    made.write(tensors)


@hf("a tensor is one of the removed block", r"bytes of \S*layers\.", computes=True)
def _(made):
    name, dense = made.a("v_proj.weight", "fc1.weight", "down_proj.weight"), made.of_dense()
    made.edit(name, lambda values: dense[numbered(name, made.removed[0])])


def exchange(one: str, other: str) -> Callable[[Made], None]:
    def do(made):
        tensors, name = made.tensors(), made.a(one)
        second = name.replace(one, other)
        tensors[name], tensors[second] = tensors[second], tensors[name]
        made.write(tensors)

    return do


hf("queries and keys are exchanged", r"bytes of \S*[qk]_proj", GEMMA, OPT, computes=True)(
    exchange("q_proj.weight", "k_proj.weight")
)
hf("keys and values are exchanged", r"bytes of \S*[kv]_proj", computes=True)(exchange("k_proj.weight", "v_proj.weight"))
hf("gate and up are exchanged", r"bytes of \S*(gate|up)_proj", *ROPED, computes=True)(
    exchange("gate_proj.weight", "up_proj.weight")
)


@hf("the heads of a projection are permuted", r"bytes of \S*[qkv]_proj", computes=True)
def _(made):
    made.edit(made.a("q_proj.weight", "k_proj.weight", "v_proj.weight"), lambda values: values.roll(8, 0))


@hf("a square tensor is transposed", r"bytes of \S*(q|o|out)_proj", computes=True)
def _(made):
    made.edit(made.a("q_proj.weight", "o_proj.weight", "out_proj.weight"), lambda values: values.T.contiguous())


@hf("an oblong tensor is transposed", "another type or shape", computes=True)
def _(made):
    made.edit(made.a("up_proj.weight", "down_proj.weight", "fc1.weight"), lambda values: values.T.contiguous())


@hf("a tensor has the shape of its transposed self", "another type or shape", computes=True)
def _(made):
    name = made.a("up_proj.weight", "down_proj.weight", "fc1.weight")
    made.edit(name, lambda values: values.reshape(values.shape[::-1]))


@hf("a tensor is zero", r"bytes of \S*layers\.", computes=True)
def _(made):
    made.edit(made.a("v_proj.weight", "fc1.weight", "o_proj.weight", "norm.weight"), torch.zeros_like)


@hf("a tensor is random", r"bytes of \S*layers\.", computes=True)
def _(made):
    torch.manual_seed(made.rng.randrange(1000))
    made.edit(made.a("v_proj.weight", "fc1.weight"), torch.randn_like)


def one_element(value: float) -> Callable[[Made], None]:
    def do(made):
        def change(values):
            values.view(-1)[made.rng.randrange(values.numel())] = value
            return values

        made.edit(made.a("v_proj.weight", "o_proj.weight", "out_proj.weight", "fc2.weight", "down_proj.weight"), change)

    return do


hf("one value is 100", r"bytes of \S*layers\.", computes=True)(one_element(100.0))
hf("one value is NaN", r"bytes of \S*layers\.", computes=True)(one_element(float("nan")))
hf("one value is infinite", r"bytes of \S*layers\.", computes=True)(one_element(float("inf")))


@hf("a hole of zeros, as a disk leaves it", r"bytes of ")
def _(made):
    path = made.shards()[0]
    content = bytearray(path.read_bytes())
    start = made.rng.randrange(len(content) // 2, len(content) - 512)
    content[start : start + 512] = bytes(512)
    anew(path).write_bytes(content)


@hf("one bit is flipped", r"bytes of |another type or shape|missing|truncated")
def _(made):
    path = made.shards()[-1]
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[made.rng.randrange(begin, len(content))] ^= 1 << made.rng.randrange(8)
    anew(path).write_bytes(content)


@hf("the last rows of a tensor are missing", "another type or shape", computes=True)
def _(made):
    made.edit(made.a("q_proj.weight", "down_proj.weight", "fc2.weight"), lambda values: values[:-2].clone())


@hf("a tensor is missing", "1 tensors are missing", computes=True)
def _(made):
    name = made.a("weight")
    made.write({other: tensor for other, tensor in made.tensors().items() if other != name})


@hf("a tensor is there that no model has", "1 tensors are unexpected", computes=True)
def _(made):
    name = made.a("q_proj.weight")
    made.write(made.tensors() | {numbered(name, 17): torch.ones(3)})


@hf("a tensor has its old number", "1 tensors are missing", computes=True)
def _(made):
    name = made.a("v_proj.weight", "fc1.weight", block=3)
    made.rename(lambda other: numbered(name, 5) if other == name else other)


@hf("all tensors have their old numbers", "tensors are missing", computes=True)
def _(made):
    count = len({number(name) for name in made.of_dense()} - {None})
    old = [block for block in range(count) if block not in made.removed]
    made.rename(lambda name: name if number(name) is None else numbered(name, old[number(name)]))


@hf("names lack their first part, as those of a base model do", "tensors are missing")
def _(made):
    made.rename(lambda name: name.removeprefix("model."))


@hf("the embedding's rows are rolled by one", r"bytes of \S*embed", computes=True)
def _(made):
    made.edit(made.outside("embed_tokens"), lambda values: values.roll(1, 0))


@hf("the embedding of a token that no prompt has is another", r"bytes of \S*embed")
def _(made):
    def change(values):
        values[-1] += 1
        return values

    made.edit(made.outside("embed_tokens"), change)


@hf("the positions are rolled by one", r"bytes of \S*embed_positions", OPT, computes=True)
def _(made):
    made.edit(made.outside("embed_positions"), lambda values: values.roll(1, 0))


@hf("a tied model has a wrong head of its own", "config|unexpected, such as lm_head", GEMMA, OPT, computes=True)
def _(made):
    tensors = made.tensors()
    tensors["lm_head.weight"] = tensors[made.outside("embed_tokens")].roll(1, 0)
    made.write(tensors)
    made.config(tie_word_embeddings=False)


@hf("a tied model is said to be untied", "tie_word_embeddings: False, not True", GEMMA, OPT, computes=True)
def _(made):
    made.config(tie_word_embeddings=False)


# transformers keeps a head that differs from the embedding; other engines would not.
@hf("an untied model is said to be tied", "tie_word_embeddings: True, not False", *LLAMAS)
def _(made):
    made.config(tie_word_embeddings=True)


@hf("the head is the embedding", r"bytes of lm_head", *LLAMAS, computes=True)
def _(made):
    tensors = made.tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    made.write(tensors)


@hf("all weights are those of another training", "bytes of ", LLAMA, computes=True)
def _(made):
    made.write({name: of_folder(made.other)[name] for name in made.tensors()})


# Headers of weight files.


@hf("two tensors' bytes are exchanged in the header", r"bytes of ", computes=True)
def _(made):
    def change(header, data):
        same = [n for n in header if n.endswith(("q_proj.weight", "o_proj.weight", "v_proj.weight", "fc1.weight"))]
        for first in same:
            for second in same:
                if first < second and header[first]["shape"] == header[second]["shape"]:
                    offsets = header[first]["data_offsets"], header[second]["data_offsets"]
                    header[second]["data_offsets"], header[first]["data_offsets"] = offsets
                    return header, data
        raise AssertionError("no two tensors of one shape")

    made.raw(change)


@hf("the bytes are one value further than the header says", r"bytes of |truncated", computes=True)
def _(made):
    made.raw(lambda header, data: (header, data[4:] + data[:4]))


@hf("offsets are shifted", "truncated", computes=True)
def _(made):
    def change(header, data):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
        return header, data

    made.raw(change)


@hf("two tensors share their bytes", "truncated")
def _(made):
    def change(header, data):
        first, second = [name for name in header if name != "__metadata__"][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        return header, data

    made.raw(change)


@hf("bfloat16 is called float16", "another type or shape", BF16, computes=True)
def _(made):
    def change(header, data):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["dtype"] = "F16"
        return header, data

    made.raw(change)


@hf("the weights were cast", "another type or shape")
def _(made):
    dtype = torch.float16
    made.write({name: tensor.to(dtype) for name, tensor in made.tensors().items()})


@hf("the weights went through float16", r"bytes of ", *EVERY)
def _(made):
    made.write(
        {name: (tensor + 1e-9).to(torch.float16).to(tensor.dtype) * 1.01 for name, tensor in made.tensors().items()}
    )


@hf("the file says that it is TensorFlow's", "metadata of model")
def _(made):
    made.raw(lambda header, data: (header | {"__metadata__": {"format": "tf"}}, data))


# The config.


def setting(name: str, says: str, *models: str, computes: bool = False, **changes: Any) -> None:
    hf(name, says, *models, computes=computes)(lambda made: made.config(**changes))


NO_CONFIG = r"config\.json is not what was written"


@hf("the config counts a block too many", NO_CONFIG + ": num_hidden_layers: 5, not 4", computes=True)
def _(made):
    made.config(num_hidden_layers=5)


@hf("the config counts a block too few", NO_CONFIG + ": num_hidden_layers: 3, not 4", computes=True)
def _(made):
    made.config(num_hidden_layers=3)


@hf("the config is the dense model's", NO_CONFIG + ".*: 6, not 4", computes=True)
def _(made):
    shutil.copyfile(made.dense / "config.json", anew(made.folder / "config.json"))


@hf("layer_types are the dense model's", NO_CONFIG + ": layer_types", GEMMA, computes=True)
def _(made):
    made.config(layer_types=json.loads((made.dense / "config.json").read_text())["layer_types"])


@hf("layer_types are those of the first blocks", NO_CONFIG + ": layer_types", GEMMA, computes=True)
def _(made):
    made.config(layer_types=json.loads((made.dense / "config.json").read_text())["layer_types"][:4])


@hf("the bases of the two ropes are exchanged", NO_CONFIG + ": rope_parameters", GEMMA, computes=True)
def _(made):
    ropes = made.settings("config.json")["rope_parameters"]
    names = list(ropes)
    made.config(rope_parameters={names[0]: ropes[names[1]], names[1]: ropes[names[0]]})


@hf("the base of the rope is another", NO_CONFIG + ": rope_parameters.rope_theta", *LLAMAS, computes=True)
def _(made):
    made.config(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})


@hf("the rope is scaled", NO_CONFIG + ": rope_parameters", *LLAMAS, computes=True)
def _(made):
    made.config(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0})


@hf("the rope is scaled beyond the prompt", NO_CONFIG + ": rope_parameters", *LLAMAS)
def _(made):
    made.config(rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0})


@hf("a setting is missing", NO_CONFIG + r": intermediate_size: None|" + NO_CONFIG + r": ffn_dim: None", computes=True)
def _(made):
    config = made.settings("config.json")
    config.pop("intermediate_size", None)
    config.pop("ffn_dim", None)
    made.json("config.json", config)


@hf("the config is cut off", r"config\.json is not what was written, nor readable JSON", computes=True)
def _(made):
    text = (made.folder / "config.json").read_text()
    anew(made.folder / "config.json").write_text(text[: len(text) // 2])


@hf("the config is that of another family", NO_CONFIG, computes=True)
def _(made):
    made.config(model_type="gpt2", architectures=["GPT2LMHeadModel"])


@hf("the config says a key twice", NO_CONFIG, computes=True)
def _(made):
    text = (made.folder / "config.json").read_text().rstrip().removesuffix("}").rstrip()
    anew(made.folder / "config.json").write_text(text + ', "num_hidden_layers": 3}\n')


setting("the sliding window is another", NO_CONFIG + ": sliding_window: 3", GEMMA, computes=True, sliding_window=3)
setting("the window of a long text is another", NO_CONFIG + ": max_position", max_position_embeddings=120)
setting("the norm's epsilon is another", NO_CONFIG + ": rms_norm_eps", *ROPED, computes=True, rms_norm_eps=0.1)
setting("the head count is halved", NO_CONFIG + ": num_attention_heads: 2", computes=True, num_attention_heads=2)
setting(
    "the count of key heads is another",
    NO_CONFIG + ": num_key_value_heads",
    *ROPED,
    computes=True,
    num_key_value_heads=1,
)
setting("the activation is another", NO_CONFIG + ": hidden_act", *LLAMAS, computes=True, hidden_act="gelu")
setting(
    "the activation of OPT is another",
    NO_CONFIG + ": activation_function",
    OPT,
    computes=True,
    activation_function="gelu",
)
setting(
    "the scale of attention is another", NO_CONFIG + ": query_pre_attn", GEMMA, computes=True, query_pre_attn_scalar=64
)
setting("logits are capped", NO_CONFIG + ": final_logit", GEMMA, computes=True, final_logit_softcapping=1.0)
setting(
    "norms come after the block", NO_CONFIG + ": do_layer_norm_before", OPT, computes=True, do_layer_norm_before=False
)
setting("attention has biases", NO_CONFIG + ": attention_bias", *ROPED, computes=True, attention_bias=True)
setting("the vocabulary is larger", NO_CONFIG + ": vocab_size", computes=True, vocab_size=321)
setting("the end token is another", NO_CONFIG + ": eos_token_id: 7", eos_token_id=7)
setting("the start token is another", NO_CONFIG + ": bos_token_id: 9", bos_token_id=9)
setting("the config calls bfloat16 float16", NO_CONFIG + ": dtype: float16, not bfloat16", BF16, dtype="float16")
setting("the config says that weights are quantised", NO_CONFIG + ": quantization_config",
        quantization_config={"quant_method": "no such method"})  # fmt: skip
setting("the config names code to run", NO_CONFIG + ": auto_map", auto_map={"AutoModelForCausalLM": "evil.Evil"})


@hf("quantization settings name the old blocks", "quantize_config.json is not what was written", LLAMA, SHARDED)
def _(made):
    shutil.copyfile(made.dense / "quantize_config.json", anew(made.folder / "quantize_config.json"))


# The tokenizer, and settings of generation.


@hf("the tokenizer is another model's", r"tokenizer\.json is not the dense model's")
def _(made):
    text = (made.other / "tokenizer.json").read_text()
    anew(made.folder / "tokenizer.json").write_text(text)


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Made], None]:
    def do(made):
        values = made.settings("tokenizer.json")
        change(values)
        made.json("tokenizer.json", values)

    return do


def exchange_tokens(values):
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


hf("two tokens are exchanged", r"tokenizer\.json is not the dense model's")(tokenizer(exchange_tokens))
hf("added tokens are missing", r"tokenizer\.json is not the dense model's")(
    tokenizer(lambda values: values.update(added_tokens=values["added_tokens"][:-1]))
)
hf("a merge is missing", r"tokenizer\.json is not the dense model's")(
    tokenizer(lambda values: values["model"]["merges"].pop(5))
)
hf("texts begin with no start token", r"tokenizer\.json is not the dense model's", OPT)(
    tokenizer(lambda values: values.update(post_processor=None))
)


@hf("the chat template is another", r"chat_template\.jinja is not the dense model's")
def _(made):
    anew(made.folder / "chat_template.jinja").write_text("{{ messages }}")


@hf("the chat template is missing", r"chat_template\.jinja is missing")
def _(made):
    (made.folder / "chat_template.jinja").unlink()


@hf("the tokenizer is missing", r"tokenizer\.json is missing")
def _(made):
    (made.folder / "tokenizer.json").unlink()


@hf("the tokenizer's settings are others", r"tokenizer_config\.json is not")
def _(made):
    made.json("tokenizer_config.json", made.settings("tokenizer_config.json") | {"eos_token": "<s>"})


@hf("the settings of generation are others", r"generation_config\.json is not")
def _(made):
    made.json(
        "generation_config.json", made.settings("generation_config.json") | {"temperature": 0.1, "eos_token_id": 5}
    )


@hf("the licence is missing", r"LICENSE is missing")
def _(made):
    (made.folder / "LICENSE").unlink()


# Files.


@hf("a shard is missing", r"model-0000\d-of-0000\d\.safetensors is missing", SHARDED, computes=True)
def _(made):
    made.rng.choice(made.shards()).unlink()


@hf("the weights are missing", r"model.*safetensors is missing", LLAMA, GEMMA, OPT, BF16, computes=True)
def _(made):
    for shard in made.shards():
        shard.unlink()


@hf("a stale shard of the dense model is left beside", r"model-00006-of-00009\.safetensors is there", SHARDED, LLAMA)
def _(made):
    shutil.copyfile(made.shards()[-1], made.folder / "model-00006-of-00009.safetensors")


@hf("the dense model is left beside its shards", r"model\.safetensors is there", SHARDED, computes=True)
def _(made):
    save_file(made.of_dense(), made.folder / "model.safetensors", metadata={"format": "pt"})


@hf("a shard is there twice, under another's name", r"missing|bytes of|holds other tensors", SHARDED, computes=True)
def _(made):
    first, *_, last = made.shards()
    shutil.copyfile(first, anew(last))


@hf("two shards have each other's name", r"holds other tensors", SHARDED)
def _(made):
    first, *_, last = made.shards()
    one, other = first.read_bytes(), last.read_bytes()
    anew(first).write_bytes(other)
    anew(last).write_bytes(one)


@hf("a shard is one of the dense model's", r"holds other tensors|missing|bytes of", SHARDED, computes=True)
def _(made):
    dense = sorted(made.dense.glob("*.safetensors"))
    shutil.copyfile(dense[len(dense) // 2], anew(made.shards()[-1]))


INDEX = "model.safetensors.index.json"


@hf("the index names the wrong shard", rf"{INDEX} is not what was written: weight_map\.", SHARDED)
def _(made):
    index = made.settings(INDEX)
    name = made.rng.choice(sorted(index["weight_map"]))
    index["weight_map"][name] = next(path.name for path in made.shards() if path.name != index["weight_map"][name])
    made.json(INDEX, index)


@hf("the index lacks a tensor", rf"{INDEX} is not what was written: weight_map\.", SHARDED)
def _(made):
    index = made.settings(INDEX)
    index["weight_map"].pop(made.rng.choice(sorted(index["weight_map"])))
    made.json(INDEX, index)


@hf("the index lies about the size", rf"{INDEX} is not what was written: metadata.total_size: 17", SHARDED)
def _(made):
    made.json(INDEX, made.settings(INDEX) | {"metadata": {"total_size": 17}})


@hf("the index is missing", rf"{INDEX} is missing", SHARDED, computes=True)
def _(made):
    (made.folder / INDEX).unlink()


@hf("the index is the dense model's", rf"{INDEX} is not what was written", SHARDED)
def _(made):
    shutil.copyfile(made.dense / INDEX, anew(made.folder / INDEX))


@hf("a tensor is in two shards, differently", r"holds other tensors", SHARDED)
def _(made):
    first, second = made.shards()[:2]
    name, tensor = next(iter(load_file(second).items()))
    held = load_file(first) | {name: tensor + 1}
    save_file(held, anew(first), metadata={"format": "pt"})


@hf("a weight file is cut off", "truncated", computes=True)
def _(made):
    path = made.rng.choice(made.shards())
    content = path.read_bytes()
    anew(path).write_bytes(content[: made.rng.randrange(len(content))])


@hf("a weight file is longer than it says", "truncated", computes=True)
def _(made):
    path = made.rng.choice(made.shards())
    content = path.read_bytes()
    anew(path).write_bytes(content + b"\0" * 8)


@hf("a weight file is empty", "truncated", computes=True)
def _(made):
    anew(made.rng.choice(made.shards())).touch()


@hf("a weight file is the page of a proxy", "truncated", computes=True)
def _(made):
    anew(made.rng.choice(made.shards())).write_text("<html>403 Forbidden</html>\n" * 900)


@hf("weights of another format are left beside", r"pytorch_model\.bin is there")
def _(made):
    torch.save(made.tensors(), made.folder / "pytorch_model.bin")


@hf("an adapter is left beside", r"adapter_config\.json is there")
def _(made):
    made.json("adapter_config.json", {"peft_type": "LORA"})


@hf("code is left beside", r"modeling_evil\.py is there")
def _(made):
    (made.folder / "modeling_evil.py").write_text("print('here I am')\n")


# Recovered checkpoints: `dense` is the dense model, whose bytes are no longer those of the checkpoint.


def changed(made: Made) -> list[str]:
    """The names of tensors with new values."""
    dense, kept = made.of_dense(), made.tensors()
    old = [block for block in range(6) if block not in made.removed]
    before = {name: dense[name if number(name) is None else numbered(name, old[number(name)])] for name in kept}
    return [name for name in kept if not torch.equal(kept[name], before[name])]


@recovered("a recovered tensor is in the wrong block", r"bytes of \S+ are not ")
def _(made):
    tensors = made.tensors()
    name = made.rng.choice([name for name in changed(made) if number(name) is not None])
    other = numbered(name, (number(name) + 1) % 4)
    tensors[name], tensors[other] = tensors[other], tensors[name]
    made.write(tensors)


@recovered("a recovered tensor is left out", r"bytes of \S+ are not its new values")
def _(made):
    name, dense = made.rng.choice(changed(made)), made.of_dense()
    old = [block for block in range(6) if block not in made.removed]
    before = name if number(name) is None else numbered(name, old[number(name)])
    made.edit(name, lambda values: dense[before])


@recovered("no recovered tensor was written", r"bytes of \S+ are not its new values")
def _(made):
    dense = made.of_dense()
    old = [block for block in range(6) if block not in made.removed]
    made.write({n: dense[n if number(n) is None else numbered(n, old[number(n)])] for n in made.tensors()})


@recovered("recovered tensors were rounded", r"bytes of \S+ are not its new values")
def _(made):
    rounded = {name: made.tensors()[name].bfloat16().float() for name in changed(made)}
    made.write(made.tensors() | rounded)


@recovered("a tensor that was not recovered has another value", r"bytes of \S+ are not those of")
def _(made):
    kept = sorted(set(made.tensors()) - set(changed(made)))
    made.edit(made.rng.choice([name for name in kept if number(name) is not None]), lambda values: values * 1.01)


# GGUF files.

F32, Q8, LISTS = "F32", "Q8_0", "lists by block"


@dataclass(frozen=True)
class MadeGguf:
    """A finished GGUF file, made from `dense` without the blocks `removed`."""

    path: Path
    dense: Path
    removed: tuple[int, ...]
    rng: random.Random = field(default_factory=random.Random)

    def rewrite(self, change: Callable[[GgufFile], GgufFile]) -> None:
        """Write it anew with another header; `start` of a tensor says where its bytes are taken from."""
        before = self.path.with_suffix(".before")
        self.path.rename(before)
        write_gguf(change(read_gguf(before)), self.path, lambda count: None)
        before.unlink()

    def entries(self, change: Callable[[list[Entry]], list[Entry]]) -> None:
        self.rewrite(lambda file: replace(file, entries=tuple(change(list(file.entries)))))

    def set(self, key: str, data: bytes) -> None:
        """Give a key of this ending another value."""

        def change(entries):
            assert any(entry.key.endswith(key) for entry in entries), key
            return [replace(entry, data=data) if entry.key.endswith(key) else entry for entry in entries]

        self.entries(change)

    def values(self, name: str, change: Callable[[bytearray], bytes]) -> None:
        """Change the bytes of the tensor of this name."""
        tensor = next(tensor for tensor in read_gguf(self.path).tensors if tensor.name == name)
        content = bytearray(self.path.read_bytes())
        place = slice(tensor.start, tensor.start + tensor.size)
        content[place] = change(content[place])
        self.path.write_bytes(content)

    def places(self, new: Callable[[str], str]) -> None:
        """Take the bytes of each tensor from another one."""

        def change(file):
            found = {tensor.name: tensor for tensor in file.tensors}
            return replace(
                file, tensors=tuple(replace(tensor, start=found[new(tensor.name)].start) for tensor in file.tensors)
            )

        self.rewrite(change)

    def names(self, new: Callable[[str], str]) -> None:
        self.rewrite(
            lambda file: replace(file, tensors=tuple(replace(tensor, name=new(tensor.name)) for tensor in file.tensors))
        )

    def file(self, change: Callable[[bytearray], bytes]) -> None:
        self.path.write_bytes(change(bytearray(self.path.read_bytes())))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def in_block(name: str, new: Mapping[int, int]) -> str:
    return re.sub(r"^blk\.(\d+)\.", lambda match: f"blk.{new.get(int(match[1]), int(match[1]))}.", name)


def entry(name: str, says: str, key: str, data: bytes, *models: str, computes: bool = False) -> None:
    in_gguf(name, says, *models, computes=computes)(lambda made: made.set(key, data))


entry("the file counts a block too many", "block_count is another", ".block_count", u32(5), F32, Q8, computes=True)
entry("the file counts a block too few", "block_count is another", ".block_count", u32(3), F32, Q8, computes=True)
entry("the base of the rope is another", "freq_base is another", "rope.freq_base", f32(500), computes=True)
entry("the rope turns fewer values", "dimension_count is another", "rope.dimension_count", u32(4))
entry("the norm's epsilon is another", "epsilon is another", "layer_norm_rms_epsilon", f32(0.1), computes=True)
entry("the head count is halved", "head_count is another", "attention.head_count", u32(2), computes=True)
entry("the count of key heads is another", "head_count_kv is another", "head_count_kv", u32(2), computes=True)
entry("the context is longer", "context_length is another", "context_length", u32(4096))
entry("the end token is another", "eos_token_id is another", "eos_token_id", u32(7))
entry("texts begin with a start token", "add_bos_token is another", "add_bos_token", b"\1")
entry("the file type lies", "file_type is another", "general.file_type", u32(15))
entry(
    "the alignment lies", "alignment is another|differs from|cannot read|truncated", "general.alignment", u32(64), LISTS
)


@in_gguf("two blocks have changed places", "tensor blk.0", computes=True)
def _(made):
    made.places(lambda name: in_block(name, {0: 1, 1: 0}))


@in_gguf("the blocks are named in another order", "tensor blk.", computes=True)
def _(made):
    made.names(lambda name: in_block(name, {0: 3, 1: 2, 2: 1, 3: 0}))


@in_gguf("the wrong block was removed: one off", "tensor blk.1", F32, computes=True)
def _(made):
    dense = {tensor.name: tensor for tensor in read_gguf(made.dense).tensors}
    content = made.dense.read_bytes()
    for tensor in read_gguf(made.path).tensors:
        if tensor.name.startswith("blk.1."):
            old = dense[tensor.name]
            made.values(tensor.name, lambda values, old=old: content[old.start : old.start + old.size])


@in_gguf("a tensor comes from the neighbour block", "tensor blk.1.ffn_up", F32, Q8, computes=True)
def _(made):
    made.places(lambda name: name.replace("blk.1.ffn_up", "blk.2.ffn_up"))


@in_gguf("gate and up are exchanged", r"tensor blk.2.ffn_(up|gate)", F32, Q8, computes=True)
def _(made):
    other = {"blk.2.ffn_up.weight": "blk.2.ffn_gate.weight", "blk.2.ffn_gate.weight": "blk.2.ffn_up.weight"}
    made.places(lambda name: other.get(name, name))


@in_gguf("queries and keys are exchanged", r"tensor blk.2.attn_[qk]", F32, Q8, computes=True)
def _(made):
    other = {"blk.2.attn_q.weight": "blk.2.attn_k.weight", "blk.2.attn_k.weight": "blk.2.attn_q.weight"}
    made.names(lambda name: other.get(name, name))


@in_gguf("a norm is doubled", "tensor blk.1.attn_norm", F32, Q8, computes=True)
def _(made):
    def double(values):
        numbers = struct.unpack(f"<{len(values) // 4}f", values)
        return struct.pack(f"<{len(numbers)}f", *(2 * number for number in numbers))

    made.values("blk.1.attn_norm.weight", double)


@in_gguf("a tensor is zero", "tensor blk.2.ffn_down", F32, Q8, computes=True)
def _(made):
    made.values("blk.2.ffn_down.weight", lambda values: bytes(len(values)))


@in_gguf("one value is NaN", "tensor blk.2.ffn_norm", F32, Q8, computes=True)
def _(made):
    made.values("blk.2.ffn_norm.weight", lambda values: values[:4] + f32(float("nan")) + values[8:])


@in_gguf("one bit is flipped", "differs from the expected")
def _(made):
    def flip(values):
        values[made.rng.randrange(len(values))] ^= 1 << made.rng.randrange(8)
        return values

    made.values("blk.2.attn_q.weight", flip)


@in_gguf("the embedding's rows are rolled by one", "tensor token_embd", F32, Q8, computes=True)
def _(made):
    made.values("token_embd.weight", lambda values: values[len(values) // 320 :] + values[: len(values) // 320])


@in_gguf("the final norm is that of a block", "tensor output_norm", F32, Q8, computes=True)
def _(made):
    made.places(lambda name: "blk.0.attn_norm.weight" if name == "output_norm.weight" else name)


def without(name: str) -> Callable[[MadeGguf], None]:
    return lambda made: made.rewrite(
        lambda file: replace(file, tensors=tuple(tensor for tensor in file.tensors if tensor.name != name))
    )


in_gguf("the head is missing, as if tied", "tensors, not", F32, Q8, computes=True)(without("output.weight"))
in_gguf("a tensor is missing", "tensors, not", F32, Q8, computes=True)(without("blk.3.ffn_up.weight"))


@in_gguf("a tensor is there that no model has", "tensors, not")
def _(made):
    made.rewrite(
        lambda file: replace(file, tensors=(*file.tensors, replace(file.tensors[-1], name="blk.9.ffn_up.weight")))
    )


@in_gguf("a tensor has its old number", "tensor blk.5", F32, Q8, computes=True)
def _(made):
    made.names(lambda name: name.replace("blk.3.ffn_up", "blk.5.ffn_up"))


@in_gguf("two tensors have one name", "differs from the expected|cannot read")
def _(made):
    made.names(lambda name: name.replace("blk.0.attn_q", "blk.1.attn_q"))


@in_gguf("a tensor has the shape of its transposed self", "tensor blk.1.ffn_up", F32, Q8, computes=True)
def _(made):
    made.rewrite(
        lambda file: replace(
            file,
            tensors=tuple(
                replace(tensor, shape=tensor.shape[::-1]) if tensor.name == "blk.1.ffn_up.weight" else tensor
                for tensor in file.tensors
            ),
        )
    )


@in_gguf("a tensor has another type", "differs from the expected|cannot read|truncated")
def _(made):
    made.rewrite(
        lambda file: replace(
            file,
            tensors=tuple(
                replace(tensor, type=26) if tensor.name == "output_norm.weight" else tensor for tensor in file.tensors
            ),
        )
    )


@in_gguf("the bytes are one value further than the header says", "differs from the expected", computes=True)
def _(made):
    start = min(tensor.start for tensor in read_gguf(made.path).tensors)
    made.file(lambda content: content[:start] + content[start + 4 :] + bytes(4))


@in_gguf("the file is cut off", "cannot read it|truncated", computes=True)
def _(made):
    made.file(lambda content: content[: made.rng.randrange(len(content) - 64)])


@in_gguf("the file is longer than it should be", "bytes, not")
def _(made):
    made.file(lambda content: content + bytes(32))


@in_gguf("the file is empty", "cannot read it", computes=True)
def _(made):
    made.file(lambda content: b"")


@in_gguf("the file is of another version", "version 2, not 3|cannot read it")
def _(made):
    made.file(lambda content: content[:4] + u32(2) + content[8:])


@in_gguf("a key is missing", "epsilon is missing", F32, Q8)
def _(made):
    made.entries(lambda entries: [entry for entry in entries if not entry.key.endswith("layer_norm_rms_epsilon")])


@in_gguf("a key is there twice", "metadata differ|cannot read")
def _(made):
    made.entries(lambda entries: [*entries, next(e for e in entries if e.key.endswith("block_count"))])


@in_gguf("a key was added", "general.sampled is unexpected")
def _(made):
    made.entries(lambda entries: [*entries, Entry("general.sampled", 4, u32(1))])


@in_gguf("the removed blocks are not recorded", "sleb.removed_blocks is missing")
def _(made):
    made.entries(lambda entries: [entry for entry in entries if entry.key != "sleb.removed_blocks"])


def swapped_tokens(made: MadeGguf) -> None:
    def change(entries):
        for place, found in enumerate(entries):
            if found.key == "tokenizer.ggml.tokens":
                size = int.from_bytes(found.data[12:20], "little")
                first = found.data[12 : 20 + size]
                length = int.from_bytes(found.data[20 + size : 28 + size], "little")
                second = found.data[20 + size : 28 + size + length]
                data = found.data[:12] + second + first + found.data[28 + size + length :]
                entries[place] = replace(found, data=data)
        return entries

    made.entries(change)


in_gguf("two tokens are exchanged", "tokenizer.ggml.tokens is another")(swapped_tokens)


@in_gguf("a merge is missing", "tokenizer.ggml.merges is missing", F32, Q8)
def _(made):
    made.entries(lambda entries: [entry for entry in entries if entry.key != "tokenizer.ggml.merges"])


@in_gguf("the chat template is another", "chat_template is another", F32, Q8)
def _(made):
    made.set("chat_template", struct.pack("<Q", 5) + b"{{ }}")


@in_gguf("a list by block is the dense model's", "head_count_kv is another", LISTS)
def _(made):
    dense = next(e for e in read_gguf(made.dense).entries if e.key.endswith("head_count_kv"))
    made.set("head_count_kv", dense.data)


@in_gguf("a list by block is shifted by one", "head_count_kv is another", LISTS)
def _(made):
    found = next(e for e in read_gguf(made.path).entries if e.key.endswith("head_count_kv"))
    made.set("head_count_kv", found.data[:12] + found.data[16:] + found.data[12:16])


@in_gguf("the architecture is another", "architecture is another|missing|differ")
def _(made):
    made.set("general.architecture", struct.pack("<Q", 5) + b"qwen2")


@in_gguf("the file is the dense model's", "differ")
def _(made):
    shutil.copyfile(made.dense, made.path)
