"""Results of a long benchmark, in a file that is written after each measurement, so that a stopped run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleb_cli.atomic import to_json, write_text


class SavedWork:
    """The results so far, by kind, in `folder`/`name`.json; results of another setting are never mixed with them."""

    def __init__(self, folder: Path, name: str, setting: dict[str, Any], kinds: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"{name}.json"
        self.data: dict[str, Any] = {"setting": setting} | {kind: {} for kind in kinds}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data["setting"] != setting:
                raise SystemExit(
                    f"{self.path} was measured with {self.data['setting']}, not {setting}: take another --work."
                )

    def save(self) -> None:
        write_text(self.path, to_json(self.data))
