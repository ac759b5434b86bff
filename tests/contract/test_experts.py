"""Experts: each family of transformers is cut and proven or is refused, in each form of files; a
wrong cut fails.
"""

import json
import re
from dataclasses import replace

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
from conftest import architecture_of, calibration, save_model, slow, weights_of
from families import FAMILIES, WITH_EXPERTS, counts_experts, experts_config, tiny_config
from gguf_models import convert_llama, metadata_of, write_gguf
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


def removal(architecture, *gone):
    """Return these experts of each block, whose number moves on by one from block to block in the
    same group.
    """
    blocks = enumerate(find_experts(architecture).blocks)
    return {
        block: tuple(expert // 4 * 4 + (expert + number) % 4 for expert in gone)
        for number, block in blocks
    }


def cut(folder, out, removed=(3, 5), *, blocks=(), dtype=torch.float32, notify=ignore, **where):
    """Remove experts (the same of each block, or by block), and return what `apply` says."""
    architecture = architecture_of(folder)
    by_block = removed if isinstance(removed, dict) else removal(architecture, *removed)
    surgery = plan_surgery(architecture, blocks, {"experts": by_block} if by_block else {})
    place = ProofPlacement(torch.device("cpu"), dtype, **where)
    return apply_removals(Subject(surgery, None), Output(out, proof=place), notify)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
def test_each_family_is_cut_and_proven(tmp_path, model_type, dtype):
    folder = save_model(tmp_path / "model", experts_config(model_type))
    result = cut(folder, tmp_path / "out", dtype=dtype)
    assert result.proof.checks[-3:] == ("same logits", "every expert", "generates")
    assert result.experts.experts == (8, 6)
    whole, fewer = (
        AutoModelForCausalLM.from_pretrained(each, dtype=dtype)
        for each in (folder, tmp_path / "out")
    )
    ids = torch.arange(2, 34)[None]
    # What goes mattered, so the proof had something to see.
    assert (whole(ids).logits - fewer(ids).logits).abs().max() > 0.05 * whole(
        ids
    ).logits.abs().max()


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", slow("gemma4_text"), slow("gpt_oss"), slow("llama4_text")]
)
@pytest.mark.parametrize("where", ["streamed", "on disk", "float16", "inference mode"])
def test_routers_are_masked_wherever_their_tensors_are(tmp_path, model_type, where):
    folder = save_model(tmp_path / "model", experts_config(model_type))
    architecture = architecture_of(folder)
    on_disk = blocks_on_disk(architecture, architecture.block_count, torch.device("cpu"))
    how = {
        "streamed": {"stream": True},
        "on disk": {"device_map": on_disk},
        "float16": {"dtype": torch.float16},
    }
    with torch.inference_mode(where == "inference mode"):
        result = cut(folder, tmp_path / "out", **how.get(where, {}))
    assert "every expert" in result.proof.checks


def test_ties_are_broken_by_number():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).bfloat16()
    with TiesByNumber():
        found = [
            torch.topk(scores, 3),
            scores.topk(k=3, dim=-1, sorted=False),
            torch.topk(input=scores[None], k=3, dim=1),
            torch.topk(scores, 3, 0, False),
            scores.topk(3, largest=False),
        ]
    assert [each.indices.flatten().tolist() for each in found] == [[1, 3, 0]] * 3 + [[0, 2, 4]] * 2
    assert found[2].values.tolist() == [[2, 2, 1]]


@pytest.mark.parametrize(
    "model_type", [name if name in ("jetmoe", "llama") else slow(name) for name in REFUSED]
)
def test_those_without_experts_to_remove_are_refused(tmp_path, model_type):
    config = tiny_config(model_type) if model_type == "llama" else experts_config(model_type)
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        cut(save_model(tmp_path / "model", config), tmp_path / "out")


def test_a_router_that_is_part_of_its_block_is_refused(tmp_path, monkeypatch):
    own = MixtralDecoderLayer.__init__

    def with_bias(self, config, number):
        own(self, config, number)
        self.bias = torch.nn.Parameter(torch.zeros(config.num_local_experts))

    monkeypatch.setattr(MixtralDecoderLayer, "__init__", with_bias)
    with pytest.raises(UnsupportedModelError, match="hold tensors of their routers themselves"):
        cut(save_model(tmp_path / "model", experts_config("mixtral")), tmp_path / "out")


