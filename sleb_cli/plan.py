"""`plan.json`: which blocks or experts to remove, in which order, and everything that led to it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from sleb_cli.names import names_beside, public_source
from sleb_cli.order import Order, SizeKey
from sleb_cli.records import (
    ModelRecord,
    OutputKind,
    Perplexity,
    Proof,
    Public,
    Record,
    UnreadableRecord,
    VersionedRecord,
    differences,
)
from sleb_cli.requests import REPEATED_OPTIONS, TARGET_NAMES, Chat, StrategyName, TargetName, Unit
from sleb_cli.units import plural
from sleb_plugins.errors import PlanError, did_you_mean

CHECKPOINT_PLAN = "sleb_plan.json"
"""The file in a checkpoint that holds the plan it was made from."""

Block = Annotated[int, Field(ge=0)]

Method = Literal["fork", "plain", "weights", "model"]
"""How candidates were scored: together in one pass, each in its own pass, by their weights, or as
whole models.
"""


class CalibrationRecord(Record):
    """The calibration tokens; `tokens_sha256` hashes the ids as little-endian int64.

    `bos` says whether every sequence starts with the BOS token; `chat`, which tokens count if they
    are conversations; if it is null, a search counts the answers of those that the model wrote.
    """

    source: Annotated[str, Public(public_source)]
    seed: int
    sequences: int
    sequence_length: int
    bos: bool
    chat: Chat | None = None
    tokens_sha256: str

    @property
    def title(self) -> str:
        """The source for display: local paths by name alone, so that folders stay private."""
        return public_source(self.source)

    def __str__(self) -> str:
        words = f"{self.title}: {self.sequences} x {self.sequence_length} tokens"
        if self.chat == "all":
            words += ", conversations"
        elif self.chat == "answers":
            words += ", the answers of conversations"
        return words


class TargetRecord(Record):
    """The target of the search, if it was not a number of blocks, and what was reached.

    The unit of `limit`, `dense` and `reached` follows from `name`: parameters, bytes, or a multiple
    of the dense model's perplexity. For a perplexity, `next` is the value after one more removal.
    `kv_cache` describes what counts besides the weights for a memory target. `predicted` is null:
    older versions of sleb estimated a speedup in it.
    """

    name: TargetName
    limit: float
    dense: float
    reached: float
    predicted: None = None
    next: float | None = None
    kv_cache: str | None = None


class MetricRecord(Record):
    """What the scores of a metric depend on besides the model and the text.

    `code` is a hash of the files that define its class and its bases, and `fingerprint` what the
    metric itself names.
    """

    package: str
    version: str
    code: str
    fingerprint: str


class SearchRecord(Record):
    """How the search was run; `engine` is how candidates were scored, with a reason if it is not
    the default.

    `implementation` is that of `metric`. `held_out` is the number of calibration sequences never
    searched on, and `holdout` their requested share.
    """

    strategy: StrategyName
    metric: str
    implementation: MetricRecord | None = None
    remove: int
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
    engine: Method
    engine_reason: str | None


class _LossRecord(Record):
    """A loss in nats per token, as a mean over sequences, and its perplexity.

    For a model that only reads, a loss is the distance from what the dense model puts out, and
    there is no perplexity.
    """

    loss: float
    perplexity: Perplexity | None

    @property
    def distance(self) -> float | None:
        """The loss of a model that only reads."""
        return self.loss if self.perplexity is None else None


class HeldOutRecord(_LossRecord):
    """The loss of a model on the held-out sequences.

    `generalization_gap` is how much more the loss grew here than on the sequences searched on,
    `standard_error` its standard error, and `overfits` whether that is more than chance explains.
    """

    generalization_gap: float = 0.0
    standard_error: float = 0.0
    overfits: bool = False


class DenseRecord(_LossRecord):
    """The dense model's loss on the searched sequences."""

    held_out: HeldOutRecord | None = None


class DropRecord(Record):
    """A candidate dropped from a race: after how many sequences, and how far behind, also in
    standard errors.
    """

    sequences: int
    behind: float
    errors: float


