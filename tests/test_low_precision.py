"""A low-precision base whose tensors are read in other ways than by a call of their module, or not all of one dtype."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.in_place import master_weights as casts
from smidgen.ports.in_place.stored_view import StoredView, rounded
from smidgen.testing.cases import shake
from tests import helpers as h

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20, **h.TOKENS}
STATE = {"state_size": 8, "n_groups": 1, "chunk_size": 4, "num_heads": 4, "head_dim": 8, "expand": 2}
HYBRID = {
    "layers_block_type": ["mamba", "attention"], "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4,
}  # fmt: skip
ALTERNATING = {  # its block calls a method of a part, not the part
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "altup_num_inputs": 2,
    "laurel_rank": 4, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 20, "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0], "altup_coef_clip": 1.0,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
WAVE = {
    **h.SIZES, "num_labels": 2, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_buckets": 8,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip
SEQ = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
IDS = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(3))


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


MODELS = {
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**SMALL, state_size=8)),
    "falcon_mamba": lambda: T.FalconMambaForCausalLM(T.FalconMambaConfig(**SMALL, state_size=8)),
    "mamba2": lambda: T.Mamba2ForCausalLM(T.Mamba2Config(**SMALL, **STATE)),
    "nemotron_h": lambda: T.NemotronHForCausalLM(T.NemotronHConfig(**SMALL, **HYBRID)),
    "gemma3n": lambda: T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**SMALL, **ALTERNATING)),
    "ibert": lambda: T.IBertForMaskedLM(T.IBertConfig(**h.SIZES, vocab_size=20, **h.TOKENS)),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**h.SIZES, image_size=8, patch_size=4)),
    "wavlm": lambda: T.WavLMForSequenceClassification(T.WavLMConfig(**WAVE)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**SEQ, decoder_start_token_id=0)),
    "mt5": lambda: T.MT5ForConditionalGeneration(T.MT5Config(**SEQ, decoder_start_token_id=0)),
    "umt5": lambda: T.UMT5ForConditionalGeneration(T.UMT5Config(**SEQ, decoder_start_token_id=0)),
}
INPUTS = {"siglip": {"pixel_values": drawn(2, 3, 8, 8)}, "wavlm": {"input_values": drawn(2, 60)}}
READ = [  # what is read by others than its own module: the dtype of a norm, biases and weights of maps
    *((kind, recipe) for kind in ("mamba", "falcon_mamba", "mamba2", "nemotron_h") for recipe in ("LN()", "BitFit()")),
    ("mamba", "Full()"), ("falcon_mamba", "Full()"), ("siglip", "BitFit()"), ("siglip", "Full()"),
    ("wavlm", "BitFit()"), ("ibert", "LN()"), ("ibert", "BitFit()"),
]  # fmt: skip
MIXED = [(kind, recipe) for kind in ("t5", "mt5", "umt5") for recipe in ("LN()", "Adapter(width=4)")]


def base(kind, dtype):
    """The shaken base, with the tensors in float32 that transformers keeps so, and its inputs."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    shake(model.parameters(), 0.1)
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    inputs = INPUTS.get(kind, {"input_ids": IDS})
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval(), inputs | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def output(model, inputs):
    found = model(**inputs)
    return found.logits if "logits" in found else found.pooler_output


def gradients(model, inputs, recipe):
    """Output and flattened gradients of an attached model, whose values are shaken."""
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.02)
    found = output(model, inputs)
    (found.float() * drawn(*found.shape)).sum().backward()
    grads = {n: p.grad for n, p in trained_parameters(model).items()}
    assert not [n for n, g in grads.items() if g is None]
    return found.detach(), torch.cat([g.double().flatten() for g in grads.values()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "recipe"), [*READ, *MIXED])
