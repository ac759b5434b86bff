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


def renamed(tensors, removals, blocks):
    """What must remain of these tensors, told apart by another way than the code's."""
    kept = [block for block in range(blocks) if block not in removals]
    result = {}
    for name, content in tensors.items():
        parts = name.split(".")
        if parts[0] != "blk":
            result[name] = content
        elif int(parts[1]) in kept:
            result[".".join(["blk", str(kept.index(int(parts[1]))), *parts[2:]])] = content
    return result


@pytest.mark.parametrize("type_", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_remaining_gguf_tensors_are_copied_byte_for_byte(tmp_path, type_):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, type_)
    small = prune(source, (4, 1), tmp_path / "small.gguf")
    assert list(tensors_of(small).items()) == list(renamed(tensors_of(source), {1, 4}, 6).items())
    before, after = metadata_of(source), metadata_of(small)
    assert after.pop("llama.block_count") == 4
    assert after.pop(REMOVED_BLOCKS) == [4, 1]
    del before["llama.block_count"]
    assert list(after.items()) == list(before.items())


@pytest.mark.parametrize("type_", sorted(gguf.quants._type_traits))
def test_a_matrix_is_unpacked_as_the_format_s_own_library_does(type_, monkeypatch):
    monkeypatch.setattr(quick, "_ROWS", 3)
    width = 2 * gguf.GGML_QUANT_SIZES[type_][1]
    for shape in ((10, width), (2, 4, width), (width,)):
        packed = np.random.default_rng(0).integers(
            0x70, size=shape, dtype=np.uint8
        )  # scales are finite
        ours, theirs = quick.dequantize(packed, type_), gguf.dequantize(packed, type_)
        assert (ours.shape, ours.tobytes()) == (theirs.shape, theirs.tobytes())


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
    removed = {"sleb.removed_experts.0": [5, 3, 6], "sleb.removed_experts.2": [0, 7, 1]}
    last = prune(once, (0,), tmp_path / "last.gguf")
    for file, blocks in ((once, [1]), (last, [1, 0])):
        found = {key: value for key, value in metadata_of(file).items() if key.startswith("sleb.")}
        assert found == removed | {"sleb.removed_blocks": blocks}


OTHERS = {
    "rope.dimension_sections": [16, 24, 24, 0],
    "some.other_list": [1, 2, 3],
    "general.tags": ["one", "two", "three", "four"],
    "expert_count": 4,
}
BY_BLOCK = {
    "attention.head_count": ([8, 7, 6, 5], [7, 5]),
    "attention.sliding_window_pattern": ([True, False, True, True], [False, True]),
    "swiglu_clamp_exp": ([0.5, 1.5, 2.5, 3.5], [1.5, 3.5]),
    "labels_of_mine": (["a", "bb", "ccc", "dddd"], ["bb", "dddd"]),
    "xielu.alpha_n": ([0.25, 0.5, 0.75, 1.0], [0.5, 1.0]),
    "leading_dense_block_count": (3, 1),
}
PREDICTING = {  # two more blocks, which stay and move up
    "nextn_predict_layers": (2, 2),
    "attention.head_count_kv": ([1, 2, 3, 4, 5, 6], [2, 4, 5, 6]),
    "attention.indexer.types": ([1, 2, 3, 4], [2, 4]),
}


@pytest.mark.parametrize(
    ("blocks", "values", "alignment"), [(4, BY_BLOCK, 4096), (6, PREDICTING, 8)]
)
def test_only_values_of_single_blocks_are_pruned(tmp_path, blocks, values, alignment):
    before = OTHERS | {key: each for key, (each, _) in values.items()}
    source = write_gguf(tmp_path / "a.gguf", "acme", blocks, before, alignment=alignment)
    small = prune(source, (2, 0), tmp_path / "small.gguf")
    found = {key.removeprefix("acme."): value for key, value in metadata_of(small).items()}
    assert found.pop("tokenizer.ggml.tokens") == [f"t{number}" for number in range(blocks)]
    expected = (
        OTHERS | {key: pruned for key, (_, pruned) in values.items()} | {"block_count": blocks - 2}
    )
    assert {key: found[key] for key in expected} == expected
    assert tensors_of(small) == renamed(tensors_of(source), {0, 2}, blocks)
    reader = gguf.GGUFReader(small)
    assert (reader.alignment, {tensor.data_offset % alignment for tensor in reader.tensors}) == (
        alignment,
        {0},
    )


