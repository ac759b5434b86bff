"""Find the family of a model, its blocks and where they are, from its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from sleb_cli.atomic import writing
from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.tensors import float_dtypes
from sleb_cli.engine.model.block_names import BlockNames, BlockNumbering, find_block_numbering
from sleb_cli.engine.model.reading import Reading, find_reading
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.model.structure import Structure, refine_kinds, shared_weights, structure_of
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notice, Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord
from sleb_plugins import FamilyAdapter, ModelError, UnsupportedModelError
from sleb_plugins.config_keys import (
    KINDS_BY_BLOCK,
    OTHER_TEXT_KEYS,
    PREDICTION_BLOCKS,
    Kept,
    kept_blocks,
)

BY_STRUCTURE = "structure"

_WHAT_WORKS = (
    "docs/reference/families.md lists the supported models; `sleb plugins` lists the families that "
    "plugins add."
)

_REPORT = "Report it to the author of the plugin, which `sleb plugins` names."

_CODE = ("attn_implementation", "implementation_internal", "experts_implementation")
"""Endings of config keys that may name compiled code, which transformers would download and run."""

_ELSEWHERE = "Free some space, or set the environment variable TMPDIR to another folder."


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model that sleb can remove blocks from."""

    source: ModelSource
    config: Any
    claimed_by: FamilyAdapter | None
    """The family that claims the model's type, if any."""
    reading: Reading | None = None
    """How it reads, if it only reads; None for a language model."""

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without weights: every parameter is on the meta device."""
        return self.build(self.config)

    @cached_property
    def adapter(self) -> FamilyAdapter:
        """The family that claims the model, or else one made from its structure.

        A family names its path in the model with a head; a model of vectors has none.
        """
        if self.claimed_by is None:
            return _read_structure(self)
        path = self.claimed_by.blocks_path
        if self.makes_vectors:
            path = path.removeprefix(f"{self.skeleton.base_model_prefix}.")
        return replace(self.claimed_by, blocks_path=path)

    @cached_property
    def block_count(self) -> int:
        """The number of blocks."""
        return len(self.blocks_of(self.skeleton))

    @property
    def text_config(self) -> Any:
        """The config of the language model: in multimodal models, a part of the whole config."""
        return self.config.get_text_config(decoder=True)

    @property
    def text_key(self) -> str:
        """The key of `config.json` that holds the language model's config.

        Empty if it is the whole config.
        """
        text = self.text_config
        if text is self.config:
            return ""
        return next(str(key) for key, value in vars(self.config).items() if value is text)

    def text_key_in(self, raw: Mapping[str, Any]) -> str:
        """Return the key of the language model's config in a `config.json`; empty if it is all.

        Early configs of multimodal models have it under another key, or among their own settings.
        """
        for key in (self.text_key, *OTHER_TEXT_KEYS):
            if self.text_key and isinstance(raw.get(key), dict):
                return key
        return ""

    @property
    def makes_vectors(self) -> bool:
        """Whether the model makes a vector of each text."""
        return self.reading is not None and self.reading.output == "vectors"

    @property
    def auto_class(self) -> Any:
        """The auto class that loads the whole model; None if sleb has no use for it."""
        kind = type(self.config)
        if self.makes_vectors:
            return AutoModel
        if self.reading is not None:
            return AutoModelForSequenceClassification
        if self.text_config is not self.config and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(self.config, "auto_map"):
            return AutoModelForCausalLM
        return None

    def build(self, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """Build a model of this family on the meta device; in the config's data type by default."""
        options = {"dtype": dtype} if dtype else {}
        with translate_transformers_errors(f"the config of {self.source.id}"), torch.device("meta"):
            model: nn.Module = self.auto_class.from_config(
                config, trust_remote_code=self.source.trust_remote_code, **options
            )
        return model

    def read_config(self, raw: dict[str, Any]) -> Any:
        """Parse the contents of a `config.json` with transformers.

        Raises:
            ModelError: transformers refuses them.
        """
        temporary = Path(gettempdir())
        with writing(temporary, hint=_ELSEWHERE), TemporaryDirectory(prefix="sleb-") as folder:
            # transformers reads a file; its `from_dict` would not decode infinities.
            (Path(folder) / "config.json").write_text(json.dumps(raw))
            with translate_transformers_errors("the pruned config"):
                config = type(self.config).from_pretrained(folder)
        config.name_or_path = self.config.name_or_path
        return config

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of blocks."""
        blocks: Any = None
        with suppress(AttributeError):
            blocks = model.get_submodule(self.adapter.blocks_path)
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModelError(
                f"The family {self.adapter.name} says that {self.config.model_type} keeps its "
                f"blocks at {self.adapter.blocks_path}, but there is no list there.",
                hint=_REPORT,
            )
        return blocks

    @cached_property
    def numbering(self) -> BlockNumbering:
        """How the weight files number the blocks, which may differ from the model in memory."""
        names = self.source.weights.tensor_names()
        numbering = find_block_numbering(names, self.adapter.blocks_path, self.block_count)
        predicted = [getattr(self.text_config, key, None) for key in PREDICTION_BLOCKS]
        if numbering is None or (numbering.extra and numbering.extra not in predicted):
            raise UnsupportedModelError(
                f"The weight files of {self.source.id} do not keep {self.block_count} blocks under "
                f"{self.adapter.blocks_path}.",
                hint="Load the model with transformers, save it again, and use that copy.",
            )
        return numbering

    @cached_property
    def names(self) -> BlockNames:
        """The names of the model's blocks, none of which goes."""
        return self.block_names(kept_blocks(self.block_count, ()))

    def block_names(self, kept: Kept) -> BlockNames:
        """Return the names of the blocks before and after all but the `kept` ones are removed."""
        return BlockNames(self.adapter.blocks_path, self.numbering, kept)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The config's data type or, without one, the files', as transformers loads them."""
        named: torch.dtype | None = self.config.dtype
        return named or next(iter(float_dtypes(self.source.weights)), None)

    @property
    def families_hint(self) -> str:
        """Where to read which blocks can be removed, and how a plugin can change that."""
        hint = "docs/reference/families.md says what each family allows."
        if self.claimed_by:
            return hint
        return (
            f"{hint} If a setting is the reason, a plugin can prune it: `config_keys` in "
            "docs/reference/plugins.md."
        )

    @property
    def is_quantized(self) -> bool:
        """Whether the config says that the weights are quantized."""
        return any(
            getattr(config, "quantization_config", None)
            for config in (self.config, self.text_config)
        )

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each block: the config's word, or the classes that differ.

        Empty if all blocks are alike.
        """
        distinct = []
        for key in KINDS_BY_BLOCK:
            values = getattr(self.text_config, key, None)
            # A list with one value for all blocks tells none apart.
            if values and len(values) == self.block_count and len(set(map(str, values))) > 1:
                distinct.append([str(value) for value in values])
        kinds = []
        for block in range(self.block_count):
            words = [values[block] for values in distinct]
            kinds.append(", ".join(dict.fromkeys(words)))
        return refine_kinds(self.blocks_of(self.skeleton), kinds)

    @cached_property
    def structures(self) -> tuple[list[Structure], Structure]:
        """The structure of each block, and of the model outside the blocks."""
        return self.structures_of(self.skeleton)

    def structures_of(self, model: nn.Module) -> tuple[list[Structure], Structure]:
        """Return the structure of each block of a model of this family, and of the rest."""
        blocks = [structure_of(block) for block in self.blocks_of(model)]
        return blocks, structure_of(model, without=self.adapter.blocks_path)

    @cached_property
    def record(self) -> ModelRecord:
        """The model's entry in plans and results."""
        return ModelRecord(
            id=self.source.id,
            revision=self.source.revision,
            fingerprint=self.source.fingerprint,
            model_type=self.config.model_type,
            family=self.adapter.name,
            blocks=self.block_count,
            code=self.source.code,
            dtype=dtype_name(self.dtype) if self.dtype else None,
            output=self.reading.output if self.reading else None,
        )

    @property
    def identity(self) -> dict[str, str | None]:
        """The key of all measurements of the model: its files, and the family of its blocks."""
        names = {"model_type": self.config.model_type, "family": self.adapter.name}
        return {"files": self.source.content_hash, **names}

    @property
    def longest_sequence(self) -> int | None:
        """The number of positions that the model supports; None without a limit."""
        if self.reading and self.reading.longest:
            return self.reading.longest
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return None
        for name, module in self.skeleton.named_modules():
            # RoBERTa and its kind count positions from behind the padding's.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
                offset: int = module.padding_idx
                return limit - offset - 1
        return limit


