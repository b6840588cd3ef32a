"""A run on disk: its folder, lock, logs, summary and checkpoints.

`Run` is the one that trains; `read_run` reads what a stored one logged.
"""

import contextlib
import errno
import io
import os
import pickle
import shlex
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
import numpy as np
import pandas as pd
import torch
from PIL import Image

import auxiliaries
from data.images import VALIDATION, describe_change, digest
from support import processes, weights
from support.errors import DivergedError, InputError, Interrupted, StoppedError, first_line, stop_reason

LAST = "last.pth.tar"
LOGS = {
    "train": "log_train_Class.csv",
    "val": "log_val_Class.csv",
    "mining": "log_mining.csv",
    "shared": "log_val_Shared.csv",
    "probe": "log_probe.csv",
}
"""The CSV files of a run folder, by the names of their rows in a checkpoint."""

FIRST_FILES = ("hypa.pkl", "Parameter_Info.txt", "log_mining.csv", "mined_clusters.png", "network.svg", "tensorboard")
FIRST_FILES += (".lock", ".*.tmp")
"""All that a run writes before its first last.pth.tar."""

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
    scores = {name: value for name, value in row.items() if name not in ("Epochs", "Time") and value is not None}
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())


def best_index(rows: Sequence[Row], test_set: str, select: str) -> int:
    """Return which row of "val" is of the epoch whose checkpoint is kept for a test set.

    The first one with the highest Recall@1 on that set or, where select is "val", on the classes held out.
    """
    recall = column(VALIDATION if select == "val" else test_set, "Recall @ 1")
    return max(range(len(rows)), key=lambda index: rows[index][recall])


