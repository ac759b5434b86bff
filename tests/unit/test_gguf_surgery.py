"""Blocks are removed from GGUF files exactly: what stays is, byte for byte, what was there."""

from contextlib import nullcontext
from itertools import combinations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gguf_models import metadata_of, tensors_of, write_gguf, write_llama_gguf
from sleb_cli.engine.gguf import quick
from sleb_cli.engine.gguf.file import gguf_size, read_gguf
from sleb_cli.engine.gguf.file import write_gguf as write_header_and_tensors
from sleb_cli.engine.gguf.removed_parts import REMOVED_BLOCKS
from sleb_cli.engine.surgery.gguf_surgery import plan_gguf_surgery
from sleb_plugins import ModelError, UnsupportedModelError, UsageError


def prune(source, removals, output, **others):
    pruned = plan_gguf_surgery(read_gguf(source), removals, others).pruned()
    pieces = []
    write_header_and_tensors(pruned, output, pieces.append)
    assert output.stat().st_size == gguf_size(pruned)
    assert sum(pieces) == sum(tensor.size for tensor in pruned.tensors)
    return output


def what_stays(source, removals):
    """What must remain of these tensors, told apart by another way than the code's."""
    found = {}
    for name, content in tensors_of(source).items():
        word, _, rest = name.partition(".")
        block, _, last = rest.partition(".")
        if word != "blk":
            found[name] = content
        elif int(block) not in removals:
            below = sum(removed < int(block) for removed in removals)
            found[f"blk.{int(block) - below}.{last}"] = content
    return found


@pytest.mark.parametrize("type_", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_remaining_gguf_tensors_are_copied_byte_for_byte(tmp_path, type_):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, type_)
    small = prune(source, (4, 1), tmp_path / "small.gguf")
    assert list(tensors_of(small).items()) == list(what_stays(source, {1, 4}).items())
    expected = metadata_of(source) | {"llama.block_count": 4, REMOVED_BLOCKS: [4, 1]}
    assert list(metadata_of(small).items()) == list(expected.items())


@pytest.mark.parametrize("type_", sorted(gguf.quants._type_traits))
def test_a_matrix_is_unpacked_as_the_format_s_own_library_does(type_, monkeypatch):
    monkeypatch.setattr(quick, "_ROWS", 3)
    width = 2 * gguf.GGML_QUANT_SIZES[type_][1]
    for shape in ((10, width), (2, 4, width), (width,)):
        # Below 0x70, scales are finite.
        packed = np.random.default_rng(0).integers(0x70, size=shape, dtype=np.uint8)
        ours = quick.dequantize(packed, type_)
        np.testing.assert_array_equal(ours, gguf.dequantize(packed, type_), strict=True)


