"""A run in training, as its folder keeps it: lock, logs, mined labels, summary and checkpoints."""

import contextlib
import pickle
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import auxiliaries
from data.images import VALIDATION, describe_change, digest
from run.logs import LOGS, Row, best_index, column, file_suffix, read_provenance, score_table, test_sets_of
from run.provenance import command
from support import processes, weights
from support.errors import DivergedError, InputError, Interrupted, StoppedError, stop_reason
from support.files import locked, make_folder, remove_empty, replaced_file, try_file_system, write_file
from support.output import Transcript, timed_run

LAST = "last.pth.tar"

FIRST_FILES = ("hypa.pkl", "Parameter_Info.txt", "log.txt", "log_mining.csv", "mined", "mined_labels.npz")
FIRST_FILES += ("mined_clusters.png", "network.svg", "tensorboard", ".lock", ".*.tmp")
"""All that a run writes before its first last.pth.tar."""


class Run:
    """A run in training: a new one, or one that is resumed from its last complete epoch.

    As a context it makes and locks the folder of a new run. What ends a new run before it has stored anything removes
    what the run made; what stops the training later becomes one line that says how to go on. Of several processes, all
    keep the rows, and the first one writes files.

    folder: the wanted run folder, or the one to resume. flags: kept with the run. n_epochs: after which it is finished.
    is_resumed: go on with the run in the folder. may_take_over: start in a folder of this name that a killed run left
    before it had stored anything. paper: published scores by column. provenance: of this start, name to text.
    transcript: of what is printed. Raises InputError where the run cannot be made or read, or where another process
    trains it.
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
        provenance: Mapping[str, str],
        transcript: Transcript,
    ):
        self.folder, self.flags, self.n_epochs, self.is_new = folder, dict(flags), n_epochs, not is_resumed
        self.may_take_over, self.paper, self.writes = may_take_over, paper, processes.is_first()
        self.provenance, self.transcript = [dict(provenance)], transcript
        self.stopwatch, self.start, self.epoch = auxiliaries.Stopwatch(), time.monotonic(), 0
        self.rows: dict[str, list[Row]] = {name: [] for name in LOGS}
        self.minings: list[np.ndarray] = []
        self.initial_scores: Row = {}
        self.contents: dict[str, dict] = {}
        self.stored: dict[str, dict] | None = None
        self.is_locked = self.can_go_on = False
        self.training_since: tuple[float, int] | None = None
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
        # That of a start that was killed before it had stored anything is in hypa.pkl only
        starts = [self.stored["provenance"], read_provenance(self.folder)]
        self.provenance = [*max(starts, key=len), *self.provenance]
        self.rows, self.initial_scores, self.contents = (progress[k] for k in ("rows", "initial_scores", "contents"))
        mined = progress["mined_labels"]
        if mined is not None and mined.shape[:1] != (len(self.rows["mining"]),):
            raise InputError(f"{self.folder / LAST}: its mined labels are not those of its minings")
        self.minings = [] if mined is None else list(mined.numpy())
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
            if self.writes:
                self.transcript.write_to(self.folder / "log.txt")
            return self
        try:
            if self.writes:
                take_over = self.may_take_over and is_left_over(self.folder)
                self.made = [self.folder] if take_over else make_folder(self.folder)
                self.folder = self.made[-1]
            self.folder = processes.broadcast(self.folder)
            self._lock()
            if self.writes:
                if (self.folder / LAST).exists():
                    raise InputError(f"{self.folder}: was trained meanwhile; start again to go on with it")
                self._remove_first_files(but=".lock")  # of the run that was killed
                try_file_system(self.folder)
                self.transcript.write_to(self.folder / "log.txt")
                self._open()
        except BaseException as error:  # ends as in the block
            self.__exit__(type(error), error, None)
            raise
        return self

    def _open(self) -> None:
        """Write flags and logs as they are so far, over whatever has happened to the files."""
        for pattern in (".*.tmp", "mined/.*.tmp"):  # of a process that was killed
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)
        write_flags(self.folder, self.flags, self.provenance)
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
        self.transcript.write_to(None)
        with contextlib.suppress(OSError):  # what ended the run is to be told
            if self.is_locked:
                self._remove_first_files()
        remove_empty(self.made)

    def _remove_first_files(self, but: str = "") -> None:
        """Remove what a run writes before it has stored anything, but one file."""
        for path in first_files(self.folder):
            if path.name != but:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder of a new run with all that it holds."""
        self.can_go_on = False
        if self.writes:
            self.transcript.write_to(None)
            shutil.rmtree(self.folder)

    def _hint(self) -> str:
        """Say what is left of a stopped run and how to go on with it."""
        if not (self.folder / LAST).exists():
            return "nothing had been stored yet"
        resume = command(["--resume", str(self.folder)], self.provenance[-1])
        return f"the last complete epoch is safe; go on with: {resume}"

    def require_images(self, fingerprints: Mapping[str, Mapping]) -> None:
        """Raise InputError where these are not the images of the run that is resumed, see images.fingerprints."""
        change = None if self.is_new else describe_change(self.stored["progress"]["contents"], fingerprints)
        if change:
            raise InputError(f"--resume {self.folder}: not the images that it was trained with: {change}; "
                             "give it those, or start a new run")  # fmt: skip
        self.contents = dict(fingerprints)
        self.note(images=digest(fingerprints))

    def note(self, **facts: str) -> None:
        """Keep with the flags what is known now only; a resumed run keeps what it knew first."""
        self.flags = facts | self.flags
        if self.is_new and self.writes:
            write_flags(self.folder, self.flags, self.provenance)

    def log(self, name: str, row: Row) -> None:
        """Add a row to a log, see LOGS."""
        self.rows[name].append(row)
        if self.writes:
            self._write_log(name)
            if self.board:
                self._add_to_board(name, row)

    def log_mining(self, row: Row, mined: np.ndarray, paths: Sequence[str]) -> None:
        """Add a mining to the history. mined: labels (N,) int of the images at `paths`."""
        self.minings.append(mined)
        self.log("mining", row)
        self._write_minings(paths)

    def _write_minings(self, paths: Sequence[str]) -> None:
        """Write mined_labels.npz, if there are any: paths (N,), labels (M, N), epochs (M,) they begin."""
        if self.writes and self.minings:
            epochs = [row["Before Epoch"] for row in self.rows["mining"]]
            with replaced_file(self.folder / "mined_labels.npz") as file:
                np.savez_compressed(file, paths=np.array(paths), labels=small(np.stack(self.minings)), epochs=epochs)

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

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return time.monotonic() - self.start

    def share_of(self, activity: str) -> float:
        """Return the share of the run's time that went to an activity, see Stopwatch."""
        return self.stopwatch.seconds[activity] / self.seconds

    def seconds_left(self, epochs: int, share: float = 0.0) -> float | None:
        """Return how long the run will take from here, by the epochs that this process has trained; None before any.

        epochs: how many are done. share: of the next one.
        """
        since, first_epoch = self.training_since or (0.0, epochs + share)
        trained = epochs + share - first_epoch
        return (time.monotonic() - since) / trained * (self.n_epochs - epochs - share) if trained > 0 else None

    def keep_best(self, network: torch.nn.Module) -> None:
        """Store the network for each test set whose best epoch the last evaluation is of.

        On resume, an epoch that last.pth.tar does not hold is trained again and overwrites its checkpoint.
        """
        last = len(self.rows["val"]) - 1
        for name, index in self.best_indices().items():
            if index == last and self.writes:
                self._store(f"checkpoint{file_suffix(name)}.pth.tar", network)

    def _store(self, name: str, network: torch.nn.Module, **more: object) -> None:
        """Write a checkpoint of tensors and plain values only, see weights.read_checkpoint."""
        progress = {"rows": self.rows, "initial_scores": self.initial_scores, "contents": self.contents}
        progress["mined_labels"] = torch.from_numpy(small(np.stack(self.minings))) if self.minings else None
        content = {"format": weights.CHECKPOINT_FORMAT, "state_dict": network.state_dict()}
        content |= {"flags": self.flags, "provenance": self.provenance, "progress": progress}
        with replaced_file(self.folder / name) as file:
            try:
                torch.save(content | more, file)
            except RuntimeError as error:  # what the archive's writer makes of a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def save(self, parts: Mapping[str, object], epoch: int) -> None:
        """Store all that `restore` needs to go on with an epoch, as last.pth.tar.

        parts: "network", and whatever else has a state_dict.
        """
        self.epoch = epoch
        if self.writes:
            network = parts["network"]
            training = {name: part.state_dict() for name, part in parts.items() if name != "network"}
            training |= {"epoch": epoch, "seconds": self.seconds, "spent": dict(self.stopwatch.seconds)}
            training |= {"random": auxiliaries.random_states(network.mean.device)}
            self._store(LAST, network, training=training)
        self._training_begins()

    def _training_begins(self) -> None:
        """From the first checkpoint on the run can be resumed, and its epochs are timed."""
        self.can_go_on = True
        if self.training_since is None:
            self.training_since = time.monotonic(), self.epoch
            self.stack.enter_context(timed_run(lambda: self.seconds_left(self.epoch)))

    def restore(self, parts: Mapping[str, object], paths: Sequence[str]) -> np.ndarray | None:
        """Set parts and random states to what `save` stored; return the mined labels of the images at `paths` (N,).

        What the folder holds of later minings is dropped. Raises InputError for parts that do not fit.
        """
        training = self.stored["training"]
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
            self._write_minings(paths)
            sheets = {sheet_path(self.folder, row["Before Epoch"]) for row in self.rows["mining"]}
            later = {*self.folder.glob("mined/before_epoch_*.jpg")} - sheets
            for path in later:
                path.unlink()
            if later and sheets and max(sheets).exists():  # else it is drawn by the next mining
                with Image.open(max(sheets)) as sheet:
                    sheet.save(self.folder / "mined_clusters.png")
        self._training_begins()
        print(f"resumed: {self.epoch} of {self.n_epochs} epochs are done")
        return self.minings[-1].astype(np.int64) if self.minings else None

    def summarise(self) -> str:
        """Write Curr_Summary_Class.txt and return its text."""
        seconds, spent = self.seconds, self.stopwatch.seconds
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


