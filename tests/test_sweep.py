"""Forty model types of transformers, tiny: no method is silently wrong on one, and none breaks.

The whole of it, every type and method, is benchmarks/sweep.py.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smidgen as sm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import sweep
    import tiny_inputs
    import tiny_models
    import uncovered
    import verdicts
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

SAMPLE = (
    # encoders of text
    "albert/AlbertForSequenceClassification",
    "bert/BertForTokenClassification",
    "canine/CanineForTokenClassification",
    "deberta-v2/DebertaV2ForSequenceClassification",
    "esm/EsmForMaskedLM",
    "funnel/FunnelForSequenceClassification",
    "layoutlm/LayoutLMForTokenClassification",
    "longformer/LongformerForSequenceClassification",
    "modernbert/ModernBertForSequenceClassification",
    "xlnet/XLNetForSequenceClassification",
    # decoders
    "bloom/BloomForCausalLM",
    "cohere/CohereForCausalLM",
    "falcon/FalconForCausalLM",
    "gemma3_text/Gemma3ForCausalLM",
    "gpt2/GPT2ForSequenceClassification",
    "gpt_neox/GPTNeoXForCausalLM",
    "llama/LlamaForCausalLM",
    "mpt/MptForCausalLM",
    "nemotron/NemotronForCausalLM",
    "qwen3/Qwen3ForSequenceClassification",
    # experts
    "deepseek_v3/DeepseekV3ForCausalLM",
    "llama4_text/Llama4TextModel",
    "mixtral/MixtralForCausalLM",
    "phimoe/PhimoeForCausalLM",
    # states
    "falcon_h1/FalconH1ForCausalLM",
    "jamba/JambaForCausalLM",
    "mamba/MambaForCausalLM",
    # encoders with decoders
    "bart/BartForConditionalGeneration",
    "longt5/LongT5ForConditionalGeneration",
    "t5/T5ForConditionalGeneration",
    # images
    "clip/CLIPForImageClassification",
    "convnext/ConvNextForImageClassification",
    "cvt/CvtForImageClassification",
    "dinov3_vit/DINOv3ViTModel",
    "swin/SwinForImageClassification",
    # sounds
    "wav2vec2/Wav2Vec2ForSequenceClassification",
    "wavlm/WavLMForSequenceClassification",
    "whisper/WhisperForConditionalGeneration",
    # images and text
    "llava/LlavaForConditionalGeneration",
    "qwen2_vl/Qwen2VLForConditionalGeneration",
)
# In bfloat16: what asks for its own dtype while it runs, uses a weight far from its module, has norms of two outputs or
# a float32 stream, or chooses experts by less than rounding.
LOW = {
    "dinov3_vit/DINOv3ViTModel": ("Full()",),
    "fsmt/FSMTForConditionalGeneration": ("Full()",),
    "gemma3n_text/Gemma3nForCausalLM": ("Full()",),
    "ibert/IBertForMaskedLM": ("LN()", "Full()"),
    "kimi_linear/KimiLinearForCausalLM": ("Full()",),
    "lxmert/LxmertModel": ("Full()",),
    "openai-gpt/OpenAIGPTForSequenceClassification": ("Full()",),
    "perceiver/PerceiverForMaskedLM": ("Full()",),
    "qwen3_5_moe/Qwen3_5MoeForConditionalGeneration": ("LN()", "Full()"),
    "smolvlm/SmolVLMForConditionalGeneration": ("Full()",),
    "vits/VitsModel": ("Full()",),
    "zaya/ZayaForCausalLM": ("LN()", "BitFit()", "Full()"),
}
TURN = 6  # recipes for each: LN(), and five others in turn
# what is wrong today -> pair -> recipes; one that is mended must leave the list
KNOWN_BY_REASON: dict[str, dict[str, tuple[str, ...]]] = {}
KNOWN = {
    (pair, recipe): reason
    for reason, pairs in KNOWN_BY_REASON.items()
    for pair, recipes in pairs.items()
    for recipe in recipes
}


def recipes(pair):
    """LN() and five others, so that three neighbours in the sample have every recipe between them."""
    others = sweep.RECIPES[1:]
    first = SAMPLE.index(pair) * (TURN - 1)
    return (sweep.RECIPES[0], *(others[(first + i) % len(others)] for i in range(TURN - 1)))


@pytest.fixture(scope="module")
def pairs():
    return {str(pair): pair for pair in tiny_models.pairs()}


def subject(pair, dtype=None):
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model, inputs, _ = tiny_models.tiny(pair)
        return verdicts.Subject(model, inputs, dtype)


@pytest.mark.parametrize("name", SAMPLE)
def test_no_method_is_wrong_and_none_breaks(name, pairs):
    found = subject(pairs[name])
    for recipe in recipes(name):
        verdict = verdicts.judge(found, recipe)
        failed = verdict["outcome"] in ("wrong", "crash", "stopped")
        if reason := KNOWN.get((name, recipe)):
            assert failed, f"{recipe} on {name} is mended ({reason}): take it from KNOWN_BY_REASON"
        else:
            assert not failed, f"{recipe} on {name}: {verdict}"


@pytest.mark.parametrize("name", LOW)
def test_none_is_wrong_in_low_precision(name, pairs):
    found = subject(pairs[name], torch.bfloat16)
    for recipe in LOW[name]:
        assert verdicts.judge(found, recipe) == {"outcome": "ok"}, recipe


def test_a_start_that_is_off_by_more_than_rounding_is_seen(pairs, monkeypatch):
    """Rounding moves a dense model's output by less than a wrong start; a near tie between experts, by more."""
    dense, experts = (
        subject(pairs[name], torch.bfloat16)
        for name in ("llama/LlamaForCausalLM", "qwen3_5_moe/Qwen3_5MoeForConditionalGeneration")
    )
    assert dense.rounding < verdicts.LOW < experts.rounding < 0.5

    def off(model, recipe):
        ATTACH(model, recipe)
        verdicts.shake(verdicts.trained_parameters(model).values(), 0.3)

    monkeypatch.setattr(sm, "attach", off)
    assert "the start is off by" in verdicts.judge(dense, "LN()")["why"]


