"""Fewer experts for each token: one setting of a checkpoint or a GGUF file, and no tensor changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import nn

from sleb_cli.engine.cut.experts.experts import ACTIVE, built_with, settings_of, with_setting
from sleb_cli.engine.cut.protocol import Cut, GgufCut, Removal
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.gguf.file import GgufFile, with_value
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.results import PerTokenRecord
from sleb_cli.units import plural
from sleb_plugins import UsageError


@dataclass(frozen=True)
class ActiveRemoval(Removal):
    """How many experts a token used before, and uses now."""

    before: int
    after: int

    @property
    def steps(self) -> tuple[int, ...]:
        """As many as are not used any more."""
        return tuple(range(self.before - self.after))

    @property
    def name_parts(self) -> tuple[str, ...]:
        """What it adds to the name of a checkpoint."""
        return (f"{self.after}-experts-per-token",)

    def record(self, sizes: Mapping[str, tuple[int, int]]) -> Mapping[str, PerTokenRecord]:
        """Return both numbers."""
        return {"experts_per_token": PerTokenRecord(experts=(self.before, self.after))}


@dataclass(frozen=True)
class ActiveCut(ActiveRemoval, Cut):
    """The same in a checkpoint.

    Attributes:
        key: the setting, in some families in a dictionary of the language model's config.
        held: what modules hold of it, by their names and attributes.
    """

    architecture: Architecture
    key: tuple[str, ...]
    held: Mapping[tuple[str, str], int]

    reference = "fewer experts per token"

    @property
    def what(self) -> str:
        """What goes, after "without"."""
        return f"{self.before - self.after} of the {self.before} experts that a token uses"

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the config with the new number."""
        return values if file != CONFIG else with_setting(self.architecture, values, self.key, self.after)

    @contextmanager
    def absent(self, dense: nn.Module) -> Iterator[None]:
        """Have the modules of the dense model hold the new number."""
        with ExitStack() as stack:
            for (path, name), value in self.held.items():
                stack.enter_context(mock.patch.object(dense.get_submodule(path), name, value))
            yield


@dataclass(frozen=True)
class GgufActiveCut(ActiveRemoval, GgufCut):
    """The same in a GGUF file."""

    def of_model(self, architecture: Architecture) -> ActiveCut:
        """Return the same of the model that transformers reads in the file."""
        return plan_active(architecture, self.after)

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header with the new number."""
        key = f"{file.architecture}.expert_used_count"
        entries = (with_value(entry, self.after) if entry.key == key else entry for entry in file.entries)
        return replace(file, entries=tuple(entries))


def plan_active(architecture: Architecture, after: int) -> ActiveCut:
    """Return the change of the setting to this number.

    Raises:
        UsageError: tokens do not use more experts than that.
    """
    found = [each for each in settings_of(architecture.text_config.to_dict()) if each[0][-1] in ACTIVE]
    for key, before in found:
        if after < before and (held := _held(architecture, built_with(architecture, key, after))):
            return ActiveCut(before, after, architecture, key, held)
    raise _none_to_spare(architecture.source.id, found[0][1] if found else 0, after)


def _held(architecture: Architecture, other: nn.Module) -> dict[tuple[str, str], int]:
    """Return the numbers that modules of another model hold, where they are not those of this one."""
    modules = dict(architecture.skeleton.named_modules())
    return {
        (path, name): value
        for path, module in other.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and vars(modules[path]).get(name) != value
    }


def plan_gguf_active(file: GgufFile, after: int) -> GgufActiveCut:
    """Return the same for a GGUF file.

    Raises:
        UsageError: tokens do not use more experts than that.
    """
    before = file.count("expert_used_count") or 0
    if after >= before:
        raise _none_to_spare(str(file.path), before, after)
    return GgufActiveCut(before, after)


def _none_to_spare(model: str, before: int, after: int) -> UsageError:
    return UsageError(
        f"A token of {model} uses {plural(before, 'expert')}, so --experts-per-token {after} spares none.",
        hint=f"Use {before - 1} or less." if before > 1 else "Leave it out.",
    )
