"""A cut of another kind than blocks and tokens is written, proven and described by code that does not know it."""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import architecture_of, llama_config, save_model
from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.cut.protocol import Cut
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.output.apply import Output, apply_removals
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import ignore
from sleb_plugins import ProofError

WIDTH = 64


@dataclass(frozen=True)
class Neurons(Cut):
    """The cut of the second half of each feed-forward network."""

    what = "half of its neurons"
    tolerance = 1e-5  # sums over fewer zeros
    kept: range = range(WIDTH // 2)

    def settings(self, file, values):
        return values | {"intermediate_size": len(self.kept)} if file == CONFIG else values

    def tensor(self, name):
        found = re.search(r"mlp\.(down)?", name)
        return name, Slices(1 if found[1] else 0, WIDTH, self.kept) if found else None

    @contextmanager
    def absent(self, dense):
        mask = torch.tensor([float(neuron in range(WIDTH // 2)) for neuron in range(WIDTH)])
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask,))
            for block in dense.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture
def architecture(tmp_path):
    return architecture_of(save_model(tmp_path / "model", llama_config(4, intermediate_size=WIDTH)))


@pytest.mark.parametrize("removals", [(), (2,)])
def test_a_third_kind_of_cut_is_written_and_proven(architecture, tmp_path, removals):
    blocks = [BlockCut(architecture, removals)] if removals else []
    subject = Subject(Surgery(architecture, (*blocks, Neurons())), None)
    result = apply_removals(subject, Output(tmp_path / "out"), ignore)
    assert result.proof.checks[-3:] == ("same logits", "generates", "saves again")
    assert result.proof.logits_difference < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == [WIDTH // 2] * (4 - len(removals))
    without = "1 of its 4 blocks" if removals else "half of its neurons"
    assert f"# model without {without}" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_cut_fails_its_proof(architecture, tmp_path):
    surgery = Surgery(architecture, (Neurons(range(WIDTH // 2 - 1, WIDTH - 1)),))
    with pytest.raises(ProofError, match="its logits differ from those of the dense model by"):
        apply_removals(Subject(surgery, None), Output(tmp_path / "out"), ignore)
