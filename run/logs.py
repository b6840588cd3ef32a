"""Rows of a run's logs: their columns and scores, the table of them, and what a stored run logged."""

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data.images import VALIDATION
from support import weights
from support.errors import InputError, first_line

LOGS = {
    "train": "log_train_Class.csv",
    "val": "log_val_Class.csv",
    "mining": "log_mining.csv",
    "shared": "log_val_Shared.csv",
    "probe": "log_probe.csv",
}
"""The CSV files of a run folder, by the names of their rows in a checkpoint."""

Row = dict[str, object]
"""A row of a log, {column of its CSV: value}, None for what was left out."""


def file_suffix(test_set: str) -> str:
    """Return what a test set's name adds to file names: "_set1" for "Set 1", nothing for "test"."""
    return "" if test_set == "test" else f"_{test_set.lower().replace(' ', '')}"


def column(test_set: str, score: str) -> str:
    """Return the column of a test set's score: the score for "test", else the set's name in front."""
    return score if test_set == "test" else f"{test_set} {score}"


def test_sets_of(row: Row) -> list[str]:
    """Return the names of the test sets that a row has scores of."""
    return [name.removesuffix("Recall @ 1").strip() or "test" for name in row if name.endswith("Recall @ 1")]


def scores_of(row: Row, test_set: str) -> dict[str, float | None]:
    """Return one test set's scores in a row, by their names without the set's."""
    if test_set != "test":
        return {name.removeprefix(f"{test_set} "): row[name] for name in row if name.startswith(f"{test_set} ")}
    others = tuple(f"{name} " for name in test_sets_of(row) if name != "test")
    return {name: row[name] for name in row if name not in ("Epochs", "Time") and not name.startswith(others)}


def scores_line(row: Row) -> str:
    """Return the scores of a row as one line of text; those that were left out are not in it."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values_of(row).items())


def losses_line(row: Row) -> str:
    """Return the losses and the learning rate of a row as one line of text, each to four significant digits."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values_of(row).items())


def values_of(row: Row) -> dict[str, float]:
    """Return what a row holds beside its epoch and time, without what was left out."""
    return {name: value for name, value in row.items() if name not in ("Epochs", "Time") and value is not None}


def best_index(rows: Sequence[Row], test_set: str, select: str) -> int:
    """Return which row of "val" is of the epoch whose checkpoint is kept for a test set.

    The first one with the highest Recall@1 on that set or, where select is "val", on the classes held out.
    """
    recall = column(VALIDATION if select == "val" else test_set, "Recall @ 1")
    return max(range(len(rows)), key=lambda index: rows[index][recall])


def score_table(rows: Sequence[Row], initial: Row, paper: Mapping[str, float]) -> str:
    """Return a table of the best value of each score with its epoch, the last, that before training, and the paper's.

    rows: of "val", at least one. A score that was left out of all rows is left out here.
    """
    history = pd.DataFrame(rows).set_index("Epochs").drop(columns="Time")
    history = history.astype(float).dropna(axis="columns", how="all")
    first, published = (pd.Series(scores, dtype=float) for scores in (initial, paper))
    table = pd.DataFrame({"best": history.max(), "epoch": history.idxmax(), "last": history.iloc[-1]})
    table["before training"] = first
    if paper:
        table["paper"] = published
        table["best - paper"] = table["best"] - table["paper"]
    text = table.rename_axis(columns="score").to_string(float_format="{:.4f}".format, na_rep="-")
    return f"{text}\npaper: MIC with margin loss, ResNet50 (arXiv 1909.11574)" if paper else text


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values (dict, list, str, numbers) and refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class StoredRun:
    """What a run folder says: flags, provenance of each start, rows of log_val_Class.csv, at least one, in order."""

    folder: Path
    flags: dict[str, object]
    provenance: list[dict[str, str]]
    rows: list[Row]


def read_run(folder: Path) -> StoredRun:
    """Read a run folder; no code in its files is executed. Raises InputError that says what is wrong with it."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    for name in ("hypa.pkl", LOGS["val"]):
        if name not in names:
            scored = "; no epoch has been scored yet?" if name.endswith("csv") else ""
            raise InputError(f"{folder}: holds no {name}{scored}")
    try:
        with open(folder / "hypa.pkl", "rb") as file:
            flags = PlainUnpickler(file).load()
        if not isinstance(flags, dict) or not isinstance(flags.get("dataset"), str):
            raise ValueError("no flags of a run")
        provenance = flags.pop("provenance", [])
        if not weights.is_provenance(provenance):
            raise ValueError("its provenance is none")
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise InputError(f"{folder}: hypa.pkl cannot be read ({first_line(error)})") from error
    try:
        table = pd.read_csv(folder / LOGS["val"])
        recalls = [name for name in table if name.endswith("Recall @ 1")]
        table = table.dropna(subset=["Epochs", *recalls]).astype(float).astype({"Epochs": int})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: {LOGS['val']} cannot be read ({first_line(error)})") from error
    if not recalls or table.empty:
        raise InputError(f"{folder}: {LOGS['val']} holds no Recall @ 1")
    return StoredRun(folder, flags, provenance, table.to_dict("records"))


def read_provenance(folder: Path) -> list[dict[str, str]]:
    """Return the provenance in the hypa.pkl of a run folder, nothing where it cannot be read."""
    try:
        with open(folder / "hypa.pkl", "rb") as file:
            provenance = PlainUnpickler(file).load()["provenance"]
    except Exception:  # damaged bytes make the unpickler raise almost anything
        return []
    return provenance if weights.is_provenance(provenance) else []
