"""Attached models in other hands: transformers.Trainer, pipelines, generate, TRL."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    pipeline,
)

import smidgen as sm
from smidgen.common.errors import AttachError, DivergedError, TrainError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h

RECIPE = "LN() + LoRA(rank=2, dropout=0.1)"


def data(count, start=0):
    rows = h.rows(count, start)
    encoded = h.tokenizer()([row["text"] for row in rows])
    return Dataset.from_dict({**encoded, "labels": [int(row["label"] == "pos") for row in rows]})


def accuracy(found):
    return {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())}


def trainer(folder, model=None, recipe=RECIPE, callback=True, attach=True, optimizer=True, **options):
    """A Trainer with an attached tiny BERT."""
    model = model or h.bert(0.1)
    if attach:
        sm.attach(model, recipe)
    settings = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 2, "seed": 3,
    }  # fmt: skip
    adam = sm.optimizer(model, lr=1e-2, head_lr=1e-2) if optimizer is True else optimizer
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=data(48),
        eval_dataset=data(16, 100),
        data_collator=DataCollatorWithPadding(h.tokenizer()),
        compute_metrics=accuracy,
        optimizers=(adam or None, None),
        callbacks=[sm.TrainerCallback()] if callback else [],
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run to its end; tests only read."""
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.train()
    return made


def test_the_loss_and_the_metrics_are_there(done):
    evaluated = [entry for entry in done.state.log_history if "eval_loss" in entry]
    assert [entry["epoch"] for entry in evaluated] == [1.0, 2.0]
    assert all(np.isfinite(entry["eval_loss"]) and 0 <= entry["eval_accuracy"] <= 1 for entry in evaluated)
    assert done.evaluate()["eval_accuracy"] == evaluated[-1]["eval_accuracy"]


def test_checkpoints_hold_a_delta_and_a_small_file(done):
    model = done.model
    for step in (6, 12):
        folder = done.args.output_dir + f"/checkpoint-{step}"
        delta, tensors = sm.Delta.load(folder), load_file(folder + "/model.safetensors")
        assert str(delta.recipe) == RECIPE
        free = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(tensors) == free
        assert sum(t.numel() for t in tensors.values()) == delta.trained + delta.head_values
    h.same(sm.Delta.load(done.args.output_dir + "/checkpoint-12"), sm.Delta.of(model))
    base = h.bert(0.1)
    with sm.attached(base, delta):
        assert torch.equal(h.logits(base), h.logits(model))


def test_after_training_saving_is_refused_again(done, tmp_path):
    with pytest.raises(AttachError, match=r"smidgen\.Delta\.of"):
        done.save_model(str(tmp_path / "model"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_base_is_untouched(tmp_path):
    model = h.bert(0.1)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    made = trainer(tmp_path, model, max_steps=6, save_strategy="no", eval_strategy="no")
    made.train()
    delta = sm.detach(model)
    assert {n: torch.equal(t, values[n]) for n, t in model.state_dict().items()} == dict.fromkeys(values, True)
    assert "save_pretrained" not in model.__dict__
    assert not any("edits" in name for name in model.state_dict())
    assert not torch.equal(delta.tensors["classifier.weight"], values["classifier.weight"])


def test_resumed_it_does_the_same(done, tmp_path):
    class Stop(sm.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first = trainer(tmp_path / "run", callback=False)
    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == 6
    second = trainer(tmp_path / "run")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 12
    h.same(sm.Delta.of(second.model), sm.Delta.of(done.model))


def test_the_best_is_loaded_at_the_end(tmp_path):
    scores = iter([0.2, 0.9, 0.1])
    made = trainer(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", num_train_epochs=3, save_total_limit=3
    )
    made.compute_metrics = lambda found: {"accuracy": next(scores)}
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-12")
    h.same(sm.Delta.of(made.model), sm.Delta.load(made.state.best_model_checkpoint))
    last = sm.Delta.load(str(tmp_path / "checkpoint-18"))
    assert not torch.equal(last.tensors["classifier.weight"], sm.Delta.of(made.model).tensors["classifier.weight"])


def test_without_the_callback_saving_is_an_error(tmp_path):
    made = trainer(tmp_path, callback=False)
    with pytest.raises(AttachError, match=r"under Trainer, add smidgen\.TrainerCallback\(\)"):
        made.train()


def test_methods_that_grow_do_so(tmp_path):
    made = trainer(tmp_path, recipe="TriAdaptLoRA(rank=4, growth=1)", save_strategy="no")
    made.train()
    assert max(len(t) for n, t in trained_parameters(made.model).items() if n.endswith(".A")) > 1


def test_a_penalty_that_trainer_leaves_out_is_refused(tmp_path):
    with pytest.raises(TrainError, match=r"adds a penalty to the loss.*TrainerCallback\(penalised=True\)"):
        trainer(tmp_path, recipe="TriAdaptLoRA(rank=4, orthogonality=0.5)").train()


def test_without_anything_attached_the_callback_is_an_error(tmp_path):
    made = trainer(tmp_path, attach=False, optimizer=None)
    with pytest.raises(AttachError, match="nothing is attached"):
        made.train()


@pytest.mark.parametrize("steps", [3, 12])
def test_a_tensor_that_the_optimiser_lacks_is_noticed(steps, tmp_path):
    model = sm.attach(h.bert(0.1), RECIPE)
    some = [p for n, p in trained_parameters(model).items() if "layer.1" not in n]
    adam = torch.optim.AdamW(some, lr=1e-2)
    made = trainer(
        tmp_path, model, attach=False, optimizer=adam, save_strategy="no", eval_strategy="no", max_steps=steps
    )
    with pytest.raises(TrainError, match=r"did not move in [35] steps, first bert\.encoder\.layer\.1"):
        made.train()


def test_an_overflow_is_noticed_unless_the_loss_is_scaled():
    model = sm.attach(h.bert(), "LN()")
    model(**h.ids()).logits.sum().backward()
    next(iter(trained_parameters(model).values())).grad[0] = float("inf")
    callback, state, control = sm.TrainerCallback(), TrainerState(), TrainerControl()
    callback.first = 0
    with pytest.raises(TrainError, match=r"gradient of bert\.embeddings\.LayerNorm\.weight is not finite"):
        callback.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, control, model=model)
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, control, model=model)
    next(iter(trained_parameters(model).values())).grad = None
    with pytest.raises(TrainError, match="got no gradient"):
        callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, control, model=model)


