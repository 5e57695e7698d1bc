"""The table: where query, key, value and feed-forward maps lie in a block, by exact module paths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """One linear map holding several: `parts` are the roles of consecutive output rows in each of `groups` blocks.

    `groups=None` is a block for each key head: its queries, its key, its value, or what there is of them.
    """

    path: str
    parts: tuple[str, ...]
    transposed: bool = False
    groups: int | None = 1


@dataclass(frozen=True)
class Layout:
    """The linear maps of one sublayer, as exact paths relative to the block; `latent` ones feed the others."""

    name: str
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    attention_out: tuple[str, ...] = ()
    ff_in: tuple[str, ...] = ()
    ff_out: tuple[str, ...] = ()
    fused: tuple[Fused, ...] = ()
    latent: tuple[str, ...] = ()

    def roles(self) -> dict[str, frozenset[str]]:
        """Path of each whole linear map -> its roles; a fused map has only the role that covers all of it."""
        found = {path: frozenset({role, COVERS[role]}) for role in COVERS for path in getattr(self, role)}
        found |= {path: frozenset({"attention"}) for path in self.latent}
        return found | {fused.path: frozenset({COVERS[fused.parts[0]]}) for fused in self.fused}


QKV, QVK = ("query", "key", "value"), ("query", "value", "key")


HALVES = ("ff_in", "ff_in")


HEAD_DIMS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head")


VALUE_DIMS = ("v_head_dim", *HEAD_DIMS)


COVERS = dict.fromkeys((*QKV, "attention_out"), "attention") | {"ff_in": "ff", "ff_out": "ff"}


def _attention(name: str, root: str, *parts: str) -> Layout:
    query, key, value, out = ((f"{root}.{part}",) for part in parts)
    return Layout(name, query, key, value, out)


def _by_head(name: str, fused: str, out: str) -> Layout:
    return Layout(name, attention_out=(out,), fused=(Fused(fused, QKV, groups=None),))


def _ff(name: str, root: str, into: tuple[str, ...], out: str) -> Layout:
    return Layout(name, ff_in=tuple(f"{root}{part}" for part in into), ff_out=(f"{root}{out}",))


def _latent(name: str, *latent: str, query: str) -> Layout:
    paths = tuple(f"self_attn.{path}" for path in latent)
    kv = Fused("self_attn.kv_b_proj", QKV[1:], groups=None)
    return Layout(name, (f"self_attn.{query}",), attention_out=("self_attn.o_proj",), fused=(kv,), latent=paths)


_DBRX = "norm_attn_norm.attn"


LAYOUTS: tuple[Layout, ...] = (
    # attention; BERT's row serves RoBERTa, ELECTRA, XLM-R and CamemBERT as well
    _attention("bert", "attention", "self.query", "self.key", "self.value", "output.dense"),
    _attention("bert cross", "crossattention", "self.query", "self.key", "self.value", "output.dense"),
    _attention("mpnet", "attention.attn", "q", "k", "v", "o"),
    _attention("distilbert", "attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    _attention("albert", "attention", "query", "key", "value", "dense"),
    _attention("deberta 2", "attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    # rows: head 0's query, key and value, then head 1's (Falcon: all queries of one key head, key, value)
    _by_head("deberta v1", "attention.self.in_proj", "attention.output.dense"),
    _by_head("gpt_neox", "attention.query_key_value", "attention.dense"),
    _by_head("bloom, falcon", "self_attention.query_key_value", "self_attention.dense"),
    _by_head("persimmon", "self_attn.query_key_value", "self_attn.dense"),
    _by_head("gpt_bigcode", "attn.c_attn", "attn.c_proj"),
    Layout("mpt", attention_out=("attn.out_proj",), fused=(Fused("attn.Wqkv", QKV),)),
    Layout("dbrx", attention_out=(f"{_DBRX}.out_proj",), fused=(Fused(f"{_DBRX}.Wqkv", QKV),)),
    Layout("bark", attention_out=("attn.out_proj",), fused=(Fused("attn.att_proj", QKV),)),
    Layout("qwen-vl, glm-v, sam", attention_out=("attn.proj",), fused=(Fused("attn.qkv", QKV),)),
    Layout("blip", attention_out=("self_attn.projection",), fused=(Fused("self_attn.qkv", QKV),)),
    # what makes the latents is neither query nor key; each head has rows of a key without position, then of a value
    _latent("deepseek", "kv_a_proj_with_mqa", query="q_proj"),
    _latent("deepseek, query from a latent", "kv_a_proj_with_mqa", "q_a_proj", query="q_b_proj"),
    # rows: four blocks, one for each core of the machine that the model was trained on
    Layout("codegen", attention_out=("attn.out_proj",), fused=(Fused("attn.qkv_proj", QVK, groups=4),)),
    Layout("modernbert", attention_out=("attn.Wo",), fused=(Fused("attn.Wqkv", QKV),)),
    # GPT-BigCode has GPT-2's names on nn.Linear, with rows by head: this is for a Conv1D
    Layout("gpt2", attention_out=("attn.c_proj",), fused=(Fused("attn.c_attn", QKV, transposed=True),)),
    Layout(
        "gpt2 cross",
        query=("crossattention.q_attn",),
        attention_out=("crossattention.c_proj",),
        fused=(Fused("crossattention.c_attn", QKV[1:], transposed=True),),
    ),
    _attention("gpt_neo", "attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("gptj", "attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("llama, mixtral, qwen, gemma, olmo", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("opt, bart, whisper, clip, siglip", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("bart cross, whisper cross", "encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("phi", "self_attn", "q_proj", "k_proj", "v_proj", "dense"),
    Layout("phi3", attention_out=("self_attn.o_proj",), fused=(Fused("self_attn.qkv_proj", QKV),)),
    _attention("t5", "layer.0.SelfAttention", "q", "k", "v", "o"),
    _attention("longt5 local", "layer.0.LocalSelfAttention", "q", "k", "v", "o"),
    _attention("longt5 global", "layer.0.TransientGlobalSelfAttention", "q", "k", "v", "o"),
    _attention("bigbird_pegasus", "self_attn", "self.query", "self.key", "self.value", "output"),
    _attention("led", "self_attn", *(f"longformer_self_attn.{part}" for part in ("query", "key", "value")), "output"),
    _attention("t5 cross", "layer.1.EncDecAttention", "q", "k", "v", "o"),
    _attention("wav2vec2, hubert", "attention", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("vit, deit, beit, ast, dinov2, swin", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    # vision models before transformers 5.23
    _attention("older vit", "attention", "attention.query", "attention.key", "attention.value", "output.dense"),
    _attention("internvl", "attention", "q_proj", "k_proj", "v_proj", "projection_layer"),
    _attention("dia", "self_attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("dia cross", "cross_attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("moonshine cross", "encoder_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("mllama cross, t5gemma cross", "cross_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("seamless cross, nllb-moe cross", "cross_attention", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("modernbert decoder", "attn", "q_proj", "k_proj", "v_proj", "Wo"),
    _attention("wav2vec2-bert, conformers", "self_attn", "linear_q", "linear_k", "linear_v", "linear_out"),
    _attention("prophetnet", "self_attn", "query_proj", "key_proj", "value_proj", "out_proj"),
    _attention("prophetnet cross", "cross_attn", "query_proj", "key_proj", "value_proj", "out_proj"),
    _attention("recurrent_gemma", "temporal_block", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("nemotron_h", "mixer", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("ctrl", "multi_head_attention", "Wq", "Wk", "Wv", "dense"),
    _attention("funnel", "attention", "q_head", "k_head", "v_head", "post_proj"),
    _attention("zamba", "shared_transf.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    _attention("blip-2 cross", "crossattention", *(f"attention.{part}" for part in QKV), "output.dense"),
    # the elements of lists side by side, in place of blocks
    Layout("xlm, flaubert", ("q_lin",), ("k_lin",), ("v_lin",), ("out_lin",)),
    # feed-forward
    _ff("bert, mpnet, deberta", "", ("intermediate.dense",), "output.dense"),
    _ff("distilbert", "ffn.", ("lin1",), "lin2"),
    _ff("albert", "", ("ffn",), "ffn_output"),
    _ff("xlnet", "ff.", ("layer_1",), "layer_2"),
    _ff("gpt2, gpt_neo", "mlp.", ("c_fc",), "c_proj"),
    _ff("gptj", "mlp.", ("fc_in",), "fc_out"),
    _ff("gpt_neox, bloom, falcon", "mlp.", ("dense_h_to_4h",), "dense_4h_to_h"),
    _ff("opt, bart, whisper", "", ("fc1",), "fc2"),
    _ff("clip, siglip, phi, vit, dinov2, swin", "mlp.", ("fc1",), "fc2"),
    _ff("llama, qwen, gemma, olmo", "mlp.", ("gate_proj", "up_proj"), "down_proj"),
    _ff("t5 encoder", "layer.1.DenseReluDense.", ("wi",), "wo"),
    _ff("t5 decoder", "layer.2.DenseReluDense.", ("wi",), "wo"),
    _ff("t5 v1.1 encoder", "layer.1.DenseReluDense.", ("wi_0", "wi_1"), "wo"),
    _ff("t5 v1.1 decoder", "layer.2.DenseReluDense.", ("wi_0", "wi_1"), "wo"),
    _ff("wav2vec2, hubert", "feed_forward.", ("intermediate_dense",), "output_dense"),
    _ff("convnext", "", ("pwconv1",), "pwconv2"),
    _ff("torch", "", ("linear1",), "linear2"),
    _ff("nemotron, arcee, apertus", "mlp.", ("up_proj",), "down_proj"),
    _ff("nemotron_h", "mixer.", ("up_proj",), "down_proj"),
    _ff("lfm2", "feed_forward.", ("w1", "w3"), "w2"),
    _ff("falcon_h1, jamba, pixtral", "feed_forward.", ("gate_proj", "up_proj"), "down_proj"),
    _ff("zamba", "shared_transf.feed_forward.", ("gate_proj", "up_proj"), "down_proj"),
    _ff("recurrent_gemma", "mlp_block.", ("gate_proj", "up_proj"), "down_proj"),
    _ff("switch encoder", "layer.1.mlp.", ("wi",), "wo"),
    _ff("switch decoder", "layer.2.mlp.", ("wi",), "wo"),
    _ff("mpt", "ffn.", ("up_proj",), "down_proj"),
    _ff("bark", "mlp.", ("in_proj",), "out_proj"),
    _ff("kosmos-2, nllb-moe, seamless", "ffn.", ("fc1",), "fc2"),
    _ff("conformers, first half", "ffn1.", ("intermediate_dense",), "output_dense"),
    _ff("conformers, second half", "ffn2.", ("intermediate_dense",), "output_dense"),
    _ff("parakeet, first half", "feed_forward1.", ("linear1",), "linear2"),
    _ff("parakeet, second half", "feed_forward2.", ("linear1",), "linear2"),
    _ff("prophetnet", "feed_forward.", ("intermediate",), "output"),
    _ff("ctrl", "ffn.", ("0",), "2"),
    _ff("funnel", "ffn.", ("linear_1",), "linear_2"),
    _ff("sam", "mlp.", ("lin1",), "lin2"),
    _ff("qwen3-vl", "mlp.", ("linear_fc1",), "linear_fc2"),
    _ff("blip-2, of queries", "", ("intermediate_query.dense",), "output_query.dense"),
    _ff("xlm, flaubert", "", ("lin1",), "lin2"),
    Layout("modernbert", ff_out=("mlp.Wo",), fused=(Fused("mlp.Wi", HALVES),)),
    Layout("phi3", ff_out=("mlp.down_proj",), fused=(Fused("mlp.gate_up_proj", HALVES),)),
    Layout("dinov2 swiglu", ff_out=("mlp.weights_out",), fused=(Fused("mlp.weights_in", HALVES),)),
)


# Where the order of registration is not that of execution: (class that owns the norm, attribute) -> its role.
NORM_ROLES: dict[tuple[str, str], str] = {
    **{
        (family + side, "layernorm_embedding"): "embedding"
        for family in ("Bart", "MBart", "PLBart", "BlenderbotSmall", "Mvp", "LED")
        for side in ("Encoder", "Decoder")
    },
    **{
        (f"{family}EncoderStableLayerNorm", "layer_norm"): "final"
        for family in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat")
    },
    **{(f"T5Gemma{side}", "norm"): "final" for side in ("Encoder", "Decoder")},
    ("OPTDecoder", "final_layer_norm"): "final",
    ("DebertaV2Encoder", "LayerNorm"): "embedding",
    ("GPT2Block", "ln_2"): "output",
    ("GPT2Block", "ln_cross_attn"): "attention",
    ("Glm4DecoderLayer", "post_attention_layernorm"): "output",
    ("Glm4DecoderLayer", "post_self_attn_layernorm"): "attention",
}
