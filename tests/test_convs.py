"""Convolutions as sites: channels stand where methods expect them, weights fold exactly, counts have closed forms."""

import copy
import io
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError
from smidgen.efficiency.prefix_cache.cut_point import why_not
from smidgen.importance.fisher_information import attached_fisher
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.resolution import resolve
from smidgen.ports import module_edits as ports
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.recipe.recipe import as_recipe
from smidgen.sites import discovery as sites
from smidgen.sites import weight_view as fold
from smidgen.sites.discovery import find_sites
from smidgen.sites.module_kinds import is_conv, kind_of
from smidgen.studies.experiments.model_components import components, part_of
from smidgen.testing.cases import Case, shake
from smidgen.testing.suite import CHECKS
from tests import helpers as h
from tests.test_fisher_rules import MODELS as SCORED
from tests.test_fisher_rules import agree, one_by_one

SIDE = 4  # as many channels as places along each axis, so that a wrong axis does not raise
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 2]}
SPEECH = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 20, "max_source_positions": 8, "num_mel_bins": 5,
    "decoder_start_token_id": 2, **h.TOKENS,
}  # fmt: skip
WAVE = {
    **h.SIZES, "num_labels": 2, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip


class Net(nn.Module):
    """One module, with its output as logits."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return SimpleNamespace(logits=self.module(x))


def tiny(cls, config):
    torch.manual_seed(0)
    model = cls(config).double().eval()
    shake(model.parameters(), 0.1)
    return model


def vit():
    return tiny(T.ViTForImageClassification, T.ViTConfig(**h.SIZES, **IMAGE, **STILL))


def convnext():
    return tiny(T.ConvNextForImageClassification, T.ConvNextConfig(**STAGES, num_stages=2, patch_size=2, num_labels=3))


def resnet():
    config = T.ResNetConfig(**STAGES, embedding_size=8, num_labels=3)
    return tiny(T.ResNetForImageClassification, config)


def whisper():
    return tiny(T.WhisperForConditionalGeneration, T.WhisperConfig(**SPEECH))


def wav2vec2():
    return tiny(T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**WAVE))


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pixels(side=8):
    return {"pixel_values": drawn(3, 3, side, side)}


SPOKEN = {"input_features": drawn(2, 5, 16), "decoder_input_ids": torch.tensor([[2, 5, 6], [2, 7, 8]])}
MODELS = {  # model, inputs, convolutions that are sites, recipe that merges
    "vit": (vit, pixels(), 1, "SSF()"),
    "convnext": (convnext, pixels(), 1 + 1 + 3, "SSF()"),
    "resnet": (resnet, pixels(32), 1 + 3 + 1 + 2 * 3, "SSF(shift=False)"),
    "whisper": (whisper, SPOKEN, 2, "SSF(norms=False, shift=False)"),
    "wav2vec2": (wav2vec2, {"input_values": drawn(2, 60)}, 2, "SSF(shift=False)"),
}


def case(name, recipe):
    build, inputs, *_ = MODELS[name]
    return Case(as_recipe(recipe), build(), inputs)


# One convolution


CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(SIDE, SIDE, 3, padding=1),
    "2d": lambda: nn.Conv2d(SIDE, SIDE, 3, padding=1),
    "3d": lambda: nn.Conv3d(SIDE, SIDE, 3, padding=1),
    "groups": lambda: nn.Conv2d(SIDE, SIDE, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(SIDE, SIDE, 3, padding="same", groups=SIDE),
    "more channels": lambda: nn.Conv2d(SIDE, 3 * SIDE, (1, 2), stride=(2, 1), dilation=2),
    "reflected": lambda: nn.Conv2d(SIDE, SIDE, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda: nn.Conv1d(SIDE, SIDE, 1, groups=SIDE),
}


def wrapped(name):
    torch.manual_seed(0)
    return Net(CONVOLUTIONS[name]()).double().eval()


def ends(name, batch=2):
    """An input, with a batch axis unless it is 0."""
    places = len(CONVOLUTIONS[name]().kernel_size)
    return drawn(*[batch][: bool(batch)], *[SIDE] * (places + 1))


def by_channel(model, x, g, t):
    """g y + t, one channel at a time."""
    y = model.module(x)
    axis = x.ndim - len(model.module.kernel_size) - 1
    return torch.stack([g[i] * part + t[i] for i, part in enumerate(y.unbind(axis))], axis)


def holds(name, batch=2):
    """Attached is the formula, merged is attached, and what is detached leaves nothing behind."""
    model, x = wrapped(name), ends(name, batch)
    with h.untouched(model), torch.no_grad():
        sm.attach(model, "SSF()")
        shake(trained_parameters(model).values(), 0.5)
        g, t = (trained_parameters(model)[f"module.edits.0.{symbol}"] for symbol in "gt")
        assert g.shape == t.shape == (model.module.out_channels,)
        found = model(x).logits
        merged = sm.merge(model)(x).logits
        sm.detach(model)
        torch.testing.assert_close(found, by_channel(model, x, g, t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_formula_is_by_channel_and_merges(name, batch):
    holds(name, batch)


def stay(site, t):
    return t


def one_place_off(site, t):
    return t.movedim(site.axis + 1, -1)


def rolled(site, weight):
    return weight.flatten(1).roll(1, 0) if site.kind == "conv" else weight


@pytest.mark.parametrize(
    ("module", "function", "broken"),
    [(ports, "channels_last", stay), (ports, "channels_last", one_place_off), (fold, "_oriented", rolled)],
)
def test_a_wrong_axis_is_seen(module, function, broken, monkeypatch):
    holds("2d")
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(AssertionError, match="not close"):
        holds("2d")


def test_channels_last_in_memory_stays_so():
    model = wrapped("2d").to(memory_format=torch.channels_last)
    x = ends("2d").contiguous(memory_format=torch.channels_last)
    before = model(x).logits
    sm.attach(model, "SSF()")
    found = model(x).logits
    assert torch.equal(found, before)
    assert found.stride() == before.stride()


def test_a_group_norm_has_its_channels_behind_the_batch():
    parts = (nn.Linear(SIDE, SIDE), nn.GroupNorm(2, SIDE), nn.Linear(SIDE, SIDE))
    model = Net(nn.ModuleList(nn.Sequential(*copy.deepcopy(parts)) for _ in range(2))).double()
    model.module.forward = lambda x: model.module[1](model.module[0](x))
    x = drawn(2, SIDE, SIDE, SIDE)
    with torch.no_grad():
        sm.attach(model, "SSF(target='linear')")
        shake(trained_parameters(model).values(), 0.5)
        found = model(x).logits
        assert [site.axis for site in find_sites(model) if site.kind == "norm"] == [1, 1]
        torch.testing.assert_close(sm.merge(model)(x).logits, found, rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Louder(sm.Method, abstract=True):
    """Scales the channels that enter a convolution."""

    def acts(self, site):
        return site.kind == "conv"

    def init(self, site):
        return {"s": torch.ones(site.width_in)}

    def before(self, p, x, site):
        return p["s"] * x


@pytest.mark.parametrize("name", ["1d", "more channels", "3d"])
def test_an_edit_of_the_input_sees_its_channels(name):
    model, x = wrapped(name), ends(name)
    sm.attach(model, Louder())
    (s,) = shaken = list(trained_parameters(model).values())
    shake(shaken, 0.5)
    found = model(x).logits
    sm.detach(model)
    scaled = torch.stack([s[i] * part for i, part in enumerate(x.unbind(1))], 1)
    torch.testing.assert_close(found, model(scaled).logits, rtol=1e-12, atol=1e-12)


def test_a_method_sees_rows_of_output_channels():
    model = wrapped("groups")
    (site,) = find_sites(model)
    assert (site.kind, site.width_in, site.width_out, site.transposed, site.axis) == ("conv", SIDE, SIDE, False, -3)
    weight = model.module.weight.detach()
    seen = fold.seen_from(site, weight, None)["weight"]
    assert seen.shape == (SIDE, SIDE // 2 * 9)
    whole, _ = fold.put_back(site, (weight, None), (seen, None))
    assert torch.equal(whole, weight)


# What is left alone


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


LEFT = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(4, 4, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "a forward of its own": lambda: Standardised(4, 4, 3),
    "Mamba's": lambda: nn.Conv1d(4, 4, 3, groups=4, padding=2),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_linear_in_a_weight_of_its_own_is_no_site_of_the_kind(name):
    module = LEFT[name]()
    assert not is_conv(module)
    assert kind_of(module) == "other"
    with pytest.raises(PlanError, match="SSF: target names 'linear'"):
        resolve(Net(module), "SSF()")


def test_mambas_convolution_is_read_without_a_call():
    """Why Mamba's is left alone: its mixer reads the weight, so an edit at the module would never act."""
    config = T.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=20, **h.TOKENS)
    model = T.MambaForCausalLM(config).double().eval()
    tokens, calls = torch.tensor([[4, 5, 6]]), []
    convs = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
    convs[0].register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=tokens)
    assert calls == []
    assert not any(row.site.kind == "conv" for row in resolve(model, "SSF()").entries)


