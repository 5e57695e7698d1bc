"""Fisher information against a loop over single, unpadded examples, for every kind of module that owns values."""

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.data.kinds.base import kind_named
from smidgen.data.text.collate import Collator
from smidgen.importance import gradient_recorder as record
from smidgen.importance import per_example_squares as squares
from smidgen.importance.fisher_information import attached_fisher, attached_mean_gradients
from smidgen.importance.per_example_rules import outer_squares
from smidgen.importance.per_example_squares import tensors_of
from smidgen.importance.sample import Sample
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h

TINY = {**h.BASE, **h.TOKENS, "head_dim": 8, "num_key_value_heads": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
WAVE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 2,
        "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "num_feat_extract_layers": 2,
        "feat_extract_norm": "group"}  # fmt: skip


def score(kind, logits, labels):
    """Log-probability of one example, spelled out: logits (1, ...), labels (1, ...)."""
    if kind == "regression":
        return -0.5 * (labels[0] - logits[0, 0]) ** 2
    if kind == "classification":
        return logits.log_softmax(-1)[0, labels[0]]
    shift = int(kind == "causal-lm")
    said = [(t, y) for t, y in enumerate(labels[0, shift:].tolist()) if y != -100]
    return sum(logits[0, t].log_softmax(-1)[y] for t, y in said)


