"""What a run has logged, as plain values. The run in training writes it, and any run folder can be read into it."""

import csv
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from data.images import VALIDATION
from data.published import dataset_info
from support import weights
from support.errors import InputError, first_line
from support.files import replaced_file, write_file

LOGS = {
    "train": "log_train_Class.csv",
    "val": "log_val_Class.csv",
    "mining": "log_mining.csv",
    "shared": "log_val_Shared.csv",
    "probe": "log_probe.csv",
}
"""{log: its CSV file in a run folder}; History.rows and the rows in a checkpoint have these keys.

"val" is the published code's name; this log holds the scores of all test sets.
"""

STATE_FILE = "run.json"

NOTES = ("started_from", "images", "left_out")
"""Facts that are learned at the start of a run and recorded with its flags."""

PAPER_NOTE = "paper: MIC with margin loss, ResNet50 (arXiv 1909.11574)"

Row = dict[str, object]
"""A row of a log, {column of its CSV: value}; None if the value was left out."""


@dataclass(eq=False)
class History:
    """What a run has logged.

    Attributes:
        folder: the run folder.
        flags: flags of the run, with the facts in NOTES.
        defaults: {flag: default} of the flags that differ from their defaults.
        provenance: provenance of each start of the run, {what: text}.
        rows: rows of each log in LOGS, in order.
        state: "running", "finished" or "stopped".
        reason: why the run was stopped, one line.
        epoch: number of complete epochs.
        seconds: time spent in all starts.
        seconds_left: estimated time left; None if unknown.
        spent: seconds by activity, see auxiliaries.Stopwatch.
        initial_scores: scores before training, by column.
        image_sets: numbers of images and classes and digest of each image set, see data.images.
        peak_memory: peak memory in bytes of the first process of the last start, and of its GPU.
        written: when the history was last written, in seconds since 1970; 0 without a run.json.
    """

    folder: Path
    flags: dict[str, object]
    defaults: dict[str, object] = field(default_factory=dict)
    provenance: list[dict[str, str]] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in LOGS})
    state: str = "running"
    reason: str = ""
    epoch: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    spent: dict[str, float] = field(default_factory=dict)
    initial_scores: Row = field(default_factory=dict)
    image_sets: dict[str, dict] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)
    written: float = 0.0

    @property
    def n_epochs(self) -> int:
        """The number of epochs after which the run is finished."""
        return self.flags["n_epochs"]

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.n_epochs

    @property
    def mined_epochs(self) -> list[int]:
        """The epochs that began with newly mined labels."""
        return [row["Before Epoch"] for row in self.rows["mining"]]

    @property
    def test_sets(self) -> list[str]:
        """The names of the test sets with scores; held-out training classes come last."""
        names = test_sets_of(self.rows["val"][-1] if self.rows["val"] else self.initial_scores)
        return sorted(names, key=lambda name: name == VALIDATION)

    def mining_is_due(self, epoch: int) -> bool:
        """Tell whether a mining is due before an epoch (every cluster_update_freq + 1 epochs) and not done yet."""
        if self.flags["task_p"][1] == 0:
            return False
        return epoch % (self.flags["cluster_update_freq"] + 1) == 0 and epoch not in self.mined_epochs

    def best_index(self, test_set: str) -> int | None:
        """Return the index in rows["val"] of a test set's best epoch; None before the first evaluation.

        The best epoch is the first one with the highest Recall@1 on that set or, with --select val, on the held-out
        classes.
        """
        rows = self.rows["val"]
        recall = column(VALIDATION if self.flags.get("select") == "val" else test_set, "Recall @ 1")
        return max(range(len(rows)), key=lambda index: rows[index][recall]) if rows else None

    def improved_sets(self) -> list[str]:
        """Return the test sets whose best epoch is the one scored last."""
        last = len(self.rows["val"]) - 1
        return [name for name in self.test_sets if name != VALIDATION and self.best_index(name) == last]

    def best_line(self) -> str:
        """Return each test set's Recall@1 at its best epoch so far, as text."""
        texts = []
        for name in [name for name in self.test_sets if name != VALIDATION]:
            best, prefix = self.rows["val"][self.best_index(name)], "" if name == "test" else f"{name} "
            texts.append(f"{prefix}{best[column(name, 'Recall @ 1')]:.4f} in epoch {best['Epochs']}")
        return ", ".join(texts)

    def score_table(self, test_set: str) -> pd.DataFrame:
        """Return a test set's scores, one per row, Recall@k first.

        Columns: "highest" and its "epoch", "best" (at the best epoch), "last", "before" training, "paper"; NaN for
        missing values.
        """
        rows = [scores_of(row, test_set) for row in self.rows["val"]]
        epochs = [row["Epochs"] for row in self.rows["val"]]
        before = scores_of(self.initial_scores, test_set)
        logged = pd.DataFrame(rows, index=epochs, columns=rows[-1] if rows else list(before)).astype(float)
        paper = scores_of(dataset_info(self.flags["dataset"]).scores, test_set)
        table = pd.DataFrame(index=sorted(logged, key=lambda score: not score.startswith("Recall")))
        table["highest"] = logged.max()
        table["epoch"] = logged.dropna(axis="columns", how="all").idxmax() if rows else None
        table["best"] = logged.iloc[self.best_index(test_set)] if rows else None
        table["last"] = logged.iloc[-1] if rows else None
        table["before"], table["paper"] = pd.Series(before, dtype=float), pd.Series(paper, dtype=float)
        return table

    def write(self) -> None:
        """Rewrite all files of the history, whatever has happened to them."""
        self.write_flags()
        for name in LOGS:
            self.write_log(name)
        self.write_state()

    def write_flags(self) -> None:
        """Write flags and provenance as hypa.pkl, a pickled dict of plain values, and as Parameter_Info.txt."""
        provenance = {"provenance": self.provenance} if self.provenance else {}
        write_file(self.folder / "hypa.pkl", pickle.dumps(self.flags | provenance))
        entries = {name: shown(value) for name, value in self.flags.items()}
        for i, start in enumerate(self.provenance):
            entries |= {f"start {i + 1}, {name}": value for name, value in start.items()}
        width = max(map(len, entries))
        text = "".join(f"{name:<{width}}  {value}\n" for name, value in entries.items())
        write_file(self.folder / "Parameter_Info.txt", text.encode(errors="surrogateescape"))

    def write_log(self, name: str) -> None:
        """Write a log as CSV; remove the file if the log has no rows."""
        path = self.folder / LOGS[name]
        if not self.rows[name]:
            path.unlink(missing_ok=True)
            return
        with replaced_file(path, "w") as file:
            pd.DataFrame(self.rows[name], dtype=object).to_csv(file, index=False, lineterminator="\n")

    def write_state(self) -> None:
        """Write run.json, with what hypa.pkl and the logs lack, and, if there are scores, Curr_Summary_Class.txt."""
        self.written = time.time()
        state = {name: getattr(self, name) for name in STATE}
        write_file(self.folder / STATE_FILE, json.dumps(state, indent=1).encode())
        if self.rows["val"]:
            text = f"{self.summary()}\n"
            write_file(self.folder / "Curr_Summary_Class.txt", text.encode(errors="surrogateescape"))

    def summary(self) -> str:
        """Return the text of Curr_Summary_Class.txt."""
        tables = []
        for name in self.test_sets:
            table = self.score_table(name)
            tables.append(table.set_axis([column(name, score) for score in table.index]))
        table = pd.concat(tables)
        table = table.dropna(subset=["highest"])[["highest", "epoch", "last", "before", "paper"]]
        # In this text "best" is the highest value of each score, on the page the score at the best epoch
        table = table.rename(columns={"highest": "best", "before": "before training"}).astype({"epoch": int})
        if table["paper"].notna().any():
            table["best - paper"] = table["best"] - table["paper"]
        table = table.dropna(axis="columns", how="all")
        spent = {**self.spent, "all else": max(self.seconds - sum(self.spent.values()), 0.0)}
        lines = [
            table.rename_axis(columns="score").to_string(float_format="{:.4f}".format, na_rep="-"),
            *([PAPER_NOTE] if "paper" in table else []),
            f"started from: {self.flags.get('started_from', 'unknown')}",
            f"epochs done: {self.rows['val'][-1]['Epochs'] + 1}",
            f"seconds: {self.seconds:.1f}",
            f"of these: {', '.join(f'{activity} {value:.1f}' for activity, value in spent.items())}",
            f"peak memory: {memory_text(self.peak_memory)}",
            f"run folder: {self.folder}",
        ]
        return "\n".join(lines)

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the run in a folder: finished, running, stopped or killed. No code in its files is executed.

        Raises:
            InputError: the folder cannot be read, or a file in it is damaged.
        """
        flags, provenance = read_flags(folder)
        history = cls(folder, flags, provenance=provenance)
        history.rows = {name: read_log(folder, name) for name in LOGS}
        for row in history.rows["val"]:
            if not test_sets_of(row) or None in [row[name] for name in row if name.endswith("Recall @ 1")]:
                raise InputError(f"{folder}: {LOGS['val']} cannot be read (an epoch without Recall @ 1)")
        if (folder / STATE_FILE).exists():
            vars(history).update(read_state(folder / STATE_FILE))
        else:  # written by an earlier version
            history.epoch = history.rows["train"][-1]["Epochs"] + 1 if history.rows["train"] else 0
            history.state = "finished" if history.is_finished else "stopped"
        return history


def fill_in_flags(histories: Sequence[History]) -> None:
    """Add flags that the programs of older runs did not have yet, with the defaults that newer runs record."""
    defaults = {}
    for history in [history for history in histories if history.written]:
        defaults |= {flag: value for flag, value in history.flags.items() if flag not in NOTES} | history.defaults
    for history in histories:
        history.flags = {**defaults, **history.flags}


NUMBER = (int, float)
STATE = {
    "state": str, "reason": str, "epoch": int, "seconds": NUMBER, "seconds_left": (*NUMBER, type(None)), "spent": dict,
    "initial_scores": dict, "image_sets": dict, "defaults": dict, "peak_memory": dict, "written": NUMBER,
}  # fmt: skip
"""Entries of run.json and their types."""


class PlainUnpickler(pickle.Unpickler):
    """Unpickle plain values only (dict, list, str, numbers) and refuse everything that would run code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_flags(folder: Path) -> tuple[dict[str, object], list[dict[str, str]]]:
    """Return flags and provenance from the hypa.pkl of a run folder.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with open(folder / "hypa.pkl", "rb") as file:
            flags = PlainUnpickler(file).load()
        provenance = flags.pop("provenance", [])
        if not isinstance(flags["dataset"], str) or not isinstance(flags["n_epochs"], int):
            raise ValueError("not the flags of a run")
        if not weights.is_provenance(provenance):
            raise ValueError("its provenance is malformed")
    except OSError as error:
        fault = f"holds no hypa.pkl that can be read ({error.strerror})" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {fault}") from error
    except Exception as error:  # the unpickler raises almost anything on damaged bytes
        raise InputError(f"{folder}: hypa.pkl cannot be read ({first_line(error)})") from error
    return flags, provenance


def epoch_column(log: str) -> str:
    """Return the column of a log that numbers the epochs."""
    return "Before Epoch" if log == "mining" else "Epochs"


def read_log(folder: Path, name: str) -> list[Row]:
    """Return the rows of a log of a run, with the numbers exactly as they were written.

    Args:
        folder: the run folder.
        name: a key of LOGS.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    path = folder / LOGS[name]
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = []
            for row in csv.DictReader(file, strict=True):
                rows.append({column: number_of(text) for column, text in row.items()})
        if not rows or not all(isinstance(row[epoch_column(name)], int) and None not in row for row in rows):
            raise ValueError("no rows, or incomplete rows")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{folder}: {path.name} cannot be read ({first_line(error)})") from error
    return rows


