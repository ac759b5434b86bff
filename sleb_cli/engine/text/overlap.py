"""Whether a text to evaluate on is one that blocks were chosen or recovered on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sleb_cli.engine.text.sources import CALIBRATION_PRESETS, EVALUATION_PRESETS, Dataset, Text, is_file
from sleb_cli.engine.text.windows import tokens_sha256
from sleb_cli.plan import CalibrationRecord


@dataclass(frozen=True)
class _Origin:
    """Where a text is from: a file, or a split of a data set."""

    place: str
    config: str = ""
    split: str = ""

    def is_of(self, recorded: _Origin) -> bool:
        """Whether this is the recorded origin, of which a published plan keeps only the name."""
        if "/" in recorded.place:
            return self == recorded
        return _Origin(Path(self.place).name, self.config, self.split) == recorded


def is_known(text: Text, windows: Tensor, record: CalibrationRecord) -> bool:
    """Whether a text, cut into these windows, is one of those in the record, by its source or by its tokens."""
    if tokens_sha256(windows) == record.tokens_sha256:
        return True
    origin = _origin(text.source, EVALUATION_PRESETS)
    return any(origin.is_of(_origin(source, CALIBRATION_PRESETS)) for source in record.sources)


def _origin(source: str, presets: dict[str, Dataset]) -> _Origin:
    if source in presets:
        preset = presets[source]
        return _Origin(preset.path, preset.config or "", preset.data_files or preset.split)
    if is_file(source):
        return _Origin(_place(source))
    path, config, split = [*source.split(":"), "", ""][:3]
    return _Origin(_place(path), config, split or "train")


def _place(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path
