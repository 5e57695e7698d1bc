"""LoRA, DoRA and PiSSA as PEFT runs them: the same outputs in float64, and the same tensors after both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.delta.attaching import attached
from smidgen.delta.hf_peft.conversion import from_peft, to_peft
from smidgen.delta.merging import merge
from tests import helpers as h
from tests.test_convert import config_of, edit_config, edit_tensors, lora_config, model_of, theirs, trained
from tests.test_convert import logits as outputs

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


def exact(name: str) -> nn.Module:
    """A tiny model in float64."""
    return model_of(name).double()


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def file_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def made_by_peft(base: nn.Module, folder: Path, **fields: Any) -> Tensor:
    """Save an adapter of PEFT's with random values; gives what PEFT computes after loading it."""
    h.peft_adapter(base, lora_config(**fields), folder)
    return outputs(theirs(base, folder))


WRITTEN = {
    "rslora": ("llama", "LoRA(rank=4, alpha=3, scaling='rslora')"),
    "rslora slices": ("gpt2", "LoRA(rank=2, alpha=3, target=('query', 'value'), scaling='rslora')"),
    "dora": ("llama", "DoRA(rank=2, alpha=3)"),
    "dora with bias": ("bert", "DoRA(rank=2, target='linear', layers='top:2')"),
    "dora rslora": ("roberta", "DoRA(rank=4, alpha=3, target='ff_in', scaling='rslora')"),
    "dora Conv1D": ("gpt2", "DoRA(rank=2, target=('c_attn', 'mlp.c_fc'))"),
    "dora slices": ("gpt2", "DoRA(rank=2, alpha=5)"),
    "dora t5": ("t5", "DoRA(rank=2, target=('query', 'ff_out'))"),
    "pissa": ("llama", "PiSSA(rank=2, alpha=3)"),
    "pissa rslora": ("bert", "PiSSA(rank=4, target='value', scaling='rslora', layers=1)"),
    "pissa Conv1D": ("gpt2", "PiSSA(rank=2, target='c_attn')"),
    "pissa slices": ("gpt2", "PiSSA(rank=1, alpha=3)"),
    "lora without layers": ("llama", "LoRA(rank=2, target='linear', exclude=('ff_in', 'key'), layers=(0, 2))"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_written_is_what_peft_computes(case: str, tmp_path: Path) -> None:
    """PEFT's model with the file gives our attached outputs, and ours again after reading the file."""
    name, recipe = WRITTEN[case]
    base = exact(name)
    delta = trained(base, recipe)
    to_peft(delta, base, tmp_path)
    plain = outputs(base)
    with attached(base, delta):
        wanted = outputs(base)
    assert distance(plain, wanted) > 1e-3
    assert distance(outputs(theirs(base, tmp_path)), wanted) < 1e-12
    with attached(base, from_peft(tmp_path, base)):
        assert distance(outputs(base), wanted) < 1e-12


@pytest.mark.parametrize("field", ["lora_alpha", "use_rslora", "magnitude", "start"])
def test_a_wrong_file_is_seen(field: str, tmp_path: Path) -> None:
    """The comparison above fails for another strength, another scale, other lengths, a start that is left in."""
    base = exact("llama")
    delta = trained(base, "PiSSA(rank=2, alpha=3)" if field == "start" else "DoRA(rank=4, alpha=3)")
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = outputs(base)
    if field in ("lora_alpha", "use_rslora"):
        edit_config(tmp_path, **{field: 3.001 if field == "lora_alpha" else True})
    elif field == "magnitude":
        edit_tensors(tmp_path, lambda t: t.update({n: v * 1.001 for n, v in t.items() if "magnitude" in n}))
    else:
        edit_tensors(tmp_path, lambda t: [t[n][:, 2:].zero_() for n in t if "lora_B" in n])
    assert distance(outputs(theirs(base, tmp_path)), wanted) > 1e-5


READ: dict[str, tuple[str, dict[str, Any], str]] = {
    "rslora": ("llama", {"use_rslora": True}, "LoRA(rank=4, alpha=6, scaling='rslora')"),
    "dora": ("llama", {"use_dora": True}, "DoRA(rank=4, alpha=6)"),
    "dora rslora": ("llama", {"use_dora": True, "use_rslora": True}, "DoRA(rank=4, alpha=6, scaling='rslora')"),
    "dora bert": (
        "bert",
        {"use_dora": True, "target_modules": ["query", "key"], "task_type": "SEQ_CLS", "lora_dropout": 0.1},
        "DoRA(rank=4, alpha=6, target=('query', 'key'), dropout=0.1)",
    ),
    "dora Conv1D": ("gpt2", {"use_dora": True, "fan_in_fan_out": True}, "DoRA(rank=4, alpha=6, target='c_attn')"),
    "dora layers": (
        "llama",
        {"use_dora": True, "target_modules": ["o_proj"], "layers_to_transform": [1, 2]},
        "DoRA(rank=4, alpha=6, target='attention_out', layers='top:2')",
    ),
    "excluded": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "up_proj", "gate_proj"]},
        "LoRA(rank=4, alpha=6, target=('query', 'key', 'value', 'attention_out'))",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_there_and_back_is_a_relabelling(case: str, tmp_path: Path) -> None:
    """PEFT -> ours -> PEFT: the same outputs, the same tensors bit for bit, the same strength."""
    name, fields, recipe = READ[case]
    base = exact(name)
    wanted = made_by_peft(base, tmp_path / "theirs", **fields)
    delta = from_peft(tmp_path / "theirs", base)
    assert str(delta.recipe) == recipe
    with attached(base, delta):
        assert distance(outputs(base), wanted) < 1e-12
    to_peft(delta, base, tmp_path / "ours")
    before, after = file_of(tmp_path / "theirs"), file_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out")
    assert {k: config_of(tmp_path / "theirs")[k] for k in kept} == {k: config_of(tmp_path / "ours")[k] for k in kept}


def test_a_dora_merges_as_in_peft(tmp_path: Path) -> None:
    base = exact("llama")
    made_by_peft(base, tmp_path, use_dora=True)
    with torch.no_grad():
        wanted = outputs(theirs(base, tmp_path).merge_and_unload())
    assert distance(outputs(merge(base, from_peft(tmp_path, base))), wanted) < 1e-12


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_of_peft(rslora: bool, tmp_path: Path) -> None:
    """PEFT rewrites the base when it loads such a file; the same outputs come from the untouched base here."""
    base = model_of("llama")
    wanted = made_by_peft(base, tmp_path, init_lora_weights="pissa", use_rslora=rslora)
    before = copy.deepcopy(base.state_dict())
    delta = from_peft(tmp_path, base)
    assert str(delta.recipe) == "PiSSA(rank=4, alpha=6" + (", scaling='rslora')" if rslora else ")")
    with attached(base, delta):
        assert distance(outputs(base), wanted) < 1e-5
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    # a plain LoRA of these tensors, without the start, is something else
    edit_config(tmp_path, init_lora_weights=True)
    with attached(base, from_peft(tmp_path, base)):
        assert distance(outputs(base), wanted) > 1e-2
    # and our PiSSA, written as a LoRA of twice the rank, is PEFT's
    to_peft(delta, base, tmp_path / "plain")
    assert config_of(tmp_path / "plain")["r"] == 8
    assert distance(outputs(theirs(base, tmp_path / "plain")), wanted) < 1e-5


def test_pissa_without_a_gap(tmp_path: Path) -> None:
    """Where singular values are equal, PEFT's own start is any of many."""
    base = model_of("llama")
    made_by_peft(base, tmp_path, init_lora_weights="pissa")
    with torch.no_grad():
        base.get_submodule("model.layers.0.self_attn.q_proj").weight.copy_(torch.eye(8))
    with pytest.raises(DeltaError, match=r"singular values 4 and 5 of model\.layers\.0\.self_attn\.q_proj are equal"):
        from_peft(tmp_path, base)


@pytest.mark.parametrize(
    ("dtype", "fields", "message"),
    [
        (torch.bfloat16, {"init_lora_weights": "pissa"}, "on a bfloat16 base: PEFT rounds .* load the base in float32"),
        (torch.float32, {"init_lora_weights": "pissa_niter_4"}, "changes the base's own weights by what the file"),
        (torch.float32, {"init_lora_weights": "pissa", "use_dora": True}, "has no counterpart here"),
    ],
)
def test_pissa_refused(dtype: torch.dtype, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = model_of("llama")
    made_by_peft(base, tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(DeltaError, match=message):
        from_peft(tmp_path, base.to(dtype))


@pytest.mark.parametrize(
    ("dora", "change", "message"),
    [
        (True, lambda t, n: t.pop(n + "lora_magnitude_vector"), "a DoRA has .*lora_magnitude_vector"),
        (True, lambda t, n: t.update({n + "lora_magnitude_vector": torch.ones(3)}), r"has shape \(3,\).* needs \(8,\)"),
        (False, lambda t, n: t.update({n + "lora_magnitude_vector": torch.ones(8)}), "a LoRA has lora_A.weight and"),
    ],
)
def test_magnitudes_refused(dora: bool, change: Callable[..., Any], message: str, tmp_path: Path) -> None:
    base = model_of("llama")
    made_by_peft(base, tmp_path, use_dora=dora)
    edit_tensors(tmp_path, lambda t: change(t, "base_model.model.model.layers.0.self_attn.q_proj."))
    with pytest.raises(DeltaError, match=message):
        from_peft(tmp_path, base)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("BitFit()", "biases only beside LoRA"),
        ("Adapter(width=2)", "no bottleneck adapters"),
        ("SSF()", "no scale and shift"),
        ("Full()", "no full fine-tuning"),
        ("Head()", "a head only beside a method"),
        ("LoRA() + LoRA(target='key')", "is a sum.* merge the delta, or train one part on a base"),
    ],
)
def test_what_peft_has_no_place_for(recipe: str, reason: str, tmp_path: Path) -> None:
    base = model_of("bert")
    with pytest.raises(DeltaError, match=reason) as caught:
        to_peft(trained(base, recipe), base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
