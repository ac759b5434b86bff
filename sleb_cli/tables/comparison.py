"""What a model lost against the one that it was made from: what only a comparison of two has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from sleb_cli.names import public_source, without_folders
from sleb_cli.results import BytesResult, EvalResult, Interval, StageRecord, TaskResult, TextResult
from sleb_cli.tables.quality import evaluation_tables, main_tasks, perplexity_change, text_names
from sleb_cli.tables.table import Column, Table, between, tabulate
from sleb_cli.units import format_bytes, format_change, format_share, plural

BROKEN = 2.0
"""A model is broken whose predictions lie so far from its parent's, and the right tokens from its
own, in nats.
"""
SAME = 1e-3
"""Below this KL, in nats, predictions differ by rounding."""
ROUNDING = 1e-3
"""Stages that all differ by less compute the same."""
_MANY = 2.0
BAR = 24
"""The characters of the longest bar."""


def comparison_tables(result: EvalResult) -> list[Table]:
    """List what was measured of two models, and their stages."""
    assert result.compared
    tables = evaluation_tables(result, text_names(result.texts))
    return [*tables, bits_per_byte(result.compared.bytes), stages(result.compared.stages)]


def bits_per_byte(results: Sequence[BytesResult]) -> Table:
    """List the bits that each byte of a text takes, of models whose tokenizers differ."""
    change = "{:+.4f}".format
    columns: list[Column] = [
        ("text", str),
        ("model", str),
        ("bits per byte", "{:.4f}".format),
        ("change", change),
        ("95%", partial(between, form=change)),
        ("predicted tokens", "{:,}".format),
    ]
    rows = []
    for text in results:
        name = public_source(text.text)
        rows.append([name, "dense", text.bits[0], None, None, text.tokens[0]])
        rows.append([name, "other", text.bits[1], text.difference, text.interval, text.tokens[1]])
    notes = [
        "bits per byte: the loss of a text over its bytes, which tokenizers do not change. Each "
        "model reads its own tokens, so there is no divergence."
    ]
    return tabulate("Bits per byte", columns, rows, notes)


def stages(records: Sequence[StageRecord]) -> Table:
    """Draw how far each stage is from the dense model's, given the same hidden states."""
    columns: list[Column] = [("stage", str), ("differs by", _difference), ("", str)]
    most = max((record.difference for record in records), default=0.0)
    rows = []
    if most < ROUNDING and not any(record.stands_out for record in records):
        records = ()
    for record in records:
        bar = "█" * math.ceil(BAR * record.difference / most)
        rows.append([record.stage, record.difference, f"{bar} ←" if record.stands_out else bar])
    notes = [
        "differs by: the difference of what a stage adds to the same hidden states, as a share of "
        "what the dense one adds; of the head, the difference of its logits. ←: stands out."
    ]
    return tabulate("Where they differ", columns, rows, notes)


def _difference(difference: float) -> str:
    return format_share(difference) if difference < _MANY else f"{difference:,.0f}x"


def conclusions(result: EvalResult) -> list[str]:
    """Say in sentences what the other model lost."""
    compared = result.compared
    assert compared
    before, after = compared.files_bytes
    size = f"{format_bytes(after)} on disk"
    if after != before:
        size += f" instead of {format_bytes(before)} ({_difference(after / before)})"
    sentences = []
    broken = [text for text in result.texts if _is_broken(text)]
    for text in broken:
        sentences.append(f"It is broken: KL {_divergence(text):.1f} on {_named(text)}.")
    if not broken:
        sentences += [_of_text(text) for text in result.texts]
    sentences += [_of_bytes(text) for text in compared.bytes]
    sentences += _of_tasks(result.tasks)
    for record in compared.stages:
        if record.rows:
            sentences.append(
                f"Its head stands out in {plural(len(record.rows), 'row')}: most in that of token "
                f"{record.rows[0]}."
            )
        elif record.stands_out:
            sentences.append(
                f"Its {record.stage} stands out: on the same hidden states, it differs by "
                f"{_difference(record.difference)}."
            )
    # Neither need be dense, such as where two methods are compared.
    parent = without_folders(result.model.id)
    models = f"In tables, {parent} is dense, and {compared.name} other."
    return [*sentences, f"It takes {size}.", models]


def _named(text: TextResult) -> str:
    return public_source(text.text)


def _divergence(text: TextResult) -> float:
    return max((scores.divergence.mean for scores in text.pruned), default=0.0)


def _is_broken(text: TextResult) -> bool:
    # A model that learned the text diverges, too, and predicts it better.
    return _divergence(text) > BROKEN and all(size.log_ratio > BROKEN for size in text.pruned)


def _of_text(text: TextResult) -> str:
    (scores,) = text.pruned
    divergence = scores.divergence.mean
    if divergence < SAME:
        return f"On {_named(text)}, it predicts the same: KL {divergence:.1g}."
    value, interval = perplexity_change(scores)
    change = format_change(value)
    if interval:
        change += f" ({between(interval, format_change)})"
    return f"On {_named(text)}, perplexity changed by {change}, at KL {divergence:.3f}."


def _of_bytes(text: BytesResult) -> str:
    name = public_source(text.text)
    form = "{:+.3f}".format
    change = form(text.difference)
    if text.interval:
        change += f" ({between(text.interval, form)})"
    before, after = text.bits
    return f"On {name}, bits per byte went from {before:.3f} to {after:.3f}: {change}."


def _of_tasks(tasks: Sequence[TaskResult]) -> list[str]:
    """Say how tasks differ: each that shows a difference, or all together."""
    counted = []
    for task in main_tasks(tasks):
        # Who got nothing right cannot lose anything.
        if task.dense.value > 0 and task.pruned[0].difference_interval:
            counted.append(task)
    if not counted:
        return []
    sentences = []
    worst = 0.0
    widest = counted[0]
    for task in counted:
        (scores,) = task.pruned
        interval = scores.difference_interval
        assert interval
        if interval.high < 0:
            lost = Interval(low=-interval.high, high=-interval.low)
            sentences.append(f"On {task.task}, it is {_points(-scores.difference, lost)} lower.")
        elif interval.low > 0:
            gained = _points(scores.difference, interval)
            sentences.append(f"On {task.task}, it is {gained} higher.")
        if -interval.low > worst:
            worst = -interval.low
            widest = task
    if sentences:
        return sentences
    items = sum(len(task.doc_ids) for task in counted)
    most = f"{100 * worst:.1f} points, of {widest.task}"
    return [f"No loss that {plural(items, 'item')} can show: at most {most}."]


def _points(value: float, interval: Interval) -> str:
    points = Interval(low=100 * interval.low, high=100 * interval.high)
    return f"{100 * value:.1f} points ({between(points, '{:.1f}'.format)})"
