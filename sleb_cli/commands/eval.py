"""`sleb eval`."""

from pathlib import Path
from typing import Annotated

import typer

from sleb_cli.commands.options import (
    AnyModelOption,
    BlocksOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OtherModelOption,
    QuietOption,
    RemoveFirstOption,
    ResultOption,
    RevisionOption,
    SubjectArgument,
    TrustOption,
    parse_blocks,
    parse_names,
)


def eval_(
    subject: SubjectArgument = None,
    blocks: BlocksOption = None,
    remove: RemoveFirstOption = None,
    model: OtherModelOption = None,
    perplexity: Annotated[
        str | None,
        typer.Option(
            help="Texts: wikitext2, c4, files, org/name[:config][:split][:column]; commas between. "
            "(default: wikitext2, unless --tasks)",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, commas between: piqa,arc_easy.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.", show_default=False)] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples in the prompt. (default: the task's own)", show_default=False),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", show_default=False)
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens in a perplexity window. (default: 2048 or the model's limit)", show_default=False),
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every perplexity window with the BOS token.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows, or task items, at once.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    output: ResultOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    any_model: AnyModelOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure quality, dense beside pruned: perplexity and lm-eval tasks."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_evaluation

    if output is not None:
        require_new_file(output, force=force)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.measure.evaluation import EvalRequest, evaluate
        from sleb_cli.engine.surgery.subject import SubjectRequest, resolve_subject

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        wanted = EvalRequest(
            texts=parse_names(perplexity),
            tasks=parse_names(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
            sequence_length=sequence_length,
            bos=bos,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
        )
        result = evaluate(resolve_subject(request, load_and_report(), notify), wanted, notify)
    show_evaluation(result, output, as_json=json)
