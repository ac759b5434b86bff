"""Find the package of an engine, or say how to install it."""

from __future__ import annotations

import importlib
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any, ClassVar

from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins.engine import Engine
from sleb_plugins.errors import MachineError


class PackagedEngine(Engine):
    """An engine in a Python package, which an extra of ours installs; errors call it `title`."""

    title: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str]

    def version(self) -> str:
        """Return the distribution and its version; builds for CPUs have names of their own."""
        self.imported()
        names = packages_distributions().get(self.module)
        return f"{names[0]} {version(names[0])}" if names else self.module

    def imported(self) -> Any:
        """Return the module, or say how to install it."""
        if find_spec(self.module) is None:
            raise MachineError(
                f"{self.title} is not installed.", hint=f"Run `pip install 'sleb[{self.extra}]'`."
            )
        failed = f"{self.title} is installed, but does not load"
        with translate_errors(error_saying(MachineError, failed, "Reinstall it for this machine.")):
            return importlib.import_module(self.module)
