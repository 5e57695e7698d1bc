"""A finer cut: in front of the first edited module of a block, instead of in front of the block.

In a post-norm block (BERT, RoBERTa, ELECTRA, DistilBERT) whose norms are tuned, attention lies below the first of
them. Which modules run before it is seen in one forward pass; whether its input is all that the rest of the block needs
is decided by the check of logits that every cut has to stand.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from smidgen.common.hook_types import Args, Kwargs
from smidgen.efficiency.prefix_cache.cut_point import Cut, cut_of, why_not
from smidgen.efficiency.prefix_cache.recorded_pass import Batch, entering
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.plans import Plan

Event = tuple[str, nn.Module, object]


def inner_cut(cut: Cut, plan: Plan, batch: Batch) -> Cut | None:
    """`cut` in front of its first edited module; None if nothing of the block runs, in whole, before that.

    Args:
        cut: in front of a block of a model in eval mode.
        plan: what is attached.
        batch: a few examples.
    """
    paths = {site.path for site in plan.places if site.layer == cut.index}
    if cut.first is None or cut.site is not None or not paths:
        return None
    edited = [cut.model.get_submodule(path) for path in paths]
    events = _events(cut, batch)
    starts = [i for i, (kind, module, _) in enumerate(events) if kind == "start" and module in edited]
    if {events[i][1] for i in starts} != set(edited):  # one that is never called may be read at any time
        return None
    _, site, states = events[starts[0]]
    if not isinstance(states, Tensor) or states.ndim != 3 or _trained_below(cut, states):
        return None
    inner = _outermost(_over(events, starts[0]))
    return replace(cut, site=site, inner=inner) if inner else None


def frozen_within_block(model: nn.Module, plan: Plan, batch: Batch) -> list[nn.Module]:
    """All that lies below the lowest edit of a model in eval mode, and so needs no gradient and no dropout.

    Beside `frozen_prefix`, the modules of the first edited block that run before its first edited module.
    """
    found = inner_cut(cut_of(model, plan), plan, batch) if why_not(model, plan) is None else None
    return [*frozen_prefix(model, plan), *(found.inner if found is not None else ())]


def _events(cut: Cut, batch: Batch) -> list[Event]:
    """Starts, with the first input, and ends of all modules in the block."""
    events: list[Event] = []

    def start(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        events.append(("start", module, entering(args, kwargs)))

    def end(module: nn.Module, args: Args, output: object) -> None:
        events.append(("end", module, None))

    assert cut.first is not None
    handles = []
    for module in list(cut.first.modules())[1:]:
        handles.append(module.register_forward_pre_hook(start, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(end))
    try:
        with torch.enable_grad():
            cut.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _trained_below(cut: Cut, states: Tensor) -> bool:
    """Whether any trained tensor has part in `states` (checkpointing lets all hidden states require a gradient)."""
    trained = [parameter for parameter in cut.model.parameters() if parameter.requires_grad]
    if not states.requires_grad or not trained:
        return False
    return any(g is not None for g in torch.autograd.grad(states.sum(), trained, allow_unused=True))


def _over(events: list[Event], first: int) -> list[nn.Module]:
    """Modules that have ended before an event and do not start again."""
    later = {module for _, module, _ in events[first:]}
    return [module for kind, module, _ in events[:first] if kind == "end" and module not in later]


def _outermost(modules: list[nn.Module]) -> tuple[nn.Module, ...]:
    """Those that lie in none of the others."""
    inside = {child for module in modules for child in list(module.modules())[1:]}
    return tuple(module for module in dict.fromkeys(modules) if module not in inside)