class RaceRecord(Record):
    """The race of a step; `margin` is the winner's lead over the next survivor, None if no other
    survived.
    """

    margin: float | None
    dropped: dict[Block, DropRecord]


class SwapRecord(Record):
    """Blocks restored to the model and those removed in their place, with the score before and
    after.
    """

    restored: tuple[Block, ...]
    removed: tuple[Block, ...]
    before: float
    after: float


class Step(Record):
    """One size: the metric's score and the calibration perplexity (of a model that only reads, the
    mean distance from what the dense model puts out) without `block` and all earlier blocks.

    If the removed blocks are not those of the previous size plus `block`, `removals` lists all of
    them, `block` being the last. `scores` has the score of each candidate for that last place (for
    spans, by their last block), or after a race, of each survivor; all are over all sequences. One
    that was not a finite number is null, and counted as the worst. `kind` is the kind of `block`,
    if the model has several. `swaps` lists the swaps that led from the greedily chosen blocks to
    these.
    """

    block: Block
    kind: str = ""
    left_out_if_none = frozenset({"distance"})

    score: float
    perplexity: Perplexity | None
    distance: float | None = None
    scores: dict[Block, float | None]
    race: RaceRecord | None = None
    held_out: HeldOutRecord | None = None
    removals: tuple[Block, ...] | None = None
    swaps: tuple[SwapRecord, ...] = ()


class SampleGeneration(Record):
    """How the dense and the pruned model continue `prompt`, with up to `new_tokens` each.

    A chat model is asked `prompt`, which is then a question, in its chat template.

    The repetitions are the shares of 4-token sequences that occurred before.
    """

    prompt: str
    new_tokens: int
    dense: str
    pruned: str
    dense_repetition: float
    pruned_repetition: float

    @property
    def verb(self) -> str:
        """What both models do with the prompt."""
        return "answer" if self.prompt.endswith("?") else "continue"


class EnvironmentRecord(Record):
    """Where and when the search ran, the last time if it was resumed: besides a timed speedup, all
    that differs between two runs.
    """

    python: str
    torch: str
    transformers: str
    platform: str
    processor: str
    plugins: dict[str, str]
    started: str
    seconds: float


class LossesRecord(Record):
    """The loss on a text, and the KL divergence from the dense model to this one, both in nats per
    token; of a model that only reads, both are the mean distance from what the dense model puts
    out.
    """

    loss: float
    divergence: float

    def left_of(self, pruned: LossesRecord) -> float:
        """Return the share of the pruned model's divergence that is left."""
        return self.divergence / pruned.divergence if pruned.divergence else 0.0


class FitRecord(Record):
    """One fit of a block to the dense model's hidden states behind a gap of `gap` removed blocks.

    The removed blocks follow the block, or precede it if no block before them stays. `weights` are
    the fitted modules, none if nothing could be fitted. `error_left` is the share of the squared
    error left on the validation text, with the `ridge` that leaves the least; with 1, the block
    stays as it was.
    """

    block: Block
    gap: int
    weights: tuple[str, ...] = ()
    ridge: float | None = None
    error_left: float


class ClosedFormRecord(Record):
    """The fits in closed form, in order of depth."""

    fits: tuple[FitRecord, ...]


class HealRecord(Record):
    """How the kept blocks were trained to predict as the dense model does; `seconds` includes
    generating the text.

    Training changes each matrix by one of `rank`, or of half the matrix's own rank if that is
    lower. `rank` is null if all numbers change: of a model that only reads, and of the routers,
    which alone change in a model without some experts. `losses`
    are of the best point, kept after `kept_tokens`; `stopped` says what ended the training.
    """

    minutes: float | None
    token_budget: int | None
    sequence_length: int
    batch_size: int
    learning_rate: float
    rank: int | None
    tokens: int
    kept_tokens: int
    steps: int
    seconds: float
    stopped: Literal["budget", "patience"]
    losses: LossesRecord


class ConversationsRecord(Record):
    """The losses on the answers in `text`: conversations that the model wrote and that were never
    fitted.
    """

    text: CalibrationRecord
    dense: LossesRecord
    pruned: LossesRecord
    closed_form: LossesRecord | None = None
    healed: LossesRecord | None = None


