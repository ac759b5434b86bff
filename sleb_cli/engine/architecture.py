"""What a model is made of, read from its config: which family, how many blocks, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

from sleb_cli.engine.foreign import transformers_reads
from sleb_cli.engine.source import ModelSource
from sleb_cli.events import Notice, Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord
from sleb_plugins import FamilyAdapter, ModelError, UnsupportedModelError

BY_STRUCTURE = "structure"


@dataclass(frozen=True)
class Architecture:
    """A model that sleb can remove blocks from."""

    source: ModelSource
    config: Any
    adapter: FamilyAdapter
    skeleton: nn.Module
    """The model without weights: every parameter is on the meta device."""

    @property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return len(self.blocks_of(self.skeleton))

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Give the model's list of blocks.

        Raises:
            UnsupportedModelError: the adapter's path does not lead to a list.
        """
        try:
            blocks = model.get_submodule(self.adapter.blocks_path)
        except AttributeError as error:
            raise self._no_blocks() from error
        if not isinstance(blocks, nn.ModuleList):
            raise self._no_blocks()
        return blocks

    @cached_property
    def record(self) -> ModelRecord:
        """The model as plans and results name it."""
        return ModelRecord(
            id=self.source.id,
            revision=self.source.revision,
            fingerprint=self.source.fingerprint,
            model_type=self.config.model_type,
            family=self.adapter.name,
            blocks=self.block_count,
        )

    @property
    def longest_sequence(self) -> int | None:
        """The most positions the model knows, or None where it sets no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def _no_blocks(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The family {self.adapter.name} says that {self.config.model_type} keeps its blocks at "
            f"{self.adapter.blocks_path}, and there is no list there.",
            hint="Tell the author of the plugin; `sleb plugins` names it.",
        )


def read_architecture(source: ModelSource, registry: Registry, notify: Notify) -> Architecture:
    """Read the config, choose the family, and find the blocks. No weights are read.

    Raises:
        UnsupportedModelError: the model is no decoder, or has no list of blocks that fits its config.
        PluginError: two plugins claim its model_type.
    """
    config = _read_config(source)
    skeleton = _skeleton(config, source)
    adapter = registry.family(config.model_type)
    if adapter is None:
        adapter = _read_structure(config, skeleton)
        notify(
            Notice(
                f"No family claims {config.model_type}: its blocks were found by structure, "
                f"{config.num_hidden_layers} at {adapter.blocks_path}."
            )
        )
    architecture = Architecture(source, config, adapter, skeleton)
    count = _configured_count(config, adapter)
    if count != architecture.block_count:
        raise UnsupportedModelError(
            f"The config of {source.id} says {count} blocks ({adapter.count_key}), the model has "
            f"{architecture.block_count} at {adapter.blocks_path}.",
            hint="sleb removes blocks only where the two agree.",
        )
    return architecture


def _read_config(source: ModelSource) -> Any:
    raw = source.raw_config
    model_type = raw.get("model_type")
    needs_code = "auto_map" in raw and model_type not in CONFIG_MAPPING
    if needs_code and not source.trust_remote_code:
        raise ModelError(
            f"{source.id} brings its own Python code.",
            hint="Read that code, and run it with --trust-remote-code if you trust it.",
        )
    if model_type not in CONFIG_MAPPING and not needs_code:
        raise UnsupportedModelError(
            f"transformers knows no model of type {model_type!r}.",
            hint="Upgrade with `pip install --upgrade transformers`, or check config.json.",
        )
    with transformers_reads(f"the config of {source.id}"):
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source.id} ({model_type}) is an encoder-decoder model.",
            hint="sleb removes blocks from decoder-only language models.",
        )
    encoder_only = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if encoder_only or not (needs_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UnsupportedModelError(
            f"{source.id} ({model_type}) is not a decoder-only language model.",
            hint="sleb needs a model that AutoModelForCausalLM loads and that predicts the next token.",
        )
    return config


def _skeleton(config: Any, source: ModelSource) -> nn.Module:
    with transformers_reads(f"the config of {source.id}"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    return model


def _configured_count(config: Any, adapter: FamilyAdapter) -> int | None:
    count = getattr(config, adapter.count_key, None)
    return count if isinstance(count, int) else None


def _read_structure(config: Any, skeleton: nn.Module) -> FamilyAdapter:
    """Find the one list whose length is the config's count and which holds most of the parameters."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UnsupportedModelError(
            f"The config of {config.model_type} does not say in one number how many blocks the model has.",
            hint="`sleb plugins` lists the families. To add one, see README, 'Write a plugin'.",
        )
    lists = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _same_interface(module)
    }
    if not lists:
        raise UnsupportedModelError(
            f"{config.model_type} has no list of {count} equal blocks to remove from.",
            hint="`sleb plugins` lists the families. To add one, see README, 'Write a plugin'.",
        )
    return FamilyAdapter(
        name=BY_STRUCTURE,
        model_types=frozenset({config.model_type}),
        blocks_path=max(lists, key=lambda path: lists[path]),
        count_key=config.attribute_map.get("num_hidden_layers", "num_hidden_layers"),
        per_block_keys=tuple(key for key, value in config.to_dict().items() if _is_per_block(key, value, count)),
    )


def _same_interface(blocks: nn.ModuleList) -> bool:
    return len({type(block) for block in blocks}) <= 2 and all(
        type(block).forward is not nn.Module.forward for block in blocks
    )


def _is_per_block(key: str, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and ("layer" in key or "block" in key)