def one_by_one(model, sample, terms=lambda kind, logits, labels: [(1.0, score(kind, logits, labels))]):
    """Mean over single examples of sum_k w_k (d term_k)^2 by autograd."""
    wanted = tensors_of(model)
    totals = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for place in range(len(sample)):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        for weight, term in terms(sample.kind, model(**inputs).logits, labels):
            grads = torch.autograd.grad(term, list(wanted.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(wanted, grads, strict=True):
                totals[name] += 0 if grad is None else weight * grad.square()
    return {name: total.detach() / len(sample) for name, total in totals.items()}


def agree(found, wanted, tolerance=1e-9):
    """Equal up to a relative error in norm; values that are zero but for rounding are compared with the largest."""
    assert found.keys() == wanted.keys()
    largest = max(float(value.norm()) for value in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        error = float((found[name].to(value.dtype) - value).norm())
        assert error <= tolerance * float(value.norm()) + 1e-3 * tolerance * largest, (name, error, float(value.norm()))


def texts(kind="classification", count=7, labels=2, bad=None):
    """Sentences of 3 to 9 tokens, padded to the longest of a batch."""
    generator = torch.Generator().manual_seed(4)
    examples = []
    for i in range(count):
        length = 3 + (5 * i) % 7
        ids = torch.randint(4, len(h.WORDS), (length,), generator=generator).tolist()
        example = {"input_ids": ids, "attention_mask": [1] * length}
        if kind == "causal-lm":
            example["labels"] = [-100, *ids[1:-1], -100 if i % 2 else ids[-1]]
        elif kind == "tokens":
            example["labels"] = [-100 if (t + i) % 3 == 0 else (t + i) % labels for t in range(length)]
        else:
            example["labels"] = 0.3 * i - 0.7 if kind == "regression" else i % labels
        examples.append(example)
    pads = {"input_ids": 0, "attention_mask": 0}
    return Sample(kind, examples, Collator(pads, kind_named(kind).label_dtype), range(100, 100 + count), "train")


def images(count=5, labels=2):
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Sample.of_batch({"pixel_values": pixels, "labels": torch.arange(count) % labels}, "classification")


def waves():
    sound = torch.randn(4, 60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Sample.of_batch({"input_values": sound, "labels": torch.arange(4) % 2}, "classification")


def pairs():
    """Encoder and decoder ids, and labels for the decoder's tokens."""
    ids = torch.randint(3, 20, (4, 7), generator=torch.Generator().manual_seed(6))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "labels": ids[:, 1:6].clone()}
    inputs["labels"][1, 2:] = -100
    return Sample.of_batch(inputs, "tokens")


def build(cls, config):
    torch.manual_seed(0)
    model = cls(config).double().eval()
    shake(model.parameters(), 0.3)
    return model


def text_model(kind, cls="AutoModelForSequenceClassification"):
    return h.build(kind, cls).double()


def vit():
    return build(T.ViTForImageClassification, T.ViTConfig(**h.SIZES, **IMAGE, num_labels=2))


def convnext():
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "num_channels": 3, "patch_size": 2}
    return build(T.ConvNextForImageClassification, T.ConvNextConfig(**sizes, num_labels=2))


def t5():
    return build(T.T5ForConditionalGeneration, T.T5Config(**T5, vocab_size=20, decoder_start_token_id=0))


def gemma3():
    return build(T.Gemma3ForCausalLM, T.Gemma3TextConfig(**{**TINY, "pad_token_id": 0}))


MODELS = {
    "bert": (lambda: text_model("bert"), texts),
    "bert tokens": (lambda: text_model("bert", "AutoModelForTokenClassification"), lambda: texts("tokens")),
    "albert": (lambda: text_model("albert"), texts),
    "gpt2": (lambda: text_model("gpt2"), texts),
    "gpt2 lm": (lambda: text_model("gpt2", "AutoModelForCausalLM"), lambda: texts("causal-lm")),
    "llama lm": (lambda: text_model("llama", "AutoModelForCausalLM"), lambda: texts("causal-lm")),
    "gemma3 lm": (gemma3, lambda: texts("causal-lm")),
    "t5": (t5, pairs),
    "vit": (vit, images),
    "convnext": (convnext, images),
    "wav2vec2": (lambda: build(T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**WAVE)), waves),
}
LOOPED = ("lm_head.weight", "wte.weight", "embed_tokens.weight", "shared.weight", "relative_attention_bias.weight",
          "masked_spec_embed", "original0", "original1")  # fmt: skip


@pytest.mark.parametrize("recipe", ["LN()", "BitFit()", "Full()", "LoRA(rank=2)", "IA3()"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop(name, recipe):
    make, data = MODELS[name]
    model, sample = make(), data()
    try:
        sm.attach(model, recipe)
    except sm.SmidgenError as error:
        pytest.skip(str(error))
    shake(trained_parameters(model).values(), 0.2)
    found = attached_fisher(model, sample, batch_size=3)
    agree(found, one_by_one(model, sample), 1e-6 if name == "gemma3 lm" else 1e-9)  # its norms are in float32
    assert found.examples == len(sample)
    unexpected = [n for n in found.looped if not n.endswith(LOOPED)]
    assert recipe == "Full()" or not found.looped, found.looped
    assert not unexpected


def test_shared_tied_and_spread_tensors_go_where_they_should():
    looped = {}
    for name in ("bert", "albert", "gpt2 lm", "llama lm", "t5", "vit"):
        make, data = MODELS[name]
        model = sm.attach(make(), "Full()")
        looped[name] = attached_fisher(model, data(), batch_size=4).looped
    assert looped["bert"] == looped["albert"] == ()  # positions (1, T) are spread over the examples
    assert looped["gpt2 lm"] == ("transformer.wte.weight",)  # tied to the output layer
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in looped["t5"]][:2] == ["relative_attention_bias"] * 2


@pytest.mark.parametrize("recipe", ["LN()", "Full()", "LoRA()", "IA3()"])
def test_any_batch_size_and_padding_gives_the_same(recipe):
    model, sample = text_model("bert"), texts()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.2)
    whole = attached_fisher(model, sample, batch_size=64)
    for size in (1, 2, 5):
        agree(attached_fisher(model, sample, batch_size=size), whole, 1e-12)
    wide = Sample(sample.kind, sample.examples, Collator({"input_ids": 0, "attention_mask": 0}, torch.long, 16),
                  sample.numbers)  # fmt: skip
    agree(attached_fisher(model, wide), whole, 1e-12)


@pytest.mark.parametrize("limit", [1, 700, 3000, 10**9])
def test_any_chunk_gives_the_same(limit):
    model, sample = text_model("bert"), texts()
    sm.attach(model, "Full() + LoRA(rank=2, target='linear')")
    shake(trained_parameters(model).values(), 0.2)
    agree(attached_fisher(model, sample, chunk_bytes=limit), one_by_one(model, sample), 1e-10)


def test_products_stay_under_the_limit(monkeypatch):
    a, b = torch.randn(6, 4, 24, dtype=torch.float64), torch.randn(6, 4, 16, dtype=torch.float64)
    wanted = torch.einsum("bto,bti->boi", a, b).square().sum(0)
    sizes, bmm = [], torch.bmm

    def seen(x, y):
        made = bmm(x, y)
        sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "bmm", seen)
    for limit in (128, 1000, 2 * 24 * 16 * 8, 10**6):
        sizes.clear()
        assert torch.allclose(outer_squares(a, b, limit), wanted)
        assert sizes
        assert max(sizes) <= limit
    one = torch.randn(6, 1, 24, dtype=torch.float64)
    assert torch.allclose(outer_squares(one, b[:, :1], 1), torch.einsum("bto,bti->boi", one, b[:, :1]).square().sum(0))


