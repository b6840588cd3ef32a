"""Comparison of stored runs with each other and with the paper."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from data.published import dataset_info
from report import plots
from run.history import History, column, fill_in_flags, scores_of, shown, test_sets_of
from run.options import PAIRS, makes_setting
from run.provenance import VERSIONS
from support.errors import InputError, first_few
from support.files import replaced_file


@dataclass(frozen=True)
class Setting:
    """Runs on a data set that differ only in the seed.

    Attributes:
        name: name of the setting.
        flags: flags in which the settings differ, as they are typed.
        runs: all runs of the setting.
        counted: runs that count for means, by seed.
    """

    name: str
    flags: dict[str, str]
    runs: list[History]
    counted: dict[str, History]

    def scores(self, test_set: str, at: str) -> pd.DataFrame:
        """Return the scores of the counted runs, (seeds, scores), at the "best" or the "last" epoch."""
        by_seed = {seed: scores_at(run, test_set, at)[1] for seed, run in self.counted.items()}
        return pd.DataFrame(by_seed, dtype=float).T

    def differences(self, base: "Setting", test_set: str, at: str) -> pd.DataFrame:
        """Return the scores minus those of another setting, paired by seed: such runs start with equal weights."""
        return (self.scores(test_set, at) - base.scores(test_set, at)).dropna(how="all")

    def curve(self, test_set: str) -> pd.DataFrame:
        """Return Recall@1 of the counted runs, (epochs that all of them have scored, runs)."""
        recall, by_seed = column(test_set, "Recall @ 1"), {}
        for seed, run in self.counted.items():
            by_seed[seed] = {row["Epochs"]: row[recall] for row in run.rows["val"]}
        return pd.DataFrame(by_seed).dropna().sort_index()


def compare_runs(
    roots: Sequence[str | Path],
    *,
    over: str | None = None,
    against: str | Path | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
) -> None:
    """Print a table of stored runs for each data set and test set.

    Args:
        roots: run folders, or folders that contain run folders.
        over: a flag; also print Recall@1 over its values.
        against: folder of one of the runs; also give the differences to its setting.
        csv: file for the table.
        plot: file for the curves over the epochs, or for what `over` or `against` ask for.

    Raises:
        InputError: there is nothing to compare or to plot, or no run matches `over` or `against`.
    """
    runs = read_runs(roots)
    reference = runs.get(Path(os.path.realpath(against))) if against else None
    if against and reference is None:
        raise InputError(f"--against {against}: not the folder of one of the runs that are compared")
    if over and not any(over in run.flags for run in runs.values()):
        raise InputError(f"--over {over}: no run has this flag")
    tables, curves, lines, points, base_name = [], {}, {}, {}, ""
    comparisons = comparisons_of(list(runs.values()))
    for dataset, test_set, settings in comparisons:
        title = dataset if test_set == "test" else f"{dataset} {test_set}"
        prefix = f"{title}, " if len(comparisons) > 1 else ""
        base = next((setting for setting in settings if reference in setting.runs), None)
        tables.append(table_of(settings, base, dataset, test_set))
        print(f"\n{title}\n{table_text(tables[-1], settings[0].flags)}")
        curves |= {prefix + setting.name: setting.curve(test_set) for setting in settings if setting.counted}
        if over:
            lines |= ablation_lines(settings, dataset, test_set, over, prefix)
        if base:
            points |= points_to_draw(settings, base, test_set, prefix)
            base_name = f"{dataset}, {base.name}"
    if plot and not curves:
        raise InputError(f"--plot {plot}: no run has finished all its epochs")
    if against and not points:
        print(f"--against {against}: no other setting has a finished run on the same data set with the same seed")
    if csv:
        with replaced_file(Path(csv), "w") as file:
            pd.concat(tables).to_csv(file, index=False)
        print(f"table: {csv}")
    if over:
        print(f"\nRecall @ 1 over --{over}, mean and standard deviation over runs")
        print(ablation_table(lines).map(mean_text).to_string())
    if plot:
        if over:
            plots.draw_ablation(Path(plot), over, ablation_table(lines))
        elif points:
            plots.draw_differences(Path(plot), points, base_name)
        else:
            plots.draw_comparison(Path(plot), curves)
        print(f"plot: {plot}")


def read_runs(roots: Sequence[str | Path]) -> dict[Path, History]:
    """Return the runs in some folders, or in folders of runs, by resolved path; print which ones cannot be read.

    Raises:
        InputError: no run can be read.
    """
    folders = [folder for root in roots for folder in run_folders(Path(root))]
    runs = {}
    for resolved, folder in {Path(os.path.realpath(folder)): folder for folder in folders}.items():
        try:
            runs[resolved] = read_scored(folder)
        except InputError as error:
            print(f"skipped {error}")
    fill_in_flags(list(runs.values()))
    if not runs:
        holders = sorted({str(path.parents[1]) for root in roots for path in Path(root).glob("*/*/hypa.pkl")})
        hint = f"; there are runs in {first_few(holders)}: give these folders" if holders else ""
        raise InputError(f"--compare: no run to read among {', '.join(map(str, roots))}{hint}")
    return runs


def read_scored(folder: Path) -> History:
    """Return the history of a run that has been scored.

    Raises:
        InputError: the run cannot be read, or no epoch has been scored.
    """
    history = History.read(folder)
    if not history.rows["val"]:
        raise InputError(f"{folder}: no epoch has been scored yet")
    return history


def run_folders(root: Path) -> list[Path]:
    """Return the folders in a folder, or the folder itself if it is a run folder or holds no folders."""
    if os.path.exists(root / "hypa.pkl"):
        return [root]
    try:
        inside = [root / name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    except OSError:
        return [root]
    return [path for path in inside if os.path.isdir(path)] or [root]


def comparisons_of(runs: Sequence[History]) -> list[tuple[str, str, list[Setting]]]:
    """Return (data set, test set, settings scored on it) for each data set and test set."""
    found: dict[tuple[str, str], list[Setting]] = {}
    for dataset in dict.fromkeys(run.flags["dataset"] for run in runs):
        for setting in settings_of([run for run in runs if run.flags["dataset"] == dataset]):
            for test_set in test_sets_of(setting.runs[0].rows["val"][0]):
                found.setdefault((dataset, test_set), []).append(setting)
    return [(dataset, test_set, settings) for (dataset, test_set), settings in found.items()]


def settings_of(runs: Sequence[History]) -> list[Setting]:
    """Group the runs on a data set into settings.

    Means and differences count finished runs, for each seed the first one by name; print which ones are left out. Also
    print if the runs of a setting come from different versions of the program or of packages.
    """
    settings = []
    groups = []
    for flags, members in grouped(setting_flags(runs)):
        groups.append((flags, [runs[i] for i in members]))
    for name, (flags, members) in zip(setting_names(groups), groups):
        counted: dict[str, History] = {}
        for run in sorted(members, key=lambda run: run.folder.name):
            done, seed = run.rows["val"][-1]["Epochs"] + 1, seed_of(run)
            if done != run.n_epochs:
                print(f"left out of the means: {run.folder}, {done} of {run.n_epochs} epochs")
            elif seed in counted:
                print(f"left out of the means: {run.folder}, repeats seed {seed} of {counted[seed].folder}")
            else:
                counted[seed] = run
        starts = [start for run in members for start in run.provenance or [{}]]
        for what in VERSIONS:
            versions = sorted({start.get(what, "unknown") for start in starts})
            if len(versions) > 1:
                print(f"{name}: runs of different versions of {what}: {'; '.join(versions)}")
        settings.append(Setting(name, flags, members, counted))
    return settings


def setting_names(groups: Sequence[tuple[Mapping[str, str], Sequence[History]]]) -> list[str]:
    """Return a name for each setting.

    If the folder names of a setting's runs differ only in _seedN, use the rest of that name, without the
    ablation_SERIES that Result_Runs.sh puts in front. Otherwise use the flags that differ.

    Args:
        groups: (flags in which the settings differ, runs) of each setting.
    """
    names = []
    for _, members in groups:
        stems = {re.sub(r"_seed\d+(_\d+)?$", "", run.folder.name) for run in members}
        is_series = len(stems) == 1 and stems.isdisjoint(run.folder.name for run in members)
        names.append(re.sub(r"^ablation_[^_]+_", "", stems.pop()) if is_series else "")
    by_flags = [", ".join(map(" ".join, flags.items())) or "all runs" for flags, _ in groups]
    return [name if name and names.count(name) == 1 else full for name, full in zip(names, by_flags)]


def grouped(flags: pd.DataFrame) -> list[tuple[dict[str, str], list[int]]]:
    """Group runs with equal flags.

    Args:
        flags: one row per run, one column per flag.

    Returns:
        For each group, its values of the flags that differ between groups, and its rows.
    """
    flags = flags.loc[:, flags.nunique() > 1]
    if flags.empty:
        return [({}, list(flags.index))]
    groups = [members for _, members in flags.groupby(list(flags), sort=False)]
    return [(members.iloc[0].to_dict(), list(members.index)) for members in groups]


def setting_flags(runs: Sequence[History]) -> pd.DataFrame:
    """Return the flags that define the settings of runs, as they are typed: one row per run, one column per flag."""
    names = dict.fromkeys(flag for run in runs for flag in run.flags if makes_setting(flag))
    rows = []
    for run in runs:
        rows.append({flag: shown(run.flags.get(flag)) for flag in names})
    return pd.DataFrame(rows, dtype=object)


def seed_of(run: History) -> str:
    """Return the seed of a run as text, empty if it has none."""
    return shown(run.flags.get("seed", ""))


def scores_at(run: History, test_set: str, at: str) -> tuple[int, dict[str, float]]:
    """Return the "best" or the "last" scored epoch of a run, and its scores on a test set."""
    row = run.rows["val"][run.best_index(test_set) if at == "best" else -1]
    return row["Epochs"], scores_of(row, test_set)


def table_of(settings: Sequence[Setting], base: Setting | None, dataset: str, test_set: str) -> pd.DataFrame:
    """Return the table of a test set.

    It has the runs and the summary_rows of each setting, at the best and at the last epoch, and the paper's row.
    """
    paper, rows = scores_of(dataset_info(dataset).scores, test_set), []
    for setting in settings:
        for at in ("best", "last"):
            head = {"data set": dataset, "test set": test_set, "setting": setting.name if setting.flags else None}
            head |= {"run": "", **setting.flags, "seed": "", "at": at}
            for run in setting.runs:
                epoch, scores = scores_at(run, test_set, at)
                row = head | {"run": run.folder.name, "seed": seed_of(run), "epoch": epoch}
                row["epochs done"] = run.rows["val"][-1]["Epochs"] + 1
                row["left out"] = None if setting.counted.get(seed_of(run)) is run else "yes"
                rows.append(row | scores)
            summary = summary_rows(setting, base, paper, test_set, at)
            rows += [head | {"run": name} | dict(scores) for name, scores in summary.items()]
    if paper:
        rows.append({"data set": dataset, "test set": test_set, "run": "paper: MIC + margin"} | paper)
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def summary_rows(
    setting: Setting, base: Setting | None, paper: Mapping[str, float], test_set: str, at: str
) -> dict[str, pd.Series]:
    """Return the rows below the runs of a setting, by name; none if no run counts.

    They are the mean and standard deviation, differences to the base with their confidence interval, and the gap to the
    paper.
    """
    scores, rows = setting.scores(test_set, at), {}
    means = scores.mean(skipna=False)
    if len(scores) > 1:
        rows[f"mean of {len(scores)}"] = means
        rows["standard deviation"] = scores.std(skipna=False)
    differences = setting.differences(base, test_set, at) if base and setting is not base else []
    if len(differences):
        mean, half = mean_and_half_interval(differences)
        rows[f"difference, mean of {len(differences)}"] = mean
        if len(differences) > 1:
            rows |= {"95 % interval from": mean - half, "95 % interval to": mean + half}
    if paper and len(scores):
        rows["gap to the paper"] = (means - pd.Series(paper)).dropna()
    return rows


def mean_and_half_interval(values: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return the mean of each column, and half the width of its 95 % confidence interval by Student's t.

    Columns with missing values have neither (NaN), and a single row has no interval (NaN).
    """
    half = values.sem(skipna=False) * stats.t.ppf(0.975, len(values) - 1)
    return values.mean(skipna=False), half


