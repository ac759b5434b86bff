"""`sleb apply`."""

from pathlib import Path
from typing import Annotated

import typer

from sleb_cli.commands.options import (
    AnyModelOption,
    BlocksOption,
    ForceOption,
    JsonOption,
    OtherModelOption,
    QuietOption,
    RemoveFirstOption,
    RevisionOption,
    SubjectArgument,
    TrustOption,
    parse_blocks,
)
from sleb_plugins import UsageError


def apply(
    subject: SubjectArgument = None,
    blocks: BlocksOption = None,
    remove: RemoveFirstOption = None,
    model: OtherModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the checkpoint, or GGUF file. (default: named after the model)",
            show_default=False,
        ),
    ] = None,
    to_gguf: Annotated[
        Path | None,
        typer.Option(
            help="Remove the blocks from this GGUF file of the model instead, quantised or not, into another one.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 512MiB.")] = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="Cast the weights: float32, bfloat16, float16.", show_default=False)
    ] = None,
    force: ForceOption = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the proof after save.")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it to the hub, private.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")] = False,
    any_model: AnyModelOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the pruned checkpoint, and prove that it does what the search measured."""
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_applied, show_pruned_gguf

    if public and push is None:
        raise UsageError("--public goes with --push.", hint="Say where to: --push ORG/NAME --public.")
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.apply import apply_removals
        from sleb_cli.engine.apply_gguf import apply_to_gguf
        from sleb_cli.engine.push import PushRequest
        from sleb_cli.engine.subject import SubjectRequest, resolve_subject

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        registry, verify = load_and_report(), not no_verify
        if to_gguf is not None:
            pruned = apply_to_gguf(request, to_gguf, output, registry, notify, dtype=dtype, force=force, verify=verify)
        else:
            applied = apply_removals(
                resolve_subject(request, registry, notify, needs_removals=True),
                output,
                notify,
                max_shard_size=max_shard_size,
                dtype=dtype,
                force=force,
                verify=verify,
                push_to=PushRequest(push, private=not public) if push is not None else None,
            )
    if to_gguf is not None:
        show_pruned_gguf(pruned, as_json=json)
    else:
        show_applied(applied, as_json=json)