def test_lora_starts_with_nothing_in_a():
    model, sample = text_model("bert"), texts()
    found = attached_fisher(sm.attach(model, "LoRA()"), sample)
    assert {name[-1] for name in found} == {"A", "B"}
    assert all(bool(value.any()) is name.endswith("B") for name, value in found.items())
    agree(found, one_by_one(model, sample))


def test_edits_nest_and_stand_on_trained_weights():
    model, sample = text_model("gpt2"), texts()
    sm.attach(model, "BitFit() + LoRA(rank=2, target=('query', 'ff_out')) + IA3()")
    shake(trained_parameters(model).values(), 0.2)
    found = attached_fisher(model, sample, batch_size=4)
    assert not found.looped
    agree(found, one_by_one(model, sample))


def test_the_square_of_a_mean_is_not_the_mean_of_squares():
    model, sample = text_model("bert"), texts()
    sm.attach(model, "LN()")
    found, mean = attached_fisher(model, sample), attached_mean_gradients(model, sample)
    with pytest.raises(AssertionError):
        agree({name: value.square() for name, value in mean.items()}, dict(found), 0.1)
    assert all((mean[name].square() <= found[name] * (1 + 1e-9)).all() for name in found)


def test_mean_gradients_are_autograds():
    model, sample = text_model("bert"), texts()
    wanted = tensors_of(sm.attach(model, "LN() + LoRA()"))
    parts = []
    for place in range(len(sample)):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        parts.append(torch.autograd.grad(score("classification", model(**inputs).logits, labels), wanted.values()))
    mean = dict(zip(wanted, (sum(p) / len(sample) for p in zip(*parts, strict=True)), strict=True))
    agree(attached_mean_gradients(model, sample, batch_size=3), mean)


# Modules of one's own


class Scaled(nn.Embedding):
    """Rows times four: no plain look-up."""

    def forward(self, ids):
        return 4 * super().forward(ids)


class Odd(nn.Module):
    """A norm over flattened rows, a gain over channels, a scale by hand, look-ups that scale or are changed in place,
    padding that is not masked, a layer used twice."""

    def __init__(self, vocabulary=20, width=8):
        super().__init__()
        self.look = Scaled(vocabulary, width, padding_idx=0)
        self.plain = nn.Embedding(vocabulary, width, padding_idx=0)
        self.flat, self.group = nn.LayerNorm(width), nn.GroupNorm(2, width)
        self.twice, self.conv = nn.Linear(width, width), nn.Conv1d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(width))
        self.unused = nn.Linear(width, width)
        self.score = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.plain(input_ids)
        x += self.look(input_ids)
        x = self.flat(x.reshape(-1, x.shape[-1])).view(x.shape)
        x = self.twice(torch.tanh(self.twice(x))) * self.scale
        x = self.conv(self.group(x.transpose(1, 2))).mean(-1)
        return type("Output", (), {"logits": self.score(x)})


