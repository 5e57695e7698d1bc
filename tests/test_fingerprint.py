"""The base is read once for each content, and no write to it goes unseen; files from before load and compare."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import DeltaError, TrainError
from smidgen.delta import content_hash, fingerprint
from smidgen.delta.fingerprint import SHA256, Fingerprint
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_held import built

OLD = Path(__file__).parent / "data" / "format_1"
NAME = "bert.encoder.layer.0.output.dense.weight"


def exact(model):
    """A model whose values are the same everywhere: multiples of 1/64, exact in any dtype."""
    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for i, (_, tensor) in enumerate(named):
            values = (torch.arange(tensor.numel()) * 7 + i) % 61 - 30
            tensor.copy_((values / 64 if tensor.is_floating_point() else values + 30).view(tensor.shape))
    for _, buffer in model.named_buffers():
        buffer.abs_()  # a variance
    return model


@pytest.fixture
def read(monkeypatch):
    """Sizes of what is hashed in full, in order."""
    sizes = []
    whole = content_hash.tensor_bytes

    def counted(tensor, dtype):
        sizes.append(tensor.numel())
        return whole(tensor, dtype)

    for module in (content_hash, fingerprint):
        monkeypatch.setattr(module, "tensor_bytes", counted)
    return sizes


def base_size(model):
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))


def test_a_base_is_read_once(read):
    model = h.bert()
    first = Fingerprint.of(model, ())
    assert sum(read) == sum(p.numel() for p in model.parameters())
    read.clear()
    with sm.attached(model, "LN() + LoRA(rank=2)"):
        assert Fingerprint.of(model, ()) == first
    assert Fingerprint.of(model, ()) == first
    assert not read
    half = Fingerprint.of(model, (), torch.bfloat16)
    assert half.content != first.content
    assert sum(read) == sum(p.numel() for p in model.parameters()), "in another dtype, it is read again, once"
    read.clear()
    assert Fingerprint.of(model, (), torch.bfloat16) == half
    assert Fingerprint.of(h.twin(model), ()) == first
    assert sum(read) == sum(p.numel() for p in model.parameters()), "a copy is another object"


def wide():
    """A BERT with matrices larger than the sample of their values."""
    model = T.BertForSequenceClassification(T.BertConfig(**{**h.BASE, "intermediate_size": content_hash.SAMPLE})).eval()
    shake(model.parameters(), 0.3)
    return model


def assigned(model, weight):
    with torch.no_grad():
        weight[3, 1] += 1


def swapped(model, weight):
    weight.data = weight.data.clone()  # the same values elsewhere: read, and found to be the same
    weight.data = weight.data + 1


def loaded(model, weight):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


def loaded_by_assignment(model, weight):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()}, assign=True)


def stepped(model, weight, **options):
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, **options)
    model(**h.ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    adam.step()
    model.zero_grad(set_to_none=True)


def stepped_one_value(model, weight):
    """A fused kernel, which does not count its writes, moves one value that is not in the sample."""
    weight.grad = torch.zeros_like(weight)
    weight.grad.view(-1)[1] = 1.0
    torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0, fused=True).step()
    weight.grad = None


def resized(model, weight):
    model.resize_token_embeddings(model.config.vocab_size + 3)


def resized_in_place(model, weight):
    weight.data = weight.data[:-1]  # the same storage from the same address on


def cast_there_and_back(model, weight):
    model.half().float()


def through_data(model, weight):
    weight.data.mul_(1.5)


def through_data_of_a_vector(model, weight):
    model.bert.encoder.layer[0].output.LayerNorm.weight.data[5] += 1


def through_numpy(model, weight):
    weight.detach().numpy()[:] += 1


def transposed(model, weight):
    weight.data = weight.data.t().contiguous().t()  # the same values in another order of memory
    weight.data[:] = weight.data.flip(0)


def replaced(model, weight):
    model.bert.encoder.layer[0].output.dense.weight = torch.nn.Parameter(weight.detach() * 2)


def replaced_values_at_one_address(model, weight):
    """What was freed is given out again, so neither the address nor the count of writes tells."""
    for _ in range(3):
        weight.data = weight.data + 1


CHANGES = [
    assigned, swapped, loaded, loaded_by_assignment, stepped, stepped_one_value, resized, resized_in_place,
    cast_there_and_back, through_data, through_data_of_a_vector, through_numpy, transposed, replaced,
    replaced_values_at_one_address,
]  # fmt: skip


def fresh(model):
    content_hash.forget(model.parameters())
    return Fingerprint.of(model, ())


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_goes_unseen(change):
    model = wide()
    before = Fingerprint.of(model, ())
    assert Fingerprint.of(model, ()) == before
    change(model, model.get_parameter(NAME))
    after = Fingerprint.of(model, ())
    assert (after.content, after.structure) != (before.content, before.structure)
    assert after == fresh(model)


def test_a_fused_step_of_any_kind_is_seen():
    model = wide()
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        before = Fingerprint.of(model, ())
        stepped(model, None, **options)
        assert Fingerprint.of(model, ()) == fresh(model) != before, options


def test_without_the_hook_and_the_sample_changes_would_be_missed(monkeypatch):
    """What the checks above are worth: the count of writes alone sees none of these."""
    monkeypatch.setattr(content_hash, "_samples", lambda tensors: dict.fromkeys(tensors, 0))
    monkeypatch.setattr(content_hash, "forget", lambda tensors: None)
    for change in (stepped_one_value, through_data, through_data_of_a_vector, through_numpy):
        model = wide()
        before = Fingerprint.of(model, ())
        change(model, model.get_parameter(NAME))
        assert Fingerprint.of(model, ()) == before, change


def test_weights_of_inference_mode_are_read_each_time(read):
    with torch.inference_mode():
        model = h.bert()
    first = Fingerprint.of(model, ())
    read.clear()
    assert Fingerprint.of(model, ()) == first
    assert sum(read) == sum(p.numel() for p in model.parameters())


def test_fit_reads_the_base_once(read, tmp_path):
    model = h.bert()
    options = {"tokenizer": h.tokenizer(), "epochs": 1, "progress": False}
    sm.fit(model, "LN() | Select('fisher', keep=0.5)", h.task(tmp_path / "data"), out=tmp_path / "run", **options)
    assert sum(read) == base_size(model)


def test_the_thousand_and_first_delta_reads_nothing_and_compiles_nothing_anew(read, monkeypatch):
    model = h.bert()
    sm.attach(model, "LN()")
    delta = sm.detach(model)
    deltas, resets = sm.Deltas(model), []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    deltas["first"] = delta
    assert not resets, "nothing ran while it was tried"
    read.clear()
    deltas.use("first")
    resets.clear()
    for i in range(5):
        shaken = {name: tensor + i for name, tensor in delta.tensors.items()}
        deltas[f"more {i}"] = replace(delta, tensors=shaken)
        assert deltas.active == "first"
    assert not read
    assert not resets
    deltas.use("more 3")
    assert torch.equal(trained_parameters(model)["classifier.bias"], delta.tensors["classifier.bias"] + 3)
    deltas.use(None)


def test_a_delta_put_in_beside_one_of_its_kind_is_checked_as_the_first_was():
    model = h.bert()
    delta = sm.detach(sm.attach(model, "LN()"))
    deltas = sm.Deltas(model)
    deltas["first"] = delta
    name = next(iter(delta.tensors))
    broken = {**delta.tensors, name: delta.tensors[name] * float("nan")}
    with pytest.raises(DeltaError, match="not finite"):
        deltas["broken"] = replace(delta, tensors=broken)
    with pytest.raises(DeltaError, match="other values"):
        deltas["other"] = replace(delta, base=replace(delta.base, content="0" * 32))
    short = {**delta.tensors, name: delta.tensors[name][:-1]}
    with pytest.raises(DeltaError, match="has shape"):
        deltas["short"] = replace(delta, tensors=short)
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] += 1
    with pytest.raises(DeltaError, match="other values"):
        deltas["late"] = delta
    assert list(deltas) == ["first"]


# Files from before

OLD_FILES = {
    "ln": lambda: exact(h.bert()),
    "lora-part": lambda: exact(h.bert()),
    "buffers": lambda: exact(built("levit")),
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_from_before_load_and_compare(name, read):
    delta, model = sm.Delta.load(OLD / name), OLD_FILES[name]()
    assert delta.base.algorithm == SHA256
    assert "algorithm" not in delta.to_json()["base"], "what was read is written as it was"
    with sm.attached(model, delta):
        pass
    assert read
    read.clear()
    with sm.attached(model, delta):
        pass
    assert not read, "SHA-256 is taken once for each content, too"
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(DeltaError, match="same shapes but other values"):
        sm.attach(model, delta)


def test_a_file_from_before_sees_buffers():
    delta, model = sm.Delta.load(OLD / "buffers"), exact(built("levit"))
    assert delta.base.buffers
    next(b for _, b in model.named_buffers() if b.is_floating_point()).add_(1)
    with pytest.raises(DeltaError, match="other buffers"):
        sm.attach(model, delta)


def test_the_old_digest_is_that_of_the_bytes_in_order():
    model = exact(h.bert())
    wanted = sha256()
    for name, p in sorted(model.named_parameters()):
        if not name.startswith("classifier"):
            wanted.update(p.detach().numpy().tobytes())
    delta = sm.Delta.load(OLD / "ln")
    assert wanted.hexdigest()[:32] == delta.base.content
    assert Fingerprint.of(model, delta.head, algorithm=SHA256) == delta.base


def test_old_and_new_deltas_add_up():
    model, old = exact(h.bert()), sm.Delta.load(OLD / "ln")
    sm.attach(model, "LN()")
    shake(trained_parameters(model).values(), 0.3)
    new = sm.detach(model)
    assert new.base.algorithm != old.base.algorithm
    both = (old + new).on(model)
    name = next(n for n in new.tensors if n not in new.head)
    start = model.get_parameter(name)
    torch.testing.assert_close(both.tensors[name], old.tensors[name] + new.tensors[name] - start)
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] += 1
    for pair in (old + new, new + old):
        with pytest.raises(DeltaError, match="other values"):
            pair.on(model)


def test_a_digest_of_an_unknown_kind_is_refused(tmp_path):
    folder = sm.Delta.load(OLD / "ln").save(tmp_path / "delta")
    meta = json.loads((folder / "delta.json").read_text())
    meta["base"]["algorithm"] = "md5"
    (folder / "delta.json").write_text(json.dumps(meta))
    with pytest.raises(DeltaError, match="'md5'; known are xxh3_128 and sha256"):
        sm.Delta.load(folder)


def older(file, model, head):
    """A record as it was written when SHA-256 told the base's content."""
    record = json.loads(file.read_text())
    assert record["asked"].pop("base_hash") == "xxh3_128"
    record["asked"]["base"] = Fingerprint.of(model, head, algorithm=SHA256).content
    file.write_text(json.dumps(record))


def test_runs_from_before_go_on(tmp_path):
    model, task = h.bert(), h.task(tmp_path / "data")
    head = ("classifier.weight", "classifier.bias")
    options = {"tokenizer": h.tokenizer(), "epochs": 1, "progress": False}
    found = sm.fit(model, "LN()", task, out=tmp_path / "run", **options)
    older(tmp_path / "run" / "run.json", model, head)
    h.same(sm.fit(model, "LN()", task, out=tmp_path / "run", **options), found)
    with pytest.raises(TrainError, match="seed of settings was 0, now 1"):
        sm.fit(model, "LN()", task, out=tmp_path / "run", seed=1, **options)
    search = {"lr": (1e-3,), "seeds": (0,), "out": tmp_path / "search", **options}
    sm.search(model, "LN()", task, **search)
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] += 1
    with pytest.raises(TrainError, match="base was"):
        sm.fit(model, "LN()", task, out=tmp_path / "run", **options)
    with pytest.raises(TrainError, match="base was"):
        sm.search(model, "LN()", task, **search)
