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

from conftest import save_model
from families import tiny_config
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.output.apply import apply_removals
from sleb_cli.engine.output.delivery import Delivery
from sleb_cli.engine.recovery.closed_form import recover_in_closed_form
from sleb_cli.engine.recovery.variant import Variant, losses
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins

CPU = torch.device("cpu")
BLOCKS = 6
TYPES = ["llama", "opt", "gpt2", "gemma2", "gemma3_text", "qwen3", "phi", "mixtral"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LIMITS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

removals = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS - 1, unique=True).map(tuple)


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
@given(model_type=st.sampled_from(TYPES), dtype=st.sampled_from(DTYPES), gone=removals, seed=st.integers(0, 99))
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
