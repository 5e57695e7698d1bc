"""Bases whose linear maps are stored in few bits: what is attached acts, trains, comes off, is saved and merged."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.cli.commands import app
from smidgen.common.argument_spelling import SCHEME_NAMES
from smidgen.common.errors import AttachError, DeltaError, ModelError, PlanError
from smidgen.delta.fingerprint import Fingerprint
from smidgen.inference import quantising
from smidgen.ports.attachment_record import trained_parameters
from smidgen.sites.quantised.maps import own_weight, quantised_maps, scheme_of, stored_bytes
from smidgen.sites.quantised.plain_maps import dequantise
from tests import helpers as h

SCHEMES = [name for name in SCHEME_NAMES if name != "none"]
RECIPES = [
    "LN()", "BitFit()", "IA3()", "SSF()", "LoRA(target='linear')", "Adapter()", "Prefix()", "PromptTuning()", "DoRA()",
    "PiSSA()", "LN() | Select('magnitude', keep=0.5)",
]  # fmt: skip
STARTS_ELSEWHERE = ("Prefix()", "PromptTuning()")  # they add tokens and keys from the first step on
NOT_MERGED = ("Adapter()", "Prefix()", "PromptTuning()")
X = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with biases whose widths fit all schemes, and its tokenizer."""
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, **h.TOKENS,
    )  # fmt: skip
    model = T.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    h.tokenizer().save_pretrained(path)
    return path


def load(folder, scheme, **options):
    return sm.load(folder, quantize=scheme, **options)[0]


