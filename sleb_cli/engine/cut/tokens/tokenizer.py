"""A tokenizer is read, and cut to the tokens that stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from sleb_cli.engine.cut.tokens.scripts import Vocabulary, cannot_cut
from sleb_cli.engine.files.copying import holds_file
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_plugins import UnsupportedModelError

TOKENIZER = "tokenizer.json"

OTHER_FORMATS = frozenset({
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt", "added_tokens.json",
})  # fmt: skip
"""The vocabulary in other formats, which `tokenizer.json` replaces."""


def read_tokenizer(architecture: Architecture) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return the contents of `tokenizer.json`, and the function that normalizes a text first."""
    source = architecture.source
    path = source.folder / TOKENIZER
    if not holds_file(source.folder, TOKENIZER):
        raise cannot_cut_tokens(architecture, f"it has no {TOKENIZER}")
    source.watch.add(path)
    with translate_transformers_errors(f"the tokenizer of {source.id}"):
        tokenizer = Tokenizer.from_file(str(path))
    data: dict[str, Any] = json.loads(tokenizer.to_str())  # with every key
    kind = data["model"]["type"]
    # The prefix of WordPiece is ASCII, which stays.
    is_prefixed = kind == "BPE" and data["model"].get("continuing_subword_prefix")
    if kind not in ("BPE", "Unigram", "WordPiece") or is_prefixed:
        kinds = "plain BPE, Unigram or WordPiece"
        raise cannot_cut_tokens(architecture, f"its tokenizer is no {kinds} ({kind})")
    return data, tokenizer.normalizer.normalize_str if tokenizer.normalizer else str


def mappings_in(settings: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a config or a part of a tokenizer, and all mappings in it."""
    if isinstance(settings, Mapping):
        yield settings
        for value in settings.values():
            yield from mappings_in(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from mappings_in(value)


def tokens_in(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the tokens of a `tokenizer.json` but the added ones, each with its number."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(piece, number) for number, (piece, _) in enumerate(vocabulary)]


def cut_tokenizer(data: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the new `tokenizer.json`.

    It has the tokens that stay, and the merges that make one of them from two others.
    """
    new = vocabulary.new_number
    model = dict(data["model"])
    staying = [(token, number) for token, number in tokens_in(data) if number in new]
    if model["type"] != "Unigram":
        model["vocab"] = tokens = {token: new[number] for token, number in staying}
    if model["type"] == "BPE":
        model["merges"] = [
            [a, b] for a, b in model["merges"] if a in tokens and b in tokens and a + b in tokens
        ]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][number] for _, number in staying]
        model["unk_id"] = vocabulary.renumbered(model.get("unk_id"))
    # An added token without a row, which the tokenizer of a GGUF file may have, goes.
    added = []
    for token in data["added_tokens"]:
        if token["id"] in new:
            added.append(token | {"id": new[token["id"]]})
    cut = data | {"model": model, "added_tokens": added}
    for key in ("post_processor", "padding"):
        cut[key] = _with_new_ids(data.get(key), new)
    return cut


def _with_new_ids(settings: Any, new: Mapping[int, int]) -> Any:
    # Tokens are named by `ids`, `pad_id` or pairs such as ["</s>", 2].
    if isinstance(settings, list):
        if len(settings) == 2 and isinstance(settings[0], str) and type(settings[1]) is int:
            return [settings[0], new.get(settings[1])]
        return [_with_new_ids(item, new) for item in settings]
    if not isinstance(settings, Mapping):
        return settings
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "ids":
            changed[key] = [new.get(number) for number in value]
        elif key == "pad_id":
            changed[key] = new.get(value)
        else:
            changed[key] = _with_new_ids(value, new)
    return changed


def cannot_cut_tokens(architecture: Architecture, why: str) -> UnsupportedModelError:
    """Return the error for a model whose vocabulary sleb cannot cut."""
    return cannot_cut(f"{architecture.source.id} ({architecture.config.model_type})", why)
