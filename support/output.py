"""What a program prints: a copy of it in a file, and how far a long activity is."""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TextIO

from tqdm import tqdm

from support import processes

INTERVAL = 60
"""Seconds between two lines that say how far an activity is, where there is no terminal."""


class Transcript:
    """As a context, copies whole lines of stdout and stderr to a file; progress bars, which are drawn over, are not.

    Lines are kept until `write_to` names the file. A traceback that leaves the context is copied too.
    """

    def __init__(self):
        self.lines: list[str] | None = []
        self.file: IO | None = None
        self.streams: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> "Transcript":
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (CopiedStream(stream, self) for stream in self.streams)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        sys.stdout, sys.stderr = self.streams
        if isinstance(error, Exception):  # a bug, whose traceback Python prints later
            self.add("".join(traceback.format_exception(error)).rstrip("\n"))
        self.write_to(None)

    def write_to(self, path: Path | None) -> None:
        """Append the lines so far, and from now on, to a file; None: to no file."""
        if self.file:
            self.file.close()
        self.file = path and open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        lines, self.lines = self.lines, None
        for line in lines or []:
            self.add(line)

    def add(self, line: str) -> None:
        """Copy a line. A full disk stops a run where it writes its results, not here."""
        if self.lines is not None:
            self.lines.append(line)
        elif self.file:
            try:
                self.file.write(f"{line}\n")
            except OSError:
                self.file = None


class CopiedStream:
    """A text stream whose lines are copied to a transcript; all else, such as isatty, is the stream's."""

    def __init__(self, stream: TextIO, transcript: Transcript):
        self.stream, self.transcript, self.unfinished = stream, transcript, ""

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, and copy the lines that this completes, of each what stands after a bar that it cleared."""
        *lines, self.unfinished = (self.unfinished + text.replace("\r\n", "\n")).split("\n")
        for line in lines:
            self.transcript.add(line.rsplit("\r", 1)[-1])
        self.unfinished = self.unfinished.rsplit("\r", 1)[-1]
        return self.stream.write(text)


RUN_LEFT: list[Callable[[], float | None]] = [lambda: None]
"""The last one says how long the run that is trained will take from now on, in seconds; see timed_run."""


@contextlib.contextmanager
def timed_run(seconds_left: Callable[[], float | None]) -> Iterator[None]:
    """Let lines on the progress say in a block how long the run will take."""
    RUN_LEFT.append(seconds_left)
    try:
        yield
    finally:
        RUN_LEFT.pop()


class Progress:
    """Shows how far an activity is: a bar on a terminal, elsewhere a line a minute; of several processes the first one.

    what: the activity. n_images: how many images it takes. run_left: seconds that the whole run will take from a share
    of this activity on, None where that is not known; by default as timed_run was told.
    """

    said = time.monotonic()
    """When the last line of any activity was printed."""

    def __init__(self, what: str, n_images: int, run_left: Callable[[float], float | None] | None = None):
        self.what, self.n_images, self.run_left = what, n_images, run_left
        self.n_done, self.values, self.start = 0, {}, time.monotonic()
        is_silent = None if processes.is_first() else True  # None: where stderr is no terminal
        self.bar = tqdm(desc=what, total=n_images, unit="img", unit_scale=True, leave=False, disable=is_silent)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, n_images: int) -> None:
        """Count images that are done."""
        self.n_done += n_images
        self.bar.update(n_images)
        self._say()

    def show(self, values: Mapping[str, str]) -> None:
        """Show values, such as losses, from now on."""
        self.values = values
        self.bar.set_postfix(values)
        self._say()

    def _say(self) -> None:
        """Print a line where there is no bar, once a minute; it goes nowhere in processes that are not the first."""
        if self.bar.disable and self.n_images and time.monotonic() - Progress.said > INTERVAL:
            Progress.said = time.monotonic()
            print(self.line())

    def line(self) -> str:
        """Return how far it is, how fast, and what is left of it and of the run, as one line."""
        share, seconds = self.n_done / self.n_images, time.monotonic() - self.start
        run_left = self.run_left(share) if self.run_left else RUN_LEFT[-1]()
        parts = [f"{self.what}: {share:.0%} of {self.n_images:,} images", f"{self.n_done / seconds:,.0f} images/s"]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        parts += [f"left: {clock(seconds / share - seconds)}"]
        parts += [] if run_left is None else [f"of the run {clock(run_left)}"]
        return ", ".join(parts)


@contextlib.contextmanager
def said_each_minute(what: str) -> Iterator[None]:
    """Say each minute for how long a block has been running, where there is no terminal."""
    is_over, start = threading.Event(), time.monotonic()

    def say() -> None:
        """Print a line a minute until the block is over."""
        while not is_over.wait(INTERVAL):
            print(f"{what}: for {clock(time.monotonic() - start)}")

    thread = None if sys.stderr.isatty() or not processes.is_first() else threading.Thread(target=say, daemon=True)
    if thread:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if thread:
            thread.join()


def clock(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
