"""Were blocks chosen or recovered on the text that they are evaluated on?"""

from __future__ import annotations

from pathlib import Path

from sleb_cli.checks.text_names import is_file
from sleb_cli.engine.text.sources import CALIBRATION_PRESETS, EVALUATION_PRESETS, Dataset
from sleb_cli.names import local_path, split_mixture
from sleb_cli.plan import CalibrationRecord


def is_known(text: str, tokens_sha256: str, record: CalibrationRecord) -> bool:
    """Whether the record is of this text to evaluate on, by its source or its tokens."""
    if tokens_sha256 == record.tokens_sha256:
        return True
    path, *split = _origin(text, EVALUATION_PRESETS)
    origins = (_origin(source, CALIBRATION_PRESETS) for source, _ in split_mixture(record.source))
    # A published plan keeps only the name of a file.
    return any(
        split == rest and known == (path if "/" in known else Path(path).name)
        for known, *rest in origins
    )


def _origin(source: str, presets: dict[str, Dataset]) -> tuple[str, str, str]:
    # A file, or a data set with its config and split.
    if source in presets:
        preset = presets[source]
        if preset.data_files:  # "en/c4-validation.00000-of-00008.json.gz"
            config, name = preset.data_files.split("/")
            return preset.path, config, name.removeprefix("c4-").partition(".")[0]
        return preset.path, preset.config or "", preset.split
    path, config, split = (source, "", "") if is_file(source) else [*source.split(":"), "", ""][:3]
    local = local_path(path)
    return (
        str(local.resolve()) if local.exists() else path,
        config,
        "" if is_file(source) else split or "train",
    )
