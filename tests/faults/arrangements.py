"""What is done in the process of a run before the program: it is called as if something there were
odd or gone.

The server imports this once, so it imports none of the tests.
"""

import os
import signal
import sys

import huggingface_hub

from sleb_cli import api, atomic
from sleb_cli.engine.recovery import saved_state


def saving_always():
    """Save unfinished healings and walks whenever that is possible."""
    saved_state.SECONDS_BETWEEN_SAVES = 0.0
    saved_state.MAX_SAVING_SHARE = 1e9


def with_a_hub():
    """Reach the hub that the environment names."""
    constants = huggingface_hub.constants
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]


def stopping_at(moment, ignored):
    """Stop once the program has said `moment`; signals may be ignored, as `nohup` has it."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    write = sys.stderr.write

    def watched(text):
        count = write(text)
        if moment in text:
            sys.stderr.write = write
            signal.raise_signal(signal.SIGSTOP)
        return count

    sys.stderr.write = watched


def cleaning_up_for_long():
    """Say when the program cleans up, and then take some time."""
    clear = atomic.clear

    def slowly(folder):
        if list(folder.glob("new/*")):
            print("cleaning up", file=sys.stderr)
            while True:
                signal.pause()
        clear(folder)

    atomic.clear = slowly


def without_readers(*streams):
    """Nobody reads these of the streams 1 and 2 any more."""
    ours, theirs = os.pipe()
    os.close(ours)
    for stream in streams:
        os.dup2(theirs, stream)


def with_encoding(encoding):
    """Have streams of this encoding, which are as strict as Python makes those of a locale."""
    sys.stdout = os.fdopen(1, "w", encoding=encoding, errors="strict", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)


def with_a_bug(password, secret):
    """Fail in `apply` with an error whose message, and whose variables, hold secrets."""

    def fail(*_):
        held = secret  # a traceback with local variables would show it
        try:
            raise OSError(
                f"GET https://jane:{password}@hub.example/x?X-Amz-Signature={password}&b=1 {held}"
            )
        except OSError as error:
            raise RuntimeError(f"Authorization: Bearer {held}") from error

    api.apply = fail
