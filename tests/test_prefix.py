"""Keys and values beside the text's own: exact, masked, cached, compiled, and refused where it cannot be."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import nn
from transformers import AttentionInterface, DynamicCache

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, RecipeError
from smidgen.delta.delta import Delta
from smidgen.ports import attention_port as attention
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.testing.suite import shake
from tests import helpers as h

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SPEECH = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1,
}  # fmt: skip
START = {"decoder_start_token_id": 0}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
IDS = {"input_ids": torch.arange(14).view(2, 7) + 3}
BOTH = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :5]}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
SOUND = {
    "input_features": torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(0)),
    "decoder_input_ids": IDS["input_ids"][:, :5],
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 61,
    "decoder_start_token_id": 0,
}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
QWEN = {"num_key_value_heads": 1, "head_dim": 8}
WHISPER = {**SPEECH, "max_source_positions": 8, "num_mel_bins": 80, **TOKENS}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 61}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61, **TOKENS}
FAMILIES = {
    "bert": (T.BertForMaskedLM, lambda: T.BertConfig(**SMALL), IDS, 2),
    "roberta": (T.RobertaForMaskedLM, lambda: T.RobertaConfig(**SMALL, **TOKENS), IDS, 2),
    "distilbert": (T.DistilBertForMaskedLM, lambda: T.DistilBertConfig(**DISTIL), IDS, 2),
    "electra": (T.ElectraForMaskedLM, lambda: T.ElectraConfig(**SMALL, embedding_size=16), IDS, 2),
    "t5": (T.T5ForConditionalGeneration, lambda: T.T5Config(**T5), BOTH, 6),
    "bart": (T.BartForConditionalGeneration, lambda: T.BartConfig(**SPEECH, **TOKENS), BOTH, 6),
    "whisper": (T.WhisperForConditionalGeneration, lambda: T.WhisperConfig(**WHISPER), SOUND, 6),
    "vit": (T.ViTForImageClassification, lambda: T.ViTConfig(**{**SMALL, **IMAGE}), PIXELS, 2),
    "gpt2": (T.GPT2LMHeadModel, lambda: T.GPT2Config(**GPT), IDS, 2),
    "opt": (T.OPTForCausalLM, lambda: T.OPTConfig(**OPT, vocab_size=61, **TOKENS), IDS, 2),
    "llama": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**SMALL, num_key_value_heads=1, **TOKENS), IDS, 2),
    "qwen3": (T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**SMALL, **QWEN, **TOKENS), IDS, 2),
    "gpt_neox": (T.GPTNeoXForCausalLM, lambda: T.GPTNeoXConfig(**SMALL, **TOKENS), IDS, 2),
    "modernbert": (T.ModernBertForMaskedLM, lambda: T.ModernBertConfig(**SMALL, **TOKENS), IDS, 2),
}


def family(name, implementation="sdpa"):
    cls, config, inputs, attentions = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config(), attn_implementation=implementation).double().eval()
    shake(model.parameters(), 0.2)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model, inputs, attentions


def prefixed(model, recipe="Prefix(3)"):
    sm.attach(model, recipe)
    shake((p for n, p in trained_parameters(model).items() if "edits" in n), 1.0)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_acts_and_comes_back(name):
    model, inputs, attentions = family(name)
    base = h.logits(model, **inputs)
    prefixed(model)
    assert len(attachment(model).edits) == attentions
    assert not torch.allclose(h.logits(model, **inputs), base)
    with sm.disabled(model):
        assert torch.equal(h.logits(model, **inputs), base)
    sm.detach(model)
    assert torch.equal(h.logits(model, **inputs), base)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_is_sdpa(name):
    outputs = []
    for implementation in ("sdpa", "eager"):
        model, inputs, _ = family(name, implementation)
        outputs.append(h.logits(prefixed(model), **inputs))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-5)  # eager softmax is in float32


# The function itself, against loops


def by_hand(query, key, value, allowed, bias, scaling):
    """softmax(q k^T * scaling + bias) v, one query at a time; key and value heads are shared by groups of queries."""
    group, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
    for b, head, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        scores = {}
        for s in range(key.shape[2]):
            if allowed(b, t, s):
                scores[s] = float(query[b, head, t] @ key[b, head // group, s]) * scaling + bias(head, t, s)
        total = sum(math.exp(x) for x in scores.values())
        for s, x in scores.items():
            out[b, head, t] += math.exp(x) / total * value[b, head // group, s]
    return out.transpose(1, 2)


class Stub(nn.Module):
    """As much of an attention module as an attention function looks at."""

    is_causal = True

    def __init__(self, groups, edits, implementation):
        super().__init__()
        self.num_key_value_groups = groups
        config = SimpleNamespace(_attn_implementation=implementation)
        eager = T.models.llama.modeling_llama.eager_attention_forward
        self.edits = attention.KeyValueEdits(config, AttentionInterface(), eager)
        for i, pair in enumerate(edits):
            self.edits[str(i)] = Given(pair)


class Given(nn.Module):
    enabled = True

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def keys_values(self, key):
        return tuple(x[None] for x in self.pair)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MASKS = ["causal", "none", "bool", "float"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("edits", [1, 2])
def test_attend_is_attention_over_all_keys(edits, mask, implementation):
    if implementation == "eager" and mask in ("causal", "bool"):
        pytest.skip("eager attention gets every mask in numbers")
    q, k, v = draw(2, 4, 5, 3), draw(2, 2, 5, 3, seed=1), draw(2, 2, 5, 3, seed=2)
    pairs = [(draw(2, n + 1, 3, seed=3 + n), draw(2, n + 1, 3, seed=6 + n)) for n in range(edits)]
    count = sum(pair[0].shape[1] for pair in pairs)
    kept = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(9)) < 0.7
    kept |= torch.eye(5, dtype=torch.bool)
    given = {"bool": kept, "float": torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~kept, -1e30)}.get(mask)
    stub = Stub(2, pairs, implementation)
    output, _ = attention.attend_with_added_keys(
        stub, q, k, v, given, scaling=0.4, dropout=0.0, is_causal=mask == "causal"
    )

    def allowed(b, t, s):
        s -= count
        return s < 0 or {"causal": s <= t, "none": True}.get(mask, bool(kept[b, 0, t, s]))

    key = torch.cat([*(pair[0].expand(2, -1, -1, -1) for pair in pairs), k], 2)
    value = torch.cat([*(pair[1].expand(2, -1, -1, -1) for pair in pairs), v], 2)
    expected = by_hand(q, key, value, allowed, lambda *place: 0.0, 0.4)
    rounding = 1e-9 if implementation == "sdpa" else 1e-5  # eager softmax is in float32
    torch.testing.assert_close(output, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("causal", [True, False])
def test_a_position_bias_belongs_to_the_text(causal):
    """As T5 has it: nothing is added to the score of a prefix key."""
    q, k, v, bias = draw(1, 2, 4, 3), draw(1, 2, 4, 3, seed=1), draw(1, 2, 4, 3, seed=2), draw(1, 2, 4, 4, seed=3)
    pair = draw(2, 2, 3, seed=4), draw(2, 2, 3, seed=5)
    stub = Stub(1, [pair], "sdpa")
    output, _ = attention.attend_with_added_keys(stub, q, k, v, None, scaling=1.0, position_bias=bias, is_causal=causal)
    key, value = (torch.cat((x[None], y), 2) for x, y in zip(pair, (k, v), strict=True))

    def added(head, t, s):
        return float(bias[0, head, t, s - 2]) if s >= 2 else 0.0

    expected = by_hand(q, key, value, lambda b, t, s: not causal or s - 2 <= t, added, 1.0)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_a_prefix_is_the_gated_form_of_he_et_al():
    """(1 - g) * attention(text) + g * attention(prefix), g the prefix's share (arXiv:2110.04366, section 3.1)."""
    q, k, v = draw(1, 1, 4, 3), draw(1, 1, 6, 3, seed=1), draw(1, 1, 6, 3, seed=2)
    P, U = draw(1, 2, 3, seed=3), draw(1, 2, 3, seed=4)
    output, _ = attention.attend_with_added_keys(Stub(1, [(P, U)], "sdpa"), q, k, v, None, scaling=1.0, is_causal=False)
    text, prefix = q @ k.transpose(2, 3), q @ P.transpose(1, 2)
    share = prefix.exp().sum(-1, keepdim=True) / (prefix.exp().sum(-1, keepdim=True) + text.exp().sum(-1, keepdim=True))
    expected = (1 - share) * (text.softmax(-1) @ v) + share * (prefix.softmax(-1) @ U)
    torch.testing.assert_close(output, expected.transpose(1, 2))


