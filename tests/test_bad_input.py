"""A mistake of a user's is told in one line: what was wrong, what was found, what would work."""

import copy
import dataclasses
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.common.errors import AttachError, DeltaError, PlanError, RecipeError, SmidgenError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.testing.suite import shake, tiny
from tests import helpers as h

LONGEST = 600  # characters of a line that is still read
PLAIN = ("Traceback", "__init__", "NoneType", "positional argument but", "object is not", "not supported between")


class Plain(nn.Module):
    """A network of no known architecture."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


class Bare(nn.Module):
    """A network with neither norms nor biases."""

    def __init__(self, norm=None):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


def batch_normed():
    return Bare(nn.BatchNorm1d(8, affine=False))


def olmo():
    return T.OlmoForCausalLM(T.OlmoConfig(**h.BASE, **h.TOKENS))


def weight_normed():
    """Weight norm makes a convolution's weight, which has three axes, of two tensors below it."""
    return Bare(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, bias=False), dim=2))


def mamba():
    return T.AutoModelForCausalLM.from_config(T.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2))


FAMILIES = {
    **{kind: lambda kind=kind: h.build(kind) for kind in ("bert", "roberta", "deberta-v2", "distilbert", "albert")},
    **{kind: lambda kind=kind: h.causal(kind) for kind in ("llama", "gpt2")},
    "t5": lambda: tiny("t5"),
    "mamba": mamba,
    "plain": Plain,
    "bare": Bare,
    "batch-normed": batch_normed,
    "weight-normed": weight_normed,
    "olmo": olmo,
}
OF_ONES_OWN = ("plain", "bare", "batch-normed", "weight-normed")
DEEPER = "but the stack has 2 layers, 0 to 1"
# model, recipe, kind of error, words of its line
SPELLED = [
    # sizes
    ("bert", "LoRA(rank=17)", RecipeError, "LoRA: rank=17", "query (16 x 16)", "at most 16 works"),
    ("bert", "DoRA(rank=17)", RecipeError, "DoRA: rank=17", "at most 16 works"),
    ("bert", "PiSSA(rank=17)", RecipeError, "PiSSA: rank=17", "at most 16 works"),
    ("bert", "MoS(rank=9)", PlanError, "MoS: rank=9", "2 maps", "at most 3 works"),
    ("bert", "TriAdaptLoRA(rank=17)", RecipeError, "rank=17", "at most 16 works"),
    ("bert", "Compacter(rank=9)", PlanError, "rank=9", "at most 4 works"),
    ("bert", "Compacter(width=6)", RecipeError, "blocks=4 does not divide width=6"),
    ("bert", "Compacter(width=6, blocks=3)", PlanError, "blocks=3 does not divide the width of", "16"),
    ("bert", "MoS(rank=3, shards=3)", PlanError, "shards=3 does not divide the width 16"),
    ("bert", "TriAdaptLoRA(start=9)", RecipeError, "start=9 is above rank=8"),
    # layers and heads
    ("bert", "LoRA(layers=7)", PlanError, "layers=7", DEEPER),
    ("bert", "LN(layers=(0, 9))", PlanError, "layers=(0, 9)", DEEPER),
    ("bert", "Prefix(layers='top:5')", PlanError, "layers='top:5'", DEEPER),
    ("bert", "Adapter(layers='3:9')", PlanError, "layers='3:9'", DEEPER),
    ("gpt2", "LoFiT(layers=2)", PlanError, "layers=2", DEEPER),
    ("bert", "LN(layers='tpo:2')", RecipeError, "LN: layers='tpo:2'", "'top:2'"),
    ("albert", "LN(layers=0)", PlanError, "the same layers at every depth", "leave it out"),
    ("albert", "Adapter(layers='top:1')", PlanError, "the same layers at every depth", "leave it out"),
    ("bert", "LoFiT(heads=(0, 9))", RecipeError, "no field 'heads'", "form, l1, layers"),
    ("bert", "LoFiT() | Select('random', granularity='head', keep=9)", PlanError, "keep=9 is more than the 4 heads"),
    # places
    ("bert", "LoRA(target='quey')", PlanError, "'quey'", "did you mean 'query'?", "value"),
    ("bert", "SSF(target='q_proj')", PlanError, "SSF: target names 'q_proj'", "it has attention_out"),
    ("plain", "SSF()", PlanError, "'linear'", "it has one, two"),
    ("bert", "Adapter(site='cross_attention')", PlanError, "'cross_attention'", "it has attention, feed_forward"),
    ("bert", "LN(which='qk')", PlanError, "LN(which='qk') matches no site", "roles found: embedding"),
    (
        "llama",
        "BitFit()",
        PlanError,
        "BitFit() matches no site of Llama",
        "none of its maps and norms has a bias",
        "LN()",
    ),
    ("bare", "LN()", PlanError, "LN() matches no site of Bare", "it has no norms"),
    ("bare", "BitFit()", PlanError, "it has no norms", "none of its maps and norms has a bias"),
    ("batch-normed", "LN()", PlanError, "its norms are BatchNorms, whose statistics run, and no others"),
    ("weight-normed", "LN()", PlanError, "it has no norms"),
    ("olmo", "LN()", PlanError, "its norms have no parameters, so there is no gain or bias to tune"),
    ("olmo", "BitFit()", PlanError, "none of its maps and norms has a bias"),
    ("llama", "LN(terms='bias')", PlanError, "none of its maps and norms has a bias", "LN() trains gains"),
    ("plain", "Adapter()", PlanError, "'attention'", "the layout of its blocks is not known", "target="),
    ("mamba", "Compacter()", PlanError, "'attention'", "the layout of its blocks is not known", "target="),
    ("plain", "IA3()", PlanError, "the layout of its blocks is not known", "target="),
    ("mamba", "LoFiT()", PlanError, "the layout of its blocks is not known", "target="),
    ("plain", "PromptTuning()", PlanError, "does not embed the tokens of one text"),
    ("deberta-v2", "Prefix(length=2)", PlanError, "DisentangledSelfAttention does not go through", "choose a method"),
    ("deberta-v2", "MAM", PlanError, "Prefix(length=16)", "AttentionInterface"),
    ("deberta-v2", "UnifiedLN", PlanError, "Prefix()", "AttentionInterface"),
    ("deberta-v2", "Prefix() + PromptTuning()", PlanError, "Prefix()", "AttentionInterface"),
    ("mamba", "Prefix(length=2)", PlanError, "Prefix(length=2) matches no site", "layout of its blocks is not known"),
    # positions
    ("bert", "PromptTuning(length=40)", PlanError, "40 positions", "40 vectors leave none", "a shorter prompt fits"),
    ("roberta", "PromptTuning(length=39)", PlanError, "39 positions", "a shorter prompt fits"),
    ("gpt2", "PromptTuning(20) + PromptTuning(25)", PlanError, "PromptTuning(length=25)", "45 vectors leave none"),
    # the same tensor twice
    (
        "bert",
        "LN() + BitFit()",
        PlanError,
        "LayerNorm.bias would be trained twice: by LN() and by BitFit()",
        "leave one",
    ),
    ("gpt2", "LN() + Full()", PlanError, "ln_1.weight would be trained twice", "leave one out"),
    ("bert", "Houlsby + LN()", PlanError, "LayerNorm.weight would be trained twice", "leave one out"),
    ("llama", "SSF() + DoRA(rank=2)", PlanError, "SSF() cannot be folded in", "write DoRA(rank=2) first"),
    # spelling
    ("bert", "Lora()", RecipeError, "'Lora'", "did you mean 'LoRA'?", "known: Adapter"),
    ("bert", "Adaptor()", RecipeError, "did you mean 'Adapter'?"),
    ("bert", "Mam", RecipeError, "did you mean 'MAM'?"),
    ("bert", "MAM()", RecipeError, "write MAM, without brackets"),
    ("bert", "LoRA", RecipeError, "write LoRA()"),
    ("bert", "SSF(shfit=True)", RecipeError, "'shfit'", "did you mean 'shift'?", "target, norms, convs, shift, layers"),
    ("bert", "LoRA(8, rank=8)", RecipeError, "multiple values for argument 'rank'", "it has: rank, alpha"),
    ("bert", "IA3(1, 2, 3, 4)", RecipeError, "too many positional arguments", "it has: layers"),
    ("bert", "LN() | Select()", RecipeError, "missing a required argument: 'score'", "it has: score, keep"),
    ("bert", "LN() - LoRA()", RecipeError, "only + between methods"),
    ("bert", "LN() +", RecipeError, "cannot read the recipe", "'LN() + LoRA(rank=8)'"),
    ("bert", "", RecipeError, "cannot read the recipe ''"),
    ("bert", "Adapter(activation='gleu')", RecipeError, "did you mean 'gelu'?", "relu"),
    ("bert", "Adapter(site='atention')", RecipeError, "did you mean 'attention'?"),
    ("bert", "LN(which='outptu')", RecipeError, "did you mean 'output'?"),
    ("bert", "LN() | Select('rnadom')", RecipeError, "did you mean 'random'?"),
    # values of fields
    ("bert", "LoRA(rank=2.5)", RecipeError, "rank=2.5", "whole number of at least 1"),
    ("bert", "LoRA(alpha='x')", RecipeError, "LoRA: alpha='x' must be a number above 0"),
    ("bert", "PiSSA(alpha=-1)", RecipeError, "PiSSA: alpha=-1 must be a number above 0"),
    ("bert", "DoRA(dropout='a')", RecipeError, "DoRA: dropout='a' must lie in [0, 1)"),
    ("bert", "LoRA(lr_ratio=0)", RecipeError, "lr_ratio=0 must be a number above 0"),
    ("bert", "MoS(alpha=True)", RecipeError, "MoS: alpha=True must be a number above 0"),
    ("bert", "TriAdaptLoRA(every=2)", RecipeError, "every=2", "at most 1"),
    ("bert", "TriAdaptLoRA(begin='a')", RecipeError, "begin='a' must lie in [0, 1)"),
    ("bert", "LoRA(target=3)", RecipeError, "target=3 must be a name or a tuple of names", "('query', 'value')"),
    ("bert", "LoRA(target=())", RecipeError, "target=() must be a name"),
    ("bert", "MoS(exclude=(1, 2))", RecipeError, "exclude=(1, 2) must be a name"),
    ("bert", "Adapter(site=3)", RecipeError, "site=3 must be a name", "('attention', 'feed_forward')"),
    ("bert", "Compacter(site=())", RecipeError, "site=() must be a name"),
    ("bert", "Adapter(scale='a')", RecipeError, "scale='a' must be a number above 0"),
    ("bert", "SSF(norms='no')", RecipeError, "norms='no' must be True or False"),
    ("bert", "Prefix(cross='no')", RecipeError, "cross='no' must be True or False"),
    ("bert", "BitFit(norms=0)", RecipeError, "norms=0 must be True or False"),
    ("bert", "Prefix(length=0)", RecipeError, "length=0", "at least 1"),
    # selections that cannot be
    ("bert", "TriAdaptLoRA(rank=2) | Select('random')", PlanError, "grows while it trains", "leave out the Select"),
    ("bert", "Prefix(2, mlp=3) | Select('fisher')", PlanError, "saves Prefix(length=2)", "leave out the Select"),
    ("bert", "LN() | Select('random', granularity='head')", PlanError, "norms belong to no head", "LoRA()"),
    ("bert", "Adapter() | Select('fisher', granularity='head')", PlanError, "the recipe has none", "LoRA()"),
    ("bert", "LN() | Select('scout', warmup=5)", PlanError, "LN() has no method that looks for it", "use 'fisher'"),
    ("bert", "LoFiT(form='gain') | Select('scout', warmup=5)", PlanError, "has no method that looks for it"),
    ("bert", "LoFiT() | Select('scout')", RecipeError, "give warmup= its steps"),
    ("bert", "Head() | Select('fisher')", PlanError, "has nothing to choose from"),
    ("bert", "LN() | Select('random', keep=161)", PlanError, "keep=161 is more than the 160 elements"),
    ("bert", "LN() | Select('random', keep=1.5)", RecipeError, "keep=1.5 is more than there is"),
    ("bert", "LN() + Select('random')", RecipeError, "narrows what stands before it: write 'LN() | Select("),
    ("bert", "LN() | LoRA()", RecipeError, "LoRA() does not narrow", "joined by '+'"),
]


