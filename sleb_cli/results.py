"""What `sleb apply`, `export`, `eval` and `bench` report: the numbers, and the raw samples behind
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, Field

from sleb_cli.keys import Key, key_of
from sleb_cli.names import public_command, public_source, without_folders
from sleb_cli.order import BLOCKS, PER_TOKEN, Order, SizeKey
from sleb_cli.plan import RecoveryRecord
from sleb_cli.records import Check, ModelRecord, Perplexity, Proof, Public, Record, VersionedRecord
from sleb_cli.requests import WorkloadName
from sleb_cli.units import format_bytes


class PartSizes(Record):
    """What sizes count that are not of blocks: how many fewer of `count`, of this `unit`.

    Of each block, they go in the order whose hash is `ranking`; if it is null, none goes, and a
    token uses fewer. `unit` is null in older results, which are of experts.
    """

    unit: str | None = None
    count: int
    ranking: str | None = None


def part_sizes(order: Order) -> PartSizes | None:
    """Say what sizes count; None if they count blocks."""
    if order.whole_blocks:
        return None
    return PartSizes(unit=order.unit, count=order.count, ranking=order.ranking)


class ResultRecord(VersionedRecord):
    """What evaluations and benchmarks share: the model, and where and by what it ran.

    If `parts` is there, it says what the numbers in `sizes` and `removals` count; older results
    call it `experts`. `plugins` has the version of each other package that took part.
    """

    left_out_if_none = frozenset({"parts"})

    model: ModelRecord
    parts: PartSizes | None = Field(None, validation_alias=AliasChoices("parts", "experts"))
    dtype: str
    device: str
    processor: str
    torch: str
    transformers: str
    plugins: dict[str, str] = Field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that took part."""
        return {
            "sleb": self.sleb_version,
            "torch": self.torch,
            "transformers": self.transformers,
            **self.plugins,
        }

    @property
    def order(self) -> Order:
        """What goes of the model."""
        parts = self.parts
        if parts is None:
            return Order(BLOCKS, self.model.blocks)
        older = "experts" if parts.ranking else PER_TOKEN
        return Order(parts.unit or older, parts.count, ranking=parts.ranking)

    @property
    def key(self) -> Key:
        """Results that share it are merged."""
        return key_of(
            {name: getattr(self.model, name) for name in ("fingerprint", "code", "family")},
            dtype=self.dtype,
            device=self.device,
            versions=self.versions,
            **self.depends,
        )

    @property
    def depends(self) -> dict[str, Any]:
        """The rest of the key."""
        return {"processor": self.processor, "parts": self.parts and self.parts.to_data()}


class CutRecord(Record):
    """What went of a model besides blocks, titled for cards and screens."""

    title: ClassVar[str]

    @property
    def change(self) -> str:
        """A clause on it."""
        raise NotImplementedError


class VocabularyRecord(CutRecord):
    """The scripts whose tokens stayed, and how many tokens, parameters and bytes the model had
    before, and has now.
    """

    title = "Vocabulary"

    scripts: tuple[str, ...]
    tokens: tuple[int, int]
    parameters: tuple[int, int]
    weights_bytes: tuple[int, int]

    @property
    def change(self) -> str:
        """What went with the tokens, and any blocks: "only latin; tokens 49,152 to 30,000; …"."""
        tokens = "{:,} to {:,}".format(*self.tokens)
        return f"only {', '.join(self.scripts)}; tokens {tokens}; {_smaller(self)}"


class ExpertsRecord(CutRecord):
    """How many experts each block had before, and has now, and the same of the model's parameters
    and bytes.
    """

    title = "Experts"

    experts: tuple[int, int]
    parameters: tuple[int, int]
    weights_bytes: tuple[int, int]

    @property
    def change(self) -> str:
        """What went: "128 to 96 in each block; parameters …"."""
        return f"{self.experts[0]} to {self.experts[1]} in each block; {_smaller(self)}"


def _smaller(cut: VocabularyRecord | ExpertsRecord) -> str:
    parameters = "{:,} to {:,}".format(*cut.parameters)
    return f"parameters {parameters}; {' to '.join(map(format_bytes, cut.weights_bytes))}"


class PerTokenRecord(CutRecord):
    """How many experts a token used before, and uses now."""

    title = "Experts per token"

    experts: tuple[int, int]

    @property
    def change(self) -> str:
        """What changed: "8 to 4"."""
        return "{} to {}".format(*self.experts)


