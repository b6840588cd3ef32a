"""A run on disk: its folder, lock, logs, summary and checkpoints.

`Run` is the one that trains; `read_run` reads what a stored one logged.
"""

import contextlib
import io
import os
import pickle
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from support.errors import DivergedError, InputError, Interrupted, StoppedError, first_line, signals_stop, stop_reason

LAST = "last.pth.tar"
LOGS = {
    "train": "log_train_Class.csv",
    "val": "log_val_Class.csv",
    "mining": "log_mining.csv",
    "shared": "log_val_Shared.csv",
    "probe": "log_probe.csv",
}
"""The CSV files of a run folder, by the names of their rows in a checkpoint."""

Row = dict[str, object]
"""A row of a log. That of "val" and "shared" is {"Epochs", "Time", "scores": Scores}."""

Scores = Mapping[str, Mapping[str, float | None]]
"""{test set: {score: value}}, None for what was left out."""


def file_suffix(test_set: str) -> str:
    """Return what a test set's name adds to file names: "_set1" for "Set 1", nothing for the only one, ""."""
    return f"_{test_set.lower().replace(' ', '')}" if test_set else ""


def columns_of(row: Row) -> Row:
    """Return a row with its scores under their columns in the CSV, test set first: "Set 1 NMI"."""
    scores = row.get("scores", {})
    flat = {f"{name} {score}".strip(): value for name, values in scores.items() for score, value in values.items()}
    return {name: value for name, value in row.items() if name != "scores"} | flat


def scores_line(scores: Scores) -> str:
    """Return scores as one line of text; those that were left out are not in it."""
    columns = columns_of({"scores": scores})
    return "  ".join(f"{name} {value:.4f}" for name, value in columns.items() if value is not None)


def best_index(rows: Sequence[Row], test_set: str, select: str) -> int:
    """Return which row of "val" is of the epoch whose checkpoint is kept for a test set.

    The first one with the highest Recall@1 on that set or, where select is "val", on the classes held out.
    """
    name = VALIDATION if select == "val" else test_set
    return max(range(len(rows)), key=lambda index: rows[index]["scores"][name]["Recall @ 1"])