class Run:
    """A run in training: a new one, or one that is resumed from its last complete epoch.

    As a context it makes and locks the folder of a new run. What ends a new run before it has stored anything removes
    what the run made; what stops the training later becomes one line that says how to go on. Of several processes, all
    keep the rows, and the first one writes files.

    folder: the wanted run folder, or the one to resume. flags: kept with the run. n_epochs: after which it is finished.
    is_resumed: go on with the run in the folder. may_take_over: start in a folder of this name that a killed run left
    before it had stored anything. paper: published scores by column. Raises InputError where the run cannot be made or
    read, or where another process trains it.
    """

    def __init__(
        self,
        folder: Path,
        flags: Mapping[str, object],
        n_epochs: int,
        *,
        is_resumed: bool,
        may_take_over: bool,
        paper: Mapping[str, float],
    ):
        self.folder, self.flags, self.n_epochs, self.is_new = folder, dict(flags), n_epochs, not is_resumed
        self.may_take_over, self.paper, self.writes = may_take_over, paper, processes.is_first()
        self.stopwatch, self.start, self.epoch = auxiliaries.Stopwatch(), time.time(), 0
        self.rows: dict[str, list[Row]] = {name: [] for name in LOGS}
        self.initial_scores: Row = {}
        self.contents: dict[str, dict] = {}
        self.stored: dict[str, dict] | None = None
        self.is_locked = self.can_go_on = False
        self.board = None
        self.made: list[Path] = []
        self.stack = contextlib.ExitStack()
        if is_resumed:
            self._read_stored()

    def _read_stored(self) -> None:
        """Lock the folder, and take up flags, rows and time from last.pth.tar."""
        self._lock()
        self.stored = weights.read_checkpoint(self.folder, LAST)
        if "training" not in self.stored:
            raise InputError(f"{self.folder / LAST}: holds a network without the state of its training")
        training, progress = self.stored["training"], self.stored["progress"]
        self.flags = self.stored["flags"] | self.flags
        self.rows, self.initial_scores = progress["rows"], progress["initial_scores"]
        self.epoch, self.stopwatch.seconds = training["epoch"], dict(training["spent"])
        self.start -= training["seconds"]

    def _lock(self) -> None:
        """Let no other process train in the folder. Raises InputError where one does."""
        if self.writes:
            self.stack.enter_context(locked(self.folder))
            self.is_locked = True

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.n_epochs

    def __enter__(self) -> "Run":
        """Make and lock the folder of a new run, and write the flags as far as they are known."""
        if not self.is_new:
            return self
        try:
            if self.writes:
                self.made = make_folder(self.folder, self.may_take_over)
                self.folder = self.made[-1]
            self.folder = processes.broadcast(self.folder)
            self._lock()
            if self.writes:
                if (self.folder / LAST).exists():
                    raise InputError(f"{self.folder}: was trained meanwhile; start again to go on with it")
                try_file_system(self.folder)
                self._open()
        except BaseException as error:  # ends as in the block
            self.__exit__(type(error), error, None)
            raise
        return self

    def _open(self) -> None:
        """Write flags and logs as they are so far, over whatever has happened to the files."""
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        write_flags(self.folder, self.flags)
        for name in LOGS:
            self._write_log(name)
        if self.flags["tensorboard"]:
            self._open_board()

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Let go of the folder; raise Interrupted or StoppedError with how to go on, where the training was stopped."""
        if self.is_new and self.writes and not self.can_go_on:
            self._remove()
        self.stack.close()
        if isinstance(error, Interrupted):
            raise Interrupted(error.signum, self._hint()) from None
        if not self.can_go_on:  # bad input
            return
        if isinstance(error, DivergedError):
            raise StoppedError(f"in epoch {self.epoch} {error}; {self.folder / LAST} is from before that") from error
        reason = stop_reason(error) if isinstance(error, Exception) else None
        if reason:
            raise StoppedError(f"{reason}; {self._hint()}") from error

    def _remove(self) -> None:
        """Remove the folders that this run made, unless something lies in them that it did not write."""
        with contextlib.suppress(OSError):  # what ended the run is to be told
            for path in first_files(self.folder) if self.is_locked else []:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        remove_empty(self.made)

    def _hint(self) -> str:
        """Say what is left of a stopped run and how to go on with it."""
        if not (self.folder / LAST).exists():
            return "nothing had been stored yet"
        n_local = processes.local_world_size()
        program = "python" if n_local == 1 else f"torchrun --standalone --nproc_per_node={n_local}"
        if processes.world_size() > n_local:  # on several machines
            program = "torchrun as before,"
        resume = f"main.py --resume {shlex.quote(str(self.folder))}"
        return f"the last complete epoch is safe; go on with: {program} {resume}"

    def require_images(self, contents: Mapping[str, Mapping]) -> None:
        """Raise InputError where these are not the images of the run that is resumed. contents: see data/images.py."""
        change = None if self.is_new else describe_change(self.stored["progress"]["contents"], contents)
        if change:
            raise InputError(f"--resume {self.folder}: not the images that it was trained with: {change}; "
                             "give it those, or start a new run")  # fmt: skip
        self.contents = dict(contents)
        self.note(images=digest(contents))

    def note(self, **facts: str) -> None:
        """Keep with the flags what is known now only; a resumed run keeps what it knew first."""
        self.flags = facts | self.flags
        if self.is_new and self.writes:
            write_flags(self.folder, self.flags)

    def log(self, name: str, row: Row) -> None:
        """Add a row to a log, see LOGS."""
        self.rows[name].append(row)
        if self.writes:
            self._write_log(name)
            if self.board:
                self._add_to_board(name, row)

    def show(self, pictures: Iterable[Path], step: int) -> None:
        """Give PNG files to TensorBoard, if it is wanted."""
        for path in pictures if self.board else []:
            with Image.open(path) as picture:
                self.board.add_image(path.stem, np.asarray(picture), step, dataformats="HWC")

    def _write_log(self, name: str) -> None:
        """Write a CSV anew from the rows in memory, whatever has happened to the file. Without rows there is none."""
        path, rows = self.folder / LOGS[name], self.rows[name]
        if not rows:
            path.unlink(missing_ok=True)
            return
        with replaced_file(path, "w") as file:
            pd.DataFrame(rows, dtype=object).to_csv(file, index=False, lineterminator="\n")

    def _open_board(self) -> None:
        """Open TensorBoard's event files; drop what they hold of epochs that will be trained again."""
        from torch.utils.tensorboard import SummaryWriter

        self.board = self.stack.enter_context(SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.epoch))
        for row in self.rows["mining"][-1:]:
            if row["Before Epoch"] == self.epoch:  # counts as of the epoch that comes next, and was dropped
                self._add_to_board("mining", row)

    def _add_to_board(self, name: str, row: Row) -> None:
        """Write a row to TensorBoard."""
        step = row["Before Epoch"] if name == "mining" else row["Epochs"]
        for key, value in row.items():
            if value is not None and key not in ("Epochs", "Before Epoch"):
                self.board.add_scalar(f"{name}/{key}", value, step)
        self.board.flush()  # it is to be there when last.pth.tar holds its epoch

    def best_indices(self) -> dict[str, int]:
        """Return which row of "val" is the best of each test set so far."""
        rows, select = self.rows["val"], self.flags["select"]
        return {name: best_index(rows, name, select) for name in test_sets_of(rows[-1]) if name != VALIDATION}

    def best_line(self) -> str:
        """Return the best Recall@1 of each test set so far as text."""
        texts = []
        for name, index in self.best_indices().items():
            best, prefix = self.rows["val"][index], "" if name == "test" else f"{name} "
            texts.append(f"{prefix}{best[column(name, 'Recall @ 1')]:.4f} in epoch {best['Epochs']}")
        return ", ".join(texts)

    def keep_best(self, network: torch.nn.Module, mined: np.ndarray | None) -> None:
        """Store the network for each test set whose best epoch the last evaluation is of.

        On resume, an epoch that last.pth.tar does not hold is trained again and overwrites its checkpoint.
        """
        last = len(self.rows["val"]) - 1
        for name, index in self.best_indices().items():
            if index == last and self.writes:
                self._store(f"checkpoint{file_suffix(name)}.pth.tar", network, mined)

    def _store(self, name: str, network: torch.nn.Module, mined: np.ndarray | None, **more: object) -> None:
        """Write a checkpoint of tensors and plain values only, see weights.read_checkpoint."""
        progress = {"rows": self.rows, "initial_scores": self.initial_scores, "contents": self.contents}
        progress["shared_labels"] = None if mined is None else torch.from_numpy(mined)
        content = {"format": weights.CHECKPOINT_FORMAT, "state_dict": network.state_dict()}
        content |= {"flags": self.flags, "progress": progress}
        buffer = io.BytesIO()  # a full disk is an OSError then, not whatever the archive's writer makes of it
        torch.save(content | more, buffer)
        write_file(self.folder / name, buffer.getbuffer())

    def save(self, parts: Mapping[str, object], mined: np.ndarray | None, epoch: int) -> None:
        """Store all that `restore` needs to go on with an epoch, as last.pth.tar.

        parts: "network", and whatever else has a state_dict. mined: labels of the training images (N,) int64, or None.
        """
        self.epoch = epoch
        if self.writes:
            network = parts["network"]
            training = {name: part.state_dict() for name, part in parts.items() if name != "network"}
            training |= {"epoch": epoch, "seconds": time.time() - self.start, "spent": dict(self.stopwatch.seconds)}
            training |= {"random": auxiliaries.random_states(network.mean.device)}
            self._store(LAST, network, mined, training=training)
        self.can_go_on = True

    def restore(self, parts: Mapping[str, object]) -> np.ndarray | None:
        """Set parts and random states to what `save` stored; return mined labels. Raises InputError for a misfit."""
        training, mined = self.stored["training"], self.stored["progress"]["shared_labels"]
        try:
            parts["network"].load_state_dict(self.stored["state_dict"])
            for name, part in parts.items():
                if name != "network":
                    part.load_state_dict(training[name])
            auxiliaries.set_random_states(training["random"], parts["network"].mean.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.folder / LAST}: holds no training of this run ({reason})") from error
        self.stored = None  # as large as all parts
        if self.writes:
            self._open()
        self.can_go_on = True
        print(f"resumed: {self.epoch} of {self.n_epochs} epochs are done")
        return None if mined is None else mined.numpy()

    def summarise(self) -> str:
        """Write Curr_Summary_Class.txt and return its text."""
        seconds, spent = time.time() - self.start, self.stopwatch.seconds
        parts = {**spent, "all else": max(seconds - sum(spent.values()), 0.0)}
        lines = [
            score_table(self.rows["val"], self.initial_scores, self.paper),
            f"started from: {self.flags['started_from']}",
            f"epochs done: {self.rows['val'][-1]['Epochs'] + 1}",
            f"seconds: {seconds:.1f}",
            f"of these: {', '.join(f'{activity} {value:.1f}' for activity, value in parts.items())}",
            f"run folder: {self.folder}",
        ]
        text = "\n".join(lines) + "\n"
        if self.writes:
            write_file(self.folder / "Curr_Summary_Class.txt", text.encode(errors="surrogateescape"))
        return text


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


