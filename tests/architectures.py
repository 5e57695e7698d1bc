"""Real-size configurations, with what each model's own code says of its norms; nothing is downloaded."""

from dataclasses import dataclass, field

import torch
import transformers as T

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@dataclass(frozen=True)
class Case:
    """One model and what is known of it.

    `norms` are the values of all norms; `roles` count norms for attention, output, embedding, final and qk;
    `linears` count the query, key, value, attention_out, ff_in, ff_out sites, slices included.
    """

    model: str
    config: T.PretrainedConfig
    norms: int
    roles: tuple[int, int, int, int, int]
    linears: tuple[int, int, int, int, int, int]
    stacks: dict = field(default_factory=dict)

    def build(self):
        with torch.device("meta"):
            return getattr(T, self.model)(self.config)


def bart(kind, layers, width, heads):
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    return kind(d_model=width, **sides)


def plain(n):
    """Linear maps of `n` blocks with one attention and a two-map feed-forward."""
    return (n,) * 6


def gated(n):
    return (n, n, n, n, 2 * n, n)


ENC_DEC_12 = {"encoder.block": 12, "decoder.block": 12}
DEBERTA_V3 = T.DebertaV2Config(
    **BASE,
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
    type_vocab_size=0,
)
OPT_350M = T.OPTConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    ffn_dim=4096,
    word_embed_proj_dim=512,
    do_layer_norm_before=False,
)
WAV2VEC2_LARGE = T.Wav2Vec2Config(**LARGE, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
QWEN3 = T.Qwen3Config(
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
)
QWEN2 = T.Qwen2Config(
    hidden_size=896,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
)
GEMMA3 = T.Gemma3TextConfig(
    hidden_size=1152,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    intermediate_size=6912,
)
FALCON_NEW = T.FalconConfig(
    hidden_size=8192,
    num_hidden_layers=60,
    num_attention_heads=128,
    num_kv_heads=8,
    new_decoder_architecture=True,
)
MINILM = T.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
PYTHIA = T.GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
OLMO_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "intermediate_size": 8192,
    "num_key_value_heads": 16,
}

