"""Components of five architectures, the laws of the four measures, runs over tasks and seeds, and the commands."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
import typer

import smidgen as sm
from smidgen.cli.analyze_commands import app
from smidgen.cli.commands import main
from smidgen.common.errors import ModelError
from smidgen.studies.experiments.change_measures import MEASURES, measure
from smidgen.studies.experiments.fisher_mass import FisherMass
from smidgen.studies.experiments.model_components import COMPONENTS, ComponentPart, components, part_of, stack_names
from smidgen.studies.experiments.parameter_changes import Changes, Run, compare_changes, join_changes
from smidgen.studies.experiments.tuning_changes import analyze_changes, change_of, lr_steps
from smidgen.studies.reports.fisher_mass import fisher_report
from smidgen.studies.reports.parameter_changes import agreement, change_report
from smidgen.training.run.settings import Settings
from tests.helpers import bert, build, rows, task, tokenizer, twin

T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
BLOCK = ["query", "key", "value", "attention out", "ff in", "ff out", "attention LN", "output LN"]
MODELS = {
    "bert": (lambda: build("bert"), [*BLOCK, "embedding", "embedding LN", "pooler", "head"]),
    "gpt2": (lambda: build("gpt2", "AutoModelForCausalLM"), [*BLOCK, "embedding", "final LN"]),
    "llama": (lambda: build("llama", "AutoModelForCausalLM"), [*BLOCK, "embedding", "final LN", "output embedding"]),
    "t5": (lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)), [*BLOCK, "embedding", "final LN", "other"]),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**VIT)), [*BLOCK, "embedding", "final LN", "head"]),
    "qwen3": (
        lambda: T.AutoModelForCausalLM.from_config(
            T.Qwen3Config(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, intermediate_size=24)),
        [*BLOCK, "q/k norm", "embedding", "final LN", "output embedding"],
    ),
}  # fmt: skip


def moved(model, by):
    """A copy with `by(name)` added to every value."""
    other = twin(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += by(name)
    return other


def wide(model):
    """In float64, so that additions are exact to the last figures."""
    return model.double()


# Components


@pytest.mark.parametrize("name", MODELS)
def test_every_value_belongs_to_one_part(name):
    model = MODELS[name][0]()
    counts = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for part in components(model):
        part.of(counts[part.name]).add_(1)
    assert {n for n, c in counts.items() if not (c == 1).all()} == set()


@pytest.mark.parametrize("name", MODELS)
def test_components_and_layers(name):
    build_model, wanted = MODELS[name]
    parts = components(build_model())
    assert {part.component for part in parts} == set(wanted)
    assert {part.component for part in parts} <= set(COMPONENTS)
    for part in parts:
        assert (part.layer is None) == (part.component not in [*BLOCK, "q/k norm"] and part.component != "other")
    norms = [part for part in parts if part.component.endswith(("LN", "norm"))]
    assert {part.term for part in norms} <= {"gain", "bias"}
    assert all(part.term != "gain" for part in parts if part not in norms)


def test_known_places():
    parts = {part.name: part for part in components(build("bert"))}
    inner = "bert.encoder.layer.1."
    known = {
        "bert.embeddings.LayerNorm.bias": ("embedding LN", "bias", None),
        f"{inner}attention.output.LayerNorm.weight": ("attention LN", "gain", 1),
        f"{inner}output.LayerNorm.bias": ("output LN", "bias", 1),
        f"{inner}output.dense.weight": ("ff out", "weight", 1),
        "bert.pooler.dense.bias": ("pooler", "bias", None),
        "classifier.weight": ("head", "weight", None),
    }
    assert {n: (parts[n].component, parts[n].term, parts[n].layer) for n in known} == known


def test_a_fused_projection_is_three_parts():
    model = build("gpt2")
    parts = [part for part in components(model) if part.name.startswith("transformer.h.0.attn.c_attn.")]
    found = [(part.component, part.term, tuple(part.rows)) for part in parts[:3]]
    assert found == [("query", "weight", (0, 16, 1)), ("key", "weight", (16, 32, 1)), ("value", "weight", (32, 48, 1))]
    assert parts[4].label == "transformer.h.0.attn.c_attn.bias[key]"
    weight, bias = torch.arange(16.0 * 48).reshape(16, 48), torch.arange(48.0)
    assert torch.equal(parts[1].of(weight), weight[:, 16:32])  # a Conv1D stores (in, out)
    assert torch.equal(parts[4].of(bias), bias[16:32])
    other = twin(model)
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight[:, 16:32] += 1.0
    table = compare_changes(model, other).table("absolute", ("component", "layer"))
    assert {key for key, cell in table.items() if cell.mean} == {("key", 0)}
    assert table["key", 0].mean == pytest.approx(0.5)  # weight 1, bias 0


def test_tied_weights_count_once_and_stacks_have_names():
    parts = components(MODELS["t5"][0]())
    assert [part.name for part in parts if part.component == "embedding"] == ["shared.weight"]
    assert stack_names(parts) == {"encoder.block": "encoder", "decoder.block": "decoder"}
    assert stack_names(components(build("bert"))) == {"bert.encoder.layer": ""}


def test_a_saved_name_finds_its_part():
    parts = components(build("gpt2"))
    assert [p.component for p in part_of(parts, "transformer.h.1.attn.c_attn.weight")] == ["query", "key", "value"]
    (added,) = part_of(parts, "transformer.h.1.attn.c_attn.edits.0-value.A")
    assert (added.component, added.layer, added.term) == ("value", 1, "weight")
    with pytest.raises(ModelError, match=r"no tensor 'transformer.h.1.ln_1.wieght'; did you mean .*ln_1.weight"):
        part_of(parts, "transformer.h.1.ln_1.wieght")


# Measures


def test_the_four_measures_in_closed_form():
    base, tuned = torch.tensor([1.0, -2.0, 5.0, 0.0]), torch.tensor([1.0, -1.0, 2.0, 0.0])
    found = measure(base, tuned, lr_steps=0.5)
    assert found == pytest.approx((1.0, 0.5, math.sqrt(10 / 4), 2.0))
    assert math.isnan(measure(base, tuned)[3])
    assert math.isnan(measure(torch.zeros(4), tuned)[1])


def test_low_precision_is_compared_exactly():
    base = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    assert measure(base, torch.tensor([1.001, 256.0]))[0] == pytest.approx(0.0005, rel=1e-4)


def test_a_known_shake_gives_the_known_measures():
    base = wide(build("bert"))
    tuned = moved(base, lambda name: 0.25 if "attention.output.LayerNorm" in name else -0.0625)
    result = compare_changes(base, tuned, lr_steps=0.125)
    for name in result.components:
        by = 0.25 if name == "attention LN" else 0.0625
        assert result.table("absolute")[name,].mean == pytest.approx(by, rel=1e-9)
        assert result.table("rms")[name,].mean == pytest.approx(by, rel=1e-9)
        assert result.table("per_lr")[name,].mean == pytest.approx(8 * by, rel=1e-9)
    parameters = dict(base.named_parameters())
    sizes = [p.detach().abs().mean() for n, p in parameters.items() if "attention.output.LayerNorm" in n]
    wanted = float(torch.stack([0.25 / size for size in sizes]).mean())
    assert result.table("relative")["attention LN",].mean == pytest.approx(wanted)
    assert result.ranking("absolute")[0] == "attention LN"


def test_tensors_first_then_components():
    """A large tensor counts no more than a small one."""
    base = wide(build("bert"))
    tuned = moved(base, lambda name: 3.0 if name.endswith("layer.0.output.dense.bias") else 0.0)
    assert compare_changes(base, tuned).table("absolute")["ff out",].mean == pytest.approx(3.0 / 4)
    terms = compare_changes(base, tuned).table("absolute", ("component", "term", "layer"))
    assert terms["ff out", "bias", 0].mean == pytest.approx(3.0)
    assert terms["ff out", "weight", 0].mean == 0


def test_the_ranking_turns_over():
    """Gains near 1 that move by 0.01 lead absolutely; weights near 0.03 that move by 0.006 lead relatively."""
    base = wide(build("bert", shaken=0.0))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(0.03 if parameter.ndim == 2 else 1.0)
    result = compare_changes(base, moved(base, lambda name: 0.01 if "LayerNorm" in name else 0.006))
    assert result.ranking("absolute")[0].endswith("LN")
    assert not result.ranking("relative")[0].endswith("LN")
    assert agreement(result.ranking("absolute"), result.ranking("relative")) < 0
    assert "is number" in change_report(result).summary[0]


def test_undefined_is_missing_and_not_zero():
    base = wide(build("bert", shaken=0.0))
    with torch.no_grad():
        base.bert.pooler.dense.bias.zero_()
        base.bert.pooler.dense.weight.fill_(2.0)
        for norm in (m for n, m in base.named_modules() if n.endswith("embeddings.LayerNorm")):
            norm.weight.zero_(), norm.bias.zero_()
    result = compare_changes(base, moved(base, lambda name: 0.5))
    cell = result.table("relative")["pooler",]
    assert (cell.mean, cell.tensors) == (pytest.approx(0.25), 1)
    assert math.isnan(result.table("relative")["embedding LN",].mean)
    assert "embedding LN" not in result.ranking("relative")
    assert "embedding LN" in result.ranking("absolute")
    assert result.ranking("per_lr") == []
    change_report(result)


def test_agreement_is_spearman():
    from scipy.stats import spearmanr

    first, second = list("abcdef"), list("cabfde")
    assert agreement(first, first) == 1
    assert agreement(first, first[::-1]) == -1
    assert agreement(first, second) == pytest.approx(spearmanr(range(6), [second.index(x) for x in first])[0])
    assert math.isnan(agreement(["a", "b"], ["b", "a"]))


# What is compared


def test_state_dicts_prefixes_and_heads():
    model = build("bert")
    tuned = moved(model, lambda name: 0.5)
    whole = compare_changes(model, tuned, lr_steps=1)
    assert not any(part.component == "head" for part in whole.parts)
    assert np.array_equal(compare_changes(model.state_dict(), tuned, lr_steps=1).values, whole.values)
    assert np.array_equal(compare_changes(model, tuned.bert.state_dict(), lr_steps=1).values, whole.values)
    assert np.array_equal(compare_changes(model.bert, tuned, lr_steps=1).values, whole.values)
    states = compare_changes(model.state_dict(), tuned.state_dict(), model=model, lr_steps=1)
    assert np.array_equal(states.values, whole.values)
    with pytest.raises(ModelError, match="pass model="):
        compare_changes(model.state_dict(), tuned.state_dict())


def test_a_pooler_that_only_one_has_is_left_out():
    model = build("bert")
    tagger = build("bert", "AutoModelForTokenClassification", seed=1)
    assert "pooler" not in compare_changes(model, tagger).components


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: build("llama"), "missing in the"),
        (lambda: _narrow(), r"\[20, 16\] in the base and \[20, 8\] in the tuned"),
    ],
)
def test_other_architectures_are_refused(other, found):
    with pytest.raises(ModelError, match=f"not of one architecture: .*{found}") as error:
        compare_changes(build("bert"), other())
    assert "\n" not in str(error.value)


def _narrow():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return T.BertModel(T.BertConfig(vocab_size=20, max_position_embeddings=40, **sizes))


def test_nothing_changed_is_an_error():
    model = build("bert")
    with pytest.raises(ModelError, match="nothing changed: all 39 tensors are equal"):
        compare_changes(model, twin(model))
    other = twin(model)
    with torch.no_grad():
        other.classifier.weight += 1  # the head does not count
    with pytest.raises(ModelError, match="nothing changed"):
        compare_changes(model, other)


def test_unknown_names_are_errors():
    model = build("bert")
    result = compare_changes(model, moved(model, lambda name: 0.1))
    with pytest.raises(ModelError, match="no component 'output NL'; did you mean 'output LN'"):
        result.only(["output NL"])
    with pytest.raises(ModelError, match="no measure 'relativ'; did you mean 'relative'"):
        result.table("relativ")
    with pytest.raises(ModelError, match="cannot be made by 'layers'; did you mean 'layer'"):
        result.table("rms", ("layers",))
    assert result.only(["output LN", "query"]).components == ["query", "output LN"]


# Several runs


def _parts():
    return (ComponentPart("a", "query", "weight", 0), ComponentPart("b", "query", "bias", 0))


def test_means_and_spreads_over_seeds_then_tasks():
    runs = tuple(Run(task, seed) for task in ("x", "y") for seed in (0, 1))
    values = np.zeros((4, 2, 4))
    values[:, :, 0] = [[1, 3], [3, 5], [10, 10], [10, 10]]
    cell = Changes("m", "", _parts(), runs, values).table("absolute")["query",]
    assert cell.mean == pytest.approx((3 + 10) / 2)
    assert cell.tasks == pytest.approx(np.std([3, 10], ddof=1))
    assert cell.seeds == pytest.approx(math.sqrt((2 + 0) / 2))  # variances 2 and 0
    assert cell.spread == cell.tasks
    alone = Changes("m", "", _parts(), runs[:2], values[:2]).table("absolute")["query",]
    assert (math.isnan(alone.tasks), alone.spread) == (True, pytest.approx(math.sqrt(2)))


def test_json_round_trip():
    model = build("gpt2")
    result = compare_changes(model, moved(model, lambda name: 0.1), run=Run("x", 3, {"steps": 2}))
    text = json.dumps(result.to_json(), allow_nan=False)
    back = Changes.from_json(json.loads(text))
    assert back.parts == result.parts
    assert back.runs == result.runs
    assert np.array_equal(back.values, result.values, equal_nan=True)
    assert back.to_json() == result.to_json()


def test_joined_runs_may_lack_a_part():
    model = build("bert")
    one = compare_changes(model, moved(model, lambda name: 0.5), run=Run("x"))
    two = compare_changes(model, build("bert", "AutoModelForTokenClassification", seed=1), run=Run("y"))
    both = join_changes([two, one])
    assert both.values.shape == (2, len(one.parts), len(MEASURES))
    assert both.table("absolute")["pooler",].mean == pytest.approx(0.5)
    assert np.isnan(both.values).any()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved base, two tasks and a delta."""
    root = tmp_path_factory.mktemp("world")
    bert().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for name in ("first", "second"):
        task(root / name, train=16, held=6, make=lambda count, start=0: rows(count, start))
    model, tok = sm.load(root / "base", task=sm.Task.load(root / "first"))
    delta = sm.fit(model, "LN()", sm.Task.load(root / "first"), tokenizer=tok, epochs=2, batch_size=4, seed=5)
    delta.save(root / "delta")
    tuned = sm.merge(model, delta)
    tuned.save_pretrained(root / "tuned")
    tok.save_pretrained(root / "tuned")
    return root


