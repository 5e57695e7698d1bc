"""Only the rows that are read: the same numbers from one row of the last block, and what cannot be computed so."""

import dataclasses
import json

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.delta.attaching import attach
from smidgen.efficiency.first_token import last_block as single
from smidgen.efficiency.first_token import single_query_attention as query
from smidgen.efficiency.first_token.last_block import FirstRow
from smidgen.efficiency.prefix_cache.recorded_pass import in_eval_mode
from smidgen.ports.attachment_record import attachment
from smidgen.training.run.forward_shortcuts import shortcuts
from smidgen.training.run.prefix_cache_policy import Conditions
from smidgen.training.run.settings import Settings
from tests import helpers as h
from tests.test_speed_cache import build, close, collate, examples, gradients

RECIPES = ("LN()", "LoRA(rank=2, target='linear')", "LN() + LoRA(rank=2, target=('key', 'value'))", "Full()")


def vit():
    config = T.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = T.AutoModelForImageClassification.from_config(config).eval()
    h.shake(model.parameters(), 0.3)
    return model


def images():
    return {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 0])}


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_row_gives_the_same_logits_and_gradients(kind, recipe):
    model = vit() if kind == "vit" else build(kind)
    attach(model, recipe)
    batch = images() if kind == "vit" else collate(examples()[:4])
    with h.untouched(model):
        row = FirstRow.of(model, batch)
    plain = gradients(model, batch)
    with row.reading():
        close(plain, gradients(model, batch), 1e-5)
    close(plain, gradients(model, batch), 0)
    assert (row.norm is not None) == (kind == "vit")
    assert (row.maps is not None) == (recipe == "LN()")  # where nothing is trained in them, no key or value is made


def test_low_precision_stays_within_its_rounding():
    model = build(dtype=torch.bfloat16)
    attach(model, "LN()")
    batch = collate(examples()[:4])
    row = FirstRow.of(model, batch)
    plain, true = h.logits(model, **batch), h.logits(build(dtype=torch.float64), **batch)
    with row.reading():
        fed = h.logits(model, **batch)
    assert (fed - true).abs().max() < 2 * (plain - true).abs().max() + 1e-2


@pytest.mark.parametrize(("recipe", "keys"), [("LN()", 1), ("LoRA(rank=2, target='key')", 8)])
def test_the_last_block_works_on_one_row(recipe, keys):
    model = build()
    attach(model, recipe)
    batch, shapes = collate(examples()[:4]), []
    row = FirstRow.of(model, batch)
    layer = model.bert.encoder.layer[2]
    for part in (layer.attention.self.query, layer.attention.self.key, layer.intermediate.dense):
        part.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    with in_eval_mode(model), row.reading():
        model(**batch)
    assert shapes == [1, keys, 1]


def plain_attention(x, q, maps, mask, share_of):
    """Keys and values of all tokens, head by head."""
    batch, heads, _, width = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(heads):
            rows = slice(i * width, (i + 1) * width)
            keys, values = x[b] @ maps.key[rows].T + 3.0, x[b] @ maps.value[rows].T + maps.bias[rows]
            scores = keys @ q[b, i, 0] / width**0.5
            scores = scores.masked_fill(~mask[b], float("-inf"))
            out[b, i, 0] = share_of(torch.softmax(scores, 0)) @ values
    return out


def the_parts():
    generator = torch.Generator().manual_seed(3)
    x, q = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5, 6), (2, 3, 1, 4)))
    maps = query.Maps(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in ((12, 6), (12, 6), (12,))))
    return x, q, maps, torch.tensor([[True] * 5, [True, True, True, False, False]])


@pytest.mark.parametrize("additive", [True, False])
def test_attention_without_keys_is_attention_with_keys(additive):
    """A bias on all keys (3.0) changes nothing; masks of both kinds."""
    x, q, maps, mask = the_parts()
    given = mask[:, None, None]
    given = torch.zeros(given.shape, dtype=x.dtype).masked_fill(~given, torch.finfo(x.dtype).min) if additive else given
    wanted = plain_attention(x, q, maps, mask, lambda share: share)
    torch.testing.assert_close(maps.attend(x, q, given), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(maps.attend(x, q), wanted)


def test_the_bias_of_the_values_counts_as_often_as_the_shares_sum_to(monkeypatch):
    x, q, maps, mask = the_parts()
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda share, p: share * 0.5 if p else share)
    wanted = plain_attention(x, q, maps, mask, lambda share: share * 0.5)
    torch.testing.assert_close(maps.attend(x, q, mask[:, None, None], 0.1), wanted, rtol=1e-12, atol=1e-12)


def test_both_ways_draw_the_same_dropout():
    model = build(attention_probs_dropout_prob=0.5)
    attach(model, "LN()")
    batch = collate(examples()[:4])
    row = FirstRow.of(model, batch)
    model.train()
    found = []
    for each in (row, dataclasses.replace(row, maps=None)):
        torch.manual_seed(0)
        with each.reading():
            found.append(model(**batch).logits)
    assert row.maps is not None
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_keys_that_attention_reads_turned_are_made():
    """What rotary positions would do: the product with the weight is not what attention gets."""
    made = [torch.ones(2, 1, 6), torch.ones(2, 1, 6)]
    as_read = [x.view(2, 1, 3, 2).transpose(1, 2) for x in made]
    query.check_unchanged(made, *as_read)
    for wrong in ([as_read[0] * 1, as_read[1]], [as_read[1], as_read[0]], [as_read[0][:1], as_read[1]]):
        with pytest.raises(TrainError, match="does not get what its maps"):
            query.check_unchanged(made, *wrong)
    with pytest.raises(TrainError, match="does not get what its maps"):
        query.check_unchanged(made[:1], *as_read)