# What llama.cpp computes with at each block, worked out by hand from its loaders: 1 where the block
# is set apart.
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
    file = read_gguf(
        write_gguf(tmp_path / "a.gguf", architecture, 12, {"attention.sliding_window": 64})
    )
    refused = pytest.raises(UnsupportedModelError, match=f"{architecture}: in llama.cpp")
    for first, end in set(combinations(range(13), 2)) - {(0, 12)}:
        with nullcontext() if kinds.startswith(kinds[:first] + kinds[end:]) else refused:
            plan_gguf_surgery(file, range(first, end))


WINDOW = {"attention.sliding_window": 64}
FED = {"deepstack_mapping": [-1, 0, -1, 1, -1, -1, -1, -1]}
THIRDS = WINDOW | {"attention.sliding_window_pattern": 3}


@pytest.mark.parametrize(
    ("architecture", "blocks", "values", "removals", "message"),
    [
        # The file lists the kinds, or none changes.
        ("gemma3", 8, WINDOW | {"attention.sliding_window_pattern": [True] * 8}, (1,), None),
        ("gemma3", 8, THIRDS, (1, 2, 0), None),
        ("llama4", 8, {"interleave_moe_layer_step": 1}, (1, 2, 3, 4), None),
        ("minicpm", 8, {"residual_scale": 0.2}, (1,), None),
        ("granite", 8, FED, (2,), None),
        ("rwkv7", 8, {}, (1,), None),
        # llama.cpp would misread the result.
        ("gemma3", 8, WINDOW, (1,), "the last of every 6 blocks has full attention"),
        (
            "llama4",
            8,
            {"interleave_moe_layer_step": 2},
            (1, 2, 3),
            "full attention instead of a window, and block 6",
        ),
        (
            "ernie4_5-moe",
            8,
            {"interleave_moe_layer_step": 2},
            (1,),
            "has experts, and block 2 would become block 1",
        ),
        (
            "acme",
            8,
            {"full_attention_interval": 4},
            (7, 0),
            "one of every 4 blocks is of another kind",
        ),
        ("deepseek2", 27, {}, (1, 2), "and 25 selects another than 27"),
        ("gemma4", 8, {"attention.shared_kv_layers": 2}, (1,), "gemma4.attention.shared_kv_layers"),
        ("rwkv7", 8, {}, (0,), "the values of its block 0"),
        ("qwen3vl", 8, {"n_deepstack_layers": 3}, (2,), "additional inputs enter block 2"),
        ("granite", 8, FED, (2, 3), "additional inputs enter block 3"),
        ("llama", 8, {"general.type": "adapter"}, (1,), "general.type is 'adapter'"),
        (
            "glm4moe",
            6,
            {"nextn_predict_layers": 2},
            (4,),
            "has 4 blocks, 0 to 3, and 2 for multi-token prediction",
        ),
        ("glm4moe", 6, {"nextn_predict_layers": 2}, (0, 1, 2, 3), "All 4 blocks"),
    ],
)
def test_a_removal_that_llama_cpp_would_misread_is_refused(
    tmp_path, architecture, blocks, values, removals, message
):
    file = read_gguf(write_gguf(tmp_path / "a.gguf", architecture, blocks, values))
    refused = pytest.raises((UnsupportedModelError, UsageError), match=message)
    with refused if message else nullcontext():
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
