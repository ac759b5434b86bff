"""`sleb bench --engine`: other engines than transformers, through `main()`."""

import json
import re
import sys
import tempfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import sleb_plugins as sleb
from conftest import as_typed, weights_of
from gguf_models import write_gguf, write_llama_gguf
from sleb_cli.engine.gguf.blocks import block_count
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.output.measured import read_measurements
from sleb_cli.engine.speed.engines import vllm
from sleb_cli.events import ignore
from sleb_cli.plan import read_plan
from sleb_cli.results import BenchResult
from sleb_cli.saved_results import read_results, results_folder

SHORT = ["--batch-size 2 --prompt-length 8 --iterations 4 --warmup 1"]


@pytest.fixture
def bench(sleb):
    """Run a short benchmark, require an exit code, and give the result."""

    def run(*words, **how):
        new_tokens = [] if "--prompt" in as_typed(words) else ["--new-tokens 3"]
        return sleb("bench", *words, *SHORT, *new_tokens, **how)

    return run


class Recorder(sleb.Engine):
    """Reads GGUF files, and remembers what it was asked."""

    name = "recorder"
    reads = "gguf"

    def __init__(self):
        self.settings, self.files, self.running, self.prompts = [], [], [], []

    def version(self):
        return "recorder 1.0"

    def load(self, model, settings):
        self.settings.append(settings)
        self.files.append(read_gguf(model))
        # Larger ones may not fit on a disk together.
        assert len(list(model.parent.glob("*-blocks-fewer.gguf"))) <= 1
        return RecordedModel(self, len(self.files))


class RecordedModel(sleb.LoadedModel):
    device = "abacus"

    def __init__(self, engine, number):
        self.engine, self.number = engine, number
        engine.running.append(number)
        assert len(engine.running) <= engine.settings[0].models

    def run(self, prompts, new_tokens):
        self.engine.prompts.append((self.number, prompts))
        return sleb.TimedRun(1.0 / self.number, tuple(step / 8 for step in range(new_tokens)))

    def close(self):
        self.engine.running.remove(self.number)


@pytest.fixture
def recorder(as_plugins, monkeypatch):
    """An engine that is offered as a plugin, to be asked what it has seen."""
    engine = Recorder()
    module = type(sys)("recorder_plugin")
    module.sleb_engines = sleb.hookimpl(lambda: [engine])
    monkeypatch.setitem(sys.modules, "recorder_plugin", module)
    as_plugins("recorder_plugin")
    return engine


def test_every_size_is_timed_beside_the_dense_model(
    bench, steady, llama_plan, tiny_llama, tmp_path, monkeypatch
):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    data = bench(llama_plan, "--every 1 --engine steady --json").data
    assert list((tmp_path / "scratch").iterdir()) == []  # no file that was written stays
    kept = read_results(BenchResult, results_folder(llama_plan), ignore).values()
    workloads = [each.to_data()["workloads"][0] for each in kept]
    assert sorted(workloads, key=str) == sorted(data["workloads"], key=str)
    assert all(each.plugins == {"unknown package": "?"} for each in kept)  # the engine's
    # Reports show transformers alone.
    plan = read_plan(llama_plan)
    assert read_measurements(llama_plan, plan, ignore)[1] is None
    dense, sizes = data["dense"], data["pruned"]
    assert [size["removals"] for size in sizes] == list(map(list, plan.size_keys))
    assert [size["blocks"] for size in (dense, *sizes)] == [6, 5, 4]
    stored = sum(tensor.nbytes for tensor in weights_of(tiny_llama).values())
    assert dense["weights_bytes"] == stored == 4 * dense["parameters"]
    prompt, generation = data["workloads"]
    assert (prompt["workload"]["name"], generation["workload"]["name"]) == ("prompt", "generation")
    for measured in data["workloads"]:
        assert measured["workload"]["engine"] == "steady"
        assert (measured["attention"], measured["engine_version"]) == (None, None)
        assert len(measured["dense"]["e2els"]) == 4 * 2  # it runs beside each size
        for size, timing in zip(sizes, measured["pruned"], strict=True):
            assert (timing["removals"], timing["memory"]) == (size["removals"], None)
            shares = dense["weights_bytes"] / size["weights_bytes"]
            assert timing["speedup"] == pytest.approx(shares, rel=0.01)  # a file has a header, too
    assert generation["dense"]["ttfts"] == prompt["dense"]["ttfts"]
    assert {len(steps) for steps in generation["dense"]["itls"]} == {2}


