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
from functools import cache
from itertools import product

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import SafetensorError
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
FIRST, RECOVERING = ("in memory", 0), [(way, 0) for way in WAYS]
CONFIGS = {
    LLAMA: llama_config,
    SHARDED: llama_config,
    BF16: lambda: llama_config(dtype=torch.bfloat16),
    GEMMA: lambda: tiny_config("gemma3_text"),
    OPT: lambda: opt_config(6),
}


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Make the dense model, or GGUF file, of a name and a seed, once."""

    @cache
    def make(name, seed=0):
        place = tmp_path_factory.mktemp("dense")
        return (
            make_gguf(place / "tiny.gguf", name, seed) if name not in CONFIGS else make_model(place / "m", name, seed)
        )

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
    typed = number("general.file_type", UINT32, "<I", {F32: 0, Q8: 7}[name])(gguf_of(path))
    path.write_bytes(key("tokenizer.chat_template", STRING, text(b"{{ messages }}"))(typed).to_bytes())
    return path


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model: other weights and another tokenizer."""
    folder = save_model(tmp_path_factory.mktemp("other") / "model", llama_config(), seed=99)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    sabotage.exchange_tokens(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def held_in(path):
    """Return the files of a checkpoint, or the keys of a GGUF file, by name; and the tensors, if they can be read."""
    if path.is_dir():
        files = {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
        with contextlib.suppress(SafetensorError):
            held = [load(data) for name, data in files.items() if name.endswith(".safetensors")]
            return files, {name: save({"": tensor}) for tensors in held for name, tensor in tensors.items()}
        return files, {}
    with contextlib.suppress(Exception):
        file, where, data = gguf_of(path), sabotage.spans(path), path.read_bytes()
        keys = {key.decode(): rest for key, *rest in file.entries}
        return keys, {
            name.decode(): (shape, type_, data[where[name.decode()]]) for name, shape, type_, _ in file.tensors
        }
    return {}, {}


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


def nothing_planned(monkeypatch):
    """Leave the proof to transformers alone, as if what is in the files had been planned."""
    monkeypatch.setattr(proof, "_as_planned", lambda *arguments: iter(()))
    monkeypatch.setattr(apply_gguf, "_require_as_planned", lambda *arguments: None)


@pytest.fixture
def require_refused(sleb, monkeypatch, other, tmp_path_factory, tried):
    """Damage a checkpoint or GGUF file between its writing and its proof, and require that it is refused."""

    def check(do, dense, *options, seed=0, as_planned=False, says=""):
        names = []

        def spoil(path):
            before, original = held_in(path), held_in(dense)
            do(Made(path, dense, (1, 4), other, random.Random(seed)))
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
        output = "out" if dense.is_dir() else "out.gguf"
        source = [dense] if dense.is_dir() else ["--source", dense]
        result = sleb("apply", *source, "--blocks", "1,4", "-o", output, *options, code=9)
        assert names, "nothing was damaged"
        (error,) = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
        assert re.search(says, error), error
        assert as_planned or any(name in error for name in names), error
        assert not result.stdout
        assert not os.path.lexists(output)
        assert set(os.listdir()) <= {".out.recovery", "hub"}
        tried("wrong checkpoints")

    return check


def cases(kinds, ways, every_model, *, first=FIRST, models=5, as_planned=False, every=1):
    """Yield cases of damage: each kind once in every run, and in all ways with `pytest -m faults`.

    `ways` are a mode and a seed each. In every run, the best model of each kind is tried, or of every so manieth.
    """
    chosen = [kind for kind in kinds if kind.computes or not as_planned]
    for place, kind in enumerate(chosen):
        fitting = kind.models or every_model
        for name, way in product(fitting[:models], dict.fromkeys([first, *ways])):
            is_best = name == fitting[0] and way == first
            if is_best or way in ways:
                marks = () if is_best and place % every == 0 else pytest.mark.faults
                label = f"{kind.name}, {name}, {way[0]}, {way[1]}{', as planned' if as_planned else ''}"
                yield pytest.param(kind, name, *way, as_planned, id=label, marks=marks)


DAMAGED = (
    *cases(HF, [("streamed", 0), ("in memory", 1)], EVERY, every=3),
    *cases(HF, [FIRST, ("streamed", 1)], EVERY, models=2, as_planned=True, every=8),
    *cases(GGUF, [("in memory", 1)], (F32, Q8), every=3),
    *cases(GGUF, [FIRST], (F32, Q8), as_planned=True, every=8),
    *cases(RECOVERED, RECOVERING, (LLAMA,), first=RECOVERING[0], every=len(RECOVERED)),
    *cases(RECOVERED, RECOVERING, (LLAMA,), first=RECOVERING[0], as_planned=True, every=len(RECOVERED)),
)


@pytest.mark.parametrize(("kind", "name", "mode", "seed", "as_planned"), DAMAGED)
def test_what_is_damaged_is_refused(require_refused, dense, text_file, kind, name, mode, seed, as_planned):
    options = [] if name not in CONFIGS else MODES.get(mode) or [*WAYS[mode], *calibration(text_file, samples=10)]
    require_refused(kind.do, dense(name, seed), *options, seed=seed, as_planned=as_planned)


@pytest.mark.parametrize("only_transformers", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", often(CONFIGS, [LLAMA]))
def test_what_is_undamaged_is_delivered(sleb, dense, monkeypatch, name, mode, only_transformers):
    if only_transformers:
        nothing_planned(monkeypatch)
    result = sleb("apply", dense(name), "--blocks", "1,4", *MODES[mode], "-o", "out", "--json")
    checks = json.loads(result.stdout)["proof"]["checks"]
    assert ("same bytes" in checks) == (not only_transformers)
    assert checks[-4:] == ["loads", "same logits", "generates", "saves again"]


@pytest.mark.parametrize("name", often([F32, Q8, LISTS], [F32, LISTS]))
def test_a_gguf_file_that_is_undamaged_is_delivered(sleb, dense, name):
    result = sleb("apply", "--source", dense(name), "--blocks", "1,4", "-o", "out.gguf", "--json")
    assert json.loads(result.stdout)["verified"]


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
    sleb("apply", dense(BF16), "--blocks", "1,4", "-o", "out")
