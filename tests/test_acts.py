"""What is attached acts: maps that are read or do something else are no sites, norms of other forms are told apart."""

import copy
import importlib

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import as_recipe
from smidgen.sites.discovery import find_sites
from smidgen.sites.module_calls import never_called, read_at
from smidgen.sites.module_kinds import channel_axis, kind_of, norm_form
from smidgen.studies.diagnosis import examine
from smidgen.testing.cases import shake
from tests import helpers as h
from tests import odd_models as odd


def of(kind, name):
    return getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)


# The law on models: what is attached has an effect, and merged equals attached


@pytest.mark.parametrize("recipe", ["LoRA(rank=2, target='linear')", "SSF(shift=False)", "SSF()", "LN()"])
@pytest.mark.parametrize(
    "name", ["llama4", "phimoe", "mamba", "falcon_mamba", "jamba", "wavlm", "nemotron", "cohere", "squeezebert"]
)
def test_what_is_attached_acts_and_merges(name, recipe):
    if name == "squeezebert" and "LoRA" in recipe:
        recipe = "LoRA(rank=2, target='dense')"  # its blocks are convolutions
    finding = examine(odd.build(name), as_recipe(recipe), odd.inputs(name))
    assert not finding.refused
    assert not finding.faults
    assert finding.places
    assert finding.merges or ("SSF()" in recipe and "has no bias" in finding.kept)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama4", "router"),
        ("phimoe", "router"),
        ("mamba", "dt_proj"),
        ("falcon_mamba", "dt_proj"),
        ("jamba", "dt_proj"),
        ("wavlm", "q_proj"),
        ("wavlm", "out_proj"),
    ],
)
def test_a_map_that_an_edit_would_not_reach_is_refused(name, part):
    model = odd.build(name)
    with pytest.raises(PlanError, match=f"target names '{part}', which is no linear map"):
        resolve(model, f"LoRA(rank=2, target='{part}')")
    names = resolve(model, "Full()").shapes
    assert any(f"{part}.weight" in name for name in names), "in place it is trained all the same"


def test_torch_layers_are_called_where_they_have_hooks():
    """nn.TransformerEncoderLayer reads its maps on a fast path that it leaves for hooks."""
    model = nn.ModuleDict({"body": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, None, False)})
    assert never_called(model) == set()
    model.eval()
    sm.attach(model, "LoRA(rank=2, target='ff_in')")
    x = torch.randn(3, 2, 8)
    before = model.body(x)
    shake(trained_parameters(model).values(), 0.5)
    assert not torch.allclose(model.body(x), before)


