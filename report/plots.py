"""Plots of single runs and comparisons. The same figure always gives the same bytes."""

import contextlib
import functools
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from data.images import VALIDATION
from report import fonts
from run.history import History, Row, column, scores_of
from support.errors import first_line
from support.files import replaced_file
from support.output import log

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
"""Colours that colour-blind readers can tell apart (Okabe and Ito), with a darker one in place of yellow."""

MARKERS, LINES = "osD^vP*X", ("-", "--", ":", "-.")

STYLE = {
    "svg.hashsalt": "mic",
    "svg.fonttype": "none",  # keeps text editable, and takes a quarter less time
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

BEST_MARK = {"marker": "*", "markersize": 17, "color": "#e69f00", "markeredgecolor": "black", "linestyle": "none"}


@contextlib.contextmanager
def saved_figure(path: Path, **options) -> Iterator[Figure]:
    """Yield a new figure to draw on, then write it, without a date, as .svg, .png or .pdf by the path's suffix.

    It looks the same whatever the user's matplotlibrc says.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # Characters that no font of this machine covers appear as boxes; in an SVG the browser may still find a font
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure = Figure(**options)
        yield figure
        for text in figure.findobj(Text):
            families = fonts.families_for(text.get_text())
            if families:
                text.set_fontfamily(families)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        with replaced_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)


@functools.cache
def warn(path: Path, reason: str) -> None:
    """Log a warning, once per process."""
    log.warning(f"{path}: {reason}")


@contextlib.contextmanager
def warned(path: Path) -> Iterator[None]:
    """Log failures to draw a picture or a page as warnings, as they must not end training."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("DataLoader worker"):  # a worker may die at any time; that must end the run
            raise
        if isinstance(error, OSError):
            warn(path, f"cannot be written ({error.strerror or first_line(error)})")
        else:
            warn(path, f"cannot be drawn ({type(error).__name__}: {first_line(error)})")


def draw_progress(path: Path, history: History, test_set: str) -> None:
    """Draw a run: losses and learning rate on the left, one panel each, a test set's scores on the right.

    Minings, drops of the learning rate and the best epoch are marked. Before the first evaluation the right side is
    empty.
    """
    losses = logged_values(history.rows["train"])
    scores = logged_values([plotted_scores(row, test_set) for row in history.rows["val"]])
    parts = [name for name in losses if name.endswith("Loss") and name != "Train Loss"]
    parts += [name for name in losses if name == "Learning Rate"]
    index = history.best_index(test_set)
    best_epoch = None if index is None else history.rows["val"][index]["Epochs"]
    with saved_figure(path, figsize=(12.8, 6.4)) as figure:
        heights = [0.4 if name == "Learning Rate" else 1 for name in parts] or [1]
        sides = {"left": 0.075, "right": 0.41, "bottom": 0.16, "top": 0.86, "hspace": 0.4}
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, **sides)
        loss_axes = [figure.add_subplot(cell) for cell in grid]
        for i, (axis, name) in enumerate(zip(loss_axes, parts)):
            draw_loss(axis, losses[[name]], first_style=i)
            if i < len(parts) - 1:
                axis.set_xticks([])
        score_axis = figure.add_subplot(figure.add_gridspec(1, 1, left=0.47, right=0.86, bottom=0.16, top=0.86)[0])
        score_axis.set(ylim=(0, 1))
        score_axis.set_title("Scores on the test classes", loc="left", fontsize=11)
        if best_epoch is not None:
            draw_curves(score_axis, scores)
            lines = sorted(score_axis.lines, key=lambda line: -line.get_ydata()[-1])
            score_axis.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False)
        for axis in (*loss_axes, score_axis):
            marks = mark_epochs(axis, history, best_epoch)
        for axis in (loss_axes[-1], score_axis):
            axis.set_xlabel("epoch")
        figure.legend(handles=marks, loc="lower center", ncols=max(1, len(marks)), frameon=False)
        title, text = run_title(history, test_set), "not scored yet"
        if best_epoch is not None:
            recall = scores["Recall @ 1"][best_epoch]
            score_axis.plot(best_epoch, recall, **BEST_MARK)
            text = f"Recall @ 1 {recall:.4f} in the best epoch, {best_epoch}"
        figure.suptitle(f"{plain(title)}\n{text}", fontsize=12, y=0.98)


