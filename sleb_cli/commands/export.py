"""`sleb export`."""

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


def export(
    to: Annotated[
        str, typer.Option("--to", help="mergekit, indices, or a plugin's format: `sleb plugins` lists them.")
    ],
    subject: SubjectArgument = None,
    blocks: BlocksOption = None,
    remove: RemoveFirstOption = None,
    model: OtherModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write to a file, not to stdout.", show_default=False),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    any_model: AnyModelOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the removals in another tool's format."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.ui.console import show_document
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress

    if output is not None:
        require_new_file(output, force=force)
    registry = load_and_report()
    exporter = registry.exporter(to)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.export import describe_pruning
        from sleb_cli.engine.subject import SubjectRequest, resolve_subject

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        pruning = describe_pruning(resolve_subject(request, registry, notify, needs_removals=True))
    show_document(exporter, pruning, output, as_json=json)
