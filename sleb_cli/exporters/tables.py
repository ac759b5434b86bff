"""The numbers of a report as tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sleb_cli.exporters.findings import (
    Data,
    Findings,
    of_size,
    perplexity_change,
    workload_label,
)
from sleb_cli.exporters.headline import between, speedup
from sleb_cli.units import (
    format_bytes,
    format_change,
    format_count,
    format_milliseconds,
    format_perplexity,
    format_probability,
    format_seconds,
    format_share,
    spans,
)

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first cell of a row names it, and `words` are other columns without numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset()

    def only(self, *columns: str) -> Table:
        """Return the table with these columns alone."""
        numbers = [self.columns.index(column) for column in columns]
        words = frozenset(new for new, old in enumerate(numbers) if old in self.words)
        return Table(self.caption, columns, [[row[number] for number in numbers] for row in self.rows], words)


def steps(findings: Findings) -> Table:
    """Return each step of the search."""
    plan = findings.plan
    dense = plan["dense"]
    nested = all(step["removals"] is None for step in plan["steps"])
    kinds = any(step["kind"] for step in plan["steps"])
    columns = ["removed", "block" if nested else "blocks", *(["kind"] if kinds else []), plan["search"]["metric"]]
    columns += ["perplexity", "change", *(["held out", "change"] if dense["held_out"] else [])]
    loss = f"{dense['loss']:.4f}" if plan["search"]["metric"] == "nll" else ""
    rows = [["0", "", *([""] if kinds else []), loss, *_perplexities(dense, None)]]
    for count, (removals, step) in enumerate(zip(findings.by_size, plan["steps"], strict=True), start=1):
        blocks = str(step["block"]) if nested else spans(removals)
        kind = [step["kind"]] if kinds else []
        rows.append([str(count), blocks, *kind, f"{step['score']:.4f}", *_perplexities(step, dense)])
    return Table("The steps of the search", columns, rows)


def _perplexities(entry: Data, dense: Data | None) -> Iterator[str]:
    for now, before in ((entry, dense), (entry["held_out"], dense and dense["held_out"])):
        if now:
            yield format_perplexity(now["perplexity"])
            yield format_change(now["perplexity"] / before["perplexity"] - 1) if before else ""


def kinds(findings: Findings) -> Table | None:
    """Return how many of the removed blocks are of each kind; None if the model has only one kind."""
    removed = [step["kind"] for step in findings.plan["steps"] if step["kind"]]
    if not removed:
        return None
    rows = [[kind, str(removed.count(kind))] for kind in dict.fromkeys(sorted(removed))]
    return Table("Removed blocks by kind", ["kind", "removed"], rows)


def texts(findings: Findings) -> Table:
    """Return the perplexity of each text at each size."""
    columns = [
        "text",
        "removed",
        "perplexity",
        "change",
        "95 % interval",
        "per word",
        "bits per byte",
        "calibration error",
    ]
    rows = []
    for text in findings.texts:
        entries = [
            (0, text["dense"]),
            *((len(size), entry) for size in findings.by_size if (entry := of_size(text, size))),
        ]
        rows += [[findings.text_name(text), str(count), *_text_scores(entry, count)] for count, entry in entries]
    caption = "Perplexity on text that was not searched on" if findings.is_independent else "Perplexity on text"
    return Table(caption, columns, rows)


def _text_scores(entry: Data, count: int) -> list[str]:
    change = perplexity_change(entry) if count else None
    interval = NONE
    if change and change.low is not None and change.high is not None:
        interval = f"{format_change(change.low)} to {format_change(change.high)}"
    return [
        format_perplexity(entry["perplexity"]),
        format_change(change.value) if change else NONE,
        interval,
        NONE if entry["word_perplexity"] is None else format_perplexity(entry["word_perplexity"]),
        NONE if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.3f}",
        format_share(entry["calibration_error"]),
    ]


def divergence(findings: Findings) -> Table:
    """Return how far the predictions are from the dense model's, for each text and size."""
    columns = [
        "text",
        "removed",
        "mean KL",
        "median",
        "90 %",
        "99 %",
        "largest",
        "RMS change of p",
        "same first choice",
    ]
    rows = []
    for text in findings.texts:
        for size in findings.by_size:
            if entry := of_size(text, size):
                kl = entry["divergence"]
                rows.append(
                    [
                        findings.text_name(text),
                        str(len(size)),
                        f"{kl['mean']:.4f}"
                        + ("" if kl["standard_error"] is None else f" ± {kl['standard_error']:.4f}"),
                        *(f"{kl[name]:.4f}" for name in ("median", "p90", "p99", "maximum")),
                        format_share(kl["probability_change_rms"]),
                        format_share(kl["same_top"]),
                    ]
                )
    return Table("KL(dense || pruned) in nats, over the positions of the text", columns, rows)


