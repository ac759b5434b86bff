"""Killed at any moment, a command that is given again ends as if nothing had happened."""

import random
import signal

import pytest

from faults.conftest import counts
from faults.place import COMMANDS
from faults.program import KILL, Fault

KINDS = (
    "search", "search --fast", "search --holdout", "search --stream, saved", "search, two processes", "search gguf",
    "apply", "apply gguf", "apply --recover", "apply --heal, saved", "eval",
)  # fmt: skip


def killed(place, name, number):
    """Kill a command once, at a call or at a time, and let it end; return how its processes ended."""
    rng, calls = random.Random(number), place.undisturbed(name)[0]
    if number % 2:
        fault = Fault(place.folder, at=rng.randint(1, len(calls)), what=KILL)
        return [each.wait() for each in place.launch(COMMANDS[name], fault=fault)]
    running = place.launch(COMMANDS[name])
    running[0].ends_within(rng.uniform(0, 0.5))
    for each in rng.choice([running, *([each] for each in running)]):
        each.send(signal.SIGKILL)
    for each in running:
        if not each.ends_within(1):
            each.send(signal.SIGTERM)  # as a launcher does
    return [each.wait() for each in running]


@counts(2, 100)
@pytest.mark.parametrize("name", KINDS)
def test_given_again_after_a_kill_it_ends_as_if_undisturbed(place, tried, name, count):
    place.undisturbed(name)
    kills = 0
    for number in range(count):
        place.reset()
        ended = killed(place, name, number)
        kills += any(each.exit_code == -signal.SIGKILL for each in ended)
        wrong = list(place.wrong(name, done=False, may_leave=True))
        assert not wrong, (number, wrong, [each.stderr for each in ended])
        if any(each.exit_code for each in ended):
            place.again(name, number)
    assert kills >= count // 2 - 1, f"only {kills} of {count} were killed before they ended"
    tried(f"kills of {name}", kills)
