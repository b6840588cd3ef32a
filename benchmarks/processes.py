"""Cost of several processes: main.py with 2 processes of 1 thread against 1 process of 2 threads, on the CPU.

    python benchmarks/processes.py [--rounds 3] [--epochs 3] [--arch resnet50] [--img_size 64] [--bs 56] [--amp none]

Both train the built-in data set with the same global batch, in turn, and are timed by their own log_train_Class.csv
without its first epoch. Prints images per second and the overhead of the two processes in percent. BatchNorm is frozen,
because training it in several processes needs GPUs.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets

MAIN = Path(__file__).resolve().parent.parent / "main.py"


def images_per_second(n_processes: int, flags: list[str], dataset: str, n_images: int, batch_size: int) -> float:
    """Return the throughput of a run on n_images training images, the median over its epochs but the first."""
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, str(MAIN), *flags, "--save_path", folder, "--savename", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // n_processes), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        with open(Path(folder) / dataset / "run" / "log_train_Class.csv", encoding="utf-8") as file:
            seconds = [float(row["Time"]) for row in csv.DictReader(file)]
    return 2 * batch_size * (n_images // batch_size) / statistics.median(seconds[1:])


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of each run, at least 2")
    parser.add_argument("--dataset", default="shapes", help="as for main.py")
    parser.add_argument("--source_path", default="./Datasets", help="as for main.py")
    parser.add_argument("--arch", default="resnet50", help="as for main.py")
    parser.add_argument("--img_size", type=int, default=64, help="as for main.py")
    parser.add_argument("--bs", type=int, default=56, help="as for main.py")
    parser.add_argument("--amp", default="none", help="as for main.py")
    args = parser.parse_args()
    flags = ["--not_pretrained", "--bn", "frozen", "--task_p", "1", "1", "--shared_num_classes", "8"]
    flags += ["--kernels", "0", "--lr", "1e-4", "--n_epochs", str(args.epochs), "--eval_every", str(args.epochs)]
    for flag in ("dataset", "source_path", "arch", "img_size", "bs", "amp"):
        flags += [f"--{flag}", str(getattr(args, flag))]
    print(
        f"{args.arch}, {args.img_size} px, bs {args.bs}, amp {args.amp}, {args.rounds} rounds: images/s of both tasks"
    )
    print(f"{'BatchNorm':<10}{'1 x 2 threads':>15}{'2 x 1 thread':>15}{'overhead %':>12}   of each round")
    n_images = len(datasets.load_dataset(args.dataset, args.source_path)[0])
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for n_processes, measured in rates.items():
            measured.append(images_per_second(n_processes, flags, args.dataset, n_images, args.bs))
    overheads = [100 * (one / two - 1) for one, two in zip(rates[1], rates[2])]
    medians = [statistics.median(values) for values in (rates[1], rates[2], overheads)]
    shown = " ".join(f"{value:.1f}" for value in overheads)
    print(f"{'frozen':<10}{medians[0]:>15.1f}{medians[1]:>15.1f}{medians[2]:>12.1f}   {shown}")


if __name__ == "__main__":
    main()
