import importlib
import math

import pytest
import torch
import transformers as T
from torch import nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from smidgen.sites.architectures import LAYOUTS, NORM_ROLES
from smidgen.sites.discovery import find_sites, roles_found, shares_layers
from smidgen.sites.layer_spec import layer_indices
from smidgen.sites.site import ROLES
from tests.architectures import CASES
from tests.odd_layouts import ODD, odd

NORM_PARTS = ("attention", "output", "embedding", "final", "qk")
LINEAR_PARTS = ("query", "key", "value", "attention_out", "ff_in", "ff_out")


@pytest.fixture(scope="module")
def built():
    found = {}

    def of(name):
        if name not in found:
            model = CASES[name].build()
            found[name] = model, find_sites(model)
        return found[name]

    return of


def having(sites, role, kind="linear"):
    return [s for s in sites if s.kind == kind and role in s.roles]


def at(sites, path):
    (site,) = [s for s in sites if s.name == path]
    return site


@pytest.mark.parametrize("name", CASES)
def test_norm_values_counted_once(built, name):
    model, sites = built(name)
    norms = {p: q for s in sites if s.kind == "norm" for p, q in owned(model, s)}
    assert sum(p.numel() for p in norms.values()) == CASES[name].norms


def owned(model, site):
    module = model.get_submodule(site.path)
    assert dict(site.terms) == {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}
    return [(id(getattr(module, term)), getattr(module, term)) for term, _ in site.terms]


@pytest.mark.parametrize("name", CASES)
def test_norms_have_their_parts(built, name):
    _, sites = built(name)
    assert tuple(len(having(sites, role, "norm")) for role in NORM_PARTS) == CASES[name].roles
    for norm in having(sites, "norm", "norm"):
        assert norm.gain == "weight"
        assert norm.bias == ("bias" if len(norm.terms) == 2 else None)
        assert norm.width_in == norm.width_out == math.prod(norm.terms[0][1])


@pytest.mark.parametrize("name", CASES)
def test_linear_maps_have_their_parts(built, name):
    _, sites = built(name)
    assert tuple(len(having(sites, role)) for role in LINEAR_PARTS) == CASES[name].linears
    query, key, value, out, ff_in, ff_out = (
        {s.layer: s for s in having(sites, r) if s.stack == sites_stack(sites)} for r in LINEAR_PARTS
    )
    for layer, site in query.items():
        assert site.width_out == out[layer].width_in
        assert key[layer].width_out == value[layer].width_out
        assert site.width_in == value[layer].width_in == out[layer].width_out
    for layer, site in ff_out.items():
        assert ff_in[layer].width_out == site.width_in
        assert ff_in[layer].width_in == site.width_out


def sites_stack(sites):
    return next((s.stack for s in sites if s.stack), "")


@pytest.mark.parametrize("name", CASES)
def test_stacks_and_layers(built, name):
    _, sites = built(name)
    stacks = {s.stack: s.depth for s in sites if s.layer is not None}
    expected = CASES[name].stacks
    assert stacks == expected or not expected
    for stack, depth in stacks.items():
        inside = [s for s in sites if s.stack == stack]
        assert {s.layer for s in inside} == set(range(depth))
        assert [s.layer for s in inside] == sorted(s.layer for s in inside)
        assert all("block" in s.roles for s in inside if s.rows is None)
        assert all(s.path.startswith(stack + ".") for s in inside)


