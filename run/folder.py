"""A run in training: its folder and lock, what it logs and saves, and how it ends."""

import contextlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import auxiliaries
from data.images import describe_change, digest
from run import checkpoint
from run.checkpoint import LAST, StoredRun
from run.history import STATE_FILE, History, Row, epoch_column, file_suffix, read_state
from run.provenance import command
from support import processes
from support.errors import DivergedError, InputError, StoppedError, ignore_signals, stop_reason
from support.files import LOCK, locked, make_folder, remove_empty, replaced_file
from support.output import log, log_to


class Run:
    """A run in training, either new or resumed from its last complete epoch.

    As a context manager it makes and locks the folder of a new run. If a new run ends before its first checkpoint, for
    whatever reason, its folder is removed. With several processes all keep the history, and the first one writes files.

    Args:
        folder: the folder that a new run should get (a counter is added if it exists), or that of the run to resume.
        flags: flags that are stored with the run.
        defaults: {flag: default} of the flags that differ from their defaults.
        provenance: provenance of this start, {what: text}.
        stored: the run to resume; None for a new one.
        may_restart: whether to reuse a folder of this name that a killed run left before its first checkpoint.

    Raises:
        InputError: the stored run is damaged.
    """

    def __init__(
        self,
        folder: Path,
        flags: Mapping[str, object],
        *,
        defaults: Mapping[str, object],
        provenance: Mapping[str, str],
        stored: StoredRun | None,
        may_restart: bool,
    ):
        self.history = History(folder, dict(flags), dict(defaults), [dict(provenance)])
        self.stored, self.may_restart, self.is_new = stored, may_restart, stored is None
        self.writes, self.minings = processes.is_first(), []
        self.stopwatch, self.start = auxiliaries.Stopwatch(), time.monotonic()
        self.stack = contextlib.ExitStack()
        self.board = None
        self.made: list[Path] = []
        self.is_resumable = False  # True once a checkpoint was saved or restored, or if none needs to be
        if stored:
            history = self.history
            history.flags = stored.content["flags"] | history.flags
            history.provenance = [*stored.content["provenance"], *history.provenance]
            self.minings = checkpoint.restore_history(history, stored.content)
            self.stopwatch.seconds = history.spent
            self.start -= history.seconds
            with contextlib.suppress(InputError):
                history.peak_memory = read_state(stored.folder / STATE_FILE)["peak_memory"]
            self.is_resumable = history.is_finished  # a finished run needs no restoring
        self.history.spent = self.stopwatch.seconds
        self.start_timing()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.history.folder

    def __enter__(self) -> "Run":
        try:
            if self.is_new:
                if self.writes:
                    self._make_folder()
                self.history.folder = processes.broadcast(self.history.folder)
            if self.writes:
                log_to(self.folder / "log.txt")
                if self.is_new:
                    self._open()
        except BaseException as error:  # clean up as for an error inside the block
            self.__exit__(type(error), error, None)
            raise
        return self

    def _make_folder(self) -> None:
        """Make and lock the folder of a new run, or reuse that of a run that was killed before its first checkpoint."""
        folder = self.folder
        if self.may_restart and (folder / LOCK).exists():
            self.stack.enter_context(locked(folder))
            if is_unfinished_start(folder):
                self.made = [folder]
                for path in [path for path in folder.iterdir() if path.name != LOCK]:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            else:
                self.stack.close()
        if not self.made:
            self.made = make_folder(folder)
            self.history.folder = self.made[-1]
            self.stack.enter_context(locked(self.folder))

    def _open(self) -> None:
        """Write all files of the history so far, and open the TensorBoard log."""
        for leftover in self.folder.glob("**/.*.tmp"):  # left by a killed process
            leftover.unlink(missing_ok=True)
        self.history.write()
        if self.history.flags["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.history.epoch)
            self.stack.callback(self.board.close)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Write how the run ended, add to the error how to resume it, and release the folder."""
        history = self.history
        history.state = "stopped" if error else "finished"
        if error:
            ignore_signals()
            history.reason = stop_reason(error) or f"a bug: {type(error).__name__}, see log.txt"
        resume = f"resume with: {command(['--resume', str(self.folder)], history.provenance[-1])}"
        if not self.is_resumable:
            self._remove()
            if error and not isinstance(error, InputError):
                error.add_note("no epoch was complete: nothing is saved" if self.is_new else resume)
            return
        if self.writes:
            with (
                contextlib.suppress(OSError) if error else contextlib.nullcontext()
            ):  # report what ended the run, not a failure to write
                if self.stored is None:  # a run that was already finished when it was started keeps its times
                    self._update_times(history.epoch)
                history.write_state()
        self.stack.close()
        if isinstance(error, DivergedError):
            error.add_note(f"diverged in epoch {history.epoch}; {self.folder / LAST} holds the state before that epoch")
        elif error:
            error.add_note(f"last complete epoch saved; {resume}")
        if isinstance(error, InputError):  # an image has disappeared or been damaged since
            stopped = StoppedError(str(error))
            stopped.__notes__ = error.__notes__
            raise stopped from error

    def _remove(self) -> None:
        """Close the files of this start and remove what it made; a failure must not hide what ended the run."""
        with contextlib.suppress(OSError):
            self.stack.close()
            if self.made:
                log_to(None)
                shutil.rmtree(self.made[-1], ignore_errors=True)
                remove_empty(self.made[:-1])

    def require_images(self, image_sets: Mapping[str, Mapping]) -> None:
        """Record the images of the run and, on resume, check that they are those that it was trained with.

        Args:
            image_sets: fingerprints of each image set, see data.images.

        Raises:
            InputError: they have changed since.
        """
        change = None if self.is_new else describe_change(self.history.image_sets, image_sets)
        if change:
            raise InputError(
                f"--resume {self.folder}: the images are not those that it was trained with ({change}); restore them, "
                "or start a new run"
            )
        self.history.image_sets = dict(image_sets)
        self.note(images=digest(image_sets))

    def note(self, **facts: str) -> None:
        """Record facts learned after start-up with the flags; on resume the stored value wins."""
        self.history.flags = facts | self.history.flags
        if self.is_new and self.writes:
            self.history.write_flags()

    def log(self, name: str, epoch: int, start: float, values: Row) -> None:
        """Add a row to a log.

        Args:
            name: a key of history.LOGS.
            epoch: number of the epoch; of a mining, the epoch that it precedes.
            start: when the work began that the row is about, as time.monotonic() counts.
            values: all other columns of the row.
        """
        values = {"Time": round(time.monotonic() - start, 2)} | values
        # Checkpoints hold plain numbers only
        values = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
        self.history.rows[name].append({epoch_column(name): epoch} | values)
        if self.writes:
            self.history.write_log(name)
        if self.board:
            for key, value in values.items():
                if value is not None:
                    self.board.add_scalar(f"{name}/{key}", value, epoch)
            self.board.flush()  # must be on disk before last.pth.tar holds its epoch

    def log_mining(self, epoch: int, start: float, values: Row, mined: np.ndarray, paths: Sequence[str]) -> None:
        """Log a mining; see log.

        Args:
            mined: labels (N,) int of the images at `paths`.
        """
        self.minings.append(mined)
        self.log("mining", epoch, start, values)
        self._write_minings(paths)

    def _write_minings(self, paths: Sequence[str]) -> None:
        """Write mined_labels.npz, if there are minings: paths (N,), labels (M, N), and the epochs (M,) they precede."""
        if self.writes and self.minings:
            labels = checkpoint.in_smallest_type(np.stack(self.minings))
            with replaced_file(self.folder / "mined_labels.npz") as file:
                np.savez_compressed(file, paths=np.array(paths), labels=labels, epochs=self.history.mined_epochs)

    def add_pictures(self, pictures: Iterable[Path], step: int) -> None:
        """Add PNG files to the TensorBoard log, if there is one."""
        for path in pictures if self.board else []:
            with Image.open(path) as picture:
                self.board.add_image(path.stem, np.asarray(picture), step, dataformats="HWC")

    def start_timing(self) -> None:
        """Start timing epochs here, for the estimate of the time left."""
        self.timing_start = time.monotonic(), self.history.epoch, self.stopwatch.seconds["mining"]

    def seconds_left(self, epochs: int, share: float = 0.0) -> float | None:
        """Estimate the time left of the run from the epochs since this start and from the last mining.

        Args:
            epochs: number of complete epochs.
            share: fraction of the next epoch that is done.

        Returns:
            Seconds; None before anything was trained.
        """
        since, first_epoch, mining = self.timing_start
        trained = epochs + share - first_epoch
        if trained <= 0:
            return None
        seconds = time.monotonic() - since - (self.stopwatch.seconds["mining"] - mining)
        left = seconds / trained * (self.history.n_epochs - epochs - share)
        n_minings = sum(map(self.history.mining_is_due, range(epochs, self.history.n_epochs)))
        return left + (n_minings * self.history.rows["mining"][-1]["Time"] if n_minings else 0)

    def keep_best(self, network: torch.nn.Module) -> None:
        """Save the network for each test set whose best epoch is the one scored last."""
        for name in self.history.improved_sets() if self.writes else []:
            path = self.folder / f"checkpoint{file_suffix(name)}.pth.tar"
            checkpoint.save(path, self.history, self.minings, network)

    def save(self, network: torch.nn.Module, parts: Mapping[str, object], epoch: int) -> None:
        """Save all that `restore` needs to continue at an epoch, as last.pth.tar; the run is now resumable."""
        history = self.history
        history.epoch = epoch
        self._update_times(epoch)
        history.peak_memory = auxiliaries.peak_memory(network.mean.device)
        if self.writes:
            checkpoint.save(self.folder / LAST, history, self.minings, network, parts)
        self.is_resumable = True
        if self.writes:
            history.write_state()

    def _update_times(self, epoch: int) -> None:
        """Update the time spent and the time left in the history."""
        self.history.seconds = time.monotonic() - self.start
        self.history.seconds_left = self.seconds_left(epoch)

    def restore(self, network: torch.nn.Module, parts: Mapping[str, object], paths: Sequence[str]) -> np.ndarray | None:
        """Restore network, parts and random states to what `save` wrote.

        Args:
            parts: what else has a state_dict, by the names given to `save`.
            paths: paths of the training images.

        Returns:
            The mined labels (N,) int64 of the images at `paths`; None if there are none.

        Raises:
            InputError: the checkpoint does not fit them.
        """
        checkpoint.restore(self.stored.content, network, parts)
        if self.minings and self.minings[-1].shape != (len(paths),):
            raise InputError(f"{self.folder / LAST}: its mined labels are not those of these images")
        self.stored = None  # free the stored checkpoint, which is as large as all parts together
        if self.writes:
            self._open()
        self._write_minings(paths)
        self.is_resumable = True
        log.info(f"resumed: {self.history.epoch} of {self.history.n_epochs} epochs are done")
        return self.minings[-1].astype(np.int64) if self.minings else None


def is_unfinished_start(folder: Path) -> bool:
    """Tell whether a folder belongs to a run that was killed before its first checkpoint."""
    if (folder / LAST).exists() or not (folder / STATE_FILE).exists():
        return False
    try:
        history = History.read(folder)
    except InputError:
        return False
    return (history.epoch, history.state) == (0, "running")
