"""Models from their configuration alone: counts and memory that were published, and what fits into which card."""

import json

import pytest
import torch
import transformers

import smidgen as sm
from smidgen.common.errors import ModelError
from smidgen.inference import model_shapes
from smidgen.training.memory.card_sizes import HELD, RECIPES
from tests import helpers as h
from tests.test_cli import call

GIB = 2**30
VALUES = {  # as their model cards say, in 1e9
    "llama-2-7b": 6.74,
    "llama-3-8b": 8.03,
    "qwen3-32b": 32.8,
    "mixtral-8x7b": 46.7,
    "deepseek-v3": 671,
}
NORMS = {  # two norms a layer and the last; Qwen3's of queries and keys, DeepSeek's of what it compresses
    "llama-2-7b": (2 * 32 + 1) * 4096,
    "llama-3-8b": (2 * 32 + 1) * 4096,
    "qwen3-32b": 64 * (2 * 5120 + 2 * 128) + 5120,
    "mixtral-8x7b": (2 * 32 + 1) * 4096,
    "deepseek-v3": 61 * (2 * 7168 + 1536 + 512) + 7168,
}


@pytest.mark.parametrize("name", sm.known_shapes())
def test_values_of_large_models_are_the_published_ones(name):
    model = sm.load_shapes(name)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(VALUES[name], rel=0.002)
    found = sm.plan(model, "LN()", batch_size=1, length=1) if name.startswith("llama-3") else None
    assert sum(m.weight.numel() for m in model.modules() if type(m).__name__.endswith("RMSNorm")) == NORMS[name]
    assert found is None or found.trained == NORMS[name]


def test_memory_of_a_step_is_the_published_one():
    """LLaMA-7B with AdamW at 8 x 512 tokens: Lv et al. 2023 (arXiv:2306.09782), table 1, GiB: parameters 12.55,
    optimiser 75.31 (float32: master and two moments), activations 45.61. They computed attention without fusion."""
    config = transformers.AutoConfig.for_model(**json.loads(_text("llama-2-7b")))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    costs = sm.plan(model, "Full()", batch_size=8, length=512).costs
    assert costs["weights_bytes"] / GIB == pytest.approx(12.55, rel=0.002)
    assert costs["training_state_bytes"] * 12 / 16 / GIB == pytest.approx(75.31, rel=0.002)
    assert costs["activation_bytes"] / GIB == pytest.approx(45.61, rel=0.15)


def _text(name):
    from importlib import resources

    return (resources.files("smidgen.inference") / "architectures" / f"{name}.json").read_text()


def test_work_of_a_token_is_that_of_the_experts_it_goes_to():
    """Mixtral: 12.9e9 of 46.7e9 values take part in a token (Jiang et al. 2024, arXiv:2401.04088), two FLOPs each."""
    costs = sm.plan(sm.load_shapes("mixtral-8x7b"), "LN(layers='top:1')", batch_size=1, length=128).costs
    assert costs["forward_flops_per_token"] == pytest.approx(2 * 12.9e9, rel=0.05)


def test_a_folder_needs_no_more_than_a_configuration(tmp_path):
    h.bert().config.save_pretrained(tmp_path)
    done = call("plan", "--model", tmp_path, "--recipe", "LN()", "--json")
    assert done.json["trained"] == sm.plan(h.bert(), "LN()").trained


def test_large_weights_are_not_read_for_a_plan(tmp_path, monkeypatch):
    h.bert().save_pretrained(tmp_path)
    assert not model_shapes.needs_shapes_only(str(tmp_path))
    monkeypatch.setattr(model_shapes, "SMALL", 10)
    (next(tmp_path.glob("*.safetensors"))).write_bytes(b"what would fail if it were read")
    assert call("plan", "--model", tmp_path, "--json").json["trained"] == sm.plan(h.bert(), "LN()").trained


def test_a_task_shapes_the_head(tmp_path):
    h.bert().config.save_pretrained(tmp_path / "base")
    task = h.task(tmp_path / "data")
    model = sm.load_shapes(tmp_path / "base", task)
    assert model.config.num_labels == len(task.labels)
    assert sm.plan(model, "LN()").head_values == (model.config.hidden_size + 1) * len(task.labels)


@pytest.mark.parametrize("name", ["llama-3-8", "no-such"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(ModelError, match=r"there are deepseek-v3, llama-2-7b, .*a folder with a config.json") as error:
        sm.load_shapes(name)
    assert "\n" not in str(error.value)
    done = call("plan", "--model", name, "--fits")
    assert done.code == 2


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the model") as error:
        sm.load_shapes(tmp_path)
    assert "\n" not in str(error.value)


def test_what_fits_is_what_the_plan_counts(monkeypatch):
    from smidgen.training.memory import card_sizes as module

    model = h.bert()
    rows = list(sm.device_fits(model, ["LN()", "Full()", "LN(layers=[99])"], batch_size=2, length=16))
    peaks = [sm.plan(model, recipe, batch_size=2, length=16).costs["peak_bytes"] for recipe in ("LN()", "Full()")]
    assert [row.peak_bytes for row in rows] == [*peaks, None]
    assert [row.card for row in rows] == [8, 8, None]
    assert "99" in rows[2].why
    for held, card in ((8 * GIB - peaks[0], 8), (8 * GIB - peaks[0] + 1, 16), (80 * GIB, None)):
        monkeypatch.setattr(module, "HELD", held)
        assert next(sm.device_fits(model, ["LN()"], batch_size=2, length=16)).card == card
    assert HELD == GIB


def test_the_command_shows_what_fits(tmp_path):
    h.bert().config.save_pretrained(tmp_path)
    asked = ["plan", "--model", tmp_path, "--fits", "--batch-size", 2, "--max-length", 16]
    found = call(*asked, "--recipe", "LoRA(rank=2)", "--json").json["fits"]
    assert [(row["recipe"], row["dtype"]) for row in found] == [
        (str(sm.parse(recipe)), dtype) for dtype in ("float32", "bfloat16") for recipe in (*RECIPES, "LoRA(rank=2)")
    ]
    assert "smallest card of 8, 16, 24, 48, 80 GB" in call(*asked).out.replace("\n", " ")
