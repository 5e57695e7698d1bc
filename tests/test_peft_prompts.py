"""Prefix and PromptTuning as PEFT runs them, in float64; models for which the two differ are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.delta.attaching import attached
from smidgen.delta.hf_peft import prompts as peft_prompts
from smidgen.delta.hf_peft.conversion import from_peft, to_peft
from smidgen.ports.attachment_record import trained_parameters
from tests import helpers as h
from tests.test_convert import config_of, edit_config, edit_tensors, logits, model_of, trained
from tests.test_peft_lora import distance
from tests.test_prefix import family

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def rotary(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor))


def exact(name: str) -> nn.Module:
    """A tiny model in float64 throughout: rotary positions too, which transformers computes in float32."""
    model = family(name)[0] if name in ("gpt_neox", "qwen3", "opt") else model_of(name).double()
    if any(isinstance(getattr(m, "inv_freq", None), Tensor) for m in model.modules()):
        found = rotary(model)
        frequencies = found.inv_freq.double()

        def in_float64(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = position_ids[..., None].double() * frequencies
            return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

        found.inv_freq = frequencies
        found.forward = in_float64
    return model


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model with the file, whose table PEFT rounds to float32 on loading: put back as the file has it."""
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    table = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    weight = tuned.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(weight.detach(), table.to(weight.dtype), rtol=0, atol=0)
    weight.data = table
    return tuned


def text_of(found: Tensor, wanted: Tensor) -> Tensor:
    """Logits at the text's places: PEFT leaves those of a prompt in front of them."""
    return found[:, -wanted.shape[1] :] if found.ndim == 3 else found


WRITTEN = [
    ("llama", "Prefix(length=5)"),
    ("llama", "Prefix(length=3, mlp=4)"),
    ("llama-score", "Prefix(length=4)"),
    ("qwen3", "Prefix(length=3)"),
    ("gpt_neox", "Prefix(length=6)"),
    ("llama", "PromptTuning(length=5)"),
    ("gpt2", "PromptTuning(length=3)"),
    ("opt", "PromptTuning(length=3)"),
    ("t5", "PromptTuning(length=4)"),
]


@pytest.mark.parametrize(("name", "recipe"), WRITTEN)
def test_written_is_what_peft_computes(name: str, recipe: str, tmp_path: Path) -> None:
    """PEFT's model with the file gives our attached outputs, and ours again after reading the file."""
    base = exact(name)
    delta = trained(base, recipe)
    to_peft(delta, base, tmp_path)
    plain = logits(base)
    with attached(base, delta):
        wanted = logits(base)
    assert distance(plain, wanted) > 1e-3
    assert distance(text_of(logits(loaded(base, tmp_path)), wanted), wanted) < 1e-12
    back = from_peft(tmp_path, base)
    assert back.tensors.keys() == delta.tensors.keys()
    with attached(base, back):
        assert distance(logits(base), wanted) < 1e-12


def test_float32_as_it_comes(tmp_path: Path) -> None:
    """With transformers' own rotary positions, in float32."""
    base = model_of("llama")
    delta = trained(base, "Prefix(length=7)")
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = logits(base)
    assert distance(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), wanted) < 1e-5
    back = from_peft(tmp_path, base)
    assert all(distance(t, delta.tensors[n]) < 1e-6 for n, t in back.tensors.items())


def test_padding_on_the_left_and_right(tmp_path: Path) -> None:
    """A mask moves the positions of neither library's text against its prefix."""
    base = exact("llama")
    delta = trained(base, "Prefix(length=4)")
    to_peft(delta, base, tmp_path)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    tuned = loaded(base, tmp_path)
    with torch.no_grad(), attached(base, delta):
        wanted = base(input_ids=ids, attention_mask=mask).logits
        found = tuned(input_ids=ids, attention_mask=mask).logits
    assert distance(found[mask.bool()], wanted[mask.bool()]) < 1e-12


