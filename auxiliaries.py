"""Small tools without a subject: seeds and random states, device, k-means, clocks."""

import contextlib
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import faiss
import numpy as np
import torch

from support import processes
from support.errors import DivergedError, InputError
from support.output import said_each_minute

ACTIVITIES = ("loading", "training", "mining", "evaluation", "drawing")
"""What a run's time is split into; loading is the time that the training steps wait for their batches."""


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) and ask cuDNN for repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def random_states(device: torch.device) -> dict[str, object]:
    """Return the states of all random number generators as plain values. device: the one that the run draws on."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    """Continue all random number generators from these random_states, on this device."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0], device)


def pick_device(gpu: int) -> torch.device:
    """Return CUDA device `gpu` and make it the current one, or return the CPU where there is no CUDA.

    Of several processes on a machine each takes a GPU, from `gpu` on. Raises InputError where there are not as many.
    """
    among = f", in {processes.world_size()} processes" if processes.world_size() > 1 else ""
    if not torch.cuda.is_available():
        print(f"device: CPU (no CUDA GPU found){among}")
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if gpu + processes.local_world_size() > n_gpus:
        raise InputError(f"--gpu {gpu}: this machine has {n_gpus} GPU(s), numbered from 0; each process takes one")
    device = torch.device("cuda", gpu + processes.local_rank())
    torch.cuda.set_device(device)  # else pinned memory opens a context on GPU 0
    print(f"device: GPU {gpu}, {torch.cuda.get_device_name(device)}{among}")
    return device


def set_precision(device: torch.device, tf32: bool, amp: str) -> None:
    """Let float32 products on the device round to TF32, or not, be it PyTorch's default as for convolutions.

    Warns of a CPU that runs bfloat16 slower than float32. Raises InputError where the device has no TF32.
    """
    if amp != "none" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
        print(f"warning: --amp {amp}: this CPU has no AVX-512, which makes it several times slower than float32")
    if tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        needed = "an NVIDIA GPU of compute capability 8.0 (Ampere) or higher"
        raise InputError(f"--tf32: needs {needed}; leave it out, or resume a run that has it on such a GPU")
    # These two keep PyTorch's newer fp32_precision settings in step; setting those leaves these unreadable
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever --tf32 allows elsewhere."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def n_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def n_workers(most: int) -> int:
    """Return how many loader workers this process starts: its share of `most`, at most one per core."""
    return max(min(most, n_cores()) // processes.local_world_size(), min(most, 1))


def kmeans(
    points: np.ndarray, n_clusters: int, seed: int, n_iterations: int = 20, left_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster points with faiss, without subsampling.

    Args:
        points: (N, D), made float32.
        n_clusters: at most as many as points take part.
        left_out: (N,) bool, points that only get the label of the nearest centre; None: all take part.

    Returns:
        Labels (N,) int64 in [0, n_clusters), some possibly unused, and the squared distances (N,) float32 of the points
        to their centres. The distances of points that took part sum to the inertia; those of the others are NaN.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    taking_part = points if left_out is None else points[~left_out]
    every_point = {"min_points_per_centroid": 1, "max_points_per_centroid": len(taking_part)}
    clustering = faiss.Kmeans(points.shape[1], n_clusters, niter=n_iterations, seed=seed % 2**31, **every_point)
    n_threads = faiss.omp_get_max_threads()
    if processes.world_size() > 1:  # torchrun allows each process one thread, and the others wait for this one
        faiss.omp_set_num_threads(n_cores())
    with said_each_minute(f"clustering {len(points):,} points into {n_clusters:,}"):
        clustering.train(taking_part)
        squared_distances, nearest = clustering.index.search(points, 1)
    faiss.omp_set_num_threads(n_threads)
    if left_out is not None:
        squared_distances[left_out] = np.nan
    return nearest[:, 0].astype(np.int64), squared_distances[:, 0]


def fill_gradients(parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that took no part in a step a gradient of zero, not None, once they have been trained.

    So it was under the published code's PyTorch: Adam's momentum and weight decay move them on.
    """
    for parameter in parameters:
        if parameter.grad is None and parameter in optimizer.state:
            parameter.grad = torch.zeros_like(parameter)


def seconds_since(start: float) -> float:
    """Return the seconds since a time of time.monotonic(), as logs hold them."""
    return round(time.monotonic() - start, 2)


class LossMeter:
    """Sums loss terms by name; the values stay on the device until `read`, so that a step never waits for them.

    sums, counts: of each term, as far as they were read.
    """

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.pending: list[tuple[str, str, torch.Tensor]] = []

    def add(self, step: str, terms: Mapping[str, torch.Tensor]) -> None:
        """Take the scalar terms of one step. step: in words, for messages."""
        self.pending += [(step, term, value.detach()) for term, value in terms.items()]

    def read(self) -> dict[str, str]:
        """Copy what is pending to the host and return the running averages as text.

        Raises DivergedError for a value that is not finite.
        """
        values = torch.stack([value for *_, value in self.pending]).tolist() if self.pending else []
        for (step, term, _), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                hint = "try a lower --lr, lower --adv_weights, or in place of --amp fp16 bf16 or none"
                raise DivergedError(f"the {term} loss is {value} {step}: training has diverged; {hint}")
            self.sums[term] = self.sums.get(term, 0.0) + value
            self.counts[term] = self.counts.get(term, 0) + 1
        self.pending.clear()
        return {term: f"{total / self.counts[term]:.4g}" for term, total in self.sums.items()}

    def averages(self, n_steps: int, tasks: Sequence[str], directions: Sequence[str]) -> dict[str, float | None]:
        """Return the row of an epoch of n_steps steps: the average of all terms over all steps, that of each task over
        its own, that of the adversarial terms over all; None for what took no step."""
        row: dict[str, float | None] = {"Train Loss": sum(self.sums.values()) / n_steps if n_steps else None}
        for task in tasks:
            row[f"{task} Loss"] = self.sums[task] / self.counts[task] if task in self.sums else None
        adversarial = [total for term, total in self.sums.items() if term in directions]
        return row | {"Adversarial Loss": sum(adversarial) / n_steps if adversarial else None}


class Stopwatch:
    """Splits the time of a run between activities; what is measured within another activity counts for the inner one.

    seconds: activity to seconds so far, plain values for a checkpoint.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.running: str | None = None
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the block for an activity."""
        outer = self.running
        self._turn_to(activity)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, activity: str | None) -> None:
        """Count the time up to now for what was running, and from now on for another activity."""
        now = time.perf_counter()
        if self.running is not None:
            self.seconds[self.running] += now - self.since
        self.running, self.since = activity, now

    def loading(self, loader: Iterable) -> Iterator:
        """Yield a loader's batches; the time that is spent waiting for them counts as loading."""
        with self.measure("loading"):
            batches = iter(loader)
        while True:
            with self.measure("loading"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