def test_biases_and_weights_are_trained_as_before():
    model = vit()
    names = {name for row in resolve(model, "BitFit()").entries for name, _ in row.names()}
    assert "vit.embeddings.patch_embeddings.projection.bias" in names
    full = resolve(model, "Full()")
    assert full.trained == full.pretrained
    assert not any(row.site.kind == "conv" for row in resolve(model, "LoRA(target='linear') + IA3()").entries)
    speech = {name for row in resolve(wav2vec2(), "BitFit()").entries for name, _ in row.names()}
    assert "wav2vec2.encoder.pos_conv_embed.conv.bias" in speech


# Models


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_each_kind(name, tmp_path):
    *_, count, recipe = MODELS[name]
    subject = case(name, recipe)
    plan = resolve(subject.model, recipe)
    assert sum(row.site.kind == "conv" for row in plan.entries) == count
    assert plan.lowest == "embeddings"
    with h.untouched(subject.model):
        subject.attach(perturb=0.3)
        trained = subject.run()
        subject.loss().backward()
        grads = {n: p.grad for n, p in trained_parameters(subject.model).items()}
        assert all(grads[n].abs().max() > 0 for row in plan.entries if row.site.kind == "conv" for n, _ in row.names())
        torch.testing.assert_close(subject.run(sm.merge(subject.model)), trained, rtol=1e-9, atol=1e-9)
        assert torch.equal(subject.run(copy.deepcopy(subject.model)), trained)
        delta = sm.detach(subject.model)
    assert torch.equal(subject.run(), subject.base)
    sm.attach(subject.model, sm.Delta.load(delta.save(tmp_path)))
    assert torch.equal(subject.run(), trained)


