"""What an epoch costs besides training and embedding, at the size of CUB200-2011: scoring, drawing, logs, checkpoints.

    python benchmarks/epoch.py [--epochs 100] [--images 11788] [--arch resnet50] [--runs 20] [--factors 0] [--sets 1]

The run has --epochs epochs but does not train: images, embeddings and scores are generated, and the weights are
random. Everything else is what main.py does in an epoch. Half of the images are for training, half for testing, each
in 100 classes. Labels are mined before every fourth epoch.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import auxiliaries
import evaluate
import losses
import main as program
import netlib
from data.images import ImageSet
from report import page, sheets
from run import options
from run.folder import Run
from run.history import column

SCORES = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "Recall @ 4", "Recall @ 8", "mAP @ R", "R-Precision"]
LOSSES = ["Train Loss", "Class Loss", "Shared Loss", "Adversarial Loss", "Learning Rate"]
N_CLASSES, N_CLUSTERS = 100, 30
IGNORED = shutil.ignore_patterns("*.tar", "*.png", "*.jpg", ".lock")


def generate_images(folder: Path, n_images: int) -> ImageSet:
    """Return an image set of n_images entries that share 100 files of 500 x 375 pixels."""
    rng = np.random.default_rng(0)
    for i in range(100):
        pixels = np.clip(rng.uniform(0, 255, 3) + rng.normal(0, 20, (375, 500, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    names = [str(folder / f"{i % 100}.jpg") for i in range(n_images)]
    return ImageSet(names, np.arange(n_images) % N_CLASSES, [f"class {i}" for i in range(N_CLASSES)])


def generate_embeddings(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return (N, 128) float32 points on the unit sphere around the centres of their labels."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(labels.max() + 1, 128))[labels] + 0.7 * rng.normal(size=(len(labels), 128))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def generate_row(epoch: int, names: list[str]) -> dict[str, float]:
    """Return a row of a log whose columns rise with noise, so that about every fourth epoch is the best so far."""
    rng = np.random.default_rng(epoch)
    return {name: 0.6 - 0.4 * 0.97**epoch + rng.normal(0, 0.01) for name in names}


class Trial:
    """A run without training, whose parts are timed.

    Attributes:
        seconds: {part: seconds of each call}.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.args, self.seconds = args, {}
        flags = f"--dataset cub200 --arch {args.arch} --not_pretrained --n_epochs {args.epochs} --savename run"
        parser = program.get_args_parser()
        self.flags, _ = options.resolve(
            [*flags.split(), "--save_path", str(folder / "runs")], parser, contextlib.ExitStack()
        )
        self.train, self.test = (generate_images(folder, args.images // 2) for _ in range(2))
        self.names = ["test"] if args.sets == 1 else [f"Set {i + 1}" for i in range(args.sets)]
        self.embeddings = {"Class": generate_embeddings(self.test.labels, 1)}
        self.mined = np.random.default_rng(2).integers(0, N_CLUSTERS, len(self.train))
        self.embeddings["Shared"] = generate_embeddings(np.resize(self.mined, len(self.test)), 3)
        tasks, sizes = options.per_task(self.flags), {"Class": 128, "Shared": 128}
        self.network = netlib.build_network(args.arch, sizes, pretrained=False, freeze_batchnorm=True)
        classes = {"Class": N_CLASSES, "Shared": N_CLUSTERS}
        objective = losses.build_objective(tasks, classes, {"Class-Shared": 2500.0}, 512, 1e-5)
        optimizer, scheduler = program.build_optimizer(self.flags, self.network, objective)
        for parameter in [*self.network.parameters(), *objective.parameters()]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # from now on it has moments
        self.parts = {"objective": objective, "optimizer": optimizer, "scheduler": scheduler}
        self.run = Run(
            options.run_folder(self.flags),
            options.stored_flags(self.flags) | {"started_from": "random weights"},
            defaults={},
            provenance={"program": "a benchmark"},
            stored=None,
            may_restart=False,
        )

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Take the time of a block."""
        start = time.perf_counter()
        yield
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)

    def mine(self, epoch: int) -> None:
        """Do all the work of a mining except embedding."""
        run, images = self.run, self.train
        with self.timed("clustering"):
            mined, distances = auxiliaries.kmeans(generate_embeddings(self.mined, epoch), N_CLUSTERS, 1)
            described = evaluate.describe_clusters(mined, N_CLUSTERS, images.labels, {}, self.mined)
            described |= {f"AMI factor {i}": 0.5 for i in range(self.args.factors)}
        with self.timed("logs"):
            run.log_mining(epoch, time.monotonic(), described, mined, images.names)
        with self.timed("sheet of a mining"):
            sheets.draw_mining(run.history, images, mined, distances)

    def epoch(self, epoch: int) -> None:
        """Do all the work of an epoch except training and embedding."""
        run, tests = self.run, dict.fromkeys(self.names, self.test)
        embeddings = dict.fromkeys(self.names, self.embeddings)
        chosen = evaluate.probe_subset(self.test.labels, seed=1)
        probed = {task: points[chosen] for task, points in self.embeddings.items()}
        if run.history.mining_is_due(epoch):
            self.mine(epoch)
        with self.timed("scoring"):
            evaluate.score_sets("Class", embeddings, tests, [1, 2, 4, 8], 1, torch.device("cpu"), with_clustering=True)
        with self.timed("probe"):
            labels = {"Class": self.test.labels[chosen], "Mined": self.mined[chosen]}
            probe = evaluate.probe_scores(probed, labels)
            for i in range(self.args.factors):
                probe |= {f"factor {i} {what}": 0.5 for what in ("from Class", "from Shared", "by chance")}
        with self.timed("logs"):
            columns = [column(name, score) for name in self.names for score in SCORES]
            rows = {"train": generate_row(epoch, LOSSES), "val": generate_row(epoch, columns), "probe": probe}
            for log, row in rows.items():
                run.log(log, epoch, time.monotonic(), row)
        with self.timed("checkpoint, if the epoch is the best"):
            run.keep_best(self.network)
        with self.timed("sheets of neighbours"):
            sheets.draw_neighbours(run.history, tests, embeddings)
        with self.timed("checkpoint of the epoch, state and summary"):
            run.save(self.network, self.parts, epoch + 1)
        with self.timed("plots, page and index"):
            page.draw(run.history)


def main() -> None:
    """Make the run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--images", type=int, default=11_788)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--runs", type=int, default=20, help="number of other runs in the index of the data set")
    parser.add_argument("--factors", type=int, default=0, help="number of known characteristics")
    parser.add_argument("--sets", type=int, default=1, help="number of test sets")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), args)
        with trial.run:
            trial.epoch(0)
            for i in range(args.runs):
                shutil.copytree(trial.run.folder, trial.run.folder.with_name(f"run {i}"), ignore=IGNORED)
            trial.seconds.clear()
            for epoch in range(1, args.epochs):
                trial.epoch(epoch)
    print(f"{args.images} images, {args.arch}, {args.epochs} epochs; {args.runs} other runs\n")
    print("| part | median s | max s | calls | s per epoch |\n|---|---|---|---|---|")
    total = 0.0
    for part, seconds in trial.seconds.items():
        mean = sum(seconds) / (args.epochs - 1)
        total += mean
        print(f"| {part} | {statistics.median(seconds):.3f} | {max(seconds):.3f} | {len(seconds)} | {mean:.3f} |")
    print(f"| all | | | | {total:.2f} |")


if __name__ == "__main__":
    main()
