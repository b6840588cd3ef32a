"""Several processes started by torchrun: who is first, who takes which share, and what they exchange.

Without torchrun every function here does nothing or returns its argument.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be clustering or decoding."""

Computed = TypeVar("Computed")


def launched() -> int:
    """Return how many processes torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() > 1 else 1


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def is_first() -> bool:
    """Tell whether this process is the one that prints and writes files."""
    return launched() == 1 or os.environ["RANK"] == "0"


def count() -> int:
    """Return the number of connected processes."""
    return distributed.get_world_size() if launched() > 1 and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number among the connected ones, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def end_with(owner: int, signum: int) -> None:
    """Let Linux send this process a signal when its parent, whose id is `owner`, has died, even if it was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
        if os.getppid() != owner:  # it died before
            signal.raise_signal(signum)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the processes, over NCCL for GPUs and Gloo for CPUs; only the first one prints."""
    if launched() == 1:
        yield
        return
    end_with(os.getppid(), signal.SIGTERM)  # torchrun
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - libraries write to it up to the end
    with contextlib.redirect_stdout(sys.stdout if is_first() else nowhere):
        yield
    distributed.destroy_process_group()  # not after an error: it would wait for the others


def own_share(n_items: int, block_size: int = 1) -> range:
    """Return this process's run of n_items in whole blocks; the shares of all processes, in order, are all items."""
    n_blocks = -(-n_items // block_size)
    first, last = (n_blocks * number // count() for number in (rank(), rank() + 1))
    return range(first * block_size, min(last * block_size, n_items))


def computed_by_first(compute: Callable[[], Computed]) -> Computed:
    """Return, on all processes, what `compute` returns on the first one; the others wait for it."""
    if count() == 1:
        return compute()
    box = [compute() if is_first() else None]
    distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def from_all(value: Computed) -> list[Computed]:
    """Return the value of every process, on all processes."""
    values = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process of each machine run a block, then the others, who find its files."""
    if local_rank() > 0:
        from_all(None)
    yield
    if local_rank() == 0:
        from_all(None)


def gather_rows(rows: np.ndarray, everywhere: bool = True) -> np.ndarray | None:
    """Return the rows of all processes in order, (n, D) of each to (N, D), or (n,) to (N,).

    A process without rows may give any D. everywhere: False leaves them to the first process, and None to the others.
    """
    if count() == 1:
        return rows  # without a copy
    if everywhere:
        parts = from_all(rows)
    else:
        parts = [None] * count() if is_first() else None
        distributed.gather_object(rows, parts)
        if parts is None:
            return None
    return np.concatenate([part for part in parts if len(part)] or [rows])


class GatherShares(torch.autograd.Function):
    """Concatenates the shares of a batch that the processes embedded, with gradient.

    Each process computes the same loss of the whole batch, so its own share's gradient needs nothing from the others.
    It is multiplied by the number of processes, which DistributedDataParallel's mean takes out again: the gradient of
    the weights is the sum over the images of the batch, as in one process.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, share: Tensor) -> Tensor:
        """Return (B, ...) from the (B / count, ...) of each process."""
        ctx.n_rows = len(share)
        batch = share.new_empty(count() * len(share), *share.shape[1:])
        distributed.all_gather(list(batch.chunk(count())), share.contiguous())
        return batch

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Return the own share of the gradient, times the number of processes."""
        start = rank() * ctx.n_rows
        return count() * gradient[start : start + ctx.n_rows]


def gather_batch(embeddings: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return embeddings {name: (B, D)} and labels (B,) of the whole batch from each process's share of it."""
    if count() == 1:
        return dict(embeddings), labels
    return {name: GatherShares.apply(values) for name, values in embeddings.items()}, GatherShares.apply(labels)


def share_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give all processes the first one's gradients of parameters whose gradient each computes from the whole batch.

    They are equal but for the order in which a GPU adds up; the parameters must stay equal to the last bit.
    """
    for parameter in parameters:
        if count() > 1 and parameter.grad is not None:
            distributed.broadcast(parameter.grad, 0)