class RecoveryRecord(Record):
    """How the kept blocks were recovered, on which text, and the losses on held-out text.

    Values were fitted to `train_text`; `validation_text` chose ridges, fits and the point that is
    kept; `dense`, `pruned`, `closed_form_losses` and `heal.losses` are measured on `test_text`. No
    document is in two of them. Stages that were not requested are null. `conversations` are
    measured besides, if it is a chat model and wrote some of the text itself.
    """

    train_text: CalibrationRecord
    validation_text: CalibrationRecord
    test_text: CalibrationRecord
    dense: LossesRecord
    pruned: LossesRecord
    closed_form: ClosedFormRecord | None = None
    closed_form_losses: LossesRecord | None = None
    heal: HealRecord | None = None
    conversations: ConversationsRecord | None = None

    @property
    def models(self) -> list[tuple[str, LossesRecord, LossesRecord | None]]:
        """Each measured model, up to the written one, with its losses on both texts."""
        answers = self.conversations
        measured = [
            ("dense", self.dense, getattr(answers, "dense", None)),
            ("pruned", self.pruned, getattr(answers, "pruned", None)),
        ]
        if self.closed_form_losses:
            of_answers = getattr(answers, "closed_form", None)
            measured.append(("recovered in closed form", self.closed_form_losses, of_answers))
        if self.heal:
            name = f"healed on {self.heal.tokens:,} tokens"
            measured.append((name, self.heal.losses, getattr(answers, "healed", None)))
        return measured

    def summaries(self, output: OutputKind | None) -> list[str]:
        """Say what is back on each measured text; on text unlike that of the fit, less is."""
        _, written, on_answers = self.models[-1]
        if output:
            left = written.left_of(self.pruned)
            return [
                f"on {plural(self.test_text.sequences, 'held-out text')} like those of the fit "
                f"({self.test_text.title}), {left:.0%} of the distance from the dense model is left"
            ]
        text = f"on held-out text like that of the fit ({self.test_text})"
        summaries = [f"{text}, {_what_is_back(self.dense, self.pruned, written)}"]
        answers = self.conversations
        if answers and on_answers:
            back = _what_is_back(answers.dense, answers.pruned, on_answers)
            summaries.append(f"on answers in its own conversations, {back}")
        return summaries


def _what_is_back(dense: LossesRecord, pruned: LossesRecord, written: LossesRecord) -> str:
    """Return the share of the lost nats that is back, and the share of the divergence that is left.

    Below the dense model's loss, the model has adapted to the kind of text; that hides no
    divergence.
    """
    lost = pruned.loss - dense.loss
    if lost <= 0:
        nats = "the removal did not raise the loss"
    elif written.loss < dense.loss:
        nats = "all of the lost nats are back, and more, by adapting to the text"
    else:
        nats = f"{(pruned.loss - written.loss) / lost:.0%} of the lost nats are back"
    left = written.left_of(pruned)
    return f"{nats}; {left:.0%} of the divergence from the dense model is left"


class ExpertOrder(Record):
    """The experts of a block that go, in this order; the score of each expert, and how many tokens
    chose it.
    """

    block: Block
    removals: tuple[Annotated[int, Field(ge=0)], ...]
    scores: tuple[float, ...]
    tokens: tuple[int, ...]


class ExpertsText(Record):
    """The losses on a text in nats per token, dense and pruned; no score saw it if it was
    `held_out`.

    `unreached` counts the experts of all blocks that none of its tokens chose, and `kept` is the
    share of the experts' energy, the sum of (gate x norm)^2, that the experts which stay have on
    it.
    """

    text: Annotated[str, Public(public_source)]
    sequences: int
    held_out: bool
    dense: float
    pruned: float
    kept: float
    unreached: int


