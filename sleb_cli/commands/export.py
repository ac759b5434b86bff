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
        str,
        typer.Option(
            "--to", help="gguf, hf, vllm, llama-quantize, mergekit, indices, or a plugin's: see `sleb plugins`."
        ),
    ],
    subject: SubjectArgument = None,
    blocks: BlocksOption = None,
    remove: RemoveFirstOption = None,
    model: OtherModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File or folder to write. (default: texts to stdout, others named after the model)",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="A GGUF file of the model, for gguf and llama-quantize.", show_default=False),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    any_model: AnyModelOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hand the pruned model to another tool: as files, or as a text that says which blocks go."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.ui.console import show_document
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_exported
    from sleb_plugins import FileExporter

    registry = load_and_report()
    exporter = registry.exporter(to)
    if output is not None and not isinstance(exporter, FileExporter):
        require_new_file(output, force=force)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.output.export import describe_pruning, export_files
        from sleb_cli.engine.surgery.subject import SubjectRequest, resolve_subject

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        resolved = resolve_subject(request, registry, notify, needs_removals=True)
        pruning = describe_pruning(resolved, exporter, source)
        if isinstance(exporter, FileExporter):
            exported = export_files(
                exporter, resolved, pruning, output, registry, notify, force=force, any_model=any_model
            )
    if isinstance(exporter, FileExporter):
        show_exported(exported, as_json=json)
    else:
        show_document(exporter, pruning, output, as_json=json)
