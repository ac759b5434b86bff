"""The cut of blocks: the settings and tensors of a checkpoint that remain. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import DynamicCache

from sleb_cli.engine.cut.protocol import Cut
from sleb_cli.engine.cut.quantization import ModuleNames
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import BlockNames
from sleb_cli.engine.model.structure import block_changes, outer_changes
from sleb_cli.engine.third_party import translate_errors
from sleb_plugins import ModelError, UnsupportedModelError
from sleb_plugins.config_keys import (
    KEY_PRUNERS,
    KEY_REWRITERS,
    LEADING_INPUTS,
    OBSTACLES,
    PERIOD_KEYS,
    PREDICTION_BLOCKS,
    REDUNDANT,
    Kept,
    by_block,
    kept_blocks,
    means_blocks,
    require_removable,
    sliced_axis,
)


@dataclass(frozen=True)
class BlockCut(Cut):
    """The removal of at least one block.

    Attributes:
        removals: as numbered in the original, in the order of their removal.
    """

    architecture: Architecture
    removals: tuple[int, ...]

    reference = "dense"

    @property
    def description(self) -> str:
        """The parts that go, to be read after "without"."""
        return f"{len(self.removals)} of its {self.architecture.block_count} blocks"

    @cached_property
    def kept(self) -> Kept:
        """The blocks that stay."""
        return kept_blocks(self.architecture.block_count, self.removals)

    @cached_property
    def names(self) -> BlockNames:
        """The names of the blocks, before and after."""
        return self.architecture.block_names(self.kept)

    def tensor(self, name: str) -> tuple[str, Slices | None] | None:
        """Return the new name of a tensor, and of one with a slice for each block, what stays."""
        new = self.names.renamed(name)
        if new is None:
            return None
        axis = sliced_axis(name)
        if axis is None:
            return new, None
        return new, Slices(axis, self.kept.count, self.kept.blocks)

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the config with new counts and settings of blocks; other files name modules."""
        if file == CONFIG:
            key = self.architecture.text_key_in(values)
            if key:
                values = values | {key: self._text_config(values[key])}
            else:
                values = self._text_config(values)
        return ModuleNames(self.architecture, self.names.renamed).settings(file, values)

    def _text_config(self, values: dict[str, Any]) -> dict[str, Any]:
        text = values | self._pruned_settings(values)
        if self.architecture.numbering.extra:
            for key in PREDICTION_BLOCKS:
                if text.get(key):
                    text[key] = 0
        return text

    def _pruned_settings(self, written: dict[str, Any]) -> dict[str, Any]:
        config = self.architecture.text_config
        adapter = self.architecture.adapter
        kept = self.kept
        # As transformers parses it: a pattern that the file leaves to a default or a period becomes
        # an explicit list.
        understood = config.to_dict()
        settings: dict[str, Any] = {}
        for key in dict.fromkeys((*written, *understood)):
            value = understood.get(key, written.get(key))
            pruner = adapter.config_keys.get(key) or KEY_PRUNERS.get(key)
            if pruner is None and means_blocks(key, value, kept.count):
                pruner = by_block
            if pruner is None or value is None or isinstance(value, bool):
                continue
            pruned = pruner(value, kept)
            if key in written or pruned != value or isinstance(value, list):
                settings[key] = pruned
        for key, rewrite in KEY_REWRITERS.items():
            if key in understood and key not in adapter.config_keys:
                every = {name: getattr(config, name, None) for name in (*understood, *written)}
                settings |= rewrite(every, kept)
        settings[adapter.count_key] = len(kept.blocks)
        for alias, name in type(config).attribute_map.items():
            if name == adapter.count_key and alias in written:
                settings[alias] = len(kept.blocks)
        return settings

    @property
    def settings_of_blocks(self) -> list[str]:
        """The settings that would be wrong for some block if only the number of blocks changed."""
        before = self.architecture.text_config.to_dict()
        wrong = []
        for key, after in self._pruned_settings({}).items():
            was = before.get(key)
            is_known = key == self.architecture.adapter.count_key or key in REDUNDANT
            is_shortened = False  # at its end
            if isinstance(was, list | str) and isinstance(after, list | str):
                is_shortened = was[: len(after)] == after
            if not is_known and not is_shortened and was != after:
                wrong.append(key)
        return wrong

    def obstacle(self) -> str | None:
        """Return a clause on the first change that this removal would make to the kept blocks.

        Builds the pruned model without weights, and compares its blocks with the dense model's.
        """
        before = self.architecture
        kept = self.kept
        _ = self.names  # raises here: below, its error would become a clause
        if stated := self._stated_obstacle():
            return stated
        try:
            config = before.read_config(self.settings(CONFIG, before.source.raw_config))
            if changed := _rotary_changes(before.text_config, config.get_text_config(decoder=True)):
                return changed
            blocks, outside = before.structures_of(before.build(config))
        except ModelError as error:
            return error.message.rstrip(".")
        if len(blocks) != len(kept.blocks):
            setting = f"{before.adapter.count_key} {len(kept.blocks)}"
            return f"with {setting} the model has {len(blocks)} blocks"
        were, outside_before = before.structures
        for old, block in zip(kept.blocks, blocks, strict=True):
            if changes := block_changes(were[old], block, old, kept):
                return f"in block {old}, {changes[0]}{self._by_period()}"
        if changes := outer_changes(outside_before, outside, kept):
            return f"outside the blocks, {changes[0]}"
        return None if _cache_fault(before.config) else _cache_fault(config)

    def _stated_obstacle(self) -> str | None:
        config = self.architecture.config
        for key, (applies, why) in OBSTACLES.items():
            if applies(getattr(self.architecture.text_config, key, None) or []):
                return f"{why} ({key})"
        for key, why in LEADING_INPUTS.items():
            configs = (config, getattr(config, "vision_config", None))
            count = max(len(getattr(any_config, key, None) or ()) for any_config in configs)
            if self.kept.blocks[:count] != tuple(range(count)):
                return f"{why.format(count=count)}, counted by number ({key})"
        return None

    def _by_period(self) -> str:
        periods = []
        for key in PERIOD_KEYS:
            value = getattr(self.architecture.text_config, key, None)
            if isinstance(value, int) and value > 1:
                periods.append(f"{key} = {value}")
        return f" (the config sets it by period: {', '.join(periods)})" if periods else ""


