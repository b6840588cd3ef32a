"""What is drawn after an evaluation, and what the demo ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.images import VALIDATION, ImageSet
from report import plots, sheets
from run.folder import Row, column, file_suffix, scores_of


def draw_evaluation(
    folder: Path,
    rows: Mapping[str, Sequence[Row]],
    bests: Mapping[str, int],
    tests: Mapping[str, ImageSet],
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    rate_steps: Sequence[int],
) -> list[Path]:
    """Redraw the plots of a run, and the contact sheets of each test set whose best epoch is the last; return these.

    rows: of each log, see folder.LOGS. bests: test set to the index of its best row of "val". embeddings: {test set:
    {task: (N, D)}}; the Shared embedding is shown where labels were mined for it. rate_steps: see plots.draw_progress.
    """
    pictures, history = [], rows["val"]
    mined_before = [row["Before Epoch"] for row in rows["mining"]]
    for name, best in bests.items():
        suffix, title = file_suffix(name), plots.shortened(folder.name, 50) + ("" if name == "test" else f" {name}")
        for task in ("Class", "Shared") if mined_before else ("Class",):
            if best == len(history) - 1:
                path = folder / f"sample_recoveries{'' if task == 'Class' else '_Shared'}{suffix}.png"
                what = f"{title}, epoch {history[-1]['Epochs']}: nearest by the {task} embedding"
                sheets.draw_recoveries(path, tests[name], embeddings[name][task], what)
                pictures.append(path)
        path = folder / f"InfoPlot_Class{suffix}.svg"
        shown = [plotted_scores(row, name) for row in history]
        plots.draw_progress(
            path, rows["train"], shown, title, best=best, mined_before=mined_before, rate_steps=rate_steps
        )
    if rows["probe"]:
        plots.draw_probe(folder / "InfoPlot_Probe.svg", rows["probe"], folder.name)
    return pictures


def plotted_scores(row: Row, test_set: str) -> Row:
    """Return the scores of a test set in a row of "val", with Recall@1 on the classes held out, if there are any."""
    held_out = column(VALIDATION, "Recall @ 1")
    first = {held_out: row[held_out]} if held_out in row else {}
    return {"Epochs": row["Epochs"], "Time": row["Time"], **first, **scores_of(row, test_set)}


def lesson(rows: Mapping[str, Sequence[Row]], initial: Row, folder: Path) -> str:
    """Return the three lines that the demo ends with: what was learned, what to look at, what to try next.

    rows: of each log; factors are known. initial: scores before training.
    """
    before, after = (row["Recall @ 1"] for row in (initial, rows["val"][-1]))
    mined = {name.removeprefix("NMI "): value for name, value in rows["mining"][-1].items() if name.startswith("NMI ")}
    of_class = mined.pop("class")
    factor = max(mined, key=mined.get)
    clear = f"mined: the {factor}" if mined[factor] > max(of_class, 0.5) else f"mined: nothing clear, most the {factor}"
    return (
        f"learned: Recall@1 on classes never seen is {after:.2f}, before training {before:.2f}; {clear} "
        f"(NMI of the labels with it {mined[factor]:.2f}, with the class {of_class:.2f})\n"
        f"look at: {folder / 'mined_clusters.png'}; what the images of a row share is what was mined\n"
        "try next: the same without mining, with your own flags if you gave any: bash Result_Runs.sh demo --task_p 1 0 "
        "--adv_weights 0; then "
        f"python evaluate.py --compare {folder.parent}"
    )
