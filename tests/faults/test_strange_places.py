"""Strange names, places, terminals and locales: each command does its work there, or says in a sentence why not."""

import html.parser
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest
import typer
import yaml

from conftest import calibration
from faults.program import Calls, Fault
from gguf_models import write_llama_gguf
from sleb_cli.plan import read_plan

NAMES = {
    "spaces": "my models  at home",
    "quotes": 'it\'s "so"',
    "emoji": "🦙🔥 模型 naïve",
    "newline": "two\nlines",
    "dash": "--force -x",
    "markup": "[red]a[/] [/bold] [link=x]",
    "braces": "100%s{x}{0}%(y)d{{",
    "markdown": "a|b`c`*d*<img src=x onerror=y>]( #e",
    "shell": "$HOME;`id` & $(id) \\ !!",
    "backslash": "ends\\",
    "tilde": "~root",
    "200 characters": "n" * 200,
}
QUICK_NAMES = ("quotes", "newline", "dash", "markdown")
LONG_WAY = ("--sample-tokens", 0, "--remove", 2)


def names(few=QUICK_NAMES):
    return [name if name in few else pytest.param(name, marks=pytest.mark.faults) for name in NAMES]


def ran(program, *words, cwd, code=0, **options):
    """Run the program, and require this exit code and no traceback."""
    result = program.run(*words, cwd=cwd, **options)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.exit_code == code, f"{words}: exit {result.exit_code}\n{result.stderr}"
    if code:
        assert "error:" in result.stderr
        assert "hint:" in result.stderr
    return result