@pytest.mark.slow
def test_every_family_with_experts_is_listed():
    assert [
        name for name in FAMILIES if counts_experts(tiny_config(name).to_dict())
    ] == WITH_EXPERTS


IN_BLOCK_1 = r"model\.layers\.1\.mlp\."
SWAPPED = "two experts change places"
IT_DIFFERS = "its block 1, .* is the first whose output differs"
FAULTS = {
    "another expert is written": (".*", (0, 1, 2, 3, 5, 7), IT_DIFFERS),
    SWAPPED: (r"experts\.", (1, 0, 2, 3, 5, 6), IT_DIFFERS),
    "two rows of the router do": (r"router\.", (1, 0, 2, 3, 5, 6), IT_DIFFERS),
    "two biases of the router do": (r"router\.bias", (1, 0, 2, 3, 5, 6), IT_DIFFERS),
    "one that no text reaches is another": (
        r"experts\.",
        (0, 1, 2, 2, 5, 6),
        "the experts of block 1 that stay make",
    ),
}


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [*((fault, torch.float32) for fault in FAULTS), (SWAPPED, torch.bfloat16)],
    ids=str,
)
def test_a_wrong_cut_fails_its_proof(tmp_path, monkeypatch, fault, dtype):
    """Experts 4 and 7 go; of block 1, no token chooses expert 3."""
    which, kept, words = FAULTS[fault]
    folder = save_model(tmp_path / "model", experts_config("gpt_oss"))
    bias = "model.layers.1.mlp.router.bias"
    change_weights(folder, lambda weights: weights | {bias: weights[bias] - 100 * torch.eye(8)[3]})
    right = ExpertCut.tensor

    def wrong(self, name):
        new, slices = right(self, name)
        return new, replace(slices, kept=kept) if re.match(
            IN_BLOCK_1 + which, name
        ) and slices else slices

    monkeypatch.setattr(ExpertCut, "tensor", wrong)
    with pytest.raises(ProofError, match=words):
        cut(folder, tmp_path / "out", dict.fromkeys(range(6), (4, 7)), dtype=dtype)


def test_a_family_whose_router_cannot_be_masked_fails(tmp_path, monkeypatch):
    own = MixtralTopKRouter.forward

    def elsewhere(self, hidden):
        """Route by a copy of the weights that torch does not see made."""
        router = MixtralTopKRouter.__new__(MixtralTopKRouter)
        router.__dict__ |= self.__dict__ | {
            "_parameters": {},
            "weight": torch.from_numpy(self.weight.numpy().copy()),
        }
        return own(router, hidden)

    monkeypatch.setattr(MixtralTopKRouter, "forward", elsewhere)
    with pytest.raises(UnsupportedModelError, match="sleb does not reach the router of block 0"):
        cut(save_model(tmp_path / "model", experts_config("mixtral")), tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "wider", "factor", "where"),
    [
        (torch.bfloat16, "float32", -1, {}),
        (torch.float16, "float32", -1, {"stream": True}),
        (torch.float32, "float64", float("nan"), {}),
    ],
    ids=str,
)
def test_a_choice_that_rounding_decides_is_compared_in_a_wider_data_type(
    tmp_path, monkeypatch, dtype, wider, factor, where
):
    folder = save_model(tmp_path / "model", experts_config("mixtral"))
    own = MixtralTopKRouter.forward

    def rounded(self, hidden):
        """Score the six experts that are left otherwise, in the narrow type."""
        is_cut = self.weight.dtype is dtype and len(self.weight) == 6
        return own(self, factor * hidden if is_cut else hidden)

    monkeypatch.setattr(MixtralTopKRouter, "forward", rounded)
    proof = cut(folder, tmp_path / "out", dtype=dtype, **where).proof
    assert proof.dtype == wider
    assert proof.checks[-3:] == ("same logits", "every expert", "generates")


