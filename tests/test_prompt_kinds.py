"""A prompt of tokens' vectors is these tokens, in models with more inputs than ids: boxes, images, global attention."""

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.suite import shake
from tests import helpers as h
from tests.test_padding import OPTIONS, XLNET, generated
from tests.test_prefix import SMALL, T5, TOKENS
from tests.test_prompt import MASK, fed, with_tokens
from tests.test_sweep import tiny_models

OPEN = {**SMALL, **TOKENS}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4}
LONG = {**OPEN, "attention_window": 4, "max_position_embeddings": 64}
BOXES = {**OPEN, "coordinate_size": 2, "shape_size": 4, "visual_embed": False, "pad_token_id": 1}
IDS = torch.arange(14).view(2, 7) + 20


def built(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).double().eval()
    shake(model.parameters(), 0.2)
    return model


def widened(x, at, value):
    """(2, 7, ...) with three places put in behind the first `at` tokens."""
    return torch.cat((x[:, :at], torch.as_tensor(value).expand(2, 3, *x.shape[2:]), x[:, at:]), 1)


def boxes():
    found = torch.arange(56).view(2, 7, 4)
    found[:, 0] = 0  # as a tokenizer gives [CLS]
    return found


KINDS = {  # class, configuration, tokens before the prompt, more inputs, and what the prompt has of them
    "xlnet": (T.XLNetForTokenClassification, lambda: T.XLNetConfig(**XLNET), 0, {}, {}),
    "longformer": (
        T.LongformerForTokenClassification, lambda: T.LongformerConfig(**LONG), 0,
        {"global_attention_mask": torch.tensor([[1, 0, 0, 0, 1, 0, 0]] * 2)}, {"global_attention_mask": 1},
    ),
    "longformer without": (T.LongformerForTokenClassification, lambda: T.LongformerConfig(**LONG), 0, {}, {}),
    "layoutlm": (
        T.LayoutLMForTokenClassification, lambda: T.LayoutLMConfig(**OPEN), 1, {"bbox": boxes()}, {"bbox": 0},
    ),
    "layoutlmv3": (
        T.LayoutLMv3ForTokenClassification, lambda: T.LayoutLMv3Config(**BOXES), 0, {"bbox": boxes()}, {"bbox": 0},
    ),
    "umt5": (T.UMT5ForTokenClassification, lambda: T.UMT5Config(**T5), 0, {}, {}),
    "bert": (
        T.BertForTokenClassification, lambda: T.BertConfig(**OPEN), 1,
        {"token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 2)}, {"token_type_ids": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_its_tokens(name):
    cls, config, at, more, values = KINDS[name]
    model = built(cls, config())
    ids = torch.where(MASK.bool(), IDS, model.config.pad_token_id or 0)
    longer, wide = fed(ids, MASK, at)
    put = {key: widened(x, at, values[key]) for key, x in more.items()}
    expected = h.logits(model, input_ids=longer, attention_mask=wide, **put)
    expected = torch.cat((expected[:, :at], expected[:, at + 3 :]), 1)
    with_tokens(model)
    found = h.logits(model, input_ids=ids, attention_mask=MASK, **more)
    assert found.shape[:2] == (2, 7)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-6, atol=1e-6)


def test_as_many_tokens_as_texts():
    """XLNet embeds (tokens, texts); which side is which cannot be told from the shape of a square."""
    model = built(T.XLNetForTokenClassification, T.XLNetConfig(**XLNET))
    ids, mask = torch.arange(10).view(5, 2) + 20, torch.ones(5, 2, dtype=torch.long)
    expected = h.logits(model, input_ids=fed(ids, mask, 0)[0])[:, 3:]
    torch.testing.assert_close(h.logits(with_tokens(model), input_ids=ids), expected, rtol=1e-6, atol=1e-6)
    square = built(T.BertForTokenClassification, T.BertConfig(**OPEN))
    expected = h.logits(square, input_ids=fed(ids, mask, 1)[0])
    expected = torch.cat((expected[:, :1], expected[:, 4:]), 1)
    torch.testing.assert_close(h.logits(with_tokens(square), input_ids=ids), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [{"perm_mask": torch.zeros(2, 7, 7)}, {"mems": [torch.zeros(1, 2, 16)] * 2}])
def test_what_has_no_room_for_a_prompt_is_refused(given):
    model = with_tokens(built(T.XLNetLMHeadModel, T.XLNetConfig(**XLNET)))
    with pytest.raises(AttachError, match=f"a prompt has no room in {next(iter(given))}; leave it out"):
        model(input_ids=IDS, **given)


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 7, 7), {"full_attention": None}])
def test_a_mask_of_each_query_is_refused(mask):
    model = with_tokens(built(T.LlamaForCausalLM, T.LlamaConfig(**OPEN)))
    with pytest.raises(AttachError, match=r"needs an attention mask \(batch, tokens\), found (one of \(2, 1|a dict)"):
        model(input_ids=IDS, attention_mask=mask)


