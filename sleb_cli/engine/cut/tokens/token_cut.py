"""The cut of the tokens of other scripts: the settings that change, the tensors that lose rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sleb_cli.engine.cut.protocol import Cut
from sleb_cli.engine.cut.tokens.scripts import (
    INCOMPLETE,
    TokenRemoval,
    Vocabulary,
    choose_tokens,
    text_of,
    token_ids_in,
)
from sleb_cli.engine.cut.tokens.tokenizer import (
    OTHER_FORMATS,
    TOKENIZER,
    cannot_cut_tokens,
    cut_tokenizer,
    mappings_in,
    read_tokenizer,
    tokens_in,
)
from sleb_cli.engine.files.config_files import CONFIG, SETTINGS, read_json
from sleb_cli.engine.files.copying import holds_file
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.structure import tensor_shapes
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_cli.events import Notice, Notify
from sleb_cli.records import Check

_UNKNOWN_TABLES = re.compile(r".+(?<!type)_vocab_size|vocab_size_.+|.*codebook.*|ngram_size")
"""Config keys of further tables by token; `type_vocab_size` counts segments."""


_TEXT_TOKENS = 32
"""The tokens of a text by which a tokenizer is checked."""
_LOST_TEXTS = 256
"""The number of texts of lost tokens by which a tokenizer is checked."""


@dataclass(frozen=True)
class TokenCut(TokenRemoval, Cut):
    """The cut of a vocabulary from a checkpoint.

    Attributes:
        text_key: the key of the language model's config in `config.json`; empty if it is the whole
            config.
        tables: the names of tensors with a row for each token.
        tokenizer: the contents of the new `tokenizer.json`; None if it comes with a GGUF file.
    """

    text_key: str
    tables: frozenset[str] = frozenset()
    tokenizer: Mapping[str, Any] | None = None

    description = "the tokens of other scripts"
    # The head's product has another shape, which some processors round otherwise.
    tolerance = 2.0**-20

    @property
    def files(self) -> Mapping[str, Any]:
        """The new `tokenizer.json`, without the formats that it replaces."""
        return dict.fromkeys(OTHER_FORMATS) | {TOKENIZER: self.tokenizer}

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with the new numbers, and the config with the number of tokens."""
        renumbered = self.vocabulary.in_settings(values)
        if file == CONFIG:
            text = renumbered.setdefault(self.text_key, {}) if self.text_key else renumbered
            text["vocab_size"] = len(self.vocabulary.tokens)
        added = renumbered.get("added_tokens_decoder")
        if isinstance(added, Mapping):
            kept_tokens = {}
            for old, new in self.vocabulary.new_number.items():
                if str(old) in added:
                    kept_tokens[str(new)] = added[str(old)]
            renumbered["added_tokens_decoder"] = kept_tokens
        return renumbered

    def tensor(self, name: str) -> tuple[str, Slices | None]:
        """Return the name, and the rows that stay of a table."""
        if name not in self.tables:
            return name, None
        return name, Slices(0, self.vocabulary.count, self.vocabulary.tokens)

    def texts(self, tokenizer: Any) -> list[str]:
        """Return texts of all tokens and characters that stay.

        `tokenizer`, the dense model's, decodes the tokens.
        """
        characters = self.vocabulary.characters
        decoded = tokenizer.batch_decode(_in_pieces(self.tokens), skip_special_tokens=True)
        # Neighbours that hold incomplete characters may together make one of another script.
        texts = [text for text in decoded if set(characters).issuperset(text)]
        for piece in _in_pieces(characters):
            texts.append(" ".join(piece))
        return texts

    def tokenizer_checks(self, pruned: Any, dense: Any, notify: Notify) -> list[Check]:
        """Return the check of `texts`, which has passed, and check text of lost tokens.

        That text must be decoded as before.
        """
        lost = sorted({*range(min(self.vocabulary.count, len(dense)))}.difference(self.tokens))
        decoded = dense.batch_decode([[token] for token in lost[:: len(lost) // _LOST_TEXTS + 1]])
        texts = [text for text in decoded if INCOMPLETE not in text] or self.texts(dense)
        # Not compared with the texts, since some tokenizers change a few characters first.
        if _respelled(pruned, texts) == _respelled(dense, texts):
            return ["same tokens", "spells others"]
        notify(
            Notice(
                "Text of other scripts does not come back: this tokenizer cannot spell it in bytes."
            )
        )
        return ["same tokens"]


def _respelled(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer.batch_decode(tokenizer(texts).input_ids, skip_special_tokens=True)


def _in_pieces(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _TEXT_TOKENS] for start in range(0, len(items), _TEXT_TOKENS)]


def plan_tokens(architecture: Architecture, scripts: Sequence[str]) -> TokenCut:
    """Plan the cut that leaves the tokens of these scripts."""
    source = architecture.source
    skeleton = cast(Any, architecture.skeleton)
    count: int = skeleton.get_input_embeddings().weight.shape[0]
    data, normalize = read_tokenizer(architecture)
    added = {token["id"] for token in data["added_tokens"]}
    used = token_ids_in(source.raw_config, f"config.json of {source.id}")
    for name in SETTINGS:
        if holds_file(source.folder, name):
            used |= token_ids_in(read_json(source.folder / name), name)
    decoders = mappings_in(data.get("decoder"))
    in_bytes = any(decoder.get("type") == "ByteLevel" for decoder in decoders)
    texts = {}
    for token, number in tokens_in(data):
        if number not in added and number < count:
            texts[number] = text_of(token, in_bytes=in_bytes)
    vocabulary = choose_tokens(scripts, texts, added | used, count, normalize)
    tables = token_tables(architecture, vocabulary)
    return TokenCut(vocabulary, architecture.text_key, tables, cut_tokenizer(data, vocabulary))


def token_tables(architecture: Architecture, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the tensors in the weight files that have a row for each token.

    Builds the model with the new number of tokens, without weights, and compares the shapes.
    """
    _require_known_tables(architecture, vocabulary)
    skeleton = cast(Any, architecture.skeleton)
    cut = TokenCut(vocabulary, architecture.text_key)
    config = architecture.read_config(cut.settings(CONFIG, architecture.source.raw_config))
    shapes = tensor_shapes(skeleton)
    new_shapes = tensor_shapes(architecture.build(config))
    expected = {}
    for path, module in skeleton.named_modules():
        if module in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()):
            for name, parameter in module.named_parameters(recurse=False):
                expected[f"{path}.{name}"] = (len(vocabulary.tokens), *parameter.shape[1:])
    changed = {}
    for name, shape in shapes.items():
        if new_shapes.get(name) != shape:
            changed[name] = new_shapes.get(name)
    if changed != expected:
        other = min({*changed.items()} ^ {*expected.items()})[0]
        raise cannot_cut_tokens(architecture, f"{other} has an entry for each token, too")
    tables = _tables_in_files(architecture, {name: shapes[name] for name in expected})
    if architecture.numbering.extra or not tables:
        raise cannot_cut_tokens(
            architecture, "its weight files hold other tables by token than its config says"
        )
    return tables


def _require_known_tables(architecture: Architecture, vocabulary: Vocabulary) -> None:
    """Refuse a config that may mean further tables by token."""
    for config_part in mappings_in(architecture.config.to_dict()):
        for key, value in config_part.items():
            is_other_count = key == "vocab_size" and value != vocabulary.count
            if value and (is_other_count or _UNKNOWN_TABLES.fullmatch(str(key))):
                raise cannot_cut_tokens(
                    architecture, f"it may have further tables by token ({key} {value})"
                )


def _tables_in_files(
    architecture: Architecture, tables: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """Return the names of the tables in the files, which may differ from the model's.

    But any other tensor of such a shape outside the blocks is known by name.
    """
    skeleton = cast(Any, architecture.skeleton)
    block_of = architecture.names.block_of
    rest = {}
    for name, tensor in skeleton.state_dict().items():
        if name not in tables and block_of(name) is None:
            rest[name] = tensor
    others = {*rest, *revert_weight_conversion(skeleton, rest)}
    table_names = set()
    for stored in architecture.source.weights.stored:
        if stored.shape in tables.values() and block_of(stored.name) is None:
            in_base = f"{skeleton.base_model_prefix}.{stored.name}"
            if stored.name not in others and in_base not in others:
                table_names.add(stored.name)
    return frozenset(table_names)
