"""What is known of a plan, joined by size: how it was found, what it costs, what it gains."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

from sleb_plugins.errors import UsageError
from sleb_plugins.exporter import Pruning

Data = Mapping[str, Any]
Removals = tuple[int, ...]

Z = 1.959963984540054
"""Two-sided 95 % of a normal distribution."""

# Where a task has several metrics, the first of these stands for it, as in the tables of the SLEB paper and others.
_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "em")
# Our own tasks, which are made to break first: an average with them would say nothing about what a model knows.
_OURS = "sleb_"
# Of these, calibration reads the training split, and evaluation another.
_SPLIT = ("wikitext2", "c4")
_SHARE = re.compile(r":[\d.]+(?:e-?\d+)?(?:/\d+)?$")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def errors(self) -> tuple[float, float]:
        """How far the interval reaches below and above."""
        if self.low is None or self.high is None:
            return 0.0, 0.0
        return max(0.0, self.value - self.low), max(0.0, self.high - self.value)


@dataclass(frozen=True)
class Missing:
    """What was not measured, and the command that does."""

    part: str
    command: str


def of_size(result: Data | None, removals: Removals) -> Data | None:
    """Return the entry of a result for these removals, in whatever order it names them; None if there is none."""
    entries: Iterable[Data] = result["pruned"] if result else ()
    return next((entry for entry in entries if set(entry["removals"]) == set(removals)), None)


def perplexity_change(entry: Data) -> Estimate:
    """Return the relative change of a text's perplexity, with its interval."""
    interval = entry["interval"] or {"low": None, "high": None}
    low, high = (None if end is None else math.expm1(end) for end in (interval["low"], interval["high"]))
    return Estimate(math.expm1(entry["log_ratio"]), low, high)


def estimate(value: float, interval: Data | None) -> Estimate:
    """Return a number of a result with its interval."""
    return Estimate(value, interval["low"], interval["high"]) if interval else Estimate(value)


@dataclass(frozen=True)
class Findings:
    """A plan and what was measured of its sizes; `removals` are those of the size that it is about.

    Attributes:
        pruning: the plan with its results.
        public: whether commands name the plan without its folder, because other people may read them.
    """

    pruning: Pruning
    public: bool = True

    @cached_property
    def plan(self) -> Data:
        """The plan.

        Raises:
            UsageError: there is none.
        """
        if self.pruning.plan is None:
            raise UsageError(f"{self.pruning.model} has no plan to describe.", hint="Name a plan of `sleb search`.")
        return self.pruning.plan

    @property
    def model(self) -> str:
        """The model as the plan names it."""
        return str(self.plan["model"]["id"])

    @property
    def short_model(self) -> str:
        """The model's name without its organization."""
        return self.model.rpartition("/")[2]

    @property
    def plan_name(self) -> str:
        """The plan's file, without folders."""
        return self.pruning.plan_file.name if self.pruning.plan_file else "plan.json"

    @property
    def plan_argument(self) -> str:
        """The plan as a shell takes it."""
        file = self.pruning.plan_file
        name = self.plan_name if self.public or file is None else str(file)
        return shlex.quote(f"./{name}" if name.startswith("-") else name)

    @property
    def removals(self) -> Removals:
        """The removed blocks."""
        return self.pruning.removals

    @property
    def blocks(self) -> int:
        """How many blocks the dense model has."""
        return self.pruning.blocks

    @cached_property
    def by_size(self) -> list[Removals]:
        """The removed blocks at each size of the plan, fewest first."""
        sizes: list[Removals] = []
        for step in self.plan["steps"]:
            sizes.append(tuple(step["removals"] or (*((), *sizes)[-1], step["block"])))
        return sizes

    @property
    def texts(self) -> Sequence[Data]:
        """The texts whose perplexity was measured."""
        return self.pruning.evaluation["texts"] if self.pruning.evaluation else ()

    def text_name(self, text: Data) -> str:
        """Return a text's name, with what tells it from the others, and whether the pruned model was made on it."""
        alike = [other for other in self.texts if other["text"] == text["text"]]
        details: list[Callable[[Data], str]] = []
        for tell in (_window, _stride, _bos, _count, _tokens):
            told = {tuple(detail(other) for detail in details) for other in alike}
            if len(told) < len(alike) and len(set(map(tell, alike))) > 1:
                details.append(tell)
        remarks = [*filter(None, (tell(text) for tell in details)), *self._made_on(text)]
        return f"{text['text']} ({', '.join(remarks)})" if remarks else str(text["text"])

    def _made_on(self, text: Data) -> list[str]:
        """Return what was done on this text besides measuring."""
        recovery = self.plan.get("recovery")
        used = {"searched on": self.plan["calibration"]} | ({"recovered on": recovery["text"]} if recovery else {})
        return [what for what, record in used.items() if _holds(record, text)]

    @cached_property
    def is_independent(self) -> bool:
        """Whether no text that was measured is one that the pruned model was made on."""
        return not any(self._made_on(text) for text in self.texts)

    @property
    def tasks(self) -> Sequence[Data]:
        """Every metric of every task."""
        return self.pruning.evaluation["tasks"] if self.pruning.evaluation else ()

    @cached_property
    def main_tasks(self) -> list[Data]:
        """One metric of each task with items that the headline size was measured on."""
        chosen: dict[str, Data] = {}
        for task in self.tasks:
            if task["items_sha256"] is None or of_size(task, self.removals) is None:
                continue
            other = chosen.get(task["task"])
            if other is None or _preference(task) < _preference(other):
                chosen[task["task"]] = task
        return list(chosen.values())

    @property
    def accuracy_tasks(self) -> list[Data]:
        """The tasks that an average is taken over: each counts what is right, and none is made to break."""
        return [task for task in self.main_tasks if task["higher_is_better"] and not task["task"].startswith(_OURS)]

    def retention(self, removals: Removals) -> Estimate | None:
        """Return the mean accuracy as a share of the dense model's; None if a task was not measured at this size.

        The interval is that of the mean paired difference, the tasks being independent.
        """
        tasks = self.accuracy_tasks
        entries = [entry for task in tasks if (entry := of_size(task, removals))]
        dense = sum(task["dense"]["value"] for task in tasks)
        if not tasks or len(entries) < len(tasks) or dense <= 0:
            return None
        value = 1 + sum(entry["difference"] for entry in entries) / dense
        errors = [entry["standard_error"] for entry in entries]
        if None in errors:
            return Estimate(value)
        reach = Z * math.hypot(*errors) / dense
        return Estimate(value, value - reach, value + reach)

    @property
    def workloads(self) -> Sequence[Data]:
        """The timed workloads."""
        return self.pruning.benchmark["workloads"] if self.pruning.benchmark else ()

    @cached_property
    def main_workloads(self) -> list[Data]:
        """One workload of each name: of transformers before other engines, with an interval, of the most tokens.

        The largest says most: small ones are decided by what a machine does around the work.
        """
        ranked: dict[str, list[tuple[tuple[bool, bool, int], Data]]] = {"generation": [], "prompt": []}
        for result in self.workloads:
            name = result["workload"]["name"]
            if entry := of_size(result, self.removals):
                ranked[name].append((_order(result, entry), result))
        return [min(found, key=itemgetter(0))[1] for found in ranked.values() if found]

    def size(self, removals: Removals) -> Data | None:
        """Return the parameters and bytes of a size; () is the dense model."""
        benchmark = self.pruning.benchmark
        dense: Data | None = benchmark["dense"] if benchmark else None
        return of_size(benchmark, removals) if removals else dense

    def sizes_of(self, results: Iterable[Data]) -> list[Removals]:
        """Return the plan's sizes that all of these results have."""
        results = list(results)
        return [size for size in self.by_size if results and all(of_size(result, size) for result in results)]

    @property
    def missing(self) -> list[Missing]:
        """What was not measured, and the commands that do."""
        name, model = self.plan_argument, shlex.quote(self.model)
        missing = []
        if not any(of_size(text, self.removals) for text in self.texts):
            missing.append(Missing("perplexity and divergence on text", f"sleb eval {name} --every 2"))
        if not self.main_tasks:
            missing.append(Missing("accuracy on tasks", f"sleb eval {name} --every 2 --tasks piqa,arc_easy"))
        if not self.main_workloads:
            missing.append(Missing("speed and memory", f"sleb bench {name} --every 2"))
        if self.plan["dense"]["held_out"] is None:
            missing.append(Missing("loss on text held out of the search", f"sleb search {model} --holdout 0.2 …"))
        if self.plan["sample_generation"] is None and len(self.by_size) == len(self.removals):
            missing.append(Missing("what both models say", f"sleb search {model} …"))
        return missing