def number_of(text: str | None) -> int | float | None:
    """Return the number in a cell, None for an empty cell.

    Raises:
        ValueError: the text is not a number.
    """
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_state(path: Path) -> dict[str, object]:
    """Return the content of run.json, see STATE.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    try:
        stored = json.loads(path.read_bytes())
        for name, kind in STATE.items():
            if not isinstance(stored[name], kind):
                raise ValueError(f"its {name} is a {type(stored[name]).__name__}")
        if not all(0 <= (stored[name] or 0) < 1e11 for name in ("seconds", "seconds_left", "written")):
            raise ValueError("a time in it is out of range")
        return {name: stored[name] for name in STATE}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path.parent}: {path.name} cannot be read ({first_line(error)})") from error


def file_suffix(test_set: str) -> str:
    """Return the suffix that a test set adds to file names: "_set1" for "Set 1", nothing for "test"."""
    return "" if test_set == "test" else f"_{test_set.lower().replace(' ', '')}"


def column(test_set: str, score: str) -> str:
    """Return the column of a test set's score: the score's name, preceded by the set's name unless that is "test"."""
    return score if test_set == "test" else f"{test_set} {score}"


def test_sets_of(row: Mapping[str, object]) -> list[str]:
    """Return the names of the test sets that a row has scores of."""
    return [name.removesuffix("Recall @ 1").strip() or "test" for name in row if name.endswith("Recall @ 1")]


