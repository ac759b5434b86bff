"""Tiny models that only read, as sentence-transformers and transformers save them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertTokenizer

MODULES = ("Transformer", "Pooling", "Normalize")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(text: str, longest: int = 64) -> BertTokenizer:
    """Make a WordPiece tokenizer of a text's words and letters, whose pairs tell first and second.

    A trained one numbers its pieces differently in each process.
    """
    words = sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))
    letters = sorted(set("".join(words)))
    inner = [f"##{letter}" for letter in letters if letter.isalpha()]
    pieces = dict.fromkeys([*SPECIAL, *letters, *inner, *words])
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizer(tokenizer_object=tokenizer, model_max_length=longest)


def bert_config(blocks: int = 6, **changes: Any) -> BertConfig:
    """A BERT of some thousand parameters."""
    settings = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return BertConfig(num_hidden_layers=blocks, **(settings | changes))


def save_reader(
    folder: Path, tokenizer: Any, config: Any = None, auto_class: Any = AutoModel, **options: Any
) -> Path:
    """Save a random model of the real class, with weights large enough that every block matters."""
    torch.manual_seed(0)
    model = auto_class.from_config(config or bert_config(), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_modules(
    folder: Path, pooling: str = "mean", modules: tuple[str, ...] = MODULES, **settings: Any
) -> Path:
    """Make a model an embedding model of sentence-transformers; `settings` hold its prompts."""
    entries = []
    for number, kind in enumerate(modules):
        path = f"{number}_{kind}" if number else ""
        type_ = f"sentence_transformers.models.{kind}"
        entries.append({"idx": number, "name": str(number), "path": path, "type": type_})
        if path:
            (folder / path).mkdir()
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    files = {
        "modules": entries,
        "sentence_bert_config": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers": {"prompts": {}, "default_prompt_name": None} | settings,
        "1_Pooling/config": {"word_embedding_dimension": width, "pooling_mode": pooling},
    }
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data, indent=2))
    return folder
