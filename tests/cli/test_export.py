"""`sleb export`, through `main()`."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import yaml
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

import sleb_plugins as sleb
from conftest import llama_config, save_model
from gguf_models import metadata_of, tensors_of, write_gguf, write_llama_gguf
from sleb_cli import exporters
from sleb_cli.exporters import checkpoint


@pytest.fixture
def export(run_sleb):
    """Export something, and give the result."""

    def run(subject, blocks, to, *options, code=0, says=""):
        given = [*(["--blocks", blocks] if blocks else []), *(["--to", to] if to else [])]
        result = run_sleb("export", subject, *given, *options)
        assert (result.exit_code, says in result.stdout + result.stderr) == (code, True), result.stderr
        return result

    return run


def test_indices_are_what_blocks_takes(export, llama_plan):
    result = export(llama_plan, None, "indices", "-q")
    removals = json.loads(llama_plan.read_text())["removals"]
    assert (result.stdout, result.stderr) == (",".join(map(str, removals)) + "\n", "")
    data = json.loads(export(llama_plan, None, "indices", "--json").stdout)["document"]
    assert data["removals"] == removals
    assert sorted(data["kept"] + removals) == list(range(6))


def test_a_mergekit_recipe_stacks_what_is_kept(export, tiny_llama, tmp_path):
    assert export(tiny_llama, "4,1,2", "mergekit", "-o", "m.yaml").stdout == "wrote m.yaml\n"
    recipe = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert recipe["merge_method"] == "passthrough"
    assert recipe["dtype"] == "float32"
    sources = [piece["sources"][0] for piece in recipe["slices"]]
    assert [source["layer_range"] for source in sources] == [[0, 1], [3, 4], [5, 6]]
    assert {source["model"] for source in sources} == {str(tiny_llama)}


def test_what_cannot_be_is_refused(export, tiny_llama, tmp_path):
    export(tiny_llama, "1", "merge", code=2, says="Did you mean 'mergekit'?")
    export(tiny_llama, None, "indices", code=2, says="No blocks given")
    export(tiny_llama, "1", None, code=2, says="--to")
    (tmp_path / "m.yaml").touch()
    export(tiny_llama, "1", "mergekit", "-o", "m.yaml", code=8, says="m.yaml already exists")


def test_a_gguf_of_the_model_itself_or_of_another_file(export, tmp_path):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, Type.Q8_0)
    shown = export(source, "4,1", "gguf").stdout
    for words in (
        "wrote tiny-sleb-4-blocks.gguf: 4 blocks",
        "proven in bfloat16",
        "llama-cli -m tiny-sleb-4-blocks.gguf",
    ):
        assert words in shown
    options = [tmp_path / "origin", "4,1", "gguf", "--source", source]
    data = json.loads(export(*options, "-o", "other.gguf", "--json").stdout)
    assert (data["exporter"], data["lines"]) == ("gguf", ["run it: llama-cli -m other.gguf"])
    assert [(written["kind"], written["removals"]) for written in data["written"]] == [("gguf", [4, 1])]
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "tiny-sleb-4-blocks.gguf").read_bytes()
    export(*options, "-o", "other.gguf", code=8, says="other.gguf already exists")
    export(*options, "-o", "other.gguf", "--force")


def test_a_gguf_needs_a_source_that_fits(export, tiny_llama, tmp_path):
    export(tiny_llama, "1", "gguf", code=2, says="Name one with --source")
    write_llama_gguf(tmp_path / "short.gguf", 5)
    options = [tiny_llama, "1", "gguf", "--source", "short.gguf"]
    export(*options, code=3, says="holds another model (llama, 5 blocks)")
    export(*options, "--any-model")
    export(tiny_llama, "1", "indices", "--source", "short.gguf", code=2, says="--source does not apply to --to indices")


def test_the_command_for_llama_quantize(export, tiny_llama, tmp_path):
    expected = "llama-quantize --prune-layers 4,1 tiny-llama.gguf tiny-llama-sleb-4-blocks.gguf COPY\n"
    assert export(tiny_llama, "4,1", "llama-quantize", "-q").stdout == expected
    source = write_llama_gguf(tmp_path / "a name.gguf", 6)
    command = json.loads(export(source, "4,1", "llama-quantize", "--json").stdout)["document"]["command"]
    assert command[3:] == [str(source), "a name-sleb-4-blocks.gguf", "COPY"]
    export(source, "4,1", "llama-quantize", "-o", "run.sh")
    assert shlex.split((tmp_path / "run.sh").read_text()) == command


def test_llama_quantize_is_not_sent_where_it_would_go_wrong(export, tiny_llama, tmp_path):
    for architecture, values, code, message in (
        ("llama", {"attention.head_count": 4}, 0, ""),
        ("llama", {"attention.head_count_kv": [2] * 5 + [4]}, 4, "not correct llama.attention.head_count_kv"),
        ("deepseek", {"leading_dense_block_count": 2}, 4, "not correct deepseek.leading_dense_block_count"),
        ("gemma2", {}, 4, "the last of every 2 blocks"),
    ):
        write_gguf(tmp_path / "a.gguf", architecture, 6, values)
        export(tiny_llama, "1", "llama-quantize", "--source", "a.gguf", code=code, says=message)


@pytest.mark.parametrize(
    ("system", "turn", "expected"),
    [
        ("<s>S {}</s>", "<s>{} {}</s>", "{{ if .System }}<s>S {{ .System }}</s><s>user {{ else }}<s>user {{ end }}"
         '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}</s><s>assistant'
         '{{ else if eq .Role "assistant" }} {{ .Content }}</s><s>user {{ end }}{{ end }}'),
        (None, "<s>{} {}</s>", "<s>user {{ if .System }}{{ .System }}\n\n{{ end }}"
         '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}</s><s>assistant'
         '{{ else if eq .Role "assistant" }} {{ .Content }}</s><s>user {{ end }}{{ end }}'),
        ("", "{} {}{{{{ messages | length }}}}", None),
        ("", None, None),
    ],
    ids=["system", "no system", "more than messages", "none"],
)  # fmt: skip
def test_a_modelfile_has_the_chat_template_in_the_language_of_ollama(export, tmp_path, system, turn, expected):
    model = save_model(tmp_path / "chatty", llama_config(4))
    if turn is not None:
        led = "{{ raise_exception('no') }}" if system is None else system.format("{{ m.content }}")
        said = turn.format("{{ m.role }}", "{{ m.content }}")
        (model / "chat_template.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'system' %}" + led + "{% else %}" + said + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant{% endif %}"
        )
    document = json.loads(export(model, "1", "ollama", "--json").stdout)["document"]
    assert (document["from"], document["template"]) == ("./chatty-sleb-3-blocks", expected)
    shown = export(model, "1", "ollama", "-q").stdout.splitlines()
    assert shown[1] == "FROM ./chatty-sleb-3-blocks"
    assert ("No TEMPLATE" in shown[2]) == (expected is None)
    assert document["stop"] == (["</s>"] if expected else [])


@pytest.mark.parametrize("name", ["hf", "vllm"])
def test_a_checkpoint_for_stock_engines(export, tiny_llama, tmp_path, name):
    result = export(tiny_llama, "4,1", name, "-o", "a folder")
    assert "wrote a folder: 4 blocks" in result.stdout
    assert "bitwise equal" in result.stdout
    assert ("serve it: vllm serve 'a folder'" in result.stdout) == (name == "vllm")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a folder").config.num_hidden_layers == 4
    export(tiny_llama, "4,1", name, "-o", "a folder", code=8, says="a folder already exists")


def test_an_installed_vllm_is_asked_for_the_architecture(export, tiny_llama, tmp_path, monkeypatch):
    registry = SimpleNamespace(get_supported_archs=lambda: ["MistralForCausalLM"])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: name == "vllm")
    export(tiny_llama, "1", "vllm", "-o", "out", code=4, says="vLLM does not support LlamaForCausalLM")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no class"),
        ({"architectures": ["LamaForCausalLM"]}, "names no class"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
            "needs code that comes with the model",
        ),
        ({"scales": {"scale_of_layer": [1.0, 2.0, 3.0]}}, "scale_of_layer of the pruned config still has 3 values"),
    ],
)
def test_a_config_that_stock_engines_do_not_read_is_refused(export, tmp_path, changes, message):
    folder = save_model(tmp_path / "odd", llama_config(3))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    result = export(folder, "1", "hf", "--trust-remote-code", "-o", "out", code=4, says=message)
    assert ("sleb has not been tested with" in result.stderr) == ("model_type" in changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


class Both(sleb.FileExporter):
    """A plugin's exporter that makes use of all that the engine offers."""

    name = "both"
    uses_source = True

    def export(self, pruning, output, writer):
        seen = []
        folder = writer.write_checkpoint(output / "hf", lambda aside: seen.append((aside / "config.json").is_file()))
        file = writer.write_gguf(pruning.source_file, output / "model.gguf")
        assert seen == [True]
        return [f"{folder.name} and [{file.name}]"]


def test_a_plugin_may_write_a_folder_and_a_file(export, tmp_path, monkeypatch):
    offered = [*exporters.sleb_exporters(), Both()]
    monkeypatch.setattr(exporters, "sleb_exporters", sleb.hookimpl(lambda: offered))
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6)
    (tmp_path / "out").mkdir()
    result = export(source, "4,1", "both", "-o", "out")
    assert result.stdout.count("wrote out/") == 2
    assert result.stdout.endswith("hf and [model.gguf]\n")
    assert len(tensors_of(tmp_path / "out" / "model.gguf")) == 3 + 4 * 9
    assert metadata_of(tmp_path / "out" / "model.gguf")["llama.block_count"] == 4