def test_the_experiment(world, tmp_path):
    tasks, said = [sm.Task.load(world / name) for name in ("first", "second")], []
    options = {"epochs": 1, "batch_size": 8, "out": tmp_path}
    result = analyze_changes(world / "base", tasks, seeds=2, say=said.append, **options)
    assert [(run.task, run.seed) for run in result.runs] == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]
    assert (result.recipe, len(said)) == ("Full()", 4)
    assert said[-1].startswith("second, seed 1: validation accuracy")
    rates = sum(5e-5 * Settings(epochs=1).rate(step, 2) for step in range(2))
    assert [run.info["lr_steps"] for run in result.runs] == pytest.approx([rates] * 4)
    assert 0 < result.table("per_lr")["query",].mean < 1.5  # Adam moves a value by at most about lr a step
    column = list(MEASURES).index("absolute")
    assert result.values[:, :, column] / rates == pytest.approx(result.values[:, :, list(MEASURES).index("per_lr")])
    files = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(files) == 4
    stamps = [f.stat().st_mtime_ns for f in files]
    again = analyze_changes(world / "base", tasks, seeds=2, **options)
    assert [f.stat().st_mtime_ns for f in files] == stamps
    assert again.to_json() == result.to_json()
    longer = analyze_changes(world / "base", tasks, seeds=2, **{**options, "epochs": 2})  # other settings, other runs
    assert longer.to_json() != result.to_json()
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 8


