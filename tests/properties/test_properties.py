"""What holds for every set of blocks in random tiny models: any data type, first and last block
included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import architecture_of, save_model
from families import tiny_config
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.output.checkpoint import Output, apply_removals
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore

BLOCKS = 6


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    model_type=st.sampled_from("llama opt gpt2 gemma2 gemma3_text qwen3 phi mixtral".split()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    gone=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS - 1, unique=True),
    seed=st.integers(0, 99),
)
def test_skipped_shared_written_and_loaded_are_one_model(model_type, dtype, gone, seed):
    """Blocks switched off in memory, weights shared with the dense model, the files, and stock
    transformers agree.
    """
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 300, (2, 16), generator=random)
    place = Placement(torch.device("cpu"), dtype)
    with tempfile.TemporaryDirectory() as home, torch.inference_mode():
        folder = Path(home) / "dense"
        output = Path(home) / "out"
        save_model(folder, tiny_config(model_type, dtype=dtype))
        AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
        architecture = architecture_of(folder)
        surgery = plan_surgery(architecture, tuple(gone))
        apply_removals(Subject(surgery, None), Output(output, verify=False), ignore)
        dense = open_model(architecture, place, ignore).model
        with SkippableModel(dense, architecture.blocks_of(dense)) as skippable:
            skipped = skippable.logits(ids, gone)
        shared = load_pruned(surgery, place, ignore, dense=dense)
        read = load_pruned(surgery, place, ignore)
        written = AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval()
        assert written.dtype is dtype
        for model in (shared, read, written):
            found = model(input_ids=ids, use_cache=False).logits
            tolerance = 0 if dtype is torch.float32 else 2.0**-6 * float(skipped.abs().max())
            torch.testing.assert_close(found, skipped, atol=tolerance, rtol=0)
