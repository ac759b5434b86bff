"""What `sleb apply`, `export`, `eval` and `bench` report: the numbers, and the raw samples behind them."""

from __future__ import annotations

from typing import Any, Literal

from sleb_cli.plan import CalibrationRecord, RecoveryRecord
from sleb_cli.records import ModelRecord, Proof, Record
from sleb_cli.requests import WorkloadName


class ResultRecord(Record):
    """The fields that several results share. `removals` is empty if only the dense model was measured."""

    schema_version: Literal[1]
    sleb_version: str
    model: ModelRecord
    removals: tuple[int, ...]
    dtype: str
    device: str


class ApplyResult(ResultRecord):
    """A written checkpoint. `proof`, in this dtype on this device, is null if it was skipped.

    `recovery` tells how its blocks were recovered, if they were; `pushed` is its address on the Hub, if uploaded.
    """

    kind: Literal["apply"]
    folder: str
    blocks: int
    weights_bytes: int
    recovery: RecoveryRecord | None
    proof: Proof | None
    pushed: str | None


class GgufResult(Record):
    """A pruned GGUF file; if `verified`, its tensors were compared with the source byte for byte.

    `proof` is by transformers; if it is null, `unproven` says why.
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
    """The output of an exporter: a `text`, with the same data as `document`, or files.

    `written` are the results for the files, and `lines` tell how to use them.
    """

    schema_version: Literal[1]
    sleb_version: str
    kind: Literal["export"]
    exporter: str
    written: tuple[ApplyResult | GgufResult, ...] = ()
    lines: tuple[str, ...] = ()
    text: str | None = None
    document: Any = None


class ComparedRecord(Record):
    """One search of a comparison: the removed blocks, and the calibration perplexity without them."""

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
    calibration: CalibrationRecord
    dtype: str
    device: str
    dense_perplexity: float
    dense_held_out_perplexity: float | None
    compared: tuple[ComparedRecord, ...]
    best: str


class PerplexityRecord(Record):
    """The perplexity over `windows` windows; `losses` has the mean of each window, in nats per token."""

    text: str
    windows: int
    sequence_length: int
    bos: bool
    tokens_sha256: str
    perplexity: float
    losses: tuple[float, ...]


class TaskRecord(Record):
    """One metric of one lm-eval task; `stderr` is lm-eval's, if it reports one."""

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
    """The quality of the dense and the pruned model."""

    kind: Literal["eval"]
    dense: ModelScores
    pruned: ModelScores | None


class Workload(Record):
    """A timed workload. If `new_tokens` is 0, only the prompt is processed, without a KV cache."""

    name: WorkloadName
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
    """The raw seconds of one workload on one model, and its peak memory."""

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
    """The size of a model: quantized weights count as the parameters they stand for, and as the bytes they take."""

    blocks: int
    parameters: int
    weights_bytes: int


class BenchResult(ResultRecord):
    """The speed and size of the dense and the pruned model."""

    kind: Literal["bench"]
    threads: int
    processor: str
    torch: str
    dense: ModelSize
    pruned: ModelSize | None
    workloads: tuple[WorkloadResult, ...]
