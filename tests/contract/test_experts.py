"""Experts: each family of transformers is cut and proven or is refused, in each form of files; a
wrong cut fails.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3VLMoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralTopKRouter

from checkpoint_files import change_weights, config_of, write_config
from conftest import architecture_of, save_model, slow, weights_of
from families import FAMILIES, WITH_EXPERTS, counts_experts, experts_config, tiny_config
from gguf_models import convert_llama, metadata_of, write_gguf
from sleb_cli.engine.cut.experts import expert_cut
from sleb_cli.engine.cut.experts.expert_cut import PREDICTION_NOTE, ExpertCut
from sleb_cli.engine.cut.experts.routing import TiesByNumber
from sleb_cli.engine.forward.placement import blocks_on_disk
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.model.experts import find_experts
from sleb_cli.engine.output import proof_placement
from sleb_cli.engine.output.apply_gguf import prune_gguf
from sleb_cli.engine.output.checkpoint import Output, apply_removals, plan_tensors
from sleb_cli.engine.output.proof_placement import ProofPlacement
from sleb_cli.engine.surgery.gguf_surgery import plan_gguf_surgery
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import PlanError, ProofError, UnsupportedModelError
from survey import DOCUMENT, survey_experts

IN_CI = ["deepseek_v3", "gpt_oss", "llama4_text", "longcat_flash", "mixtral", "qwen3_moe"]
"""Those that stand for the others: groups, biases, experts scaled at the input, experts of none,
each form of files.
"""
REFUSED = {
    "deepseek_v4": "its blocks keep their experts in different ways",
    "doge": "no setting of its config counts experts",
    "dots3_note_text": "transformers decodes it differently",
    "inkling2_loop_text": "attend to what groups of earlier blocks made",
    "inkling2_text": "attend to what groups of earlier blocks made",
    "jetmoe": "it has two kinds of experts",
    "llama": "no setting of its config counts experts",
    "zaya": "reads what the router of the block before it made",
}
OTHERS = [slow(name) for name in WITH_EXPERTS if name not in (*IN_CI, *REFUSED)]
MODEL = Path("model")
OUT = Path("out")
PROVEN = ("same logits", "every expert", "generates")


def saved(model_type, **settings):
    """Save a tiny mixture where the test runs."""
    return save_model(MODEL, experts_config(model_type, **settings))


def removal(architecture, *gone):
    """Return these experts of each block, whose number moves on by one from block to block in the
    same group.
    """
    removed = {}
    for number, block in enumerate(find_experts(architecture).blocks):
        removed[block] = tuple(expert // 4 * 4 + (expert + number) % 4 for expert in gone)
    return removed


def cut(folder, removed=None, out=OUT, *, blocks=(), dtype=torch.float32, notify=ignore, **where):
    """Remove experts by block, by default two of each, and return what `apply` says."""
    architecture = architecture_of(folder)
    if removed is None:
        removed = removal(architecture, 3, 5)
    surgery = plan_surgery(architecture, blocks, {"experts": removed} if removed else {})
    place = ProofPlacement(torch.device("cpu"), dtype, **where)
    return apply_removals(Subject(surgery, None), Output(out, proof=place), notify)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
def test_each_family_is_cut_and_proven(model_type, dtype):
    result = cut(saved(model_type), dtype=dtype)
    assert result.proof.checks[-3:] == PROVEN
    assert result.experts.experts == (8, 6)
    ids = torch.arange(2, 34)[None]
    whole = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)(ids).logits
    fewer = AutoModelForCausalLM.from_pretrained(OUT, dtype=dtype)(ids).logits
    # What goes mattered, so the proof had something to see.
    assert (whole - fewer).abs().max() > 0.05 * whole.abs().max()


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", slow("gemma4_text"), slow("gpt_oss"), slow("llama4_text")]
)
@pytest.mark.parametrize("where", ["streamed", "on disk", "float16", "inference mode"])
def test_routers_are_masked_wherever_their_tensors_are(model_type, where):
    architecture = architecture_of(saved(model_type))
    on_disk = blocks_on_disk(architecture, architecture.block_count, torch.device("cpu"))
    settings = {
        "streamed": {"stream": True},
        "on disk": {"device_map": on_disk},
        "float16": {"dtype": torch.float16},
        "inference mode": {},
    }
    with torch.inference_mode(where == "inference mode"):
        result = cut(MODEL, **settings[where])
    assert "every expert" in result.proof.checks


SCORES = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).bfloat16()


@pytest.mark.parametrize(
    ("choose", "chosen"),
    [
        (lambda: torch.topk(SCORES, 3), [1, 3, 0]),
        (lambda: SCORES.topk(k=3, dim=-1, sorted=False), [1, 3, 0]),
        (lambda: torch.topk(input=SCORES[None], k=3, dim=1), [1, 3, 0]),
        (lambda: torch.topk(SCORES, 3, 0, False), [0, 2, 4]),
        (lambda: SCORES.topk(3, largest=False), [0, 2, 4]),
    ],
)
def test_ties_are_broken_by_number(choose, chosen):
    with TiesByNumber():
        found = choose()
    assert found.indices.flatten().tolist() == chosen
    assert torch.equal(found.values.flatten(), SCORES[chosen])


@pytest.mark.parametrize(
    "model_type", [name if name in ("jetmoe", "llama") else slow(name) for name in REFUSED]
)
def test_those_without_experts_to_remove_are_refused(model_type):
    config = tiny_config(model_type) if model_type == "llama" else experts_config(model_type)
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        cut(save_model(MODEL, config))


def test_a_router_that_is_part_of_its_block_is_refused(monkeypatch):
    own = MixtralDecoderLayer.__init__

    def with_bias(self, config, number):
        own(self, config, number)
        self.bias = torch.nn.Parameter(torch.zeros(config.num_local_experts))

    monkeypatch.setattr(MixtralDecoderLayer, "__init__", with_bias)
    with pytest.raises(UnsupportedModelError, match="hold tensors of their routers themselves"):
        cut(saved("mixtral"))


@pytest.mark.slow
def test_every_family_with_experts_is_listed():
    found = [name for name in FAMILIES if counts_experts(tiny_config(name).to_dict())]
    assert found == WITH_EXPERTS


SWAP = (1, 0, 2, 3, 5, 6)
IT_DIFFERS = "its block 1, .* is the first whose output differs"
UNREACHED = "the experts of block 1 that stay compute other values"


@pytest.mark.parametrize(
    ("tensors", "kept", "dtype", "words"),
    [
        pytest.param(".*", (0, 1, 2, 3, 5, 7), torch.float32, IT_DIFFERS, id="another expert"),
        pytest.param(r"experts\.", SWAP, torch.float32, IT_DIFFERS, id="two change places"),
        pytest.param(r"experts\.", SWAP, torch.bfloat16, IT_DIFFERS, id="two, in bfloat16"),
        pytest.param(r"router\.", SWAP, torch.float32, IT_DIFFERS, id="two rows of the router"),
        pytest.param(r"router\.bias", SWAP, torch.float32, IT_DIFFERS, id="two of its biases"),
        pytest.param(
            r"experts\.", (0, 1, 2, 2, 5, 6), torch.float32, UNREACHED, id="one no text reaches"
        ),
    ],
)
def test_a_wrong_cut_fails_its_proof(monkeypatch, tensors, kept, dtype, words):
    """Experts 4 and 7 go; of block 1, no token chooses expert 3."""
    folder = saved("gpt_oss")
    bias = "model.layers.1.mlp.router.bias"
    change_weights(folder, lambda weights: weights | {bias: weights[bias] - 100 * torch.eye(8)[3]})
    right = ExpertCut.tensor

    def wrong(self, name):
        new, slices = right(self, name)
        if slices and re.match(rf"model\.layers\.1\.mlp\.{tensors}", name):
            slices = replace(slices, kept=kept)
        return new, slices

    monkeypatch.setattr(ExpertCut, "tensor", wrong)
    with pytest.raises(ProofError, match=words):
        cut(folder, dict.fromkeys(range(6), (4, 7)), dtype=dtype)


def test_experts_that_never_run_fail_the_proof(monkeypatch):
    monkeypatch.setattr(expert_cut, "watch_routing", lambda *_: nullcontext())
    with pytest.raises(ProofError, match=r"the experts of block 0 never ran, so they were not"):
        cut(saved("mixtral"), dtype=torch.bfloat16)


def test_a_family_whose_router_cannot_be_masked_fails(monkeypatch):
    own = MixtralTopKRouter.forward

    def elsewhere(self, hidden):
        """Route by a copy of the weights that torch does not see made."""
        router = MixtralTopKRouter.__new__(MixtralTopKRouter)
        weight = torch.from_numpy(self.weight.numpy().copy())
        router.__dict__ |= self.__dict__ | {"_parameters": {}, "weight": weight}
        return own(router, hidden)

    monkeypatch.setattr(MixtralTopKRouter, "forward", elsewhere)
    with pytest.raises(UnsupportedModelError, match="sleb does not reach the router of block 0"):
        cut(saved("mixtral"))


def is_cut(router, hidden):
    return len(router.weight) == 6


def is_one_token(router, hidden):
    return len(hidden) == 1


@pytest.mark.parametrize(
    ("dtype", "wider", "factor", "rounds", "how"),
    [
        (torch.bfloat16, "float32", -1, is_cut, {}),
        (torch.float16, "float32", -1, is_cut, {"stream": True}),
        (torch.float32, "float64", float("nan"), is_cut, {}),
        (torch.bfloat16, "float32", -1, is_one_token, {"removed": {}, "blocks": (1,)}),
    ],
    ids=["bfloat16", "float16", "float32", "decoding"],
)
def test_a_choice_that_rounding_decides_is_compared_in_a_wider_data_type(
    monkeypatch, dtype, wider, factor, rounds, how
):
    own = MixtralTopKRouter.forward

    def rounded(self, hidden):
        if self.weight.dtype is dtype and rounds(self, hidden):
            hidden = factor * hidden
        return own(self, hidden)

    monkeypatch.setattr(MixtralTopKRouter, "forward", rounded)
    proof = cut(saved("mixtral"), dtype=dtype, **how).proof
    assert (proof.dtype, proof.checks[-1]) == (wider, "generates")


def test_files_that_hold_all_experts_of_a_block_in_one_tensor():
    held = AutoModelForCausalLM.from_pretrained(saved("qwen3_moe")).state_dict()
    change_weights(MODEL, lambda weights: {name: held[name].clone() for name in held})
    assert cut(MODEL).proof.logits_difference < 1e-4
    assert weights_of(OUT)["model.layers.1.mlp.experts.gate_up_proj"].shape[0] == 6


def moved_one_up(weights, after):
    """Return the tensors of the last block, changed, under the names of a prediction block."""
    moved = {}
    for name, tensor in weights.items():
        if name.startswith("model.layers.5."):
            moved[name.replace("model.layers.5.", after)] = tensor + 1
    return moved


@pytest.mark.parametrize(
    ("model_type", "after", "settings"),
    [
        ("deepseek_v3", "model.layers.6.", {"num_nextn_predict_layers": 1}),
        ("qwen3_moe", "mtp.layers.0.", {}),
    ],
)
def test_prediction_blocks_lose_the_experts_of_the_last_block(model_type, after, settings):
    folder = saved(model_type, **settings)
    change_weights(folder, lambda weights: weights | moved_one_up(weights, after))
    events = []
    cut(folder, notify=events.append)
    assert PREDICTION_NOTE in [getattr(event, "text", None) for event in events]
    written = weights_of(OUT)
    expected = moved_one_up(written, after)
    assert {name for name in written if name.startswith(after)} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor)


@pytest.mark.parametrize(
    "names", [[], ["num_experts"], ["num_local_experts"], ["num_experts", "num_local_experts"]]
)
def test_each_name_of_the_count_changes(names):
    """Files of Qwen3 say `num_experts`, transformers 5.24 writes `num_local_experts`; Mixtral's may
    leave it out.
    """
    folder = saved("qwen3_moe" if names else "mixtral")
    counts = {"num_experts": None, "num_local_experts": None} | dict.fromkeys(names, 8)
    write_config(folder, **counts)
    cut(folder)
    written = config_of(OUT)
    found = {key: written[key] for key in written if key.endswith("_experts")}
    assert found == dict.fromkeys(names or ["num_local_experts"], 6)


def test_a_vision_model_counts_the_blocks_of_its_text_config():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = experts_config("qwen3_vl_moe_text", rope_parameters=rope)
    eyes = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=eyes)
    AutoModelForImageTextToText.from_config(config).save_pretrained(MODEL)
    assert cut(MODEL).experts.experts == (8, 6)
    assert AutoConfig.from_pretrained(OUT).text_config.num_local_experts == 6


def as_fp8(name, tensor):
    is_packed = ".experts." in name or "self_attn" in name
    if not is_packed or not name.endswith("_proj.weight"):
        return {name: tensor}
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def as_mxfp4(name, tensor):
    if not name.endswith("_proj"):
        return {name: tensor}
    shape = (8, tensor.shape[2], tensor.shape[1] // 32)
    random = torch.Generator().manual_seed(0)
    scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=random)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=random)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


@pytest.mark.parametrize(
    ("model_type", "pack", "settings"),
    [
        ("deepseek_v3", as_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("gpt_oss", as_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    ],
)
def test_quantized_experts_are_copied_from_the_files(model_type, pack, settings):
    folder = saved(model_type, dtype=torch.bfloat16)
    packed = {}
    for name, tensor in weights_of(folder).items():
        packed.update(pack(name, tensor))
    change_weights(folder, lambda weights: packed)
    write_config(folder, quantization_config=settings)
    architecture = architecture_of(folder)
    removed = dict.fromkeys(find_experts(architecture).blocks, (0, 4))
    # None is decoded, and no block is held in memory.
    for tensor in plan_tensors(plan_surgery(architecture, (), {"experts": removed})):
        assert tensor.ranges is not None
    assert "every expert" in cut(folder, removed, dtype=torch.bfloat16).proof.checks


@pytest.mark.slow
def test_the_page_of_families_says_which_can_lose_experts(tmp_path):
    assert f"## Experts\n\n{survey_experts(tmp_path)}" in DOCUMENT.read_text()


def test_a_streamed_proof_without_room_for_converted_weights_is_partial(monkeypatch):
    monkeypatch.setattr(proof_placement, "free_space", lambda folder: 1000)
    proof = cut(saved("mixtral"), stream=True).proof
    assert "converted weights to the disk" in proof.partial
    assert proof.checks == ("complete", "same bytes", "loads")


GGUF = Path("model.gguf")
CUT_GGUF = Path("out.gguf")


def cut_gguf(removed, more=None, notify=ignore):
    surgery = plan_gguf_surgery(read_gguf(GGUF), (), {"experts": removed} | (more or {}))
    return prune_gguf(surgery, Output(CUT_GGUF), load_plugins(), notify)


@pytest.mark.parametrize(
    ("type_", "more", "per_token"),
    [
        (Type.F32, {}, 2),
        (Type.Q8_0, {"experts_per_token": 1}, 1),
        pytest.param(Type.Q4_0, {"experts_per_token": 1}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_gguf_file_is_cut_and_proven(type_, more, per_token):
    sizes = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    sizes["moe_intermediate_size"] = 768  # which transformers takes from no file
    convert_llama(saved("qwen3_moe", **sizes), GGUF, type_, architecture="qwen3moe")
    removed = {block: (5, block) for block in range(4)} | {4: (0, 7), 5: (2, 3)}
    result = cut_gguf(removed, more)
    assert result.unproven is None
    assert metadata_of(CUT_GGUF)["qwen3moe.expert_used_count"] == per_token
    assert result.proof.checks[-3:] == PROVEN
    parts = "gate_exps up_exps down_exps gate_inp".split()
    require_experts(removed, [f"ffn_{part}.weight" for part in parts])


def test_what_only_looks_like_experts_in_a_gguf_file_stays():
    matrices = "ffn_gate_up_exps.weight ffn_down_exps.weight ffn_gate_inp.weight ffn_up_exps.bias"
    lists = "ffn_gate_inp.bias exp_probs_b.bias ffn_down_exps.scale"
    others = "ffn_gate_inp.scale ffn_norm_exps.weight ffn_gate_inp_shexp.weight attn_q_norm.weight"
    tensors = dict.fromkeys(f"{matrices} ffn_up_shexp.weight".split(), (8, 3))
    tensors |= dict.fromkeys(f"{lists} {others}".split(), (8,))
    settings = {"expert_count": 8, "nextn_predict_layers": 1}
    write_gguf(GGUF, "acme", 3, settings, more=tensors)
    removed = {0: (5, 3), 1: (0, 7)}
    events = []
    result = cut_gguf(removed, notify=events.append)
    assert "transformers does not read" in result.unproven
    assert PREDICTION_NOTE in [getattr(event, "text", None) for event in events]
    require_experts(removed | {2: removed[1]}, f"{matrices} {lists}".split())


def require_experts(removed, names):
    """Check that in the blocks, the tensors of these names lost exactly the removed experts, and no
    other did.
    """
    old = gguf.GGUFReader(GGUF)
    new = gguf.GGUFReader(CUT_GGUF)
    settings = metadata_of(CUT_GGUF)
    assert [settings[key] for key in settings if key.endswith(".expert_count")] == [6]
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert after.name == before.name
        data = before.data
        number, _, name = before.name.removeprefix("blk.").partition(".")
        if name in names:
            data = data[[row for row in range(8) if row not in removed[int(number)]]]
        assert after.data.tobytes() == data.tobytes()


@pytest.mark.parametrize(
    ("architecture", "count", "tensor", "words"),
    [
        ("deepseek4", 8, "ffn_gate_tid2eid.weight", "by the numbers of tokens"),
        ("grovemoe", 8, "ffn_up_chexps.weight", "share parts of one another"),
        ("llama4", 128, "ffn_gate_inp.weight", "computes attention otherwise for 128"),
        ("acme", 8, "ffn_other_exps.weight", "not know what blk.0.ffn_other_exps.weight holds"),
    ],
)
def test_gguf_files_whose_experts_cannot_be_removed(architecture, count, tensor, words):
    names = ("ffn_up_exps.weight", "ffn_gate_inp.weight", tensor)
    more = dict.fromkeys(names, (count, 3))
    write_gguf(GGUF, architecture, 2, {"expert_count": count}, more=more)
    with pytest.raises(UnsupportedModelError, match=words):
        cut_gguf({0: (5,), 1: (0,)})


@pytest.mark.parametrize("model_type", ["deepseek_v3", slow("gpt_oss")])
def test_experts_and_blocks_go_one_after_the_other(model_type):
    removed = removal(architecture_of(saved(model_type)), 3, 5)
    cut(MODEL, removed, Path("fewer"))
    cut(Path("fewer"), {}, Path("last"), blocks=(4,))
    cut(MODEL, {}, Path("shorter"), blocks=(4,))
    renumbered = {block - (block > 4): gone for block, gone in removed.items() if block != 4}
    cut(Path("shorter"), renumbered, Path("again"))
    found = weights_of(Path("last"))
    again = weights_of(Path("again"))
    assert found.keys() == again.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ({2: (1, 4, 0, 5, 2), 3: (1, 4, 0, 5, 2)}, "5 of 8 would go, and at least 4 must stay"),
        ({2: (0, 4), 3: (0, 1)}, "of block 3, it takes more from some of the 2 groups than from"),
        ({2: (0, 4), 3: (0, 8)}, r"of block 3, it names \[0, 8\], and not 2 of 8"),
        ({2: (0, 4), 3: (-4, 4)}, "of block 3, it names"),
        ({2: (0, 4), 3: (4, 4)}, "of block 3, it names"),
        ({2: (0, 4), 3: (0,)}, "of block 3, it names"),
        ({2: (), 3: ()}, "0 of 8 would go"),
        ({2: (0, 4)}, "experts of 1 blocks, but .* has experts in 2"),
    ],
)
def test_removals_that_no_model_computes_with_are_refused(gone, words):
    architecture = architecture_of(saved("deepseek_v3", num_hidden_layers=4))
    with pytest.raises(PlanError, match=words):
        plan_surgery(architecture, (), {"experts": gone})
