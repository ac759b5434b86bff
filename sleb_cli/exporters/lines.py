"""What was measured of a plan, as lines by the number of removals."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sleb_cli.plan import Plan
from sleb_cli.results import CorpusResult, Interval, TaskResult, TextResult, WorkloadResult
from sleb_cli.tables.quality import Estimate, is_canary, perplexity_change, retention
from sleb_cli.tables.search_results import perplexities
from sleb_cli.tables.speed import workload_name

MEAN = "mean of tasks"


@dataclass(frozen=True)
class Line:
    """Estimates by the number of removals, of which 0 is the dense model.

    Lines of several plans compare if they have the same key.
    """

    name: str
    values: Mapping[int, Estimate]
    key: Hashable = None

    @property
    def smallest(self) -> float:
        """The smallest value."""
        return min(value for value, _ in self.values.values())

    @property
    def largest(self) -> float:
        """The largest value."""
        return max(value for value, _ in self.values.values())


def search_lines(plan: Plan) -> list[Line]:
    """Return the perplexity of the text of the search and of its held-out sequences."""
    lines = []
    for name, series in perplexities(plan).items():
        values: dict[int, Estimate] = {size: (value, None) for size, value in enumerate(series)}
        lines.append(Line(name, values, (name, plan.calibration.tokens_sha256)))
    return lines


def distance_lines(plan: Plan) -> list[Line]:
    """Return the distance from the dense model's output, of a model that only reads."""
    searched: dict[int, Estimate] = {}
    held_out: dict[int, Estimate] = {}
    for number, step in enumerate(plan.steps, start=1):
        if step.distance is not None:
            searched[number] = (step.distance, None)
            if step.held_out:
                held_out[number] = (step.held_out.loss, None)
    lines = [Line("searched on", searched), Line("held out of the search", held_out)]
    return [Line(line.name, {0: (0.0, None), **line.values}) for line in lines if line.values]


def text_line(name: str, text: TextResult) -> Line:
    """Return the perplexity of a text."""
    dense = text.dense.perplexity
    values: dict[int, Estimate] = {0: (dense, None)}
    for scores in text.pruned:
        _, change = perplexity_change(scores)
        values[len(scores.removals)] = (scores.perplexity, _scaled(change, dense, dense))
    return Line(name, values, text.key)


def task_line(task: TaskResult) -> Line:
    """Return the score of a task."""
    return _score_line(task.task, task)


def corpus_line(corpus: CorpusResult) -> Line:
    """Return a measure of a corpus."""
    return _score_line(corpus.measure, corpus)


def _score_line(name: str, result: TaskResult | CorpusResult) -> Line:
    dense = result.dense.value
    values: dict[int, Estimate] = {0: (dense, None)}
    for scores in result.pruned:
        ends = _scaled(scores.difference_interval, dense)
        if scores.lost is not None or (isinstance(result, TaskResult) and is_canary(result)):
            ends = _limited(ends)
        values[len(scores.removals)] = (scores.value, ends)
    return Line(name, values, result.key)


def mean_line(plan: Plan, tasks: Sequence[TaskResult]) -> Line:
    """Return the mean score of tasks that count right items."""
    dense = fmean(task.dense.value for task in tasks)
    values: dict[int, Estimate] = {0: (dense, None)}
    for key in plan.size_keys:
        estimate = retention(tasks, key)
        if estimate:
            values[len(key)] = (dense * estimate[0], _limited(_scaled(estimate[1], 0.0, dense)))
    return Line(MEAN, values, MEAN)


def kept_line(plan: Plan, name: str, results: Sequence[TaskResult | CorpusResult]) -> Line:
    """Return the share of the dense model's mean score that is kept."""
    values: dict[int, Estimate] = {0: (1.0, None)}
    for key in plan.size_keys:
        estimate = retention(results, key)
        if estimate:
            values[len(key)] = estimate
    return Line(name, values)


def speed_line(result: WorkloadResult) -> Line:
    """Return the speedup of a workload."""
    values: dict[int, Estimate] = {0: (1.0, None)}
    for timing in result.pruned:
        values[len(timing.removals)] = (timing.speedup, timing.interval)
    return Line(workload_name(result), values, result.workload.identity)


def changes(line: Line) -> Line:
    """Return the line relative to its start, as changes."""
    dense, _ = line.values[0]
    values = {}
    for size, (value, ends) in line.values.items():
        values[size] = (value / dense - 1, _scaled(ends, -1.0, 1 / dense))
    return Line(line.name, values)


def _scaled(ends: Interval | None, start: float, scale: float = 1.0) -> Interval | None:
    if ends is None:
        return None
    # Not validated: intervals in a file can be so wide that this one is infinite.
    return Interval.model_construct(low=start + scale * ends.low, high=start + scale * ends.high)


def _limited(ends: Interval | None) -> Interval | None:
    """Limit an interval to the shares that a score can be."""
    if ends is None:
        return None
    return Interval.model_construct(low=max(0.0, ends.low), high=min(1.0, ends.high))
