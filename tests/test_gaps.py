"""A plan names what its recipe's words would cover and it does not reach: where, and why; and nothing else."""

import json
import re

import pytest
import torch
import transformers as T
from rich.console import Console
from torch import nn
from transformers.models.vits.modeling_vits import VitsTextEncoder

from smidgen.cli.views.plans import plan_view as view
from smidgen.planning import gaps
from smidgen.planning.resolution import resolve
from smidgen.planning.rules.attention import INTERFACE
from tests import helpers as h
from tests import odd_layouts, odd_models
from tests.architectures import CASES

MOE = {"num_key_value_heads": 1, "num_experts_per_tok": 2, "head_dim": 8}
EXPERTS = {
    "mixtral": lambda: T.MixtralConfig(**h.BASE, **h.TOKENS, **MOE, num_local_experts=4),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**h.BASE, **h.TOKENS, **MOE, num_experts=4, moe_intermediate_size=8),
}


def found(model, recipe):
    """(places, count, reason) of each gap."""
    return [(gap.places, gap.count, gap.reason) for gap in resolve(model, recipe).left_out]


def experts(name):
    with torch.device("meta"):
        return T.AutoModelForCausalLM.from_config(EXPERTS[name]())


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_one_parameter(name):
    """IA3 reaches keys and values, and no second feed-forward map."""
    model, stacked = experts(name), (("model.layers.*.mlp.experts",), 2, gaps.STACKED)
    plan = resolve(model, "IA3()")
    assert {role for row in plan.entries for role in row.site.roles} == {"key", "value", "attention", "block"}
    for recipe in ("IA3()", "LoRA(target='linear')", "SSF()", "SSF(norms=False)"):
        assert found(model, recipe) == [stacked], recipe
    for recipe in ("LN()", "LoRA()", "LoFiT()", "Adapter()", "Adapter(site='attention')", "Prefix()", "Full()"):
        assert found(model, recipe) == [], recipe
    assert found(model, "IA3(layers=1)") == [(*stacked[:1], 1, gaps.STACKED)]


class OddAttention(nn.Module):
    """One whose maps have names of their own."""

    def __init__(self):
        super().__init__()
        self.everything, self.back = nn.Linear(16, 48), nn.Linear(16, 16)


class Attending(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attn, self.fc1, self.fc2 = nn.LayerNorm(16), attention, nn.Linear(16, 24), nn.Linear(24, 16)


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.pwconv1, self.pwconv2 = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)


def both(block):
    """A text model with a tower beside its blocks."""
    model = T.BertModel(T.BertConfig(**h.BASE), add_pooling_layer=False)
    model.tower = nn.ModuleList(block() for _ in range(3))
    return model


