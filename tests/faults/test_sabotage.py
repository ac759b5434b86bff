"""Whatever is wrong with a checkpoint when `sleb apply` has written it, its proof refuses it, and
nothing is delivered.

Each kind of damage is done between writing and proof.
"""

import json
import os
import re
import shutil
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
from faults.lies import gguf_of, with_number
from gguf_models import write_llama_gguf
from sleb_cli.engine.output import apply_gguf, proof

KEPT = (0, 2, 3, 5)
SWAP = (1, 0, 2, 3)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


def renumbered(name, places):
    """Return the name of the tensor when its block has another place."""
    return BLOCK.sub(lambda match: f"{match[1]}{places[int(match[2])]}{match[3]}", name)


def write_weights(made, weights):
    # The file may be mapped into memory, so another one takes its place.
    (made / WEIGHTS).unlink()
    held = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(held, made / WEIGHTS, {"format": "pt"})


def tensors(change):
    """Change the tensors of a checkpoint in one file, by name."""
    return lambda made, dense: write_weights(made, change(weights_of(made)))


def at(name, change):
    return tensors(lambda held: held | {name: change(held[name])})


def without(part):
    """Leave out the tensors with this in their names."""
    return tensors(lambda held: {name: held[name] for name in held if part not in name})


def swap_blocks(held):
    return {name: held[renumbered(name, SWAP)] for name in held}


def keep_dense(made, dense):
    """Write the dense model's tensors in place of what was recovered."""
    held = weights_of(dense)
    write_weights(made, {name: held[renumbered(name, KEPT)] for name in weights_of(made)})


def missing(file):
    return lambda made, dense: (made / file).unlink()


def copied(file, source=None):
    return lambda made, dense: shutil.copyfile(dense / (source or file), made / file)


def of_json(file, change):
    def do(made, dense):
        data = change(json.loads((made / file).read_text()))
        (made / file).write_text(json.dumps(data))

    return do


def says(file, **changes):
    return of_json(file, lambda data: data | changes)


def of_bytes(change, file=""):
    """Change the bytes of a file of the checkpoint, or of a checkpoint that is one."""
    return lambda made, dense: (made / file).write_bytes(change((made / file).read_bytes()))


def both(*parts):
    def do(made, dense):
        for part in parts:
            part(made, dense)

    return do


def last_bit(values):
    values.view(torch.int32)[5] ^= 1
    return values


def one_nan(values):
    values[0, 9] = float("nan")
    return values


def add_code(made, dense):
    (made / "x.py").write_text("print('here I am')")


def in_two_shards(made, dense):
    one, two = sorted(made.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(two).items()))
    held = load(one.read_bytes()) | {name: tensor + 1}
    one.unlink()
    save_file(held, one, {"format": "pt"})


def wrong_shards(data):
    shards = list(data["weight_map"].values())
    return {"weight_map": dict(zip(data["weight_map"], reversed(shards), strict=True))}


# Of the kept blocks 0, 2, 3 and 5, block 1 of the checkpoint has the number of a removed one.
LAYER = "model.layers.1."
NORM = f"{LAYER}input_layernorm.weight"
UP = f"{LAYER}mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
quiet = partial(Kind, computes=False)
MOVED = "two blocks have changed places"
CHECKPOINTS = {
    MOVED: Kind(tensors(swap_blocks)),
    "a block too few": Kind(both(says(CONFIG, num_hidden_layers=3), without(".layers.3."))),
    "a norm is a bit larger": Kind(at(NORM, lambda values: values * 1.001)),
    "a norm differs by the last bit": quiet(at(NORM, last_bit)),
    "one value is NaN": Kind(at(UP, one_nan)),
    "a tensor is missing": Kind(without(UP)),
    "a tensor is there that no model has": Kind(tensors(lambda held: held | {"model.x": held[UP]})),
    "a bias is left out": Kind(without("layers.1.fc1.bias"), model="opt"),
    "a tied model has a head of its own": Kind(
        both(
            says(CONFIG, tie_word_embeddings=False),
            tensors(lambda held: held | {"lm_head.weight": held[EMBEDDING].roll(1, 0)}),
        ),
        model="gemma3",
    ),
    "the weights were cast": quiet(
        tensors(lambda held: {name: held[name].half() for name in held})
    ),
    "the weights are cut off": Kind(of_bytes(lambda data: data[:-999], WEIGHTS)),
    "the config is the dense model's": Kind(copied(CONFIG)),
    "the kinds of blocks are the first ones": Kind(
        of_json(CONFIG, lambda data: data | {"layer_types": data["layer_types"][::-1]}),
        model="gemma3",
    ),
    "there is code": quiet(both(says(CONFIG, auto_map={"AutoModelForCausalLM": "x.X"}), add_code)),
    "the tokenizer has other tokens": quiet(says("tokenizer.json", added_tokens=[])),
    "the license is missing": quiet(missing("LICENSE")),
    "weights of another format are left beside": quiet(copied("pytorch_model.bin", WEIGHTS)),
    "a shard is missing": Kind(missing("model-00002-of-00006.safetensors"), model="shards"),
    "the index names the wrong shards": quiet(of_json(INDEX, wrong_shards), model="shards"),
    "a tensor is in two shards, differently": quiet(in_two_shards, model="shards"),
}
RECOVERED = {
    "no recovered tensor was written": Kind(keep_dense),
    "another tensor has another value": Kind(at(EMBEDDING, lambda values: values * 1.01)),
}