def test_the_experiment_refuses_what_makes_no_sense(world):
    one = sm.Task.load(world / "first")
    with pytest.raises(ModelError, match="0 tasks"):
        analyze_changes(world / "base", [])
    with pytest.raises(ModelError, match="0 seeds"):
        analyze_changes(world / "base", [one], seeds=0)
    with pytest.raises(ModelError, match="two tasks have one name"):
        analyze_changes(world / "base", [one, one])


def test_a_delta_moves_what_it_trained(world):
    delta = sm.Delta.load(world / "delta")
    model, _ = sm.load(world / "base", delta=delta)
    result = change_of(model, delta)
    moving = [name for name in result.components if result.table("absolute")[name,].mean]
    assert moving == ["embedding LN", "attention LN", "output LN"]
    assert result.recipe == "LN()"
    assert (result.runs[0].task, result.runs[0].seed) == ("first", 5)
    pooled = change_of(model, replace(delta, pooling="mean"))
    assert np.array_equal(pooled.values, result.values, equal_nan=True)


def test_added_tensors_are_folded_in(world):
    model, tok = sm.load(world / "base", task=sm.Task.load(world / "first"))
    delta = sm.fit(model, "LoRA(rank=2, target='query')", sm.Task.load(world / "first"), tokenizer=tok, epochs=2,
                   batch_size=4)  # fmt: skip
    result = change_of(model, delta)
    assert [name for name in result.components if result.table("absolute")[name,].mean] == ["query"]


