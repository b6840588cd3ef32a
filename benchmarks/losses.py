"""Time one loss step, forward and backward, against pytorch-metric-learning, side by side in one run.

    pip install pytorch-metric-learning
    python benchmarks/losses.py [--sizes 112 512 2048] [--dim 128] [--seconds 2]

Both libraries get the same L2-normalised embeddings, 4 images per class; rounds alternate between them, and the median
is printed. `growth` is the time relative to the smallest batch. The pairs: margin loss with distance-weighted sampling
(ours one triplet per anchor, theirs as many per anchor as its class has images; their upper cut-off of distances is set
to 2.1, that is, off), triplet loss with semihard sampling (ours one triplet per anchor, theirs all semihard triplets),
and ProxyNCA with one proxy per class, which has no sampler.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses as ours

IMAGES_PER_CLASS = 4


def our_step(
    name: str, sampling: str, n_classes: int, dim: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return our loss as a function of embeddings (B, D) and labels (B,)."""
    return ours.build_loss(
        name,
        sampling,
        n_classes=n_classes,
        embed_size=dim,
        margin=0.2,
        beta=1.2,
        beta_lr=5e-4,
        nu=0.0,
        proxy_lr=1e-5,
    ).to(device)


def their_step(name: str, n_classes: int, dim: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return pytorch-metric-learning's counterpart as a function of embeddings (B, D) and labels (B,)."""
    from pytorch_metric_learning import losses as theirs
    from pytorch_metric_learning import miners

    if name == "proxynca":
        return theirs.ProxyNCALoss(n_classes, dim).to(device)
    if name == "triplet":
        loss, miner = theirs.TripletMarginLoss(margin=0.2), miners.TripletMarginMiner(0.2, "semihard")
    else:
        loss = theirs.MarginLoss(margin=0.2, beta=1.2, learn_beta=True, num_classes=n_classes)
        miner = miners.DistanceWeightedMiner(nonzero_loss_cutoff=2.1)
    loss.to(device)

    def step(embeddings: Tensor, labels: Tensor) -> Tensor:
        return loss(embeddings, labels, miner(embeddings, labels))

    step.parameters = loss.parameters
    return step


def time_steps(steps: list[nn.Module], embeddings: Tensor, labels: Tensor, seconds: float) -> list[float]:
    """Return the median milliseconds of each step; rounds alternate between the steps for `seconds` each."""

    def once(step: nn.Module) -> float:
        for parameter in [embeddings, *step.parameters()]:
            parameter.grad = None
        synchronise(embeddings)
        start = time.perf_counter()
        step(embeddings, labels).backward()
        synchronise(embeddings)
        return 1e3 * (time.perf_counter() - start)

    durations: list[list[float]] = [[] for _ in steps]
    for step in steps * 3:
        once(step)
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(durations[0]) < 5:
        for step, kept in zip(steps, durations):
            kept.append(once(step))
    return [statistics.median(kept) for kept in durations]


def synchronise(tensor: Tensor) -> None:
    """Wait for the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def make_batch(size: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return L2-normalised embeddings (B, D), spread around their classes, and labels (B,), 4 images per class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size // IMAGES_PER_CLASS).repeat_interleave(IMAGES_PER_CLASS)
    centres = torch.randn(size // IMAGES_PER_CLASS, dim, generator=generator)
    embeddings = normalize(centres[labels] + torch.randn(size, dim, generator=generator), dim=1)
    return embeddings.to(device).requires_grad_(), labels.to(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 512, 2048], help="batch sizes")
    parser.add_argument("--dim", type=int, default=128, help="embedding dimensions")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per entry and library")
    args = parser.parse_args()
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        parser.error("needs the package pytorch-metric-learning: pip install pytorch-metric-learning")
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, D = {args.dim}")
    print(f"{'device':6} {'loss':10} {'sampling':9} {'B':>5} {'ours ms':>8} {'theirs ms':>9} {'ours/theirs':>11}"
          f" {'growth ours':>11} {'growth theirs':>13}")  # fmt: skip
    for device in devices:
        for name, sampling in (("marginloss", "distance"), ("triplet", "semihard"), ("proxynca", "-")):
            smallest = None
            for size in args.sizes:
                n_classes = size // IMAGES_PER_CLASS
                steps = [
                    our_step(name, sampling, n_classes, args.dim, device),
                    their_step(name, n_classes, args.dim, device),
                ]
                mine, theirs = time_steps(steps, *make_batch(size, args.dim, device), args.seconds)
                smallest = smallest or (mine, theirs)
                print(f"{device.type:6} {name:10} {sampling:9} {size:5} {mine:8.2f} {theirs:9.2f} {mine / theirs:11.2f}"
                      f" {mine / smallest[0]:11.1f} {theirs / smallest[1]:13.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
