"""Errors a user can act on, and the exit code of each class."""

from typing import ClassVar


class SlebError(Exception):
    """A sentence for the person at the keyboard: what happened, and in `hint` what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SlebError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class PlanError(SlebError):
    """A plan is unreadable, from a newer sleb, or was made for another model."""

    exit_code = 3


class ModelError(SlebError):
    """A model cannot be found, read, or run to finite numbers."""

    exit_code = 4


class UnsupportedModelError(ModelError):
    """The model is whole, but is not a decoder whose blocks sleb can remove."""


class DataError(SlebError):
    """A calibration or evaluation text, data set or task is missing, unreadable or too small."""

    exit_code = 5


class PluginError(SlebError):
    """A plugin is missing, broken, or claims a name that another one has."""

    exit_code = 6


class MachineError(SlebError):
    """The machine or the installation lacks something: a device, pip, the package index."""

    exit_code = 7


class OutputError(SlebError):
    """A result cannot be written: it exists, or the place is read-only or full."""

    exit_code = 8


class ProofError(SlebError):
    """A pruned checkpoint did not do what the dense model with these blocks skipped does, and was not delivered."""

    exit_code = 9