def parts(model):
    """Every tensor of a model in a copy: parameters as they are stored, scales, tables."""
    found = {f"{path}.{n}": t for path, m, s in quantised_maps(model) for n, t in s.parts(m).items()}
    stored = {id(m._parameters["weight"]) for _, m, _ in quantised_maps(model)}
    found |= {n: p.detach() for n, p in model.named_parameters() if id(p) not in stored}
    return {name: tensor.clone() for name, tensor in found.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain_copy(model):
    """The model with the dequantised weights, and nothing quantised."""
    found = copy.deepcopy(model)
    dequantise(found, torch.float32)
    return found


def loss_of(model, x=X):
    return model(input_ids=x, labels=x).loss


def shake(model, size=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def train(model, steps=3, lr=1e-2):
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_the_names_are_the_schemes():
    assert set(quantising.SCHEMES) == set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
class TestEachScheme:
    def test_sites_see_the_shapes_that_the_codes_stand_for(self, folder, scheme):
        plain, model = load(folder, "none"), load(folder, scheme)
        assert sm.find_sites(model) == sm.find_sites(plain)
        assert scheme_of(model) == scheme
        assert scheme_of(plain) == ""
        kept = [m for _, m, _ in quantised_maps(model)]
        assert len(kept) == 14
        assert model.lm_head not in kept

    def test_the_weight_is_what_the_map_multiplies_with(self, folder, scheme):
        model = load(folder, scheme)
        x = torch.randn(5, 64)
        for path, module, _ in quantised_maps(model):
            if path.endswith(("q_proj", "up_proj")):
                by_hand = nn.functional.linear(x, own_weight(module), module.bias)
                error = (module(x) - by_hand).norm() / by_hand.norm()
                assert error < (2e-2 if scheme == "int8" else 1e-5), path  # int8 rounds what enters as well

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_recipe_starts_trains_and_comes_off(self, folder, scheme, recipe):
        model = load(folder, scheme)
        before, base = parts(model), model(X).logits
        sm.attach(model, recipe)
        logits = model(X).logits
        if recipe not in STARTS_ELSEWHERE:
            assert torch.equal(logits, base)
        shake(model)
        loss_of(model).backward()
        for name, parameter in trained_parameters(model).items():
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
            # the same number added to all scores of a query is nothing to softmax
            assert parameter.grad.abs().max() > (-1 if "k_proj.bias" in name else 0), name
        losses = train(model)
        assert losses[-1] < losses[0]
        sm.detach(model)
        assert same(parts(model), before)
        assert torch.equal(model(X).logits, base)
        assert not any(hasattr(module, "edits") for module in model.modules())

    def test_a_delta_is_saved_and_put_on_the_same_base(self, folder, scheme, tmp_path):
        model = load(folder, scheme)
        sm.attach(model, "LN() + LoRA()")
        train(model)
        tuned = model(X).logits
        sm.detach(model).save(tmp_path)
        delta = sm.Delta.load(tmp_path)
        assert delta.base.quantised == scheme
        again, _ = sm.load(folder, delta=delta)
        assert scheme_of(again) == scheme
        sm.attach(again, delta)
        assert torch.equal(again(X).logits, tuned)

    def test_the_fingerprint_is_of_codes_and_scales(self, folder, scheme):
        model, again = load(folder, scheme), load(folder, scheme)
        first = Fingerprint.of(model, ())
        assert first == Fingerprint.of(again, ())
        assert first.structure == Fingerprint.of(load(folder, "none"), ()).structure
        seen = {first.content}
        _, module, storage = next(iter(quantised_maps(again)))
        for part in storage.parts(module).values():
            flat = part.view(-1)
            kept = flat[0].clone()
            flat[0] = flat[0] + 1
            seen.add(Fingerprint.of(again, ()).content)
            flat[0] = kept
        assert len(seen) == 1 + len(storage.parts(module))
        assert Fingerprint.of(again, ()) == first

    @pytest.mark.parametrize(
        "recipe", ["SSF(shift=False)", "LoRA(target='linear')", "IA3()", "DoRA()", "LN() + BitFit()"]
    )
    def test_merged_is_attached(self, folder, scheme, recipe):
        model = load(folder, scheme)
        sm.attach(model, recipe)
        shake(model)
        before, tuned = parts(model), model(X).logits
        maps_change = recipe != "LN() + BitFit()"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merged = sm.merge(model)
        assert any(issubclass(w.category, sm.DequantisedWarning) for w in said) == maps_change
        assert scheme_of(merged) == ("" if maps_change else scheme)
        assert bool(getattr(merged, "is_quantized", False)) == (not maps_change)
        error = (merged(X).logits - tuned).norm() / tuned.norm()
        assert error < (3e-2 if scheme == "int8" else 1e-5)
        assert same(parts(model), before)

    def test_the_plan_counts_values_and_true_bytes(self, folder, scheme):
        plain, model = load(folder, "none"), load(folder, scheme)
        first, found = (sm.plan(m, "LN()", batch_size=2, length=16) for m in (plain, model))
        assert (found.pretrained, found.trained) == (first.pretrained, first.trained)
        assert (
            found.costs["weights_bytes"]
            == stored_bytes(model)
            == sum(t.numel() * t.element_size() for t in parts(model).values())
        )
        assert found.costs["weights_bytes"] < 0.5 * first.costs["weights_bytes"]
        assert found.costs["forward_flops_per_token"] == first.costs["forward_flops_per_token"]

    def test_what_would_train_codes_is_refused(self, folder, scheme):
        model = load(folder, scheme)
        for recipe in ("Full()", "Full(target='q_proj')", "Full() | Select('magnitude', keep=0.1)"):
            with pytest.raises(PlanError, match=f"stored in {scheme}: codes take no gradient"):
                sm.attach(model, recipe)
        sm.attach(model, "Full(target='input_layernorm')")

    def test_rebase_asks_says_and_compares(self, folder, scheme):
        model, plain = load(folder, scheme), load(folder, "none")
        sm.attach(model, "LN() + LoRA()")
        train(model)
        delta = sm.detach(model)
        with pytest.raises(DeltaError, match=rf"in {scheme}, but the base is in float32.*rebase"):
            sm.attach(plain, delta)
        with pytest.warns(sm.RebasedWarning, match=f"in {scheme} and goes on the base in float32"):
            moved = sm.rebase(delta, plain)
        sm.attach(plain, moved)
        assert moved.info["rebased_from"]["quantised"] == scheme
        with torch.no_grad():
            plain.model.layers[1].mlp.up_proj.weight[3] += 0.1
        sm.detach(plain)
        with pytest.raises(DeltaError, match="give other codes"):
            sm.rebase(delta, plain)
        with pytest.raises(DeltaError, match="attach it as it is"):
            sm.rebase(delta, model)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "int8"])
