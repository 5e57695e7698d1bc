"""doctor: what a model is made of, and whether what a recipe attaches to it acts, trains, folds away and comes off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError, ModelError, SmidgenError
from smidgen.common.module_modes import copied
from smidgen.common.wrappers import bare
from smidgen.delta.attaching import attach, remove
from smidgen.delta.merging import DequantisedWarning, merge
from smidgen.inference.sample_inputs import Inputs, fitting_inputs
from smidgen.methods.base import Method
from smidgen.planning.stack_choice import stack_advice
from smidgen.ports.attachment_record import attachment, refuse_attached, trained_parameters
from smidgen.recipe.recipe import Recipe, Term, as_recipe, registry
from smidgen.sites.inventory import Part, buffers, left_alone, norms, parts
from smidgen.sites.quantised.maps import logical_counts, scheme_of
from smidgen.sites.task_head import head_names
from smidgen.steps.gradient_checks import floats, idle_by_word, may_stand_still, routed

NEAR = 1e-3  # of what the recipe changes
YES, RESTS, UNUSED, IDLE = "yes", "rests by its method's word", "unused by this input", "no token went to its expert"
FAULTS = ("no effect", "never used")
ZERO, NEVER = FAULTS  # no gradient but zeros; none


@dataclass(frozen=True)
class Place:
    """What one method trains at one site, or the head.

    Attributes:
        acts: "yes" if the output depends on each of its tensors; else why not, of the first that it does not depend on;
            empty if the model was not run.
    """

    method: str
    name: str
    values: int
    acts: str


@dataclass(frozen=True)
class Finding:
    """What one recipe does on a model.

    Attributes:
        refused: why it cannot be attached or run; then the rest is empty.
        crashed: what went wrong in the forward pass, where that was not foreseen; then the rest is empty too.
        changes: the largest change of an output by shaken values; None if the model was not run.
        merged: the largest difference between the merged and the attached model's outputs; None if not merged.
        kept: why it cannot be merged.
        restored: whether the outputs are what they were, bit for bit, after it is taken off.
    """

    recipe: str
    refused: str = ""
    crashed: str = ""
    places: tuple[Place, ...] = ()
    changes: float | None = None
    merged: float | None = None
    kept: str = ""
    restored: bool = True

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, a line each; a refusal is not."""
        found = [self._fault(word) for word in FAULTS if any(place.acts == word for place in self.places)]
        if self.crashed:
            found.append(f"{self.recipe}: {self.crashed}")
        if self.merged is not None and not self.merges:
            found.append(f"{self.recipe}: merged and attached differ by {self.merged:.2g}")
        return (*found, *(() if self.restored else (f"{self.recipe}: taken off, the model is not what it was",)))

    def _fault(self, word: str) -> str:
        names = [place.name for place in self.places if place.acts == word]
        acting = (p.name + "." for p in self.places if p.acts not in ("", *FAULTS) and p.method != "head")
        advice = stack_advice(acting, names)
        hint = f"; {advice} leaves them out" if advice else ""
        return f"{self.recipe}: {len(names)} of {len(self.places)} places: {word}, first {names[0]}{hint}"

    @property
    def merges(self) -> bool:
        """Whether the merged model does what the attached one does."""
        return self.merged is not None and self.merged <= NEAR * (self.changes or 0.0) + 1e-6


@dataclass(frozen=True)
class Diagnosis:
    """What a model is made of and what was found on it.

    Attributes:
        values: of all parameters.
        sites, norms, buffers: what there is, alike things together.
        left: reason -> paths of modules with weights that are left alone for it.
        head: names of the head's tensors.
        inputs: name -> shape of what the model was run on; empty if it was not, and `unrun` says why.
        findings: of the recipe; of every method at its defaults, if none was given.
    """

    model: str
    values: int
    sites: tuple[Part, ...]
    norms: tuple[Part, ...]
    buffers: tuple[Part, ...]
    left: Mapping[str, tuple[str, ...]]
    head: tuple[str, ...]
    inputs: Mapping[str, tuple[int, ...]]
    unrun: str
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """All that is wrong, a line each."""
        return tuple(fault for finding in self.findings for fault in finding.faults)

    def to_json(self) -> dict[str, object]:
        """The diagnosis as plain data."""
        return asdict(self) | {"faults": list(self.faults)}


def doctor(
    model: nn.Module, recipe: str | Term | Recipe | None = None, *, inputs: Mapping[str, Tensor] | None = None
) -> Diagnosis:
    """Look a model over, and run recipes on it: whether what they attach acts, gets a gradient, folds away, comes off.

    The model is not touched: a copy is run in eval mode, in float64 if its kernels have it, with shaken values in all
    that the recipe trains. It takes the memory of two more models in that dtype.

    Args:
        model: any torch module; one on the meta device is looked over and not run.
        recipe: a recipe or its spelling (of what a Select narrows, all candidates are tried); None for every method at
            its defaults.
        inputs: keyword arguments of a forward pass; None for random ones of the kind that the configuration tells.

    Raises:
        AttachError: something is attached already.
        RecipeError: the spelling cannot be read.
        ModelError: the model does not run on `inputs`.
    """
    refuse_attached(model)
    model = bare(model)
    recipes = [as_recipe(recipe).whole] if recipe is not None else list(_defaults())
    twin, given, why = _runnable(model, inputs)
    counts = logical_counts(model)
    return Diagnosis(
        type(model).__name__,
        sum(counts.get(id(p), p.numel()) for p in model.parameters()),
        parts(model),
        norms(model),
        buffers(model),
        left_alone(model),
        head_names(model),
        {name: tuple(value.shape) for name, value in (given or {}).items() if isinstance(value, Tensor)},
        why,
        tuple(examine(twin, one, given) for one in recipes),
    )