class Run:
    """A run in training: a new one, or one that is resumed from its last complete epoch.

    Used as a context it makes the folder, or goes on in it, locks it, and turns what stops the training into one line
    that says how to go on. Of several processes, all keep the rows, and the first one writes files.

    folder: the wanted run folder, or the one to resume. flags: kept with the run. n_epochs: after which it is finished.
    is_resumed: go on with the run in the folder. paper: published scores by column. Raises InputError where the run
    cannot be made or read, or where another process trains it.
    """

    def __init__(
        self, folder: Path, flags: Mapping[str, object], n_epochs: int, *, is_resumed: bool, paper: Mapping[str, float]
    ):
        self.folder, self.flags, self.n_epochs, self.is_new = folder, dict(flags), n_epochs, not is_resumed
        self.paper, self.writes = paper, processes.is_first()
        self.stopwatch, self.start, self.epoch = auxiliaries.Stopwatch(), time.time(), 0
        self.rows: dict[str, list[Row]] = {name: [] for name in LOGS}
        self.initial_scores: Scores = {}
        self.stored: dict[str, dict] | None = None
        self.board, self.is_open = None, False
        self.pending: list[tuple[int, Callable[[Path], Iterable[Path] | None]]] = []
        self.stack = contextlib.ExitStack()
        if self.is_new:
            check_folder(folder)
        else:
            self._read_stored()

    def _read_stored(self) -> None:
        """Lock the folder, and take up flags, rows and time from last.pth.tar."""
        if self.writes:
            self.stack.enter_context(locked(self.folder / ".lock", self.folder))
        self.stored = weights.read_checkpoint(self.folder, LAST)
        if "training" not in self.stored:
            raise InputError(f"{self.folder / LAST}: holds a network without the state of its training")
        training, progress = self.stored["training"], self.stored["progress"]
        self.flags = self.stored["flags"] | self.flags
        self.rows, self.initial_scores = progress["rows"], progress["initial_scores"]
        self.epoch, self.stopwatch.seconds = training["epoch"], dict(training["spent"])
        self.start -= training["seconds"]

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.n_epochs

    def require_images(self, contents: Mapping[str, Mapping[str, str]]) -> None:
        """Raise InputError where these are not the images of the run that is resumed. contents: see data/images.py."""
        self.contents, self.flags["images"] = contents, digest(contents)
        change = None if self.is_new else describe_change(self.stored["progress"]["contents"], contents)
        if change:
            raise InputError(f"--resume {self.folder}: not the images that it was trained with: {change}; "
                             "give it those, or start a new run")  # fmt: skip

    def __enter__(self) -> "Run":
        """Make the folder of a new run, or go on in that of a resumed one; write flags and logs as they are so far."""
        if self.is_new:
            self.folder = processes.computed_by_first(lambda: make_folder(self.folder))
            if self.writes:
                self.stack.enter_context(locked(self.folder / ".lock", self.folder))
        try:
            self._write_first_files()
        except BaseException as error:  # ends as in the block
            self.__exit__(type(error), error, None)
            raise
        self.stack.enter_context(signals_stop(""))
        return self

    def _write_first_files(self) -> None:
        """Write flags, logs and pictures as they are so far."""
        if self.writes:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            write_flags(self.folder, self.flags)
            for name in LOGS:
                self._write_log(name)
            if self.flags["tensorboard"]:
                self._open_board()
        self.is_open = True
        for step, draw in self.pending:
            self.plot(step, draw)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Let go of the folder; raise Interrupted or StoppedError with how to go on, where the run was stopped."""
        self.stack.close()
        if isinstance(error, Interrupted):
            raise Interrupted(error.signum, self._hint()) from None
        if isinstance(error, DivergedError):
            raise StoppedError(f"in epoch {self.epoch} {error}; {self.folder / LAST} is from before that") from error
        reason = stop_reason(error) if isinstance(error, Exception) else None
        if reason:
            raise StoppedError(f"{reason}; {self._hint()}") from error

    def _hint(self) -> str:
        """Say what is left of a stopped run and how to go on with it."""
        if not (self.folder / LAST).exists():
            return "nothing had been stored to go on with"
        n_local = processes.local()
        program = "python" if n_local == 1 else f"torchrun --standalone --nproc_per_node={n_local}"
        if processes.launched() > n_local:  # on several machines
            program = "torchrun as before,"
        resume = f"main.py --resume {shlex.quote(str(self.folder))}"
        return f"the last complete epoch is safe; go on with: {program} {resume}"

    def epochs(self) -> Iterator[int]:
        """Yield the epochs to train; each is done when the next one is asked for, or the last one is over."""
        while not self.is_finished:
            yield self.epoch

    def log(self, name: str, row: Row) -> None:
        """Add a row to a log, see LOGS."""
        self.rows[name].append(row)
        if self.is_open and self.writes:
            self._write_log(name)
            if self.board:
                self._add_to_board(name, row)

    def plot(self, step: int, draw: Callable[[Path], Iterable[Path] | None]) -> None:
        """Let a function draw into the folder, as soon as there is one; TensorBoard gets the PNG files it returns."""
        if not self.is_open:
            self.pending.append((step, draw))
        elif self.writes:
            with self.stopwatch.measure("drawing"):
                pictures = draw(self.folder)
            for path in (pictures or []) if self.board else []:
                with Image.open(path) as picture:
                    self.board.add_image(path.stem, np.asarray(picture), step, dataformats="HWC")

    def _write_log(self, name: str) -> None:
        """Write a CSV anew from the rows in memory, whatever has happened to the file. Without rows there is none."""
        path, rows = self.folder / LOGS[name], [columns_of(row) for row in self.rows[name]]
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
        for column, value in columns_of(row).items():
            if value is not None and column not in ("Epochs", "Before Epoch"):
                self.board.add_scalar(f"{name}/{column}", value, step)
        self.board.flush()  # it is to be there when last.pth.tar holds its epoch

    def best_indices(self) -> dict[str, int]:
        """Return which row of "val" is the best of each test set so far."""
        rows, select = self.rows["val"], self.flags["select"]
        return {name: best_index(rows, name, select) for name in rows[-1]["scores"] if name != VALIDATION}

    def best_line(self) -> str:
        """Return the best Recall@1 of each test set so far as text."""
        texts = []
        for name, index in self.best_indices().items():
            best = self.rows["val"][index]
            texts.append(f"{name} {best['scores'][name]['Recall @ 1']:.4f} in epoch {best['Epochs']}".strip())
        return ", ".join(texts)

    def keep_best(self, network: torch.nn.Module, labels: Mapping[str, np.ndarray]) -> None:
        """Store the network for each test set whose best epoch the last evaluation is of.

        On resume, an epoch that last.pth.tar does not hold is trained again and overwrites its checkpoint.
        """
        last = len(self.rows["val"]) - 1
        for name, index in self.best_indices().items():
            if index == last and self.writes:
                self._store(f"checkpoint{file_suffix(name)}.pth.tar", network, labels)

    def _store(self, name: str, network: torch.nn.Module, labels: Mapping[str, np.ndarray], **more: object) -> None:
        """Write a checkpoint of tensors and plain values only, see weights.read_checkpoint."""
        shared = torch.from_numpy(labels["Shared"]) if "Shared" in labels else None
        progress = {"rows": self.rows, "initial_scores": self.initial_scores, "shared_labels": shared}
        progress |= {"contents": self.contents}
        content = {"format": weights.CHECKPOINT_FORMAT, "state_dict": network.state_dict()}
        content |= {"flags": self.flags, "progress": progress}
        buffer = io.BytesIO()  # a full disk is an OSError then, not whatever the archive's writer makes of it
        torch.save(content | more, buffer)
        write_file(self.folder / name, buffer.getbuffer())

    def save(self, parts: Mapping[str, object], labels: Mapping[str, np.ndarray], epoch: int) -> None:
        """Store all that `restore` needs to go on with an epoch, as last.pth.tar.

        parts: "network", and whatever else has a state_dict. labels: of the training images by task.
        """
        self.epoch = epoch
        if not self.writes:
            return
        network = parts["network"]
        training = {name: part.state_dict() for name, part in parts.items() if name != "network"}
        training |= {"epoch": epoch, "seconds": time.time() - self.start, "spent": dict(self.stopwatch.seconds)}
        training |= {"random": auxiliaries.random_states(network.mean.device)}
        self._store(LAST, network, labels, training=training)

    def restore(self, parts: Mapping[str, object], labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Set parts and random states to what `save` stored; return all labels. Raises InputError where they misfit."""
        training, shared = self.stored["training"], self.stored["progress"]["shared_labels"]
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
        print(f"resumed: {self.epoch} of {self.n_epochs} epochs are done")
        return dict(labels) if shared is None else {**labels, "Shared": shared.numpy()}

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
            write_file(self.folder / "Curr_Summary_Class.txt", text.encode())
        return text


