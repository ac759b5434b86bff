"""Inference engines that `sleb bench --engine NAME` times beside transformers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

Reads = Literal["checkpoint", "gguf"]
"""The files that an engine reads."""


@dataclass(frozen=True)
class TimedRun:
    """One timed run of a batch of prompts.

    Attributes:
        seconds: from the start to the end.
        token_seconds: from the start to the arrival of each step of new tokens; empty if only the
            prompt was processed.
    """

    seconds: float
    token_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class EngineSettings:
    """How an engine loads a model that is about to be timed.

    Attributes:
        dtype: the data type to compute in, where the engine can choose: "bfloat16".
        threads: how many CPU threads to use.
        batch_size: the most prompts that are run together.
        sequence_length: the most tokens of one prompt and what is generated after it.
        models: how many models are loaded at once, to share the memory.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    dtype: str
    threads: int
    batch_size: int
    sequence_length: int
    models: int = 1
    trust_remote_code: bool = False


class LoadedModel(ABC):
    """A model in an engine, ready to be timed.

    Attributes:
        device: the kind of device it runs on, such as "cuda".
    """

    device: str = "cpu"

    @abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedRun:
        """Process the prompts together and generate `new_tokens` for each, greedily, whatever token
        ends a text.

        With `new_tokens` 0, only the prompts are processed. No prompt is answered from a cache of
        earlier ones.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""


class Engine(ABC):
    """An inference engine.

    Attributes:
        name: its name on the command line.
        description: one line for `sleb plugins`.
        reads: the files it reads: "checkpoint" for a folder, or "gguf".
        least_new_tokens: how many tokens it generates at least, also after a prompt that is timed
            alone.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    reads: ClassVar[Reads]
    least_new_tokens: ClassVar[int] = 0

    def version(self) -> str:
        """Return the package and version that results name: "vllm 0.32.0"; empty if it has none.

        Raises:
            MachineError: the engine is not installed.
        """
        return ""

    @abstractmethod
    def load(self, model: Path, settings: EngineSettings) -> LoadedModel:
        """Load the checkpoint folder or GGUF file at this path.

        Raises:
            MachineError: the engine is not installed, or does not run on this machine.
            UnsupportedModelError: it does not run this model.
        """
