"""What became of a vocabulary, and what the proof of a checkpoint has shown."""

from __future__ import annotations

from sleb_cli.records import Check, Proof
from sleb_cli.results import VocabularyRecord
from sleb_cli.units import format_bytes


def checked(proof: Proof, dense: str = "the dense model") -> list[str]:
    """Return a clause for each check that passed; `dense` is what the clauses call the dense model."""
    is_recovered = proof.reference == "recovered"
    references = {"recovered": "the recovered model in memory", "whole": dense}
    reference = references.get(proof.reference, f"{dense} with these blocks skipped")
    if "same tokens" in proof.checks:
        reference += ", for the tokens that stay"
    close = "bitwise equal to those"
    if proof.logits_difference:
        close = f"within {proof.logits_difference:.1g} of the largest (allowed: {proof.logits_tolerance:.1g}) of those"
    words: dict[Check, str] = {
        "complete": "every planned file is there and complete, and no other",
        "same bytes": f"the bytes of every weight are those of {dense}{' or the new values' if is_recovered else ''}",
        "same tokens": "text of the scripts that stay gets the same tokens",
        "spells others": "other text still encodes, and decodes as before",
        "loads": "stock transformers finds every weight of the config in the files, and no other",
        "same logits": f"its logits on {proof.prompt_tokens} prompt tokens ({proof.prompt}) are {close} of {reference}",
        "generates": "it generates with the KV cache",
        "saves again": "transformers saves it again, with the same weights",
    }
    return [words[check] for check in proof.checks]


def vocabulary_change(vocabulary: VocabularyRecord) -> str:
    """Return a clause on what went with the tokens, and any blocks: "only latin; tokens 49,152 to 30,000; …"."""
    tokens, parameters = (f"{before:,} to {after:,}" for before, after in (vocabulary.tokens, vocabulary.parameters))
    before, after = map(format_bytes, vocabulary.weights_bytes)
    return f"only {', '.join(vocabulary.scripts)}; tokens {tokens}; parameters {parameters}; {before} to {after}"
