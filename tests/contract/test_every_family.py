"""Every causal language model of transformers works, or is refused at once, as
docs/reference/families.md says.
"""

import json

import pytest

from conftest import save_model, slow
from families import FAMILIES, NEWER, ON_THE_HUB, READERS, tiny_config
from survey import DOCUMENT, WORKS, survey, survey_reader

IN_CI = """
bart diffllama ernie4_5_moe gemma3n_text gpt_neo jamba llama4_text longcat_flash minicpm3 nemotron_h
qwen3_next recurrent_gemma xlm
""".split()
"""Those that stand for the others: each way to say a block's kind, and each way to be refused.

The most used ones are also in test_families.py.
"""

READERS_IN_CI = ["albert", "bert", "deberta-v2", "gte", "llama", "modernbert"]
"""Refused, the usual, relative positions, other names in files, a family that we name, and kinds
of blocks.
"""

OTHERS = [slow(name) for name in FAMILIES if name not in IN_CI]


@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
def test_it_works_or_is_refused_as_documented(model_type, tmp_path):
    assert survey(model_type, tmp_path) in DOCUMENT.read_text().splitlines()


def documented_readers():
    """Return the names of families in the list of those that read, by what stands before them."""
    section = DOCUMENT.read_text().partition("## Models that only read\n")[2].partition("\n## ")[0]
    outcomes = {}
    for line in section.splitlines():
        if line.startswith("- "):
            outcome, _, names = line.removeprefix("- ").rpartition(": ")
            outcomes[outcome] = names.split(", ")
    return outcomes


@pytest.mark.parametrize(
    "model_type", [name if name in READERS_IN_CI else slow(name) for name in READERS]
)
def test_it_reads_or_is_refused_as_documented(model_type, tmp_path):
    assert model_type in documented_readers()[survey_reader(model_type, tmp_path)]


def test_the_document_lists_every_family_that_reads():
    outcomes = documented_readers()
    listed = [name for names in outcomes.values() for name in names]
    assert sorted(listed) == READERS
    readme = (DOCUMENT.parents[2] / "README.md").read_text()
    assert f"and {len(outcomes[WORKS])} that only read" in readme


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
    assert sorted({*listed} - {"family"}) == sorted({*FAMILIES} | NEWER)
