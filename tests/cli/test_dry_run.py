"""--dry-run: the checks of the real run, what it would do and write, and nothing else."""

import json
import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

import sleb_cli as sleb
import sleb_cli.engine.dry_run  # all that it imports is bound before a test replaces functions
from gguf_models import write_llama_gguf
from sleb_cli.engine.files import weights
from sleb_cli.engine.surgery import loading

TEXT = ("--sequence-length", 32)


@pytest.fixture
def commands(tiny_llama, llama_plan, text_file):
    """A command line of each command."""
    calibration = ("--calibration", text_file, "--samples", 4, *TEXT)
    short = ("--iterations", 1, "--warmup", 0, "--batch-size", 1, "--prompt-length", 8, "--new-tokens", 2)
    return {
        "search": ("search", tiny_llama, "--remove", 2, *calibration),
        "apply": ("apply", llama_plan, "-o", "smaller"),
        "recover": (
            "apply",
            llama_plan,
            "-o",
            "smaller",
            "--recover",
            "--calibration",
            text_file,
            "--samples",
            8,
            *TEXT,
        ),
        "eval": (
            "eval",
            llama_plan,
            "--perplexity",
            text_file,
            "--max-windows",
            5,
            "--every",
            1,
            *TEXT,
            "-o",
            "e.json",
        ),
        "bench": ("bench", llama_plan, *short, "-o", "b.json"),
    }


def planned(run_sleb, *arguments):
    result = run_sleb(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["search", "apply", "recover", "eval", "bench"])
def test_no_file_is_written_and_no_weights_are_loaded(run_sleb, commands, name, monkeypatch, tmp_path, tiny_llama):
    def refuse(*arguments, **options):
        raise AssertionError("weights are loaded")

    for module, function in ((loading, "load_pretrained"), (weights, "read_tensors")):
        monkeypatch.setattr(module, function, refuse)
    before = sorted(tmp_path.rglob("*")), files_in(tmp_path), files_in(tiny_llama)
    data, screen = planned(run_sleb, *commands[name]), run_sleb(*commands[name], "--dry-run")
    assert (sorted(tmp_path.rglob("*")), files_in(tmp_path), files_in(tiny_llama)) == before
    assert data["blocks"] == 6
    assert data["removed"] == 2
    assert data["memory_bytes"] > 0
    assert (data["seconds"] or 0) > 0 or name in ("apply", "recover")
    assert all(f"would write {file}" in screen.stdout for file in data["files"])
    assert all(each in screen.stdout for each in ("2 of 6 blocks", data["dtype"]))


REFUSALS = {
    "no such model": ("search", "nowhere", "--remove", 2),
    "no target": ("search", "MODEL"),
    "too many": ("search", "MODEL", "--remove", 6),
    "unknown metric": ("search", "MODEL", "--remove", 1, "--metric", "nl"),
    "no text": ("search", "MODEL", "--remove", 1, "--calibration", "missing.txt"),
    "short text": ("search", "MODEL", "--remove", 1, "--calibration", "short.txt", *TEXT),
    "too long": ("search", "MODEL", "--remove", 1, "--sequence-length", 10**6),
    "lone entry": ("search", "MODEL", "--remove", 1, "--compare", "nll"),
    "plan exists": ("search", "MODEL", "--remove", 1, "-o", "short.txt"),
    "no blocks": ("apply", "MODEL"),
    "no such block": ("apply", "MODEL", "--blocks", "9"),
    "output exists": ("apply", "MODEL", "--blocks", "2", "-o", "here"),
    "option alone": ("apply", "MODEL", "--blocks", "2", "--samples", 3),
    "no dtype": ("eval", "MODEL", "--dtype", "float7", "--perplexity", "short.txt"),
    "no evaluation text": ("eval", "MODEL", "--perplexity", "missing.txt"),
    "no task": ("eval", "MODEL", "--tasks", "canarys"),
    "streamed tasks": ("eval", "MODEL", "--tasks", "canaries", "--stream"),
    "result exists": ("eval", "MODEL", "--perplexity", "short.txt", "-o", "short.txt"),
    "no engine": ("bench", "MODEL", "--engine", "nothing"),
    "long prompt": ("bench", "MODEL", "--prompt-length", 10**6),
    "no size": ("bench", "MODEL", "--blocks", "2,3", "--remove", "5"),
    "no plan": ("bench", "missing.json"),
}


