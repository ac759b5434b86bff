"""What a benchmark times."""

import torch

from sleb_cli.checks.verbs import check_bench
from sleb_cli.engine.door.bench import resolve_bench
from sleb_cli.engine.door.files import locate
from sleb_cli.engine.speed.workloads import make_workload
from sleb_cli.events import Notice, ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import BenchRequest


def resolve(model, notify=ignore, **options):
    request, registry = BenchRequest(str(model), **options), load_plugins()
    named, engine = check_bench(request, registry)
    return resolve_bench(request, named, engine, locate(named, notify), registry, notify)


def test_a_sweep_takes_each_shape_in_turn(tiny_llama):
    found = resolve(tiny_llama, sweep=("batch=1,2 prompt=4,8", "new=2,3"), iterations=7).workloads
    assert [workload.label for workload in found] == [
        *(f"prompt {batch}x{length}" for batch in (1, 2) for length in (4, 8)),
        *(
            f"generation {batch}x{length}+{new}"
            for batch in (1, 2)
            for length in (4, 8)
            for new in (2, 3)
        ),
    ]
    assert {workload.iterations for workload in found} == {7}


def test_defaults_suit_the_device_and_the_model(tiny_llama):
    heard = []
    found = resolve(tiny_llama, heard.append).workloads
    assert [workload.label for workload in found] == ["prompt 1x128", "generation 4x64+32"]
    assert heard[0] == Notice("prompt 1x128: less than the paper's setting, because this is a CPU.")
    heard.clear()
    (found,) = resolve(tiny_llama, heard.append, prompt=True, batch_size=3).workloads
    assert (found.label, heard) == ("prompt 3x128", [])
    assert make_workload("generation", torch.device("cuda"), None).label == "generation 64x64+128"
    assert (
        make_workload("prompt", torch.device("cuda"), 100, least_new_tokens=1).label
        == "prompt 1x99"
    )
