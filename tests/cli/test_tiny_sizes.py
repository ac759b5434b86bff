"""What a command finds and writes is the same when its buffers, batches and files are a few bytes
long.
"""

import re

import pytest

from conftest import calibration, write_task

COMMANDS = {
    # races look after batches
    "search": "search MODEL --remove 2 TEXT --fast --holdout 0.25 --batch-size 2",
    "apply": "apply PLAN --max-shard-size 20kB --stream",
    "apply --recover": "apply PLAN --recover --heal-tokens 1024 TEXT",
    "eval": "eval PLAN --every 1 --perplexity FILE --sequence-length 32 --max-windows 8",
    "eval --tasks": "eval PLAN --tasks mine --include-path tasks",
}
UNLIKE = re.compile("environment|seconds|started|folder|file|batch_size|peak|memory")


def numbers_of(data, name=""):
    """Yield the numbers of a document with their names, without those that differ between two equal
    runs.
    """
    if isinstance(data, dict):
        for key, value in data.items():
            if not UNLIKE.search(key):
                yield from numbers_of(value, f"{name}.{key}")
    elif isinstance(data, list):
        for place, value in enumerate(data):
            yield from numbers_of(value, f"{name}.{place}")
    elif isinstance(data, int | float):
        yield name, data


@pytest.mark.parametrize("name", COMMANDS)
def test_results_do_not_depend_on_the_sizes_of_buffers_and_batches(
    sleb, request, tiny_llama, llama_plan, text_file, tmp_path, name
):
    rows = [
        {"q": f"item {number}", "choices": ["yes", "no"], "gold": number % 2} for number in range(9)
    ]
    write_task(tmp_path / "tasks", "mine", rows)
    given = {
        "MODEL": [tiny_llama],
        "PLAN": [llama_plan],
        "FILE": [text_file],
        "TEXT": calibration(text_file, 24, 32),
    }
    words = [part for word in COMMANDS[name].split() for part in given.get(word, [word])]
    found, files = [], []
    for _ in ("usual sizes", "tiny sizes"):
        found.append(dict(numbers_of(sleb(*words, "--force --json").data)))
        weights = sorted(tmp_path.glob("*/model*.safetensors"))
        files.append({path.name: path.read_bytes() for path in weights})
        request.getfixturevalue("tiny_sizes")
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert files[0].keys() == files[1].keys()
    assert files[0] == files[1] or name == "apply --recover"
