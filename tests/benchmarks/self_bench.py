"""Bench a model against itself, which must be 1.00 times as fast: how often is 1.00 inside the interval?

    python tests/benchmarks/self_bench.py MODEL [--runs 10] [--workload generation] [--batch-size 1]
        [--prompt-length 64] [--new-tokens 32] [--iterations 10] [--threads 1]

Prints each run's speedup and interval, how many of them hold 1.00, and how many pairs of intervals overlap. Fails if
1.00 is inside fewer than 9 of 10.
"""

import statistics
import sys
from itertools import combinations

from saved_work import architecture_of, parser

from sleb_cli.engine.device import choose_device
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.speed.benchmark import threads, time_in_turn
from sleb_cli.engine.speed.workloads import resolve_workload
from sleb_cli.engine.statistics import median_ratio_interval
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, quiet_libraries
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import ignore
from sleb_cli.requests import BenchRequest
from sleb_cli.results import Interval

SHARE = 0.9


def main() -> int:
    found = parser(
        __doc__, "model", runs=10, batch_size=int, prompt_length=int, new_tokens=int, iterations=int, threads=int
    )
    found.add_argument("--workload", choices=["prompt", "generation"], default="generation")
    options = found.parse_args()
    quiet_libraries()
    architecture = architecture_of(options.model)
    surgery, device = Surgery(architecture, ()), choose_device("auto")
    dtype = place_model(architecture, device, "auto", ignore, stream=False).dtype
    request = BenchRequest(
        batch_size=options.batch_size, prompt_length=options.prompt_length, iterations=options.iterations,
        new_tokens=options.new_tokens if options.workload == "generation" else None,
    )  # fmt: skip
    with threads(options.threads):
        workload = resolve_workload(options.workload, request, Subject(surgery, None), device, ignore)
        dense = load_dense(architecture, dtype, device, ignore)
        models = {"dense": dense, "the same": load_pruned(surgery, dtype, device, ignore, dense=dense)}
        intervals = [compare(time_in_turn(workload, models, ignore)) for _ in range(options.runs)]
    inside = sum(found.low <= 1 <= found.high for found in intervals)
    pairs = list(combinations(intervals, 2))
    overlapping = sum(one.low <= other.high and other.low <= one.high for one, other in pairs)
    print(f"{workload.label}: 1.00 is inside {inside} of {len(intervals)}; {overlapping} of {len(pairs)} pairs overlap")
    return 0 if inside >= SHARE * len(intervals) else 1


def compare(seconds: dict[str, list[float]]) -> Interval:
    """Print the speedup of the second model over the first, and return its interval."""
    first, second = seconds.values()
    found = median_ratio_interval(first, second)
    if found is None:
        raise SystemExit("Use more --iterations: so few give no interval.")
    ratio = statistics.median(first) / statistics.median(second)
    print(f"{ratio:.3f}x ({found.low:.3f} to {found.high:.3f})", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
