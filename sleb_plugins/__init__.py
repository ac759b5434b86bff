"""The public contract of `sleb`: what a plugin imports, and nothing else."""

from sleb_plugins.config_keys import (
    Kept,
    KeyPruner,
    block_numbers,
    by_block,
    keyed_by_block,
    last_block,
    leading_blocks,
    trailing_blocks,
)
from sleb_plugins.engine import Engine, EngineSettings, LoadedModel, TimedRun
from sleb_plugins.errors import (
    DataError,
    MachineError,
    ModelError,
    OutputError,
    PlanError,
    PluginError,
    ProofError,
    SlebError,
    UnsupportedModelError,
    UsageError,
)
from sleb_plugins.exporter import Exporter, Pruning
from sleb_plugins.family import FamilyAdapter
from sleb_plugins.hookspecs import hookimpl
from sleb_plugins.metric import (
    ExpertMetric,
    ExpertUse,
    HiddenStateMetric,
    LogitMetric,
    Metric,
    ModelMetric,
    OutputMetric,
    WeightMetric,
)

__all__ = [
    "DataError",
    "Engine",
    "EngineSettings",
    "ExpertMetric",
    "ExpertUse",
    "Exporter",
    "FamilyAdapter",
    "HiddenStateMetric",
    "Kept",
    "KeyPruner",
    "LoadedModel",
    "LogitMetric",
    "MachineError",
    "Metric",
    "ModelError",
    "ModelMetric",
    "OutputError",
    "OutputMetric",
    "PlanError",
    "PluginError",
    "ProofError",
    "Pruning",
    "SlebError",
    "TimedRun",
    "UnsupportedModelError",
    "UsageError",
    "WeightMetric",
    "block_numbers",
    "by_block",
    "hookimpl",
    "keyed_by_block",
    "last_block",
    "leading_blocks",
    "trailing_blocks",
]
