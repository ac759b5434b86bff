"""Strange names, places, terminals and locales: each command does its work there, or says in a sentence why not."""

import errno
import json
import os
import re
import shlex
import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml

from conftest import calibration, evaluation
from faults.arrangements import in_a_deleted_folder, on_a_terminal, with_encoding, without_streams
from faults.conftest import often
from faults.program import Calls, Fault
from gguf_models import write_llama_gguf
from sleb_cli.plan import read_plan

NAMES = {
    "spaces": "my models  at home", "quotes": 'it\'s "so"', "emoji": "🦙🔥 模型 naïve", "newline": "two\nlines",
    "dash": "--force -x", "markup": "[red]a [bold] [link=x]", "braces": "100%s{x}{0}%(y)d{{",
    "markdown": "a|b`c`*d*<img src=x onerror=y>]( #e", "shell": "$HOME;`id` & $(id) \\ !!", "backslash": "ends\\",
    "tilde": "~root", "200 characters": "n" * 200,
    "all at once": '--it\'s "so"\na|b`c`*d*<img src=x onerror=y>]( #e $(id) [red]{0}',
}  # fmt: skip
QUICK = ("--sample-tokens", 0, "--remove", 2)
SHAPE = ("--prompt-length", 8, "--new-tokens", 2)


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def text(text_file):
    return calibration(text_file)


@pytest.fixture
def search(sleb, text):
    return lambda model, *options, code=0: sleb("search", model, *text, *QUICK, *options, code=code)


@pytest.fixture
def strange(request, tmp_path, tiny_llama, text_file, monkeypatch):
    """Be in a folder of a strange name, with a model, a text and room for a cache, all of strange names."""
    name = NAMES[request.param]
    place = tmp_path / name
    place.mkdir()
    shutil.copytree(tiny_llama, place / name)
    shutil.copy(text_file, place / f"{name}.txt")
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLEB_CACHE", str(place / "cache"))
    yield place, name
    assert [path for path in place.rglob("*") if path.name.endswith(".partial")] == []


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("strange", often(NAMES, ["all at once"]), indirect=True)
def test_every_command_works_at_a_strange_place(sleb, strange):
    """Relative names at the strange place itself, as people type them; a leading dash needs ./ as everywhere."""
    place, name = strange
    plan, text = f"./{name}.json", place / f"{name}.txt"
    found = sleb("search", f"./{name}", *calibration(text), *QUICK, "-o", plan)
    assert read_plan(Path(plan)).model.id == str(place / name)
    assert f"wrote {name}.json" in found.stdout
    assert Path(shlex.split(found.stdout.partition("next: ")[2])[2]).samefile(plan)
    sleb("apply", plan, "-o", f"./{name} out")
    _, front, card = (place / f"{name} out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert heading.endswith("without 2 of its 6 blocks")
    assert not re.search(r"(?<!\\)<img", re.sub("`[^`]*`", "", card)), "a name put a tag into the card"
    assert json.loads(sleb("eval", plan, *evaluation(text), "--json").stdout)["texts"][0]["text"] == str(text)
    recipe = yaml.safe_load(sleb("export", plan, "--to", "mergekit").stdout)
    assert {source["model"] for each in recipe["slices"] for source in each["sources"]} == {str(place / name)}
    command = shlex.split(sleb("export", plan, "--to", "llama-quantize").stdout)
    assert (command[0], Path(command[3]).name) == ("llama-quantize", f"{name}.gguf")
    assert not any(word.startswith("-") for word in command[3:])
    sleb("export", plan, "--to", "indices")
    sleb("export", plan, "--to", "report", "-o", "./page.html")
    page = (place / "page.html").read_text()
    assert not re.search('<img src=x|"so"', page), "a name put a tag or an attribute into the page"


@pytest.mark.faults
@pytest.mark.parametrize("strange", NAMES, indirect=True)
def test_gguf_files_and_times_at_a_strange_place(sleb, strange, tmp_path):
    place, name = strange
    shutil.move(write_llama_gguf(tmp_path / "model.gguf"), place / f"{name}.gguf")
    sleb("search", f"./{name}.gguf", *calibration(place / f"{name}.txt"), *QUICK)
    sleb("apply", "plan.json", "-o", f"./{name} small.gguf")
    sleb("export", "plan.json", "--to", "gguf", "-o", f"./{name} again.gguf")
    assert (place / f"{name} again.gguf").read_bytes() == (place / f"{name} small.gguf").read_bytes()
    quantize = shlex.split(sleb("export", "plan.json", "--to", "llama-quantize").stdout)
    assert Path(quantize[3]) == place / f"{name}.gguf"
    sleb("bench", "plan.json", "--iterations", 2, "--warmup", 1, "--batch-size", 1, *SHAPE)


BAD = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("words", [("search", BAD), ("apply", f"{BAD}.json"), ("search", "link", "--remove", 1)])
def test_a_name_that_is_not_utf8_is_refused_before_any_work(sleb, model, search, words, monkeypatch):
    shutil.copytree(model, BAD)
    Path("link").symlink_to(BAD)
    said = sleb(*words, code=2).stderr
    assert "caf\\udce9" in said
    assert "link" in said
    monkeypatch.chdir(BAD)
    search(model, code=2)


@pytest.mark.parametrize("length", [250, 255, 300, 5000])
def test_a_long_name_is_refused_before_any_work(run_sleb, model, search, length):
    assert "Measuring" not in search("model", "-o", "n" * (length - 5) + ".json", code=8).stderr
    for words in (("apply", "x" * length), ("search", "y" * length, "--remove", 1), ("export", "z/" * length)):
        assert run_sleb(*words).exit_code in (2, 3, 4)
    assert os.listdir() == ["model"]


@pytest.mark.parametrize(
    "words",
    [
        ("apply", "model", "--blocks", 1, "-o", "closed/out"),
        ("apply", "closed/model", "--blocks", 1),
        ("export", "closed/plan.json", "--to", "csv"),
        ("search", "model", "--remove", 1, "--calibration", "closed/text.txt"),
    ],
)
def test_what_is_in_a_closed_folder_is_refused(run_sleb, model, monkeypatch, words):
    stat = Path.stat

    def refusing(path, **how):
        if "closed" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refusing)
    result = run_sleb(*words)
    assert result.exit_code in (2, 3, 4, 5, 8)
    assert "hint:" in result.stderr


