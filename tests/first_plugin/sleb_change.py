"""A metric for sleb."""

import sleb_plugins as sleb


class Change(sleb.HiddenStateMetric):
    """The length of what a block adds to a hidden state, relative to that state."""

    name = "change"
    description = "relative change of the hidden states"

    def score_tokens(self, entering, leaving):
        return (leaving - entering).norm(dim=-1) / entering.norm(dim=-1)


@sleb.hookimpl
def sleb_metrics():
    return [Change()]
