"""PEFT's own model and ours give the same outputs, both ways; what one side cannot say is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen.methods  # noqa: F401 (fills the registry)
from smidgen.common.errors import DeltaError, SmidgenError
from smidgen.delta.attaching import attach, attached, detach
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.conversion import MissingHeadWarning, from_peft, to_peft
from smidgen.delta.merging import merge
from smidgen.ports.attachment_record import trained_parameters
from tests import helpers as h

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
VOCAB = {"vocab_size": 40, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"vocab_size": 40, "n_embd": 8, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = VOCAB | {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**VOCAB, **SMALL, num_labels=3)),
    "roberta": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**VOCAB, **SMALL, num_labels=3)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(**VOCAB, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    ),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**VOCAB, **SMALL)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**VOCAB, **SMALL, num_key_value_heads=1)),
    "llama-score": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**VOCAB, **SMALL)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**VOCAB, **SMALL)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
}


@cache
def _shaken(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def model_of(name: str) -> nn.Module:
    """A tiny random model with nothing left at a stock zero or one."""
    return copy.deepcopy(_shaken(name))


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def from_theirs(name: str, config: Any, folder: Path) -> tuple[nn.Module, Tensor]:
    """Save a PEFT adapter with random values; gives the base and what PEFT computes."""
    base = model_of(name)
    tuned = h.peft_adapter(base, config, folder)
    return base, logits(tuned)


def trained(model: nn.Module, recipe: str, **options: Any) -> Delta:
    """A delta with random values, as training would leave."""
    attach(model, recipe, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return detach(model)


def theirs(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def ln_config(*target: str, **fields: Any) -> Any:
    return peft.LNTuningConfig(target_modules=list(target) or None, **fields)


def lora_config(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | fields)


def ia3_config(target: list[str], inner: list[str], **fields: Any) -> Any:
    return peft.IA3Config(target_modules=target, feedforward_modules=inner, **fields)


CLS = {"task_type": "SEQ_CLS"}
READ = {
    "ln bert": ("bert", ln_config("LayerNorm", **CLS), "LN()"),
    "ln bert output": (
        "bert",
        ln_config(*(f"{i}.output.LayerNorm" for i in range(3)), **CLS),
        "LN(which='output')",
    ),
    "ln bert attention": ("bert", ln_config("attention.output.LayerNorm", **CLS), "LN(which='attention')"),
    "ln embedding": ("bert", ln_config("embeddings.LayerNorm", **CLS), "LN(which='embedding')"),
    "ln roberta tokens": ("roberta", ln_config("LayerNorm", task_type="TOKEN_CLS"), "LN()"),
    "ln distilbert": (
        "distilbert",
        ln_config("sa_layer_norm", "output_layer_norm", **CLS),
        "LN(which='block')",
    ),
    "ln llama": ("llama", ln_config(), "LN()"),
    "ln llama pattern": (
        "llama",
        peft.LNTuningConfig(target_modules=r".*\.[12]\..*layernorm"),
        "LN(layers='top:2')",
    ),
    "ln llama final": ("llama", ln_config("model.norm"), "LN(which='final')"),
    "ln score": ("llama-score", ln_config("input_layernorm", **CLS), "LN(which='attention')"),
    "ln gpt2": ("gpt2", ln_config(), "LN()"),
    "ln t5": ("t5", ln_config(), "LN()"),
    "lora bert": ("bert", lora_config(target_modules=["query", "value"], **CLS), "LoRA(rank=4, alpha=6)"),
    "lora dropout": (
        "bert",
        lora_config(target_modules=["key"], lora_alpha=4, lora_dropout=0.1, **CLS),
        "LoRA(rank=4, alpha=4, target='key', dropout=0.1)",
    ),
    "lora rs": (
        "llama",
        lora_config(target_modules=["q_proj"], use_rslora=True),
        "LoRA(rank=4, alpha=6, target='query', scaling='rslora')",
    ),
    "lora all": ("llama", lora_config(target_modules="all-linear"), "LoRA(rank=4, alpha=6, target='linear')"),
    "lora layers": (
        "llama",
        lora_config(target_modules=["o_proj", "down_proj"], layers_to_transform=[0, 2]),
        "LoRA(rank=4, alpha=6, target=('attention_out', 'ff_out'), layers=(0, 2))",
    ),
    "lora pattern": (
        "llama",
        lora_config(target_modules=r".*\.1\.mlp\.up_proj"),
        "LoRA(rank=4, alpha=6, target='up_proj', layers=1)",
    ),
    "lora scattered": (
        "llama",
        lora_config(target_modules=["0.self_attn.q_proj", "2.mlp.up_proj"]),
        "LoRA(rank=4, alpha=6, target=('0.self_attn.q_proj', '2.mlp.up_proj'))",
    ),
    "lora uniform ranks": (
        "llama",
        lora_config(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2, "v_proj": 2}),
        "LoRA(rank=2, alpha=6)",
    ),
    "lora gpt2": ("gpt2", lora_config(fan_in_fan_out=True), "LoRA(rank=4, alpha=6, target='c_attn')"),
    "lora gpt2 both": (
        "gpt2",
        lora_config(fan_in_fan_out=True, target_modules=["attn.c_proj", "c_fc"]),
        "LoRA(rank=4, alpha=6, target=('attention_out', 'ff_in'))",
    ),
    "lora t5": ("t5", lora_config(), "LoRA(rank=4, alpha=6)"),
    "lora lm head": (
        "llama",
        lora_config(target_modules=["lm_head"]),
        "LoRA(rank=4, alpha=6, target='lm_head')",
    ),
    "ia3 llama": ("llama", ia3_config(["k_proj", "v_proj", "down_proj"], ["down_proj"]), "IA3()"),
    "ia3 outputs": ("llama", ia3_config(["k_proj", "v_proj"], []), "IA3(target=('key', 'value'), inputs=())"),
    "ia3 gpt2": (
        "gpt2",
        ia3_config(["c_attn", "mlp.c_proj"], ["mlp.c_proj"], fan_in_fan_out=True),
        "IA3(target=('attn.c_attn', 'mlp.c_proj'))",
    ),
    "ia3 bert": (
        "bert",
        ia3_config(["key", "value", "output.dense"], ["output.dense"], **CLS),
        "IA3(target=('key', 'value', 'attention_out', 'ff_out'), inputs=('attention_out', 'ff_out'))",
    ),
    "ia3 all": (
        "llama",
        ia3_config(["q_proj", "up_proj", "o_proj"], ["q_proj"]),
        "IA3(target=('o_proj', 'q_proj', 'up_proj'), inputs='query')",
    ),
    "ia3 t5": ("t5", ia3_config(["k", "v", "wo"], ["wo"]), "IA3()"),
    "ia3 score": (
        "llama-score",
        ia3_config(["k_proj", "v_proj", "down_proj"], ["down_proj"], **CLS),
        "IA3()",
    ),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", READ)
def test_reads_what_peft_wrote(case: str, tmp_path: Path) -> None:
    name, config, recipe = READ[case]
    base, wanted = from_theirs(name, copy.deepcopy(config), tmp_path)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    delta = from_peft(tmp_path, base)
    assert str(delta.recipe) == recipe
    assert delta.info == {"source": f"peft {config.peft_type.value}", "model_class": type(base).__name__}
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    with attached(base, delta):
        same(logits(base), wanted)
    assert (wanted - logits(base)).abs().max() > 1e-3


WRITE = {
    "bert": ("LN()", "LN(which='output', layers='top:2')", "LN(which='embedding')", "LoRA(rank=2)"),
    "roberta": ("LN()", "LoRA(rank=2, alpha=5, target='linear', layers=1)"),
    "distilbert": ("LN()", "IA3()", "IA3(target=('query', 'ff_in', 'ff_out'), inputs=('query', 'ff_in'))"),
    "modernbert": ("LN()",),
    "llama": (
        "LN()",
        "LoRA(rank=2, alpha=3, target='linear')",
        "IA3()",
        "IA3(layers=(0, 2))",
        "IA3(target='linear', inputs=())",
        "IA3(layers=1, target=('o_proj', 'up_proj'), inputs='ff_in')",
        "LN(layers=0)",
    ),
    "llama-score": ("LN()", "LoRA(rank=2, target=('query', 'ff_out'), layers='top:2')", "IA3()"),
    "gpt2": ("LN()", "LoRA(rank=2, target=('ff_in', 'ff_out'))", "LN(which='final')"),
    "t5": ("LN()", "LoRA(rank=2)", "IA3()", "LN(which='output', layers=1)"),
}


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in WRITE for recipe in WRITE[name]])
def test_round_trip(name: str, recipe: str, tmp_path: Path) -> None:
    """Ours -> PEFT's model gives the same outputs; -> ours again gives the same delta, bit for bit."""
    base = model_of(name)
    delta = trained(base, recipe)
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = logits(base)
    same(logits(theirs(base, tmp_path)), wanted)
    back = from_peft(tmp_path, base)
    assert str(back.recipe) == recipe
    assert back.base == delta.base
    assert (back.head, back.labels) == (delta.head, delta.labels)
    assert back.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(t, delta.tensors[n]) for n, t in back.tensors.items())