@pytest.mark.parametrize("broken", ["layers", "keys and values", "heads", "not turned", "turned too far"])
def test_another_order_is_seen(broken: str, tmp_path: Path) -> None:
    """The comparison above fails when the table is read in another order, or keys are turned otherwise."""
    base = exact("qwen3")
    delta = trained(base, "Prefix(length=3)")
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = logits(base)
    heads, size = (base.config.num_key_value_heads, base.config.head_dim)
    shape = (3, 2, 2, heads, size)

    def change(tensors: dict[str, Tensor]) -> None:
        table = tensors["prompt_embeddings"].view(shape)
        by = {"not turned": -3, "turned too far": 1}.get(broken)
        if by is not None:
            keys = peft_prompts._turned(table[:, :, 0].permute(1, 2, 0, 3), rotary(base).inv_freq, by)
            table = table.clone()
            table[:, :, 0] = keys.permute(2, 0, 1, 3)
        else:
            table = table.flip({"layers": 1, "keys and values": 2, "heads": 4}[broken])
        tensors["prompt_embeddings"] = table.reshape(3, -1).contiguous()

    edit_tensors(tmp_path, change)
    assert distance(logits(loaded(base, tmp_path)), wanted) > 1e-4


def made_by_peft(base: nn.Module, config: Any, folder: Path) -> Tensor:
    """Save an adapter of PEFT's; gives what its model computes after loading it, in float64."""
    h.peft_adapter(base, config, folder)
    return logits(loaded(base, folder))


def prefix_config(task: str = "CAUSAL_LM", **fields: Any) -> Any:
    return peft.PrefixTuningConfig(task_type=task, **{"num_virtual_tokens": 4} | fields)


def prompt_config(task: str = "CAUSAL_LM", **fields: Any) -> Any:
    return peft.PromptTuningConfig(task_type=task, **{"num_virtual_tokens": 4} | fields)


