"""What do the numbers depend on? The settings of searches, evaluations and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sleb_cli.plan import Plan
from sleb_cli.results import BenchResult, EvalResult
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Table, tabulate
from sleb_cli.units import format_seconds, format_share, spans


def search_settings(plan: Plan) -> Table:
    """List the settings of a search."""
    model, search, text, environment = plan.model, plan.search, plan.calibration, plan.environment
    implementation = search.implementation
    package = (
        f" of {implementation.package} {implementation.version}"
        if implementation and implementation.package != "sleb"
        else ""
    )
    protected = f"{search.protect_first} at the start, {search.protect_last} at the end"
    held_out = f" ({search.held_out} held out)" if search.held_out else ""
    rows = [
        ("model", model.id),
        ("revision", model.revision),
        ("fingerprint", model.fingerprint[:16]),
        ("family", f"{model.family} ({model.model_type}), {model.blocks} blocks"),
        ("removed, in order", ", ".join(map(str, plan.removals))),
        ("metric", search.metric + package),
        ("strategy", search.strategy),
        ("candidates raced", "yes" if search.fast else "no"),
        (
            "protected blocks",
            protected + (f", and {spans(search.protect)}" if search.protect else ""),
        ),
        ("calibration", f"{text}{held_out}"),
        ("seed", str(text.seed)),
        ("BOS before each sequence", "yes" if text.bos else "no"),
        ("hash of the tokens", text.tokens_sha256[:16]),
        (
            "data type and device",
            f"{model.computed_in(search.dtype)} on {search.device}, batch {search.batch_size}",
        ),
        ("engine", search.engine + (f": {search.engine_reason}" if search.engine_reason else "")),
        ("started", environment.started),
        ("took", format_seconds(environment.seconds)),
        ("versions", _list_versions(plan.versions)),
        ("machine", f"{environment.processor}; {environment.platform}"),
    ]
    return _settings_table("Search", rows)


def result_settings(result: EvalResult | BenchResult) -> Table:
    """List the settings of an evaluation or a benchmark."""
    tasks = result.tasks if isinstance(result, EvalResult) else ()
    lm_eval = sorted({task.lm_eval for task in tasks if task.lm_eval})
    rows: list[tuple[str, str | None]] = [
        (
            "data type and device",
            f"{result.model.computed_in(result.dtype)} on {result.device}, {result.processor}",
        ),
        ("versions", _list_versions(result.versions)),
        ("lm-eval", " and ".join(lm_eval)),
    ]
    if isinstance(result, EvalResult):
        return _settings_table(
            "Evaluation", [*rows, *(("command", command) for command in result.commands)]
        )
    rows.append(("clock governor", result.governor))
    for measured in result.workloads:
        workload, warmup = measured.workload, measured.warmup
        deviation = (
            "" if warmup.deviation is None else f", last deviation {format_share(warmup.deviation)}"
        )
        unstable = ", not enough for stable times" if warmup.stable is False else ""
        details = [
            f"{workload.iterations} runs of each after {warmup.runs} to warm "
            f"up{deviation}{unstable}",
            f"{workload.engine} {measured.engine_version or ''}".strip(),
            f"{measured.attention} attention" if measured.attention else "",
        ]
        rows.append((workload_name(measured), ", ".join(filter(None, details))))
    return _settings_table("Benchmark", rows)


def _list_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _settings_table(title: str, rows: Sequence[tuple[str, str | None]]) -> Table:
    return tabulate(title, [("setting", str), ("value", str)], [row for row in rows if row[1]])
