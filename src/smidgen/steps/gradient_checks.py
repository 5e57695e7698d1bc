"""Nothing fails in silence: every trained tensor is reached by a gradient and moves.

A block or a tower that a forward pass in eval mode never uses is refused at once. Judged over more steps are tensors of
an expert to which no token went, of a part of a block that is used, and those that chance left out (layerdrop).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from smidgen.common.errors import DivergedError, TrainError
from smidgen.common.finite_values import not_finite
from smidgen.common.module_modes import evaluating
from smidgen.planning.stack_choice import NAMED, stack_advice, stacks_around
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.sites.data_flow import only_called
from smidgen.sites.discovery import find_blocks, is_block
from smidgen.sites.roles import within
from smidgen.sites.site import EmbeddingSite
from smidgen.steps.divergence import remedy

MANY = 50  # steps after which chance is no reason any more: a layer is dropped with 0.5 in all of them once in 1e15
FEW = 5  # steps in which each tensor moves, LoRA's A as well, which stands still in the first


class IdleWarning(UserWarning):
    """Some trained tensors were never used."""


class Watch:
    """What training shows of the tensors of an attached model, step by step.

    Attributes:
        steps: how many were watched.
        seen: name of each trained tensor -> in how many of them a gradient reached it.
        idle: names of those that may have none: by their method's word, of experts, of parts beside others.
        routed: names of those of experts.
        zero: names of those whose gradient was nothing but zeros, or none, in all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.start = snapshot(model)
        self.seen, self.steps = dict.fromkeys(self.start, 0), 0
        self.idle, self.routed, self.zero = set(idle_by_word(model)), set[str](), set(self.start)

    def first(self, model: nn.Module, finite: bool = True, reached: Iterable[str] = ()) -> None:
        """After the first backward pass: all is reached, now or in another pass (`reached`), or excused.

        Raises:
            TrainError: naming the tensors that the loss does not depend on, or whose gradient is not finite.
        """
        missed = {name for name, p in trained_parameters(model).items() if p.grad is None} - set(reached)
        spare = set(attachment(model).plan.spare)
        for names in _terms(model):  # a term of which nothing is reached has no excuse
            self.idle -= set(names) - spare if missed.issuperset(names) else set()
        self.routed |= set(routed(model, missed))
        self.idle |= self.routed | set(aside(model, missed))
        check_gradients(model, finite, {*reached, *self.idle})

    def saw(self, model: nn.Module) -> None:
        """In each step, before gradients are dropped."""
        self.steps += 1
        if self.steps <= MANY or self.unseen:
            for name, p in trained_parameters(model).items():
                self.seen[name] += p.grad is not None
                if name in self.zero and p.grad is not None and p.grad.any():
                    self.zero.discard(name)

    @property
    def unseen(self) -> set[str]:
        """Names of the tensors that no gradient has reached yet."""
        return {name for name, count in self.seen.items() if not count}

    def moved(self, model: nn.Module, steps: int) -> None:
        """After some optimiser steps: what was reached in several has moved; after many, all but what is excused was
        reached.

        Raises:
            TrainError: naming the tensors that stand still.
        """
        late = sorted(self.unseen - self.idle)
        if late and self.steps >= MANY:
            raise TrainError(
                f"{_never(late, len(self.start))} in {self.steps} steps, more than chance (layerdrop) explains; "
                f"{_narrow(model, late, self.idle)}"
            )
        rare = {name for name, count in self.seen.items() if count < min(FEW, self.steps)}
        check_moved(model, self.start, steps, rare | set(self.flat(model)))

    def flat(self, model: nn.Module) -> Iterator[str]:
        """Names of the tensors with nothing but zeros for a gradient, where others of the same term have more.

        That is the model's own doing: the first token of a Longformer attends by maps of its own, and where it alone is
        read, the last layer's other query moves nothing.
        """
        for names in _terms(model):
            if not self.zero.issuperset(names):
                yield from (name for name in names if name in self.zero and self.seen[name])

    def report(self, model: nn.Module, steps: int) -> None:
        """At the end of so many steps, if all were seen: warn of what was never used, or never had an effect."""
        if self.steps < steps:
            return
        end = f"in {steps} steps: %s; they stand where they stood"
        if names := sorted(self.unseen.difference(attachment(model).plan.spare)):
            why = "no token went to its expert" if self.routed.intersection(names) else "the task does not use them"
            why = why if set(names) <= self.idle else "chance (layerdrop) left them out"
            warnings.warn(f"{_never(names, len(self.start))} {end % why}", IdleWarning, stacklevel=2)
        if names := sorted(set(self.flat(model)) & set(still(model, self.start))):
            text = f"{len(names)} of {len(self.start)} trained tensors had a gradient of zeros, first {names[0]}"
            why = "nothing that the task reads depends on them"
            warnings.warn(f"{text} {end % why}", IdleWarning, stacklevel=2)


