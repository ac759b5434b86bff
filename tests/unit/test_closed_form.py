"""Recovery in closed form, each part against a direct computation on real, tiny models."""

import pytest
import torch

from conftest import llama_config, random_model
from families import tiny_config
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery import closed_form
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.least_squares import PANEL_COLUMNS, Gains, Ridge, gram
from sleb_cli.engine.recovery.residual_projections import find_residual_projections, inputs_of
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_plugins import MachineError, UnsupportedModelError

BLOCKS = {
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "phi": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "mamba": "backbone.layers",
}


def skippable_model(model_type):
    model = random_model(llama_config() if model_type == "llama" else tiny_config(model_type))
    model.requires_grad_(False)
    return SkippableModel(model, model.get_submodule(BLOCKS.get(model_type, "model.layers")))


def own_text(model, sequences=24, length=32):
    """Text of the model's own, so that the dense model's loss on it is about the least there is."""
    torch.manual_seed(0)
    start = torch.randint(2, 300, (sequences, 1))
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=length - 1,
        min_new_tokens=length - 1, pad_token_id=1,
    )  # fmt: skip


def test_ridge_equals_solving_the_normal_equations_of_all_rows_at_once():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 7, generator=generator), torch.randn(200, 3, generator=generator)
    weights = torch.rand(200, generator=generator)
    sums = Ridge()
    for part in (slice(0, 50), slice(50, 51), slice(51, 200)):
        sums.add(x[part], y[part], weights[part])
    w = weights.double()[:, None]
    scale = (w * x.double().square()).sum(0)
    # The penalty as rows: feature i alone, sqrt(ridge x its sum of squares), and nothing to explain.
    rows = torch.cat([x.double() * w.sqrt(), torch.diag((0.3 * scale).sqrt())])
    targets = torch.cat([y.double() * w.sqrt(), torch.zeros(7, 3, dtype=torch.float64)])
    torch.testing.assert_close(sums.solve(0.3), torch.linalg.lstsq(rows, targets).solution, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Ridge, Gains])
def test_what_coefficients_leave_on_other_rows_equals_the_direct_sum(kind):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 4, generator=generator), torch.randn(90, 4, generator=generator)
    weights, fit, other = torch.rand(90, generator=generator), kind(), kind()
    fit.add(x[:60], y[:60], weights[:60])
    other.add(x[60:70], y[60:70], weights[60:70])
    other.add(x[70:], y[70:], weights[70:])
    found = fit.solve(0.1).float()
    there = x[60:] * found if kind is Gains else x[60:] @ found
    direct = (weights[60:, None] * (y[60:] - there).square()).sum()
    assert other.error(found.double()) == pytest.approx(float(direct), rel=1e-4)
    assert other.yy == pytest.approx(float((weights[60:, None] * y[60:].square()).sum()), rel=1e-4)


def test_a_feature_that_is_always_zero_gets_no_coefficient():
    sums = Ridge()
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    sums.add(x, x[:, :1] * 2, torch.ones(50))
    assert sums.solve(0.0).flatten().tolist() == pytest.approx([2, 0, 0], abs=1e-5)


def test_gains_are_the_ridge_of_each_channel_alone():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.randn(60, 4, generator=generator)
    weights, gains = torch.rand(60, generator=generator), Gains()
    gains.add(x[:20], y[:20], weights[:20])
    gains.add(x[20:], y[20:], weights[20:])
    for channel in range(4):
        alone = Ridge()
        alone.add(x[:, channel : channel + 1], y[:, channel : channel + 1], weights)
        assert float(gains.solve(0.5)[channel]) == pytest.approx(float(alone.solve(0.5)), rel=1e-4)


