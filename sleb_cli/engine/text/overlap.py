"""Tell whether blocks were chosen or recovered on the text that they are evaluated on."""

from __future__ import annotations

from pathlib import Path

from sleb_cli.names import split_mixture
from sleb_cli.plan import CalibrationRecord
from sleb_cli.texts.named import text_source


def is_known(text: str, tokens_sha256: str, record: CalibrationRecord) -> bool:
    """Whether the record is of this text to evaluate on, by its source or its tokens."""
    if tokens_sha256 == record.tokens_sha256:
        return True
    path, config, split = text_source(text).origin(evaluated=True)
    for source, _ in split_mixture(record.source):
        known, *rest = text_source(source).origin(evaluated=False)
        # A published plan keeps only the name of a file.
        is_same_path = known == (path if "/" in known else Path(path).name)
        if is_same_path and rest == [config, split]:
            return True
    return False
