"""Whatever is wrong with a checkpoint when `sleb apply` has written it, its proof refuses it, and
nothing is delivered.

Each kind of damage is done between writing and proof.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from conftest import calibration, llama_config, opt_config, save_model, weights_of
from families import tiny_config
from faults.conftest import often
from faults.lies import UINT32, gguf_of, number
from gguf_models import write_llama_gguf
from sleb_cli.engine.output import apply_gguf, proof

KEPT = (0, 2, 3, 5)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BLOCK = re.compile(r"((?:.*layers|blk)\.)(\d+)(\..*)")
CONFIGS = {
    "llama": llama_config,
    "bfloat16": partial(llama_config, dtype=torch.bfloat16),
    "shards": llama_config,
    "gemma3": partial(tiny_config, "gemma3_text"),
    "opt": partial(opt_config, 6),
}


@dataclass(frozen=True)
class Kind:
    """What damages a checkpoint at a path, made of a dense one; whether it then computes something
    else; and where.
    """

    do: Callable[..., object]
    computes: bool = True
    model: str = "llama"


def renumber(*places):
    """Return the name of the tensor at each block's new place."""
    return lambda name: BLOCK.sub(
        lambda match: f"{match[1]}{places[int(match[2])]}{match[3]}", name
    )


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
MOVED = "two blocks have changed places"
CHECKPOINTS = {
    MOVED: Kind(taken(renumber(1, 0, 2, 3))),
    "a block too few": Kind(
        both(
            says(CONFIG, num_hidden_layers=3),
            tensors(lambda held, dense: {n: held[n] for n in held if ".layers.3." not in n}),
        )
    ),
    "a norm is a bit larger": Kind(at(NORM, lambda values: values * 1.001)),
    "a norm differs by the last bit": quiet(at(NORM, last_bit)),
    "one value is NaN": Kind(
        at(UP, lambda values: values.index_fill(1, torch.tensor([9]), float("nan")))
    ),
    "a tensor is missing": Kind(tensors(lambda held, dense: {n: held[n] for n in held if n != UP})),
    "a tensor is there that no model has": Kind(
        tensors(lambda held, dense: held | {"model.x": held[UP]})
    ),
    "a bias is left out": Kind(
        tensors(
            lambda held, dense: {
                name: held[name] for name in held if name != "model.decoder.layers.1.fc1.bias"
            }
        ),
        model="opt",
    ),
    "a tied model has a head of its own": Kind(
        both(
            says(CONFIG, tie_word_embeddings=False),
            tensors(lambda held, dense: held | {"lm_head.weight": held[EMBEDDING].roll(1, 0)}),
        ),
        model="gemma3",
    ),
    "the weights were cast": quiet(
        tensors(lambda held, dense: {name: held[name].half() for name in held})
    ),
    "the weights are cut off": Kind(content(WEIGHTS, lambda data, dense: data[:-999])),
    "the config is the dense model's": Kind(copied(CONFIG)),
    "the kinds of blocks are the first ones": Kind(
        of_json(CONFIG, lambda data: data | {"layer_types": data["layer_types"][::-1]}),
        model="gemma3",
    ),
    "there is code": quiet(
        both(
            says(CONFIG, auto_map={"AutoModelForCausalLM": "x.X"}),
            content("x.py", lambda data, dense: b"print('here I am')"),
        )
    ),
    "the tokenizer has other tokens": quiet(
        of_json("tokenizer.json", lambda data: data | {"added_tokens": []})
    ),
    "the license is missing": quiet(missing("LICENSE")),
    "weights of another format are left beside": quiet(copied("pytorch_model.bin", WEIGHTS)),
    "a shard is missing": Kind(missing(SHARD.format(2, 6)), model="shards"),
    "the index names the wrong shards": quiet(
        of_json(
            INDEX,
            lambda data: {
                "weight_map": dict(
                    zip(data["weight_map"], reversed(data["weight_map"].values()), strict=True)
                )
            },
        ),
        model="shards",
    ),
    "a tensor is in two shards, differently": quiet(in_two_shards, model="shards"),
}


RECOVERED = {
    "no recovered tensor was written": tensors(
        lambda held, dense: {n: dense[renumber(*KEPT)(n)] for n in held}
    ),
    "another tensor has another value": at(EMBEDDING, lambda values: values * 1.01),
}


def of_gguf(change):
    return lambda made, dense: made.write_bytes(change(gguf_of(made)).to_bytes())


def of_bytes(change):
    return lambda made, dense: made.write_bytes(change(made.read_bytes()))


def entry(ending, new):
    """Give the key of this ending another value, or remove it."""

    def change(file):
        kept = [each for each in file.entries if new is not None or not each[0].endswith(ending)]
        new_entries = [
            (name, kind, new if name.endswith(ending) else data) for name, kind, data in kept
        ]
        return replace(file, entries=tuple(new_entries))

    return of_gguf(change)


def swapped(file):
    """Have the first two blocks change places."""
    named = [(renumber(1, 0, 2, 3)(name.decode()).encode(), *rest) for name, *rest in file.tensors]
    return replace(file, tensors=tuple(named))