def how_texts(findings: Findings) -> Table:
    """Return how each perplexity was measured."""
    rows = []
    for text in findings.texts:
        stride = f", stride {text['stride']}" if text["stride"] else ""
        windows = f"{text['windows']} x {text['sequence_length']} tokens{stride}"
        bos = {"none": "none", "text": "once, before the text", "windows": "before every window"}[text["bos"]]
        error = f"{text['clusters']:,} {text['clustered_by']}"
        rows.append([findings.text_name(text), windows, f"{text['tokens']:,}", bos, error])
    columns = ["text", "windows", "predicted tokens", "BOS", "observations behind errors"]
    return Table("How perplexity was measured", columns, rows, frozenset({1, 3, 4}))


def tasks(findings: Findings) -> Table:
    """Return every metric of every task at the plan's size."""
    columns = [
        "task", "metric", "shots", "items", "dense", "its interval", "pruned", "its interval", "kept", "difference",
        "95 % interval", "lost", "gained", "McNemar p", "items for 1 point",
    ]  # fmt: skip
    rows = []
    for task in findings.tasks:
        if (entry := of_size(task, findings.removals)) is None:
            continue
        interval = entry["difference_interval"]
        metric = task["metric"] if task["filter"] == "none" else f"{task['metric']}, {task['filter']}"
        rows.append(
            [
                task["task"],
                metric if task["higher_is_better"] else f"{metric} (lower is better)",
                str(task["num_fewshot"]),
                f"{len(task['doc_ids']):,}" if task["doc_ids"] else NONE,
                *_score(task["dense"]),
                *_score(entry),
                NONE if entry["retention"] is None else format_share(entry["retention"]),
                f"{100 * entry['difference']:+.1f}",
                f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}" if interval else NONE,
                *(NONE if entry[name] is None else f"{entry[name]:,}" for name in ("lost", "gained")),
                NONE if entry["mcnemar_p"] is None else format_probability(entry["mcnemar_p"]),
                NONE if entry["items_needed"] is None else f"{entry['items_needed']:,}",
            ]
        )
    return Table("Tasks, in percent and points", columns, rows, frozenset({1}))


def _score(model: Data) -> tuple[str, str]:
    interval = model["interval"]
    between = f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}" if interval else NONE
    return f"{100 * model['value']:.1f}", between


def task_sizes(findings: Findings) -> Table | None:
    """Return the main metric of each task at every size; None if there is only one size."""
    sizes = findings.sizes_of(findings.main_tasks)
    if len(sizes) < 2:
        return None
    rows = [
        [
            f"{task['task']}, {task['metric']}",
            f"{100 * task['dense']['value']:.1f}",
            *(f"{100 * entry['value']:.1f}" for size in sizes if (entry := of_size(task, size))),
        ]
        for task in findings.main_tasks
    ]
    kept = [value for size in sizes if (value := findings.retention(size))]
    if len(kept) == len(sizes):
        rows.append(["accuracy kept", "100 %", *(format_share(value.value) for value in kept)])
    return Table("Tasks by size, in percent", ["task", "dense", *(f"{len(size)} removed" for size in sizes)], rows)