@pytest.mark.parametrize("name", CASES)
def test_every_owner_of_parameters_is_one_site(built, name):
    model, sites = built(name)
    whole = [s.path for s in sites if s.rows is None]
    assert whole == [p for p, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    assert len({s.name for s in sites}) == len(sites)
    assert {role for s in sites for role in s.roles} <= set(ROLES)
    assert all(s.roles == {"embedding"} or "block" in s.roles for s in sites if s.kind == "embedding")


@pytest.mark.parametrize("name", CASES)
def test_no_role_selects_a_weight_twice(built, name):
    _, sites = built(name)
    for role in roles_found(sites):
        rows = {}
        for s in having(sites, role):
            own = {*range(s.width_out)} if s.rows is None else {*s.rows.numbers(s.terms[0][1][-s.transposed]).tolist()}
            assert len(own) == s.width_out
            assert not own & rows.setdefault(s.path, set())
            rows[s.path] |= own


def test_every_row_of_the_table_is_met(built):
    needed = {(row.name, path) for row in LAYOUTS for path in row.roles()}
    met = {path for name in CASES for s in built(name)[1] if s.stack for path in endings(s.path)}
    met |= {path for name in ODD for s in find_sites(odd(name)) for path in endings(s.path)}
    elsewhere = {"bert cross", "older vit", "torch", "dinov2 swiglu"}
    assert not {(name, path) for name, path in needed if path not in met and name not in elsewhere}
    assert elsewhere <= {row.name for row in LAYOUTS}


def endings(path):
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


@pytest.mark.parametrize(
    ("name", "fused", "rows"),
    [
        ("gpt2", "h.3.attn.c_attn", {"query": (0, 768), "key": (768, 1536), "value": (1536, 2304)}),
        ("gpt2-cross", "h.3.crossattention.c_attn", {"key": (0, 768), "value": (768, 1536)}),
        ("phi-3-mini", "layers.9.mlp.gate_up_proj", {"ff_in0": (0, 8192), "ff_in1": (8192, 16384)}),
        ("modernbert-base", "model.layers.0.mlp.Wi", {"ff_in0": (0, 1152), "ff_in1": (1152, 2304)}),
        (
            "modernbert-base",
            "model.layers.0.attn.Wqkv",
            {"query": (0, 768), "key": (768, 1536), "value": (1536, 2304)},
        ),
    ],
)
def test_slices(built, name, fused, rows):
    _, sites = built(name)
    assert {s.name: s.rows for s in sites if s.path == fused and s.rows} == {
        f"{fused}[{part}]": (*run, 1) for part, run in rows.items()
    }
    whole = at(sites, fused)
    assert not whole.roles & {"query", "key", "value", "ff_in"}
    assert whole.transposed == name.startswith("gpt2")
    assert all(s.width_out == s.rows.stop - s.rows.start for s in sites if s.rows)


def test_shapes_where_query_and_key_differ(built):
    _, sites = built("qwen3-0.6b")
    assert (at(sites, "layers.5.self_attn.q_proj").width_in, having(sites, "query")[5].width_out) == (
        1024,
        2048,
    )
    assert {s.width_out for s in having(sites, "key")} == {1024}
    _, gpt2 = built("gpt2")
    fc = at(gpt2, "h.0.mlp.c_fc")
    assert (fc.width_in, fc.width_out, fc.transposed) == (768, 3072, True)
    assert fc.roles == {"ff_in", "ff", "block"}
    assert at(gpt2, "wpe").width_in == 1024


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CUT = {
    "gpt2": (T.GPT2Model, T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)),
    "phi3": (
        T.Phi3Model,
        T.Phi3Config(**SIZES, num_key_value_heads=2, vocab_size=40, pad_token_id=0),
    ),
    "modernbert": (T.ModernBertModel, T.ModernBertConfig(**SIZES, vocab_size=40, pad_token_id=0)),
    "gpt_neox": (T.GPTNeoXModel, T.GPTNeoXConfig(**SIZES, vocab_size=40)),
}


def spied(name):
    """The model, one fused map's input, and the query, key and value its attention then received."""
    seen = []

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    cls, config = CUT[name]
    config._attn_implementation = "spy"
    model = cls(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    fused = next(m for n, m in model.named_modules() if n.endswith(("c_attn", "qkv_proj", "Wqkv", "query_key_value")))
    inputs = []
    fused.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    # the first token stands at position 0, where rotary embeddings turn nothing
    return model, fused, inputs[0][:, 0], [t[:, :, 0].flatten(1) for t in seen[0]]


def sliced(module, site, x):
    rows = site.rows.numbers(module.weight.shape[-1 if site.transposed else 0])
    weight = module.weight[:, rows].T if site.transposed else module.weight[rows]
    return nn.functional.linear(x, weight, module.bias[rows] if module.bias is not None else None)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "modernbert", "gpt_neox"])
def test_a_slice_is_what_the_attention_receives(name):
    model, fused, x, received = spied(name)
    slices = [s for s in find_sites(model) if s.rows and model.get_submodule(s.path) is fused]
    assert [set(s.roles) for s in slices] == [{"query"}, {"key"}, {"value"}]
    for site, tensor in zip(slices, received, strict=True):
        torch.testing.assert_close(sliced(fused, site, x), tensor)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(sliced(fused, slices[0], x), received[1])


def test_rows_by_head_are_no_run_of_rows():
    _, fused, x, (query, _, _) = spied("gpt_neox")
    rows = fused(x).detach()
    assert not torch.allclose(rows[:, :32], query)
    torch.testing.assert_close(rows.view(1, 4, 3, 8)[:, :, 0].flatten(1), query)


TINY_BART = {
    "vocab_size": 40,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}
