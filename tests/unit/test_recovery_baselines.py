"""The recoveries that ours is compared with, each where its result is known."""

import pytest
import torch

from conftest import llama_config, random_model
from recovery_baselines import FittingText, Patch, final_states, fit_gaps, ghosted, hadamard, linear_patch, replace_me
from sleb_cli.engine.forward.skipping import SkippableModel

IDS = torch.randint(2, 300, (20, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


def fitting_text(skippable):
    return FittingText(skippable, IDS[:16], IDS[16:], batch=4)


def squares_left(skippable, removed, patch):
    wanted = final_states(skippable, (), Patch(), IDS)
    return float((final_states(skippable, removed, patch, IDS) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("size", [1, 2, 9, 12, 96, 576, 640])
def test_a_hadamard_matrix_is_orthogonal_and_of_equal_sizes(size):
    found = hadamard(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    if size != 9:  # there is none, so it is a rotation
        assert found.abs().unique().tolist() == pytest.approx([size**-0.5])


def test_any_matrix_gives_back_blocks_that_are_linear():
    model = random_model(llama_config())
    for block in (2, 3):
        own = torch.eye(32) + 0.1 * torch.randn(32, 32)
        model.model.layers[block].forward = lambda hidden, own=own, **others: hidden @ own
    with SkippableModel(model, model.model.layers) as skippable:
        assert squares_left(skippable, {2, 3}, Patch()) > 0.01
        assert squares_left(skippable, {2, 3}, fit_gaps(fitting_text(skippable), {2, 3}, ghosted)) < 1e-6


def test_linear_patch_gives_back_a_block_that_scales_channels():
    model = random_model(llama_config())
    rotation, scale = hadamard(32).float(), torch.linspace(0.5, 2, 32)
    model.model.layers[3].forward = lambda hidden, **others: (hidden @ rotation * scale) @ rotation.T
    with SkippableModel(model, model.model.layers) as skippable:
        patch = fit_gaps(fitting_text(skippable), {3}, linear_patch)
        assert squares_left(skippable, {3}, patch) < 1e-9
    torch.testing.assert_close(patch.added[2].coefficients, patch.added[2].coefficients.T)


def test_replace_me_is_least_squares_on_what_the_mlp_adds():
    model, seen = random_model(llama_config()), []
    block = model.model.layers[2]
    with SkippableModel(model, model.model.layers) as skippable:
        patch = fit_gaps(fitting_text(skippable), {3}, replace_me)
        handle = block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, 1)))
        states = model(IDS[:16], output_hidden_states=True).hidden_states
        handle.remove()
    after, wanted = states[3].flatten(0, 1), states[4].flatten(0, 1)
    transform = torch.linalg.lstsq(seen[0].double(), (wanted - (after - seen[0])).double()).solution
    expected = (transform.T @ block.mlp.down_proj.weight.double()).float()
    torch.testing.assert_close(patch.values["model.layers.2.mlp.down_proj.weight"], expected, rtol=1e-3, atol=1e-4)
