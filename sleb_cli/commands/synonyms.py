"""What people type who have not read the help, and what it is called here."""

from __future__ import annotations

from collections.abc import Mapping

_SEARCH = "Find the blocks with `sleb search MODEL --ratio 0.2`, then write the model with `sleb apply`."
_COUNT = "Use --remove 6, a number of blocks."
_SHARE = "Use --ratio 0.2, a share of the blocks."
_TEXT = "Use --calibration, with wikitext2, c4 or a file."

SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(["prune", "compress", "shrink", "drop", "cut"], _SEARCH),
    **dict.fromkeys(["--layers", "--num-layers", "--n-layers", "--num-blocks", "-n"], _COUNT),
    **dict.fromkeys(["--sparsity", "--pruning-ratio", "--amount", "-r"], _SHARE),
    **dict.fromkeys(["--dataset", "--data", "--text", "-d"], _TEXT),
    "evaluate": "Use `sleb eval`.",
    "benchmark": "Use `sleb bench`.",
    "report": "Use `sleb export --to report`.",
    "search --model": "Name the model without an option: sleb search MODEL.",
    "apply --ratio": "A plan has its sizes: use --remove, or search again with --ratio.",
    "--format": "Use --to.",
    "Missing option '--to'.": "Name the format: --to report, csv, llama-quantize, mergekit or indices.",
}
"""The hint for a wrong command, for a wrong option of any command or of one, and for a message."""


def hint_for(command: str, message: str, option: str | None, words: list[str]) -> str:
    """Return what to do about a command line that cannot be read, `option` being the unknown one."""
    verb = command.removeprefix("sleb").strip()
    if "No such command" in message and words:
        is_model = "/" in words[0] or words[0].endswith(".gguf")
        known = f"Write `sleb search {words[0]} …`." if is_model else SYNONYMS.get(words[0])
    else:
        known = SYNONYMS.get(f"{verb} {option}") or SYNONYMS.get(option or message)
    return known or f"See `{command} --help`."
