"""What people type who have not read the help, and what they should type here."""

import os
from collections.abc import Mapping

_SEARCH = (
    "Find the blocks with `sleb search MODEL --ratio 0.2`, then write the model with `sleb apply`."
)
_EXPERTS = "Use --unit experts --remove 3, a number of each block's experts."
_COUNT = "Use --remove 6, a number of blocks."
_SHARE = "Use --ratio 0.2, a share of the blocks."
_TEXT = "Use --calibration, with wikitext2, c4 or a file."
_MEASURED = "Use --perplexity, with wikitext2, c4 or a file."
_WRITTEN = (
    "Name the file: -o model.gguf. It is made from a GGUF file: the plan's model, or --source "
    "FILE.gguf."
)

SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(["prune", "compress", "shrink", "drop", "cut"], _SEARCH),
    **dict.fromkeys(["--layers", "--num-layers", "--n-layers", "--num-blocks", "-n"], _COUNT),
    **dict.fromkeys(["--sparsity", "--pruning-ratio", "--amount", "-r"], _SHARE),
    **dict.fromkeys(["--dataset", "--data", "--text", "-d"], _TEXT),
    **dict.fromkeys(
        ["eval --dataset", "eval --data", "eval --text", "eval --ppl", "eval --calibration"],
        _MEASURED,
    ),
    "search --experts": _EXPERTS,
    "evaluate": "Use `sleb eval`.",
    "heal": "Use `sleb apply --heal`.",
    "recover": "Use `sleb apply --recover`.",
    "benchmark": "Use `sleb bench`.",
    "report": "Use `sleb export --to report`.",
    "--model": "Name the model without an option: `sleb search MODEL`.",
    "apply --ratio": "A plan has its sizes: use --remove, or search again with --ratio.",
    **dict.fromkeys(["apply --to", "apply --format"], _WRITTEN),
    "--format": "Use --to.",
    "Missing option '--to'.": "Name the format: --to report, table, llama-quantize, mergekit or "
    "indices.",
    **dict.fromkeys(
        ["exporter csv", "exporter markdown", "exporter svg"],
        "Use table, and -o table.csv, .md, .tex, .svg or .pdf.",
    ),
    "exporter gguf": "`sleb apply` writes GGUF files.",
    "exporter ollama": "Write `FROM ./model.gguf` into a Modelfile.",
    "exporter html": "Use report, a page of HTML.",
    **dict.fromkeys(["metric perplexity", "metric ppl"], "Use nll, its logarithm."),
    **dict.fromkeys(["metric shortgpt", "metric bi"], "Use cosine, with --strategy oneshot."),
}
"""Hints by wrong command, by wrong option of any command or one, by message, and by kind and name
of an offer.
"""


def hint_for(command: str, message: str, option: str | None, words: list[str]) -> str | None:
    """Return the hint for a command line that cannot be read; `option` is the unknown one."""
    verb = command.removeprefix("sleb").strip()
    if "No such command" in message and words:
        first = words[0]
        is_model = first == "demo" or "/" in first or first.endswith(".gguf")
        if is_model or os.path.isfile(f"{first}/config.json"):  # noqa: PTH113 - or too long a name
            return f"Write `sleb search {first} --ratio 0.2`."
        return SYNONYMS.get(first)
    return SYNONYMS.get(f"{verb} {option}") or SYNONYMS.get(option or message)