# Images


def llava():
    text, image = T.LlamaConfig(**OPEN), T.CLIPVisionConfig(**IMAGE, image_size=8)
    more = {"image_token_index": 60, "vision_feature_select_strategy": "default", "vision_feature_layer": -1}
    return T.LlavaForConditionalGeneration, T.LlavaConfig(text_config=text, vision_config=image, **more)


def gemma3():
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    text = T.Gemma3TextConfig(**OPEN, head_dim=8, num_key_value_heads=1, **layers)
    image = T.SiglipVisionConfig(**IMAGE, image_size=8, vision_use_head=False)
    more = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59}
    return T.Gemma3ForConditionalGeneration, T.Gemma3Config(text_config=text, vision_config=image, **more)


def paligemma():
    text = T.GemmaConfig(**OPEN, head_dim=8, num_key_value_heads=1)
    image = T.SiglipVisionConfig(**IMAGE, image_size=8, vision_use_head=False)
    more = {"image_token_index": 60, "projection_dim": 16}
    return T.PaliGemmaForConditionalGeneration, T.PaliGemmaConfig(text_config=text, vision_config=image, **more)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**OPEN, "num_key_value_heads": 1, "rope_parameters": rope}
    image = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
             "temporal_patch_size": 1, "spatial_merge_size": 2}  # fmt: skip
    more = {"image_token_id": 60, "video_token_id": 57, "vision_start_token_id": 58, "vision_end_token_id": 59}
    return T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig(text_config=text, vision_config=image, **more)


IMAGES = {"llava": (llava, 4), "gemma3": (gemma3, 4), "paligemma": (paligemma, 4), "qwen2_vl": (qwen2_vl, 1)}


