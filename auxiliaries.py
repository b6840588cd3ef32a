"""Seeding, device selection, k-means and timers."""

import contextlib
import functools
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import faiss
import numpy as np
import torch

from support import processes
from support.errors import DivergedError, InputError, first_line
from support.output import log

LONGEST_SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Longest path, in bytes, of a temporary folder in which Python's processes can open sockets to each other."""

ACTIVITIES = ("loading", "training", "mining", "evaluation", "drawing")
"""Activities between which a run's time is split; loading is the time that training steps wait for their batches."""

AMPERE = (8, 0)
"""First compute capability with TF32 and bfloat16."""


def set_seeds(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices, and ask cuDNN for repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def random_states(device: torch.device) -> dict[str, object]:
    """Return the states of the generators of Python, NumPy, PyTorch and the GPU `device`: tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    """Set all random number generators to the states that random_states returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0], device)


def pick_device(gpu: int) -> torch.device:
    """Return CUDA device `gpu` and make it the current one, or return the CPU on a machine without a GPU.

    With several processes on a machine, each takes a GPU of its own, starting at `gpu`.

    Raises:
        InputError: there are too few GPUs, or the machine has one that this PyTorch cannot use.
    """
    # For a GPU that it cannot use, PyTorch prints a warning of several lines. If named_device raises its own one-line
    # error, drop that warning
    with warnings.catch_warnings(record=True) as held_back:
        device, name = named_device(gpu)
    for warning in held_back:
        warnings.warn(warning.message, stacklevel=2)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise pinned memory opens a context on GPU 0
    among = f", in {processes.world_size()} processes" if processes.world_size() > 1 else ""
    log.info(f"device: {name}{among}")
    return device


