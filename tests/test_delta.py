"""Deltas on disk and on the hub: strict, bit-exact, never half written; and merged models."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.delta.delta import CARD, META, TENSORS, Delta
from smidgen.delta.fingerprint import Fingerprint
from smidgen.delta.hf_peft.conversion import to_peft
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import inputs_for, shake, tiny
from tests import helpers as h


def trained(recipe="LN() + LoRA(rank=2)", model=None, scale=0.3, **options):
    """A delta with values of its own, and what the model gave with it."""
    model = h.bert() if model is None else model
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), scale)
    return h.logits(model), sm.detach(model)


@pytest.fixture(scope="module")
def made():
    return trained()


@pytest.fixture
def saved(made, tmp_path):
    return made[1].with_info(note="ä", scores={"accuracy": 0.25}).save(tmp_path / "delta")


# Files


def test_saved_and_loaded_bit_for_bit(made, saved):
    logits, delta = made
    loaded = Delta.load(saved)
    h.same(loaded, delta)
    assert loaded.to_json() == delta.with_info(note="ä", scores={"accuracy": 0.25}).to_json()
    assert (loaded.recipe, loaded.base, loaded.head, loaded.labels) == (
        sm.parse("LN() + LoRA(rank=2)"), delta.base, ("classifier.weight", "classifier.bias"), ("LABEL_0", "LABEL_1"),
    )  # fmt: skip
    assert sorted(path.name for path in saved.iterdir()) == [CARD, META, TENSORS]
    model = h.bert(shaken=0.3)
    assert torch.equal(h.logits(sm.attach(model, loaded)), logits)


def test_odd_values_survive(tmp_path):
    _, delta = trained("LN()")
    name = next(iter(delta.tensors))
    delta.tensors[name][:5] = torch.tensor([-3.4e38, -1e-42, -0.0, 1e-42, 3.4e38])
    loaded = Delta.load(delta.save(tmp_path / "delta"))
    assert loaded.tensors[name].numpy().tobytes() == delta.tensors[name].numpy().tobytes()


BROKEN = {
    "save": lambda model, delta, folder: delta.save(folder),
    "load": lambda model, delta, folder: Delta.load(folder),
    "attach": lambda model, delta, folder: sm.attach(model, delta),
    "merge": lambda model, delta, folder: sm.merge(model, delta),
    "sum": lambda model, delta, folder: (delta + delta).on(model),
    "switch": lambda model, delta, folder: sm.Deltas(model).update(a=delta),
    "export": lambda model, delta, folder: to_peft(delta, model, folder),
}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", BROKEN)
def test_values_that_are_not_finite_are_refused_by_name(what, value, tmp_path):
    delta, model = trained("LoRA(rank=2)")[1], h.bert()
    name = next(name for name in delta.tensors if name.endswith("query.edits.0.A"))
    broken = replace(delta, tensors={**delta.tensors, name: delta.tensors[name].clone()})
    broken.tensors[name][0, :3] = float(value)
    folder = delta.save(tmp_path / "delta")
    rewrite(folder, lambda tensors: tensors.update({name: broken.tensors[name]}))
    said = rf"{re.escape(name)} holds 3 values of 32 that are not finite.*diverged"
    with h.untouched(model), pytest.raises(DeltaError, match=said) as error:
        BROKEN[what](model, broken, folder)
    assert "\n" not in str(error.value)


def test_a_merge_of_what_is_attached_refuses_values_that_are_not_finite():
    model = sm.attach(h.bert(), "LN() + LoRA(rank=2)")
    with torch.no_grad():
        trained_parameters(model)["bert.embeddings.LayerNorm.weight"][1] = float("nan")
    with pytest.raises(AttachError, match=r"embeddings\.LayerNorm\.weight holds 1 values of 16 that are not finite"):
        sm.merge(model)


def test_a_merge_that_would_overflow_is_refused():
    model = sm.attach(h.bert(), "LN()")
    with torch.no_grad():
        trained_parameters(model)["bert.embeddings.LayerNorm.weight"][1] = 1e6
    with pytest.raises(
        AttachError, match=r"in float16, bert\.emb\S+ holds 1 values of 16 .* merge\(\.\.\., dtype=torch\.float32"
    ):
        sm.merge(model, dtype=torch.float16)
    sm.merge(model)


def test_saved_twice_the_bytes_are_equal(made, tmp_path):
    first, second = made[1].save(tmp_path / "a"), Delta.load(made[1].save(tmp_path / "a")).save(tmp_path / "b")
    for name in (TENSORS, META, CARD):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_with_info(made):
    delta = made[1].with_info(task={"name": "films"}, note=1)
    more = delta.with_info(note=2)
    assert (delta.info["note"], more.info["note"], more.info["task"]) == (1, 2, {"name": "films"})
    assert more.tensors is delta.tensors
    assert "note" not in made[1].info
    assert Delta.of(sm.attach(h.bert(), "LN()"), note=3).info["note"] == 3


def test_the_card(made, saved):
    text = (saved / CARD).read_text()
    delta = made[1]
    assert text.startswith("---\nlibrary_name: smidgen\nbase_model: unnamed\ntags: [smidgen, peft]\n---\n")
    assert "# LN() + LoRA(rank=2)\n" in text
    assert f"{delta.trained:,} trained values and a head of 34" in text
    assert f"fingerprint `{delta.base.content}`, taken in float32" in text
    assert "| accuracy | 0.2500 |" in text
    assert "a plain bert model" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "card", "exec")


def test_repr(made):
    assert repr(made[1]) == f"Delta(LN() + LoRA(rank=2) on bert: {made[1].trained:,} values, head 34)"


def edit(path, change):
    meta = json.loads((path / META).read_text())
    change(meta)
    (path / META).write_text(json.dumps(meta))


def rewrite(path, change):
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS)


NAME = "bert.embeddings.LayerNorm.weight"
CORRUPTIONS = {
    "truncated": (lambda p: cut(p / TENSORS, 0.5), "corrupt or truncated"),
    "cut in the header": (lambda p: cut(p / TENSORS, 0.01), "corrupt or truncated"),
    "empty": (lambda p: (p / TENSORS).write_bytes(b""), "corrupt or truncated"),
    "no tensors": (lambda p: (p / TENSORS).unlink(), rf"{TENSORS} is missing"),
    "no json": (lambda p: (p / META).unlink(), rf"holds no delta: {META} is missing"),
    "not json": (lambda p: (p / META).write_text("{"), "damaged: not JSON"),
    "not text": (lambda p: (p / META).write_bytes(b"\xff\xfe\x00"), "damaged: not JSON"),
    "no object": (lambda p: (p / META).write_text("[1]"), "not a JSON object"),
    "extra key": (lambda p: edit(p, lambda m: m.update(extra=1)), "unexpected extra"),
    "missing key": (lambda p: edit(p, lambda m: m.pop("pooling")), "missing pooling"),
    "wrong version": (
        lambda p: edit(p, lambda m: m.update(format_version=2)),
        "format_version 2; this smidgen reads 1",
    ),
    "no version": (lambda p: edit(p, lambda m: m.pop("format_version")), "format_version None"),
    "wrong shape": (lambda p: rewrite(p, lambda t: t.update({NAME: torch.zeros(4, 4)})), rf"{NAME}.*shape \[16\]"),
    "shape in json": (lambda p: edit(p, lambda m: m["tensors"][NAME].update(shape=[8])), rf"{NAME}.*shape \[8\]"),
    "wrong dtype": (lambda p: rewrite(p, lambda t: t.update({NAME: t[NAME].half()})), rf"{NAME} is torch.float16"),
    "unknown dtype": (lambda p: edit(p, lambda m: m["tensors"][NAME].update(dtype="float33")), "float33"),
    "no dtype": (lambda p: edit(p, lambda m: m["tensors"][NAME].pop("dtype")), "damaged|dtype"),
    "tensors a list": (lambda p: edit(p, lambda m: m.update(tensors=[])), "damaged|disagree"),
    "extra tensor": (lambda p: rewrite(p, lambda t: t.update(more=torch.zeros(1))), "disagree on more"),
    "missing tensor": (lambda p: rewrite(p, lambda t: t.pop(NAME)), f"disagree on {NAME}"),
    "head name": (lambda p: edit(p, lambda m: m["head"].append("classifier.gain")), r"lacks: \['classifier.gain'\]"),
    "head a number": (lambda p: edit(p, lambda m: m.update(head=3)), "damaged"),
    "unknown method": (lambda p: edit(p, lambda m: m["recipe"][0].update(name="LM")), "no method is called 'LM'"),
    "unknown field": (lambda p: edit(p, lambda m: m["recipe"][0].update(depth=1)), "LN has no field 'depth'"),
    "missing field": (lambda p: edit(p, lambda m: m["recipe"][0].pop("terms")), "lacks the field.* terms"),
    "no recipe": (lambda p: edit(p, lambda m: m.update(recipe=[])), "needs at least one method"),
    "recipe a number": (lambda p: edit(p, lambda m: m.update(recipe=3)), "damaged"),
    "recipe a text": (lambda p: edit(p, lambda m: m.update(recipe="LN()")), "damaged"),
    "base lacks a field": (lambda p: edit(p, lambda m: m["base"].pop("content")), "damaged.*content"),
    "base of more": (lambda p: edit(p, lambda m: m["base"].update(size=1)), "damaged.*size"),
    "base dtype": (lambda p: edit(p, lambda m: m["base"].update(dtype="int3")), "int3"),
}


def cut(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damaged_delta_is_refused(name, saved):
    change, said = CORRUPTIONS[name]
    change(saved)
    model = h.bert()
    with h.untouched(model), pytest.raises(sm.SmidgenError, match=said) as error:
        sm.attach(model, Delta.load(saved))
    assert "\n" not in str(error.value)


def test_no_delta_there(tmp_path):
    with pytest.raises(DeltaError, match="no delta at .*nowhere: not a folder"):
        Delta.load(tmp_path / "nowhere")
    with pytest.raises(DeltaError, match=f"{META} is missing .found: a.txt"):
        (tmp_path / "a.txt").touch()
        Delta.load(tmp_path)
    with pytest.raises(DeltaError, match="not a folder"):
        Delta.load(tmp_path / "a.txt")
    with pytest.raises(DeltaError, match="no delta at plain: not a folder"):
        Delta.load("plain")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_leaves_the_old_delta_whole(at, made, saved, monkeypatch):
    files, calls = sys.modules["smidgen.common.atomic_files"], []
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    original = files._write_temporary

    def full(*args):
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(files, "_write_temporary", full)
    _, other = trained("LN()")
    with pytest.raises(DeltaError, match="cannot write to .*: No space left on device"):
        other.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    h.same(Delta.load(saved), made[1])


def test_a_disk_that_fills_up_while_a_file_is_written(made, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["smidgen.common.atomic_files"].os, "fsync", full)
    with pytest.raises(DeltaError, match="No space left"):
        made[1].save(tmp_path / "delta")
    assert list((tmp_path / "delta").iterdir()) == []


def test_a_folder_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DeltaError, match="cannot write to"):
        made[1].save(tmp_path / "file" / "delta")


# The hub


def test_from_the_hub(made, saved, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    h.same(Delta.load("someone/films", revision="v2"), made[1])
    assert asked == [("someone/films", {"revision": "v2", "allow_patterns": [TENSORS, META, CARD]})]


def test_not_on_the_hub(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def missing(name, **options):
        raise LocalEntryNotFoundError("a long story\nof many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(DeltaError, match="^someone/nothing is neither a folder nor a delta on the hub"):
        Delta.load("someone/nothing")


def test_a_hub_repository_without_a_delta(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(DeltaError, match=META):
        Delta.load("someone/else")


def test_to_the_hub(made, tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, name, private, exist_ok):
            assert (name, private, exist_ok) == ("someone/films", True, True)
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert repo_id == "someone/films"
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert made[1].push_to_hub("someone/films", private=True, token="secret") == "https://hub/someone/films"
    h.same(Delta.load(tmp_path / "hub"), made[1])


# The right base


def named(model, name="tiny/base"):
    model.config._name_or_path = name
    return model


def test_another_base_of_the_same_name():
    _, delta = trained(model=named(h.bert()))
    other = named(h.bert())
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-6
    with (
        h.untouched(other),
        pytest.raises(DeltaError, match=r"trained on 'tiny/base'; this model has the same shapes but other values"),
    ):
        sm.attach(other, delta)
    sm.attach(other, delta, verify=False)


def test_the_head_and_the_name_do_not_count():
    logits, delta = trained(model=named(h.bert()))
    other = named(h.bert(), "elsewhere")
    with torch.no_grad():
        other.classifier.weight += 1
    assert torch.equal(h.logits(sm.attach(other, delta)), logits)


def test_other_architectures_and_sizes():
    _, delta = trained("LN()", model=named(h.bert()))
    with pytest.raises(DeltaError, match=r"trained on 'tiny/base' \(bert\), but this model is a roberta"):
        sm.attach(h.build("roberta"), delta)
    larger = h.T.AutoModelForSequenceClassification.from_config(h.T.BertConfig(**{**h.BASE, "num_hidden_layers": 3}))
    with pytest.raises(DeltaError, match="this bert has other tensors or shapes"):
        sm.attach(larger, delta)


def test_another_number_of_labels():
    _, delta = trained("LN()")
    with pytest.raises(
        DeltaError, match=r"classifier\.weight has shape \(3, 16\).*\(2, 16\) in the delta; load the model"
    ):
        sm.attach(h.bert(num_labels=3), delta)


def test_a_base_in_a_wider_dtype_is_compared_after_rounding():
    _, delta = trained("LN()", model=h.bert().to(torch.bfloat16))
    assert delta.base.dtype == "bfloat16"
    wide = h.bert()
    with sm.attached(wide, delta):  # the float32 values that were rounded
        pass
    sm.attach(wide.to(torch.bfloat16).float(), delta)  # the rounded ones in float32
    sm.detach(wide)
    with torch.no_grad():
        wide.bert.encoder.layer[0].output.dense.weight[0, 0] *= 1.02
    with pytest.raises(DeltaError, match="other values"):
        sm.attach(wide, delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_a_narrower_dtype_is_refused(dtype):
    _, delta = trained("LN()")
    model, name = h.bert().to(dtype), str(dtype)[6:]
    with (
        h.untouched(model),
        pytest.raises(DeltaError, match=f"in float32, but the base is loaded in {name}.*dtype=float32 .*verify=False"),
    ):
        sm.attach(model, delta)
    sm.attach(model, delta, verify=False)


def test_fingerprints_tell_apart():
    model = h.bert()
    own = Fingerprint.of(model, ())
    assert Fingerprint.of(h.twin(model), ()) == own
    assert Fingerprint.of(sm.attach(h.twin(model), "Full()"), ()) == own, "attached, the base is the same"
    zero = h.twin(model)
    with torch.no_grad():
        zero.bert.pooler.dense.bias[:] = torch.where(zero.bert.pooler.dense.bias.abs() < 9, -0.0, 1.0)
    assert Fingerprint.of(zero, ()).content != own.content
    renamed = h.twin(model)
    renamed.bert.extra = renamed.bert._modules.pop("pooler")
    assert Fingerprint.of(renamed, ()).structure != own.structure
    swapped = h.twin(model)
    layer = swapped.bert.encoder.layer[0].attention.self
    layer.query, layer.key = layer.key, layer.query
    found = Fingerprint.of(swapped, ())
    assert found.structure == own.structure
    assert found.content != own.content


# Merged


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "distilbert", "llama", "gpt2"])
def test_merged_ln_is_bit_equal(kind):
    model = h.build(kind, attn_implementation="eager")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    logits, delta = trained("LN()", model=model)
    with h.untouched(model):
        merged = sm.merge(model, delta)
    assert type(merged) is type(model)
    assert not any("edits" in name for name in merged.state_dict())
    assert torch.equal(h.logits(merged), logits)


def test_merged_from_what_is_attached():
    model = h.bert()
    sm.attach(model, "LN() + LoRA(rank=2) + IA3()")
    shake(trained_parameters(model).values(), 0.2)
    before = h.logits(model)
    merged = sm.merge(model)
    torch.testing.assert_close(h.logits(merged), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(h.logits(model), before)
    merged.save_pretrained  # noqa: B018  (its own again)
    assert "save_pretrained" not in merged.__dict__


def test_merging_into_bfloat16_says_what_it_lost():
    base = h.bert().to(torch.bfloat16)
    sm.attach(base, "LN()")
    with torch.no_grad():
        for name, parameter in trained_parameters(base).items():
            if "LayerNorm.weight" in name:
                parameter[:3] *= 1 + 1e-4  # lost: below half the distance of two bfloat16 numbers
                parameter[3] += 0.1
    model, delta = base, sm.detach(base)
    with pytest.warns(sm.RoundingWarning) as caught:
        merged = sm.merge(model, delta)
    count, lost = re.search(r"rounded ([\d,]+) values: (\d+) of them fell back", str(caught[0].message)).groups()
    assert count == f"{delta.trained + delta.head_values}"
    assert int(lost) == 3 * 5
    error = float(re.search(r"largest error (\S+);", str(caught[0].message)).group(1))
    worst = max(float((merged.get_parameter(n).detach().float() - t).abs().max()) for n, t in delta.tensors.items())
    assert error == pytest.approx(worst, rel=0.05)
    assert caught[0].filename == __file__
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_merging_into_float32_keeps_every_value():
    model = h.bert().to(torch.bfloat16)
    _, delta = trained("LN() + BitFit(norms=False)", model=model, scale=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = sm.merge(model, delta, dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, tensor in delta.tensors.items():
        assert torch.equal(merged.get_parameter(name).detach(), tensor)


def test_a_pooling_cannot_be_merged():
    model = h.bert()
    _, delta = trained("LN()", model=model, pooling="mean")
    with h.untouched(model), pytest.raises(AttachError, match=r"pooling='mean' cannot be merged: .* reads first token"):
        sm.merge(model, delta)


def test_a_missing_bias_cannot_be_merged_into():
    class Shift(sm.IA3, abstract=True):
        """IA3 with a bias where there is none."""

        def merge(self, p, weight, bias, site):
            return weight, p["l"]

    with pytest.raises(AttachError, match="needs a bias at .*k_proj, which has none"):
        sm.merge(sm.attach(h.causal(), Shift()))


def test_a_merged_model_keeps_its_head_on_disk(tmp_path):
    model = h.bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    logits, delta = trained("LN()", model=model)
    assert delta.labels == ("neg", "pos")
    sm.merge(model, delta).save_pretrained(tmp_path / "merged")
    loaded = h.T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(h.logits(loaded), logits)
    assert loaded.config.id2label == {0: "neg", 1: "pos"}
    for name in delta.head:
        assert torch.equal(loaded.get_parameter(name).detach(), delta.tensors[name])
    assert not torch.equal(model.classifier.weight, loaded.classifier.weight)


def test_between_reads_a_delta_from_two_checkpoints():
    base, tuned = tiny("bert"), tiny("bert")
    shake([p for n, p in tuned.named_parameters() if "LayerNorm" in n or n.startswith("classifier")], 0.3, seed=5)
    delta = Delta.between(base, tuned, "LN()", source="a test")
    inputs = inputs_for("bert")
    with torch.no_grad(), sm.attached(base, delta):
        attached = base(**inputs).logits
    assert torch.equal(attached, tuned.eval()(**inputs).logits)
    assert delta.info["source"] == "a test"


def test_between_refuses_what_two_checkpoints_do_not_tell():
    with pytest.raises(DeltaError, match="adds tensors, which two checkpoints do not tell"):
        Delta.between(tiny("bert"), tiny("bert"), "LN() + LoRA(rank=2)")
    with pytest.raises(DeltaError, match="does not match the base"):
        Delta.between(tiny("bert"), tiny("llama"), "LN()")
