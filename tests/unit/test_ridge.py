"""The ridge regressions at gaps, each part against a direct computation on real, tiny models."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch

from conftest import llama_config, random_model
from families import tiny_config
from sleb_cli.engine.files.fingerprint import Watch
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery import ridge
from sleb_cli.engine.recovery.ridge import Gap, Ridge
from sleb_cli.engine.recovery.saved_state import SavedState
from sleb_cli.engine.recovery.stage import Job
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.text.calibration import Calibration
from sleb_cli.events import ignore
from sleb_plugins import UnsupportedModelError

DOWN = "mlp.down_proj"


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


def job_of(skippable, removed, text, fitted, folder="", notify=ignore):
    """Fit to the first sequences of a text, and let the rest decide."""
    modules = dict(skippable.model.named_modules())
    (path,) = (
        name
        for name, module in modules.items()
        if module is modules[""].get_submodule(name)
        and isinstance(module, torch.nn.ModuleList)
        and module[0] is skippable.switches[0].block
    )
    count = len(skippable.switches)
    surgery = SimpleNamespace(
        removed=removed,
        kept=SimpleNamespace(blocks=[block for block in range(count) if block not in removed]),
        architecture=SimpleNamespace(block_count=count, adapter=SimpleNamespace(blocks_path=path)),
    )
    settings = SimpleNamespace(surgery=surgery, stored=skippable.model.dtype, on_host=False)
    texts = [Calibration(part, None, None, ()) for part in (text[:fitted], text[fitted:])]
    state = SavedState(Path(folder) / "out", {"dtype": "", "stored": ""}, Watch())
    return Job(settings, skippable, *texts, state, notify)


def recovered(skippable, removed, text, fitted, notify=ignore):
    with skippable, TemporaryDirectory() as folder:
        return Ridge().run(job_of(skippable, removed, text, fitted, folder, notify), {})


def divergence(skippable, removed, text, values=()):
    with skippable:
        comparison = DenseComparison(Variant(skippable), Calibration(text, None, None, ()))
        return comparison.losses(Variant(skippable, removed, dict(values))).divergence


@pytest.mark.parametrize(
    ("model_type", "names", "norm"),
    [
        ("llama", [DOWN], None),
        ("gpt2", ["mlp.c_proj"], None),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"], None),
        ("gemma2", [DOWN], "post_feedforward_layernorm"),
        ("glm4", [DOWN], "post_mlp_layernorm"),
        ("mixtral", ["self_attn.o_proj"], None),
        ("deepseek_v3", ["mlp.shared_experts.down_proj"], None),
        ("mamba", ["mixer.out_proj"], None),
    ],
)
def test_matrices_that_write_to_the_hidden_states_are_found(model_type, names, norm):
    text = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with skippable_model(model_type) as skippable:
        block = len(skippable.switches) - 2
        calls = [skippable.calls(text)[block]]
        states = [calls[0].entering]
        job = job_of(skippable, {block + 1}, text, 1)
        found = Gap(job, block, 1, calls, 1, states, states).find_matrices()
    assert [matrix.name for matrix in found] == names
    assert found[0].norm == norm
    if model_type != "mixtral":
        assert found[0].scale == pytest.approx(1, rel=0.01)


def test_a_fit_equals_a_direct_computation(monkeypatch):
    monkeypatch.setattr(ridge, "RIDGES", (0.3,))
    skippable = skippable_model("llama")
    model = skippable.model
    text = own_text(model, 30)
    values, record = recovered(skippable, {3, 4}, text, 24)
    (fit,) = record.fits
    assert (fit.block, fit.gap, fit.weights, fit.ridge) == (2, 2, (DOWN,), 0.3)
    name = f"model.layers.2.{DOWN}.weight"
    assert [*values] == [name]
    inputs = []
    down = model.model.layers[2].get_submodule(DOWN)
    hook = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    states = model(text, output_hidden_states=True).hidden_states
    hook.remove()
    wanted, leaving = (states[depth].double() for depth in (5, 3))
    weights = 1 / wanted[:24].square().mean(-1).reshape(-1, 1)
    x = inputs[0][:24].flatten(0, 1).double()
    products = x.T @ (weights * x)
    right = x.T @ (weights * (wanted - leaving)[:24].flatten(0, 1))
    change = torch.linalg.solve(products + 0.3 * torch.diag(products.diagonal()), right)
    torch.testing.assert_close(values[name], down.weight + change.T.float(), rtol=1e-3, atol=1e-3)
    # On the text that decides.
    weights = 1 / wanted[24:].square().mean(-1, keepdim=True)
    missing = (wanted - leaving)[24:]
    after = missing - inputs[0][24:].double() @ change
    left = (weights * after.square()).sum() / (weights * missing.square()).sum()
    assert fit.error_left == pytest.approx(left.item(), rel=1e-3)


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
    fitted, unseen = own_text(skippable.model, 60).split([50, 10])
    before = {name: parameter.clone() for name, parameter in skippable.model.named_parameters()}
    values, record = recovered(skippable, removed, fitted, 40)
    assert [fit.gap for fit in record.fits] == gaps
    plain = divergence(skippable, removed, unseen)
    assert divergence(skippable, removed, unseen, values) < 0.97 * plain
    for name, parameter in skippable.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not any(f".{gone}." in name for gone in removed for name in values)


def test_a_family_whose_blocks_do_not_run_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match="xlnet cannot be recovered"):
        recovered(skippable_model("xlnet"), {2}, torch.randint(2, 300, (6, 16)), 5)


def test_out_of_memory_takes_fewer_sequences(monkeypatch):
    skippable = skippable_model("llama")
    told = []
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
    said = [getattr(event, "text", "") for event in told]
    assert "Out of memory on cpu; fitting 8 sequences at a time." in said
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("worse", [5.0, float("inf")], ids=["worse", "an overflow"])
def test_a_fit_that_does_not_lower_the_error_is_not_kept(monkeypatch, worse):
    solve = ridge._solve
    monkeypatch.setattr(ridge, "_solve", lambda *sums: solve(*sums) * -worse)
    skippable = skippable_model("llama")
    values, record = recovered(skippable, {3}, own_text(skippable.model, 24), 20)
    assert values == {}
    assert record.fits[0].error_left == 1
