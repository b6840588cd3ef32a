"""A series of runs, one for each value of a flag and each seed, and their comparison at the end.

bash Result_Runs.sh ablation SERIES DATASET [--seeds N] [--values V ...] [more flags of main.py]
"""

import argparse
import glob
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from data.published import PUBLISHED
from report.compare import compare_runs
from run.options import PATH, whole
from support.errors import Interrupted, OneLineParser, one_line_errors, set_up_output, signals_stop

PROG = "Result_Runs.sh"
ROOT = Path(__file__).resolve().parent.parent
SETUPS = {**{name: name for name in PUBLISHED}, "shapes": "demo"}
"""Data sets with a set-up in Result_Runs.sh, and its name."""

STOPPING = (2, 129, 130, 143)
"""Exit codes of a run that end the series: bad flags, or told to stop."""

SERIES = {
    "clusters": ("shared_num_classes", "5 10 20 30 50 100 150 200 250 300", "the number of mined clusters"),
    "interval": ("cluster_update_freq", "1 3 5 10 20 50", "the epochs between two minings"),
    "dim": ("embed_sizes", "0 64 128 256 512 1024", "of the Shared embedding; 0 is the plain margin-loss baseline"),
    "adversarial": ("adv_weights", "0 on", "on is the weight of the set-up"),
    "standardise": ("cluster_mode", "no_norm mean mstd", "what of each class is taken out before the first clustering"),
    "mining": (None, "margin margin_steps mic no_adversarial no_norm shared_head", "whether mining helps: margin is "
               "the plain margin-loss baseline, margin_steps the same with as many steps of the optimiser as MIC takes "
               "in more epochs, no_adversarial MIC with --adv_weights 0, no_norm MIC with --cluster_mode no_norm, "
               "shared_head MIC with --shared_gradient head; ends with the differences to the first of them, paired by "
               "seed"),
}  # fmt: skip
"""A series' flag, its values, and what they are; mining sets several flags."""

HELP = """\
Trains one run for each value of a flag and each of N seeds, with the set-up of the data set (shapes: the demo's; your
own: the defaults and your flags), and then compares them: a table, and ablation_SERIES.csv and ablation_SERIES.svg
beside the runs. Rerunning a series skips finished runs and resumes interrupted ones.

SERIES is
{}

--values runs others than these, for example a smaller series on a CPU:
  bash Result_Runs.sh ablation clusters shapes --values 4 8 16 --seeds 2 --n_epochs 4"""


