"""The report in a real browser: `pytest -m browser -n0`, with Chromium installed."""

import re
import shutil

import pytest

from measured_plans import make_benchmark, make_evaluation, make_plan, write_measured
from sleb_cli.__main__ import main

pytestmark = pytest.mark.browser

# Nothing that calls home, and no sandbox, which root may not use.
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    assert chromium, "no Chromium is installed: apt-get install chromium"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a plan of which everything was measured."""
    plan = make_plan(24, 5)
    evaluation, benchmark = make_evaluation(plan, items=100), make_benchmark(plan)
    file = write_measured(
        tmp_path_factory.mktemp("browser"), plan, evaluation=evaluation, benchmark=benchmark
    )
    assert main(["export", str(file), "--to", "report", "-q"]) == 0
    return file.with_suffix(".report.html").as_uri()


@pytest.fixture
def open_page(browser, report):
    """Open the report; whatever it says to the console or asks of a network fails the test."""
    asked, complaints = [], []

    def open_page(width, **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report)
        return page

    yield open_page
    assert complaints == []
    assert {url for url in asked if not url.startswith("data:")} == {report}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_its_screen_and_scheme_and_prints(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("figure img:visible")
    assert pictures.count() == page.locator("figure h3").count() == 5
    drawn = 840 if width > 620 else 380
    for picture in pictures.all():
        assert picture.evaluate("image => image.naturalWidth") > 0
        assert picture.bounding_box()["width"] <= width
        # A phone gets a narrow picture, whose words are as large.
        assert picture.bounding_box()["width"] > 0.85 * drawn
    tables = page.locator(".scroll")
    for table in tables.all():
        assert table.bounding_box()["width"] <= width
        assert "gradient" in table.evaluate("table => getComputedStyle(table).backgroundImage")
    colours = page.evaluate(
        "(style => [style.backgroundColor, "
        "style.color])(getComputedStyle(document.documentElement))"
    )
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (paper > 600 and ink < 200) == (scheme == "light")
    assert (paper < 120 and ink > 600) == (scheme == "dark")
    page.emulate_media(media="print")
    assert page.pdf().startswith(b"%PDF")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(open_page):
    page = open_page(1280)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.tagName, "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name == "BODY":
            break
        assert outline != "none", name
        reached.add(name)
    assert reached >= {"A", "DIV"}