def draw_loss(axis: Axes, values: pd.DataFrame, first_style: int) -> None:
    """Draw a loss, or the learning rate on a logarithmic axis, over the epochs.

    Args:
        values: a single column, by epoch.
        first_style: see draw_curves.
    """
    name = values.columns[0]
    draw_curves(axis, values, first_style)
    axis.set_title(f"{name.lower().capitalize()} in training", loc="left", fontsize=11)
    if name == "Learning Rate":
        rates = sorted({values[name].min(), values[name].max()})
        axis.set_yscale("log")
        axis.margins(y=0.3)
        axis.set_yticks(rates, [f"{rate:.2g}" for rate in rates])
        axis.minorticks_off()
        axis.set_title("learning rate", loc="left", fontsize=11)


def run_title(history: History, test_set: str) -> str:
    """Return the name of a run, followed by that of a test set unless it is "test"."""
    return shortened(history.folder.name, 50) + ("" if test_set == "test" else f" {test_set}")


def plotted_scores(row: Row, test_set: str) -> Row:
    """Return the scores of a test set in a row of "val", with Recall@1 on the held-out classes if there are any."""
    held_out = column(VALIDATION, "Recall @ 1")
    first = {held_out: row[held_out]} if held_out in row else {}
    return {"Epochs": row["Epochs"], "Time": row["Time"], **first, **scores_of(row, test_set)}


def logged_values(rows: Sequence[Row], epochs: str = "Epochs") -> pd.DataFrame:
    """Return the rows of a log by epoch, as floats, without columns that have no value."""
    table = pd.DataFrame(rows, columns=None if rows else [epochs, "Time"])
    return table.set_index(epochs).drop(columns="Time").astype(float).dropna(axis=1, how="all")


def mark_epochs(axis: Axes, history: History, best: int | None) -> list[Line2D]:
    """Mark minings, drops of the learning rate and the best epoch; return the marks drawn, for a legend."""
    last = history.rows["train"][-1]["Epochs"]
    axis.set_xlim(-0.7, last + 0.7)
    marks = []
    for epochs, label, look in [
        (history.mined_epochs, "mined labels renewed", {"color": "#999933", "linestyle": "dashed"}),
        (rate_steps(history.flags), "learning rate lowered", {"color": "black", "linestyle": "dotted"}),
    ]:
        starts = [epoch - 0.5 for epoch in epochs if epoch <= last + 1]
        low = 0 if len(starts) <= 40 else 0.96  # many lines would hide the curves, so draw short ones at the top
        axis.vlines(starts, low, 1, **look, linewidth=1, zorder=0, transform=axis.get_xaxis_transform())
        if starts:
            marks.append(Line2D([], [], **look, linewidth=1, label=label))
    if best is None:
        return marks
    axis.axvline(best, color="#e69f00", linewidth=5, alpha=0.3, zorder=0)
    return [*marks, Line2D([], [], **BEST_MARK, label="best epoch")]


def rate_steps(flags: Mapping[str, object]) -> Sequence[int]:
    """Return the epochs of a run that begin with a lower learning rate."""
    return {"step": flags["tau"], "exp": range(1, flags["n_epochs"])}.get(flags["scheduler"], [])


