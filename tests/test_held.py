"""Buffers, modules and parameters of the base stay as they are while something is attached."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.common.module_modes import evaluating, renew_caches
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import Fingerprint
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.in_place import held_state as held
from smidgen.steps.references import base_running
from smidgen.testing.cases import shake
from tests import helpers as h

VIT = {
    "num_stages": 1, "embed_dim": [8], "num_heads": [2], "depth": [1], "patch_sizes": [3], "patch_stride": [2],
    "patch_padding": [1], "mlp_ratio": [2.0], "attention_drop_rate": [0.0], "drop_rate": [0.0], "drop_path_rate": [0.0],
    "qkv_bias": [True], "cls_token": [True], "qkv_projection_method": ["dw_bn"], "kernel_qkv": [3],
    "padding_kv": [1], "stride_kv": [1], "padding_q": [1], "stride_q": [1],
}  # fmt: skip
MOBILE = {
    "image_size": 32, "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8], "hidden_sizes": [8, 8, 8], "num_attention_heads": 2,
    "num_labels": 2, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "mlp_ratio": 2.0,
}  # fmt: skip
LEVIT = {
    "image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
    "key_dim": [4, 4, 4], "num_labels": 2, "drop_path_rate": 0,
}  # fmt: skip
MODELS = {
    "cvt": (lambda: T.CvtForImageClassification(T.CvtConfig(**VIT, num_labels=2)), "LN()"),
    "mobilevit": (lambda: T.MobileViTForImageClassification(T.MobileViTConfig(**MOBILE)), "LN()"),
    "levit": (lambda: T.LevitForImageClassification(T.LevitConfig(**LEVIT)), "BitFit()"),
    "levit, whole": (lambda: T.LevitForImageClassification(T.LevitConfig(**LEVIT)), "Full()"),
}


def drawn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(seed=3):
    return {"pixel_values": drawn(4, 3, 32, 32, seed=seed)}


def built(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    shake(model.parameters(), 0.1)
    for buffer in model.buffers():  # running statistics of some data
        if buffer.is_floating_point():
            buffer.add_(drawn(*buffer.shape).abs())
    return model


def trained(model, recipe, steps=2):
    """A few steps in training mode, as one's own loop has them."""
    sm.attach(model, recipe).train()
    adam = sm.optimizer(model, lr=1e-2)
    for seed in range(steps):
        model(**pixels(seed), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        adam.step()
        adam.zero_grad()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_running_statistics_stand_still_in_training(name, tmp_path):
    model, recipe = built(name), MODELS[name][1]
    with h.untouched(model):
        before = {n: b.clone() for n, b in model.named_buffers()}
        assert any("running_mean" in n for n in before)
        trained(model, recipe)
        for n, buffer in model.named_buffers():
            assert torch.equal(buffer, before[n]), n
        assert all(module.training for module in model.modules() if "running_mean" in module._buffers)
        wanted, delta = h.logits(model, **pixels()), sm.detach(model)
        model.eval()
    fresh = built(name)
    sm.attach(fresh, Delta.load(delta.save(tmp_path / "delta")))
    assert torch.equal(h.logits(fresh, **pixels()), wanted)


def test_training_mode_computes_with_the_statistics_of_the_base():
    model = built("levit")
    with torch.no_grad():
        before = model(**pixels()).logits
        sm.attach(model, "BitFit()").train()
        torch.testing.assert_close(model(**pixels()).logits, before)
        sm.detach(model)
        assert not torch.allclose(model(**pixels()).logits, before, atol=1e-3), (
            "batch statistics are as the running ones"
        )


def test_statistics_that_move_would_be_seen(monkeypatch):
    monkeypatch.setattr(held, "to_eval", lambda module, args: None)
    monkeypatch.setattr(held.Held, "put_back", lambda self: None)
    model = built("levit")
    with pytest.raises((AttachError, AssertionError)), h.untouched(model):
        trained(model, "BitFit()")


class Batched(nn.Module):
    """A norm with running statistics, and one without."""

    def __init__(self):
        super().__init__()
        self.up, self.batch, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.batch(self.up(x)))


