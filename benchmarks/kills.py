"""Stop a run at random times, resume it each time, and compare its end with that of an uninterrupted run.

    python benchmarks/kills.py [--kills 30] [--signal KILL] [--seed 0] [--dataset shapes] [--n_epochs 12] [more flags]

The run mines before every second epoch and is small enough for a CPU. Each time it is sent the signal (KILL, TERM, INT
or HUP) after a random delay, and is then resumed. The delay is uniform between 0 and the time that the uninterrupted
run took for its start plus 1.5 epochs; it is shorter if the run would otherwise end before all signals were sent. After
the last signal the run trains to its end. Logs (except for times), weights, optimiser and random states are then
compared bit for bit. A run stopped by a signal other than KILL must end with exit code 128 + N, or die of
the signal without output if it comes before main.py handles signals. No process may be left. All other flags are passed
on to main.py.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

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
    """Wait for the end of a run; if it failed, exit with what it wrote to stderr."""
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"main.py ended with exit code {process.returncode}: {error}")


class Wait(NamedTuple):
    """Upper limits of the random delay before a signal, in seconds.

    Attributes:
        longest: limit at any time.
        epoch: limit once the run has logged enough epochs.
        rng: draws the delays.
    """

    longest: float
    epoch: float
    rng: random.Random


def stop(process: subprocess.Popen, folder: Path, args: argparse.Namespace, wait: Wait, n_rows: int) -> bool:
    """Send the signal after a random delay and return whether the signal ended the run.

    The delay is at most an epoch once the log has n_rows rows.
    """
    end, is_due = time.perf_counter() + wait.rng.uniform(0, wait.longest), False
    while process.poll() is None and time.perf_counter() < end:
        time.sleep(0.02)
        if not is_due and epochs_logged(folder) >= n_rows:
            is_due, end = True, min(end, time.perf_counter() + wait.rng.uniform(0, wait.epoch))
    process.send_signal(args.signal)
    _, error = process.communicate()
    code = process.returncode
    if code not in (0, -args.signal, 128 + args.signal) or (code == -args.signal and error):
        sys.exit(f"main.py ended with exit code {code}: {error}")
    return code != 0


def run_whole(flags: list[str], folder: Path, args: argparse.Namespace) -> Wait:
    """Make the uninterrupted run; return how long to wait before a signal."""
    began = time.perf_counter()
    finish(start(*flags, folder.name))
    seconds = time.perf_counter() - began
    epoch = sum(pd.read_csv(path)["Time"].sum() for path in folder.glob("*.csv")) / args.n_epochs
    longest = seconds - (args.n_epochs - 1.5) * epoch
    print(f"uninterrupted: {seconds:.0f} s; signals after up to {longest:.1f} s", flush=True)
    return Wait(longest, epoch, random.Random(args.seed))


def run_stopped(flags: list[str], folder: Path, wait: Wait, args: argparse.Namespace) -> None:
    """Make the run that is stopped and resumed; one that has no complete epoch yet starts anew, with --go_on."""
    done = []
    for n_kill in range(1, args.kills + 1):
        process = start(*flags, folder.name, "--go_on")
        if not stop(process, folder, args, wait, args.n_epochs * n_kill // (args.kills + 1) + 1):
            break
        done.append(epochs_logged(folder))
    else:
        finish(start(*flags, folder.name, "--go_on"))
    if len(done) < args.kills:
        print(f"the run ended after {len(done)} signals; give a larger --n_epochs for {args.kills}")
    print(f"{len(done)} times {args.signal.name}, epochs logged at each: {done}")


def main() -> None:
    """Run the trial and print what it found; the exit code is 1 if the two runs differ at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of signals")
    parser.add_argument("--signal", type=lambda name: signal.Signals[f"SIG{name}"], default="KILL", help="its name")
    parser.add_argument("--dataset", default="shapes", help="as for main.py")
    parser.add_argument("--n_epochs", type=int, default=12, help="epochs of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random delays")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        flags = ["--dataset", args.dataset, "--n_epochs", str(args.n_epochs), *FLAGS.split(), *more]
        flags += ["--save_path", name, "--savename"]
        whole, killed = (Path(name) / args.dataset / run for run in ("whole", "killed"))
        run_stopped(flags, killed, run_whole(flags, whole, args), args)
        try:
            assert_same_run(killed, whole)
        except AssertionError as error:
            sys.exit(f"the ends differ: {error}")
        left = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True).stdout.split()
        if left:
            sys.exit(f"processes are left: {' '.join(left)}")
    print("logs, weights, optimiser and random states are bit-identical; no process is left")


if __name__ == "__main__":
    main()
