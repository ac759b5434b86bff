"""GGUF files of tiny random models, written with the format's own library."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoConfig

from conftest import llama_config, save_model

WITH_EXPERTS = {"qwen3moe": gguf.MODEL_ARCH.QWEN3MOE, "gpt-oss": gguf.MODEL_ARCH.GPT_OSS}


def write_llama_gguf(
    path: Path,
    blocks: int = 6,
    type_: Type = Type.F32,
    *,
    kv_heads: int = 4,
    architecture: str = "llama",
    config: Any = None,
) -> Path:
    """Write a random Llama with its tokenizer, and leave it as a checkpoint in the folder `origin`
    beside it too.

    Another architecture whose tensors are those of a Llama goes too, with a config of the same
    sizes.
    """
    folder = save_model(
        path.parent / "origin", config or llama_config(blocks, num_key_value_heads=kv_heads)
    )
    return convert_llama(folder, path, type_, architecture=architecture)


def convert_llama(
    folder: Path, path: Path, type_: Type = Type.F32, *, architecture: str = "llama"
) -> Path:
    """Write the Llama, or the Qwen3 or gpt-oss with experts, in a folder as a GGUF file with its
    byte-level BPE.
    """
    config = AutoConfig.from_pretrained(folder)
    heads, kv_heads, blocks = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_hidden_layers,
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "no"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    unused = [f"<unused{number}>" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types(
        [3 if token in ("<s>", "</s>") else 1 for token in tokens] + [5] * len(unused)
    )
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    kind_of_experts = WITH_EXPERTS.get(architecture)
    if kind_of_experts:
        writer.add_key_length(config.hidden_size // heads)
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", config.intermediate_size)
        )
        writer.add_sliding_window(config.sliding_window or 0)
    names = gguf.get_tensor_name_map(kind_of_experts or gguf.MODEL_ARCH.LLAMA, blocks)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _with_experts_stacked(load_file(file)):
            array = tensor.float().numpy()
            # Without experts, GGUF stores the rotary halves interleaved.
            if not kind_of_experts and ("q_proj" in name or "k_proj" in name):
                count = heads if "q_proj" in name else kv_heads
                array = (
                    array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
                )
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            kind = Type.F32 if array.ndim == 1 else type_
            writer.add_tensor(
                own, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
            )
    return finish(writer, path)


def _with_experts_stacked(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield tensors with all experts of a block in one; those of gpt-oss, which has them so, as
    GGUF files do.
    """
    stacked: dict[str, Any] = {}
    for name in sorted(tensors):
        stacked.setdefault(re.sub(r"(?<=experts\.)\d+\.", "", name), []).append(tensors[name])
    for name, found in stacked.items():
        if len(found) > 1:
            yield name, torch.stack(found)
        elif ".experts." in name:
            last, rows = ("bias", found[0]) if name.endswith("_bias") else ("weight", found[0].mT)
            stem, is_both, _ = name.partition("gate_up_proj")
            parts = {f"{stem}gate_proj": rows[:, ::2], f"{stem}up_proj": rows[:, 1::2]}
            for part, values in (parts if is_both else {name.removesuffix("_bias"): rows}).items():
                yield f"{part}.{last}", values
        else:
            yield f"{name}.weight" if name.endswith("sinks") else name, found[0]


def write_gguf(
    path: Path,
    architecture: str,
    blocks: int,
    values: dict[str, Any] | None = None,
    *,
    alignment: int | None = None,
    more: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write a file of an architecture with two small tensors a block and `more`, and `values` under
    its own keys.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(blocks)
    for key, value in (values or {}).items():
        own = key if key.startswith(("xielu.", "general.", "split.")) else f"{architecture}.{key}"
        {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
            str: writer.add_string,
        }[type(value)](own, value)
    writer.add_token_list([f"t{number}" for number in range(blocks)])
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32), raw_dtype=Type.F32)

    add("token_embd.weight", blocks, 3)
    for block in range(blocks):
        add(f"blk.{block}.attn_q.weight", 3, 5)
        add(f"blk.{block}.ffn_norm.weight", 7)
        for name, shape in (more or {}).items():
            add(f"blk.{block}.{name}", *shape)
    add("output_norm.weight", 3)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return each tensor's type, shape and bytes, in the file's order, as the format's own library
    reads them.
    """
    return {
        tensor.name: (tensor.tensor_type, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata, in the file's order, as the format's own library reads it."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")
    }