def examine(model: nn.Module, recipe: Recipe, inputs: Inputs | None) -> Finding:
    """One recipe on a model in eval mode, which is left as it was. Without `inputs` nothing is run."""
    base = None if inputs is None else _outputs(model, inputs)
    try:
        attach(model, recipe)
    except SmidgenError as error:
        return Finding(str(recipe), refused=str(error))
    try:
        if inputs is None or base is None:
            return Finding(str(recipe), places=tuple(_places(model, {})))
        places, tuned = _tried(model, inputs)
        merged, kept = _merged(model, inputs, tuned)
    except SmidgenError as error:
        return Finding(str(recipe), refused=f"in the first forward pass: {error}")
    except Exception as error:  # a model's own code, on what it was not written for
        return Finding(str(recipe), crashed=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    finally:
        remove(model)
    restored = all(map(torch.equal, _outputs(model, inputs), base))
    return Finding(str(recipe), "", "", places, _distance(tuned, base), merged, kept, restored)


def _defaults() -> Iterator[Recipe]:
    """Every registered method that can be made without arguments."""
    for _, cls in sorted(registry().items()):
        if issubclass(cls, Method):
            try:
                yield as_recipe(cls())
            except (TypeError, SmidgenError):
                continue


def _runnable(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> tuple[nn.Module, Inputs | None, str]:
    """A copy in eval mode, in the widest dtype that it runs in, with inputs for it; or without, and why."""
    if any(p.is_meta for p in model.parameters()):
        return copied(model).eval(), None, "its tensors are on the meta device, without content"
    said: ModelError | None = None
    if scheme_of(model):  # what is stored in few bits stays as it is
        return _in_its_own_dtype(copied(model).eval(), inputs)
    for dtype in (torch.float64, torch.float32):
        twin = copied(model).eval().to(dtype)
        try:
            given = fitting_inputs(twin, inputs)
            if all(p.dtype == dtype for p in twin.parameters()):  # Switch casts its routers when it is run
                return twin, given, ""
        except ModelError as error:
            said = error
    if inputs is not None and said is not None:
        raise said
    return twin, None, str(said)


def _in_its_own_dtype(twin: nn.Module, inputs: Mapping[str, Tensor] | None) -> tuple[nn.Module, Inputs | None, str]:
    try:
        return twin, fitting_inputs(twin, inputs), ""
    except ModelError as error:
        if inputs is not None:
            raise
        return twin, None, str(error)


def _tried(model: nn.Module, inputs: Inputs) -> tuple[tuple[Place, ...], list[Tensor]]:
    """What acts, and the outputs with shaken values."""
    trained = trained_parameters(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in trained.values():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            size = float(p.square().mean().sqrt()) if p.numel() else 0.0
            p.add_(noise * max(0.1 * size, 0.02))
    with torch.enable_grad():
        found = _outputs(model, inputs, grad=True)
        weights = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in found)
        total = sum(((t * w).sum() for t, w in zip(found, weights, strict=True)), torch.zeros(()))
        if total.requires_grad:
            total.backward()
    said = dict(_said(model))
    for p in trained.values():
        p.grad = None
    return tuple(_places(model, said)), [t.detach() for t in found]


def _said(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name of each trained tensor -> whether it acts, or why not."""
    trained = trained_parameters(model)
    missed = [name for name, p in trained.items() if p.grad is None]
    rest, spare, idle = set(may_stand_still(model)), set(idle_by_word(model)), set(routed(model, missed))
    for name, p in trained.items():
        if p.grad is None:
            yield name, IDLE if name in idle else UNUSED if name in spare else NEVER
        else:
            yield name, YES if p.grad.any() else RESTS if name in rest else UNUSED if name in spare else ZERO


def _places(model: nn.Module, said: Mapping[str, str]) -> Iterator[Place]:
    plan = attachment(model).plan
    for entry in plan.entries:
        names = [name for name, _ in entry.names()]
        yield Place(
            str(entry.method), entry.site.name or "(shared)", entry.values, _worst([said.get(n, "") for n in names])
        )
    if plan.head:
        heads = [said.get(name, "") for name, _ in plan.head]
        yield Place("head", plan.head[0][0].rpartition(".")[0], plan.head_values, _worst(heads))


def _worst(said: Sequence[str]) -> str:
    for word in (*FAULTS, IDLE, UNUSED, RESTS):
        if word in said:
            return word
    return said[0] if said else YES


def _merged(model: nn.Module, inputs: Inputs, tuned: list[Tensor]) -> tuple[float | None, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DequantisedWarning)  # a copy that is looked at and let go
            plain = merge(model)
        return _distance(_outputs(plain, inputs), tuned), ""
    except AttachError as error:
        return None, str(error)


def _outputs(model: nn.Module, inputs: Inputs, grad: bool = False) -> list[Tensor]:
    """All floating tensors that a forward pass gives, the random generator at one place."""
    with torch.random.fork_rng(), torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        return list(floats(model(**inputs)))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of two values, of all tensors whose shapes are alike (a prompt lengthens some)."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.shape == b.shape and a.numel()]
    return max((float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs), default=0.0)