@pytest.mark.parametrize("change", ["hook", "forward", "trained", "subclass"])
def test_maps_that_do_more_are_called(change):
    key, value = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    for p in (*key.parameters(), *value.parameters()):
        p.requires_grad_(False)
    assert query.Maps.of(key, value) is not None
    assert query.Maps.of(key, key) is None
    if change == "hook":
        value.register_forward_hook(lambda *a: None)
    elif change == "forward":
        key.forward = lambda x: x
    elif change == "trained":
        value.bias.requires_grad_(True)
    else:
        key = type("Other", (torch.nn.Linear,), {})(4, 4).requires_grad_(False)
    assert query.Maps.of(key, value) is None


@pytest.mark.parametrize("masked", [True, False])
def test_padding_does_not_reach_the_row(masked):
    """Other tokens behind the mask, the same logits; without a mask, others."""
    model = build()
    attach(model, "LN()")
    batch = collate(examples()[:4])
    row = FirstRow.of(model, batch)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    if not masked:
        del batch["attention_mask"], other["attention_mask"]
    with row.reading():
        assert torch.allclose(h.logits(model, **batch), h.logits(model, **other), atol=1e-6) == masked


@pytest.mark.parametrize(
    ("kind", "pooling", "options", "said"),
    [
        ("bert", "mean", {}, "reads more than the first token"),
        ("gpt2", None, {}, "reads more than the first token"),
        ("albert", None, {}, "same layers at every depth"),
        ("bert", None, {"output_hidden_states": True}, "what every block computes"),
        ("bert", None, {"attn_implementation": "eager"}, "cannot be computed for one token"),
    ],
)
def test_what_cannot_be_computed_so_is_refused(kind, pooling, options, said):
    model = build(kind, **options)
    attach(model, "LN()", pooling=pooling)
    with h.untouched(model), pytest.raises(TrainError, match=said) as error:
        FirstRow.of(model, collate(examples()[:4]))
    assert "\n" not in str(error.value)


def test_checkpointing_is_refused():
    model = build()
    model.activation_checkpointing_enable()
    with pytest.raises(TrainError, match="a second time"):
        FirstRow.of(model, collate(examples()[:4]))


def test_a_block_that_mixes_the_wrong_rows_is_caught(monkeypatch):
    """Attention without keys is left if it gives other logits; if that with keys does too, both are."""
    model = build()
    attach(model, "LN()")
    batch = collate(examples()[:4])
    right = query.Maps.attend
    monkeypatch.setattr(query.Maps, "attend", lambda self, x, *rest, **more: right(self, x.flip(0), *rest, **more))
    assert FirstRow.of(model, batch).maps is None
    plain = single.attend_once
    monkeypatch.setattr(
        single, "attend_once", lambda tokens, q, k, *rest, **more: plain(tokens, q, k.flip(1), *rest, **more)
    )
    with pytest.raises(TrainError, match="logits from one row differ"):
        FirstRow.of(model, batch)


@pytest.mark.parametrize("recipe", ["LN()", "LN(layers='top:2')", "LN(layers='top:1')", "Head()"])
def test_fit_gives_the_same_delta(recipe, tmp_path):
    """With and without, alone and over a kept prefix; dropout is off, as one row draws fewer numbers."""
    task = h.task(tmp_path / "data")
    options = {
        "epochs": 3,
        "batch_size": 8,
        "progress": False,
        "max_length": 16,
        "lr": 1e-2,
        "tokenizer": h.tokenizer(),
    }
    model = h.bert()
    one = sm.fit(model, recipe, task, out=tmp_path / "one", **options)
    all_rows = sm.fit(model, recipe, task, only_read=False, out=tmp_path / "all", **options)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, all_rows.tensors[name], rtol=1e-4, atol=1e-5)
    assert one.info["scores"] == all_rows.info["scores"]
    said = [json.loads((tmp_path / out / "run.json").read_text())["chosen"]["rows"] for out in ("one", "all")]
    assert said == ["on", "off"]


def test_a_run_that_began_with_one_row_does_not_go_on_without(tmp_path):
    model = h.bert()
    attach(model, "LN()", pooling="mean")
    given = Conditions(collate, Settings(cache=False))
    with pytest.raises(TrainError, match="began with one row of the last block, and now the head reads more"):
        shortcuts(model, [examples()], given, {"rows": "on"})
    assert "more than the first" in shortcuts(model, [examples()], given, {})[1]["rows"]


def test_insisting_says_why_not(tmp_path):
    with pytest.raises(TrainError, match="only_read=True, but the head reads more than the first token") as error:
        sm.fit(
            h.bert(), "LN()", h.task(tmp_path), tokenizer=h.tokenizer(), pooling="mean", only_read=True, progress=False
        )
    assert "\n" not in str(error.value)


def test_a_cut_in_the_last_block_needs_one_row_of_states():
    from smidgen.efficiency.prefix_cache.cache import PrefixCache

    model = build()
    attach(model, "LN(layers='top:1')")
    cache = PrefixCache(model, attachment(model).plan)
    cache.fill(examples(), collate)
    assert cache.ends_rowwise
    batch = collate(examples()[:3])
    wanted = h.logits(model, **batch)
    with cache.feeding(cache.first([0, 1, 2]), batch["input_ids"].shape[1]):
        assert torch.allclose(h.logits(model, **batch), wanted, atol=1e-6)
    with cache.feeding(cache.first([1, 2, 0]), batch["input_ids"].shape[1]):
        assert not torch.allclose(h.logits(model, **batch), wanted, atol=1e-3)
