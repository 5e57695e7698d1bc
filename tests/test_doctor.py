"""sm.doctor and `smidgen doctor`: what a model is made of, what acts, what merges."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

import smidgen as sm
from smidgen.cli import commands as cli
from smidgen.common.errors import AttachError, ModelError, RecipeError
from smidgen.inference.sample_inputs import fitting_inputs, input_candidates
from smidgen.studies.diagnosis import Finding, Place
from tests import helpers as h
from tests import odd_models as odd


def test_a_plain_model_is_well():
    model = h.bert(num_labels=3)
    with h.untouched(model):
        found = sm.doctor(model, "LN() + LoRA(rank=2)")
    (finding,) = found.findings
    assert found.faults == ()
    assert finding.merges
    assert finding.restored
    assert {place.acts for place in finding.places} == {"yes"}
    assert sum(p.values for p in finding.places if p.method != "head") == sm.plan(model, "LN() + LoRA(rank=2)").trained
    assert [p.name for p in finding.places if p.method == "head"] == ["classifier"]
    assert found.inputs == {"input_ids": (2, 8), "attention_mask": (2, 8)}
    assert found.head == ("classifier.weight", "classifier.bias")
    counts = {(part.what, part.about): part.count for part in found.sites}
    assert counts["linear", "attention query"] == 2
    assert sum(part.count for part in found.norms) == 5
    assert sum(part.values for part in found.sites) == found.values
    assert found.left == {}


def test_without_a_recipe_every_method_is_tried():
    found = sm.doctor(odd.build("nemotron"))
    named = {finding.recipe for finding in found.findings}
    assert {"LN()", "LoRA()", "Prefix()", "SSF()"} <= named
    assert found.faults == ()
    assert "Adapter()" in named
    assert any("1 + weight, bias of 16" in part.about for part in found.norms)


def test_a_method_that_does_not_fit_is_named_with_the_reason():
    found = sm.doctor(odd.build("mamba"))
    refused = {finding.recipe: finding.refused for finding in found.findings if finding.refused}
    assert "site names 'attention'" in refused["Adapter()"]


def test_what_is_left_alone_is_named():
    left = sm.doctor(odd.build("mamba"), "LN()").left
    assert left["read and never called"] == ("backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj")
    left = sm.doctor(odd.build("llama4"), "LN()").left
    assert [len(paths) for reason, paths in left.items() if "Router" in reason] == [2]
    left = sm.doctor(odd.build("deepseek_v32"), "LN()").left
    assert len(left["no gradient passes: under torch.no_grad"]) == 2


def test_buffers_that_training_moves_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    found = sm.doctor(model, "LoRA(rank=2, target='0')", inputs={"input": torch.randn(3, 4)})
    assert {part.about for part in found.buffers} == {
        "running_mean (moves in training)", "running_var (moves in training)", "num_batches_tracked (moves in training)"
    }  # fmt: skip
    assert found.findings[0].merges


# Each check can fail


class Reading(nn.Module):
    """Reads its maps where nothing tells so beforehand."""

    def __init__(self, also=False):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.also = also

    def forward(self, x):
        maps = [self.one, self.two]
        x = self.norm(x)
        x = F.linear(x, maps[0].weight, maps[0].bias)
        return x + self.two(x) + (F.linear(x, maps[1].weight) if self.also else 0)


def test_an_edit_that_never_acts_is_a_fault():
    (finding,) = sm.doctor(nn.Sequential(Reading(), Reading()), "LoRA(rank=2, target='linear')",
                           inputs={"input": torch.randn(2, 6)}).findings  # fmt: skip
    said = {place.name: place.acts for place in finding.places}
    assert said == {"0.one": "never used", "0.two": "yes", "1.one": "never used", "1.two": "yes"}
    assert finding.faults == (
        "LoRA(rank=2, target='linear'): 2 of 4 places: never used, first 0.one; "
        "stack=('0.two', '1.two') leaves them out",
        f"LoRA(rank=2, target='linear'): merged and attached differ by {finding.merged:.2g}",
    )


def test_a_merged_model_that_does_something_else_is_a_fault():
    """The weight is read beside the call: merged it changes both, attached only one."""
    found = sm.doctor(nn.Sequential(Reading(True), Reading(True)), "LoRA(rank=2, target='two')",
                      inputs={"input": torch.randn(2, 6)})  # fmt: skip
    (finding,) = found.findings
    assert {place.acts for place in finding.places} == {"yes"}
    assert not finding.merges
    assert found.faults == (f"LoRA(rank=2, target='two'): merged and attached differ by {finding.merged:.2g}",)


def test_a_forward_that_breaks_is_a_fault():
    class Fragile(Reading):
        def forward(self, x):
            if hasattr(self.two, "edits"):
                raise IndexError("out of range")
            return super().forward(x)

    found = sm.doctor(nn.Sequential(Fragile(), Fragile()), "LoRA(rank=2, target='two')",
                      inputs={"input": torch.randn(2, 6)})  # fmt: skip
    assert found.faults == ("LoRA(rank=2, target='two'): IndexError: out of range",)


def test_what_is_not_restored_is_a_fault():
    finding = Finding("LN()", places=(Place("LN()", "norm", 4, "yes"),), changes=1.0, merged=0.0)
    assert finding.faults == ()
    assert replace(finding, restored=False).faults == ("LN(): taken off, the model is not what it was",)
    assert replace(finding, merged=0.01).faults == ("LN(): merged and attached differ by 0.01",)


# Inputs


@pytest.mark.parametrize("name", ["llama4", "switch", "wav2vec2", "moonshine_streaming", "gemma3"])
def test_inputs_are_made_from_the_configuration(name):
    model = odd.build(name).float()
    assert set(fitting_inputs(model)) >= {odd_main(name)}


def odd_main(name):
    return next(iter(odd.inputs(name)))


def test_images_are_made_too():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = T.ViTForImageClassification(T.ViTConfig(**sizes, image_size=16, patch_size=4))
    found = sm.doctor(model, "LN()")
    assert found.inputs == {"pixel_values": (2, 3, 16, 16)}
    assert found.faults == ()


def test_ids_mean_nothing_special():
    model = odd.build("gemma3")
    special = {0, 1, 2, 38, 39, 40}
    for inputs in input_candidates(model):
        assert not special & set(inputs.get("input_ids", torch.tensor([])).flatten().tolist())


def test_a_model_that_cannot_be_run_is_looked_over_all_the_same():
    with torch.device("meta"):
        model = h.T.BertModel(h.T.BertConfig(**h.BASE))
    found = sm.doctor(model, "LN()")
    assert "meta device" in found.unrun
    assert found.inputs == {}
    assert {place.acts for place in found.findings[0].places} == {""}
    assert found.faults == ()
    found = sm.doctor(nn.Sequential(Reading(), Reading()), "LN()")
    assert found.unrun.startswith("no input could be made that Sequential runs on (it says nothing of its inputs)")


def test_mistakes():
    model = h.bert()
    with pytest.raises(ModelError, match=r"BertForSequenceClassification runs on \(\w+Error"):
        sm.doctor(model, "LN()", inputs={"pixels": torch.zeros(1)})
    with pytest.raises(RecipeError, match="no method is called 'LNN'"):
        sm.doctor(model, "LNN()")
    sm.attach(model, "LN()")
    with pytest.raises(AttachError, match="attached already"):
        sm.doctor(model)


def test_of_a_select_all_candidates_are_tried():
    (finding,) = sm.doctor(h.bert(), "LN() | Select('fisher', keep=0.1)").findings
    assert finding.recipe == "LN()"
    assert not finding.refused


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    h.bert().save_pretrained(path)
    h.tokenizer().save_pretrained(path)
    return str(path)


def test_the_command(folder, capsys):
    assert cli.main(["doctor", "--model", folder, "--recipe", "LN()"]) == 0
    shown = capsys.readouterr().out
    assert "nothing wrong was found" in shown
    assert "bert.encoder.layer.*.attention.output.LayerNorm" in shown
    assert "input_ids 2x8" in shown


def test_the_command_as_json(folder, capsys):
    assert cli.main(["doctor", "--model", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == []
    assert {finding["recipe"] for finding in report["findings"]} >= {"LN()", "LoRA()"}


def test_the_command_says_by_its_status_what_does_not_fit(folder, capsys):
    assert cli.main(["doctor", "--model", folder, "--recipe", "LN(which='qk')"]) == 1
    assert "matches no site" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["doctor", "--model", folder, "--recipe", "LNN()"]) == 2
