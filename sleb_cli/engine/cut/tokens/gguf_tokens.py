"""The cut of the tokens of other scripts of a GGUF file: its lists of tokens, and the rows of its
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
        """Return the cut of these tokens from the model that transformers reads in the file,
        tokenizer included.
        """
        return TokenCut(
            self.vocabulary, architecture.text_key, token_tables(architecture, self.vocabulary)
        )

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header of the file with the tokens that stay."""
        entries = tuple(_cut_entry(file, entry, self.vocabulary) for entry in file.entries)
        tensors = (
            tensor.only(self.vocabulary.tokens) if tensor.name in _TABLES else tensor
            for tensor in file.tensors
        )
        return replace(file, entries=entries, tensors=tuple(tensors))


def plan_gguf_tokens(file: GgufFile, scripts: Sequence[str]) -> GgufTokenCut:
    """Plan the cut that leaves the tokens of these scripts."""
    kind, tokens, types, merges = (
        file.get(_PREFIX + key) for key in ("model", "tokens", "token_type", "merges")
    )
    if kind not in _IN_BYTES or file.get("tokenizer.huggingface.json"):
        raise cannot_cut(
            str(file.path),
            f"its tokenizer is of another kind than {' and '.join(_IN_BYTES)} ({kind!s:.60})",
        )
    lists = [
        values for values in (tokens, types, file.get(f"{_PREFIX}scores")) if values is not None
    ]
    count = len(tokens) if isinstance(tokens, list) else 0
    if not types or any(not isinstance(values, list) or len(values) != count for values in lists):
        raise cannot_cut(str(file.path), "its lists of tokens differ in length")
    if not all(isinstance(pair, str) and " " in pair for pair in merges or ()):
        raise cannot_cut(str(file.path), "its merges are not pairs")
    tables = [tensor for tensor in file.tensors if count in tensor.shape]
    if not tables or any(
        tensor.name not in _TABLES or tensor.shape[-1] != count for tensor in tables
    ):
        raise cannot_cut(str(file.path), "it has further tables by token, or none")
    normal = {number for number, type_ in enumerate(types) if type_ == _NORMAL}
    texts = {number: text_of(tokens[number], in_bytes=_IN_BYTES[kind]) for number in normal}
    named = {entry.value for entry in file.entries if _names_token(entry)}
    return GgufTokenCut(choose_tokens(scripts, texts, {*range(count)} - normal | named, count))


def _cut_entry(file: GgufFile, entry: Entry, vocabulary: Vocabulary) -> Entry:
    if entry.key in _BY_TOKEN:
        return with_items(entry, list(vocabulary.tokens))
    if entry.key == f"{_PREFIX}merges":
        tokens = file.get(f"{_PREFIX}tokens")
        stay = {tokens[token] for token in vocabulary.tokens}
        pairs = [pair.split(" ", 1) for pair in file.get(entry.key)]
        return with_items(
            entry, [index for index, (a, b) in enumerate(pairs) if {a, b, a + b} <= stay]
        )
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
