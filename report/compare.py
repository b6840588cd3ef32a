"""Stored runs against each other and against the paper."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from report import plots
from run.errors import InputError
from run.flags import PAIRS, shown
from run.folder import StoredRun, best_index, read_run, replaced_file

PAPER = {
    "cub200": {"": {"Recall @ 1": 0.661, "Recall @ 2": 0.768, "Recall @ 4": 0.856, "NMI": 0.697}},
    "cars196": {"": {"Recall @ 1": 0.826, "Recall @ 2": 0.891, "Recall @ 4": 0.932, "NMI": 0.684}},
    "online_products": {"": {"Recall @ 1": 0.772, "Recall @ 10": 0.894, "Recall @ 100": 0.956, "NMI": 0.900}},
    "in-shop": {"": {"Recall @ 1": 0.882, "Recall @ 10": 0.970, "Recall @ 30": 0.980, "Recall @ 50": 0.988}},
    "vehicle_id": {
        "Set 1": {"Recall @ 1": 0.869, "Recall @ 5": 0.934},
        "Set 3": {"Recall @ 1": 0.820, "Recall @ 5": 0.910},
    },
}
"""Scores of MIC with margin loss in the paper's tables, by data set and test set (Roth et al., ICCV 2019)."""

CLUSTERS = ("5", "10", "20", "30", "50", "100", "150", "200", "250", "300")
SIZES = ("0", "64", "128", "256", "512", "1024")
PAPER_ABLATIONS = {
    "shared_num_classes": {
        "cub200": dict(zip(CLUSTERS, (0.604, 0.612, 0.636, 0.647, 0.641, 0.633, 0.621, 0.599, 0.602, 0.587))),
        "cars196": dict(zip(CLUSTERS, (0.770, 0.769, 0.781, 0.786, 0.796, 0.798, 0.805, 0.805, 0.801, 0.800))),
        "online_products": dict(zip(CLUSTERS, (0.728, 0.731, 0.730, 0.738, 0.741, 0.742, 0.740, 0.745, 0.744, 0.742))),
    },
    "cluster_update_freq": {
        "cub200": {"1": 0.647, "50": 0.628},
        "cars196": {"1": 0.800, "50": 0.783},
        "online_products": {"1": 0.741, "50": 0.730},
    },
    "embed_sizes": {
        "cub200": dict(zip(SIZES, (0.636, 0.647, 0.657, 0.666, 0.670, 0.667))),
        "cars196": dict(zip(SIZES, (0.796, 0.817, 0.828, 0.842, 0.850, 0.845))),
    },
}
"""Recall@1 over a flag, by data set, read off the paper's plots, +-0.002; of the update interval its ends only."""

NO_SETTING = ("seed", "savename", "save_path", "source_path", "gpu", "kernels", "cache", "make_graph", "resume")
NO_SETTING += ("eval_shared", "tensorboard")
"""Flags in which runs of one setting may differ."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed only.

    label: data set, test set and the flags that make the setting, as text. flags: the same as they are typed. counted:
    the runs that count for means and differences, one of each seed.
    """

    label: str
    flags: dict[str, str]
    runs: list[StoredRun]
    counted: list[StoredRun]

    def scores(self, test_set: str, at: str) -> pd.DataFrame:
        """Return the scores of the runs that count, (seeds, scores), at the "best" or the "last" epoch."""
        return pd.DataFrame({seed_of(run): scores_at(run, test_set, at)[1] for run in self.counted}, dtype=float).T

    def differences(self, base: "Setting", test_set: str, at: str) -> pd.DataFrame:
        """Return the scores less those of another setting, of the seeds that both have.

        Runs of a seed have the first weights and the order of the images in common.
        """
        return (self.scores(test_set, at) - base.scores(test_set, at)).dropna(how="all")


def paper_scores(dataset: str) -> dict[str, dict[str, float]]:
    """Return the paper's {test set: {score: value}} of a data set; nothing for others than the five."""
    return PAPER.get(dataset, {})