def test_the_sample_is_spread_over_types_and_methods(pairs):
    assert len(SAMPLE) == len({name.split("/")[0] for name in SAMPLE}) == 40
    assert set(SAMPLE) <= set(pairs)
    used = [recipe for name in SAMPLE for recipe in recipes(name)]
    assert all(used.count(recipe) >= 10 for recipe in sweep.RECIPES)
    assert {name for name, _ in KNOWN} <= set(SAMPLE)
    assert all(recipe in recipes(name) for name, recipe in KNOWN), "a known fault that is not looked at"


def test_every_type_has_a_pair(pairs):
    types = {pair.type for pair in pairs.values()}
    assert {"bert", "gpt2", "t5", "whisper", "llava", "mamba2", "vit", "wav2vec2"} <= types
    assert len(types) > 500
    assert len(pairs) > 800


ATTACH, DETACH, MERGE = sm.attach, sm.detach, sm.merge


def _deaf(model, recipe):
    """Gradients of zero arrive, and nothing changes."""
    ATTACH(model, recipe)
    for module in model.modules():
        for edit in getattr(module, "edits", {}).values():
            edit.enabled = False
    values = list(verdicts.trained_parameters(model).values())

    def touch(module, args, output):
        output["logits"] = output["logits"] + 0 * sum(value.sum() for value in values)

    model.register_forward_hook(touch)


def _cut_off(model, recipe):
    """The output depends on nothing that is trained, as `fit` says, and stops."""
    ATTACH(model, recipe)
    for module in model.modules():
        for edit in getattr(module, "edits", {}).values():
            edit.enabled = False


def _careless(model):
    delta = DETACH(model)
    next(model.parameters()).data.view(-1)[0] += 1
    return delta


def _forgetful(model):
    merged = MERGE(model)
    merged.get_parameter("bert.encoder.layer.0.attention.self.query.weight").data.zero_()
    return merged


@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("attach", _deaf, "change no output"),
        ("attach", lambda model, recipe: 1 / 0, "ZeroDivisionError"),
        ("detach", _careless, "is not what it was"),
        ("merge", _forgetful, "differ"),
    ],
)
def test_each_check_can_fail(name, broken, says, pairs, monkeypatch):
    found = subject(pairs["bert/BertForMaskedLM"])
    monkeypatch.setattr(sm, name, broken)
    verdict = verdicts.judge(found, "LoRA(rank=2)")
    assert verdict["outcome"] in ("wrong", "crash")
    assert says in verdict["why"]


def test_what_fit_stops_with_is_stopped(pairs, monkeypatch):
    monkeypatch.setattr(sm, "attach", _cut_off)
    verdict = verdicts.judge(subject(pairs["bert/BertForMaskedLM"]), "LoRA(rank=2)")
    assert verdict["outcome"] == "stopped"
    assert "depends on nothing that is trained" in verdict["why"]


def test_an_advised_stack_is_judged(pairs):
    """Text alone does not run an image tower: the verdict is of the recipe on the stack that the error names."""
    found = subject(pairs["minicpm_ocr/MiniCPMOcrForConditionalGeneration"])
    assert verdicts.once(found, "LN()")["outcome"] == "stopped"
    assert verdicts.judge(found, "LN()") == {"outcome": "ok", "stack": "'language_model'"}
    assert verdicts.judge(found, "LoRA(rank=2)")["stack"] == "'language_model'"


def test_what_is_left_out_is_found(pairs):
    model = subject(pairs["mixtral/MixtralForCausalLM"]).model
    plan = sm.plan(model, "LoRA(rank=2, layers=0)")
    assert uncovered.uncovered(model, plan) == "1 of 2 attention modules: model.layers.*.self_attn"
    assert not uncovered.uncovered(model, sm.plan(model, "LN()"))


def test_what_a_recipe_does_not_mean_is_not_asked_for(pairs):
    """An adapter's usual sites are no attention to another sequence, a convolution is no attention."""
    model = subject(pairs["t5/T5ForConditionalGeneration"]).model
    assert not uncovered.uncovered(model, sm.plan(model, "Adapter(width=4)"))
    assert "attention" in uncovered.uncovered(model, sm.plan(model, "Adapter(width=4, layers=0)"))
    model = subject(pairs["cvt/CvtForImageClassification"]).model
    assert not uncovered.uncovered(model, sm.plan(model, "LoRA(rank=2, target='linear')"))