AUDIO = {
    **SIZES,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
}
STABLE = {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
WORDS, SOUND = {"input_ids": torch.tensor([[5, 6, 7]])}, {"input_values": torch.ones(1, 800)}
BOTH = WORDS | {"decoder_input_ids": torch.tensor([[5, 6]])}
CROSS = WORDS | {"encoder_hidden_states": torch.ones(1, 4, 32)}
PICTURE = {"pixel_values": torch.ones(1, 3, 32, 32)}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 40}
V3 = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_buckets": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
GLM = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "pad_token_id": 0}
RUNS = {
    "bert": (T.BertModel, T.BertConfig(**SIZES, vocab_size=40), WORDS),
    "deberta-v3": (T.DebertaV2Model, T.DebertaV2Config(**SIZES, **V3, vocab_size=40), WORDS),
    "modernbert": (T.ModernBertModel, T.ModernBertConfig(**SIZES, vocab_size=40, pad_token_id=0), WORDS),
    "gpt2": (T.GPT2Model, T.GPT2Config(**GPT2), WORDS),
    "gpt2-cross": (T.GPT2Model, T.GPT2Config(**GPT2, add_cross_attention=True), CROSS),
    "opt": (T.OPTModel, T.OPTConfig(**OPT, word_embed_proj_dim=32), WORDS),
    "opt-post": (T.OPTModel, T.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False), WORDS),
    "gemma2": (T.Gemma2Model, T.Gemma2Config(**GLM), WORDS),
    "glm4": (T.Glm4Model, T.Glm4Config(**GLM), WORDS),
    "olmo2": (T.Olmo2Model, T.Olmo2Config(**SIZES, vocab_size=40, pad_token_id=0), WORDS),
    "t5": (T.T5Model, T.T5Config(**T5), BOTH),
    "bart": (T.BartModel, T.BartConfig(**TINY_BART), BOTH),
    "mbart": (T.MBartModel, T.MBartConfig(**TINY_BART), BOTH),
    "wav2vec2": (T.Wav2Vec2Model, T.Wav2Vec2Config(**AUDIO), SOUND),
    "wav2vec2-stable": (T.Wav2Vec2Model, T.Wav2Vec2Config(**STABLE), SOUND),
    "hubert-stable": (T.HubertModel, T.HubertConfig(**STABLE), SOUND),
    "clip": (T.CLIPVisionModel, T.CLIPVisionConfig(**SIZES, image_size=32, patch_size=16), PICTURE),
    "dinov2": (
        T.Dinov2Model,
        T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32),
        PICTURE,
    ),
}


def misplaced(name):
    """Norms that run elsewhere than their role says: a second opinion, from the order of execution."""
    cls, config, inputs = RUNS[name]
    model = cls(config).eval()
    calls = []
    for site in find_sites(model):
        if site.rows is None and site.kind in ("norm", "linear"):
            module = model.get_submodule(site.path)
            module.register_forward_hook(lambda *_, site=site: calls.append(site))
    model(**inputs)
    assert len({s.path for s in calls}) > 10
    return [s.path for i, s in enumerate(calls) if s.kind == "norm" and not in_place(i, s, calls)]


def in_place(i, norm, calls):
    side = norm.path.split(".")[0] if any(s.stack.startswith("decoder") for s in calls) else ""
    blocks = [j for j, s in enumerate(calls) if s.stack and s.stack.startswith(side)]
    here = [(j, s) for j, s in enumerate(calls) if norm.stack and (s.stack, s.layer) == (norm.stack, norm.layer)]
    if "embedding" in norm.roles:
        return i < blocks[0]
    if "final" in norm.roles:
        return i > blocks[-1]
    if "attention" in norm.roles:
        return i < min(j for j, s in here if s.roles & {"ff", "output"})
    return "output" not in norm.roles or i > max(j for j, s in here if "attention_out" in s.roles)


@pytest.mark.parametrize("name", RUNS)
def test_norms_run_where_their_role_says(name):
    assert misplaced(name) == []


@pytest.mark.parametrize("name", ["opt", "deberta-v3", "gpt2-cross", "glm4", "bart", "mbart", "hubert-stable"])
def test_the_order_of_registration_misleads(name, monkeypatch):
    monkeypatch.setattr("smidgen.sites.discovery.NORM_ROLES", {})
    assert misplaced(name)


def test_exceptions_to_the_order_name_real_classes():
    sources = [importlib.import_module(f"transformers.models.{m}.modeling_{m}") for m in FAMILIES]
    assert all(any(hasattr(source, cls) for source in sources) for cls, _ in NORM_ROLES)


FAMILIES = (
    *(
        "bart",
        "mbart",
        "plbart",
        "blenderbot_small",
        "mvp",
        "led",
        "wav2vec2",
        "hubert",
        "wavlm",
        "unispeech",
    ),
    *("unispeech_sat", "t5gemma", "opt", "deberta_v2", "gpt2", "glm4"),
)


def test_names_alone_do_not_make_gpt2():
    """Their attentions have the same names, but GPT-BigCode's rows go head by head."""
    model = T.GPTBigCodeModel(T.GPTBigCodeConfig(**GPT2, multi_query=False))
    assert {s.rows.groups for s in find_sites(model) if s.rows} == {GPT2["n_head"]}


