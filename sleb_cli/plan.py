"""`plan.json`: which blocks to remove, in which order, and everything that decided it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from sleb_cli.records import ModelRecord, Proof, Record
from sleb_plugins.errors import PlanError

SCHEMA_VERSION = 1

MAX_ADDED_REPETITION = 0.2
"""A pruned model that repeats itself by so much more than the dense one is suspected of having collapsed."""

Block = Annotated[int, Field(ge=0)]


Engine = Literal["fork", "prefix", "plain", "weights", "model"]
"""How candidates were scored: all in one walk, each from its block on, each through the whole model, or otherwise."""


Chat = Literal["all", "answers"]
"""Which tokens of conversations count: all, or those that the assistant writes."""

StrategyName = Literal["greedy", "oneshot", "contiguous", "last", "refine", "beam"]
"""How a search goes about it: see `engine/search/strategies.py`."""


_FILE = re.compile(r"\.(txt|jsonl)(:|$)")


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

    @property
    def title(self) -> str:
        """The source as people read it: of a file its name, since where it lies is nobody's business."""
        parts = self.source.split(",")
        return ",".join(part.rpartition("/")[2] if _FILE.search(part) else part for part in parts)

    def __str__(self) -> str:
        counts = {None: "", "all": ", conversations", "answers": ", the answers of conversations"}[self.chat]
        return f"{self.title}: {self.sequences} x {self.sequence_length} tokens{counts}"


TargetName = Literal[
    "ratio",
    "remove",
    "target_params",
    "target_memory",
    "target_speedup",
    "max_loss_increase",
    "max_perplexity_ratio",
]
"""The ways to say how far a search goes."""

Workload = Literal["prompt", "generation"]


class ServingRecord(Record):
    """How a model is to be served, where its memory is the target: the KV cache is of `batch` x `length` tokens."""

    dtype: str
    length: int
    batch: int


class TargetRecord(Record):
    """What the search was to reach, and what it reached, where that was not a number of blocks.

    `limit`, `dense` and `reached` are parameters, bytes, times as fast, nats per token above the dense model, or times
    its perplexity, by `name`. `asked` is what the user wrote. Of a speedup, `predicted` came before the search and
    `reached` was timed after it; of a loss, `next` is what one more removal would have come to.
    """

    name: TargetName
    asked: str
    limit: float
    dense: float
    reached: float
    predicted: float | None = None
    next: float | None = None
    serving: ServingRecord | None = None
    workload: Workload | None = None


class SearchRecord(Record):
    """How the search was run; `engine` is how candidates were scored, with the reason if not the usual way.

    `held_out` of the calibration sequences, a share of `holdout`, were never searched on.
    """

    strategy: StrategyName
    beam_width: int | None = None
    metric: str
    remove: int
    ratio: str | None
    target: TargetRecord | None = None
    protect_first: int
    protect_last: int
    protect: tuple[Block, ...] = ()
    dtype: str
    device: str
    batch_size: int
    fast: bool = False
    holdout: float = 0.0
    held_out: int = 0
    engine: Engine
    engine_reason: str | None


class HeldOutRecord(Record):
    """What a model loses on the sequences that are never searched on: nats per token, and its exponential.

    `generalization_gap` is how much more the loss has grown here than on the sequences searched on,
    `standard_error` its standard error, and `overfits` whether that is more than chance explains.
    """

    loss: float
    perplexity: float
    generalization_gap: float = 0.0
    standard_error: float = 0.0
    overfits: bool = False


class DenseRecord(Record):
    """The unpruned model on the calibration tokens that are searched on: nats per token, and its exponential."""

    loss: float
    perplexity: float
    held_out: HeldOutRecord | None = None


class DropRecord(Record):
    """A candidate that left the race: after how many sequences, how far behind the leader, in how many errors."""

    sequences: int
    behind: float
    errors: float


class RaceRecord(Record):
    """How a step was raced; `margin` is the winner's lead over the next survivor, None where no other survived."""

    margin: float | None
    dropped: dict[Block, DropRecord]


class SwapRecord(Record):
    """Blocks that came back into the model for others that went, and what the whole scored before and after."""

    restored: tuple[Block, ...]
    removed: tuple[Block, ...]
    before: float
    after: float


