"""Documents cannot drift from what they describe."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import typer
from cogapp import Cog

import sleb_cli
import sleb_plugins
from sleb_cli.__main__ import main
from sleb_cli.app import app
from sleb_cli.plan import (
    CalibrationRecord,
    HeldOutRecord,
    Plan,
    SampleGeneration,
    SearchRecord,
    Step,
)
from sleb_cli.requests import TARGET_NAMES, StrategyName
from sleb_cli.ui.plans import SMALL_MODELS
from sleb_plugins import SlebError, errors, hookspecs
from sleb_plugins.families import REFUSED
from sleb_plugins.metrics import sleb_metrics
from survey import COUNTS

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "sleb_cli" / "engine"
EXPERIMENTS = ROOT / "docs" / "experiments"
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
COMMANDS = typer.main.get_command(app).commands
PARAMETERS = [parameter for command in COMMANDS.values() for parameter in command.params]
OPTIONS = {
    name for parameter in PARAMETERS for name in (*parameter.opts, *parameter.secondary_opts)
}
OPTIONS |= {"--help", "--version", "--install-completion"}


def read(page):
    return (ROOT / page).read_text()


def without_cog(text):
    """The page as people read it: no program that generates a part of it."""
    return re.sub(r"<!-- \[\[\[cog.*?\]\]\] -->", "", text, flags=re.DOTALL)


def code_lines(text):
    """Return the lines of all code blocks; those that end with a backslash are joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^\n)((?:^ {4}.*\n)+)", text, re.MULTILINE)
    return "".join((*fenced, *indented)).replace("\\\n", " ").splitlines()


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def wrong_arguments(arguments, *, complete):
    """Parse a command line with the program's own parameters, without running it; one in a sentence
    may be open.
    """
    name, *rest = arguments
    if name.startswith("-") or name == "COMMAND":
        return [
            word
            for word in arguments
            if word.startswith("-") and word.partition("=")[0] not in OPTIONS
        ]
    if name not in COMMANDS:
        return [f"There is no command {name}."]
    try:
        COMMANDS[name].make_context(name, [word for word in rest if word not in ("…", "--help")])
    except typer.TyperException as error:
        message = error.format_message()
        is_open = message.startswith("Missing") or message.endswith("requires an argument.")
        return [message] if complete or not is_open else []
    except SlebError:  # the file behind --config is only an example
        return []
    return []


def wrong_commands(text):
    """What is wrong with the command lines in code, and with those and the options in sentences."""
    sentences = [f"sleb {code}" if code.startswith("--") else code for code in inline_code(text)]
    for lines, complete in ((code_lines(text), True), (sentences, False)):
        for part in re.split(r"\s#\s|\n|&&|\|", "\n".join(lines)):
            words = part.strip().replace("accelerate launch -m sleb_cli", "sleb")
            if words.startswith("sleb "):
                yield from wrong_arguments(shlex.split(words)[1:], complete=complete)


FOLDERS = "sleb_cli|sleb_plugins|tests|docs|completions|\\.ci|\\.github"


def slugs_in(text):
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings
    ]