@pytest.mark.parametrize("term", ["gain", "bias"])
def test_one_term_of_a_norm(term: str, tmp_path: Path) -> None:
    """PEFT keeps norms whole: the other term is written as in the base, and recognised on reading."""
    base = model_of("bert")
    delta = trained(base, f"LN(terms={term!r})")
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = logits(base)
    same(logits(theirs(base, tmp_path)), wanted)
    back = from_peft(tmp_path, base)
    assert str(back.recipe) == str(delta.recipe)
    assert all(torch.equal(t, delta.tensors[n]) for n, t in back.tensors.items())


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gpt2", "LoRA(rank=2, alpha=3)"),
        ("gpt2", "LoRA(rank=1, target=('query', 'key', 'value'))"),
        ("gpt2", "IA3()"),
        ("modernbert", "LoRA(rank=2, target='value')"),
        ("modernbert", "IA3()"),
        ("gpt2", "IA3(target='c_attn', inputs='c_attn')"),
        ("gpt_neox", "LoRA(rank=2)"),
        ("gpt_neox", "DoRA(rank=2, target=('query', 'value'))"),
        ("gpt_neox", "IA3()"),
    ],
)
def test_slices_become_one_block(name: str, recipe: str, tmp_path: Path) -> None:
    """Edits of slices are one edit of the whole fused projection in PEFT, with the same outputs, and back."""
    base = model_of(name)
    delta = trained(base, recipe)
    to_peft(delta, base, tmp_path)
    with attached(base, delta):
        wanted = logits(base)
    same(logits(theirs(base, tmp_path)), wanted)
    back = from_peft(tmp_path, base)
    with attached(base, back):
        same(logits(base), wanted)
    if recipe == "IA3()":
        assert all(torch.equal(t, delta.tensors[n]) for n, t in back.tensors.items())