class Reader(nn.Module):
    """Calls its map, or reads its weight as a fused kernel does."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.fused = False

    def forward(self, x):
        x = self.one(self.norm(x))
        return F.linear(x, self.two.weight, self.two.bias) if self.fused else self.two(x)


def test_a_map_that_is_sometimes_read_says_so():
    model = nn.Sequential(Reader(), Reader())
    assert read_at(model) == {"0.two", "1.two"}
    x = torch.randn(2, 6)
    with h.untouched(model):
        sm.attach(model, "LoRA(rank=2, target='linear')")
        model(x)
        model[1].fused = True
        with pytest.raises(AttachError, match=r"Reader read the weight of its two without calling it .*LoRA"):
            model(x)
        with sm.disabled(model):
            model(x)
        twin = copy.deepcopy(model)
        with pytest.raises(AttachError, match="did not act"):
            twin(x)
        model[1].fused = False
        model(x)
        twin[1].fused = False
        twin(x)
        sm.detach(model)


def test_no_part_of_a_map_that_is_read_can_be_chosen():
    model = odd.build("mamba")
    sites = {site.path: site.kind for site in find_sites(model)}
    assert sites["backbone.layers.0.mixer.dt_proj"] == "other"
    with h.untouched(model), pytest.raises(AttachError, match=r"mixer\.\w+\.bias is read and its module never called"):
        sm.attach(model, "BitFit() | Select('random', keep=0.5)")


# Linear maps by what they compute


class Same(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


class Clamped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(-1, 1)


class Doubled(nn.Linear):
    def forward(self, input):
        return F.linear(input, 2 * self.weight, self.bias)


class Beside(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.beside = nn.Linear(*sizes)
        nn.init.zeros_(self.beside.weight)
        nn.init.zeros_(self.beside.bias)

    def forward(self, input):
        return super().forward(input) + self.beside(input)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Same(4, 6), "linear"),
        (lambda: of("falcon", "FalconLinear")(4, 6), "linear"),
        (lambda: Clamped(4, 6), "other"),
        (lambda: Doubled(4, 6), "other"),
        (lambda: Beside(4, 6), "other"),
        (lambda: of("deepseek_v4", "DeepseekV4GroupedLinear")(8, 8, 2), "other"),
        (lambda: of("idefics", "IdeficsDecoupledLinear")(4, 6, 2), "other"),
    ],
)
def test_a_linear_map_is_told_by_what_it_computes(make, kind, device):
    with torch.device(device):
        assert kind_of(make()) == kind


def test_a_weight_made_of_others_is_no_linear_map():
    assert kind_of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) == "other"


# Norms by their form

GAIN, UNIT = 0.0, 1.0
FORMS = {
    "llama": (lambda: of("llama", "LlamaRMSNorm")(6), -1, GAIN),
    "gemma": (lambda: of("gemma", "GemmaRMSNorm")(6), -1, UNIT),
    "nemotron": (lambda: of("nemotron", "NemotronLayerNorm1P")(6), -1, UNIT),
    "cohere by head": (lambda: of("cohere", "CohereLayerNorm")((2, 6)), -1, GAIN),
    "chameleon by head": (lambda: of("chameleon", "ChameleonLayerNorm")((2, 6)), -1, GAIN),
    "moonshine streaming": (lambda: of("moonshine_streaming", "MoonshineStreamingLayerNorm")(6), -1, UNIT),
    "... without an offset": (lambda: of("moonshine_streaming", "MoonshineStreamingLayerNorm")(6, False), -1, GAIN),
    "squeezebert": (lambda: of("squeezebert", "SqueezeBertLayerNorm")(6), 1, GAIN),
    "eomt": (lambda: of("eomt", "EomtLayerNorm2d")(6), 1, GAIN),
    "convnext": (lambda: of("convnext", "ConvNextLayerNorm")(6, data_format="channels_first"), 1, GAIN),
    "deberta": (lambda: of("deberta", "DebertaLayerNorm")(6, 1e-5), -1, GAIN),
    "mobilebert": (lambda: of("mobilebert", "NoNorm")(6), -1, GAIN),
    "group": (lambda: nn.GroupNorm(2, 6), 1, GAIN),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FORMS)
def test_a_norm_is_told_by_what_it_computes(name, device):
    make, axis, offset = FORMS[name]
    with torch.device(device):
        norm = make()
    form = norm_form(norm)
    assert (kind_of(norm), channel_axis(norm), form.axis, form.offset) == ("norm", axis, axis, offset)


@pytest.mark.parametrize(
    "norm",
    [
        of("bit", "BitGroupNormActivation")(T.BitConfig(num_groups=2), 6),
        of("mamba2", "MambaRMSNormGated")(6, 3),
        of("pe_audio", "PeAudioMaskedGroupNorm")(2, 6),
        of("muse_spark", "MuseSparkTextInputScaledRMSNorm")(6),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_that_does_more_is_not_scaled_and_shifted(norm):
    """Its gain is trained in place, but g * output is no other gain: an activation, a gate or a mask follows."""
    assert kind_of(norm) == "norm"
    assert norm_form(norm) is None
    assert not find_sites(nn.ModuleDict({"norm": norm}))[0].affine


class NormalisedRows(nn.Module):
    """A matrix, for all its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=-1))


def test_a_matrix_is_no_norm():
    assert kind_of(NormalisedRows()) == "other"


@pytest.mark.parametrize(("name", "count"), [("cohere", 4), ("chameleon", 4)])
def test_norms_by_head_are_those_of_queries_and_keys(name, count):
    model = odd.build(name)
    qk = [site for site in find_sites(model) if "qk" in site.roles]
    assert len(qk) == count
    assert {len(dict(site.terms)[site.gain]) for site in qk} == {2}
    values = sum(p.numel() for n, p in model.named_parameters() if "q_norm" in n or "k_norm" in n)
    assert resolve(model, "LN(which='qk', stack='layers')").trained == values
    finding = examine(model, as_recipe("LN(which='qk')"), odd.inputs(name))
    assert not finding.faults
    assert finding.merges


def test_all_norms_of_moonshine_streaming_are_there():
    model = odd.build("moonshine_streaming")
    norms = {f"{site.path}.{site.gain}" for site in find_sites(model) if site.kind == "norm"}
    assert norms == {n for n, _ in model.named_parameters() if "norm" in n}
    finding = examine(model, as_recipe("LN()"), odd.inputs("moonshine_streaming"))
    assert not finding.faults


@pytest.mark.parametrize("name", ["cohere", "chameleon"])
def test_fisher_information_of_norms_by_head(name):
    """The closed form, against autograd on one example at a time."""
    from smidgen.importance.per_example_rules import Call, norm

    module = (of("cohere", "CohereLayerNorm") if name == "cohere" else of("chameleon", "ChameleonLayerNorm"))((2, 6))
    shake(module.parameters(), 0.5)
    module.double()
    x, g = torch.randn(2, 3, 5, 2, 6, dtype=torch.float64).unbind()
    p = {n: q.detach() for n, q in module.named_parameters()}
    call = Call(module, lambda q, x: torch.func.functional_call(module, q, (x,)), (x,), g)
    wanted = {n: torch.zeros_like(q) for n, q in p.items()}
    for i in range(3):
        grads = torch.autograd.grad((module(x[i : i + 1]) * g[i]).sum(), list(module.parameters()))
        for (n, total), grad in zip(wanted.items(), grads, strict=True):
            wanted[n] = total + grad.square()
    torch.testing.assert_close(norm(p, [call], 2**20), wanted, rtol=1e-5, atol=1e-5)  # Cohere's computes in float32
