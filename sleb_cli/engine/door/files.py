"""Find the files of a model by name, before torch is imported, so mistakes show at once."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

from sleb_cli.checks.searches import CheckedSearch, goal_of
from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.model.source import ModelSource, locate_model
from sleb_cli.events import Notify
from sleb_cli.names import require_path
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import SearchRequest
from sleb_cli.units import plural
from sleb_plugins import FamilyAdapter, UnsupportedModelError, UsageError

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


def require_possible(checked: CheckedSearch, source: ModelSource, registry: Registry) -> None:
    """Refuse what cannot be removed by config.json and the names of the tensors."""
    from sleb_cli.engine.search.choices import Protection  # which only a search imports

    request = checked.request
    if request.unit == "experts":
        _require_experts(source)
        return
    model_type = str(source.raw_config.get("model_type"))
    count = _configured_blocks(source, registry.family(model_type))
    if count is None or count < 2:
        return
    require_blocks(request, source, count)
    gone = checked.extended.removals if checked.extended else ()
    protection = Protection(
        request.protect_first or 0, request.protect_last or 0, tuple(request.protect or ())
    )
    free = protection.candidates(count, gone)
    most = min(len(gone) + len(free), count - 1)
    name, goal = goal_of(request)
    if name == "ratio":
        goal *= count
    if name in ("ratio", "remove") and goal > most:
        raise UsageError(
            f"At most {plural(most, 'block')} can be removed from {source.id}, which has {count}; "
            f"{math.ceil(goal)} were to go.",
            hint="Choose a target that can be met, or protect fewer blocks.",
        )


def require_blocks(request: SearchRequest, source: ModelSource, count: int) -> None:
    """Refuse to protect a block that a model does not have."""
    absent = [block for block in request.protect or () if not 0 <= block < count]
    if absent:
        raise UsageError(
            f"There is no block {absent[0]} to protect: {source.id} has {count} blocks, 0 to "
            f"{count - 1}.",
            hint="Blocks are numbered from 0.",
        )


def _configured_blocks(source: ModelSource, family: FamilyAdapter | None) -> int | None:
    """Return the number of blocks where config.json says it."""
    config = source.raw_config
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text
    for key in (family.count_key if family else "num_hidden_layers", "n_layer"):
        if type(config.get(key)) is int:
            return int(config[key])
    return None


def _require_experts(source: ModelSource) -> None:
    names = f"{json.dumps(source.raw_config)} {source.weights.tensor_names()}".lower()
    if not re.search("expert|moe|router", names):
        raise UnsupportedModelError(
            f"No expert can be removed from {source.id}, because neither its config.json nor its "
            "weights name any.",
            hint="Remove blocks: leave out --unit experts. docs/experts.md says which models have "
            "experts to remove.",
        )
