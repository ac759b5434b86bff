"""Serve new queries from an old index, with an embedding model that has fewer blocks.

    python docs/example_encoder.py MODEL TEXTS.jsonl [MINUTES]

Each line of the file is {"text": "…"}. Every tenth text asks the others, and no search or healing
sees it. A MODEL in a folder needs no network.
"""

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

import sleb_cli as sleb

NEAREST = 10

model, texts, *minutes = sys.argv[1:]
folder = Path("sleb-encoder")
folder.mkdir(exist_ok=True)
lines = Path(texts).read_text(encoding="utf-8").splitlines()
queries = [json.loads(line)["text"] for line in lines[::10]]
del lines[::10]
documents = [json.loads(line)["text"] for line in lines]
(folder / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")

# The index that exists: its vectors are the original's, and stay.
original = SentenceTransformer(model)
index = original.encode_document(documents, normalize_embeddings=True)

# Find a quarter of the blocks, remove them, and bring the vectors back to where they were.
search = sleb.SearchRequest(
    model,
    ratio=0.25,
    calibration=str(folder / "documents.jsonl"),
    prompt="query" if original.prompts.get("query") else None,
    output=folder / "plan.json",
)
apply = sleb.ApplyRequest(
    folder / "plan.json",
    heal=True,
    heal_minutes=float(minutes[0]) if minutes else None,
    output=folder / "smaller",
)
with sleb.show_progress() as notify:
    print("without blocks", sleb.search(search, notify).removals)
    print(", ".join(sleb.apply(apply, notify).checks))

# From now on, queries are computed by the smaller model.
smaller = SentenceTransformer(str(folder / "smaller"))

nearest = []
for embedder in (original, smaller):
    similarities = embedder.encode_query(queries, normalize_embeddings=True) @ index.T
    nearest.append(similarities.argsort(axis=1)[:, -NEAREST:])
same = 0
for before, after in zip(*nearest, strict=True):
    same += len(set(before) & set(after))
print(f"{same / (NEAREST * len(queries)):.1%} of the {NEAREST} nearest documents stay")
