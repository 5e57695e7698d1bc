"""fit with what lies below the lowest edit computed once: the same result, less work."""

import json
import sys

import pytest
import torch

import smidgen as sm
from smidgen.common.devices import carried
from smidgen.common.errors import TrainError
from tests import helpers as h

OPTIONS = {"epochs": 3, "batch_size": 8, "progress": False, "max_length": 16, "lr": 1e-2}
TOP = "LN(layers='top:1')"


@pytest.fixture
def task(tmp_path):
    return h.task(tmp_path / "data")


def fitted(task, recipe=TOP, model=None, **more):
    return sm.fit(model or h.bert(dropout=0.2), recipe, task, tokenizer=h.tokenizer(), **{**OPTIONS, **more})


def chosen(folder):
    return json.loads((folder / "run.json").read_text())["chosen"]["cache"]


@pytest.mark.parametrize(
    "recipe", [TOP, "LoRA(layers='top:1', rank=2)", "Head()", f"{TOP} | Select('fisher', keep=0.5)"]
)
@pytest.mark.parametrize("more", [{}, {"batching": "length"}, {"pooling": "mean"}], ids=str)
def test_the_same_delta_with_and_without(task, recipe, more, tmp_path):
    """Dropout is on above the cut, and draws the same in both."""
    kept = fitted(task, recipe, out=tmp_path / "run", **more)
    plain = fitted(task, recipe, cache=False, **more)
    assert kept.tensors.keys() == plain.tensors.keys()
    for name, tensor in kept.tensors.items():
        torch.testing.assert_close(tensor, plain.tensors[name], rtol=1e-4, atol=1e-5)
    assert kept.info["scores"] == plain.info["scores"]
    assert chosen(tmp_path / "run") == "on"


def test_lower_blocks_run_once_per_example(task):
    calls = []
    model = h.bert()
    inner = model.bert.encoder.layer[0].attention.self.query
    handle = inner.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    fitted(task, model=model, epochs=8)
    once = sum(calls)
    calls.clear()
    fitted(task, model=model, epochs=8, cache=False)
    handle.remove()
    assert once < 0.4 * sum(calls)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cache": False}, "off"),
        ({"epochs": 1}, "one epoch has nothing to gain"),
        ({"recipe": "LN()"}, "embedding"),
        ({"cache_bytes": 100}, "100"),
    ],
)
def test_where_it_does_not_pay_or_cannot_be_the_run_goes_on_and_says_so(task, tmp_path, more, said):
    fitted(task, out=tmp_path / "run", **more)
    assert said in chosen(tmp_path / "run")


def test_insisting_is_an_error_where_it_cannot_be(task):
    with pytest.raises(TrainError, match="cache=True, but .*embedding") as error:
        fitted(task, "LN()", cache=True)
    assert "\n" not in str(error.value)
    model = h.bert()
    with h.untouched(model), pytest.raises(TrainError, match="cache=True"):
        fitted(task, "LN()", model, cache=True)


def test_beyond_the_limit_it_lies_in_a_file_of_the_run_until_its_end(task, tmp_path, monkeypatch):
    seen, run = [], sys.modules["smidgen.inference.forward_pass"].run_examples

    def spied(*args):
        seen.extend((tmp_path / "run").glob("prefix-*.states"))
        return run(*args)

    monkeypatch.setattr("smidgen.training.run.loop.run_examples", spied)
    kept = fitted(task, cache=True, cache_bytes=100, out=tmp_path / "run")
    assert len(set(seen)) == 2
    assert not list((tmp_path / "run").glob("prefix-*"))
    h.same(kept, fitted(task, cache=True))


def test_a_resumed_run_does_as_at_its_first_start(task, tmp_path, monkeypatch):
    whole = fitted(task, out=tmp_path / "whole", checkpoint_steps=1)

    class StopError(Exception):
        pass

    seen = []

    def stopping(self, *args):
        seen.append(1)
        if len(seen) == 6:
            raise StopError
        return original(self, *args)

    loop = __import__("smidgen.training.run.loop", fromlist=["Loop"]).Loop
    original = loop._step
    monkeypatch.setattr(loop, "_step", stopping)
    with pytest.raises(StopError):
        fitted(task, out=tmp_path / "run", checkpoint_steps=1)
    monkeypatch.setattr(loop, "_step", original)
    assert chosen(tmp_path / "run") == "on"
    h.same(whole, fitted(task, out=tmp_path / "run", checkpoint_steps=1))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["chosen"]["cache"] = "some reason"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for name in ("delta.json", "delta.safetensors"):
        (tmp_path / "run" / name).unlink()
    monkeypatch.setattr(
        "smidgen.training.run.prefix_cache_policy.PrefixCache.fill", lambda *args, **kwargs: pytest.fail("filled")
    )
    fitted(task, out=tmp_path / "run", checkpoint_steps=1)


class Remembers:
    """Stands in for a tensor, as no GPU may be at hand."""

    def __init__(self, kind="cpu", calls=()):
        self.device, self.calls = torch.device(kind), calls

    def pin_memory(self):
        return Remembers(calls=(*self.calls, "pinned"))

    def to(self, device, **options):
        return Remembers(device.type, (*self.calls, device.type, options))


def test_what_goes_to_a_gpu_goes_through_pinned_memory_and_nobody_waits():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert carried(Remembers(), gpu).calls == ("pinned", "cuda", {"non_blocking": True})
    assert carried(Remembers(), cpu).calls == ("cpu", {})
    assert carried(Remembers("cuda"), gpu).calls == ("cuda", {})
    x = torch.ones(2)
    assert carried(x, cpu) is x
