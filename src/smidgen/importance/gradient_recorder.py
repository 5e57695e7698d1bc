"""Records what goes through the modules that own trained tensors, and squares per-example gradients on the way back.

Weights take no part in autograd. A recorded output that would need no gradient becomes a leaf that does, so that the
backward pass goes down to the lowest recorded module and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from smidgen.importance.per_example_rules import Call, Tensors, embedding, general
from smidgen.importance.targets import Target
from smidgen.ports.edit import Edit
from smidgen.ports.module_edits import ModuleEdit
from smidgen.ports.observers import restore_methods, stand_in, watch_calls

Before = Callable[[Tensor], Tensor]
Base = Mapping[str, Tensor] | None  # the base's tensors, where an edit reads them
After = Callable[[Tensor, Tensor, Base], Tensor]


class Recorder:
    """Hooks on the owners of some targets: a context, with `forward` around a forward pass and `settle` after backward.

    Attributes:
        totals: saved name -> sum of squared gradients so far.
        refused: targets whose calls cannot be told apart by example; in a trial, also those whose rule raises.
    """

    def __init__(self, targets: Iterable[Target], limit: int, trial: bool = False) -> None:
        self.limit, self.trial, self.size, self.on = limit, trial, 0, False
        self.totals: Tensors = {}
        self.refused: set[Target] = set()
        self.targets: dict[nn.Module, list[Target]] = {}
        for target in targets:
            for module in target.modules:
                self.targets.setdefault(module, []).append(target)
            for term, name in target.names.items():
                self.totals[name] = torch.zeros_like(target.tensors[term], requires_grad=False)
        self._expected: dict[Target, int] = {}
        self._calls: dict[Target, list[Call]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for module in self.targets:
            if isinstance(module, ModuleEdit):
                self._wrap(module)
            elif not isinstance(module, Edit):
                self._handles += watch_calls(module, after=self._record, first=True)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.targets:
            if isinstance(module, ModuleEdit):
                restore_methods(module, "before", "after")
        self._handles.clear()

    @contextmanager
    def forward(self, size: int) -> Iterator[None]:
        """Record a forward pass of `size` examples."""
        self._expected.clear()
        self._calls.clear()
        self.size, self.on = size, True
        try:
            yield
        finally:
            self.on = False

    def settle(self) -> None:
        """Square what a backward pass left: what needs autograd itself, and calls beside others without a gradient."""
        for target, calls in self._calls.items():
            self._square(target, calls)
        self._calls.clear()

    def _square(self, target: Target, calls: list[Call]) -> None:
        if target in self.refused:
            return
        try:
            for name, value in target.squares(calls, self.limit).items():
                self.totals[name] += value
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            if not self.trial:
                raise
            self.refused.add(target)

    def _record(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> Tensor | None:
        """Forward hook: keeps a module's input and waits for its output's gradient; refuses calls with no rule."""
        targets = [target for target in self.targets[module] if target not in self.refused]
        if not (self.on and targets and torch.is_grad_enabled()):
            return None
        if any(target.rule is embedding for target in targets):
            args, output = self._spread(args, output)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        others = any(target.rule is general for target in targets) and len(tensors) > 1
        if others or not (args and self._led(args[0]) and self._led(output) and output.is_floating_point()):
            self.refused.update(targets)
            return None

        def function(p: Tensors, x: Tensor) -> Tensor:
            found: Tensor = functional_call(module, p, (x, *args[1:]), kwargs)
            return found

        return self._watch(output, targets, Call(module, function, (args[0].detach(),)))

    def _wrap(self, edit: ModuleEdit) -> None:
        """Stand in for an edit's two functions, as far as its method defines them."""
        (target,) = self.targets[edit]
        if edit.input is not None:
            stand_in(edit, "before", partial(self._before, edit, target, edit.before))
        if edit.output is not None or edit.reads_base:
            stand_in(edit, "after", partial(self._after, edit, target, edit.after))

    def _before(self, edit: ModuleEdit, target: Target, plain: Before, x: Tensor) -> Tensor:
        output = plain(x)
        call = Call(edit, lambda p, x: edit.input_formula(edit.tensors() | p, x), (x.detach(),))
        return output if output is x else self._edited(target, call, output)

    def _after(self, edit: ModuleEdit, target: Target, plain: After, x: Tensor, y: Tensor, base: Base = None) -> Tensor:
        output = plain(x, y, base)

        def function(p: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return edit.formula(edit.tensors() | p, x, y, base)

        return output if output is y else self._edited(target, Call(edit, function, (x.detach(), y.detach())), output)

    def _edited(self, target: Target, call: Call, output: Tensor) -> Tensor:
        if not (self.on and torch.is_grad_enabled()) or target in self.refused:
            return output
        if not (all(map(self._led, call.inputs)) and self._led(output)):
            self.refused.add(target)
            return output
        return self._watch(output, [target], call)

    def _spread(self, args: tuple[object, ...], output: object) -> tuple[tuple[object, ...], object]:
        """Ids (1, T) that serve all examples, as positions do, and what was looked up, once for each example."""
        ids = args[0] if args else None
        shared = isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == 1 < ids.shape[1]
        if isinstance(ids, Tensor) and isinstance(output, Tensor) and shared:
            return (ids.expand(self.size, -1), *args[1:]), output.expand(self.size, -1, -1)
        return args, output

    def _led(self, value: object) -> TypeGuard[Tensor]:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.size

    def _watch(self, output: Tensor, targets: list[Target], call: Call) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf must not be changed in place
        for target in targets:
            self._expected[target] = self._expected.get(target, 0) + 1
        output.register_hook(partial(self._receive, targets, call))
        return output

    def _receive(self, targets: list[Target], call: Call, g: Tensor) -> None:
        call = replace(call, g=g)
        for target in targets:
            calls = self._calls.setdefault(target, [])
            calls.append(call)
            # autograd inside a backward pass is left for later
            if len(calls) == self._expected[target] and target.rule is not general:
                self._square(target, self._calls.pop(target))
