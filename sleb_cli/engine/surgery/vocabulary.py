"""Cut the tokens of other scripts out of a checkpoint: its tokenizer, its settings, and which tensors lose rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer

from sleb_cli.engine.files.copying import holds
from sleb_cli.engine.files.weights import read_json
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.engine.vocabulary import Vocabulary, cannot_cut, choose, numbers_in, text_of
from sleb_plugins import UnsupportedModelError

TOKENIZER = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "generation_config.json", "processor_config.json")
"""Files besides `config.json` that may name tokens by number."""

OTHER_FORMATS = frozenset({
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt",
    "merges.txt", "added_tokens.json",
})  # fmt: skip
"""The vocabulary in other formats, which `tokenizer.json` replaces."""

_UNKNOWN_TABLES = re.compile(r".+(?<!type)_vocab_size|vocab_size_.+|.*codebook.*|ngram_size")
"""Config keys of further tables by token; `type_vocab_size` counts segments."""


@dataclass(frozen=True)
class VocabularyCut:
    """The vocabulary that stays, and where a checkpoint holds it.

    Attributes:
        vocabulary: the tokens that stay.
        tables: the names of tensors with a row for each token.
        tokenizer: the contents of the new `tokenizer.json`; None if the checkpoint has none.
    """

    vocabulary: Vocabulary
    tables: frozenset[str]
    tokenizer: Mapping[str, Any] | None = None

    def in_config(self, config: Mapping[str, Any], text_key: str) -> dict[str, Any]:
        """Return a `config.json` with the new numbers, and with the number of tokens, which it may leave out."""
        renumbered = self.vocabulary.in_settings(config)
        text = renumbered.setdefault(text_key, {}) if text_key else renumbered
        text["vocab_size"] = len(self.vocabulary.tokens)
        return renumbered

    def in_file(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the contents of one of `SETTINGS` with the new numbers."""
        renumbered = self.vocabulary.in_settings(settings)
        added = renumbered.get("added_tokens_decoder")
        if isinstance(added, Mapping):
            new = {str(old): str(number) for old, number in self.vocabulary.new_number.items()}
            renumbered["added_tokens_decoder"] = {new.get(old, old): token for old, token in added.items()}
        return renumbered


def plan_vocabulary(architecture: Architecture, scripts: Sequence[str]) -> VocabularyCut:
    """Return the cut that leaves the tokens of these scripts.

    Raises:
        UsageError: Unicode has no such script, or hardly any token would go.
        UnsupportedModelError: the tokenizer or a table of the model is of a kind that sleb cannot cut.
    """
    source, skeleton = architecture.source, cast(Any, architecture.skeleton)
    count: int = skeleton.get_input_embeddings().weight.shape[0]
    data, normalize = _read_tokenizer(architecture)
    added = {token["id"] for token in data["added_tokens"]}
    used = numbers_in(source.raw_config, f"config.json of {source.id}")
    for name in SETTINGS:
        if holds(source.folder, name):
            used |= numbers_in(read_json(source.folder / name), name)
    in_bytes = any(part.get("type") == "ByteLevel" for part in _parts(data.get("decoder")))
    texts = {number: text_of(token, in_bytes=in_bytes) for token, number in _tokens(data) if number not in added}
    if max({*texts, *added}, default=0) >= count:
        raise _refused(architecture, f"its tokenizer has more tokens than the model's {count:,} rows")
    vocabulary = choose(scripts, texts, added | used, count, normalize)
    tables = tables_of(architecture, vocabulary)
    return VocabularyCut(vocabulary, tables, _cut_tokenizer(data, vocabulary))


