"""A family, a metric, an export format and an inference engine for sleb."""

import sleb_plugins as sleb


class NextTokenError(sleb.ModelMetric):
    """Counts the calibration tokens that the model would not guess in a number of guesses."""

    name = "next-token-error"
    description = "share of calibration tokens that are not among the model's first guesses"
    unit = "share of tokens"
    argument = "[GUESSES]"

    def __init__(self, guesses=1):
        self.guesses = guesses

    def with_argument(self, argument):
        if not argument.isdecimal():
            raise sleb.UsageError(
                f"{argument!r} is no number of guesses.", hint="Write next-token-error:5."
            )
        return NextTokenError(int(argument))

    def score_model(self, model, tokenizer, sequences):
        guesses = model(input_ids=sequences).logits[:, :-1].topk(self.guesses).indices
        return 1 - (guesses == sequences[:, 1:, None]).any(-1).float().mean().item()


class SliceExpression(sleb.Exporter):
    """Writes what is left of a list of blocks as Python slices it."""

    name = "slices"
    description = "the kept blocks as a Python expression"

    def export(self, pruning):
        return " + ".join(f"blocks[{low}:{high}]" for low, high in pruning.kept_ranges) + "\n"


class SteadyModel(sleb.LoadedModel):
    """Takes a nanosecond for each byte and token."""

    def __init__(self, size):
        self.seconds = size / 1e9

    def run(self, prompts, new_tokens):
        first = self.seconds * sum(map(len, prompts))
        arrivals = [first + self.seconds * step * len(prompts) for step in range(new_tokens)]
        return sleb.TimedRun(arrivals[-1] if arrivals else first, tuple(arrivals))

    def close(self):
        pass


class SteadyEngine(sleb.Engine):
    """Does nothing, in the time that the weights suggest."""

    name = "steady"
    description = "pretends to run checkpoints, in proportion to their bytes"
    reads = "checkpoint"

    def load(self, model, settings):
        return SteadyModel(sum(path.stat().st_size for path in model.glob("*.safetensors")))


@sleb.hookimpl
def sleb_metrics():
    return [NextTokenError()]


@sleb.hookimpl
def sleb_families():
    return [sleb.FamilyAdapter("gpt2", frozenset({"gpt2"}), "transformer.h", count_key="n_layer")]


@sleb.hookimpl
def sleb_exporters():
    return [SliceExpression()]


@sleb.hookimpl
def sleb_engines():
    return [SteadyEngine()]
