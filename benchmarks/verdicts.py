"""What one recipe does on one tiny model: ok, partly, refused, wrong or crash, with the reason in one line."""

import copy
import re
import warnings
from functools import cached_property

import torch
from tiny_configs import LABELS
from tiny_inputs import line, run, tensors
from uncovered import uncovered, unnamed

import smidgen as sm
from smidgen.common.errors import AttachError, SmidgenError
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.recipe.recipe import as_recipe
from smidgen.steps.gradient_checks import Watch, check_depends, may_stand_still

NEAR = 1e-4  # of 1 + the largest output: what float32 inside a float64 model leaves
LOW = 0.05  # of the same, in a low-precision base: what rounding leaves
DRAWS = 8
# "stopped": accepted, then refused with one line in the first step or at detach, where attach could have known
OUTCOMES = ("ok", "partly", "refused", "stopped", "wrong", "crash", "not built")


class WrongError(AssertionError):
    """Silently wrong: nobody would have noticed."""


class NothingError(WrongError):
    """Attached, and nothing is trained."""


class StoppedError(AssertionError):
    """`fit` stops with one line after a few steps, where attach could have known."""


class Subject:
    """A tiny model, an input, and the outputs of the untouched model, in the widest dtype that it runs in."""

    def __init__(self, model, inputs, dtype=None):
        self.exact = dtype is None
        self.dtype, self.model, self.inputs, self.base = self._ready(model, inputs, dtype)
        self.stays = self._repeats()
        self.trains = self._trains()

    def _ready(self, model, inputs, dtype):
        wanted = (torch.float64, torch.float32) if dtype is None else (dtype,)
        for kind in wanted:
            try:
                ready = cast(copy.deepcopy(model), kind)
                given = {k: v.to(kind) if torch.is_floating_point(v) else v for k, v in inputs.items()}
                with torch.no_grad():
                    base = tensors(run(ready, given))
                if not all(torch.isfinite(t).all() for t in base):
                    raise ArithmeticError("its output is not finite")
                if dtype is None and any(p.is_floating_point() and p.dtype != kind for p in ready.parameters()):
                    raise ArithmeticError("it casts a part of itself while it runs")
                return kind, ready, given, base
            except Exception as error:
                last = error
        raise last

    def _repeats(self):
        with torch.no_grad():
            again = tensors(run(self.model, self.inputs))
        return all(torch.equal(a, b) for a, b in zip(again, self.base, strict=True))

    def _trains(self):
        """Whether the untouched model runs in train mode on these inputs; some want labels there."""
        model = copy.deepcopy(self.model).train()
        try:
            with torch.no_grad():
                run(model, self.inputs)
        except Exception:
            return False
        return True

    @cached_property
    def rounding(self):
        """How far errors of rounding alone carry the untouched model's output: its weights are moved by half a unit in
        their last place. Where an expert wins by less than that, another is chosen, and the output jumps."""
        half, worst = torch.finfo(self.dtype).eps / 2, 0.0
        for seed in range(DRAWS):
            twin, generator = copy.deepcopy(self.model), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in twin.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter.double() * (1 + half * noise))
            worst = max(worst, distance(self.outputs(twin), self.base))
        return worst

    def outputs(self, model):
        with torch.no_grad():
            return tensors(run(model.eval(), self.inputs))


def cast(model, dtype):
    """The model in a dtype, as `from_pretrained(dtype=...)` leaves it: what a class keeps in float32 stays there."""
    kept = set()
    for names in ("_keep_in_fp32_modules_strict", *(("_keep_in_fp32_modules",) if dtype is torch.float16 else ())):
        kept |= set(getattr(model, names, None) or ())
    model.to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
    return model


ADVISED = re.compile(r"narrow the recipe \(stack=(\(.*?\)|'.*?')\)")


def judge(subject, recipe):
    """Outcome and reason of a recipe on a subject, whose model is left alone.

    A model of several parts that is given text alone stops a recipe that covers the others, and the error names the
    stack that is left: then the recipe on that stack is judged, and the verdict says which it was.
    """
    found = once(subject, recipe)
    advised = ADVISED.search(found.get("why", "")) if found["outcome"] == "stopped" else None
    if advised is None:
        return found
    inside = recipe.rstrip(")") + ("" if recipe.endswith("()") else ", ") + f"stack={advised[1]})"
    return once(subject, inside) | {"stack": advised[1]}


def once(subject, recipe):
    """Outcome and reason of exactly this recipe."""
    model, notes, wrong, stage = copy.deepcopy(subject.model), {}, [], "attach"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stage, check in CHECKS:
                try:
                    check(subject, model, recipe, notes)
                except WrongError as error:
                    wrong.append(f"{stage}: {error}")
                    if isinstance(error, NothingError):
                        break
    except StoppedError as error:
        found = {"outcome": "stopped", "why": f"{stage}: {error}"}
    except SmidgenError as error:
        text = " ".join(str(error).split())
        found = (
            {"outcome": "refused", "why": text}
            if stage == "attach"
            else {"outcome": "stopped", "why": f"{stage}: {text}"}
        )
    except Exception as error:
        found = {"outcome": "crash", "why": f"{stage}: {line(error)}"}
    else:
        left = notes.pop("left", "")
        found = {"outcome": "partly", "why": left} if left else {"outcome": "ok"}
    notes = {name: note for name, note in notes.items() if name in ("named", "merge")}
    if wrong and found["outcome"] != "crash":
        found = {"outcome": "wrong", "why": "; ".join(wrong)}
    return found | notes


