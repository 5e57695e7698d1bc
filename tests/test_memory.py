"""Memory: the estimated peak is that of a real step, recomputation changes nothing but memory, what fits is found."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import smidgen as sm
from smidgen.common.byte_sizes import parse_bytes
from smidgen.common.errors import TrainError
from smidgen.efficiency.activation_checkpointing import recomputed, recomputing
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.gradient_checks import snapshot
from smidgen.steps.optimizer_groups import optimizer
from smidgen.training.memory.batch_size import largest_batch
from smidgen.training.memory.live_tensors import Live
from tests import helpers as h

RECIPES = ["LN()", "LN(layers='top:1')", "LoRA(rank=2, dropout=0.2)", "IA3()", "BitFit()", "Full()"]


def attached(kind, recipe, dropout=0.1):
    """A tiny model in the modes that `fit` trains it in."""
    rates = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "gpt2": ("resid_pdrop", "attn_pdrop")}
    model = h.build(kind, **dict.fromkeys(rates.get(kind, ("attention_dropout",)), dropout))
    sm.attach(model, recipe)
    return modes(model)


def modes(model):
    model.train()
    for module in frozen_prefix(model, attachment(model).plan):
        module.eval()
    return model


def gradients(model, seed=5):
    """Of every trained tensor, and the state of the generator afterwards."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    model(**h.ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    found = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    return found, torch.get_rng_state()