def table_text(table: pd.DataFrame, flags: Iterable[str]) -> str:
    """Return a table as text, without the columns of these flags; scores have four decimals."""
    whole = dict.fromkeys(["epoch", "epochs done"], "{:.0f}".format)
    table = table.drop(columns=["data set", "test set", *flags], errors="ignore")
    return table.to_string(index=False, na_rep="", formatters=whole, float_format="{:.4f}".format)


def points_to_draw(
    settings: Sequence[Setting], base: Setting, test_set: str, prefix: str
) -> dict[tuple[str, str, str], tuple[np.ndarray, float]]:
    """Return the differences of the other settings to the base, as plots.draw_differences takes them.

    Scores that are missing for some seed are left out.
    """
    points = {}
    for setting in [setting for setting in settings if setting is not base]:
        for at in ("best", "last"):
            differences = setting.differences(base, test_set, at).dropna(axis=1)
            _, half = mean_and_half_interval(differences)
            for score in ("Recall @ 1", "NMI", "mAP @ R"):
                if score in differences and len(differences):
                    points[score, prefix + setting.name, at] = (differences[score].to_numpy(), half[score])
    return points


def ablated_value(run: History, flag: str) -> str:
    """Return a run's value of a flag as it is typed; "None" if the run lacks the flag.

    Of a pair of values this is the Shared task's. A run without the Shared task counts as having a Shared embedding of
    size 0.
    """
    if flag == "embed_sizes" and run.flags.get("task_p", [1])[-1] == 0:
        return "0"
    value = run.flags.get(flag)
    if isinstance(value, list) and (flag in PAIRS or len(value) == 1):
        value = value[-1]
    return f"{value:g}" if isinstance(value, float) else shown(value)


