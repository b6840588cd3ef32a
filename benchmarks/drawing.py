"""Time of what a run draws after an epoch, on a large generated test set, and of the probe beside it.

    python benchmarks/drawing.py [--images 60000] [--size 500 375] [--epochs 100] [--rounds 3]

Embeddings are generated: points around the centre of their class on the unit sphere, D = 128, five images a class; as
many training images with 50 mined clusters. The images are JPEG files of the given size with noise in them, which are
decoded each time. epochs: rows of the logs that are plotted. Seconds are medians over the rounds; the last line is an
epoch that is the best so far and after which labels are mined, the most that one epoch draws.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
from data.images import ImageSet
from report import plots, sheets

SCORES = ["NMI", "F1", "Recall @ 1", "Recall @ 10", "Recall @ 100", "Recall @ 1000", "mAP @ R", "R-Precision"]
PROBES = ["Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared", "Class by chance"]
PROBES += ["Mined by chance"]


def generate_images(folder: Path, n_images: int, size: tuple[int, int]) -> ImageSet:
    """Return an image set of n_images entries in classes of five, that share 100 files of this width and height."""
    rng = np.random.default_rng(0)
    for i in range(100):
        pixels = np.clip(rng.uniform(0, 255, 3) + rng.normal(0, 20, (size[1], size[0], 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    labels = np.arange(n_images) // 5
    names = [str(folder / f"{i % 100}.jpg") for i in range(n_images)]
    return ImageSet(names, labels, [f"class {label}" for label in range(labels[-1] + 1)])


def generate_embeddings(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return (N, 128) float32 points around the centres of their labels."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(labels.max() + 1, 128))[labels] + 0.7 * rng.normal(size=(len(labels), 128))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def generate_rows(n_epochs: int, names: list[str]) -> list[dict[str, float]]:
    """Return rows of a log with noisy rising columns."""
    rng = np.random.default_rng(0)
    return [
        {"Epochs": i, "Time": 1.0} | {n: 1 - 0.9**i * rng.uniform(0.5, 0.9) for n in names} for i in range(n_epochs)
    ]


def tasks(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name."""
    images = generate_images(folder, args.images, tuple(args.size))
    by_class = generate_embeddings(images.labels, 1)
    mined = np.random.default_rng(2).integers(0, 50, args.images)
    by_mined = generate_embeddings(mined, 3)
    distances = np.random.default_rng(4).random(args.images).astype(np.float32)
    train_rows = generate_rows(args.epochs, ["Train Loss", "Class Loss", "Shared Loss", "Adversarial Loss"])
    val_rows, probe_rows = generate_rows(args.epochs, SCORES), generate_rows(args.epochs, PROBES)
    chosen = evaluate.probe_subset(images.labels, seed=1)
    probed = {"Class": by_class[chosen], "Shared": by_mined[chosen]}
    labels = {"Class": images.labels[chosen], "Mined": mined[chosen]}
    marks = {"best": 0, "mined_before": range(0, args.epochs + 1, 4), "rate_steps": [args.epochs // 2]}
    plot, sheet = folder / "plot.svg", folder / "sheet.png"
    return {
        "InfoPlot_Class.svg": lambda: plots.draw_progress(plot, train_rows, val_rows, "a run", **marks),
        "InfoPlot_Probe.svg": lambda: plots.draw_probe(plot, probe_rows, "a run"),
        "sample_recoveries.png": lambda: sheets.draw_recoveries(sheet, images, by_class, "a run"),
        "sample_recoveries_Shared.png": lambda: sheets.draw_recoveries(sheet, images, by_mined, "a run"),
        "mined_clusters.png": lambda: sheets.draw_clusters([sheet], "a run", 0, images, mined, distances),
        "(probe: nearest neighbours)": lambda: evaluate.probe_scores(probed, labels),
    }


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = tasks(Path(folder), args)
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(args.rounds):
            for name, task in measured.items():
                start = time.perf_counter()
                task()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.images} images, {args.size[0]} x {args.size[1]}; {args.epochs} epochs; median of {args.rounds}\n")
    print("| drawn | s |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} |")
    print(f"| all of an epoch | {sum(medians.values()):.2f} |")


if __name__ == "__main__":
    main()
