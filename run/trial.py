"""What a trial of a run's flags says: speeds, memory, disk, and how long the whole run will take."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from support.output import clock

SHEET_BYTES, PICTURE_BYTES = 200_000, 5_000_000
"""About what the contact sheet of a mining takes on the disk, and all other pictures, logs and the page together."""


@dataclass(frozen=True)
class Trial:
    """What was measured, in seconds where no unit is named.

    start: until training could begin. step: a training step. batch_size: images of a step. embedding: images a second.
    clustering: of the training images. scoring: of embeddings, on all test sets, with the probe. storing: a checkpoint
    to go on with. drawing: after an evaluation. checkpoint_bytes: of the checkpoint to go on with and of the network.
    """

    start: float
    step: float
    batch_size: int
    embedding: float
    clustering: float
    scoring: float
    storing: float
    drawing: float
    checkpoint_bytes: tuple[int, int]

    def parts(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the seconds of a whole run by activity.

        counts: epochs, steps (of all epochs), evaluations, minings, and the images of train and test.
        """
        evaluation = counts["test"] / self.embedding + self.scoring
        return {
            "training": counts["steps"] * self.step,
            "evaluation": (counts["evaluations"] + 1) * evaluation,  # one of them before training
            "mining": counts["minings"] * (counts["train"] / self.embedding + self.clustering),
            "drawing": counts["evaluations"] * self.drawing,
            "start and checkpoints": self.start + (counts["epochs"] + counts["evaluations"] / 2) * self.storing,
        }

    def lines(self, counts: Mapping[str, int], n_test_sets: int, device: torch.device) -> list[str]:
        """Return what to print of the trial, a line each; see parts."""
        parts = self.parts(counts)
        last, best = self.checkpoint_bytes
        disk = last + n_test_sets * best + counts["minings"] * SHEET_BYTES + PICTURE_BYTES
        unit = 1 if sys.platform == "darwin" else 1024
        own, worker = (unit * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        memory = f"this process {gigabytes(own)}, a loader worker {gigabytes(worker)}"
        if device.type == "cuda":
            memory = f"GPU {gigabytes(torch.cuda.max_memory_allocated(device))}, {memory}"
        return [
            f"training: {self.batch_size / self.step:,.0f} images/s, {counts['steps'] / counts['epochs']:,.0f} steps an epoch",
            f"embedding: {self.embedding:,.0f} images/s",
            f"mining: {self.clustering:.1f} s to cluster {counts['train']:,} images, after embedding them",
            f"evaluation: {self.scoring:.1f} s to score {counts['test']:,} images, after embedding them; drawing "
            f"{self.drawing:.1f} s",
            f"checkpoint: {self.storing:.1f} s",
            f"peak memory: {memory}",
            f"disk: {gigabytes(disk)} for the run folder",
            f"whole run: {counts['epochs']} epochs, {clock(sum(parts.values()))} h, of these "
            + ", ".join(f"{activity} {clock(seconds)}" for activity, seconds in parts.items()),
        ]


def gigabytes(n_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{n_bytes / 1e9:.2f} GB"
