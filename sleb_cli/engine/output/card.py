"""The README of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml

from sleb_cli.atomic import write_text
from sleb_cli.engine.output.card_metadata import front_matter, with_results
from sleb_cli.engine.output.card_results import card_table, hub_results, measured_in, results_section
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.events import Notify, Warned, ignore
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, RecoveryRecord, checkpoint_name, read_plan
from sleb_cli.records import Proof, without_folders
from sleb_cli.tables import search
from sleb_cli.tables.proof import checked
from sleb_cli.tables.table import in_markdown
from sleb_cli.version import __version__
from sleb_plugins import SlebError

CARD = "README.md"
# What is between these lines is written anew whenever something is measured; what people write around them stays.
BEGIN = "<!-- results, kept up to date by sleb: begin -->"
END = "<!-- results, kept up to date by sleb: end -->"


def update_card(folder: Path, notify: Notify = ignore) -> None:
    """Update the results in a checkpoint's card, unless its author removed their place.

    A card that cannot be updated is a warning: the results are kept anyway.
    """
    try:
        fill_in_results(folder, notify)
    except FileNotFoundError:
        return
    except (SlebError, OSError, ValueError, yaml.YAMLError) as error:
        reason = error.message if isinstance(error, SlebError) else str(error).partition("\n")[0]
        notify(Warned(f"Cannot update {folder / CARD}: {reason.rstrip('.')}."))


def fill_in_results(folder: Path, notify: Notify) -> None:
    """Write the results that a checkpoint holds into its card, between the two lines for them, if they are there.

    Raises:
        SlebError, OSError, ValueError, yaml.YAMLError: the card or the plan cannot be read, or the card not written.
    """
    path = folder / CARD
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        plan = read_plan(folder / CHECKPOINT_PLAN)
        measured = measured_in(folder, plan, notify)
        name = checkpoint_name(without_folders(plan.model.id), plan.model.blocks - len(plan.removals))
        results = "\n".join([BEGIN, *results_section(measured), END])
        write_text(path, with_results(f"{before}{results}{after}", name, hub_results(measured)))


def model_card(subject: Subject, recovery: RecoveryRecord | None, proof: Proof | None) -> str:
    """Return the README without results: the base model, the removed blocks, how they were found, and the proof."""
    source, removals = subject.architecture.source, subject.surgery.removals
    lines = [
        front_matter(source),
        f"# {in_markdown(source.name)} without {len(removals)} of its {subject.architecture.block_count} blocks",
        "",
        # The card may be published, so it does not show the path of a local folder.
        "- Base model: "
        + (f"`{source.id}` at revision `{source.revision}`" if source.revision else in_markdown(source.name)),
        f"- Blocks removed, in order, numbered from 0 in the base model: {', '.join(map(str, removals))}",
        f"- Made by sleb {__version__} (SLEB, arXiv:2402.09025): whole transformer blocks removed, "
        + ("no training" if recovery is None else "the others given new weights"),
        *_search(subject),
        *_sample_generation(subject.plan),
        *_recovery(recovery),
        *_proof(proof),
        "",
        BEGIN,
        END,
        "",
    ]
    return "\n".join(lines)


def _search(subject: Subject) -> list[str]:
    if subject.plan is None:
        return ["- The blocks were chosen by hand."]
    plan = subject.plan.published()
    return [
        f"- Found by {plan.search.strategy} search: metric {in_markdown(plan.search.metric)} (`{CHECKPOINT_PLAN}` has "
        "every score)",
        *card_table(search.steps(plan)),
    ]


def _sample_generation(plan: Plan | None) -> list[str]:
    """Return what both models generated at the end of the search."""
    sample = plan.sample_generation if plan else None
    if sample is None:
        return []
    said = [f"{who} ({repeated}): {' '.join(text.split())}" for who, repeated, text in search.said(sample)]
    prompt = in_markdown(sample.prompt)
    return [
        *(line for warning in search.collapse(sample) for line in ("", f"**{warning}**")),
        "",
        f'At the end of the search, both models continued "{prompt}" greedily as follows; "repeated" is the '
        "share of runs of 4 tokens that occurred before:",
        "",
        "```text",
        # Without backticks, so that no text can close the fence.
        *(line.replace("`", "'") for line in said),
        "```",
    ]


def _recovery(recovery: RecoveryRecord | None) -> list[str]:
    if recovery is None:
        return []
    published = recovery.published()
    return [
        "",
        f"The remaining blocks were given new weights on {in_markdown(str(published.train_text))}, to bring the model "
        "closer to the base model.",
        *card_table(search.recovery(published)),
    ]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["", "The checkpoint was written without a proof (`--no-verify`)."]
    partial = ["", f"**The proof is partial**: {proof.partial}."] if proof.partial else []
    clauses = [f"- {clause}" for clause in checked(proof, "the base model")]
    return [*partial, "", f"Checked after saving, in {proof.dtype} on {proof.device}:", "", *clauses]