def test_files_that_hold_all_experts_of_a_block_in_one_tensor(tmp_path):
    folder = save_model(tmp_path / "model", experts_config("qwen3_moe"))
    names = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    change_weights(folder, lambda weights: {name: tensor.clone() for name, tensor in names.items()})
    assert cut(folder, tmp_path / "out").proof.logits_difference < 1e-4
    assert weights_of(tmp_path / "out")["model.layers.1.mlp.experts.gate_up_proj"].shape[0] == 6


@pytest.mark.parametrize(
    ("model_type", "after"), [("deepseek_v3", "model.layers.6."), ("qwen3_moe", "mtp.layers.0.")]
)
def test_prediction_blocks_lose_the_experts_of_the_last_block(tmp_path, model_type, after):
    numbered = {"num_nextn_predict_layers": 1} if "6" in after else {}
    folder, last = (
        save_model(tmp_path / "model", experts_config(model_type, **numbered)),
        "model.layers.5.",
    )
    more = {
        name.replace(last, after): t + 1
        for name, t in weights_of(folder).items()
        if name.startswith(last)
    }
    change_weights(folder, lambda weights: weights | more)
    events = []
    cut(folder, tmp_path / "out", notify=events.append)
    assert PREDICTION_NOTE in [getattr(event, "text", None) for event in events]
    written = weights_of(tmp_path / "out")
    cut_alike = {
        name.replace(last, after): t + 1 for name, t in written.items() if name.startswith(last)
    }
    assert {name for name in written if name.startswith(after)} == {*cut_alike}
    assert all(torch.equal(written[name], tensor) for name, tensor in cut_alike.items())


@pytest.mark.parametrize(
    "names", [[], ["num_experts"], ["num_local_experts"], ["num_experts", "num_local_experts"]]
)
def test_each_name_of_the_count_changes(tmp_path, names):
    """Files of Qwen3 say `num_experts`, transformers 5.24 writes `num_local_experts`; Mixtral's may
    leave it out.
    """
    folder = save_model(tmp_path / "model", experts_config("qwen3_moe" if names else "mixtral"))
    counts = {"num_experts": None, "num_local_experts": None} | dict.fromkeys(names, 8)
    write_config(folder, **counts)
    cut(folder, tmp_path / "out")
    written = config_of(tmp_path / "out")
    counts = {key: value for key, value in written.items() if key.endswith("_experts")}
    assert counts == dict.fromkeys(names or ["num_local_experts"], 6)


def as_fp8(name, tensor):
    if (".experts." not in name and "self_attn" not in name) or not name.endswith("_proj.weight"):
        return {name: tensor}
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def as_mxfp4(name, tensor):
    if not name.endswith("_proj"):
        return {name: tensor}
    shape, random = (8, tensor.shape[2], tensor.shape[1] // 32), torch.Generator().manual_seed(0)
    scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=random)
    return {
        f"{name}_blocks": torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=random),
        f"{name}_scales": scales,
    }