CASES = {
    "bert-base": Case("BertModel", T.BertConfig(), 38_400, (12, 12, 1, 0, 0), plain(12), {"encoder.layer": 12}),
    "bert-large": Case("BertModel", T.BertConfig(**LARGE), 100_352, (24, 24, 1, 0, 0), plain(24)),
    "minilm-l6": Case("BertModel", MINILM, 9_984, (6, 6, 1, 0, 0), plain(6), {"encoder.layer": 6}),
    "roberta-base": Case("RobertaModel", T.RobertaConfig(), 38_400, (12, 12, 1, 0, 0), plain(12)),
    "camembert-base": Case("CamembertModel", T.CamembertConfig(), 38_400, (12, 12, 1, 0, 0), plain(12)),
    "xlm-r-base": Case("XLMRobertaModel", T.XLMRobertaConfig(), 38_400, (12, 12, 1, 0, 0), plain(12)),
    "electra-base": Case(
        "ElectraModel", T.ElectraConfig(embedding_size=768, **BASE), 38_400, (12, 12, 1, 0, 0), plain(12)
    ),
    "electra-small": Case("ElectraModel", T.ElectraConfig(), 12_544, (12, 12, 1, 0, 0), plain(12)),
    "mpnet-base": Case("MPNetModel", T.MPNetConfig(), 38_400, (12, 12, 1, 0, 0), plain(12)),
    "distilbert": Case(
        "DistilBertModel", T.DistilBertConfig(), 19_968, (6, 6, 1, 0, 0), plain(6), {"transformer.layer": 6}
    ),
    "albert-base": Case(
        "AlbertModel",
        T.AlbertConfig(**BASE),
        3_328,
        (1, 1, 1, 0, 0),
        plain(1),
        {"encoder.albert_layer_groups": 1},
    ),
    "deberta-base": Case("DebertaModel", T.DebertaConfig(), 38_400, (12, 12, 1, 0, 0), plain(12)),
    "deberta-v3-base": Case("DebertaV2Model", DEBERTA_V3, 39_936, (12, 12, 2, 0, 0), plain(12)),
    "modernbert-base": Case(
        "ModernBertForMaskedLM",
        T.ModernBertConfig(),
        35_328,
        (21, 22, 1, 1, 0),
        gated(22),
        {"model.layers": 22},
    ),
    "xlnet-base": Case(
        "XLNetModel",
        T.XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072),
        36_864,
        (12, 12, 0, 0, 0),
        (0, 0, 0, 0, 12, 12),
        {"layer": 12},
    ),
    "gpt2": Case("GPT2Model", T.GPT2Config(), 38_400, (12, 12, 0, 1, 0), plain(12), {"h": 12}),
    "gpt2-medium": Case(
        "GPT2LMHeadModel",
        T.GPT2Config(n_embd=1024, n_layer=24, n_head=16),
        100_352,
        (24, 24, 0, 1, 0),
        plain(24),
        {"transformer.h": 24},
    ),
    "gpt2-cross": Case(
        "GPT2Model",
        T.GPT2Config(add_cross_attention=True),
        (3 * 12 + 1) * 2 * 768,
        (24, 12, 0, 1, 0),
        (24, 24, 24, 24, 12, 12),
    ),
    "gpt-neo-125m": Case(
        "GPTNeoModel",
        T.GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]]),
        (2 * 12 + 1) * 2 * 768,
        (12, 12, 0, 1, 0),
        plain(12),
    ),
    "gpt-j-6b": Case("GPTJModel", T.GPTJConfig(), (28 + 1) * 2 * 4096, (28, 28, 0, 1, 0), plain(28)),
    "pythia-70m": Case("GPTNeoXModel", PYTHIA, (2 * 6 + 1) * 2 * 512, (6, 6, 0, 1, 0), plain(6), {"layers": 6}),
    "opt-125m": Case("OPTModel", T.OPTConfig(), 38_400, (12, 12, 0, 1, 0), plain(12), {"decoder.layers": 12}),
    "opt-350m": Case("OPTModel", OPT_350M, 98_304, (24, 24, 0, 0, 0), plain(24)),
    "bloom-560m": Case(
        "BloomModel",
        T.BloomConfig(hidden_size=1024, n_layer=24, n_head=16),
        (2 * 24 + 2) * 2 * 1024,
        (24, 24, 1, 1, 0),
        plain(24),
    ),
    "falcon-7b": Case("FalconModel", T.FalconConfig(), (32 + 1) * 2 * 4544, (32, 32, 0, 1, 0), plain(32)),
    "falcon-40b": Case("FalconModel", FALCON_NEW, (2 * 60 + 1) * 2 * 8192, (60, 60, 0, 1, 0), plain(60)),
    "phi-1.5": Case("PhiModel", T.PhiConfig(), (24 + 1) * 2 * 2048, (24, 24, 0, 1, 0), plain(24)),
    "phi-3-mini": Case("Phi3Model", T.Phi3Config(), (2 * 32 + 1) * 3072, (32, 32, 0, 1, 0), gated(32)),
    "llama-7b": Case("LlamaForCausalLM", T.LlamaConfig(), 266_240, (32, 32, 0, 1, 0), gated(32)),
    "mistral-7b": Case("MistralModel", T.MistralConfig(), 266_240, (32, 32, 0, 1, 0), gated(32)),
    "qwen2-0.5b": Case("Qwen2Model", QWEN2, (2 * 24 + 1) * 896, (24, 24, 0, 1, 0), gated(24)),
    "qwen3-0.6b": Case("Qwen3Model", QWEN3, 65_536, (28, 28, 0, 1, 56), gated(28)),
    "gemma-7b": Case("GemmaModel", T.GemmaConfig(), (2 * 28 + 1) * 3072, (28, 28, 0, 1, 0), gated(28)),
    "gemma2-2b": Case("Gemma2Model", T.Gemma2Config(), (4 * 26 + 1) * 2304, (52, 52, 0, 1, 0), gated(26)),
    "gemma3-1b": Case("Gemma3TextModel", GEMMA3, (4 * 26 + 1) * 1152 + 26 * 2 * 256, (52, 52, 0, 1, 52), gated(26)),
    "olmo-1b": Case("OlmoModel", T.OlmoConfig(**OLMO_1B), 0, (0, 0, 0, 0, 0), gated(16), {"layers": 16}),
    "olmo2-1b": Case("Olmo2Model", T.Olmo2Config(**OLMO_1B), (4 * 16 + 1) * 2048, (16, 16, 0, 1, 32), gated(16)),
    "mixtral-8x7b": Case("MixtralModel", T.MixtralConfig(), 266_240, (32, 32, 0, 1, 0), (32, 32, 32, 32, 0, 0)),
    "mamba-130m": Case(
        "MambaModel",
        T.MambaConfig(hidden_size=768, num_hidden_layers=24),
        25 * 768,
        (0, 0, 0, 1, 0),
        (0,) * 6,
    ),
}

