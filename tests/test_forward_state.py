"""The state of one pass: its own in each thread and in each pass inside of another, gone when the pass is over."""

import gc
import sys
import threading
import weakref

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError
from smidgen.ports import forward_state
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.forward_state import state
from tests import helpers as h

RECIPES = [
    "LN()",
    "LoRA(rank=2) + IA3()",
    "Adapter(form='parallel', width=2)",
    "PromptTuning(length=3)",
    "Prefix(length=2)",
    "LN() | Select('magnitude', keep=0.5)",
    "LoRA(rank=2) + PromptTuning(length=2) + Adapter(form='parallel', width=2)",
]


def shaken(recipe, model=None):
    model = sm.attach(model or h.bert(), recipe).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batches(count=8):
    return [h.ids(rows=2 + i % 3, length=4 + i) for i in range(count)]


def outputs_in_threads(model, given, rounds=6):
    """What each thread gets for its own batch, several times at once; errors are handed on."""
    found, errors, barrier = [[] for _ in given], [], threading.Barrier(len(given))

    def work(place, batch):
        try:
            barrier.wait()
            for _ in range(rounds):
                with torch.no_grad():
                    found[place].append(model(**batch).logits)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(given)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places within a hook
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return found, errors


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_on_one_model_give_what_one_gives(recipe):
    model, given = shaken(recipe), batches()
    with torch.no_grad():
        alone = [model(**batch).logits for batch in given]
    found, errors = outputs_in_threads(model, given)
    assert not errors
    for one, several in zip(alone, found, strict=True):
        assert all(torch.equal(one, other) for other in several)


def test_threads_in_low_precision_give_what_one_gives():
    model, given = shaken("Full()", h.bert().to(torch.bfloat16)), batches()
    with torch.no_grad():
        alone = [model(**batch).logits for batch in given]
    found, errors = outputs_in_threads(model, given)
    assert not errors
    assert all(torch.equal(one, other) for one, several in zip(alone, found, strict=True) for other in several)


def test_one_state_for_all_threads_would_be_seen(monkeypatch):
    class Shared:
        current = None

    monkeypatch.setattr(forward_state, "_THREAD", Shared())
    model, given = shaken("LoRA(rank=2) + PromptTuning(length=3)"), batches()
    with torch.no_grad():
        alone = [model(**batch).logits for batch in given]
    found, errors = outputs_in_threads(model, given, rounds=30)
    same = all(torch.equal(one, other) for one, several in zip(alone, found, strict=True) for other in several)
    assert errors or not same


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pass_inside_of_another(recipe):
    """Of the same model, from a hook of one of its blocks."""
    model = shaken(recipe)
    outer, inner = h.ids(rows=2, length=7), h.ids(rows=3, length=5)
    with torch.no_grad():
        alone = model(**outer).logits, model(**inner).logits
        seen = []

        def again(module, args, output):
            if not seen:
                seen.append(None)
                seen[0] = model(**inner).logits

        handle = model.bert.encoder.layer[0].attention.register_forward_hook(again)
        found = model(**outer).logits
        handle.remove()
    assert torch.equal(seen[0], alone[1])
    assert torch.equal(found, alone[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_of_a_pass_is_left(recipe):
    model = shaken(recipe)
    entered = []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda m, a, o: entered.append(weakref.ref(a[0])))
    model(**h.ids()).logits.sum().backward()
    handle.remove()
    gc.collect()
    assert entered[0]() is None, "a pass that is over keeps its tensors"
    assert state().owner is None


def test_a_pass_that_fails_leaves_nothing():
    model, batch = shaken("PromptTuning(length=3)"), h.ids()
    with pytest.raises(AttachError, match="needs an attention mask"):
        model(batch["input_ids"], attention_mask=torch.ones(len(batch["input_ids"]), 1, 4, 4))
    assert state().owner is None
    assert not state().prompts


def test_a_part_that_is_called_by_itself():
    model = shaken("LoRA(rank=2) + Adapter(form='parallel', width=2)")
    with torch.no_grad():
        whole = model(h.ids()["input_ids"], output_hidden_states=True).hidden_states
        block = model.bert.encoder.layer[1](whole[1])
    block = block[0] if isinstance(block, tuple) else block
    assert torch.allclose(block, whole[2], atol=1e-5)
    assert not state().inputs
    assert not any(state().taps.values())


@pytest.mark.parametrize("recipe", ["IA3()", "Adapter(form='parallel', width=2)", "LoRA(rank=2)"])
def test_what_recomputation_leaves_goes_with_the_backward_pass(recipe, monkeypatch):
    """Checkpointing stops in the middle of a block, once it has what it needs."""
    model, left = shaken(recipe, h.causal()).train(), []
    model.activation_checkpointing_enable()
    forget = forward_state.ForwardState.forget

    def seen(found):
        left.append(len(found.inputs) + sum(map(len, found.taps.values())))
        forget(found)

    monkeypatch.setattr(forward_state.ForwardState, "forget", seen)
    for _ in range(2):
        model(**h.ids()).logits.sum().backward()
        assert not state().inputs
        assert not any(state().taps.values())
    assert len(left) == 2
    assert any(left) or "IA3" not in recipe
