"""Show the result of `sleb apply`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from sleb_cli.ui.console import print_prose, stdout
from sleb_cli.ui.tables import print_line, print_to_copy, show_table
from sleb_cli.units import format_bytes

if TYPE_CHECKING:
    from sleb_cli.results import ApplyResult, GgufResult


def show_applied(result: ApplyResult | GgufResult) -> None:
    """Show what was written and how far it is proven."""
    from sleb_cli.tables.proof import checked  # pydantic, so here
    from sleb_cli.tables.search import recovery

    proof, said = result.proof, checked(result.proof) if result.proof else []
    if result.kind == "apply":
        path, size, is_verified = result.folder, result.weights_bytes, proof is not None
        unproven = None
    else:
        path, size, is_verified = result.file, result.file_bytes, result.verified
        said, unproven = [_copied(result), *said], result.unproven
    print_to_copy(f"wrote {path}: {result.blocks} blocks, {format_bytes(size)}")
    if result.recovery:
        show_table(recovery(result.recovery), title=False)
    if result.kind == "apply" and result.pushed:
        print_to_copy(f"pushed to {result.pushed}")
    if not is_verified:
        print_line("not verified (--no-verify)")
        return
    missing = proof.partial if proof else f"logits not compared: {unproven}"
    how = "[yellow]partially proven[/]" if missing else "[green]proven[/]"
    where = f" in {proof.dtype} on {proof.device}" if proof else ""
    print_prose(stdout(), f"{how}{where}: {escape('; '.join([*said, *([missing] if missing else [])]))}")


def _copied(result: GgufResult) -> str:
    if not result.repacked:
        return "every tensor is a byte-for-byte copy from the source"
    kinds = [
        f"{each.tensors} {each.type}" + (f" (were {each.before})" if each.before != each.type else "")
        for each in result.repacked
    ]
    return f"tensors with new values: {', '.join(kinds)}; every other one is a byte-for-byte copy from the source"
