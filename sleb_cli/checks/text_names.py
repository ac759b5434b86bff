"""Check that texts and tasks are named as they must be, and that local files are there."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version

from sleb_cli.cache import read_cached
from sleb_cli.canaries import PRESETS
from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.keys import Key
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


def require_measures(texts: Iterable[str], tasks: Iterable[str]) -> None:
    """Check all texts and tasks to evaluate on, tasks as far as lm-eval's names are known.

    Raises:
        DataError: files are missing, there are no such texts or tasks, or texts are made to
            calibrate on.
    """
    faults = []
    for name in texts:
        try:
            _require_evaluation_text(name)
        except DataError as error:
            faults.append(error)
    names = read_cached(*task_names_key())
    for task in tasks:
        if names is not None and task not in {*names, *PRESETS}:
            faults.append(unknown_task(task, names))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        hints = dict.fromkeys(fault.hint for fault in faults)
        raise DataError(" ".join(fault.message for fault in faults), hint=" ".join(hints))


def task_names_key() -> tuple[str, Key]:
    """Return the kind and the key of the names of lm-eval's tasks in the cache."""
    return "tasks", {"lm_eval": version("lm_eval")}


def unknown_task(name: str, names: Iterable[str]) -> DataError:
    """Return an error about a task that is none of these."""
    hint = did_you_mean(name, [*PRESETS, *names], otherwise="`lm-eval ls tasks` lists them.")
    return DataError(f"lm-eval has no task {name!r}.", hint=hint)


def _require_evaluation_text(name: str) -> None:
    hint = f"Use wikitext2, c4, {_FORMS}."
    if is_written(name) or is_reference(name):
        raise DataError(f"{name} is text to calibrate on.", hint=hint)
    known = [name for name in NAMED if not is_written(name) and not is_reference(name)]
    _require_source(name, known, hint)


def _require_source(name: str, known: Sequence[str], hint: str) -> None:
    source = text_source(name)
    if isinstance(source, DataSet) and not source.is_well_formed:
        raise DataError(
            f"Unknown text source {name!r}.",
            hint=did_you_mean(name, [*files_beside(name), *known], otherwise=hint),
        )
    source.require()