@pytest.mark.parametrize("recipe", ["SSF()", "SSF() | Select('random', keep=0.5)"])
@pytest.mark.parametrize("check", CHECKS)
def test_conformance_on_images(check, recipe):
    CHECKS[check](case("vit", recipe))


def test_conformance_sees_a_wrong_axis(monkeypatch):
    assert h.SIZES["hidden_size"] == 16  # and two places along each axis: a wrong axis raises here
    monkeypatch.setattr(ports, "channels_last", stay)
    with pytest.raises(RuntimeError, match="must match the size"):
        CHECKS["merges"](case("vit", "SSF()"))


def test_one_compiled_graph():
    subject = case("vit", "SSF()")
    subject.attach(perturb=0.3).requires_grad_(False)
    compiled = torch.compile(subject.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(subject.run(compiled), subject.run(), rtol=1e-9, atol=1e-9)


def test_low_precision_keeps_its_dtype():
    model = convnext().bfloat16()
    inputs = {"pixel_values": pixels()["pixel_values"].bfloat16()}
    before = h.logits(model, **inputs)
    sm.attach(model, "SSF()")
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert torch.equal(h.logits(model, **inputs), before)
    assert before.dtype == torch.bfloat16


def test_without_a_bias_the_shift_stays_attached():
    model = resnet()
    sm.attach(model, "SSF()")
    with pytest.raises(AttachError, match=r"embedder\.convolution has no bias to take the shift; shift=False"):
        sm.merge(model)


@pytest.mark.parametrize("recipe", ["SSF()", "SSF() | Select('random', keep=0.5)"])
@pytest.mark.parametrize("name", ["vit", "convnext", "wav2vec2"])
def test_fisher_information_is_exact(name, recipe):
    make, data = SCORED[name]
    model, sample = make(), data()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.2)
    found = attached_fisher(model, sample, batch_size=3)
    agree(found, one_by_one(model, sample))
    assert recipe != "SSF()" or not found.looped  # what a selection leaves of an added tensor is looped anywhere


def test_fisher_information_of_a_wrong_axis_is_seen(monkeypatch):
    make, data = SCORED["convnext"]
    model, sample = sm.attach(make(), "SSF()"), data()
    wanted = one_by_one(model, sample)
    monkeypatch.setattr(ports, "channels_last", lambda site, t: t.flip(0) if site.kind == "conv" else t)
    with pytest.raises((AssertionError, RuntimeError)):
        agree(attached_fisher(model, sample, batch_size=3), wanted)


def test_nothing_lies_below_the_patches():
    model = vit()
    plan = resolve(model, "SSF()")
    assert plan.lowest == "embeddings"
    assert frozen_prefix(model, plan) == []
    sm.attach(model, "SSF()")
    assert "embeddings" in why_not(model, attachment(model).plan)
    model = vit()
    above = resolve(model, "SSF(convs=False)")
    assert above.lowest == "vit.layers.0"
    assert any(isinstance(m, nn.Conv2d) for m in frozen_prefix(model, above))
    assert resolve(model, "SSF(layers='top:1')").lowest == "vit.layers.1"


