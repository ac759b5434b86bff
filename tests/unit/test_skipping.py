"""Block switches on real blocks: they skip, they pass states on, and they leave nothing behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import gpt2_config, llama_config, opt_config, random_model
from reference import plain_loss
from sleb_cli.engine.forward.logits import score_logits
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_plugins import MachineError, UnsupportedModelError
from sleb_plugins.errors import OutOfMemory
from sleb_plugins.metrics.nll import NegativeLogLikelihood

PATHS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


@pytest.fixture(params=[llama_config, opt_config, gpt2_config], ids=PATHS)
def model(request):
    config = request.param()
    model = random_model(config)
    return model, model.get_submodule(PATHS[config.model_type])


@pytest.fixture
def ids():
    return torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_skipping_equals_the_plain_reference(model, ids):
    model, blocks = model
    with SkippableModel(model, blocks) as skippable:
        for removed in (set(), {1}, {0, 3}, {len(blocks) - 1}):
            found = float(score_logits(NegativeLogLikelihood(), skippable.logits(ids, removed), ids).mean())
            skippable.skip(())
            assert found == pytest.approx(plain_loss(model, blocks, ids, removed), abs=1e-5)


@torch.inference_mode()
def test_a_pass_that_starts_at_a_block_is_bitwise_the_whole_pass(model, ids):
    model, blocks = model
    with SkippableModel(model, blocks) as skippable:
        for removed in ((), (2,)):
            whole = skippable.entering_states(ids, removed)
            assert set(whole) == set(range(len(blocks))) - set(removed)
            for block in whole:
                seen = {}
                skippable.run_with_hook(
                    ids, removed, lambda n, *states, at=seen: at.update({n: states[0]}), (block, whole[block])
                )
                assert list(seen) == [n for n in whole if n >= block]
                assert all(torch.equal(entering, whole[n]) for n, entering in seen.items())


@torch.inference_mode()
def test_the_head_gets_the_last_positions_in_one_piece(model, ids):
    """As a slice, they take bfloat16 on a CPU hundreds of times as long."""
    model, blocks = model
    seen = []
    with SkippableModel(model, blocks) as skippable:
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        skippable.logits(ids, (), last=2)
        skippable.calls(ids)
        skippable.logits(ids[:1], (), last=1)
        handle.remove()
    width = model.config.hidden_size
    assert [(len(states), states.stride()) for states in seen] == [
        (3, (2 * width, width, 1)),
        (3, (width, width, 1)),
        (1, (width, width, 1)),
    ]
    assert not model.lm_head._forward_pre_hooks


@torch.inference_mode()
def test_a_block_never_seen_running_can_be_skipped_at_once(model, ids):
    model, blocks = model
    with SkippableModel(model, blocks) as skippable:
        first = skippable.logits(ids, {1, 2})
        assert torch.equal(first, skippable.logits(ids, {1, 2}))


@torch.inference_mode()
def test_everything_is_put_back_after_an_error(model, ids):
    model, blocks = model
    before = model(ids).logits
    use_cache = model.config.use_cache
    with pytest.raises(ZeroDivisionError), SkippableModel(model, blocks) as skippable:
        skippable.skip({1})
        assert not model.config.use_cache
        raise ZeroDivisionError
    assert all("forward" not in vars(block) for block in blocks)
    assert model.config.use_cache == use_cache
    assert torch.equal(model(ids).logits, before)


@torch.inference_mode()
def test_a_forward_that_somebody_set_on_the_instance_is_called_and_put_back(ids):
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    block, calls = model.model.layers[1], []
    inner = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    outer = block.forward
    with SkippableModel(model, model.model.layers) as skippable:
        skippable.logits(ids, ())
    assert calls == [1]
    assert block.forward is outer


@torch.inference_mode()
def test_a_family_that_does_not_run_without_a_block_is_named(ids):
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()

    def needs_what_block_1_did(*args, **kwargs):
        raise ValueError("no top-k indices from a previous block")

    with SkippableModel(model, model.model.layers) as skippable:
        skippable.logits(ids, ())
        skippable.switches[2]._forward = needs_what_block_1_did
        with pytest.raises(UnsupportedModelError, match=r"llama does not run without blocks \[1\]: no top-k indices"):
            skippable.logits(ids, {1})


@torch.inference_mode()
def test_out_of_memory_is_said(ids):
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()

    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with SkippableModel(model, model.model.layers) as skippable:
        skippable.switches[0]._forward = too_large
        with pytest.raises(MachineError, match="3 sequences of 24 tokens do not fit into the memory of cpu"):
            skippable.logits(ids, ())


def fails(*states):
    raise ValueError("a bug of ours")


@torch.inference_mode()
def test_a_bug_of_a_listener_is_not_blamed_on_the_family(ids, monkeypatch):
    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    forward = model.model.forward

    def catches_everything(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("the family failed") from error

    monkeypatch.setattr(model.model, "forward", catches_everything)
    with SkippableModel(model, model.model.layers) as skippable:
        with pytest.raises(ValueError, match="a bug of ours") as raised:
            skippable.run_with_hook(ids, (), fails)
        assert raised.traceback[-1].name == "fails"
        assert raised.value.__cause__ is raised.value.__context__ is None
        skippable.switches[1]._forward = fails
        with pytest.raises(UnsupportedModelError, match="llama does not run: the family failed"):
            skippable.logits(ids, ())


@torch.inference_mode()
def test_a_listener_that_runs_out_of_memory_is_said_to(ids):
    def too_large(*states):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = AutoModelForCausalLM.from_config(llama_config(3)).eval()
    with SkippableModel(model, model.model.layers) as skippable, pytest.raises(OutOfMemory, match="do not fit"):
        skippable.run_with_hook(ids, (), too_large)
