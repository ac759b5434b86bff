"""This process's place among those that a launcher (`accelerate launch`, `torchrun`) started together."""

import os


class WorkerFinished(Exception):
    """This process has done its share of the work; the main process writes the result."""


def process_count() -> int:
    """Return the number of processes that work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints for all."""
    return os.environ.get("RANK", "0") == "0"
