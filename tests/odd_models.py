"""Tiny models with modules that are not what they look like: routers, maps that are read, norms of other forms."""

import torch
import transformers as T

from smidgen.testing.cases import shake

WORDS = 41
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": WORDS, "pad_token_id": 0}
AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": WORDS,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
SPARSE = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 3, "n_group": 1, "topk_group": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": WORDS}
SINGLE = ("phimoe", "deepseek_v32")
MODELS = {
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(
            **TEXT, head_dim=8, intermediate_size_mlp=24, num_local_experts=3, attention_chunk_size=16,
            use_qk_norm=False,
        )
    ),
    "phimoe": lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**MAMBA)),
    "falcon_mamba": lambda: T.FalconMambaForCausalLM(T.FalconMambaConfig(**MAMBA)),
    "jamba": lambda: T.JambaForCausalLM(
        T.JambaConfig(
            **TEXT, num_experts=2, expert_layer_period=8, expert_layer_offset=7, attn_layer_period=2,
            attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        )
    ),
    "wavlm": lambda: T.WavLMForCTC(T.WavLMConfig(**AUDIO, num_buckets=8, max_bucket_distance=16)),
    "wav2vec2": lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**AUDIO)),
    "nemotron": lambda: T.NemotronForCausalLM(T.NemotronConfig(**TEXT)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**TEXT, use_qk_norm=True)),
    "deepseek_v32": lambda: T.DeepseekV32ForCausalLM(T.DeepseekV32Config(**TEXT, **LATENT, **EXPERTS, **SPARSE)),
    "switch": lambda: T.SwitchTransformersForConditionalGeneration(
        T.SwitchTransformersConfig(
            **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=8
        )
    ),
    "xlnet": lambda: T.XLNetForSequenceClassification(
        T.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=WORDS)
    ),
    "squeezebert": lambda: T.SqueezeBertForSequenceClassification(
        T.SqueezeBertConfig(
            hidden_size=16, embedding_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=WORDS, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1,
            output_groups=1,
        )
    ),
    "chameleon": lambda: T.ChameleonForConditionalGeneration(
        T.ChameleonConfig(
            **TEXT,
            vocabulary_map={"<image>": 8, **{f"IMGIMG{c}Z": 9 + i for i, c in enumerate("ABCD")}},
            vq_config={
                "embed_dim": 8, "num_embeddings": 4, "base_channels": 32, "channel_multiplier": [1],
                "latent_channels": 8, "num_res_blocks": 1, "resolution": 16,
            },
        )
    ),
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "sliding_window": 4},
            vision_config={
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4,
            },
            mm_tokens_per_image=4, image_token_index=40, boi_token_index=38, eoi_token_index=39,
        )
    ),
    "moonshine_streaming": lambda: T.MoonshineStreamingForConditionalGeneration(
        T.MoonshineStreamingConfig(
            **{**TEXT, "num_hidden_layers": 1},
            encoder_config={
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 8, "sliding_windows": [[4, 2]],
            },
        )
    ),
}  # fmt: skip


def build(name, shaken=0.1):
    """In eval mode, shaken; in float64, but for those whose experts' kernel has no such."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval().to(torch.float32 if name in SINGLE else torch.float64)
    shake(model.parameters(), shaken)
    return model


def inputs(name, rows=3, length=7):
    generator = torch.Generator().manual_seed(5)
    if name in ("wavlm", "wav2vec2"):
        return {"input_values": torch.randn(rows, 80, generator=generator, dtype=torch.float64)}
    if name == "moonshine_streaming":
        sound = torch.randn(rows, 1600, generator=generator, dtype=torch.float64)
        return {"input_values": sound, "decoder_input_ids": torch.ones(rows, 3, dtype=torch.long)}
    ids = torch.randint(14, 38, (rows, length), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if name == "switch" else {"input_ids": ids}
