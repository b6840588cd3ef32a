"""Kill a run at random times, resume it each time, and compare its end with that of an uninterrupted run.

    python benchmarks/kills.py [--kills 30] [--seed 0] [--dataset shapes] [--n_epochs 12] [flags of main.py]

The run mines after every second epoch and is small enough for a CPU. It is sent SIGKILL after a random time, uniform up
to what the uninterrupted run took for its start and one and a half epochs (sooner where it would end before it was
killed often enough), and resumed; after the last kill it may end. Logs (but for times), weights, optimiser and random
states are compared bit for bit.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402
from conftest import assert_same_run, epochs_logged  # noqa: E402

FLAGS = "--arch googlenet --not_pretrained --img_size 32 --bs 56 --lr 1e-3 --kernels 1 "
FLAGS += "--shared_num_classes 8 --cluster_update_freq 1 --adv_weights 100"


def start(*flags: str) -> subprocess.Popen:
    """Start main.py and return its process."""
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run's end; exit with what it wrote on stderr where it failed."""
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"main.py ended with exit code {process.returncode}: {error}")


def kill(process: subprocess.Popen, folder: Path, rng: random.Random, times: tuple[float, float], n_rows: int) -> bool:
    """Kill the process after a random time, within an epoch once the log has n_rows; tell whether it was alive.

    times: longest time to wait, and that of an epoch, in seconds.
    """
    longest, epoch = times
    end, is_due = time.perf_counter() + rng.uniform(0, longest), False
    while process.poll() is None and time.perf_counter() < end:
        time.sleep(0.02)
        if not is_due and epochs_logged(folder) >= n_rows:
            is_due, end = True, min(end, time.perf_counter() + rng.uniform(0, epoch))
    process.kill()
    return process.wait() == -signal.SIGKILL


def run_whole(flags: list[str], folder: Path, n_epochs: int) -> tuple[float, float]:
    """Make the uninterrupted run; return the longest time to wait before a kill, and that of an epoch, in seconds."""
    began = time.perf_counter()
    finish(start(*flags, folder.name))
    seconds = time.perf_counter() - began
    epoch = sum(pd.read_csv(path)["Time"].sum() for path in folder.glob("*.csv")) / n_epochs
    longest = seconds - (n_epochs - 1.5) * epoch
    print(f"uninterrupted: {seconds:.0f} s; kills after up to {longest:.1f} s", flush=True)
    return longest, epoch


def run_killed(
    flags: list[str], folder: Path, rng: random.Random, times: tuple[float, float], n_epochs: int, n_kills: int
) -> None:
    """Make the run that is killed and resumed; one that was killed before it had stored anything starts anew."""
    done, early = [], 0
    while True:
        can_resume = (folder / "last.pth.tar").exists()
        if folder.exists() and not can_resume:
            folder.rename(folder.with_name(f"killed_early_{early}"))
            early += 1
        process = start("--resume", str(folder)) if can_resume else start(*flags, folder.name)
        n_rows = n_epochs * (len(done) + 1) // (n_kills + 1) + 1
        if len(done) == n_kills or not kill(process, folder, rng, times, n_rows):
            break
        done.append(epochs_logged(folder))
    finish(process)
    if len(done) < n_kills:
        print(f"the run ended after {len(done)} kills; give a larger --n_epochs for {n_kills}")
    print(f"{len(done)} kills, epochs logged at each: {done}; {early} of them before anything was stored")


def main() -> None:
    """Run the trial and print what it found; the exit code is 1 where the ends differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often the run is killed")
    parser.add_argument("--dataset", default="shapes", help="as for main.py")
    parser.add_argument("--n_epochs", type=int, default=12, help="epochs of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        flags = ["--dataset", args.dataset, "--n_epochs", str(args.n_epochs), *FLAGS.split(), *more]
        flags += ["--save_path", name, "--savename"]
        whole, killed = (Path(name) / args.dataset / run for run in ("whole", "killed"))
        times = run_whole(flags, whole, args.n_epochs)
        run_killed(flags, killed, random.Random(args.seed), times, args.n_epochs, args.kills)
        try:
            assert_same_run(killed, whole)
        except AssertionError as error:
            sys.exit(f"the ends differ: {error}")
    print("logs, weights, optimiser and random states are bit-identical")


if __name__ == "__main__":
    main()
