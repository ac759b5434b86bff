"""A model family as data: where its blocks are, and what its config says about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sleb_plugins.config_keys import KeyPruner


@dataclass(frozen=True)
class FamilyAdapter:
    """What `sleb` needs to know about a model family to remove blocks from it.

    Attributes:
        name: the family's name on screen and in plans.
        model_types: the values of `config.model_type` that this adapter claims.
        blocks_path: the dotted path from the language model, as transformers loads it, to its list
            of blocks.
        count_key: the config key that holds the number of blocks.
        config_keys: how to prune config keys that `sleb_plugins.config_keys.KEY_PRUNERS` lacks, or
            prunes wrongly for this family: `{"window_by_depth": by_block}`.
        refusal: why no block of these models can be removed, as a clause that follows "because";
            empty if blocks can be removed.

    Raises:
        TypeError: an attribute is missing, or has another type.
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
            raise TypeError(
                f"model_types of family {self.name!r} is a string, not a set of strings"
            )
        if not isinstance(self.config_keys, Mapping):
            raise TypeError(
                f"config_keys of family {self.name!r} is no mapping from keys to functions"
            )
        if not (self.blocks_path or self.refusal):
            raise TypeError(f"family {self.name!r} needs a blocks_path or a refusal")