def speeds(findings: Findings) -> Table:
    """Return the speed-up of each workload at each size, beside its bound."""
    columns = [
        "workload",
        "removed",
        "end to end",
        "tokens/s",
        "speed-up",
        "95 % interval",
        "bound",
        "blocks",
        "outliers",
    ]
    rows = []
    for result in findings.workloads:
        for count, entry in _models(findings, result):
            measured = speedup(entry) if count else None
            rows.append(
                [
                    workload_label(result["workload"]),
                    str(count),
                    format_milliseconds(entry["median_e2el_ms"]),
                    f"{_throughput(entry):,.1f}",
                    f"{measured.value:.2f}x" if measured else NONE,
                    (measured and between(measured)) or NONE,
                    f"{entry['bound']:.2f}x" if count and entry["bound"] else NONE,
                    f"{findings.blocks / (findings.blocks - count):.2f}x",
                    str(entry["outliers"]),
                ]
            )
    return Table("Median times and speed-ups", columns, rows)


def _models(findings: Findings, result: Data) -> list[tuple[int, Data]]:
    """Return the dense model and each size, with the number of removed blocks."""
    pruned = [(len(size), entry) for size in findings.by_size if (entry := of_size(result, size))]
    return [(0, result["dense"]), *pruned]


def _throughput(entry: Data) -> float:
    """Return generated tokens per second, or those of the prompt if none are generated."""
    return float(entry["output_throughput"] or entry["total_token_throughput"])


def latencies(findings: Findings) -> Table:
    """Return the percentiles of the time to first token and of the time between tokens."""
    columns = ["workload", "removed"]
    columns += [f"{name} {part}" for name in ("TTFT", "ITL") for part in ("50 %", "90 %", "99 %")] + ["TPOT mean"]
    keys = [f"{part}_{name}_ms" for name in ("ttft", "itl") for part in ("p50", "p90", "p99")] + ["mean_tpot_ms"]
    rows = [
        [
            workload_label(result["workload"]),
            str(count),
            *(NONE if entry[key] is None else format_milliseconds(entry[key]) for key in keys),
        ]
        for result in findings.workloads
        for count, entry in _models(findings, result)
        if count in (0, len(findings.removals))
    ]
    return Table("Time to first token, between tokens, and per token", columns, rows)


def memory(findings: Findings) -> Table | None:
    """Return the peak memory and energy of each workload, at the plan's size; None if nothing was measured."""
    columns = ["workload", "removed", "peak memory", "weights", "KV cache", "the rest", "energy per token"]
    rows = []
    for result in findings.workloads:
        for count, entry in _models(findings, result):
            parts, energy = entry["memory"], entry["energy"]
            if count not in (0, len(findings.removals)) or not (parts or energy):
                continue
            keys = ("peak_bytes", "weights_bytes", "kv_cache_bytes", "rest_bytes")
            rows.append(
                [
                    workload_label(result["workload"]),
                    str(count),
                    *(format_bytes(parts[key]) if parts else NONE for key in keys),
                    f"{energy['joules_per_token']:.3g} J ({energy['source']})" if energy else NONE,
                ]
            )
    return Table("Memory and energy", columns, rows) if rows else None


def sizes(findings: Findings) -> Table | None:
    """Return parameters and bytes of each size; None if they were not measured."""
    models = [((), findings.size(())), *((size, findings.size(size)) for size in findings.by_size)]
    rows = [
        [
            str(len(size)),
            str(model["blocks"]),
            format_count(model["parameters"]),
            format_bytes(model["weights_bytes"]),
            NONE if model["load_seconds"] is None else f"{model['load_seconds']:.2f} s",
        ]
        for size, model in models
        if model
    ]
    return Table("Sizes", ["removed", "blocks", "parameters", "weights", "time to load"], rows) if rows else None


def recovery(findings: Findings) -> Table | None:
    """Return the losses of a recovered model on text that decided nothing; None if it was not recovered."""
    record = findings.plan.get("recovery")
    if not record:
        return None
    stages = [("dense", record["dense"]), ("pruned", record["pruned"])]
    stages += [("recovered in closed form", record["closed_form_losses"])] if record["closed_form_losses"] else []
    stages += [("healed", record["heal"]["losses"])] if record["heal"] else []
    rows = [
        [name, f"{losses['loss']:.4f}", format_perplexity(math.exp(losses["loss"])), f"{losses['divergence']:.4f}"]
        for name, losses in stages
    ]
    return Table("On text that decided nothing", ["model", "loss, nats", "perplexity", "KL from dense, nats"], rows)


