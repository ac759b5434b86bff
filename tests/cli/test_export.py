"""`sleb export`, through `main()`: what other tools read."""

import json
import shlex
import shutil

import pytest
import yaml

from conftest import save_model
from families import tiny_config
from gguf_models import write_gguf, write_llama_gguf
from sleb_cli.exporters import sleb_exporters
from sleb_cli.requests import ExportRequest


@pytest.fixture
def export(run_sleb):
    """Export something, and give the result."""

    def run(subject, blocks, to, *options, code=0, says=""):
        if blocks:
            options = ("--blocks", blocks, *options)
        result = run_sleb("export", subject, "--to", to, *options)
        assert result.exit_code == code, result.stderr
        assert says in result.stdout + result.stderr
        return result

    return run


def test_indices_are_what_blocks_takes(export, llama_plan):
    result = export(llama_plan, None, "indices", "-q")
    removals = json.loads(llama_plan.read_text())["removals"]
    assert (result.stdout, result.stderr) == (",".join(map(str, removals)) + "\n", "")
    data = export(llama_plan, None, "indices", "--json").data
    assert (data["exporter"], data["text"], data["file"]) == ("indices", result.stdout, None)


def test_help_names_every_format():
    help_of_to = ExportRequest.__dataclass_fields__["to"].metadata["doc"].help
    assert [name for name in help_of_to.split(", ") if "plugin" not in name] == [
        each.name for each in sleb_exporters()
    ]


def test_a_mergekit_recipe_stacks_what_is_kept(export, tiny_llama, tmp_path):
    assert export(tiny_llama, "4,1,2", "mergekit", "-o", "m.yaml").stdout == "wrote m.yaml\n"
    recipe = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert (recipe["merge_method"], recipe["dtype"]) == ("passthrough", "float32")
    sources = [piece["sources"][0] for piece in recipe["slices"]]
    assert [source["layer_range"] for source in sources] == [[0, 1], [3, 4], [5, 6]]
    assert {source["model"] for source in sources} == {str(tiny_llama)}
    # In a word, what follows + is an adapter, and what follows @ a revision.
    named = shutil.copytree(tiny_llama, tmp_path / "a+b@c")
    source = yaml.safe_load(export(named, "1", "mergekit").stdout)["slices"][0]["sources"][0]
    assert source["model"] == {"model": {"path": str(named), "revision": None}}


def test_the_command_for_llama_quantize(export, tiny_llama, tmp_path):
    expected = (
        "llama-quantize --prune-layers 4,1 tiny-llama.gguf tiny-llama-sleb-4-blocks.gguf COPY\n"
    )
    assert export(tiny_llama, "4,1", "llama-quantize", "-q").stdout == expected
    source = write_llama_gguf(tmp_path / "a name.gguf", 6)
    export(source, "4,1", "llama-quantize", "-o", "run.sh")
    assert shlex.split((tmp_path / "run.sh").read_text())[3:] == [
        str(source),
        "a name-sleb-4-blocks.gguf",
        "COPY",
    ]
    source.rename("a blob")
    said = export(tiny_llama, "4,1", "llama-quantize", "--source", "a blob", "-q").stdout
    assert shlex.split(said)[3:] == ["a blob", "a blob-sleb-4-blocks.gguf", "COPY"]


@pytest.mark.parametrize(
    ("architecture", "values", "code", "says"),
    [
        ("llama", {"attention.head_count": 4}, 0, ""),
        ("llama", {"attention.head_count_kv": [2, 2, 2, 2, 2, 4]}, 4, "attention.head_count_kv"),
        ("deepseek", {"leading_dense_block_count": 2}, 4, "leading_dense_block_count"),
        ("gemma2", {}, 4, "the last of every 2 blocks"),
    ],
)
def test_llama_quantize_is_not_sent_where_it_would_go_wrong(
    export, tiny_llama, tmp_path, architecture, values, code, says
):
    write_gguf(tmp_path / "a.gguf", architecture, 6, values)
    export(tiny_llama, "1", "llama-quantize", "--source", "a.gguf", code=code, says=says)


@pytest.mark.parametrize("to", ["mergekit", "llama-quantize"])
def test_an_exporter_that_only_counts_refuses_blocks_of_several_kinds(export, tmp_path, to):
    # With windows in the last three of six blocks.
    mixed = save_model(tmp_path / "mixed", tiny_config("qwen2"))
    wrong = f"{to} would renumber the blocks of {mixed} but not correct layer_types."
    export(mixed, "1", to, code=4, says=wrong)
    export(mixed, "4", to)
    alike = tiny_config("qwen2", use_sliding_window=False, layer_types=None)
    export(save_model(tmp_path / "alike", alike), "1", to)