ODD = (("tower.*.attn",), 3, gaps.LAYOUT)
TORCHS = (("tower.*.attn",), 3, gaps.UNCALLED)
WHOLE = (("tower.*",), 1, gaps.ABSENT)
TOWERS = {
    "names of its own": (lambda: Attending(OddAttention()), ODD, "LoRA()", "Prefix()", "IA3()", "Adapter()", "LoFiT()"),
    "torch's attention": (lambda: Attending(nn.MultiheadAttention(16, 2)), TORCHS, "LoRA()", "Prefix()", "IA3()"),
    "no attention": (Convolving, WHOLE, "LoRA()", "Prefix()", "LoFiT()", "Adapter(site='attention')"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower(name):
    block, gap, *recipes = TOWERS[name]
    model = both(block)
    for recipe in recipes:
        assert found(model, recipe) == [gap], recipe
    for recipe in ("LN()", "BitFit()", "Full()", "Adapter(site='feed_forward')", "LoRA(target='ff_in')"):
        assert found(model, recipe) == [], recipe
    assert found(model, "LoRA(stack='encoder')") == []
    assert found(model, "LoRA(target='linear')") == ([gap] if gap is TORCHS else [])


def test_an_attention_outside_of_the_blocks():
    """SigLIP pools its places by one, here as a tower of another model."""
    model = both(Convolving)
    model.pooler = nn.ModuleDict({"attend": OddAttention(), "mlp": nn.Linear(16, 16)})
    outside = (("pooler.attend",), 1, gaps.OUTSIDE)
    assert found(model, "LoRA()") == [outside, WHOLE]
    assert found(model, "IA3()") == [outside]
    assert found(model, "LoRA(layers='top:1')") == [WHOLE]
    assert found(model, "LN()") == found(model, "LoRA(target='ff_out')") == []


def test_what_is_the_heads_is_not_left_out():
    """A whole stack in a head is trained with it."""
    model = T.BertForSequenceClassification(T.BertConfig(**h.BASE))
    model.classifier = nn.Sequential(nn.ModuleList(Attending(OddAttention()) for _ in range(2)), nn.Linear(16, 2))
    assert found(model, "LoRA()") == []


def test_attentions_without_the_interface_in_a_tower():
    """Donut's: keys reach the decoder of the text; `test_prefix` holds that a text's own are refused."""
    swin = T.DonutSwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    text = T.MBartConfig(
        vocab_size=20, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, is_decoder=True,
        add_cross_attention=True, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
    )  # fmt: skip
    with torch.device("meta"):
        model = T.VisionEncoderDecoderModel(T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(swin, text))
    plan = resolve(model, "Prefix(length=2)")
    inside = {row.site.stack for row in plan.entries}
    assert inside == {"decoder.model.decoder.layers"}
    ((places, count, reason),) = found(model, "Prefix(length=2)")
    assert (count, reason) == (2, INTERFACE)
    assert all(place.startswith("encoder.encoder.layers.*.blocks.*.attention") for place in places)
    assert found(model, "Prefix(length=2, stack='decoder')") == []


RUNNING = (("encoder.layers.*.conv.norm",), 2, gaps.RUNNING)
ROUTER = (("model.layers.*.feed_forward.router",), 2, gaps.OWN)
LLAMA4 = (("model.layers.*.feed_forward.experts",), 2, gaps.STACKED)
SHARED = (("model.layers.*.feed_forward.shared_expert",), 2, gaps.LAYOUT)
INDEXER = (("model.layers.*.self_attn.indexer.k_norm",), 2, gaps.NO_GRADIENT)
OTHERS = {
    ("parakeet", "LN()"): [RUNNING],
    ("parakeet", "BitFit()"): [],
    ("parakeet", "IA3()"): [],
    ("llama4", "LoRA(target='linear')"): [LLAMA4, ROUTER],
    ("llama4", "IA3()"): [LLAMA4, SHARED],
    ("deepseek_v32", "LN()"): [INDEXER],
    ("mamba", "LoRA(target='linear')"): [(("backbone.layers.*.mixer.dt_proj",), 2, gaps.UNCALLED)],
    ("wavlm", "IA3()"): [(("wavlm.encoder.layers.*.attention",), 2, gaps.UNCALLED)],
    ("xlnet", "LoRA(target='linear')"): [(("transformer.layer.*.rel_attn",), 2, gaps.BY_HEAD)],
    ("jamba", "LoRA()"): [(("model.layers.*.mamba",), 1, gaps.LAYOUT)],
    ("jamba", "LoRA(layers=1)"): [],
    ("recurrent_gemma", "LoRA()"): [(("model.layers.*.temporal_block",), 1, gaps.LAYOUT)],
    ("longt5", "IA3()"): [],
    ("bigbird_pegasus", "Adapter()"): [],
}


@pytest.mark.parametrize(("name", "recipe"), OTHERS, ids=str)
def test_in_models_of_transformers(name, recipe):
    model = odd_layouts.odd(name) if name in odd_layouts.ODD else odd_models.build(name)
    assert found(model, recipe) == OTHERS[name, recipe]


KNOWN = ("bert-base", "deberta-v3-base", "modernbert-base", "gpt2-cross", "pythia-70m", "phi-3-mini", "llama-7b",
         "qwen3-0.6b", "gemma3-1b", "t5-v1.1-base", "bart-base", "whisper-tiny", "clip-vit-b32", "swin-tiny",
         "wav2vec2-base")  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_is_named_where_all_is_known(name):
    model = CASES[name].build()
    for recipe in ("LN()", "LN(which='attention')", "LoRA()", "LoRA(target='linear')", "IA3()", "Adapter()", "SSF()"):
        assert found(model, recipe) == [], recipe


def test_it_is_shown_in_every_form(capsys):
    advice = "LoRA with target=('experts.gate_up_proj', 'experts.down_proj') acts there"
    model, line = experts("mixtral"), f"model.layers.*.mlp.experts: {gaps.STACKED}; {advice}"
    plan = resolve(model, "LN() + IA3()")
    assert str(plan).splitlines()[-1] == f"left out by IA3(): {line}"
    data = json.loads(json.dumps(plan.to_json()))
    gap = {"method": "IA3()", "reason": gaps.STACKED, "places": ["model.layers.*.mlp.experts"], "count": 2}
    assert data["left_out"] == [{**gap, "advice": advice}]
    console = Console(width=300)
    console.print(view(plan))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"left out IA3: {line}" in shown
    console.print(view(resolve(model, "LN()")))
    assert "left out" not in capsys.readouterr().out


SIGLIP = {**h.BASE, "image_size": 8, "patch_size": 4}


def siglip():
    with torch.device("meta"):
        return T.SiglipVisionModel(T.SiglipVisionConfig(**SIGLIP))


def test_what_lies_outside_of_the_blocks_is_named_for_every_linear_map():
    """SigLIP's head: an nn.MultiheadAttention and a feed-forward network behind the blocks."""
    model = siglip()
    for recipe in ("LoRA()", "LoRA(target='linear')", "SSF()", "IA3()", "Adapter()", "Prefix(length=2)"):
        assert found(model, recipe) == [(("head",), 1, gaps.OUTSIDE)], recipe
    assert found(model, "LN()") == []


def test_what_is_never_read_is_named_for_all_methods_whose_words_mean_it():
    """The classifier takes the mean of the tower's states, and nothing of its head."""
    with torch.device("meta"):
        model = T.SiglipForImageClassification(T.SiglipConfig(vision_config=SIGLIP, num_labels=3))
    for recipe in ("LoRA()", "LoRA(target='linear')", "SSF()", "IA3()", "Adapter()", "Prefix(length=2)", "LN()"):
        plan = resolve(model, recipe)
        assert (plan.unread, plan.left_out) == (("vision_model.head",), ()), recipe
    for recipe in ("LoRA(layers=0)", "LN(layers=0)", "LoRA(target='ff_out')"):
        assert resolve(model, recipe).unread == (), recipe


class OwnFormula(nn.Module):
    """Experts in one parameter of two axes, as DBRX has them."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(48, 16))


class OwnMLP(Convolving):
    def __init__(self):
        super().__init__()
        self.attn = OddAttention()
        self.pwconv1 = self.pwconv2 = None
        self.mixture_mlp = type("OddExperts", (OwnFormula,), {})()


def vits():
    """A text encoder whose feed-forward part is made of convolutions."""
    config = T.VitsConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24)
    with torch.device("meta"):
        return VitsTextEncoder(config)


def test_feed_forward_parts_that_are_no_linear_maps():
    own = (("tower.*.mixture_mlp",), 3, gaps.OWN)
    assert own in found(both(OwnMLP), "IA3()")
    assert own in found(both(OwnMLP), "SSF()")
    convolved = (("encoder.layers.*.feed_forward",), 2, gaps.CONVOLVED)
    assert found(vits(), "IA3()") == [convolved]
    assert found(vits(), "SSF()") == found(vits(), "LoRA()") == [], "SSF acts at convolutions"


ADVISED = {
    "experts": (lambda: experts("mixtral"), "LoRA(target='linear')", "LoRA"),
    "experts, by another method": (lambda: experts("qwen3_moe"), "IA3()", "LoRA"),
    "torch's attention": (lambda: both(lambda: Attending(nn.MultiheadAttention(16, 2))), "LoRA()", "LoRA"),
    "maps that are read": (lambda: odd_models.build("mamba"), "LoRA(target='linear')", "LoRA"),
    "a forward of its own": (lambda: odd_models.build("llama4"), "LoRA(target='linear')", "LoRA"),
    "names of its own": (lambda: both(lambda: Attending(OddAttention())), "IA3()", "IA3"),
    "outside": (lambda: siglip(), "SSF()", "SSF"),
    "outside, by LoRA": (lambda: siglip(), "Adapter()", "LoRA"),
}


@pytest.mark.parametrize("name", ADVISED)
def test_what_is_advised_acts_there_and_nowhere_else(name):
    make, recipe, by = ADVISED[name]
    model = make()
    for gap in resolve(model, recipe).left_out:
        assert gap.advice.startswith("target=" if recipe.startswith(by) else f"{by} with target=")
        target = re.search(r"target=(\(.*?\)|'.*?')", gap.advice)[1]
        fields = {"LoRA": "rank=1, ", "SSF": "norms=False, convs=False, "}.get(by, "")
        plan = resolve(model, f"{by}({fields}target={target})")
        rows = [re.sub(r"\.\d+(?=\.|$)", ".*", row.site.path) for row in plan.entries]
        assert all(any(f"{row}.".startswith(f"{place}.") for place in gap.places) for row in rows), (gap, rows)
        assert {place for place in gap.places for row in rows if f"{row}.".startswith(f"{place}.")} == set(gap.places)


def test_nothing_is_advised_where_nothing_acts():
    (xlnet,) = resolve(odd_models.build("xlnet"), "LoRA(target='linear')").left_out
    assert not xlnet.advice
    (own,) = (gap for gap in resolve(both(OwnMLP), "IA3()").left_out if gap.reason == gaps.OWN)
    assert not own.advice


def test_a_feed_forward_part_whose_maps_have_modules_of_their_own():
    with torch.device("meta"):
        model = T.ReformerModel(T.ReformerConfig(**odd_sizes(), attn_layers=["local", "local"], axial_pos_embds=False))
    (gap,) = resolve(model, "IA3()").left_out
    assert (gap.places, gap.count, gap.reason) == (("encoder.layers.*.feed_forward",), 2, gaps.LAYOUT)
    assert gap.advice == "target=('dense.dense', 'feed_forward.output.dense') acts there"


def odd_sizes():
    return {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 24}
