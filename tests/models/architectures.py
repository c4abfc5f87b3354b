"""Small random checkpoints of many architectures."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIZES = {
    "vocab_size": 266,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
LINEAR |= {f"linear_{part}_head_dim": 16 for part in ("key", "value")}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}
EVERY_SECOND |= {"expert_layer_period": 2, "expert_layer_offset": 1}
WINDOW = {"sliding_window": 8}  # shorter than the prompts
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"], **LINEAR}


class Architecture(NamedTuple):
    """kind: the model type; changes: of SIZES; refused: a word of the line, None where it works."""

    kind: str
    changes: dict[str, Any] = {}
    attn_implementation: str = "sdpa"
    refused: str | None = None


ARCHITECTURES = {
    "Llama": Architecture("llama"),
    "GPT-2": Architecture("gpt2"),
    "GPT-NeoX": Architecture("gpt_neox"),
    "GPT-Neo": Architecture("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "eager"),
    "GPT-J": Architecture("gptj", {"rotary_dim": 8}, "eager"),
    "CodeGen": Architecture("codegen", {"rotary_dim": 8, "num_attention_heads": 4}, "eager"),
    "OPT": Architecture("opt", {"ffn_dim": 64}),
    "OPT-350m": Architecture("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "BLOOM": Architecture("bloom", {}, "eager"),
    "Falcon, rotary": Architecture("falcon"),
    "Falcon, alibi": Architecture("falcon", {"alibi": True}),
    "Falcon, new decoder": Architecture("falcon", {"new_decoder_architecture": True}),
    "MPT": Architecture("mpt", {}, "eager"),
    "Phi-3": Architecture("phi3"),
    "Gemma 2": Architecture("gemma2", {"head_dim": 24, **WINDOW}, "eager"),
    "Gemma 3": Architecture("gemma3_text", {"head_dim": 24, **MIXED}),
    "Qwen2": Architecture("qwen2"),
    "Qwen3": Architecture("qwen3", {"head_dim": 24}),
    "Qwen3 MoE": Architecture("qwen3_moe", EXPERTS),
    "Qwen3-Next": Architecture("qwen3_next", EXPERTS | HALF_LINEAR),
    "Qwen3.5": Architecture("qwen3_5_text", HALF_LINEAR),
    "Mistral": Architecture("mistral", WINDOW),
    "Mixtral": Architecture("mixtral", EXPERTS),
    "OLMo 2": Architecture("olmo2"),
    "Granite": Architecture("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "Granite 4 hybrid": Architecture(
        "granitemoehybrid", EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"]}
    ),
    "Cohere": Architecture("cohere"),
    "SmolLM3": Architecture("smollm3"),
    "StarCoder2": Architecture("starcoder2"),
    "DeepSeek-V3": Architecture("deepseek_v3", EXPERTS | LATENT | {"first_k_dense_replace": 1}),
    "GPT-OSS": Architecture("gpt_oss", EXPERTS | MIXED | {"head_dim": 16}, "eager"),
    "Llama 4": Architecture(
        "llama4_text", EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8}
    ),
    "Jamba": Architecture("jamba", EXPERTS | EVERY_SECOND),
    "Bamba": Architecture("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "LFM2": Architecture("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "Mamba 2": Architecture("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1}, "eager"),
    "Mamba": Architecture("mamba", {}, "eager", "cache"),
    "RWKV": Architecture("rwkv", {}, "eager", "padding"),
    "RecurrentGemma": Architecture("recurrent_gemma", {"num_hidden_layers": 3}, "sdpa", "padding"),
    "BERT": Architecture("bert", {"is_decoder": True}, "sdpa", "LM head"),
    "XLM": Architecture("xlm", {}, "eager", "type xlm"),
    "BART": Architecture("bart", {"d_model": 32}, "sdpa", "type bart"),
}


def save_architecture(folder: Path, architecture: Architecture, tokenizer_of: Path) -> Path:
    """A checkpoint whose logits have a spread of about 1, so that a wrong token shows."""
    config = AutoConfig.for_model(architecture.kind, **copy.deepcopy(SIZES | architecture.changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder
