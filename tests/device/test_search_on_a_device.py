"""`sleb search` on the simulated device writes the plan that it writes on the CPU, to the last digit."""

import json

import pytest

from conftest import calibration, save_model
from families import tiny_config
from sleb_cli.engine.forward import passes
from sleb_cli.engine.search import run
from sleb_cli.engine.search.journal import journal_of

SEARCHES = {
    "nll": (),
    "kl": ("--metric", "kl"),
    "cosine": ("--metric", "cosine"),
    "taylor": ("--metric", "taylor"),
    "magnitude": ("--metric", "magnitude"),
    "a task": ("--metric", "task:tales.yaml:2"),
    "beam": ("--strategy", "beam", "--beam-width", 2),
    "contiguous cosine": ("--strategy", "contiguous", "--metric", "cosine"),
    "fast": ("--fast", "--batch-size", 1),
    "held out, fast": ("--holdout", 0.25, "--fast", "--batch-size", 1),
    "own text": ("--calibration", "self:0.5,prose.txt:0.5"),
    "a sample": ("--sample-tokens", 6),
    "streamed kl": ("--stream", "--metric", "kl"),
    "streamed spans": ("--stream", "--metric", "angular", "--strategy", "contiguous"),
    "streamed through a file": ("--stream", "--memory", "250kB", "--batch-size", 1, "--samples", 12),
    "bfloat16": ("--dtype", "bfloat16"),
}


@pytest.fixture
def search(run_sleb, text_file, tmp_path):
    """Search on a device, and return the plan without what may differ: the device, and the machine and its time."""
    (tmp_path / "prose.txt").symlink_to(text_file)
    write_task(tmp_path)

    def run_search(model, *options, code=0):
        given = ["--remove", 2, "--sample-tokens", 1, "--samples", 4, "--sequence-length", 16, "--force", "-q"]
        result = run_sleb("search", model, *given, "--calibration", text_file, *options)
        assert result.exit_code == code, result.stderr
        if code:
            return None
        assert result.stderr == ""
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["search"].pop("device") == ("cpu" if "cpu" in options else "sim")
        del plan["environment"]
        return plan

    return run_search


def write_task(folder):
    """Write a task of two choices, as lm-eval reads it."""
    items = [{"text": f"the river {i}", "choices": [" stone bridge", " town"], "label": i % 2} for i in range(8)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "tales.yaml").write_text(
        f"task: tales\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'items.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\nmetric_list:\n  - metric: acc\n"
    )


ON_ONE = ["--device", "sim:1"]
ONE_STEP = ["kl", "cosine", "taylor", "magnitude", "a task", "bfloat16"]
EVERYWHERE = [(None, "nll"), (None, "kl"), (None, "cosine"), (None, "taylor"), ("gemma3_text", "nll")]
# The last is searched by whole passes.
FAMILIES = [("gemma2", "taylor"), ("mixtral", "nll"), ("opt", "taylor"), ("xlnet", "nll"), ("xlnet", "taylor")]


@pytest.mark.parametrize(("family", "name"), [*((None, name) for name in SEARCHES), EVERYWHERE[-1], *FAMILIES])
def test_the_plan_is_the_cpus(search, simulate, tiny_llama, tmp_path, spread, family, name):
    model = save_model(tmp_path / family, tiny_config(family)) if family else tiny_llama
    options = [*SEARCHES[name], *(["--remove", 1] if family or name in ONE_STEP else [])]
    expected = search(model, *options, "--device", "cpu")
    simulate(float64=False)
    assert search(model, *options, *ON_ONE) == expected
    if (family, name) in EVERYWHERE:
        simulate(float64=True)
        assert search(model, *options, *ON_ONE) == expected
        assert search(model, *options, *spread()) == expected


def test_auto_chooses_the_device(run_sleb, simulate, tiny_llama, text_file, tmp_path):
    simulate()
    result = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file), "-q")
    assert result.exit_code == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["search"]["device"], plan["environment"]["processor"]) == ("sim", "Simulated device")
    result = run_sleb("search", tiny_llama, "--remove", 1, "--device", "sim:2", "-o", "other.json")
    assert result.exit_code == 7
    assert "There is no sim:2: this machine has 2 sim devices." in result.stderr


def test_interrupted_and_resumed_it_is_the_same_plan(search, simulate, tiny_llama, tmp_path, monkeypatch):
    options = ["--fast", "--batch-size", 1]
    expected = search(tiny_llama, *options, "--device", "cpu")
    simulate(float64=False)
    journal, real, steps = journal_of(tmp_path / "plan.json"), run._step, []

    def step(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "_step", step)
    assert search(tiny_llama, *options, *ON_ONE, code=130) is None
    assert journal.stat().st_size > 1000
    assert search(tiny_llama, *options, *ON_ONE, "--resume") == expected
    assert not journal.exists()


def test_hidden_states_wait_in_host_memory_if_need_be(search, simulate, tiny_llama, monkeypatch):
    options = ("--stream", "--batch-size", 1, "--samples", 24)
    expected = search(tiny_llama, *options, "--device", "cpu")
    held = []
    monkeypatch.setattr(passes, "on_host", lambda hidden: held.append(hidden.device.type) or hidden.cpu())
    simulate(memory=600_000)
    assert search(tiny_llama, *options, "--device", "sim") == expected
    assert "sim" in held
