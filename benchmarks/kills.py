"""Kill a run at random times, resume it each time, and compare its end with that of an uninterrupted run.

    python benchmarks/kills.py [--kills 30] [--seed 0] [flags of main.py]

The run is one of 12 epochs on the rendered data set with mining after every second epoch, small enough for a CPU. It is
sent SIGKILL after a random time, uniform up to the time that the uninterrupted run took for its start and one epoch and
a half (sooner where it would end before it was killed often enough), and resumed; after the last kill it may end. Logs
(but for times), weights, optimiser and random states are compared bit for bit.
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
import test_resume  # noqa: E402

FLAGS = "--dataset shapes --arch googlenet --not_pretrained --img_size 32 --bs 56 --n_epochs 12 --lr 1e-3 --amp bf16 "
FLAGS += "--shared_num_classes 8 --cluster_update_freq 1 --adv_weights 100 --kernels 1"


def start(*flags: str) -> subprocess.Popen:
    """Start main.py and return its process."""
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def epochs_logged(folder: Path) -> int:
    """Return how many epochs stand in the log of a run."""
    log = folder / "log_train_Class.csv"
    return log.read_text().count("\n") - 1 if log.exists() else 0


def killed(process: subprocess.Popen, folder: Path, rng: random.Random, longest: float, n_epochs: int) -> bool:
    """Kill the process after a random time, at the latest when it has logged n_epochs; tell whether it was alive."""
    end = time.perf_counter() + rng.uniform(0, longest)
    is_last = False
    while process.poll() is None and time.perf_counter() < end:
        time.sleep(0.02)
        if not is_last and epochs_logged(folder) > n_epochs:
            is_last, end = True, min(end, time.perf_counter() + rng.uniform(0, 3))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def main() -> None:
    """Run the trial and print what it found; the exit code is 1 where the ends differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    args, more = parser.parse_known_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        flags = [*FLAGS.split(), *more, "--save_path", name, "--savename"]
        began = time.perf_counter()
        whole = start(*flags, "whole")
        assert whole.wait() == 0, whole.stderr.read()
        seconds = time.perf_counter() - began
        folders = [Path(name) / "shapes" / run for run in ("whole", "killed")]
        epoch = sum(pd.read_csv(folders[0] / name)["Time"].sum() for name in test_resume.main.LOGS) / 12
        longest = seconds - 12 * epoch + 1.5 * epoch
        print(f"uninterrupted: {seconds:.0f} s; kills after up to {longest:.1f} s", flush=True)
        kills, early, done = 0, 0, []
        while True:
            can_resume = (folders[1] / "last.pth.tar").exists()
            if not can_resume and folders[1].exists():
                folders[1].rename(folders[1].with_name(f"killed_early_{early}"))
                early += 1
            process = start("--resume", str(folders[1])) if can_resume else start(*flags, "killed")
            if kills < args.kills and killed(process, folders[1], rng, longest, 12 * (kills + 1) // args.kills):
                kills += 1
                done.append(epochs_logged(folders[1]))
                continue
            process.wait()
            assert process.returncode == 0, process.stderr.read()
            if kills >= args.kills:
                break
            print(f"the run ended after {kills} kills; give a larger --n_epochs for {args.kills}")
            break
        print(f"{kills} kills, epochs logged at each: {done}")
        try:
            test_resume.assert_same_run(*folders)
        except AssertionError as error:
            sys.exit(f"the ends differ: {error}")
        print("logs, weights, optimiser and random states are bit-identical")


if __name__ == "__main__":
    main()
