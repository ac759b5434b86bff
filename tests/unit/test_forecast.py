"""How long work will take: the passes that are counted, and the sentence."""

from types import SimpleNamespace

import pytest
import torch

from sleb_cli.engine.forecast import Load, Pace, announce, padded_tokens, passes_by_size, walk_passes
from sleb_cli.engine.forward.fork import Walk
from sleb_cli.engine.forward.states import BASE, States


@pytest.mark.parametrize("count", [2, 7, 30])
@pytest.mark.parametrize("removed", [(), (3,), (1, 4)])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_the_passes_of_a_walk_are_counted(count, removed, start):
    blocks = [block for block in range(count) if block not in removed]
    candidates = blocks[1:-1] or blocks[:1]
    start = start if start <= candidates[-1] else 0
    states = States()
    if start:
        states.at[start] = {branch: None for branch in (BASE, *(block for block in candidates if block < start))}
    walk = Walk(None, [SimpleNamespace(entering=None)] * count, states, removed, candidates)
    assert walk_passes(blocks, candidates, start) == walk.block_branches


@pytest.mark.parametrize(
    ("together", "keeps", "passes"),
    [
        (True, False, [(3 + 3 + 2 + 1) / 3, (2 + 2 + 1) / 2]),  # the base and each candidate; then without block 3
        (True, True, [(3 + 3 + 2 + 1) / 3, (1 + 1) / 2]),
        (False, False, [4.0, 3.0]),
    ],
)
def test_a_step_begins_where_the_one_before_removed_a_block(together, keeps, passes):
    assert passes_by_size(range(5), [1, 2, 3], 2, together=together, keeps=keeps) == pytest.approx(passes)


def test_there_are_no_more_steps_than_candidates():
    assert len(passes_by_size(range(4), [1, 2], 9, together=True, keeps=True)) == 2


@pytest.mark.parametrize(
    ("lengths", "batch", "tokens"), [([3, 9, 5], 1, 17), ([3, 9, 5], 2, 2 * 9 + 3), ([3, 9, 5], 8, 27), ([], 4, 0)]
)
def test_batches_are_as_wide_as_their_longest_text(lengths, batch, tokens):
    assert padded_tokens(lengths, batch) == tokens


def test_blocks_are_read_while_others_compute():
    pace = Pace(block=2.0, head=10.0, read=7.0)
    assert pace.seconds(Load(3, 1)) == 16
    assert pace.seconds(Load(3, 1, 1), Load(1, 0, 1)) == 14 + 10


@pytest.mark.parametrize(
    ("seconds", "device", "said"),
    [
        (60, "cpu", []),
        (75, "cpu", ["Work: about 75 s on this CPU."]),
        (540, "cuda:1", ["Work: about 9 min on cuda:1."]),
    ],
)
def test_only_long_work_is_announced(seconds, device, said):
    events = []
    announce(events.append, "Work", seconds, torch.device(device))
    assert [event.text for event in events] == said