# Whole models


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "gpt_neox"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_model_does_what_it_does_with_these_keys_in_its_cache(name, padded):
    model, inputs, _ = family(name)
    ids, mask = inputs["input_ids"], torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0 if padded else 1
    plain = copy.deepcopy(model)
    prefixed(model)
    found = h.logits(model, input_ids=ids, attention_mask=mask)
    edits = [model.get_submodule(path).edits[key] for path, key in attachment(model).edits]
    cache = DynamicCache()
    for i, edit in enumerate(edits):
        cache.update(edit.K.detach().expand(2, -1, -1, -1), edit.V.detach().expand(2, -1, -1, -1), i)
    wide = torch.cat((torch.ones(2, 3, dtype=torch.long), mask), 1)
    places = torch.arange(7).expand(2, -1)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=wide, past_key_values=cache, position_ids=places).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generating_with_a_cache_is_the_full_pass(name):
    model, inputs, _ = family(name)
    prefixed(model)
    mask = torch.ones_like(inputs["input_ids"])
    if name in ("llama", "gpt2"):
        mask[1, :2] = 0  # padding on the left
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    cached, full = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, full)
    with sm.disabled(model):
        assert not torch.equal(model.generate(**inputs, **options), cached)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_one_compiled_graph(name):
    model, inputs, _ = family(name)
    prefixed(model).requires_grad_(False)
    expected = h.logits(model, **inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(h.logits(compiled, **inputs), expected, rtol=1e-9, atol=1e-9)


def test_padding_is_not_seen():
    model, inputs, _ = family("bert")
    prefixed(model)
    ids = inputs["input_ids"]
    longer = torch.cat((ids, torch.full((2, 3), 50)), 1)
    mask = torch.cat((torch.ones(2, 7), torch.zeros(2, 3)), 1).long()
    found = h.logits(model, input_ids=longer, attention_mask=mask)[:, :7]
    torch.testing.assert_close(found, h.logits(model, input_ids=ids), rtol=1e-9, atol=1e-9)


def test_the_configuration_of_the_model_is_left_alone():
    model, _, _ = family("llama")
    own = model.model.layers[0].self_attn.config
    prefixed(model, "Prefix(length=3, layers=0)")
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[1].self_attn.config is own
    assert model.model.layers[0].self_attn.config is not own
    sm.detach(model)
    assert model.model.layers[0].self_attn.config is own


def test_an_unpickled_model_needs_no_import(tmp_path):
    model, inputs, _ = family("llama")
    torch.save(prefixed(model), tmp_path / "model.pt")
    expected = tmp_path / "out.pt"
    torch.save((inputs, h.logits(model, **inputs)), expected)
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"inputs, wanted = torch.load({str(expected)!r}, weights_only=False)\n"
        "assert torch.equal(model.eval()(**inputs).logits, wanted)\nprint('the same')\n"
    )
    process = h.script(tmp_path / "script.py", code)
    assert "the same" in process.communicate(timeout=120)[0]