def _rotary_changes(before: Any, after: Any) -> str | None:
    old = getattr(before, "rope_parameters", None)
    new = getattr(after, "rope_parameters", None)
    if old == new or not isinstance(old, dict) or not isinstance(new, dict):
        return None
    # By the new keys only, as a kind of block may disappear.
    for key, value in new.items():
        if value != old.get(key):
            return f"its rotary positions would change: {key} {value}, not {old.get(key)}"
    return None


def _cache_fault(config: Any) -> str | None:
    try:  # most caches need at least one attention block
        with translate_errors(
            lambda words: ModelError(f"the KV cache would not work: {words}", hint="")
        ):
            DynamicCache(config=config.get_text_config(decoder=True)).get_mask_sizes(1, 0)
    except ModelError as error:
        return error.message
    return None


def plan_blocks(architecture: Architecture, removals: tuple[int, ...]) -> BlockCut:
    """Plan the removal of at least one block, checked against the model."""
    require_removable(removals, architecture.block_count, architecture.source.id)
    cut = BlockCut(architecture, removals)
    if obstacle := cut.obstacle():
        names = f"block{'s' if len(removals) > 1 else ''} {', '.join(map(str, sorted(removals)))}"
        raise UnsupportedModelError(
            f"Cannot remove {names} from {architecture.source.id} "
            f"({architecture.config.model_type}): {obstacle}.",
            hint=f"Remove other blocks. {architecture.families_hint}",
        )
    return cut
