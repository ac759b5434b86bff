"""The cut of blocks: which settings and tensors of a checkpoint remain, under which names? No
weight is read.
"""

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
    OTHER_TEXT_KEYS,
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
        """Return the new name of a tensor, and the slices that stay of one with a slice for each
        block.
        """
        new, axis = self.names.renamed(name), sliced_axis(name)
        slices = None if axis is None else Slices(axis, self.kept.count, self.kept.blocks)
        return None if new is None else (new, slices)

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the config with new counts and new values of settings of blocks; other files name
        modules.
        """
        modules = ModuleNames(self.architecture, self.names.renamed)
        return modules.settings(file, self._config(values) if file == CONFIG else values)

    def _config(self, values: dict[str, Any]) -> dict[str, Any]:
        raw = dict(values)
        # Early configs of multimodal models have the language model's settings elsewhere, or among
        # their own.
        keys = (self.architecture.text_key, *OTHER_TEXT_KEYS) if self.architecture.text_key else ()
        inner = next((key for key in keys if isinstance(raw.get(key), dict)), "")
        text = dict(raw[inner]) if inner else raw
        text |= self._pruned_settings(text)
        if self.architecture.numbering.extra:
            text |= {key: 0 for key in PREDICTION_BLOCKS if text.get(key)}
        return raw | {inner: text} if inner else text

    def _pruned_settings(self, written: dict[str, Any]) -> dict[str, Any]:
        config, adapter, kept = self.architecture.text_config, self.architecture.adapter, self.kept
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
                settings |= rewrite(
                    {name: getattr(config, name, None) for name in (*understood, *written)}, kept
                )
        aliases = [
            alias for alias, name in type(config).attribute_map.items() if name == adapter.count_key
        ]
        counts = [adapter.count_key, *(alias for alias in aliases if alias in written)]
        return settings | dict.fromkeys(counts, len(kept.blocks))

    @property
    def settings_of_blocks(self) -> list[str]:
        """The settings that would be wrong for some block if only the number of blocks changed."""
        before, known = (
            self.architecture.text_config.to_dict(),
            {self.architecture.adapter.count_key, *REDUNDANT},
        )

        def is_shortened(was: object, after: object) -> bool:
            return (
                isinstance(was, list | str)
                and isinstance(after, list | str)
                and was[: len(after)] == after
            )

        return [
            key
            for key, after in self._pruned_settings({}).items()
            if key not in known
            and before.get(key) != after
            and not is_shortened(before.get(key), after)
        ]

    def obstacle(self) -> str | None:
        """Return a clause on the first change that this removal would make to the kept blocks, or
        None.

        Builds the pruned model without weights, and compares its blocks with the dense model's.
        """
        before, kept = self.architecture, self.kept
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
            return f"with {before.adapter.count_key} {len(kept.blocks)} the model has {len(blocks)} blocks"
        were, outside_before = before.structures
        for old, block in zip(kept.blocks, blocks, strict=True):
            if changes := block_changes(were[old], block, old, kept):
                return f"in block {old}, {changes[0]}{self._by_period()}"
        if changes := outer_changes(outside_before, outside, kept):
            return f"outside the blocks, {changes[0]}"
        return None if _cache_fault(before.config) else _cache_fault(config)

    def _stated_obstacle(self) -> str | None:
        config, kept = self.architecture.config, self.kept
        for key, (applies, why) in OBSTACLES.items():
            if applies(getattr(self.architecture.text_config, key, None) or []):
                return f"{why} ({key})"
        for key, why in LEADING_INPUTS.items():
            configs = (config, getattr(config, "vision_config", None))
            count = max(len(getattr(any_config, key, None) or ()) for any_config in configs)
            if kept.blocks[:count] != tuple(range(count)):
                return f"{why.format(count=count)}, counted by number ({key})"
        return None

    def _by_period(self) -> str:
        config = self.architecture.text_config
        values = {key: getattr(config, key, None) for key in PERIOD_KEYS}
        periods = [
            f"{key} = {value}"
            for key, value in values.items()
            if isinstance(value, int) and value > 1
        ]
        return f" (the config sets it by period: {', '.join(periods)})" if periods else ""


def _rotary_changes(before: Any, after: Any) -> str | None:
    old, new = (getattr(config, "rope_parameters", None) for config in (before, after))
    if old == new or not isinstance(old, dict) or not isinstance(new, dict):
        return None
    # By the new keys only, as a kind of block may disappear.
    changed = next((key for key in new if new[key] != old.get(key)), None)
    return (
        changed
        and f"its rotary positions would change: {changed} {new[changed]}, not {old.get(changed)}"
    )


def _cache_fault(config: Any) -> str | None:
    try:  # most caches need at least one attention block
        with translate_errors(
            lambda words: ModelError(f"the KV cache would not work: {words}", hint="")
        ):
            DynamicCache(config=config.get_text_config(decoder=True)).get_seq_length()
    except ModelError as error:
        return error.message
    return None


def plan_blocks(architecture: Architecture, removals: tuple[int, ...]) -> BlockCut:
    """Plan the removal of at least one block, checked against the model."""
    require_removable(removals, architecture.block_count, architecture.source.id)
    cut = BlockCut(architecture, removals)
    if obstacle := cut.obstacle():
        names = (
            f"block {removals[0]}"
            if len(removals) == 1
            else f"blocks {', '.join(map(str, sorted(removals)))}"
        )
        raise UnsupportedModelError(
            f"Cannot remove {names} from {architecture.source.id} "
            f"({architecture.config.model_type}): {obstacle}.",
            hint=f"Remove other blocks. {architecture.families_hint}",
        )
    return cut
