"""The front matter of a model card: what the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sleb_cli.engine.files.copying import leads_out
from sleb_cli.engine.model.source import ModelSource

# The Hub knows adapter, merge, quantized and finetune. Of these, only the last is a model of the base model's own kind,
# changed, which is also what it takes any other model with a base model for.
RELATION = "finetune"

BY_US = "sleb"
"""The argument of a metric by which our results are known: the version that measured them."""

_TAGS = ("sleb", "pruned")
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?\n)---\s*$", re.MULTILINE | re.DOTALL)
_MODEL_INDEX = re.compile(r"^model-index:.*\n(?:[ \t#-].*\n|\n)*", re.MULTILINE)


def front_matter(source: ModelSource) -> str:
    """Return the card's front matter; licence, languages and tags are those of the base model's own card."""
    base = _of_base(source.folder)
    data = ModelCardData(
        base_model=source.id if source.revision else None,
        base_model_relation=RELATION if source.revision else None,
        library_name="transformers",
        pipeline_tag=_word(base.get("pipeline_tag")) or "text-generation",
        license=_words(base.get("license")) or None,
        # A licence that the Hub does not know is "other", and these say which.
        license_name=_word(base.get("license_name")),
        license_link=_word(base.get("license_link")),
        language=_words(base.get("language")) or None,
        # Some programs write what they know of a base model as tags, which is not true of this one.
        tags=[*_TAGS, *(tag for tag in _listed(base.get("tags")) if not tag.startswith("base_model:"))],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def with_results(card: str, name: str, results: Sequence[EvalResult]) -> str:
    """Return a card with these results of ours in its front matter; all else, and results of others, stay as they are.

    Raises:
        ValueError, yaml.YAMLError: its front matter cannot be read.
    """
    found = _FRONT_MATTER.search(card)
    if found is None:
        return card
    data: Any = ModelCard(card).data
    others = [old for old in data.eval_results or () if BY_US not in (old.metric_args or {})]
    index = ModelCardData(model_name=data.model_name or name, eval_results=[*others, *results])
    block = f"{index.to_yaml()}\n" if others or results else ""
    kept = _MODEL_INDEX.sub("", found[1])
    return f"{card[: found.start(1)]}{kept}{block}{card[found.end(1) :]}"


def _of_base(folder: Path) -> dict[str, Any]:
    """Return the front matter of the base model's card, or nothing if it has none that can be read."""
    path = folder / "README.md"
    if not path.is_file() or leads_out(path, folder):
        return {}
    try:
        found = _FRONT_MATTER.search(path.read_text(encoding="utf-8"))
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    # Norwegian is `no`, which YAML takes for false.
    return [word for word in ("no" if each is False else _word(each) for each in values) if word]


def _words(value: Any) -> Any:
    """Return one word as it is, or several as a list."""
    words = _listed(value)
    return words if isinstance(value, list) else next(iter(words), None)
