"""`sleb apply` on models that only read, through `main()`, in stock sentence-transformers."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from conftest import prose
from encoders import add_modules, save_reader, word_pieces
from sleb_cli.engine.output import proof, stock_vectors

TEXTS = [
    line[:length]
    for line, length in zip(
        prose(40).splitlines(),
        (20, 90, 400),
        strict=False,
    )
]
REMOVED = {1, 3}
CHECKS = ["complete", "same bytes", "loads", "same outputs", "same vectors"]


@pytest.fixture
def proven(apply, tmp_path):
    """Apply the removal of two blocks, and return the folder and its proof."""
    return partial(applied, apply, tmp_path / "out")


def applied(apply, out, folder, *options):
    result = apply(folder, "--blocks", "3,1", "--json", "--force", *options)
    return out, json.loads(result.stdout)["proof"]


def vectors_of(folder, removed=(), **options):
    model = SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
    )
    blocks = model[0].auto_model.encoder
    blocks.layer = nn.ModuleList(b for n, b in enumerate(blocks.layer) if n not in removed)
    return model.encode(TEXTS, convert_to_tensor=True, **options)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def add_dense(folder, **more):
    """Add a dense module between pooling and normalization."""
    add_modules(folder, modules=("Transformer", "Pooling", "Dense", "Normalize"))
    dense = folder / "2_Dense"
    tensors = {"linear.weight": torch.randn(8, 32)}
    if more:
        tensors["residual.weight"] = torch.randn(8, 32)
    save_file(tensors, dense / "model.safetensors")
    settings = {"in_features": 32, "out_features": 8, "bias": False, **more}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    (dense / "config.json").write_text(json.dumps(settings | activation))


def in_masked_lm(folder):
    """Keep the weights under a prefix, with a head for masked tokens and no pooler."""
    add_modules(folder, pooling="cls")
    save_reader(
        folder,
        word_pieces(prose(200)),
        auto_class=AutoModelForMaskedLM,
    )
    names = load_file(folder / "model.safetensors").keys()
    assert "bert.encoder.layer.0.output.dense.weight" in names
    assert not any("pooler" in name for name in names)


@pytest.mark.parametrize(
    "kind",
    [
        add_modules,
        add_dense,
        partial(add_dense, use_residual=True),
        partial(add_modules, truncate_dim=8),
        in_masked_lm,
        lambda folder: None,
    ],
)
def test_vectors_are_those_of_the_dense_model_without_the_blocks(proven, tmp_path, kind):
    model = save_reader(tmp_path / "model", word_pieces(prose(200)))
    kind(model)
    folder, found = proven(model)
    assert found["checks"] == CHECKS
    assert found["logits_difference"] == 0
    assert found["vectors_difference"] <= stock_vectors.TOLERANCE
    expected = vectors_of(model, REMOVED)
    assert torch.allclose(vectors_of(folder), expected, atol=1e-5)
    assert not torch.allclose(vectors_of(model), expected, atol=1e-2)
    assert files_in(folder) == files_in(model) | {"README.md"}


def test_prompts_stay_and_the_card_stands_above_theirs(apply, tiny_encoder, tmp_path):
    card = tiny_encoder / "README.md"
    head = "library_name: sentence-transformers\npipeline_tag: sentence-similarity"
    card.write_text(f"---\n{head}\n---\n\n# Mine\nIt embeds.\n")
    result = apply(tiny_encoder, "--blocks", "3,1")
    card.unlink()
    assert "without these blocks, in sentence-transformers" in result.stdout
    assert "to run it: SentenceTransformer('out').encode(texts)" in result.stdout
    assert "--heal would bring it closer" in result.stdout
    folder = tmp_path / "out"
    written = (folder / "README.md").read_text()
    assert written.startswith("---\n" + head)
    assert written.count("---\n") == 3
    assert written.index("stock sentence-transformers") < written.index("# Mine\nIt embeds.")
    assert "SentenceTransformer('tiny-encoder-sleb-4-blocks')" in written
    expected = vectors_of(tiny_encoder, REMOVED, prompt_name="query")
    assert torch.allclose(
        vectors_of(folder, prompt_name="query"),
        expected,
        atol=1e-5,
    )
    assert not torch.allclose(vectors_of(folder), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["tiny_classifier", "tiny_reranker"])
def test_classes_and_scores_are_those_without_the_blocks(request, proven, tmp_path, kind):
    dense = request.getfixturevalue(kind)
    folder, found = proven(dense)
    assert found["checks"] == CHECKS[:-1]
    model = AutoModelForSequenceClassification.from_pretrained(dense).eval()
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = nn.ModuleList(b for n, b in enumerate(layers) if n not in REMOVED)
    model.config.num_hidden_layers = 4
    model.save_pretrained(tmp_path / "by-hand")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "by-hand")
    results = []
    for path in (folder, tmp_path / "by-hand"):
        if kind == "tiny_reranker":
            results.append(CrossEncoder(str(path)).predict([(TEXTS[0], text) for text in TEXTS]))
        else:
            rows = pipeline(
                "text-classification",
                str(path),
                device="cpu",
            )(TEXTS)
            results.append([row["score"] for row in rows])
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    name = "CrossEncoder" if kind == "tiny_reranker" else "pipeline('text-classification'"
    assert name in (folder / "README.md").read_text()


@pytest.mark.parametrize("options", [["--stream"], ["--dtype", "bfloat16"]])
def test_a_proof_in_other_ways(proven, tiny_encoder, options):
    checks = proven(tiny_encoder, *options)[1]["checks"]
    assert checks == (CHECKS[:-1] if options == ["--stream"] else CHECKS)


def test_without_sentence_transformers_its_own_pooling_is_used(apply, monkeypatch, tiny_encoder):
    monkeypatch.setattr(stock_vectors, "is_installed", lambda: False)
    result = apply(tiny_encoder, "--blocks", "3,1")
    assert "sentence-transformers is not installed" in " ".join(result.stderr.split())
    assert "matches the original without these blocks\n" in result.stdout


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (stock_vectors, "compute", "in sentence-transformers its vectors differ by"),
        (proof._Models, "_outputs", "its outputs differ from those of the dense model"),
    ],
)
def test_others_fail_the_proof(run_sleb, monkeypatch, tiny_encoder, tmp_path, owner, name, said):
    plain = getattr(owner, name)
    monkeypatch.setattr(
        owner,
        name,
        lambda *args, **how: plain(*args, **how) * 1.01,
    )
    result = run_sleb("apply", tiny_encoder, "--blocks", "3,1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert said in " ".join(result.stderr.split())
    assert "float64 decides" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tokens_of_other_scripts_go_from_word_pieces(apply, tmp_path):
    greek = prose(120, seed=1).lower().translate(str.maketrans("aeioustr", "αεηιουστ"))
    model = save_reader(tmp_path / "model", word_pieces(prose(120) + greek))
    add_modules(model)
    (tmp_path / "latin.txt").write_text(prose(60))
    words = [
        "--scripts",
        "latin",
        "--calibration",
        tmp_path / "latin.txt",
        "--samples",
        4,
    ]
    applied = apply(model, *words, "--json")
    assert "0.0% of the tokens in latin.txt go" in applied.stderr
    result = json.loads(applied.stdout)
    before, after = result["vocabulary"]["tokens"]
    assert (before, after < before) == (160, True)
    assert {"same tokens", "same outputs", "same vectors"} < {*result["proof"]["checks"]}
    assert torch.allclose(
        vectors_of(tmp_path / "out"),
        vectors_of(model),
        atol=1e-5,
    )


def test_a_quantized_reader_is_refused(run_sleb, tmp_path):
    model = add_modules(save_reader(tmp_path / "model", word_pieces(prose(200))))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (model / "config.json").write_text(json.dumps(config))
    result = run_sleb("apply", model, "--blocks", 1)
    assert result.exit_code == 4, result.stderr
    assert "is quantized" in result.stderr