class ExpertPlan(Record):
    """What a search found of a model's experts: of `count` in each block, `active` for a token, in
    `groups`.

    The pairs tell what the dense and the pruned model have; `active_parameters` are those that a
    token uses.
    """

    count: int
    active: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    blocks: Annotated[tuple[ExpertOrder, ...], Field(min_length=1)]
    texts: tuple[ExpertsText, ...]
    parameters: tuple[int, int]
    active_parameters: tuple[int, int]
    weights_bytes: tuple[int, int]

    @model_validator(mode="after")
    def _require_order(self) -> ExpertPlan:
        if self.count % self.groups:
            raise ValueError(f"{self.count} experts cannot be in {self.groups} groups")
        if not 0 < self.fewer <= self.count - self.active:
            raise ValueError(
                f"{self.fewer} of {self.count} experts go, and a token uses {self.active}"
            )
        for order in self.blocks:
            if len(order.removals) != self.fewer or len(set(order.removals)) != self.fewer:
                raise ValueError(
                    f"block {order.block} names an expert twice, or the wrong number of them"
                )
            counts = {len(order.scores), len(order.tokens)}
            if max(order.removals) >= self.count or counts != {self.count}:
                raise ValueError(
                    f"block {order.block} names other experts than the {self.count} of each block"
                )
        if len(self.removed) != len(self.blocks):
            raise ValueError("a block is named twice")
        return self

    @property
    def fewer(self) -> int:
        """How many experts of each block go."""
        return len(self.blocks[0].removals)

    @property
    def perplexity(self) -> float:
        """The perplexity of the texts that were not held out, without these experts."""
        # A plan as it was found has some, and one of fewer experts has none.
        texts = [text for text in self.texts if not text.held_out]
        loss = sum(text.pruned * text.sequences for text in texts)
        return math.exp(loss / sum(text.sequences for text in texts))

    @property
    def removed(self) -> dict[int, tuple[int, ...]]:
        """The experts that go, by block, in order."""
        return {order.block: order.removals for order in self.blocks}

    @property
    def ranking(self) -> str:
        """A hash of the order of all experts: those that stay follow by score in each group."""
        size = self.count // self.groups
        orders = []
        for order in sorted(self.blocks, key=lambda order: order.block):
            gone = {expert: place for place, expert in enumerate(order.removals)}
            places = []
            for expert, score in enumerate(order.scores):
                places.append((expert // size, gone.get(expert, self.count), score, expert))
            orders.append((order.block, [expert for *_, expert in sorted(places)]))
        return hashlib.sha256(json.dumps(orders).encode()).hexdigest()

    def first(self, count: int) -> ExpertPlan:
        """Return the plan for `count` experts of each block, without measurements."""
        if count == self.fewer:
            return self
        blocks = tuple(
            order.model_copy(update={"removals": order.removals[:count]}) for order in self.blocks
        )
        changes: dict[str, Any] = {"blocks": blocks, "texts": ()}
        for name in ("parameters", "active_parameters", "weights_bytes"):
            was, now = getattr(self, name)
            changes[name] = (was, was - (was - now) * count // self.fewer)
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class _Location:
    """The file of a plan, which is no part of it: what is in two files may be equal."""

    file: Path | None = field(default=None, compare=False)


class Plan(VersionedRecord):
    """A finished search. Blocks are numbered from 0 as in the original model, everywhere.

    A plan removes blocks, or the same number of `experts` from each; then it has no removals and no
    steps.

    `score_unit` is what the metric says that its scores count; older plans lack it. `removals` are
    the blocks of the last step; `first` returns the plan for fewer. `request` has
    the resolved options, with which `sleb search --config plan.json -o again.json` repeats the
    search.

    In the copy inside a checkpoint, `base_model` is what that was made of, if it is not the model
    of the search, `recovery` tells how its blocks were recovered, and `proof` what was checked.
    `checkpoint` is the fingerprint that it had, if only the plan's parts went. That copy may be
    published, so it names local models and texts without their folders.
    """

    left_out_if_none = frozenset(
        {"score_unit", "base_model", "recovery", "proof", "checkpoint", "experts"}
    )

    request: dict[str, str | int | float | bool | tuple[int | str, ...]]
    model: ModelRecord
    calibration: CalibrationRecord
    search: SearchRecord
    score_unit: str | None = None
    dense: DenseRecord
    removals: tuple[Block, ...]
    steps: tuple[Step, ...]
    experts: ExpertPlan | None = None
    sample_generation: SampleGeneration | None = None
    environment: EnvironmentRecord
    base_model: ModelRecord | None = None
    recovery: RecoveryRecord | None = None
    proof: Proof | None = None
    checkpoint: str | None = None
    _location: _Location = PrivateAttr(_Location())

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that took part in the search."""
        ran = self.environment
        versions = {"sleb": self.sleb_version, "torch": ran.torch, "transformers": ran.transformers}
        return versions | {"Python": ran.python, **ran.plugins}

    def __fspath__(self) -> str:
        """Return the plan's file, so that requests take a plan as a path; PlanError if none."""
        file = self._location.file
        if file is not None and read_plan(file) == self:
            return str(file)
        where = f"{file} holds another plan than this one" if file else "This plan is in no file"
        raise PlanError(f"{where}.", hint='Write it first: plan.write(Path("plan.json")).')

    def write(self, path: Path) -> None:
        """Write the plan atomically, and remember where."""
        super().write(path)
        self._location = _Location(path.absolute())

    @model_validator(mode="after")
    def _require_counts(self) -> Plan:
        if others := self.request.keys() - REPEATED_OPTIONS:
            raise ValueError(
                f"request has {min(others)!r}, which is not an option that repeats a search"
            )
        if len(self.steps) > self.model.blocks:
            raise ValueError(
                f"{len(self.steps)} steps are more than the {self.model.blocks} blocks of the model"
            )
        if any((step.held_out is None) != (self.dense.held_out is None) for step in self.steps):
            raise ValueError("some, but not all, of the models were measured on held-out sequences")
        for size, removals in enumerate(() if self.parts else self.size_keys, start=1):
            if len(removals) != size or removals[-1] != self.steps[size - 1].block:
                raise ValueError(f"step {size} names the wrong blocks, or the wrong number of them")
            if len(set(removals)) != size:
                raise ValueError("removals contain a block twice")
            if any(block >= self.model.blocks for block in removals):
                raise ValueError(
                    f"removals contain a block that a model of {self.model.blocks} blocks does not "
                    f"have"
                )
        if self.parts and (
            self.steps
            or self.removals
            or any(order.block >= self.model.blocks for order in self.parts.blocks)
        ):
            raise ValueError("experts are of blocks that the model does not have, or that go")
        if not self.parts and self.removals != self.largest:
            raise ValueError("removals and steps do not name the same blocks")
        return self

    @property
    def made_for(self) -> ModelRecord:
        """The model that the parts are removed from."""
        return self.base_model or self.model

    @property
    def unit(self) -> Unit:
        """What goes: blocks, or experts of each block."""
        return "experts" if self.experts else "blocks"

    @property
    def parts(self) -> ExpertPlan | None:
        """What the search found of the parts of each block; None if whole blocks go."""
        return self.experts

    @property
    def order(self) -> Order:
        """What goes at each size."""
        if self.parts is None:
            return Order(self.unit, self.model.blocks, self.size_keys)
        return Order(
            self.unit,
            self.parts.count,
            self.size_keys,
            removed=self.parts.removed,
            multiple=self.parts.groups,
            ranking=self.parts.ranking,
        )

    @property
    def largest(self) -> SizeKey:
        """The key of the largest size."""
        return self.size_keys[-1] if self.size_keys else ()

    @property
    def perplexity(self) -> float | None:
        """The perplexity of the calibration text at the last size; None of a model that reads."""
        if self.parts is None:
            return self.steps[-1].perplexity if self.steps else self.dense.perplexity
        return self.parts.perplexity

    @property
    def size_keys(self) -> tuple[SizeKey, ...]:
        """The key of each size, fewest removals first."""
        if self.parts:
            return tuple(tuple(range(count)) for count in range(1, self.parts.fewer + 1))
        sizes: list[SizeKey] = []
        removed: SizeKey = ()
        for step in self.steps:
            removed = step.removals or (*removed, step.block)
            sizes.append(removed)
        return tuple(sizes)

    @property
    def nested(self) -> bool:
        """Whether each size removes the blocks of the previous size and one more."""
        return all(step.removals is None for step in self.steps)

    def first(self, count: int) -> Plan:
        """Return the plan as if its search had stopped after `count` removals.

        The sample generation is kept only for all.
        """
        if count == len(self.largest):
            return self
        targets = {*TARGET_NAMES, "serve_length"}
        request = {name: value for name, value in self.request.items() if name not in targets}
        cut = {
            "request": {**request, "remove": count},
            "search": self.search.model_copy(update={"remove": count, "target": None}),
            "sample_generation": None,
        }
        if self.parts:
            cut[self.unit] = self.parts.first(count)
        else:
            cut["removals"] = self.size_keys[count - 1] if count else ()
            cut["steps"] = self.steps[:count]
        return self.model_copy(update=cut)

    def published(self) -> Self:
        """Return the plan as a checkpoint holds it."""
        plan = super().published()
        request = self.request | {"calibration": plan.calibration.source}
        if plan.model.id != self.model.id:
            request.pop("model", None)  # the name of a folder must not lead to the Hub
        return plan.model_copy(update={"request": request})


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and check that it is complete and consistent.

    Raises:
        PlanError: the file is missing, cannot be read, is not a plan, or was written by another
            version of sleb.
    """
    path = Path(path)
    try:
        plan = Plan.read(path, "the plan")
    except FileNotFoundError as error:
        raise no_plan(path) from error
    except UnreadableRecord as error:
        raise PlanError(
            f"Cannot read the plan {path}: {error}.",
            hint="If a newer sleb wrote it, upgrade. If it was edited or cut off, restore it; "
            "otherwise search again.",
        ) from error
    plan._location = _Location(path.absolute())
    return plan


def no_plan(path: Path) -> PlanError:
    """Return the error for a plan that is not there, with the name that is closest to it."""
    hint = did_you_mean(
        path.name,
        names_beside(str(path), "*.json"),
        otherwise="`sleb search MODEL --ratio 0.2` writes one.",
    )
    return PlanError(f"There is no plan {path}.", hint=hint)


def compare_plans(before: Plan, after: Plan) -> str:
    """Say whether a repeated search found what `before` holds, and what else differs."""
    outcome = f"the same {after.unit}, in the same order"
    sizes = zip_longest(_sizes(before), _sizes(after))
    for size, (old, new) in enumerate(sizes, start=1):
        if old != new:
            outcome = f"other {after.unit} from step {size} on"
            break
    change = max(_changes(before, after))
    scores = f"scores differ by at most {change:.2g}" if change else "all scores are identical"
    said = f"The search found {outcome}; {scores}."
    differing = differences(_circumstances(after), _circumstances(before))
    return f"{said} Also different: {differing}." if differing else said


def _sizes(plan: Plan) -> list[Any]:
    """List what goes at each size."""
    order = plan.order
    return [order.by_size(size) for size in range(1, len(order.size_keys) + 1)]


def _changes(before: Plan, after: Plan) -> list[float]:
    """Return how far losses and scores differ, as long as the same blocks are gone."""
    changes = [abs(before.dense.loss - after.dense.loss)]
    for old, new in zip(before.steps, after.steps, strict=False):
        for block, score in old.scores.items():
            again = new.scores.get(block)
            if score is not None and again is not None:
                changes.append(abs(score - again))
        if (old.block, old.removals) != (new.block, new.removals):
            break
    if before.parts and after.parts:
        for old_text, new_text in zip(before.parts.texts, after.parts.texts, strict=False):
            changes.append(abs(old_text.pruned - new_text.pruned))
    return changes


def _circumstances(plan: Plan) -> dict[str, Any]:
    """List the settings that can change what a repeated search finds."""
    return {
        "options": plan.request,
        "weights": plan.model.fingerprint[:12],
        "tokens": plan.calibration.tokens_sha256[:12],
        "sleb": plan.sleb_version,
        **plan.environment.model_dump(exclude={"started", "seconds"}),
    }
