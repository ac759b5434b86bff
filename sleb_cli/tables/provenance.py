"""The settings of searches, evaluations and benchmarks, on which their numbers depend."""

from collections.abc import Mapping, Sequence

from sleb_cli.plan import Plan
from sleb_cli.results import BenchResult, EvalResult, WorkloadResult
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import Table, tabulate
from sleb_cli.units import format_seconds, format_share, spans


def search_settings(plan: Plan) -> Table:
    """List the settings of a search."""
    model = plan.model
    search = plan.search
    text = plan.calibration
    environment = plan.environment
    metric = search.metric
    if search.implementation and search.implementation.package != "sleb":
        metric += f" of {search.implementation.package} {search.implementation.version}"
    protected = f"{search.protect_first} at the start, {search.protect_last} at the end"
    if search.protect:
        protected += f", and {spans(search.protect)}"
    calibration = str(text)
    if search.held_out:
        calibration += f" ({search.held_out} held out)"
    engine: str = search.engine
    if search.engine_reason:
        engine += f": {search.engine_reason}"
    computed = f"{model.computed_in(search.dtype)} on {search.device}"
    rows = [
        ("model", model.id),
        ("revision", model.revision),
        ("fingerprint", model.fingerprint[:16]),
        ("family", f"{model.family} ({model.model_type}), {model.blocks} blocks"),
        ("removed, in order", ", ".join(map(str, plan.removals))),
        ("metric", metric),
        ("strategy", search.strategy),
        ("candidates raced", "yes" if search.fast else "no"),
        ("protected blocks", protected),
        ("calibration", calibration),
        ("seed", str(text.seed)),
        ("BOS before each sequence", "yes" if text.bos else "no"),
        ("hash of the tokens", text.tokens_sha256[:16]),
        ("data type and device", computed),
        ("batch", str(search.batch_size)),
        ("engine", engine),
        ("started", environment.started),
        ("took", format_seconds(environment.seconds)),
        ("versions", _list_versions(plan.versions)),
        ("machine", f"{environment.processor}; {environment.platform}"),
    ]
    return _settings_table("Search", rows)


def result_settings(result: EvalResult | BenchResult) -> Table:
    """List the settings of an evaluation or a benchmark."""
    computed = f"{result.model.computed_in(result.dtype)} on {result.device}, {result.processor}"
    rows: list[tuple[str, str | None]] = [
        ("data type and device", computed),
        ("versions", _list_versions(result.versions)),
    ]
    if isinstance(result, EvalResult):
        lm_eval = {task.lm_eval for task in result.tasks if task.lm_eval}
        rows.append(("lm-eval", " and ".join(sorted(lm_eval))))
        for command in result.commands:
            rows.append(("command", command))
        return _settings_table("Evaluation", rows)
    rows.append(("clock governor", result.governor))
    for measured in result.workloads:
        rows.append((workload_name(measured), _describe_runs(measured)))
    return _settings_table("Benchmark", rows)


def _describe_runs(measured: WorkloadResult) -> str:
    """Describe how a workload was timed: runs, engine, attention."""
    workload = measured.workload
    warmup = measured.warmup
    runs = f"{workload.iterations} runs of each after {warmup.runs} to warm up"
    if warmup.deviation is not None:
        runs += f", last deviation {format_share(warmup.deviation)}"
    if warmup.stable is False:
        runs += ", not enough for stable times"
    runs += f", {workload.engine}"
    if measured.engine_version:
        runs += f" {measured.engine_version}"
    if measured.attention:
        runs += f", {measured.attention} attention"
    return runs


def _list_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _settings_table(title: str, rows: Sequence[tuple[str, str | None]]) -> Table:
    return tabulate(title, [("setting", str), ("value", str)], [row for row in rows if row[1]])