@pytest.mark.parametrize("recipe", ["LN()", "BitFit()", "LoRA(target='linear')", "DoRA()"])
def test_training_is_that_of_the_dequantised_model(folder, scheme, recipe):
    model = load(folder, scheme)
    plain = plain_copy(model)
    for one in (model, plain):
        sm.attach(one, recipe)
        shake(one)
    for ours, theirs in zip(train(model, 5), train(plain, 5), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    other = trained_parameters(plain)
    for name, parameter in trained_parameters(model).items():
        if "k_proj.bias" not in name:  # gradients of rounding alone
            assert torch.allclose(parameter, other[name], rtol=1e-3, atol=2e-4), name


def test_masters_are_float32_where_a_map_computes_in_bfloat16(folder):
    """bitsandbytes casts a bias in place to the dtype of its products, which would ruin a master."""
    half = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = T.LlamaForCausalLM.from_pretrained(folder, quantization_config=half, dtype=torch.float32)
    sm.attach(model, "BitFit()")
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_low_precision_base_has_float32_masters(folder, dtype):
    model = load(folder, "nf4", dtype=dtype)
    base = model(X).logits
    assert base.dtype == getattr(torch, dtype)
    sm.attach(model, "LN() + BitFit() + LoRA()")
    assert torch.equal(model(X).logits, base)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}


def test_passes_in_eval_mode_leave_the_codes_alone_and_a_gradient_passes_after_them(folder):
    """On a CPU with AVX512-BF16 bitsandbytes would rearrange them for a kernel that has no gradient."""
    model = load(folder, "nf4")
    before = parts(model)
    with torch.no_grad():
        model.eval()(X)
    assert same(parts(model), before)
    sm.attach(model, "LN(layers=0)")
    with torch.no_grad():
        model.eval()(X)
    loss_of(model.train()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained_parameters(model).values())


def test_a_base_whose_codes_were_rearranged_is_refused(folder):
    four = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = T.LlamaForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32)
    module = model.model.layers[0].mlp.up_proj
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AttachError, match="rounds its scales"):
        sm.attach(model, "LN()")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "up_proj" in n)


def test_copies_share_the_stored_values(folder):
    from smidgen.ports.in_place.shared_parameters import shared_copy

    for scheme in SCHEMES:
        model = load(folder, scheme)
        base = model(X).logits
        twin = shared_copy(model)
        theirs = {path: s.parts(m) for path, m, s in quantised_maps(twin)}
        for path, module, storage in quantised_maps(model):
            for name, part in storage.parts(module).items():
                if name != "offset":
                    assert part.data_ptr() == theirs[path][name].data_ptr(), (scheme, path, name)
        assert torch.equal(twin(X).logits, base)


@pytest.mark.parametrize("recipe", ["LN()", "LoRA(target='linear')", "BitFit()"])
def test_rows_of_one_batch_have_their_own_results(folder, recipe):
    model, deltas, alone = load(folder, "nf4"), [], []
    for seed in (0, 1):
        sm.attach(model, recipe, seed=seed)
        shake(model, 0.05 * (1 + seed))
        alone.append(model(X[:1]).logits)
        deltas.append(sm.detach(model))
    with sm.attached_rows(model, deltas), sm.rows_from([1, 0]):
        rows = model(X[:1].expand(2, -1)).logits
    assert torch.allclose(rows[0], alone[1][0], atol=1e-5)
    assert torch.allclose(rows[1], alone[0][0], atol=1e-5)


def test_a_doctor_looks_a_quantised_base_over(folder):
    found = sm.doctor(load(folder, "nf4"), "LN() + LoRA()")
    assert not found.faults
    assert found.findings[0].restored


