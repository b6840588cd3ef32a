"""Files and folders: atomic writing, locking, creating and removing."""

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
    """Create a folder; if it exists, add _1, _2, ... to its name, so that nothing is ever overwritten.

    Returns:
        The folders that were created: missing parents, then the folder itself.

    Raises:
        InputError: the folder cannot be created.
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
    """Remove those of the folders that are empty, children first; the list has parents before children."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder within the block. The lock of a process that has died does not count.

    Raises:
        InputError: another process holds the lock, or the file system does not support locks.
    """
    path = folder / LOCK
    is_new, lock = not path.exists(), filelock.FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # filelock falls back to a plain file, which a killed process would leave
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
def replaced_file(path: Path, mode: str = "wb", folder: Path | None = None) -> Iterator[IO]:
    """Open a file that replaces `path` if the block succeeds; readers see either the old or the new file, whole.

    Args:
        folder: folder of the temporary file on the same file system; None: that of `path`.
    """
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
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
    """Write a whole file; see replaced_file."""
    with replaced_file(path) as file:
        file.write(content)