def tables_of(architecture: Architecture, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the tensors in the weight files that have a row for each token.

    Builds the model with the new number of tokens, without weights, and compares the shapes.

    Raises:
        UnsupportedModelError: there are others than the embeddings and the head.
    """
    for part in _parts(architecture.config.to_dict()):
        for key, value in part.items():
            if value and (_UNKNOWN_TABLES.fullmatch(str(key)) or (key == "vocab_size" and value != vocabulary.count)):
                raise _refused(architecture, f"it may have further tables by token ({key} {value})")
    skeleton, raw = cast(Any, architecture.skeleton), architecture.source.raw_config
    config = architecture.read_config(VocabularyCut(vocabulary, frozenset()).in_config(raw, architecture.text_key))
    were, are = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for model in (skeleton, architecture.build(config))
    )
    known = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    expected = {
        f"{path}.{name}": (len(vocabulary.tokens), *parameter.shape[1:])
        for path, module in skeleton.named_modules()
        if any(module is each for each in known)
        for name, parameter in module.named_parameters(recurse=False)
    }
    changed = {name: are.get(name) for name, shape in were.items() if are.get(name) != shape}
    if changed != expected:
        other = min({*changed.items()} ^ {*expected.items()})[0]
        raise _refused(architecture, f"{other} has an entry for each token, too")
    # Files may use other names than the model; but nothing else outside the blocks has a row for each token.
    shapes, numbering = {were[name] for name in expected}, architecture.numbering
    outside = (each for each in architecture.source.weights.stored if not each.name.startswith(numbering.prefix))
    tables = frozenset(each.name for each in outside if each.shape in shapes)
    if numbering.extra or not tables:
        raise _refused(architecture, "its weight files hold other tables by token than its config says")
    return tables


def _read_tokenizer(architecture: Architecture) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return the contents of `tokenizer.json`, and what it does to a text first.

    Raises:
        UnsupportedModelError: there is none, or it is of another kind.
    """
    source = architecture.source
    path = source.folder / TOKENIZER
    if not holds(source.folder, TOKENIZER):
        raise _refused(architecture, f"it has no {TOKENIZER}")
    source.watch.add(path)
    with translate_transformers_errors(f"the tokenizer of {source.id}"):
        tokenizer = Tokenizer.from_file(str(path))
    data: dict[str, Any] = json.loads(tokenizer.to_str())  # with every key
    kind, prefix = data["model"]["type"], data["model"].get("continuing_subword_prefix")
    if kind not in ("BPE", "Unigram") or prefix:
        raise _refused(architecture, f"its tokenizer is no plain BPE or Unigram ({kind})")
    return data, tokenizer.normalizer.normalize_str if tokenizer.normalizer else str


def _parts(settings: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all mappings in a config or a part of a tokenizer."""
    if isinstance(settings, Mapping):
        yield settings
        for value in settings.values():
            yield from _parts(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _parts(value)


def _tokens(data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((piece, number) for number, (piece, _) in enumerate(vocabulary))


def _cut_tokenizer(data: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the new `tokenizer.json`: the tokens that stay, and the merges that make one of them from two others."""
    new, model = vocabulary.new_number, dict(data["model"])
    kept = [(token, number) for token, number in _tokens(data) if number in new]
    if model["type"] == "BPE":
        model["vocab"] = tokens = {token: new[number] for token, number in kept}
        model["merges"] = [[a, b] for a, b in model["merges"] if a in tokens and b in tokens and a + b in tokens]
    else:
        model["vocab"] = [model["vocab"][number] for _, number in kept]
        model["unk_id"] = vocabulary.renumbered(model.get("unk_id"))
    added = [token | {"id": new[token["id"]]} for token in data["added_tokens"]]
    rest = {key: _with_new_ids(data.get(key), new) for key in ("post_processor", "padding")}
    return {**data, "model": model, "added_tokens": added, **rest}


def _with_new_ids(part: Any, new: Mapping[int, int]) -> Any:
    """Return a part that adds the same tokens, which it names by `ids`, `pad_id` or `["</s>", 2]`."""
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int
        return [part[0], new.get(part[1])] if pair else [_with_new_ids(each, new) for each in part]
    if not isinstance(part, Mapping):
        return part
    changed = {key: _with_new_ids(value, new) for key, value in part.items()}
    changed |= {"ids": [new.get(number) for number in part["ids"]]} if "ids" in part else {}
    return changed | ({"pad_id": new.get(part["pad_id"])} if "pad_id" in part else {})


def _refused(architecture: Architecture, why: str) -> UnsupportedModelError:
    return cannot_cut(f"{architecture.source.id} ({architecture.config.model_type})", why)
