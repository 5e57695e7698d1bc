"""What the parts of a block are: its linear maps by one explicit table, its norms by order of registration.

A row of `LAYOUTS` describes one sublayer (attention or feed-forward) by exact module paths in a block; a
decoder block with cross-attention matches three. A row counts only if all its paths are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.calls import never_called
from smidgen.kinds import kind_of, widths


@dataclass(frozen=True)
class Fused:
    """One linear map holding several: `parts` are the roles of its consecutive runs of output rows."""

    path: str
    parts: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """The linear maps of one sublayer, as exact paths relative to the block.

    `mixed` maps hold query, key and value head by head, so no run of rows is the query: they get no slices.
    """

    name: str
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    attention_out: tuple[str, ...] = ()
    ff_in: tuple[str, ...] = ()
    ff_out: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    fused: tuple[Fused, ...] = ()

    def roles(self) -> dict[str, frozenset[str]]:
        """Path of each whole linear map -> its roles; a fused map has only the role that covers all of it."""
        found = {path: frozenset({role, COVERS[role]}) for role in COVERS for path in getattr(self, role)}
        found |= {path: frozenset({"attention"}) for path in self.mixed}
        return found | {fused.path: frozenset({COVERS[fused.parts[0]]}) for fused in self.fused}


QKV = ("query", "key", "value")
HALVES = ("ff_in", "ff_in")
COVERS = dict.fromkeys((*QKV, "attention_out"), "attention") | {"ff_in": "ff", "ff_out": "ff"}


def _attention(name: str, root: str, *parts: str) -> Layout:
    query, key, value, out = ((f"{root}.{part}",) for part in parts)
    return Layout(name, query, key, value, out)


def _ff(name: str, root: str, into: tuple[str, ...], out: str) -> Layout:
    return Layout(name, ff_in=tuple(f"{root}{part}" for part in into), ff_out=(f"{root}{out}",))


LAYOUTS: tuple[Layout, ...] = (
    # attention; BERT's row serves RoBERTa, ELECTRA, XLM-R and CamemBERT as well
    _attention("bert", "attention", "self.query", "self.key", "self.value", "output.dense"),
    _attention("bert cross", "crossattention", "self.query", "self.key", "self.value", "output.dense"),
    _attention("mpnet", "attention.attn", "q", "k", "v", "o"),
    _attention("distilbert", "attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    _attention("albert", "attention", "query", "key", "value", "dense"),
    _attention("deberta 2", "attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    # rows: head 0's query, key and value, then head 1's (Falcon: all queries of one key head, key, value)
    Layout("deberta v1", attention_out=("attention.output.dense",), mixed=("attention.self.in_proj",)),
    Layout("gpt_neox", attention_out=("attention.dense",), mixed=("attention.query_key_value",)),
    Layout("bloom", attention_out=("self_attention.dense",), mixed=("self_attention.query_key_value",)),
    Layout("modernbert", attention_out=("attn.Wo",), fused=(Fused("attn.Wqkv", QKV),)),
    # GPT-BigCode has GPT-2's names on nn.Linear, with rows mixed by head: only a Conv1D is cut here
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
    _attention("t5 cross", "layer.1.EncDecAttention", "q", "k", "v", "o"),
    _attention("wav2vec2, hubert", "attention", "q_proj", "k_proj", "v_proj", "out_proj"),
    _attention("vit, deit, beit, ast, dinov2, swin", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    # vision models before transformers 5.23
    _attention("older vit", "attention", "attention.query", "attention.key", "attention.value", "output.dense"),
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
Roles = dict[str, frozenset[str]]


def linear_parts(block: nn.Module) -> tuple[Roles, dict[str, list[tuple[str, int, int]]]]:
    """Path of each known linear map of a block -> its roles; of fused ones -> (role, first row, end)s."""
    roles: Roles = {}
    slices: dict[str, list[tuple[str, int, int]]] = {}
    for layout, linears in matching(block):
        roles = layout.roles() | roles
        slices |= {f.path: _slices(f, layout, linears) for f in layout.fused}
    return roles, slices


def matching(block: nn.Module) -> Iterator[tuple[Layout, dict[str, nn.Module]]]:
    """The rows of `LAYOUTS` that a block has, each with all linear maps of the block by path.

    A map that is read and never called counts for nothing: no edit of its input or output would act.
    """
    idle = never_called(block)
    found = ((path, module) for path, module in block.named_modules() if id(module) not in idle)
    linears = {path: module for path, module in found if kind_of(module) == "linear"}
    for layout in LAYOUTS:
        stored = all(isinstance(linears.get(f.path), Conv1D) is f.transposed for f in layout.fused)
        if stored and linears.keys() >= layout.roles().keys():
            yield layout, linears


def _slices(fused: Fused, layout: Layout, linears: dict[str, nn.Module]) -> list[tuple[str, int, int]]:
    """Parts of equal size, but a query has as many rows as the attention's output map has inputs."""
    total = widths(linears[fused.path])[1]
    first = widths(linears[layout.attention_out[0]])[0] if fused.parts == QKV else total // len(fused.parts)
    rest = (total - first) // (len(fused.parts) - 1)
    ends = [first + i * rest for i in range(len(fused.parts))]
    return list(zip(fused.parts, [0, *ends], ends, strict=False)) if ends[-1] == total else []


