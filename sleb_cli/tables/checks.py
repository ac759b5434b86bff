"""The proof of a checkpoint, in words."""

from sleb_cli.records import Check, Proof, Reference


def describe_reference(kind: Reference, dense: str = "the dense model") -> str:
    """Describe the model that logits are compared with, calling the dense model `dense`."""
    words: dict[Reference, str] = {
        "dense": f"{dense} with these blocks skipped",
        "recovered": "the recovered model in memory",
        "whole": dense,
        "fewer experts": f"{dense} whose routers cannot choose these experts",
        "fewer experts per token": f"{dense} whose routers choose as few experts",
    }
    return words[kind]


def match_clause(proof: Proof) -> str:
    """Say in a few words what a complete proof has shown."""
    words: dict[Reference, str] = {
        "dense": "the original without these blocks",
        "recovered": "the recovered model in memory",
        "whole": "the original",
        "fewer experts": "the original without these experts",
        "fewer experts per token": "the original with as few experts for each token",
    }
    where = ", in sentence-transformers" if "same vectors" in proof.checks else ""
    return f"matches {words[proof.reference]}{where}"


def _how_close(difference: float | None, allowed: str = "") -> str:
    if not difference:
        return "bitwise equal to those"
    return f"within {difference:.1g} of the largest{allowed} of those"


def check_clauses(proof: Proof, dense: str = "the dense model") -> list[str]:
    """Return a clause for each check that passed, calling the dense model `dense`."""
    weights = dense
    if proof.reference == "recovered":
        weights += " or the new values"
    compared = describe_reference(proof.reference, dense)
    if "same tokens" in proof.checks:
        compared += ", for the tokens that stay"
    close = _how_close(proof.logits_difference, f" (allowed: {proof.logits_tolerance or 0:.1g})")
    words: dict[Check, str] = {
        "complete": "every planned file is there and complete, and no other",
        "same bytes": f"the bytes of every weight are those of {weights}",
        "same tokens": "text of the scripts that stay gets the same tokens",
        "spells others": "other text still encodes, and decodes as before",
        "loads": "stock transformers finds every weight of the config in the files, and no other",
        "same logits": f"its logits on {proof.prompt_tokens} prompt tokens ({proof.prompt}) are "
        f"{close} of {compared}",
        "every expert": "each expert, used by force, gives what it gave before",
        "generates": "it generates with the KV cache",
        "same outputs": f"its outputs for padded texts ({proof.prompt_tokens} positions) are "
        f"{close} of {compared}",
        "same vectors": f"stock sentence-transformers loads it, and its vectors are "
        f"{_how_close(proof.vectors_difference)}",
        "saves again": "transformers saves it again, with the same weights",
    }
    return [words[check] for check in proof.checks]
