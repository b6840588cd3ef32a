"""Images per second of main's whole training iteration against the bare backbone, side by side in one run.

    python benchmarks/training.py [--settings plain bf16 compile] [--img_size 64] [--bs 112] [--rounds 5] [--steps 10]

Ours is main.train_one_epoch itself on ResNet50: loading (images in memory, random crops, workers as main has them),
both tasks' steps, samplers, margin losses, the adversarial term and Adam. Bare is torchvision's ResNet50 without its
classifier on one normalised float32 batch that lies in memory on the device: forward, the mean square of the output,
backward, the same fused Adam; in PyTorch's default memory format and in channels_last, which ours always has. Batch
size, precision, compilation and BatchNorm (frozen, as with pretrained weights) are the same. Rounds alternate between
the three. The table gives the median rates over the rounds, and the median of the ratios within each round. cuDNN is
asked for deterministic algorithms in ours only, as main does.

Settings: plain is float32, tf32 the same with --tf32, bf16 and fp16 are autocast, compile is torch.compile with bf16.
Images have 224 pixels on a GPU, 64 without one. At the end a profile shows how the time of our step is split between
its parts. It is taken by a loader, a network and a scaler that note the time (CUDA events on a GPU). `losses` is the
forward and backward time of samplers, losses and the adversarial term.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import auxiliaries
import datasets
import losses
import main as program
import netlib
from data.images import ImageSet
from run import options
from support.output import Progress

SETTINGS = {
    "plain": [],
    "tf32": ["--tf32"],
    "bf16": ["--amp", "bf16"],
    "fp16": ["--amp", "fp16"],
    "compile": ["--amp", "bf16", "--compile"],
}
BARE = {"bare": torch.contiguous_format, "bare c.l.": torch.channels_last}
PARTS = ("network forward", "network backward", "losses", "optimiser", "loading", "transfer", "rest")
N_CLASSES, N_CLUSTERS, PER_CLASS = 100, 30, 10


class Marks:
    """Times at which the parts of a step end, by the device's own clock.

    The loader, the network and the scaler that train_one_epoch is given add them.

    Attributes:
        moments: (part, time or CUDA event at which it ended), in order.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moments: list[tuple[str, float | torch.cuda.Event]] = []

    def add(self, part: str) -> None:
        """Note that a part ends now."""
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
        else:
            moment = time.perf_counter()
        self.moments.append((part, moment))

    def shares(self) -> dict[str, float]:
        """Return the share of each part in the time between the first and the last moment."""
        synchronise(self.device)
        totals: dict[str, float] = {}
        for (_, start), (part, end) in zip(self.moments, self.moments[1:]):
            seconds = end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
            totals[part] = totals.get(part, 0.0) + seconds
        return {part: seconds / sum(totals.values()) for part, seconds in totals.items()}

    def loading(self, loader: Iterable) -> Iterator:
        """Yield a loader's batches and mark how long each is waited for."""
        batches = iter(loader)
        while True:
            self.add("rest")
            batch = next(batches, None)
            if batch is None:
                return
            self.add("loading")
            yield batch


