"""`sleb export`, through `main()`."""

import json

import yaml


def test_indices_are_what_blocks_takes(run_sleb, llama_plan, tmp_path):
    result = run_sleb("export", llama_plan, "--to", "indices", "-q")
    removals = json.loads(llama_plan.read_text())["removals"]
    assert result.stdout == ",".join(map(str, removals)) + "\n"
    assert result.stderr == ""
    data = json.loads(run_sleb("export", llama_plan, "--to", "indices", "--json").stdout)
    assert data["removals"] == removals
    assert sorted(data["kept"] + removals) == list(range(6))


def test_a_mergekit_recipe_stacks_what_is_kept(run_sleb, tiny_llama, tmp_path):
    result = run_sleb("export", tiny_llama, "--blocks", "4,1,2", "--to", "mergekit", "-o", "m.yaml")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    recipe = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert recipe["merge_method"] == "passthrough"
    assert recipe["dtype"] == "float32"
    sources = [piece["sources"][0] for piece in recipe["slices"]]
    assert [source["layer_range"] for source in sources] == [[0, 1], [3, 4], [5, 6]]
    assert {source["model"] for source in sources} == {str(tiny_llama)}


def test_what_cannot_be_is_refused(run_sleb, tiny_llama, tmp_path):
    result = run_sleb("export", tiny_llama, "--blocks", "1", "--to", "merge")
    assert (result.exit_code, "Did you mean 'mergekit'?" in result.stderr) == (2, True)
    result = run_sleb("export", tiny_llama, "--to", "indices")
    assert (result.exit_code, "Which blocks" in result.stderr) == (2, True)
    result = run_sleb("export", tiny_llama, "--blocks", "1")
    assert (result.exit_code, "--to" in result.stderr) == (2, True)
    (tmp_path / "m.yaml").touch()
    result = run_sleb("export", tiny_llama, "--blocks", "1", "--to", "mergekit", "-o", "m.yaml")
    assert (result.exit_code, "m.yaml exists" in result.stderr) == (8, True)
