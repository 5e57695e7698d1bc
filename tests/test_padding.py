"""What a model says of a text does not depend on the texts beside it, nor on the side that padding is on."""

from inspect import signature

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.attachment import trained_parameters
from smidgen.errors import PlanError
from smidgen.heads import own_pooling
from smidgen.testing import shake
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
        sm.plan(made(family), edits)
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
        if side == "left" and (name == "bart" or own_pooling(model) == "first" and kind == "whole"):
            continue  # a table of positions that nobody can shift; a class that reads the first column
        for found, wanted in zip(said(model, TEXTS, side), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
