"""Whether the original code of SLEB and ours score the same candidates alike, on a Llama.

    git clone https://github.com/jiwonsong-dev/SLEB && pip install -r SLEB/requirements.txt
    python tests/benchmarks/original_sleb.py SLEB MODEL TEXT plan.json

Run it in an environment of its own, with the original's old transformers, or 4.45 where that reads
the tokenizer's file. Search in float32 and without --fast, on a TEXT of no more tokens than
--samples times --sequence-length and a few, and with a MODEL that begins no sequence with BOS. The
original is MIT-licensed, by Song et al.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for place in ("original", "model", "text", "plan"):
        parser.add_argument(place)
    options = parser.parse_args()
    sys.path.insert(0, options.original)

    import torch
    from sleb import nlls  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from utils.onoff_utils import onoff_llama  # type: ignore[import-not-found]

    plan = json.loads(Path(options.plan).read_text())
    model = AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=torch.float32).eval()
    model.seqlen = plan["calibration"]["sequence_length"]
    model.config.use_cache = False
    onoff_llama.replace(model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = tokenizer(Path(options.text).read_text(), return_tensors="pt")
    counted = text.input_ids.numel() // model.seqlen * model.seqlen
    differences = []
    same_choices = 0
    for step in plan["steps"]:
        losses = {}
        for block, ours in step["scores"].items():
            onoff_llama.turn_off(model, int(block))
            losses[block] = nlls(model, text, device=torch.device("cpu")) / counted
            onoff_llama.turn_on(model, int(block))
            differences.append(abs(losses[block] - ours))
        best = min(losses, key=losses.__getitem__)
        same_choices += int(best) == step["block"]
        onoff_llama.turn_off(model, step["block"])
    print(f"{same_choices} of {len(plan['steps'])} choices are the same;")
    print(f"{len(differences)} candidates differ by at most {max(differences):.1e} nats.")


if __name__ == "__main__":
    main()
