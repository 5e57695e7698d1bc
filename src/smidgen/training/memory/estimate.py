"""plan: the resolved recipe with an estimate of memory and work, counted on tensors without content."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smidgen.common.module_modes import copied
from smidgen.common.wrappers import bare
from smidgen.efficiency.activation_checkpointing import recomputed, recomputing
from smidgen.inference.sample_inputs import SAMPLES, Inputs, input_candidates
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.plans import Plan
from smidgen.planning.prompt_positions import prompt_length
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.narrowing import settle
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.placement import place
from smidgen.recipe.recipe import Recipe, Term
from smidgen.sites.quantised.maps import counted_maps, logical_counts, stored_bytes
from smidgen.sites.site import InputSite
from smidgen.steps.gradient_checks import snapshot
from smidgen.steps.optimizer_groups import optimizer
from smidgen.training.memory.grouped_products import OPERATOR, Grouped, flops
from smidgen.training.memory.layer_drop import EveryLayer
from smidgen.training.memory.live_tensors import Live

TOKENS = 128
Shape = Sequence[int]
Costs = dict[str, int | str]


def plan(
    model: nn.Module,
    recipe: str | Term | Recipe,
    *,
    pooling: str | None = None,
    batch_size: int = 32,
    length: int | None = None,
    recompute: bool = False,
) -> Plan:
    """What a recipe would do to a model: sites, shapes, counts, file size, lowest edit, memory and FLOPs.

    The model is not touched and may live on the meta device: training steps are run on a copy whose tensors have no
    content: token ids, or images or sound where a model takes no ids (then FLOPs are per example). `costs` is
    {"unknown": reason} for a model that cannot be run so. Its `activation_bytes`
    are what a forward pass keeps for the backward pass, its `peak_bytes` the most that is alive at once in a step of
    `fit`: weights, masters, gradients, moments, two copies of the trained values, activations and what comes and goes.
    Not in it: what an allocator holds beyond the tensors, and what a kernel takes for itself.

    Args:
        batch_size, length: shape of the batch that the estimate is for: tokens (by default 128), or samples of a sound
            (16,000). A length above what the model takes is cut.
        recompute: with the activations of blocks computed again in the backward pass, see `recomputing`.

    Raises:
        PlanError: the recipe does not fit the model.
        TrainError: `recompute` on a model whose blocks cannot be computed again.
    """
    model = bare(model)
    resolved = settle(model, resolve(model, recipe, pooling))
    if recompute:
        recomputed(model, resolved)
    return replace(resolved, costs=_tried(model, resolved, batch_size, length, recompute))


def _tried(model: nn.Module, resolved: Plan, batch_size: int, given: int | None, recompute: bool) -> Costs:
    """The costs with the first inputs that the model takes, or why there are none with any."""
    config = getattr(model, "config", None)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    length, samples = (TOKENS, SAMPLES) if given is None else (given, given)
    prompt = sum(
        prompt_length(entry.method, entry.site) for entry in resolved.entries if isinstance(entry.site, InputSite)
    )
    if longest and longest > 0:  # XLNet has -1, for no limit
        length = min(length, longest - prompt)
    main, why = getattr(model, "main_input_name", "input_ids"), ""
    for candidate in input_candidates(model, batch_size, length, samples):
        inputs = {name: value for name, value in candidate.items() if name != "attention_mask"}  # nothing is padded
        try:
            with _quiet_torch():
                return _costs(model, resolved, inputs, recompute)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return {"unknown": "its forward pass depends on values, which tensors without content have not"}
        except Exception as error:  # whatever a model raises for inputs that it does not take
            if main in inputs and not why:
                why = f"with {' and '.join(inputs)}, {type(error).__name__}: {error}".splitlines()[0][:160]
    return {"unknown": why or f"no inputs to count with: its forward takes {main}"}


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch logs a traceback beside the error that it raises where it cannot tell a shape."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _costs(model: nn.Module, resolved: Plan, inputs: Inputs, recompute: bool) -> Costs:
    """Bytes and FLOPs of one training step, counted on tensors without content."""
    ghost, mode = _ghost(model)
    with mode, EveryLayer(), Grouped(), Live() as live:
        live.add(*ghost.parameters(), *ghost.buffers())
        place(ghost, resolved)
        ghost.train()
        for module in frozen_prefix(ghost, resolved):
            module.eval()
        with recomputing(ghost) if recompute else nullcontext():
            own = {name: torch.zeros_like(value) for name, value in inputs.items()}
            saved, *work = _count(ghost, own)
            peak = _peak(ghost, own, live)
    weights = stored_bytes(model)
    shape = next(iter(inputs.values())).shape
    words, sound = "input_ids" in inputs, len(shape) == 2
    unit, units = ("token", shape[:2].numel()) if words else ("example", shape[0])
    return {
        "batch_size": shape[0],
        **({"length": shape[1]} if words else {"samples": shape[1]} if sound else {}),
        "weights_bytes": weights,
        "training_state_bytes": 16 * (resolved.trained + resolved.head_values),  # master, gradient, two moments
        "activation_bytes": saved,
        "peak_bytes": peak,
        f"forward_flops_per_{unit}": work[0] // units,
        f"training_flops_per_{unit}": work[1] // units,
    }


def _ghost(model: nn.Module) -> tuple[nn.Module, FakeTensorMode]:
    """A copy whose tensors have shapes but no content, placed on the CPU so that its kernels are the ones counted."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the indices of subsets
    memo: dict[int, object] = {}
    with mode:
        memo |= counted_maps(model)
        quantised = set(logical_counts(model))
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in quantised:
                continue
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    ghost = copied(model, memo)
    config = getattr(ghost, "config", None)
    if config is not None and getattr(
        config, "apply_spec_augment", False
    ):  # which places it masks is a matter of chance, that of values
        config.apply_spec_augment = False
    return ghost, mode


def _count(model: nn.Module, inputs: Inputs) -> tuple[int, int, int]:
    """Bytes kept for the backward pass, FLOPs of the forward pass, FLOPs of both; leaves gradients."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    counting = FlopCounterMode(display=False, custom_mapping=_not_counted())
    with saved_tensors_hooks(pack, lambda tensor: tensor), counting as counter:
        output = model(**inputs)[0]
        forward = counter.get_total_flops()
        output.float().sum().backward()
    return sum(storage.nbytes() for storage in kept.values()), forward, counter.get_total_flops()


def _peak(model: nn.Module, inputs: Inputs, live: Live) -> int:
    """The most bytes alive at once in a step of `fit` after its first; gradients are there, to make moments of."""
    trained = list(trained_parameters(model).values())
    adam, copies = optimizer(model), (snapshot(model), snapshot(model))
    adam.step()
    adam.zero_grad(set_to_none=True)
    live.high = live.now
    _loss(model, inputs).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    del copies
    return live.high


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The cross-entropy of a model with a head; the sum of what another gives."""
    takes = inspect.signature(model.forward).parameters
    masked = "attention_mask" in takes and "input_ids" in inputs
    mask = {"attention_mask": torch.ones_like(inputs["input_ids"])} if masked else {}
    logits: Tensor = model(**inputs, **mask)[0].float()
    if "labels" not in takes:
        return logits.sum()
    logits = logits.flatten(0, -2)  # (B, C), or (B T, C)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def _not_counted() -> dict[object, Callable[..., int]]:
    """Operators that torch leaves out -> FLOPs from shapes: the CPU's fused attention, the product of experts."""

    def forward(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Shape, query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    ops = torch.ops.aten
    experts = {} if OPERATOR is None else {OPERATOR: flops}
    return {
        **experts,
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
