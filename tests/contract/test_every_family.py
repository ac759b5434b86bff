"""Every causal language model of transformers works, or is refused at once, as
docs/reference/families.md says.
"""

import json

import pytest

from conftest import save_model, slow
from families import FAMILIES, ON_THE_HUB, tiny_config
from survey import DOCUMENT, survey

IN_CI = """
bart diffllama ernie4_5_moe gemma3n_text gpt_neo jamba llama4_text longcat_flash minicpm3 nemotron_h
qwen3_next recurrent_gemma xlm
""".split()
"""Those that stand for the others: each way to say a block's kind, and each way to be refused.

The most used ones are also in test_families.py.
"""

OTHERS = [slow(name) for name in FAMILIES if name not in IN_CI]


@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
def test_it_works_or_is_refused_as_documented(model_type, tmp_path):
    assert survey(model_type, tmp_path) in DOCUMENT.read_text().splitlines()


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_configs_as_the_hub_has_them(run_sleb, tmp_path, name):
    model_type, settings, changes = ON_THE_HUB[name]
    folder = save_model(tmp_path / "model", tiny_config(model_type, **settings))
    config = json.loads((folder / "config.json").read_text()) | changes
    written = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(written))
    result = run_sleb("apply", folder, "--blocks", "1,4", "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["proof"]["logits_difference"] == 0
    pruned = json.loads((tmp_path / "out" / "config.json").read_text())
    # Other engines read other keys: none of these may speak of all blocks any more.
    stale = [
        key
        for key, value in pruned.items()
        if isinstance(value, list | str) and len(value) == 6 and key in changes
    ]
    assert stale == []


def test_the_document_lists_every_family():
    lines = DOCUMENT.read_text().splitlines()
    listed = [
        row.split(" | ")[0].removeprefix("| ")
        for row in lines
        if row.startswith("| ") and row.count(" | ") > 1
    ]
    assert sorted(name for name in listed if name != "family") == FAMILIES
