"""What a model says of a text does not depend on the texts beside it, nor on the side that padding is on."""

import copy
from dataclasses import replace
from inspect import signature

import pytest
import torch
import transformers as T
from transformers import DynamicCache

import smidgen as sm
from smidgen.common.errors import AttachError, DataError, PlanError
from smidgen.data.text.collate import Collator
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.prompts.token_insertion import TokenInsertion
from smidgen.sites.task_head import own_pooling, takes_positions
from smidgen.testing.suite import shake
from tests import helpers as h
from tests.test_prefix import DISTIL, GPT, OPT, QWEN, SMALL, T5, TOKENS

TEXTS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34, 35]]
EDITS = (None, "LN()", "Prefix(3)", "PromptTuning(3)")
OPEN = {**SMALL, **TOKENS}
XLNET = {"vocab_size": 61, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "pad_token_id": 0}
ALIBI = {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2, **TOKENS}
WINDOW = {"num_key_value_heads": 1, "sliding_window": 4}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
CAUSAL = {
    "llama": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**OPEN, num_key_value_heads=1)),
    "qwen3": (T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**OPEN, **QWEN)),
    "mistral": (T.MistralForCausalLM, lambda: T.MistralConfig(**OPEN, **WINDOW)),
    "gemma3": (T.Gemma3ForCausalLM, lambda: T.Gemma3TextConfig(**OPEN, **QWEN, **LAYERS)),
    "gpt2": (T.GPT2LMHeadModel, lambda: T.GPT2Config(**GPT)),
    "opt": (T.OPTForCausalLM, lambda: T.OPTConfig(**OPT, vocab_size=61, **TOKENS)),
    "gpt_neox": (T.GPTNeoXForCausalLM, lambda: T.GPTNeoXConfig(**OPEN)),
    "bloom": (T.BloomForCausalLM, lambda: T.BloomConfig(**ALIBI)),
    "mamba": (T.MambaForCausalLM, lambda: T.MambaConfig(**OPEN, state_size=4)),
}
TOKEN = {
    "bert": (T.BertForMaskedLM, lambda: T.BertConfig(**SMALL)),
    "roberta": (T.RobertaForMaskedLM, lambda: T.RobertaConfig(**{**OPEN, "pad_token_id": 1})),
    "mpnet": (T.MPNetForMaskedLM, lambda: T.MPNetConfig(**{**SMALL, "pad_token_id": 1})),
    "distilbert": (T.DistilBertForMaskedLM, lambda: T.DistilBertConfig(**DISTIL)),
    "deberta-v2": (T.DebertaV2ForMaskedLM, lambda: T.DebertaV2Config(**SMALL, relative_attention=True)),
    "modernbert": (T.ModernBertForMaskedLM, lambda: T.ModernBertConfig(**OPEN)),
    "xlnet": (T.XLNetForTokenClassification, lambda: T.XLNetConfig(**XLNET)),
    "t5": (T.T5ForTokenClassification, lambda: T.T5Config(**T5)),
    "umt5": (T.UMT5ForTokenClassification, lambda: T.UMT5Config(**T5)),
    **CAUSAL,
}
WHOLE = {
    "bert": (T.BertForSequenceClassification, lambda: T.BertConfig(**SMALL)),
    "roberta": (T.RobertaForSequenceClassification, lambda: T.RobertaConfig(**{**OPEN, "pad_token_id": 1})),
    "gpt2": (T.GPT2ForSequenceClassification, lambda: T.GPT2Config(**GPT)),
    "qwen3": (T.Qwen3ForSequenceClassification, lambda: T.Qwen3Config(**OPEN, **QWEN)),
    "bloom": (T.BloomForSequenceClassification, lambda: T.BloomConfig(**ALIBI)),
    "bart": (
        T.BartForConditionalGeneration,
        lambda: T.BartConfig(
            vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, **TOKENS, decoder_start_token_id=1,
        ),
    ),
}  # fmt: skip
OFFSET = ("roberta", "mpnet")  # positions are counted from the ids


def made(family, edits=None):
    cls, config = family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config()).eval()
    if model.config.model_type != "bloom":  # its mask overflows in float64
        model = model.double()
    shake(model.parameters(), 0.2)
    if edits is not None:
        sm.attach(model, edits)
        shake((p for n, p in trained_parameters(model).items() if "edits" in n), 0.5)
    return model