def ablation_lines(
    settings: Sequence[Setting], dataset: str, test_set: str, flag: str, prefix: str
) -> dict[str, dict[str, list[float]]]:
    """Return lines of Recall@1 over a flag: at the best epoch, at the last one, and the paper's if there is one.

    Runs that differ in any flag but this one and the seed are on different lines. The name of a line is the prefix and
    the flags that differ.

    Returns:
        {name of the line: {value of the flag: Recall@1 of each run}}.
    """

    runs = [run for setting in settings for run in setting.counted.values()]
    flags = setting_flags(runs).drop(columns=flag, errors="ignore")
    if flag in PAIRS:  # only the Shared task's value varies along a line
        flags[f"{flag} of Class"] = [shown(run.flags[flag][0]) if flag in run.flags else "None" for run in runs]
    # A run without the Shared task counts as one with an embedding of size 0, and belongs to every line
    without = [i for i, run in enumerate(runs) if flag == "embed_sizes" and ablated_value(run, flag) == "0"]
    alike = flags.drop(columns=["task_p", "adv_weights"], errors="ignore")
    lines: dict[str, dict[str, list[float]]] = {}
    for differing, members in grouped(flags.drop(index=without) if len(without) < len(runs) else flags):
        members += [i for i in without if i not in members and alike.loc[i].equals(alike.loc[members[0]])]
        for at in ("best", "last"):
            points = lines.setdefault(prefix + " ".join([*map(" ".join, differing.items()), at, "epoch"]), {})
            for run in [runs[i] for i in members]:
                recall = scores_at(run, test_set, at)[1]["Recall @ 1"]
                points.setdefault(ablated_value(run, flag), []).append(recall)
    paper = dataset_info(dataset).ablations.get(flag, {})
    if paper and test_set == "test":
        lines[f"paper, {dataset}"] = {value: [recall] for value, recall in paper.items()}
    return lines


def ablation_table(lines: Mapping[str, Mapping[str, Sequence[float]]]) -> pd.DataFrame:
    """Return ablation_lines as a table with a row per value of the flag, numbers first; NaN where a line has no run."""
    table = pd.DataFrame({name: pd.Series(points, dtype=object) for name, points in lines.items()})
    return table.sort_index(key=lambda values: pd.to_numeric(values, errors="coerce"), kind="stable")


def mean_text(recalls: Sequence[float] | float) -> str:
    """Return the mean, with standard deviation and number if there are several runs; empty for NaN."""
    if isinstance(recalls, float):
        return ""
    spread = f" +- {np.std(recalls, ddof=1):.4f} ({len(recalls)} runs)" if len(recalls) > 1 else ""
    return f"{np.mean(recalls):.4f}{spread}"
