"""New values in a GGUF file: which tensor holds a parameter, how it lies there, and in which type it is written."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from torch import nn

from gguf_models import finish
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.recovery.gguf_tensors import WRITTEN, find_places, pack, type_to_write
from sleb_plugins import UnsupportedModelError

WIDTH = 64


@pytest.fixture
def model():
    """Two blocks and a final norm."""
    blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)])
    model = nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(WIDTH)}).requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).bfloat16())
    return model


@pytest.fixture
def tensors(tmp_path, model):
    """Write a GGUF file with these arrays, and return a function that packs new values for it."""

    def write(arrays, type_=Type.F32):
        writer = GGUFWriter(tmp_path / "one.gguf", "llama")
        writer.add_block_count(2)
        for name, array in arrays.items():
            kind = type_ if array.dim() > 1 else Type.F32
            writer.add_tensor(name, quantize(np.ascontiguousarray(array.numpy()), kind), raw_dtype=kind)
        file = read_gguf(finish(writer, tmp_path / "one.gguf"))
        in_memory = SimpleNamespace(model=model, loaded=nullcontext)  # as much of a skippable model as is asked for
        return lambda values: pack(file, find_places(file, in_memory, "blocks", values), values)

    return write


ROWS = torch.arange(WIDTH).view(2, -1).T.flatten()


@pytest.mark.parametrize("lies", [lambda own: own, lambda own: own.T, lambda own: own[ROWS]])
def test_a_matrix_is_found_however_it_lies_and_written_so(tensors, model, lies):
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    others = {"blk.1.a.weight": own["blocks.0.weight"], "output_norm.weight": own["norm.weight"]}
    packed = tensors(others | {"blk.0.b.weight": lies(own["blocks.0.weight"]), "blk.0.b.bias": own["blocks.0.bias"]})
    new = own["blocks.0.weight"] + torch.randn(WIDTH, WIDTH)
    written, values = packed({"blocks.0.weight": new})
    assert torch.equal(values["blocks.0.weight"], new)
    (written,) = written.values()
    assert written.name == "blk.0.b.weight"
    stored = torch.frombuffer(bytearray(written.values), dtype=torch.float32).view(WIDTH, WIDTH)
    assert torch.equal(stored, lies(new))


@pytest.mark.parametrize("added", [-1.0, 0.0, 1.0])
def test_gains_may_be_stored_with_1_added(tensors, model, added):
    packed = tensors({"output_norm.weight": model.norm.weight.data + added, "output_norm.bias": model.norm.bias.data})
    new = model.norm.weight.data * 2
    written, values = packed({"norm.weight": new})
    assert torch.allclose(values["norm.weight"], new, atol=1e-6)
    stored = torch.frombuffer(bytearray(written["output_norm.weight"].values), dtype=torch.float32)
    assert torch.equal(stored, new + added)


@pytest.mark.parametrize(
    ("type_", "written"), [(Type.Q4_1, Type.Q8_0), (Type.Q5_0, Type.Q8_0), *((type_, type_) for type_ in WRITTEN)]
)
def test_what_is_returned_is_what_the_file_gives_back(tensors, model, type_, written):
    own = model.blocks[1].weight
    original = own.data
    own.data = torch.from_numpy(dequantize(quantize(original.numpy(), type_), type_))
    new = own.data + 0.02 * torch.randn(own.shape)
    found, values = tensors({"blk.1.b.weight": original}, type_)({"blocks.1.weight": new})
    back = values["blocks.1.weight"]
    assert found["blk.1.b.weight"].type == written
    packed = np.frombuffer(bytearray(found["blk.1.b.weight"].values), np.uint8).reshape(len(own), -1)
    assert torch.equal(back, torch.from_numpy(dequantize(packed, written)))
    assert (back - new).norm() < 0.5 * (new - own.data).norm()


def test_new_values_have_8_bits_or_more():
    for type_ in Type:
        assert type_to_write(type_, 256) is (type_ if type_ in WRITTEN else Type.Q8_0)
    assert type_to_write(Type.F16, 33) is Type.F16


def test_what_the_file_lacks_or_holds_twice_is_refused(tensors, model):
    weight = model.blocks[0].weight.data
    for arrays, words in (
        ({"blk.0.b.weight": weight * 2, "blk.1.b.weight": weight}, "no tensor with the values of"),
        ({"blk.0.a.weight": weight, "blk.0.b.weight": weight}, "twice, in blk.0.a.weight and in"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            tensors(arrays)({"blocks.0.weight": weight})
