"""Tiny causal models of many architectures, with random weights, built from their configs alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V, D = 64, 32

_SIZES: dict[str, Any] = dict(
    dict.fromkeys(("hidden_size", "n_embd", "d_model"), D),
    **dict.fromkeys(
        ("n_layer", "num_hidden_layers", "n_layers", "num_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    vocab_size=V,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=None,
    first_k_dense_replace=1,
    state_size=8,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
"""What is set where a config knows the name."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 48},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {},
    "codegen": {},
    "gpt_bigcode": {},
    "gpt_oss": {},
    "openai-gpt": {},
    "ctrl": {},
    "bloom": {},
    "opt": {"word_embed_proj_dim": D},
    "xglm": {"attention_heads": 4},
    "biogpt": {},
    "bart": {},
    "trocr": {},
    "bert": {"is_decoder": True},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mistral": {},
    "ministral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "falcon": {},
    "mpt": {},
    "stablelm": {},
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "cohere": {},
    "cohere2": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": D},
    "rwkv": {},
    "persimmon": {},
    "nemotron": {},
    "glm": {},
    "glm4": {},
    "smollm3": {},
    "seed_oss": {},
    "ernie4_5": {},
    "exaone4": {},
    "helium": {},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "diffllama": {},
    "minimax": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "arcee": {},
    "lfm2": {},
    "apertus": {},
    "bitnet": {},
    "nanochat": {},
    "modernbert-decoder": {},
}
"""Model type → what its config needs besides."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word: w0 … w63."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def tiny(model_type: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of two layers, D = 32 and V = 64, in evaluation mode.

    The weights are larger than an initialised model's, so that its distributions differ clearly
    from position to position.
    """
    config_class = CONFIG_MAPPING[model_type]
    aliases = getattr(config_class, "attribute_map", {})
    known = set(inspect.signature(config_class.__init__).parameters) - set(aliases)
    wanted = {name: size for name, size in _SIZES.items() if name in known}
    config = config_class(**wanted | ARCHITECTURES.get(model_type, {}) | settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 3 * D**-0.5 if parameter.shape[0] == V else D**-0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    return model
