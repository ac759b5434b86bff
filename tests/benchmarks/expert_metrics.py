"""How well each metric of experts chooses, on small mixtures of experts that are trained here on
prose and on code.

    python tests/benchmarks/expert_metrics.py TEXT WORK [--seeds 3] [--seconds 170] [--types
    mixtral,qwen3_moe]

TEXT is an encyclopaedia, WORK a folder for the models; code is that of Python's own library. Each
model has 4 blocks of 8 experts, of which a token uses 2. The tables have nats lost on unseen prose
and code, by the text that experts were chosen on, and where the two experts of a block that go
stand among all 28 pairs, by the loss on that text.
"""

from __future__ import annotations

import sys
import time
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import architecture_of, library_code, parser
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from sleb_cli import api
from sleb_cli.engine.cut.experts.routing import without_experts
from sleb_cli.engine.model.experts import find_experts
from sleb_cli.plan import read_plan
from sleb_cli.requests import EvalRequest, SearchRequest

METRICS = ["energy", "reap", "frequency", "random:1"]
SAMPLES, LENGTH, WINDOWS, VOCABULARY = 64, 128, 96, 1024
SCORED, UNSEEN = 400_000, 400_000
"""Characters of each text that experts are chosen on, and that losses are measured on; the rest is
for training.
"""


def main() -> None:
    defaults = {"seeds": 3, "seconds": 170, "types": ["mixtral", "qwen3_moe"]}
    options = parser(__doc__, "text", "work", **defaults).parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, training = write_texts(Path(options.text), work)
    texts = {name: str(work / f"{name}.txt") for name in ("prose", "code")}
    texts["both"] = ",".join(f"{text}:0.5" for text in texts.values())
    for kind in options.types:
        lost: dict[tuple[str, str, int], list[list[float]]] = {}
        fewer = list[list[float]]()
        ranks: dict[str, list[int]] = {}
        for seed in range(options.seeds):
            folder = train(
                kind, seed, options.seconds, tokenizer, training, work / f"{kind}-{seed}"
            )
            fewer.append(measure(folder, work, experts_per_token=1))
            exact = {
                name: losses_of_pairs(folder, Path(texts[name]), tokenizer)
                for name in ("prose", "code")
            }
            for metric, remove, (name, text) in product(METRICS, (2, 4), texts.items()):
                plan = search(folder, metric, remove, text, work)
                lost.setdefault((metric, name, remove), []).append(measure(plan, work))
                if remove == 2 and name in exact:
                    ranks.setdefault(metric, []).extend(places(plan, exact[name]))
        print(
            f"\n{kind}, {options.seeds} seeds: nats lost on prose / code\n", *table(lost), sep="\n"
        )
        prose, code = (fmean(each) for each in zip(*fewer, strict=True))
        print(f"\n--experts-per-token 1, nothing removed: {prose:.3f} / {code:.3f}")
        print(
            "\nmean rank of the pair among 28:",
            {metric: round(fmean(found), 1) for metric, found in ranks.items()},
        )


def write_texts(prose: Path, work: Path) -> tuple[Any, torch.Tensor]:
    """Write the texts to choose on and to measure on; return a tokenizer, and the tokens to train
    on.
    """
    parts = []
    for name, text in {
        "prose": prose.read_text()[:3_000_000],
        "code": library_code()[:3_000_000],
    }.items():
        (work / f"{name}.txt").write_text(text[:SCORED])
        (work / f"{name}-unseen.txt").write_text(text[SCORED : SCORED + UNSEEN])
        parts.append(text[SCORED + UNSEEN :])
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(parts, vocab_size=VOCABULARY)
    trained.save(str(work / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"))
    rows = [torch.tensor(tokenizer(part).input_ids) for part in parts]
    return tokenizer, torch.cat(
        [row[: len(row) // LENGTH * LENGTH].view(-1, LENGTH) for row in rows]
    )


def train(
    kind: str, seed: int, seconds: float, tokenizer: Any, training: torch.Tensor, folder: Path
) -> Path:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "num_experts_per_tok": 2,
        "output_router_logits": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    if kind == "mixtral":
        config: Any = MixtralConfig(**sizes, num_local_experts=8)
    else:
        config = Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=128, head_dim=32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer, started, losses = torch.optim.AdamW(model.parameters(), 2e-3), time.monotonic(), []
    while time.monotonic() - started < seconds:
        ids = training[torch.randint(len(training), (16,))]
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    print(
        f"{kind}, seed {seed}: loss {fmean(losses[-50:]):.2f} after {len(losses)} steps",
        file=sys.stderr,
        flush=True,
    )
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def search(folder: Path, metric: str, remove: int, text: str, work: Path) -> Path:
    plan = work / "plan.json"
    how = {
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        "holdout": 0.0,
        "sample_tokens": 0,
        "dtype": "float32",
    }
    api.search(
        SearchRequest(
            str(folder),
            unit="experts",
            remove=remove,
            metric=metric,
            calibration=text,
            output=plan,
            force=True,
            **how,
        )
    )
    return plan


def measure(subject: Path, work: Path, **asked: Any) -> list[float]:
    """Return the nats lost on unseen prose and code."""
    texts = tuple(str(work / f"{name}-unseen.txt") for name in ("prose", "code"))
    how = {"sequence_length": LENGTH, "max_windows": WINDOWS, "dtype": "float32", "force": True}
    request = EvalRequest(str(subject), perplexity=texts, **asked, **how)
    return [text.pruned[0].log_ratio for text in api.evaluate(request).texts]


def losses_of_pairs(
    folder: Path, text: Path, tokenizer: Any
) -> dict[int, dict[tuple[int, ...], float]]:
    """Return the loss on a text without each pair of experts of one block alone, by block."""
    architecture = architecture_of(folder)
    experts = find_experts(architecture)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids[: SAMPLES * LENGTH]).view(
        SAMPLES, LENGTH
    )
    blocks = [*architecture.blocks_of(model)]

    def loss(block: int, pair: tuple[int, ...]) -> float:
        with without_experts(experts, blocks, {block: pair}, folder.name), torch.no_grad():
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    pairs = [*combinations(range(experts.count), 2)]
    return {block: {pair: loss(block, pair) for pair in pairs} for block in experts.blocks}


def places(plan: Path, exact: dict[int, dict[tuple[int, ...], float]]) -> list[int]:
    """Return the place, from 1, of the pair that goes of each block among all pairs."""
    found = read_plan(plan).experts
    assert found
    chosen = {block: exact[block][tuple(sorted(gone))] for block, gone in found.removed.items()}
    return [1 + sum(loss < chosen[block] for loss in exact[block].values()) for block in chosen]


def table(lost: dict[tuple[str, str, int], list[list[float]]]) -> list[str]:
    columns = [(name, remove) for remove in (2, 4) for name in ("prose", "code", "both")]
    lines = [
        "| metric | " + " | ".join(f"{remove} of 8, {name}" for name, remove in columns) + " |"
    ]
    lines.append("|---|" + "---|" * len(columns))
    for metric in METRICS:
        means = [
            [fmean(each) for each in zip(*lost[metric, name, remove], strict=True)]
            for name, remove in columns
        ]
        cells = (f"{prose:.3f} / {code:.3f}" for prose, code in means)
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