def get_args_parser() -> OneLineParser:
    """Return the parser of the series' own flags; all others are main.py's."""
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
    seeds = "seeds for each value, from 0 for the published set-ups, else from 1 (default: 1)"
    add("--seeds", type=whole(1), default=1, metavar="N", help=seeds)
    add("--values", nargs="+", metavar="V", help="values other than those of the series")
    add("--save_path", type=PATH, default="./Training_Results", metavar="FOLDER", help="runs go to FOLDER/DATASET")
    add("--savename", metavar="NAME", help="first word of the runs' names (default: ablation_SERIES)")
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the series, and those of main.py; what does not fit ends in one line, with exit code 2."""
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


def value_flags(series: str, value: str) -> list[str]:
    """Return the flags of a value of a series other than mining."""
    if (series, value) == ("dim", "0"):
        return ["--task_p", "1", "0", "--adv_weights", "0"]
    if series == "dim":
        return ["--embed_sizes", "128", value]
    return [] if (series, value) == ("adversarial", "on") else [f"--{SERIES[series][0]}", value]


def mining_flags(dataset: str, flags: Sequence[str]) -> dict[str, list[str]]:
    """Return the flags of each value of the series mining, for the set-up of a data set with these flags.

    margin_steps trains so many epochs that the Class task alone takes as many steps as both tasks.
    """
    words = flags
    if dataset in SETUPS:
        printed = subprocess.check_output(["bash", str(ROOT / PROG), "flags", SETUPS[dataset], *flags])
        words = os.fsdecode(printed).split()
    parser = OneLineParser(prog=PROG, allow_abbrev=False, add_help=False)
    parser.add_argument("--n_epochs", type=int, default=130)
    parser.add_argument("--tau", type=int, nargs="+", default=[80])
    parser.add_argument("--task_p", type=float, nargs=2, default=[1.0, 0.8])
    parser.add_argument("--adv_weights", nargs="+", default=["2500"])
    args, _ = parser.parse_known_args(words)
    no_adversarial = ["--adv_weights", *["0"] * len(args.adv_weights)]
    margin = ["--task_p", "1", "0", *no_adversarial]
    per_iteration = sum(Fraction(str(p)) for p in args.task_p)  # steps of both tasks
    n_epochs, *tau = (str(math.ceil(per_iteration * epoch)) for epoch in (args.n_epochs, *args.tau))
    return {
        "margin": margin,
        "margin_steps": [*margin, "--n_epochs", n_epochs, "--tau", *tau],
        "mic": [],
        "no_adversarial": no_adversarial,
        "no_norm": ["--cluster_mode", "no_norm"],
        "shared_head": ["--shared_gradient", "head"],
    }


def train(words: Sequence[str]) -> int:
    """Run a command to its end and return its exit code, as a shell does."""
    process = subprocess.Popen(words)
    try:
        code = process.wait()
    except Interrupted as stop:
        if stop.signum == signal.SIGTERM:  # Ctrl-C reaches the run by itself
            process.terminate()
        process.wait()
        raise
    return code if code >= 0 else 128 - code


def trained_folder(folder: Path) -> Path | None:
    """Return the folder of a run of this name that stored something; it may have a counter behind its name."""
    folders = [folder, *sorted(folder.parent.glob(f"{glob.escape(folder.name)}_[0-9]*"))]
    return next((path for path in folders if (path / "last.pth.tar").exists()), None)


def compare_series(series: str, first: str, folders: Mapping[str, Sequence[Path]], table: str) -> None:
    """Compare the runs of a series and replace its table and plot. first: its first value. folders: of each value."""
    against = folders[first][0] if series == "mining" and first in folders else None
    if series == "mining" and against is None:
        print(f"no run of {first} to compare with")
    runs = sum(folders.values(), [])
    compare_runs(runs, over=SERIES[series][0], against=against, csv=f"{table}.csv", plot=f"{table}.svg")


@one_line_errors(PROG)
@signals_stop("the same command goes on with the series")
def main(argv: Sequence[str] | None = None) -> None:
    """Train a series and compare its runs, as a command line asks."""
    args, flags = parse_args(argv)
    os.environ.setdefault("PYTHON", sys.executable)  # what Result_Runs.sh starts
    command = [os.environ["PYTHON"], str(ROOT / "main.py"), "--dataset", args.dataset]
    if args.dataset in SETUPS:
        command = ["bash", str(ROOT / PROG), SETUPS[args.dataset]]
    mining = mining_flags(args.dataset, flags) if args.series == "mining" else None
    first_seed = 0 if args.dataset in PUBLISHED else 1
    failed, folders = [], {}
    for value in args.values:
        of_value = mining[value] if mining else value_flags(args.series, value)
        for seed in map(str, range(first_seed, first_seed + args.seeds)):
            print(f"== {args.series} {value}, seed {seed}")
            name = f"{args.savename}_{value}_seed{seed}"
            of_run = ["--seed", seed, "--save_path", args.save_path, "--savename", name, "--go_on"]
            code = train([*command, *flags, *of_value, *of_run])
            if code in STOPPING or (code == 2 and not folders):  # bad flags are the same in all runs
                sys.exit(code)
            if code:
                failed.append(f"{value}_seed{seed}")
            folder = trained_folder(Path(args.save_path, args.dataset, name))
            if folder:
                folders.setdefault(value, []).append(folder)
    if folders:
        table = os.path.join(args.save_path, args.dataset, args.savename)
        compare_series(args.series, args.values[0], folders, table)
    if failed:
        sys.exit(f"{PROG}: failed: {' '.join(failed)}")


if __name__ == "__main__":
    set_up_output()
    main()