@pytest.fixture
def odd():
    torch.manual_seed(0)
    model = Odd().double().eval()
    shake(model.parameters(), 0.3)
    ids = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(3))
    sample = Sample.of_batch({"input_ids": ids, "labels": torch.arange(6) % 3}, "classification")
    return sm.attach(model, "Full()"), sample


def test_what_no_rule_fits_is_looped_and_exact(odd):
    model, sample = odd
    found = attached_fisher(model, sample, batch_size=4)
    agree(found, one_by_one(model, sample))
    assert {"look.weight", "flat.weight", "flat.bias", "scale"} <= set(found.looped)
    assert not {"plain.weight", "group.weight", "twice.weight", "conv.weight", "conv.bias", "score.weight"} & set(
        found.looped
    )
    assert not found["unused.weight"].any()
    assert not found["plain.weight"][0].any()


def test_wrong_rules_are_found_by_the_check(odd, monkeypatch):
    """Without the check the same model gets wrong values: the check is what sends them to the loop."""
    model, sample = odd
    monkeypatch.setattr(squares, "_unseparated", lambda *_: set())
    with pytest.raises(AssertionError):
        agree(attached_fisher(model, sample, batch_size=4), one_by_one(model, sample))


def test_a_batch_of_another_form_than_the_trial_is_looped():
    """A call whose output the batch does not lead, seen for the first time in the last batch."""

    class Sly(Odd):
        def forward(self, input_ids, attention_mask=None):
            x = self.look(input_ids)
            if input_ids.shape[1] > 5 and len(input_ids) > 3:
                x = self.twice(x.reshape(-1, 8)).view(x.shape)
            else:
                x = self.twice(x)
            return type("Output", (), {"logits": self.score(self.flat(x).mean(1))})

    torch.manual_seed(0)
    model = sm.attach(Sly().double().eval(), "Full()")
    generator = torch.Generator().manual_seed(3)
    examples = [
        {"input_ids": torch.randint(1, 20, (6,), generator=generator), "labels": torch.tensor(i % 3)} for i in range(6)
    ]
    sample = Sample("classification", examples, lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
                    range(6))  # fmt: skip
    found = attached_fisher(model, sample, batch_size=4)
    agree(found, one_by_one(model, sample))
    assert {"twice.weight", "twice.bias"} <= set(found.looped)


def test_gradients_reach_no_lower_than_the_lowest_module(monkeypatch):
    model, sample = text_model("bert"), texts()
    sm.attach(model, "LN(layers='top:1')")
    lower, leaves = [], []
    model.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: lower.append(out))
    watch = record.Recorder._watch

    def seen(self, output, targets, call):
        leaves.append(output.requires_grad)
        return watch(self, output, targets, call)

    monkeypatch.setattr(record.Recorder, "_watch", seen)
    attached_fisher(model, sample, batch_size=64)
    states = [out[0] if isinstance(out, tuple) else out for out in lower]
    assert sum(state.requires_grad for state in states) <= 1  # autograd's own, for the check
    assert leaves.count(False) * 2 == len(leaves)


@pytest.mark.parametrize("recipe", ["LN()", "BitFit()", "LoRA()", "Full()"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_low_precision_base_is_close(kind, recipe):
    exact, low = h.build(kind, shaken=0.1), h.build(kind, shaken=0.1).to(torch.bfloat16)
    exact.load_state_dict(low.state_dict())
    sample, found = texts(), []
    for model in (exact, low):
        try:
            sm.attach(model, recipe)
        except sm.SmidgenError as error:
            pytest.skip(str(error))
        shake(trained_parameters(model).values(), 0.05)
        found.append(attached_fisher(model, sample))
    assert not found[1].looped
    assert {value.dtype for value in found[1].values()} == {torch.float32}
    a, b = (torch.cat([value.flatten() for value in values.values()]) for values in found)
    assert (a - b).norm() < 0.1 * a.norm()


def test_single_precision_is_exact_too():
    model, sample = h.build("bert"), texts()
    sm.attach(model, "Full()")
    agree(attached_fisher(model, sample), one_by_one(model, sample), 1e-5)
