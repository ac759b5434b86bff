"""Follow a search and a healing in trackio (`pip install trackio`), or in wandb, whose names are
the same.
"""

import sys

import trackio

import sleb_cli
from sleb_cli import events


def log(event: events.Event) -> None:
    """Log what is decided; progress and single scores are left to the screen."""
    match event:
        case events.BlockRemoved():
            trackio.log(
                {"removed": event.step, "score": event.score, "perplexity": event.perplexity}
            )
        case events.HealChecked():
            trackio.log(
                {"share": event.share, "KL of a step": event.divergence, "KL": event.validation}
            )
        case events.Notice() | events.Warned():
            print(event.text, file=sys.stderr)


if __name__ == "__main__":
    model, text = sys.argv[1:]
    trackio.init(project="sleb", name=model, config={"calibration": text})
    plan = sleb_cli.search(sleb_cli.SearchRequest(model, ratio=0.2, calibration=text), log)
    sleb_cli.apply(
        sleb_cli.ApplyRequest("plan.json", recover=True, heal=True, calibration=text), log
    )
    trackio.log({"removals": str(plan.removals)})
    trackio.finish()