@pytest.mark.parametrize("arguments", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_those_of_the_real_run(run_sleb, tiny_llama, tmp_path, arguments):
    (tmp_path / "short.txt").write_text("A word.")
    (tmp_path / "here").mkdir()
    words = [tiny_llama if word == "MODEL" else word for word in arguments]
    real, dry = run_sleb(*words), run_sleb(*words, "--dry-run")
    assert real.exit_code == dry.exit_code > 1
    assert re.findall("^error: .*", dry.stderr, re.MULTILINE) == re.findall("^error: .*", real.stderr, re.MULTILINE)


@pytest.mark.parametrize("options", [(), ("--holdout", "0.25", "--metric", "kl"), ("--fast",)], ids=str)
def test_a_search_is_what_was_said(run_sleb, commands, options):
    data = planned(run_sleb, *commands["search"], *options)
    real = run_sleb(*commands["search"], *options, "--json")
    plan, (evaluations,) = json.loads(real.stdout), re.findall(r"(\d+) candidate x sequence", real.stderr)
    text = plan["calibration"]
    assert f"{text['sequences']} x {text['sequence_length']} tokens" in data["work"][0]
    assert data["work"][1].removeprefix("at most ").startswith(f"{evaluations} evaluations")
    assert data["work"][1].startswith("at most") == (options == ("--fast",))
    assert (data["dtype"], data["device"]) == (plan["search"]["dtype"], plan["search"]["device"])
    assert (data["model"], data["removed"]) == (plan["model"]["id"], len(plan["removals"]))
    assert data["files"] == ["plan.json"]


@pytest.mark.parametrize("options", [(), ("--max-shard-size", "20kB"), ("--dtype", "bfloat16")], ids=str)
def test_a_checkpoint_is_what_was_said(run_sleb, commands, tmp_path, options):
    data = planned(run_sleb, *commands["apply"], *options)
    real = json.loads(run_sleb(*commands["apply"], *options, "--json").stdout)
    assert data["files"] == sorted(f"smaller/{name}" for name in files_in(tmp_path / "smaller"))
    assert data["written_bytes"] == real["weights_bytes"]
    assert (data["dtype"], data["blocks"] - data["removed"]) == (real["dtype"], real["blocks"])


def test_a_checkpoint_with_results_is_what_was_said(run_sleb, commands, tmp_path):
    assert run_sleb(*commands["eval"]).exit_code == 0
    data = planned(run_sleb, *commands["apply"])
    assert run_sleb(*commands["apply"]).exit_code == 0
    assert data["files"] == sorted(f"smaller/{name}" for name in files_in(tmp_path / "smaller"))
    assert any("eval" in name for name in data["files"])


def test_an_evaluation_is_what_was_said(run_sleb, commands, tmp_path):
    data = planned(run_sleb, *commands["eval"])
    before = files_in(tmp_path)
    real = json.loads(run_sleb(*commands["eval"], "--json").stdout)
    (text,) = real["texts"]
    assert f"{text['windows']} windows of {text['sequence_length']} tokens" in data["work"][0]
    assert data["sizes"] == [len(each["removals"]) for each in text["pruned"]]
    assert (data["dtype"], data["device"]) == (real["dtype"], real["device"])
    written = files_in(tmp_path).keys() - before
    assert {Path(name).name for name in data["files"]} == {name for name in written if "cache" not in name}


def test_a_benchmark_is_what_was_said(run_sleb, commands, tmp_path):
    data = planned(run_sleb, *commands["bench"])
    before = files_in(tmp_path)
    real = json.loads(run_sleb(*commands["bench"], "--json").stdout)
    for said, timed in zip(data["work"], real["workloads"], strict=True):
        asked = timed["workload"]
        assert said.startswith(f"{asked['name']}: {asked['batch_size']} x {asked['prompt_length']} prompt tokens")
        assert said.endswith(f"{asked['iterations']} runs")
    assert data["sizes"] == [len(each["removals"]) for each in real["pruned"]]
    assert (data["dtype"], data["device"]) == (real["dtype"], real["device"])
    assert {Path(name).name for name in data["files"]} == files_in(tmp_path).keys() - before


def test_a_gguf_file_is_what_was_said(run_sleb, tmp_path):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, GGMLQuantizationType.Q8_0)
    command = ("apply", "--source", source, "--blocks", "2,3", "-o", "small.gguf")
    data = planned(run_sleb, *command)
    real = json.loads(run_sleb(*command, "--json").stdout)
    assert data["files"] == [real["file"]]
    assert data["written_bytes"] == real["file_bytes"]
    assert data["blocks"] - data["removed"] == real["blocks"]
    assert data["dtype"] is None