def _preference(task: Data) -> int:
    metric = task["metric"]
    return _MAIN_METRICS.index(metric) if metric in _MAIN_METRICS else len(_MAIN_METRICS)


def _order(result: Data, entry: Data) -> tuple[bool, bool, int]:
    workload = result["workload"]
    tokens = workload["batch_size"] * (workload["prompt_length"] + workload["new_tokens"])
    return workload["engine"] != "transformers", entry["interval"] is None, -tokens


def _holds(record: Data, text: Data) -> bool:
    """Whether a text is one of those in the record of a calibration, by its source."""
    if text["text"] in _SPLIT:
        return False
    source = record["source"]
    parts = source.split(",")
    sources = [_SHARE.sub("", part).strip() for part in parts] if all(map(_SHARE.search, parts)) else [source]
    return _split_of(text["text"]) in map(_split_of, sources)


def _split_of(source: str) -> tuple[str, str, str]:
    """Return the place, config and split of a text; a file has the same ones wherever it is named."""
    place, config, split = [*source.split(":"), "", ""][:3]
    return place, config, split or "train"


def _window(text: Data) -> str:
    return f"windows of {text['sequence_length']:,}"


def _stride(text: Data) -> str:
    return f"stride {text['stride']:,}" if text["stride"] else ""


def _bos(text: Data) -> str:
    return {"none": "no BOS", "text": "one BOS", "windows": "BOS in each"}[str(text["bos"])]


def _count(text: Data) -> str:
    return f"{text['windows']:,} of them"


def _tokens(text: Data) -> str:
    return f"tokens {text['tokens_sha256'][:8]}"


def workload_label(workload: Data) -> str:
    """Return what is run: prompt 1 x 512, generation 4 x 64 + 32; with the engine, if it is not transformers."""
    new = f" + {workload['new_tokens']}" if workload["new_tokens"] else ""
    engine = "" if workload["engine"] == "transformers" else f", {workload['engine']}"
    options = [name for name, key in (("compiled", "compiled"), ("static cache", "static_cache")) if workload[key]]
    label = f"{workload['name']} {workload['batch_size']} x {workload['prompt_length']}{new}{engine}"
    return ", ".join([label, *options])


def gap_lines(pruning: Pruning) -> list[str]:
    """Say what was not measured yet, and the commands that measure it, as the user types them here."""
    return [f"not measured yet: {gap.part}; {gap.command}" for gap in Findings(pruning, public=False).missing]
