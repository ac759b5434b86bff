"""Show the result of `sleb rerun`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_cli.ui.tables import print_line, print_to_copy
from sleb_cli.units import plural

if TYPE_CHECKING:
    from sleb_cli.results import RerunResult


def show_rerun(result: RerunResult) -> None:
    """Say whether the same blocks and scores were found, and what may be why not."""
    if not result.same_tokens:
        print_line("the calibration tokens differ: the text, its split or the tokenizer has changed")
    if result.first_other_step is not None:
        print_line(f"other blocks from step {result.first_other_step} on")
    else:
        print_line(f"the same {plural(len(result.removals), 'block')}, in the same order")
    change = result.largest_change
    print_line("every score is the same, to the last digit" if not change else f"scores differ by at most {change:.2g}")
    if result.environment:
        print_line(f"also different: {result.environment}")
    print_to_copy(f"wrote {result.output}")