def compare_runs(
    roots: Sequence[str | Path],
    *,
    over: str | None = None,
    against: str | Path | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
) -> None:
    """Print a table of stored runs for each data set and test set.

    roots: run folders, or folders of them. over: a flag; print Recall@1 over it too. against: the folder of one of the
    runs; give the differences to its setting too. csv, plot: files that take the table, and the curves over the epochs
    or what `over` or `against` ask for. Raises InputError where there is nothing to compare.
    """
    runs, reference = read_runs(roots, against)
    counted = runs_that_count(runs)
    if plot and not counted:
        raise InputError(f"--plot {plot}: no run is through with its epochs")
    with_flag = runs_with_flag(counted, over) if over else []
    tables, curves, lines, points = [], {}, {}, {}
    for dataset in dict.fromkeys(run.flags["dataset"] for run in runs):
        in_dataset = [run for run in runs if run.flags["dataset"] == dataset]
        if against:
            name_unpaired(settings_of(in_dataset, counted, dataset), reference, dataset)
        for test_set in dict.fromkeys(name for run in in_dataset for name in run.rows[0]["scores"]):
            scored = [run for run in in_dataset if test_set in run.rows[0]["scores"]]
            settings = settings_of(scored, counted, f"{dataset} {test_set}".rstrip())
            base = setting_of(reference, settings)
            table = table_of(settings, base, dataset, test_set)
            print(f"\n{dataset} {test_set}".rstrip())
            print(table_text(table))
            tables.append(table)
            curves |= {setting.label: curve(setting.counted, test_set) for setting in settings if setting.counted}
            points |= points_to_draw(base, settings, test_set)
            lines |= ablation_lines([run for run in scored if run in with_flag], dataset, test_set, over)
    if csv:
        with replaced_file(Path(csv), "w") as file:
            pd.concat(tables).to_csv(file, index=False)
    values = sorted({value for line in lines.values() for value in line}, key=by_number)
    if over:
        print(f"\nRecall @ 1 over --{over}, mean and standard deviation over runs")
        print(ablation_table(lines, values).to_string())
    if plot and over:
        plots.draw_ablation(Path(plot), over, values, lines)
    elif plot and points:
        plots.draw_differences(Path(plot), points, str(against))
    elif plot:
        plots.draw_comparison(Path(plot), curves)


def read_runs(roots: Sequence[str | Path], against: str | Path | None) -> tuple[list[StoredRun], StoredRun | None]:
    """Return the runs in some folders, or in folders of runs, and the one `against`; what cannot be read is named.

    Raises InputError where nothing can be read, or not the run `against`.
    """
    runs, reasons = {}, {}
    for resolved, folder in {path.resolve(): path for root in roots for path in run_folders(Path(root))}.items():
        try:
            runs[resolved] = read_run(folder)
        except InputError as error:
            print(f"skipped {error}")
            reasons[resolved] = str(error)
    if not runs:
        raise InputError(f"--compare: no run to read among {', '.join(map(str, roots))}")
    reference = Path(against).resolve() if against else None
    if reference and reference not in runs:
        reason = reasons.get(reference, "not the folder of one of the runs that are compared")
        raise InputError(f"--against {against}: {reason}")
    return list(runs.values()), runs.get(reference)


def run_folders(root: Path) -> list[Path]:
    """Return a run folder itself, or the folders in a folder of runs."""
    if (root / "hypa.pkl").exists() or not root.is_dir():
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")) or [root]


def seed_of(run: StoredRun) -> str:
    """Return the seed of a run as text, empty where it has none."""
    return shown(run.flags.get("seed", ""))


def epochs_done(run: StoredRun) -> int:
    """Return how many epochs of a run were through when it was scored last."""
    return run.rows[-1]["Epochs"] + 1


