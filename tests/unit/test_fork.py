"""The forking forward on real blocks: bit for bit one-at-a-time skipping, for half of the work."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from conftest import gpt2_config, llama_config, opt_config, random_model
from sleb_cli.engine.forward.fork import Walk, fork
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import BASE, States
from sleb_plugins import UnsupportedModelError


def bloom_config(blocks=5):
    """Its ALiBi tensor carries the batch size times the heads."""
    return BloomConfig(vocab_size=320, hidden_size=32, n_layer=blocks, n_head=4)


PATHS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h", "bloom": "transformer.h"}


@pytest.fixture(params=[llama_config, opt_config, gpt2_config, bloom_config], ids=PATHS)
def skippable(request):
    config = request.param()
    model = random_model(config)
    with torch.inference_mode(), SkippableModel(model, model.get_submodule(PATHS[config.model_type])) as skippable:
        yield skippable


@pytest.fixture
def ids():
    return torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))


def count_calls(skippable, monkeypatch):
    calls = Counter()
    run = skippable.run_block

    def counted(call, hidden):
        calls[call.block] += 1
        return run(call, hidden)

    monkeypatch.setattr(skippable, "run_block", counted)
    return calls


@pytest.mark.parametrize("removed", [(), (2,), (3, 1)])
@pytest.mark.parametrize("per_walk", [None, 1, 2])
def test_each_branch_is_bitwise_the_model_without_its_block(skippable, ids, removed, per_walk):
    candidates = [block for block in range(len(skippable.switches)) if block not in removed]
    found = list(fork(skippable, ids, removed, candidates, States(), per_walk=per_walk))
    assert [block for block, _ in found] == candidates
    for block, hidden in found:
        assert torch.equal(skippable.head(hidden, ids), skippable.logits(ids, {*removed, block}))


def test_without_the_last_block_that_is_left_nothing_runs(skippable, ids):
    others, told = [0, 1, 3, 4], []
    ((block, hidden),) = fork(skippable, ids, others, [2], States(), advanced=lambda done, of: told.append(done / of))
    assert (block, sum(told)) == (2, 1)
    assert torch.equal(skippable.head(hidden, ids), skippable.logits(ids, range(5)))


def test_without_candidates_it_is_the_model_as_it_stands(skippable, ids):
    ((branch, hidden),) = fork(skippable, ids, (1,), (), States())
    assert branch == BASE
    assert torch.equal(skippable.head(hidden, ids), skippable.logits(ids, {1}))


def test_a_slice_of_positions_has_the_logits_of_the_whole(skippable, ids):
    ((_, hidden),) = fork(skippable, ids, (), (), States())
    whole = skippable.logits(ids, ())
    parts = [skippable.head(hidden[:, part], ids[:, part]) for part in (slice(0, 5), slice(5, 24))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_walk", [None, 2])
def test_a_walk_does_half_of_the_work_and_drops_the_base(skippable, ids, monkeypatch, per_walk):
    count = len(skippable.switches)
    calls = count_calls(skippable, monkeypatch)
    told = []
    candidates = list(range(1, count - 1))
    finals = fork(
        skippable, ids, (), candidates, States(), per_walk=per_walk, advanced=lambda done, of: told.append(done)
    )
    assert [block for block, _ in finals] == candidates
    # Above the last candidate only the candidates' branches continue; below it, so does the base.
    below = {block: 1 + sum(other < block for other in candidates) for block in range(count - 2)}
    above = {count - 2: len(candidates) - 1, count - 1: len(candidates)}
    assert calls == below | above
    assert sum(told) == sum(calls.values())


def test_the_walk_knows_its_work_beforehand(skippable, ids, monkeypatch):
    states = States()
    list(fork(skippable, ids, (), [1, 2, 3], states, keep={2: 9}))
    states.after_removal(2)
    for candidates in ([1, 3], [3], [1], []):
        walk = Walk(skippable, skippable.calls(ids), states, (2,), candidates)
        expected = walk.block_branches
        calls = count_calls(skippable, monkeypatch)
        for block in range(walk.start, len(skippable.switches)):
            walk.advance(block)
        assert sum(calls.values()) == expected


def test_what_a_step_knows_saves_the_next_one_work_and_changes_no_bit(skippable, ids, monkeypatch):
    states = States()
    candidates = list(range(len(skippable.switches)))
    list(fork(skippable, ids, (), candidates, states, keep={1: 9, 3: 9}))
    states.after_removal(3)
    candidates.remove(3)
    fresh = dict(fork(skippable, ids, (3,), candidates, States()))
    calls = count_calls(skippable, monkeypatch)
    found = dict(fork(skippable, ids, (3,), candidates, states))
    assert list(found) == list(fresh) == candidates
    assert all(torch.equal(found[block], fresh[block]) for block in candidates)
    assert all(calls[block] == 0 for block in range(4))


def test_a_candidate_that_is_not_known_forks_off_where_the_base_is(skippable, ids):
    states = States()
    list(fork(skippable, ids, (), [1, 2], states, keep={1: 9, 2: 9, 3: 9}))
    fresh = dict(fork(skippable, ids, (), [0, 1, 2, 3], States()))
    found = dict(fork(skippable, ids, (), [0, 1, 2, 3], states))
    assert list(found) == list(fresh) == [0, 1, 2, 3]
    assert all(torch.equal(found[block], fresh[block]) for block in fresh)


def test_a_part_of_the_branches_may_be_known(skippable, ids, monkeypatch):
    states = States()
    list(fork(skippable, ids, (), [0, 1, 2, 3], states, keep={0: 1, 3: 2}))
    assert set(states.at[3]) == {BASE, 0}
    fresh = dict(fork(skippable, ids, (), [0, 1, 2], States()))
    calls = count_calls(skippable, monkeypatch)
    found = dict(fork(skippable, ids, (), [0, 1, 2], states))
    assert list(found) == list(fresh) == [0, 1, 2]
    assert all(torch.equal(found[block], fresh[block]) for block in fresh)
    assert [calls[block] for block in range(4)] == [1, 1, 1, 3]


def test_blocks_may_be_the_outer_loop(skippable):
    batches = [torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    walks = [Walk(skippable, skippable.calls(ids), States(), (1,), [0, 2, 3]) for ids in batches]
    for block in range(len(skippable.switches)):
        for walk in walks:
            walk.advance(block)
    for walk, ids in zip(walks, batches, strict=True):
        alone = dict(fork(skippable, ids, (1,), [0, 2, 3], States()))
        assert list(alone) == [0, 2, 3]
        assert all(torch.equal(walk.branches[block], hidden) for block, hidden in alone.items())


def test_hidden_states_may_lie_anywhere_in_between(skippable, ids):
    """Branches are plain tensors in a dictionary, which may be moved elsewhere and back."""
    walk = Walk(skippable, skippable.calls(ids), States(), (), [1, 2])
    for block in range(len(skippable.switches)):
        walk.advance(block)
        walk.branches = {branch: torch.from_numpy(hidden.numpy().copy()) for branch, hidden in walk.branches.items()}
    in_place = dict(fork(skippable, ids, (), [1, 2], States()))
    assert list(in_place) == [1, 2]
    assert all(torch.equal(walk.branches[block], hidden) for block, hidden in in_place.items())


def test_a_model_that_calls_a_block_twice_is_refused(ids):
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    twice = [model.model.layers[0], model.model.layers[1], model.model.layers[0]]
    model.model.layers = torch.nn.ModuleList(twice)
    with (
        torch.inference_mode(),
        SkippableModel(model, list(model.model.layers)[:2]) as skippable,
        pytest.raises(UnsupportedModelError, match=r"calls its blocks in the order \[0, 1, 0\]"),
    ):
        skippable.calls(ids)