def read_architecture(source: ModelSource, registry: Registry, notify: Notify) -> Architecture:
    """Read the config, choose the family, and find the blocks. No weights are read.

    Raises:
        UnsupportedModelError: the model neither predicts the next token nor only reads, has no list
            of blocks that matches its config, or belongs to a family whose blocks cannot be
            removed.
    """
    config = _read_config(source)
    reading = find_reading(source, config, notify)
    architecture = Architecture(source, config, registry.family(config.model_type), reading)
    text = architecture.text_config
    for family in (architecture.claimed_by, registry.family(text.model_type)):
        if family is not None and family.refusal:
            raise _refused(architecture, family.refusal)
    _require_use(architecture)
    adapter = architecture.adapter
    if architecture.claimed_by is None and config.model_type not in CONFIG_MAPPING:
        untested = (
            f"sleb has not been tested with {config.model_type}, which transformers does not know"
        )
        notify(
            Notice(
                f"{untested}. It found {text.num_hidden_layers} blocks at {adapter.blocks_path}."
            )
        )
    count = getattr(text, adapter.count_key, None)
    if count != architecture.block_count:
        raise UnsupportedModelError(
            f"The config of {source.id} says {count} blocks ({adapter.count_key}), but the model "
            f"has {architecture.block_count} at {adapter.blocks_path}.",
            hint=_REPORT if count is None else "Correct config.json, or download the model again.",
        )
    if not count:
        raise _refused(architecture, "it has none")
    if shared_weights(architecture.blocks_of(architecture.skeleton)):
        raise _refused(architecture, "its blocks share weights with one another")
    return architecture