def broken_links(text, page):
    """Relative links and images whose file, or heading within it, is not there."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", without_cog(text)):
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (heading and heading not in slugs_in(path.read_text())):
            yield target


def wrong_in(text, page):
    """All that a page names and that is not there."""
    names = {
        path.name
        for folder in ("sleb_cli", "sleb_plugins", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    files = [
        name for code in inline_code(text) for name in re.findall(r"^(?:[a-z_]+/)*(\w+\.py)$", code)
    ]
    absent = [name for name in files if name not in names]
    named = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*", without_cog(text))
    absent += [place for place in named if not (ROOT / place.rstrip(".")).exists()]
    return [*absent, *broken_links(text, page), *wrong_commands(text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_link_and_command_in_a_page_exists(page):
    assert wrong_in(read(page), page) == []


@pytest.mark.parametrize(
    "text",
    [
        "`sleb serch demo`",
        "`sleb search demo --ratoi 0.2`",
        "\n    sleb export plan.json\n",
        "Use `--to-gguf x`.",
        "\n    pip install . && sleb search demo --no-such\n",
        "```\nsleb bench --generation \\\n    --nope\n```\n",
        "See tests/no/such.py.",
        "[a](docs/no.md)",
        "![a](docs/images/no.svg)",
        "[a](docs/search.md#no-such-heading)",
    ],
)
def test_names_of_what_does_not_exist_are_found(text):
    assert wrong_in(text, "README.md") != []


def test_the_notebook_is_made_of_the_example():
    cells = re.split(r"^# %%(.*)\n", read("docs/example.py"), flags=re.MULTILINE)[1:]
    sources = [
        re.sub("^# ?", "", text, flags=re.MULTILINE) if kind else text
        for kind, text in zip(cells[::2], cells[1::2], strict=True)
    ]
    found = ["".join(cell["source"]) for cell in json.loads(read("docs/first-run.ipynb"))["cells"]]
    assert found == [source.strip() for source in sources], (
        "jupytext --update --to ipynb -o docs/first-run.ipynb docs/example.py"
    )


def test_the_readme_is_short_and_the_changelog_begins_with_this_version():
    assert len(without_cog(read("README.md")).splitlines()) <= 130
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == sleb_cli.__version__


def test_the_demo_ends_with_a_figure_of_the_readme():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "keeps 98% of its right choices without 6 blocks" in readme
    assert "keeps 98% of its right choices without 6 blocks" in SMALL_MODELS


def test_generated_parts_are_what_cog_would_write(monkeypatch):
    pages = [page for page in PAGES if "[[[cog" in read(page)]
    assert len(pages) > 3
    monkeypatch.chdir(ROOT)
    assert Cog().main(["cog", "--check", *pages]) == 0


@pytest.mark.parametrize(
    ("shell", "name"),
    [("bash", "sleb.bash"), ("zsh", "_sleb"), ("fish", "sleb.fish"), ("powershell", "sleb.ps1")],
)
def test_the_completions_are_what_the_program_prints(monkeypatch, capfd, shell, name):
    monkeypatch.setenv("_SLEB_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        main([])
    assert capfd.readouterr().out == read(f"completions/{name}")


CLASSES_OF_ERRORS = [
    c for c in vars(errors).values() if isinstance(c, type) and c.__base__ is SlebError
]
RECORDS = (CalibrationRecord, SearchRecord, Step, HeldOutRecord, SampleGeneration)
NAMES = {
    "hooks": (
        "plugins.md",
        r"`{}\(\)`",
        [name for name in vars(hookspecs) if name.startswith("sleb_")],
    ),
    "kinds of metric": (
        "plugins.md",
        r"\| `{}Metric` \|",
        ("Logit", "HiddenState", "Weight", "Model", "Expert"),
    ),
    "names for plugins": (
        "plugins.md",
        r"\b{}\b",
        [name for name in sleb_plugins.__all__ if "Error" not in name],
    ),
    "exit codes": (
        "exit-codes.md",
        r"\| {} \|",
        [f"{c.exit_code} | `{c.__name__}`" for c in CLASSES_OF_ERRORS],
    ),
    "keys of a plan": ("plan.md", r"\| `{}` \|", Plan.model_fields),
    "keys of its records": (
        "plan.md",
        "`{}`",
        [key for record in RECORDS for key in record.model_fields],
    ),
    "strategies": ("commands.md", r"\| `{}` \|", get_args(StrategyName)),
    "targets": ("commands.md", "`--{} ", [name.replace("_", "-") for name in TARGET_NAMES]),
    "commands": ("commands.md", "## sleb {}\n", COMMANDS),
    "metrics": ("commands.md", "`{}[`:]", [metric.name for metric in sleb_metrics()]),
    "experiments": (
        "../experiments/index.md",
        r"\]\({}\)",
        [p.name for p in EXPERIMENTS.glob("*.md") if p.stem != "index"],
    ),
    "pages": (
        "../../README.md",
        r"\]\({}\)",
        [page for page in PAGES if re.match("docs/(?!experiments/(?!index))", page)],
    ),
}


@pytest.mark.parametrize(("page", "form", "names"), NAMES.values(), ids=NAMES)
def test_the_reference_has_every_name(page, form, names):
    """Not only in what is generated: in a plan's keys above, in the commands outside of help."""
    text = read(f"docs/reference/{page}")
    prose = text.partition("<!-- [[[cog")[0] if page == "plan.md" else without_blocks(text)
    assert len(names) >= 4
    assert [name for name in names if not re.search(form.format(re.escape(name)), prose)] == []


def test_the_architecture_has_every_room():
    page = read("docs/architecture.md")
    assert len(page.splitlines()) <= 150
    rows = re.findall(r"^\| `(\w+)/` \| [^|]+ \|$", page, re.MULTILINE)
    rooms = [path.parent.name for path in ENGINE.glob("*/__init__.py")]
    assert sorted(rows) == sorted(rooms)
    drawn = re.findall(
        rf"\b(?:{'|'.join(rooms)})/\w+",
        " ".join(re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)),
    )
    assert len(drawn) > 10
    assert [place for place in drawn if not (ENGINE / f"{place}.py").exists()] == []
    source = "\n".join(
        path.read_text()
        for name in ("sleb_cli", "sleb_plugins")
        for path in (ROOT / name).rglob("*.py")
    )
    named = [
        code.rpartition(".")[2]
        for code in inline_code(page)
        if re.fullmatch(r"[A-Z]\w+|\w+\.[a-z]+_\w+", code)
    ]
    assert len(named) > 5
    assert [
        name
        for name in named
        if not re.search(rf"^ *(?:class |def )?{name}\b", source, re.MULTILINE)
    ] == []


def test_the_families_are_counted_as_their_tables_say():
    page = read("docs/reference/families.md")
    works, _, refused = page.partition("## Refused")
    works, refused = (
        part.count("\n| ") - 1
        for part in (works.partition("## Works")[2], refused.partition("## What")[0])
    )
    assert [tuple(map(int, found)) for found in re.findall(COUNTS, page)] == [
        (works + refused, works, refused)
    ]
    assert f"**{works} families**" in read("README.md")
    listed = re.findall(
        r"^\| (\S+) \| (.+) \| [^|]*\|$", page.partition("## Refused")[2], re.MULTILINE
    )
    assert [name for name, reason in listed if REFUSED.get(name, reason) != reason] == []


def test_the_readme_s_python_runs(tiny_llama, text_file, tmp_path, capsys):
    example = re.search(
        r"^```python\n(from pathlib.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL
    )
    assert example
    program = (
        example[1]
        .replace("HuggingFaceTB/SmolLM2-135M", str(tiny_llama))
        .replace("wikitext2", str(text_file))
    )
    exec(compile(program, "README.md", "exec"), {})
    assert "same logits" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "config.json").exists()
