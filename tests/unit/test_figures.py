"""A fact has one number: the README and the guides show what docs/figures.toml holds."""

import re
from pathlib import Path

import figures
import pytest

ROOT = Path(__file__).resolve().parents[2]

WRITTEN_BY_A_PROGRAM = ["docs/performance.md"]  # tests/benchmarks/all.py adds a column for each machine
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page not in WRITTEN_BY_A_PROGRAM]
COUNT = r"\d[\d,]* of \d[\d,]*(?! (?:blocks|experts))"
MEASURED = re.compile(rf"(?<![\w.,/-])(?:{COUNT}|\d*\.\d+(?:%|x)?|\d[\d,]*(?:%|x))(?![\w-]|\.\d)")


def read(page):
    return (ROOT / page).read_text()


def plain(number):
    """A number without its thousands' commas and the zero before its point."""
    return re.sub(r"(?<![\d.])0(?=\.)", "", number.replace(",", ""))


def numbers(text):
    return [plain(number) for number in MEASURED.findall(text)]


def prose(text):
    """A page as people read it, without code, what Cog wrote, and links' targets."""
    text = re.sub(r"^```.*?^```|<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$|`[^`\n]*`|\]\([^)\s]*\)|arXiv[\s:]+[\d., ]+", " ", text, flags=re.MULTILINE)


def forms():
    return {
        plain(number)
        for measures in figures.MEASURES.values()
        for measure in measures.values()
        for row in measure.values
        for form in measure.forms(row)
        for number in (form, *MEASURED.findall(form))
    }


def not_measured(text, page):
    """Numbers of a page that `figures.toml` lacks: in tables written by hand, all that look measured."""
    constants = [plain(number) for number in figures.CONSTANTS.get(page, [])]
    in_table, in_sentence = [], []
    for line in prose(text).splitlines():
        (in_table if line.lstrip().startswith("|") else in_sentence).extend(numbers(line))
    known = forms()
    return [n for n in in_table if n not in constants] + [n for n in in_sentence if n not in known.union(constants)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_figure_of_its_own(page):
    assert not_measured(read(page), page) == []


@pytest.mark.parametrize(
    "text",
    ["It keeps 12.3%.", "It is 9.87x as fast.", "It goes to 4.44.", "It solves 51 of 82.", "| 26 blocks | 4.43 |"],
)
def test_a_figure_that_the_file_lacks_is_found(text):
    assert not_measured("It goes to 4.43, and solves 50 of 82, which is 71%.", "README.md") == []
    assert not_measured(text, "README.md") != []


def test_every_figure_stands_in_a_page():
    pages = [*PAGES, *(f"docs/experiments/{path.name}" for path in (ROOT / "docs/experiments").glob("*.md"))]
    text = plain("\n".join(map(read, pages)))
    unused = [
        f"{model}.{name}: {row}"
        for model, measures in figures.MEASURES.items()
        for name, measure in measures.items()
        for row in measure.values
        if not any(re.search(rf"(?<![\d.]){re.escape(plain(form))}(?!\d)", text) for form in measure.forms(row))
    ]
    assert unused == []


def test_every_constant_stands_in_its_page():
    for page, constants in figures.CONSTANTS.items():
        found = numbers(prose(read(page)))
        assert [number for number in constants if plain(number) not in found] == []
