"""What a benchmark times, and options that do not go together."""

import pytest
import torch

from sleb_cli.engine.door.bench import resolve_bench
from sleb_cli.engine.speed.workloads import make_workload
from sleb_cli.events import Notice, ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import BenchRequest
from sleb_plugins import UsageError


def resolve(model, notify=ignore, **options):
    return resolve_bench(BenchRequest(str(model), **options), load_plugins(), notify)


def test_a_sweep_takes_each_shape_in_turn(tiny_llama):
    found = resolve(tiny_llama, sweep=("batch=1,2 prompt=4,8", "new=2,3"), iterations=7).workloads
    assert [workload.label for workload in found] == [
        *(f"prompt {batch}x{length}" for batch in (1, 2) for length in (4, 8)),
        *(f"generation {batch}x{length}+{new}" for batch in (1, 2) for length in (4, 8) for new in (2, 3)),
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
    assert make_workload("prompt", torch.device("cuda"), 100, least_new_tokens=1).label == "prompt 1x99"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "--new-tokens 0"),
        ({"prompt_length": 100, "new_tokens": 100}, "exceeds the model's 128 positions"),
        ({"compile": True, "warmup": 0}, "--warmup 0 is too small"),
        ({"sweep": ("batch=1,2 prompts=8",)}, "--sweep cannot vary 'prompts'"),
        ({"sweep": ("batch=one",)}, "'batch=one' is not a name and a list of numbers"),
        ({"sweep": ("batch=0",)}, "--batch-size 0 is too small"),
        ({"sweep": ("batch=1",), "batch_size": 2}, "--sweep sets batch and so does --batch-size"),
        ({"sweep": ("batch=1", "batch=2")}, "--sweep sets batch twice"),
        ({"sweep": ("prompt=8,2048",)}, "A prompt of 2048 tokens exceeds"),
        ({"engine": "lama.cpp"}, "Did you mean 'llama.cpp'?"),
        ({"source": "x.gguf"}, "--source requires --engine"),
        ({"engine": "steady", "source": "x.gguf"}, "--source does not apply to --engine steady"),
        ({"engine": "steady", "device": "cpu"}, "--device does not apply to --engine steady"),
    ],
)
def test_what_cannot_be_is_refused(steady, tiny_llama, options, message):
    with pytest.raises(UsageError) as error:
        resolve(tiny_llama, **options)
    assert message in f"{error.value.message} {error.value.hint}"
