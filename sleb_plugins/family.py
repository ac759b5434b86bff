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
        for attribute in ("model_types", "per_block_keys"):
            if isinstance(getattr(self, attribute), str):
                raise TypeError(f"{attribute} of family {self.name!r} is a string, where a set of strings belongs")
