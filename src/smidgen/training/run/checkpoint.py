"""The state of training as tensors: trained and best values, optimiser, generators; and the model given back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.growth import assign


def pack(
    model: nn.Module, best: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """All of it as flat tensors. Every process has to call this: each adds the state of its own generator."""
    tensors: dict[str, Tensor] = {f"trained/{n}": p.detach() for n, p in trained_parameters(model).items()}
    tensors |= {f"best/{n}": t for n, t in best.items()} | pack_optimizer(optimizer)
    for index, memory in attachment(model).memory.items():
        tensors |= {f"memory/{index}/{key}": value for key, value in memory.items()}
    device = accelerator.device
    tensors["rng/cpu"] = accelerator.gather(torch.get_rng_state()[None].to(device))
    if device.type == "cuda":
        tensors["rng/cuda"] = accelerator.gather(torch.cuda.get_rng_state()[None].to(device))
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Put a packed state back; returns the best values."""
    assign(model, {name: tensors[f"trained/{name}"] for name in trained_parameters(model)}, optimizer)
    for name, value in tensors.items():
        if name.startswith("memory/"):
            _, index, key = name.split("/", 2)
            memory = attachment(model).memory
            memory[int(index)] = {**memory.get(int(index), {}), key: value}
    unpack_optimizer(optimizer, tensors)
    rank = accelerator.process_index
    torch.set_rng_state(tensors["rng/cpu"][rank].clone())  # of a view, torch 2.13 crashes
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"][rank].clone())
    device = accelerator.device
    return {n.removeprefix("best/"): t.to(device) for n, t in tensors.items() if n.startswith("best/")}


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["names"]]


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser from `smidgen.optimizer` as flat tensors, by the names of its parameters."""
    names, state = _names(optimizer), optimizer.state_dict()["state"]
    return {
        f"optimizer/{names[i]}/{key}": torch.as_tensor(value)
        for i, entry in state.items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`."""
    names = _names(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, entry = rest.rpartition("/")
            state.setdefault(names.index(name), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
