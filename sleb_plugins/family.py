"""Where a model family keeps its blocks, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sleb_plugins.config_keys import KeyPruner


@dataclass(frozen=True)
class FamilyAdapter:
    """What `sleb` must know of a family of models to remove blocks from them.

    Attributes:
        name: how the family is called on screen and in plans.
        model_types: the values of `config.model_type` that this adapter claims.
        blocks_path: dotted path from the language model, as transformers loads it, to its list of blocks.
        count_key: the key of the config that holds the number of blocks.
        config_keys: what keys of the config say about blocks, where `sleb_plugins.layout.READINGS` does not know
            them or is wrong for this family: `{"window_by_depth": by_block}`.
        refusal: why no block of these models can be removed, as a clause that follows "because"; empty where
            blocks can.

    Raises:
        TypeError: an attribute is not of its type (a plain string of model types is the usual slip).
    """

    name: str
    model_types: frozenset[str]
    blocks_path: str = ""
    count_key: str = "num_hidden_layers"
    config_keys: Mapping[str, KeyPruner] = field(default_factory=dict)
    refusal: str = ""

    def __post_init__(self) -> None:
        model_types: object = self.model_types
        if isinstance(model_types, str):
            raise TypeError(f"model_types of family {self.name!r} is a string, where a set of strings belongs")
        if not (self.blocks_path or self.refusal):
            raise TypeError(f"family {self.name!r} says neither where its blocks are nor why none can go")