def settings(findings: Findings) -> list[Table]:
    """Return everything that the numbers depend on."""
    plan = findings.plan
    model, search, text, environment = plan["model"], plan["search"], plan["calibration"], plan["environment"]
    protected = f"{search['protect_first']} at the start, {search['protect_last']} at the end"
    protected += f", and {spans(search['protect'])}" if search["protect"] else ""
    held_out = f" ({search['held_out']} held out)" if search["held_out"] else ""
    reason = f": {search['engine_reason']}" if search["engine_reason"] else ""
    packed = f", weights in {search['load_in']}," if search.get("load_in") else ""
    rows = [
        ("model", model["id"]),
        ("revision", model["revision"]),
        ("fingerprint", model["fingerprint"][:16]),
        ("family", f"{model['family']} ({model['model_type']}), {model['blocks']} blocks"),
        ("removed, in order", ", ".join(map(str, findings.removals))),
        ("metric", search["metric"]),
        ("strategy", search["strategy"] + (f", width {search['beam_width']}" if search["beam_width"] else "")),
        ("candidates raced", "yes" if search["fast"] else "no"),
        ("protected blocks", protected),
        ("calibration", f"{text['source']}: {text['sequences']} x {text['sequence_length']} tokens{held_out}"),
        ("counted tokens of conversations", text["chat"]),
        ("seed", str(text["seed"])),
        ("BOS before each sequence", "yes" if text["bos"] else "no"),
        ("hash of the tokens", text["tokens_sha256"][:16]),
        ("data type and device", f"{search['dtype']}{packed} on {search['device']}, batch {search['batch_size']}"),
        ("engine", search["engine"] + reason),
        ("started", environment["started"]),
        ("took", format_seconds(environment["seconds"])),
        ("versions", _versions(plan["sleb_version"], environment)),
        ("machine", f"{environment['processor']}; {environment['platform']}"),
    ]
    tables = [_pairs("Search", rows)]
    if found := findings.pruning.evaluation:
        where = f"{found['dtype']} on {found['device']}, {found['processor']}"
        tables.append(
            _pairs(
                "Evaluation", [("data type and device", where), ("versions", _versions(found["sleb_version"], found))]
            )
        )
    if found := findings.pruning.benchmark:
        tables.append(_benchmark_settings(findings, found))
    return tables


def _versions(sleb: str, found: Data) -> str:
    python = f"Python {found['python']}, " if "python" in found else ""
    return f"sleb {sleb}, {python}torch {found['torch']}, transformers {found['transformers']}"


def _benchmark_settings(findings: Findings, found: Data) -> Table:
    rows = [
        ("data type and device", f"{found['dtype']} on {found['device']}, {found['processor']}"),
        ("threads", str(found["threads"])),
        ("clock governor", found["governor"]),
        ("versions", _versions(found["sleb_version"], found)),
    ]
    for result in findings.workloads:
        workload, warmup = result["workload"], result["warmup"]
        spread = f", last deviation {format_share(warmup['deviation'])}" if warmup["deviation"] is not None else ""
        engine = f"{workload['engine']} {result['engine_version'] or ''}".strip()
        attention = f", {result['attention']} attention" if result["attention"] else ""
        pause = f", {workload['cooldown']:g} s pause" if workload["cooldown"] else ""
        how = f"{workload['iterations']} runs after {warmup['runs']} to warm up{spread}; {engine}{attention}{pause}"
        rows.append((workload_label(workload), how))
    return _pairs("Benchmark", rows)


def _pairs(caption: str, rows: Sequence[tuple[str, str | None]]) -> Table:
    return Table(caption, ["setting", "value"], [[name, value] for name, value in rows if value], frozenset({1}))
