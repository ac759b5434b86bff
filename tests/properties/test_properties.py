"""What holds for every set of blocks in random tiny models: any data type and device, first and last block included."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import simulated_device
from conftest import save_model
from families import tiny_config
from sleb_cli.engine.forward.passes import prepare_passes
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.apply import apply_removals
from sleb_cli.engine.output.delivery import Delivery
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.events import ignore
from sleb_cli.plan import CalibrationRecord, LossesRecord, RecoveryRecord
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins.config_keys import kept_blocks
from sleb_plugins.metrics.nll import NegativeLogLikelihood

CPU = torch.device("cpu")
BLOCKS = 6
TYPES = ["llama", "opt", "gpt2", "gemma2", "gemma3_text", "qwen3", "phi", "mixtral"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LIMITS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

removals = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS - 1, unique=True).map(tuple)
families = st.sampled_from(TYPES)
dtypes = st.sampled_from(DTYPES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Architectures by family and data type, saved once each."""

    @cache
    def of(model_type: str, dtype: torch.dtype) -> Architecture:
        folder = save_model(tmp_path_factory.mktemp(model_type), tiny_config(model_type, dtype=dtype))
        AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
        return read_architecture(locate_model(str(folder), ignore), load_plugins(), ignore)

    return of


def tokens(seed: int, sequences: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(2, 300, (sequences, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, **LIMITS)
@given(model_type=families, dtype=dtypes, gone=removals, seed=st.integers(0, 99))
def test_skipped_shared_written_and_loaded_are_one_model(models, model_type, dtype, gone, seed):
    """Blocks switched off in memory, weights shared with the dense model, the files, and stock transformers agree."""
    architecture, ids = models(model_type, dtype), tokens(seed)
    surgery = plan_surgery(architecture, gone)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        apply_removals(Subject(surgery, None), Delivery(Path(folder) / "out", verify=False), ignore)
        dense = load_dense(architecture, dtype, CPU, ignore)
        with SkippableModel(dense, architecture.blocks_of(dense)) as skippable:
            skipped = skippable.logits(ids, gone)
        shared = load_pruned(surgery, dtype, CPU, ignore, dense=dense)
        read = load_pruned(surgery, dtype, CPU, ignore)
        written = AutoModelForCausalLM.from_pretrained(f"{folder}/out", dtype=dtype).eval()
        assert written.dtype is dtype
        for model in (shared, read, written):
            found = model(input_ids=ids, use_cache=False).logits
            tolerance = 0 if dtype is torch.float32 else 2.0**-6 * float(skipped.abs().max())
            torch.testing.assert_close(found, skipped, atol=tolerance, rtol=0)


@settings(max_examples=4, **LIMITS)
@given(
    model_type=st.sampled_from(["llama", "opt", "gemma2", "mixtral"]), dtype=dtypes, gone=removals,
    seed=st.integers(0, 99), float64=st.booleans(), device=st.sampled_from(["sim:0", "sim:1"]),
)  # fmt: skip
def test_every_device_has_the_cpus_numbers(models, model_type, dtype, gone, seed, float64, device):
    architecture, ids = models(model_type, dtype), tokens(seed)
    surgery = plan_surgery(architecture, gone)
    expected = all_about(surgery, dtype, CPU, ids)
    with simulated_device.simulate(simulated_device.Settings(float64=float64)):
        found = all_about(surgery, dtype, torch.device(device), ids)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def all_about(surgery: Surgery, dtype: torch.dtype, device: torch.device, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of the pruned model, its loss and divergence, and the scores of every candidate."""
    architecture = surgery.architecture
    dense = load_dense(architecture, dtype, device, ignore)
    pruned = load_pruned(surgery, dtype, device, ignore, dense=dense)
    ids = ids.to(device)
    with torch.inference_mode(), SkippableModel(dense, architecture.blocks_of(dense)) as skippable:
        passes, _ = prepare_passes(skippable, ids, ignore, memory=lambda device: 10**9)
        found = passes.score(NegativeLogLikelihood(), (), [(0, list(range(BLOCKS)))])
        scores = {block: scores for _, block, scores in found}
        compared = losses(Variant(skippable, surgery.removals), Variant(skippable), ids)
        logits = pruned(input_ids=ids, use_cache=False).logits.cpu()
    return [logits, torch.tensor(compared), torch.tensor([scores[block] for block in range(BLOCKS)])]


@settings(max_examples=10, **LIMITS)
@given(model_type=st.sampled_from(["llama", "opt", "gpt2", "gemma2", "phi"]), gone=removals, seed=st.integers(0, 99))
def test_recovered_is_never_worse_on_the_text_that_decides(models, model_type, gone, seed):
    architecture = models(model_type, torch.float32)
    model = load_dense(architecture, torch.float32, CPU, ignore)
    train, deciding = tokens(seed, 12), tokens(seed + 1, 4)
    with SkippableModel(model, architecture.blocks_of(model)) as skippable:
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        values, record = recover_in_closed_form(skippable, gone, train, deciding, ignore)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        pruned = losses(Variant(skippable, gone), Variant(skippable), deciding)
        recovered = losses(Variant(skippable, gone, values), Variant(skippable), deciding)
    assert recovered[1] <= pruned[1] * (1 + 1e-6)
    removed = {f"{architecture.adapter.blocks_path}.{block}." for block in gone}
    assert not [name for name in values if any(name.startswith(prefix) for prefix in removed)]
    if any(fit.kept for fit in record.fits):
        assert recovered[1] < pruned[1]


@settings(max_examples=200, **LIMITS)
@given(
    dense=st.floats(0, 10), lost=st.floats(-1, 10), back=st.floats(-5, 20),
    before=st.floats(0, 10), after=st.floats(0, 10),
)  # fmt: skip
def test_no_more_comes_back_than_was_lost(dense, lost, back, before, after):
    text = CalibrationRecord(source="self", seed=0, sequences=1, sequence_length=2, bos=False, tokens_sha256="")
    pruned = dense + lost
    record = RecoveryRecord(
        text=text, deciding_text=text, report_text=text, dense=LossesRecord(loss=dense, divergence=0),
        pruned=LossesRecord(loss=pruned, divergence=before),
        closed_form_losses=LossesRecord(loss=pruned - back, divergence=after),
    )  # fmt: skip
    assert record.nats_back is None or record.nats_back <= 1
    assert record.divergence_left >= 0
    assert record.summary


@settings(max_examples=100, **LIMITS)
@given(gone=removals)
def test_every_removal_renumbers_the_rest_in_order(gone):
    kept = kept_blocks(BLOCKS, gone)
    assert sorted({*kept.blocks, *gone}) == list(range(BLOCKS))
    assert list(kept.blocks) == sorted(kept.blocks)
    assert [kept.below(block) for block in kept.blocks] == list(range(len(kept.blocks)))