def test_output_and_gradients_are_those_of_the_base_in_float32(kind, recipe, dtype):
    model, inputs = base(kind, dtype)
    wide, wide_inputs = (
        copy.deepcopy(model).float(),
        {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()},
    )
    with torch.no_grad():
        before = output(model, inputs)
    with h.untouched(model):
        with torch.no_grad():
            sm.attach(model, recipe)
            start = output(model, inputs)
            sm.detach(model)
        assert start.dtype == before.dtype
        torch.testing.assert_close(start.float(), before.float(), rtol=0.03, atol=0.03 * float(before.abs().max()))
        found, gradient = gradients(model, inputs, recipe)
        delta = sm.detach(model)
        model.zero_grad()
    assert {t.dtype for t in delta.tensors.values()} == {torch.float32}
    wanted, wide_gradient = gradients(wide, wide_inputs, recipe)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    assert float(torch.cosine_similarity(gradient, wide_gradient, dim=0)) > 0.99


class Inner(nn.Module):
    """A part that is called, and one of whose weights is used outside of it as well."""

    def __init__(self):
        super().__init__()
        self.table, self.map = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return torch.tanh(self.map(self.table(ids)))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, ids):
        return self.inner(ids)


class Afar(nn.Module):
    """Uses a table, and asks for dtypes, from further away than the module above."""

    def __init__(self):
        super().__init__()
        self.outer, self.told = Outer(), []

    def forward(self, ids):
        weight = self.outer.inner.table.weight
        self.told = [weight.dtype, weight.device, weight.shape, len(weight), next(self.parameters()).dtype]
        if self.training:
            self.outer.inner.map.weight.data.clamp_(-0.1, 0.1)
        return self.outer(ids) @ weight.T


def afar(dtype, recipe="Full()"):
    torch.manual_seed(0)
    model = Afar().to(dtype).eval()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.02)
    return model


@pytest.mark.parametrize("recipe", ["Full()", "Full(target='outer.inner.table')"])
def test_a_weight_used_from_afar_counts_with_its_gradient(recipe):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = afar(dtype, recipe)
        (model(IDS).float() * drawn(2, 6, 20)).sum().backward()
        assert model.told == [dtype, torch.device("cpu"), (20, 8), 20, dtype]
        found.append(torch.cat([p.grad.flatten() for p in trained_parameters(model).values()]))
        assert next(model.parameters()).dtype == torch.float32 or recipe != "Full()", (
            "and outside of a call the masters"
        )
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.999


def test_data_seen_from_afar_is_the_master_s():
    """Gemma3n limits a weight in training, in place."""
    model = afar(torch.bfloat16)
    before = trained_parameters(model)["outer.inner.map.weight"].detach().clone()
    model.train()(IDS)
    assert before.abs().max() > 0.1
    assert torch.equal(trained_parameters(model)["outer.inner.map.weight"], before.clamp(-0.1, 0.1))


def test_nothing_of_it_stays():
    model = afar(torch.bfloat16)
    model(IDS)
    assert not any({"weight", "parameters"} & set(module.__dict__) for module in model.modules())
    sm.detach(model)
    assert not any({"_reads", "_shown", "_casting"} & set(module.__dict__) for module in model.modules())


def test_a_view_gives_no_values_to_what_hides_them():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    model = afar(torch.bfloat16)
    view = StoredView.of(model.outer.inner.table, "weight")
    assert torch.equal(view + 0, rounded(model.outer.inner.table, "weight"))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="load the base in float32"):
        torch.mul(view, 2)
    assert torch.equal(Double.apply(view), 2 * rounded(model.outer.inner.table, "weight"))
    with pytest.raises(TypeError, match="load the base in float32"):
        Double.apply(view).sum().backward()


