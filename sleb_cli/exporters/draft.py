"""Export how to use the pruned model as a draft for the dense one, and whether that pays.

The draft writes a few tokens, and the dense model checks them in one pass: its text stays as it is (speculative
decoding, Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from sleb_cli.exporters.findings import Findings, read_findings
from sleb_cli.plan import CHECKPOINT_PLAN, checkpoint_name
from sleb_cli.units import format_share, plural
from sleb_plugins.exporter import Exporter, Pruning

MOST_TOKENS = 16
"""The most tokens that are drafted at a time."""


class Draft(Exporter):
    """Whether the pruned model is worth it as a draft, and the lines that start it in three engines."""

    name = "draft"
    description = "whether the pruned model pays as a draft for the dense one, and how to start it"
    needs_model = False

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Return the figures and the lines."""
        return _document(read_findings(pruning, public=False), pruning)

    def render(self, pruning: Pruning) -> str:
        """Return the same as comments and lines to copy."""
        findings = read_findings(pruning, public=False)
        document = _document(findings, pruning)
        said = [f"# {sentence}" for sentence in _sentences(document, findings)]  # unbroken, as they hold commands
        for engine, line in document["lines"].items():
            said += ["", f"# {engine}", line]
        return "\n".join(said) + "\n"


def _document(findings: Findings, pruning: Pruning) -> dict[str, Any]:
    (text, accepted), cost = _accepted(findings), _cost(findings)
    tokens, speedup = best_draft(accepted, cost) if accepted is not None and cost else (None, None)
    lines = _lines(findings, pruning, tokens or 1)
    return {"accepted": accepted, "text": text, "cost": cost, "tokens": tokens, "speedup": speedup, "lines": lines}


def best_draft(accepted: float, cost: float) -> tuple[int, float]:
    """Return how many tokens to draft at a time, and how many times as fast that is at most.

    Source: Leviathan et al., theorem 3.8. It takes checking several tokens to cost as much as writing one, so engines
    stay below it.

    Args:
        accepted: the mean share of the draft's tokens that the dense model keeps, 0 to 1.
        cost: the time of the draft's token in that of the dense model's.
    """

    def speedup(tokens: int) -> float:
        kept = sum(accepted**token for token in range(tokens + 1))  # of a round, with the dense model's own
        return kept / (tokens * cost + 1)

    best = max(range(1, MOST_TOKENS + 1), key=speedup)
    return best, speedup(best)


def _accepted(findings: Findings) -> tuple[str | None, float | None]:
    """Return the text on which most was measured of the tokens that the dense model keeps, and their share."""
    if recovery := findings.plan.recovery:
        if talks := recovery.conversations:
            return "answers in its own conversations", (talks.healed or talks.closed_form or talks.pruned).accepted
        return str(recovery.test_text), recovery.recovered.accepted
    if not findings.own_texts:
        return None, None
    name, _, scores = max(findings.own_texts, key=lambda found: found[1].tokens)
    return name, scores.divergence.accepted


def _cost(findings: Findings) -> float | None:
    """Return the time of a token of the pruned model in that of the dense one, with the smallest batch."""
    timed = [
        (result.workload.batch_size, own.tpot_ms.median / result.dense.tpot_ms.median)
        for result in findings.workloads
        if (own := findings.own(result.pruned)) and own.tpot_ms and result.dense.tpot_ms
    ]
    return min(timed)[1] if timed else None


def _sentences(document: dict[str, Any], findings: Findings) -> list[str]:
    accepted, cost, tokens, speedup = (document[name] for name in ("accepted", "cost", "tokens", "speedup"))
    sentences = []
    if speedup is not None:
        verdict = f"worth a try with {plural(tokens, 'token')} at a time" if speedup > 1 else "not worth it"
        sentences.append(f"As a draft for the dense model: about {speedup:.2f}x as fast at best, {verdict}.")
    if accepted is None:
        sentences.append(f"Not measured: how many of its tokens are kept. Run `sleb eval {findings.plan_argument}`.")
    else:
        sentences.append(f"The dense model keeps {format_share(accepted)} of its tokens ({document['text']}).")
    if cost is None:
        sentences.append(
            f"Not measured: what a token costs. Run `sleb bench {findings.plan_argument} --generation --batch-size 1`."
        )
    else:
        sentences.append(f"A token takes {format_share(cost)} of the dense model's time.")
    return [*sentences, "Drafting pays if its share of the time is below the share of tokens kept."]


def _lines(findings: Findings, pruning: Pruning, tokens: int) -> dict[str, str]:
    """Return the line for each engine, which takes `tokens` at a time."""
    model, draft = pruning.model, checkpoint_name(findings.short_model, pruning.blocks - len(pruning.removals))
    if findings.file.name == CHECKPOINT_PLAN:
        draft = str(findings.file.parent.resolve() if findings.file.parent == Path() else findings.file.parent)
    speculative = json.dumps({"method": "draft_model", "model": draft, "num_speculative_tokens": tokens})
    # These names are of llama.cpp since May 2026 (ggml-org/llama.cpp, pull requests 22397 and 22964).
    dense = f"{findings.short_model.removesuffix('.gguf')}.gguf"
    drafting = ["-md", f"{Path(draft).name}.gguf", "--spec-type", "draft-simple", "--spec-draft-n-max", str(tokens)]
    return {
        "transformers": (
            f"draft = AutoModelForCausalLM.from_pretrained({json.dumps(draft)})\n"
            f"draft.generation_config.num_assistant_tokens = {tokens}\n"
            "model.generate(**inputs, assistant_model=draft)"
        ),
        "vLLM": shlex.join(["vllm", "serve", model, "--speculative-config", speculative]),
        "llama.cpp": shlex.join(["llama-server", "-m", dense, *drafting]),
    }