def test_a_tensor_that_is_not_reached_is_noticed(tmp_path):
    model = h.bert(0.1)
    model.bert.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden
    made = trainer(tmp_path, model, save_strategy="no", eval_strategy="no")
    with pytest.raises(TrainError, match="got no gradient"):
        made.train()


def test_trained_without_sm_optimizer(tmp_path):
    """Trainer's own optimiser finds the free tensors too, at one learning rate."""
    made = trainer(tmp_path, optimizer=None, learning_rate=1e-2, save_strategy="no", eval_strategy="no")
    start = sm.Delta.of(made.model)
    made.train()
    moved = sm.Delta.of(made.model)
    assert all(not torch.equal(moved.tensors[n], t) for n, t in start.tensors.items())


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}])
def test_under_autocast_and_checkpointing(options, tmp_path):
    model = h.bert(0.1).to(torch.bfloat16) if "bf16" in options else h.bert(0.1)
    made = trainer(tmp_path, model, max_steps=6, eval_strategy="steps", eval_steps=6, save_strategy="no", **options)
    made.train()
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert np.isfinite(made.state.log_history[-2]["eval_loss"])


# Pipelines and generate


def test_a_pipeline_for_classification(tmp_path):
    task = h.task(tmp_path / "task", 64, 12)
    base = h.bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    settings = {"epochs": 8, "batch_size": 8, "lr": 1e-2, "head_lr": 2e-2, "progress": False}
    delta = sm.fit(base, "Full()", task, tokenizer=h.tokenizer(), **settings)
    with sm.attached(base, delta):
        classify = pipeline("text-classification", model=base, tokenizer=h.tokenizer(), device="cpu")
        said = [entry["label"] for entry in classify(["the film was great", "the film was awful"])]
    assert said == ["pos", "neg"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_with_a_cache(kind):
    model = sm.attach(h.causal(kind), "LN() + LoRA(rank=2, target='linear') + IA3()")
    prompt = h.ids(2, 5, mask=False)
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    plain = model.generate(**prompt, **options)
    shake(trained_parameters(model).values(), 0.3)
    cached = model.generate(**prompt, **options, use_cache=True)
    whole = model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain), "the edits change nothing"
    assert torch.equal(sm.merge(model).generate(**prompt, **options), cached)
    sm.detach(model)
    assert torch.equal(model.generate(**prompt, **options), plain)


# TRL


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    model = h.causal()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    sm.attach(model, "LN() + LoRA(rank=2)")
    args = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, max_length=16, save_steps=3, logging_steps=1, eos_token="[SEP]", pad_token="[PAD]",
    )  # fmt: skip
    made = trl.SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list([{"text": row["text"]} for row in h.rows(24)]),
        processing_class=h.tokenizer(),
        optimizers=(sm.optimizer(model, lr=2e-2), None),
        callbacks=[sm.TrainerCallback()],
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    h.same(sm.Delta.load(tmp_path / "checkpoint-6"), sm.Delta.of(model))
    assert json.loads((tmp_path / "checkpoint-6" / "delta.json").read_text())["head"] == []
    sm.detach(model)
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


def test_values_that_are_not_finite_stop_training(tmp_path):
    """Trainer leaves nan out of the loss that it logs, and goes on."""
    run = trainer(tmp_path, recipe="LN()")
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, sm.TrainerCallback))
    start = callback.on_step_end

    def spoil(args, state, control, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                trained_parameters(run.model)["bert.embeddings.LayerNorm.bias"][2] = float("nan")
        return start(args, state, control, **kwargs)

    callback.on_step_end = spoil
    with pytest.raises(DivergedError, match=r"after step 3, bert\.embeddings\.LayerNorm\.bias holds 1 values of 16"):
        run.train()