def test_a_model_that_casts_a_part_of_itself_is_judged_in_float32(pairs):
    """Switch's router makes its map a float32 one while it runs."""
    found = subject(pairs["switch_transformers/SwitchTransformersForConditionalGeneration"])
    assert found.dtype == torch.float32
    assert verdicts.judge(found, "LoRA(rank=2, target='linear')")["outcome"] == "ok"
    assert verdicts.judge(found, "Full()")["outcome"] == "ok"


def test_the_file_holds_what_was_found(tmp_path):
    class Options:
        recipes = ("LN()", "Full()")
        dtype = "float64"

    found = {
        "a/A": {
            "dtype": "float64",
            "recipes": {"LN()": {"outcome": "ok"}, "Full()": {"outcome": "refused", "why": "x"}},
        },
        "b/B": {"not built": "timm"},
    }
    sweep.save(tmp_path / "sweep.json", found, Options, {"commit": "c"})
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep.unpacked(content) == found
    assert content["counts"]["all"]["ok"] == content["counts"]["all"]["refused"] == 1
    assert content["counts"]["all"]["not built"] == 2
    assert content["counts"]["built"] == 1


def test_recipes_are_split_at_commas_outside_brackets():
    assert sweep.split("LN(),LoRA(rank=2, target='linear')") == ("LN()", "LoRA(rank=2, target='linear')")


def test_places_for_images_are_made_as_the_model_asks():
    assert tiny_inputs.MISMATCH.search("do not match, tokens: 0, features: 8")[2] == "8"


@pytest.fixture
def page():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import gen_models
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return gen_models


def test_the_page_of_models_is_what_the_results_say(page, monkeypatch, tmp_path):
    assert page.PAGE.read_text() == page.text(), "run python docs/gen_models.py"
    content = json.loads(page.RESULTS.read_text())
    result = next(result for result in content["found"].values() if "recipes" in result)
    result["recipes"]["LN()"] = ["crash", 0]
    changed = tmp_path / "sweep.json"
    changed.write_text(json.dumps(content))
    monkeypatch.setattr(page, "RESULTS", changed)
    assert page.PAGE.read_text() != page.text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_page_tells_what_breaks_in_low_precision(page, dtype, monkeypatch, tmp_path):
    content = json.loads(page.RESULTS.read_text())
    first, second = [key for key, result in content["found"].items() if "recipes" in result][:2]
    content["found"][first]["recipes"]["LN()"] = ["crash", len(content["reasons"])]
    content["found"][second] = {"not built": len(content["reasons"]) + 1}
    content["reasons"] += ["it broke", "no kernel"]
    changed = tmp_path / "low.json"
    changed.write_text(json.dumps(content))
    monkeypatch.setitem(page.LOW, dtype, changed)
    text = page.text()
    assert f"- {dtype}, breaks: it broke: `LN` on `{first.partition('/')[2]}`" in text
    assert f"- {dtype}, not built: no kernel: `{second.partition('/')[2]}`" in text


def test_what_is_left_out_is_named_one_by_one(pairs):
    model = subject(pairs["mixtral/MixtralForCausalLM"]).model
    plan = sm.plan(model, "SSF()")
    assert uncovered.uncovered(model, plan) == "2 of 2 feed-forward modules: model.layers.*.mlp.experts"
    assert not uncovered.unnamed(model, plan)
    gap = replace(plan.left_out[0], places=("model.layers.*.self_attn",))
    assert uncovered.unnamed(model, replace(plan, left_out=(gap,))) == ["model.layers.*.mlp.experts"]


def test_what_is_the_heads_is_not_asked_for(pairs):
    """Perceiver's decoder is trained whole."""
    model = subject(pairs["perceiver/PerceiverForSequenceClassification"]).model
    assert "decoder" not in uncovered.uncovered(model, sm.plan(model, "SSF()"))


def test_types_are_merged_into_what_is_there(tmp_path):
    class Options:
        recipes, dtype, types, merge, again, out = ("LN()",), "float64", "b", True, False, tmp_path / "sweep.json"

    ok, refused = ({"dtype": "float64", "recipes": {"LN()": {"outcome": o}}} for o in ("ok", "refused"))
    old = {"a/A": ok, "b/B": ok}
    sweep.save(Options.out, old, Options, {"source": "one", "versions": {"torch": "2"}})
    now = {"source": "two", "versions": {"torch": "2"}}
    left = sweep.kept(Options, now)
    assert left == {"a/A": ok}
    sweep.save(Options.out, left | {"b/B": refused}, Options, now)
    content = json.loads(Options.out.read_text())
    assert sweep.unpacked(content) == {"a/A": ok, "b/B": refused}
    assert content["source"] == "one, of 1 types two"
    with pytest.raises(SystemExit, match="nothing can be merged"):
        sweep.kept(Options, {"source": "two", "versions": {"torch": "3"}})