def _attach(subject, model, recipe, notes):
    sm.attach(model, recipe)
    plan = attachment(model).plan
    if missing := uncovered(subject.model, plan):
        notes["left"] = missing
        notes["named"] = not unnamed(subject.model, plan)


def _head(subject, model, recipe, notes):
    frozen = [n for n, p in model.named_parameters() if p.ndim and p.shape[0] == LABELS and not p.requires_grad]
    if frozen and "Classification" in type(model).__name__:
        raise WrongError(f"{frozen[0]} is as long as the labels and frozen")
    head = attachment(model).plan.head
    if head and "For" not in type(model).__name__:
        raise WrongError(f"a model without a task has a head: {head[0][0]}")
    if not trained_parameters(model):
        raise NothingError("attached, and nothing is trained")


def _start(subject, model, recipe, notes):
    if any("starts_as_identity" in getattr(term, "exceptions", {}) for term in as_recipe(recipe)):
        subject.outputs(model)
        return
    off = distance(subject.outputs(model), subject.base)
    if off > (NEAR if subject.exact else LOW) and (subject.exact or off > subject.rounding):
        raise WrongError(f"the start is off by {off:.2g}")


def _train(subject, model, recipe, notes):
    shake(trained_parameters(model).values(), 0.05)
    model.train(subject.trains)
    found = tensors(run(model, subject.inputs))
    generator = torch.Generator().manual_seed(3)
    loss = sum((t.double() * torch.randn(t.shape, dtype=torch.float64, generator=generator)).sum() for t in found)
    check_depends(model, found)  # what `fit` stops with
    watch = Watch(model)
    loss.backward()
    watch.first(model)
    watch.saw(model)
    may, dead = {*may_stand_still(model), *watch.unseen, *watch.flat(model)}, []
    for name, parameter in trained_parameters(model).items():
        if name not in may and not parameter.grad.any():
            dead.append(name)
    model.zero_grad()
    if dead and subject.exact:
        notes["dead"] = f"{len(dead)} of {len(trained_parameters(model))} tensors do not move: {dead[0]}"


def _acts(subject, model, recipe, notes):
    notes["_tuned"] = subject.outputs(model)
    if not all(torch.isfinite(t).all() for t in notes["_tuned"]):
        raise WrongError("the output is not finite")
    if distance(notes["_tuned"], subject.base) < (1e-9 if subject.exact else 0):
        raise WrongError("changed values change no output")


def _merge(subject, model, recipe, notes):
    rows = attachment(model).plan.entries
    if any(row.added and row.method.unmergeable(row.site) for row in rows) or not subject.exact:
        return
    try:
        merged = sm.merge(model)
    except AttachError as error:
        notes["merge"] = " ".join(str(error).split())
        return
    off = distance(subject.outputs(merged), notes["_tuned"])
    if off > NEAR:
        raise WrongError(f"merged and attached differ by {off:.2g}")


def _detach(subject, model, recipe, notes):
    delta = sm.detach(model)
    before = dict(subject.model.named_parameters()) | dict(subject.model.named_buffers())
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    if before.keys() != after.keys():
        raise WrongError(f"names differ: {sorted(before.keys() ^ after.keys())[:2]}")
    for name, tensor in before.items():
        if not same(tensor, after[name]):
            raise WrongError(f"{name} is not what it was")
    if distance(subject.outputs(model), subject.base) > 0 and subject.stays:
        raise WrongError("the output is not what it was")
    sm.attach(model, delta)
    off = distance(subject.outputs(model), notes["_tuned"])
    if off > (NEAR if subject.exact else LOW):
        raise WrongError(f"the delta attached again differs by {off:.2g}")


def _moves(subject, model, recipe, notes):
    """What never gets a gradient makes `fit` stop; asked last, so that the rest is seen as well."""
    if dead := notes.pop("dead", ""):
        raise StoppedError(dead)


CHECKS = (
    ("attach", _attach),
    ("head", _head),
    ("start", _start),
    ("train", _train),
    ("acts", _acts),
    ("merge", _merge),
    ("detach", _detach),
    ("train", _moves),
)


def same(a, b):
    """Bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def distance(found, wanted):
    """Largest difference over 1 + the largest value, over all outputs; infinite if shapes differ."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if b.numel() and not torch.equal(a, b):
            gap = (a.double() - b.double()).abs() / (1 + b.double().abs().max())
            worst = max(worst, float(torch.nan_to_num(gap, nan=float("inf")).max()))
    return worst


def shake(parameters, scale):
    """Add Gaussian noise in place."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