class Wide(nn.Module):
    """A float32 stream beside low-precision tensors, and a norm of two outputs (Zaya; experts of Kimi-Linear)."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(drawn(8))

        def forward(self, x, share):
            return (x + self.bias) * share

    class TwoNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(1 + 0.1 * drawn(8))

        def forward(self, q, k):
            q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6) for x in (q, k))
            return q, k * self.weight

    def __init__(self):
        super().__init__()
        self.map, self.scale, self.norm = nn.Linear(8, 8), self.Scale(), self.TwoNorm()

    def forward(self, x):
        x = self.map(x)
        scaled = self.scale(x.float(), torch.full((), 1 / 3))
        q, k = self.norm(x, x)
        return scaled, q, k


@pytest.mark.parametrize("recipe", ["Full()", "BitFit()"])
def test_inputs_and_outputs_keep_the_dtypes_of_the_base(recipe):
    model = Wide().bfloat16()
    before = model(drawn(2, 8).bfloat16())
    sm.attach(model, recipe)
    after = model(drawn(2, 8).bfloat16())
    assert [t.dtype for t in after] == [t.dtype for t in before] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert torch.equal(after[0], before[0]), "float32 that enters is not rounded"


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [*((kind, "LN() + BitFit(norms=False)") for kind in ("mamba", "nemotron_h")), ("gemma3n", "Full()")],
)
def test_what_is_read_by_others_survives_checkpointing(kind, recipe):
    found = []
    for checkpointed in (False, True):
        model, inputs = base(kind, torch.bfloat16)
        if checkpointed:
            model.activation_checkpointing_enable()
        found.append(gradients(model.train(), inputs | {"use_cache": False}, recipe)[1])
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "recipe"), [("mamba", "LN()"), ("mamba", "BitFit()"), ("siglip", "BitFit()")])
def test_masters_that_others_read_would_be_seen(kind, recipe, monkeypatch):
    monkeypatch.setattr(casts, "_readers", lambda model, low: {})
    model, inputs = base(kind, torch.bfloat16)
    sm.attach(model, recipe)
    with pytest.raises(RuntimeError, match="dtype|type"):
        output(model, inputs)


def test_a_norm_gives_what_the_base_s_gives():
    """For an input wider than its terms: T5's gives the dtype of its terms, Llama's that of its input."""

    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x)

    given = {}
    for name, norm in (
        ("t5", T.models.t5.modeling_t5.T5LayerNorm(8)),
        ("llama", T.models.llama.modeling_llama.LlamaRMSNorm(8)),
    ):
        model = Net(norm).bfloat16()
        shake(model.parameters(), 0.3)
        for dtype in (torch.bfloat16, torch.float32):
            before = model(drawn(2, 8).to(dtype))
            sm.attach(model, "LN()")
            after = model(drawn(2, 8).to(dtype))
            sm.detach(model)
            assert after.dtype == before.dtype
            torch.testing.assert_close(after, before, rtol=0.01, atol=0.01)
            given[name, dtype] = after.dtype
    assert given["t5", torch.float32] == torch.bfloat16
    assert given["llama", torch.float32] == torch.float32


def test_one_graph_when_compiled():
    model, inputs = base("siglip", torch.bfloat16)
    sm.attach(model, "LN() + BitFit(norms=False)")
    shake(trained_parameters(model).values(), 0.02)
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, inputs), output(model, inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("Full()", torch.bfloat16), ("Full() | Select('random', keep=0.3)", torch.float32)]
)
def test_tensors_of_a_block_itself_survive_checkpointing(recipe, dtype):
    """transformers computes a block's forward again, not its call: hooks of the block do not run the second time."""
    config = T.BeitConfig(
        **h.SIZES, image_size=8, patch_size=4, num_labels=2, hidden_dropout_prob=0.0, drop_path_rate=0.0
    )
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = T.BeitForImageClassification(config)
        shake(model.parameters(), 0.3)
        sm.attach(model.to(dtype).train(), recipe)
        shake(trained_parameters(model).values(), 0.1)
        if checkpointed:
            model.activation_checkpointing_enable()
        model(pixel_values=drawn(2, 3, 8, 8).to(dtype)).logits.float().square().sum().backward()
        found.append({n: p.grad for n, p in trained_parameters(model).items() if p.grad is not None})
    assert any("lambda_1" in name for name in found[0])
    h.same(*found)
    block = next(module for module in model.modules() if "lambda_1" in module._parameters)
    assert "_standing" in block.__dict__
    sm.detach(model)
    assert not {"_standing", "_reads", "_shown", "_unwrapped"} & set(block.__dict__)
