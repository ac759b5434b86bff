"""Strange names, places, terminals and locales: each command does its work there, or says in a
sentence why not.
"""

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import calibration, evaluation
from faults.arrangements import with_encoding
from faults.program import Calls, Fault
from gguf_models import write_llama_gguf
from sleb_cli.plan import read_plan

NAME = '--it\'s "so" 🦙\na|b`c`*d*<img src=x onerror=y>]( #e $(id) [red]{0}'
QUICK = ("--sample-tokens", 0, "--remove", 2)


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def search(sleb, text_file):
    return lambda model, *options, code=0: sleb(
        "search", model, *calibration(text_file), *QUICK, *options, code=code
    )


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("without_memory")
def test_every_command_works_at_a_strange_place(sleb, tmp_path, tiny_llama, text_file, monkeypatch):
    """Relative names at the strange place itself, as people type them; a leading dash needs ./ as
    everywhere.
    """
    place = tmp_path / NAME
    place.mkdir()
    model = place / NAME
    text = place / f"{NAME}.txt"
    plan = f"./{NAME}.json"
    shutil.copytree(tiny_llama, model)
    shutil.copy(text_file, text)
    write_llama_gguf(tmp_path / "model.gguf").rename(place / f"{NAME}.gguf")
    monkeypatch.chdir(place)
    monkeypatch.setenv("SLEB_CACHE", str(place / "cache"))
    found = sleb("search", f"./{NAME}", *calibration(text), *QUICK, "-o", plan)
    assert read_plan(Path(plan)).model.id == str(model)
    assert Path(shlex.split(found.stdout.partition("next: ")[2])[2]).samefile(plan)
    sleb("apply", plan, "-o", f"./{NAME} out")
    require_card((place / f"{NAME} out" / "README.md").read_text())
    measured = json.loads(sleb("eval", plan, *evaluation(text), "--json").stdout)
    assert measured["texts"][0]["text"] == str(text)
    recipe = yaml.safe_load(sleb("export", plan, "--to", "mergekit").stdout)
    for each in recipe["slices"]:
        assert [source["model"] for source in each["sources"]] == [str(model)]
    command = shlex.split(sleb("export", plan, "--to", "llama-quantize").stdout)
    assert (command[0], Path(command[3]).name) == ("llama-quantize", f"{NAME}.gguf")
    assert not any(word.startswith("-") for word in command[3:])
    sleb("export", plan, "--to", "report", "-o", "./page.html")
    page = (place / "page.html").read_text()
    assert not re.search('<img src=x|"so"', page), "a name put a tag or an attribute into the page"
    sleb("apply", f"./{NAME}.gguf", "--blocks", "1,2", "-o", f"./{NAME} small.gguf")
    few = "--prompt-length 4 --new-tokens 1 --batch-size 1 --iterations 1 --warmup 0"
    sleb("bench", plan, *few.split())
    assert [path for path in place.rglob("*") if ".partial" in path.name] == []


def require_card(page):
    """Check that a card is what it is without a strange name."""
    _, front, card = page.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert re.search("^# .*without 2 of its 6 blocks$", card, re.MULTILINE)
    outside_code = re.sub("`[^`]*`", "", card)
    assert not re.search(r"(?<!\\)<img", outside_code), "a name put a tag into the card"


BAD = os.fsdecode(b"caf\xe9")
ONE = ("--remove", 1)
REFUSED = [
    # What is not UTF-8, too long, in a closed folder, or a folder where a file should be.
    (("search", BAD), 2),
    (("search", "link", *ONE), 2),
    (("search", "y" * 255, *ONE), 2, 3, 4, 8),
    (("export", "z/" * 5000), 2, 3, 4, 8),
    (("search", "model", *ONE, "-o", "n" * 250 + ".json"), 2, 3, 4, 8),
    (("apply", "model", "--blocks", 1, "-o", "closed/out"), 2, 3, 4, 5, 8),
    (("apply", "closed/model", "--blocks", 1), 2, 3, 4, 5, 8),
    (("export", "closed/plan.json", "--to", "table"), 2, 3, 4, 5, 8),
    (("search", "model", *ONE, "--calibration", "closed/text.txt"), 2, 3, 4, 5, 8),
    (("search", "model", *ONE, "-o", ""), 8),
    (("search", "model", *ONE, "-o", "."), 8),
    (("search", "model", *ONE, "-o", "/"), 8),
]


