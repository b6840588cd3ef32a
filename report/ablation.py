"""Train a series of runs, one for each value of a flag and each seed, and compare them at the end.

bash Result_Runs.sh ablation SERIES DATASET [--seeds N] [--values V ...] [more flags of main.py]
"""

import argparse
import contextlib
import glob
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from data.published import PUBLISHED
from report.compare import compare_runs
from run import options
from run.options import PATH, whole
from support import errors, output
from support.errors import InputError, OneLineParser
from support.files import locked

PROG = "Result_Runs.sh"
ROOT = Path(__file__).resolve().parent.parent
SETUPS = {**{name: name for name in PUBLISHED}, "shapes": "demo"}
"""Data sets with a set-up in Result_Runs.sh, and the names of the set-ups."""

STOPPED = (129, 130, 143)
"""Exit codes of a run that was asked to stop; they end the series."""

SERIES = {
    "clusters": ("shared_num_classes", "5 10 20 30 50 100 150 200 250 300", "number of mined clusters"),
    "interval": ("cluster_update_freq", "1 3 5 10 20 50", "F: labels are mined again every F+1 epochs"),
    "dim": ("embed_sizes", "0 64 128 256 512 1024", "size of the Shared embedding; 0: the plain margin-loss baseline"),
    "adversarial": ("adv_weights", "0 on", "weight of the adversarial term; on is the weight of the set-up"),
    "standardise": ("cluster_mode", "no_norm mean mstd", "how features are standardised before the first clustering"),
    "mining": (None, "margin margin_steps mic no_adversarial no_norm shared_head", "does mining help? margin is the "
               "plain margin-loss baseline; margin_steps trains it for as many optimiser steps as MIC takes; "
               "mic has the flags of the set-up; no_adversarial is MIC with --adv_weights 0; no_norm is MIC with "
               "--cluster_mode no_norm; shared_head is MIC with --shared_gradient head. The series ends with the "
               "differences to the first of the values, paired by seed"),
}  # fmt: skip
"""Flag and values of each series, and what they are; "mining" sets several flags."""

HELP = """\
Train one run for each value of a flag and each of N seeds, with the set-up of the data set (shapes: the demo's; your
own images: the defaults and your flags). Then compare the runs: print a table, and write SAVENAME.csv and SAVENAME.svg
(by default ablation_SERIES) next to the runs. Rerunning a series skips finished runs and resumes interrupted ones.

SERIES is one of
{}

--values replaces the values of a series. A small series that runs on a CPU:
  bash Result_Runs.sh ablation clusters shapes --values 4 8 16 --seeds 2 --n_epochs 4"""


