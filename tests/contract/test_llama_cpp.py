"""llama.cpp, from a wheel in a virtual environment of its own, runs the files that we cut."""

import json
import subprocess
import venv

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, SmolLM3Config

from conftest import calibration, save_model
from families import experts_config
from gguf_models import convert_llama, write_llama_gguf
from sleb_cli.engine.cut.blocks.gguf_blocks import GgufBlockCut
from sleb_cli.engine.gguf.file import read_gguf, write_gguf

PROMPT = list(range(40, 60))
NEW_TOKENS = 32

GENERATE = """
import json, sys
from xllamacpp import CommonParams, Server

path, prompt, count = json.loads(sys.argv[1])
settings = CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = path, 128, 1, 10
asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
asked["return_tokens"] = True
print(json.dumps(Server(settings).handle_completions(asked)["__verbose"]["tokens"]))
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Generate greedily with llama.cpp, which llama-cpp-python would compile for minutes."""
    home = tmp_path_factory.mktemp("llama-cpp")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "xllamacpp"],
        check=True,
    )

    def generate(path):
        request = json.dumps([str(path), PROMPT, NEW_TOKENS])
        done = subprocess.run([python, "-c", GENERATE, request], check=True, capture_output=True)
        return json.loads(done.stdout)

    return generate


def generate_with_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
    return text[0, len(PROMPT) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "type_"), [(4, Type.F32), (2, Type.F32), (4, Type.Q8_0)])
def test_it_generates_what_transformers_generates(sleb, llama_cpp, tmp_path, kv_heads, type_):
    source = write_llama_gguf(tmp_path / "tiny.gguf", 6, type_, kv_heads=kv_heads)
    sleb("apply", "--blocks", "4,1", "--source", source, "-o", "small.gguf")
    sleb("apply", tmp_path / "origin", "--blocks", "4,1", "-o", "small")
    found = llama_cpp(tmp_path / "small.gguf")
    expected = generate_with_transformers(tmp_path / "small")
    # Quantised, near ties fall the other way sooner or later; the first token of a sharp model does
    # not.
    compared = NEW_TOKENS if type_ is Type.F32 else 1
    assert found[:compared] == expected[:compared]
    assert llama_cpp(source) != found


@pytest.mark.slow
@pytest.mark.parametrize("removals", [(0, 1, 2, 3), (7,), (5,), (2, 3)])
def test_settings_depend_on_block_numbers_only_where_the_table_says(
    run_sleb, llama_cpp, tmp_path, removals
):
    """SmolLM3 in llama.cpp has no rotary positions in the last of every four blocks, whatever a
    file says.
    """
    config = SmolLM3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_theta=10000.0,
        no_rope_layer_interval=4,
        tie_word_embeddings=False,
    )
    source = write_llama_gguf(tmp_path / "tiny.gguf", 8, architecture="smollm3", config=config)
    assert llama_cpp(source) == generate_with_transformers(tmp_path / "origin")
    blocks = ",".join(map(str, removals))
    assert run_sleb("apply", tmp_path / "origin", "--blocks", blocks, "-o", "small").exit_code == 0
    passes = run_sleb("apply", "--blocks", blocks, "--source", source, "--no-verify").exit_code == 0
    write_gguf(
        GgufBlockCut(removals).header(read_gguf(source)),
        tmp_path / "forced.gguf",
        lambda size: None,
    )
    agrees = llama_cpp(tmp_path / "forced.gguf") == generate_with_transformers(tmp_path / "small")
    assert agrees == passes == (removals in [(0, 1, 2, 3), (7,)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_it_runs_a_file_without_some_experts(sleb, llama_cpp, tmp_path, text_file, architecture):
    if architecture == "qwen3moe":
        config = experts_config(
            "qwen3_moe",
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = experts_config("gpt_oss", rope_parameters=rope)
    folder = save_model(tmp_path / "origin", config)
    source = convert_llama(folder, tmp_path / "model.gguf", Type.F32, architecture=architecture)
    sleb("search", folder, "--unit", "experts", "--remove", 2, *calibration(text_file))
    sleb("apply", "plan.json", "-o", "small")
    sleb("apply", "plan.json", "--source", source, "-o", "small.gguf")
    found = llama_cpp(tmp_path / "small.gguf")
    expected = generate_with_transformers(tmp_path / "small")
    assert found[:16] == expected[:16]  # rounding decides a choice of experts sooner or later
    assert llama_cpp(source)[:16] != found[:16]