def image_and_text(name):
    """A model, two texts of one image each, and what it gets beside ids and mask."""
    make, places = IMAGES[name]
    model = built(*make())
    ids = torch.tensor([[1, 58, *[60] * places, 59, 21, 22], [1, 58, *[60] * places, 59, 31, 32]])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    more = {"pixel_values": pixels}
    if name == "qwen2_vl":
        more = {"pixel_values": pixels.reshape(8, 48), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
        more["mm_token_type_ids"] = (ids == 60).long()
    if name in ("gemma3", "paligemma"):
        more["token_type_ids"] = (ids == 60).long() if name == "gemma3" else torch.zeros_like(ids)
    return model, ids, more


def put_among(more):
    return {k: widened(x, 0, 0) if k.endswith("type_ids") else x for k, x in more.items()}


@pytest.mark.parametrize("name", IMAGES)
def test_a_prompt_beside_an_image_is_its_tokens(name):
    model, ids, more = image_and_text(name)
    mask = torch.ones_like(ids)
    longer, wide = fed(ids, mask, 0)
    expected = h.logits(model, input_ids=longer, attention_mask=wide, **put_among(more))[:, 3:]
    plain = h.logits(model, input_ids=ids, attention_mask=mask, **more)
    with_tokens(model)
    found = h.logits(model, input_ids=ids, attention_mask=mask, **more)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    with sm.disabled(model):
        assert torch.equal(h.logits(model, input_ids=ids, attention_mask=mask, **more), plain)


@pytest.mark.parametrize("name", IMAGES)
def test_generating_beside_an_image_is_as_with_tokens(name):
    model, ids, more = image_and_text(name)
    mask = torch.ones_like(ids)
    longer, wide = fed(ids, mask, 0)
    wanted = generated(model, {"input_ids": longer, "attention_mask": wide, **put_among(more)}, **OPTIONS)
    with_tokens(model)
    found = generated(model, {"input_ids": ids, "attention_mask": mask, **more}, **OPTIONS)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_models_that_compare_images_and_texts_are_refused():
    text, image = {**OPEN}, {**IMAGE, "image_size": 8}
    model = built(T.CLIPModel, T.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
    with pytest.raises(PlanError, match="it does not embed the tokens of one text"):
        sm.attach(model, "PromptTuning()")


def test_a_language_models_prompt_is_trained():
    model, ids, more = image_and_text("llava")
    sm.attach(model, "PromptTuning(3)")
    ((name, P),) = trained_parameters(model).items()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **more).loss.backward()
    assert name == "model.language_model.embed_tokens.edits.0.P"
    assert P.grad.abs().min(1).values.max() > 0


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_an_image_and_its_text_beside_longer_ones(name):
    model, ids, more = image_and_text(name)
    with_tokens(model)
    short, pixels = ids[1:, :-1], more["pixel_values"]
    types = {k: x[1:, :-1] for k, x in more.items() if k.endswith("type_ids")}
    alone = {"input_ids": short, "attention_mask": torch.ones_like(short), "pixel_values": pixels[1:], **types}
    pad = torch.zeros(1, 1, dtype=torch.long)
    left = torch.cat((ids[:1], torch.cat((pad, short), 1)))
    both = {"input_ids": left, "attention_mask": (left != 0).long(), "pixel_values": pixels}
    both |= {k: torch.cat((more[k][:1], torch.cat((pad, x), 1))) for k, x in types.items()}
    wanted, found = h.logits(model, **alone)[0], h.logits(model, **both)[1, 1:]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    wanted = generated(model, alone, **OPTIONS)
    found = generated(model, both, **OPTIONS)
    torch.testing.assert_close(found[1][:, 1:], wanted[1], rtol=1e-4, atol=1e-4)


def test_a_model_that_embeds_and_ends_in_logits_itself():
    """Nemotron-H Omni has no model between its head and its language model: labels get room, logits lose it."""
    pair = next(pair for pair in tiny_models.pairs() if pair.cls == "NemotronH_Omni_Reasoning_V3")
    with torch.no_grad():
        model, given, _ = tiny_models.tiny(pair)
    model, ids = model.float().eval(), given["input_ids"]
    mask, alone = torch.ones_like(ids), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer, wide = fed(ids, mask, 0)
    expected = h.logits(model, input_ids=longer, attention_mask=wide)[:, 3:]
    with_tokens(model)
    torch.testing.assert_close(h.logits(model, **alone), expected, rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(**alone, labels=ids).loss, loss, rtol=1e-4, atol=1e-4)
    last = model(**alone, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "error"),
    [
        ("FunnelForSequenceClassification", "it shortens the text"),
        ("VoxtralRealtimeForConditionalGeneration", "its own piece of sound"),
        ("Kosmos2ForConditionalGeneration", "does not embed the tokens of one text"),
        ("InstructBlipForConditionalGeneration", "does not embed the tokens of one text"),
    ],
)
def test_texts_that_are_no_rows_of_tokens_of_their_own(cls, error):
    pair = next(pair for pair in tiny_models.pairs() if pair.cls == cls)
    with torch.no_grad():
        model, given, _ = tiny_models.tiny(pair)
    with pytest.raises((AttachError, PlanError), match=error):
        sm.attach(model, "PromptTuning(3)")(**given)
