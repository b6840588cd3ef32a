"""Draw Recall@1 and how well a known factor is read from the Class embedding over the epochs, for several settings.

    python benchmarks/factor_curves.py FILE.svg FACTOR NAME=FOLDERS [NAME=FOLDERS ...]

FACTOR is a column of factors.csv. FOLDERS is a glob pattern that matches the run folders of one setting, which differ
only in the seed, for example 'mic=Training_Results/faces/ablation_mining_mic_seed*'. Each panel shows the mean over
the runs of each setting, with a band of one standard deviation. The factor is read as in log_probe.csv, from training
and from test images.
"""

import argparse
import glob
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402

from report import plots  # noqa: E402


def column_of(folders: list[str], log: str, column: str) -> pd.DataFrame:
    """Return a column of the logs of some runs, (epochs, runs), for the epochs that all runs have logged."""
    logs = [pd.read_csv(Path(folder) / log, index_col="Epochs")[column] for folder in folders]
    return pd.concat(logs, axis="columns").dropna()


def main() -> None:
    """Read the logs and draw the panels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("factor")
    parser.add_argument("settings", nargs="+", metavar="NAME=FOLDERS")
    args = parser.parse_args()
    panels = {
        "Recall @ 1 on the test classes": ("log_val_Class.csv", "Recall @ 1"),
        f"{args.factor}: read from Class, test images": ("log_probe.csv", f"Test {args.factor} from Class"),
        f"{args.factor}: read from Class, training images": ("log_probe.csv", f"{args.factor} from Class"),
    }
    runs = {name: sorted(glob.glob(pattern)) for name, pattern in (text.split("=", 1) for text in args.settings)}
    with plots.saved_figure(args.file, figsize=(12.8, 4.4), layout="constrained") as figure:
        for axis, (title, (log, column)) in zip(figure.subplots(1, len(panels)), panels.items()):
            for i, (name, folders) in enumerate(runs.items()):
                values = column_of(folders, log, column)
                look = {"color": plots.COLOURS[i], "marker": plots.MARKERS[i], "markersize": 5}
                plots.draw_means(axis, values.index, values.to_numpy(), look, f"{name} ({len(folders)} runs)")
            axis.set(xlabel="epoch")
            axis.set_title(title, loc="left", fontsize=11)
            plots.format_axis(axis, 5)
        figure.legend(handles=axis.lines, loc="outside lower center", ncols=len(runs), frameon=False)


if __name__ == "__main__":
    main()
