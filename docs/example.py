"""The whole way from a model to a faster one, in Python. Run the cells in a notebook, or the file as a script.

python docs/example.py                                     # SmolLM2-135M
python docs/example.py MODEL TEXT.txt FOLDER               # your own
"""

# %% What to prune, the text to calibrate and to evaluate on, and where results go
import sys
from pathlib import Path

import sleb_cli as sleb

model, text, folder = (*sys.argv[1:], *("demo", "self", "sleb-example")[len(sys.argv) - 1 :])
results = Path(folder)
results.mkdir(exist_ok=True)

# %% Find the blocks that the model can do best without
plan = sleb.search(
    sleb.SearchRequest(
        model, ratio=0.2, calibration=text, samples=8, sequence_length=64, fast=True, output=results / "plan.json"
    )
)
for step in plan.steps:
    print(f"without block {step.block:2}: perplexity {step.perplexity:.2f}")

# %% Write the pruned checkpoint, proven equal to what was searched
applied = sleb.apply(sleb.ApplyRequest(str(results / "plan.json"), output=results / "pruned"))
assert applied.proof is not None
print(f"{applied.blocks} blocks, checked: {', '.join(applied.proof.checks)}")

# %% Measure what it cost
if text != "self":
    scores = sleb.evaluate(sleb.EvalRequest(str(results / "plan.json"), perplexity=(text,), sequence_length=64))
    text = scores.texts[0]
    print("perplexity", text.dense.perplexity, "->", text.pruned[-1].perplexity)

# %% Measure what it gained
speed = sleb.bench(sleb.BenchRequest(str(results / "plan.json"), generation=True, iterations=3))
print(f"{speed.workloads[0].pruned[-1].speedup:.2f}x at {speed.workloads[0].workload}")

# %% Hand the blocks to another tool
recipe = sleb.export(sleb.ExportRequest(str(results / "plan.json"), to="mergekit"))
print(recipe.text)
