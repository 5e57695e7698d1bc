"""What a model's class or configuration never reads is left out, and nothing else is."""

import warnings

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import PlanError
from smidgen.delta.hf_peft.conversion import from_peft
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.sites import data_flow as flow
from smidgen.sites.roles import within
from smidgen.sites.unread_parts import unread
from smidgen.steps.gradient_checks import Watch
from smidgen.testing.cases import shake
from tests import helpers as h

SIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
VISION = {**SIDE, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
TEXT = {**SIDE, "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64}
TOWERS = {"clip": T.CLIPVisionConfig, "siglip": T.SiglipVisionConfig, "dinov2": T.Dinov2Config}


def llava(chosen=-2, tower="clip", cls="Llava", **options):
    config = getattr(T, f"{cls}Config")(
        vision_config=TOWERS[tower](**VISION), text_config=T.LlamaConfig(**TEXT), image_token_id=39,
        vision_feature_layer=chosen,
        vision_feature_select_strategy="full" if tower == "siglip" else "default", **options,
    )  # fmt: skip
    return ready(getattr(T, f"{cls}ForConditionalGeneration"), config)


def ready(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
    shake(model.parameters())
    return model


def inputs(model):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images}
    ids = torch.randint(4, 30, (2, 12), generator=generator)
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": ids}
    ids[:, 2:6] = 39
    return {"input_ids": ids, "pixel_values": images}


def without_gradient(model):
    """Names of the parameters that the logits do not depend on, as a backward pass tells."""
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**inputs(model)).logits.square().sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    return found


def said(model):
    """Names of the parameters in the parts that are never read."""
    return {name for name, _ in model.named_parameters() if any(within(name, path) for path in unread(model))}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("chosen", [-1, -2, -4, 1, 3, [-3, 0], [-2, -4, 1]])
def test_what_lies_above_the_chosen_states(chosen, tower):
    model = llava(chosen, tower)
    wanted = without_gradient(model)
    assert any("post_layernorm" in name for name in wanted)
    assert said(model) == wanted - {"model.vision_tower.embeddings.mask_token"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tower", ["siglip", "dinov2"])
def test_the_last_state_may_be_behind_the_last_norm(tower, tied):
    """DINOv2 records its states in its encoder, so what its configuration ties is not behind the norm around that."""
    model = llava(-1, tower)
    model.model.vision_tower.config.tie_last_hidden_states = tied
    wanted = without_gradient(model) - {"model.vision_tower.embeddings.mask_token"}
    norms = ("model.vision_tower.layernorm", "model.vision_tower.post_layernorm")
    assert any(name.startswith(norms) for name in wanted) == (not tied or tower == "dinov2")
    assert said(model) == wanted


def clip():
    vision = T.CLIPVisionConfig(**VISION).to_dict()
    return ready(T.CLIPForImageClassification, T.CLIPConfig(vision_config=vision, num_labels=3))


def siglip():
    vision = T.SiglipVisionConfig(**VISION).to_dict()
    return ready(T.SiglipForImageClassification, T.SiglipConfig(vision_config=vision, num_labels=3))


def of_text(name, **options):
    config = getattr(T, f"{name.partition('For')[0]}Config")
    return ready(getattr(T, name), config(**h.BASE | {"vocab_size": 40}, num_labels=3, **options))


BART = {f"{side}_{k}": v for side in ("encoder", "decoder")
        for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
CLASSES = {
    "clip": (clip, {"vision_model.post_layernorm"}),
    "siglip": (siglip, {"vision_model.head"}),
    "esm": (lambda: of_text("EsmForTokenClassification", pad_token_id=1, mask_token_id=2), {"esm.contact_head"}),
    "layoutlm": (lambda: of_text("LayoutLMForTokenClassification"), {"layoutlm.pooler"}),
    "fnet": (lambda: of_text("FNetForTokenClassification"), {"fnet.pooler"}),
    "canine": (lambda: of_text("CanineForTokenClassification"), {"canine.pooler"}),
    "canine text": (
        lambda: of_text("CanineForSequenceClassification"),
        {"canine.projection", "canine.final_char_encoder"},
    ),
    "bert": (lambda: of_text("BertForSequenceClassification"), set()),
    "bart": (
        lambda: ready(T.BartForConditionalGeneration, T.BartConfig(vocab_size=40, d_model=16, **BART)),
        set(),
    ),
    "layoutlm text": (lambda: of_text("LayoutLMForSequenceClassification"), set()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_drops(name):
    make, wanted = CLASSES[name]
    model = make()
    assert set(unread(model)) == wanted
    assert said(model) <= without_gradient(model)


RECIPES = ("LN()", "BitFit()", "LoRA(rank=2)", "IA3()", "SSF()", "Prefix(length=2)", "Adapter(width=4)")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [llava, clip, siglip], ids=["llava", "clip", "siglip"])
def test_every_method_trains_by_default(make, recipe):
    model = make()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), seed=2)
    watch = Watch(model)
    model(**inputs(model)).logits.square().sum().backward()
    watch.first(model)
    assert not [name for name, p in trained_parameters(model).items() if p.grad is None]


def test_layers_are_counted_among_those_that_are_read():
    """Three blocks, of which two are read: the top one is the second."""
    plan = resolve(llava(), "LN(layers='top:1', stack='vision_tower')")
    assert plan.trained
    assert all(name.startswith("model.vision_tower.encoder.layers.1.") for name in plan.shapes if "vision" in name)


def test_a_plan_names_what_is_left_out():
    model = llava()
    left = ("model.vision_tower.encoder.layers.2", "model.vision_tower.post_layernorm")
    plan = resolve(model, "LN()")
    assert plan.unread == left
    assert plan.to_json()["unread"] == list(left)
    assert str(plan).endswith(f"left out, never read: {left[1]}")
    assert resolve(model, "LoRA()").unread == left[:1]
    assert not any("never read" in line for line in str(resolve(clip(), "LoRA()")).splitlines())
    (paths,) = (v for k, v in sm.doctor(model, "LN()", inputs=inputs(model)).left.items() if "never read" in k)
    assert paths == left


def test_an_error_says_that_it_is_never_read():
    with pytest.raises(PlanError, match=r"no module or parameter 'post_layernorm'.*never reads .*post_layernorm"):
        resolve(clip(), "Full(target='post_layernorm')")


# the code of classes


class Parts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (torch.nn.Linear(2, 2) for _ in range(4))


Output = T.modeling_outputs.BaseModelOutputWithPooling


class Plain(Parts):
    def forward(self, x):
        h = self.one(x)
        for _ in range(2):
            h = self.helper(h)
        return Output(last_hidden_state=h, pooler_output=self.three(h))

    def helper(self, h):
        return self.two(h)


class InPlace(Parts):
    def forward(self, x):
        h = self.one(x)
        h.add_(self.two(x))
        kept = []
        kept.append(self.three(h))
        return Output(pooler_output=kept[0], last_hidden_state=h)


class Late(Parts):
    def forward(self, x):
        h = x
        for _ in range(2):
            x = h
            h = self.two(x)
        return Output(last_hidden_state=x)


class Looked(Parts):
    def forward(self, x):
        return Output(last_hidden_state=getattr(self, "one")(x))  # noqa: B009


class Walked(Parts):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return Output(last_hidden_state=x)


class Handed(Parts):
    def forward(self, x):
        found = Output(last_hidden_state=self.one(x))
        return found


def test_what_outputs_are_computed_with():
    found = flow.output_fields(Plain)
    assert list(found) == ["last_hidden_state", "pooler_output"], "in the order of the class of outputs"
    assert {"one", "two"} <= found["last_hidden_state"]
    assert not {"three", "four"} & found["last_hidden_state"]
    assert "three" in found["pooler_output"]
    found = flow.output_fields(InPlace)
    assert {"one", "two"} <= found["last_hidden_state"]
    assert {"one", "two", "three"} <= found["pooler_output"]
    assert list(found) == ["last_hidden_state", "pooler_output"]
    assert "two" in flow.output_fields(Late)["last_hidden_state"], "what a loop's end makes comes in at its start"


@pytest.mark.parametrize("cls", [Looked, Walked, Handed])
def test_code_that_is_not_plain_says_nothing(cls):
    assert flow.output_fields(cls) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_peft_that_covers_what_is_never_read(tmp_path):
    """PEFT puts its matrices there as well, where they have no effect: the rest is the same function."""
    peft = pytest.importorskip("peft")
    model = llava()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    tuned = h.peft_adapter(model, config, tmp_path).eval()
    with torch.no_grad():
        wanted = tuned(**inputs(model)).logits
        sm.attach(model, from_peft(tmp_path, model))
        assert torch.allclose(model(**inputs(model)).logits, wanted, atol=1e-5)
    assert not any("vision_tower.encoder.layers.2" in name for name in trained_parameters(model))