def make_folder(wanted: Path, may_take_over: bool = False) -> list[Path]:
    """Create a folder, with _1, _2, ... behind its name where it exists: nothing is ever overwritten.

    may_take_over: take a folder of this name that holds nothing but what a run wrote before it had stored anything.
    Returns the folder behind the parents that this made. Raises InputError where it cannot be made.
    """
    made = [parent for parent in reversed(wanted.parents) if not parent.exists()]
    folder, counter = wanted, 0
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return [*made, folder]
            if may_take_over and is_left_over(folder):
                return [folder]
            counter += 1
            folder = wanted.with_name(f"{wanted.name}_{counter}")
    except BaseException as error:
        remove_empty(made)
        if isinstance(error, OSError):
            raise InputError(f"--save_path: cannot make the folder {folder} ({error.strerror})") from error
        raise


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of some folders, parents first, that are empty when those behind them are gone."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def first_files(folder: Path) -> list[Path]:
    """Return what lies in a folder of FIRST_FILES."""
    return [path for name in FIRST_FILES for path in folder.glob(name)]


def is_left_over(folder: Path) -> bool:
    """Tell whether a folder is of a run that was killed before it had stored anything: it holds nothing else."""
    files = set(first_files(folder))
    return folder / ".lock" in files and files == set(folder.iterdir())


