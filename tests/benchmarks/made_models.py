"""Random Llamas of any size, written shard by shard."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def shapes(blocks: int, hidden: int, wide: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor of a Llama."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        yield from ((f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield from ((f"{prefix}.mlp.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up"))
        yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
        yield from ((f"{prefix}.{norm}.weight", (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm"))
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_llama(folder: Path, blocks: int, hidden: int, wide: int, vocabulary: int, shard_bytes: int) -> None:
    """Write a Llama of random bfloat16 weights in shards of about this size, with its config and index."""
    folder.mkdir(parents=True)
    tensors = list(shapes(blocks, hidden, wide, vocabulary))
    # Slices of one pool at random places: drawing each number would take longer than writing it.
    pool = torch.empty(2 * max(math.prod(shape) for _, shape in tensors), dtype=torch.bfloat16).normal_(0, 0.02)
    rng, shards, size = random.Random(0), [{}], 0
    for name, shape in tensors:
        if size > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for name, shape in shard.items():
            begin, count = rng.randrange(len(pool) // 2), math.prod(shape)
            matrix = len(shape) > 1
            values[name] = (pool[begin : begin + count].clone() if matrix else torch.ones(count).bfloat16()).view(shape)
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(2 * math.prod(shape) for _, shape in tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": wide, "vocab_size": vocabulary,
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