def batch(model, texts, side, positions=True):
    pad = model.config.get_text_config().pad_token_id or 0
    longest = max(map(len, texts))

    def row(values, filler):
        missing = [filler] * (longest - len(values))
        return [*missing, *values] if side == "left" else [*values, *missing]

    found = {
        "input_ids": torch.tensor([row(text, pad) for text in texts]),
        "attention_mask": torch.tensor([row([1] * len(text), 0) for text in texts]),
    }
    takes = "position_ids" in signature(model.forward).parameters and model.config.model_type not in OFFSET
    if positions and takes:
        found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return found


def said(model, texts, side, **options):
    inputs = batch(model, texts, side, **options)
    if model.config.is_encoder_decoder and "decoder_input_ids" in signature(model.forward).parameters:
        inputs["decoder_input_ids"] = torch.tensor([[1, 7, 8]] * len(texts))
    with torch.no_grad():
        logits = model(**inputs).logits
    per_token = logits.shape[:2] == inputs["input_ids"].shape
    return [x[m.bool()] if per_token else x for x, m in zip(logits, inputs["attention_mask"], strict=True)]


def applies(family, edits):
    if edits is None:
        return True
    try:
        resolve(made(family), edits)
    except PlanError:
        return False
    return True


PAIRS = [(kind, name, edits) for kind, all_ in (("token", TOKEN), ("whole", WHOLE)) for name in all_ for edits in EDITS]


@pytest.mark.parametrize(("kind", "name", "edits"), PAIRS)
def test_padding_has_no_effect(kind, name, edits):
    family = {"token": TOKEN, "whole": WHOLE}[kind][name]
    if not applies(family, edits):
        pytest.skip(f"{edits} is refused")
    model = made(family, edits)
    alone = [said(model, [text], "right")[0] for text in TEXTS]
    for side in ("left", "right"):
        if side == "left" and (name == "bart" or (own_pooling(model) == "first" and kind == "whole")):
            continue  # a table of positions that nobody can shift; a class that reads the first column
        for found, wanted in zip(said(model, TEXTS, side), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_prompt_stands_beside_the_text_where_nobody_gives_positions(name):
    """Rotary attention sees differences of positions; GPT-2's own table is read at the same places as with tokens."""
    model = made(CAUSAL[name])
    prompt = model.get_input_embeddings().weight[:3].detach().clone()
    pads, rest = torch.tensor([[0, 0]]), torch.tensor([[11, 12, 13]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        fed = torch.cat((pads, torch.tensor([[0, 1, 2]]), rest), 1)
        wide = torch.cat((mask[:, :2], torch.ones(1, 3, dtype=torch.long), mask[:, 2:]), 1)
        wanted = model(input_ids=fed, attention_mask=wide).logits[:, -3:]
        sm.attach(model, "PromptTuning(3)")
        next(p for n, p in trained_parameters(model).items() if "edits" in n).copy_(prompt)
        found = model(input_ids=torch.cat((pads, rest), 1), attention_mask=mask).logits[:, -3:]
    torch.testing.assert_close(found, wanted)


def test_given_positions_go_on_behind_the_prompt():
    inserted = TokenInsertion.of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]), 2, 0, torch.device("cpu"))
    found = inserted.positions(torch.tensor([[0, 0, 5, 6], [5, 6, 7, 0]]))
    assert found[0, 2:].tolist() == [5, 6, 7, 8]
    assert found[1, :5].tolist() == [5, 6, 7, 8, 9]
    behind = TokenInsertion.of(torch.tensor([[0, 1, 1]]), 2, 1, torch.device("cpu"))
    assert behind.positions(torch.tensor([[0, 4, 5]]))[0, 1:].tolist() == [4, 5, 6, 7]
    assert behind.positions(torch.tensor([[[0, 4, 5]], [[0, 7, 8]]]))[1, 0, 1:].tolist() == [7, 8, 9, 10]


# One collation