def get_args_parser() -> OneLineParser:
    """Build the parser of the series' own flags; all others are those of main.py."""
    lines = []
    for name, (flag, values, about) in SERIES.items():
        line = f"  {name:<13} {f'--{flag}: ' if flag else ''}{values}: {about}"
        lines.append(textwrap.fill(line, 118, subsequent_indent=16 * " "))
    parser = OneLineParser(
        prog=PROG,
        usage="bash Result_Runs.sh ablation SERIES DATASET [--seeds N] [--values V ...] [more flags of main.py]",
        description=HELP.format("\n".join(lines)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("series", metavar="SERIES", choices=SERIES)
    add("dataset", metavar="DATASET")
    seeds = "number of seeds for each value, from 0 for the published set-ups, else from 1 (default: 1)"
    add("--seeds", type=whole(1), default=1, metavar="N", help=seeds)
    add("--values", nargs="+", metavar="V", help="values to run instead of those of the series")
    add("--save_path", type=PATH, default="./Training_Results", metavar="FOLDER", help="the runs are in FOLDER/DATASET")
    add("--savename", metavar="NAME", help="start of the runs' names (default: ablation_SERIES)")
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the series, and those for main.py; exit with one line and code 2 if they do not fit."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    for flag in flags:
        if flag.split("=")[0] in ("--seed", "--dataset", "--resume"):
            instead = "--seeds N, --values V ..., --save_path FOLDER, --savename NAME"
            parser.error(f"{flag} does not go with an ablation: give {instead}")
    all_values = SERIES[args.series][1].split()
    args.values = args.values or all_values
    args.savename = args.savename or f"ablation_{args.series}"
    for value in args.values:
        if args.series == "mining" and value not in all_values:
            parser.error(f"no value '{value}' of mining; some of {', '.join(all_values)}")
    return args, flags


def value_flags(series: str, value: str, base: argparse.Namespace) -> list[str]:
    """Return the flags for a value of a series; `base` are the flags that all its runs have in common.

    With margin_steps, the Class task alone trains for so many epochs that it takes as many steps as both tasks do.
    """
    no_adversarial = ["--adv_weights", *["0"] * len(base.adversarial)]
    margin = ["--task_p", "1", "0", *no_adversarial]
    if series == "mining":
        per_iteration = sum(Fraction(str(p)) for p in base.task_p)  # expected steps of both tasks
        n_epochs, *tau = (str(math.ceil(per_iteration * epoch)) for epoch in (base.n_epochs, *base.tau))
        return {
            "margin": margin,
            "margin_steps": [*margin, "--n_epochs", n_epochs, "--tau", *tau],
            "mic": [],
            "no_adversarial": no_adversarial,
            "no_norm": ["--cluster_mode", "no_norm"],
            "shared_head": ["--shared_gradient", "head"],
        }[value]
    if series == "dim":
        return margin if value == "0" else ["--embed_sizes", str(base.embed_sizes[0]), value]
    if series == "adversarial":
        return [] if value == "on" else ["--adv_weights", *[value] * len(base.adversarial)]
    return [f"--{SERIES[series][0]}", value]


def train(words: Sequence[str]) -> int:
    """Run a command to its end and return its exit code as a shell does."""
    process = subprocess.Popen(words)
    try:
        code = process.wait()
    except KeyboardInterrupt as stop:
        if errors.stop_signal not in (None, signal.SIGINT):  # Ctrl-C already reaches the run
            process.send_signal(errors.stop_signal)
        process.wait()
        stop.add_note("the same command resumes the series")
        raise
    return code if code >= 0 else 128 - code


def trained_folder(folder: Path) -> Path | None:
    """Return the folder of a run of this name with a checkpoint; a counter may follow the name."""
    folders = [folder, *sorted(folder.parent.glob(f"{glob.escape(folder.name)}_[0-9]*"))]
    return next((path for path in folders if (path / "last.pth.tar").exists()), None)


def is_being_trained(folder: Path) -> bool:
    """Tell whether another process is training the run in a folder."""
    try:
        with locked(folder) if (folder / ".lock").exists() else contextlib.nullcontext():
            return False
    except InputError:
        return True


def fits(words: Sequence[str], parser: OneLineParser) -> bool:
    """Tell whether main.py accepts a command line; if not, it prints why."""
    logging.disable(logging.INFO)  # the run itself will log the same
    try:
        with contextlib.ExitStack() as locks:  # released at once, for the run itself
            return bool(options.resolve(words, parser, locks))
    except SystemExit:
        return False
    finally:
        logging.disable(logging.NOTSET)


def compare_series(series: str, first: str, folders: Mapping[str, Sequence[Path]], table: str) -> None:
    """Compare the runs of a series, and replace its table and plot.

    Args:
        first: first value of the series.
        folders: run folders of each value.
        table: path of the table and the plot, without suffix.
    """
    against = folders[first][0] if series == "mining" and first in folders else None
    if series == "mining" and against is None:
        print(f"no run of {first} to compare with")
    runs = sum(folders.values(), [])
    compare_runs(runs, over=SERIES[series][0], against=against, csv=f"{table}.csv", plot=f"{table}.svg")


@output.logged()
@errors.stop_on_signals()
@errors.one_line_errors(PROG)
def main(get_main_parser: Callable[[], OneLineParser], argv: Sequence[str] | None = None) -> None:
    """Train a series and compare its runs, as a command line asks.

    Args:
        get_main_parser: main.get_args_parser. Result_Runs.sh passes it, as report/ must not import main.py.
        argv: the command line after the program's name; None: that of this process.
    """
    args, flags = parse_args(argv)
    os.environ.setdefault("PYTHON", sys.executable)  # Result_Runs.sh runs this Python
    setup = ["--dataset", args.dataset]
    command = [os.environ["PYTHON"], str(ROOT / "main.py"), *setup]
    if args.dataset in SETUPS:
        command = ["bash", str(ROOT / PROG), SETUPS[args.dataset]]
        setup = subprocess.check_output([*command[:2], "flags", SETUPS[args.dataset]], text=True).split()
    setup += ["--savename", args.savename, *flags]
    base, _ = options.resolve(setup, get_main_parser(), contextlib.ExitStack())  # exits on bad input
    values = {value: value_flags(args.series, value, base) for value in args.values}
    failed = [value for value in values if not fits([*setup, *values[value]], get_main_parser())]
    if len(failed) == len(values):
        sys.exit(2)
    first_seed, folders = 0 if args.dataset in PUBLISHED else 1, {}
    for value in [value for value in values if value not in failed]:
        for seed in map(str, range(first_seed, first_seed + args.seeds)):
            print(f"== {args.series} {value}, seed {seed}")
            name = f"{args.savename}_{value}_seed{seed}"
            of_run = ["--seed", seed, "--save_path", args.save_path, "--savename", name, "--go_on"]
            folder = Path(args.save_path, args.dataset, name)
            if is_being_trained(trained_folder(folder) or folder):
                print("skipped: another process trains it")
            elif code := train([*command, *flags, *values[value], *of_run]):
                if code in STOPPED:
                    sys.exit(code)
                failed.append(f"{value}_seed{seed}")
                if code == 2:
                    break  # bad input fails with every seed
            if trained_folder(folder):
                folders.setdefault(value, []).append(trained_folder(folder))
    if folders:
        table = os.path.join(args.save_path, args.dataset, args.savename)
        compare_series(args.series, args.values[0], folders, table)
    if failed:
        sys.exit(f"{PROG}: failed: {' '.join(failed)}")
