"""Show the result of `sleb apply`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.tables import print_line, print_to_copy, show_table
from sleb_cli.units import format_bytes

if TYPE_CHECKING:
    from sleb_cli.records import Proof
    from sleb_cli.results import ApplyResult, GgufResult


def show_applied(result: ApplyResult | GgufResult) -> None:
    """Show what was written and how far it is proven."""
    from sleb_cli.tables.search import recovery  # pydantic, so here

    if result.kind == "apply":
        path, size, copied, is_verified = result.folder, result.weights_bytes, "", result.proof is not None
    else:
        path, size, copied, is_verified = result.file, result.file_bytes, _copied(result), result.verified
    print_to_copy(f"wrote {path}: {result.blocks} blocks, {format_bytes(size)}")
    if result.recovery:
        show_table(recovery(result.recovery), title=False)
    if result.kind == "apply" and result.pushed:
        print_to_copy(f"pushed to {result.pushed}")
    if not is_verified:
        print_line("not verified (--no-verify)")
    elif result.proof:
        _print_proof(result.proof, f"{copied}; transformers reads it" if copied else "stock transformers loads it")
    elif result.kind == "gguf":
        unproven = f"{copied}; logits not compared: {result.unproven}"
        print_prose(stdout(), f"[yellow]partially proven[/]: {escape(unproven)}")


def _copied(result: GgufResult) -> str:
    if not result.repacked:
        return "every tensor is a byte-for-byte copy from the source"
    kinds = [
        f"{each.tensors} {each.type}" + (f" (were {each.before})" if each.before != each.type else "")
        for each in result.repacked
    ]
    return f"tensors with new values: {', '.join(kinds)}; every other one is a byte-for-byte copy from the source"


def _print_proof(proof: Proof, loads: str) -> None:
    if proof.logits_difference is None:
        print_prose(
            stdout(),
            f"[yellow]partially proven[/]: {proof.partial}; transformers finds every weight in the files, and their "
            "bytes equal the dense model's; logits not compared",
        )
        return
    closeness = "bitwise equal to" if proof.logits_difference == 0 else f"within {proof.logits_difference:.1g} of"
    allowed = f" (allowed: {proof.logits_tolerance:.1g} of the largest)" if proof.logits_tolerance else ""
    can_be = f"[yellow]not proven[/] that it can be saved again: {proof.partial}"
    saves = can_be if proof.partial else "it can be saved again"
    references = {"dense": "the dense model with these blocks skipped", "recovered": "the recovered model in memory"}
    print_prose(
        stdout(),
        f"[green]proven[/] in {proof.dtype} on {proof.device}: {loads}; its logits on {proof.prompt_tokens} "
        f"prompt tokens are {closeness} those of {references[proof.reference]}{allowed}; it generates with the KV "
        f"cache; {saves}",
    )
