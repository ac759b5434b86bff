"""Options that do not go together, of all commands, in one table.

Options are fields of a request, with spaces between them, or `field=pattern` for some values:
`warmup=0`.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from sleb_cli.requests import (
    RECOVERIES,
    TARGET_NAMES,
    ApplyRequest,
    BenchRequest,
    EvalRequest,
    Request,
    SearchRequest,
    SizesRequest,
    option_of,
)
from sleb_plugins import UsageError


@dataclass(frozen=True)
class Clash:
    """None of `options` can be combined with one of `others`."""

    options: str
    others: str
    because: str
    hint: str
    request_type: type[Request] = Request

    def check(self, request: Request) -> None:
        """Check that a request does not have both."""
        options = given(request, self.options)
        others = [other for other in given(request, self.others) if other not in options[:1]]
        if options and others:
            raise UsageError(
                f"{options[0]} and {others[0]} cannot be combined: {self.because}.", hint=self.hint
            )


@dataclass(frozen=True)
class Need:
    """Each of `options` does nothing without one of `needed`, or does nothing `beside` another
    option alone.
    """

    options: str
    needed: str
    request_type: type[Request] = Request
    beside: str | None = None

    def check(self, request: Request) -> None:
        """Check that none of the options is idle."""
        idle = given(request, self.options)
        if (
            idle
            and not given(request, self.needed)
            and (self.beside is None or given(request, self.beside))
        ):
            needed = " or ".join(map(option_of, self.needed.split()))
            raise UsageError(
                f"{idle[0]} requires {needed}.", hint=f"Use both, or leave out {idle[0]}."
            )


def given(request: Request, options: str) -> list[str]:
    """Return the options that a request sets, as the user types them."""
    names = []
    for option in options.split():
        name, _, pattern = option.partition("=")
        field = type(request).__dataclass_fields__.get(name)
        value = getattr(request, name, None)
        if field is None or value in (None, field.default):
            continue
        if value is False:
            if pattern == "False":
                names.append(option_of(f"no_{name}"))
        elif fnmatchcase(str(value), pattern or "*"):
            names.append(f"{option_of(name)} {value}" if pattern else option_of(name))
    return names


def require_coherent(request: Request) -> None:
    """Check that the options of a request go together.

    Raises:
        UsageError: some do not.
    """
    for row in CLASHES:
        if isinstance(request, row.request_type):
            row.check(request)


_RECOVERIES = " ".join(RECOVERIES)
_GGUF = "source output=*.gguf"
FOR_CHECKPOINTS = f"{_RECOVERIES} device_map stream dtype max_shard_size"
"""Options of `apply` that a GGUF file cannot follow."""
_ONE = "Use one of them."

CLASHES: tuple[Clash | Need, ...] = (
    Clash(" ".join(TARGET_NAMES), " ".join(TARGET_NAMES), "each says how far to go", _ONE,
          SearchRequest),
    Need("serve_length", "target_memory"),
    Clash("unit=*", "strategy fast protect protect_kind protect_first protect_last",
          "as many of each block go, and each is scored once", "Leave one of them out.",
          SearchRequest),
    Clash("unit=*", "max_perplexity_ratio extend",
          "one walk ranks them all, for a number of them that is known before",
          "Use --ratio, --remove, --target-params or --target-memory.", SearchRequest),
    Clash("unit=*", "device_map",
          "what goes is watched and left out where weights are loaded by sleb", "Use --stream.",
          SearchRequest),
    Clash("device_map", "stream", "each runs a model that does not fit",
          "Use one of them: --stream reads each block once a step, a device map once a pass."),
    Clash("device_map", "device", "the device map chooses the devices", _ONE),
    Clash("heal heal_minutes heal_tokens", "device_map stream",
          "healing trains the model, so all weights must be on one device",
          "Use a device with enough memory, or --recover alone, which then only refits."),
    Clash("heal_minutes", "heal_tokens", "each says when healing stops", _ONE),
    Clash("heal=False", "heal_minutes heal_tokens", "nothing would be trained", _ONE),
    Need("heal_minutes heal_tokens", _RECOVERIES),
    Need("calibration", f"{_RECOVERIES} scripts", ApplyRequest),
    Need("samples sequence_length seed chat", f"{_RECOVERIES} calibration", ApplyRequest),
    Need("device", _RECOVERIES, ApplyRequest),
    Clash("keep_failed", "no_verify", "what is not proven cannot fail", _ONE),
    Clash(_GGUF, _RECOVERIES, "new values are written to a checkpoint, not to a GGUF file",
          "Choose a folder with -o, without --source, and convert it with llama.cpp's "
          "convert_hf_to_gguf.py.",
          ApplyRequest),
    Clash(_GGUF, FOR_CHECKPOINTS, "the tensors of a GGUF file are copied as they are",
          "Write a checkpoint of the model instead: choose a folder with -o, without --source.",
          ApplyRequest),
    Clash("source", "model", "only the plan and the GGUF file are read", "Leave out --model.",
          ApplyRequest),
    Clash("experts_per_token", "blocks", "each names what is compared with the dense model",
          "Measure one after the other.", SizesRequest),
    Clash("experts_per_token", _RECOVERIES,
          "blocks are fitted to what the dense model computes with all its experts",
          "Recover first, and apply the setting to that checkpoint.", ApplyRequest),
    Clash("against", "model any_model blocks remove every experts_per_token",
          "one names the other model, the others say how it is made of this one",
          "Leave one of them out.", EvalRequest),
    Clash("against", "device_map", "two models share the devices",
          "Leave out --device-map: what does not fit is streamed.", EvalRequest),
    Clash("every", "remove", "each names the sizes", "Use --every 2, or --remove 2,4,6."),
    Clash("tasks", "stream", "each batch of requests would read the whole model again",
          "Leave out --stream, or measure --perplexity alone. --device-map auto runs tasks, "
          "slowly."),
    Clash("corpus", "perplexity tasks max_windows bos",
          "one is for models that only read, the other for language models", _ONE),
    Need("limit num_fewshot apply_chat_template include_path run_code show_flips", "tasks"),
    # alone, a text is read by default
    Need("sequence_length max_windows bos", "perplexity", beside="tasks"),
    Need("prompt", "corpus", EvalRequest),
    Need("new_tokens", "generation", beside="prompt"),
    Need("source", "engine", BenchRequest),
    Clash("engine", "device compile",
          "these are of transformers alone", "Leave out --device and --compile."),
    Clash("compile", "warmup=0", "the compilation would be timed", "Use --warmup 1 or more."),
)  # fmt: skip
