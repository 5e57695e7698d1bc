"""Where a model is cut: below lies what never changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.plans import Plan
from smidgen.sites.discovery import find_blocks, shares_layers
from smidgen.sites.roles import within


@dataclass(frozen=True, eq=False)
class Cut:
    """An attached model with one stack of blocks, cut before its first edited block.

    Attributes:
        stack: path of the stack.
        blocks: all blocks of it, in order.
        index: number of the first edited block; the number of blocks if none is edited.
        site: the first edited module of that block, if the cut lies in front of it (see `inner`).
        inner: modules of that block that are computed, in whole, before `site`.
    """

    model: nn.Module
    stack: str
    blocks: tuple[nn.Module, ...]
    index: int
    site: nn.Module | None = None
    inner: tuple[nn.Module, ...] = ()

    @property
    def lower(self) -> tuple[nn.Module, ...]:
        """The blocks below the cut."""
        return self.blocks[: self.index]

    @property
    def entry(self) -> nn.Module | None:
        """The module that the hidden states at the cut enter; None if the cut is behind the last block."""
        return self.first if self.site is None else self.site

    @property
    def place(self) -> str:
        """Path of that module."""
        paths = {module: path for path, module in self.model.named_modules()}
        return paths[self.entry] if self.entry is not None else f"{self.stack}, its end"

    @property
    def first(self) -> nn.Module | None:
        """The first edited block; None if the cut is behind the last block."""
        return self.blocks[self.index] if self.index < len(self.blocks) else None

    def before(self) -> list[nn.Module]:
        """The largest modules that are registered before the stack, such as the embeddings."""
        return _before(self.model, "", self.stack)

    def refusal(self, why: str) -> TrainError:
        """The error of a model whose lower part turns out not to be what a cache needs."""
        return TrainError(f"what lies below the edits of {type(self.model).__name__} cannot be kept: {why}")


def cut_of(model: nn.Module, plan: Plan) -> Cut:
    """The cut of a model with one stack of blocks, see `why_not`."""
    ((stack, blocks),) = find_blocks(model).items()
    layers = [site.layer for site in plan.places if site.layer is not None]
    return Cut(model, stack, tuple(blocks), min(layers, default=len(blocks)))


def why_not(model: nn.Module, plan: Plan) -> str | None:
    """In one line, why nothing below the lowest edit can be kept; None if it seems that it can.

    Args:
        model: with `plan` attached.
        plan: what is attached.
    """
    return _shape(model) or _edits(model, plan) or _use(model) or _drops(model, plan)


def irregular(model: nn.Module) -> str | None:
    """In one line, why a model is no plain chain of blocks of which only the logits count; None if it is."""
    return _shape(model) or _use(model)


def _shape(model: nn.Module) -> str | None:
    """Why the model, as it is built, cannot start in the middle; None if it can."""
    name, stacks = type(model).__name__, find_blocks(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{name} has an encoder and a decoder; only models with one stack of blocks can start in the middle"
    if not stacks:
        return f"{name} has no stack of blocks"
    if len(stacks) > 1:
        return f"{name} has {len(stacks)} stacks of blocks ({', '.join(stacks)}); only one can be cut"
    if shares_layers(model):
        return f"{name} uses the same layers at every depth, so an edited one lies at the bottom too"
    return None


def _edits(model: nn.Module, plan: Plan) -> str | None:
    if plan.lowest == "embeddings":
        return f"{plan.recipe} edits the embeddings: nothing lies below"
    if cut_of(model, plan).index == 0:
        return f"{plan.recipe} edits the first block: only the embeddings lie below"
    for module in frozen_prefix(model, plan):
        if any(parameter.requires_grad for parameter in module.parameters()):
            return f"{type(module).__name__} is trained and lies below the lowest edit"
    return None


def _use(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            return f"the model gives back what every block computes (config.{name})"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return f"{type(model).__name__} is compiled, which does not notice a start in the middle"
    return None


def _drops(model: nn.Module, plan: Plan) -> str | None:
    """A dropout rate on a module around the blocks: its forward drops (OPT), and has no eval mode of its own."""
    words = cut_of(model, plan).stack.split(".")
    for count in range(len(words)):
        module = model.get_submodule(".".join(words[:count]))
        rate = getattr(module, "dropout", None)
        if isinstance(rate, float) and rate > 0:
            return f"{type(module).__name__} drops activations by itself (dropout={rate:g}) below the edits"
    return None


def _before(module: nn.Module, path: str, stack: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if here == stack:
            break
        if within(stack, here):
            return found + _before(child, here, stack)
        found.append(child)
    return found
