"""Texts as sequences of tokens, padded to one length, as models that read take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PaddedTexts:
    """Texts as rows of tokens; it is indexed and moved like a tensor of its shape.

    Attributes:
        ids: the tokens, int64 [texts, positions].
        mask: 1 for the tokens of a text and 0 for padding, int64, of that shape.
        types: the number of the text in a pair that a token belongs to, int64, of that shape; None
            if the model does not ask.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, where: Any) -> PaddedTexts:
        """Take rows, or rows and positions."""
        return self._map(lambda tensor: tensor[where])

    @property
    def shape(self) -> torch.Size:
        """The number of texts, and of positions."""
        return self.ids.shape

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.ids.device

    def numel(self) -> int:
        """Return the number of positions of all texts."""
        return self.ids.numel()

    def to(self, device: torch.device) -> PaddedTexts:
        """Move the tokens to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def trimmed(self) -> PaddedTexts:
        """Leave out the positions where every text has padding."""
        used = self.mask.any(0).nonzero().flatten()
        return self[:, int(used[0]) : int(used[-1]) + 1]

    def split(self, size: int) -> list[PaddedTexts]:
        """Cut into batches of `size` texts, each as long as its longest text."""
        return [self[start : start + size].trimmed() for start in range(0, len(self), size)]

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a model's forward pass."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        if self.types is not None:
            inputs["token_type_ids"] = self.types
        return inputs

    def _map(self, change: Any) -> PaddedTexts:
        types = None if self.types is None else change(self.types)
        return PaddedTexts(change(self.ids), change(self.mask), types)


Tokens = Tensor | PaddedTexts
"""Sequences of tokens, int64 [sequences, positions], or texts of several lengths."""


def split(tokens: Tokens, size: int) -> Sequence[Any]:
    """Cut sequences into batches of `size`."""
    if isinstance(tokens, Tensor):
        return torch.split(tokens, size)
    return tokens.split(size)


def usual_length(tokens: Tokens) -> int:
    """Return the length of a sequence, or the mean length of texts."""
    if isinstance(tokens, Tensor):
        return tokens.shape[1]
    return max(1, int(tokens.mask.sum()) // len(tokens))


def ids_of(tokens: Tokens) -> Tensor:
    """Return the numbers of the tokens, [sequences, positions]."""
    return tokens if isinstance(tokens, Tensor) else tokens.ids


def join(rows: Sequence[Any]) -> Any:
    """Join sequences of one length."""
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))
    types = None
    if rows[0].types is not None:
        types = torch.cat([texts.types for texts in rows])
    ids = torch.cat([texts.ids for texts in rows])
    return PaddedTexts(ids, torch.cat([texts.mask for texts in rows]), types)