def test_the_sum_of_learning_rates(world):
    delta = sm.Delta.load(world / "delta")
    settings = Settings(epochs=2, batch_size=4)
    done = 4 * delta.info["best_epoch"]
    wanted = 3e-3 * sum(settings.rate(step, 8) for step in range(done))
    assert lr_steps(delta) == pytest.approx(wanted)
    given = delta.with_info(settings={**delta.info["settings"], "lr": 1.0})
    assert lr_steps(given) == pytest.approx(wanted / 3e-3)
    assert lr_steps(replace(delta, info={})) is None
    mixed = replace(delta, recipe=sm.parse("LN() + IA3()"))
    assert lr_steps(mixed) is None


# Fisher


def ones(model, **larger):
    return {n: torch.full_like(p, larger.get(n.rpartition(".")[2], 1.0)) for n, p in model.named_parameters()}


def test_fisher_mass_in_closed_form():
    model = build("bert")
    result = FisherMass.of(model, ones(model, bias=4.0), task="x", kind="empirical")
    assert "head" not in result.components
    outside = [(n, p) for n, p in model.named_parameters() if not n.startswith("classifier")]
    total = sum(p.numel() * (4.0 if n.endswith("bias") else 1.0) for n, p in outside)
    table = result.table()
    assert sum(mass.share for mass in table.values()) == pytest.approx(1)
    assert sum(mass.values for mass in table.values()) == sum(p.numel() for _, p in outside)
    norm = table["output LN",]
    assert (norm.values, norm.total, norm.mean) == (64, 160, 2.5)
    assert norm.share == pytest.approx(160 / total)
    terms = result.table(("term",))
    assert (terms["gain",].mean, terms["bias",].mean, terms["weight",].mean) == (1, 4, 1)
    assert result.ranking("total")[0] != result.ranking("mean")[0]
    assert result.ranking("mean")[0].endswith("LN")
    layers = result.table(("component", "stack", "layer"))
    assert layers["output LN", "bert.encoder.layer", 1].total == 80


