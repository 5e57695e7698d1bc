"""Tensors that a forward pass does not use: by chance, by routing, by the task, or never."""

import warnings

import pytest
import torch
import transformers as T
from torch import nn
from transformers import Trainer, TrainingArguments

import smidgen as sm
from smidgen.common.errors import PlanError, TrainError
from smidgen.planning.resolution import resolve
from smidgen.planning.stack_choice import stacks_around
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Recipe, parse
from smidgen.steps.gradient_checks import IdleWarning, Watch
from smidgen.testing.cases import shake
from tests import helpers as h
from tests import odd_models as odd
from tests.test_doctor import Reading


def train(model, recipe, name, tmp_path, steps=8, rows=2, labels=None):
    """Trainer with the callback; gives the names that moved."""
    model = sm.attach(model.float(), recipe)
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    batch = {k: v.float() if v.is_floating_point() else v for k, v in odd.inputs(name, rows).items()}
    batch["labels"] = labels if labels is not None else batch.get("decoder_input_ids", batch["input_ids"])
    made = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=1, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, seed=3,
        ),
        train_dataset=[{k: v[i] for k, v in batch.items()} for i in range(rows)],
        optimizers=(sm.optimizer(model, lr=1e-2), None),
        callbacks=[sm.TrainerCallback()],
    )  # fmt: skip
    made.train()
    return {n for n, p in trained_parameters(model).items() if not torch.equal(p, start[n])}


def test_a_layer_that_chance_drops_is_no_fault(tmp_path):
    """wav2vec 2.0 drops layers while it trains, by default; here nearly always."""
    model = odd.build("wav2vec2")
    model.config.layerdrop, model.config.apply_spec_augment = 0.8, False
    labels = torch.randint(3, 20, (2, 3), generator=torch.Generator().manual_seed(0))
    warnings.simplefilter("ignore", IdleWarning)
    moved = train(model, "LN(which='block')", "wav2vec2", tmp_path, steps=12, labels=labels)
    assert moved, "no layer was ever kept"


def test_a_layer_that_is_never_run_is_one_also_under_layerdrop(tmp_path):
    model = odd.build("wav2vec2")
    model.config.layerdrop, model.config.apply_spec_augment = 0.5, False
    model.wav2vec2.encoder.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    labels = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TrainError, match=r"got no gradient, first wav2vec2\.encoder\.layers\.1"):
        train(model, "LN(which='block')", "wav2vec2", tmp_path, labels=labels)


def test_an_expert_that_meets_no_token_is_no_fault(tmp_path):
    model = odd.build("switch")
    for module in model.modules():
        if hasattr(module, "router"):  # rows of zeros: the first of the largest is expert 0 or 1, never 2 or 3
            torch.nn.init.zeros_(module.router.classifier.weight[1:])
    recipe = "LoRA(rank=1, target=('wi', 'wo'))"
    said = r"of 80 trained tensors got no gradient, first \w+\.\S*\.experts\.expert_2\.\S+ in 8 steps: no token went"
    with pytest.warns(IdleWarning, match=said):
        moved = train(model, recipe, "switch", tmp_path, rows=1)
    assert 0 < len(moved) < len(trained_parameters(model))


def test_full_trains_what_the_task_uses(tmp_path):
    """XLNet's mask_emb stands for positions to be guessed, and r_s_bias for segments: there are none here."""
    model = odd.build("xlnet").float()
    model.resize_token_embeddings(len(h.WORDS))
    task = h.task(tmp_path / "task", 16, 4)
    with pytest.warns(
        IdleWarning,
        match=r"5 of 40 .*first transformer\.layer\.0\.rel_attn\.r_s_bias in 4 steps: the task does not use them",
    ):
        sm.fit(model, "Full()", task, tokenizer=h.tokenizer(), epochs=2, batch_size=8, progress=False)


def longformer(tmp_path, recipe):
    """Two layers, a head that reads the first token, which alone attends to all the text, by maps of its own."""
    config = T.LongformerConfig(**{**h.BASE, "max_position_embeddings": 80}, attention_window=4, num_labels=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.LongformerForSequenceClassification(config)
    shake(model.parameters(), 0.1)
    task = h.task(tmp_path / "task", 16, 4)
    return sm.fit(model, recipe, task, tokenizer=h.tokenizer(), epochs=3, batch_size=4, lr=1e-2, progress=False)


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [("LoRA(rank=2)", "4 of 12"), ("BitFit(norms=False)", r"\d+ of \d+"), ("Full()", r"\d+ of \d+")],
)
def test_what_a_model_itself_leaves_without_effect_is_named_at_the_end(recipe, counts, tmp_path):
    """The last layer's common maps move nothing: the first token's output is that of maps of its own."""
    first = r"longformer\.encoder\.layer\.1\.attention\.self\.(query|key)\."
    with pytest.warns(
        IdleWarning, match=rf"{counts} trained tensors had a gradient of zeros, first {first}.* in 12 steps"
    ):
        delta = longformer(tmp_path, recipe)
    assert any("layer.0.attention.self.query." in name for name in delta.tensors)