def nothing_hidden(folder):
    """No unfinished file or folder is left."""
    left = [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    assert left == []


class Page(html.parser.HTMLParser):
    """The tags of a page, and the text outside of scripts."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.attributes, self.texts = [], set(), []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def strange(request, tmp_path, tiny_llama, text_file):
    """A folder of a strange name, with a model, a text and room for a cache, all of strange names."""
    name = NAMES[request.param]
    place = tmp_path / name
    place.mkdir()
    shutil.copytree(tiny_llama, place / name)
    shutil.copy(text_file, place / (name[:200] + ".txt"))
    return place, name


def search_words(place, name):
    return (*calibration(place / (name + ".txt")), *LONG_WAY)


@pytest.mark.parametrize("strange", names(), indirect=True)
def test_every_command_works_at_a_strange_place(program, strange):
    """Relative names at the strange place itself, as people type them; a leading dash needs ./ as everywhere."""
    place, name = strange
    plan = place / (name + ".json")
    here = {"environment": {"SLEB_CACHE": str(place / "cache")}, "cwd": place}
    found = ran(program, "search", f"./{name}", *search_words(place, name), "-o", f"./{name}.json", **here)
    assert read_plan(plan).model.id == str(place / name)
    assert read_plan(plan).removals
    assert found.stdout.rstrip().split("wrote ")[-1].startswith(f"{name}.json")
    ran(program, "apply", f"./{name}.json", "-o", f"./{name} out", **here)
    card = (place / f"{name} out" / "README.md").read_text()
    check_card(card)
    evaluated = ran(
        program, "eval", f"./{name}.json", "--perplexity", place / (name + ".txt"), "--sequence-length", 32,
        "--max-windows", 4, "--json", **here,
    )  # fmt: skip
    assert json.loads(evaluated.stdout)["texts"][0]["text"] == str(place / (name + ".txt"))
    ran(program, "bench", f"./{name}.json", "--estimate", *RATES, **here)
    check_texts(program, place, name, here)
    check_report(program, place, name, here)
    hf = ran(program, "export", f"./{name}.json", "--to", "vllm", "-o", "./served", **here)
    (served,) = [line for line in hf.stdout.splitlines() if line.startswith("serve it: ")]
    assert Path(shlex.split(served)[-1]) in (place / "served", Path("served"))
    nothing_hidden(place)


RATES = ("--device-flops", "1e12", "--device-bandwidth", "1e11", "--prompt-length", 8, "--new-tokens", 4)


def check_card(card):
    """A front matter that is YAML, and one heading, whatever the model is called."""
    _, front, rest = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    headings = [line for line in rest.splitlines() if line.startswith("# ")]
    assert len(headings) == 1
    assert headings[0].endswith("without 2 of its 6 blocks")
    assert not re.search(r"(?<!\\)<img", re.sub("`[^`]*`", "", rest)), "a name put a tag into the card"


def check_texts(program, place, name, here):
    """What is to be copied into a shell or read by a program names the very files."""
    plan = f"./{name}.json"
    recipe = yaml.safe_load(ran(program, "export", plan, "--to", "mergekit", **here).stdout)
    assert {source["model"] for each in recipe["slices"] for source in each["sources"]} == {str(place / name)}
    command = shlex.split(ran(program, "export", plan, "--to", "llama-quantize", **here).stdout)
    assert command[0] == "llama-quantize"
    assert Path(command[3]).name == f"{name}.gguf"
    assert not any(word.startswith("-") for word in command[3:])
    ran(program, "export", plan, "--to", "indices", **here)
    summary = ran(program, "export", plan, "--to", "summary", **here).stdout
    commands = commands_in(summary)
    (again,) = [words for words in commands if words[1] == "search" and "--calibration" in words]
    assert again[again.index("--calibration") + 1] == f"{name}.txt"  # a plan fit to be published has no folders
    (apply,) = [words for words in commands if words[1] == "apply"]
    assert (place / apply[2]).samefile(place / f"{name}.json")
    data = json.loads(ran(program, "export", plan, "--to", "summary", "--json", **here).stdout)
    assert [shlex.split(command)[:2] for command in data["document"]["commands"]] == [
        ["sleb", "search"],
        ["sleb", "apply"],
    ]


def commands_in(summary):
    """The commands of a summary as a shell reads them; a quoted name may go over several lines."""
    _, _, rest = summary.partition("\nNext\n----\n")
    words, lines = [], rest.splitlines()
    while lines:
        text = lines.pop(0)
        if not text.startswith("    sleb "):
            continue
        while True:
            try:
                found = shlex.split(text)
            except ValueError:  # within quotes, or at a backslash before the end of a line
                found = None
            if found is not None and not text.endswith("\\"):
                break
            text = f"{text}\n{lines.pop(0)}"
        words.append([word.strip("\n") for word in found if word.strip("\n")])
    return words


def check_report(program, place, name, here):
    """A page into which no name can put a tag, and whose data is JSON."""
    ran(program, "export", f"./{name}.json", "--to", "report", "-o", "./page.html", **here)
    content = (place / "page.html").read_text()
    page = Page(content)
    assert not page.attributes & {"onerror", "onload", "onclick"}
    assert "img" not in page.tags
    data = content.partition('id="sleb-data"')[2].partition(">")[2].partition("</script>")[0]
    assert json.loads(data)["plan"]["removals"]


@pytest.mark.faults
@pytest.mark.parametrize("strange", NAMES, indirect=True)
def test_gguf_files_and_times_at_a_strange_place(program, strange, tmp_path):
    place, name = strange
    shutil.move(write_llama_gguf(tmp_path / "model.gguf"), place / f"{name}.gguf")
    here = {"environment": {"SLEB_CACHE": str(place / "cache")}, "cwd": place}
    ran(program, "search", f"./{name}.gguf", *search_words(place, name), "-o", "./plan.json", **here)
    ran(program, "apply", "plan.json", "-o", f"./{name} small.gguf", **here)
    exported = ran(program, "export", "plan.json", "--to", "gguf", "-o", f"./{name} again.gguf", **here)
    line = exported.stdout.partition("run it: ")[2]
    assert Path(place, shlex.split(line)[-1]).samefile(place / f"{name} again.gguf")
    assert (place / f"{name} again.gguf").read_bytes() == (place / f"{name} small.gguf").read_bytes()
    quantize = shlex.split(ran(program, "export", "plan.json", "--to", "llama-quantize", **here).stdout)
    assert Path(quantize[3]) == place / f"{name}.gguf"
    words = ("--iterations", 2, "--warmup", 1, "--batch-size", 1, "--prompt-length", 8, "--new-tokens", 2)
    ran(program, "bench", "plan.json", *words, "--json", **here)
    nothing_hidden(place)


# Names that no plan could hold.


@pytest.mark.parametrize(
    "words", [("search", "{}"), ("search", "model", "-o", "{}.json"), ("apply", "{}.json")], ids=str
)
def test_a_name_that_is_not_utf8_is_refused_before_any_work(program, tmp_path, tiny_llama, text_file, words):
    (tmp_path / "model").symlink_to(tiny_llama)
    bad = os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_llama, tmp_path / bad)
    given = [word.format(bad) for word in words]
    options = [*calibration(text_file), *LONG_WAY] if words[0] == "search" else []
    result = ran(program, *given, *options, cwd=tmp_path, code=2)
    assert "caf\\udce9" in result.stderr
    assert "link" in result.stderr


def test_a_link_to_what_is_not_utf8_and_a_folder_that_is_not(program, tmp_path, tiny_llama, text_file):
    bad = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_llama, bad)
    (tmp_path / "link").symlink_to(bad)
    words = (*calibration(text_file), *LONG_WAY)
    ran(program, "search", "link", *words, cwd=tmp_path, code=2)
    ran(program, "search", ".", *words, cwd=bad, code=2)


@pytest.mark.parametrize("length", [240, 250, 255, 300, 5000])
def test_a_name_that_is_too_long_works_or_is_refused_before_any_work(program, tmp_path, tiny_llama, text_file, length):
    shutil.copytree(tiny_llama, tmp_path / "model")
    name = "n" * (length - 5) + ".json"
    words = ("search", "model", *calibration(text_file), *LONG_WAY, "-o", name)
    if length == 240:
        ran(program, *words, cwd=tmp_path)
        (tmp_path / name).unlink()
    else:
        result = ran(program, *words, cwd=tmp_path, code=8)
        assert "file name too long" in result.stderr
        assert "Measuring" not in result.stderr
    for arguments in (("apply", "x" * length), ("search", "y" * length, *words[2:-2]), ("export", "z/" * length)):
        refused = program.run(*arguments, cwd=tmp_path)
        assert "Traceback" not in refused.stderr
        assert refused.exit_code in (2, 3, 4)
        assert "error:" in refused.stderr
    assert os.listdir(tmp_path) == ["model"]


# Ways to name a model.


@pytest.mark.parametrize(
    ("where", "model"),
    [("in", "."), ("in", "../model"), ("below", ".."), ("beside", "model/"), ("beside", "./model//"),
     ("beside", "link"), ("beside", "link/../model"), ("beside", "~/model")],
)  # fmt: skip
def test_all_ways_to_name_one_model_make_one_plan(program, tmp_path, tiny_llama, text_file, where, model):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "link").symlink_to("model")
    cwd = {"in": tmp_path / "model", "below": tmp_path / "model" / "sub", "beside": tmp_path}[where]
    here = {"cwd": cwd, "environment": {"HOME": str(tmp_path)}}
    ran(program, "search", model, *calibration(text_file), *LONG_WAY, "-o", tmp_path / "plan.json", **here)
    own = read_plan(tmp_path / "plan.json").model
    real = tmp_path / "model"
    assert own.id == str(real)
    ran(program, "search", real, *calibration(text_file), *LONG_WAY, "-o", tmp_path / "again.json", **here)
    other = read_plan(tmp_path / "again.json").model
    assert own == other
    before = {path: path.read_bytes() for path in real.rglob("*") if path.is_file()}
    ran(program, "apply", tmp_path / "plan.json", "-o", tmp_path / "small", **here)
    assert before == {path: path.read_bytes() for path in real.rglob("*") if path.is_file()}
    assert not any(path.is_symlink() for path in (tmp_path / "small").iterdir())


# Outputs that touch the model, and outputs that are links.


@pytest.mark.parametrize("output", ["model", "model/", "model/../model", "link", "."])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_checkpoint_never_takes_the_place_of_its_model(program, tmp_path, tiny_llama, text_file, output, force):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    ran(program, "search", "model", *calibration(text_file), *LONG_WAY, cwd=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ran(program, "apply", "plan.json", "-o", output, *force, cwd=tmp_path, code=8)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_outputs_inside_the_model_folder_do_not_change_the_model(program, tmp_path, tiny_llama, text_file):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    ran(program, "search", ".", *calibration(text_file), *LONG_WAY, cwd=model)
    fingerprint = read_plan(model / "plan.json").model.fingerprint
    ran(program, "apply", "-o", "small", cwd=model)
    ran(program, "search", ".", *calibration(text_file), *LONG_WAY, "-o", "again.json", cwd=model)
    assert read_plan(model / "again.json").model.fingerprint == fingerprint
    ran(program, "apply", "again.json", "-o", "other", cwd=model)
    assert sorted(os.listdir(model / "other")) == sorted(os.listdir(model / "small"))
    assert "plan.json" not in os.listdir(model / "small"), "a checkpoint has a plan that names local folders"


def test_an_output_that_is_a_link(program, tmp_path, tiny_llama, text_file):
    """A link is not followed out of the named place: the new file takes its name, and what it named stays."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.json").write_text("kept")
    (tmp_path / "plan.json").symlink_to("elsewhere/kept.json")
    words = ("search", "model", *calibration(text_file), *LONG_WAY)
    ran(program, *words, cwd=tmp_path, code=8)
    ran(program, *words, "--force", cwd=tmp_path)
    assert (tmp_path / "elsewhere" / "kept.json").read_text() == "kept"
    assert read_plan(tmp_path / "plan.json").removals
    (tmp_path / "dangling.json").symlink_to("nowhere/plan.json")
    ran(program, *words, "-o", "dangling.json", cwd=tmp_path, code=8)
    ran(program, *words, "-o", "dangling.json", "--force", cwd=tmp_path)
    assert read_plan(tmp_path / "dangling.json").removals
    assert not (tmp_path / "nowhere").exists()