class WrittenResult(VersionedRecord):
    """A model that was written without some of its parts; what went besides blocks has a field for
    each kind.
    """

    left_out_if_none = frozenset({"experts", "experts_per_token"})

    @property
    def path(self) -> Path:
        """The folder or file that was written."""
        raise NotImplementedError

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was proven, if it was."""
        return next((value.checks for _, value in self if isinstance(value, Proof)), ())

    @property
    def cuts(self) -> list[CutRecord]:
        """What went besides blocks."""
        return [value for _, value in self if isinstance(value, CutRecord)]


class ApplyResult(WrittenResult):
    """A written checkpoint. `proof` is null if it was skipped.

    `vocabulary` tells which tokens stayed, if not all, `experts` how many experts,
    `experts_per_token` how many a token uses, if fewer, and `recovery` how its blocks were
    recovered, if they were.
    """

    kind: Literal["apply"]
    model: ModelRecord
    folder: str
    removals: SizeKey
    blocks: int
    weights_bytes: int
    vocabulary: VocabularyRecord | None = None
    experts: ExpertsRecord | None = None
    experts_per_token: PerTokenRecord | None = None
    recovery: RecoveryRecord | None
    proof: Proof | None

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)


class GgufResult(WrittenResult):
    """A pruned GGUF file; if `verified`, its tensors were compared byte for byte with the source.

    `proof` is by transformers; if it is null, `unproven` says why.
    """

    kind: Literal["gguf"]
    source: str
    architecture: str
    removals: SizeKey
    file: str
    blocks: int
    file_bytes: int
    verified: bool
    vocabulary: VocabularyRecord | None = None
    experts: ExpertsRecord | None = None
    experts_per_token: PerTokenRecord | None = None
    proof: Proof | None
    unproven: str | None

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.file)


class ExportResult(VersionedRecord):
    """A `text` for another tool or a reader, or the `file` that it was written to."""

    kind: Literal["export"]
    exporter: str
    text: str | None
    file: str | None


class Interval(Record):
    """A 95% confidence interval."""

    low: float
    high: float


Bos = Literal["none", "text", "windows"]
"""What begins with the BOS token: nothing, the text as a whole, or every window."""


class TextScores(Record):
    """How well a model predicts a text; `losses` has the mean of each window, in nats per token."""

    perplexity: Perplexity
    losses: tuple[float, ...]


class DivergenceRecord(Record):
    """How far a model's predictions are from the dense model's: KL(dense || pruned), in nats.

    `probability_change_rms` is the root mean square of the change of the right token's probability,
    and `same_top` the share of positions with the same first choice. `accepted` is the share of
    sampled tokens that the dense model keeps if the pruned one drafts for it: the mean of the sum
    of min(p, q) (Leviathan et al., arXiv 2211.17192, section 3).
    """

    mean: float
    standard_error: float | None
    median: float
    p90: float
    p99: float
    maximum: float
    probability_change_rms: float
    same_top: float
    accepted: float


class PrunedTextScores(TextScores):
    """The scores without `removals`, and how they differ from the dense model's on the same tokens.

    `log_ratio` is ln(pruned perplexity / dense perplexity), in nats per token, and `interval` its
    95% interval; its standard error takes a document or a window as one observation.
    """

    removals: SizeKey
    log_ratio: float
    standard_error: float | None
    interval: Interval | None
    divergence: DivergenceRecord


ClusteredBy = Literal["documents", "windows", "conversations"]


class TextResult(Record):
    """One text on the dense and each pruned model.

    `tokens` counts what is predicted, and `clusters` the observations behind each standard error,
    which are `clustered_by` documents or windows, or by conversations, of which only the answers
    are predicted. `clusters_sha256` hashes which tokens count, and the cluster of each.
    """

    text: Annotated[str, Public(public_source)]
    windows: int
    sequence_length: int
    bos: Bos
    tokens: int
    clusters: int
    clustered_by: ClusteredBy
    tokens_sha256: str
    clusters_sha256: str | None = None
    dense: TextScores
    pruned: tuple[PrunedTextScores, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two results of a text comparable: all but the scores."""
        return tuple(value for name, value in self if name not in ("dense", "pruned"))


class TaskScores(Record):
    """One metric of a task on one model: `value` as lm-eval reports it, and the score of each item
    in `items`.

    `interval` is Wilson's where each item is right or wrong, else normal; null if lm-eval reports
    no error.
    """

    value: float
    stderr: float | None
    interval: Interval | None
    items: tuple[float, ...]


class FlipRecord(Record):
    """An item that only one model gets right, and what each answered."""

    doc_id: int
    prompt: str
    target: str
    dense: str
    pruned: str