def test_fisher_of_slices_and_added_tensors():
    model = build("gpt2")
    scores = {"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 48)}
    scores["transformer.h.0.attn.c_attn.weight"][:, :16] = 2.0
    scores["transformer.h.1.attn.c_attn.edits.0-value.A"] = torch.ones(2, 16)
    table = FisherMass.of(model, scores).table()
    assert {key[0]: mass.total for key, mass in table.items()} == {"query": 512, "key": 0, "value": 32}


def test_fisher_refuses_what_is_none():
    model = build("bert")
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ModelError, match="no Fisher information in"):
        FisherMass.of(model, {names[0]: torch.zeros(20, 16)})
    with pytest.raises(ModelError, match="below zero or not finite"):
        FisherMass.of(model, {names[0]: torch.full((20, 16), math.nan)})
    with pytest.raises(ModelError, match="no tensor 'bert.nothing'"):
        FisherMass.of(model, {"bert.nothing": torch.ones(2)})


def test_fisher_report_tells_both_rankings():
    model = build("bert")
    report = fisher_report(FisherMass.of(model, ones(model, bias=4.0), kind="true", info={"examples": 8}))
    assert "Per value the" in report.summary[0]
    assert report.facts["Examples"] == "8"
    json.dumps(report.to_json(), allow_nan=False)