def test_a_vision_model_counts_the_blocks_of_its_text_config(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = experts_config("qwen3_vl_moe_text", rope_parameters=rope)
    eyes = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "out_hidden_size": 32,
    }
    config = Qwen3VLMoeConfig(
        text_config=text.to_dict(), vision_config=eyes | {"deepstack_visual_indexes": [0]}
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    assert cut(tmp_path / "model", tmp_path / "out").experts.experts == (8, 6)
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.num_local_experts == 6


@pytest.mark.parametrize(("model_type", "packed", "settings"), [
    ("deepseek_v3", as_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ("gpt_oss", as_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
])  # fmt: skip
def test_quantized_experts_are_copied_from_the_files(tmp_path, model_type, packed, settings):
    folder = save_model(tmp_path / "model", experts_config(model_type, dtype=torch.bfloat16))
    change_weights(
        folder,
        lambda weights: {k: v for name, t in weights.items() for k, v in packed(name, t).items()},
    )
    write_config(folder, quantization_config=settings)
    architecture = architecture_of(folder)
    removed = dict.fromkeys(find_experts(architecture).blocks, (0, 4))
    tensors = plan_tensors(plan_surgery(architecture, (), {"experts": removed}))
    assert all(
        tensor.ranges is not None for tensor in tensors
    )  # so none is decoded, and no block is held in memory
    assert (
        "every expert" in cut(folder, tmp_path / "out", removed, dtype=torch.bfloat16).proof.checks
    )


def test_decoding_that_routes_otherwise_is_compared_in_a_wider_dtype(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", experts_config("mixtral"))
    own = MixtralTopKRouter.forward

    def rounded(self, hidden):
        is_one_token = hidden.shape[0] == 1
        return own(self, -hidden if is_one_token and hidden.dtype is torch.bfloat16 else hidden)

    monkeypatch.setattr(MixtralTopKRouter, "forward", rounded)
    proof = cut(folder, tmp_path / "out", {}, blocks=(1,), dtype=torch.bfloat16).proof
    assert (proof.dtype, proof.checks[-1]) == ("float32", "generates")


@pytest.mark.slow
def test_the_page_of_families_says_which_can_lose_experts(tmp_path):
    assert survey_experts(tmp_path) in DOCUMENT.read_text()


def test_a_streamed_proof_without_room_for_converted_weights_is_partial(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", experts_config("mixtral"))
    monkeypatch.setattr(proof_placement, "free_space", lambda folder: 1000)
    result = cut(folder, tmp_path / "out", stream=True)
    assert "converted weights to the disk" in result.proof.partial
    assert result.proof.checks == ("complete", "same bytes", "loads")


@pytest.mark.parametrize(
    "type_", [Type.F32, Type.Q8_0, slow(Type.Q4_0)], ids=lambda type_: type_.name
)
def test_a_gguf_file_is_cut_and_proven(tmp_path, type_):
    width = {"moe_intermediate_size": 768}  # which transformers takes from no file
    folder = save_model(
        tmp_path / "model",
        experts_config("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[], **width),
    )
    path = convert_llama(folder, tmp_path / "model.gguf", type_, architecture="qwen3moe")
    removed = {block: (5, block) for block in range(4)} | {4: (0, 7), 5: (2, 3)}
    per_token = {} if type_ is Type.F32 else {"experts_per_token": 1}
    surgery = plan_gguf_surgery(read_gguf(path), (), {"experts": removed} | per_token)
    result = prune_gguf(surgery, Output(tmp_path / "out.gguf"), load_plugins(), ignore)
    assert result.unproven is None
    assert metadata_of(tmp_path / "out.gguf")["qwen3moe.expert_used_count"] == per_token.get(
        "experts_per_token", 2
    )
    assert result.proof.checks[-3:] == ("same logits", "every expert", "generates")
    parts = {f"ffn_{part}.weight" for part in ("gate_exps", "up_exps", "down_exps", "gate_inp")}
    require_experts(path, tmp_path / "out.gguf", removed, parts)


def test_what_only_looks_like_experts_in_a_gguf_file_stays(tmp_path):
    matrices = (
        "ffn_gate_up_exps.weight",
        "ffn_down_exps.weight",
        "ffn_gate_inp.weight",
        "ffn_up_exps.bias",
    )
    lists = ("ffn_gate_inp.bias", "exp_probs_b.bias", "ffn_down_exps.scale")
    theirs = dict.fromkeys(matrices, (8, 3)) | dict.fromkeys(lists, (8,))
    others = (
        "ffn_gate_inp.scale",
        "ffn_norm_exps.weight",
        "ffn_gate_inp_shexp.weight",
        "attn_q_norm.weight",
    )
    more = theirs | dict.fromkeys(others, (8,)) | {"ffn_up_shexp.weight": (8, 3)}
    path = write_gguf(
        tmp_path / "model.gguf",
        "acme",
        3,
        {"expert_count": 8, "nextn_predict_layers": 1},
        more=more,
    )
    removed, events = {0: (5, 3), 1: (0, 7)}, []
    surgery = plan_gguf_surgery(read_gguf(path), (), {"experts": removed})
    result = prune_gguf(surgery, Output(tmp_path / "out.gguf"), load_plugins(), events.append)
    assert "transformers does not read" in result.unproven
    assert PREDICTION_NOTE in [getattr(event, "text", None) for event in events]
    require_experts(path, tmp_path / "out.gguf", removed | {2: removed[1]}, {*theirs})


def require_experts(before, after, removed, names):
    """Check that in the blocks, the tensors of these names lost exactly the removed experts, and no
    other did.
    """
    old, new = (gguf.GGUFReader(path) for path in (before, after))
    (count,) = (
        field.contents() for name, field in new.fields.items() if name.endswith(".expert_count")
    )
    assert count == 8 - 2
    for was, now in zip(old.tensors, new.tensors, strict=True):
        _, _, rest = was.name.partition(".")
        block, _, inner = rest.partition(".")
        rows = [row for row in range(8) if inner not in names or row not in removed[int(block)]]
        assert now.name == was.name
        assert now.data.tobytes() == (was.data[rows] if inner in names else was.data).tobytes()


@pytest.mark.parametrize(("architecture", "count", "tensor", "words"), [
    ("deepseek4", 8, "ffn_gate_tid2eid.weight", "by the numbers of tokens"),
    ("grovemoe", 8, "ffn_up_chexps.weight", "share parts of one another"),
    ("llama4", 128, "ffn_gate_inp.weight", "computes attention otherwise for 128"),
    ("acme", 8, "ffn_other_exps.weight", "does not know what blk.0.ffn_other_exps.weight holds"),
])  # fmt: skip
def test_gguf_files_whose_experts_cannot_be_removed(tmp_path, architecture, count, tensor, words):
    more = {"ffn_up_exps.weight": (count, 3), "ffn_gate_inp.weight": (count, 3), tensor: (count, 3)}
    file = read_gguf(
        write_gguf(tmp_path / "model.gguf", architecture, 2, {"expert_count": count}, more=more)
    )
    with pytest.raises(UnsupportedModelError, match=words):
        plan_gguf_surgery(file, (), {"experts": {0: (5,), 1: (0,)}})


@pytest.mark.parametrize("model_type", ["deepseek_v3", slow("gpt_oss")])
def test_experts_and_blocks_go_one_after_the_other(tmp_path, model_type):
    folder = save_model(tmp_path / "model", experts_config(model_type))
    removed = removal(architecture_of(folder), 3, 5)
    cut(folder, tmp_path / "fewer", removed)
    cut(tmp_path / "fewer", tmp_path / "last", {}, blocks=(4,))
    cut(folder, tmp_path / "shorter", {}, blocks=(4,))
    renumbered = {block - (block > 4): gone for block, gone in removed.items() if block != 4}
    cut(tmp_path / "shorter", tmp_path / "again", renumbered)
    found, again = weights_of(tmp_path / "last"), weights_of(tmp_path / "again")
    assert found.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("gone", "words"), [
    ({2: (1, 4, 0, 5, 2), 3: (1, 4, 0, 5, 2)}, "5 of 8 would go, and at least 4 must stay"),
    ({2: (0, 4), 3: (0, 1)}, "of block 3, it takes more from some of the 2 groups than from "
                             "others"),
    ({2: (0, 4), 3: (0, 8)}, r"of block 3, it names \[0, 8\], and not 2 of 8"),
    ({2: (0, 4), 3: (-4, 4)}, "of block 3, it names"),
    ({2: (0, 4), 3: (4, 4)}, "of block 3, it names"),
    ({2: (0, 4), 3: (0,)}, "of block 3, it names"),
    ({2: (), 3: ()}, "0 of 8 would go"),
    ({2: (0, 4)}, "experts of 1 blocks, but .* has experts in 2"),
])  # fmt: skip
def test_removals_that_no_model_computes_with_are_refused(tmp_path, gone, words):
    folder = save_model(tmp_path / "model", experts_config("deepseek_v3", num_hidden_layers=4))
    with pytest.raises(PlanError, match=words):
        plan_surgery(architecture_of(folder), (), {"experts": gone})


def test_a_plan_edited_by_hand_is_refused(sleb, tmp_path, text_file):
    folder = save_model(tmp_path / "model", experts_config("mixtral"))
    sleb("search", folder, "--unit", "experts", "--remove", 2, *calibration(text_file))
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["experts"]["blocks"][0]["removals"] = [0, 0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "plan" in sleb("apply", code=3).stderr
