"""How well `sleb bench --estimate` predicts the speedups that `sleb bench` measures.

    python tests/benchmarks/estimate.py [--models 20] [--seed 0] [--dtype float32] [--iterations 10]

The models have random weights, and a random family, width and depth of 30 to 300 million parameters; random blocks are
removed. Without --dtype, float32 and bfloat16 take turns. Each is predicted from its config alone, then timed as a
benchmark does.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from saved_work import architecture_of, parser
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sleb_cli.engine.device import choose_device, parse_dtype
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.speed.benchmark import threads, time_in_turn
from sleb_cli.engine.speed.estimate import estimate_speed
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.loading import load_pruned, quiet_libraries
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore
from sleb_cli.requests import BenchRequest

FAMILIES = ("llama", "opt", "gemma3_text", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe")
PARAMETERS = (30e6, 300e6)
CLOSE = 0.1


def main() -> None:
    options = parser(__doc__, models=20, seed=0, iterations=10, dtype=str, device="auto", threads=int).parse_args()
    quiet_libraries()
    print("family       | dtype    | params | blocks | workload   | predicted | measured | error | took")
    print("-------------|----------|--------|--------|------------|-----------|----------|-------|-----")
    errors: dict[str, list[float]] = {}
    rng = random.Random(options.seed)
    for number in range(options.models):
        dtype = options.dtype or ("float32", "bfloat16")[number % 2]
        asked = BenchRequest(
            dtype=dtype, device=options.device, iterations=options.iterations, threads=options.threads, new_tokens=16
        )
        for name, error in compare(rng, asked).items():
            errors.setdefault(name, []).append(error)
    for name, found in errors.items():
        close = sum(abs(error) <= CLOSE for error in found)
        worst, mean = max(found, key=abs), statistics.mean(map(abs, found))
        print(f"{name}: {close} of {len(found)} within {CLOSE:.0%}; mean {mean:.1%}, worst {worst:+.1%}")


def compare(rng: random.Random, request: BenchRequest) -> dict[str, float]:
    """Predict and measure one model; return the relative error of the speedup in each workload."""
    with tempfile.TemporaryDirectory() as folder:
        architecture = random_architecture(rng, Path(folder))
        blocks = architecture.block_count
        removals = rng.sample(range(1, blocks - 1), rng.randint(1, blocks // 2))
        surgery = plan_surgery(architecture, removals)
        subject = Subject(surgery, None)
        start = time.perf_counter()
        estimate = estimate_speed(subject, replace(request, every=blocks, iterations=None), ignore)
        took = time.perf_counter() - start
        on = choose_device(request.device)
        kind = parse_dtype(str(request.dtype), None)
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(architecture.config), dtype=kind).eval().to(on)
        models = {"dense": dense, "pruned": load_pruned(surgery, kind, on, ignore, dense=dense)}
        errors = {}
        for number, workload in enumerate(resolve_workloads(request, subject, on, ignore)):
            with threads(request.threads):
                seconds = time_in_turn(workload, models, ignore)
            measured = statistics.median(seconds["dense"]) / statistics.median(seconds["pruned"])
            predicted = estimate.pruned[0].timings[number].speedup
            errors[workload.name] = predicted / measured - 1
            print(
                f"{architecture.config.model_type:12} | {request.dtype:8} | {estimate.dense.parameters / 1e6:5.0f}M "
                f"| {blocks:2} - {len(removals):<2}| {workload.name:10} | {predicted:8.2f}x | {measured:7.2f}x "
                f"| {errors[workload.name]:+5.1%} | {took:3.1f} s",
                flush=True,
            )
        return errors


def random_architecture(rng: random.Random, folder: Path) -> Architecture:
    """Write the config of a random model of the right size, and read it."""
    while True:
        config = random_config(rng)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        config.save_pretrained(folder)
        architecture = architecture_of(folder, config_only=True)
        parameters = sum(parameter.numel() for parameter in architecture.skeleton.parameters())
        if PARAMETERS[0] <= parameters <= PARAMETERS[1]:
            return architecture


def random_config(rng: random.Random) -> Any:
    family, heads = rng.choice(FAMILIES), rng.randint(5, 16)
    width = heads * 64
    groups = [count for count in range(1, heads + 1) if heads % count == 0 and heads // count <= 8]
    sizes = {
        "vocab_size": rng.choice((8_000, 32_000, 50_000, 128_000)), "hidden_size": width,
        "num_hidden_layers": rng.randint(6, 24), "num_attention_heads": heads, "max_position_embeddings": 1024,
        "intermediate_size": rng.choice((2, 3, 4)) * width, "num_key_value_heads": rng.choice(groups), "head_dim": 64,
        "tie_word_embeddings": rng.random() < 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"num_key_value_heads": heads},
        "opt": {"num_key_value_heads": heads, "ffn_dim": sizes["intermediate_size"], "word_embed_proj_dim": width},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width},
        "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width},
    }
    return CONFIG_MAPPING[family](**sizes | own.get(family, {}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
