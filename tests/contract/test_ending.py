"""The vectors of embedding models are those that sentence-transformers computes."""

import json
import shutil
from functools import partial

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.models import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from conftest import architecture_of, prose
from encoders import add_modules, bert_config, save_reader, word_pieces
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.model.reading import POOLING_MODES
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.text.passages import TextShape, pad_texts
from sleb_cli.events import ignore

TEXTS = [" ".join(prose(40).split()[:count]) for count in (1, 3, 9, 30, 90)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder that embeds, with padding on the left."""
    config = Qwen3Config(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=4,
        max_position_embeddings=64,
    )
    pieces = word_pieces(prose(200))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces.backend_tokenizer,
        pad_token="[PAD]",
        padding_side="left",
        model_max_length=64,
    )
    return save_reader(tmp_path_factory.mktemp("decoder"), tokenizer, config)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT without a head."""
    return save_reader(tmp_path_factory.mktemp("encoder"), word_pieces(prose(200)), bert_config())


MODULES = {
    **{
        mode: [lambda width, mode=mode: Pooling(width, pooling_mode=mode)] for mode in POOLING_MODES
    },
    "two modes": [partial(Pooling, pooling_mode=["cls", "mean"])],
    "dense": [
        partial(Pooling, pooling_mode="mean"),
        lambda width: Dense(width, 16, activation_function=torch.nn.GELU()),
        lambda width: Dense(16, 8, bias=False, activation_function=torch.nn.Identity()),
        lambda width: Normalize(),
    ],
    "residual": [
        partial(Pooling, pooling_mode="mean"),
        lambda width: Dense(width, width, activation_function=torch.nn.PReLU(), use_residual=True),
        lambda width: LayerNorm(width),
        lambda width: Dense(width, 8, use_residual=True),
        lambda width: Dropout(),
    ],
}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_vectors_are_those_of_sentence_transformers(request, tmp_path, kind, modules):
    start = Transformer(str(request.getfixturevalue(kind)), max_seq_length=40)
    others = [make(start.get_word_embedding_dimension()) for make in modules]
    stock = SentenceTransformer(modules=[start, *others], device="cpu")
    stock.save(str(tmp_path / "stock"))
    compare(tmp_path / "stock")


def test_old_settings_are_read_in_the_order_of_sentence_transformers(encoder, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(encoder, folder)
    add_modules(folder, modules=("Transformer", "Pooling"))
    old = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, **old})
    )
    compare(folder)


def test_vectors_are_truncated(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "short")
    compare(add_modules(folder, truncate_dim=8))


def test_the_length_may_stand_in_a_file_of_an_older_name(encoder, tmp_path):
    folder = add_modules(shutil.copytree(encoder, tmp_path / "old"))
    settings = (folder / "sentence_bert_config.json").rename(
        folder / "sentence_roberta_config.json"
    )
    settings.write_text(json.dumps({"max_seq_length": 12}))
    compare(folder)


@pytest.fixture
def of_bytes():
    """A tokenizer of bytes, to which white space tells."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate(["[PAD]", "[SEP]", *letters])}
    tokenizer = Tokenizer(models.BPE(numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[SEP]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=64
    )


def test_white_space_around_a_text_is_read(of_bytes, tmp_path):
    folder = save_reader(tmp_path / "model", of_bytes, bert_config(vocab_size=260))
    compare(add_modules(folder), [f" {TEXTS[1]}", f"\n{TEXTS[2]}", f"{TEXTS[3][:20]} \n"])


def test_white_space_around_the_texts_of_a_pair_is_read(of_bytes, tmp_path):
    config = bert_config(vocab_size=260, num_labels=1)
    auto_class = AutoModelForSequenceClassification
    folder = save_reader(tmp_path / "model", of_bytes, config, auto_class)
    pairs = [(f" {TEXTS[1]} ", f"\n{TEXTS[0]}"), (TEXTS[0], f"{TEXTS[1]} ")]
    stock = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    expected = stock.predict(pairs, convert_to_tensor=True)
    torch.testing.assert_close(outputs_of(folder, pairs)[:, 0], expected, atol=1e-5, rtol=0)


def compare(folder, texts=TEXTS):
    """Compare our vectors of a saved model with those of sentence-transformers."""
    stock = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    expected = stock.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(outputs_of(folder, texts), expected, atol=1e-5, rtol=0)


def outputs_of(folder, texts):
    """Return what a model puts out for texts or pairs, [texts, width]."""
    architecture = architecture_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padded = pad_texts(tokenizer, texts, TextShape(architecture.longest_sequence))
    placement = Placement(torch.device("cpu"), torch.float32)
    with open_model(architecture, placement, ignore) as model, torch.inference_mode():
        return model.ending.of_model(model, padded.trimmed(), ())
