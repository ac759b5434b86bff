"""`plan.json`: which blocks to remove, in which order, and everything that decided it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sleb_cli.records import ModelRecord, Proof, Record
from sleb_plugins.errors import PlanError

SCHEMA_VERSION = 1

Block = Annotated[int, Field(ge=0)]


Engine = Literal["fork", "prefix", "plain", "weights", "model"]
"""How candidates were scored: all in one walk, each from its block on, each through the whole model, or otherwise."""


Chat = Literal["all", "answers"]
"""Which tokens of conversations count: all, or those that the assistant writes."""


class CalibrationRecord(Record):
    """The tokens that decided; `tokens_sha256` is over the ids as little-endian int64.

    `bos` says that every sequence begins with the BOS token; `chat`, that they are conversations, and what counts.
    """

    source: str
    seed: int
    sequences: int
    sequence_length: int
    bos: bool
    chat: Chat | None = None
    tokens_sha256: str

    def __str__(self) -> str:
        counts = {None: "", "all": ", conversations", "answers": ", the answers of conversations"}[self.chat]
        return f"{self.source}: {self.sequences} x {self.sequence_length} tokens{counts}"


class SearchRecord(Record):
    """How the search was run; `engine` is how candidates were scored, with the reason if not the usual way."""

    algorithm: Literal["greedy"]
    metric: str
    remove: int
    ratio: str | None
    protect_first: int
    protect_last: int
    protect: tuple[Block, ...] = ()
    dtype: str
    device: str
    batch_size: int
    fast: bool = False
    engine: Engine
    engine_reason: str | None


class DenseRecord(Record):
    """The unpruned model on the calibration tokens: nats per token, and its exponential."""

    loss: float
    perplexity: float


class DropRecord(Record):
    """A candidate that left the race: after how many sequences, how far behind the leader, in how many errors."""

    sequences: int
    behind: float
    errors: float


class RaceRecord(Record):
    """How a step was raced; `margin` is the winner's lead over the next survivor, None where no other survived."""

    margin: float | None
    dropped: dict[Block, DropRecord]


class Step(Record):
    """One removal: the metric's score, and the calibration perplexity, without this and all earlier blocks.

    `scores` holds every candidate's; where they raced, every survivor's. All are over all sequences. `kind` says what
    kind of block went, where the model has several.
    """

    block: Block
    kind: str = ""
    score: float
    perplexity: float
    scores: dict[Block, float]
    race: RaceRecord | None = None


class EnvironmentRecord(Record):
    """Where and when: the only part that differs between two runs of one search."""

    python: str
    torch: str
    transformers: str
    platform: str
    processor: str
    plugins: dict[str, str]
    started: str
    seconds: float


class LossesRecord(Record):
    """Nats per token on a text, and of divergence from the dense model's distribution (KL, dense to this)."""

    loss: float
    divergence: float


class ClosedFormRecord(Record):
    """What the fit in closed form did."""


class HealRecord(Record):
    """How the kept blocks were trained to predict as the dense model does; `seconds` include the writing of text.

    `losses` are those of the point that was kept, after `kept_tokens`; `stopped` says what ended the training.
    """

    minutes: float | None
    token_budget: int | None
    sequence_length: int
    batch_size: int
    learning_rate: float
    tokens: int
    kept_tokens: int
    steps: int
    seconds: float
    stopped: Literal["budget", "patience"]
    losses: LossesRecord


class RecoveryRecord(Record):
    """What the kept blocks were given back, on which text, and what the model then does on text that was held out.

    `text` is all of it, of which `held_out` sequences were never fitted; `dense`, `pruned`, `closed_form_losses` and
    `heal.losses` are measured on those. What was not asked for is None.
    """

    text: CalibrationRecord
    held_out: int
    dense: LossesRecord
    pruned: LossesRecord
    closed_form: ClosedFormRecord | None = None
    closed_form_losses: LossesRecord | None = None
    heal: HealRecord | None = None

    @property
    def recovered(self) -> LossesRecord:
        """The losses of the model as it is written."""
        return self.heal.losses if self.heal else self.closed_form_losses or self.pruned

    @property
    def share(self) -> float:
        """The share of the nats lost by the removal that came back."""
        lost = self.pruned.loss - self.dense.loss
        return (self.pruned.loss - self.recovered.loss) / lost if lost else 0.0


class Plan(Record):
    """A finished search. Blocks are numbered from 0 as in the original model, everywhere.

    In the copy that a checkpoint carries, `recovery` says what its blocks were given back, and `proof` what was
    checked of it.
    """

    schema_version: Literal[1]
    sleb_version: str
    model: ModelRecord
    calibration: CalibrationRecord
    search: SearchRecord
    dense: DenseRecord
    removals: tuple[Block, ...]
    steps: tuple[Step, ...]
    environment: EnvironmentRecord
    recovery: RecoveryRecord | None = None
    proof: Proof | None = None

    @model_validator(mode="after")
    def _agree(self) -> Plan:
        if list(self.removals) != [step.block for step in self.steps]:
            raise ValueError("removals and steps name different blocks")
        if len(set(self.removals)) != len(self.removals):
            raise ValueError("removals name a block twice")
        if any(block >= self.model.blocks for block in self.removals):
            raise ValueError(f"removals name a block that a model of {self.model.blocks} blocks does not have")
        return self

    def to_data(self) -> dict[str, Any]:
        """Give the plan as JSON holds it; `recovery` and `proof` only where there are any."""
        checkpoints = {"recovery": self.recovery, "proof": self.proof}
        return {key: value for key, value in super().to_data().items() if checkpoints.get(key, True) is not None}

    def first(self, count: int) -> Plan:
        """Give the plan of the search that had stopped after `count` removals: they are nested."""
        search = self.search.model_copy(update={"remove": count})
        cut = {"removals": self.removals[:count], "steps": self.steps[:count], "search": search}
        return self.model_copy(update=cut)


def read_plan(path: Path) -> Plan:
    """Read a plan and check that it is whole and means something to this version.

    Raises:
        PlanError: the file is missing, unreadable, truncated, from a newer sleb, or contradicts itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"There is no plan {path}.", hint="`sleb search MODEL --ratio 0.2` writes one.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PlanError(
            f"Cannot read the plan {path}: {reason}.", hint="Name a plan that `sleb search` wrote."
        ) from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"The plan {path} is not whole JSON: {error.msg} at line {error.lineno}.",
            hint="It may have been cut off while it was copied; copy it again, or search again.",
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise PlanError(f"{path} is not a plan of sleb: it has no schema_version.", hint="`sleb search` writes plans.")
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"The plan {path} has schema_version {version}; this sleb reads up to {SCHEMA_VERSION}.",
            hint="Upgrade with `pip install --upgrade sleb`.",
        )
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the plan"
        raise PlanError(
            f"The plan {path} does not say what a plan must: {where}: {first['msg']}.",
            hint="If you edited it by hand, undo that; otherwise search again.",
        ) from error
