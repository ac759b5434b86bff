"""The README of a pruned checkpoint."""

from __future__ import annotations

import math

from huggingface_hub import ModelCardData

from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.plan import LossesRecord, Plan, RecoveryRecord
from sleb_cli.records import Check, Proof
from sleb_cli.version import __version__


def model_card(subject: Subject, recovery: RecoveryRecord | None, proof: Proof | None) -> str:
    """Return the README: the base model, the removed blocks, how they were found, and what was checked."""
    architecture, surgery = subject.architecture, subject.surgery
    source = architecture.source
    removals = ", ".join(map(str, surgery.removals))
    front_matter = ModelCardData(
        base_model=source.id if source.revision else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sleb", "pruned"],
    )
    lines = [
        "---",
        front_matter.to_yaml(),
        "---",
        "",
        f"# {source.name} without {len(surgery.removals)} of its {architecture.block_count} blocks",
        "",
        # The card may be published, so it does not show the path of a local folder.
        "- Base model: "
        + (f"`{source.id}` at revision `{source.revision}`" if source.revision else f"`{source.name}`"),
        f"- Blocks removed, in order, numbered from 0 in the base model: {removals}",
        f"- Made by sleb {__version__} (SLEB, arXiv:2402.09025): whole transformer blocks removed, "
        + ("no training" if recovery is None else "the others given new weights"),
        *_search(subject),
        *_sample_generation(subject.plan),
        *_recovery(recovery),
        *_proof(proof),
        "",
    ]
    return "\n".join(lines)


def _search(subject: Subject) -> list[str]:
    if subject.plan is None:
        return ["- The blocks were chosen by hand."]
    plan = subject.plan.published()
    return [
        f"- Found by {plan.search.strategy} search: metric {plan.search.metric}, calibrated on {plan.calibration}, "
        f"{plan.search.dtype} (`sleb_plan.json` has every score)",
        "",
        "| removed | perplexity on the calibration text |",
        "|---|---|",
        f"| none | {plan.dense.perplexity:.2f} |",
        *(
            f"| {', '.join(map(str, removals))} | {step.perplexity:.2f} |"
            for removals, step in zip(plan.by_size, plan.steps, strict=True)
        ),
    ]


def _sample_generation(plan: Plan | None) -> list[str]:
    """Return what both models generated at the end of the search."""
    sample = plan.sample_generation if plan else None
    if sample is None:
        return []
    said = (
        ("base model", sample.dense, sample.dense_repetition),
        ("pruned", sample.pruned, sample.pruned_repetition),
    )
    warning = "**The pruned model repeats itself much more than the base model.** " if sample.is_repetitive else ""
    return [
        "",
        f'{warning}At the end of the search, both models continued "{sample.prompt}" greedily as follows; "repeated" '
        "is the share of runs of 4 tokens that occurred before:",
        "",
        "```text",
        # Without backticks, so that no text can close the fence.
        *(f"{name} ({share:.0%} repeated): {' '.join(text.split())}".replace("`", "'") for name, text, share in said),
        "```",
    ]


def _recovery(recovery: RecoveryRecord | None) -> list[str]:
    if recovery is None:
        return []
    text, healed = recovery.text, recovery.heal

    def row(what: str, losses: LossesRecord) -> str:
        return f"| {what} | {math.exp(losses.loss):.2f} | {losses.divergence:.4f} |"

    return [
        "",
        f"The remaining blocks were given new weights on {text.title} ({text.sequences} x {text.sequence_length} "
        f"tokens), to bring the model closer to the base model. On {recovery.report_text.sequences} other sequences, "
        f"which decided nothing, {recovery.summary}:",
        "",
        "| | perplexity | KL to the base model, nats per token |",
        "|---|---|---|",
        row("base model", recovery.dense),
        row("pruned", recovery.pruned),
        *([row("recovered in closed form", recovery.closed_form_losses)] if recovery.closed_form_losses else []),
        *([row(f"healed: distilled for {healed.tokens} tokens", healed.losses)] if healed else []),
    ]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["", "The checkpoint was written without a proof (`--no-verify`)."]
    difference = proof.logits_difference or 0.0
    same = "equal" if difference == 0 else f"equal within {difference:.2g} of the largest,"
    reference = {
        "dense": "the base model with these blocks skipped",
        "recovered": "the recovered model in memory, before it was written",
    }[proof.reference]
    words: dict[Check, str] = {
        "complete": "every tensor is complete in its file",
        "loads": "stock transformers finds every weight of the config in the files, and no other",
        "same logits": f"on a prompt of {proof.prompt_tokens} tokens ({proof.prompt}), its logits are {same} to those "
        f"of {reference}",
        "generates": "it generates with the KV cache",
        "saves again": "transformers saves it again, with the same weights",
        "same bytes": "the bytes of every weight are those of the base model",
    }
    partial = ["", f"**The proof is partial**: {proof.partial}."] if proof.partial else []
    checked = [f"- {words[check]}" for check in proof.checks]
    return [*partial, "", f"Checked after saving, in {proof.dtype} on {proof.device}:", "", *checked]
