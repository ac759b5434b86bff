"""How a model that only reads takes a text, and what it puts out. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from sleb_cli.engine.files.config_files import read_json
from sleb_cli.engine.model.source import MODULES, TRANSFORMER_SETTINGS, ModelSource
from sleb_cli.events import Notice, Notify
from sleb_cli.records import OutputKind
from sleb_plugins import ModelError, UnsupportedModelError

T = TypeVar("T")

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

_ANY = None
_ON_VECTOR = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding",),
}
_KNOWN: Mapping[str, Mapping[str, tuple[Any, ...] | None]] = {
    "Transformer": {
        "max_seq_length": _ANY,
        "do_lower_case": _ANY,
        "unpad_inputs": _ANY,
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "method": ("forward",),
        "method_output_name": ("last_hidden_state", ["last_hidden_state"]),
        "trust_remote_code": _ANY,
        "attn_implementation": _ANY,
        "add_pooling_layer": _ANY,
        "dtype": _ANY,
        "torch_dtype": _ANY,
    },
    "Pooling": {
        "embedding_dimension": _ANY,
        "word_embedding_dimension": _ANY,
        "pooling_mode": _ANY,
        "include_prompt": (True,),
        **dict.fromkeys(_OLD_KEYS, _ANY),
    },
    "Dense": {
        "in_features": _ANY,
        "out_features": _ANY,
        "bias": _ANY,
        "activation_function": _ANY,
        "use_residual": _ANY,
        **_ON_VECTOR,
    },
    "Normalize": _ON_VECTOR,
    "LayerNorm": {"dimension": _ANY},
    "Dropout": {"dropout": _ANY},
}
"""The settings of each module, with the values that sleb computes with.

Those that may have any are followed, or change no vector.
"""
_NESTED = (
    "model_args",
    "model_kwargs",
    "config_args",
    "config_kwargs",
    "tokenizer_args",
    "processor_kwargs",
)
"""Settings of the transformer that hold others."""

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

SAVE_AGAIN = "Load it with a recent sentence-transformers, save it, and name the new folder."


@dataclass(frozen=True)
class Module:
    """A module of an embedding model: its class, its settings, and the folder of its weights."""

    kind: str
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Reading:
    """How a model that only reads takes a text, and what it puts out.

    Attributes:
        output: a vector, a score (of how well two texts match, as a rule), or classes.
        pooling: how a vector is made of the hidden states; the vectors of several modes are joined.
        behind: the modules that the vector goes through.
        longest: texts are cut to this many tokens; None for as many as the model has positions.
        lower_case: whether texts are written in lower case first.
        prompts: texts to begin with, by name.
        prompt: the name of the one that is used.
        truncate_dim: how many numbers of a vector are kept; None for all.
        similarity: how vectors are compared, one of `SIMILARITIES`.
    """

    output: OutputKind
    pooling: tuple[str, ...] = ()
    behind: tuple[Module, ...] = ()
    longest: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    truncate_dim: int | None = None
    similarity: str = "cosine"


def find_reading(source: ModelSource, config: Any, notify: Notify) -> Reading | None:
    """Find out how a model reads; None if it has a head for language, or one of another kind.

    Raises:
        UnsupportedModelError: it has a module or a kind of head that sleb does not know.
    """
    if source.modules:
        return _read_modules(source)
    heads = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in heads):
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return None
        if config.num_labels == 1:
            return Reading("scores")
        if config.problem_type in ("multi_label_classification", "regression"):
            raise UnsupportedModelError(
                f"{source.id} gives each text several answers ({config.problem_type}), but sleb "
                "compares the one class that a text belongs to.",
                hint="Prune the model that it was fine-tuned from, and fine-tune that.",
            )
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
    return Reading("vectors", ("mean",))


def _read_modules(source: ModelSource) -> Reading:
    pooling, *behind = _modules_behind_transformer(source)
    settings = _transformer_settings(source)
    whole = _settings_of(source.folder / "config_sentence_transformers.json")
    similarity = _value(whole, "similarity_fn_name", str, source) or "cosine"
    if similarity not in SIMILARITIES:
        raise _broken(source, "similarity_fn_name", similarity)
    prompts = {}
    named = _value(whole, "prompts", dict, source) or {}
    for name in named:
        prompts[name] = _value(named, name, str, source) or ""
    return Reading(
        "vectors",
        _pooling_modes(pooling, source),
        tuple(behind),
        longest=_count(settings, "max_seq_length", source),
        lower_case=bool(settings.get("do_lower_case")),
        prompts=prompts,
        prompt=_value(whole, "default_prompt_name", str, source),
        truncate_dim=_count(whole, "truncate_dim", source),
        similarity=similarity,
    )


def _modules_behind_transformer(source: ModelSource) -> list[Module]:
    """Return the pooling, and the modules behind it."""
    modules = []
    for kind, path in source.modules:
        folder = source.folder / path
        modules.append(Module(kind, _settings_of(folder / "config.json"), folder))
    expected = chain([("Transformer",), ("Pooling",)], repeat(BEHIND))
    for module, kinds in zip(modules, expected, strict=False):
        if module.kind not in kinds:
            raise _unknown(source, module.kind)
    if len(modules) < 2:
        raise _unknown(source, "Transformer and none behind it")
    transformer, *others = modules
    if transformer.folder != source.folder:
        name = transformer.folder.relative_to(source.folder)
        raise UnsupportedModelError(
            f"{source.id} keeps its transformer in {name}, not beside {MODULES}.", hint=SAVE_AGAIN
        )
    for module in others:
        _require_known(module.kind, module.settings, source)
    return others


def _transformer_settings(source: ModelSource) -> Mapping[str, Any]:
    """Return what sentence-transformers reads of its transformer, besides the model's config."""
    settings: Mapping[str, Any] = {}
    for name in reversed(TRANSFORMER_SETTINGS):
        settings = _settings_of(source.folder / name) or settings
    flat = dict(settings)
    modality = _value(settings, "modality_config", dict, source) or {}
    if "message" in modality:
        raise UnsupportedModelError(
            f"{source.id} reads each text in a chat template, which sleb does not write.",
            hint="If it was trained on plain texts, take `message` out of the modality_config in "
            "sentence_bert_config.json.",
        )
    flat["modality_config"] = None
    flat |= _value(modality, "text", dict, source) or {}
    for key in _NESTED:
        flat[key] = None
        flat |= _value(settings, key, dict, source) or {}
    _require_known("Transformer", flat, source)
    return settings


