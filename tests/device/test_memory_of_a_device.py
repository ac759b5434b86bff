"""What `sleb` does where the memory of a device does not suffice: smaller pieces and the same plan,
or a sentence.
"""

import pytest

SMALLEST = 2**18
"""Too little even for the weights of the tiny Llama, of which there are 328,704 bytes with their
padding.
"""


SIZES = ["--samples", 8, "--sequence-length", 32]


def test_the_plan_is_the_same_in_smaller_pieces(search, simulate, tiny_llama):
    backend = simulate()
    _, plan = search(tiny_llama, *SIZES, "--device", "sim")
    half = backend.max_memory_allocated() // 2
    backend.memory = backend.memory_reserved()
    assert backend.mem_get_info()[0] == 0
    _, found = search(tiny_llama, *SIZES, "--device", "sim")
    assert found["removals"] == plan["removals"]
    backend.empty_cache()
    backend.memory = half
    result, found = search(
        tiny_llama, *SIZES, "--device", "sim", "--memory", "1GB", "--batch-size", 8
    )
    assert "Out of memory on sim:0; continuing with" in result.stderr
    assert found == plan


@pytest.mark.parametrize(
    "command",
    [
        "search --remove 1",
        "eval --perplexity test.txt --sequence-length 32",
        "apply --blocks 2 --recover --no-heal --samples 8 --sequence-length 32 -o out",
    ],
)
def test_a_model_that_does_not_fit_is_one_sentence(
    run_sleb, simulate, tiny_llama, text_file, tmp_path, command
):
    simulate(memory=SMALLEST)
    (tmp_path / "test.txt").write_text(text_file.read_text())
    verb, *options = command.split()
    calibrated = [] if verb == "eval" else ["--calibration", text_file]
    result = run_sleb(verb, tiny_llama, *options, *calibrated, "--device", "sim:1")
    assert result.exit_code == 7, result.stderr
    assert result.stderr.count("error: ") == 1
    assert "memory" in result.stderr
    assert not (tmp_path / "plan.json").exists()