def score_table(rows: Sequence[Row], initial: Scores, paper: Mapping[str, float]) -> str:
    """Return a table of the best value of each score with its epoch, the last, that before training, and the paper's.

    rows: of "val", at least one. A score that was left out of all rows is left out here.
    """
    history = pd.DataFrame([columns_of(row) for row in rows]).set_index("Epochs").drop(columns="Time")
    history = history.astype(float).dropna(axis="columns", how="all")
    first, published = (pd.Series(scores, dtype=float) for scores in (columns_of({"scores": initial}), paper))
    table = pd.DataFrame({"best": history.max(), "epoch": history.idxmax(), "last": history.iloc[-1]})
    table["before training"] = first
    if paper:
        table["paper"] = published
        table["best - paper"] = table["best"] - table["paper"]
    text = table.rename_axis(columns="score").to_string(float_format="{:.4f}".format, na_rep="-")
    return f"{text}\npaper: MIC with margin loss, ResNet50 (arXiv 1909.11574)" if paper else text


def check_folder(folder: Path) -> None:
    """Raise InputError where a folder could not be made, as far as that shows without making anything."""
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--save_path: {existing} is a file, or a folder that is not writable")


def make_folder(wanted: Path) -> Path:
    """Create and return a folder, with _1, _2, ... behind its name where it exists: nothing is ever overwritten."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, counter = wanted, 0
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        counter += 1
        folder = wanted.with_name(f"{wanted.name}_{counter}")


def locked(file: Path, folder: Path) -> contextlib.AbstractContextManager:
    """Lock a file for the run in a folder, and return a context that ends with letting go of it.

    A process that has died holds no lock. Raises InputError where another process holds it.
    """
    try:
        return filelock.FileLock(file).acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"{folder}: is being trained by another process; wait for it, or stop it first") from error


def name_taken(folder: Path) -> contextlib.AbstractContextManager:
    """Hold the name of a run, be there a folder of it or not. Raises InputError where another process holds it."""
    if not processes.is_first():
        return contextlib.nullcontext()
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return locked(folder.parent / f".{folder.name}.lock", folder)


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
    write_file(folder / "Parameter_Info.txt", "".join(lines).encode())


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
    test_sets = [name.removesuffix("Recall @ 1").strip() for name in recalls]
    return StoredRun(folder, flags, [with_scores(row, test_sets) for row in table.to_dict("records")])


def with_scores(row: Row, test_sets: Sequence[str]) -> Row:
    """Return a row of the CSV with its scores by test set: what columns_of makes columns of."""
    scores: dict[str, dict[str, float]] = {name: {} for name in test_sets}
    for column, value in row.items():
        if column not in ("Epochs", "Time"):
            owner = next((name for name in test_sets if name and column.startswith(f"{name} ")), "")
            scores[owner][column.removeprefix(owner).strip()] = value
    return {"Epochs": int(row["Epochs"]), "Time": row.get("Time"), "scores": scores}
