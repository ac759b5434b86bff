"""A family, a metric and an export format for sleb."""

import sleb_plugins as sleb


class NextTokenError(sleb.ModelMetric):
    """Counts the calibration tokens that the model would not have guessed."""

    name = "next-token-error"
    description = "share of calibration tokens that are not the model's first guess"

    def score_model(self, model, tokenizer, sequences):
        guesses = model(input_ids=sequences).logits[:, :-1].argmax(-1)
        return (guesses != sequences[:, 1:]).float().mean().item()


class SliceExpression(sleb.Exporter):
    """Writes what is left of a list of blocks as Python slices it."""

    name = "slices"
    description = "the kept blocks as a Python expression"

    def document(self, pruning):
        return {"slices": pruning.kept_ranges}

    def render(self, pruning):
        return " + ".join(f"blocks[{low}:{high}]" for low, high in pruning.kept_ranges) + "\n"


@sleb.hookimpl
def sleb_metrics():
    return [NextTokenError()]


@sleb.hookimpl
def sleb_families():
    return [sleb.FamilyAdapter("gpt2", frozenset({"gpt2"}), "transformer.h", count_key="n_layer")]


@sleb.hookimpl
def sleb_exporters():
    return [SliceExpression()]