def test_a_term_that_has_no_effect_at_all_is_an_error(tmp_path):
    recipe = "LN() + LoRA(rank=2, target='query', layers=1)"
    with pytest.raises(TrainError, match=r"2 of \d+ .* did not move in 5 steps, first longformer\.encoder\.layer\.1"):
        longformer(tmp_path, recipe)


def test_biases_that_a_task_does_not_use(tmp_path):
    """No global attention without a token that is marked for it."""
    config = T.LongformerConfig(**{**h.BASE, "max_position_embeddings": 80}, attention_window=4)
    model = sm.attach(T.LongformerForMaskedLM(config), "BitFit()")
    watch = Watch(model)
    model(torch.randint(5, 12, (2, 8))).logits.square().sum().backward()
    watch.first(model)
    watch.saw(model)
    with pytest.warns(IdleWarning, match=r"6 of \d+ .*_global\.bias in 1 steps: the task does not use them"):
        watch.report(model, 1)


def test_biases_of_which_the_task_uses_none(tmp_path):
    with pytest.raises(
        TrainError,
        match=r"depends on nothing that is trained: .* got no gradient, first model\.vision_tower.*; all of it lies in "
        r"vision_tower, which these inputs do not run: give some that do \(images, sounds\), or a recipe that finds "
        r"something to train in model\.language_model\.layers$",
    ):
        train(odd.build("gemma3"), "BitFit()", "gemma3", tmp_path)


def test_a_tensor_without_values_is_not_trained():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = T.DINOv3ViTModel(T.DINOv3ViTConfig(**sizes, image_size=8, patch_size=4, num_register_tokens=0))
    assert model.embeddings.register_tokens.numel() == 0
    sm.attach(model, "Full()")
    assert "embeddings.mask_token" in trained_parameters(model)
    assert "embeddings.register_tokens" not in trained_parameters(model)
    shake(trained_parameters(model).values())
    image = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        wanted = model.eval()(**image).last_hidden_state
        assert torch.allclose(sm.merge(model)(**image).last_hidden_state, wanted, atol=1e-6)


