"""Check that texts are named as they must be, and that local files are there."""

from collections.abc import Iterable, Sequence

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.texts.data_set import DataSet
from sleb_cli.texts.local_file import files_beside
from sleb_cli.texts.named import NAMED, is_reference, is_written, text_source
from sleb_plugins import DataError
from sleb_plugins.errors import did_you_mean

_FORMS = "a .txt or .jsonl file, or org/name[:config][:split][:column]"


def require_mixture(text: str | None) -> None:
    """Check the texts of a calibration, or of a mixture of them.

    Raises:
        UsageError: the mixture is invalid.
        DataError: a file is missing, or there is no such text.
    """
    for name in parse_mixture(text) if text else ():
        _require_source(name, [*NAMED], f"Use wikitext2, c4, self, {_FORMS}.")


def require_evaluation_texts(names: Iterable[str]) -> None:
    """Check texts to evaluate on.

    Raises:
        DataError: a file is missing, there is no such text, or it is made to calibrate on.
    """
    known = [name for name in NAMED if not is_written(name) and not is_reference(name)]
    for name in names:
        if is_written(name) or is_reference(name):
            raise DataError(
                f"{name} is text to calibrate on.", hint=f"Use wikitext2, c4, {_FORMS}."
            )
        _require_source(name, known, f"Use wikitext2, c4, {_FORMS}.")


def _require_source(name: str, known: Sequence[str], hint: str) -> None:
    source = text_source(name)
    if isinstance(source, DataSet) and not source.is_well_formed:
        raise DataError(
            f"Unknown text source {name!r}.",
            hint=did_you_mean(name, [*files_beside(name), *known], otherwise=hint),
        )
    source.require()