READ: dict[str, tuple[str, Callable[[], Any], str]] = {
    "prefix": ("llama", prefix_config, "Prefix(length=4)"),
    "prefix of a network": (
        "llama",
        lambda: prefix_config(prefix_projection=True, encoder_hidden_size=6),
        "Prefix(length=4)",
    ),
    "prefix and head": ("llama-score", lambda: prefix_config("SEQ_CLS"), "Prefix(length=4)"),
    "prefix, partly rotary": ("gpt_neox", lambda: prefix_config(init_weights="zero"), "Prefix(length=4)"),
    "prompt": ("gpt2", prompt_config, "PromptTuning(length=4)"),
    "prompt t5": ("t5", lambda: prompt_config("SEQ_2_SEQ_LM"), "PromptTuning(length=4)"),
    "prompt of words": (
        "llama",
        lambda: prompt_config(prompt_tuning_init="SAMPLE_VOCAB"),
        "PromptTuning(length=4)",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """PEFT -> ours -> PEFT: the same outputs; prompts and values bit for bit, turned keys to rounding."""
    name, config, recipe = READ[case]
    base = exact(name)
    wanted = made_by_peft(base, config(), tmp_path / "theirs")
    delta = from_peft(tmp_path / "theirs", base)
    assert str(delta.recipe) == recipe
    with attached(base, delta):
        ours = logits(base)
    assert distance(text_of(wanted, ours), ours) < 1e-12
    to_peft(delta, base, tmp_path / "ours")
    before, after = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    one, other = before.pop("prompt_embeddings").double(), after.pop("prompt_embeddings")
    if recipe.startswith("Prefix"):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        layers = base.config.num_hidden_layers
        assert torch.equal(one.view(4, layers, 2, -1)[:, :, 1], other.view(4, layers, 2, -1)[:, :, 1])
    else:
        assert torch.equal(one[:4], other)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_files_are_what_peft_writes(tmp_path: Path) -> None:
    """No field that PEFT does not know, and sizes as it would fill them in."""
    base = exact("llama")
    made_by_peft(base, prefix_config(), tmp_path / "theirs")
    to_peft(from_peft(tmp_path / "theirs", base), base, tmp_path / "ours")
    theirs, ours = config_of(tmp_path / "theirs"), config_of(tmp_path / "ours")
    assert set(ours) <= set(theirs)
    sizes = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
    assert {k: ours[k] for k in sizes} == {k: theirs[k] for k in sizes}


def windowed() -> nn.Module:
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.MistralForCausalLM(tf.MistralConfig(**small, vocab_size=40, num_key_value_heads=1, sliding_window=4))


def interleaved() -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.CohereForCausalLM(tf.CohereConfig(**small, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def dynamic() -> nn.Module:
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**small, vocab_size=40, rope_parameters=rope))


def tagger() -> nn.Module:
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.LlamaForTokenClassification(tf.LlamaConfig(**small, vocab_size=40))


REFUSED = [
    (lambda: model_of("gpt2"), "Prefix(3)", "CAUSAL_LM", "PEFT counts it as positions"),
    (lambda: model_of("bert"), "Prefix(3)", "SEQ_CLS", "PEFT counts it as positions"),
    (lambda: model_of("t5"), "Prefix(3)", "SEQ_2_SEQ_LM", "decoder's self-attention of .* alone"),
    (windowed, "Prefix(3)", "CAUSAL_LM", "leave the sliding window"),
    (dynamic, "Prefix(3)", "CAUSAL_LM", "type 'dynamic' depend on the length"),
    (interleaved, "Prefix(3)", "CAUSAL_LM", "computes something else with PEFT's"),
    (lambda: model_of("bert"), "PromptTuning(3)", "SEQ_CLS", "in front of .*'s first token"),
    (lambda: model_of("roberta"), "PromptTuning(3)", "TOKEN_CLS", "in front of .*'s first token"),
    (lambda: model_of("llama-score"), "PromptTuning(3)", "SEQ_CLS", "cannot tell padding"),
    (tagger, "PromptTuning(3)", "TOKEN_CLS", "in front of .*'s first token"),
]


@pytest.mark.parametrize(("build", "recipe", "task", "reason"), REFUSED)
def test_other_functions_are_refused(
    build: Callable[[], nn.Module], recipe: str, task: str, reason: str, tmp_path: Path
) -> None:
    """Both ways, in one line, and nothing is written."""
    base = build()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(DeltaError, match=reason) as caught:
        to_peft(trained(base, recipe), base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    config = {"Prefix(3)": prefix_config, "PromptTuning(3)": prompt_config}[recipe](task, num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(DeltaError, match=reason):
        from_peft(tmp_path / "theirs", base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_layers_of_a_prefix_cannot_be_left_out(tmp_path: Path) -> None:
    base = model_of("llama")
    with pytest.raises(DeltaError, match="PEFT puts a prefix into every layer"):
        to_peft(trained(base, "Prefix(3, layers=0)"), base, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 3}, r"prompt_embeddings has shape \(4, 24\), this model needs \(3, 24\)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None is not a whole number"),
        ({"task_type": None}, "task_type=None, but LlamaForCausalLM is 'CAUSAL_LM'"),
        ({"something_new": 1}, "something_new=1 has no counterpart here"),
    ],
)
def test_damaged_files(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = model_of("llama")
    made_by_peft(base, prefix_config(), tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(DeltaError, match=message):
        from_peft(tmp_path, base)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Modes too, although the comparison runs in eval mode; values of the trial are drawn apart from torch's own."""
    base = model_of("llama").train()
    base.model.layers[0].eval()
    modes = {n: m.training for n, m in base.named_modules()}
    delta = trained(base, "Prefix(3)")
    state = torch.get_rng_state()
    to_peft(delta, base, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == {n: m.training for n, m in base.named_modules()}
    with pytest.raises(Exception, match="nothing is attached"):
        trained_parameters(base)


def test_json_is_plain(tmp_path: Path) -> None:
    base = model_of("llama")
    to_peft(trained(base, "PromptTuning(2)"), base, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("name", "task", "table"),
    [
        ("gpt2", "CAUSAL_LM", "transformer.wpe"),
        ("opt", "CAUSAL_LM", "model.decoder.embed_positions"),
        ("bert", "SEQ_CLS", "bert.embeddings.position_embeddings"),
        ("roberta", "TOKEN_CLS", "roberta.embeddings.position_embeddings"),
    ],
)
def test_the_reason_for_refusing_tables_of_positions(name: str, task: str, table: str, tmp_path: Path) -> None:
    """PEFT's prefix is ours with the text n rows further down the table: the same only with the table moved."""
    base = exact(name)
    wanted = made_by_peft(base, prefix_config(task), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].double()
    heads = base.config.num_attention_heads
    pairs = stored.view(4, base.config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4).flatten(0, 1)

    def ours(model: nn.Module) -> Tensor:
        with torch.no_grad(), attached(model, "Prefix(length=4)"):
            placed = [p for n, p in trained_parameters(model).items() if ".edits." in n]
            for parameter, value in zip(placed, pairs, strict=True):
                parameter.copy_(value)
            return logits(model)

    moved = copy.deepcopy(base)
    weight = moved.get_submodule(table).weight
    with torch.no_grad():
        weight.copy_(weight.roll(-4, 0))
    head = load_file(tmp_path / "adapter_model.safetensors").items()
    for model in (base, moved):
        model.load_state_dict({n.removeprefix("base_model."): t for n, t in head if "classifier" in n}, strict=False)
    assert distance(ours(moved), wanted) < 1e-12
    assert distance(ours(base), wanted) > 1e-3
