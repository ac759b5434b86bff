"""Block switches on real blocks: they skip, they pass states on, and they leave nothing behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import gpt2_config, llama_config, opt_config, random_model
from reference import plain_loss
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_plugins import UnsupportedModelError
from sleb_plugins.errors import OutOfMemory
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PATHS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


@pytest.fixture(params=[llama_config, opt_config, gpt2_config], ids=PATHS)
def skippable(request):
    config = request.param()
    model = random_model(config)
    with torch.inference_mode():
        yield SkippableModel(model, model.get_submodule(PATHS[config.model_type]))


@pytest.fixture
def small():
    """A Llama of three blocks, which can be skipped."""
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    with torch.inference_mode(), SkippableModel(model, model.model.layers) as skippable:
        yield skippable


@pytest.fixture
def ids():
    return torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))


def test_skipping_equals_the_plain_reference(skippable, ids):
    blocks = [switch.block for switch in skippable.switches]
    with skippable:
        for removed in ({1, 2}, set(), {1}, {0, 3}, {len(blocks) - 1}):  # the first before any block has run
            logits = skippable.logits(ids, removed)
            assert torch.equal(logits, skippable.logits(ids, removed))
            found = float(score_logits(NegativeLogLikelihood(), logits, ids).mean())
            skippable.skip(())
            assert found == pytest.approx(plain_loss(skippable.model, blocks, ids, removed), abs=1e-5)


@pytest.mark.parametrize("removed", [(), (2,)])
def test_a_pass_that_starts_at_a_block_is_bitwise_the_whole(skippable, ids, removed):
    def entering(start=None):
        found = {}
        skippable.run_with_hook(ids, removed, lambda block, *states: found.update({block: states[0]}), start)
        return found

    with skippable:
        whole = entering()
        assert list(whole) == [block for block in range(len(skippable.switches)) if block not in removed]
        for start in whole.items():
            seen = entering(start)
            assert list(seen) == [block for block in whole if block >= start[0]]
            assert all(torch.equal(states, whole[block]) for block, states in seen.items())


def test_the_head_gets_the_last_positions_in_one_piece(skippable, ids):
    """As a slice, they take bfloat16 on a CPU hundreds of times as long."""
    head, seen = skippable.model.lm_head, []
    with skippable:
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        skippable.logits(ids, (), last=2)
        skippable.calls(ids)
        skippable.logits(ids[:1], (), last=1)
        handle.remove()
    width = skippable.model.config.hidden_size
    strides = [(2 * width, width, 1), (width, width, 1), (width, width, 1)]
    assert [(len(states), states.stride()) for states in seen] == list(zip([3, 3, 1], strides, strict=True))
    assert not head._forward_pre_hooks


def test_everything_is_put_back_after_an_error(skippable, ids):
    model = skippable.model
    before, use_cache = model(ids).logits, model.config.use_cache
    with pytest.raises(ZeroDivisionError), skippable:
        skippable.skip({1})
        assert not model.config.use_cache
        raise ZeroDivisionError
    assert all("forward" not in vars(switch.block) for switch in skippable.switches)
    assert model.config.use_cache == use_cache
    assert torch.equal(model(ids).logits, before)


def fails(*args, **kwargs):
    raise ValueError("no top-k indices")


def ends_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("forward", "error", "words"),
    [
        (fails, UnsupportedModelError, r"llama does not run without blocks \[1\]: no top-k indices"),
        (ends_memory, OutOfMemory, "3 sequences of 24 tokens do not fit into the memory of cpu"),
    ],
)
def test_what_a_block_raises_is_translated(small, ids, forward, error, words):
    small.logits(ids, ())
    small.switches[2]._forward = forward
    with pytest.raises(error, match=words):
        small.logits(ids, {1})


def test_an_error_of_a_hook_is_not_blamed_on_the_family(small, ids, monkeypatch):
    forward = small.model.model.forward

    def catches_everything(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("the family failed") from error

    monkeypatch.setattr(small.model.model, "forward", catches_everything)
    with pytest.raises(ValueError, match="no top-k indices") as raised:
        small.run_with_hook(ids, (), fails)
    assert raised.traceback[-1].name == "fails"
    assert raised.value.__cause__ is raised.value.__context__ is None