class PrunedTaskScores(TaskScores):
    """The scores without `removals`, and how they differ from the dense model's on the same items.

    `retention` is pruned / dense (null if dense is 0). `lost` items went from right to wrong,
    `gained` ones from wrong to right; with `mcnemar_p`, the exact McNemar test, they are null where
    items are not right or wrong. `items_needed` is how many items would show a difference of one
    point. `flips` are those asked for.
    """

    removals: SizeKey
    retention: float | None
    difference: float
    standard_error: float | None
    difference_interval: Interval | None
    mcnemar_p: float | None
    lost: int | None
    gained: int | None
    items_needed: int | None
    flips: tuple[FlipRecord, ...] = ()


Use = Literal["choosing", "programs", "writing"]
"""What the items of a task ask for: to choose an answer, to write a program that runs, or to write.
"""


class TaskResult(Record):
    """One metric of one lm-eval task on the dense and each pruned model.

    Items are matched by `doc_ids`, and `items_sha256` is a hash over lm-eval's hashes of their
    documents, prompts and targets. A group has no items of its own. `chat` tells whether prompts
    were in the chat template. `fingerprint` is a hash of what the scores depend on besides the
    model; `use` is null if it is unknown. `limit` is how many items were asked for, null for all,
    and `lm_eval` the version that ran them.
    """

    task: str
    metric: str
    filter: str
    version: str
    num_fewshot: int
    chat: bool = False
    higher_is_better: bool
    doc_ids: tuple[int, ...]
    items_sha256: str | None
    fingerprint: str | None = None
    use: Use | None = None
    limit: int | None = None
    lm_eval: str | None = None
    dense: TaskScores
    pruned: tuple[PrunedTaskScores, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two results of a task comparable."""
        others = ("higher_is_better", "fingerprint", "use", "limit", "lm_eval", "dense", "pruned")
        return tuple(value for name, value in self if name not in others)


class CorpusResult(Record):
    """One measure of a corpus on the dense and each pruned model, which only read.

    Items are queries, or texts that ask each other, or what is classified. `prompts` are what the
    queries and then the texts begin with; `sha256` hashes the tokens and all that is known of them.
    """

    corpus: str
    measure: str
    texts: int
    queries: int
    sequence_length: int
    prompts: tuple[str, ...]
    sha256: str
    dense: TaskScores
    pruned: tuple[PrunedTaskScores, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two results of a corpus comparable: all but the scores."""
        return tuple(value for name, value in self if name not in ("dense", "pruned"))


_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "em")
"""Where a task has several metrics, the first of these stands for it, as in the tables of the SLEB
paper and others.
"""


def main_metric(results: list[TaskResult]) -> TaskResult:
    """Pick the result that stands for a task: by its metric, then on the most items."""
    order = [*_MAIN_METRICS, *(result.metric for result in results)]
    return min(results, key=lambda result: (order.index(result.metric), -len(result.doc_ids)))


class BytesResult(Record):
    """One text on two models whose tokenizers differ: the bits of each byte, which is the loss of
    what is predicted, over its bytes.

    Pairs are of the dense model and the other one. `clusters` counts the observations behind the
    standard error, which are documents, or stretches of `stretch` characters.
    """

    text: Annotated[str, Public(public_source)]
    sequence_length: int
    tokens: tuple[int, int]
    bytes: int
    clusters: int
    stretch: int | None
    bits: tuple[float, float]
    difference: float
    standard_error: float | None
    interval: Interval | None


class StageRecord(Record):
    """How far a stage of the other model is from the dense one's, on the same hidden states.

    `difference` is relative to what the dense stage adds to them, or puts out. A stage is
    "embeddings", "block 3" or "head". `rows` are the dense model's tokens whose rows of the head
    stand out among the others, the most different first.
    """

    left_out_if_none = frozenset({"rows"})

    stage: str
    difference: float
    stands_out: bool
    rows: tuple[int, ...] = ()


class ComparedRecord(Record):
    """The other model of a comparison, and what is known of the pair; pairs are of the dense model
    and the other one.

    `shared_tokens` is null if the tokenizers differ, and then `bytes` has the texts. `stages` is
    empty if the blocks are not the same in number and width.
    """

    model: ModelRecord
    files_bytes: tuple[int, int]
    tokens: tuple[int, int]
    shared_tokens: int | None
    same_chat_template: bool
    bytes: tuple[BytesResult, ...] = ()
    stages: tuple[StageRecord, ...] = ()

    @property
    def name(self) -> str:
        """The other model's name in tables."""
        return without_folders(self.model.id).rpartition("/")[2]