@pytest.mark.parametrize("how", ["compiled", "copied", "recomputed", "in part"])
def test_however_it_is_run(how):
    model = Batched()
    shake(model.parameters(), 0.3)
    before = {n: b.clone() for n, b in model.named_buffers()}
    sm.attach(model, "LN()").train()
    model, x = copy.deepcopy(model) if how == "copied" else model, drawn(5, 6)
    run = {
        "compiled": lambda: torch.compile(model, backend="eager", fullgraph=True)(x),
        "copied": lambda: model(x),
        "recomputed": lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
        "in part": lambda: model.norm(model.batch(model.up(x))),
    }[how]
    found = run()
    found.sum().backward()
    sm.detach(model)
    for n, buffer in model.named_buffers():
        assert torch.equal(buffer, before[n]), n
    torch.testing.assert_close(found, model.eval()(x))


class Net(nn.Module):
    """A norm, and buffers that move in other ways than those of running statistics."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = spectral_norm(nn.Linear(6, 8)), nn.LayerNorm(8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        y = self.norm(self.up(x))
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            self.cache = y.detach()
        return SimpleNamespace(logits=y)


def test_any_buffer_that_a_forward_pass_moves_is_put_back():
    model = Net().eval()
    shake(model.parameters(), 0.3)
    before = {n: b.clone() for n, b in model.state_dict().items()}
    sm.attach(model, "LN()").train()
    for seed in range(3):
        model(drawn(5, 6, seed=seed)).logits.sum().backward()
        for n, buffer in model.named_buffers():
            assert n == "cache" or torch.equal(buffer, before[n]), n
    assert model.cache is not None, "a cache belongs to nobody"
    delta = sm.detach(model.eval())
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n]), n
    assert delta.base.buffers


def test_a_buffer_that_is_changed_from_outside_is_an_error():
    model = sm.attach(Net().eval(), "LN()")
    with torch.no_grad():
        model.mean += 1
    said = r"the buffer mean was changed while LN\(\) was attached.*or detach, change the model, attach again"
    for use in (lambda: model(drawn(2, 6)), lambda: sm.detach(model)):
        with pytest.raises(AttachError, match=said):
            use()
    with torch.no_grad():
        model.mean -= 1
    model(drawn(2, 6))
    model.load_state_dict(model.state_dict())  # the same values, written again
    model(drawn(2, 6))
    sm.detach(model)


def test_the_fingerprint_sees_buffers(tmp_path):
    model = built("levit")
    delta = sm.detach(sm.attach(model, "BitFit()"))
    folder = delta.save(tmp_path / "delta")
    other = built("levit")
    other.train()(**pixels())  # moves its running statistics
    with pytest.raises(
        DeltaError, match=r"same parameters but other buffers \(running statistics.*one that was trained"
    ):
        sm.attach(other.eval(), Delta.load(folder))
    sm.attach(other, Delta.load(folder), verify=False)
    sm.detach(other)
    old = replace(delta, base=replace(delta.base, buffers=""))  # a file that says nothing of them
    sm.attach(other, old)
    assert "buffers" not in old.base.to_json()
    low = Fingerprint.of(built("levit").bfloat16(), ())
    assert low.buffers == Fingerprint.of(built("levit"), (), torch.bfloat16).buffers != delta.base.buffers
    assert Fingerprint.of(h.bert(), ()).buffers == ""


# Modules and parameters


def bigger(model):
    table = nn.Embedding(25, 16)
    model.set_input_embeddings(table)


def other_head(model):
    model.classifier = nn.Linear(16, 5)


def other_parameter(model):
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(torch.zeros(16, 24))


def compiled_part(model):
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")


CHANGES = {
    "compiled in part": (compiled_part, r"bert\.encoder\.layer\.1 was replaced"),
    "embeddings": (bigger, r"bert\.embeddings\.word_embeddings was replaced while LN\(\) was attached"),
    "head": (other_head, r"classifier was replaced while LN\(\) was attached"),
    "parameter": (other_parameter, r"the parameter bert\.encoder\.layer\.0\.output\.dense\.weight was replaced"),
    "offloaded": (lambda m: cpu_offload(m, torch.device("cpu")), r"the parameter bert\.emb\S+ was replaced"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_part_that_is_replaced_is_seen(what):
    model = h.bert()
    sm.attach(model, "LN()")
    change, said = CHANGES[what]
    change(model)
    for use in (lambda: model(**h.ids()), lambda: sm.detach(model)):
        with pytest.raises(AttachError, match=said) as error:
            use()
        assert "put it back, or detach, change the model, attach again" in str(error.value)


def test_a_part_that_is_replaced_does_not_outlive_the_block():
    model = h.bert()
    with (
        h.untouched(model),
        pytest.raises(AttachError, match="was replaced"),
        sm.attached(model, "LN() + LoRA(rank=2)"),
    ):
        model.bert.encoder.layer[0].output = nn.Identity()
        model(**h.ids())


def test_resizing_embeddings_is_refused_while_attached():
    model = h.causal("llama")
    before = h.logits(model)
    with h.untouched(model):
        sm.attach(model, "LN()")
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        assert model.resize_token_embeddings(len(h.WORDS)) is model.get_input_embeddings()
        for size in (25, 10):
            with pytest.raises(AttachError, match=rf"resized to {size} rows while LN\(\) is attached.*detach, resize"):
                model.resize_token_embeddings(size)
        assert torch.equal(h.logits(model), before)
        sm.detach(model)
    model.resize_token_embeddings(25)
    assert model.get_input_embeddings().weight.shape[0] == 25


def test_what_leaves_the_model_as_it_is_is_allowed():
    model = h.causal("gpt2")
    sm.attach(model, "Full()")
    shake(trained_parameters(model).values(), 0.1)
    before = h.logits(model)
    model.tie_weights()
    model.activation_checkpointing_enable()
    model.train().eval().requires_grad_(True)
    model.load_state_dict(model.state_dict())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(h.logits(model), before)
    assert len({id(p) for p in trained_parameters(model).values()} - {id(p) for p in model.parameters()}) == 0
    for block in model.transformer.h:
        block.compile(backend="eager")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(h.logits(model), before)
    sm.detach(model)


# What a class makes of its weights in eval mode and keeps until the next train()


def test_what_is_made_of_weights_is_made_anew_when_they_change():
    """LeViT looks its attention biases up once: a delta's at attach and at a switch, the base's after."""
    model = built("levit")
    base = h.logits(model, **pixels())
    deltas = {}
    for name, scale in (("small", 0.1), ("large", 0.5)):
        sm.attach(model, "Full()")
        shake(trained_parameters(model).values(), scale)
        deltas[name] = sm.detach(model)
    assert torch.equal(h.logits(model, **pixels()), base)
    wanted = {name: h.logits(sm.merge(built("levit"), delta), **pixels()) for name, delta in deltas.items()}
    for name, delta in deltas.items():
        with sm.attached(model, delta):
            torch.testing.assert_close(h.logits(model, **pixels()), wanted[name])
        assert torch.equal(h.logits(model, **pixels()), base)
    tasks = sm.Deltas(model)
    for name, delta in deltas.items():
        tasks[name] = delta
    for name in ("small", "large", "small"):
        with tasks.using(name):
            torch.testing.assert_close(h.logits(model, **pixels()), wanted[name])
    assert torch.equal(h.logits(model, **pixels()), base)


def test_a_cache_that_is_kept_would_be_seen(monkeypatch):
    monkeypatch.setattr("smidgen.ports.attachment_record.renew_caches", lambda model: None)
    monkeypatch.setattr("smidgen.delta.attaching.renew_caches", lambda model: None)
    with pytest.raises(AssertionError):
        test_what_is_made_of_weights_is_made_anew_when_they_change()


def test_what_was_made_in_eval_mode_is_not_kept_through_training():
    """A validation, or a reference with the edits off, between steps: the next one sees the values of then."""
    model = built("levit")
    sm.attach(model, "Full()").train()
    for between in (evaluating, base_running):
        with between(model):
            model(**pixels())
        shake(trained_parameters(model).values(), 0.3)
        wanted = h.logits(sm.merge(model).eval(), **pixels())
        torch.testing.assert_close(h.logits(model.eval(), **pixels()), wanted)
        model.train()


def test_a_model_that_keeps_a_graph_can_be_merged():
    model = built("levit")
    sm.attach(model, "Full()")
    shake(trained_parameters(model).values(), 0.3)
    kept = model(**pixels()).logits
    assert kept.requires_grad
    torch.testing.assert_close(h.logits(sm.merge(model), **pixels()), kept.detach())


def test_modes_of_parts_are_left_as_they_are():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(2, 2), []

        def train(self, mode=True):
            self.calls.append(mode)
            return super().train(mode)

    model = Own().eval()
    model.inner.train()
    model.calls.clear()
    renew_caches(model)
    assert model.calls == [True]
    assert (model.training, model.inner.training) == (False, True)
