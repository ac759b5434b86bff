"""What pages link to outside of `docs/`, as files of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "tests/reference.py": "tests/reference.py",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, page in PAGES.items():
        files.append(
            File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8"))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links between the root and `docs/` to where the pages are on the site."""

    def moved(link: re.Match[str]) -> str:
        place = link[1].removeprefix("docs/")
        return f"]({PAGES.get(place.removeprefix('../'), place)}"

    return re.sub(r"\]\(([\w./-]+)", moved, markdown)
