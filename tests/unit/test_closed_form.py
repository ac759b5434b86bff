"""Recovery in closed form, each part against a direct computation on real, tiny models."""

import math
from contextlib import nullcontext
from itertools import chain, pairwise, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from conftest import llama_config, random_model
from families import tiny_config
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery import block_regression, least_squares
from sleb_cli.engine.recovery.block_regression import RIDGES
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.depth import PROBED_TOKENS, Judge
from sleb_cli.engine.recovery.least_squares import Ridge, best_ridge
from sleb_cli.engine.recovery.residual_projections import captured, find_residual_projections
from sleb_cli.engine.recovery.saved_state import SavedState
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import ignore
from sleb_plugins import MachineError, UnsupportedModelError

DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"


def skippable_model(model_type):
    model = random_model(llama_config() if model_type == "llama" else tiny_config(model_type))
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return SkippableModel(model.requires_grad_(False), blocks)


def own_text(model, sequences):
    """Text of the model's own, so that the dense model's loss on it is about the least there is."""
    torch.manual_seed(0)
    start = torch.randint(2, 300, (sequences, 1))
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=31,
        min_new_tokens=31,
        pad_token_id=1,
    )


def recovered(skippable, removed, text, fitted, notify=ignore):
    """Fit to the first sequences of a text, and let the rest decide."""
    kept = SimpleNamespace(
        blocks=[block for block in range(len(skippable.switches)) if block not in removed]
    )
    surgery = SimpleNamespace(removed=removed, kept=kept)
    decided = SimpleNamespace(surgery=surgery, stored=skippable.model.dtype, on_host=False)
    texts = [Calibration(part, None, None, ()) for part in (text[:fitted], text[fitted:])]
    with skippable, TemporaryDirectory() as folder:
        state = SavedState(Path(folder) / "out", {"dtype": "", "stored": ""}, Watch())
        return recover_in_closed_form(Job(decided, skippable, *texts, state, notify))


def divergence(skippable, removed, text, values=()):
    with skippable:
        comparison = DenseComparison(Variant(skippable), Calibration(text, None, None, ()))
        return comparison.losses(Variant(skippable, removed, dict(values))).divergence


def summed(rows, *bounds, rounded=False):
    sums = Ridge(rows[0].shape[1], rows[1].shape[1], rounded=rounded)
    for start, end in pairwise(bounds):
        sums.add(*(part[start:end] for part in rows))
    return sums


@pytest.mark.parametrize(
    ("outputs", "rounded", "near"), [(7, False, 1e-6), (100, False, 1e-6), (100, True, 1e-2)]
)
def test_the_best_ridge_solves_the_normal_equations(monkeypatch, outputs, rounded, near):
    monkeypatch.setattr(least_squares, "PANEL_COLUMNS", 3)
    generator = torch.Generator().manual_seed(0)
    x, noise = (
        torch.randn(90, 7, generator=generator),
        torch.randn(90, outputs, generator=generator),
    )
    y, weights = (
        0.3 * x @ torch.randn(7, outputs, generator=generator) + noise,
        torch.rand(90, generator=generator),
    )
    x[:, 1] = 0
    w = weights.double()[:, None]

    def direct(ridge):
        # The penalty as rows: feature i alone, sqrt(ridge x its sum of squares), and nothing to
        # explain.
        scale = (w[:60] * x[:60].double().square()).sum(0)
        features = torch.cat([x[:60].double() * w[:60].sqrt(), torch.diag((ridge * scale).sqrt())])
        targets = torch.cat(
            [y[:60].double() * w[:60].sqrt(), torch.zeros(7, outputs, dtype=torch.float64)]
        )
        # What is always zero gets no coefficient.
        solution = torch.linalg.lstsq(features, targets, driver="gelsd").solution
        return (
            float((w[60:] * (y[60:].double() - x[60:].double() @ solution).square()).sum()),
            ridge,
            solution,
        )

    parts = (
        summed((x, y, weights), *bounds, rounded=rounded)
        for bounds in ((0, 50, 51, 60), (60, 70, 90))
    )
    found = best_ridge(*parts, RIDGES)
    expected, best, solution = min(map(direct, RIDGES))
    assert (found.ridge, found.error) == (best, pytest.approx(expected, rel=10 * near))
    torch.testing.assert_close(found.coefficients, solution, rtol=10 * near, atol=near)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize(
    ("model_type", "near", "exact", "kind", "norms"),
    [
        ("llama", [OUT], [DOWN], "matrix", []),
        ("gpt2", ["attn.c_proj"], ["mlp.c_proj"], "transposed", []),
        ("gpt_neox", [], ["attention.dense", "mlp.dense_4h_to_h"], "matrix", []),
        (
            "gemma2",
            [OUT],
            [DOWN],
            "matrix",
            ["post_attention_layernorm", "post_feedforward_layernorm"],
        ),
        ("glm4", [OUT], [DOWN], "matrix", ["post_self_attn_layernorm", "post_mlp_layernorm"]),
        ("mixtral", [OUT], [], "matrix", []),
        ("deepseek_v3", [], ["mlp.shared_experts.down_proj"], "matrix", []),
        ("mamba", [], ["mixer.out_proj"], "matrix", []),
    ],
)
@torch.inference_mode()
def test_weights_that_write_to_the_hidden_states_are_found(model_type, near, exact, kind, norms):
    with skippable_model(model_type) as skippable:
        call = skippable.calls(
            torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))
        )[-2]
        found = find_residual_projections(skippable, call, call.entering)
    assert [each.name for each in found if not each.exact] == near
    assert [each.name for each in found if each.exact] == exact
    assert all(
        each.kind == kind and each.scale == pytest.approx(1, rel=0.01)
        for each in found
        if each.exact
    )
    assert [each.norm.name for each in found if each.norm] == norms


