"""Files that lie, drawn at random: each ends well, or with a sentence, and nothing outside is touched."""

import io
import json
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from faults.bases import (
    APPLY,
    CHAT,
    CODE,
    CUT,
    CUT_GGUF,
    EVAL,
    HEAL,
    PLANNED,
    RESUME,
    ROWS_OF_PLAN,
    SEARCH,
    STREAM,
)  # fmt: skip
from faults.conftest import counts
from faults.hostile import FOLDER, PIPE, PLACE, Case, link, require_well, run_cases
from faults.lies import (
    WORDS,
    Runs,
    damaged,
    documents,
    drawn,
    gguf_files,
    gguf_of,
    hostile,
    lying,
    rows,
    saved_as,
    texts,
    to_text,
    weight_files,
    words,
)  # fmt: skip


def replaced(base, file, contents, *commands):
    """Draw cases in which this file of a base has these contents."""
    return st.builds(lambda content, command: Case(command, {file: content}, base), contents, st.sampled_from(commands))


def lies_in(base, file, lies, *commands):
    """Return a function that draws cases in which this file of a base lies, as `lies` draws it from its content."""
    return lambda bases: replaced(bases[base], file, lies((bases[base] / file).read_bytes()), *commands)


def weights(bases):
    files = [(base, f"model/{path.name}") for base in ("llama", "llama", "shards", "gpt2")
             for path in sorted((bases[base] / "model").glob("*.safetensors"))]  # fmt: skip
    return st.one_of(lies_in(*file, weight_files, *[CUT] * 16, APPLY, EVAL)(bases) for file in files)


INDEX = "model.safetensors.index.json"
SHARDS = [
    *WORDS, "../outside/../outside/model.safetensors", "sub/../../outside/model.safetensors", "/dev/stdin", "x" * 300,
    "config.json", INDEX, "tokenizer.json", "none.safetensors", "x/" * 3000, "away", "away/model.safetensors", "C:\\x",
    "link.safetensors", "loop.safetensors", "pipe.safetensors", "folder.safetensors", "pytorch_model.bin",
    "./model-00001-of-00004.safetensors",
]  # fmt: skip
BESIDE = {
    "model/away": link("../outside"), "model/link.safetensors": link("../outside/model.safetensors"),
    "model/loop.safetensors": link("loop.safetensors"), "model/pipe.safetensors": PIPE,
    "model/folder.safetensors": FOLDER,
}  # fmt: skip


