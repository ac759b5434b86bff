"""`sleb search`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sleb_cli.commands.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    RevisionOption,
    TrustOption,
    parse_blocks,
    parse_names,
)

HOW_FAR = "How far it goes: one of these"
SERVED = "What is counted and timed for a target"


def search(
    model: ModelArgument,
    ratio: Annotated[
        str | None,
        typer.Option(
            help="Share of the blocks to remove, rounded up: 0.2.", show_default=False, rich_help_panel=HOW_FAR
        ),
    ] = None,
    remove: Annotated[
        int | None, typer.Option(help="Number of blocks to remove.", show_default=False, rich_help_panel=HOW_FAR)
    ] = None,
    target_params: Annotated[
        str | None,
        typer.Option(
            help="Remove until at most so many parameters remain: 1.2B.", show_default=False, rich_help_panel=HOW_FAR
        ),
    ] = None,
    target_memory: Annotated[
        str | None,
        typer.Option(
            help="Remove until weights and KV cache need at most so much: 6GiB.",
            show_default=False,
            rich_help_panel=HOW_FAR,
        ),
    ] = None,
    target_speedup: Annotated[
        str | None,
        typer.Option(
            help="Remove until it is so many times as fast, timed here: 1.25.",
            show_default=False,
            rich_help_panel=HOW_FAR,
        ),
    ] = None,
    max_loss_increase: Annotated[
        str | None,
        typer.Option(
            help="Remove while the loss rises by at most so many nats per token: 0.1.",
            show_default=False,
            rich_help_panel=HOW_FAR,
        ),
    ] = None,
    max_perplexity_ratio: Annotated[
        str | None,
        typer.Option(
            help="Remove while perplexity is at most so many times the dense one: 1.2.",
            show_default=False,
            rich_help_panel=HOW_FAR,
        ),
    ] = None,
    serve_dtype: Annotated[
        str | None,
        typer.Option(
            help="For --target-memory: how it will be served. (default: --dtype)",
            show_default=False,
            rich_help_panel=SERVED,
        ),
    ] = None,
    serve_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in the KV cache. (default: 4096, or the model's limit)",
            show_default=False,
            rich_help_panel=SERVED,
        ),
    ] = None,
    serve_batch: Annotated[
        int | None,
        typer.Option(help="Sequences in the KV cache. (default: 1)", show_default=False, rich_help_panel=SERVED),
    ] = None,
    target_workload: Annotated[
        Literal["prompt", "generation"] | None,
        typer.Option(
            help="For --target-speedup: prompt or generation. (default: generation)",
            show_default=False,
            rich_help_panel=SERVED,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="How a candidate is scored, or a sum: nll+0.5*kl; `sleb plugins` lists them. (default: nll)",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Search once for each of these metrics, METRIC or METRIC@STRATEGY, and write the best plan: "
            "nll,cosine,angular@contiguous.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How blocks are chosen: greedy, refine (greedy, then exchanges), beam, oneshot (all scored once), "
            "contiguous (the best span), or last. (default: greedy)",
            show_default=False,
        ),
    ] = None,
    beam_width: Annotated[
        int | None, typer.Option(help="Sets of blocks that a beam keeps. (default: 4)", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, wikitext2-sleb, c4-sleb, self, a .txt or .jsonl file, "
            "org/name[:config][:split][:column], or a mixture: self:0.5,c4:0.5. (default: wikitext2; self for demo)",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        Literal["all", "answers"] | None,
        typer.Option(
            help="The calibration data are conversations, a field or column `messages`: what counts of them.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration sequences. (default: 16)", show_default=False),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens in each. (default: 2048 or the model's limit; 128 for demo)", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Decides which text is drawn or written, and the order of a race. (default: 0)", show_default=False
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Let candidates race: who is clearly beaten is scored on no more sequences.")
    ] = False,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the calibration sequences never searched on; shows overfitting: 0.2. (default: 0)",
            show_default=False,
        ),
    ] = None,
    protect_first: Annotated[
        int | None, typer.Option(help="Blocks at the start that stay. (default: 1)", show_default=False)
    ] = None,
    protect_last: Annotated[
        int | None, typer.Option(help="Blocks at the end that stay. (default: 1)", show_default=False)
    ] = None,
    protect: Annotated[str | None, typer.Option(help="Further blocks that stay: 5,11.", show_default=False)] = None,
    protect_kind: Annotated[
        list[str] | None,
        typer.Option(help="A kind of block that stays: full_attention. May be repeated.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, or auto: the checkpoint's own. (default: auto)", show_default=False
        ),
    ] = None,
    device: DeviceOption = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            help="What a search may take beside the model: 8GiB. (default: a share of what is free)", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences that pass through a block together. (default: by device)", show_default=False),
    ] = None,
    extend: Annotated[
        Path | None,
        typer.Option(help="Go on from a finished plan, with its settings and text.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was interrupted.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Where to write the plan. (default: plan.json, or the one extended)",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the blocks that MODEL can best do without, and write them to a plan."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.engine.search.journal import Journal, journal_of
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_comparison, show_plan

    # An extended plan holds all that was in the old one, so it may take its place.
    place = output or extend or Path("plan.json")
    require_new_file(place, force=force or place == extend)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.search.compare import compare_removals, forget_journals
        from sleb_cli.engine.search.resolve import SearchRequest
        from sleb_cli.engine.search.run import find_removals
        from sleb_cli.engine.search.targets import TargetRequest
        from sleb_cli.engine.text.calibration import CalibrationRequest

        request = SearchRequest(
            model=model,
            output=place,
            target=TargetRequest(
                ratio=ratio,
                remove=remove,
                target_params=target_params,
                target_memory=target_memory,
                target_speedup=target_speedup,
                max_loss_increase=max_loss_increase,
                max_perplexity_ratio=max_perplexity_ratio,
                serve_dtype=serve_dtype,
                serve_length=serve_length,
                serve_batch=serve_batch,
                workload=target_workload,
            ),
            calibration=CalibrationRequest(calibration, samples, sequence_length, seed, chat),
            metric=metric,
            strategy=strategy,
            beam_width=beam_width,
            protect_first=protect_first,
            protect_last=protect_last,
            protect=parse_blocks(protect, "--protect"),
            protect_kinds=tuple(protect_kind or ()),
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            memory=memory,
            fast=fast,
            holdout=holdout,
            extend=extend,
            resume=resume,
            force=force,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if compare is not None:
            result, plan = compare_removals(request, parse_names(compare), load_and_report(), notify)
        else:
            plan = find_removals(request, load_and_report(), notify)
    if compare is not None:
        show_comparison(result, plan, place, as_json=json)
        forget_journals(result, place)
    else:
        show_plan(plan, place, as_json=json)
        Journal(journal_of(place)).delete()
