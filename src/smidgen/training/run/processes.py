"""Processes: the copies of a run that share its batches, and all that they tell each other.

Their gradients are added up here, behind the last backward pass of a step, and not by DistributedDataParallel: what is
trained is small, processes may cut their shares of a batch into different numbers of micro-batches, a tensor that one
of them did not reach counts as zeros, and growth puts other tensors in the place of trained ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, distributed
from torch.distributed.fsdp import CPUOffloadPolicy

from smidgen.common.errors import SmidgenError, TrainError

Value = TypeVar("Value")
Item = TypeVar("Item")

BUCKET = 1 << 24  # values that are sent together: what is copied beside the gradients stays small
INSTEAD = (
    "what is trained is small and the base has no gradient, so no optimiser state is worth sharding: use data "
    "parallelism (accelerate launch --multi_gpu), or FSDP2 (--use_fsdp --fsdp_version 2) to shard the base"
)
REFUSED = {
    DistributedType.DEEPSPEED: ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
    DistributedType.MEGATRON_LM: ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
}


class Processes:
    """This process among those of a run.

    Attributes:
        rank, count: its number, from 0, and how many there are.
        main: whether it is the one that writes.
        sharded: whether each is to keep a part of the base, so that they compute together; see `ShardedBase`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Raises TrainError for a way to shard that `fit` does not have."""
        self.device = accelerator.device
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.sharded = _asks_fsdp2(accelerator) and self.count > 1

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What the main process makes, in all of them; also the error that it meets, so that none waits for it."""
        if self.count == 1:
            return make()
        found: list[tuple[Value | None, SmidgenError | None]] = [(None, None)]
        if self.main:
            found = [_tried(make)]
        broadcast_object_list(found)
        value, error = found[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def check_same(self, said: Mapping[str, str]) -> None:
        """Raises TrainError, in every process, if what they say of themselves differs: name -> something that tells."""
        if self.count == 1:
            return
        first, *others = gather_object([dict(said)])
        for rank, other in enumerate(others, 1):
            if wrong := [name for name in first if first[name] != other.get(name)]:
                raise TrainError(
                    f"process {rank} has another {wrong[0]} than process 0; load and draw the same in every process"
                )

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a sequence."""
        return [items[i] for i in range(self.rank, len(items), self.count)]

    def joined(self, mine: Sequence[Item]) -> list[Item]:
        """The parts of all processes, in the order of the sequence that was shared."""
        numbered = gather_object([(self.rank + k * self.count, item) for k, item in enumerate(mine)])
        return [item for _, item in sorted(numbered, key=lambda pair: pair[0])]

    def most(self, number: int) -> int:
        """The largest of a number over all processes."""
        found = torch.tensor(number, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        return self._summed(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each gradient becomes the sum over all processes, bit for bit the same in each of them.

        One that a process lacks counts as zeros; one that all lack stays None.
        """
        if self.count == 1:
            return
        reached = self.total(*(p.grad is not None for p in parameters))
        for bucket in _buckets(p for p, times in zip(parameters, reached, strict=True) if times):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self._summed(torch.cat([grad.flatten() for grad in grads]))
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Tensors hold what they hold in the main process."""
        if self.count > 1:
            for tensor in tensors:
                sent = tensor.detach().contiguous()
                distributed.broadcast(sent, src=0)
                tensor.detach().copy_(sent)

    def _summed(self, tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor)
        return tensor


def accelerator_of() -> Accelerator:
    """Accelerate's, as the script was launched.

    Raises:
        TrainError: to work together in a way that `fit` does not have. Asked of the launcher's variables too: on a CPU
            Accelerate passes over some, and for others it wants packages that would be of no use.
    """
    for name, variable in REFUSED.values():
        if _launched(variable):
            raise TrainError(f"{name} is not supported; {INSTEAD}")
    accelerator = Accelerator()
    if accelerator.distributed_type in REFUSED:
        raise TrainError(f"{REFUSED[accelerator.distributed_type][0]} is not supported; {INSTEAD}")
    return accelerator


def _asks_fsdp2(accelerator: Accelerator) -> bool:
    """Whether the base is to be sharded. On a CPU only the launcher's variables say so."""
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None and not _launched("ACCELERATE_USE_FSDP"):
        return False
    version = int(os.environ.get("FSDP_VERSION", "1")) if plugin is None else plugin.fsdp_version
    if version != 2:
        raise TrainError(
            f"FSDP of version {version} is not supported, as it joins what is trained and what is frozen into one flat "
            "tensor; launch with --fsdp_version 2"
        )
    if _launched("FSDP_OFFLOAD_PARAMS") if plugin is None else isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise TrainError("FSDP2 with shards in the host's memory is not supported; leave --fsdp_offload_params out")
    return True


def _launched(variable: str) -> bool:
    """Whether the launcher has set a variable to true."""
    return os.environ.get(variable, "false").lower() == "true"


def _tried(make: Callable[[], Value]) -> tuple[Value | None, SmidgenError | None]:
    try:
        return make(), None
    except SmidgenError as error:
        return None, error


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of no more than `BUCKET` values if there are several."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        size = sum(p.numel() for p in bucket) + parameter.numel()
        if bucket and (size > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
