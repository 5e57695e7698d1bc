"""LoRA at convolutions: A is one with the same kernel, stride, padding, dilation and groups, B looks at one place."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import DeltaError, PlanError, RecipeError
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.conversion import to_peft
from smidgen.delta.merging import folded
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h

RANK = 4
CONVOLUTIONS = {  # the convolution, and the shape of an input
    "1d": (lambda: nn.Conv1d(6, 10, 3, padding=1, stride=2), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 8, 7)),
    "2d, one place": (lambda: nn.Conv2d(6, 10, 1, bias=False), (2, 6, 4, 4)),
    "2d, groups": (lambda: nn.Conv2d(6, 10, 3, groups=2, padding="same"), (2, 6, 5, 5)),
    "3d": (lambda: nn.Conv3d(6, 10, 2, padding="valid"), (2, 6, 3, 4, 3)),
}
RECIPE = f"LoRA(rank={RANK}, target='conv')"


class Model(nn.Module):
    """A convolution between two others, and a sum over places."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.last = conv, nn.Linear(10, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)).flatten(2).mean(-1))


def built(name, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = CONVOLUTIONS[name]
        model, x = Model(make()).to(dtype), torch.randn(shape).to(dtype)
    shake(model.parameters(), 0.1)
    return model, x


def attached(name, **how):
    model, x = built(name, **how)
    sm.attach(model, RECIPE)
    shake(trained_parameters(model).values(), 0.3)
    return model, x


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_starts_as_nothing_and_comes_off_bit_for_bit(name, tmp_path):
    model, x = built(name)
    base = model(x)
    with h.untouched(model):
        sm.attach(model, RECIPE)
        torch.testing.assert_close(model(x), base)
        shake(trained_parameters(model).values(), 0.3)
        tuned = model(x).detach()
        assert not torch.allclose(tuned, base)
        delta = sm.detach(model)
    assert torch.equal(model(x), base)
    sm.attach(model, Delta.load(delta.save(tmp_path / "delta")))
    torch.testing.assert_close(model(x), tuned)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_counts_are_the_closed_form(name):
    model, _ = attached(name)
    conv = model.conv
    places = conv.weight[0, 0].numel()
    wanted = RANK * conv.in_channels // conv.groups * places + conv.out_channels * RANK // conv.groups
    assert sum(p.numel() for p in trained_parameters(model).values()) == wanted


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_merged_is_attached(name):
    model, x = attached(name)
    torch.testing.assert_close(sm.merge(model)(x), model(x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_are_those_of_the_merged_weight(name):
    model, x = attached(name)
    trained = list(trained_parameters(model).values())
    found = torch.autograd.grad(model(x).square().sum(), trained)
    plain = copy.deepcopy(model)
    sm.detach(plain)
    merged = {name: value for name, value in folded(model).items() if name.startswith("conv.")}
    wanted = torch.autograd.grad(torch.func.functional_call(plain, merged, (x,)).square().sum(), trained)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_product_of_loops_over_groups(name):
    model, _ = attached(name)
    A, B = (p.detach() for p in trained_parameters(model).values())
    conv = model.conv
    g, change = conv.groups, torch.zeros_like(conv.weight)
    for out in range(conv.out_channels):
        group = out // (conv.out_channels // g)
        for i in range(RANK // g):
            row = A[group * (RANK // g) + i].view(conv.weight[0].shape)
            change[out] += 16 / RANK * B[out, i] * row
    torch.testing.assert_close(sm.merge(model).conv.weight, conv.weight + change)


@pytest.mark.parametrize("name", ["1d", "2d, groups", "3d"])
def test_a_sum_of_two_is_both(name):
    model, x = built(name)
    deltas = []
    for seed in range(2):
        sm.attach(model, RECIPE, seed=seed)
        shake(trained_parameters(model).values(), 0.3)
        deltas.append(sm.detach(model))
    weights = [sm.merge(model, delta).conv.weight for delta in deltas]
    wanted = copy.deepcopy(model)
    wanted.conv.weight.data = weights[0] + weights[1] - model.conv.weight.data
    with sm.attached(model, deltas[0] + deltas[1]):
        torch.testing.assert_close(model(x), wanted(x))


def test_a_bfloat16_base_trains_in_float32():
    model, x = attached("2d", dtype=torch.bfloat16)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    model(x).float().square().sum().backward()
    assert all(p.grad.any() for p in trained_parameters(model).values())


def test_it_computes_what_pefts_does():
    peft = pytest.importorskip("peft")
    for name in ("1d", "2d, one place", "3d"):  # PEFT leaves a dilation out, and stops
        model, x = attached(name, dtype=torch.float32)
        tuned = model(x)
        A, B = (p.detach() for p in trained_parameters(model).values())
        sm.detach(model)
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["conv"]))
        layer = theirs.base_model.model.conv
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(A.view_as(layer.lora_A["default"].weight))
            layer.lora_B["default"].weight.copy_(B.view_as(layer.lora_B["default"].weight))
        torch.testing.assert_close(theirs(x), tuned)


def test_patches_of_an_image_model():
    config = T.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8,
                         patch_size=4, num_labels=2)  # fmt: skip
    model = T.ViTForImageClassification(config)
    sm.attach(model, "LoRA(rank=2, target=('query', 'projection'))")
    pixels = torch.randn(2, 3, 8, 8)
    model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss.backward()
    names = [name for name, p in trained_parameters(model).items() if "patch" in name and p.grad is not None]
    assert [name.rpartition(".")[2] for name in names] == ["A", "B"]


def test_what_is_not_named_is_left_alone():
    model, _ = built("2d")
    plan = sm.plan(nn.Sequential(model.conv, nn.Flatten(2), nn.Linear(1, 3)), "LoRA(rank=1, target='2')")
    assert [row.site.path for row in plan.entries] == ["2"]
    with pytest.raises(PlanError, match="matches no site"):
        sm.plan(model, "LoRA(target='conv', exclude='conv')")


@pytest.mark.parametrize(
    ("conv", "recipe", "error", "says"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), RECIPE, RecipeError, "pads with 'circular'"),
        (nn.Conv2d(6, 9, 3, groups=3), RECIPE, RecipeError, "rank=4 is no multiple of the 3 groups"),
        (nn.Conv2d(2, 3, 3), RECIPE, RecipeError, "rank=4 is above the smaller side of 0"),
        (nn.Conv2d(6, 10, 3), "DoRA(target='0')", PlanError, "no linear map but a convolution"),
        (nn.Conv2d(6, 10, 3), "PiSSA(target='0')", PlanError, "no linear map but a convolution"),
    ],
)
def test_mistakes(conv, recipe, error, says):
    model = nn.Sequential(conv, nn.Linear(2, 2))
    with pytest.raises(error, match=says):
        sm.attach(model, recipe.replace("'conv'", "'0'"))


def test_a_file_of_pefts_is_not_written(tmp_path):
    model, _ = attached("2d")
    delta = sm.detach(model)
    with pytest.raises(DeltaError, match="conv, no linear map, is not written in PEFT's format"):
        to_peft(delta, model, tmp_path)


def test_a_product_of_another_scale_would_be_seen(monkeypatch):
    model, x = attached("2d, groups")
    merged = sm.merge(model)
    monkeypatch.setattr("smidgen.methods.low_rank.lora._convolved", lambda p, x, site: 0.0)
    assert not torch.allclose(merged(x), model(x))