def test_merged_as_in_peft(tmp_path: Path) -> None:
    base, _ = from_theirs("gpt2", lora_config(fan_in_fan_out=True), tmp_path)
    with torch.no_grad():
        wanted = logits(theirs(base, tmp_path).merge_and_unload())
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    same(logits(merge(base, from_peft(tmp_path, base))), wanted)


def test_low_precision_file(tmp_path: Path) -> None:
    """bfloat16 values become float32 ones, the same numbers."""
    base, _ = from_theirs("llama", ln_config(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    delta = from_peft(tmp_path, base)
    value = delta.tensors["model.norm.weight"]
    assert value.dtype == torch.float32
    assert torch.equal(value, stored["base_model.model.model.norm.ln_tuning_layers.weight"].float())


def test_low_precision_base(tmp_path: Path) -> None:
    base = model_of("llama").bfloat16()
    delta = trained(base, "LN()")
    to_peft(delta, base, tmp_path)
    back = from_peft(tmp_path, base)
    assert all(t.dtype == torch.float32 and torch.equal(t, delta.tensors[n]) for n, t in back.tensors.items())


def test_files_are_what_peft_writes(tmp_path: Path) -> None:
    """Same names of tensors, and no field that PEFT does not know (it would warn)."""
    base, _ = from_theirs("bert", ln_config("LayerNorm", **CLS), tmp_path / "theirs")
    delta = from_peft(tmp_path / "theirs", base)
    to_peft(delta, base, tmp_path / "ours")
    names = [load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("theirs", "ours")]
    assert names[0] == names[1]
    ours = config_of(tmp_path / "ours")
    assert set(ours) <= set(config_of(tmp_path / "theirs"))
    assert ours["target_modules"] == ["LayerNorm"]
    assert ours["task_type"] == "SEQ_CLS"
    assert not any(path.suffix == ".bin" for path in (tmp_path / "ours").iterdir())


def test_target_modules_hit_nothing_else(tmp_path: Path) -> None:
    """`LayerNorm` or `output.LayerNorm` would also hit the attention's norms."""
    base = model_of("bert")
    to_peft(trained(base, "LN(which='output')"), base, tmp_path)
    assert config_of(tmp_path)["target_modules"] == [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(3)]


def test_head_that_the_file_lacks(tmp_path: Path) -> None:
    """Without modules_to_save PEFT runs the model's own head; so does the delta, and it says so."""
    base, wanted = from_theirs("bert", ln_config("LayerNorm"), tmp_path)
    with pytest.warns(MissingHeadWarning, match=r"no values for classifier\.weight, classifier\.bias"):
        delta = from_peft(tmp_path, base)
    assert delta.info["head_from_model"] == ["classifier.weight", "classifier.bias"]
    with attached(base, delta):
        same(logits(base), wanted)


def test_saved_module_equal_to_the_base(tmp_path: Path) -> None:
    """A whole module that was stored but never trained loses nothing by being left out."""
    base, _ = from_theirs("llama", ln_config(), tmp_path)
    name = "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda t: t.update({"base_model.model." + name: base.state_dict()[name].clone()}))
    assert name not in from_peft(tmp_path, base).tensors


WHOLE = [
    ("bert", ln_config("LayerNorm", modules_to_save=["classifier", "pooler"]), "Full(target=('bert.pooler',))"),
    (
        "bert",
        lora_config(target_modules=["query", "value"], modules_to_save=["classifier", "intermediate"]),
        "Full(target=('bert.encoder.layer.0.intermediate', 'bert.encoder.layer.1.intermediate', "
        "'bert.encoder.layer.2.intermediate'))",
    ),
    ("llama", lora_config(target_modules=["q_proj"], modules_to_save=["model.norm"]), "Full(target=('model.norm',))"),
]


@pytest.mark.parametrize(("name", "config", "beside"), WHOLE)
def test_whole_modules_beside_the_method_are_trained_by_full(
    name: str, config: Any, beside: str, tmp_path: Path
) -> None:
    base, wanted = from_theirs(name, copy.deepcopy(config), tmp_path)
    delta = from_peft(tmp_path, base)
    assert str(delta.recipe).endswith(" + " + beside)
    with attached(base, Delta.load(delta.save(tmp_path / "delta"))):
        same(logits(base), wanted)


def test_a_whole_module_of_another_shape_is_refused(tmp_path: Path) -> None:
    base, _ = from_theirs("llama", ln_config(), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}))
    with pytest.raises(DeltaError, match=r"embed_tokens\.weight has shape \(2, 2\), the model's"):
        from_peft(tmp_path, base)