# The commands


class Said:
    def __init__(self, *args):
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            self.code = main(["analyze", *map(str, args)])
        self.out, self.err = out.getvalue(), err.getvalue()


def test_without_a_command_it_helps():
    said = Said()
    assert said.code == 0
    assert all(name in said.out for name in ("changes", "fisher"))


def test_help_loads_nothing_heavy():
    code = "import sys, smidgen.cli.commands as c; c.main(['analyze', 'changes', '--help']); "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'matplotlib', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_changes_by_experiment(world, tmp_path):
    options = ["--data", world / "first", "--data", world / "second", "--seeds", 1, "--epochs", 1, "--limit", 8]
    command = ["changes", "--model", world / "base", *options, "--out", tmp_path / "report"]
    said = Said(*command)
    assert said.code == 0, said.err
    for part in ("Change by component", "output LN", "±", "report.html", "Under Adam"):
        assert part in said.out
    assert "first, seed 0: validation accuracy" in said.err
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"smidgen analyze changes --model {world / 'base'}" in page
    report = json.loads(Said(*command, "--json").out)
    assert [run["task"] for run in report["runs"]] == ["first", "second"]
    assert report["out"] == str(tmp_path / "report")


def test_changes_between_two_models(world, tmp_path):
    said = Said("changes", "--base", world / "base", "--tuned", world / "tuned", "--json")
    assert said.code == 0, said.err
    models = json.loads(said.out)
    assert models["out"] is None
    assert set(models["rankings"]["absolute"][:3]) == {"embedding LN", "attention LN", "output LN"}
    delta = json.loads(Said("changes", "--tuned", world / "delta", "--json").out)
    for name in ("embedding LN", "output LN"):
        means = [found["components"]["absolute"][name]["mean"] for found in (delta, models)]
        assert means[0] == pytest.approx(means[1])
    assert delta["runs"][0]["info"]["lr_steps"] > 0
    one = json.loads(Said("changes", "--tuned", world / "delta", "--component", "output LN", "--json").out)
    assert list(one["components"]["rms"]) == ["output LN"]


