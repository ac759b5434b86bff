"""How a model that only reads takes a text, and what it puts out. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from sleb_cli.engine.files.config_files import read_json, read_json_list
from sleb_cli.engine.model.source import MODULES, ModelSource
from sleb_cli.events import Notice, Notify
from sleb_cli.records import OutputKind
from sleb_plugins import UnsupportedModelError

POOLING_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of earlier versions of sentence-transformers, in the order that vectors are joined in."""

BEHIND = ("Dense", "Normalize", "LayerNorm", "Dropout")
"""The modules that may follow the pooling."""

SAVE_AGAIN = "Load it with a recent sentence-transformers, save it, and name the new folder."


@dataclass(frozen=True)
class Module:
    """A module behind the transformer: its class, its settings, and the folder of its weights."""

    kind: str
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Reading:
    """How a model that only reads takes a text, and what it puts out.

    Attributes:
        output: a vector, a score (of how well two texts match, as a rule), or classes.
        modules: what the hidden states of a text go through, for a vector.
        longest: texts are cut to this many tokens; None for as many as the model has positions.
        lower_case: whether texts are written in lower case first.
        prompts: texts to begin with, by name.
        prompt: the name of the one that is used.
    """

    output: OutputKind
    modules: tuple[Module, ...] = ()
    longest: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None


def find_reading(source: ModelSource, config: Any, notify: Notify) -> Reading | None:
    """Find out how a model reads; None if it has a head for language, or one of another kind.

    Raises:
        UnsupportedModelError: it has a module that sleb does not know.
    """
    if (source.folder / MODULES).is_file():
        return _read_modules(source)
    heads = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in heads):
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return None
        if config.num_labels == 1:
            return Reading("scores")
        return Reading("classes")
    bare = MODEL_MAPPING.get(type(config), None)
    if bare is None or heads != [getattr(bare, "__name__", None)]:
        return None
    notify(
        Notice(
            f"{source.id} has no head and no {MODULES}: its vector is taken to be the mean of its "
            "hidden states, as sentence-transformers does."
        )
    )
    pooling = Module("Pooling", {"pooling_mode": "mean"}, source.folder)
    return Reading("vectors", (pooling,))


def _read_modules(source: ModelSource) -> Reading:
    first, *others = read_json_list(source.folder / MODULES)
    if _class_of(first) != "Transformer":
        raise _unknown(source, _class_of(first))
    if first["path"]:
        raise UnsupportedModelError(
            f"{source.id} keeps its transformer in {first['path']}, not beside {MODULES}.",
            hint=SAVE_AGAIN,
        )
    modules: list[Module] = []
    for entry in others:
        kind = _class_of(entry)
        expected = BEHIND if modules else ("Pooling",)
        if kind not in expected:
            raise _unknown(source, kind)
        folder = source.folder / entry["path"]
        modules.append(Module(kind, _settings_of(folder / "config.json"), folder))
    settings = _settings_of(source.folder / "sentence_bert_config.json")
    whole = _settings_of(source.folder / "config_sentence_transformers.json")
    if not modules:
        raise _unknown(source, "Transformer and none behind it")
    pooling_modes(modules[0], source)
    return Reading(
        "vectors",
        tuple(modules),
        longest=settings.get("max_seq_length"),
        lower_case=bool(settings.get("do_lower_case")),
        prompts={name: text or "" for name, text in (whole.get("prompts") or {}).items()},
        prompt=whole.get("default_prompt_name"),
    )


def _class_of(entry: Mapping[str, Any]) -> str:
    return str(entry["type"]).rpartition(".")[2]


def _settings_of(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _unknown(source: ModelSource, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.id} has a module {kind}, which sleb does not know.",
        hint=f"sleb knows Transformer, then Pooling, then {', '.join(BEHIND)}.",
    )


def pooling_modes(module: Module, source: ModelSource) -> list[str]:
    """Return the modes of a pooling module, whose results are joined.

    Raises:
        UnsupportedModelError: sleb does not know one.
    """
    named = module.settings.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in _OLD_KEYS.items() if module.settings.get(key)]
    modes = [named] if isinstance(named, str) else list(named or ["mean"])
    if module.settings.get("include_prompt") is False:
        raise _unknown(source, "Pooling that leaves out the prompt")
    for mode in modes:
        if mode not in POOLING_MODES:
            raise _unknown(source, f"Pooling with {mode}")
    return modes
