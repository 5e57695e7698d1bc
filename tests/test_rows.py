"""Mixed batches: each row has what its own delta alone gives, or the recipe is refused by name."""

import re

import pytest
import torch
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.by_row import in_place_terms, mixture
from smidgen.ports.forward_state import state
from smidgen.testing.cases import shake
from tests import helpers as h

MODELS = {"bert": h.bert, "llama": h.causal, "gpt2": lambda: h.causal("gpt2"), "t5": lambda: h.causal("t5")}
MIXED = [
    "LN()",
    "LN(which='attention')",
    "LoRA(rank=2)",
    "LoRA(rank=2, target='linear') + LN()",
    "IA3()",
    "SSF()",
    "Adapter(width=2)",
    "Adapter(width=2, form='parallel')",
    "Prefix(length=3)",
    "PromptTuning(length=3)",
    "LoFiT()",
    "Head()",
    "LN() + LoRA(rank=2) + IA3() + Prefix(length=2) + PromptTuning(length=2) + Adapter(width=2)",
]
REFUSED = {
    "Full()": "trained in place",
    "DoRA(rank=2)": "reads the weight|more than its trained tensors",
    "MoS(rank=2)": "share tensors",
    "PiSSA(rank=2)": "more than its trained tensors",
    "LN() | Select('magnitude', keep=0.5)": "parts of tensors",
    "LoRA(rank=2) | Select('magnitude', keep=0.5)": "indices",
    "Prefix(length=2, mlp=4)": "saved as another method",
}


def several(model, recipe, count=3):
    deltas = []
    for seed in range(count):
        sm.attach(model, recipe)
        shake(trained_parameters(model).values(), 0.3, seed=seed)
        deltas.append(sm.detach(model))
    return deltas


def inputs(model, rows):
    batch = h.ids(rows=rows)
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = h.ids(rows=rows, mask=False)["input_ids"]
    return batch


def differences(model, deltas, index):
    """The largest difference of each row of a mixed batch from what its delta gives alone, padding left out."""
    batch, alone = inputs(model, len(index)), []
    for row, which in enumerate(index):
        with sm.attached(model, deltas[which]), torch.no_grad():
            alone.append(model(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0])
    with sm.attached_rows(model, deltas), sm.rows_from(index), torch.no_grad():
        mixed = model(**batch).logits
    text = batch["attention_mask"].bool() if mixed.ndim == 3 and "decoder_input_ids" not in batch else slice(None)
    return float((mixed - torch.stack(alone))[text].abs().max()), float((mixed[0] - mixed[-1]).abs().max())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("recipe", MIXED)
def test_each_row_has_its_own(recipe, name):
    if recipe == "Head()" and name != "bert":
        pytest.skip("a causal LM has no head to train")
    model = MODELS[name]().double()
    with h.untouched(model):
        apart, between = differences(model, several(model, recipe), [2, 0, 1, 1])
    assert apart < 1e-11
    assert between > 1e-6


@pytest.mark.parametrize("recipe", ["LN()", "LN() + LoRA(rank=2) + Prefix(length=2)"])
def test_in_float32(recipe):
    model = h.bert()
    assert differences(model, several(model, recipe), [1, 2, 0])[0] < 1e-5


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_has_no_form_by_row_is_refused_by_name(recipe):
    model = h.bert()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.1)
    if "mlp" in recipe:  # what it is saved as can be mixed; what is trained cannot
        plan = attachment(model).plan
        sm.detach(model)
        assert any(re.search(REFUSED[recipe], why) for why in mixture.why_no_rows(model, plan).values())
        return
    delta = sm.detach(model)
    with (
        h.untouched(model),
        pytest.raises(AttachError, match=f"cannot have different results .*({REFUSED[recipe]})"),
        sm.attached_rows(model, [delta, delta]),
    ):
        pass


def test_deltas_that_are_not_alike():
    model = h.bert()
    (one,), (other,) = several(model, "LN()", 1), several(model, "LoRA(rank=2)", 1)
    (wide,) = several(model, "LoRA(rank=2, layers=0)", 1)
    for found, said in (([one, other], "delta 1 is of LoRA"), ([other, wide], "delta 1 is of"), ([], "no delta")):
        with pytest.raises(DeltaError, match=said), sm.attached_rows(model, found):
            pass


def test_nothing_else_is_attached_meanwhile():
    model = h.bert()
    deltas = several(model, "LN()")
    with sm.attached_rows(model, deltas), pytest.raises(AttachError, match="leave the block"):
        sm.attach(model, "LN()")
    sm.attach(model, "LN()")
    with pytest.raises(AttachError, match="attached already"), sm.attached_rows(model, deltas):
        pass


def test_rows_have_to_be_said_and_counted():
    model = h.bert()
    deltas = several(model, "LoRA(rank=2)")
    with sm.attached_rows(model, deltas):
        with pytest.raises(AttachError, match="say which one each row has"):
            model(**h.ids())
        with pytest.raises(AttachError, match="in a mixed batch of 2 rows"), sm.rows_from([0, 1]):
            model(**h.ids(rows=3))


def test_two_threads_have_rows_of_their_own():
    import threading

    model, batch = h.bert(), h.ids(rows=3)
    deltas, found = several(model, "LN() + LoRA(rank=2)"), {}
    with sm.attached_rows(model, deltas):

        def work(index):
            for _ in range(5):
                with sm.rows_from(index), torch.no_grad():
                    found.setdefault(index, []).append(model(**batch).logits)

        threads = [threading.Thread(target=work, args=(index,)) for index in ((0, 1, 2), (2, 1, 0), (1, 1, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, several_times in found.items():
            with sm.rows_from(index), torch.no_grad():
                wanted = model(**batch).logits
            assert all(torch.equal(wanted, one) for one in several_times)
    assert len(found) == 3


def first_head_for_all(path, module, args, output):
    heads = state().mixed().heads
    return nn.functional.linear(args[0], heads[f"{path}.weight"][0], heads[f"{path}.bias"][0])


BROKEN = {
    "gain left out": (in_place_terms, "terms_by_row", lambda terms, module, args, output: output),
    "first head for all": (mixture, "head_by_row", first_head_for_all),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_row_would_be_seen(name, monkeypatch):
    model = h.bert().double()
    deltas = several(model, "LN()")
    monkeypatch.setattr(*BROKEN[name])
    assert differences(model, deltas, [2, 0, 1])[0] > 1e-6
