"""Each picture in the docs has the words that its script draws today."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"search.svg": "docs/images/draw_search.py", "when-it-pays.svg": "tests/benchmarks/draw_when_it_pays.py"}


def words(svg):
    """The texts of a picture in order; ids, styles and shapes change with the versions of what draws them."""
    return re.findall(r"<(?:text|dc:description)\b[^>]*>(.*?)</", svg.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_a_picture_has_the_words_that_its_script_draws(tmp_path, name, script):
    subprocess.run([sys.executable, ROOT / script, tmp_path / name], check=True)
    found = words(tmp_path / name)
    assert len(found) > 20
    assert found == words(ROOT / "docs/images" / name), f"draw it again: python {script}"
