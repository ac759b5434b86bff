"""`sleb bench`."""

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
)

CountOption = Annotated[int | None, typer.Option(help="(default: by workload and device)", show_default=False)]


def bench(
    subject: SubjectArgument = None,
    blocks: BlocksOption = None,
    remove: RemoveFirstOption = None,
    model: OtherModelOption = None,
    prompt: Annotated[bool, typer.Option("--prompt", help="Time prompt processing (prefill).")] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Time generation (prefill and decode). (default: both)")
    ] = False,
    batch_size: CountOption = None,
    prompt_length: CountOption = None,
    new_tokens: CountOption = None,
    iterations: CountOption = None,
    warmup: CountOption = None,
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
    """Measure speed and memory, dense and pruned in alternation."""
    from sleb_cli.atomic import require_new_file
    from sleb_cli.ui.plugins import load_and_report
    from sleb_cli.ui.progress import show_progress
    from sleb_cli.ui.tables import show_benchmark

    if output is not None:
        require_new_file(output, force=force)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.measure.benchmark import benchmark
        from sleb_cli.engine.measure.workloads import BenchRequest, choose_workloads
        from sleb_cli.engine.surgery.subject import SubjectRequest, resolve_subject

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        wanted = BenchRequest(
            workloads=choose_workloads(prompt=prompt, generation=generation),
            batch_size=batch_size,
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            iterations=iterations,
            warmup=warmup,
            dtype=dtype,
            device=device,
        )
        result = benchmark(resolve_subject(request, load_and_report(), notify), wanted, notify)
    show_benchmark(result, output, as_json=json)
