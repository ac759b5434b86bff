"""What removing experts costs a mixture whose experts each know another text, and what removing
blocks costs it.

    python tests/benchmarks/expert_domains.py MODEL STORIES TEXT WORK [--steps 240]

MODEL is a small Llama with a chat template, STORIES a model that writes stories, TEXT an
encyclopaedia, WORK a folder that keeps each stage. The MLPs of MODEL are trained on prose, code (of
Python's own library), stories and its own conversations, and joined as the four experts of a
Mixtral, of which a token uses one; routers learn to tell the texts apart. The table has nats lost
on unseen text of each kind, by the text that experts or blocks were chosen on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import architecture_of, library_code, parser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from sleb_cli import api
from sleb_cli.engine.text.calibration import calibrate
from sleb_cli.engine.text.settings import resolve_calibration
from sleb_cli.events import ignore
from sleb_cli.requests import EvalRequest, SearchRequest

KINDS = ["prose", "code", "stories", "talk"]
METRICS = ["energy", "reap", "frequency"]
LENGTH, BATCH, SAMPLES, WINDOWS, ROUTED, RATE = 128, 4, 32, 20, 40, 5e-4
HOW = {"sequence_length": LENGTH, "dtype": "bfloat16", "force": True}
BLOCKS = (7, 14)
"""Blocks of about the bytes of one expert of four, and of two."""


def main() -> None:
    options = parser(__doc__, "model", "stories", "text", "work", steps=240).parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = {kind: write_text(kind, options, work) for kind in KINDS}
    rows = {kind: to_rows(path.read_text(), tokenizer) for kind, path in texts.items()}
    experts = {kind: train_expert(options, kind, rows[kind], work) for kind in KINDS}
    mixture = join(options, experts, rows, tokenizer, work)
    sources = {kind: str(work / f"{kind}-scored.txt") for kind in KINDS}
    sources["all"] = ",".join(f"{source}:0.25" for source in sources.values())
    print(
        f"| removed | by | chosen on | {' | '.join(KINDS)} | mean |",
        "|---|---|---|" + "---|" * 5,
        sep="\n",
    )
    for name, metric in [
        *product(["all"], [*METRICS, "random:1", "blocks"]),
        *product(KINDS, METRICS),
    ]:
        asked = (
            {"unit": "experts", "metric": metric, "holdout": 0.0}
            if metric != "blocks"
            else {"fast": True}
        )
        sizes = (1, 2) if metric != "blocks" else BLOCKS
        plan = search(mixture, sources[name], work, remove=sizes[1], **asked)
        for removed, lost in measure(plan, work, sizes):
            show(f"{removed} of {30 if metric == 'blocks' else 4}", metric, name, lost)


def show(removed: str, metric: str, text: str, lost: list[float]) -> None:
    cells = " | ".join(f"{loss:.3f}" for loss in [*lost, fmean(lost)])
    print(f"| {removed} | {metric} | {text} | {cells} |", flush=True)


def say(*said: object) -> None:
    print(time.strftime("%H:%M:%S"), *said, file=sys.stderr, flush=True)


def write_text(kind: str, options: Any, work: Path) -> Path:
    """Write the text of a kind: to train on, which is returned, to choose on and to measure on."""
    training = work / f"{kind}-training.txt"
    if training.exists():
        return training
    torch.manual_seed(0)
    if kind == "prose":
        text = Path(options.text).read_text()
    elif kind == "code":
        text = library_code()
    elif kind == "stories":
        model = AutoModelForCausalLM.from_pretrained(options.stories)
        tokenizer = AutoTokenizer.from_pretrained(options.stories)
        start = torch.full((256, 1), tokenizer.bos_token_id)
        written = [
            model.generate(start, do_sample=True, top_k=0, max_new_tokens=400) for _ in range(6)
        ]
        text = "\n\n".join(
            tokenizer.decode(ids, skip_special_tokens=True) for batch in written for ids in batch
        )
    else:
        settings = resolve_calibration(
            architecture_of(options.model), "self-chat", 160, 2 * LENGTH, 0
        )
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        (calibration,) = calibrate([settings], tokenizer, lambda: model, ignore)
        text = "\n\n".join(tokenizer.decode(ids) for ids in calibration.sequences)
    tenth = min(len(text) // 10, 60_000)
    (work / f"{kind}-scored.txt").write_text(text[:tenth])
    (work / f"{kind}-unseen.txt").write_text(text[tenth : 2 * tenth])
    training.write_text(text[2 * tenth :][:2_000_000])
    say(kind, "has", len(text), "characters")
    return training


def to_rows(text: str, tokenizer: Any) -> Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def train(what: str, model: Any, steps: int, rows: Tensor) -> None:
    """Train what is not frozen, with a rate that falls to 0 in the second half."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer, losses = (
        torch.optim.AdamW(parameters, RATE, weight_decay=0.0, fused=True),
        list[float](),
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / steps))
        ids = rows[torch.randint(len(rows), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = fmean(losses[:10]), fmean(losses[-10:])
    say(f"{what}: {len(losses)} steps, loss {first:.2f} -> {last:.2f}")


def train_expert(options: Any, kind: str, rows: Tensor, work: Path) -> dict[str, Tensor]:
    """Return the MLPs of the model, trained on a text while the rest stays as it is."""
    file = work / f"{kind}.pt"
    if not file.exists():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32
        ).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
        train(kind, model, options.steps, rows)
        torch.save(
            {name: tensor for name, tensor in model.state_dict().items() if ".mlp." in name}, file
        )
    return torch.load(file)


def join(
    options: Any,
    experts: dict[str, dict[str, Tensor]],
    rows: dict[str, Tensor],
    tokenizer: Any,
    work: Path,
) -> Path:
    """Write the mixture of the trained MLPs, with routers that tell the kinds of text apart."""
    folder = work / "mixture"
    if folder.exists():
        return folder
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    settings = {
        name: value
        for name, value in dense.config.to_dict().items()
        if hasattr(MixtralConfig(), name)
    }
    settings |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "sliding_window": None,
    }
    torch.manual_seed(0)
    config = MixtralConfig(**settings, num_local_experts=len(KINDS), num_experts_per_tok=1)
    model: Any = MixtralForCausalLM(config)
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(shared, strict=False)
    for number, block in enumerate(model.model.layers):
        gate, up, down = (
            torch.stack(
                [experts[kind][f"model.layers.{number}.mlp.{name}_proj.weight"] for kind in KINDS]
            )
            for name in ("gate", "up", "down")
        )
        block.mlp.experts.gate_up_proj.data, block.mlp.experts.down_proj.data = (
            torch.cat([gate, up], 1),
            down,
        )
    ids = torch.cat([rows[kind][torch.randperm(len(rows[kind]))[:ROUTED]] for kind in KINDS])
    for block, router in zip(model.model.layers, routers(dense, ids), strict=True):
        block.mlp.gate.weight.data = router
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def routers(dense: Any, ids: Tensor) -> Iterator[Tensor]:
    """Yield for each block the weights that tell best from the input of its MLP of which kind a
    token is.
    """
    seen, kinds = (
        list[Tensor](),
        torch.arange(len(KINDS)).repeat_interleave(ids.numel() // len(KINDS)),
    )
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda mlp, given: seen.append(given[0].detach().flatten(0, 1))
        )
        for block in dense.model.layers
    ]
    with torch.no_grad():
        dense(input_ids=ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for number, hidden in enumerate(seen):
        weights = classifier(hidden, kinds)
        right = (hidden @ weights.T).argmax(-1).eq(kinds).float().mean()
        say(f"the router of block {number} is right on {right:.0%} of tokens")
        yield weights


def classifier(hidden: Tensor, kinds: Tensor) -> Tensor:
    """Fit the weights [kinds, width] of a logistic regression."""
    weights = torch.zeros(len(KINDS), hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = (
            nn.functional.cross_entropy(hidden @ weights.T, kinds) + 1e-4 * weights.square().sum()
        )
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def search(folder: Path, text: str, work: Path, **asked: Any) -> Path:
    plan = work / "plan.json"
    api.search(
        SearchRequest(
            str(folder),
            calibration=text,
            samples=SAMPLES,
            sample_tokens=0,
            output=plan,
            **asked,
            **HOW,
        )
    )
    return plan


def measure(plan: Path, work: Path, sizes: tuple[int, int]) -> list[tuple[int, list[float]]]:
    """Return each size, and the nats lost on each unseen text."""
    texts = tuple(str(work / f"{kind}-unseen.txt") for kind in KINDS)
    found = api.evaluate(
        EvalRequest(str(plan), perplexity=texts, max_windows=WINDOWS, remove=sizes, **HOW)
    )
    say("dense losses", [round(text.dense.perplexity, 2) for text in found.texts])
    return [
        (size, [text.pruned[at].log_ratio for text in found.texts]) for at, size in enumerate(sizes)
    ]


if __name__ == "__main__":
    main()