def _require_use(architecture: Architecture) -> None:
    """Refuse a model that neither predicts the next token nor makes one result of a text."""
    config = architecture.config
    named = f"{architecture.source.id} ({config.model_type})"
    encodes_only = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", True
    )
    if config.is_encoder_decoder or architecture.auto_class is None:
        raise UnsupportedModelError(
            f"{named} is not a decoder-only language model, an embedding model or a classifier.",
            hint="sleb needs one that AutoModelForCausalLM, sentence-transformers or "
            "AutoModelForSequenceClassification can load.",
        )
    if encodes_only and architecture.reading is None:
        raise UnsupportedModelError(
            f"{named} predicts masked tokens, and its text has no vector and no class to keep.",
            hint="Fine-tune it first, or save it as an embedding model with sentence-transformers: "
            "SentenceTransformer(FOLDER).save(NEW_FOLDER).",
        )


def _refused(architecture: Architecture, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"No block can be removed from {architecture.source.id} "
        f"({architecture.config.model_type}), because {why}.",
        hint=_WHAT_WORKS,
    )


def _read_config(source: ModelSource) -> Any:
    raw = source.raw_config
    model_type = raw.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known and "auto_map" not in raw:
        raise UnsupportedModelError(
            f"transformers has no model of type {model_type!r}."
            if model_type
            else "config.json has no model_type.",
            hint="Upgrade with `pip install --upgrade transformers`, or check config.json.",
        )
    if not is_known and not source.trust_remote_code:
        raise untrusted_code(source)
    _require_harmless(source, raw)
    with translate_transformers_errors(f"the config of {source.id}"):
        config: Any = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code
        )
        # A text_config where the family has none is no config.
        config.get_text_config(decoder=True).to_dict()
    return config


def _require_harmless(source: ModelSource, settings: dict[str, Any]) -> None:
    """Refuse a config that names code to run, before transformers parses it."""
    for key, value in settings.items():
        named = value.values() if isinstance(value, dict) else [value]
        for name in named:
            if key.endswith(_CODE) and "/" in str(name):
                raise ModelError(
                    f"The config of {source.id} names code to be downloaded and run: {key} is "
                    f"{name!r}.",
                    hint=f"Delete {key} from a local copy of its config.json.",
                )
        if isinstance(value, dict):
            _require_harmless(source, value)


def untrusted_code(source: ModelSource) -> ModelError:
    """Return the error for a model whose code is needed, and not trusted."""
    return ModelError(
        f"{source.id} comes with its own Python code.",
        hint="Read that code; if you trust it, run it with --trust-remote-code.",
    )


def _read_structure(architecture: Architecture) -> FamilyAdapter:
    """Find the list of the configured length that holds most of the language model's parameters."""
    text = architecture.text_config
    model_type = architecture.config.model_type
    count = getattr(text, "num_hidden_layers", None)
    paths = {}
    for path, module in architecture.skeleton.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if all(type(block).forward is not nn.Module.forward for block in module):
            paths[module] = path
    if not paths:
        number = "" if count is None else f"{count} "
        raise UnsupportedModelError(
            f"{model_type} has no list of {number}blocks to remove from.", hint=_WHAT_WORKS
        )
    # In a multimodal model, only lists of the language model count, if transformers names it.
    decoder = getattr(architecture.skeleton, "get_decoder", lambda: None)()
    candidates = list(paths)
    if isinstance(decoder, nn.Module):
        candidates = [module for module in decoder.modules() if module in paths] or candidates
    return FamilyAdapter(
        name=BY_STRUCTURE,
        model_types=frozenset({model_type}),
        blocks_path=paths[max(candidates, key=_parameter_count)],
        count_key=type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers"),
    )


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