def test_reports_have_a_place_for_them():
    parts = components(vit())
    (patch,) = part_of(parts, "vit.embeddings.patch_embeddings.projection.edits.0.g")
    assert patch.component == "embedding"
    named = {part.name: part.component for part in components(convnext())}
    assert named["convnext.embeddings.patch_embeddings.weight"] == "embedding"
    assert {c for name, c in named.items() if "dwconv" in name} == {"convolution"}


# Counts


def counted(cls, config, recipe="SSF()"):
    with torch.device("meta"):
        return resolve(getattr(T, cls)(config), recipe).trained


def test_counts_have_closed_forms():
    paper = 22 * 768 * 12 + 4 * 768
    assert counted("ViTForImageClassification", T.ViTConfig()) == paper == 205_824
    assert counted("ViTForImageClassification", T.ViTConfig(), "SSF(convs=False)") == paper - 2 * 768
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    blocks = sum(d * (1 + 1 + 4 + 1) * w for d, w in zip(depths, widths, strict=True))
    stem_and_downsampling, final = sum(widths), 768
    assert counted("ConvNextForImageClassification", T.ConvNextConfig()) == 2 * (blocks + stem_and_downsampling + final)


def test_a_count_without_convolutions_is_another(monkeypatch):
    monkeypatch.setattr(sites, "kind_of", lambda module: "other" if is_conv(module) else kind_of(module))
    assert counted("ViTForImageClassification", T.ViTConfig()) == 205_824 - 2 * 768


# A pretrained model and real images

RENAMED = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embedding.embed": "vit.embeddings.patch_embeddings.projection",
    "transformer_layers.": "vit.layers.",
    "attention.out_proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "out_head.0": "vit.layernorm",
    "out_head.1": "classifier",
}


def pretrained(folder):
    """A ViT of four blocks that was trained on CIFAR-10."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    image = {"image_size": 32, "patch_size": 4, "num_labels": 10, "layer_norm_eps": 1e-5}
    path = folder / "checkpoints" / "vit_small" / "ashu_vit_model.pth"
    tensors = {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            tensors[name] = tensor
    model = T.ViTForImageClassification(T.ViTConfig(**sizes, **image, **STILL))
    model.load_state_dict(tensors)
    return model.eval()


def photographs(folder, count, test):
    """Images (count, 3, 32, 32) between 0 and 1, and labels."""
    image = pytest.importorskip("PIL.Image")
    with np.load(folder / "cifar10_12k_jpeg.npz") as data:
        # in the file they are sorted by class
        places = np.random.default_rng(0).permutation(np.flatnonzero(data["is_test"] == test))[:count]
        blob, offsets, labels = data["blob"], data["offsets"], data["label"][places]
    files = (io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes()) for i in places)
    found = np.stack([np.asarray(image.open(file)) for file in files])
    return torch.tensor(found).permute(0, 3, 1, 2) / 255, torch.tensor(labels).long()


def measured(model, images, labels):
    """Loss and accuracy."""
    logits = h.logits(model, pixel_values=images)
    return nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def test_a_pretrained_model_learns_to_see_in_fog(shared):
    """Images with a third of their contrast, which it reads badly: SSF gets some of the accuracy back in 32 steps."""
    model = pretrained(shared)
    (x, y), (clear, truth) = photographs(shared, 1024, 0), photographs(shared, 512, 1)
    train, held = 0.3 * x + 0.6, 0.3 * clear + 0.6
    assert measured(model, clear, truth)[1] > 0.5
    start = measured(model, held, truth)
    sm.attach(model, "SSF()")
    adam = sm.optimizer(model, lr=1e-2, head_lr=1e-3)
    for step in range(32):
        part = slice(64 * step % 1024, 64 * step % 1024 + 64)
        adam.zero_grad()
        model(pixel_values=train[part], labels=y[part]).loss.backward()
        adam.step()
    end = measured(model, held, truth)
    print(f"loss and accuracy on held-out images: {start} before, {end} after")
    assert end[0] < 0.5 * start[0]
    assert end[1] > start[1] + 0.1
    g, t = (p for n, p in trained_parameters(model).items() if "projection.edits" in n)
    assert (g - 1).abs().max() > 0.01 < t.abs().max()
    wanted = h.logits(model, pixel_values=held)
    torch.testing.assert_close(h.logits(sm.merge(model), pixel_values=held), wanted, rtol=1e-5, atol=1e-5)