def test_fisher_command(world, tmp_path, monkeypatch):
    import smidgen.importance.fisher_information as home

    seen = {}

    def fisher(model, given, recipe, delta, examples, kind, **options):
        seen.update(options, recipe=recipe, delta=delta, examples=examples, kind=kind, task=given.name)
        return {n: t for n, t in ones(model, bias=4.0).items() if "LayerNorm" in n}

    monkeypatch.setattr(home, "fisher", fisher)
    options = ["--model", world / "base", "--data", world / "first", "--examples", 4, "--kind", "true"]
    said = Said("fisher", *options, "--recipe", "LN()", "--out", tmp_path / "report")
    assert said.code == 0, said.err
    assert "share of mass" in said.out
    assert "mean per value" in said.out
    assert {k: seen[k] for k in ("recipe", "examples", "kind", "task", "split")} == {
        "recipe": "LN()", "examples": 4, "kind": "true", "task": "first", "split": "train"
    }  # fmt: skip
    report = json.loads(Said("fisher", *options, "--delta", world / "delta", "--json").out)
    assert seen["delta"].recipe == sm.parse("LN()")
    terms = {row["term"]: row["share"] for row in report["tables"]["term"]}
    assert terms == pytest.approx({"gain": 0.2, "bias": 0.8})


def test_fisher_command_measures(world):
    said = Said("fisher", "--model", world / "base", "--data", world / "first", "--examples", 4, "--json")
    assert said.code == 0, said.err
    assert sum(row["share"] for row in json.loads(said.out)["tables"]["component"]) == pytest.approx(1)


def lines_of_the_page():
    text = (Path(__file__).parents[1] / "docs" / "analyze.md").read_text()
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("smidgen analyze")]


@pytest.mark.parametrize("words", lines_of_the_page(), ids=" ".join)
def test_the_command_lines_of_the_page_are_understood(words):
    commands = typer.main.get_command(app).commands
    commands[words[0]].make_context(words[0], words[1:])


def test_a_wrong_command_line_would_be_seen():
    commands = typer.main.get_command(app).commands
    assert len(lines_of_the_page()) > 4
    with pytest.raises(Exception, match="No such option"):
        commands["changes"].make_context("changes", ["--seed", "3"])


MISTAKES = {
    "nothing": (lambda w, t: ["changes"], "give --model and --data to fine-tune, or --base and --tuned"),
    "both": (lambda w, t: ["changes", "--model", "minilm", "--base", "minilm"], "give --model and --data"),
    "no data": (lambda w, t: ["changes", "--model", w / "base"], "at least one --data"),
    "no tuned": (lambda w, t: ["changes", "--base", w / "base"], "give --tuned"),
    "no base": (lambda w, t: ["changes", "--tuned", w / "tuned"], "is no delta, so --base"),
    "the base itself": (lambda w, t: ["changes", "--base", w / "base", "--tuned", w / "base"], "nothing changed"),
    "another base": (
        lambda w, t: ["changes", "--base", w / "tuned", "--tuned", w / "delta"],
        "other values",
    ),
    "component": (
        lambda w, t: ["changes", "--tuned", w / "delta", "--component", "ouput LN"],
        "did you mean 'output LN'",
    ),
    "misspelt recipe": (
        lambda w, t: ["changes", "--model", w / "base", "--data", w / "first", "--recipe", "Fll()"],
        "did you mean 'Full'",
    ),
    "out is a file": (
        lambda w, t: ["changes", "--tuned", w / "delta", "--out", w / "delta" / "delta.json"],
        "delta.json is a file, not a folder",
    ),
    "kind of Fisher": (
        lambda w, t: ["fisher", "--model", w / "base", "--data", w / "first", "--kind", "emprical"],
        "empirical",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(world, tmp_path, monkeypatch, case):
    build_args, expected = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    said = Said(*build_args(world, tmp_path))
    assert said.code == 2, said.err
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert expected in errors[0]
    assert list(tmp_path.iterdir()) == []
