"""The cut of the tokens of other scripts: which settings change, and which tensors lose rows?"""

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
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_cli.events import Notice, Notify
from sleb_cli.records import Check

_UNKNOWN_TABLES = re.compile(r".+(?<!type)_vocab_size|vocab_size_.+|.*codebook.*|ngram_size")
"""Config keys of further tables by token; `type_vocab_size` counts segments."""


_TEXT_TOKENS, _LOST_TEXTS = 32, 256
"""When a tokenizer is checked: the tokens of a text, and the number of texts of lost tokens."""


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
            new = {str(old): str(number) for old, number in self.vocabulary.new_number.items()}
            renumbered["added_tokens_decoder"] = {
                new[old]: token for old, token in added.items() if old in new
            }
        return renumbered

    def tensor(self, name: str) -> tuple[str, Slices | None]:
        """Return the name, and the rows that stay of a table."""
        return name, Slices(
            0, self.vocabulary.count, self.vocabulary.tokens
        ) if name in self.tables else None

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
    source, skeleton = architecture.source, cast(Any, architecture.skeleton)
    count: int = skeleton.get_input_embeddings().weight.shape[0]
    data, normalize = read_tokenizer(architecture)
    added = {token["id"] for token in data["added_tokens"]}
    used = token_ids_in(source.raw_config, f"config.json of {source.id}")
    for name in SETTINGS:
        if holds_file(source.folder, name):
            used |= token_ids_in(read_json(source.folder / name), name)
    in_bytes = any(
        decoder.get("type") == "ByteLevel" for decoder in mappings_in(data.get("decoder"))
    )
    plain = {
        number: token for token, number in tokens_in(data) if number not in added and number < count
    }
    texts = {number: text_of(token, in_bytes=in_bytes) for number, token in plain.items()}
    vocabulary = choose_tokens(scripts, texts, added | used, count, normalize)
    tables = token_tables(architecture, vocabulary)
    return TokenCut(vocabulary, architecture.text_key, tables, cut_tokenizer(data, vocabulary))


def token_tables(architecture: Architecture, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the tensors in the weight files that have a row for each token.

    Builds the model with the new number of tokens, without weights, and compares the shapes.
    """
    for config_part in mappings_in(architecture.config.to_dict()):
        for key, value in config_part.items():
            if value and (
                _UNKNOWN_TABLES.fullmatch(str(key))
                or (key == "vocab_size" and value != vocabulary.count)
            ):
                raise cannot_cut_tokens(
                    architecture, f"it may have further tables by token ({key} {value})"
                )
    skeleton, raw = cast(Any, architecture.skeleton), architecture.source.raw_config
    config = architecture.read_config(
        TokenCut(vocabulary, architecture.text_key).settings(CONFIG, raw)
    )
    shapes, new_shapes = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for model in (skeleton, architecture.build(config))
    )
    known = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    expected = {
        f"{path}.{name}": (len(vocabulary.tokens), *parameter.shape[1:])
        for path, module in skeleton.named_modules()
        if any(module is embeddings for embeddings in known)
        for name, parameter in module.named_parameters(recurse=False)
    }
    changed = {
        name: new_shapes.get(name)
        for name, shape in shapes.items()
        if new_shapes.get(name) != shape
    }
    if changed != expected:
        other = min({*changed.items()} ^ {*expected.items()})[0]
        raise cannot_cut_tokens(architecture, f"{other} has an entry for each token, too")
    tables = _tables_in_files(architecture, {name: shapes[name] for name in expected})
    if architecture.numbering.extra or not tables:
        raise cannot_cut_tokens(
            architecture, "its weight files hold other tables by token than its config says"
        )
    return tables


def _tables_in_files(
    architecture: Architecture, tables: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    skeleton, block_of = cast(Any, architecture.skeleton), architecture.names.block_of
    state = skeleton.state_dict().items()
    rest = {name: tensor for name, tensor in state if name not in tables and block_of(name) is None}
    others, base = (
        {*rest, *revert_weight_conversion(skeleton, rest)},
        f"{skeleton.base_model_prefix}.",
    )
    # Names may differ from the model's. But any other tensor of such a shape outside the blocks is
    # known by name.
    fitting = [
        tensor.name
        for tensor in architecture.source.weights.stored
        if tensor.shape in tables.values()
    ]
    outside = [name for name in fitting if block_of(name) is None]
    return frozenset(name for name in outside if others.isdisjoint((name, f"{base}{name}")))
