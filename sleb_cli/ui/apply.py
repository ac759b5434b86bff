"""Show the result of `sleb apply`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.tables import print_line, print_to_copy
from sleb_cli.units import format_bytes

if TYPE_CHECKING:
    from sleb_cli.plan import RecoveryRecord
    from sleb_cli.records import Proof
    from sleb_cli.results import ApplyResult, GgufResult


def show_applied(result: ApplyResult | GgufResult) -> None:
    """Show what was written and how far it is proven."""
    if result.kind == "gguf":
        _show_gguf(result)
    else:
        _show_checkpoint(result)


def _show_checkpoint(result: ApplyResult) -> None:
    _print_size(result.folder, result.blocks, result.weights_bytes)
    if result.recovery:
        _print_recovery(result.recovery)
    if result.pushed:
        print_to_copy(f"pushed to {result.pushed}")
    if result.proof is None:
        stdout().print("not verified (--no-verify)")
        return
    _print_proof(result.proof, "stock transformers loads it")


def _show_gguf(result: GgufResult) -> None:
    _print_size(result.file, result.blocks, result.file_bytes)
    if result.recovery:
        _print_recovery(result.recovery)
    same = _copied_and_repacked(result)
    if not result.verified:
        stdout().print("not verified (--no-verify)")
    elif result.proof is None:
        unproven = escape(result.unproven or "")
        print_prose(stdout(), f"[yellow]partially proven[/]: {same}; logits not compared: {unproven}")
    else:
        _print_proof(result.proof, f"{same}; transformers reads it")


def _copied_and_repacked(result: GgufResult) -> str:
    if not result.repacked:
        return "every tensor is a byte-for-byte copy from the source"
    kinds = [
        f"{each.tensors} {each.type}" + (f" (were {each.before})" if each.before != each.type else "")
        for each in result.repacked
    ]
    return f"tensors with new values: {', '.join(kinds)}; every other one is a byte-for-byte copy from the source"


def _print_size(path: str, blocks: int, size: int) -> None:
    print_to_copy(f"wrote {path}: {blocks} blocks, {format_bytes(size)}")


def _print_recovery(recovery: RecoveryRecord) -> None:
    stages = {"dense": recovery.dense, "pruned": recovery.pruned, "recovered": recovery.closed_form_losses}
    stages |= {"healed": recovery.heal.losses if recovery.heal else None}
    perplexities = [f"{what} {math.exp(losses.loss):.2f}" for what, losses in stages.items() if losses]
    text = recovery.report_text
    sequences = "1 sequence" if text.sequences == 1 else f"{text.sequences} sequences"
    print_line(f"perplexity on {sequences} of {text.title} that decided nothing: {', '.join(perplexities)}")
    print_line(recovery.summary)


def _print_proof(proof: Proof, loaded: str) -> None:
    if proof.logits_difference is None:
        print_prose(
            stdout(),
            f"[yellow]partially proven[/]: {proof.partial}; transformers finds every weight in the files, and their "
            "bytes equal the dense model's; logits not compared",
        )
        return
    closeness = "bitwise equal to" if proof.logits_difference == 0 else f"within {proof.logits_difference:.1g} of"
    allowed = f" (allowed: {proof.logits_tolerance:.1g} of the largest)" if proof.logits_tolerance else ""
    saves = (
        f"[yellow]not proven[/] that it can be saved again: {proof.partial}"
        if proof.partial
        else "it can be saved again"
    )
    reference = {"dense": "the dense model with these blocks skipped", "recovered": "the recovered model in memory"}[
        proof.reference
    ]
    print_prose(
        stdout(),
        f"[green]proven[/] in {proof.dtype} on {proof.device}: {loaded}; its logits on {proof.prompt_tokens} "
        f"prompt tokens are {closeness} those of {reference}{allowed}; it generates with the KV cache; {saves}",
    )