# ---------------------------------------------------------------------------------------------- refusals

REFUSED_FIELDS = {
    "lora_bias": True,
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "loftq_config": {"loftq_bits": 4},
    "some_field_of_the_future": "yes",
}


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, nn.Module]:
    base, _ = from_theirs("llama", lora_config(target_modules=["q_proj", "v_proj"]), tmp_path)
    return tmp_path, base


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_fields_without_counterpart(field: str, lora: tuple[Path, nn.Module]) -> None:
    folder, base = lora
    edit_config(folder, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(DeltaError, match=f"{field}=.* has no counterpart here"):
        from_peft(folder, base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "lora_only"}, "bias='lora_only' trains biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base's own weights"),
        ({"alpha_pattern": {"q_proj": 3}}, r"alpha_pattern=\{'q_proj': 3\} sets several strengths"),
        ({"r": None}, "r=None is not a number above 0"),
        (
            {"peft_type": "VERA"},
            "peft_type 'VERA' cannot be read; LN_TUNING, LORA, IA3, PREFIX_TUNING, PROMPT_TUNING can",
        ),
        ({"peft_type": "IA3", "use_rslora": False, "r": 0}, "has no counterpart here"),
        ({"target_modules": ["q_proj", "k_proj"]}, "but the file has no tensors for it"),
    ],
)
def test_configs_refused(fields: dict[str, Any], message: str, lora: tuple[Path, nn.Module]) -> None:
    folder, base = lora
    edit_config(folder, **fields)
    with pytest.raises(DeltaError, match=message):
        from_peft(folder, base)


PATH = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PATH + "lora_B.weight"), "a LoRA has lora_A.weight and lora_B.weight"),
        (lambda t: t.update({PATH + "lora_magnitude_vector": torch.ones(3)}), "lora_magnitude_vector"),
        (
            lambda t: t.update({PATH + "lora_A.weight": torch.ones(4, 5)}),
            r"has shape \(4, 5\).*needs \(4, 8\)",
        ),
        (
            lambda t: t.update({PATH + "lora_A.weight": torch.ones(4, 8).int()}),
            "is int32; only floating-point",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(8)}), "does not start with 'base_model.model.'"),
        (
            lambda t: t.update({"base_model.model.model.norms.weight": torch.ones(8)}),
            "nor one of its parameters",
        ),
        (
            lambda t: t.update({"base_model.model.model.layerz.0.lora_A.weight": torch.ones(4, 8)}),
            "has no module 'model.layerz.0'; did you mean",
        ),
        (lambda t: [t.pop(n) for n in list(t)], "holds no tensor of a LORA adapter"),
    ],
)
def test_tensors_refused(change: Callable[..., Any], message: str, lora: tuple[Path, nn.Module]) -> None:
    folder, base = lora
    edit_tensors(folder, change)
    with pytest.raises(DeltaError, match=message):
        from_peft(folder, base)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "llama",
            lora_config(target_modules=["q_proj", "embed_tokens"]),
            "embed_tokens is Embedding; only linear maps",
        ),
        (
            "llama",
            lora_config(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}),
            "ranks 2, 4; a recipe",
        ),
        (
            "llama",
            ln_config("input_layernorm", "q_proj"),
            "q_proj is Linear; LN.. trains normalisation layers only",
        ),
        ("llama", ln_config("1.input_layernorm", "model.norm"), r"nearest is .*lacks .*and also trains"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_refused(name: str, config: Any, message: str, tmp_path: Path) -> None:
    base, _ = from_theirs(name, copy.deepcopy(config), tmp_path)
    with pytest.raises(DeltaError, match=message):
        from_peft(tmp_path, base)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 8)])