ASIDE = {
    "an encoder": (
        lambda: T.BartForCausalLM(T.BartConfig(**odd_bart())),
        "LN()", "model.decoder.layers.0.encoder_attn_layer_norm.",
    ),
    "global attention": (
        lambda: T.LongformerForMaskedLM(
            T.LongformerConfig(**{**h.BASE, "max_position_embeddings": 80}, attention_window=4)
        ),
        "SSF()", "longformer.encoder.layer.1.attention.self.query_global.edits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASIDE)
def test_a_part_beside_others_that_a_task_does_not_run_is_named_at_the_end(name):
    build, recipe, part = ASIDE[name]
    model = sm.attach(build(), recipe)
    watch = Watch(model)
    model(torch.randint(5, 12, (2, 8))).logits.square().sum().backward()
    assert any(n.startswith(part) and p.grad is None for n, p in trained_parameters(model).items())
    watch.first(model)
    watch.saw(model)
    with pytest.warns(IdleWarning, match=r"got no gradient, first .* in 1 steps: the task does not use them"):
        watch.report(model, 1)


def test_what_is_added_to_a_map_that_is_read_is_none_beside_others():
    """Its owner's code takes the weight in a way that is not foreseen, so what is added there does not act."""
    model = sm.attach(nn.Sequential(nn.ModuleList([Reading()])), "LoRA(rank=2, target='linear')")
    model[0][0](torch.ones(2, 6)).square().sum().backward()
    with pytest.raises(TrainError, match=r"2 of 4 .* first 0\.0\.one"):
        Watch(model).first(model)


def test_a_block_of_which_nothing_runs_is_none_beside_others():
    model = sm.attach(T.BertModel(T.BertConfig(**h.BASE)), "LN()")
    model.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden
    model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    with pytest.raises(TrainError, match=r"4 of 10 .* first encoder\.layer\.1"):
        Watch(model).first(model)


def test_no_gradient_passes_through_an_indexer():
    """DeepSeek's picks keys under torch.no_grad: nothing in it can be trained."""
    model = odd.build("deepseek_v32")
    for recipe in ("LN()", "Full()", "LoRA(rank=2, target='linear')"):
        names = resolve(model, recipe).shapes
        assert names
        assert not any("indexer" in name for name in names), recipe
    sm.attach(model, "LN()")
    model(**odd.inputs("deepseek_v32")).logits.square().sum().backward()
    assert [n for n, p in trained_parameters(model).items() if p.grad is None] == []


def test_a_model_that_passes_no_gradient_is_refused():
    class Closed(T.BertModel):
        forward = torch.no_grad()(T.BertModel.forward)

    with pytest.raises(PlanError, match=r"no gradient passes through its forward, which stands under torch\.no_grad"):
        resolve(Closed(T.BertConfig(**h.BASE)), "LN()")


def test_a_tower_that_is_not_run_can_be_left_out(tmp_path):
    with pytest.raises(TrainError, match=r"vision_tower.*narrow the recipe \(stack='language_model'\)"):
        train(odd.build("gemma3"), "LN()", "gemma3", tmp_path)
    moved = train(odd.build("gemma3"), "LN(stack='language_model')", "gemma3", tmp_path)
    assert moved
    assert all("language_model" in name for name in moved)


# stack=


@pytest.mark.parametrize("recipe", ["LoRA(target='linear', stack='encoder')", "SSF(stack='model.encoder')"])
def test_stack_keeps_to_a_module(recipe):
    model = T.BartModel(T.BartConfig(**odd_bart()))
    whole = resolve(model, recipe.replace(", stack='encoder'", "").replace("stack='model.encoder'", ""))
    part = resolve(T.BartForConditionalGeneration(T.BartConfig(**odd_bart())) if "model." in recipe else model, recipe)
    assert 0 < part.trained < whole.trained
    assert all(".edits." in n and n.removeprefix("model.").startswith("encoder.") for n in part.shapes)


def odd_bart():
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder")
             for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32, **sides}


STACKS = ("'language_model'", "'vision_tower'")


def test_a_stack_that_is_not_there():
    model = odd.build("gemma3")
    with pytest.raises(PlanError, match=r"stack='langage_model' is no module .*did you mean 'language_model'"):
        resolve(model, "LN(stack='langage_model')")
    for wrong in ("3", "''", "()", "('language_model', 3)"):
        with pytest.raises(PlanError, match="must be a module path or the end of one"):
            resolve(model, f"LN(stack={wrong})")


def test_several_stacks_are_those_together():
    model = odd.build("gemma3")
    names = {row.site.path for row in resolve(model, "LN()").entries}
    parts = [{row.site.path for row in resolve(model, f"LN(stack={stack})").entries} for stack in STACKS]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    both = resolve(model, f"LN(stack=({', '.join(STACKS)}))")
    assert {row.site.path for row in both.entries} == parts[0] | parts[1] <= names
    assert parse(str(both.recipe)) == both.recipe
    assert Recipe.from_json(both.recipe.to_json()) == both.recipe


@pytest.mark.parametrize(
    ("reached", "others", "wanted"),
    [
        (["m.text.0.norm.", "m.text.norm."], ["m.vision.0.norm."], ["text"]),
        (["m.text.0.norm.", "m.dec.norm."], ["m.vision.norm."], ["text", "dec"]),
        (["m.text.0.norm."], ["m.vision.text.norm."], ["m.text"]),  # "text" would mean both
        (["m.0.a.", "m.1.a."], ["m.0.b.", "m.1.b."], ["m.0.a", "m.1.a"]),
        (["m.a.", "m."], ["m.b."], []),  # m owns a tensor itself
    ],
)
def test_stacks_that_hold_what_was_reached(reached, others, wanted):
    assert stacks_around(reached, others) == wanted


def test_stack_is_saved_where_it_is_given():
    recipe = parse("LN(which='qk', stack='encoder')")
    assert str(recipe) == "LN(which='qk', stack='encoder')"
    assert type(recipe).from_json(recipe.to_json()) == recipe
    assert "stack" not in parse("LN()").to_json()[0], "files without it are as they were"


def test_a_delta_of_one_stack_comes_back(tmp_path):
    model = odd.build("gemma3").float()
    sm.attach(model, "LN(stack='language_model') + LoRA(rank=2, stack='vision_tower')")
    for p in trained_parameters(model).values():
        torch.nn.init.normal_(p)
    wanted = model(**odd.inputs("gemma3")).logits.detach()
    sm.detach(model).save(tmp_path)
    sm.attach(model, sm.Delta.load(tmp_path))
    assert torch.equal(model(**odd.inputs("gemma3")).logits, wanted)
