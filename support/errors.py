"""How a program ends on an error: the message to the user, and the exit code.

Exit codes: 2: bad input, before training. 1: a run that cannot continue. 128 + N: stopped by signal N.
"""

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TextIO

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from support import processes

log = logging.getLogger("mic")

OUT_OF_MEMORY = r"out of memory|MemoryError|allocate memory|Unable to allocate|bad_alloc|ALLOC_FAILED"
LITTLE_SHARED_MEMORY = r"shared memory|file </torch_|Bus error"
TOO_LARGE_KERNEL = r"out of resource: "  # Triton's, mostly about the GPU's on-chip shared memory
"""Regular expressions for messages of PyTorch, NumPy and the system."""


class InputError(ValueError):
    """The user's input cannot be used; the message says what is wrong, where, and what to do. Exit code 2."""


class StoppedError(RuntimeError):
    """A run cannot continue; the message is one line. Exit code 1."""


class DivergedError(StoppedError):
    """A value in training is NaN or infinite."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors as one line on stderr, with exit code 2."""

    def error(self, message: str) -> None:
        """Exit with the message; with several processes only the first one prints it."""
        if message.startswith("unrecognized arguments: "):
            flags = [flag for action in self._actions for flag in action.option_strings]
            words = [word.split("=")[0] for word in message.split() if word.startswith("-")]
            near = [flag for word in words for flag in difflib.get_close_matches(word, flags, 1, 0.75)]
            if near:
                message += f"; did you mean {' or '.join(near)}?"
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n" if processes.is_first() else None)


def one_line(text: str) -> str:
    """Join the lines of a text with semicolons."""
    return "; ".join(" ".join(line.split()) for line in text.strip().splitlines())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_few(names: Sequence[str], n: int = 3) -> str:
    """Return the first n names as text on one line."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", ", ".join(names[:n])) + (", ..." if len(names) > n else "")


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 classes", "1,000 copies"."""
    if n == 1:
        return f"1 {noun}"
    is_y = noun.endswith("y")
    return f"{n:,} {noun[:-1] if is_y else noun}{'ies' if is_y else 'es' if noun.endswith('s') else 's'}"


def stop_reason(error: BaseException) -> str | None:
    """Return why a program cannot continue after an error, in one line; None for a bug, which needs its traceback."""
    if stop_signal is not None:  # whatever error followed from it
        return f"stopped by {signal.Signals(stop_signal).name}"
    if isinstance(error, (InputError, StoppedError)):
        # An error in a loader worker arrives as "Caught ... Original Traceback ... InputError: message"
        return one_line(str(error).rsplit("InputError: ", 1)[-1])
    is_compiler = type(error).__module__.startswith(("torch._inductor", "torch._dynamo", "triton"))
    if line_with(error, TOO_LARGE_KERNEL) or (is_compiler and not line_with(error, OUT_OF_MEMORY)):
        return f"--compile: torch.compile cannot be used here ({first_line(error)}): start a new run without it"
    cause = line_with(error, OUT_OF_MEMORY)
    if cause:
        return f"out of memory ({cause}): free some; a new run takes less with a smaller --bs or --img_size"
    cause = line_with(error, LITTLE_SHARED_MEMORY)
    if cause:
        reason = f"too little shared memory (/dev/shm) for the loader workers ({cause})"
        return f"{reason}: give --kernels 0, or in Docker --shm-size=1g"
    lost_connection = isinstance(error, (EOFError, ConnectionResetError, ConnectionRefusedError))
    if lost_connection or str(error).startswith("DataLoader worker"):
        return f"a loader worker has ended unexpectedly ({first_line(error)})"
    if isinstance(error, OSError):
        return f"cannot read or write {error.filename or 'a file'} ({error.strerror or first_line(error)})"
    if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        cause = re.sub(r"^\[\S+\] ", "", first_line(error)).split(". ")[0]  # drop the position in PyTorch's source
        return f"lost another process of the run ({cause})"
    is_of_device = isinstance(error, torch.AcceleratorError) or re.search("CUDA|cuDNN|NCCL", first_line(error))
    if is_of_device and isinstance(error, RuntimeError):
        return first_line(error)
    return None


def line_with(error: BaseException, pattern: str) -> str | None:
    """Return the line of an error that matches a regular expression, cut to two sentences; None if no line does."""
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return None
    text = f"{error.strerror if isinstance(error, OSError) else error}\n{error.__cause__}\n{type(error).__name__}"
    line = next((line for line in text.splitlines() if re.search(pattern, line)), None)
    return line and ". ".join(line.split(": ")[-1].split(". ")[:2]).rstrip(". ")


stop_signal: int | None = None
"""The signal that asked this program to stop, if any; see stop_on_signals."""


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD") if hasattr(signal, name)]
"""Signals that ask a program to stop, and the one for a child that has ended, as far as the system has them."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first Ctrl-C, SIGTERM or SIGHUP; a second Ctrl-C ends the process at once."""
    global stop_signal
    stop_signal, before = None, {signum: signal.getsignal(signum) for signum in SIGNALS}

    def stop(signum: int, frame: FrameType | None) -> None:
        global stop_signal
        stop_signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        ignore_signals()
        raise KeyboardInterrupt

    for signum in SIGNALS[:3]:
        if signum != getattr(signal, "SIGHUP", None) or before[signum] != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signum, stop)
    try:
        yield
    finally:
        if stop_signal is None:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def ignore_signals() -> None:
    """From now on, ignore signals that ask the program to stop, so that they cannot interrupt the clean-up."""
    for signum in SIGNALS:
        if signum == getattr(signal, "SIGCHLD", None):  # PyTorch's handler raises when the other workers end
            signal.signal(signum, signal.SIG_DFL)
        elif signum != signal.SIGINT or stop_signal is None:  # after a first signal, Ctrl-C ends the process at once
            signal.signal(signum, signal.SIG_IGN)


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt after a signal to stop, in case a finaliser swallowed the first one."""
    if stop_signal is not None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Report whatever ends a program as one line in its log and an exit code; a bug keeps its traceback.

    The line ends with the notes of the error (`add_note`), such as how to resume. With several processes only the first
    one prints it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if processes.world_size() > 1:  # so that torchrun reports it, in whichever process it occurred
            get_error_handler().record_exception(error)
        reason = stop_reason(error)
        if reason is None:
            log.error("".join(traceback.format_exception(error)), extra={"for_file_only": True})  # Python prints it
            raise
        reason = "; ".join([reason, *getattr(error, "__notes__", ())])
        if stop_signal is not None:
            end(f"{prog}: {reason}", 128 + stop_signal)
        is_input = isinstance(error, InputError)
        end(f"{prog}: {'error' if is_input else 'stopped'}: {reason}", 2 if is_input else 1)


def end(line: str, code: int) -> None:
    """Log a line as an error and exit."""
    ignore_signals()  # so that this line is whole, and the only one
    log.error(line)
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    sys.exit(code)


def silence(stream: TextIO) -> None:
    """Discard whatever is written to a stream from now on, because its reader has gone or its disk is full.

    Otherwise Python's flush at exit would fail on what the stream still holds.
    """
    with contextlib.suppress(io.UnsupportedOperation):  # not a file, but a replacement by a notebook or a caller
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def set_up_output() -> None:
    """Let stdout print names in any encoding, and line by line, so that a killed run's output in a file is complete."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a replacement by a notebook or a caller
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