def named_device(gpu: int) -> tuple[torch.device, str]:
    """Return the device that pick_device selects, and its description for the log."""
    if not torch.cuda.is_available():
        why = why_no_gpu(reason_without_cuda(), listed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        return torch.device("cpu"), f"CPU ({why})"
    n_gpus = torch.cuda.device_count()
    if gpu + processes.local_world_size() > n_gpus:
        raise InputError(f"--gpu {gpu}: this machine has {n_gpus} GPU(s), numbered from 0; each process takes one")
    device = torch.device("cuda", gpu + processes.local_rank())
    name = torch.cuda.get_device_name(device)
    require_kernels(name, torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    return device, f"GPU {gpu}, {name}"


def reason_without_cuda() -> str:
    """Return the first line of PyTorch's reason for having no CUDA device."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        return first_line(error).rstrip(".")
    return "no CUDA device"


def listed_gpus() -> list[str]:
    """Return the GPUs that nvidia-smi lists, one line each; empty if the program is missing or fails."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in listed.splitlines() if line.startswith("GPU ")]


def why_no_gpu(reason: str, gpus: Sequence[str], visible: str | None) -> str:
    """Explain why a run is on the CPU.

    Args:
        reason: PyTorch's reason for having no CUDA device.
        gpus: GPUs that the driver lists, whether PyTorch can use them or not.
        visible: value of CUDA_VISIBLE_DEVICES; None if it is not set.

    Raises:
        InputError: there is a visible GPU, so the user would expect the run to use it.
    """
    setting = "" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
    # CUDA ignores all entries from the first invalid one on, such as -1, or NoDevFiles, which Slurm sets
    if setting and not re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return f"{setting} hides all GPUs"
    if gpus:
        name, under = gpus[0].split(" (UUID")[0], f" with {setting}" if setting else ""
        raise InputError(
            f"PyTorch {torch.__version__} cannot use {name}{under} ({reason}); "
            "to train on the CPU set CUDA_VISIBLE_DEVICES=''"
        )
    return f"no CUDA GPU found: {reason}"


def require_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """Check that this build of PyTorch has kernels for a GPU.

    The check is coarser than PyTorch's own: it also accepts integrated GPUs, such as Jetson's, that need a build for
    exactly their capability.

    Args:
        name: name of the GPU, for the message.
        capability: its compute capability, such as (8, 0).
        architectures: what PyTorch was built for, as torch.cuda.get_arch_list returns it. sm_80 runs on GPUs with the
            same major and the same or a higher minor version, compute_80 (PTX) on all later ones too. Other entries,
            such as those for AMD, are ignored; without any sm or compute entry nothing is checked.

    Raises:
        InputError: there are no kernels for it.
    """
    built = []
    for match in (re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]*", architecture) for architecture in architectures):
        if match:
            built.append((match[1], (int(match[2]), int(match[3]))))
    for kind, version in built:
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    if built:
        instead = "a newer build"
        if capability < min(version for _, version in built):
            instead = "a build for CUDA 12.6 (https://download.pytorch.org/whl/cu126; PyTorch up to 2.14)"
        raise InputError(
            f"{name}: PyTorch {torch.__version__} has no kernels for its compute capability {dotted(capability)}, only "
            f"for {' '.join(architectures)}; install {instead}, or to train on the CPU set CUDA_VISIBLE_DEVICES=''"
        )


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as NVIDIA writes it, such as 8.0."""
    return ".".join(map(str, capability))


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, such as (8, 0); None for the CPU and for AMD GPUs."""
    if device.type != "cuda" or torch.version.hip:  # AMD numbers its GPUs differently
        return None
    return torch.cuda.get_device_capability(device)


def lacking_precision(capability: tuple[int, int] | None, tf32: bool, amp: str) -> list[str]:
    """Return the precision flags that a device does not support, as they are typed.

    TF32 and bfloat16 came with compute capability 8.0. On older GPUs PyTorch emulates bfloat16, but fails when cuDNN
    finds no algorithm for it. CPUs and AMD GPUs support bfloat16.

    Args:
        capability: see compute_capability.
        tf32: the flag.
        amp: the flag: none, bf16 or fp16.
    """
    lacking = ["--tf32"] if tf32 and (capability is None or capability < AMPERE) else []
    return [*lacking, "--amp bf16"] if amp == "bf16" and capability is not None and capability < AMPERE else lacking


def require_precision(capability: tuple[int, int] | None, tf32: bool, amp: str, is_resumed: bool) -> None:
    """Check that a run's device supports its precision; see lacking_precision.

    The message for a new run says which flags to use instead; a resumed run needs a device that supports its precision.

    Raises:
        InputError: the device does not support it.
    """
    here = "but this device is not one" if capability is None else f"but this one has {dotted(capability)}"
    instead = {"--tf32": "leave it out", "--amp bf16": "give --amp fp16"}
    for flag in lacking_precision(capability, tf32, amp):
        what_to_do = "resume the run on such a GPU" if is_resumed else instead[flag]
        needed = "an NVIDIA GPU of compute capability 8.0 (Ampere) or higher"
        raise InputError(f"{flag}: needs {needed}, {here}; {what_to_do}")


def supported_precision(capability: tuple[int, int] | None, tf32: bool, amp: str) -> tuple[bool, str]:
    """Return the flags tf32 and amp for scoring a stored run. If the device lacks one, leave it out and log that."""
    lacking = lacking_precision(capability, tf32, amp)
    if lacking:
        tf32, amp = tf32 and "--tf32" not in lacking, "none" if "--amp bf16" in lacking else amp
        used = "float32" if amp == "none" else amp
        log.info(f"embedding in {used}: this device does not support the run's {' and '.join(lacking)}")
    return tf32, amp


def precision_hint(capability: tuple[int, int] | None, tf32: bool, amp: str) -> str | None:
    """Return a hint on how to train faster on this device; None if there is nothing to suggest."""
    if capability is None or capability < AMPERE or tf32 or amp != "none":
        return None
    return "hint: on this GPU --amp bf16 is usually faster than float32; --tf32 lies between them"


def set_precision(device: torch.device, tf32: bool, amp: str) -> None:
    """Switch TF32 on or off for all float32 products on the device, as PyTorch's default differs between operations.

    Log a warning if the CPU runs bfloat16 or float16 slower than float32.
    """
    if amp != "none" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
        log.warning(f"--amp {amp}: this CPU has no AVX-512, which makes it several times slower than float32")
    # These options also set PyTorch's newer fp32_precision. Setting fp32_precision alone would make these unreadable
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Multiply float32 matrices in full float32 precision within the block, even with --tf32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def n_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def n_workers(n_wanted: int) -> int:
    """Return the number of loader workers of this process: `n_wanted`, capped at its share of the machine's cores.

    Raises:
        InputError: workers are wanted, but the path of the temporary folder is too long for their sockets.
    """
    folder = tempfile.gettempdir()
    # With a longer path the workers would wait for each other forever
    if n_wanted and len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
        hint = "shorten it, or give --kernels 0"
        raise InputError(f"--kernels {n_wanted}: TMPDIR is too long a name for loader workers ({folder}); {hint}")
    return min(n_wanted, max(n_cores() // processes.local_world_size(), 1))


def kmeans(
    points: np.ndarray, n_clusters: int, seed: int, left_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster points with 20 iterations of faiss, without subsampling.

    Args:
        points: (N, D), converted to float32.
        n_clusters: number of clusters, at most the number of points that take part.
        seed: seed of the initial centres.
        left_out: (N,) bool, points that are excluded from the clustering and only assigned to the nearest centre; None:
            all points take part.

    Returns:
        Labels (N,) int64 in [0, n_clusters), some possibly unused, and the squared distances (N,) float32 of the points
        to their centres. Distances of the points that took part sum to the inertia; those of the others are NaN.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    taking_part = points if left_out is None or not left_out.any() else points[~left_out]
    every_point = {"min_points_per_centroid": 1, "max_points_per_centroid": len(taking_part)}
    clustering = faiss.Kmeans(points.shape[1], n_clusters, niter=20, seed=seed % 2**31, **every_point)
    n_threads = faiss.omp_get_max_threads()
    if processes.world_size() > 1:  # torchrun limits each process to one thread, but here the others wait
        faiss.omp_set_num_threads(n_cores())
    log.info(f"clustering {len(taking_part):,} points of {points.shape[1]:,} dimensions into {n_clusters:,}")
    clustering.train(taking_part)
    squared_distances, nearest = clustering.index.search(points, 1)
    faiss.omp_set_num_threads(n_threads)
    if left_out is not None:
        squared_distances[left_out] = np.nan
    return nearest[:, 0].astype(np.int64), squared_distances[:, 0]


def fill_gradients(parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Set missing gradients to zero for parameters that the optimiser has already updated.

    Adam skips parameters whose grad is None. The published code's PyTorch zeroed gradients instead, so momentum and
    weight decay kept acting on parameters that took no part in a step; reproduce that.
    """
    for parameter in parameters:
        if parameter.grad is None and parameter in optimizer.state:
            parameter.grad = torch.zeros_like(parameter)


def event_maker(device: torch.device) -> Callable[[], torch.cuda.Event] | None:
    """Return a function that makes events to time work on a GPU; None for the CPU, which has no queue."""
    return functools.partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else None


def recorded(new_event: Callable[[], torch.cuda.Event]) -> torch.cuda.Event:
    """Record a new event after all work that the GPU has been given so far."""
    event = new_event()
    event.record()
    return event


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process and its GPU in bytes; Windows does not report that of the process."""
    memory = {}
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        memory["process"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if device.type == "cuda":
        memory["GPU"] = float(torch.cuda.max_memory_allocated(device))
    return memory


class LossMeter:
    """Sum loss terms by name.

    The values stay on the device until `read`, so that training steps do not wait for them.

    Attributes:
        sums: sum of each term, over the values read so far.
        counts: number of values of each term read so far.
        pending: (step, term, value) not yet read.
    """

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.pending: list[tuple[str, str, torch.Tensor]] = []

    def add(self, step: str, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the scalar loss terms of one step; `step` describes it for messages."""
        self.pending += [(step, term, value.detach()) for term, value in terms.items()]

    def read(self) -> dict[str, str]:
        """Copy pending values to the host and return the running averages as text.

        Raises:
            DivergedError: a value is not finite.
        """
        values = torch.stack([value for *_, value in self.pending]).tolist() if self.pending else []
        for (step, term, _), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                hint = "try a lower --lr or lower --adv_weights; with --amp fp16, try bf16 or none instead"
                raise DivergedError(f"the {term} loss is {value} {step}: training has diverged; {hint}")
            self.sums[term] = self.sums.get(term, 0.0) + value
            self.counts[term] = self.counts.get(term, 0) + 1
        self.pending.clear()
        return {term: f"{total / self.counts[term]:.4g}" for term, total in self.sums.items()}

    def averages(self, n_steps: int, tasks: Sequence[str]) -> dict[str, float | None]:
        """Return the average losses of an epoch of n_steps steps; None for a loss that took no step.

        "Train Loss" averages all terms over all steps, each task's loss only over the task's own steps, and
        "Adversarial Loss" the adversarial terms over all steps.
        """
        row: dict[str, float | None] = {"Train Loss": sum(self.sums.values()) / n_steps if n_steps else None}
        for task in tasks:
            row[f"{task} Loss"] = self.sums[task] / self.counts[task] if task in self.sums else None
        adversarial = [total for term, total in self.sums.items() if term not in tasks]
        return row | {"Adversarial Loss": sum(adversarial) / n_steps if adversarial else None}


class Stopwatch:
    """Split the time of a run between activities.

    While an activity is measured within another one, time counts only for the inner one.

    Attributes:
        seconds: {activity: seconds so far}, plain values for a checkpoint.
        running: the current activity, if any.
        since: when it started, as time.perf_counter() counts.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.running: str | None = None
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time of the block for an activity."""
        outer = self.running
        self._turn_to(activity)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, activity: str | None) -> None:
        """Add the time up to now to the running activity, then switch to another one."""
        now = time.perf_counter()
        if self.running is not None:
            self.seconds[self.running] += now - self.since
        self.running, self.since = activity, now

    def loading(self, loader: Iterable, new_event: Callable[[], torch.cuda.Event] | None = None) -> Iterator:
        """Yield a loader's batches and count the time that training steps wait for them as loading.

        Args:
            loader: any iterable of batches.
            new_event: makes events of the GPU that the steps run on (see event_maker); None on the CPU.
        """
        if new_event:
            yield from self._loading_for_gpu(loader, new_event)
            return
        with self.measure("loading"):
            batches = iter(loader)
        while True:
            with self.measure("loading"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _loading_for_gpu(self, loader: Iterable, new_event: Callable[[], torch.cuda.Event]) -> Iterator:
        """Yield a loader's batches and count the time that the GPU is idle as loading.

        While the host waits for a batch, the GPU may still work on earlier steps. So measure on the GPU: from an event
        after these steps to an event recorded when the batch has arrived.
        """
        waits, start = [], recorded(new_event)
        for batch in loader:
            waits.append((start, recorded(new_event)))
            yield batch
            start = recorded(new_event)
        # All events have passed, because reading the losses of the last step waited for it
        seconds = sum(before.elapsed_time(after) for before, after in waits) / 1000
        self.seconds["loading"] += seconds
        if self.running is not None:  # _turn_to will add the whole time on the host to it, including these waits
            self.seconds[self.running] -= seconds