@pytest.mark.parametrize(
    ("model_type", "near", "exact", "kind"),
    [
        ("llama", ["self_attn.o_proj"], ["mlp.down_proj"], "matrix"),
        ("gpt2", ["attn.c_proj"], ["mlp.c_proj"], "transposed"),
        ("opt", ["self_attn.out_proj"], ["fc2"], "matrix"),
        ("gpt_neox", [], ["attention.dense", "mlp.dense_4h_to_h"], "matrix"),
        ("phi", [], ["self_attn.dense", "mlp.fc2"], "matrix"),
        ("gemma2", ["self_attn.o_proj"], ["mlp.down_proj"], "matrix"),
        ("olmo2", ["self_attn.o_proj"], ["mlp.down_proj"], "matrix"),
        ("glm4", ["self_attn.o_proj"], ["mlp.down_proj"], "matrix"),
        ("mixtral", ["self_attn.o_proj"], [], "matrix"),
        ("deepseek_v3", [], ["mlp.shared_experts.down_proj"], "matrix"),
        ("mamba", [], ["mixer.out_proj"], "matrix"),
    ],
)
@torch.inference_mode()
def test_the_weights_that_write_to_the_hidden_states_are_found(model_type, near, exact, kind):
    with skippable_model(model_type) as skippable:
        calls = skippable.calls(torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0)))
        found = find_residual_projections(skippable, calls[-2], calls[-2].entering)
    assert [(projection.name, projection.exact) for projection in found] == [
        *((name, False) for name in near),
        *((name, True) for name in exact),
    ]
    for projection in found[len(near) :]:
        assert (projection.kind, projection.exact, projection.scale) == (kind, True, pytest.approx(1, rel=0.01))
    norms = [projection.norm.name for projection in found if projection.norm]
    assert norms == NORMS_BEHIND.get(model_type, [])


NORMS_BEHIND = {
    "gemma2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "glm4": ["post_self_attn_layernorm", "post_mlp_layernorm"],
}


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2", "glm4", "gpt2"])
@torch.inference_mode()
def test_what_a_norm_does_to_a_projection_is_its_features_times_its_weights(model_type):
    with skippable_model(model_type) as skippable:
        calls = skippable.calls(torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0)))
        (*_, projection) = find_residual_projections(skippable, calls[-2], calls[-2].entering)
        leaving = []
        handle = (projection.norm or projection).module.register_forward_hook(
            lambda module, args, output: leaving.append(output)
        )
        with inputs_of(projection.modules) as entering:
            skippable.run_block(calls[-2], calls[-2].entering)
        handle.remove()
    weight = projection.module.weight.T if projection.kind == "matrix" else projection.module.weight
    product = projection.features(entering) @ weight
    if projection.norm:
        product = product * (projection.norm.module.weight + projection.norm.offset)
    else:
        product = product + projection.module.bias
    torch.testing.assert_close(product, leaving[0].flatten(0, -2), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_multiplier_behind_the_weights_is_part_of_what_they_write():
    model = random_model(tiny_config("granite", residual_multiplier=0.25))
    with SkippableModel(model, model.model.layers) as skippable:
        calls = skippable.calls(torch.randint(2, 300, (2, 16)))
        exact = find_residual_projections(skippable, calls[1], calls[1].entering)[-1]
    assert exact.scale == pytest.approx(0.25, rel=0.01)


def keep_every_fit(monkeypatch):
    """One ridge, and whatever is fitted is taken for a gain."""
    monkeypatch.setattr(closed_form, "RIDGES", (0.3,))
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(closed_form._ClosedFormFit, "_divergence", lambda self, block, values: float(next(falling)))


def test_the_fits_at_a_gap_equal_a_direct_computation(monkeypatch):
    keep_every_fit(monkeypatch)
    skippable = skippable_model("llama")
    model, text = skippable.model, own_text(skippable.model, 30)
    with skippable:
        values, record = recover_in_closed_form(skippable, {3, 4}, text[:24], text[24:], lambda event: None)
    both = ("self_attn.o_proj", "mlp.down_proj")
    assert [(fit.weights, fit.gap, fit.kept) for fit in record.fits[:2]] == [(both, 2, True), (both, 0, True)]
    wanted = model(text[:24], output_hidden_states=True).hidden_states[5].flatten(0, 1).double()
    weights = 1 / wanted.square().mean(-1, keepdim=True)
    block = model.model.layers[2]
    # Both together, then the one that makes up for how it responds to the other.
    for names in (("mlp.down_proj", "self_attn.o_proj"), ("mlp.down_proj",)):
        entering = []
        handles = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, at=entering: at.append((name, args[0]))
            )
            for name in names
        ]
        leaving = model(text[:24], output_hidden_states=True).hidden_states[3].flatten(0, 1).double()
        for handle in handles:
            handle.remove()
        scales = {"mlp.down_proj": 1.0, "self_attn.o_proj": scale_of(skippable, 2, text[:24], "self_attn.o_proj")}
        x = torch.cat([dict(entering)[name].flatten(0, 1).double() * scales[name] for name in names], dim=1)
        gram, right = x.T @ (weights * x), x.T @ (weights * (wanted - leaving))
        change = torch.linalg.solve(gram + 0.3 * torch.diag(gram.diagonal()), right).T
        for name, part in zip(
            names, change.split([dict(entering)[name].shape[-1] for name in names], dim=1), strict=True
        ):
            block.get_submodule(name).weight.data += part.float()
    for name in both:
        torch.testing.assert_close(
            values[f"model.layers.2.{name}.weight"], block.get_submodule(name).weight, rtol=1e-3, atol=1e-3
        )


