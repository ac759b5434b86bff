"""`sleb search`."""

from pathlib import Path
from typing import Annotated

import typer

from sleb_cli.commands.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    RevisionOption,
    TrustOption,
)


def search(
    model: ModelArgument,
    ratio: Annotated[
        str | None, typer.Option(help="Share of the blocks to remove, rounded up: 0.2.", show_default=False)
    ] = None,
    remove: Annotated[int | None, typer.Option(help="Number of blocks to remove.", show_default=False)] = None,
    metric: Annotated[str, typer.Option(help="How a candidate is scored; `sleb plugins` lists them.")] = "nll",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, wikitext2-sleb, c4-sleb, self, a .txt or .jsonl file, or "
            "org/name[:config][:split][:column]. (default: wikitext2; self for demo)",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration sequences. (default: 16; 8 for demo)", show_default=False),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens in each. (default: 2048 or the model's limit; 128 for demo)", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which text is drawn, or written.")] = 0,
    protect_first: Annotated[int, typer.Option(help="Blocks at the start that stay.")] = 1,
    protect_last: Annotated[int, typer.Option(help="Blocks at the end that stay.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences at once. (default: 2048 tokens)", show_default=False)
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the plan.")] = Path("plan.json"),
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the blocks that MODEL can best do without, and write them to a plan."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_plan

    require_new_file(output, force=force)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.calibration import CalibrationRequest
        from sleb_cli.engine.search import SearchRequest, plan_removals

        request = SearchRequest(
            model=model,
            ratio=ratio,
            remove=remove,
            calibration=CalibrationRequest(calibration, samples, sequence_length, seed),
            metric=metric,
            protect_first=protect_first,
            protect_last=protect_last,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        plan = plan_removals(request, load_and_report(), notify)
    show_plan(plan, output, as_json=json)
