"""A cut of another kind than blocks and tokens is written, proven and described by code that does
not know it.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import architecture_of, llama_config, save_model
from gguf_models import convert_llama
from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.cut.blocks.gguf_blocks import GgufBlockCut
from sleb_cli.engine.cut.protocol import Cut, GgufCut
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.output.apply_gguf import prune_gguf
from sleb_cli.engine.output.checkpoint import Output, apply_removals
from sleb_cli.engine.surgery.gguf_surgery import GgufSurgery
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import ProofError

WIDTH = 64


@dataclass(frozen=True)
class Neurons(Cut):
    """The cut of the second half of each feed-forward network."""

    description = "half of its neurons"
    tolerance = 1e-5  # sums over fewer zeros
    kept: range = range(WIDTH // 2)

    def settings(self, file, values):
        return values | {"intermediate_size": len(self.kept)} if file == CONFIG else values

    def tensor(self, name):
        if ".mlp." not in name:
            return name, None
        axis = 1 if "down" in name else 0
        return name, Slices(axis, WIDTH, self.kept)

    @contextmanager
    def simulate(self, dense):
        mask = (torch.arange(WIDTH) < WIDTH // 2).float()
        hooks = []
        for block in dense.model.layers:
            hook = block.mlp.down_proj.register_forward_pre_hook(lambda _, given: given[0] * mask)
            hooks.append(hook)
        yield
        for hook in hooks:
            hook.remove()


class Head(Cut):
    """The cut of a head of its own: the model computes with the embeddings in its place."""

    description = "its head"

    def settings(self, file, values):
        return values | {"tie_word_embeddings": True} if file == CONFIG else values

    def tensor(self, name):
        return None if name == "lm_head.weight" else (name, None)

    @contextmanager
    def simulate(self, dense):
        own = dense.lm_head.weight
        dense.lm_head.weight = dense.model.embed_tokens.weight
        yield
        dense.lm_head.weight = own


class GgufHead(GgufCut):
    def header(self, file):
        kept = [tensor for tensor in file.tensors if tensor.name != "output.weight"]
        return replace(file, tensors=tuple(kept))

    def for_model(self, architecture):
        return Head()


@pytest.fixture
def architecture(tmp_path):
    return architecture_of(save_model(tmp_path / "model", llama_config(4, intermediate_size=WIDTH)))


@pytest.mark.parametrize("removals", [(), (2,)])
def test_a_third_kind_of_cut_is_written_and_proven(architecture, tmp_path, removals):
    blocks = [BlockCut(architecture, removals)] if removals else []
    subject = Subject(Surgery(architecture, (*blocks, Neurons())), None)
    result = apply_removals(subject, Output(tmp_path / "out"), ignore)
    assert result.proof.checks[-2:] == ("same logits", "generates")
    assert result.proof.logits_difference < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 4 - len(removals)
    assert {block.mlp.up_proj.out_features for block in model.model.layers} == {WIDTH // 2}
    without = "1 of its 4 blocks" if removals else "half of its neurons"
    assert f"# model without {without}" in (tmp_path / "out" / "README.md").read_text()


def test_a_third_kind_of_cut_of_a_gguf_file_is_proven(architecture, tmp_path):
    file = read_gguf(convert_llama(architecture.source.folder, tmp_path / "model.gguf"))
    surgery = GgufSurgery(file, (GgufBlockCut((1,)), GgufHead()))
    result = prune_gguf(surgery, Output(tmp_path / "out.gguf"), load_plugins(), ignore)
    assert (result.unproven, result.proof.logits_difference) == (None, 0.0)
    written = read_gguf(tmp_path / "out.gguf").tensors
    assert "output.weight" not in [tensor.name for tensor in written]


def test_a_wrong_cut_fails_its_proof(architecture, tmp_path):
    surgery = Surgery(architecture, (Neurons(range(WIDTH // 2 - 1, WIDTH - 1)),))
    with pytest.raises(ProofError, match="its logits differ from those of the dense model by"):
        apply_removals(Subject(surgery, None), Output(tmp_path / "out"), ignore)