@torch.inference_mode()
def test_the_gains_of_the_final_norm_equal_a_direct_computation(monkeypatch):
    keep_every_fit(monkeypatch)
    skippable = skippable_model("llama")
    model, text = skippable.model, own_text(skippable.model, 30)
    with skippable:
        values, record = recover_in_closed_form(skippable, {3, 4}, text[:24], text[24:], lambda event: None)
        final, fitted = record.fits[-1], values.pop("model.norm.weight")
        pruned = Variant(skippable, {3, 4}, values).final_states(text[:24])
        dense = Variant(skippable).final_states(text[:24])
    assert (final.block, final.weights, final.kept) == (None, ("model.norm",), True)
    weight = model.model.norm.weight
    wanted, found = (model.model.norm(states).flatten(0, 1).double() for states in (dense, pruned))
    x = found / weight
    change = (x * (wanted - found)).sum(0) / ((x * x).sum(0) * 1.3)
    torch.testing.assert_close(fitted.double(), weight + change, rtol=1e-3, atol=1e-4)


def scale_of(skippable, block, ids, name):
    with skippable, torch.inference_mode():
        calls = skippable.calls(ids)
        hidden = list(skippable.run_blocks(calls, calls[0].entering))[block]
        found = find_residual_projections(skippable, calls[block], hidden)
    return next(projection.scale for projection in found if projection.name == name)


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",
        "opt",
        "gpt_neox",
        "phi",
        "granite",
        "gemma2",
        "olmo2",
        "glm4",
        "mixtral",
        "deepseek_v3",
        "mamba",
        "bloom",
    ],
)
def test_the_divergence_falls_on_text_that_was_not_fitted(model_type):
    skippable = skippable_model(model_type)
    text = own_text(skippable.model, 60)
    before = {name: parameter.clone() for name, parameter in skippable.model.named_parameters()}
    with skippable:
        values, record = recover_in_closed_form(skippable, {2, 3}, text[:40], text[40:50], lambda event: None)
        pruned = losses(Variant(skippable, {2, 3}), Variant(skippable), text[40:50])
        recovered = losses(Variant(skippable, {2, 3}, values), Variant(skippable), text[40:50])
    assert recovered[1] == pytest.approx(min(fit.divergence for fit in record.fits if fit.kept), rel=1e-4)
    assert recovered[1] < pruned[1]
    assert all(torch.equal(parameter, before[name]) for name, parameter in skippable.model.named_parameters())
    assert not any(f"{BLOCKS.get(model_type, 'model.layers')}.{gone}." in name for gone in (2, 3) for name in values)
    assert {fit.gap for fit in record.fits} == {0, 2}


