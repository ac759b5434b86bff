"""Documents cannot drift from what they describe."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from cogapp import Cog

import sleb_cli
from sleb_cli.__main__ import main
from sleb_cli.app import app
from sleb_cli.plan import CalibrationRecord, HeldOutRecord, Plan, SampleGeneration, SearchRecord, Step
from sleb_cli.requests import TARGET_NAMES, StrategyName
from sleb_plugins import SlebError, errors, hookspecs
from sleb_plugins.families import REFUSED
from sleb_plugins.metrics import sleb_metrics
from survey import COUNTS

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "sleb_cli" / "engine"
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name
    for command in COMMANDS.values()
    for parameter in command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
}
OPTIONS |= {"--help", "--version", "--install-completion"}


def read(page):
    return (ROOT / page).read_text()


def without_cog(text):
    """The page as people read it: no program that generates a part of it."""
    return re.sub(r"<!-- \[\[\[cog.*?\]\]\] -->", "", text, flags=re.DOTALL)


def code_lines(text):
    """The lines of all code blocks, fenced or indented; those that end with a backslash are joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^\n)((?:^ {4}.*\n)+)", text, re.MULTILINE)
    for block in (*fenced, *indented):
        yield from block.replace("\\\n", " ").splitlines()


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands_in(lines):
    """Every command line of `sleb` in these lines of code, as a list of arguments."""
    for line in lines:
        for part in re.split(r"&&|\||(?:^|\s)#\s", line):
            words = part.strip().replace("accelerate launch -m sleb_cli", "sleb")
            if words.startswith("sleb "):
                yield shlex.split(words)[1:]


def what_is_wrong_with(arguments, *, complete):
    """Parse a command line with the program's own parameters, without running it; one in a sentence may be open."""
    name, *rest = arguments
    if name.startswith("-") or name == "COMMAND":
        return [word for word in arguments if word.startswith("-") and word not in OPTIONS]
    if name not in COMMANDS:
        return [f"There is no command {name}."]
    try:
        COMMANDS[name].make_context(name, [word for word in rest if word not in ("…", "--help")])
    except typer.TyperException as error:
        message = error.format_message()
        is_open = message.startswith("Missing") or message.endswith("requires an argument.")
        return [message] if complete or not is_open else []
    return []


def wrong_commands(text):
    for arguments in commands_in(code_lines(text)):
        yield from what_is_wrong_with(arguments, complete=True)
    for arguments in commands_in(inline_code(text)):
        yield from what_is_wrong_with(arguments, complete=False)
    for code in inline_code(text):
        options = [word.partition("=")[0] for word in code.split()] if code.startswith("--") else []
        yield from (option for option in options if option.startswith("--") and option not in OPTIONS)


def absent_places(text):
    named = re.findall(
        r"(?<![\w/.-])(?:sleb_cli|sleb_plugins|tests|docs|completions|\.ci|\.github)/[\w./-]*", without_cog(text)
    )
    return [place for place in named if not (ROOT / place.rstrip(".")).exists()]


def slugs_in(text):
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


def broken_links(text, page):
    """Relative links and images whose file, or heading within it, is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_cog(text)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (heading and heading not in slugs_in(path.read_text())):
            yield target


@pytest.mark.parametrize("page", PAGES)
def test_every_path_link_and_command_in_a_page_exists(page):
    assert absent_places(read(page)) == []
    assert list(broken_links(read(page), page)) == []
    names = {path.name for folder in ("sleb_cli", "sleb_plugins", "tests") for path in (ROOT / folder).rglob("*.py")}
    files = [name for code in inline_code(read(page)) for name in re.findall(r"^(?:[a-z_]+/)*(\w+\.py)$", code)]
    assert [name for name in files if name not in names] == []
    assert list(wrong_commands(read(page))) == []


@pytest.mark.parametrize(
    "text",
    ["`sleb serch demo`", "`sleb search demo --ratoi 0.2`", "\n    sleb export plan.json\n", "Use `--to-gguf x`.",
     "\n    pip install . && sleb search demo --no-such\n", "```\nsleb bench --generation \\\n    --nope\n```\n"],
)  # fmt: skip
def test_a_wrong_command_is_found(text):
    assert list(wrong_commands(text))


def test_a_wrong_path_or_link_is_found():
    assert absent_places("See `sleb_cli/engine/gates.py`, tests/no/such.py.") != []
    for link in ("[a](docs/no.md)", "![a](docs/images/no.svg)", "[a](docs/search.md#no-such-heading)"):
        assert list(broken_links(link, "README.md"))


def test_the_readme_is_short_and_the_changelog_begins_with_this_version():
    assert len(read("README.md").splitlines()) <= 200
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == sleb_cli.__version__


def test_generated_parts_are_what_cog_would_write(monkeypatch):
    pages = [page for page in PAGES if "[[[cog" in read(page)]
    assert len(pages) > 3
    monkeypatch.chdir(ROOT)
    assert Cog().main(["cog", "--check", *pages]) == 0


@pytest.mark.parametrize(
    ("shell", "name"), [("bash", "sleb.bash"), ("zsh", "_sleb"), ("fish", "sleb.fish"), ("powershell", "sleb.ps1")]
)
def test_the_completions_are_what_the_program_prints(monkeypatch, capfd, shell, name):
    monkeypatch.setenv("_SLEB_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        main([])
    assert capfd.readouterr().out == read(f"completions/{name}")


def test_bash_completes_commands_and_options(tmp_path):
    (tmp_path / "sleb").write_text(f'#!/bin/sh\nexec {sys.executable} -m sleb_cli "$@"\n')
    (tmp_path / "sleb").chmod(0o755)
    script = f"""
        PATH={tmp_path}:$PATH; source {ROOT}/completions/sleb.bash
        COMP_WORDS=(sleb se); COMP_CWORD=1; _sleb_completion sleb; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(sleb search --cal); COMP_CWORD=2; _sleb_completion sleb; echo "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["search", "--calibration"]