class MarkedNetwork(nn.Module):
    """A network that marks its forward pass, and the moment when gradients come back to its outputs."""

    def __init__(self, network: nn.Module, marks: Marks):
        super().__init__()
        self.module, self.marks = network, marks  # the name of the wrapped network in DistributedDataParallel

    def forward(self, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        """Return what the network returns."""
        self.marks.add("transfer")
        outputs = self.module(images, heads)
        self.marks.add("network forward")
        for values in outputs.values():
            values.register_hook(lambda gradient: self.marks.add("losses"))
        return outputs


class MarkedScaler(torch.amp.GradScaler):
    """A gradient scaler that marks the ends of the parts of a step, between which train_one_epoch calls it."""

    def __init__(self, marks: Marks, enabled: bool):
        super().__init__(marks.device.type, enabled=enabled)
        self.marks = marks

    def scale(self, outputs: Tensor) -> Tensor:
        """Mark the end of the losses' forward pass."""
        self.marks.add("losses")
        return super().scale(outputs)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mark the end of the backward pass."""
        self.marks.add("network backward")
        super().step(optimizer)
        self.marks.add("optimiser")


class Ours:
    """main's training of ResNet50 on generated images in memory, assembled as main.train does."""

    def __init__(self, argv: list[str], device: torch.device):
        parser = program.get_args_parser()
        self.args = args = options.check(parser.parse_args([*argv, "--task_p", "1", "1"]), parser)
        rng, tasks = np.random.default_rng(0), options.per_task(args)
        n_images, side = N_CLASSES * PER_CLASS, round(args.img_size * 256 / 224)
        pixels = rng.integers(0, 256, (n_images, side, side, 3), dtype=np.uint8)
        names, classes = ([str(i) for i in range(n)] for n in (n_images, N_CLASSES))
        images = ImageSet(names, np.repeat(np.arange(N_CLASSES), PER_CLASS), classes, pixels)
        self.labels = {"Class": images.labels, "Shared": rng.permutation(np.arange(n_images) % N_CLUSTERS)}
        self.loaders = datasets.build_loaders(
            images,
            {},
            tasks,
            probed=[],
            batch_size=args.bs,
            random_pick_p=args.random_cluster_pick_p,
            flip=args.flip,
            img_size=args.img_size,
            seed=args.seed,
            n_workers=auxiliaries.n_workers(args.kernels),
            pin_memory=device.type == "cuda",
        )
        sizes = {name: task.embed_sizes for name, task in tasks.items()}
        self.network = netlib.build_network("resnet50", sizes, pretrained=False, freeze_batchnorm=True).to(device)
        self.network.amp = args.amp
        n_classes, directions = (
            {"Class": N_CLASSES, "Shared": N_CLUSTERS},
            dict(zip(args.adversarial, args.adv_weights)),
        )
        self.objective = losses.build_objective(tasks, n_classes, directions, args.adv_dim, args.lr).to(device)
        self.optimizer, _ = program.build_optimizer(args, self.network, self.objective)
        self.trained = netlib.for_training(self.network, args.compile, has_unused_heads=False)
        self.device, self.n_epochs = device, 0

    def run(self, n_steps: int, marks: Marks | None = None) -> None:
        """Train one epoch of n_steps steps, half of them each task's."""
        torch.backends.cudnn.deterministic = True  # as a run of main has it
        steps = [(i // 2, options.TASKS[i % 2]) for i in range(n_steps)]
        self.loaders.sampler.set_epoch(self.n_epochs, self.labels, steps)
        self.n_epochs += 1
        network, is_scaled = self.trained, self.args.amp == "fp16"
        if marks is None:
            scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
            batches = auxiliaries.Stopwatch().loading(self.loaders.batches)
        else:
            network, scaler = MarkedNetwork(network, marks), MarkedScaler(marks, is_scaled)
            batches = marks.loading(self.loaders.batches)
        with Progress("", 0) as bar:
            program.train_one_epoch(network, self.objective, self.optimizer, scaler, steps, batches, bar)


class Bare:
    """torchvision's ResNet50, forward, backward and Adam, on a batch that lies in memory."""

    def __init__(self, ours: Ours, memory_format: torch.memory_format):
        args, self.amp = ours.args, ours.args.amp
        self.device = ours.device
        network = torchvision.models.resnet50(weights=None)
        network.fc = nn.Identity()
        network.load_state_dict(ours.network.backbone.layers.state_dict())
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        network.to(self.device, memory_format=memory_format)
        self.optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=args.decay, fused=True)
        self.images = torch.randn(args.bs, 3, args.img_size, args.img_size, device=self.device)
        self.images = self.images.contiguous(memory_format=memory_format)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.network = torch.compile(network, dynamic=False) if args.compile else network

    def run(self, n_steps: int) -> None:
        """Take n_steps steps."""
        torch.backends.cudnn.deterministic = False
        for _ in range(n_steps):
            with torch.autocast(self.device.type, netlib.AMP_TYPES.get(self.amp), enabled=self.amp != "none"):
                pooled = self.network(self.images)
            loss = pooled.float().square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(contenders: dict[str, Ours | Bare], n_steps: int, n_rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each contender in each round; a round goes through all of them."""
    device = contenders["ours"].device
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run(4)
    for _ in range(n_rounds):
        for name, contender in contenders.items():
            synchronise(device)
            start = time.perf_counter()
            contender.run(n_steps)
            synchronise(device)
            rates[name].append(contenders["ours"].args.bs * n_steps / (time.perf_counter() - start))
    return rates


def built(build: Callable[[], Ours | Bare], device: torch.device) -> tuple[Ours | Bare, float]:
    """Build a contender; on a GPU also take its first steps and return their peak of memory in GB, else nan."""
    if device.type != "cuda":
        return build(), float("nan")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender = build()
    contender.run(4)
    synchronise(device)
    return contender, (torch.cuda.max_memory_allocated(device) - before) / 1e9


def compare(setting: str, argv: list[str], device: torch.device, n_steps: int, n_rounds: int) -> str:
    """Print the row of a setting and return its profile as a line."""
    auxiliaries.set_precision(device, "--tf32" in argv, "none")
    contenders, memory = {}, {}
    contenders["ours"], memory["ours"] = built(lambda: Ours(argv, device), device)
    for name, memory_format in BARE.items():
        contenders[name], memory[name] = built(lambda m=memory_format: Bare(contenders["ours"], m), device)
    rates = measure(contenders, n_steps, n_rounds)
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: statistics.median(ours / bare for ours, bare in zip(rates["ours"], rates[name])) for name in median}
    cells = [*(f"{value:.1f}" for value in median.values()), *(f"{ratios[name]:.3f}" for name in BARE)]
    print(f"{setting:8}" + "".join(f"{cell:>11}" for cell in [*cells, *(f"{value:.2f}" for value in memory.values())]),
          flush=True)  # fmt: skip
    marks = Marks(device)
    contenders["ours"].run(n_steps, marks)
    shares = marks.shares()
    contenders["ours"].loaders.pool.close()
    return f"{setting:8}" + "".join(f"{100 * shares.get(part, 0):>{len(part) + 3}.1f}" for part in PARTS)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    is_gpu = device.type == "cuda"
    settings = ["plain", "tf32", "bf16", "compile"] if is_gpu else ["plain", "bf16", "compile"]
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=settings)
    parser.add_argument("--img_size", type=int, default=224 if is_gpu else 64, help="side of the images")
    parser.add_argument("--bs", type=int, default=112, help="batch size")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender")
    parser.add_argument("--steps", type=int, default=100 if is_gpu else 10, help="steps in a round, an even number")
    parser.add_argument("--kernels", type=int, default=8, help="loader workers, at most one per core")
    args = parser.parse_args()
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}; ResNet50, {args.img_size} pixels, batch size {args.bs}")
    print("images per second of ours and of the bare backbone (c.l.: channels_last), ours/bare, peak GPU memory in GB")
    columns = ["ours", *BARE, *(f"/{name}" for name in BARE), "GB ours", *(f"GB {name[5:] or name}" for name in BARE)]
    print(f"{'setting':8}" + "".join(f"{column:>11}" for column in columns))
    common = ["--img_size", args.img_size, "--bs", args.bs, "--kernels", args.kernels, "--bn", "frozen"]
    profiles = [
        compare(setting, [*map(str, common), *SETTINGS[setting]], device, args.steps, args.rounds)
        for setting in args.settings
    ]
    print("\npercent of our step")
    print(f"{'setting':8}" + "".join(f"   {part}" for part in PARTS))
    print("\n".join(profiles))
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