class EvalResult(ResultRecord):
    """The quality of the dense model and of each size of the pruned one, `sizes`: the removed
    blocks, fewest first.

    `behavior` is a hash over all of the model's files that decide a number: weights, config,
    trusted code, tokenizer and generation settings; `recovered` is the hash of the model in place
    of a pruned one, if its weights are not the dense model's. If that is any other model,
    `compared` names it, and its size is `OTHER`. `commands` measured it, one for each run.
    """

    left_out_if_none = ResultRecord.left_out_if_none | {"corpora", "compared"}

    kind: Literal["eval"]
    commands: Annotated[tuple[str, ...], Public(public_command)] = ()
    behavior: str | None = None
    recovered: str | None = None
    compared: ComparedRecord | None = None
    sizes: tuple[SizeKey, ...]
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
    corpora: tuple[CorpusResult, ...] = ()

    @property
    def depends(self) -> dict[str, Any]:
        """The rest of the key."""
        return super().depends | {"behavior": self.behavior, "recovered": self.recovered}

    @property
    def size_keys(self) -> tuple[SizeKey, ...]:
        """The measured sizes of the pruned model."""
        return self.sizes

    def of_sizes(self, sizes: Collection[frozenset[int]]) -> EvalResult:
        """Return the result without other sizes."""
        return self.model_copy(
            update={
                "sizes": tuple(size for size in self.sizes if frozenset(size) in sizes),
                "texts": with_sizes(self.texts, sizes),
                "tasks": with_sizes(self.tasks, sizes),
                "corpora": with_sizes(self.corpora, sizes),
            }
        )

    def merged_with(self, previous: EvalResult) -> EvalResult:
        """Return both results, of one key, as one: what was measured in both is taken from this
        one.
        """
        sizes = {frozenset(size): size for size in (*previous.sizes, *self.sizes)}
        return self.model_copy(
            update={
                "commands": tuple(dict.fromkeys((*previous.commands, *self.commands))),
                "sizes": tuple(sorted(sizes.values(), key=len)),
                "texts": merge_results(previous.texts, self.texts),
                "tasks": merge_results(previous.tasks, self.tasks),
                "corpora": merge_results(previous.corpora, self.corpora),
            }
        )


R = TypeVar("R", TextResult, TaskResult, CorpusResult)
_Sized = TypeVar("_Sized", TextResult, TaskResult, CorpusResult, "WorkloadResult")


def with_sizes(results: Iterable[_Sized], sizes: Collection[frozenset[int]]) -> tuple[_Sized, ...]:
    """Return the results with these sizes of the pruned model alone."""
    found = []
    for result in results:
        pruned = tuple(size for size in result.pruned if frozenset(size.removals) in sizes)
        found.append(result.model_copy(update={"pruned": pruned}))
    return tuple(found)


def merge_results(old: tuple[R, ...], new: tuple[R, ...]) -> tuple[R, ...]:
    """Merge results; of texts, tasks and corpora that are in both, also their sizes, if they were
    scored alike.
    """
    found = {result.key: result for result in old}
    for result in new:
        before = found.get(result.key)
        alike = getattr(before, "fingerprint", None) == getattr(result, "fingerprint", None)
        pruned = {
            frozenset(size.removals): size for size in (before.pruned if before and alike else ())
        }
        pruned |= {frozenset(size.removals): size for size in result.pruned}
        ordered = tuple(sorted(pruned.values(), key=lambda size: len(size.removals)))
        found[result.key] = result.model_copy(update={"pruned": ordered})
    return tuple(found.values())


class Workload(Record):
    """A timed workload. If `new_tokens` is 0, only the prompt is processed, without a KV cache.

    Models that only read have the workloads texts, read together, and query, which is one text.
    Every iteration has random prompts of its own. `warmup` is null if it lasted until times were
    stable. `engine` runs the model: transformers, or a plugin's. If `compiled`, the KV cache has a
    fixed size.
    """

    name: WorkloadName
    engine: str
    batch_size: int
    prompt_length: int
    new_tokens: int
    iterations: int
    warmup: int | None
    compiled: bool

    @property
    def label(self) -> str:
        """What is run: prompt 1x512, generation 4x64+32."""
        new = f"+{self.new_tokens}" if self.new_tokens else ""
        return f"{self.name} {self.batch_size}x{self.prompt_length}{new}"

    @property
    def identity(self) -> tuple[object, ...]:
        """What identifies the workload, however often it is run."""
        return tuple(value for name, value in self if name not in ("iterations", "warmup"))