def _terms(model: nn.Module) -> Iterable[list[str]]:
    """Names of what each term of the recipe trains."""
    terms: dict[int, list[str]] = {}
    for entry in attachment(model).plan.entries:
        terms.setdefault(entry.index, []).extend(name for name, _ in entry.names())
    return terms.values()


def check_gradients(model: nn.Module, finite: bool = True, excused: Iterable[str] = ()) -> None:
    """After a backward pass: every trained tensor must have a gradient, and a finite one unless told otherwise.

    Raises:
        TrainError: naming the tensors that the loss does not depend on, or whose gradient is not finite.
    """
    parameters = trained_parameters(model)
    excused = {*attachment(model).plan.spare, *excused}
    unreached = [name for name, p in parameters.items() if p.grad is None and name not in excused]
    if unreached:
        said = f"{_never(unreached, len(parameters))}: the forward pass never used them"
        raise TrainError(f"{said}; {_narrow(model, unreached, excused)}")
    broken = [n for n, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if broken and finite:
        raise TrainError(f"the gradient of {broken[0]} is not finite; {remedy(model)}")


def check_depends(model: nn.Module, outputs: object) -> None:
    """Before a backward pass: what a model gives, or its loss, depends on something that is trained.

    Raises:
        TrainError: it does not.
    """
    if not any(tensor.requires_grad for tensor in floats(outputs)):
        names = list(trained_parameters(model))
        text, where = f"the loss depends on nothing that is trained: {_never(names, len(names))}", _unrun(model)
        raise TrainError(f"{text}; {where}" if where else text)


def _unrun(model: nn.Module) -> str:
    """Where all that is trained lies, if other stacks of blocks hold nothing of it: those are what runs."""
    sites = [entry.site for entry in attachment(model).plan.entries]
    others = [f"{stack}." for stack in find_blocks(model) if all(site.stack != stack for site in sites)]
    found = stacks_around([f"{site.path}." for site in sites], others) if others else []
    if not 0 < len(found) <= NAMED:
        return ""
    return (
        f"all of it lies in {', '.join(found)}, which these inputs do not run: give some that do (images, sounds), "
        f"or a recipe that finds something to train in {others[0][:-1]}"
    )


def _never(names: list[str], count: int) -> str:
    return f"{len(names)} of {count} trained tensors got no gradient, first {names[0]}"


def _narrow(model: nn.Module, unreached: list[str], excused: Iterable[str]) -> str:
    """What would leave out the tensors that were not reached: stacks, where a few hold all others."""
    plan = attachment(model).plan
    aside = {name for name, _ in plan.head} | set(excused)
    shared = {name for entry in plan.entries if entry.owns_shared for name, _ in entry.names()}
    reached = [name for name in trained_parameters(model) if name not in aside | set(unreached) | shared]
    idle = [name for name in unreached if name not in aside | shared]
    if not reached and (where := _unrun(model)):
        return where  # but for the head
    fields = stack_advice(map(_module, reached), [_module(name) for name in idle])
    return f"narrow the recipe ({fields or 'which=, layers=, target=, stack='}) to what this model runs"


def _module(name: str) -> str:
    """The module that a saved tensor is at, with a dot behind it."""
    path, added, _ = name.partition(".edits.")
    return (path if added else name.rpartition(".")[0]) + "."


def idle_by_word(model: nn.Module) -> Iterator[str]:
    """Names of trained tensors that may get no gradient at all, by their method's word, or of parts of the head."""
    yield from attachment(model).plan.spare
    for entry in attachment(model).plan.entries:
        yield from (name for term, name, _ in entry.trained() if entry.method.may_idle(entry.site, term))


def routed(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Those of the tensors without gradient that belong to one of several experts, of which others have gradients.

    Experts are modules of one class in a list or dict that are no blocks of the model: they have no norm.
    """
    reached = {name for name, p in trained_parameters(model).items() if p.grad is not None}
    lists = (nn.ModuleList, nn.ModuleDict)
    groups = [path for path, module in model.named_modules() if isinstance(module, lists) and _alike(module)]
    for name in names:
        around = [path for path in groups if name.startswith(path + ".")]
        if any(other.startswith(path + ".") for path in around for other in reached):
            yield name


def aside(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Those of the tensors without gradient that lie in a block of which other trained tensors have gradients: what it
    does not run for this task (a decoder's attention to an encoder, Longformer's global attention).

    Not what is added to a module that may run without it: its owner's code does more than call it.
    """
    reached = {name for name, p in trained_parameters(model).items() if p.grad is not None}
    blocks = {id(block) for found in find_blocks(model).values() for block in found}
    used = [path for path, module in model.named_modules() if id(module) in blocks and _in(reached, path)]
    for name in names:
        owner, _, child = name.partition(".edits.")[0].rpartition(".")
        cls: type = type(model.get_submodule(owner))
        called = ".edits." not in name or only_called(cls, child)
        if called and any(within(name, path) for path in used):
            yield name


def _in(names: Iterable[str], path: str) -> bool:
    return any(within(name, path) for name in names)


def _alike(group: nn.Module) -> bool:
    parts = list(group.children())
    return len(parts) > 1 and len(set(map(type, parts))) == 1 and not any(map(is_block, parts))


def reached_in_eval(
    model: nn.Module, names: Iterable[str], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> set[str]:
    """Those of the trained tensors on which the output depends when nothing is left to chance. No gradient is left."""
    parameters = {name: p for name, p in trained_parameters(model).items() if name in set(names)}
    with evaluating(model), torch.enable_grad():
        total = scalar(model(*args, **kwargs))
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, grad in zip(parameters, found, strict=True) if grad is not None}


def scalar(outputs: object) -> Tensor:
    """The loss in a model's outputs, or the sum of all floating tensors that depend on something."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return loss if isinstance(loss, Tensor) else sum((t.float().sum() for t in floats(outputs)), torch.zeros(()))


def floats(outputs: object) -> Iterator[Tensor]:
    """All floating tensors in what a model gives, in order."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from floats(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from floats(value)


def check_finite(model: nn.Module, step: int) -> None:
    """After an optimiser step: every trained value is finite.

    Raises:
        DivergedError: naming a tensor that is not.
    """
    parameters = trained_parameters(model)
    norms = (
        torch.stack([n.float() for n in torch._foreach_norm(list(parameters.values()))])
        if parameters
        else torch.zeros(1)
    )
    if torch.isfinite(norms).all():
        return
    if found := not_finite({name: p.detach() for name, p in parameters.items()}):
        raise DivergedError(f"after step {step}, {found}; {remedy(model)}")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained values, to compare with later."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def still(model: nn.Module, start: dict[str, Tensor], rare: Iterable[str] = ()) -> list[str]:
    """Names of trained tensors that are bit for bit where they were, without a declared reason or a name in `rare`."""
    excused = {*may_stand_still(model), *rare}
    now = trained_parameters(model)
    return [n for n, p in now.items() if n not in excused and torch.equal(p.detach(), start[n])]


def check_moved(model: nn.Module, start: dict[str, Tensor], steps: int, rare: Iterable[str] = ()) -> None:
    """After a few optimiser steps with a learning rate above 0: all trained tensors but `rare` ones must have moved.

    Raises:
        TrainError: naming the tensors that stand still.
    """
    names = still(model, start, rare)
    if names:
        raise TrainError(
            f"{len(names)} of {len(start)} trained tensors did not move in {steps} steps, first {names[0]}: is it in "
            "the optimiser (smidgen.optimizer(model)), and is its learning rate above 0?"
        )


def may_stand_still(model: nn.Module) -> Iterator[str]:
    """Names of trained tensors that may stand still: by their method's word, chosen values of rows of a table, and what
    is new in the base (a pooler that nothing reads)."""
    yield from attachment(model).plan.spare
    for entry in attachment(model).plan.entries:
        for term, name, _ in entry.trained():
            # the batch may hold none of the chosen rows of a table; a chosen value of LoRA's A may meet none of B's
            rare = term in entry.subsets and (entry.added or isinstance(entry.site, EmbeddingSite))
            if rare or entry.method.may_rest(entry.site, term):
                yield name