def kept(model):
    """Bytes saved for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**h.ids()).logits.sum()
    loss.backward()
    return sum(s.nbytes() for s in storages.values())


def runs(module, model):
    """How often a module runs in a forward and backward pass."""
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    handle.remove()
    return len(calls)


# --- the peak ---


def test_live_counts_births_and_deaths():
    with Live() as live:
        a = torch.ones(1000)
        view = a[10:].view(99, 10)
        b = a + a
        assert (live.now, live.high) == (8000, 8000)
        del b
        assert (live.now, live.high) == (4000, 8000)
        del a
        assert live.now == 4000, "a view keeps its storage"
        del view
        assert live.now == 0


def real_peak(model, rows, length):
    """The same step as the estimate's, on tensors with content, after one step before it."""
    live = Live()
    with live:
        live.add(*model.parameters(), *model.buffers())
        adam = optimizer(model)
        copies = snapshot(model), snapshot(model)
        for _ in range(2):
            live.high = live.now
            ids = torch.zeros(rows, length, dtype=torch.long)
            mask = torch.ones_like(ids)
            mask[0, -3:] = 0  # with nothing to mask, transformers makes no mask of its own
            loss = model(input_ids=ids, attention_mask=mask, labels=torch.zeros(rows).long()).loss
            loss.backward()
            nn.utils.clip_grad_norm_(list(trained_parameters(model).values()), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            del loss
        del copies
    return live.high


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_that_of_a_real_step(recipe, recompute):
    model = h.bert(0.1)
    found = sm.plan(model, recipe, batch_size=16, length=32, recompute=recompute).costs["peak_bytes"]
    sm.attach(model, recipe)
    modes(model)
    originals = sum(s.original.nbytes for s in attachment(model).swaps)  # kept beside the masters, for detach
    if recompute:
        with recomputing(model):
            real = real_peak(model, 16, 32)
    else:
        real = real_peak(model, 16, 32)
    assert found == pytest.approx(real + originals, rel=0.01)


def test_what_comes_and_goes_belongs_to_the_peak():
    costs = sm.plan(h.bert(0.1), "Full()", batch_size=2, length=8).costs
    bare = costs["weights_bytes"] + costs["training_state_bytes"]
    assert costs["peak_bytes"] > bare + costs["training_state_bytes"] // 2  # two copies of the trained values


# --- recomputation ---


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_gradients_are_the_same_bit_for_bit(kind, recipe):
    if (kind, recipe) == ("llama", "BitFit()"):
        pytest.skip("no biases")
    model = attached(kind, recipe)
    plain, after = gradients(model)
    with recomputing(model):
        again, then = gradients(model)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(after, then)


def test_without_the_generators_state_gradients_would_differ():
    model = attached("bert", "LN()")
    plain, _ = gradients(model)
    with recomputing(model):
        for block in recomputed(model, attachment(model).plan):
            func = block._gradient_checkpointing_func.func
            block._gradient_checkpointing_func = lambda *a, f=func: f(*a, use_reentrant=False, preserve_rng_state=False)
        again, _ = gradients(model)
    assert not all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputing_keeps_less_and_the_estimate_knows(recipe):
    model = attached("bert", recipe)
    before = kept(model)
    with recomputing(model):
        assert kept(model) < before
    costs = [sm.plan(h.bert(0.1), recipe, batch_size=8, length=32, recompute=on).costs for on in (False, True)]
    assert costs[1]["activation_bytes"] < costs[0]["activation_bytes"]
    if recipe == "LN(layers='top:1')":  # the one block is whole in the backward pass, with and without
        assert costs[1]["peak_bytes"] <= costs[0]["peak_bytes"]
    else:
        assert costs[1]["peak_bytes"] < costs[0]["peak_bytes"]
    assert costs[1]["training_flops_per_token"] > costs[0]["training_flops_per_token"]


def test_blocks_below_the_lowest_edit_run_once():
    model = attached("bert", "LN(layers='top:1')")
    lower, upper = model.bert.encoder.layer
    inner = [block.intermediate.dense for block in (lower, upper)]
    assert [runs(m, model) for m in inner] == [1, 1]
    with recomputing(model):
        assert [runs(m, model) for m in inner] == [1, 2]
    model = attached("bert", "Head()")
    assert recomputed(model, attachment(model).plan) == []


def test_subsets_and_low_precision_masters_are_recomputed_too():
    model = h.bert(0.1).to(torch.bfloat16)
    sm.attach(model, sm.LN() + sm.LoRA(rank=2) | sm.Select("magnitude", keep=0.5))
    modes(model)
    plain, _ = gradients(model)
    with recomputing(model):
        again, _ = gradients(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_model_is_as_before_on_exit(kind):
    model = attached(kind, "LN()")
    blocks = recomputed(model, attachment(model).plan)
    blocks[0].gradient_checkpointing = False  # set by someone else, on the instance
    before, config = [dict(block.__dict__) for block in blocks], copy.deepcopy(model.config.to_dict())
    with pytest.raises(KeyError), recomputing(model):
        assert all(block.gradient_checkpointing for block in blocks)
        raise KeyError
    assert [dict(block.__dict__) for block in blocks] == before
    assert model.config.to_dict() == config
    plain = kept(model)
    with recomputing(model):
        pass
    assert kept(model) == plain


def test_nothing_is_kept_alive_after_a_step():
    model = attached("bert", "IA3()")
    with recomputing(model):
        output = model(**h.ids(), labels=torch.tensor([0, 1, 1]))
        output.loss.backward()
        graph = weakref.ref(output.logits)
        del output
    gc.collect()
    assert graph() is None


def test_models_that_cannot_be_recomputed_say_so():
    albert = h.build("albert")
    sm.attach(albert, "LN()")
    with pytest.raises(TrainError, match=r"AlbertLayer.*cannot be recomputed"), recomputing(albert):
        pass
    with pytest.raises(TrainError, match="cannot be recomputed"):
        sm.plan(h.build("albert"), "LN()", recompute=True)
    bare = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    sm.attach(bare, "LN()")
    with pytest.raises(TrainError, match="no stack of blocks"), recomputing(bare):
        pass
    with pytest.raises(sm.SmidgenError, match="nothing is attached"), recomputing(h.bert()):
        pass


# --- what fits ---


def peak(batch_size, **options):
    return sm.plan(h.bert(0.1), "LN()", batch_size=batch_size, length=16, **options).costs["peak_bytes"]


def test_the_largest_batch_is_the_first_that_fits():
    shape = {"batch_size": 24, "length": 16}
    for size, smaller in ((24, 12), (12, 6), (3, 1)):
        assert largest_batch(h.bert(0.1), "LN()", peak(size), **shape) == size
        assert largest_batch(h.bert(0.1), "LN()", peak(size) - 1, **shape) == smaller
    assert largest_batch(h.bert(0.1), "LN()", peak(6, recompute=True), **shape, recompute=True) == 6


def test_one_example_that_does_not_fit_is_one_clear_line():
    need = peak(1)
    with pytest.raises(TrainError) as caught:
        largest_batch(h.bert(0.1), "LN()", need - 1, batch_size=4, length=16)
    text = str(caught.value)
    for part in (f"{need:,} bytes", f"{need - 1:,}", "16 tokens", "max_length", "recompute", "layers", "bfloat16"):
        assert part in text
    assert "\n" not in text
    with pytest.raises(TrainError) as caught:
        largest_batch(h.bert(0.1), "LN()", 1, batch_size=4, length=16, recompute=True)
    assert "recompute" not in str(caught.value)


def test_a_model_without_an_estimate_has_no_largest_batch():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(TrainError, match="memory of Odd cannot be estimated"):
        largest_batch(Odd(), "LN()", 10**9, batch_size=4, length=16)
    with pytest.raises(TrainError, match="at least 1"):
        largest_batch(h.bert(), "LN()", 10**9, batch_size=0, length=16)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), ("2KB", 2000), ("4GiB", 2**32), ("512MiB", 2**29),
        ("3KiB", 3072), ("4gb", 4 * 10**9), (" 4096 ", 4096), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "4", "four GB", "4TBB", "-4GB", "0GB", "infGB", "nanGB", "4 G B", 0, -1])
def test_what_is_no_size_is_an_error(text):
    if text == "4":
        assert parse_bytes(text) == 4
        return
    with pytest.raises(TrainError, match="no size of memory"):
        parse_bytes(text)