@pytest.mark.parametrize("output", ["", ".", "/"])
@pytest.mark.parametrize(
    "words",
    [
        ("search", "model", "--remove", "1"), ("search", "model", "--remove", "1", "--compare", "nll,cosine"),
        ("export", "plan.json", "--to", "report"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_folder_is_no_output(run_sleb, model, search, words, output):
    search("model")
    assert run_sleb(*words, "-o", output).exit_code == 8


WAYS = [("model", "."), ("model", "../model"), ("model/sub", ".."), (".", "model/"), (".", "./model//"), (".", "link"),
        (".", "link/../model"), (".", "~/model")]  # fmt: skip


def test_all_ways_to_name_one_model_make_one_plan(sleb, model, search, monkeypatch, tmp_path):
    """Nor does what is written into the model's folder make it another model, or part of a checkpoint."""
    (model / "sub").mkdir()
    Path("link").symlink_to("model")
    search(model)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = files_of(model)
    for where, name in WAYS:
        monkeypatch.chdir(tmp_path / where)
        search(name, "-o", model / "again.json", "--force")
        found = read_plan(model / "again.json").model
        assert (found, found.id) == (read_plan(tmp_path / "plan.json").model, str(model))
    sleb("apply", model / "again.json", "-o", model / "small", "--no-verify")
    assert before.items() <= files_of(model).items()
    assert "again.json" not in os.listdir(model / "small"), "a checkpoint has a plan that names local folders"
    assert not any(path.is_symlink() for path in (model / "small").iterdir())


def test_a_checkpoint_never_takes_the_place_of_its_model(sleb, model, tmp_path):
    Path("link").symlink_to("model")
    before = files_of(tmp_path)
    for output, force in product(["model", "model/", "model/../model", "link", "."], [(), ("--force",)]):
        sleb("apply", "model", "--blocks", 1, "-o", output, *force, code=8)
        assert files_of(tmp_path) == before


@pytest.mark.usefixtures("model")
def test_an_output_that_is_a_link(search, tmp_path):
    """A link is not followed out of the named place: the new file takes its name, and what it named stays."""
    Path("kept.json").write_text("kept")
    for name, target in (("plan.json", "kept.json"), ("dangling.json", "nowhere/plan.json")):
        Path(name).symlink_to(target)
        search("model", "-o", name, code=8)
        search("model", "-o", name, "--force")
        assert read_plan(tmp_path / name).removals
    assert Path("kept.json").read_text() == "kept"
    assert not Path("nowhere").exists()


# The process: its folder, its streams, its user, its terminal. Each is arranged in the forked process itself.


@pytest.fixture
def arranged(program, tiny_llama, text, tmp_path):
    """Search in a process in which something is arranged."""

    def run(*before, words=(), codes=(0,), **options):
        command = ("search", tiny_llama, *text, *QUICK, "-o", tmp_path / "plan.json")
        return program.run(*(words or command), cwd=tmp_path, before=before or None, codes=codes, **options)

    return run


def test_a_current_folder_that_is_gone(arranged):
    assert "folder" in arranged(in_a_deleted_folder, codes=[2]).stderr


@pytest.mark.parametrize("closed", often([(0,), (1,), (2,), (1, 2), (0, 1, 2)], [(1,), (2,), (0, 1, 2)]))
def test_closed_streams(arranged, tmp_path, tiny_llama, text, closed):
    """What would be printed goes nowhere: not to another stream, and not into a file that took its number."""
    result = arranged(without_streams, *closed, words=("search", tiny_llama, *text, *QUICK, "--json"))
    removals = list(read_plan(tmp_path / "plan.json").removals)
    assert (1 in closed and result.stdout == "") or json.loads(result.stdout)["removals"] == removals
    assert bool(result.stderr) == (2 not in closed)
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("encoding", often(["ascii", "latin-1", "cp1252", "utf-8"], ["ascii", "cp1252"]))
def test_streams_that_are_not_utf8(arranged, tmp_path, model, text, encoding):
    name = str(model.rename(tmp_path / "🦙 é"))
    words = ("search", "🦙 é", *text, "--sample-tokens", 4, "--remove", 3)
    said = arranged(with_encoding, encoding, words=words).stdout
    assert "removed" in said
    if encoding == "ascii":
        assert said.isascii()
        assert "\\U0001f999 \\xe9" in said
    answer = arranged(with_encoding, encoding, words=(*words, "--force", "--json")).stdout
    assert json.loads(answer)["model"]["id"] == name


TERMINALS = [({}, None), ({"TERM": "dumb"}, "\x1b[2K"), ({"TERM": None}, None), ({"NO_COLOR": "1"}, "\x1b[3")]


@pytest.mark.parametrize("columns", often([20, 1, 400], [20]))
@pytest.mark.parametrize(("environment", "never"), TERMINALS, ids=ascii)
def test_terminals(arranged, tmp_path, columns, environment, never):
    """A dumb one is sent no movements of the cursor, and without colours, there are none."""
    variables = {"COLUMNS": None, "LINES": None, "TERM": "xterm-256color", "NO_COLOR": None, **environment}
    shown = arranged(on_a_terminal, columns, environment=variables).stdout
    assert read_plan(tmp_path / "plan.json").removals
    assert not never or never not in shown


def test_variables_that_are_missing_or_wrong(arranged, tmp_path):
    environment = {"HOME": None, "TMPDIR": "/nowhere", "USER": None}
    arranged(environment=environment)
    arranged(words=("apply", "-o", "small"), environment=environment)
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "small"]


def test_a_home_on_a_read_only_disk(arranged, tmp_path, text):
    home = tmp_path / "home"
    home.mkdir()
    gguf = write_llama_gguf(tmp_path / "model.gguf")
    variables = {"HOME": str(home), "SLEB_CACHE": None, "XDG_CACHE_HOME": None}
    here = {"environment": variables, "fault": Fault(home, 1, errno.EROFS, Calls.CHANGES, lasting=True)}
    arranged(**here)
    arranged(words=("apply", "-o", "small", "--no-verify"), **here)
    assert "SLEB_CACHE" in arranged(words=("search", gguf, *text, *QUICK, "--force"), codes=[8], **here).stderr
    assert os.listdir(home) == []
