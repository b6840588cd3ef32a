"""A run as it is drawn while it trains: pictures, page and index, and what the demo ends with."""

import contextlib
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.images import VALIDATION, ImageSet
from report import plots, sheets
from report.index import write_index
from report.page import RunView, warned, write_page
from run.folder import Run, sheet_path
from run.logs import Row, column, file_suffix, scores_of
from run.trial import DRAWING_SHARE
from support.errors import Interrupted, stop_reason


class Report:
    """Draws a run, in the first process. As a context, brings all up to date when the run ends or is stopped.

    defaults: of the program's flags. rate_steps: the epochs that begin with another learning rate.
    """

    def __init__(self, run: Run, defaults: Mapping[str, object], rate_steps: Sequence[int]):
        self.run, self.defaults, self.rate_steps = run, dict(defaults), rate_steps
        self.is_behind = bool(run.rows["val"])  # a run that was killed may have drawn later epochs
        self.is_new_mining = False

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Draw what was put off, and say on the page how the run ended."""
        if not self.run.can_go_on:
            return
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # what ended the run is to be told
            if self.is_behind:
                self._draw_plots()
            if isinstance(error, Interrupted):
                reason = f"stopped by {signal.Signals(error.signum).name}"
            else:
                reason = error and (stop_reason(error) or f"a bug: {type(error).__name__}, see log.txt")
            self.write_page("stopped" if error else "finished", reason or "")

    def evaluated(self, tests: Mapping[str, ImageSet], embeddings: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Draw the contact sheets of each test set whose best epoch is the last, and the plots, as time allows.

        embeddings: {test set: {task: (N, D)}}; the Shared embedding is shown where labels were mined for it.
        """
        run, self.is_behind = self.run, True
        if not run.writes:
            return
        last = len(run.rows["val"]) - 1
        epoch, pictures = run.rows["val"][last]["Epochs"], []
        for name in [name for name, best in run.best_indices().items() if best == last]:
            for task in ("Class", "Shared") if run.minings else ("Class",):
                path = run.folder / f"sample_recoveries{'' if task == 'Class' else '_Shared'}{file_suffix(name)}.png"
                what = f"{self._title(name)}, epoch {epoch}: nearest by the {task} embedding"
                with warned(path):
                    sheets.draw_recoveries(path, tests[name], embeddings[name][task], what)
                    pictures.append(path)
        run.show(pictures, epoch)
        if self.is_new_mining or epoch == run.n_epochs - 1 or run.share_of("drawing") < DRAWING_SHARE:
            self._draw_plots()

    def mined(self, before_epoch: int, images: ImageSet, mined: np.ndarray, squared_distances: np.ndarray) -> None:
        """Draw the contact sheet of a mining, see sheets.draw_clusters."""
        if self.run.writes:
            latest, path = self.run.folder / "mined_clusters.png", sheet_path(self.run.folder, before_epoch)
            with warned(latest):
                path.parent.mkdir(exist_ok=True)
                name = self.run.folder.name
                sheets.draw_clusters([path, latest], name, before_epoch, images, mined, squared_distances)
                self.run.show([latest], before_epoch)
        self.is_new_mining = True

    def _title(self, test_set: str) -> str:
        """Return the name of the run, and of a test set with a name."""
        return plots.shortened(self.run.folder.name, 50) + ("" if test_set == "test" else f" {test_set}")

    def _draw_plots(self) -> None:
        """Draw InfoPlot_Class.svg, of each test set, and InfoPlot_Probe.svg anew from the logs."""
        run = self.run
        mined_before = [row["Before Epoch"] for row in run.rows["mining"]]
        for name, best in run.best_indices().items() if run.writes else ():
            path = run.folder / f"InfoPlot_Class{file_suffix(name)}.svg"
            scores = [plotted_scores(row, name) for row in run.rows["val"]]
            marks = {"best": best, "mined_before": mined_before, "rate_steps": self.rate_steps}
            with warned(path):
                plots.draw_progress(path, run.rows["train"], scores, self._title(name), **marks)
        if run.rows["probe"] and run.writes:
            path = run.folder / "InfoPlot_Probe.svg"
            with warned(path):
                plots.draw_probe(path, run.rows["probe"], run.folder.name)
        self.is_behind = self.is_new_mining = False

    def write_page(self, state: str = "running", reason: str = "") -> None:
        """Write page.html, and index.html beside the run folder."""
        run = self.run
        if run.writes:
            view = RunView(
                folder=run.folder,
                flags=run.flags,
                defaults=self.defaults,
                rows=run.rows,
                initial_scores=run.initial_scores,
                paper=run.paper,
                provenance=run.provenance,
                state=state,
                reason=reason,
                epoch=run.epoch,
                seconds=run.seconds,
                seconds_left=run.seconds_left(run.epoch),
                spent=run.stopwatch.seconds,
                contents=run.contents,
            )
            write_page(view)
            write_index(run.folder)


def plotted_scores(row: Row, test_set: str) -> Row:
    """Return the scores of a test set in a row of "val", with Recall@1 on the classes held out, if there are any."""
    held_out = column(VALIDATION, "Recall @ 1")
    first = {held_out: row[held_out]} if held_out in row else {}
    return {"Epochs": row["Epochs"], "Time": row["Time"], **first, **scores_of(row, test_set)}


def what_was_mined(row: Row) -> str:
    """Return which known factor a mining agrees with most; nothing for a row that an older version logged."""
    agreements = {name.removeprefix("AMI "): value for name, value in row.items() if name.startswith("AMI ")}
    of_class = agreements.pop("class", 0.0)
    if not agreements:
        return ""
    factor = max(agreements, key=agreements.get)
    is_clear = agreements[factor] > max(of_class, 0.5)
    clear = f"the {factor}" if is_clear else f"nothing clear, most the {factor}"
    return f"; mined: {clear} (AMI of the labels with it {agreements[factor]:z.2f}, with the class {of_class:z.2f})"


def lesson(rows: Mapping[str, Sequence[Row]], initial: Row, folder: Path) -> str:
    """Return the three lines that the demo ends with: what was learned, what to look at, what to try next.

    rows: of each log. initial: scores before training.
    """
    before, after = (row["Recall @ 1"] for row in (initial, rows["val"][-1]))
    learned = f"learned: Recall@1 on classes never seen is {after:.2f}, before training {before:.2f}"
    return (
        f"{learned}{what_was_mined(rows['mining'][-1])}\n"
        f"look at: {folder / 'page.html'} in a browser; what the images of a mined cluster share is what was mined\n"
        "try next: the same without mining, with your own flags if you gave any: bash Result_Runs.sh demo --task_p 1 0 "
        "--adv_weights 0; then "
        f"python evaluate.py --compare {shlex.quote(str(folder.parent))}"
    )
