import torch
from sleb_change import Change


def test_a_block_that_doubles_the_states_changes_them_by_one():
    states = torch.ones(1, 3, 8)
    assert Change().score_tokens(states, states * 2).tolist() == [[1.0, 1.0, 1.0]]
