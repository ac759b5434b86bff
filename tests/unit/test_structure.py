"""A removal that changes other blocks is seen without weights."""

import pytest
from torch import nn

from sleb_cli.engine.model.structure import block_changes, outer_changes, structure_of
from sleb_plugins.config_keys import Kept

KEPT = Kept((0, 2, 3), 4)


class Block(nn.Module):
    def __init__(self, number=0, width=4, **attributes):
        super().__init__()
        self.mlp = nn.Linear(width, width, device="meta")
        self.layer_idx = number
        vars(self).update(attributes)

    def forward(self, hidden):
        return self.mlp(hidden)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Block(2, lender_idx=3, count_of_layers=4), Block(1, lender_idx=2, count_of_layers=3), None),
        (Block(2, kinds=list("abcd")), Block(1, kinds=list("acd")), None),
        (Block(2, scale=1 / 3), Block(1, scale=1 - 2 / 3), None),
        (Block(4), Block(2), None),  # a block of two attentions counts these
        (Block(2, scale=0.5), Block(1, scale=0.25), "scale would be 0.25, not 0.5"),
        (Block(2, window=8), Block(1, window=None), "window would be None, not 8"),
        (Block(2, width=4), Block(1, width=8), "mlp.weight would be (8, 8), not (4, 4)"),
        (Block(2, residual_idx=6), Block(1, residual_idx=4), "residual_idx would be 4, not 6"),
        (Block(2), Block(1, cap=3), "cap would be 3, not absent"),
    ],
)
def test_a_block_keeps_all_but_its_number(before, after, said):
    changes = block_changes(structure_of(before), structure_of(after), 2, KEPT)
    assert (said in changes) if said else not changes


def test_outside_the_blocks_lists_may_shrink_and_parts_may_not():
    def outer(blocks, kinds, parts):
        model = nn.Module()
        model.layers = nn.ModuleList(Block(number) for number in range(blocks))
        model.norms = nn.ModuleList(nn.LayerNorm(4, device="meta") for _ in range(parts))
        model.num_layers, model.kinds = blocks, kinds
        return structure_of(model, without="layers")

    dense = outer(4, list("abcd"), 1)
    assert outer_changes(dense, outer(3, list("acd"), 1), KEPT) == []
    assert outer_changes(outer(4, ["full", "sliding"], 1), outer(3, ["sliding"], 1), KEPT) == []
    pattern = outer_changes(outer(4, list("aaba"), 1), outer(3, list("aab"), 1), KEPT)
    assert pattern == ["kinds would be ['a', 'a', 'b'], not ['a', 'a', 'b', 'a']"]
    assert "norms.1 would be absent, not LayerNorm" in outer_changes(outer(4, [], 2), outer(3, [], 1), KEPT)