def draw_curves(axis: Axes, table: pd.DataFrame, first_style: int = 0) -> None:
    """Draw the columns of a table over its epochs, in different colours and markers, without NaN.

    Args:
        first_style: index of the colour and marker of the first column.
    """
    for i, name in enumerate(table, start=first_style):
        points = table[name].dropna()
        look = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 4}
        axis.plot(points.index, points, **look, markevery=max(1, len(points) // 25), label=name)
    format_axis(axis, 4)  # few ticks, as they take most of the time


def format_axis(axis: Axes, n_values: int) -> None:
    """Put whole epochs on the x axis, about n_values ticks on the y axis, and horizontal grid lines."""
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(n_values))
    axis.grid(axis="y", alpha=0.25)


def draw_probe(path: Path, history: History) -> None:
    """Draw the accuracies of the probe, a panel per kind of label: training images with markers, test images thin.

    A last panel shows the agreement of the mined labels with other labels.
    """
    table, mined = logged_values(history.rows["probe"]), logged_values(history.rows["mining"], "Before Epoch")
    agreements = mined[[name for name in mined if name.startswith("AMI ")]]
    kinds = [name.removesuffix(" by chance") for name in table if name.endswith(" by chance")]
    test_sets = tuple(kind.removesuffix("Class") for kind in kinds if kind.endswith(" Class"))  # "Test ", "Set 1 "
    kinds = [kind for kind in kinds if not kind.startswith(test_sets)]
    looks = {
        "from Class": {"color": "#0072b2", "linestyle": "--", "marker": "s", "label": "from the Class embedding"},
        "from Shared": {"color": "#d55e00", "linestyle": "-", "marker": "o", "label": "from the Shared embedding"},
        "by chance": {"color": "0.3", "linestyle": ":", "marker": "_", "label": "by chance"},
    }
    marked, thin = {"markersize": 4, "markevery": max(1, len(table) // 25)}, {"marker": "", "linewidth": 0.8}
    n_panels = len(kinds) + (not agreements.empty)
    n_lines = math.ceil(n_panels / 3)
    n_columns = math.ceil(n_panels / n_lines)
    with saved_figure(path, figsize=(0.6 + 3.9 * n_columns, 1.5 + 3.0 * n_lines), layout="constrained") as figure:
        axes = figure.subplots(n_lines, n_columns, sharey=True, squeeze=False)
        for axis, kind in zip(axes.flat, kinds):
            for source, look in looks.items():
                for test_set in ("", *test_sets):
                    column = f"{test_set}{kind} {source}"
                    if column in table:  # test images have no mined labels, and a plain baseline no Shared embedding
                        axis.plot(table.index, table[column], **look | (thin if test_set else marked))
            what = {"Class": "the class", "Mined": "the mined label"}.get(kind, plain(kind, 24))
            low_from = "Shared" if kind == "Class" else "Class"
            axis.set_title(f"{what} (should be low from {low_from})", loc="left", fontsize=11)
            axis.set(ylim=(-0.06, 1.02), xlim=(-0.7, table.index[-1] + 0.7), xlabel="epoch")  # AMI may be below 0
            format_axis(axis, 5)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy of the probe")
        if not agreements.empty:
            draw_agreements(axes.flat[len(kinds)], agreements, table.index[-1])
        for axis in axes.flat[n_panels:]:
            axis.set_visible(False)
        handles = [line for line in axes[0, 0].lines if line.get_marker()]
        if test_sets:
            handles += [Line2D([], [], color="0.3", marker="o", markersize=4, label="training images")]
            handles += [Line2D([], [], color="0.3", label="test images", **thin)]
        figure.legend(handles=handles, loc="outside lower center", ncols=n_columns + 2, frameon=False)
        what = "accuracy of a nearest-neighbour probe: the 5 nearest images vote for the label"
        figure.suptitle(f"{plain(history.folder.name)}\n{textwrap.fill(what, 40 * n_columns)}", fontsize=12)


def draw_agreements(axis: Axes, agreements: pd.DataFrame, last: int) -> None:
    """Draw the adjusted mutual information of the mined labels with class and known factors over the minings."""
    draw_curves(axis, agreements.rename(columns=lambda name: plain(name.removeprefix("AMI "), 20)))
    axis.set_title("AMI of the mined labels", loc="left", fontsize=11)
    axis.set(xlim=(-0.7, last + 0.7), xlabel="epoch", ylabel="")
    axis.legend(fontsize=8, frameon=False)
    format_axis(axis, 5)


def draw_comparison(path: Path, curves: Mapping[str, pd.DataFrame]) -> None:
    """Draw Recall@1 over the epochs: the mean of each setting, with a band of one standard deviation.

    The legend is beside the curves, however many there are.

    Args:
        curves: name of the setting to Recall@1 (epochs, runs).
    """
    with saved_figure(path, figsize=(9, max(5.5, 0.22 * len(curves)))) as figure:
        matplotlib.rcParams["savefig.bbox"] = "tight"  # grow to fit the legend
        axis = figure.subplots()
        for i, (setting, recalls) in enumerate(curves.items()):
            label = f"{plain(setting, 110)} ({recalls.shape[1]} run{'s' if recalls.shape[1] > 1 else ''})"
            look = {"color": COLOURS[i % 8], "linestyle": LINES[i // 8 % 4], "marker": MARKERS[(i + i // 32) % 8]}
            look["markersize"] = 4
            draw_means(axis, recalls.index, recalls.to_numpy(), look, label)
        format_axis(axis, 8)
        axis.set(xlabel="epoch", ylabel="Recall @ 1 on the test classes")
        axis.set_title("mean over runs, band: one standard deviation", loc="left", fontsize=10)
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False)


def draw_ablation(path: Path, flag: str, table: pd.DataFrame) -> None:
    """Draw Recall@1 over a flag: the mean of the runs with a band of one standard deviation, and the runs as dots.

    Values of the flag are drawn at equal distances.

    Args:
        table: a row for each value of the flag, a column for each line; a cell is the list of its runs' Recall@1, or
            NaN without runs. A line whose name starts with "paper" has published numbers.
    """
    values = [plain(str(value), 40) for value in table.index]
    is_crowded = sum(len(value) + 2 for value in values) > 85  # more characters than fit side by side
    height = 4.6 + 0.25 * len(table.columns) + (0.08 * max(map(len, values)) if is_crowded else 0)
    with saved_figure(path, figsize=(max(8.4, 0.22 * len(values)), height), layout="constrained") as figure:
        axis = figure.subplots()
        for i, name in enumerate(table):
            places = np.flatnonzero(table[name].notna())
            look = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": "-:"[i % 2]}
            look["markersize"] = (9, 5)[i % 2]  # so that both of two coinciding lines are visible
            look |= {"color": "0.35", "linestyle": "--", "marker": "x"} if name.startswith("paper") else {}
            recalls = list(table[name].dropna())
            draw_means(axis, places, recalls, look, plain(name, 90))
            for place, of_runs in zip(places, recalls):
                if len(of_runs) > 1:
                    axis.scatter([place] * len(of_runs), of_runs, s=12, color=look["color"], alpha=0.6, zorder=3)
        axis.set_xticks(range(len(table)), values, rotation=90 if is_crowded else 0)
        axis.set(xlabel=f"--{flag}", ylabel="Recall @ 1 on the test classes")
        axis.set_title("mean over runs, band: one standard deviation, dots: runs", loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False)


def draw_means(axis: Axes, places: Sequence[float], runs: Sequence[Sequence[float]], look: Mapping, label: str) -> None:
    """Draw the means of the runs at each place as a line, with a band of one standard deviation; 0 for a single run."""
    means = np.array([np.mean(values) for values in runs])
    deviations = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in runs])
    axis.plot(places, means, label=label, **look)
    axis.fill_between(places, means - deviations, means + deviations, color=look["color"], alpha=0.2, linewidth=0)


def draw_differences(path: Path, points: Mapping[tuple[str, str, str], tuple[np.ndarray, float]], base: str) -> None:
    """Draw the differences of settings to a base setting: one panel per score, one row per setting.

    Args:
        points: {(score, setting, "best" or "last" epoch): (differences of the seeds (n,), half the width of their
            confidence interval)}.
        base: name of the base setting.
    """
    scores = list(dict.fromkeys(score for score, _, _ in points))
    settings = list(dict.fromkeys(setting for _, setting, _ in points))
    size = (3.4 + 2.9 * len(scores), 1.6 + 0.75 * len(settings))
    with saved_figure(path, figsize=size, layout="constrained") as figure:
        axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
        for axis, score in zip(axes, scores):
            axis.axvline(0, color="0.4", linewidth=1)
            for at, colour, marker, shift in [("last", "#0072b2", "o", -0.13), ("best", "#d55e00", "D", 0.13)]:
                keys = [(score, setting, at) for setting in settings]
                rows = [(i + shift, *points[key]) for i, key in enumerate(keys) if key in points]
                draw_intervals(axis, rows, color=colour, marker=marker, label=f"{at} epoch")
            axis.set(xlabel=f"difference in {score}", ylim=(len(settings) - 0.5, -0.5))
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.tick_params(axis="x", labelsize=9)
            axis.grid(alpha=0.3, axis="x")
        labels = [textwrap.fill(plain(setting, 240), 40) for setting in settings]
        axes[0].set_yticks(range(len(settings)), labels, fontsize=8)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
        title = textwrap.fill(f"Differences to {plain(base, 240)}, same seeds; bars: 95 % interval", 90)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)


def draw_intervals(axis: Axes, rows: Sequence[tuple[float, np.ndarray, float]], **look: str) -> None:
    """Draw rows of draw_differences: the values as dots, and their mean with a bar for the interval.

    Args:
        rows: (place, values (n,), half the width of the interval).
        look: options of Matplotlib's errorbar.
    """
    places, means = [place for place, *_ in rows], [values.mean() for _, values, _ in rows]
    axis.errorbar(means, places, xerr=[half for *_, half in rows], linestyle="none", markersize=6, linewidth=2, **look)
    for place, values, _ in rows:
        axis.scatter(values, [place] * len(values), s=9, color=look["color"], alpha=0.45)


def shortened(name: str, length: int) -> str:
    """Return a name, shortened to `length` characters if it is longer."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def plain(name: str, length: int = 80) -> str:
    """Return a name, shortened to `length` characters, that Matplotlib does not parse as a formula."""
    return shortened(name, length).replace("$", r"\$")