def test_pruning_a_gguf_file_twice_equals_once_and_pruning_nothing_copies_it(tmp_path):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, Type.Q8_0)
    assert prune(source, (), tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    once = prune(source, (4, 1, 5), tmp_path / "once.gguf")
    twice = prune(prune(source, (4,), tmp_path / "first.gguf"), (1, 4), tmp_path / "twice.gguf")
    assert metadata_of(twice)[REMOVED_BLOCKS] == [4, 1, 5]
    assert twice.read_bytes() == once.read_bytes()


def test_experts_removed_in_two_steps_are_recorded_by_their_original_numbers(tmp_path):
    more = {"ffn_up_exps.weight": (8, 3), "ffn_gate_inp.weight": (8, 3)}
    source = write_gguf(tmp_path / "a.gguf", "acme", 3, {"expert_count": 8}, more=more)
    shorter = prune(source, (1,), tmp_path / "shorter.gguf")
    once = prune(shorter, (), tmp_path / "once.gguf", experts={0: (5, 3, 6), 1: (0, 7, 1)})
    first = prune(shorter, (), tmp_path / "first.gguf", experts={0: (5,), 1: (0,)})
    twice = prune(first, (), tmp_path / "twice.gguf", experts={0: (3, 5), 1: (6, 0)})
    assert twice.read_bytes() == once.read_bytes()
    found = metadata_of(prune(once, (0,), tmp_path / "last.gguf"))
    assert found["sleb.removed_experts.0"] == [5, 3, 6]
    assert found["sleb.removed_experts.2"] == [0, 7, 1]
    assert found["sleb.removed_blocks"] == [1, 0]


WHOLE = {
    "rope.dimension_sections": [16, 24, 24, 0],
    "some.other_list": [1, 2, 3],
    "general.tags": ["one", "two", "three", "four"],
    "expert_count": 4,
}
BY_BLOCK = {
    "attention.head_count": [8, 7, 6, 5],
    "attention.sliding_window_pattern": [True, False, True, True],
    "swiglu_clamp_exp": [0.5, 1.5, 2.5, 3.5],
    "labels_of_mine": ["a", "bb", "ccc", "dddd"],
    "leading_dense_block_count": 3,
}
PRUNED = {
    "attention.head_count": [7, 5],
    "attention.sliding_window_pattern": [False, True],
    "swiglu_clamp_exp": [1.5, 3.5],
    "labels_of_mine": ["bb", "dddd"],
    "leading_dense_block_count": 1,
    "block_count": 2,
}
# Two more blocks, which stay and move up.
PREDICTING = {"nextn_predict_layers": 2, "attention.head_count_kv": [1, 2, 3, 4, 5, 6]}
LATER = {"nextn_predict_layers": 2, "attention.head_count_kv": [2, 4, 5, 6], "block_count": 4}


@pytest.mark.parametrize(
    ("blocks", "before", "after", "alignment"),
    [(4, BY_BLOCK, PRUNED, 4096), (6, PREDICTING, LATER, 8)],
)
def test_only_values_of_single_blocks_are_pruned(tmp_path, blocks, before, after, alignment):
    path = tmp_path / "a.gguf"
    source = write_gguf(path, "acme", blocks, WHOLE | before, alignment=alignment)
    small = prune(source, (2, 0), tmp_path / "small.gguf")
    found = {key.removeprefix("acme."): value for key, value in metadata_of(small).items()}
    assert found == found | WHOLE | after
    assert found["tokenizer.ggml.tokens"] == [f"t{number}" for number in range(blocks)]
    assert tensors_of(small) == what_stays(source, {0, 2})
    reader = gguf.GGUFReader(small)
    assert reader.alignment == alignment
    assert {tensor.data_offset % alignment for tensor in reader.tensors} == {0}


# What llama.cpp computes with at each block, worked out by hand from its loaders: 1 where the block
# is set apart.
WINDOW = {"attention.sliding_window": 64}
KINDS = {
    "gemma2": "010101010101",
    "gemma3": "000001000001",
    "gpt-oss": "010101010101",
    "smollm3": "000100010001",
    "smallthinker": "100010001000",
    "qwen3next": "000100010001",
    "plamo3": "000000010000",
}


@pytest.mark.parametrize("architecture", KINDS)
def test_a_removal_passes_exactly_if_every_block_keeps_its_kind(tmp_path, architecture):
    kinds = KINDS[architecture]
    file = read_gguf(write_gguf(tmp_path / "a.gguf", architecture, 12, WINDOW))
    refused = pytest.raises(UnsupportedModelError, match=f"{architecture}: in llama.cpp")
    for first, end in set(combinations(range(13), 2)) - {(0, 12)}:
        with nullcontext() if kinds.startswith(kinds[:first] + kinds[end:]) else refused:
            plan_gguf_surgery(file, range(first, end))


FED = {"deepstack_mapping": [-1, 0, -1, 1, -1, -1, -1, -1]}
SECONDS = {"interleave_moe_layer_step": 2}
PREDICT = {"nextn_predict_layers": 2}
KV = "attention.shared_kv_layers"
SLIDES = "attention.sliding_window_pattern"


@pytest.mark.parametrize(
    ("architecture", "values", "removals"),
    [
        ("gemma3", WINDOW | {SLIDES: [True] * 8}, (1,)),
        ("gemma3", WINDOW | {SLIDES: 3}, (1, 2, 0)),
        ("llama4", {"interleave_moe_layer_step": 1}, (1, 2, 3, 4)),
        ("minicpm", {"residual_scale": 0.2}, (1,)),
        ("granite", FED, (2,)),
        ("rwkv7", {}, (1,)),
    ],
)
def test_a_removal_is_allowed_if_no_kind_changes_or_the_file_lists_them(
    tmp_path, architecture, values, removals
):
    plan_gguf_surgery(read_gguf(write_gguf(tmp_path / "a.gguf", architecture, 8, values)), removals)


@pytest.mark.parametrize(
    ("architecture", "blocks", "values", "removals", "message"),
    [
        ("gemma3", 8, WINDOW, (1,), "the last of every 6 blocks has full attention"),
        ("llama4", 8, SECONDS, (1, 2, 3), "full attention instead of a window, and block 6"),
        ("ernie4_5-moe", 8, SECONDS, (1,), "has experts, and block 2 would become block 1"),
        ("acme", 8, {"full_attention_interval": 4}, (7, 0), "one of every 4 blocks is of another"),
        ("deepseek2", 27, {}, (1, 2), "and 25 selects another than 27"),
        ("gemma4", 8, {KV: 2}, (1,), f"gemma4.{KV}"),
        ("rwkv7", 8, {}, (0,), "the values of its block 0"),
        ("qwen3vl", 8, {"n_deepstack_layers": 3}, (2,), "additional inputs enter block 2"),
        ("granite", 8, FED, (2, 3), "additional inputs enter block 3"),
        ("llama", 8, {"general.type": "adapter"}, (1,), "general.type is 'adapter'"),
        ("glm4moe", 6, PREDICT, (4,), "has 4 blocks, 0 to 3, and 2 for multi-token prediction"),
        ("glm4moe", 6, PREDICT, (0, 1, 2, 3), "All 4 blocks"),
    ],
)
def test_a_removal_that_llama_cpp_would_misread_is_refused(
    tmp_path, architecture, blocks, values, removals, message
):
    file = read_gguf(write_gguf(tmp_path / "a.gguf", architecture, blocks, values))
    with pytest.raises((UnsupportedModelError, UsageError), match=message):
        plan_gguf_surgery(file, removals)


def test_files_that_hold_no_whole_model_are_refused(tmp_path):
    path = write_llama_gguf(tmp_path / "a.gguf", 4)
    path.write_bytes(path.read_bytes().replace(b"blk.3.attn_q", b"blk.9.attn_q"))
    for file, blocks in ((path, 4), (write_gguf(tmp_path / "b.gguf", "llama", 0), 0)):
        with pytest.raises(ModelError, match=f"says {blocks} blocks"):
            plan_gguf_surgery(read_gguf(file), (0,))
    with pytest.raises(ModelError, match="one of 3 parts"):
        read_gguf(write_gguf(tmp_path / "c.gguf", "llama", 2, {"split.count": 3}))
    for missing in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(ModelError, match="no file"):
            read_gguf(missing)
