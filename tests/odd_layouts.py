"""Tiny models whose blocks are laid out in ways of their own: fused rows by head, latent attention, other names."""

import torch
import transformers as T

from smidgen.testing.suite import shake

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 61}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**SIZES, **TOKENS}
GROUPED = {**BASE, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 61, **TOKENS}
LATENT = {
    **{**BASE, "num_key_value_heads": 4},
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "head_dim": 4},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    **{"n_group": 1, "topk_group": 1},
}
SEQ2SEQ = {"d_model": 16, "vocab_size": 61, "decoder_start_token_id": 0, **TOKENS} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "pad_token_id": 0}
DIA = {**SIZES, "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 32}
DIA_CROSS = {"cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 4}


def dia():
    encoder = T.DiaEncoderConfig(**DIA)
    decoder = T.DiaDecoderConfig(**DIA, **DIA_CROSS, **TOKENS, cross_hidden_size=16, num_channels=3)
    return T.DiaConfig(encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 1, 2])


def deepseek(q_lora_rank):
    return lambda: T.DeepseekV3Config(**LATENT, q_lora_rank=q_lora_rank, first_k_dense_replace=2)


GEMMA = {**GROUPED, "head_dim": 4}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
del IMAGE["vocab_size"]
CLASSES = {"Qwen2VLVisionModel": T.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel}
LM, S2S = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
HYBRID = {**GROUPED, "head_dim": 4, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4}
# name -> class, configuration, numbers of query, key, value, attention_out, ff_in and ff_out maps, and of attention,
# cross-attention and feed-forward sublayers
ODD = {
    "gpt_neox": (LM, lambda: T.GPTNeoXConfig(**BASE), (2,) * 6, (2, 0, 2)),
    "bloom": (LM, lambda: T.BloomConfig(**BASE, n_layer=2, n_head=4), (2,) * 6, (2, 0, 2)),
    "falcon, one key": (LM, lambda: T.FalconConfig(**BASE), (2,) * 6, (2, 0, 2)),
    "falcon, all keys": (LM, lambda: T.FalconConfig(**BASE, multi_query=False, alibi=True), (2,) * 6, (2, 0, 2)),
    "falcon, groups": (
        LM,
        lambda: T.FalconConfig(**BASE, num_kv_heads=2, new_decoder_architecture=True),
        (2,) * 6,
        (2, 0, 2),
    ),
    "gpt_bigcode": (LM, lambda: T.GPTBigCodeConfig(**GPT, multi_query=False), (2,) * 6, (2, 0, 2)),
    "gpt_bigcode, one key": (LM, lambda: T.GPTBigCodeConfig(**GPT), (2,) * 6, (2, 0, 2)),
    "mpt": (LM, lambda: T.MptConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=61), (2,) * 6, (2, 0, 2)),
    "persimmon": (LM, lambda: T.PersimmonConfig(**BASE, qk_layernorm=False), (2,) * 6, (2, 0, 2)),
    "codegen": (LM, lambda: T.CodeGenConfig(**GPT, rotary_dim=4), (2,) * 6, (2, 0, 2)),
    "deberta": ("AutoModelForMaskedLM", lambda: T.DebertaConfig(**BASE), (2,) * 6, (2, 0, 2)),
    "dbrx": (
        LM,
        lambda: T.DbrxConfig(
            d_model=16,
            n_heads=4,
            n_layers=2,
            vocab_size=61,
            max_seq_len=32,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
        ),
        (2, 2, 2, 2, 0, 0),
        (2, 0, 2),
    ),
    "deepseek": (LM, deepseek(None), (2, 2, 2, 2, 4, 2), (2, 0, 2)),
    "deepseek, query from a latent": (LM, deepseek(8), (2, 2, 2, 2, 4, 2), (2, 0, 2)),
    "nemotron": (LM, lambda: T.NemotronConfig(**GROUPED, head_dim=4), (2,) * 6, (2, 0, 2)),
    "arcee": (LM, lambda: T.ArceeConfig(**GROUPED), (2,) * 6, (2, 0, 2)),
    "apertus": (LM, lambda: T.ApertusConfig(**GROUPED), (2,) * 6, (2, 0, 2)),
    "lfm2": (
        LM,
        lambda: T.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        (1, 1, 1, 1, 4, 2),
        (1, 0, 2),
    ),
    "falcon_h1": (LM, lambda: T.FalconH1Config(**HYBRID), (2, 2, 2, 2, 4, 2), (2, 0, 2)),
    "switch": (
        S2S,
        lambda: T.SwitchTransformersConfig(
            **T5, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4
        ),
        (6, 6, 6, 6, 2, 2),
        (4, 2, 4),
    ),
    "longt5": (S2S, lambda: T.LongT5Config(**T5, local_radius=3), (6, 6, 6, 6, 4, 4), (4, 2, 4)),
    "longt5, global": (
        S2S,
        lambda: T.LongT5Config(**T5, local_radius=3, global_block_size=4, encoder_attention_type="transient-global"),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "bigbird_pegasus": (
        S2S,
        lambda: T.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full"),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "led": (S2S, lambda: T.LEDConfig(**SEQ2SEQ, attention_window=4), (6, 6, 6, 6, 4, 4), (4, 2, 4)),
    "pegasus_x": (
        S2S,
        lambda: T.PegasusXConfig(**SEQ2SEQ, num_global_tokens=3, block_size=4),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "prophetnet": (
        S2S,
        lambda: T.ProphetNetConfig(
            hidden_size=16,
            vocab_size=61,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            ngram=2,
            **TOKENS,
        ),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "dia": ("DiaForConditionalGeneration", dia, (6, 6, 6, 6, 8, 4), (4, 2, 4)),
    "xlm": (
        "AutoModelForMaskedLM",
        lambda: T.XLMConfig(emb_dim=16, n_layers=2, n_heads=4, vocab_size=61, n_words=61),
        (2,) * 6,
        (2, 0, 2),
    ),
    "flaubert": (
        "AutoModelForMaskedLM",
        lambda: T.FlaubertConfig(emb_dim=16, n_layers=2, n_heads=4, vocab_size=61, n_words=61),
        (2,) * 6,
        (2, 0, 2),
    ),
    "funnel": (
        "AutoModelForMaskedLM",
        lambda: T.FunnelConfig(
            vocab_size=61, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=4, d_head=4, d_inner=24
        ),
        (3,) * 6,
        (3, 0, 3),
    ),
    "ctrl": (LM, lambda: T.CTRLConfig(vocab_size=61, n_embd=16, n_layer=2, n_head=4, dff=24), (2,) * 6, (2, 0, 2)),
    "recurrent_gemma": (
        LM,
        lambda: T.RecurrentGemmaConfig(**GROUPED, head_dim=4, lru_width=16, block_types=["attention", "recurrent"]),
        (1, 1, 1, 1, 4, 2),
        (1, 0, 2),
    ),
    "wav2vec2-bert": (
        "AutoModelForCTC",
        lambda: T.Wav2Vec2BertConfig(**{**SIZES, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3}),
        (2, 2, 2, 2, 4, 4),
        (2, 0, 4),
    ),
    "qwen2_moe": (
        LM,
        lambda: T.Qwen2MoeConfig(
            **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
        (2, 2, 2, 2, 0, 0),
        (2, 0, 2),
    ),
    "bark": (
        "BarkSemanticModel",
        lambda: T.BarkSemanticConfig(
            hidden_size=16, num_layers=2, num_heads=4, block_size=32, input_vocab_size=61, output_vocab_size=61
        ),
        (2,) * 6,
        (2, 0, 2),
    ),
    "zamba": (
        LM,
        lambda: T.ZambaConfig(
            **{**GROUPED, "num_hidden_layers": 4},
            attention_head_dim=8,
            attention_hidden_size=32,
            layers_block_type=["hybrid", "mamba", "hybrid", "mamba"],
            mamba_d_state=4,
            mamba_dt_rank=2,
            n_mamba_heads=2,
        ),
        (2, 2, 2, 2, 4, 2),
        (2, 0, 2),
    ),
    "nemotron_h": (
        LM,
        lambda: T.NemotronHConfig(
            **GROUPED,
            head_dim=4,
            layer_types=["full_attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=4,
        ),
        (1,) * 6,
        (1, 0, 1),
    ),
    "modernbert decoder": (
        LM,
        lambda: T.ModernBertDecoderConfig(**BASE, cls_token_id=1, sep_token_id=2),
        (2, 2, 2, 2, 4, 2),
        (2, 0, 2),
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        lambda: T.MoonshineConfig(
            hidden_size=16,
            intermediate_size=24,
            vocab_size=61,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            pad_token_id=0,
        ),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "nllb-moe": (
        S2S,
        lambda: T.NllbMoeConfig(**SEQ2SEQ, encoder_sparse_step=0, decoder_sparse_step=0),
        (6, 6, 6, 6, 4, 4),
        (4, 2, 4),
    ),
    "t5gemma": (S2S, lambda: T.T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, **TOKENS), (6, 6, 6, 6, 8, 4), (4, 2, 4)),
    "blip vision": ("BlipVisionModel", lambda: T.BlipVisionConfig(**IMAGE), (2,) * 6, (2, 0, 2)),
    "internvl vision": ("InternVLVisionModel", lambda: T.InternVLVisionConfig(**IMAGE), (2,) * 6, (2, 0, 2)),
    "sam vision": (
        "SamVisionModel",
        lambda: T.SamVisionConfig(**IMAGE, mlp_dim=24, output_channels=16, window_size=0, global_attn_indexes=[0, 1]),
        (2,) * 6,
        (2, 0, 2),
    ),
    "qwen2-vl vision": (
        "Qwen2VLVisionModel",
        lambda: T.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            depth=2, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2, spatial_merge_size=2
        ),
        (2,) * 6,
        (2, 0, 2),
    ),
    "qwen3-vl vision": (
        "Qwen3VLVisionModel",
        lambda: T.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=2,
            out_hidden_size=16,
            num_position_embeddings=16,
            deepstack_visual_indexes=[],
        ),
        (2,) * 6,
        (2, 0, 2),
    ),
    "blip-2 queries": (
        "Blip2QFormerModel",
        lambda: T.Blip2QFormerConfig(**SIZES, encoder_hidden_size=12, cross_attention_frequency=1),
        (4, 4, 4, 4, 2, 2),
        (2, 2, 2),
    ),
    "parakeet": (
        "ParakeetForCTC",
        lambda: T.ParakeetCTCConfig(
            vocab_size=61,
            pad_token_id=0,
            encoder_config={**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 4, "conv_kernel_size": 3},
        ),
        (2, 2, 2, 2, 4, 4),
        (2, 0, 4),
    ),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5, 4, 3, 13]])


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PATCHES = {"hidden_states": draw(16, 3 * 2 * 2 * 2), "grid_thw": torch.tensor([[1, 4, 4]])}
OTHER = {
    "AutoModelForCTC": {"input_features": draw(2, 8, 8)},
    "ParakeetForCTC": {"input_features": draw(2, 32, 16)},
    "MoonshineForConditionalGeneration": {"input_values": draw(2, 2000), "decoder_input_ids": IDS[:, :5]},
    **{f"{name}VisionModel": {"pixel_values": draw(2, 3, 8, 8)} for name in ("Blip", "InternVL", "Sam")},
    **{f"{name}VisionModel": PATCHES for name in ("Qwen2VL", "Qwen3VL")},
    "Blip2QFormerModel": {"query_embeds": draw(2, 5, 16), "encoder_hidden_states": draw(2, 7, 12)},
}


def inputs(name):
    """What a model of `ODD` reads."""
    cls = ODD[name][0]
    if cls in OTHER:
        return OTHER[cls]
    given = {"input_ids": IDS}
    if name == "dia":
        return given | {"decoder_input_ids": IDS[:, :6].view(2, 2, 3) + torch.arange(3)}
    return given | ({"decoder_input_ids": IDS[:, :5]} if cls == S2S else {})


def odd(name):
    """A shaken model of `ODD` in float64, in eval mode."""
    cls, config, *_ = ODD[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = getattr(T, cls, None) or CLASSES[cls]
        made = kind.from_config(config()) if cls.startswith("Auto") else kind._from_config(config())
    model = made.double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other knows no float64
    shake(model.parameters(), 0.3)
    return model


def output(model, name):
    """The logits of a model of `ODD`, or its last hidden states where it has no head."""
    found = model(**inputs(name))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