def _count(settings: Mapping[str, Any], key: str, source: ModelSource) -> int | None:
    count = _value(settings, key, int, source)
    if count is not None and count < 1:
        raise _broken(source, key, count)
    return count


def _require_known(kind: str, settings: Mapping[str, Any], source: ModelSource) -> None:
    """Refuse a module with a setting that would make other vectors than sleb's."""
    for key, value in settings.items():
        if value in (None, "", [], {}):
            continue
        values = _KNOWN[kind].get(key, ())
        if values is not _ANY and value not in values:
            raise UnsupportedModelError(
                f"{source.id} has a setting of {kind} that sleb does not follow: {key} is "
                f"{value!r}.",
                hint="sentence-transformers computes other vectors with it than sleb would. If the "
                "model does not need it, take it out of its file.",
            )


def _value(settings: Mapping[str, Any], key: str, kind: type[T], source: ModelSource) -> T | None:
    """Return a setting of sentence-transformers, which may be absent, but is of one type."""
    value = settings.get(key)
    if value is not None and not isinstance(value, kind):
        raise _broken(source, key, value)
    return value


def _broken(source: ModelSource, key: str, value: object) -> ModelError:
    return ModelError(
        f"{source.id} has a setting of sentence-transformers that makes no sense: {key} is "
        f"{value!r}.",
        hint="Copy or download the model again.",
    )


def _settings_of(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _unknown(source: ModelSource, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.id} has a module {kind}, which sleb does not know.",
        hint=f"sleb knows Transformer, then Pooling, then {', '.join(BEHIND)}.",
    )


def _pooling_modes(module: Module, source: ModelSource) -> tuple[str, ...]:
    named = module.settings.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in _OLD_KEYS.items() if module.settings.get(key)]
    modes = [named] if isinstance(named, str) else named or ["mean"]
    if not isinstance(modes, list):
        raise _broken(source, "pooling_mode", modes)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise _unknown(source, f"Pooling with {mode}")
    return tuple(modes)
