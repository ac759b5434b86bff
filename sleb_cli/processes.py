"""Which of several processes this one is, where a launcher (`accelerate launch`, `torchrun`) started some."""

import os


def process_count() -> int:
    """Give how many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"
