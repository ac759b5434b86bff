"""Running models in turn: their order, their prompts, and when they are warm."""

import time

import pytest

from sleb_cli.engine.speed.in_turn import WARMUP_LIMIT, draw_prompts, measure
from sleb_cli.events import Notice
from sleb_cli.results import Workload
from sleb_plugins.engine import TimedRun


def workload(**changes):
    given = {
        "name": "generation", "engine": "transformers", "batch_size": 2, "prompt_length": 8, "new_tokens": 4,
        "iterations": 4, "warmup": 0, "cooldown": 0.0, "seed": 0, "compiled": False, "static_cache": False,
    }  # fmt: skip
    return Workload(**(given | changes))


class Machine:
    """Runs models in no time, notes what it ran, and says that each run took the next of `seconds`."""

    def __init__(self, *seconds, names=("dense", "pruned")):
        self.runs, self.prompts, self._seconds = [], [], seconds
        self.models = {name: self._runner(name) for name in names}

    def _runner(self, name):
        def run(prompts, new_tokens):
            assert new_tokens == 4
            self.prompts.append(prompts)
            self.runs.append(name)
            number = self.runs.count(name) - 1
            return TimedRun(self._seconds[min(number, len(self._seconds) - 1)])

        return run


def test_every_other_round_is_reversed():
    machine = Machine(1.0, names="abc")
    measured = measure(machine.models, workload(iterations=3), 10, [].append)
    assert "".join(machine.runs) == "abc" + "cba" + "abc"
    assert {name: sample.seconds for name, sample in measured.samples.items()} == {name: [1.0] * 3 for name in "abc"}


def test_a_round_has_prompts_of_its_own_the_same_for_all():
    machine = Machine(1.0)
    measure(machine.models, workload(warmup=2, iterations=3), 1000, [].append)
    first, second = machine.prompts[::2], machine.prompts[1::2]
    assert first == second
    assert len({str(prompts) for prompts in first}) == 5
    assert [len(prompts) for prompts in first[0]] == [8, 8]
    assert all(0 <= token < 1000 for prompts in first for prompt in prompts for token in prompt)
    assert draw_prompts(workload(seed=1), 1000, 0) != first[0] == draw_prompts(workload(), 1000, 0)


@pytest.mark.parametrize(
    ("seconds", "runs", "stable"),
    [
        ((1.0,), 3, True),
        ((9.0, 5.0, 1.0, 1.0, 1.01), 5, True),
        ((1.0, 1.1) * 20, WARMUP_LIMIT, False),
    ],
)
def test_it_warms_up_until_times_are_stable(seconds, runs, stable):
    machine, heard = Machine(*seconds), []
    measured = measure(machine.models, workload(warmup=None), 10, heard.append)
    assert (measured.warmup.runs, measured.warmup.stable) == (runs, stable)
    assert (measured.warmup.deviation < 0.02) is stable
    assert len(machine.runs) == 2 * (runs + 4)
    assert len(measured.samples["dense"].runs) == 4
    told = [event.text for event in heard if isinstance(event, Notice)]
    assert len(told) == (not stable)
    assert all("times still varied by 4.4% after 10 runs to warm up" in text for text in told)


def test_a_number_of_runs_to_warm_up_is_kept():
    measured = measure(Machine(1.0, 2.0, 1.0).models, workload(warmup=5), 10, [].append)
    assert (measured.warmup.runs, measured.warmup.stable) == (5, None)


def test_it_pauses_before_each_run_only_if_asked(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    measure(Machine(1.0).models, workload(), 10, [].append)
    assert pauses == []
    measure(Machine(1.0).models, workload(cooldown=0.5), 10, [].append)
    assert pauses == [0.5] * 8


class Meter:
    """Counts 3 J in each run."""

    source = "NVML"

    def __init__(self):
        self.total = 0

    def joules(self):
        self.total += 3
        return self.total


def test_the_energy_of_each_run_is_read():
    measured = measure(Machine(1.0).models, workload(), 10, [].append, Meter())
    for sample in measured.samples.values():
        assert (sample.energy_source, sample.joules) == ("NVML", (3, 3, 3, 3))