# The process: its folder, its streams, its user, its terminal. Each is arranged in the forked process itself.


def _main(*words):
    from sleb_cli.__main__ import run

    sys.argv = ["sleb", *words]
    run()


def in_a_deleted_folder(*words):
    """Run where the current folder is gone."""
    folder = Path("gone").absolute()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    _main(*words)


def without_streams(closed, *words):
    """Run with these of the streams 0, 1 and 2 closed."""
    for number in map(int, closed.split(",")):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    _main(*words)


def with_encoding(encoding, *words):
    """Run with streams of this encoding, which are as strict as Python makes those of a locale."""
    sys.stdout = os.fdopen(1, "w", encoding=encoding, errors="strict", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)
    _main(*words)


def as_nobody(*words):
    """Run as a user who may write nowhere but in the current folder."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    _main(*words)


def on_a_terminal(columns, *words):
    """Run on a terminal of this width, and write what it shows to the real stdout."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, int(columns)))
    child = os.fork()
    if not child:
        os.close(master)
        for number in range(3):
            os.dup2(slave, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        code = 1
        try:
            _main(*words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    os.close(slave)
    while True:
        try:
            shown = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        os.write(1, shown)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def called(program, arrangement, *words, cwd, code=0, **options):
    result = program.call(arrangement, *map(str, words), cwd=cwd, **options)
    assert "Traceback" not in result.stderr + result.stdout, result.stderr + result.stdout
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def test_a_current_folder_that_is_gone(program, tmp_path, tiny_llama, text_file):
    words = ("search", tiny_llama, *calibration(text_file), *LONG_WAY, "-o", tmp_path / "plan.json")
    result = called(program, in_a_deleted_folder, *words, cwd=tmp_path, code=2)
    assert "The current folder has been deleted" in result.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2", "1,2", "0,1,2"])
def test_closed_streams(program, tmp_path, tiny_llama, text_file, closed):
    """What would be printed goes nowhere: not to another stream, and not into a file that took its number."""
    words = ("search", tiny_llama, *calibration(text_file), *LONG_WAY, "--json")
    result = called(program, without_streams, closed, *words, cwd=tmp_path)
    plan = read_plan(tmp_path / "plan.json")
    if "1" not in closed:
        assert json.loads(result.stdout)["removals"] == list(plan.removals)
    else:
        assert result.stdout == ""
    assert ("Reading" in result.stderr) == ("2" not in closed)
    assert sorted(os.listdir(tmp_path)) == ["plan.json"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_streams_that_are_not_utf8(program, tmp_path, tiny_llama, text_file, encoding):
    name = "🦙 é"
    shutil.copytree(tiny_llama, tmp_path / name)
    words = ("search", name, *calibration(text_file), "--sample-tokens", 4, "--remove", 3)
    result = called(program, with_encoding, encoding, *words, cwd=tmp_path)
    said = result.stdout
    assert "blocks removed" in said
    assert "UnicodeEncodeError" not in result.stderr
    if encoding == "ascii":
        assert said.isascii()
        assert "\\U0001f999 \\xe9" in said
        assert "# kept" in said
    answer = called(program, with_encoding, encoding, *words, "--force", "--json", cwd=tmp_path)
    assert json.loads(answer.stdout)["model"]["id"] == str(tmp_path / name)
    text = called(program, with_encoding, encoding, "export", "plan.json", "--to", "summary", cwd=tmp_path)
    assert "without 3 of 6 blocks" in text.stdout


@pytest.mark.parametrize("columns", [20, pytest.param(400, marks=pytest.mark.faults), 1])
@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}, {"TERM": None}, {"NO_COLOR": "1"}], ids=str)
def test_terminals(program, tmp_path, tiny_llama, text_file, columns, environment):
    if columns == 1 and environment:
        return
    words = ("search", tiny_llama, *calibration(text_file), "--sample-tokens", 4, "--remove", 3)
    variables = {"COLUMNS": None, "LINES": None, "TERM": "xterm-256color", "NO_COLOR": None, **environment}
    result = called(program, on_a_terminal, columns, *words, cwd=tmp_path, environment=variables)
    assert read_plan(tmp_path / "plan.json").removals
    if environment.get("TERM") == "dumb":
        assert "\x1b[2K" not in result.stdout, "a dumb terminal was sent movements of the cursor"
    if environment.get("NO_COLOR"):
        assert "\x1b[3" not in result.stdout, "there are colours"