def test_a_vector_of_another_width_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    base, _ = from_theirs("llama", ia3_config(["k_proj", "v_proj"], []), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({name: torch.ones(shape) for name in list(t) if "0.self_attn.k" in name}))
    with pytest.raises(DeltaError, match=r"k_proj\.ia3_l has shape .*, this model needs"):
        from_peft(tmp_path, base)


def test_other_number_of_labels(tmp_path: Path) -> None:
    from_theirs("bert", ln_config("LayerNorm", **CLS), tmp_path)
    other = tf.BertForSequenceClassification(tf.BertConfig(**VOCAB, **SMALL, num_labels=5))
    with pytest.raises(DeltaError, match="as many labels as the adapter has"):
        from_peft(tmp_path, other)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here/at all", "no PEFT adapter at .*: not a folder"),
        ("", "holds no PEFT adapter: adapter_config.json is missing"),
    ],
)
def test_no_adapter(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=message):
        from_peft(tmp_path / source, model_of("llama"))


def test_pickles_and_damage(lora: tuple[Path, nn.Module]) -> None:
    folder, base = lora
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DeltaError, match="corrupt or truncated"):
        from_peft(folder, base)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(DeltaError, match="is a pickle, which can run code, and is not read"):
        from_peft(folder, base)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("LN() + LoRA()", r"LN\(\) \+ LoRA\(\) is a sum, and a PEFT adapter holds one method"),
        ("BitFit()", r"BitFit\(\) has no counterpart in PEFT: PEFT trains biases only beside LoRA"),
        ("Head()", r"Head\(\) has no counterpart in PEFT"),
    ],
)
def test_recipes_that_peft_cannot_say(recipe: str, message: str, tmp_path: Path) -> None:
    base = model_of("bert")
    with pytest.raises(DeltaError, match=message):
        to_peft(trained(base, recipe), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pooling_cannot_be_written(tmp_path: Path) -> None:
    base = model_of("bert")
    with pytest.raises(DeltaError, match="pooling='mean' cannot be written"):
        to_peft(trained(base, "LN()", pooling="mean"), base, tmp_path)


def test_slices_beside_whole_maps(tmp_path: Path) -> None:
    base = model_of("gpt2")
    delta = trained(base, "LoRA(rank=2, target=('query', 'value', 'attention_out'))")
    with pytest.raises(DeltaError, match=r"one rank does not fit all modules .*c_attn: 4.*c_proj: 2"):
        to_peft(delta, base, tmp_path)


def test_another_base(tmp_path: Path) -> None:
    base = model_of("bert")
    delta = trained(base, "LN()")
    with torch.no_grad():
        base.bert.embeddings.LayerNorm.weight.add_(1)
    with pytest.raises(DeltaError, match="same shapes but other values"):
        to_peft(delta, base, tmp_path)


def test_an_attached_model_is_refused(lora: tuple[Path, nn.Module]) -> None:
    folder, base = lora
    attach(base, "LN()")
    with pytest.raises(SmidgenError, match="detach it first"):
        from_peft(folder, base)


def test_peft_is_not_imported() -> None:
    """The format is read without the package."""
    import smidgen

    files = Path(smidgen.__path__[0]).rglob("*.py")
    assert not [f for f in files if "import peft" in f.read_text() or "from peft " in f.read_text()]


def test_no_warning_on_our_files(lora: tuple[Path, nn.Module]) -> None:
    """PEFT loads what is written here without a word about missing or unexpected keys."""
    folder, base = lora
    to_peft(from_peft(folder, base), base, folder / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs(base, folder / "again")
