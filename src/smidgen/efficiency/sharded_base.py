"""A frozen base in shards: each process keeps its part of every weight, and all of a block's while it computes it.

That is FSDP2 (`torch.distributed.fsdp.fully_shard`). What is trained is left out of it and stands whole in every
process, where `Processes` adds the gradients up. Accelerate's own preparation (`fsdp2_prepare_model`) is not used: it
leaves out whole modules alone, and a trained bias stands in one module with a frozen weight; and on a CPU Accelerate
passes over FSDP, `distributed_type` being MULTI_CPU whatever was launched.
"""

from __future__ import annotations

from collections import Counter

import torch
from accelerate.utils import is_torch_version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from smidgen.common.errors import TrainError
from smidgen.ports.attachment_record import attachment
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.sites.discovery import find_blocks
from smidgen.sites.new_tensors import keep_note


class ShardedBase:
    """A base lent to a run that keeps it in shards.

    Its own Parameter objects hold nothing while it is in shards, and the very same values afterwards.

    Attributes:
        model: of the same class, to attach to and to train; the base's own hooks and classes are not touched.
        parted: whether it is in shards now.
    """

    def __init__(self, base: nn.Module, device: torch.device, processes: int) -> None:
        """Raises TrainError if torch is too old."""
        if is_torch_version("<", "2.7.0"):
            raise TrainError(f"FSDP2 around what is trained needs torch 2.7, and this is {torch.__version__}")
        self.base, self.device, self.processes = base, device, processes
        self.model, self.parted = keep_note(base, shared_copy(base)), False

    def shard(self) -> None:
        """Part what is not trained. Every process has to call this, with the recipe attached."""
        record, model = attachment(self.model), self.model
        trained = {owner for swap in record.swaps for owner in swap.owners}
        self.places = _places(model, record.flags.keys() - trained)
        frozen = {id(module._parameters[term]) for places in self.places.values() for module, term in places}
        whole = {p for p in model.parameters() if id(p) not in frozen}
        held = record.held
        held.parameters = [entry for entry in held.parameters if id(entry[3]) not in frozen]
        self.classes = {module: type(module) for module in model.modules()}
        self.buffers = [(buffer, buffer.device) for buffer in model.buffers()]
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.processes,))
        for module in _units(model):
            fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        self.parted = True
        for name, parameter in self.base.named_parameters():
            if name in self.places:
                parameter.data = parameter.data.new_empty(0)

    def gather(self) -> None:
        """Put it together again, bit for bit. Every process has to call this."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        own = dict(self.base.named_parameters())
        for name, places in self.places.items():
            module, term = places[0]
            parameter, shard = own[name], module._parameters[term]
            assert isinstance(shard, DTensor)
            parameter.data = shard.full_tensor().to(parameter.device)
            twin = nn.Parameter(parameter.data, requires_grad=False)
            for module, term in places:
                module._parameters[term] = twin
        for buffer, device in self.buffers:
            buffer.data = buffer.data.to(device)
        for module, cls in self.classes.items():
            module.__class__ = cls
        self.parted = False


def _places(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of each of these parameters -> the modules that own it, and as what.

    FSDP2 takes no single numbers, nor what does not lie row by row; those stay whole.
    """
    first: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names and parameter.ndim and parameter.is_contiguous():
            path, _, term = name.rpartition(".")
            places = found.setdefault(first.setdefault(id(parameter), name), [])
            places.append((model.get_submodule(path), term))
    return found


def _units(model: nn.Module) -> list[nn.Module]:
    """Modules that gather their weights together, inner ones first: blocks that share none with others, the model."""
    owners = _owners(model)
    blocks = {block for found in find_blocks(model).values() for block in found}
    alone = {block for block in blocks if all(owners[key] == count for key, count in _owners(block).items())}
    return [*(module for module in reversed(list(model.modules())) if module in alone), model]


def _owners(model: nn.Module) -> Counter[int]:
    """Identity of each parameter -> how many modules own it."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
