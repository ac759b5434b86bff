"""Each picture in the docs is shown, and has the words that its script draws today."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "images/search.svg": "docs/images/draw_search.py",
    "experiments/quality.svg": "docs/experiments/draw_quality.py",
}


def words(svg):
    """The texts of a picture in order; ids, styles and shapes change with the versions of what
    draws them.
    """
    return re.findall(
        r"<(?:text|dc:description)\b[^>]*>(.*?)</", svg.read_text(encoding="utf-8"), re.DOTALL
    )


@pytest.mark.parametrize(("picture", "script"), SCRIPTS.items())
def test_a_picture_has_the_words_that_its_script_draws(tmp_path, picture, script):
    drawn = tmp_path / "drawn.svg"
    subprocess.run([sys.executable, ROOT / script, drawn], check=True)
    found = words(drawn)
    assert len(found) > 20
    assert found == words(ROOT / "docs" / picture), f"draw it again: python {script}"


def test_every_picture_is_shown():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        (page.parent / path).resolve()
        for page in pages
        for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    }
    assert shown == set((ROOT / "docs").rglob("*.svg"))