FILES = {
    "a block too few": Kind(entry(b".block_count", struct.pack("<I", 3))),
    "the removed blocks are not recorded": quiet(entry(b"removed_blocks", None)),
    MOVED: Kind(of_gguf(swapped)),
    "one bit is flipped": quiet(of_bytes(lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    "a tensor is missing": Kind(of_gguf(lambda file: replace(file, tensors=file.tensors[1:]))),
    "the file is cut off": Kind(of_bytes(lambda data: data[:-999])),
    "the file is the dense model's": quiet(lambda made, dense: shutil.copyfile(dense, made)),
}
RECOVER = ["--recover", *calibration("text.txt", samples=10)]
DAMAGED = [
    *((name, kind, "", ()) for name, kind in CHECKPOINTS.items()),
    (MOVED, CHECKPOINTS[MOVED], "", ("--stream",)),
    *((name, Kind(do), "", RECOVER) for name, do in RECOVERED.items()),
    *((name, kind, ".gguf", ()) for name, kind in FILES.items()),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Make the dense model, or GGUF file, of a name; all biases count."""
    folder, made = tmp_path_factory.mktemp("dense"), {}

    def make(name):
        if name in made:
            return made[name]
        path = made[name] = folder / name
        if path.suffix:
            write_llama_gguf(path, 6)
            path.write_bytes(number("general.file_type", UINT32, 0)(gguf_of(path)).to_bytes())
            return path
        save_model(
            path,
            CONFIGS[name](),
            bos=name == "opt",
            **({"max_shard_size": "60KB"} if name == "shards" else {}),
        )
        for file in path.glob("*.safetensors"):
            held = load(file.read_bytes())
            biases = {each: held[each] + 0.1 for each in held if each.endswith("bias")}
            save_file(held | biases, file, {"format": "pt"})
        (path / "LICENSE").write_text("Anyone may use this.\n")
        return path

    return make


@pytest.fixture
def damaging(monkeypatch):
    """Damage what was written before it is proven; the proof compares it with the plan, or leaves
    that out.
    """

    def arrange(do, as_planned):
        pending = [do]

        def damage_and(check, source, path, *more):
            if pending:
                pending.pop()(path)
            return [] if as_planned else check(source, path, *more)

        for module, name in ((proof, "check_files"), (apply_gguf, "_require_as_planned")):
            monkeypatch.setattr(module, name, partial(damage_and, getattr(module, name)))

    return arrange


def cut(dense, *options):
    return ("apply", dense, "--blocks", "1,4", "-o", f"out{dense.suffix}", *options)


@pytest.mark.parametrize(
    "case", often(DAMAGED, DAMAGED[::3]), ids=lambda case: f"{case[0]}{case[2]}"
)
def test_a_damaged_checkpoint_is_refused(
    sleb, dense, damaging, text_file, tmp_path_factory, monkeypatch, case
):
    """By transformers alone where it then computes something else, as if the plan itself had been
    wrong.
    """
    _, kind, suffix, options = case
    shutil.copy(text_file, "text.txt")
    # One cache for all of these tests, so that a GGUF file is converted once.
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    model = dense(f"{kind.model}{suffix}")
    damaging(lambda path: kind.do(path, model), kind.computes)
    result = sleb(*cut(model, *options), code=9)
    assert len(re.findall(r"^error: .*\nhint: ", result.stderr, re.MULTILINE)) == 1
    assert not result.stdout
    left = {name for name in os.listdir() if not fnmatch(name, ".out.*.recovery")}
    assert left <= {"hub", "text.txt"}


@pytest.mark.parametrize("model", often([*CONFIGS, "llama.gguf"], ["llama", "llama.gguf"]))
@pytest.mark.parametrize("as_planned", [False, True])
def test_an_undamaged_checkpoint_is_delivered(sleb, dense, damaging, model, as_planned):
    damaging(lambda path: None, as_planned)
    sleb(*cut(dense(model)))


@pytest.mark.faults
@pytest.mark.parametrize(("model", "larger"), [("llama", 2**-20), ("bfloat16", 2**-4)])
def test_a_difference_larger_than_rounding_shows_in_logits(sleb, dense, damaging, model, larger):
    """As docs/reference/commands.md says of logits, when the plan itself is wrong."""
    block, old = 2, KEPT[2]
    name = f"model.layers.{block}.input_layernorm.weight"
    damaging(lambda path: at(name, lambda values: values * (1 + larger))(path, dense(model)), True)
    assert re.search(rf"logits.*\b{block}\b.*\b{old}\b", sleb(*cut(dense(model)), code=9).stderr)


@pytest.mark.parametrize("as_planned", [False, True])
def test_a_difference_as_small_as_rounding_shows_in_bytes(sleb, dense, damaging, as_planned):
    name = "model.layers.3.input_layernorm.weight"
    damaging(
        lambda path: at(name, lambda values: values * (1 + 2**-7))(path, dense("bfloat16")),
        as_planned,
    )
    sleb(*cut(dense("bfloat16")), code=0 if as_planned else 9)