def of_gguf(change):
    return lambda made, dense: made.write_bytes(change(gguf_of(made)).to_bytes())


def removed_entry(file):
    kept = [each for each in file.entries if not each[0].endswith(b"removed_blocks")]
    return replace(file, entries=tuple(kept))


def swapped(file):
    """Have the first two blocks change places."""
    named = [(renumbered(name.decode(), SWAP).encode(), *rest) for name, *rest in file.tensors]
    return replace(file, tensors=tuple(named))


FILES = {
    "a block too few": Kind(of_gguf(lambda file: with_number(file, "llama.block_count", 3))),
    "the removed blocks are not recorded": quiet(of_gguf(removed_entry)),
    MOVED: Kind(of_gguf(swapped)),
    "one bit is flipped": quiet(of_bytes(lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    "a tensor is missing": Kind(of_gguf(lambda file: replace(file, tensors=file.tensors[1:]))),
    "the file is cut off": Kind(of_bytes(lambda data: data[:-999])),
    "the file is the dense model's": quiet(lambda made, dense: shutil.copyfile(dense, made)),
}
RECOVER = ["--recover", "--no-heal", *calibration("text.txt", samples=10)]
DAMAGED = [
    *((name, kind, "", ()) for name, kind in CHECKPOINTS.items()),
    (MOVED, CHECKPOINTS[MOVED], "", ("--stream",)),
    *((name, kind, "", RECOVER) for name, kind in RECOVERED.items()),
    *((name, kind, ".gguf", ()) for name, kind in FILES.items()),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Make the dense model, or GGUF file, of a name, once; all biases count."""
    folder = tmp_path_factory.mktemp("dense")

    def make(name):
        path = folder / name
        if path.exists():
            return path
        if path.suffix:
            write_llama_gguf(path, 6)
            file = with_number(gguf_of(path), "general.file_type", 0)
            path.write_bytes(file.to_bytes())
            return path
        size = "60KB" if name == "shards" else "5GB"
        save_model(path, CONFIGS[name](), bos=name == "opt", max_shard_size=size)
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


@pytest.fixture
def with_larger_norm(sleb, dense, damaging):
    """Cut a model, and make a norm of a block larger by this share."""

    def run(model, block, share, as_planned, code):
        name = f"model.layers.{block}.input_layernorm.weight"
        enlarge = at(name, lambda values: values * (1 + share))
        damaging(lambda path: enlarge(path, dense(model)), as_planned)
        return sleb(*cut(dense(model)), code=code)

    return run


@pytest.mark.faults
@pytest.mark.parametrize(("model", "share"), [("llama", 2**-20), ("bfloat16", 2**-4)])
def test_a_difference_larger_than_rounding_shows_in_logits(with_larger_norm, model, share):
    """As docs/reference/commands.md says of logits, when the plan itself is wrong."""
    said = with_larger_norm(model, 2, share, as_planned=True, code=9).stderr
    assert re.search(rf"logits.*\b2\b.*\b{KEPT[2]}\b", said)


@pytest.mark.parametrize(("as_planned", "code"), [(False, 9), (True, 0)])
def test_a_difference_as_small_as_rounding_shows_in_bytes(with_larger_norm, as_planned, code):
    with_larger_norm("bfloat16", 3, 2**-7, as_planned, code)