class Step(Record):
    """One size: the metric's score, and the calibration perplexity, without this and all earlier blocks.

    Where the blocks of this size are not those of the size before and `block`, `removals` names them all, and `block`
    is the last of them. `scores` holds every candidate's for this last place (of spans, by the block that they end
    with); where they raced, every survivor's. All are over all sequences. `kind` says what kind of block went, where
    the model has several. `swaps` led from the blocks that were chosen one by one to these.
    """

    block: Block
    kind: str = ""
    score: float
    perplexity: float
    scores: dict[Block, float]
    race: RaceRecord | None = None
    held_out: HeldOutRecord | None = None
    removals: tuple[Block, ...] | None = None
    swaps: tuple[SwapRecord, ...] = ()


class SampleGeneration(Record):
    """What the dense and the pruned model say after `prompt`, and what share of it says again what was said.

    `new_tokens` is the most that each may say; repetitions are shares of runs of 4 tokens that occurred before.
    """

    prompt: str
    new_tokens: int
    dense: str
    pruned: str
    dense_repetition: float
    pruned_repetition: float

    @property
    def is_repetitive(self) -> bool:
        """Whether the pruned model repeats itself much more than the dense one."""
        return self.pruned_repetition > self.dense_repetition + MAX_ADDED_REPETITION


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


class FitRecord(Record):
    """One fit of a block's weights to what the dense model has `gap` removed blocks later (0: at the same depth).

    `weights` are the modules that were fitted, none where nothing could be; `exact` says whether the block's output
    changes by just what they add. `error_left` is the share of the squared error that is left on held-out text, with
    the `ridge` that leaves least; `loss` is the held-out loss with these values, which stay only if they are `kept`.
    Without a `block`, it is the norm behind the last one.
    """

    block: Block | None
    gap: int
    weights: tuple[str, ...] = ()
    exact: bool = True
    ridge: float | None = None
    error_left: float | None = None
    loss: float
    kept: bool


class ClosedFormRecord(Record):
    """What the fit in closed form did, in order of depth."""

    fits: tuple[FitRecord, ...]


class HealRecord(Record):
    """How the kept blocks were trained to predict as the dense model does; `seconds` include the writing of text.

    What is trained are changes of the matrices, of `rank` or, where that is less, half the matrix's own.
    `losses` are those of the point that was kept, after `kept_tokens`; `stopped` says what ended the training.
    """

    minutes: float | None
    token_budget: int | None
    sequence_length: int
    batch_size: int
    learning_rate: float
    rank: int
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

    `removals` are the blocks of the last step; what goes where fewer are asked for, `first` knows.

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
    sample_generation: SampleGeneration | None = None
    environment: EnvironmentRecord
    recovery: RecoveryRecord | None = None
    proof: Proof | None = None

    @model_validator(mode="after")
    def _agree(self) -> Plan:
        for size, removals in enumerate(self.by_size, start=1):
            if len(removals) != size or removals[-1] != self.steps[size - 1].block:
                raise ValueError(f"step {size} names other blocks than its own, or not so many")
            if len(set(removals)) != size:
                raise ValueError("removals name a block twice")
            if any(block >= self.model.blocks for block in removals):
                raise ValueError(f"removals name a block that a model of {self.model.blocks} blocks does not have")
        if self.removals != ((), *self.by_size)[-1]:
            raise ValueError("removals and steps name different blocks")
        return self

    @property
    def by_size(self) -> tuple[tuple[int, ...], ...]:
        """The blocks that are gone at each size, the smallest first."""
        sizes: list[tuple[int, ...]] = []
        for step in self.steps:
            sizes.append(step.removals or (*((), *sizes)[-1], step.block))
        return tuple(sizes)

    @property
    def nested(self) -> bool:
        """Whether each size has the blocks of the one before, and one more."""
        return all(step.removals is None for step in self.steps)

    def to_data(self) -> dict[str, Any]:
        """Give the plan as JSON holds it; `recovery` and `proof` only where there are any."""
        checkpoints = {"recovery": self.recovery, "proof": self.proof}
        return {key: value for key, value in super().to_data().items() if checkpoints.get(key, True) is not None}

    def first(self, count: int) -> Plan:
        """Give the plan of the search that had stopped after `count` removals; its model was not heard if not now."""
        target = self.search.target if count == len(self.steps) else None
        search = self.search.model_copy(update={"remove": count, "target": target})
        cut = {"removals": ((), *self.by_size)[count], "steps": self.steps[:count], "search": search}
        return self.model_copy(update=cut if count == len(self.removals) else cut | {"sample_generation": None})


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