def norm_roles(block: nn.Module, linear_roles: Roles) -> Roles:
    """Path of each norm of a block -> "qk", "attention", "output", the last two (it feeds both) or none.

    A norm inside an attention sublayer is that sublayer's own, and the others are then the feed-forward's,
    unless the block itself owns some for every sublayer. Otherwise the norms, in order of registration, are
    dealt out evenly: first to the attention sublayers, last to the feed-forward.
    """
    roots = _attention_roots(block, linear_roles)
    norms = {path: _is_qk(block, path, roots) for path, m in block.named_modules() if kind_of(m) == "norm"}
    inside = [n for n, qk in norms.items() if not qk and any(within(n, root) for root in roots)]
    outside = [n for n, qk in norms.items() if not qk and n not in inside]
    dealt = [n for n in outside if "." not in n] if inside else outside
    found = {n: {"qk"} if qk else {"attention"} if n in inside else set[str]() for n, qk in norms.items()}
    each, left = divmod(len(dealt), len(roots) + 1)
    if inside:
        found |= {n: {"output"} for n in outside}
    if roots and not left:
        found |= {n: {"attention" if i < each * len(roots) else "output"} for i, n in enumerate(dealt)}
    elif len(outside) == 1 and not inside and (roots or linear_roles):
        found[outside[0]] = {"attention", "output"} if roots else {"output"}
    return {n: frozenset(roles) for n, roles in found.items()}


def _attention_roots(block: nn.Module, linear_roles: Roles) -> list[str]:
    """Paths of the sublayers that hold known projections or whose class says so; T5 keeps them in a list."""
    parts = dict(block.named_children())
    lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
    for name in lists:
        parts |= {f"{name}.{i}": part for i, part in parts.pop(name).named_children()}
    known = [path for path, roles in linear_roles.items() if "attention" in roles]
    by_class = {path for path, part in parts.items() if "attention" in type(part).__name__.lower()}
    return [path for path in parts if path in by_class or any(within(p, path) for p in known)]


def _is_qk(block: nn.Module, path: str, roots: list[str]) -> bool:
    """Whether a norm is one of a pair that an attention owns side by side with its projections."""
    owner = path.rpartition(".")[0]
    kinds = [kind_of(child) for child in block.get_submodule(owner).children()]
    in_attention = any(within(owner, root) for root in roots)
    return in_attention and kinds.count("norm") == 2 and kinds.count("linear") >= 2


def within(path: str, outer: str) -> bool:
    """Whether a module path is that of `outer` or of something in it; "" holds everything."""
    return not outer or path == outer or path.startswith(outer + ".")
