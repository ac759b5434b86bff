"""How a model that only reads is run in Python."""

from sleb_cli.records import OutputKind


def python_lines(output: OutputKind, model: str) -> tuple[str, str]:
    """Return the import, and the expression that runs a model, a folder or a name of the Hub."""
    if output == "vectors":
        name = "SentenceTransformer"
        return f"from sentence_transformers import {name}", f"{name}({model!r}).encode(texts)"
    if output == "scores":
        name = "CrossEncoder"
        return f"from sentence_transformers import {name}", f"{name}({model!r}).predict(pairs)"
    run = f"pipeline('text-classification', {model!r})(texts)"
    return "from transformers import pipeline", run