def indices(bases):
    base, index = bases["shards"], json.loads((bases["shards"] / "model" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    places = st.sampled_from([*SHARDS, *shards])
    contents = [None, b"", PIPE, FOLDER, link("../outside/model.safetensors"), link(shards[0]), link("..")]
    everywhere = places.map(lambda place: to_text({"weight_map": dict.fromkeys(index["weight_map"], place)}))
    lies = documents(index["weight_map"], values=places, keys=words).map(lambda text: b'{"weight_map": %s}' % text)
    beside = replaced(base, f"model/{INDEX}", lies | everywhere | documents(index), *[CUT] * 10, APPLY, EVAL)
    return beside.map(lambda case: replace(case, files=case.files | BESIDE)) | st.sampled_from(shards).flatmap(
        lambda shard: replaced(base, f"model/{shard}", st.sampled_from(contents), CUT)
    )


CONFIG_KEYS = """rope_theta rope_scaling layer_types auto_map quantization_config _name_or_path text_config torch_dtype
id2label num_labels pad_token_id sliding_window is_encoder_decoder is_decoder attn_implementation pruned_heads
_attn_implementation _attn_implementation_internal adapter_path tokenizer_class chunk_size_feed_forward
output_attentions return_dict problem_type base_model_tp_plan use_return_dict name_or_path attribute_map sub_configs
to_dict vision_config torchscript label2id num_nextn_predict_layers per_layer_config _commit_hash no_split_modules
keys_to_ignore gguf_file subfolder cache_dir revision code_revision trust_remote_code device_map state_dict from_tf
force_download local_files_only token __class__ __init__ __dict__ self kwargs cls""".split()
SETTINGS = [
    {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "fp8"}, "gptq",
    {"quant_method": "awq", "modules_to_not_convert": ["model.layers.1.x", ".*(a+)+$"]}, {"quant_method": ["x"]},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:(x+x+)+y"]}}}, {"bits": 4},
    {"quant_method": "mxfp4"}, {"quant_method": "torchao"}, {"quant_method": "quanto"}, {"quant_method": "../x"},
    {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, {"AutoConfig": "../outside/code.C"}, "gelu", "silu",
    {"AutoConfig": "org/repo--code.C"}, {"AutoTokenizer": ["code.T", None]}, {"rope_type": "yarn", "factor": 1e308},
    {"AutoModelForCausalLM": "../outside/code--x.y"}, {"rope_type": "longrope", "long_factor": [1] * 10**4}, "eager",
    {"rope_type": "dynamic", "factor": "2"}, {"rope_type": ["x"]}, {"rope_type": "linear", "factor": 0}, {"type": "x"},
    {"full_attention": {"rope_type": "default"}}, {"0": [0, 1]}, ["full_attention"] * 3, ["full_attention"] * 10**5,
    ["sliding_attention"] * 2 + ["x"], [["x"]] * 3, "full_attention", {"num_hidden_layers": 10**9}, "flex_attention",
    {"model_type": "llama", "num_hidden_layers": 3}, {str(10**9): "x"}, "float8_e4m3fn", "complex64", "int8",
    "torch.float32", "os.system", "flash_attention_2", "kernels-community/flash-attn", "org/repo@main:function",
    "LlamaTokenizer", "ByT5Tokenizer", "float64",
]  # fmt: skip


@st.composite
def configs(draw, bases):
    base = bases[draw(st.sampled_from(["llama", "llama", "gpt2", "shards"]))]
    config = json.loads((base / "model" / "config.json").read_text())
    names, values = st.sampled_from(CONFIG_KEYS + sorted(config)), hostile | st.sampled_from(SETTINGS)
    more = st.dictionaries(names, values, max_size=2)
    commands = [CUT] * 12 + [APPLY, SEARCH, EVAL]
    if draw(st.integers(0, 5)) == 0:
        # What the defaults of another type make may honestly be a huge model, and is not measured.
        text = to_text(config | draw(more) | {"model_type": draw(st.sampled_from(sorted(CONFIG_MAPPING_NAMES)))})
    else:
        counts = st.sampled_from([0, -1, 1, 2, 4, 5, 30, 10**4, 10**9, 3.0, "3", True, None, [3], 2**64])
        count = st.fixed_dictionaries({"n_layer" if base.name == "gpt2" else "num_hidden_layers": counts})
        changed = (more | count).map(lambda changes: to_text(config | changes))
        text = draw(changed | documents(config, values=values, keys=names))
    command = draw(st.sampled_from(commands))
    return Case(command, {"model/config.json": text, "model/code.py": CODE}, base)


OTHER_FILES = """special_tokens_map.json added_tokens.json tokenizer.model vocab.json merges.txt spiece.model vocab.txt
chat_template.jinja chat_template.json processor_config.json adapter_config.json preprocessor_config.json tekken.json
tiktoken.model additional_chat_templates/x.jinja""".split()
GENERATION = """max_length eos_token_id temperature top_p top_k num_beams repetition_penalty cache_implementation
bad_words_ids transformers_version stop_strings watermarking_config assistant_tokens custom_generate compile_config
guidance_scale do_sample max_new_tokens forced_eos_token_id pad_token_id use_cache""".split()
SPECIAL = [None, link("../outside/tokenizer.json"), link("loop"), link("/dev/zero"), PIPE, FOLDER]
IDS = st.sampled_from([-1, 320, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 1.5, "1"])
COMMANDS = (*[CUT] * 3, *[SEARCH] * 6, EVAL, APPLY)


def tokenizers(bases):
    base = bases["llama"]
    files = {name: json.loads((base / "model" / name).read_text())
             for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}  # fmt: skip
    tokenizer = files["tokenizer.json"]
    parts = [lying(tokenizer[part], values=IDS).map(lambda lie, part=part: to_text(tokenizer | {part: lie}))
             for part in ("added_tokens", "model")]  # fmt: skip
    settings = st.dictionaries(st.sampled_from(GENERATION), hostile, max_size=4)
    others = st.one_of(st.binary(max_size=50), hostile.map(to_text), st.sampled_from(SPECIAL))
    return st.one_of(
        *(replaced(base, f"model/{name}", documents(data), *COMMANDS) for name, data in files.items()),
        *(replaced(base, "model/tokenizer.json", part, *COMMANDS) for part in parts),
        replaced(base, "model/generation_config.json", settings.map(to_text), APPLY, EVAL, SEARCH),
        *(replaced(base, f"model/{name}", others, *COMMANDS) for name in OTHER_FILES),
    )


def pickles(bases):
    """Draw pickles that hold more than tensors, or less; what would run code is in test_trust.py."""
    honest = (bases["pickle"] / "model" / "pytorch_model.bin").read_bytes()
    tensors = torch.load(io.BytesIO(honest), weights_only=True)
    one = torch.ones(1)
    more = [
        5, {"b": one}, one.expand(10**12), torch.ones(4).to_sparse(), torch.ones(2, dtype=torch.complex128),
        torch.empty(4, device="meta"), Runs(torch.Tensor, 10**13), Runs(torch.zeros, 10**13), Runs(bytearray, 10**11),
        Runs(open, "../outside/note.txt"), Runs(eval, "__import__('os').abort()"),
    ]  # fmt: skip
    others = [
        *(tensors | {"a": value} for value in more), list(tensors.values()), one, None, {}, {"state_dict": tensors},
        tensors | {5: one}, tensors | {"../outside/x": one}, dict(list(tensors.items())[:3]),
    ]  # fmt: skip
    deep = [b"\x80\x02]" + b"]" * 10**6, b"\x80\x02" + b"(" * 10**6 + b"."]
    known = [*deep, b"R", b"\x80\x02}q", *map(saved_as, others)]
    contents = st.sampled_from(known) | st.sampled_from([honest, *known]).flatmap(damaged)
    return replaced(bases["pickle"], "model/pytorch_model.bin", contents, CUT, APPLY)


READ = """config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors README.md LICENSE
special_tokens_map.json chat_template.jinja added_tokens.json model.safetensors.index.json tokenizer.model code.py .x
pytorch_model.bin quantize_config.json adapter_config.json additional_chat_templates processor_config.json sub
""".split()
LINKS = """../outside/{name} ../outside @PLACE@/outside/{name} .. . {name} loop/{name} /dev/zero /dev/stdin / none
/proc/self/mem /proc/self/environ sub/../../outside/{name} away/{name} /proc/self/root@PLACE@/outside/{name}
config.json""".split()


@st.composite
def links(draw, bases):
    files = draw(st.sampled_from([{}, {"model/away": link("../outside"), "model/loop": link("loop")}]))
    for name in draw(st.lists(st.sampled_from(READ), min_size=1, max_size=3, unique=True)):
        target = link(draw(st.sampled_from(LINKS)).replace("{name}", name).replace("@PLACE@", PLACE))
        files = files | {f"model/{name}": draw(st.sampled_from([target] * 6 + [PIPE, FOLDER, b"", None]))}
    command = draw(st.sampled_from([CUT] * 6 + [APPLY, SEARCH, EVAL, CHAT]))
    return Case(command, files, bases[draw(st.sampled_from(["llama", "shards"]))])


def record(data):
    return documents(json.loads(data))


@st.composite
def journals(draw, bases):
    """Draw journals whose lines have the right checksums, and say what they like."""
    said = [json.loads(line[9:]) for line in (bases["journal"] / "out.json.journal").read_bytes().splitlines()]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(said) - 1))
        said[place] = draw(lying(said[place]) | hostile)
    lines = [b"%08x %s\n" % (zlib.crc32(line), line) for line in map(to_text, said)]
    data = b"".join(lines)
    data = draw(damaged(data)) if draw(st.integers(0, 4)) == 0 else data
    return Case(RESUME, {"out.json.journal": data}, bases["journal"])


def gguf(bases):
    path = bases["files"] / "whole.gguf"
    return replaced(bases["files"], "whole.gguf", gguf_files(gguf_of(path)) | damaged(path.read_bytes()), CUT_GGUF)


def real_gguf(bases):
    """Draw GGUF files of a whole model; beside one that is read, nothing else of its folder is."""
    settings = {"model/tokenizer_config.json": to_text({"auto_map": {"AutoTokenizer": ["code.T", None]}})}
    commands = (("apply", "model/x.gguf", "--blocks", "1", "-o", "out.gguf"), ("eval", "model/x.gguf", *EVAL[2:]))
    files = gguf_files(gguf_of(bases["files"] / "real.gguf"))
    beside = settings | {"model/code.py": CODE}
    found = replaced(bases["llama"], "model/x.gguf", files, *commands)
    return found.map(lambda case: replace(case, files=case.files | beside))


HEALING, WALK = ".out.recovery/healing.safetensors", "out.json.journal.walk.0"
HOSTILE = {
    # How many in every run and with `-m faults`, and which share of them must be taken and refused at least.
    "weight files": (40, 1500, 0.02, 0.3, weights),
    "indices": (25, 700, 0, 0.3, indices),
    "configs": (40, 1500, 0.02, 0.2, configs),
    "tokenizers and settings": (25, 1000, 0.04, 0.1, tokenizers),
    "pickles": (15, 400, 0, 0.3, pickles),
    "links, pipes and folders": (20, 400, 0.05, 0.3, links),
    "GGUF files": (60, 2500, 0.03, 0.3, gguf),
    "GGUF files of whole models": (8, 100, 0, 0.3, real_gguf),
    "plans": (30, 1000, 0, 0.5, lies_in("files", "plan.json", record, ROWS_OF_PLAN)),
    "plans of whole models": (8, 80, 0, 0.3, lies_in("planned", "plan.json", record, *PLANNED)),
    "evaluations": (12, 400, 1, 0, lies_in("files", "plan.eval.json", record, ROWS_OF_PLAN)),
    "benchmarks": (12, 400, 1, 0, lies_in("files", "plan.bench.json", record, ROWS_OF_PLAN)),
    "journals": (15, 500, 0.06, 0.1, journals),
    "states of healing": (15, 500, 0, 0.5, lies_in("healing", HEALING, weight_files, (*HEAL, "--resume"))),
    # It only costs the time that it would have saved.
    "saved walks": (8, 300, 1, 0, lies_in("walk", WALK, weight_files, STREAM)),
    "texts": (20, 500, 0.02, 0.1, lies_in("llama", "text.txt", texts, SEARCH, EVAL)),
    "rows": (20, 500, 0.02, 0.25, lies_in("files", "rows.jsonl", rows, (*SEARCH, "--calibration", "rows.jsonl"))),
    "chats": (20, 500, 0.02, 0.25, lies_in("chat", "chat.jsonl", rows, CHAT)),
}  # fmt: skip


@counts(0, 1)
@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_lie(program, bases, tmp_path, kind, count, tried):
    *many, taken, refused, strategy = HOSTILE[kind]
    cases = drawn(strategy(bases), many[count])
    outcomes = run_cases(program, cases, tmp_path)
    require_well(outcomes)
    # Or nothing behind the first check was ever reached.
    assert taken * len(cases) <= sum(outcome.code == 0 for outcome in outcomes) <= (1 - refused) * len(cases)
    tried(f"hostile {kind}", len(cases))
