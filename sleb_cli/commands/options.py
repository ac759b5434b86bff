"""Option types that more than one command takes."""

from pathlib import Path
from typing import Annotated

import typer

from sleb_plugins import UsageError

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, or demo.", show_default=False),
]
SubjectArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="PLAN|MODEL",
        help="A plan (./plan.json where nothing is named), or a model with --blocks.",
        show_default=False,
    ),
]
BlocksOption = Annotated[
    str | None,
    typer.Option("--blocks", help="Blocks to remove from MODEL, in order: 5,4,9.", show_default=False),
]
RemoveFirstOption = Annotated[
    int | None,
    typer.Option(
        "--remove",
        help="Remove only N: the blocks of the plan's step N, or the first N of --blocks.",
        show_default=False,
    ),
]
OtherModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Where the plan's model is now, if it moved.", show_default=False),
]
AnyModelOption = Annotated[bool, typer.Option("--any-model", help="Use the plan on a model it was not made for.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's own.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
ResultOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the result as JSON.", show_default=False)
]


def parse_blocks(text: str | None, option: str = "--blocks") -> tuple[int, ...] | None:
    """Read `5,4,9`.

    Raises:
        UsageError: something in it is no number.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers.", hint="Write it like 5,4,9.") from error


def parse_names(text: str | None) -> tuple[str, ...]:
    """Read `wikitext2,c4`; nothing gives nothing."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