@pytest.fixture
def anyones(tiny_llama, text_file):
    """A folder that every user can read, with a folder `work` where every user can write."""
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        (place / "work").mkdir()
        (place / "work").chmod(0o777)
        shutil.copytree(tiny_llama, place / "model")
        shutil.copy(text_file, place / "text.txt")
        for file in (*(place / "model").iterdir(), place / "text.txt"):
            file.chmod(0o644)
        (place / "model").chmod(0o755)
        (place / "home").mkdir(mode=0o555)
        yield place
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("home", ["home", None, "missing"], ids=str)
def test_somebody_whose_home_is_read_only(program, anyones, home):
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in Path(typer.__file__).parents):
        pytest.skip("the packages lie where other users may not read them")
    where = {"HOME": None if home is None else str(anyones / home), "SLEB_CACHE": None, "XDG_CACHE_HOME": None}
    here = {"cwd": anyones / "work", "environment": {**where, "HF_HUB_CACHE": None, "HF_HOME": None}}
    words = (*calibration(anyones / "text.txt"), *LONG_WAY)
    called(program, as_nobody, "search", anyones / "model", *words, **here)
    called(program, as_nobody, "apply", "plan.json", "-o", "small", **here)
    assert sorted(os.listdir(anyones / "work")) == ["plan.json", "small"]
    refused = called(program, as_nobody, "apply", "plan.json", "-o", anyones / "small", code=8, **here)
    assert "permission denied" in refused.stderr
    (anyones / "other").mkdir(mode=0o755)
    write_llama_gguf(anyones / "other" / "model.gguf").chmod(0o644)
    gguf = called(
        program, as_nobody, "search", anyones / "other" / "model.gguf", *words, "-o", "g.json", code=8, **here
    )
    assert "SLEB_CACHE" in gguf.stderr
    assert "g.json" not in os.listdir(anyones / "work")
    assert "~" not in os.listdir(anyones / "work")