def runs_that_count(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Return the runs that count for means and differences: finished ones, of each setting and seed the first by name.

    The others are named. A run that does not tell how many epochs it has is finished.
    """
    counted = []
    for _, members in grouped(runs, described):
        first: dict[str, Path] = {}
        for run in sorted(members, key=lambda run: run.folder.name):
            done, seed = epochs_done(run), seed_of(run)
            if done != run.flags.get("n_epochs", done):
                print(f"left out of the means: {run.folder}, {done} of {run.flags['n_epochs']} epochs")
            elif seed in first:
                print(f"left out of the means: {run.folder}, repeats seed {seed} of {first[seed]}")
            else:
                first[seed] = run.folder
                counted.append(run)
    return counted


def runs_with_flag(runs: Sequence[StoredRun], flag: str) -> list[StoredRun]:
    """Return the runs that have a flag; the others are named. Raises InputError where there is none."""
    for run in runs:
        if flag not in run.flags:
            print(f"left out of --over: {run.folder}, which has no flag {flag}")
    with_flag = [run for run in runs if flag in run.flags]
    if not with_flag:
        raise InputError(f"--over {flag}: no run has this flag and is through with its epochs")
    return with_flag


def described(run: StoredRun, left_out: Sequence[str] = ()) -> dict[str, str]:
    """Return the flags that make a run's setting, as they are typed."""
    return {name: shown(value) for name, value in run.flags.items() if name not in (*NO_SETTING, *left_out)}


def grouped(
    runs: Sequence[StoredRun], describe: Callable[[StoredRun], dict[str, str]]
) -> list[tuple[dict[str, str], list[StoredRun]]]:
    """Group runs that are described alike; return for each group those of its entries in which groups differ."""
    descriptions = [describe(run) for run in runs]
    names = dict.fromkeys(name for entries in descriptions for name in entries)
    differing = [name for name in names if len({entries.get(name, "None") for entries in descriptions}) > 1]
    groups: dict[tuple, tuple[dict[str, str], list[StoredRun]]] = {}
    for run, entries in zip(runs, descriptions):
        own = {name: entries.get(name, "None") for name in differing}
        groups.setdefault(tuple(own.values()), (own, []))[1].append(run)
    return list(groups.values())


def settings_of(runs: Sequence[StoredRun], counted: Sequence[StoredRun], title: str) -> list[Setting]:
    """Return the settings of some runs of a data set; title: the first words of their labels."""
    return [
        Setting(", ".join([title, *map(" ".join, flags.items())]), flags, members, [r for r in members if r in counted])
        for flags, members in grouped(runs, described)
    ]


def setting_of(run: StoredRun | None, settings: Sequence[Setting]) -> Setting | None:
    """Return the setting that a run has; None where it is not among them."""
    return next((setting for setting in settings if run in setting.runs), None)


def name_unpaired(settings: Sequence[Setting], reference: StoredRun, dataset: str) -> None:
    """Print which runs of a data set that count have no part in the differences to the reference, and why."""
    base = setting_of(reference, settings)
    if base is None:
        print(f"--against {reference.folder}: no differences on {dataset}, of which it is no run")
        return
    if len(settings) == 1:
        print(f"--against {reference.folder}: no differences on {dataset}, where all runs have its setting")
    seeds = [seed_of(run) for run in base.counted]
    for run in (run for setting in settings for run in setting.counted):
        if seed_of(run) not in seeds:
            print(f"left out of the differences: {run.folder}, no run to compare with has its seed")


def scores_at(run: StoredRun, test_set: str, at: str) -> tuple[int, dict[str, float]]:
    """Return the "best" or the "last" scored epoch of a run, and its scores on a test set."""
    index = best_index(run.rows, test_set, run.flags.get("select", "test")) if at == "best" else -1
    return run.rows[index]["Epochs"], run.rows[index]["scores"][test_set]


def table_of(settings: Sequence[Setting], base: Setting | None, dataset: str, test_set: str) -> pd.DataFrame:
    """Return the table of a test set.

    It has two rows for each run, at its best epoch and at its last; mean and standard deviation over the runs of a
    setting; its differences to the base, paired by seed; its gap to the paper; and the paper's row.
    """
    paper, rows = paper_scores(dataset).get(test_set, {}), []
    for setting in settings:
        for at in ("best", "last"):
            head = {"data set": dataset, "test set": test_set, "run": "", **setting.flags, "seed": "", "at": at}
            for run in setting.runs:
                epoch, scores = scores_at(run, test_set, at)
                own = {"run": run.folder.name, "seed": seed_of(run), "epoch": epoch, "epochs done": epochs_done(run)}
                rows.append(head | own | scores)
            summary = summary_rows(setting, base, paper, test_set, at)
            rows += [head | {"run": name} | dict(scores) for name, scores in summary.items()]
    if paper:
        rows.append({"data set": dataset, "test set": test_set, "run": "paper: MIC + margin"} | paper)
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def summary_rows(
    setting: Setting, base: Setting | None, paper: Mapping[str, float], test_set: str, at: str
) -> dict[str, Mapping[str, float]]:
    """Return the rows of the table below the runs of a setting, by their names; none where no run counts."""
    scores, rows = setting.scores(test_set, at), {}
    means = scores.mean(skipna=False)
    if len(scores) > 1:
        rows[f"mean of {len(scores)}"] = means
        rows["standard deviation"] = scores.std(skipna=False)
    if base and setting is not base:
        differences = setting.differences(base, test_set, at)
        if len(differences):
            rows[f"difference, mean of {len(differences)}"] = differences.mean(skipna=False)
        if len(differences) > 1:
            low, high = confidence_interval(differences.to_numpy())
            rows["95 % interval from"] = pd.Series(low, differences.columns)
            rows["95 % interval to"] = pd.Series(high, differences.columns)
    if paper and len(scores):
        rows["gap to the paper"] = {name: means[name] - value for name, value in paper.items() if name in means}
    return rows


def confidence_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the confidence interval of the mean of values (n, ...), by Student's t.

    Of one value it is empty, from the value to the value.
    """
    n = len(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(values) if n > 1 else 0
    return values.mean(0) - half, values.mean(0) + half


def table_text(table: pd.DataFrame) -> str:
    """Return a table as it is printed: whole epochs, scores with four digits, nothing for what is not there."""
    shown_columns = {}
    for name, column in table.drop(columns=["data set", "test set"]).items():
        digits = 0 if name in ("epoch", "epochs done") else 4
        texts = [f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in column]
        shown_columns[name] = ["" if text == "nan" else text for text in texts]
    return pd.DataFrame(shown_columns).to_string(index=False)


def curve(runs: Sequence[StoredRun], test_set: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs (E,) that all runs have scored, and their Recall@1 (runs, E)."""
    recalls = [{row["Epochs"]: row["scores"][test_set]["Recall @ 1"] for row in run.rows} for run in runs]
    epochs = sorted(set.intersection(*map(set, recalls)))
    return np.array(epochs), np.array([[by_epoch[epoch] for epoch in epochs] for by_epoch in recalls])


def points_to_draw(
    base: Setting | None, settings: Sequence[Setting], test_set: str
) -> dict[tuple[str, str, str], tuple[np.ndarray, float, float]]:
    """Return the differences of the other settings to the base as plots.draw_differences draws them.

    The name of a setting begins with that of its series: what its runs are called before "_seed1", "_seed2", .... A
    score that some seed lacks is left out.
    """
    points = {}
    for setting in (setting for setting in settings if base and setting is not base):
        series = {re.sub(r"_seed\d+(_\d+)?$", "", run.folder.name) for run in setting.runs}
        has_name = len(series) == 1 and "_seed" in setting.runs[0].folder.name
        name = f"{series.pop()}, {setting.label}" if has_name else setting.label
        for at in ("best", "last"):
            differences = setting.differences(base, test_set, at).dropna(axis=1)
            for score in [score for score in ("Recall @ 1", "NMI", "mAP @ R") if score in differences]:
                values = differences[score].to_numpy()
                if len(values):
                    points[score, name, at] = (values, *confidence_interval(values))
    return points


def ablated_value(run: StoredRun, flag: str) -> str:
    """Return a run's value of a flag as it is typed; of a pair that of the Shared task.

    A run without the Shared task has a Shared embedding of size 0.
    """
    if flag == "embed_sizes" and run.flags.get("task_p", [1])[-1] == 0:
        return "0"
    value = run.flags[flag][-1] if flag in PAIRS else run.flags[flag]
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return f"{value:g}" if isinstance(value, float) else shown(value)


def ablation_lines(
    runs: Sequence[StoredRun], dataset: str, test_set: str, flag: str
) -> dict[str, dict[str, list[float]]]:
    """Return lines of Recall@1 over a flag, {name: {value of the flag: of each run}}: at the best epoch, at the last,
    and the paper's where there is one. Runs that differ in other flags than this one and the seed are in other lines.
    """

    def describe(run: StoredRun, *left_out: str) -> dict[str, str]:
        """Return what a run's line is for: its other flags, and the Class task's value of this one."""
        of_class = {f"{flag} of Class": shown(run.flags[flag][0])} if flag in PAIRS else {}
        return described(run, (flag, *left_out)) | of_class

    # A run without the Shared task, of an embedding of size 0, belongs to every line
    without = [run for run in runs if flag == "embed_sizes" and ablated_value(run, flag) == "0"]
    lines: dict[str, dict[str, list[float]]] = {}
    for flags, members in grouped([run for run in runs if run not in without] or without, describe):
        mining = ("task_p", "adv_weights")
        members += [r for r in without if r not in members and describe(r, *mining) == describe(members[0], *mining)]
        for at in ("best", "last"):
            words = [dataset, test_set, *map(" ".join, flags.items()), at, "epoch"]
            points = lines.setdefault(" ".join(filter(None, words)), {})
            for run in members:
                recall = scores_at(run, test_set, at)[1]["Recall @ 1"]
                points.setdefault(ablated_value(run, flag), []).append(recall)
    paper = PAPER_ABLATIONS.get(flag, {}).get(dataset, {})
    if lines and paper and not test_set:
        lines[f"paper, {dataset}"] = {value: [recall] for value, recall in paper.items()}
    return lines


def by_number(value: str) -> tuple[float, str]:
    """Return the key that sorts values of a flag: numbers by size, then words."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def ablation_table(lines: Mapping[str, Mapping[str, Sequence[float]]], values: Sequence[str]) -> pd.DataFrame:
    """Return ablation_lines as text: a row for each value of the flag, a column for each line."""

    def cell(recalls: Sequence[float]) -> str:
        """Return the mean, with standard deviation and number where there are several runs."""
        spread = f" +- {np.std(recalls, ddof=1):.4f} ({len(recalls)} runs)" if len(recalls) > 1 else ""
        return f"{np.mean(recalls):.4f}{spread}" if len(recalls) else ""

    columns = {name: [cell(points.get(value, [])) for value in values] for name, points in lines.items()}
    return pd.DataFrame(columns, index=list(values))
