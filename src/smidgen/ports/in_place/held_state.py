"""What must not change in a model while something is attached: its buffers, and which modules and parameters it has.

A delta holds neither. So a module with running statistics computes with them in training mode too, as in eval mode; any
other persistent buffer that a forward pass moves is put back behind it; and what is changed from outside is an error.
Buffers that are not persistent are caches, which belong to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.ports.during_call import stand, stand_down
from smidgen.sites.quantised.maps import quantised_maps
from smidgen.sites.quantised.storage import WeightStorage

CHANGED = (
    "while {recipe} was attached: a delta says nothing of it; put it back, or detach, change the model, attach again"
)


@dataclass
class Buffer:
    """A persistent buffer: whose it is, what it held when something was attached, and what was last seen there."""

    name: str
    module: nn.Module
    term: str
    value: Tensor
    seen: Tensor
    version: int | None

    @property
    def now(self) -> Tensor | None:
        """What stands there."""
        return self.module._buffers.get(self.term)

    def moved(self) -> bool:
        """Whether it holds anything else than it did. Looks at values only where something was written."""
        now = self.now
        if now is self.seen and self.version is not None and now._version == self.version:
            return False
        if now is None or now.shape != self.value.shape or not _equal(now, self.value.to(now)):
            return True
        self._note(now)
        return False

    def put_back(self) -> None:
        """The values of before, where the module lives now."""
        now = self.now
        with torch.no_grad():
            if now is None or now.shape != self.value.shape or now.is_inference():
                now = self.module._buffers[self.term] = self.value.to(self.seen.device, copy=True)
            else:
                now.copy_(self.value)
        self._note(now)

    def _note(self, now: Tensor) -> None:
        self.seen, self.version = now, _version(now)


@dataclass
class Held:
    """Buffers, modules and parameters of a model as they were when something was attached."""

    buffers: list[Buffer]
    modules: list[tuple[str, nn.Module, str, nn.Module]]  # path, parent, name, child
    parameters: list[tuple[str, nn.Module, str, nn.Parameter]]  # name, owner, term
    running: bool = False
    in_eval_mode: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    stored: list[tuple[WeightStorage, nn.Module, object]] = field(default_factory=list)  # with what was before `hold`

    @classmethod
    def of(cls, model: nn.Module) -> Held:
        """Take note of a model that nothing is attached to yet."""
        buffers = [Buffer(n, m, t, b.detach().clone(), b, _version(b)) for n, m, t, b in _persistent(model)]
        modules, parameters = [], []
        for path, parent in model.named_modules():
            prefix = f"{path}." if path else ""
            modules += [(prefix + name, parent, name, child) for name, child in parent._modules.items() if child]
            own = parent._parameters.items()
            parameters += [(prefix + term, parent, term, p) for term, p in own if p is not None]
        return cls(buffers, modules, parameters)

    def hold(self, model: nn.Module) -> None:
        """Let modules with running statistics compute as in eval mode, and quantised weights stay as they are."""
        for module in model.modules():
            if module._buffers.get("running_mean") is not None:
                self.in_eval_mode.append(module)
                self.handles += stand(module, to_eval, to_train)
        self.stored = [(storage, module, storage.hold(module)) for _, module, storage in quantised_maps(model)]

    def check_parts(self, recipe: object, expected: dict[str, nn.Parameter]) -> None:
        """Raises AttachError if a module or parameter of the base is not the one that it was.

        expected: name -> what stands in place of the base's own.
        """
        for path, parent, name, child in self.modules:
            if parent._modules.get(name) is not child:
                raise AttachError(f"{path} was replaced {CHANGED.format(recipe=recipe)}")
        for name, owner, term, own in self.parameters:
            if owner._parameters.get(term) is not expected.get(name, own):
                raise AttachError(f"the parameter {name} was replaced {CHANGED.format(recipe=recipe)}")

    def check_buffers(self, recipe: object) -> None:
        """Raises AttachError if a buffer was written from outside of a forward pass."""
        for buffer in self.buffers:
            if buffer.moved():
                raise AttachError(f"the buffer {buffer.name} was changed {CHANGED.format(recipe=recipe)}")

    def begin(self) -> None:
        """A forward pass begins: what is written from here on is its own doing."""
        self.running = True

    def end(self) -> None:
        """After it, whether or not it came to its end."""
        if self.running:
            self.put_back()
        self.running = False

    def put_back(self) -> None:
        """Buffers that a forward pass has moved hold what they held before."""
        for buffer in self.buffers:
            if buffer.moved():
                buffer.put_back()

    def release(self) -> None:
        """Everything is as it was: modules, buffers, modes."""
        for _, parent, name, child in self.modules:
            if parent._modules.get(name) is not child:
                parent._modules[name] = child
        self.put_back()
        for handle in self.handles:
            handle.remove()
        for module in self.in_eval_mode:
            stand_down(module)
        for storage, module, before in self.stored:
            storage.release(module, before)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of all that a state dict holds; one that several modules share under its first name."""
    return {name: buffer for name, _, _, buffer in _persistent(model)}


class InEvalMode(nn.Module):
    """A module with running statistics during its call, and the mode it was in before."""

    _mode: bool


def to_eval(module: InEvalMode, args: Args) -> None:
    """Pre-hook of a module with running statistics: it uses them, and does not move them."""
    module._mode, module.training = module.training, False


def to_train(module: InEvalMode, args: Args, output: object) -> None:
    """Forward hook (always called): back to the mode of before."""
    module.training = module.__dict__.pop("_mode", module.training)


def _persistent(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for term, buffer in module._buffers.items():
            if buffer is not None and term not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{path}.{term}" if path else term, module, term, buffer


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written; None for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())