def try_file_system(folder: Path) -> None:
    """Raise InputError that says what the file system of a folder cannot do, of what checkpoints need."""
    needed, trial = "write", folder / ".trial.tmp"
    try:
        with open(trial, "wb") as file:
            needed = "flush"
            os.fsync(file.fileno())
        needed = "rename"
        os.replace(trial, folder / "hypa.pkl")
    except OSError as error:
        raise InputError(
            f"--save_path: the file system of {folder} cannot {needed} files ({error.strerror}); give another folder"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. A process that has died holds none.

    Raises InputError where another process holds it, or the file system knows no locks.
    """
    path = folder / ".lock"
    is_new, lock = not path.exists(), filelock.FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a file in place of a lock, which a killed process would leave
            lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"{folder}: is being trained by another process; wait for it, or stop it first") from error
    except (OSError, NotImplementedError, UserWarning) as error:
        if is_new:
            path.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else os.strerror(errno.ENOSYS)
        raise InputError(
            f"{folder}: its file system cannot lock files ({reason}); keep runs on another one, see --save_path"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def replaced_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` when the block ends well: readers see the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file, see replaced_file."""
    with replaced_file(path) as file:
        file.write(content)


def write_flags(folder: Path, flags: Mapping[str, object]) -> None:
    """Write all flags as hypa.pkl, a pickled dict of plain values, and as readable Parameter_Info.txt."""
    write_file(folder / "hypa.pkl", pickle.dumps(dict(flags)))
    width, lines = max(map(len, flags)), []
    for name, value in flags.items():
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        lines.append(f"{name:<{width}}  {shown}\n")
    write_file(folder / "Parameter_Info.txt", "".join(lines).encode(errors="surrogateescape"))


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values (dict, list, str, numbers) and refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class StoredRun:
    """What a run folder says: its flags, and the rows of log_val_Class.csv, at least one, epochs ascending."""

    folder: Path
    flags: dict[str, object]
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
    return StoredRun(folder, flags, table.to_dict("records"))
