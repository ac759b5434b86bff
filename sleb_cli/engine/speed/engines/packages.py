"""Find the package of an engine, or say how to install it."""

from __future__ import annotations

import importlib
from importlib.metadata import packages_distributions, version
from typing import Any, ClassVar

from sleb_plugins.engine import Engine
from sleb_plugins.errors import MachineError


class PackagedEngine(Engine):
    """An engine in a Python package, which an extra of ours installs.

    Attributes:
        title: what errors call it.
        module: its module.
        extra: the extra.
    """

    title: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str]

    def version(self) -> str:
        """Return the package and its version.

        Raises:
            MachineError: it is not installed.
        """
        self.imported()
        return package_version(self.module)

    def imported(self) -> Any:
        """Return the module.

        Raises:
            MachineError: it is not installed, or does not load on this machine.
        """
        return import_engine(self.module, self.title, self.extra)


def import_engine(module: str, name: str, extra: str) -> Any:
    """Import an engine's module.

    Raises:
        MachineError: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise _broken(name, error) from error
        raise MachineError(f"{name} is not installed.", hint=f"Run `pip install 'sleb[{extra}]'`.") from error
    except (ImportError, OSError, RuntimeError) as error:  # a library that it needs is missing, or for another machine
        raise _broken(name, error) from error


def package_version(module: str) -> str:
    """Return the distribution that a module comes from, with its version: builds for CPUs have names of their own."""
    names = packages_distributions().get(module)
    return f"{names[0]} {version(names[0])}" if names else module


def _broken(name: str, error: Exception) -> MachineError:
    words = str(error).splitlines() or [type(error).__name__]
    return MachineError(
        f"{name} is installed, but does not load: {words[0].rstrip('.')}.", hint="Install it again for this machine."
    )
