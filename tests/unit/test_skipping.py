"""Block switches and the forking forward on real blocks: they skip, bit for bit alike, and leave
nothing behind.
"""

from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from conftest import gpt2_config, llama_config, opt_config, random_model
from sleb_cli.engine.forward.fork import SizesWalk, Walk, walk_together
from sleb_cli.engine.forward.predictions import SharedPredictions
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.forward.states import States
from sleb_plugins import UnsupportedModelError
from sleb_plugins.errors import OutOfMemory


def bloom_config(blocks=5):
    """Its ALiBi tensor carries the batch size times the heads."""
    return BloomConfig(vocab_size=320, hidden_size=32, n_layer=blocks, n_head=4)


PATHS = {
    "llama": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
}


def blocks_of(model):
    return model.get_submodule(PATHS[model.config.model_type])


@pytest.fixture(scope="module", params=[llama_config, opt_config, gpt2_config, bloom_config])
def model(request):
    return random_model(request.param())


@pytest.fixture
def skippable(model):
    with torch.inference_mode(), SkippableModel(model, blocks_of(model)) as skippable:
        yield skippable


@pytest.fixture
def small():
    """A Llama of three blocks, which can be skipped."""
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    with torch.inference_mode():
        yield SkippableModel(model, model.model.layers)


@pytest.fixture
def ids():
    return torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))


def test_the_head_gets_the_last_positions_in_one_piece(skippable, ids):
    """As a slice, they take bfloat16 on a CPU hundreds of times as long."""
    seen = []
    hook = skippable.model.lm_head.register_forward_pre_hook(
        lambda module, args: seen.append((len(args[0]), args[0].stride()))
    )
    skippable.logits(ids, (), last=2)
    skippable.calls(ids)
    skippable.logits(ids[:1], (), last=1)
    hook.remove()
    assert seen == [(3, (64, 32, 1)), (3, (32, 32, 1)), (1, (32, 32, 1))]


def test_everything_is_put_back_after_an_error(small, ids):
    model = small.model
    before, use_cache = model(ids).logits, model.config.use_cache
    with pytest.raises(ZeroDivisionError), small:
        small.skip({1})
        assert not model.config.use_cache
        raise ZeroDivisionError
    assert model.config.use_cache == use_cache
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (ValueError("no ids"), UnsupportedModelError, r"does not run without blocks \[1\]: no ids"),
        (torch.OutOfMemoryError("CUDA"), OutOfMemory, "3 sequences of 24 tokens do not fit in"),
    ],
)
def test_an_error_in_a_block_becomes_a_sentence(small, ids, monkeypatch, cause, error, words):
    with small, pytest.raises(error, match=words):
        small.logits(ids, ())
        monkeypatch.setattr(small.switches[2], "forward", Mock(side_effect=cause))
        small.logits(ids, {1})


def test_a_model_that_calls_a_block_twice_is_refused(small, ids):
    layers = list(small.model.model.layers)[:2]
    small.model.model.layers = torch.nn.ModuleList([*layers, layers[0]])
    with (
        SkippableModel(small.model, layers) as skippable,
        pytest.raises(UnsupportedModelError, match=r"calls its blocks in the order \[0, 1, 0\]"),
    ):
        skippable.calls(ids)


@pytest.fixture
def ran(skippable, monkeypatch):
    """The blocks that run on their own, in order."""
    blocks = []
    run = skippable.run_block

    def counted(call, hidden):
        blocks.append(call.block)
        return run(call, hidden)

    monkeypatch.setattr(skippable, "run_block", counted)
    return blocks


def walk(skippable, ids, removed, candidates, states=None, **options):
    """Walk through all blocks; return the walk."""
    calls = skippable.calls(ids)
    found = Walk(skippable, calls, removed, states or States(), candidates, **options)
    walk_together(skippable, [found])
    return found


@pytest.mark.parametrize("removed", [(), (2,), (3, 1)])
@pytest.mark.parametrize("size", [9, 1, 2])
def test_each_branch_is_bitwise_the_model_without_its_block(skippable, ids, removed, size):
    states = States()
    candidates = [block for block in range(len(skippable.switches)) if block not in removed]
    for first in range(0, len(candidates), size):
        some = candidates[first : first + size]
        branches = walk(skippable, ids, removed, some, states).branches
        assert list(branches) == some
        for block, hidden in branches.items():
            expected = skippable.logits(ids, {*removed, block})
            assert torch.equal(skippable.head(hidden, ids), expected)


@pytest.mark.parametrize("size", [9, 2])
def test_a_walk_does_half_of_the_work_and_drops_the_base(skippable, ids, ran, size):
    count = len(skippable.switches)
    candidates = list(range(1, count - 1))
    states = States()
    told = 0
    progress = []
    for first in range(0, len(candidates), size):
        some = candidates[first : first + size]
        told += walk(skippable, ids, (), some, states, progress=progress.append).block_runs
    assert told == len(ran)
    assert sum(progress) == pytest.approx(len(candidates[::size]))
    # The base runs below the last candidate; the branch of each candidate, in all blocks above it.
    expected = list(range(candidates[-1]))
    for candidate in candidates:
        expected += range(candidate + 1, count)
    assert sorted(ran) == sorted(expected)


@pytest.mark.parametrize(
    ("first", "keep", "removed", "candidates", "counts"),
    [
        ([0, 1, 2, 3], {1: 9, 3: 9}, (3,), [0, 1, 2], [0, 0, 0, 0]),
        ([1, 2], {1: 9, 2: 9, 3: 9}, (), [0, 1, 2, 3], None),
        ([0, 1, 2, 3], {0: 1, 3: 2}, (), [0, 1, 2], [1, 1, 1, 3]),
        ([1, 2, 3], {2: 9}, (2,), [1, 3], None),
    ],
    ids=["all are known", "a new one", "some are known", "the removed one is the base"],
)
def test_kept_states_save_work_and_change_no_bit(
    skippable, ids, ran, first, keep, removed, candidates, counts
):
    states = States()
    walk(skippable, ids, (), first, states, keep=keep)
    for block in removed:
        states.after_removal(block)
    fresh = walk(skippable, ids, removed, candidates)
    ran.clear()
    found = walk(skippable, ids, removed, candidates, states)
    assert len(ran) == found.block_runs <= fresh.block_runs
    torch.testing.assert_close(found.branches, fresh.branches, rtol=0, atol=0)
    if counts:
        assert [ran.count(block) for block in range(4)] == counts


SIZES = [(), (3,), (3, 1), (0, 2)]


def test_sizes_share_a_branch_as_far_as_they_agree(skippable, ids, ran):
    found = SizesWalk(skippable, skippable.calls(ids), SIZES)
    walk_together(skippable, [found])
    assert [ran.count(block) for block in range(4)] == [1, 2, 2, 2]
    for size in SIZES:
        hidden = found.branches[frozenset(size)]
        assert torch.equal(skippable.head(hidden, ids), skippable.logits(ids, size))


@pytest.mark.parametrize(("memory", "batches"), [(10**6, 2), (1, 1), (0, 0)])
def test_sizes_in_turn_share_work_while_there_is_room(skippable, ids, ran, memory, batches):
    """Of two batches, as many are run once for all sizes as fit."""
    shared = SharedPredictions(skippable, SIZES, memory)
    for size in SIZES:
        for batch in (ids, ids[:1, :9]):
            assert torch.equal(shared.logits(batch, size), skippable.logits(batch, size))
    assert ran.count(0) == batches * 1 + (2 - batches) * 3
