"""Fewer experts for each token: one setting changes, and no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sleb_cli.engine.cut.protocol import Cut, GgufCut, Removal
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.gguf.file import GgufFile
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.expert_settings import (
    ACTIVE,
    Key,
    build_with_setting,
    integer_settings,
    with_setting,
)
from sleb_cli.engine.model.structure import tensor_shapes
from sleb_cli.results import PerTokenRecord
from sleb_cli.units import plural
from sleb_plugins import UnsupportedModelError, UsageError


@dataclass(frozen=True)
class ActiveRemoval(Removal):
    """The number of experts that a token used before, and uses now."""

    before: int
    after: int

    @property
    def size_key(self) -> tuple[int, ...]:
        """(0, ..., n-1), if a token uses n experts fewer."""
        return tuple(range(self.before - self.after))

    @property
    def name_parts(self) -> tuple[str, ...]:
        """The words that it adds to the name of a checkpoint."""
        return (f"{self.after}-experts-per-token",)

    def record(self, sizes: Mapping[str, tuple[int, int]]) -> Mapping[str, PerTokenRecord]:
        """Return both numbers."""
        return {"experts_per_token": PerTokenRecord(experts=(self.before, self.after))}


@dataclass(frozen=True)
class ActiveCut(ActiveRemoval, Cut):
    """Fewer experts for each token of a checkpoint.

    Attributes:
        key: the setting; in some families, in a dictionary of the language model's config.
        copies: its values in modules, by path and attribute; other modules read the config as they
            run.
    """

    architecture: Architecture
    key: tuple[str, ...]
    copies: Mapping[tuple[str, str], int]

    reference = "fewer experts per token"

    @property
    def description(self) -> str:
        """The parts that go, to be read after "without"."""
        return f"{self.before - self.after} of the {self.before} experts that a token uses"

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the config with the new number."""
        if file != CONFIG:
            return values
        return with_setting(self.architecture, values, self.key, self.after)

    @contextmanager
    def simulate(self, dense: Any) -> Iterator[None]:
        """Have the modules of the dense model hold the new number."""
        with ExitStack() as stack:
            for (path, name), value in self.copies.items():
                stack.enter_context(mock.patch.object(dense.get_submodule(path), name, value))
            if len(self.key) == 1:
                stack.enter_context(
                    mock.patch.object(dense.config.get_text_config(), self.key[0], self.after)
                )
            yield


@dataclass(frozen=True)
class GgufActiveCut(ActiveRemoval, GgufCut):
    """Fewer experts for each token of a GGUF file."""

    def for_model(self, architecture: Architecture) -> ActiveCut:
        """Return this change of the model that transformers reads in the file."""
        return plan_active(architecture, self.after)

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header with the new number."""
        return file.with_count("expert_used_count", self.after)


def plan_active(architecture: Architecture, after: int) -> ActiveCut:
    """Plan the change of the setting to this number."""
    settings = integer_settings(architecture.text_config.to_dict())
    key: Key = ()
    before = 0
    for path, number in settings.items():
        if path[-1] in ACTIVE:
            key = path
            before = number
            break
    if after >= before:
        raise _none_to_spare(architecture.source.id, before, after)
    fewer = build_with_setting(architecture, key, after)
    if tensor_shapes(architecture.skeleton) != tensor_shapes(fewer):
        raise UnsupportedModelError(
            f"{architecture.source.id} has weights whose shapes follow from how many experts a "
            f"token uses.",
            hint="Leave out --experts-per-token.",
        )
    copies = {}
    for path, module in fewer.named_modules():
        before_there = vars(architecture.skeleton.get_submodule(path))
        for name, value in vars(module).items():
            if type(value) is int and before_there.get(name) != value:
                copies[path, name] = value
    return ActiveCut(before, after, architecture, key, copies)


def plan_gguf_active(file: GgufFile, after: int) -> GgufActiveCut:
    """Plan the change of a GGUF file's setting to this number."""
    before = file.count("expert_used_count") or 0
    if after >= before:
        raise _none_to_spare(str(file.path), before, after)
    return GgufActiveCut(before, after)


def _none_to_spare(model: str, before: int, after: int) -> UsageError:
    if not before:
        return UsageError(
            f"{model} is dense: its tokens choose no experts.",
            hint="Leave out --experts-per-token.",
        )
    return UsageError(
        f"A token of {model} uses {plural(before, 'expert')}, so --experts-per-token {after} "
        f"spares none.",
        hint=f"Use {before - 1} or less." if before > 1 else "Leave it out.",
    )
