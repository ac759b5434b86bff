"""The place of this process among those that `accelerate launch` or `torchrun` started."""

import os


class WorkerFinished(Exception):
    """This process has done its share; the main one writes the result, or says what went wrong."""

    def __init__(self, exit_code: int = 0) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Terminated(SystemExit):
    """A signal ends this process."""


def process_count() -> int:
    """Return the number of processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_count() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints for all."""
    return process_rank() == 0
