"""Where a model family keeps its blocks, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyAdapter:
    """What `sleb` must know of a family of models to remove blocks from them.

    Attributes:
        name: how the family is called on screen and in plans.
        model_types: the values of `config.model_type` that this adapter claims.
        blocks_path: dotted path from the causal language model to its list of blocks.
        count_key: the key of `config.json` that holds the number of blocks.
        per_block_keys: keys of the config that, where present, hold a list with one value per block.

    Raises:
        TypeError: an attribute is not of its type (a plain string of model types is the usual slip).
    """

    name: str
    model_types: frozenset[str]
    blocks_path: str
    count_key: str = "num_hidden_layers"
    per_block_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.model_types, str) or not all(isinstance(t, str) for t in self.model_types):
            raise TypeError(f"model_types of family {self.name!r} must be a set of strings")
        if isinstance(self.per_block_keys, str):
            raise TypeError(f"per_block_keys of family {self.name!r} must be a tuple of strings")
        object.__setattr__(self, "model_types", frozenset(self.model_types))
        object.__setattr__(self, "per_block_keys", tuple(self.per_block_keys))