def test_another_engine_is_not_started(run_sleb, steady, commands):
    data = planned(run_sleb, *commands["bench"], "--engine", "steady")
    assert data["seconds"] is None
    assert any(name.endswith(".bench.steady.json") for name in data["files"])


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        (("--stream",), False),  # how fast the disk is, is not known
        (("--metric", "next-token-error"), False),  # nor how long a metric of whole models takes
        (("--target-speedup", 1.2), False),
        (("--metric", "cosine"), True),
        (("--strategy", "contiguous"), True),
    ],
    ids=str,
)
def test_the_time_is_told_where_it_is_known(run_sleb, commands, steady, options, seconds):
    search = [word for word in commands["search"] if options[0] != "--target-speedup" or word not in ("--remove", 2)]
    data = planned(run_sleb, *search, *options)
    assert (data["seconds"] is not None) == seconds
    assert (data["removed"] is None) == (options[0] == "--target-speedup")


def test_compared_searches_are_counted_together(run_sleb, commands):
    one = planned(run_sleb, *commands["search"])["work"][1]
    both = planned(run_sleb, *commands["search"], "--compare", "nll,kl")["work"][1]
    assert int(both.split()[0]) == 2 * int(one.split()[0])


def test_a_gguf_file_is_not_converted_for_it(run_sleb, tmp_path, text_file):
    write_llama_gguf(tmp_path / "a.gguf", blocks=4)
    command = ("search", "a.gguf", "--remove", 1, "--calibration", text_file, "--samples", 4, *TEXT)
    data = planned(run_sleb, *command)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert run_sleb("bench", "a.gguf", "--estimate").exit_code == 0
    assert run_sleb("apply", "a.gguf", "--blocks", "1", "-o", "out", "--dry-run").exit_code == 4
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert run_sleb(*command).exit_code == 0
    again = planned(run_sleb, *command, "--force")
    ignored = {"seconds", "free_bytes"}
    assert {k: v for k, v in data.items() if k not in ignored} == {k: v for k, v in again.items() if k not in ignored}


def test_the_demo_is_not_downloaded_for_it(run_sleb, tmp_path, tiny_llama):
    result = run_sleb("search", "demo", "--remove", 1, "--dry-run")
    assert result.exit_code == 2
    assert "--dry-run downloads nothing" in result.stderr
    assert not (tmp_path / "cache").exists()
    assert run_sleb("bench", tiny_llama, "--estimate", "--dry-run").exit_code == 2


def test_from_python(tiny_llama):
    assert sleb.dry_run(sleb.ApplyRequest(str(tiny_llama), blocks=(2,))).removed == 1