def classifier(name, edits):
    """A classifier with the test tokenizer's vocabulary, whose delta was never trained but shaken."""
    cls, config = {
        "xlnet": (T.XLNetForSequenceClassification, lambda: T.XLNetConfig(**XLNET)),
        "qwen3": WHOLE["qwen3"], "gpt2": WHOLE["gpt2"], "bert": WHOLE["bert"], "roberta": WHOLE["roberta"],
    }[name]  # fmt: skip
    model = made((cls, config), edits)
    if name == "roberta":
        model.config.pad_token_id = 0
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(("score.weight", "logits_proj.weight"))
             or n.endswith(("classifier.weight", "out_proj.weight"))).mul_(8)  # so that labels differ  # fmt: skip
    return model, replace(sm.Delta.of(model), labels=("pos", "neg"))


def tokenizer(side):
    found = h.tokenizer()
    found.padding_side = side
    return found


@pytest.mark.parametrize("edits", ["LN()", "Prefix(3)", "PromptTuning(8)"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "xlnet"])
def test_labels_do_not_depend_on_the_batch_nor_on_the_tokenizers_side(name, edits, tmp_path):
    if name == "xlnet" and edits == "Prefix(3)":
        pytest.skip("refused")
    model, delta = classifier(name, edits)
    sm.detach(model)
    task = h.task(tmp_path, held=24)
    texts = list(task.split("test")["text"])
    wanted = [p.probabilities for p in sm.predict(model, texts, delta=delta, tokenizer=h.tokenizer(), batch_size=1)]
    best = [max(odds, key=odds.get) for odds in wanted]
    for side in ("left", "right"):
        found = sm.predict(model, texts, delta=delta, tokenizer=tokenizer(side), batch_size=24)
        for one, odds in zip(found, wanted, strict=True):
            assert one.probabilities == pytest.approx(odds, abs=1e-5)
        own = replace(delta, labels=tuple(task.labels))
        scores = sm.evaluate(model, task, delta=own, tokenizer=tokenizer(side), batch_size=24)
        assert [("pos", "neg")[i] for i in scores.predictions] == best


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_get_the_labels_that_they_have_alone(side, tmp_path):
    model = made(TOKEN["xlnet"], "PromptTuning(3)")
    delta = replace(sm.Delta.of(model), labels=("A", "B"))
    delta = delta.with_info(task={"kind": "tokens", "text": ["text"]})
    sm.detach(model)
    texts = [" ".join(row["text"].split()) for row in h.rows(12)]
    options = {"delta": delta, "tokenizer": tokenizer(side)}
    alone = [p.answer for p in sm.predict(model, texts, batch_size=1, **options)]
    assert [p.answer for p in sm.predict(model, texts, batch_size=12, **options)] == alone
    assert {len(text.split()) for text in texts} == {len(answer) for answer in alone}
    assert len({tuple(answer) for answer in alone}) > 1


def test_texts_end_where_a_model_reads(tmp_path):
    """XLNet reads the last place, so that training too has padding on the left, and no token beside it."""
    model = made((T.XLNetForSequenceClassification, lambda: T.XLNetConfig(**XLNET)))
    task = h.task(tmp_path)
    batch = task.collator(h.tokenizer(), model=model)(list(task.encode(h.tokenizer(), "train"))[:4])
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    right = task.collator(tokenizer("left"), model=h.bert())(list(task.encode(h.tokenizer(), "train"))[:4])
    assert right["attention_mask"][:, 0].all()


def test_positions_are_given_where_padding_on_the_left_would_move_them():
    collate = Collator({"input_ids": 0, "attention_mask": 0}, torch.long, left=True, positions=True)
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [8], "attention_mask": [1]}]
    batch = collate([{**row, "labels": 0} for row in rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert takes_positions(h.bert()) is True
    assert takes_positions(h.build("roberta")) is False  # it counts them itself, from its padding id on


@pytest.mark.parametrize("known", [None, 7])
def test_a_classifier_that_tells_padding_by_another_id_is_refused(known, tmp_path):
    model, task = h.build("gpt2"), h.task(tmp_path)
    model.config.pad_token_id = known
    for act in (lambda: sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), epochs=1),
                lambda: sm.evaluate(model, task, tokenizer=h.tokenizer())):  # fmt: skip
        with pytest.raises(
            DataError, match=f"config.pad_token_id={known}.*pads with 0; set model.config.pad_token_id = 0"
        ):
            act()


# Generation


OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
GENERATE = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "opt", "gpt_neox", "bloom"]