def small(labels: np.ndarray) -> np.ndarray:
    """Return labels as the smallest integers that hold them, of those that a checkpoint can hold."""
    return labels.astype(next(kind for kind in (np.uint8, np.int16, np.int32) if labels.max() <= np.iinfo(kind).max))


def sheet_path(folder: Path, before_epoch: int) -> Path:
    """Return the file of a mining's contact sheet."""
    return folder / "mined" / f"before_epoch_{before_epoch:04d}.jpg"


def first_files(folder: Path) -> list[Path]:
    """Return what lies in a folder of FIRST_FILES."""
    return [path for name in FIRST_FILES for path in folder.glob(name)]


def is_left_over(folder: Path) -> bool:
    """Tell whether a folder is of a run that was killed before it had stored anything: it holds nothing else."""
    files = set(first_files(folder))
    return folder / ".lock" in files and files == set(folder.iterdir())


def write_flags(folder: Path, flags: Mapping[str, object], provenance: Sequence[Mapping[str, str]] = ()) -> None:
    """Write flags and provenance as hypa.pkl, a pickled dict of plain values, and as readable Parameter_Info.txt."""
    more = {"provenance": list(provenance)} if provenance else {}
    write_file(folder / "hypa.pkl", pickle.dumps(dict(flags) | more))
    shown = {}
    for name, value in flags.items():
        shown[name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    for i, entry in enumerate(provenance):
        shown |= {f"start {i + 1}, {name}": value for name, value in entry.items()}
    width = max(map(len, shown))
    text = "".join(f"{name:<{width}}  {value}\n" for name, value in shown.items())
    write_file(folder / "Parameter_Info.txt", text.encode(errors="surrogateescape"))
