"""Cost of several processes: main.py with 2 processes of 1 thread against 1 process of 2 threads, on the CPU.

python benchmarks/processes.py [--rounds N] [--img_size PIXELS]

Both train the built-in data set with the same global batch, in turn, and are timed by their own log_train_Class.csv
without its first epoch. Prints images per second and the overhead of the two processes in percent, with BatchNorm
frozen (as with pretrained weights) and training, when its statistics are synchronised.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TRAINING_IMAGES = 576
BATCH_SIZE = 56


def images_per_second(n_processes: int, flags: list[str], n_epochs: int) -> float:
    """Return the training throughput of a run, the median over its epochs but the first."""
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    with tempfile.TemporaryDirectory() as folder:
        own = ["--n_epochs", str(n_epochs), "--save_path", folder, "--savename", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // n_processes), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            [*launcher, str(ROOT / "main.py"), *flags, *own], check=True, env=environment, capture_output=True
        )
        seconds = pd.read_csv(Path(folder) / "shapes" / "run" / "log_train_Class.csv")["Time"][1:].median()
    return 2 * BATCH_SIZE * (TRAINING_IMAGES // BATCH_SIZE) / seconds


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--img_size", type=int, default=64)
    args = parser.parse_args()
    print(f"ResNet50, {args.img_size} px, bs {BATCH_SIZE}, bf16, {args.rounds} rounds, images/s of both tasks' steps")
    print(f"{'BatchNorm':<10}{'1 x 2 threads':>15}{'2 x 1 thread':>15}{'overhead %':>12}   of each round")
    for batchnorm in ("frozen", "train"):
        flags = ["--dataset", "shapes", "--not_pretrained", "--bn", batchnorm, "--img_size", str(args.img_size)]
        flags += ["--amp", "bf16", "--bs", str(BATCH_SIZE), "--task_p", "1", "1", "--shared_num_classes", "8"]
        flags += ["--kernels", "0", "--lr", "1e-4", "--eval_every", str(args.epochs)]
        one, two = [], []
        for _ in range(args.rounds):
            one.append(images_per_second(1, flags, args.epochs))
            two.append(images_per_second(2, flags, args.epochs))
        overheads = [100 * (a / b - 1) for a, b in zip(one, two)]
        medians = [pd.Series(values).median() for values in (one, two, overheads)]
        shown = " ".join(f"{value:.1f}" for value in overheads)
        print(f"{batchnorm:<10}{medians[0]:>15.1f}{medians[1]:>15.1f}{medians[2]:>12.1f}   {shown}")


if __name__ == "__main__":
    main()
