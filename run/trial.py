"""A trial of a run's flags: when the rate of the steps has settled, and what the whole run will take."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from support import processes
from support.errors import counted
from support.output import Progress, clock

DRAWING_SHARE = 0.03
"""Share of a run's time up to which its plots are drawn anew after every evaluation."""


class Settled(Exception):
    """The rate of the training steps has settled."""


class StepTimer(Progress):
    """The progress of training steps whose rate is measured; it ends them with Settled.

    seconds: of an image, between every two looks at the losses. The first ones, with compilation and the workers'
    start, do not count; the rate has settled when two in succession differ by less than a tenth.
    """

    def __init__(self):
        super().__init__("trial", 0)
        self.seconds: list[float] = []
        self.n_before, self.before = 0, time.perf_counter()

    def show(self, values: Mapping[str, str]) -> None:
        """Take the time since the last look at the losses."""
        now = time.perf_counter()
        self.seconds.append(processes.broadcast((now - self.before) / (self.n_done - self.n_before)))
        self.n_before, self.before = self.n_done, now
        print(f"trial: {1 / self.seconds[-1]:,.0f} images/s in training")
        if len(self.seconds) > 2 and abs(self.seconds[-1] / self.seconds[-2] - 1) < 0.1:
            raise Settled


def seconds_by_activity(seconds: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Return how long a whole run takes, by activity.

    seconds: start, until training can begin; training and embedding, of an image; mining and evaluation, once, without
    embedding; drawing, after an evaluation; storing, a checkpoint. counts: how many epochs, trained (images in all
    steps), evaluations, minings, and images in train and test.
    """
    parts = {
        "training": counts["trained"] * seconds["training"],
        "evaluation": (counts["evaluations"] + 1) * (counts["test"] * seconds["embedding"] + seconds["evaluation"]),
        "mining": counts["minings"] * (counts["train"] * seconds["embedding"] + seconds["mining"]),
        "all else": seconds["start"] + (counts["epochs"] + 1) * seconds["storing"],
    }
    # Plots are drawn after each evaluation up to a share of the run, and after each mining
    most = DRAWING_SHARE * sum(parts.values()) + (counts["minings"] + 1) * seconds["drawing"]
    return parts | {"drawing": min(counts["evaluations"] * seconds["drawing"], most)}


def report_lines(
    seconds: Mapping[str, float], counts: Mapping[str, int], folder: Path, device: torch.device
) -> list[str]:
    """Return what a trial found, a line each; see seconds_by_activity. folder: of the trial, with all its files."""
    parts, per_epoch = seconds_by_activity(seconds, counts), counts["trained"] / counts["epochs"]
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    n_bytes = sum(sizes.values()) + sum(sizes[path] for path in folder.glob("mined/*")) * (counts["minings"] - 1)
    memory = f"this process {gigabytes(peak_memory())}"
    if device.type == "cuda":
        memory = f"GPU {gigabytes(torch.cuda.max_memory_allocated(device))}, {memory}"
    return [
        f"training: {1 / seconds['training']:,.0f} images/s, {per_epoch:,.0f} images an epoch",
        f"embedding: {1 / seconds['embedding']:,.0f} images/s",
        f"mining: {seconds['mining']:.1f} s, embedding {counts['train']:,} images apart",
        f"evaluation: {seconds['evaluation']:.1f} s, embedding {counts['test']:,} images apart; drawing "
        f"{seconds['drawing']:.1f} s",
        f"peak memory: {memory}",
        f"disk: {gigabytes(n_bytes)} for the run folder",
        f"whole run: {clock(sum(parts.values()))} for {counted(counts['epochs'], 'epoch')} ("
        + ", ".join(f"{activity} {clock(value)}" for activity, value in parts.items())
        + ")",
    ]


def peak_memory() -> float:
    """Return the most bytes of memory that this process has had; NaN on Windows, which has no getrusage."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gigabytes(n_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{n_bytes / 1e9:.2f} GB"
