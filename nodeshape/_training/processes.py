"""The processes of one run, started by torchrun: which one this is, its share of a batch, and sums over all of them.

Every process holds the whole model and takes a share of every batch, so that a run computes the same with any number of
them: gradients are summed, and batch normalisation takes the mean and variance of the whole batch.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nodeshape._errors import UserError
from nodeshape._models.norm import PooledNorm, SharedBatchNorm

T = TypeVar("T")

#: Models over several processes, until the process ends. Of the last that goes, the process group waits for gloo's
#: thread while it holds the lock of Python's interpreter, for which that thread may be waiting to let go of a tensor.
_parallel: list[DistributedDataParallel] = []


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0. Process 0 alone prints and writes.
        count: of all processes.
        local_rank: of this process among those of its machine.
        local_count: processes on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """As the environment variables of torchrun, or of whatever else starts the processes, say.

        ``RANK`` and ``WORLD_SIZE`` make several processes; ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``, which not all that
        start one process per machine give, default to those of a process that is alone on its machine.

        Raises:
            UserError: they contradict each other, or do not say where process 0 is.
        """
        if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
            return cls()
        defaults = {"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        found = {name: os.environ.get(name, default) for name, default in defaults.items()}
        said = ", ".join(f"{name}={text}" for name, text in found.items() if text is not None)
        unless = "; start several processes by torchrun, or unset these variables for one"
        numbers = [int(text) for text in found.values() if text is not None and text.isdecimal()]
        if len(numbers) < len(found):
            raise UserError(f"{said}: expected whole numbers for each of RANK and WORLD_SIZE{unless}")
        rank, count, local_rank, local_count = numbers
        if not (rank < count and local_rank < local_count <= count):
            raise UserError(f"{said}: a rank must be below its count{unless}")
        if count > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(f"{said}: MASTER_ADDR and MASTER_PORT must say where process 0 is{unless}")
        return cls(rank, count, local_rank, local_count)

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that starts a run like this one, up to ``-m``."""
        return "python" if self.count == 1 else f"torchrun --nproc-per-node={self.local_count}"

    def let_the_first_speak(self, seconds: float = 60) -> None:
        """Wait for the machine's first process, which fails alike, to say why and end: torchrun then ends this one.

        Returns at once in the first, and after ``seconds`` where the first has not ended: then this one must say it.
        """
        if self.local_rank > 0:
            time.sleep(seconds)

    def connect(self, device: torch.device) -> None:
        """Meet the other processes: over gloo for tensors in memory, over nccl for those on ``device``, if a GPU."""
        if self.count > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group()

    def disconnect(self) -> None:
        """Part from the others, who may go on or end."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, ``[n]`` to about ``[n / count]``, possibly empty."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def of_the_first(self, item: T) -> T:
        """What process 0 has as ``item``."""
        items = [item]
        if self.count > 1:
            dist.broadcast_object_list(items)
        return items[0]

    def union(self, items: set[T]) -> set[T]:
        """Everything that is in ``items`` of any process."""
        everyones = [items]
        if self.count > 1:
            everyones *= self.count
            dist.all_gather_object(everyones, items)
        return set().union(*everyones)

    def parallel(self, model: nn.Module) -> nn.Module:
        """A module that computes what ``model`` does and averages the gradients of its parameters over the processes.

        Batch normalisation in ``model`` is made to see the whole batch.
        """
        if self.count == 1:
            return model
        for module in list(model.modules()):
            if isinstance(module, PooledNorm):
                module.shared = True
            for name, layer in module.named_children():
                if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    setattr(module, name, SharedBatchNorm.of(layer))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of PyTorch have another name for it
            _parallel.append(DistributedDataParallel(model, broadcast_buffers=False))
        return _parallel[-1]


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End this process with what is inside, sparing it the interpreter's own end.

    Gloo's threads outlive their process group where DistributedDataParallel has used it. One that lets go of its last
    tensor when the interpreter is gone aborts the process, however well all went (pytorch/pytorch#179291).
    """
    code: object = None
    try:
        yield
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another process can no longer be reached."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))
