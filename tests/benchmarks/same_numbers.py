"""Show that two versions of sleb compute the same: plans, losses, recovery, and hashes of files.

    python tests/benchmarks/same_numbers.py MODEL... --text FILE -o numbers.json
    python tests/benchmarks/same_numbers.py MODEL... --text FILE --against numbers.json

Run the first before a change and the second after it. Both run `sleb` as it is installed where
this script runs, or the one named with --sleb. A number that differs is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = ["--samples", "6", "--sequence-length", "64", "--dtype", "float32", "--sample-tokens", "8"]
SEARCHES = {
    "greedy": [],
    "fast": ["--fast", "--samples", "12"],
    "holdout": ["--holdout", "0.34"],
    "kl": ["--metric", "kl"],
    "cosine": ["--metric", "cosine"],
    "magnitude": ["--metric", "magnitude"],
    "refine": ["--strategy", "refine"],
    "contiguous": ["--strategy", "contiguous", "--metric", "angular"],
    "oneshot": ["--strategy", "oneshot"],
    "self": ["--calibration", "self"],
    "streamed": ["--stream"],
}
FIT = ["--samples", "40", "--sequence-length", "64"]
APPLIES = {
    "as it is": [],
    "shards": ["--max-shard-size", "40MB"],
    "bfloat16": ["--dtype", "bfloat16"],
    "recovered": ["--recover", "--no-heal", *FIT],
    "healed": ["--heal", "--heal-tokens", "4096", *FIT],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration and evaluation text")
    parser.add_argument("--sleb", default="sleb", help="the program")
    parser.add_argument(
        "--only",
        default=",".join([*SEARCHES, *APPLIES, "tasks"]),
        help="these runs, besides greedy",
    )
    parser.add_argument("-o", dest="output", type=Path)
    parser.add_argument("--against", type=Path)
    asked = parser.parse_args()
    text, only = asked.text.resolve(), asked.only.split(",")
    found = {model.name: numbers(asked.sleb, model.resolve(), text, only) for model in asked.models}
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1))
    if not asked.against:
        return 0
    expected = json.loads(asked.against.read_text())
    differing = list(
        differences(json.loads(json.dumps(found)), {name: expected[name] for name in found}, "")
    )
    print("\n".join(differing) or "The same numbers and hashes.")
    return bool(differing)


def numbers(sleb: str, model: Path, text: Path, only: list[str]) -> dict:
    found: dict = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(*arguments: object) -> None:
            print("sleb", *arguments, file=sys.stderr, flush=True)
            done = subprocess.run(
                [sleb, *map(str, arguments)], cwd=folder, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)

        for kind in [kind for kind in SEARCHES if kind == "greedy" or kind in only]:
            options = SEARCHES[kind]
            given = [] if "--calibration" in options else ["--calibration", text]
            run("search", model, "--remove", 2, *given, *SMALL, *options, "-o", f"{kind}.json")
            found[f"search {kind}"] = of_plan(json.loads((folder / f"{kind}.json").read_text()))
        for kind in [kind for kind in APPLIES if kind in only]:
            options = APPLIES[kind]
            given = ["--calibration", text] if "--samples" in options else []
            run("apply", "greedy.json", *options, *given, "-o", kind)
            found[f"apply {kind}"] = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted((folder / kind).iterdir())
                if path.suffix == ".safetensors" or path.name == "config.json"
            }
        if model.suffix == ".gguf":
            run("apply", "greedy.json", "-o", "cut.gguf")
            found["apply gguf"] = hashlib.sha256((folder / "cut.gguf").read_bytes()).hexdigest()
        windows = [
            "--perplexity",
            text,
            "--max-windows",
            4,
            "--sequence-length",
            128,
            "--dtype",
            "float32",
        ]
        run("eval", "greedy.json", *windows, "-o", "quality.json")
        measured = json.loads((folder / "quality.json").read_text())["texts"][0]
        found["eval"] = {name: measured[name] for name in ("dense", "pruned") if name in measured}
        if "tasks" not in only:
            return found
        run(
            "eval",
            "greedy.json",
            "--tasks",
            "sleb_sums,sleb_lists",
            "--limit",
            8,
            "-o",
            "tasks.json",
        )
        found["tasks"] = json.loads((folder / "tasks.json").read_text())["tasks"]
    return found


def of_plan(plan: dict) -> dict:
    """Return what a search found, without what describes the machine."""
    steps = [
        {name: step[name] for name in ("block", "score", "perplexity", "scores")}
        for step in plan["steps"]
    ]
    return {"dense": plan["dense"], "steps": steps, "tokens": plan["calibration"]["tokens_sha256"]}


def differences(found: object, expected: object, where: str):
    """Yield each value that differs; one that a version no longer records is none."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in found.keys() & expected.keys():
            yield from differences(found[name], expected[name], f"{where} / {name}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from differences(*pair, f"{where} / {number}")
    elif found != expected:
        yield f"{where}: {found}, was {expected}"


if __name__ == "__main__":
    sys.exit(main())
