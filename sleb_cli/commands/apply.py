"""`sleb apply`."""

from collections.abc import Mapping
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
    recover: Annotated[
        bool, typer.Option("--recover", help="Refit the blocks around each gap to the dense model, in closed form.")
    ] = False,
    heal: Annotated[
        bool, typer.Option("--heal", help="Train the blocks that stay to predict as the dense model does.")
    ] = False,
    heal_minutes: Annotated[float | None, typer.Option(help="For how long. (default: 10)", show_default=False)] = None,
    heal_tokens: Annotated[
        int | None, typer.Option(help="For how many tokens, instead: the same in every run.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a healing that was interrupted.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to recover on, as for `sleb search`. (default: self; --recover: a quarter of it)",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Sequences of it; a fifth is held out. (default: 65,536 tokens, of self 32,768)", show_default=False
        ),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in each. (default: 512 or the model's limit)", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides which text is drawn or written. (default: 0)", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to recover: cpu, cuda, cuda:1, mps. (default: auto)", show_default=False)
    ] = None,
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
    budget = {"--heal-minutes": heal_minutes, "--heal-tokens": heal_tokens, "--resume": resume}
    text = {"--calibration": calibration, "--samples": samples, "--sequence-length": sequence_length, "--seed": seed}
    _require_ways(budget, text | {"--device": device}, recover=recover, heal=heal, to_gguf=to_gguf is not None)
    with show_progress(quiet=quiet, first="Starting") as notify:
        from sleb_cli.engine.output.apply import apply_removals
        from sleb_cli.engine.output.apply_gguf import apply_to_gguf
        from sleb_cli.engine.output.push import PushRequest
        from sleb_cli.engine.recovery.run import HealRequest, RecoveryRequest
        from sleb_cli.engine.surgery.subject import SubjectRequest, resolve_subject
        from sleb_cli.engine.text.calibration import CalibrationRequest

        request = SubjectRequest(subject, parse_blocks(blocks), remove, model, any_model, revision, trust_remote_code)
        registry, verify = load_and_report(), not no_verify
        asked = CalibrationRequest(calibration, samples, sequence_length, seed)
        healing = HealRequest(heal_minutes, heal_tokens, resume) if heal else None
        recovery = RecoveryRequest(recover, asked, healing, device or "auto") if recover or heal else None
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
                recovery=recovery,
            )
    if to_gguf is not None:
        show_pruned_gguf(pruned, as_json=json)
    else:
        show_applied(applied, as_json=json)


def _require_ways(
    budget: Mapping[str, object], text: Mapping[str, object], *, recover: bool, heal: bool, to_gguf: bool
) -> None:
    """Make sure that what was said about recovery is of use.

    Raises:
        UsageError: it is not, or GGUF files were meant.
    """
    for options, useful, ways in ((budget, heal, "--heal"), (text, recover or heal, "--recover or --heal")):
        given = [name for name, value in options.items() if value not in (None, False)]
        if given and not useful:
            raise UsageError(f"{given[0]} goes with {ways}.", hint="Give both, or neither.")
    if to_gguf and (recover or heal):
        raise UsageError(
            f"{'--recover' if recover else '--heal'} does not go with --to-gguf, which copies tensors as they are.",
            hint="Recover the model itself, and convert the checkpoint.",
        )
