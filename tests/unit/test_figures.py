"""A fact has one number: the README and the guides show what docs/figures.toml holds."""

import re
from decimal import Decimal
from pathlib import Path

import figures
import pytest

ROOT = Path(__file__).resolve().parents[2]

WRITTEN_BY_A_PROGRAM = [
    "docs/performance.md"
]  # tests/benchmarks/all.py adds a column for each machine
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
    text = re.sub(
        r"^```.*?^```|<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->",
        "",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return re.sub(
        r"^ {4}.*$|`[^`\n]*`|\]\([^)\s]*\)|arXiv[\s:]+[\d., ]+", " ", text, flags=re.MULTILINE
    )


def all_forms():
    """Return each form in which a page may show a measured number."""
    found = set()
    for measures in figures.MEASURES.values():
        for measure in measures.values():
            for row in measure.values:
                for form in measure.forms(row):
                    found.update(map(plain, [form, *MEASURED.findall(form)]))
    return found


def not_measured(text, page):
    """Numbers of a page that `figures.toml` lacks: in tables written by hand, all that look
    measured.
    """
    constants = [plain(number) for number in figures.CONSTANTS.get(page, [])]
    in_table, in_sentence = [], []
    for line in prose(text).splitlines():
        (in_table if line.lstrip().startswith("|") else in_sentence).extend(numbers(line))
    known = all_forms()
    return [n for n in in_table if n not in constants] + [
        n for n in in_sentence if n not in known.union(constants)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_figure_of_its_own(page):
    assert not_measured(read(page), page) == []


@pytest.fixture
def two_measures(monkeypatch):
    counts = {"all": 70, "half": [50, 59, 83], "half, healed": 58}
    perplexities = {
        "half, healed": Decimal("4.31"),
        "half": Decimal("40.55"),
        "all": 4,
        "fewer bits": 2404,
    }
    measures = {
        "programs": figures.Measure("programs", "share", counts, "all", 82),
        "code": figures.Measure("perplexity", "perplexity", perplexities, "all", None),
    }
    monkeypatch.setattr(figures, "MEASURES", {"tiny": measures})


def test_a_table_has_shares_of_the_dense_model_and_short_labels(two_measures):
    assert figures.table("code programs", tiny="") == (
        "| | perplexity | programs |\n"
        "| --- | --- | --- |\n"
        "| all | 4.00 | 70 of 82 |\n"
        "| half | 40.6 | 71% (59 to 83) |\n"
        "| and healed | 4.31 | 83% |\n"
        "| fewer bits | 2,404 | |\n"
    )


@pytest.mark.parametrize(("columns", "row"), [("code speed", "all"), ("code", "a third")])
def test_a_table_of_what_was_not_measured_is_an_error(two_measures, columns, row):
    with pytest.raises(KeyError):
        figures.table(columns, tiny=row)


def test_figures_that_the_file_lacks_are_found(two_measures):
    text = (
        "It goes to 40.6 (40.55), and 50 of 82 programs pass, 71% (59 to 83%).\n"
        "Without 6 of 30 blocks, SmolLM2-1.7B is no 2.5x, `4.3`; arXiv 2402.09025.\n"
        "It goes to 4.32, and 51 of 82 programs pass, 72%.\n"
        "| half | 40.7 |"
    )
    missing = ["40.7", "2.5x", "4.32", "51 of 82", "72%"]
    assert not_measured(text, "README.md") == missing


def test_every_figure_stands_in_a_page():
    pages = [
        *PAGES,
        *(f"docs/experiments/{path.name}" for path in (ROOT / "docs/experiments").glob("*.md")),
    ]
    text = plain("\n".join(map(read, pages)))
    unused = []
    for model, measures in figures.MEASURES.items():
        for name, measure in measures.items():
            for row in measure.values:
                if not any(stands_in(text, form) for form in measure.forms(row)):
                    unused.append(f"{model}.{name}: {row}")
    assert unused == []


def stands_in(text, form):
    return re.search(rf"(?<![\d.]){re.escape(plain(form))}(?!\d)", text)


def test_every_constant_stands_in_its_page():
    for page, constants in figures.CONSTANTS.items():
        found = numbers(prose(read(page)))
        assert [number for number in constants if plain(number) not in found] == []