def generated(model, inputs, **options):
    """Six tokens for each row, and their logits (6, rows, vocabulary)."""
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return found.sequences[:, -6:], torch.stack(found.logits)


def generated_alone(model, **options):
    found = [generated(model, batch(model, [text], "right", positions=False), **options) for text in TEXTS]
    return torch.cat([ids for ids, _ in found]), torch.cat([logits for _, logits in found], 1)


def agree(found, wanted, beams=False):
    assert torch.equal(found[0], wanted[0])
    if not beams:  # of beams there are more logits than texts
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("name", [*GENERATE, "mamba"])
def test_generating_beside_others_is_generating_alone(name, edits):
    if not applies(CAUSAL[name], edits):
        pytest.skip(f"{edits} is refused")
    model = made(CAUSAL[name], edits)
    found = generated(model, batch(model, TEXTS, "left", positions=False), **OPTIONS)
    agree(found, generated_alone(model, **OPTIONS))


@pytest.mark.parametrize("more", [{"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", GENERATE)
def test_every_way_of_generating_says_the_same(name, more):
    model = made(CAUSAL[name], "PromptTuning(3)")
    beams = more.get("num_beams", 1)
    wanted = generated_alone(model, **{**OPTIONS, "num_beams": beams})
    found = generated(model, batch(model, TEXTS, "left", positions=False), **{**OPTIONS, **more})
    agree(found, wanted, beams > 1)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("name", GENERATE)
def test_turns_with_a_kept_cache_are_one_run_over_the_whole(name, edits):
    if not applies(CAUSAL[name], edits):
        pytest.skip(f"{edits} is refused")
    model = made(CAUSAL[name], edits)
    first, cache = batch(model, TEXTS, "left", positions=False), DynamicCache(config=model.config)
    said = model.generate(**first, past_key_values=cache, **OPTIONS)
    ids = torch.cat((said, torch.arange(40, 55).view(3, 5)), 1)
    mask = torch.cat((first["attention_mask"], torch.ones(3, 11, dtype=torch.long)), 1)
    wanted = generated(model, {"input_ids": ids, "attention_mask": mask}, **OPTIONS)
    kept = copy.deepcopy(cache)
    agree(generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, **OPTIONS), wanted)
    new = ids[:, said.shape[1] - 1 :]  # the last token was said, and never read
    agree(generated(model, {"input_ids": new, "attention_mask": mask}, past_key_values=kept, **OPTIONS), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_goes_on_in_a_forward_pass_too(name):
    model = made(CAUSAL[name], "PromptTuning(3)")
    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 4:]
        for given in ({}, {"attention_mask": torch.ones_like(ids)}):
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
            torch.testing.assert_close(model(input_ids=ids[:, 4:], past_key_values=cache, **given).logits, whole)


def test_a_cache_that_does_not_hold_the_prompt_is_refused():
    model = made(CAUSAL["llama"])
    ids = torch.tensor(TEXTS[:1])
    whole = {"attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        sm.attach(model, "PromptTuning(3)")
        with pytest.raises(
            AttachError, match="filled with no prompt, and one of 3 is on now; begin with an empty cache"
        ):
            model(input_ids=ids[:, 4:], past_key_values=plain)
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(
            AttachError, match=r"7 tokens, but 4 are in the cache.*and 1 given; give the tokens from 4 on"
        ):
            model(input_ids=ids[:, cache.get_seq_length() - 1 :], past_key_values=cache, **whole)
        with sm.disabled(model), pytest.raises(AttachError, match="holds a prompt, which is off now"):
            model(input_ids=ids[:, 4:], past_key_values=cache, **whole)


def test_generation_is_the_classs_own_again():
    model = made(CAUSAL["llama"])
    with h.untouched(model):
        sm.attach(model, "PromptTuning(3)")
        assert "prepare_inputs_for_generation" in model.__dict__
        other = copy.deepcopy(model)
        with torch.no_grad():
            trained_parameters(other)["model.embed_tokens.edits.0.P"].mul_(-3)
        logits = [generated(x, {"input_ids": torch.tensor(TEXTS[:1])}, **OPTIONS)[1] for x in (model, other)]
        assert not torch.allclose(*logits)
        assert other.prepare_inputs_for_generation.args[0] is other
        sm.detach(model)
