"""Find the files of a model by name, before torch is imported, so mistakes show at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.model.source import ModelSource, locate_model
from sleb_cli.events import Notify
from sleb_cli.names import require_path
from sleb_plugins import UsageError

if TYPE_CHECKING:
    from sleb_cli.engine.gguf.file import GgufFile


def locate(named: NamedSubject, notify: Notify) -> ModelSource:
    """Find the named model; download or convert it the first time."""
    request = named.request
    return locate_model(
        named.model, notify, revision=request.revision, trust_remote_code=request.trust_remote_code
    )


def locate_pair(named: NamedSubject, notify: Notify) -> tuple[ModelSource, ModelSource | None]:
    """Find the named model, and the one that is compared with it, if there is one."""
    if named.other is None:
        return locate(named, notify), None
    request = named.request
    trusts_code = request.trust_remote_code
    other = locate_model(
        named.other, notify, revision=request.revision, trust_remote_code=trusts_code
    )
    source = locate_model(named.model, notify, trust_remote_code=trusts_code)
    if source.folder.samefile(other.folder):
        raise UsageError(
            f"{named.other} and {named.model} are the same model.",
            hint="Name the model that it was made from with --against.",
        )
    return source, other


def locate_to_cut(named: NamedSubject, notify: Notify) -> ModelSource | GgufFile:
    """Read the header of the GGUF file to cut, or find the model to make a checkpoint of."""
    if named.gguf is None:
        return locate(named, notify)
    from sleb_cli.engine.gguf.file import read_gguf  # which imports NumPy

    require_path(str(named.gguf))
    return read_gguf(named.gguf)