def clear(text, *words):
    """Assert that a message is one readable line with these words."""
    assert "\n" not in text, text
    assert len(text) < LONGEST, text
    assert [word for word in words if word not in text] == [], text
    assert [word for word in PLAIN if word in text] == [], text


@pytest.mark.parametrize(
    "text", ["rank=9\nis wrong", "'int' object is not iterable: rank=9", "too large", "rank=9 " * 99]
)
def test_a_vague_line_would_be_seen(text):
    with pytest.raises(AssertionError):
        clear(text, "rank=9")


def told(do, kind, *words):
    """Assert that a call is refused by this very kind of error, in one clear line."""
    with pytest.raises(SmidgenError) as caught:
        do()
    clear(str(caught.value), *words)
    assert type(caught.value) is kind


def shell(*args):
    """Exit status, what stands on stdout, and the lines of stderr that are not notes of a command."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return code, out.getvalue(), [line for line in err.getvalue().splitlines() if line.startswith("error: ")]


def refused(*args, words):
    """Assert that a command ends with status 2 and one clear line, without a result."""
    code, out, errors = shell(*args)
    assert (code, out, len(errors)) == (2, "", 1), (code, out, errors)
    clear(errors[0], *words)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of a base with its tokenizer, made when first asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family):
        if not (root / family).is_dir():
            FAMILIES[family]().save_pretrained(root / family)
            h.tokenizer().save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    h.task(root)
    return root


@pytest.mark.parametrize(("family", "recipe", "kind", "words"), [(*c[:3], c[3:]) for c in SPELLED], ids=str)
def test_python(family, recipe, kind, words):
    model = FAMILIES[family]()
    with h.untouched(model):
        told(lambda: sm.plan(model, recipe), kind, *words)


@pytest.mark.parametrize(
    ("family", "recipe", "words"), [(*c[:2], c[3:]) for c in SPELLED if c[0] not in OF_ONES_OWN], ids=str
)
def test_shell(family, recipe, words, folders):
    refused("plan", "--model", folders(family), "--recipe", recipe, words=words)


UNSAID = [
    ("bare", "LN()", "its norms", "trains gains", "has a bias"),
    ("bare", "BitFit()", "its norms", "trains gains"),
    ("batch-normed", "LN()", "no parameters", "trains gains", "has a bias"),
    ("weight-normed", "LN()", "stacked", "experts"),
    ("olmo", "LN()", "it has no norms", "trains gains", "has a bias"),
    ("olmo", "BitFit()", "trains gains"),
    ("llama", "LN(which='qk')", "trains gains", "has a bias", "no norms"),
    ("bare", "IA3()", "its norms", "has no norms"),
]


@pytest.mark.parametrize(("family", "recipe", "unsaid"), [(*c[:2], c[2:]) for c in UNSAID], ids=str)
def test_a_refusal_gives_no_reason_that_is_not_true(family, recipe, unsaid):
    with pytest.raises(PlanError) as caught:
        sm.plan(FAMILIES[family](), recipe)
    assert [word for word in unsaid if word in str(caught.value)] == [], caught.value


# What training, merging and converting refuse

TUNED = [
    (["--recipe", "PromptTuning(length=36)", "--max-length", 16], ("a prompt of 36", "model has 40", "--max-length 4")),
    (["--recipe", "LoRA(layers=7)"], ("layers=7", DEEPER)),
    (["--recipe", "LN() | Select('change', warmup=2, granularity='head')"], ("norms belong to no head",)),
    (["--recipe", "LoFiT() | Select('scout', keep=9, granularity='head', warmup=1)"], ("keep=9", "4 heads")),
    (["--recipe", "Houlsby + LN()"], ("would be trained twice", "leave one out")),
]


@pytest.mark.parametrize(("options", "words"), TUNED, ids=str)
def test_tune(options, words, folders, films, tmp_path):
    args = ["--model", folders("bert"), "--data", films, "--out", tmp_path / "run", "--epochs", 1, *options]
    refused("tune", *args, words=words)


@pytest.mark.parametrize("recipe", ["UnifiedLN", "LN() + PromptTuning(length=4)"])
def test_a_prompt_or_prefix_in_a_run(recipe, folders, films, tmp_path):
    """It trains, says next what can be done with it, and merging says why not."""
    run = tmp_path / "run"
    base = ["--model", folders("bert")]
    code, out, errors = shell("tune", *base, "--data", films, "--out", run, "--epochs", 1, "--recipe", recipe)
    assert (code, errors) == (0, [])
    assert "smidgen predict" in out
    assert "smidgen merge" not in out
    assert "sm.merge" not in (run / "README.md").read_text()
    refused(
        "merge", "--delta", run, "--out", tmp_path / "plain", words=("keep the delta attached", "no part of a weight")
    )
    refused("convert", run, tmp_path / "peft", "--to", "peft", words=("PEFT",))


def test_texts_are_cut_to_leave_room_for_a_prompt(films):
    task = sm.Task.load(films)
    options = {"tokenizer": h.tokenizer(), "epochs": 1, "batch_size": 8, "progress": False}
    for recipe, length in (("LN()", 32), ("PromptTuning(length=12)", 28), ("LN() + PromptTuning(length=35)", 5)):
        assert sm.fit(h.bert(), recipe, task, **options).info["settings"]["max_length"] == length


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "llama", "gpt2", "t5"])
def test_keys_and_tokens_together_act_on_each_family(family):
    model, inputs = FAMILIES[family]().eval(), h.ids()
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family == "t5" else {}
    with torch.no_grad(), h.untouched(model):
        before = model(**inputs).logits
        outputs = [before]
        for recipe in ("Prefix(length=2)", "PromptTuning(length=2)", "Prefix(length=2) + PromptTuning(length=2)"):
            with sm.attached(model, recipe):
                shake(trained_parameters(model).values(), 0.5)
                outputs.append(model.eval()(**inputs).logits)
            assert outputs[-1].shape == before.shape
    assert not any(torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


# Python only: objects that are none, sums, bases


def trained(recipe, seed=0, by=0.3):
    model = sm.attach(h.bert(seed=seed), recipe)
    shake(trained_parameters(model).values(), by)
    return sm.detach(model)


def quantised():
    model = h.bert()
    weight = torch.zeros(16, 24, dtype=torch.int8)
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(weight, requires_grad=False)
    return model


def flash():
    model = h.bert()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def run_long():
    model = sm.attach(h.bert(), "PromptTuning(length=36)")
    model(**h.ids())


OBJECTS = {
    "a name for a model": (lambda: sm.plan("minilm", "LN()"), PlanError, "'minilm'", "smidgen.load"),
    "attached to a name": (lambda: sm.attach("minilm", "LN()"), AttachError, "'minilm'", "smidgen.load"),
    "a class": (lambda: sm.plan(h.bert(), sm.LN), RecipeError, "the class LN", "LN() + LoRA()"),
    "a list": (lambda: sm.plan(h.bert(), [sm.LN(), sm.LoRA()]), RecipeError, "not list", "LN() + LoRA()"),
    "names in a list": (lambda: sm.LoRA(target=["query"]), RecipeError, "target=['query']", "a tuple of names"),
    "quantised": (lambda: sm.attach(quantised(), "Adapter()"), PlanError, "is quantised", "float32, bfloat16"),
    "flash attention": (lambda: sm.attach(flash(), "Prefix()"), AttachError, "'flash_attention_2'", "sdpa"),
    "a long text": (run_long, AttachError, "36 and a text of 7 tokens need 43 positions", "max_length=4"),
    "a part, attached": (
        lambda: sm.attach(h.bert(), "LN() | Select('fisher')"), PlanError, "needs data to choose", "use fit"
    ),
    "a delta with a pooling": (
        lambda: sm.attach(h.bert(), trained("LN()"), pooling="mean"), AttachError, "leave pooling="
    ),
    "twice": (lambda: sm.attach(sm.attach(h.bert(), "LN()"), "LN()"), AttachError, "is attached already", "detach"),
    "another base": (lambda: sm.attach(h.bert(seed=1), trained("UnifiedLN")), DeltaError, "other values", "checkpoint"),
    "another architecture": (lambda: sm.attach(h.build("roberta"), trained("LN()")), DeltaError, "is a roberta"),
    "not a delta": (lambda: sm.Deltas(h.bert()).update(a=3), DeltaError, "'a' is of type int", "hub id"),
    "merging": (lambda: sm.merge(h.bert(), trained("MAM")), AttachError, "Prefix(length=16): keys", "keep the delta"),
}  # fmt: skip


@pytest.mark.parametrize("case", OBJECTS)
def test_objects(case):
    do, kind, *words = OBJECTS[case]
    told(do, kind, *words)


@pytest.mark.parametrize(
    "recipe",
    ["DoRA(rank=2)", "PiSSA(rank=2)", "Adapter(width=2)", "Prefix(length=2)", "PromptTuning(length=2)", "MoS(rank=3)",
     "Compacter(width=4)", "TriAdaptLoRA(rank=2)", "Houlsby"],
)  # fmt: skip
def test_sums_that_are_none(recipe):
    delta = trained(recipe)
    told(lambda: (delta + delta).on(h.bert()), DeltaError, "does not add up", "not linear", "LoRA add up")


def test_sums_of_unlike_deltas():
    a, b = trained("LN()"), trained("LoRA(rank=2)")
    told(lambda: (a + b).on(h.bert()), DeltaError, "LN() and LoRA(rank=2) train other tensors", "like recipes")
    told(lambda: (a + trained("LN()", 1)).on(h.bert()), DeltaError, "different bases", "train both on one")
    both = trained("SSF() + LoRA(rank=2)")
    told(lambda: (both + both).on(h.bert()), DeltaError, "both act at", "add up deltas of one of the two")
    told(lambda: sm.ties([b, b], model=h.bert()), DeltaError, "TIES looks at single values", "add or average")


def test_offsets_of_heads_add_up():
    """What LoFiT adds is linear in its tensors: the sum is the base with both changes."""
    a, b, base = trained("LoFiT()"), trained("LoFiT()", by=-0.7), h.bert()
    whole = (a + 0.5 * b).on(copy.deepcopy(base))
    for name, tensor in whole.tensors.items():
        if name not in whole.head:
            torch.testing.assert_close(tensor, a.tensors[name] + 0.5 * b.tensors[name])


FLAGS = [
    (cls, f.name)
    for _, cls in sorted(Term.registry.items())
    for f in dataclasses.fields(cls)
    if type(f.default) is bool and cls.__module__.startswith("smidgen.")
]


@pytest.mark.parametrize(("cls", "name"), FLAGS, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("value", ["no", "False", 0, None])
def test_a_switch_is_true_or_false(cls, name, value):
    """'no' would count as yes."""
    with pytest.raises(RecipeError, match=f"{name}={value!r} must be True or False"):
        cls(**{name: value})


def test_every_switch_is_tried():
    assert {name for _, name in FLAGS} >= {"norms", "convs", "shift", "cross"}
