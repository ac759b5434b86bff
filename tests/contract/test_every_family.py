"""Every causal language model that transformers knows works, or is refused at once; docs/families.md says which."""

import pytest

from families import FAMILIES
from survey import DOCUMENT, line, survey

IN_CI = [
    "bamba", "bart", "bert", "bloom", "cohere2", "deepseek_v3", "diffllama", "ernie4_5_moe", "falcon_h1",
    "gemma3_text", "gemma3n_text", "gpt_neo", "gpt_oss", "granite_swa", "jamba", "lfm2", "llama", "llama4_text",
    "longcat_flash", "mamba", "minicpm3", "mixtral", "nemotron_h", "opt", "qwen2", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "smollm3", "xlm",
]  # fmt: skip
"""Thirty that stand for the others: each way to say a block's kind, each way to be refused, the most used ones."""

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in IN_CI]


@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
def test_it_works_or_is_refused_as_documented(model_type, tmp_path):
    assert line(survey(model_type, tmp_path)) in DOCUMENT.read_text().splitlines()


def test_the_document_lists_every_family():
    lines = DOCUMENT.read_text().splitlines()
    listed = [row.split(" | ")[0].removeprefix("| ") for row in lines if row.startswith("| ") and row.count(" | ") > 1]
    assert sorted(name for name in listed if name != "family") == FAMILIES