class WarmupRecord(Record):
    """The untimed runs of each model; `deviation` is the largest relative standard deviation of the
    last few.

    `stable` says whether it fell below the limit of 2%; null if the number of runs was asked for.
    """

    runs: int
    deviation: float | None
    stable: bool | None


class MemoryRecord(Record):
    """The peak memory of a process that runs nothing else: the weights, the KV cache at its
    largest, and the rest.

    On a CPU, this is resident memory, so the rest includes the program; on an accelerator, it is
    what torch allocates.
    """

    peak_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    rest_bytes: int


class Distribution(Record):
    """The mean and percentiles of a sample of times, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float


class Timing(Record):
    """One workload on one model, in the terms of `vllm bench serve`.

    TTFT is the time to first token, ITL the latency between tokens, TPOT the time per token after
    the first, E2EL that from end to end; all prompts of a batch share them. `ttfts`, `itls` and
    `e2els` are the samples, in seconds, by iteration; without new tokens there are no `itls`, and
    the first token is the end. `tokens_per_second` counts the new tokens of all prompts, or the
    tokens of the prompts if there are none, over all iterations; tables show those of the median.
    `outliers` is the number of `e2els` beyond Tukey's fences, which are kept.
    """

    tokens_per_second: float
    ttft_ms: Distribution
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2el_ms: Distribution
    ttfts: tuple[float, ...]
    itls: tuple[tuple[float, ...], ...]
    e2els: tuple[float, ...]
    outliers: int
    memory: MemoryRecord | None


class PrunedTiming(Timing):
    """The timing without `removals`; `speedup` is dense over pruned, of the medians from end to
    end.

    `interval` is its 95% bootstrap interval over rounds; null if there are too few for one.
    """

    removals: SizeKey
    speedup: Annotated[float, Field(gt=0)]
    interval: Interval | None


class WorkloadResult(Record):
    """One workload on the dense and each pruned model, run in turn, and in every other round in
    reverse.

    `attention` is the implementation that transformers uses; null for other engines. Models that
    share no weights are timed in pairs, each size with the dense model, and `dense` then has the
    dense runs of all pairs.
    """

    workload: Workload
    engine_version: str | None
    attention: str | None
    warmup: WarmupRecord
    dense: Timing
    pruned: tuple[PrunedTiming, ...]


class ModelSize(Record):
    """The size of a model without `removals`, and how long it takes to load, if that was measured.

    Quantized weights count as the parameters they stand for, and as the bytes they take.
    """

    removals: SizeKey
    blocks: int
    parameters: int
    weights_bytes: int
    load_seconds: float | None


class BenchResult(ResultRecord):
    """The speed and size of the dense model and of each size of the pruned one, the fewest removals
    first.

    `governor` is how the system sets the processor's clock, where it says so: performance,
    powersave.
    """

    kind: Literal["bench"]
    threads: int
    governor: str | None
    dense: ModelSize
    pruned: tuple[ModelSize, ...]
    workloads: tuple[WorkloadResult, ...]

    @property
    def depends(self) -> dict[str, Any]:
        """The rest of the key."""
        return super().depends | {"threads": self.threads}

    @property
    def size_keys(self) -> tuple[SizeKey, ...]:
        """The measured sizes of the pruned model."""
        return tuple(size.removals for size in self.pruned)

    def of_sizes(self, sizes: Collection[frozenset[int]]) -> BenchResult:
        """Return the result without other sizes."""
        pruned = tuple(size for size in self.pruned if frozenset(size.removals) in sizes)
        workloads = with_sizes(self.workloads, sizes)
        return self.model_copy(update={"pruned": pruned, "workloads": workloads})

    def merged_with(self, previous: BenchResult) -> BenchResult:
        """Return both results, of one key, as one.

        A workload that was run again replaces the earlier one with all its sizes, since each run
        times the dense model anew; but runs with fewer iterations replace nothing.
        """
        found = {result.workload.identity: result for result in previous.workloads}
        for new in self.workloads:
            earlier = found.get(new.workload.identity)
            if earlier is None or earlier.workload.iterations <= new.workload.iterations:
                found[new.workload.identity] = new
        used = {timing.removals for result in found.values() for timing in result.pruned}
        sizes = {
            size.removals: size
            for size in (*previous.pruned, *self.pruned)
            if size.removals in used
        }
        ordered = tuple(sorted(sizes.values(), key=lambda size: len(size.removals)))
        return self.model_copy(update={"pruned": ordered, "workloads": tuple(found.values())})
