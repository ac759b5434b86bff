"""What `sleb apply`, `export`, `eval` and `bench` report: the numbers, and the raw samples behind them."""

from __future__ import annotations

from typing import Literal

from sleb_cli.plan import RecoveryRecord
from sleb_cli.records import ModelRecord, Proof, Record


class ResultRecord(Record):
    """What both kinds of result share. `removals` is empty where only the dense model was measured."""

    schema_version: Literal[1]
    sleb_version: str
    model: ModelRecord
    removals: tuple[int, ...]
    dtype: str
    device: str


class ApplyResult(ResultRecord):
    """A checkpoint that was written. `proof`, in this dtype on this device, is None where none was asked for.

    `recovery` says what its blocks were given back, where anything was; `pushed` is its address on the hub, where it
    went there too.
    """

    kind: Literal["apply"]
    folder: str
    blocks: int
    weights_bytes: int
    recovery: RecoveryRecord | None
    proof: Proof | None
    pushed: str | None


class GgufResult(Record):
    """A pruned GGUF file. What stays was compared byte for byte with the source, where `verified`.

    `proof`, by transformers, is None where there is none, and `unproven` then says why.
    """

    schema_version: Literal[1]
    sleb_version: str
    kind: Literal["gguf"]
    source: str
    architecture: str
    removals: tuple[int, ...]
    file: str
    blocks: int
    file_bytes: int
    verified: bool
    proof: Proof | None
    unproven: str | None


class ExportResult(Record):
    """What an exporter wrote through the engine, and the lines that it says besides."""

    schema_version: Literal[1]
    sleb_version: str
    kind: Literal["export"]
    exporter: str
    written: tuple[ApplyResult | GgufResult, ...]
    lines: tuple[str, ...]


class ComparedRecord(Record):
    """A search of a comparison: what goes, and the perplexity without it on the calibration text."""

    metric: str
    strategy: str
    removals: tuple[int, ...]
    perplexity: float
    held_out_perplexity: float | None
    seconds: float


class CompareResult(Record):
    """Searches of one model on one text; `best` is the metric@strategy whose plan was written."""

    schema_version: Literal[1]
    sleb_version: str
    kind: Literal["compare"]
    model: ModelRecord
    dtype: str
    device: str
    dense_perplexity: float
    dense_held_out_perplexity: float | None
    compared: tuple[ComparedRecord, ...]
    best: str


class PerplexityRecord(Record):
    """exp(mean nats per token) over `windows` windows; `losses` holds the mean of each window."""

    text: str
    windows: int
    sequence_length: int
    bos: bool
    tokens_sha256: str
    perplexity: float
    losses: tuple[float, ...]


class TaskRecord(Record):
    """One metric of one lm-eval task; `stderr` is lm-eval's own, where it gives one."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    num_fewshot: int
    higher_is_better: bool


class ModelScores(Record):
    """Everything measured on one model."""

    blocks: int
    perplexities: tuple[PerplexityRecord, ...]
    tasks: tuple[TaskRecord, ...]


class EvalResult(ResultRecord):
    """Quality, dense beside pruned."""

    kind: Literal["eval"]
    dense: ModelScores
    pruned: ModelScores | None


class Workload(Record):
    """What is timed. `new_tokens` is 0 where only the prompt is processed, without a KV cache."""

    name: Literal["prompt", "generation"]
    batch_size: int
    prompt_length: int
    new_tokens: int
    iterations: int
    warmup: int
    seed: int

    def __str__(self) -> str:
        new = f", {self.new_tokens} new tokens each" if self.new_tokens else ""
        return (
            f"{self.batch_size} x {self.prompt_length} prompt tokens{new}, "
            f"{self.iterations} iterations after {self.warmup} to warm up"
        )


class Timing(Record):
    """The raw seconds of one workload on one model, and the most memory that it took."""

    seconds: tuple[float, ...]
    median_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None


class WorkloadResult(Record):
    """One workload on both models; `speedup` is the ratio of the medians, dense over pruned."""

    workload: Workload
    dense: Timing
    pruned: Timing | None
    speedup: float | None


class ModelSize(Record):
    """How large a model is."""

    blocks: int
    parameters: int
    weights_bytes: int


class BenchResult(ResultRecord):
    """Speed and size, dense beside pruned."""

    kind: Literal["bench"]
    threads: int
    processor: str
    torch: str
    dense: ModelSize
    pruned: ModelSize | None
    workloads: tuple[WorkloadResult, ...]