T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
CASES |= {
    "t5-base": Case("T5Model", T.T5Config(**T5), 47_616, (36, 24, 0, 2, 0), (36, 36, 36, 36, 24, 24), ENC_DEC_12),
    "t5-v1.1-base": Case(
        "T5Model",
        T.T5Config(**T5, feed_forward_proj="gated-gelu"),
        47_616,
        (36, 24, 0, 2, 0),
        (36, 36, 36, 36, 48, 24),
        ENC_DEC_12,
    ),
    "bart-base": Case(
        "BartModel",
        bart(T.BartConfig, 6, 768, 12),
        49_152,
        (18, 12, 2, 0, 0),
        (18, 18, 18, 18, 12, 12),
        {"encoder.layers": 6, "decoder.layers": 6},
    ),
    "mbart-large": Case(
        "MBartModel",
        bart(T.MBartConfig, 12, 1024, 16),
        (2 * 12 + 3 * 12 + 4) * 2 * 1024,
        (36, 24, 2, 2, 0),
        (36, 36, 36, 36, 24, 24),
    ),
    "pegasus-large": Case(
        "PegasusModel",
        bart(T.PegasusConfig, 16, 1024, 16),
        (2 * 16 + 3 * 16 + 2) * 2 * 1024,
        (48, 32, 0, 2, 0),
        (48, 48, 48, 48, 32, 32),
    ),
    "whisper-tiny": Case("WhisperModel", T.WhisperConfig(), 16_896, (12, 8, 0, 2, 0), (12, 12, 12, 12, 8, 8)),
    "clip-vit-b32": Case(
        "CLIPModel",
        T.CLIPConfig(text_config={"bos_token_id": 0, "eos_token_id": 2}, vision_config={"patch_size": 32}),
        (2 * 12 + 1) * 2 * 512 + (2 * 12 + 2) * 2 * 768,
        (24, 24, 1, 2, 0),
        plain(24),
        {"text_model.encoder.layers": 12, "vision_model.encoder.layers": 12},
    ),
    # the norm of the pooling head has no role but "norm"
    "siglip-base": Case(
        "SiglipModel", T.SiglipConfig(), (2 * 12 + 1 + 2 * 12 + 2) * 2 * 768, (24, 24, 0, 2, 0), plain(24)
    ),
    "vit-base": Case("ViTModel", T.ViTConfig(), 38_400, (12, 12, 0, 1, 0), plain(12)),
    "deit-base": Case("DeiTModel", T.DeiTConfig(), 38_400, (12, 12, 0, 1, 0), plain(12)),
    "beit-base": Case("BeitModel", T.BeitConfig(), 38_400, (12, 12, 0, 0, 0), plain(12)),
    # and the classifier's norm here
    "ast-base": Case("ASTForAudioClassification", T.ASTConfig(), 38_400 + 2 * 768, (12, 12, 0, 1, 0), plain(12)),
    "dinov2-base": Case("Dinov2Model", T.Dinov2Config(), 38_400, (12, 12, 0, 1, 0), plain(12), {"encoder.layer": 12}),
    "swin-tiny": Case(
        "SwinModel",
        T.SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]),
        2 * 96
        + 4 * (2 * 96 + 2 * 192 + 6 * 384 + 2 * 768)
        + 2 * (4 * 96 + 4 * 192 + 4 * 384)  # before each merge of 2 x 2 patches
        + 2 * 768,
        (12, 12, 1, 1, 0),
        plain(12),
        {"encoder.layers": 12},
    ),
    "convnext-tiny": Case(
        "ConvNextModel",
        T.ConvNextConfig(),
        2 * 96 + 2 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768) + 2 * (96 + 192 + 384) + 2 * 768,
        (0, 18, 1, 1, 0),
        (0, 0, 0, 0, 18, 18),
        {"encoder.stages": 18},
    ),
    "resnet-50": Case("ResNetModel", T.ResNetConfig(), 0, (0, 0, 0, 0, 0), (0,) * 6),
    "wav2vec2-base": Case(
        "Wav2Vec2Model",
        T.Wav2Vec2Config(),
        2 * 512 + 2 * 512 + 2 * 768 + 12 * 4 * 768,
        (12, 12, 3, 0, 0),
        plain(12),
        {"encoder.layers": 12},
    ),
    "wav2vec2-large": Case(
        "Wav2Vec2Model",
        WAV2VEC2_LARGE,
        7 * 2 * 512 + 2 * 512 + 24 * 4 * 1024 + 2 * 1024,
        (24, 24, 8, 1, 0),
        plain(24),
        {"encoder.layers": 24},
    ),
    "hubert-base": Case(
        "HubertModel",
        T.HubertConfig(),
        2 * 512 + 2 * 512 + 2 * 768 + 12 * 4 * 768,
        (12, 12, 3, 0, 0),
        plain(12),
    ),
}