def test_a_name_that_no_file_can_have_is_refused_before_any_work(
    run_sleb, model, search, monkeypatch
):
    search(model, "-o", "found.json")
    shutil.copytree(model, BAD)
    Path("link").symlink_to(BAD)
    before = files_of(Path())
    stat = Path.stat

    def refusing(path, **how):
        if "closed" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refusing)
    for words, *codes in REFUSED:
        result = run_sleb(*words)
        assert result.exit_code in codes, words
        assert "hint: " in result.stderr, words
        assert "Measuring" not in result.stderr, words
        assert BAD not in words or "caf\\udce9" in result.stderr
    assert files_of(Path()) == before


WAYS = [
    ("model", "."),
    ("model/sub", ".."),
    (".", "./model//"),
    (".", "link/../model"),
    (".", "~/model"),
]


def test_all_ways_to_name_one_model_make_one_plan(sleb, model, search, monkeypatch, tmp_path):
    """Nor does what is written into the model's folder make it another model, or part of a
    checkpoint.
    """
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
    assert "again.json" not in os.listdir(model / "small"), (
        "a checkpoint has a plan that names local folders"
    )
    assert not any(path.is_symlink() for path in (model / "small").iterdir())


def test_an_output_that_is_a_link_is_not_followed(search, model, tmp_path):
    """A link is not followed out of the named place: the new file takes its name, and what it named
    stays.
    """
    Path("kept.json").write_text("kept")
    for name, target in (("plan.json", "kept.json"), ("dangling.json", "nowhere/plan.json")):
        Path(name).symlink_to(target)
        search(model, "-o", name, code=8)
        search(model, "-o", name, "--force")
        assert read_plan(tmp_path / name).removals
    assert Path("kept.json").read_text() == "kept"
    assert not Path("nowhere").exists()


# The process: its streams, its user, its terminal, each arranged in the forked
# process itself.


@pytest.fixture
def arranged(program, model, text_file, tmp_path):
    """Search in a process in which something is arranged."""
    words = ("search", model, *calibration(text_file), *QUICK, "-o", tmp_path / "plan.json")
    return lambda **options: program.run(*words, "--force", cwd=tmp_path, **options)


def test_a_search_works_on_streams_that_are_not_utf8(program, tmp_path, model, text_file):
    name = str(model.rename(tmp_path / "🦙 é"))
    words = ("search", "🦙 é", *calibration(text_file), "--sample-tokens", 4, "--remove", 3)
    in_ascii = {"cwd": tmp_path, "before": (with_encoding, "ascii")}
    said = program.run(*words, **in_ascii).stdout
    assert "removed" in said
    assert said.isascii()
    assert "\\U0001f999 \\xe9" in said
    answer = program.run(*words, "--force", "--json", **in_ascii).stdout
    assert json.loads(answer)["model"]["id"] == name


def test_a_search_works_without_a_home_to_write_to(program, arranged, tmp_path, text_file):
    arranged(environment={"HOME": None, "TMPDIR": "/nowhere", "USER": None})
    home = tmp_path / "home"
    home.mkdir()
    gguf = write_llama_gguf(tmp_path / "model.gguf")
    variables = {"HOME": home, "SLEB_CACHE": None, "XDG_CACHE_HOME": None}
    read_only = Fault(home, 1, errno.EROFS, Calls.CHANGES, lasting=True)
    here = {"environment": variables, "fault": read_only}
    arranged(**here)
    words = ("search", gguf, *calibration(text_file), *QUICK, "--force")
    assert "SLEB_CACHE" in program.run(*words, cwd=tmp_path, codes=[8], **here).stderr
    assert os.listdir(home) == []