def test_norms_of_a_head_are_neither_final_nor_embedding(built):
    _, sites = built("modernbert-base")
    assert at(sites, "head.norm").roles == {"norm"}
    distil = T.DistilBertForMaskedLM(T.DistilBertConfig(dim=32, n_layers=1, n_heads=4, vocab_size=40))
    assert at(find_sites(distil), "vocab_layer_norm").roles == {"norm"}
    assert at(built("swin-tiny")[1], "encoder.layers.0.downsample.norm").layer is None


def test_parallel_blocks_have_one_norm_for_both(built):
    for name in ("gpt-j-6b", "phi-1.5", "falcon-7b"):
        (first,) = [s for s in built(name)[1] if s.kind == "norm" and s.layer == 0]
        assert first.roles == {"norm", "block", "attention", "output"}
    first, second = [s for s in built("modernbert-base")[1] if s.kind == "norm" and s.layer in (0, 1)][:2]
    assert first.roles == {"norm", "block", "output"}
    assert second.roles == {"norm", "block", "attention"}


class Expert(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.experts = nn.ModuleList(Expert() for _ in range(4))


def test_any_module_will_do():
    toy = nn.Sequential(Block(), Block())
    sites = find_sites(toy)
    assert {(s.layer, s.depth) for s in sites} == {(0, 2), (1, 2)}
    assert at(sites, "0.norm").roles == {"norm", "block"}
    torch_encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    sites = find_sites(nn.ModuleDict({"body": torch_encoder}))
    assert at(sites, "body.layers.2.self_attn.out_proj").kind == "other"
    assert at(sites, "body.layers.2.self_attn").bias == "in_proj_bias"
    assert at(sites, "body.layers.2.norm1").roles == {"norm", "block", "attention"}
    assert at(sites, "body.layers.2.norm2").roles == {"norm", "block", "output"}
    assert find_sites(nn.ReLU()) == []


def test_kinds():
    parts = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(4),
            "instance": nn.InstanceNorm1d(4, affine=True),
            "group": nn.GroupNorm(2, 4),
            "square": nn.LayerNorm((4, 4)),
            "bare": nn.LayerNorm(4, elementwise_affine=False),
            "conv1d": Conv1D(6, 4),
            "rows": nn.Embedding(7, 4),
        }
    )
    assert {s.path: s.kind for s in find_sites(parts)} == {
        **dict.fromkeys(("batch", "instance", "square"), "other"),
        **{"group": "norm", "conv1d": "linear", "rows": "embedding"},
    }
    assert roles_found(find_sites(parts)) == ["embedding", "norm"]


def test_shared_modules_and_tied_parameters():
    norm, rows = nn.LayerNorm(4), nn.Embedding(7, 4)
    model = nn.ModuleDict({"a": norm, "b": norm, "rows": rows, "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = rows.weight
    assert [s.path for s in find_sites(model)] == ["a", "rows", "head"]


def test_shared_layers(built):
    assert [name for name in CASES if shares_layers(built(name)[0])] == ["albert-base"]
    block = Block()
    assert shares_layers(nn.ModuleList([block, block]))
    assert not shares_layers(nn.ModuleList([Block(), Block()]))


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, None),
        (3, {3}),
        (-1, {5}),
        ("3", {3}),
        ((0, 5), {0, 5}),
        ([1, 1], {1}),
        ("top:2", {4, 5}),
        ("bottom:3", {0, 1, 2}),
        ("top:6", {0, 1, 2, 3, 4, 5}),
        ("2:5", {2, 3, 4}),
        ("4:", {4, 5}),
        (":2", {0, 1}),
        ("-2:", {4, 5}),
        (":-4", {0, 1}),
    ],
)
def test_layers_that_can_be_read(spec, layers):
    assert layer_indices(spec, 6) == layers


@pytest.mark.parametrize("spec", ["top:9", "bottom:7", "2:9", 6, -7, (0, 6), "6", "-9:"])
def test_layers_outside_the_stack(spec):
    with pytest.raises(ValueError, match="but the stack has 6 layers") as error:
        layer_indices(spec, 6)
    assert f"layers={spec!r}" in str(error.value)


@pytest.mark.parametrize("spec", ["top", "top:", "upper:2", "1:2:3", "a", "", True, (1, 2.0), 1.5, "top:x"])
def test_layers_that_cannot_be_read(spec):
    with pytest.raises(ValueError, match="cannot be read; use a number"):
        layer_indices(spec, 6)


@pytest.mark.parametrize("spec", ["top:0", "3:3", "5:2", (), "top:-1"])
def test_no_layer_at_all(spec):
    with pytest.raises(ValueError, match="means no layer at all"):
        layer_indices(spec, 6)
