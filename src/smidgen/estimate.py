"""plan: the resolved recipe with an estimate of memory and work, counted on tensors without content."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smidgen.attachment import trained_parameters
from smidgen.inputs import prompt_length
from smidgen.optim import optimizer
from smidgen.peak import Live
from smidgen.place import place
from smidgen.plan import Plan, resolve
from smidgen.prefix import frozen_prefix
from smidgen.recipe import Recipe, Term
from smidgen.selection.narrow import settle
from smidgen.speed.recompute import recomputed, recomputing
from smidgen.watch import snapshot


def plan(
    model: nn.Module,
    recipe: str | Term | Recipe,
    *,
    pooling: str | None = None,
    batch_size: int = 32,
    length: int = 128,
    recompute: bool = False,
) -> Plan:
    """What a recipe would do to a model: sites, shapes, counts, file size, lowest edit, memory and FLOPs.

    The model is not touched and may live on the meta device: training steps are run on a copy whose tensors have no
    content. `costs` is {"unknown": reason} for a model that cannot be run so (no `input_ids`). Its `activation_bytes`
    are what a forward pass keeps for the backward pass, its `peak_bytes` the most that is alive at once in a step of
    `fit`: weights, masters, gradients, moments, two copies of the trained values, activations and what comes and goes.
    Not in it: what an allocator holds beyond the tensors, and what a kernel takes for itself.

    Args:
        batch_size, length: shape of the batch that the estimate is for; a length above what the model takes is cut.
        recompute: with the activations of blocks computed again in the backward pass, see `recomputing`.

    Raises:
        PlanError: the recipe does not fit the model.
        TrainError: `recompute` on a model whose blocks cannot be computed again.
    """
    resolved = settle(model, resolve(model, recipe, pooling))
    if recompute:
        recomputed(model, resolved)
    try:
        costs: dict[str, Any] = _costs(model, resolved, batch_size, length, recompute)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        costs = {"unknown": str(error).splitlines()[0][:120]}
    return replace(resolved, costs=costs)


def _costs(model: nn.Module, resolved: Plan, batch_size: int, length: int, recompute: bool) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    prompt = sum(prompt_length(row.method, row.site) for row in resolved.rows if row.site.kind == "input")
    length = min(length, (longest or length + prompt) - prompt)
    ghost, mode = _ghost(model)
    with mode, Live() as live:
        live.add(*ghost.parameters(), *ghost.buffers())
        place(ghost, resolved)
        ghost.train()
        for module in frozen_prefix(ghost, resolved):
            module.eval()
        with recomputing(ghost) if recompute else nullcontext():
            ids = torch.zeros(batch_size, length, dtype=torch.long)
            saved, *work = _count(ghost, ids)
            peak = _peak(ghost, ids, live)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "batch_size": batch_size,
        "length": length,
        "weights_bytes": weights,
        "training_state_bytes": 16 * (resolved.trained + resolved.head_values),  # master, gradient, two moments
        "activation_bytes": saved,
        "peak_bytes": peak,
        "forward_flops_per_token": work[0] // (batch_size * length),
        "training_flops_per_token": work[1] // (batch_size * length),
    }


def _ghost(model: nn.Module) -> tuple[nn.Module, FakeTensorMode]:
    """A copy whose tensors have shapes but no content, placed on the CPU so that its kernels are the ones counted."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the indices of subsets
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo), mode


def _count(model: nn.Module, ids: Tensor) -> tuple[int, int, int]:
    """Bytes kept for the backward pass, FLOPs of the forward pass, FLOPs of both. ids: (B, T); leaves gradients."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    counting = FlopCounterMode(display=False, custom_mapping=_attention_on_cpu())
    with saved_tensors_hooks(pack, lambda tensor: tensor), counting as counter:
        output = model(input_ids=ids)[0]
        forward = counter.get_total_flops()
        output.float().sum().backward()
    return sum(storage.nbytes() for storage in kept.values()), forward, counter.get_total_flops()


def _peak(model: nn.Module, ids: Tensor, live: Live) -> int:
    """The most bytes alive at once in a step of `fit` after its first; gradients are there, to make moments of."""
    trained = list(trained_parameters(model).values())
    adam, copies = optimizer(model), (snapshot(model), snapshot(model))
    adam.step()
    adam.zero_grad(set_to_none=True)
    live.high = live.now
    _loss(model, ids).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    del copies
    return live.high


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The cross-entropy of a model with a head; the sum of what another gives."""
    takes = inspect.signature(model.forward).parameters
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {}
    logits = model(input_ids=ids, **mask)[0].float()
    if "labels" not in takes:
        return logits.sum()
    logits = logits.flatten(0, -2)  # (B, C), or (B T, C)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def _attention_on_cpu() -> dict[Any, Any]:
    """The fused attention of the CPU, which torch's counter leaves out: its operators -> FLOPs from shapes."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