# The implementation is switched while a prefix is attached


SWITCHES = {
    "set_attn_implementation": lambda model, name: model.set_attn_implementation(name),
    "the configuration": lambda model, name: setattr(model.config, "_attn_implementation", name),
}


def switched(name, first, second, how):
    model, inputs, _ = family(name, first)
    prefixed(model)
    SWITCHES[how](model, second)
    return model, inputs


@pytest.mark.parametrize(("first", "second"), [("eager", "sdpa"), ("sdpa", "eager")])
@pytest.mark.parametrize("how", SWITCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_switch_of_the_implementation_is_followed(name, how, first, second):
    """The model's masks are made for what its configuration names, so the edited modules run that as well."""
    if (name, how) in (("t5", "the configuration"),):
        pytest.skip("T5's stacks have copies of the configuration, which this way of switching does not reach")
    model, inputs = switched(name, first, second, how)
    plain, _, _ = family(name, second)
    expected = h.logits(prefixed(plain), **inputs)
    torch.testing.assert_close(h.logits(model, **inputs), expected, rtol=1e-9, atol=1e-9)
    with sm.disabled(model), sm.disabled(plain):
        assert torch.equal(h.logits(model, **inputs), h.logits(plain, **inputs))
    sm.detach(model), sm.detach(plain)
    assert torch.equal(h.logits(model, **inputs), h.logits(plain, **inputs))


@pytest.mark.parametrize(("first", "second"), [("eager", "sdpa"), ("sdpa", "eager")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_future_is_hidden_after_a_switch(name, first, second):
    model, inputs = switched(name, first, second, "set_attn_implementation")
    before, key = h.logits(model, **inputs), "decoder_input_ids" if name == "t5" else "input_ids"
    changed = {**inputs, key: inputs[key].clone()}
    changed[key][:, -1] = 60
    after = h.logits(model, **changed)
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after[:, -1], before[:, -1])


def llava(**options):
    vision = T.CLIPVisionConfig(**{**SMALL, "vocab_size": 8, **IMAGE}, projection_dim=16)
    text = T.LlamaConfig(**SMALL, num_key_value_heads=1, **TOKENS)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.LlavaForConditionalGeneration._from_config(config, **options).double().eval()
    shake(model.parameters(), 0.2)
    return model


@pytest.mark.parametrize("parts", [{"text_config": "sdpa"}, {"vision_config": "sdpa"}, {"": "sdpa"}])
@pytest.mark.parametrize("when", ["before", "after"])
def test_each_part_of_a_composed_model_runs_what_its_own_configuration_names(parts, when):
    ids = IDS["input_ids"].clone()
    ids[:, :4] = 60  # four patches
    inputs = {"input_ids": ids, "pixel_values": PIXELS["pixel_values"].double()}
    expected = h.logits(prefixed(llava(attn_implementation="sdpa")), **inputs)
    model = llava(attn_implementation="eager")
    for step in (prefixed, lambda m: m.set_attn_implementation(parts))[:: 1 if when == "after" else -1]:
        step(model)
    found = h.logits(model, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # eager softmax is in float32
    changed = {**inputs, "input_ids": torch.cat((ids[:, :-1], ids[:, -1:] + 1), 1)}
    torch.testing.assert_close(h.logits(model, **changed)[:, :-1], found[:, :-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_switch_to_what_takes_no_keys_is_refused_at_the_forward(name):
    model, inputs, _ = family(name)
    prefixed(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AttachError, match=r"runs 'flash_attention_2', to which no keys can be added; .*implementation"):
        h.logits(model, **inputs)
    model.set_attn_implementation("sdpa")
    h.logits(model, **inputs)


def test_eager_is_what_the_module_itself_runs_as_eager():
    """Llama 4's vision attention asks for a function of its own, beside the text's in the same file."""
    code = T.models.llama4.modeling_llama4
    assert attention._looked_up(code.Llama4VisionAttention.__new__(code.Llama4VisionAttention))[1] is (
        code.vision_eager_attention_forward
    )


# The reparametrisation


def test_the_network_is_dropped_on_saving(tmp_path):
    model = h.bert()
    sm.attach(model, "LN() + Prefix(length=3, mlp=5)")
    shake(trained_parameters(model).values())
    before, delta = h.logits(model), sm.detach(model)
    assert str(delta.recipe) == "LN() + Prefix(length=3)"
    assert delta.info["trained_as"] == "LN() + Prefix(length=3, mlp=5)"
    assert {name.rpartition(".")[2] for name in delta.tensors if "edits" in name} == {"K", "V"}
    loaded = Delta.load(delta.save(tmp_path))
    sm.attach(model, loaded)
    assert torch.equal(h.logits(model), before)


@pytest.mark.parametrize("mlp", [None, 4, 100, 800])
def test_keys_and_values_start_equally_wide_with_and_without_a_network(mlp):
    torch.manual_seed(0)
    method, site = sm.Prefix(30, mlp=mlp), SimpleNamespace(heads=8, head_dim=32, value_dim=32)
    start = method.settle(method.init(site), site)
    for symbol in "KV":
        assert float(start[symbol].square().mean().sqrt()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("mlp", [4, 64, 256, 800, 2000])
def test_keys_move_as_far_in_a_step_at_any_width_of_the_network(mlp):
    def moved(method):
        torch.manual_seed(0)
        site = SimpleNamespace(heads=12, head_dim=32, value_dim=32)
        p = {name: nn.Parameter(t) for name, t in method.init(site).items()}
        groups = [{"params": [t], "lr": method.lr * method.rate(name)} for name, t in p.items()]
        adam, start = torch.optim.AdamW(groups, weight_decay=0.0), method.settle(p, site)["K"].detach().clone()
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            adam.zero_grad()
            (method.settle(p, site)["K"] * gradient).sum().backward()
            adam.step()
        return float((method.settle(p, site)["K"] - start).detach().abs().mean())

    assert 0.5 < moved(sm.Prefix(mlp=mlp)) / moved(sm.Prefix()) < 2  # at one rate for all widths 190 at 2000


def test_the_network_says_what_the_formula_says():
    method, site = sm.Prefix(3, mlp=4), SimpleNamespace(heads=2, head_dim=5, value_dim=3)
    p = {k: v.double() for k, v in method.init(site).items()}
    K, V = method.keys_values(method.settle(p, site), site)
    for i in range(3):
        row = p["W2"] @ torch.tanh(p["W1"] @ p["E"][i] + p["b1"]) + p["b2"]
        torch.testing.assert_close(torch.cat((K[:, i].flatten(), V[:, i].flatten())), row)
    assert (K.shape, V.shape) == ((2, 3, 5), (2, 3, 3))


def test_a_network_cannot_be_narrowed():
    with pytest.raises(PlanError, match=r"Prefix\(mlp=4\) saves Prefix\(\), so no part of it can be kept"):
        sm.plan(h.bert(), "Prefix(mlp=4) | Select('random', keep=0.5)")


# Counts, refusals


def counted(recipe):
    """On the shape of MiniLM: six layers of width 384."""
    config = T.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with torch.device("meta"):
        return sm.plan(T.BertForSequenceClassification(config), recipe)


def test_counts_are_the_closed_form():
    """2 L p d saved; in training (p + m + 1) m + (m + 1) 2 d for each layer with a network of width m."""
    assert counted("Prefix(length=20)").trained == 92_160
    plan = counted("Prefix(length=20, mlp=16)")
    assert plan.trained == 6 * ((20 + 16 + 1) * 16 + 17 * 2 * 384)
    assert plan.file_bytes == counted("Prefix(length=20)").file_bytes


def test_grouped_heads_have_fewer_keys():
    model, _, _ = family("qwen3")
    assert sm.plan(model, "Prefix(length=5)").trained == 2 * 2 * 5 * 8


def test_attention_of_its_own_is_refused_by_name():
    with pytest.raises(
        PlanError, match="DisentangledSelfAttention does not go through transformers' AttentionInterface"
    ):
        sm.plan(h.build("deberta-v2"), sm.Prefix())


def test_other_implementations_are_refused():
    model, _, _ = family("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(AttachError, match="LlamaAttention at .* runs 'flex_attention'.*attn_implementation='sdpa'"):
        sm.attach(model, "Prefix()")


def test_cross_attention_can_be_left_out():
    model, _, _ = family("t5")
    assert len(sm.plan(model, "Prefix(cross=False)").entries) == 4


@pytest.mark.parametrize(
    ("fields", "message"), [({"length": 0}, "length=0"), ({"mlp": 0}, "mlp=0"), ({"layers": "x"}, "x")]
)
def test_wrong_fields_are_one_line(fields, message):
    with pytest.raises(RecipeError, match=message):
        sm.Prefix(**fields)