def test_the_fits_equal_a_direct_computation(monkeypatch):
    # One ridge, and whatever is fitted is taken for a gain.
    monkeypatch.setattr(block_regression, "RIDGES", (0.3,))
    falling, rounds = iter(range(100, 0, -1)), []
    monkeypatch.setattr(
        least_squares, "bfloat16_products", lambda on: rounds.append(on) or nullcontext()
    )
    monkeypatch.setattr(
        Judge, "divergence", lambda self, pruned, block, values: float(next(falling))
    )
    skippable = skippable_model("llama")
    model, text = skippable.model, own_text(skippable.model, 30)
    block, norm = model.model.layers[2], model.model.norm
    values, record = recovered(skippable, {3, 4}, text, 24)
    assert [(fit.weights, fit.gap, fit.kept) for fit in record.fits[:2]] == [
        ((OUT, DOWN), gap, True) for gap in (2, 0)
    ]
    final, fitted, text = record.fits[-1], values.pop("model.norm.weight"), text[:24]
    assert (final.block, final.weights, final.kept) == (None, ("model.norm",), True)
    assert {*rounds} == {False}  # a model in float32 is fitted in float32
    with skippable, torch.inference_mode():
        variants = Variant(skippable), Variant(skippable, {3, 4}, values)
        wanted, found = (
            norm(variant.final_states(text)).flatten(0, 1).double() for variant in variants
        )
        x = found / norm.weight
        gains = norm.weight + (x * (wanted - found)).sum(0) / ((x * x).sum(0) * 1.3)
        probed = text[: PROBED_TOKENS // text.shape[1]]
        calls, entered = skippable.calls(probed), {}
        skippable.run_with_hook(
            probed, (), lambda block, entering, leaving: entered.update({block: entering})
        )
        projections = find_residual_projections(skippable, calls[2], entered[2])
    torch.testing.assert_close(fitted.double(), gains, rtol=1e-3, atol=1e-4)
    scales = {each.name: each.scale for each in projections} | {DOWN: 1}
    wanted = model(text, output_hidden_states=True).hidden_states[5].flatten(0, 1).double()
    weights = 1 / wanted.square().mean(-1, keepdim=True)
    # Both together, then the one that makes up for how it responds to the other.
    for names in ((DOWN, OUT), (DOWN,)):
        with captured(block, names) as (entering, _):
            leaving = model(text, output_hidden_states=True).hidden_states[3].flatten(0, 1).double()
        x = torch.cat(
            [entering[name].flatten(0, 1).double() * scales[name] for name in names], dim=1
        )
        products, right = x.T @ (weights * x), x.T @ (weights * (wanted - leaving))
        change = torch.linalg.solve(products + 0.3 * torch.diag(products.diagonal()), right).T
        for name, part in zip(
            names, change.split([entering[name].shape[-1] for name in names], dim=1), strict=True
        ):
            block.get_submodule(name).weight.data += part.float()
    for name in (OUT, DOWN):
        torch.testing.assert_close(
            values[f"model.layers.2.{name}.weight"],
            block.get_submodule(name).weight,
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize(
    ("model_type", "removed", "gaps"),
    [
        ("llama", {2, 3}, [2]),
        ("glm4", {2, 3}, [2]),
        ("llama", {0}, [1]),
        ("llama", {0, 1, 4, 5}, [2, 2]),
    ],
)
def test_the_divergence_falls_wherever_blocks_are_removed(model_type, removed, gaps):
    skippable = skippable_model(model_type)
    fitted, validation, unseen = own_text(skippable.model, 60).split([40, 10, 10])
    before = {name: parameter.clone() for name, parameter in skippable.model.named_parameters()}
    values, record = recovered(skippable, removed, torch.cat([fitted, validation]), 40)
    assert (
        sorted(fit.gap for fit in {fit.block: fit for fit in record.fits if fit.gap}.values())
        == gaps
    )
    told = min(fit.divergence for fit in record.fits if fit.kept)
    assert divergence(skippable, removed, validation, values) == pytest.approx(told, rel=1e-4)
    assert divergence(skippable, removed, unseen, values) < 0.97 * divergence(
        skippable, removed, unseen
    )
    assert all(
        torch.equal(parameter, before[name])
        for name, parameter in skippable.model.named_parameters()
    )
    assert not any(f".{gone}." in name for gone in removed for name in values)


def test_a_family_whose_blocks_do_not_run_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match="xlnet cannot be recovered"):
        recovered(skippable_model("xlnet"), {2}, torch.randint(2, 300, (6, 16)), 5)


def test_out_of_memory_takes_fewer_sequences(monkeypatch):
    skippable, told = skippable_model("llama"), []
    text = own_text(skippable.model, 30)
    expected, _ = recovered(skippable, {3}, text, 20)
    forward = skippable.switches[2].forward

    def short_of_memory(hidden, *args, **kwargs):
        if len(hidden) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(skippable.switches[2], "forward", short_of_memory)
        found, _ = recovered(skippable, {3}, text, 20, told.append)
    assert "Out of memory on cpu; fitting 8 sequences at a time." in [
        getattr(event, "text", "") for event in told
    ]
    # Projections are told from others by noise on the first batch, so the fits are alike, not the
    # same.
    ours, theirs = (divergence(skippable, {3}, text[20:], values) for values in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_sums_that_do_not_fit_are_named_and_nothing_is_retried(monkeypatch):
    monkeypatch.setattr(
        Ridge, "solve", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    )
    skippable, told = skippable_model("llama"), []
    needed = r"Fitting mlp.down_proj and self_attn.o_proj needs about \S+ kB of memory"
    with pytest.raises(MachineError, match=needed) as error:
        recovered(skippable, {3}, own_text(skippable.model, 12), 10, told.append)
    assert "--recover" in error.value.hint
    assert not [event for event in told if hasattr(event, "text")]


@pytest.mark.parametrize("later", [1.0, math.nan], ids=["no lower", "an overflow"])
def test_a_fit_that_does_not_lower_the_divergence_is_not_kept(monkeypatch, later):
    skippable, found = skippable_model("llama"), chain([1.0], repeat(later))
    monkeypatch.setattr(Judge, "divergence", lambda self, pruned, block, values: next(found))
    shapes, head = [], skippable.model.lm_head
    head.register_forward_hook(lambda module, entering, logits: shapes.append(logits.shape))
    values, record = recovered(skippable, {3}, own_text(skippable.model, 24), 20)
    assert (values, [fit for fit in record.fits if fit.kept]) == ({}, [])
    assert bool(record.fits) == (later == 1.0)
    # No logits of a whole batch are made to find the last norm.
    assert max(shape[0] * shape[1] for shape in shapes if len(shape) == 3) <= 256