@pytest.mark.parametrize(
    "environment", [{"HOME": None}, {"TMPDIR": "/nowhere"}, {"HOME": None, "TMPDIR": "/nowhere", "USER": None}], ids=str
)
def test_variables_that_are_missing_or_wrong(program, tmp_path, tiny_llama, text_file, environment):
    here = {"cwd": tmp_path, "environment": environment}
    ran(program, "search", tiny_llama, *calibration(text_file), *LONG_WAY, **here)
    ran(program, "apply", "-o", "small", **here)
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "small"]


def test_a_cache_on_a_read_only_disk(program, tmp_path, text_file):
    (tmp_path / "home").mkdir()
    gguf = write_llama_gguf(tmp_path / "model.gguf")
    variables = {"HOME": str(tmp_path / "home"), "SLEB_CACHE": None, "XDG_CACHE_HOME": None}
    fault = Fault(tmp_path / "home", at=1, what=30, calls=Calls.CHANGES, lasting=True)  # EROFS
    words = ("search", gguf, *calibration(text_file), *LONG_WAY)
    result = ran(program, *words, cwd=tmp_path, code=8, environment=variables, fault=fault)
    assert "read-only" in result.stderr
    assert "SLEB_CACHE" in result.stderr
    assert os.listdir(tmp_path / "home") == []


# A process of its own, since these decide what Python does as it starts.


STARTS = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX"},
    "latin-1": {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
}


@pytest.mark.faults
@pytest.mark.parametrize("start", STARTS)
def test_locales(tmp_path, tiny_llama, text_file, start):
    shutil.copytree(tiny_llama, tmp_path / "model")
    environment = {**os.environ, **STARTS[start], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("LANG", None)
    program = [sys.executable, "-m", "sleb_cli"]

    def run(*words):
        result = subprocess.run(
            [*program, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert b"Traceback" not in result.stderr, result.stderr.decode(errors="replace")
        return result

    shown = run("search", "model", *calibration(text_file), "--sample-tokens", 4, "--remove", 3)
    assert shown.returncode == 0, shown.stderr
    assert b"3 of 6 blocks removed" in shown.stdout
    json.loads(run("export", "plan.json", "--to", "summary", "--json").stdout.decode("utf-8"))
    if start == "C":
        refused = run("search", "modèle", *calibration(text_file), "--remove", 1)
        assert refused.returncode == 2
        assert b"LC_ALL=C.UTF-8" in refused.stderr
