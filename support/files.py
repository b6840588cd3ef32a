"""Files and folders: written whole or not at all, locked, made and removed."""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import filelock

from support.errors import InputError

LOCK = ".lock"


def make_folder(path: Path) -> list[Path]:
    """Create a folder, with _1, _2, ... behind its name where it exists: nothing is ever overwritten.

    Returns the folder behind the parents that this made. Raises InputError where it cannot be made.
    """
    made = [parent for parent in reversed(path.parents) if not parent.exists()]
    folder, counter = path, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return [*made, folder]
            counter += 1
            folder = path.with_name(f"{path.name}_{counter}")
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

    Raises:
        InputError: another process holds it, or the file system knows no locks.
    """
    path = folder / LOCK
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
