"""Read from a model's config which family it is, how many blocks it has, and where they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from sleb_cli.atomic import scratch_folder, writing
from sleb_cli.engine.model.block_names import BlockNames, BlockNumbering, find_block_numbering
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.model.structure import Structure, refine_kinds, shared_weights, structure_of
from sleb_cli.engine.third_party import translate_transformers_errors
from sleb_cli.events import Notice, Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord
from sleb_plugins import FamilyAdapter, ModelError, UnsupportedModelError
from sleb_plugins.config_keys import PREDICTION_BLOCKS, Kept

BY_STRUCTURE = "structure"

_WHAT_WORKS = (
    "docs/reference/families.md lists the supported models; `sleb plugins` lists the families that plugins add."
)

_COUNTS = re.compile(r"(n|num)_(\w+_)?(layers?|blocks?|experts?|labels)|depth")
"""Config keys of which transformers makes as many modules, or entries of a list."""

_LARGEST_COUNT = 4096

_CODE = ("attn_implementation", "implementation_internal", "experts_implementation")
"""Endings of config keys that may name a repository of compiled code, which transformers would download and run."""

_ELSEWHERE = "Free some space, or choose another place for temporary files with the environment variable TMPDIR."

_KINDS = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types")
"""Config keys that list the kind of each block."""


@dataclass(frozen=True)
class Architecture:
    """A model that sleb can remove blocks from."""

    source: ModelSource
    config: Any
    adapter: FamilyAdapter
    skeleton: nn.Module
    """The model without weights: every parameter is on the meta device."""

    @cached_property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return len(self.blocks_of(self.skeleton))

    @property
    def text_config(self) -> Any:
        """The config of the language model: in multimodal models, a part of the whole config."""
        return _text_config(self.config)

    @property
    def text_key(self) -> str:
        """The key of `config.json` that holds the language model's config; empty if it is the whole config."""
        text = self.text_config
        return "" if text is self.config else next(k for k, value in vars(self.config).items() if value is text)

    @property
    def auto_class(self) -> Any:
        """The auto class that loads this model."""
        return _auto_class(self.config)

    def build(self, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """Build a model of this family on the meta device; in the config's data type by default."""
        return _skeleton(config, self.source, dtype)

    def read_config(self, raw: dict[str, Any]) -> Any:
        """Parse the contents of a `config.json` with transformers.

        Raises:
            ModelError: transformers refuses them.
            OutputError: they cannot be written to the temporary folder from which it reads them.
        """
        temporary = Path(gettempdir())
        with writing(temporary, hint=_ELSEWHERE), scratch_folder(temporary, "sleb-config") as folder:
            (folder / "config.json").write_text(json.dumps(raw))
            with translate_transformers_errors("the pruned config"):
                config = type(self.config).from_pretrained(folder)
        config.name_or_path = self.config.name_or_path
        return config

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of blocks.

        Raises:
            UnsupportedModelError: the adapter's path does not lead to a list.
        """
        try:
            blocks = model.get_submodule(self.adapter.blocks_path)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedModelError(
                f"The family {self.adapter.name} says that {self.config.model_type} keeps its blocks at "
                f"{self.adapter.blocks_path}, but there is no list there.",
                hint="Tell the author of the plugin; `sleb plugins` names it.",
            )
        return blocks

    @cached_property
    def numbering(self) -> BlockNumbering:
        """How the weight files, if any, number the blocks, which may differ from the model in memory.

        Raises:
            UnsupportedModelError: they do not number each block.
        """
        source = self.source
        names = list(self.skeleton.state_dict()) if source.config_only else source.weights.tensor_names()
        numbering = find_block_numbering(names, self.adapter.blocks_path, self.block_count)
        predicted = [getattr(self.text_config, key, None) for key in PREDICTION_BLOCKS]
        if numbering is None or (numbering.extra and numbering.extra not in predicted):
            raise UnsupportedModelError(
                f"The weight files of {self.source.id} do not keep {self.block_count} blocks under "
                f"{self.adapter.blocks_path}.",
                hint="Load the model with transformers, save it again, and use that copy.",
            )
        return numbering

    def block_names(self, kept: Kept) -> BlockNames:
        """Return the names of the model's blocks before and after all but the `kept` ones are removed.

        Raises:
            UnsupportedModelError: the weight files do not number each block.
        """
        return BlockNames(self.adapter.blocks_path, self.numbering, kept)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The model's own data type: the config's, or else that of the files, as transformers loads them."""
        named: torch.dtype | None = self.config.dtype
        return named if named or self.source.config_only else next(iter(self.source.weights.float_dtypes), None)

    @property
    def is_quantized(self) -> bool:
        """Whether the config, or that of the language model in it, says that the weights are quantized."""
        return any(getattr(config, "quantization_config", None) for config in (self.config, self.text_config))

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each block: the config's word, or the classes that differ; "" if all blocks are alike."""
        lists = [getattr(self.text_config, key, None) for key in _KINDS]
        said = [v for v in lists if v and len(v) == self.block_count and len(set(map(str, v))) > 1]
        kinds = [", ".join(dict.fromkeys(str(values[block]) for values in said)) for block in range(self.block_count)]
        return refine_kinds(self.blocks_of(self.skeleton), kinds)

    @cached_property
    def structures(self) -> tuple[list[Structure], Structure]:
        """The structure of each block, and that of the model outside the blocks."""
        return self.structures_of(self.skeleton)

    def structures_of(self, model: nn.Module) -> tuple[list[Structure], Structure]:
        """Return the same of another model of this family."""
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
        )

    @property
    def longest_sequence(self) -> int | None:
        """The number of positions that the model supports, or None if it sets no limit."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def read_architecture(source: ModelSource, registry: Registry, notify: Notify) -> Architecture:
    """Read the config, choose the family, and find the blocks. No weights are read.

    Raises:
        UnsupportedModelError: the model is not a decoder, has no list of blocks that matches its config, or belongs to
            a family whose blocks cannot be removed.
        PluginError: two plugins claim its model_type.
    """
    config = _read_config(source)
    text = _text_config(config)
    adapter = registry.family(config.model_type)
    inner = registry.family(text.model_type)
    for claimed in (adapter, inner):
        if claimed is not None and claimed.refusal:
            raise _refused(source, config, claimed.refusal)
    skeleton = _skeleton(config, source)
    if adapter is None:
        adapter = _read_structure(config, skeleton)
        if config.model_type not in CONFIG_MAPPING:
            notify(
                Notice(
                    f"sleb was never tested with {config.model_type}, which transformers does not know. "
                    f"It found {text.num_hidden_layers} blocks at {adapter.blocks_path}."
                )
            )
    architecture = Architecture(source, config, adapter, skeleton)
    count = getattr(text, adapter.count_key, None)
    if count != architecture.block_count:
        raise UnsupportedModelError(
            f"The config of {source.id} says {count} blocks ({adapter.count_key}), but the model has "
            f"{architecture.block_count} at {adapter.blocks_path}.",
            hint="Correct config.json, or download the model again.",
        )
    if not count:
        raise _refused(source, config, "it has none")
    if shared_weights(architecture.blocks_of(skeleton)):
        raise _refused(source, config, "its blocks share weights with one another")
    return architecture


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _refused(source: ModelSource, config: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"No block can be removed from {source.id} ({config.model_type}), because {why}.", hint=_WHAT_WORKS
    )


def _read_config(source: ModelSource) -> Any:
    raw = source.raw_config
    model_type = raw.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known and "auto_map" not in raw:
        raise UnsupportedModelError(
            f"transformers has no model of type {model_type!r}.",
            hint="Upgrade with `pip install --upgrade transformers`, or check config.json.",
        )
    if not is_known and not source.trust_remote_code:
        raise untrusted_code(source)
    if source.trust_remote_code:
        source.require_own_code()
    _require_harmless(source, raw)
    with translate_transformers_errors(f"the config of {source.id}"):
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        _text_config(config).to_dict()  # a text_config where the family has none is no config
    encoder_only = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if config.is_encoder_decoder or encoder_only or not _auto_class(config):
        raise UnsupportedModelError(
            f"{source.id} ({model_type}) is not a decoder-only language model.",
            hint="sleb needs a model that AutoModelForCausalLM can load.",
        )
    return config


def _require_harmless(source: ModelSource, settings: dict[str, Any]) -> None:
    """Make sure that a config, which transformers has yet to parse, names no code, and asks for no billion of anything.

    Raises:
        ModelError: it does.
    """
    for key, value in settings.items():
        named = value.values() if isinstance(value, dict) else [value]
        if key.endswith(_CODE) and (code := [name for name in named if "/" in str(name)]):
            raise ModelError(
                f"The config of {source.id} names code to be downloaded and run: {key} is {code[0]!r}.",
                hint=f"Delete {key} from a local copy of its config.json.",
            )
        if isinstance(value, dict):
            _require_harmless(source, value)
        elif _COUNTS.fullmatch(key) and isinstance(value, int | float) and value > _LARGEST_COUNT:
            raise ModelError(
                f"The config of {source.id} sets {key} to more than {_LARGEST_COUNT:,}.",
                hint="Copy or download the model again.",
            )


def untrusted_code(source: ModelSource) -> ModelError:
    """Return the error for a model whose code is needed, and not trusted."""
    return ModelError(
        f"{source.id} comes with its own Python code.",
        hint="Read that code; if you trust it, run it with --trust-remote-code.",
    )


def _auto_class(config: Any) -> Any:
    """Return the auto class that loads the whole model, or None if transformers has no language model of its type."""
    if _text_config(config) is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    return None


def _skeleton(config: Any, source: ModelSource, dtype: torch.dtype | None = None) -> nn.Module:
    options = {"dtype": dtype} if dtype else {}
    with translate_transformers_errors(f"the config of {source.id}"), torch.device("meta"):
        model: nn.Module = _auto_class(config).from_config(
            config, trust_remote_code=source.trust_remote_code, **options
        )
    return model


def _read_structure(config: Any, skeleton: nn.Module) -> FamilyAdapter:
    """Find the list of the configured length that holds most of the language model's parameters."""
    text = _text_config(config)
    count = getattr(text, "num_hidden_layers", None)
    lists = {
        module: path
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(type(block).forward is not nn.Module.forward for block in module)
    }
    if not lists:
        raise UnsupportedModelError(
            f"{config.model_type} has no list of {count} blocks to remove from.", hint=_WHAT_WORKS
        )
    # In a multimodal model, those of the language model, if transformers says which it is.
    decoder = getattr(skeleton, "get_decoder", lambda: None)()
    inner = [module for module in decoder.modules() if module in lists] if isinstance(decoder, nn.Module) else []
    return FamilyAdapter(
        name=BY_STRUCTURE,
        model_types=frozenset({config.model_type}),
        blocks_path=lists[max(inner or lists, key=lambda module: sum(p.numel() for p in module.parameters()))],
        count_key=text.attribute_map.get("num_hidden_layers", "num_hidden_layers"),
    )
