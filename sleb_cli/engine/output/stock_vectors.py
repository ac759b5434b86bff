"""The vectors of a checkpoint in stock sentence-transformers, an optional package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sleb_cli.engine.output.proof_of_files import proof_error
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.engine.third_party import translate_errors

TOLERANCE = 1e-5
"""The allowed difference of vectors in a wider data type: its pooling adds in another order."""


def is_installed() -> bool:
    """Whether sentence-transformers is installed, and can be imported."""
    try:
        import sentence_transformers  # noqa: F401
    except Exception:  # a package that does not fit torch or transformers can raise anything
        return False
    return True


def compute(
    folder: Path, texts: list[str], placement: Placement, *, trust_remote_code: bool
) -> Tensor:
    """Load the checkpoint with sentence-transformers; return the texts' vectors, [texts, width]."""
    from sentence_transformers import SentenceTransformer  # takes seconds

    fails = "sentence-transformers makes no vectors with it"
    with translate_errors(lambda words: proof_error(f"{fails}: {words}")):
        model: Any = SentenceTransformer(
            str(folder),
            device=str(placement.device),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": placement.dtype},
        )
        vectors: Tensor = model.to(placement.dtype).encode(
            texts, convert_to_tensor=True, show_progress_bar=False
        )
    return vectors
