"""A tiny config for every causal language model in transformers, with what each needs beside the
common sizes.
"""

import inspect
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

BLOCKS = 6

COMMON = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": BLOCKS, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1, "head_dim": 8, "sliding_window": 8, "ffn_dim": 64, "word_embed_proj_dim": 32, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
}  # fmt: skip
"""Sizes under the names that configs use; each family gets those it has."""

DECODER = {"is_decoder": True}
HALF = {
    "d_model": 32, "decoder_layers": BLOCKS, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "is_encoder_decoder": False, "is_decoder": True,
}  # fmt: skip
"""The decoder of an encoder-decoder model, alone."""

SSM = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
INKLING = {
    "unpadded_vocab_size": 320,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
}
MIXED = ["sliding_attention", "full_attention"] * 3

SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys("bert bert-generation camembert data2vec-text electra ernie megatron-bert "
                    "roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl".split(), DECODER),
    **dict.fromkeys("bart blenderbot blenderbot-small marian mbart mvp pegasus plbart".split(), HALF),
    **dict.fromkeys("qwen3_5_moe_text qwen3_5_text qwen3_next".split(), DELTA),
    **{key: {"layer_types": MIXED} for key in "cohere2 exaone4 gemma3_text".split()},
    **{key: {"first_k_dense_replace": 2} for key in "deepseek_v2 deepseek_v3 dots1 glm4_moe "
                                                    "sarvam_mla sarvam_moe".split()},
    **{key: {"num_kv_shared_layers": 0, "global_head_dim": 8} for key in "gemma4_text "
                                                                         "gemma4_unified_text".split()},
    **dict.fromkeys("inkling_text inkling2_text".split(), INKLING),
    "bailing_hybrid": {"layer_group_size": 4, "first_k_dense_replace": 1},
    "bamba": {**SSM, "attn_layer_indices": [2, 4]},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {**HALF, "attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": MIXED, "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED}},
    "cpmant": {"dim_ff": 64, "dim_head": 8},
    "ctrl": {"n_embd": 32, "dff": 64, "n_layer": BLOCKS, "n_head": 4},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": 128,
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v4": {"hc_mult": 2, "o_lora_rank": 8, "index_n_heads": 4, "index_head_dim": 8},
    "dory": {"n_input_layers": 2, "n_output_layers": 2},
    "dots3_note_text": {"first_k_dense_replace": 1, "shared_experts_intermediate_size": 32, "index_n_heads": 4, "index_head_dim": 16,
                        "per_layer_config": {str(block): {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8,
                                                           "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8}
                                              for block in (2, 3, 4)}},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 4},
    "falcon_h1": {**SSM, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": MIXED, "laurel_rank": 8, "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "granitemoehybrid": {**SSM, "layer_types": ["mamba", "mamba", "attention"] * 2},
    "inkling2_loop_text": {**INKLING, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_d_conv": 2, "use_mamba_kernels": False},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8, 4, 4]},
    "lfm2": {"full_attn_idxs": [2, 4]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_dense_layers": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
    "kolibri1_1": {"head_dim": 16, "index_num_heads": 1},
    "longcat_flash": {"num_layers": BLOCKS, "num_hidden_layers": None, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 0, "moe_topk": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "mimo_v2_flash": {"layer_types": MIXED, "num_key_value_heads": 2},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {"shared_intermediate_size": 32, "dense_intermediate_size": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": 128},
    "nemotron_h": {"num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "attention"],
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
                   "moe_shared_expert_intermediate_size": 32},
    "prophetnet": {"num_decoder_layers": BLOCKS, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_encoder_layers": 2,
                   "num_encoder_attention_heads": 4, "encoder_ffn_dim": 64, "is_encoder_decoder": False, "is_decoder": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen4_exp_text": {**DELTA, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"lru_width": 32},
    "reformer": {**DECODER, "attn_layers": ["local", "lsh"] * 3, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "axial_pos_shape": (8, 16),
                 "axial_pos_embds_dim": (16, 16), "attention_head_size": 8, "feed_forward_size": 64, "num_buckets": 4},
    "rembert": {**DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {**DECODER, "pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "trocr": {"d_model": 32, "decoder_layers": BLOCKS, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "whisper": {**HALF, "max_target_positions": 128},
    "xglm": {"d_model": 32, "num_layers": BLOCKS, "attention_heads": 4, "ffn_dim": 64},
    "xlm": {"emb_dim": 32, "n_layers": BLOCKS, "n_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": BLOCKS, "n_head": 4, "d_inner": 64, "d_head": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "num_blocks": BLOCKS, "chunk_size": 8, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1, 4], "mamba_ngroups": 1,
               "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

EVERY_THIRD = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2}

ON_THE_HUB = {
    "a period, gemma3_text": ("gemma3_text", EVERY_THIRD, {"layer_types": None, "sliding_window_pattern": 3}),
    "a period, qwen3_next": ("qwen3_next", LINEAR, {"layer_types": None, "full_attention_interval": 3}),
    "a period, smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0] * 2}, {"no_rope_layers": None, "layer_types": None, "no_rope_layer_interval": 3}),
    "a period, modernbert-decoder": ("modernbert-decoder", {}, {"layer_types": None, "global_attn_every_n_layers": 3}),
    "periods, llama4_text": ("llama4_text", {}, {"moe_layers": None, "no_rope_layers": None, "layer_types": None}),
    "nothing at all, gpt_oss": ("gpt_oss", {}, {"layer_types": None}),
    "runs, gpt_neo": ("gpt_neo", {}, {"attention_layers": None}),
    "a string, nemotron_h": ("nemotron_h", {}, {"layers_block_type": None, "hybrid_override_pattern": "ME*-M*", "num_hidden_layers": 6}),
    "numbers, lfm2": ("lfm2", {}, {"layer_types": None, "full_attn_idxs": [2, 4]}),
    "numbers from one, kimi_linear": ("kimi_linear", {}, {"layer_types": None, "mlp_layer_types": None, "first_k_dense_replace": 1, "moe_layer_freq": 1,
                                      "linear_attn_config": {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}}),
    "numbers of kinds, minimax": ("minimax", {}, {"layer_types": None, "attn_type_list": [1, 0] * 3}),
    "a count, glm4_moe_lite": ("glm4_moe_lite", {}, {"mlp_layer_types": None, "first_k_dense_replace": 1}),
    "the last block by -1, ernie4_5_moe": ("ernie4_5_moe", {"moe_layer_end_index": -1}, {"moe_layer_end_index": -1}),
}  # fmt: skip
"""Configs of Hub checkpoints that differ from what transformers saves: type, settings, changes to
config.json.
"""

NOT_ONLY_TEXT = {
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
}  # fmt: skip
"""Models that also see or hear, draft for another model, or read bytes: not a single stack of
blocks.
"""

FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_ONLY_TEXT)
NEWER = {"ergo", "kolibri1_1", "minicpm5_moe", "param2moe"}
"""Families that the document lists, too: they came with transformers 5.25."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a config of some thousand parameters for one of FAMILIES."""
    kind = CONFIG_MAPPING[model_type]
    known = {
        *getattr(kind, "__dataclass_fields__", ()),
        *inspect.signature(kind.__init__).parameters,
        *kind.attribute_map,
    }
    settings = (
        {key: value for key, value in COMMON.items() if key in known}
        | SETTINGS.get(model_type, {})
        | changes
    )
    return kind(**{key: value for key, value in settings.items() if value is not None})


LEFT_OUT = {
    "layoutlmv2", "layoutlmv3", "markuplm", "modernvbert", "neomme", "t5gemma", "t5gemma2", "tapas",
    "ultravbert",
}  # fmt: skip
"""They read images, pages or tables, or do not become tiny by COMMON."""
CLASSIFIERS = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
EMBEDDING_DECODERS = {"embedding_gemma2_text", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"}
READERS = sorted(
    {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *CLASSIFIERS.difference(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    - LEFT_OUT
    | EMBEDDING_DECODERS
)
"""Families that predict masked tokens or classify texts, and decoders of embedding models."""

READER_SETTINGS: dict[str, dict[str, Any]] = {
    "funnel": {
        "num_hidden_layers": None,
        "block_sizes": [2, 2, 2],
        "architectures": ["FunnelModel"],
    },
    "gemma3_text": {"use_bidirectional_attention": True},
    "lilt": {"hidden_size": 48},
    "squeezebert": {"embedding_size": 32},
}


def reader_config(model_type: str) -> Any:
    """Return a config of some thousand parameters for one of READERS, as it reads."""
    settings = dict(READER_SETTINGS.get(model_type, {}))
    for key in {"is_decoder", "is_encoder_decoder"} & set(SETTINGS.get(model_type, {})):
        settings[key] = None
    return tiny_config(model_type, **settings)


WITH_EXPERTS = """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge dots1
    dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_loop_text inkling2_text inkling_text
    jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax
    minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen4_exp_text sarvam_mla sarvam_moe solar_open zaya
""".split()

EIGHT = {
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 8),
    "n_group": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config": SETTINGS["dbrx"]["ffn_config"] | {"moe_num_experts": 8}},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 32},
    "longcat_flash": {"zero_expert_num": 2},
}


def experts_config(model_type: str, **changes: Any) -> Any:
    """Return such a config with eight experts, in two groups if the family has groups."""
    tiny = tiny_config(model_type)
    eight = {key: value for key, value in EIGHT.items() if hasattr(tiny, key)}
    return tiny_config(model_type, **(eight | EXPERTS.get(model_type, {}) | changes))


def counts_experts(config: Any) -> bool:
    """Whether a setting counts some experts."""
    return any(
        counts_experts(value)
        if isinstance(value, dict)
        else "expert" in str(key) and type(value) is int and value > 1
        for key, value in config.items()
    )
