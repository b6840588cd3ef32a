"""Time and memory of scoring a test set, side by side in one run.

    python benchmarks/evaluation.py [--rounds 3] [--sets cub200 in-shop online_products] [--scale 1]

Contenders:
    ours: evaluate.score_set, with Recall@k for all k, NMI, F1, mAP@R and R-precision.
    pml: pytorch-metric-learning's AccuracyCalculator, if installed, with precision at 1, NMI, mAP@R and R-precision.
    floor: the work that any scorer has to do: the faiss k-means, and one blocked product of queries and gallery.

Embeddings are generated: points around the centre of their class on the unit sphere, D = 128, at the sizes of the
published test sets, times --scale; --noise sets how far the classes overlap. Each contender runs in a process of its
own, in turns; times are medians over the rounds, memory is the peak above what the process holds before scoring.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import auxiliaries
import evaluate

SETS = {
    "cub200": (5_924, 100, 0, [1, 2, 4, 8]),
    "in-shop": (26_830, 3_985, 14_218, [1, 10, 20, 30, 50]),
    "online_products": (60_502, 11_316, 0, [1, 10, 100, 1000]),
}
"""{data set: (test images, classes, queries, values of k)}; 0 queries: each image is searched among all others."""


def scaled(name: str, scale: float) -> tuple[int, int, int, list[int]]:
    """Return a set's numbers of images, classes and queries, times a scale, and its k."""
    return (*(round(scale * n) for n in SETS[name][:3]), SETS[name][3])


def generate(name: str, noise: float, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[int]]:
    """Return embeddings (N, 128) float32, labels (N,), is_query (N,) or None, and the k of Recall@k."""
    n_images, n_classes, n_queries, k_vals = scaled(name, scale)
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(n_classes).repeat(2), rng.integers(0, n_classes, n_images - 2 * n_classes)])
    rng.shuffle(labels)
    points = rng.normal(size=(n_classes, 128))[labels] + noise * rng.normal(size=(n_images, 128))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    is_query = rng.permutation(n_images) < n_queries if n_queries else None
    return points.astype(np.float32), labels, is_query, k_vals


def run_ours(embeddings: np.ndarray, labels: np.ndarray, is_query: np.ndarray | None, k_vals: list[int]) -> dict:
    """Score with this program."""
    return evaluate.score_set(embeddings, labels, k_vals, seed=0, is_query=is_query)


def run_floor(embeddings: np.ndarray, labels: np.ndarray, is_query: np.ndarray | None, k_vals: list[int]) -> dict:
    """Run the k-means and multiply the queries with the gallery."""
    auxiliaries.kmeans(embeddings, len(np.unique(labels)), seed=0)
    points = torch.from_numpy(embeddings)
    queries, gallery = (points, points) if is_query is None else (points[is_query], points[~is_query])
    product = torch.empty(256, len(gallery))
    for block in queries.split(256):
        torch.mm(block, gallery.T, out=product[: len(block)])
    return {}


def run_pml(embeddings: np.ndarray, labels: np.ndarray, is_query: np.ndarray | None, k_vals: list[int]) -> dict:
    """Score with pytorch-metric-learning."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    include = ("precision_at_1", "NMI", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    points, classes = torch.from_numpy(embeddings), torch.from_numpy(labels)
    if is_query is None:
        return calculator.get_accuracy(points, classes, points, classes, ref_includes_query=True)
    query = torch.from_numpy(is_query)
    return calculator.get_accuracy(points[query], classes[query], points[~query], classes[~query])


CONTENDERS = {"ours": run_ours, "pml": run_pml, "floor": run_floor}


def memory_mb(field: str) -> float:
    """Return VmRSS or VmHWM of this process in MB (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def measure(contender: str, name: str, noise: float, scale: float) -> dict:
    """Run one contender in this process and return {"seconds", "megabytes", "scores"}."""
    data = generate(name, noise, scale)
    CONTENDERS[contender](*(generate_small(data)))  # warm up, so that lazy imports are not timed
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    scores = CONTENDERS[contender](*data)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": memory_mb("VmHWM") - before, "scores": scores}


def generate_small(data: tuple) -> tuple:
    """Return a part of a set, its first classes."""
    embeddings, labels, is_query, k_vals = data
    part = labels < 50
    return embeddings[part], labels[part], None if is_query is None else is_query[part], k_vals


def compare(name: str, rounds: int, noise: float, scale: float) -> None:
    """Print the table of one set."""
    contenders = [c for c in CONTENDERS if c != "pml" or importlib.util.find_spec("pytorch_metric_learning")]
    results: dict[str, list[dict]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            with multiprocessing.get_context("fork").Pool(1) as process:
                results[contender].append(process.apply(measure, (contender, name, noise, scale)))
    n_images, n_classes, n_queries, k_vals = scaled(name, scale)
    print(
        f"\n{name}: {n_images} x 128, {n_classes} classes, Recall at {k_vals}"
        + (f", {n_queries} queries" * bool(n_queries))
    )
    print("contender  median s   min s   max s  peak MB  median of ours/it")
    for contender, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        ratio = statistics.median(o["seconds"] / s for o, s in zip(results["ours"], seconds, strict=True))
        peak = max(run["megabytes"] for run in runs)
        print(
            f"{contender:9}  {statistics.median(seconds):8.2f}  {min(seconds):6.2f}  {max(seconds):6.2f}  {peak:7.0f}"
            f"  {ratio:6.2f}",
            flush=True,
        )
    for contender in contenders[: len(contenders) - 1]:
        scores = results[contender][0]["scores"]
        print(f"{contender}: {'  '.join(f'{score} {value:.4f}' for score, value in scores.items())}", flush=True)


def main() -> None:
    """Print a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--noise", type=float, default=1.6, help="spread of a class against that of the centres")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of images and classes")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, noise {args.noise}")
    for name in args.sets:
        compare(name, args.rounds, args.noise, args.scale)


if __name__ == "__main__":
    main()
