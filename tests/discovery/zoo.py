"""Tiny models of published families, built from configs: distinct sizes, random biases and gains, eager attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 31


def randoms(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IDS = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": VOCAB,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    **TOKENS,
}
# heads of 6 on a stream of 20: nothing but a config's head_dim says so; 24 where the config has no head_dim
GROUPED = {**COMMON, "hidden_size": 20, "num_key_value_heads": 2, "head_dim": 6}
GROUPED_24 = {**COMMON, "hidden_size": 24, "num_key_value_heads": 2}
WHOLE = {**COMMON, "hidden_size": 24}
GEMMA = {**GROUPED, "query_pre_attn_scalar": 6, "sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "experts_implementation": "eager"}
DEEPSEEK = {
    **{key: value for key, value in GROUPED.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 11,
    "kv_lora_rank": 13,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EAGER = {"attn_implementation": "eager"}
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 28, **TOKENS, **EAGER}
VISION = {**WHOLE, "image_size": 8, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WHISPER = {
    **TOKENS,
    "vocab_size": VOCAB,
    "num_mel_bins": 8,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 26,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
    "attn_implementation": "eager",
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    **EAGER,
}
IDS_ONLY = {"input_ids": IDS}
# family: (model class, config class, config, inputs)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        IDS_ONLY,
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**WHOLE, "ffn_dim": 28, "word_embed_proj_dim": 24, "dropout": 0.0},
        IDS_ONLY,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, IDS_ONLY),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, IDS_ONLY),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED_24, IDS_ONLY),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, IDS_ONLY),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA, IDS_ONLY),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, IDS_ONLY),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED_24, IDS_ONLY),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**WHOLE, "rotary_pct": 0.7, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        IDS_ONLY,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**WHOLE, **NO_DROPOUT, "tie_word_embeddings": True}, IDS_ONLY),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**VISION, **NO_DROPOUT, "num_labels": 5},
        {"pixel_values": randoms(2, 3, 8, 8)},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**WHOLE, "projection_dim": 15},
            "vision_config": {**VISION, "hidden_size": 30, "intermediate_size": 26, "num_attention_heads": 5},
            "projection_dim": 15,
            "attn_implementation": "eager",
        },
        {"input_ids": IDS, "pixel_values": randoms(3, 3, 8, 8)},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        {"input_features": randoms(2, 8, 20), "decoder_input_ids": IDS},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)[:, :5]},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, **EXPERTS, "num_local_experts": 5}, IDS_ONLY),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED_24, **EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 14},
        IDS_ONLY,
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 5}, IDS_ONLY),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**DEEPSEEK, **EXPERTS}, IDS_ONLY),
    # beyond the list: each has a detail that the builders were not written for
    "phi": ("PhiForCausalLM", "PhiConfig", {**WHOLE, "partial_rotary_factor": 0.7}, IDS_ONLY),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4, "tie_word_embeddings": False}, IDS_ONLY),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED_24, IDS_ONLY),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**WHOLE, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "ffn_hidden_size": 28},
        IDS_ONLY,
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", GROUPED_24, IDS_ONLY),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**GROUPED_24, "no_rope_layers": [1, 0]}, IDS_ONLY),
}


@torch.no_grad()
def build(family: str, device: str = "cpu", **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The family's tiny model off its initialisation, in float64 and eval mode, with inputs for it."""
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, config_class, config, inputs = FAMILIES[family]
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **changes}))
    if device != "cpu":
        return model.eval(), inputs
    generator = torch.Generator().manual_seed(5)
    model.double()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    for tensor in (*model.parameters(), *biases):
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.eval(), wide
