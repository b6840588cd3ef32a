"""Several processes started by torchrun: ranks, shards, and communication.

Without torchrun there is one process, rank 0, and communication returns its argument.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be clustering or decoding."""

TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
"""Environment variables in which srun, mpirun and other launchers give the number of tasks they started."""

Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return this process's number among all processes, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def n_machines() -> int:
    """Return the number of machines."""
    return world_size() // local_world_size()


def is_first() -> bool:
    """Tell whether this process is the one that prints and writes files."""
    return rank() == 0


def warning_of_other_tasks() -> str | None:
    """Return a warning if another launcher than torchrun started several tasks, which would each train a run."""
    n_tasks = {name: os.environ[name] for name in TASK_COUNTS if os.environ.get(name) not in (None, "", "0", "1")}
    if "TORCHELASTIC_RUN_ID" in os.environ or not n_tasks:
        return None
    name, n = next(iter(n_tasks.items()))
    return (
        f"{name}={n}, but torchrun started none of these tasks: each trains a run of its own; "
        "one run in several processes is started with torchrun, see docs/distributed.md"
    )


def die_with_parent(parent: int, signum: int) -> None:
    """On Linux, let the system send this process a signal when its parent dies, however that ends.

    Args:
        parent: process id of the parent.
        signum: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has already died
            signal.raise_signal(signum)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the processes, with NCCL for GPUs and Gloo for CPUs. Each ends when its parent, torchrun, dies."""
    if world_size() == 1:
        yield
        return
    has_gpu = torch.cuda.is_available()
    # A process waiting in NCCL does not react to SIGTERM, and would hold its GPU until TIMEOUT
    die_with_parent(os.getppid(), signal.SIGKILL if has_gpu else signal.SIGTERM)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield
    distributed.destroy_process_group()  # not after an error, as it would wait for the others


def shard(n_items: int, block_size: int = 1) -> range:
    """Return this process's range of n_items, in whole blocks; all shards in order cover all items."""
    n_blocks = -(-n_items // block_size)
    first, last = (n_blocks * number // world_size() for number in (rank(), rank() + 1))
    return range(first * block_size, min(last * block_size, n_items))


def broadcast(value: Value) -> Value:
    """Broadcast rank 0's value; the arguments of other ranks are ignored."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def all_gather(value: Value) -> list[Value]:
    """Return the values of all processes, on every process."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others, which find its files."""
    if local_rank() > 0:
        all_gather(None)
    yield
    if local_rank() == 0:
        all_gather(None)


def gather_rows(rows: np.ndarray, to_all: bool = True) -> np.ndarray | None:
    """Concatenate the rows of all processes in order, (n, D) of each to (N, D), or (n,) to (N,).

    Args:
        rows: rows of this process; if there are none, D may be anything.
        to_all: whether all processes get the result; False: the first process gets it, the others None.
    """
    if world_size() == 1:
        return rows  # without a copy
    if to_all:
        parts = all_gather(rows)
    else:
        parts = [None] * world_size() if is_first() else None
        distributed.gather_object(rows, parts)
    if parts is None:
        return None
    return np.concatenate([part for part in parts if len(part)] or [rows])


class GatherShards(torch.autograd.Function):
    """Concatenate the shards of a batch that the processes embedded, with gradient.

    Each process computes the same loss of the whole batch, so the gradient of its shard needs nothing from the others.
    DistributedDataParallel averages over processes; the factor world_size cancels that, so that weights get the sum
    over the batch's images, as in one process.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, shard: Tensor) -> Tensor:
        """Return (B, ...) from the (B / world_size, ...) of each process."""
        ctx.n_rows = len(shard)
        batch = shard.new_empty(world_size() * len(shard), *shard.shape[1:])
        distributed.all_gather(list(batch.chunk(world_size())), shard.contiguous())
        return batch

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Return this process's shard of the gradient, times the number of processes."""
        start = rank() * ctx.n_rows
        return world_size() * gradient[start : start + ctx.n_rows]


def gather_batch(embeddings: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return embeddings {name: (B, D)} and labels (B,) of the whole batch, given each process's shard of it."""
    if world_size() == 1:
        return dict(embeddings), labels
    return {name: GatherShards.apply(values) for name, values in embeddings.items()}, GatherShards.apply(labels)


def share_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients of parameters by those of the first process.

    It is for parameters whose gradients every process computes from the whole batch. GPUs add up in no fixed order, so
    these gradients may differ in the last bits, but the parameters must stay identical.
    """
    for parameter in parameters:
        if world_size() > 1 and parameter.grad is not None:
            distributed.broadcast(parameter.grad, 0)