@pytest.mark.parametrize("scheme", ["nf4-double", "int8", "torchao-int4"])
def test_norms_merged_into_codes_are_saved_and_read_with_them(folder, scheme, tmp_path):
    model = load(folder, scheme)
    sm.attach(model, "LN()")
    shake(model)
    tuned = model(X).logits
    sm.merge(model).save_pretrained(tmp_path)
    h.tokenizer().save_pretrained(tmp_path)
    again, _ = sm.load(tmp_path)
    assert scheme_of(again) == scheme
    assert torch.equal(again(X).logits, tuned)
    sm.attach(again, "LN()")


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "fp4", "int8", "torchao-int8", "torchao-int4"])
class TestLoftQ:
    RECIPE = sm.LoftQ(rank=8, target="linear")

    def errors(self, model, plain):
        """|W - Q|, |W - Q - s B A| of each map with something attached."""
        found = []
        for path, module, _ in quantised_maps(model):
            weight, lost = plain.get_submodule(path).weight, own_weight(module)
            edit = module.edits["0"]
            product = edit.method.scale * edit.B @ edit.A
            found.append(((weight - lost).norm().item(), (weight - lost - product).norm().item()))
        return found

    def test_it_starts_nearer_to_the_original(self, folder, scheme):
        model, plain = load(folder, scheme), load(folder, "none")
        base, wanted = model(X).logits, plain(X).logits
        before = parts(model)
        sm.attach(model, self.RECIPE)
        assert all(near < far for far, near in self.errors(model, plain))
        assert (model(X).logits - wanted).norm() < (base - wanted).norm()
        train(model)
        tuned = model(X).logits
        delta = sm.detach(model)
        assert same(parts(model), before)
        assert str(delta.recipe) == "LoRA(target='linear')"
        sm.attach(model, delta)
        assert torch.equal(model(X).logits, tuned)

    def test_it_is_the_best_product_of_its_rank(self, folder, scheme):
        model, plain = load(folder, scheme), load(folder, "none")
        sm.attach(model, self.RECIPE)
        for (_, found), (path, module, _) in zip(self.errors(model, plain), quantised_maps(model), strict=True):
            values = torch.linalg.svdvals(plain.get_submodule(path).weight - own_weight(module))
            assert found == pytest.approx(values[8:].norm().item(), rel=1e-3), path

    @pytest.mark.parametrize("start", ["zero", "pissa"])
    def test_steps_do_not_increase_the_error(self, folder, scheme, start):
        model, plain = load(folder, scheme), load(folder, "none")
        errors = sm.requantise(model, self.RECIPE, steps=4, start=start)
        assert len(errors) == 14
        for path, each in errors.items():
            assert len(each) == 5
            assert list(each) == sorted(each, reverse=True), path
            assert each[1] < each[0], path
        sm.attach(model, self.RECIPE)
        lengths = {path: plain.get_submodule(path).weight.norm().item() for path in errors}
        for (_, found), (path, each) in zip(self.errors(model, plain), errors.items(), strict=True):
            assert found / lengths[path] == pytest.approx(each[-1], rel=2e-3), path

    def test_one_step_leaves_the_codes_alone(self, folder, scheme):
        model = load(folder, scheme)
        before = parts(model)
        sm.requantise(model, self.RECIPE, steps=1)
        assert same(parts(model), before)

    def test_a_base_with_other_codes_has_another_fingerprint(self, folder, scheme):
        model = load(folder, scheme)
        sm.requantise(model, self.RECIPE, steps=3, start="pissa")
        delta = sm.detach(sm.attach(model, self.RECIPE))
        with pytest.raises(DeltaError, match="other values"):
            sm.attach(load(folder, scheme), delta)


def test_loftq_on_real_numbers_is_lora(folder):
    one, other = load(folder, "none"), load(folder, "none")
    sm.attach(one, "LoftQ()", seed=3)
    sm.attach(other, "LoRA()", seed=3)
    first = trained_parameters(one)
    for name, parameter in trained_parameters(other).items():
        assert torch.equal(first[name], parameter)


def test_loftq_says_what_it_needs(folder):
    four = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = T.LlamaForCausalLM.from_pretrained(folder, quantization_config=four, dtype=torch.float32)
    with pytest.raises(PlanError, match=r"nothing says where they are: load it with smidgen.load.*note_originals"):
        sm.attach(model, "LoftQ()")
    sm.note_originals(model, load(folder, "none"))
    sm.attach(model, "LoftQ()")
    sm.detach(model)
    with pytest.raises(PlanError, match="both start at what was lost"):
        sm.attach(model, sm.LoftQ(rank=2) + sm.LoftQ(rank=3))
    sm.note_originals(model, T.LlamaForCausalLM(T.LlamaConfig(**{**model.config.to_dict(), "hidden_size": 32})))
    with pytest.raises(PlanError, match=r"have \(.*\) at .*, the base \("):
        sm.attach(model, "LoftQ()")
    with pytest.raises(PlanError, match="starts nowhere at what was lost"):
        sm.requantise(model, "LoRA()")
    with pytest.raises(PlanError, match="steps=0 must be"):
        sm.requantise(model, "LoftQ()", steps=0)
    with pytest.raises(PlanError, match="start='svd' is not one of zero, pissa"):
        sm.requantise(model, "LoftQ()", start="svd")


