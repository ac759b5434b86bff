"""Whatever is wrong with a checkpoint when `sleb apply` has written it, its proof refuses it, and nothing is delivered.

Each kind of damage (sabotage.py) is done to the finished folder or file, between writing and proof. It must be refused
twice: because it is not what was planned, and, where the model then computes something else, by transformers alone, as
if the plan itself had been wrong.
"""

import contextlib
import json
import os
import random
import re
from functools import cache, partial
from itertools import product

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load, load_file, save, save_file

import gguf_models
from conftest import calibration, llama_config, opt_config, save_model
from families import tiny_config
from faults import sabotage
from faults.conftest import often
from faults.lies import STRING, UINT32, gguf_of, key, number, text
from faults.sabotage import BF16, EVERY, F32, GEMMA, GGUF, HF, LISTS, LLAMA, OPT, Q8, RECOVERED, SHARDED, Made, edit
from sleb_cli.engine.output import apply, apply_gguf, proof

MODES = {"in memory": ["--no-stream"], "streamed": ["--stream"]}
WAYS = {
    "recovered": ["--recover"],
    "recovered, streamed": ["--recover", "--stream"],
    "healed": ["--heal", "--heal-tokens", 2048],
}
CONFIGS = {
    LLAMA: llama_config, SHARDED: llama_config, BF16: partial(llama_config, dtype=torch.bfloat16),
    GEMMA: partial(tiny_config, "gemma3_text"), OPT: partial(opt_config, 6),
}  # fmt: skip


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Make the dense model, or GGUF file, of a name and a seed, once."""

    @cache
    def make(name, seed=0):
        place = tmp_path_factory.mktemp("dense")
        return make_model(place / "m", name, seed) if name in CONFIGS else make_gguf(place / "m.gguf", name, seed)

    return make


def make_model(folder, name, seed):
    """Save a model with biases that are not zero, and the files that a model may have beside its weights."""
    options = {"max_shard_size": "60KB"} if name == SHARDED else {}
    save_model(folder, CONFIGS[name](), seed=seed, bos=name == OPT, **options)
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        biases = {n: torch.randn_like(t) * 0.1 for n, t in held.items() if n.endswith("bias") and not t.any()}
        save_file(held | biases, path, metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (folder / "LICENSE").write_text("Anyone may use this.\n")
    if name in (LLAMA, SHARDED):
        settings = {"quant_method": "gptq", "bits": 4, "ignore": ["lm_head", "model.layers.5.mlp.down_proj"]}
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


def make_gguf(path, name, seed):
    if name == LISTS:
        values = {"attention.head_count_kv": [1, 2, 0, 3, 5, 4], "general.file_type": 0}
        return gguf_models.write_gguf(path, "llama", 6, values, alignment=32)
    torch.manual_seed(seed)
    gguf_models.write_llama_gguf(path, 6, {F32: Type.F32, Q8: Type.Q8_0}[name])
    typed = number("general.file_type", UINT32, {F32: 0, Q8: 7}[name])(gguf_of(path))
    path.write_bytes(key("tokenizer.chat_template", STRING, text(b"{{ messages }}"))(typed).to_bytes())
    return path


def held_in(path):
    """Return the files of a checkpoint, or the keys of a GGUF file, by name; and the tensors, if they can be read."""
    own, tensors = {}, {}
    with contextlib.suppress(Exception):
        if path.is_dir():
            own = {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
            held = [load(data) for name, data in own.items() if name.endswith(".safetensors")]
            tensors = {name: save({"": tensor}) for shard in held for name, tensor in shard.items()}
        else:
            file, where, data = gguf_of(path), sabotage.spans(path), path.read_bytes()
            own = {key.decode(): rest for key, *rest in file.entries}
            tensors = {name.decode(): (*rest, data[where[name.decode()]]) for name, *rest, _ in file.tensors}
    return own, tensors


def names_of(before, after):
    """Return words of which a refusal must say one: what is missing, new or another."""
    files, tensors = (
        {name for name in one | other if one.get(name) != other.get(name)}
        for one, other in zip(before, after, strict=True)
    )
    if tensors and after[1]:  # then a weight file is named only if it is missing or new
        files -= {name for name in before[0].keys() & after[0].keys() if name.endswith(".safetensors")}
    names = files | tensors
    is_checkpoint = any(name.endswith(".json") for name in before[0])
    if is_checkpoint or (names and len(after[1]) == len(before[1]) and "general.alignment" not in names):
        return names
    return names | {"cannot read it", "truncated", "tensors, not", "bytes, not", "version", "metadata differ"}


def cut(dense):
    """Return the command that removes two blocks of a model or GGUF file."""
    return "apply", dense, "--blocks", "1,4", "-o", f"out{dense.suffix}"


def nothing_planned(monkeypatch):
    """Leave the proof to transformers alone, as if what is in the files had been planned."""
    monkeypatch.setattr(proof, "_as_planned", lambda *arguments: iter(()))
    monkeypatch.setattr(apply_gguf, "_require_as_planned", lambda *arguments: None)


@pytest.fixture
def require_refused(sleb, monkeypatch, tmp_path_factory, tried):
    """Damage a checkpoint or GGUF file between its writing and its proof, and require that it is refused."""

    def check(do, dense, *options, seed=0, as_planned=False, says=""):
        names = []

        def spoil(path):
            before, original = held_in(path), held_in(dense)
            do(Made(path, dense, random.Random(seed)))
            after = held_in(path)
            assert held_in(dense) == original, "the dense model was damaged too"
            names.extend(names_of(before, after))

        def prove_damaged(reference, folder, *arguments, prove=apply.prove):
            spoil(folder)
            return prove(reference, folder, *arguments)

        def write_damaged(pruned, aside, notify, write=apply_gguf._write):
            write(pruned, aside, notify)
            spoil(aside)

        monkeypatch.setattr(apply, "prove", prove_damaged)
        monkeypatch.setattr(apply_gguf, "_write", write_damaged)
        # One cache for all of these tests, so that a GGUF file is converted once.
        monkeypatch.setenv("SLEB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        if as_planned:
            nothing_planned(monkeypatch)
        result = sleb(*cut(dense), *options, code=9)
        assert names, "nothing was damaged"
        (error,) = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
        assert re.search(says, error), error
        assert as_planned or any(name in error for name in names), error
        assert not result.stdout
        assert set(os.listdir()) <= {".out.recovery", "hub"}
        tried("wrong checkpoints")

    return check


def cases(kinds, every_model, ways, *, as_planned=False):
    """Yield each kind of damage to each model that it fits, or the first two, in these ways: a mode and a seed each."""
    for kind in kinds:
        if kind.computes or not as_planned:
            for name, way in product((kind.models or every_model)[: 2 if as_planned else 5], ways):
                yield kind, name, *way, as_planned


def label(case):
    kind, name, mode, seed, as_planned = case
    return f"{kind.name}, {name}, {mode}, {seed}{', as planned' if as_planned else ''}"


DAMAGED = [
    *cases(HF, EVERY, [("streamed", 0), ("in memory", 1)]),
    *cases(HF, EVERY, [("in memory", 0), ("streamed", 1)], as_planned=True),
    *cases(GGUF, (F32, Q8), [("in memory", 0), ("in memory", 1)]),
    *cases(GGUF, (F32, Q8), [("in memory", 0)], as_planned=True),
    *cases(RECOVERED, (LLAMA,), [(way, 0) for way in WAYS]),
    *cases(RECOVERED, (LLAMA,), [(way, 0) for way in WAYS], as_planned=True),
]


@pytest.mark.parametrize("case", often(DAMAGED, DAMAGED[::19]), ids=label)
def test_what_is_damaged_is_refused(require_refused, dense, text_file, case):
    kind, name, mode, seed, as_planned = case
    options = [] if name not in CONFIGS else MODES.get(mode) or [*WAYS[mode], *calibration(text_file, samples=10)]
    require_refused(kind.do, dense(name, seed), *options, seed=seed, as_planned=as_planned)


@pytest.mark.parametrize("name", often([*CONFIGS, F32, Q8, LISTS], [LLAMA, F32, LISTS]))
def test_what_is_undamaged_is_delivered(sleb, dense, monkeypatch, name):
    for options in MODES.values() if name in CONFIGS else [()]:
        with monkeypatch.context() as patch:
            sleb(*cut(dense(name)), *options, "--force")
            nothing_planned(patch)
            sleb(*cut(dense(name)), *options, "--force")


@pytest.mark.faults
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
@pytest.mark.parametrize(("block", "old"), enumerate((0, 2, 3, 5)))
@pytest.mark.parametrize(("name", "larger"), [(LLAMA, 2**-20), (BF16, 2**-4)])
def test_what_rounding_cannot_hide(require_refused, dense, name, larger, block, old, norm):
    """As docs/reference/commands.md says of logits, when the plan itself is wrong."""
    do = edit(rf"layers\.{block}\.{norm}\.weight", lambda values: values * (1 + larger))
    require_refused(do, dense(name), as_planned=True, says=rf"logits.*\b{block}\b.*\b{old}\b")


def test_what_rounding_hides_from_logits_but_not_from_bytes(sleb, require_refused, dense, monkeypatch):
    require_refused(edit(r"layers\.3\.input_layernorm", lambda values: values * (1 + 2**-7)), dense(BF16))
    nothing_planned(monkeypatch)
    sleb(*cut(dense(BF16)))