def test_every_hook_kind_of_metric_and_exit_code_is_in_the_reference():
    plugins, codes = read("docs/reference/plugins.md"), read("docs/reference/exit-codes.md")
    hooks = [name for name in vars(hookspecs) if name.startswith("sleb_")]
    assert len(hooks) == 4
    assert all(f"`{hook}()`" in plugins for hook in hooks)
    for kind in ("LogitMetric", "HiddenStateMetric", "WeightMetric", "ModelMetric"):
        assert f"| `{kind}` |" in plugins
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__base__ is SlebError]
    assert all(f"| {c.exit_code} | `{c.__name__}` |" in codes for c in classes)


def test_every_key_of_the_plan_is_explained():
    explained = read("docs/reference/plan.md").partition("<!-- [[[cog")[0]
    assert all(f"| `{key}` |" in explained for key in Plan.model_fields)
    records = (CalibrationRecord, SearchRecord, Step, HeldOutRecord, SampleGeneration)
    keys = {key for record in records for key in record.model_fields}
    assert [key for key in sorted(keys) if f"`{key}`" not in explained] == []


def test_every_metric_strategy_and_target_is_in_the_reference():
    commands = read("docs/reference/commands.md")
    prose = re.sub(r"^```.*?^```", "", commands, flags=re.MULTILINE | re.DOTALL)
    assert [metric.name for metric in sleb_metrics() if not re.search(rf"`{metric.name}[`:]", prose)] == []
    assert [name for name in get_args(StrategyName) if f"| `{name}` |" not in prose] == []
    assert [name for name in TARGET_NAMES if f"`--{name.replace('_', '-')} " not in prose] == []
    assert all(f"## sleb {name}\n" in commands for name in COMMANDS)


def test_the_architecture_has_every_room():
    page = read("docs/architecture.md")
    assert len(page.splitlines()) <= 150
    rows = re.findall(r"^\| `(\w+)/` \| [^|]+ \|$", page, re.MULTILINE)
    rooms = [path.parent.name for path in ENGINE.glob("*/__init__.py")]
    assert sorted(rows) == sorted(rooms)
    drawn = re.findall(rf"\b(?:{'|'.join(rooms)})/\w+", " ".join(re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)))
    assert len(drawn) > 10
    assert [place for place in drawn if not (ENGINE / f"{place}.py").exists()] == []
    source = "\n".join(
        path.read_text() for name in ("sleb_cli", "sleb_plugins") for path in (ROOT / name).rglob("*.py")
    )
    named = [code.rpartition(".")[2] for code in inline_code(page) if re.fullmatch(r"[A-Z]\w+|\w+\.[a-z]+_\w+", code)]
    assert len(named) > 5
    assert [name for name in named if not re.search(rf"^ *(?:class |def )?{name}\b", source, re.MULTILINE)] == []


def test_the_index_has_every_page():
    index = read("docs/README.md")
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and page != "docs/README.md"]
    assert [page for page in pages if f"]({page})" not in index] == []


def test_the_families_are_counted_as_their_tables_say():
    page = read("docs/reference/families.md")
    works, _, refused = page.partition("## Refused")
    works, refused = (
        part.count("\n| ") - 1 for part in (works.partition("## Works")[2], refused.partition("## What")[0])
    )
    assert [tuple(map(int, found)) for found in re.findall(COUNTS, page)] == [(works + refused, works, refused)]
    assert f"**{works} families**" in read("README.md")
    listed = re.findall(r"^\| (\S+) \| (.+) \| [^|]*\|$", page.partition("## Refused")[2], re.MULTILINE)
    assert [name for name, reason in listed if REFUSED.get(name, reason) != reason] == []


def test_the_readme_s_python_runs(tiny_llama, text_file, tmp_path, capsys):
    example = re.search(r"^```python\n(from pathlib.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    assert example
    program = example[1].replace("HuggingFaceTB/SmolLM2-135M", str(tiny_llama)).replace("wikitext2", str(text_file))
    exec(compile(program, "README.md", "exec"), {})
    assert "same logits" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "config.json").exists()