def scores_of(row: Mapping[str, float | None], test_set: str) -> dict[str, float | None]:
    """Return one test set's scores in a row, by name without the set's prefix."""
    if test_set != "test":
        return {name.removeprefix(f"{test_set} "): row[name] for name in row if name.startswith(f"{test_set} ")}
    others = tuple(f"{name} " for name in test_sets_of(row) if name != "test")
    return {name: row[name] for name in row if name not in ("Epochs", "Time") and not name.startswith(others)}


def shown(value: object) -> str:
    """Return a flag's value as text."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def row_text(row: Row) -> str:
    """Return the values of a row as one line of text, without epoch, time and values that were left out."""
    values = {name: value for name, value in row.items() if name not in ("Epochs", "Time") and value is not None}
    return "  ".join(f"{name} {value:.4g}" if name == "Learning Rate" else f"{name} {value:.4f}"
                     for name, value in values.items())  # fmt: skip


def strongest_factor(row: Row) -> str:
    """Return the known factor with the highest AMI in a row of log_mining.csv; empty if there is none."""
    agreements = {name[4:]: row[name] for name in row if name.startswith("AMI ") and name != "AMI class"}
    return max(agreements, key=agreements.get, default="")


def mining_sheet(folder: Path, epoch: int) -> Path:
    """Return the path of the contact sheet of the mining before an epoch."""
    return folder / "mined" / f"before_epoch_{epoch:04d}.jpg"


def neighbour_sheet(folder: Path, test_set: str, task: str) -> Path:
    """Return the path of the sheet of a test set's nearest neighbours by a task's embedding."""
    return folder / f"sample_recoveries{'' if task == 'Class' else f'_{task}'}{file_suffix(test_set)}.png"


def info_plot(folder: Path, test_set: str) -> Path:
    """Return the path of the plot of losses and of a test set's scores."""
    return folder / f"InfoPlot_Class{file_suffix(test_set)}.svg"


def memory_text(peak_memory: Mapping[str, float]) -> str:
    """Return peak memory as text."""
    return ", ".join(f"{what} {n_bytes / 1e9:.2f} GB" for what, n_bytes in peak_memory.items()) or "unknown"
