"""The frozen-prefix cache: same numbers, nothing computed below the cut, nothing left behind, and what is refused."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as T
from torch.utils._python_dispatch import TorchDispatchMode

from smidgen.common.errors import TrainError
from smidgen.delta.attaching import attach, remove
from smidgen.efficiency.prefix_cache import cache as module
from smidgen.efficiency.prefix_cache import storage as store
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.cache_key import key
from smidgen.efficiency.prefix_cache.cut_point import cut_of, why_not
from smidgen.efficiency.prefix_cache.recorded_pass import in_eval_mode, states_at
from smidgen.efficiency.prefix_cache.within_block import frozen_within_block, inner_cut
from smidgen.ports.attachment_record import attachment, trained_parameters
from tests import helpers as h

TOP = ("LN(layers='top:1')", "LoRA(rank=2, layers='top:1')", "Head()")
LENGTHS = (5, 7, 3, 8, 6, 4, 7, 2, 5, 8)


def build(kind="bert", dtype=torch.float32, cls="AutoModelForSequenceClassification", **options):
    config = h.CONFIGS[kind](**options)
    config.num_hidden_layers = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(T, cls).from_config(config).eval().to(dtype)
    h.shake(model.parameters(), 0.3)
    return model


def examples(seed=0, lengths=LENGTHS):
    drawn = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, len(h.WORDS), (n,), generator=drawn).tolist() for n in lengths]
    return [{"input_ids": t, "attention_mask": [1] * len(t), "labels": i % 2} for i, t in enumerate(tokens)]


def collate(rows, left=False, mask=True):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values):
        empty = [0] * (longest - len(values))
        return [*empty, *values] if left else [*values, *empty]

    names = ("input_ids", "attention_mask") if mask else ("input_ids",)
    batch = {name: torch.tensor([pad(row[name]) for row in rows]) for name in names}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def left(rows):
    return collate(rows, left=True)


def filled(model, recipe=TOP[0], rows=None, pad=collate, pooling=None, **options):
    attach(model, recipe, pooling=pooling)
    cache = PrefixCache.of(model, attachment(model).plan)
    cache.fill(rows or examples(), pad, **{"batch_size": 3, **options})
    return cache


def gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in trained_parameters(model).items()}


def both(model, cache, places, pad=collate, rows=None):
    """Logits and gradients without and with the cache."""
    batch = pad([(rows or examples())[i] for i in places])
    plain = gradients(model, batch)
    with cache.feeding(cache.batch(places, batch["input_ids"].shape[1])):
        return plain, gradients(model, batch)


def close(plain, fed, off):
    assert torch.allclose(plain[0], fed[0], rtol=off, atol=off)
    for name, gradient in plain[1].items():
        assert torch.allclose(gradient, fed[1][name], rtol=off, atol=off), name


@contextmanager
def counted(modules):
    """How often each module is called."""
    calls = [0] * len(modules)

    def count(i):
        return lambda *_: calls.__setitem__(i, calls[i] + 1)

    handles = [found.register_forward_pre_hook(count(i)) for i, found in enumerate(modules)]
    yield calls
    for handle in handles:
        handle.remove()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# The same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("recipe", TOP)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2", "llama", "deberta-v2"])
def test_same_logits_and_gradients(kind, recipe, pooling, dtype):
    model = build(kind, dtype)
    cache = filled(model, recipe, pooling=pooling)
    off = 1e-12 if dtype == torch.float64 else 1e-5
    close(*both(model, cache, [3, 1, 2]), off)
    close(*both(model, cache, [7]), off)
    assert cache.batch([3], 8).dtype == dtype


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama"])
def test_bit_equal_in_the_same_batch(kind):
    model = build(kind)
    cache = filled(model, TOP[1], pooling="mean", batch_size=len(LENGTHS))
    plain, fed = both(model, cache, sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i]))
    assert torch.equal(plain[0], fed[0])
    h.same(plain[1], fed[1])


@pytest.mark.parametrize("recipe", TOP)
def test_left_padding(recipe):
    model = build("llama", torch.float64)
    cache = filled(model, recipe, pad=left)
    close(*both(model, cache, [3, 1, 2], left), 1e-6)  # rotary angles are float32 in any model
    assert not cache.batch([2], 8)[0, :5].any()
    assert cache.batch([2], 8)[0, 5:].any()


def causal(pad, skip):
    """A collator with the tokens as labels, the first ones of each example left out."""

    def padded(rows):
        batch = pad(rows)
        labelled = batch["attention_mask"].bool() & (batch["attention_mask"].cumsum(1) > skip)
        return {**batch, "labels": torch.where(labelled, batch["input_ids"], -100)}

    return padded


@pytest.mark.parametrize(("side", "skip"), [(collate, 0), (collate, 1), (left, 1)])
def test_causal_loss(side, skip):
    model, pad = build("llama", torch.float64, "AutoModelForCausalLM"), causal(side, skip)
    plain, fed = (gradient for _, gradient in both(model, filled(model, pad=pad), [3, 1, 2], pad))
    for name in plain:
        assert torch.allclose(plain[name], fed[name], rtol=1e-6, atol=1e-6), name


def test_a_loss_that_reads_padding_is_refused():
    with pytest.raises(TrainError, match="losses with and without the cache"):  # padding predicts the first token
        filled(build("llama", cls="AutoModelForCausalLM"), pad=causal(left, 0))


def test_without_an_attention_mask():
    model, rows = build(), examples(lengths=[6] * 8)

    def unmasked(chosen):
        return collate(chosen, mask=False)

    cache = filled(model, rows=rows, pad=unmasked)
    close(*both(model, cache, [3, 1], unmasked, rows), 1e-5)
    with pytest.raises(TrainError, match="depend on padding"):
        filled(build(), pad=unmasked)
    model = build("llama")
    close(*both(model, filled(model, pad=unmasked), [3, 1, 2], unmasked), 1e-5)


@pytest.mark.parametrize("recipe", TOP)
def test_what_stands_between_blocks_and_hooks_of_others(recipe):
    model = build("bert", torch.float64)
    for block in model.bert.encoder.layer:
        block.register_forward_hook(lambda _, args, output: 1.5 * output)
        block.register_forward_pre_hook(lambda _, args: (0.5 * args[0], *args[1:]))
    close(*both(model, filled(model, recipe), [3, 1, 2]), 1e-12)


def test_images():
    sizes = {**h.SIZES, "num_hidden_layers": 3}
    model = T.ViTForImageClassification(T.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(6)]

    def stack(chosen):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in chosen])}

    cache = filled(model, rows=rows, pad=stack)
    wanted = h.logits(model, **stack(rows[:4]))
    with counted([model.vit.embeddings.patch_embeddings]) as calls, cache.feeding(cache.batch(range(4))):
        assert torch.allclose(h.logits(model, **stack(rows[:4])), wanted, atol=1e-6)
    assert calls == [0]


def test_low_precision_states_keep_their_dtype():
    model = build("llama", torch.bfloat16)
    cache = filled(model)
    assert cache.batch([0]).dtype == torch.bfloat16
    assert cache.nbytes == sum(LENGTHS) * 16 * 2
    assert cache.examples == len(LENGTHS)
    assert cache.seconds > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_above_stays_on_and_draws_the_same(checkpointing):
    drop = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = build("bert", torch.float64, **drop)
    cache = filled(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = collate(examples()[:3])
    frozen = frozen_within_block(model, attachment(model).plan, batch)
    model.train()
    for part in frozen:
        part.eval()
    torch.manual_seed(5)
    plain = gradients(model, batch)
    other = gradients(model, batch)
    with cache.feeding(cache.batch([0, 1, 2], 7)):
        torch.manual_seed(5)
        close(plain, gradients(model, batch), 1e-12)
    assert not torch.allclose(plain[0], other[0])


# What is computed


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", TOP)
def test_nothing_is_computed_below(kind, recipe):
    model = build(kind)
    cache, cut = filled(model, recipe), cut_of(model, attachment(model).plan)
    inside = [part for block in cut.blocks for part in (next(block.children()), list(block.children())[-1])]
    below = 2 * cut.index
    batch = collate(examples()[:3])
    with counted(inside) as calls, Operations() as operations:
        model(**batch)
    assert set(calls) == {1}
    assert any("embedding" in name for name in operations.names)
    products = sum("mm" in name for name in operations.names)
    with counted(inside) as calls, Operations() as operations, cache.feeding(cache.batch([0, 1, 2])):
        model(**batch)
    assert calls == [0] * below + [1] * (len(inside) - below)
    assert not any("embedding" in name for name in operations.names)
    left_over = sum("mm" in name for name in operations.names)
    head = products - 3 * (per_block := (products - left_over) // cut.index)
    assert left_over == head + (3 - cut.index) * per_block


@pytest.mark.parametrize(
    ("kind", "recipe", "still"),
    [
        ("bert", "LN(layers='top:1')", {"attention.self", "attention.output.dense", "attention.output.dropout"}),
        ("distilbert", "LN(layers='top:2')", {"attention"}),
        ("bert", "LN('output', layers='top:1')", {"attention", "intermediate", "output.dense", "output.dropout"}),
        ("bert", "LoRA(rank=2, layers='top:1')", set()),
        ("bert", "LN(layers='top:1') + LoRA(rank=2, layers='top:1')", set()),
        ("gpt2", "LN(layers='top:1')", set()),
        ("gpt2", "LN('output', layers='top:1')", {"ln_1", "attn"}),  # what enters the norm is also added further up
        ("llama", "LN('output', layers='top:1')", {"input_layernorm", "self_attn"}),
    ],
)
def test_the_cut_lies_in_front_of_the_first_edited_module(kind, recipe, still):
    model = build(kind)
    cache = filled(model, recipe)
    paths = {module: path for path, module in cache._cut.blocks[cache._cut.index].named_modules()}
    assert {paths[module] for module in cache._cut.inner} == still
    batch = collate(examples()[:3])
    parts = [part for module in cache._cut.inner for part in list(module.modules())[1:]]
    with counted(parts) as calls, cache.feeding(cache.batch([0, 1, 2])):
        model(**batch)
    assert not any(calls)
    close(*both(model, cache, [0, 1, 2]), 1e-5)


def test_a_cut_above_a_trained_value_is_not_taken():
    """A weight in front of the site that is trained but named by no plan: what enters the site needs a gradient."""
    model = build()
    attach(model, TOP[0])
    plan, block = attachment(model).plan, model.bert.encoder.layer[2]
    cut, batch = cut_of(model, plan), collate(examples()[:2])
    assert inner_cut(cut, plan, batch).site is block.attention.output.LayerNorm
    block.attention.self.value.weight.requires_grad_(True)
    assert inner_cut(cut, plan, batch) is None


def test_autograd_records_nothing_below():
    model = build()
    cache, seen = filled(model), []
    block = model.bert.encoder.layer[2]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with cache.feeding(cache.batch([0, 1])):
        gradients(model, collate(examples()[:2]))
    handle.remove()
    assert seen[0].is_leaf
    assert not seen[0].requires_grad


@pytest.mark.parametrize("recipe", TOP)
def test_fill_stops_at_the_cut(recipe):
    model = build()
    attach(model, recipe)
    plan, done = attachment(model).plan, []
    cut, generator = cut_of(model, plan), torch.get_rng_state()
    with h.untouched(model), counted([*cut.blocks[:1], *cut.blocks[cut.index + 1 :], model.classifier]) as calls:
        PrefixCache.of(model, plan).fill(examples(), collate, batch_size=1, progress=lambda *now: done.append(now))
    # a few examples are run whole: to find the cut, without the cache, and with it before and after filling
    assert len(LENGTHS) < calls[0] <= 6 + len(LENGTHS)
    assert max(calls[1:]) <= 4
    assert done == [(i, 10) for i in range(1, 11)]
    assert torch.equal(generator, torch.get_rng_state())
    with in_eval_mode(model), counted([*cut.blocks[cut.index :], model.classifier]) as calls:
        assert states_at(cut, collate(examples()[:2])).shape == (2, 7, 16)
    assert not any(calls)


# What is left behind


@pytest.mark.parametrize("recipe", TOP)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_nothing_is_left_on_the_model(kind, recipe):
    model = build(kind).train()
    cache = filled(model, recipe)
    with h.untouched(model):
        with cache.feeding(cache.batch([0, 1])), torch.no_grad():
            model(**collate(examples()[:2]))
        with pytest.raises(ZeroDivisionError), cache.feeding(cache.batch([0])):
            raise ZeroDivisionError
    assert model.training


def test_a_forward_that_an_instance_had_comes_back():
    model = build()
    cache, block = filled(model), model.bert.encoder.layer[0]
    own = block.__dict__["forward"] = block.forward
    with cache.feeding(cache.batch([0])):
        assert block.__dict__["forward"] is not own
        with cache.feeding(cache.batch([1])):
            pass
        assert block.__dict__["forward"] is not own
    assert block.__dict__["forward"] is own


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_inside_and_outside(clone):
    model = build("gpt2")
    cache = filled(model)
    batch = collate(examples()[:3])
    wanted = h.logits(model, **batch)
    with cache.feeding(cache.batch([0, 1, 2])):
        assert torch.allclose(h.logits(clone(model), **batch), wanted, atol=1e-5)
    other = clone(model)
    with cache.feeding(cache.batch([3, 4, 5], 7 + 1)):
        assert torch.equal(h.logits(other, **batch), wanted)  # a copy is not fed
    assert torch.equal(h.logits(clone(model), **batch), wanted)


# Files


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def mapped(model, folder, rows=None):
    done = []
    options = {"limit_bytes": 10, "folder": folder, "progress": lambda *now: done.append(now)}
    cache = PrefixCache.of(model, attachment(model).plan)
    cache.fill(rows or examples(), collate, batch_size=3, **options)
    return cache, bool(done)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mapped_equals_in_memory_and_is_taken_up_again(dtype, tmp_path):
    model = build(dtype=dtype)
    cache = filled(model)
    first, computed = mapped(model, tmp_path)
    again, anew = mapped(model, tmp_path)
    assert computed
    assert not anew
    for found in (first, again):
        assert torch.equal(found.batch(range(10)), cache.batch(range(10)))
        assert found.nbytes == cache.nbytes
    assert kept(tmp_path) == [f"prefix-{key(model, attachment(model).plan, examples(), cache._cut)}.states"]
    filled(build(dtype=dtype), limit_bytes=10**6, folder=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_another_key_is_another_file(tmp_path):
    model = build()
    attach(model, TOP[0])
    mapped(model, tmp_path)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(1)
    assert not mapped(model, tmp_path)[1], "trained values are no part of the key"
    renamed = [{**row, "labels": 1} for row in examples()]
    assert not mapped(model, tmp_path, renamed)[1], "nor are labels"
    assert mapped(model, tmp_path, examples(seed=1))[1]
    assert mapped(model, tmp_path, examples()[:-1])[1]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4, 0] += 1
    assert mapped(model, tmp_path)[1]
    other = build(layer_norm_eps=1e-3)
    attach(other, TOP[0])
    assert mapped(other, tmp_path)[1]
    lower = build()
    attach(lower, "LN(layers='top:2')")
    assert mapped(lower, tmp_path)[1]
    assert len(kept(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "checksum", "renamed", "longer", "stale"])
def test_a_damaged_file_is_rebuilt(damage, tmp_path, monkeypatch):
    model = build()
    cache = filled(model)
    mapped(model, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "renamed":
        mapped(model, tmp_path, examples(seed=1))
        data = bytearray(next(other for other in tmp_path.iterdir() if other != path).read_bytes())
    elif damage == "stale":  # sound, but not what the model computes
        zeros = torch.zeros(sum(LENGTHS), 16)
        store.in_file([zeros], path, tuple(zeros.shape), zeros.dtype)
        data = bytearray(path.read_bytes())
    elif damage in ("flipped", "checksum"):
        data[17 if damage == "flipped" else -1] ^= 1
    path.write_bytes({"cut": data[:-9], "longer": data + b"x"}.get(damage, data))
    again, anew = mapped(model, tmp_path)
    assert anew
    assert torch.equal(again.batch(range(10)), cache.batch(range(10)))
    assert not mapped(model, tmp_path)[1]


def test_no_room(tmp_path, monkeypatch):
    model = build()
    attach(model, TOP[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot keep hidden states in .*file"):
        mapped(model, tmp_path / "file")
    with pytest.raises(TrainError, match=r"3,520 bytes are over cache_bytes=10, and only cache=True with a folder"):
        PrefixCache.of(model, attachment(model).plan).fill(examples(), collate, limit_bytes=10)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "disk").mkdir()
    with h.untouched(model), pytest.raises(TrainError, match="No space left on device"):
        mapped(model, tmp_path / "disk")
    assert not kept(tmp_path / "disk")


# What is refused


@pytest.mark.parametrize(
    ("kind", "recipe", "options", "reason"),
    [
        ("bert", "LN()", {}, "edits the embeddings"),
        ("bert", "LoRA(rank=2)", {}, "edits the first block"),
        ("llama", "LN()", {}, "edits the first block"),
        ("albert", "Head()", {}, "same layers at every depth"),
        ("bert", "Head()", {"output_hidden_states": True}, "config.output_hidden_states"),
    ],
)
def test_nothing_to_keep(kind, recipe, options, reason):
    model = build(kind, **options)
    attach(model, recipe)
    plan = attachment(model).plan
    assert reason in why_not(model, plan)
    assert PrefixCache.of(model, plan) is None


def test_models_of_another_shape():
    sides = {f"{s}_{n}": 2 for s in ("encoder", "decoder") for n in ("layers", "attention_heads", "ffn_dim")}
    bart = T.BartForConditionalGeneration(T.BartConfig(d_model=8, vocab_size=9, **sides, max_position_embeddings=9))
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    compiled = build()
    compiled.bert.encoder.compile(backend="eager")
    for model, recipe, reason in [
        (bart, "LN(layers='top:1')", "an encoder and a decoder"),
        (plain, "Full()", "no stack of blocks"),
        (compiled, TOP[0], "is compiled"),
    ]:
        attach(model, recipe)
        assert reason in why_not(model, attachment(model).plan)


def test_a_trained_tensor_below_is_seen():
    model = build()
    attach(model, TOP[0])
    model.bert.encoder.layer[0].output.dense.bias.requires_grad_(True)
    assert "is trained and lies below" in why_not(model, attachment(model).plan)


class Anew(list):
    """Examples with a fresh token at each reading."""

    def __getitem__(self, index):
        self.read = getattr(self, "read", 0) + 1
        row = super().__getitem__(index)
        return {**row, "input_ids": [4 + self.read % 9, *row["input_ids"][1:]]}


def test_examples_that_are_not_the_same_twice():
    with pytest.raises(TrainError, match="input_ids of an example is not the same twice"):
        filled(build(), rows=Anew(examples()))

    def masking(rows):
        batch = collate(rows)
        return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 1, batch["input_ids"])}

    with pytest.raises(TrainError, match="input_ids of an example is not the same twice"):
        filled(build(), pad=masking)


def test_states_that_depend_on_more_than_the_example():
    model = build()
    model.bert.encoder.layer[0].register_forward_hook(lambda _, args, y: y + 0.1 * torch.rand_like(y))
    with pytest.raises(TrainError, match="random in eval mode"):
        filled(model)
    with pytest.raises(TrainError, match="cannot be kept: they depend on padding"):
        filled(build("gpt2"), pad=left)
    model = build()  # a block that mixes the examples of a batch
    model.bert.encoder.layer[0].register_forward_hook(lambda _, args, y: y + 0.1 * y.mean(0, keepdim=True))
    with pytest.raises(TrainError, match="they depend on padding: alone and beside"):
        filled(model)


def test_collators_that_do_not_fit_the_examples():
    def cut(rows):
        return {k: v[:, :4] if v.ndim == 2 else v for k, v in collate(rows).items()}

    with pytest.raises(TrainError, match="the collator makes 4 tokens of an example of 5"):
        filled(build(), pad=cut)
    holed = [{**row, "attention_mask": [1, 0, 1, *row["attention_mask"][3:]]} for row in examples(lengths=[5] * 3)]
    ragged = [{**row, "attention_mask": ([0, *[1] * 4], [*[1] * 4, 0])[i % 2]} for i, row in enumerate(holed)]

    def given(rows):
        return collate(rows) | {"attention_mask": torch.tensor([row["attention_mask"] for row in rows])}

    with pytest.raises(TrainError, match="does not lie on one side"):
        filled(build(), rows=holed, pad=given)
    with pytest.raises(TrainError, match="some examples on the left and some on the right"):
        filled(build(), rows=ragged, pad=given)


def test_a_broken_cache_is_caught(monkeypatch):
    model = build()
    attach(model, "LN(layers='top:1')")
    plan, stored, feeding = attachment(model).plan, module.in_memory, module.feeding
    lower = replace(cut_of(model, plan), index=1)

    def refused(name, instead, reason):
        monkeypatch.setattr(module, name, instead)
        with h.untouched(model), pytest.raises(TrainError, match=reason):
            PrefixCache.of(model, plan).fill(examples(), collate)
        monkeypatch.undo()

    refused("in_memory", lambda *args: stored(*args).flip(0), "kept and fresh hidden states differ")
    refused("states_at", lambda cut, batch: states_at(lower, batch), "kept and fresh hidden states differ")
    refused("feeding", lambda seam, hidden: feeding(seam, hidden.flip(0)), "logits with and without the cache differ")

    remove(model)
    attach(model, "LoRA(rank=2, layers='top:1')")
    plan = attachment(model).plan
    refused("feeding", lambda seam, hidden: feeding(seam, hidden[:, :-1]), "cannot start in the middle")


def test_a_model_that_reads_the_embeddings_further_up():
    model = build()
    keep = {}
    model.bert.embeddings.register_forward_hook(lambda _, args, y: keep.update(first=y))
    model.bert.encoder.layer[2].register_forward_hook(lambda _, args, y: y + keep["first"])
    with pytest.raises(TrainError, match="logits with and without the cache differ"):
        filled(model)


def test_an_empty_cache_says_so():
    model = build()
    attach(model, TOP[0])
    cache = PrefixCache.of(model, attachment(model).plan)
    for use in (lambda: cache.batch([0]), lambda: cache.feeding(torch.zeros(1, 2, 16))):
        with pytest.raises(TrainError, match="is empty; call fill"):
            use()
    with pytest.raises(TrainError, match="there are no examples"):
        cache.fill([], collate)
    cache.fill(examples(), collate)
    with pytest.raises(TrainError, match="8 tokens of an example are kept, but the batch has room for 5"):
        cache.batch([0, 3], 5)


@pytest.mark.parametrize(("rate", "refused"), [(0.1, True), (0.0, False)])
def test_a_model_that_drops_around_its_blocks_is_refused(rate, refused):
    """OPT drops embeddings in the decoder's own forward, which training without a cache leaves on."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    config = T.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=40, dropout=rate)
    model = T.OPTForCausalLM(config).eval()
    recipe = "LN(layers='top:1')"
    attach(model, recipe)
    why = why_not(model, attachment(model).plan)
    assert (why is not None) == refused
    assert not refused or "drops activations by itself (dropout=0.1)" in why