BAD = {
    "no such scheme": (lambda f: load(f, "nf5"), ModelError, "quantize='nf5' is not one of none, nf4.*nf4"),
    "Full": (lambda f: sm.attach(load(f, "nf4"), "Full()"), PlanError, "codes take no gradient; LN"),
    "merging an adapter": (
        lambda f: sm.merge(sm.attach(load(f, "nf4"), "Adapter()")), AttachError, "not to be folded into the weights"
    ),
    "another form of numbers": (lambda f: sm.attach(_half_a_byte(f), "LN()"), PlanError, "int8 values of Parameter"),
    "on top": (lambda f: _stored(f, "bitsandbytes", "nf4"), ModelError, "stored by bitsandbytes already; leave"),
    "GPTQ": (lambda f: _stored(f, "gptq", None), ModelError, "stored by GPTQ, which nothing.*quantize='nf4'"),
    "AWQ": (lambda f: _stored(f, "awq", None), ModelError, "stored by AWQ, which nothing.*quantize='nf4'"),
}  # fmt: skip


def _half_a_byte(folder):
    model = load(folder, "none")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    return model


def _stored(folder, method, scheme):
    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as other:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
        (Path(other) / "config.json").write_text(json.dumps(config))
        return sm.load(other, quantize=scheme)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(folder, case):
    make, error, said = BAD[case]
    with pytest.raises(error, match=said) as caught:
        make(folder)
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_quantised_in_another_way_is_refused_by_name(folder):
    model = load(folder, "none")
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(PlanError, match="quantised by gptq, unknown here; load it in float32.*quantize='nf4'"):
        sm.plan(model, "LN()")


@pytest.mark.parametrize(("scheme", "package"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(folder, scheme, package, monkeypatch):
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match=rf"needs {package}, which is not installed: pip install 'smidgen\[quant\]'"):
        load(folder, scheme)


def test_loading_says_nothing(folder):
    """Neither package's notes at import, nor of every call, reach the user; other records of their loggers do."""
    code = f"""
import smidgen as sm, torch
for scheme in {SCHEMES}:
    model = sm.load({str(folder)!r}, quantize=scheme)[0]
    sm.attach(model, "LN()")
    model(torch.arange(6)[None]).logits.sum().backward()
import logging
logging.getLogger("torchao").warning("another")
"""
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in found.stderr.splitlines() if line and "Loading weights" not in line]
    assert lines == ["another"]
    assert not found.stdout


def test_a_head_of_a_task_stays_in_real_numbers(tmp_path):
    from tests.helpers import task

    config = T.BertConfig(
        vocab_size=len(h.tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    T.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    h.tokenizer().save_pretrained(tmp_path / "bert")
    data = task(tmp_path / "task")
    for scheme in ("nf4", "torchao-int8"):
        model, processor = sm.load(tmp_path / "bert", task=data, quantize=scheme)
        assert sum(1 for _ in quantised_maps(model)) == 12  # neither the classifier nor the pooler, which is new
        delta = sm.fit(model, "LN()", data, processor=processor, epochs=1, progress=False)
        assert delta.base.quantised == scheme
        assert set(delta.base.kept.split()) == {"classifier", "bert.pooler.dense"}
        first = sm.predict(model, ["good fine"], delta=delta, processor=processor)
        model, processor = sm.load(tmp_path / "bert", delta=delta)
        assert sm.predict(model, ["good fine"], delta=delta, processor=processor) == first


def test_the_command_line_quantises_and_remembers(tmp_path):
    from typer.testing import CliRunner

    torch.manual_seed(0)
    config = T.BertConfig(
        vocab_size=len(h.tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    T.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    h.tokenizer().save_pretrained(tmp_path / "bert")
    h.task(tmp_path / "task")

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    asked = ("--model", tmp_path / "bert", "--quantize", "nf4")
    call("plan", *asked, "--json")
    data = ("--data", tmp_path / "task")
    call("tune", *asked, *data, "--out", tmp_path / "run", "--epochs", 1)
    assert sm.Delta.load(tmp_path / "run").base.quantised == "nf4"
    first = call("evaluate", "--delta", tmp_path / "run", *data, "--json")
    assert first == call("evaluate", "--delta", tmp_path / "run", *data, "--json", "--quantize", "nf4")
    call("predict", "--delta", tmp_path / "run", "--text", "good")
    with pytest.warns(sm.RebasedWarning, match="in nf4 and goes on the base in float32"):
        call("evaluate", "--delta", tmp_path / "run", *data, "--json", "--quantize", "none")
