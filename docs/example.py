# %% [markdown]
# # First run
#
# From a model to a faster one, as a script or a notebook: minutes on two cores, without a GPU. In Colab, first clone sleb's repository, and run
# `%pip install ./sleb`.

# %% [markdown]
# ## Choose a model and a text: `self` is text that the model writes

# %%
from pathlib import Path

import matplotlib.pyplot as plt

import sleb_cli as sleb

model, text, folder = "demo", "self", Path("sleb-example")
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## Find the blocks that it needs least

# %%
output = folder / "plan.json"
request = sleb.SearchRequest(
    model, ratio=0.2, calibration=text, samples=8, sequence_length=64, output=output
)
with sleb.show_progress() as notify:
    plan = sleb.search(request, notify)
print(plan.removals)

# %% [markdown]
# ## What the model loses without each block

# %%
scores = {block: score for block, score in plan.steps[0].scores.items() if score is not None}
plt.bar([str(block) for block in scores], [score - plan.dense.loss for score in scores.values()])
plt.xlabel("block")
plt.ylabel("loss added, nats per token")
plt.show()

# %% [markdown]
# ## How both models continue a sentence

# %%
if sample := plan.sample_generation:
    print(sample.prompt, "…\n\ndense:", sample.dense, "\n\npruned:", sample.pruned)

# %% [markdown]
# ## Write the pruned checkpoint

# %%
with sleb.show_progress() as notify:
    applied = sleb.apply(sleb.ApplyRequest(plan, output=folder / "pruned"), notify)
print(f"{applied.blocks} blocks, checked: {', '.join(applied.checks)}")

# %% [markdown]
# ## Measure what it cost, on a text of your own

# %%
if text != "self":
    found = sleb.evaluate(sleb.EvalRequest(plan, perplexity=(text,), sequence_length=64))
    print("perplexity", found.texts[0].dense.perplexity, "->", found.texts[0].pruned[-1].perplexity)

# %% [markdown]
# ## Measure what it gained

# %%
speed = sleb.bench(sleb.BenchRequest(plan, generation=True, iterations=3))
print(f"{speed.workloads[0].pruned[-1].speedup:.2f}x at {speed.workloads[0].workload.label}")

# %% [markdown]
# ## Hand the blocks to another tool

# %%
print(sleb.export(sleb.ExportRequest(plan, to="indices")).text)