def test_a_fit_that_does_not_lower_the_divergence_is_not_kept(monkeypatch):
    skippable = skippable_model("llama")
    text = own_text(skippable.model, 24)
    monkeypatch.setattr(closed_form._ClosedFormFit, "_divergence", lambda self, block, values: 1.0)
    with skippable:
        values, record = recover_in_closed_form(skippable, {3}, text[:20], text[20:], lambda event: None)
    assert values == {}
    assert record.fits
    assert not any(fit.kept for fit in record.fits)


def test_a_family_whose_blocks_do_not_run_alone_is_refused():
    model = random_model(tiny_config("xlnet"))
    skippable = SkippableModel(model, model.transformer.layer)
    ids = torch.randint(2, 300, (6, 16))
    with skippable, pytest.raises(UnsupportedModelError, match="xlnet cannot be recovered"):
        recover_in_closed_form(skippable, {2}, ids[:5], ids[5:], lambda event: None)


@pytest.mark.parametrize("removed", [{0}, {0, 1}, {0, 3}, {4, 5}, {0, 1, 4, 5}])
def test_the_first_and_the_last_block_are_made_up_for_too(removed):
    skippable = skippable_model("llama")
    text = own_text(skippable.model, 60)
    with skippable:
        values, record = recover_in_closed_form(skippable, removed, text[:40], text[40:50], lambda event: None)
        pruned = losses(Variant(skippable, removed), Variant(skippable), text[50:])
        recovered = losses(Variant(skippable, removed, values), Variant(skippable), text[50:])
    assert sorted(fit.gap for fit in {fit.block: fit for fit in record.fits if fit.gap}.values()) == runs(removed)
    assert recovered[1] < 0.97 * pruned[1]


def runs(removed):
    """Return the lengths of the runs of removed blocks of six."""
    found = "".join("x" if block in removed else " " for block in range(6)).split()
    return sorted(map(len, found))


def test_out_of_memory_fewer_sequences_pass_at_once_and_the_fits_are_alike(monkeypatch):
    skippable = skippable_model("llama")
    text, told = own_text(skippable.model, 30), []
    with skippable:
        expected, _ = recover_in_closed_form(skippable, {3}, text[:20], text[20:], told.append)
        run = skippable.switches[2].run

        def short_of_memory(hidden, call):
            if len(hidden) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(hidden, call)

        monkeypatch.setattr(skippable.switches[2], "run", short_of_memory)
        found, _ = recover_in_closed_form(skippable, {3}, text[:20], text[20:], told.append)
        monkeypatch.undo()
        ours, theirs = (losses(Variant(skippable, {3}, v), Variant(skippable), text[20:]) for v in (found, expected))
    assert "Out of memory on cpu; fitting with 8 sequences at once." in [getattr(event, "text", "") for event in told]
    # Projections are told from others by noise on the first batch, so the fits are alike, not the same.
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("features", [1, PANEL_COLUMNS, 2 * PANEL_COLUMNS + 3])
def test_the_products_of_all_pairs_of_features_are_those_of_one_multiplication(features):
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(0))
    found = gram(x)
    torch.testing.assert_close(found, x.T @ x)
    assert torch.equal(found, found.T)


def test_sums_that_do_not_fit_are_named_and_nothing_smaller_is_tried(monkeypatch):
    def too_large(self, ridge):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Ridge, "solve", too_large)
    skippable = skippable_model("llama")
    text, told = own_text(skippable.model, 12), []
    with (
        skippable,
        pytest.raises(
            MachineError, match=r"fit of mlp.down_proj and self_attn.o_proj needs about \S+ kB of memory"
        ) as error,
    ):
        recover_in_closed_form(skippable, {3}, text[:10], text[10:], told.append)
    assert "--recover" in error.value.hint
    assert not [event for event in told if hasattr(event, "text")]
