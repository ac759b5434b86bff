"""How much of a task the model loses without some blocks, on as many items as decide whether that is too much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sleb_cli.engine.quality.tasks import Results, compare_task
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.engine.search.targets import TaskTarget
from sleb_cli.engine.statistics import normal_interval, paired_proportions_interval
from sleb_cli.events import Notice
from sleb_cli.results import Interval, PrunedTaskScores, TaskResult, main_metric
from sleb_cli.units import plural
from sleb_plugins import UsageError

MOST_LOOKS = 8
"""As many as take 12,800 items."""


@dataclass
class TaskDrop:
    """Compares a task on the dense model and without blocks, item by item."""

    target: TaskTarget
    scoring: Scoring
    _dense: dict[int, Results] = field(default_factory=dict)

    def measure(self, removals: tuple[int, ...]) -> tuple[float, bool]:
        """Return the drop without these blocks, and whether its interval is within the target.

        The interval holds with 95% confidence at all looks together. If all items leave that open, it is not within.

        Raises:
            UsageError: the task has no accuracy that can be compared by items.
        """
        count, asked = self.target.first_items, self.target.items
        while True:
            result = self._compared(count, removals)
            found, items = result.pruned[0], len(result.doc_ids)
            ends = _interval(found, items, _looks(self.target))
            if -ends.low <= self.target.most or -ends.high > self.target.most or items < count or count == asked:
                break
            count = min(2 * count, asked or 2 * count)
        within = -ends.low <= self.target.most
        self.scoring.notify(
            Notice(
                f"{self.target.task} without {plural(len(removals), 'block')}: {found.difference:+.4f} "
                f"(95% interval over all looks {ends.low:+.4f} to {ends.high:+.4f}) on {plural(items, 'item')}"
                f"{'' if within else ', not within the target'}."
            )
        )
        return -found.difference, within

    def _compared(self, count: int, removals: tuple[int, ...]) -> TaskResult:
        if count not in self._dense:
            self._dense[count] = self._run(count, ())
        results = compare_task(self._dense[count], [(removals, self._run(count, removals))])
        compared = [each for each in results if each.pruned[0].difference_interval and each.doc_ids]
        if len({each.task for each in compared}) != 1 or not (best := main_metric(compared)).higher_is_better:
            raise UsageError(
                f"--max-task-drop needs one task whose items are right or wrong, which {self.target.task} is not.",
                hint="Name a task such as piqa.",
            )
        return best

    def _run(self, count: int, removals: tuple[int, ...]) -> Results:
        scoring, what = self.scoring, f"{len(removals)} removed" if removals else "dense"
        scoring.skippable.skip(removals)
        return self.target.load(count).run(
            scoring.skippable.model, scoring.tokenizer, what, scoring.notify, scoring.group, models=1
        )


def _looks(target: TaskTarget) -> int:
    """Return how often a task may be looked at: on its first items, and each time that these were doubled."""
    return MOST_LOOKS if target.items is None else 1 + math.ceil(math.log2(target.items / target.first_items))


def _interval(scores: PrunedTaskScores, items: int, looks: int) -> Interval:
    if scores.lost is not None and scores.gained is not None:
        return paired_proportions_interval(scores.lost, scores.gained, items, looks)
    return normal_interval(scores.difference, scores.standard_error or 0.0, looks)