def test_a_gguf_file_is_cut_and_loaded_in_pairs(bench, recorder, tmp_path):
    file = write_llama_gguf(tmp_path / "tiny.gguf", 6)
    options = "--blocks 4,1,2 --remove 1,3 --engine recorder --prompt --threads 1 --json"
    data = bench(file, options).data
    assert [block_count(file) for file in recorder.files] == [6, 5, 3]
    assert (data["dtype"], data["device"], data["threads"]) == ("F32", "abacus", 1)
    settings = recorder.settings[0]
    assert (settings.threads, settings.models) == (1, 2)
    assert (settings.batch_size, settings.sequence_length) == (2, 8)
    (measured,) = data["workloads"]
    assert measured["engine_version"] == "recorder 1.0"
    assert [timing["speedup"] for timing in measured["pruned"]] == [2.0, 3.0]
    assert recorder.running == []
    of_first_size = recorder.prompts[:10]
    assert [number for number, _ in of_first_size] == [1, 2, 2, 1, 1, 2, 2, 1, 1, 2]
    # Both models of a round read the same prompts, which no other round of the two repeats.
    assert len({json.dumps(prompts) for _, prompts in of_first_size}) == 5


def test_the_gguf_file_of_a_checkpoint_is_named(bench, recorder, tmp_path):
    file = write_llama_gguf(tmp_path / "tiny.gguf", 6)
    command = [tmp_path / "origin", "--blocks 1 --engine recorder --prompt"]
    assert re.search("recorder reads GGUF files(.|\n)*--source", bench(*command, code=2).stderr)
    bench(*command, "--source", file)
    write_gguf(tmp_path / "other.gguf", "gemma", 4)
    assert "holds another model" in bench(*command, "--source other.gguf", code=3).stderr


@pytest.mark.parametrize(("engine", "module"), [("vllm", "vllm"), ("llama.cpp", "llama_cpp")])
def test_an_engine_that_is_missing(bench, tiny_llama, monkeypatch, engine, module):
    monkeypatch.setitem(sys.modules, module, None)
    said = bench(tiny_llama, "--engine", engine, code=7).stderr
    assert "is not installed" in said
    assert f"pip install 'sleb[{module.replace('_', '-')}]'" in said


def test_an_engine_that_is_broken(bench, tiny_llama, monkeypatch, tmp_path):
    broken = "raise OSError('libgomp.so.1: cannot open shared object file')"
    (tmp_path / "llama_cpp.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    said = bench(tiny_llama, "--engine llama.cpp", code=7).stderr
    assert "llama.cpp is installed, but does not load: libgomp.so.1" in said


def test_an_engine_is_told_whether_code_of_the_model_may_run(
    bench, steady, tiny_llama, monkeypatch
):
    import sleb_example

    told = []

    def load(_, model, settings):
        told.append(settings.trust_remote_code)
        return sleb_example.SteadyModel(1)

    monkeypatch.setattr(sleb_example.SteadyEngine, "load", load)
    for words in ([], ["--trust-remote-code"]):
        bench(tiny_llama, "--engine steady", *words)
    assert told == [False, True]


def test_vllm_shares_what_is_free_of_a_cpu(monkeypatch):
    memory = SimpleNamespace(available=20.0, total=32.0)
    monkeypatch.setattr(vllm.psutil, "virtual_memory", lambda: memory)
    first = 32.0 * vllm._memory_share("cpu", 2, 0)
    assert first == pytest.approx(9)
    memory.available -= first
    assert 9 <= 32.0 * vllm._memory_share("cpu", 2, 1) < memory.available


needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_runs_a_gguf_file(bench, tmp_path):
    file = write_llama_gguf(tmp_path / "tiny.gguf", 6)
    data = bench(file, "--blocks 4,1 --every 1 --engine llama.cpp --json").data
    for measured in data["workloads"]:
        assert measured["engine_version"].startswith("llama_cpp_python ")
        assert all(min(timing["e2els"]) > 0 for timing in measured["pruned"])
    generation = data["workloads"][1]
    assert {len(steps) for steps in generation["dense"]["itls"]} == {2}


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_decodes_sequences_together_as_it_does_alone(tmp_path):
    from sleb_cli.engine.speed.engines.llama_cpp import LlamaCpp

    file = write_llama_gguf(tmp_path / "tiny.gguf", 4)
    prompts = [[5, 9, 200, 31, 7], [11, 12, 13], [300, 2, 2, 40]]
    chosen = {}
    for name, batches in (("together", [prompts]), ("alone", [[prompt] for prompt in prompts])):
        model = LlamaCpp().load(file, sleb.EngineSettings("float32", 1, 3, 16))
        decode, chosen[name] = model._decode, []

        def remember(*given, decode=decode, into=chosen[name]):
            into.append(decode(*given))
            return into[-1]

        model._decode = remember
        runs = [model.run(batch, 6) for batch in batches]
        model.close()
        assert all(len(run.token_seconds) == 6 for run in runs)
    alone = chosen["alone"]
    assert chosen["together"] == [[alone[6 * n + step][0] for n in range(3)] for step in range(6)]
