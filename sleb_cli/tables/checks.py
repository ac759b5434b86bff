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


def match_clause(kind: Reference) -> str:
    """Say in a few words what a complete proof has shown."""
    words: dict[Reference, str] = {
        "dense": "the original without these blocks",
        "recovered": "the recovered model in memory",
        "whole": "the original",
        "fewer experts": "the original without these experts",
        "fewer experts per token": "the original with as few experts for each token",
    }
    return f"matches {words[kind]}"


def check_clauses(proof: Proof, dense: str = "the dense model") -> list[str]:
    """Return a clause for each check that passed, calling the dense model `dense`."""
    weights = dense
    if proof.reference == "recovered":
        weights += " or the new values"
    compared = describe_reference(proof.reference, dense)
    if "same tokens" in proof.checks:
        compared += ", for the tokens that stay"
    close = "bitwise equal to those"
    if proof.logits_difference:
        close = (
            f"within {proof.logits_difference:.1g} of the largest "
            f"(allowed: {proof.logits_tolerance:.1g}) of those"
        )
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
        "saves again": "transformers saves it again, with the same weights",
    }
    return [words[check] for check in proof.checks]
