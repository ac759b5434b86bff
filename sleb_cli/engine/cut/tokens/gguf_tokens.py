"""The cut of the tokens of other scripts of a GGUF file: lists of tokens, and rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sleb_cli.engine.cut.protocol import GgufCut
from sleb_cli.engine.cut.tokens.scripts import (
    TokenRemoval,
    Vocabulary,
    cannot_cut,
    choose_tokens,
    text_of,
)
from sleb_cli.engine.cut.tokens.token_cut import TokenCut, token_tables
from sleb_cli.engine.gguf.file import Entry, GgufFile, with_items, with_value
from sleb_cli.engine.model.architecture import Architecture

_PREFIX = "tokenizer.ggml."
_BY_TOKEN = frozenset(f"{_PREFIX}{name}" for name in ("tokens", "scores", "token_type"))
_IN_BYTES = {"gpt2": True, "llama": False}
"""The kinds of tokenizers that sleb can cut, by their names in GGUF files, and whether tokens are
spelled in bytes.
"""
_NORMAL = 1
"""The type of a token for text, rather than a byte, control, or a token of the user's."""
_TABLES = ("token_embd.weight", "output.weight", "output.bias")


class GgufTokenCut(TokenRemoval, GgufCut):
    """The cut of a vocabulary from a GGUF file."""

    def for_model(self, architecture: Architecture) -> TokenCut:
        """Return the cut of these tokens from the model that transformers reads in the file."""
        tables = token_tables(architecture, self.vocabulary)
        return TokenCut(self.vocabulary, architecture.text_key, tables)

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header of the file with the tokens that stay."""
        entries = [_cut_entry(file, entry, self.vocabulary) for entry in file.entries]
        tensors = list(file.tensors)
        for position, tensor in enumerate(tensors):
            if tensor.name in _TABLES:
                tensors[position] = tensor.only(self.vocabulary.tokens)
        return replace(file, entries=tuple(entries), tensors=tuple(tensors))


def plan_gguf_tokens(file: GgufFile, scripts: Sequence[str]) -> GgufTokenCut:
    """Plan the cut that leaves the tokens of these scripts."""
    kind = file.get(f"{_PREFIX}model")
    tokens = file.get(f"{_PREFIX}tokens")
    types = file.get(f"{_PREFIX}token_type")
    if obstacle := _obstacle(file, kind, tokens, types):
        raise cannot_cut(str(file.path), obstacle)
    texts = {}
    always = {entry.value for entry in file.entries if _names_token(entry)}
    for number, type_ in enumerate(types):
        if type_ == _NORMAL:
            texts[number] = text_of(tokens[number], in_bytes=_IN_BYTES[kind])
        else:
            always.add(number)
    return GgufTokenCut(choose_tokens(scripts, texts, always, len(tokens)))


def _obstacle(file: GgufFile, kind: Any, tokens: Any, types: Any) -> str | None:
    """Say why the vocabulary cannot be cut, if it cannot."""
    if kind not in _IN_BYTES or file.get("tokenizer.huggingface.json"):
        return f"its tokenizer is of another kind than {' and '.join(_IN_BYTES)} ({kind!s:.60})"
    scores = file.get(f"{_PREFIX}scores")
    for values in (tokens, types, tokens if scores is None else scores):
        if not isinstance(values, list) or len(values) != len(tokens):
            return "its lists of tokens differ in length"
    for pair in file.get(f"{_PREFIX}merges") or ():
        if not isinstance(pair, str) or " " not in pair:
            return "its merges are not pairs"
    tables = [tensor for tensor in file.tensors if len(tokens) in tensor.shape]
    known = [table for table in tables if table.name in _TABLES and table.shape[-1] == len(tokens)]
    if not tables or known != tables:
        return "it has further tables by token, or none"
    return None


def _cut_entry(file: GgufFile, entry: Entry, vocabulary: Vocabulary) -> Entry:
    if entry.key in _BY_TOKEN:
        return with_items(entry, list(vocabulary.tokens))
    if entry.key == f"{_PREFIX}merges":
        tokens = file.get(f"{_PREFIX}tokens")
        stay = {tokens[token] for token in vocabulary.tokens}
        kept_merges = []
        for index, pair in enumerate(file.get(entry.key)):
            a, b = pair.split(" ", 1)
            if {a, b, a + b} <= stay:
                kept_merges.append(index)
        return with_items(entry, kept_merges)
    if _names_token(entry):
        return with_value(entry, vocabulary.renumbered(entry.value))
    if entry.key == f"{file.architecture}.vocab_size":
        return with_value(entry, len(vocabulary.tokens))
    return entry


def _names_token(entry: Entry) -> bool:
    return (
        entry.key.startswith(_PREFIX)
        and entry.key.endswith("token_id")
        and type(entry.value) is int
    )
