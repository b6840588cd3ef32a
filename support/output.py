"""Output of a program: log lines on stdout, on stderr and in log.txt, and the progress of long activities."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from support import errors, processes

log = logging.getLogger("mic")

INTERVAL = 60
"""Seconds between two progress lines, when there is no terminal for a bar."""


class LineFormatter(logging.Formatter):
    """Format a record as its message, with "warning: " in front of the program's own warnings."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).rstrip("\n")
        return f"warning: {text}" if record.levelno == logging.WARNING and record.name == log.name else text


class ConsoleHandler(logging.Handler):
    """Write lines to a stream, above any progress bar; stop writing to a stream once that fails."""

    def __init__(self, stream: TextIO, takes: Callable[[logging.LogRecord], bool]):
        super().__init__()
        self.stream = stream
        self.addFilter(lambda record: takes(record) and not getattr(record, "for_file_only", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()
        except OSError:
            errors.silence(self.stream)
            self.setLevel(logging.CRITICAL + 1)


class QuietFileHandler(logging.FileHandler):
    """Append lines to a file and ignore errors: on a full disk the run stops when it writes its results, not here."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Log to the current stdout within the block; errors, and warnings of libraries, go to stderr.

    With several processes only the first one prints anything. The lines are also kept for `log_to`.
    """
    root, handlers = logging.getLogger(), [logging.NullHandler()]
    if processes.is_first():
        lines = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        handlers = [
            ConsoleHandler(sys.stdout, lambda record: is_for_stdout(record)),
            ConsoleHandler(sys.stderr, lambda record: not is_for_stdout(record)),
            lines,
        ]
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        log_to(None)
        for handler in handlers:
            root.removeHandler(handler)


def is_for_stdout(record: logging.LogRecord) -> bool:
    """Tell whether a record is from this program and not an error."""
    return record.name == log.name and record.levelno < logging.ERROR


def log_to(path: Path | None) -> None:
    """Append all lines, those so far and later ones, to a file; None closes it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, MemoryHandler):
            if handler.target:
                handler.target.close()
            handler.setTarget(path and QuietFileHandler(path, encoding="utf-8", errors="backslashreplace"))
            if handler.target:
                handler.target.setFormatter(LineFormatter())
                handler.flushLevel = logging.NOTSET
                handler.flush()


class Progress:
    """Show the progress of an activity: a bar on a terminal, otherwise one line per minute; first process only.

    Args:
        what: name of the activity.
        n_images: number of images that it processes.
        run_left: maps the share of the activity that is done to the seconds left of the whole run, None if unknown.
    """

    last_line = time.monotonic()
    """When the last line of any activity was logged."""

    def __init__(self, what: str, n_images: int, run_left: Callable[[float], float | None] = lambda share: None):
        self.what, self.n_images, self.run_left = what, n_images, run_left
        self.n_done, self.values, self.start = 0, {}, time.monotonic()
        is_silent = None if processes.is_first() else True  # None: silent unless stderr is a terminal
        self.bar = tqdm(desc=what, total=n_images, unit="img", unit_scale=True, leave=False, disable=is_silent)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, n_images: int) -> None:
        """Count images that are done.

        Raises:
            KeyboardInterrupt: a signal has asked the program to stop.
        """
        errors.raise_if_stopped()
        self.n_done += n_images
        self.bar.update(n_images)
        self._log_line()

    def show(self, values: Mapping[str, str]) -> None:
        """Show values, such as losses, from now on."""
        self.values = values
        self.bar.set_postfix(values)
        self._log_line()

    def _log_line(self) -> None:
        if self.bar.disable and self.n_images and time.monotonic() - Progress.last_line > INTERVAL:
            Progress.last_line = time.monotonic()
            log.info(self.line())

    def line(self) -> str:
        """Return the progress as one line: share done, speed, and time left of the activity and of the run."""
        share, seconds = self.n_done / self.n_images, time.monotonic() - self.start
        run_left = self.run_left(share)
        parts = [f"{self.what}: {share:.0%} of {self.n_images:,} images", f"{self.n_done / seconds:,.0f} images/s"]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        parts += [f"left: {clock(seconds / share - seconds)}"]
        parts += [] if run_left is None else [f"left of the run: {clock(run_left)}"]
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
