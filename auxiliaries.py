"""Command lines, devices, several processes, clocks, run folders and their files, plots, checkpoints, k-means."""

import argparse
import contextlib
import csv
import ctypes
import errno
import functools
import html
import importlib.util
import io
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

try:
    import fcntl
except ImportError:  # not on Windows: there a run folder is not locked
    fcntl = None

import faiss
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, distributed

if TYPE_CHECKING:  # it is optional
    from torch.utils.tensorboard import SummaryWriter

COLOUR_CYCLE = matplotlib.cycler(
    color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"]
)
"""Colours that colour-blind readers can tell apart (Okabe and Ito), darker in place of yellow."""


STYLE = {
    "svg.hashsalt": "mic",
    "svg.fonttype": "none",  # text that can be edited, in a quarter less time
    "font.size": 10.5,
    "axes.prop_cycle": COLOUR_CYCLE,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""How plots look."""

BEST_MARK = {"marker": "*", "markersize": 17, "color": "#e69f00", "markeredgecolor": "black", "linestyle": "none"}


class RunFolderError(OSError):
    """A run folder cannot be made or read; the message is one line for the user."""


class DeviceError(ValueError):
    """The device asked for does not exist; the message is one line for the user."""


class DivergedError(FloatingPointError):
    """A value of the training is NaN or infinite; the message is one line for the user."""


class StoppedError(OSError):
    """A run cannot go on because its files cannot be written; the message is one line for the user."""


class LostProcessError(StoppedError):
    """Another process of the run has ended or does not answer; the message is one line for the user."""


class Interrupted(BaseException):
    """A signal asks the run to stop; the message is one line for the user. signum: the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, with exit code 2.

    given: the names of the flags that the last command line named.
    """

    given: frozenset[str] = frozenset()

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse and remember in `given` which flags were there; see argparse."""
        parsed = super().parse_args(args, namespace)
        absent = object()
        marked = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(parsed), absent)))
        self.given = frozenset(name for name, value in vars(marked).items() if value is not absent)
        return parsed

    def error(self, message: str) -> None:
        """Exit with the message; see argparse."""
        self.exit(2, f"{self.prog}: error: {message}\n" if may_tell() else None)


def pick_device(gpu: int) -> torch.device:
    """Return CUDA device `gpu`, or the CPU where there is no CUDA; of several processes of a machine each gets its own.

    The processes take the GPUs from `gpu` on. Raises DeviceError for a GPU that does not exist.
    """
    n_local, own = (local_processes(), int(os.environ["LOCAL_RANK"])) if launched_processes() > 1 else (1, 0)
    among = f", in {launched_processes()} processes" if launched_processes() > 1 else ""
    if not torch.cuda.is_available():
        print(f"device: CPU (no CUDA GPU found){among}")
        return torch.device("cpu")
    if not 0 <= gpu <= torch.cuda.device_count() - n_local:
        wanted = f"--gpu {gpu}" + (f" with {n_local} processes on this machine" if n_local > 1 else "")
        raise DeviceError(f"{wanted}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0")
    device = torch.device("cuda", gpu + own)
    if n_local > 1:
        torch.cuda.set_device(device)
    print(f"device: GPU {gpu}, {torch.cuda.get_device_name(device)}{among}")
    return device


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Let float32 products on the device round to TF32, or not even where PyTorch does so by default (convolutions).

    Raises DeviceError where the device has no TF32.
    """
    if enabled and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise DeviceError(
            "--tf32: needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher; leave it out, or "
            "resume a run that has it on such a GPU"
        )
    # These two keep PyTorch's newer fp32_precision settings in step; setting those leaves these unreadable
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def n_workers(wanted: int) -> int:
    """Return how many workers each loader starts: as many as wanted, but at most one per CPU core of the process."""
    return min(wanted, max(n_cores() // local_processes(), 1))


def n_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class GraphError(RuntimeError):
    """A picture of a graph cannot be drawn; the message is one line for the user."""


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) and ask cuDNN for repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


PROCESS_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be clustering or decoding, before it gives them up."""

PATIENCE = 2.0
"""Seconds that a process which was stopped by others leaves the one that knows why to tell it."""

UNHEEDED = 5.0
"""Seconds after which a process is ended that does not heed a signal, as it waits for others within a library."""

Computed = TypeVar("Computed")


def launched_processes() -> int:
    """Return how many processes torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local_processes() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first_process() -> bool:
    """Tell whether this process is the one that prints and writes files."""
    return launched_processes() == 1 or os.environ["RANK"] == "0"


def may_tell(is_cause_known: bool = True) -> bool:
    """Tell whether it is for this process to tell why the run stops: of several, the one that asks first.

    is_cause_known: False for one that was stopped, or that lost another; it lets those that know more ask before.
    """
    if launched_processes() == 1:
        return True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not is_cause_known:
        time.sleep(PATIENCE if is_first_process() else PATIENCE + 1)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))  # torchrun's own
        return store.add(f"told in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:
        return True


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started, over NCCL for GPUs and Gloo for CPUs; only the first one prints.

    Without torchrun nothing happens, nor do the functions below do anything. Raises LostProcessError where the
    processes do not find each other.
    """
    if launched_processes() == 1:
        yield
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG: not to train on where torchrun is killed
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=PROCESS_TIMEOUT)
    except RuntimeError as error:
        raise LostProcessError(f"the processes of the run do not find each other ({first_line(error)})") from error
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - libraries write to it up to the end
    with contextlib.redirect_stdout(sys.stdout if is_first_process() else nowhere):
        yield
    distributed.destroy_process_group()  # not after an error: the others would be waited for


@contextlib.contextmanager
def unheeded_signals_end(hint: Callable[[], str]) -> Iterator[None]:
    """End one of several processes that does not heed SIGTERM or Ctrl-C within the block; a line has the hint.

    Python answers a signal when a call returns; one that waits for a process that is gone may not for a long time.
    """
    if launched_processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    is_over = threading.Event()

    def watch() -> None:
        """Wait for the signal's number, then for the block to end."""
        while numbers := reader.recv(1):
            if numbers[0] in (signal.SIGTERM, signal.SIGINT) and not is_over.wait(UNHEEDED):
                if may_tell(is_cause_known=False):
                    sys.stderr.write(f"main.py: stopped by {signal.Signals(numbers[0]).name}: {hint()}\n")
                    sys.stderr.flush()
                os._exit(128 + numbers[0])

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread


def n_processes() -> int:
    """Return the number of connected processes."""
    return distributed.get_world_size() if launched_processes() > 1 and distributed.is_initialized() else 1


def process_number() -> int:
    """Return this process's number among the connected ones, from 0."""
    return distributed.get_rank() if n_processes() > 1 else 0


def own_share(n_items: int, block_size: int = 1) -> range:
    """Return which of n_items this process takes: a run of whole blocks of block_size, as many as the others to one.

    The shares of all processes, one after the other, are all items.
    """
    n_blocks = -(-n_items // block_size)
    first, last = (n_blocks * number // n_processes() for number in (process_number(), process_number() + 1))
    return range(first * block_size, min(last * block_size, n_items))


def computed_by_first(compute: Callable[[], Computed]) -> Computed:
    """Return, on all processes, what `compute` returns on the first one; the others wait for it."""
    if n_processes() == 1:
        return compute()
    box = [compute() if is_first_process() else None]
    distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if n_processes() > 1:
        distributed.all_gather_object([None] * n_processes(), None)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run a block, then the first of each other machine, then the rest, who find their files."""
    turn = 0 if is_first_process() else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(2 - turn):
        wait_for_all()


def require_same(value: object, message: str) -> None:
    """Raise RunFolderError with the message where a value is not the same on all processes."""
    if n_processes() > 1:
        values = [None] * n_processes()
        distributed.all_gather_object(values, value)
        if any(other != value for other in values):
            raise RunFolderError(message)


def gather_rows(rows: np.ndarray, everywhere: bool = True) -> np.ndarray | None:
    """Return the rows of all processes, one process after the other: (n, D) of each to (N, D), (n,) to (N,).

    A process without rows may give any D. everywhere: False leaves the whole to the first process, and None to others.
    """
    if n_processes() == 1:
        return rows
    shapes = [None] * n_processes()
    distributed.all_gather_object(shapes, rows.shape)
    if not everywhere and not is_first_process():
        if len(rows):
            distributed.send(torch.from_numpy(rows), 0)
        return None
    dims = next((shape[1:] for shape in shapes if shape[0]), rows.shape[1:])
    whole = np.empty((sum(shape[0] for shape in shapes), *dims), rows.dtype)
    parts = np.split(whole, np.cumsum([shape[0] for shape in shapes])[:-1])
    if len(rows):
        parts[process_number()][:] = rows
    for number, part in enumerate(parts):
        if len(part) and everywhere:
            distributed.broadcast(torch.from_numpy(part), number)
        elif len(part) and number != process_number():
            distributed.recv(torch.from_numpy(part), number)
    return whole


class GatherShares(torch.autograd.Function):
    """Concatenates the shares of a batch that the processes embedded, with gradient.

    Each process computes the same loss of the whole batch, so that its own share's gradient needs nothing from others.
    It is multiplied by the number of processes, which DistributedDataParallel's mean over them takes out again: the
    gradient of the weights is the sum over the images of the batch, as in one process.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, share: Tensor) -> Tensor:
        """Return (B, ...) of the (B / n_processes, ...) of each process."""
        ctx.n_rows = len(share)
        whole = share.new_empty(n_processes() * len(share), *share.shape[1:])
        distributed.all_gather(list(whole.chunk(n_processes())), share.contiguous())
        return whole

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Return the own share of the gradient, times the number of processes."""
        start = process_number() * ctx.n_rows
        return n_processes() * gradient[start : start + ctx.n_rows]


def gather_batch(embeddings: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the embeddings {name: (B, D)} and labels (B,) of the whole batch from each process's share of it."""
    if n_processes() == 1:
        return dict(embeddings), labels
    return {name: GatherShares.apply(values) for name, values in embeddings.items()}, GatherShares.apply(labels)


def share_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give all processes the gradients of the first one, for parameters whose gradient each computes from the whole.

    They are equal but for the order in which a GPU adds up; the parameters are to stay equal to the last bit.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if n_processes() == 1 or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.broadcast(flat, 0)
    for gradient, values in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


ACTIVITIES = ("loading", "training", "mining", "evaluation", "drawing")
"""What a run's time is split into; loading is the time that the training steps wait for their batches."""


class Stopwatch:
    """Splits the time of a run between activities; what is measured within another activity counts for the inner one.

    seconds: activity to seconds so far, plain values for a checkpoint.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.running: str | None = None
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the block for an activity."""
        outer = self.running
        self._turn_to(activity)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, activity: str | None) -> None:
        """Count the time up to now for what was running, and from now on for another activity."""
        now = time.perf_counter()
        if self.running is not None:
            self.seconds[self.running] += now - self.since
        self.running, self.since = activity, now


class TimedLoader:
    """A loader; the time that whoever iterates over it waits for batches counts as loading."""

    def __init__(self, loader: Iterable, stopwatch: Stopwatch):
        self.loader, self.stopwatch = loader, stopwatch

    def __iter__(self) -> Iterator:
        """Yield the loader's batches."""
        with self.stopwatch.measure("loading"):
            batches = iter(self.loader)
        while True:
            with self.stopwatch.measure("loading"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def check_run_folder(parent: str | Path, name: str) -> None:
    """Raise RunFolderError where parent/name could not be made, as far as that shows without making anything."""
    try:
        existing = next(folder for folder in (Path(parent), *Path(parent).absolute().parents) if folder.exists())
    except OSError as error:
        raise RunFolderError(f"--save_path: cannot look into {parent} ({error.strerror})") from error
    if not existing.is_dir():
        raise RunFolderError(f"--save_path: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunFolderError(f"--save_path: {existing} is not writable")
    if len(os.fsencode(name)) > 200:
        raise RunFolderError(f"--savename: {name[:20]}... is longer than 200 bytes")


def make_run_folder(parent: str | Path, name: str) -> Path:
    """Create and return parent/name, or parent/name_1, _2, ... where that exists: nothing is ever overwritten.

    Raises RunFolderError where the folder cannot be created.
    """
    counter = 0
    while True:
        folder = Path(parent) / (f"{name}_{counter}" if counter else name)
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not Path(parent).is_dir():
                raise RunFolderError(f"--save_path: {parent} is a file, not a folder") from None
            counter += 1
        except OSError as error:
            raise RunFolderError(f"--save_path: cannot create {folder} ({error.strerror})") from error


@contextlib.contextmanager
def signals_stop(message: str = "nothing had been stored yet") -> Iterator[None]:
    """Raise Interrupted(message) on SIGTERM and Ctrl-C, once; a second Ctrl-C ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, _: object) -> None:
        """Raise Interrupted; forked workers leave it to their owner."""
        if os.getpid() != owner:
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forget_workers()  # those that were told too may end now: no news
        raise Interrupted(signum, message)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def forget_workers() -> None:
    """Let loader workers end without an error: PyTorch raises one for each, at whatever point the owner has reached."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, lambda *_: None)


@contextlib.contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Say how to go on with a run that is stopped or cannot write; folder: None before there is one.

    Raises Interrupted, StoppedError.
    """

    def hint() -> str:
        """Say what is left and how to go on with it."""
        n_local = local_processes()
        if folder is not None and launched_processes() > n_local:
            return (
                f"go on with the last complete epoch: torchrun as before, main.py --resume {shlex.quote(str(folder))}"
            )
        if folder is None or not (folder / "last.pth.tar").exists():
            return "nothing had been stored to go on with"
        program = "python" if n_local == 1 else f"torchrun --standalone --nproc_per_node={n_local}"
        return f"the last complete epoch is safe; go on with: {program} main.py --resume {shlex.quote(str(folder))}"

    try:
        with unheeded_signals_end(hint):
            yield
    except Interrupted as error:
        if folder is None:
            raise
        raise Interrupted(error.signum, hint()) from None
    except DivergedError as error:
        if folder is None:
            raise
        before = f"; {folder / 'last.pth.tar'} is from before that"
        raise type(error)(str(error).removesuffix(before) + before) from error
    except (RunFolderError, StoppedError):
        raise
    except RuntimeError as error:
        forget_workers()  # where one was killed for want of memory, the next may follow
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            is_late = re.search(r"time[d ]*out", str(error), re.IGNORECASE)
            what = f"waited {PROCESS_TIMEOUT} in vain for" if is_late else "lost"
            raise LostProcessError(f"process {process_number()} {what} another one of the run; {hint()}") from error
        if not isinstance(error, torch.OutOfMemoryError) and not str(error).startswith("DataLoader worker"):
            raise
        raise StoppedError(f"{first_line(error)}; {hint()}") from error
    except OSError as error:
        if folder is None:
            raise
        path = re.sub(r"\.([^/]+)\.[^./]+\.tmp$", r"\1", str(error.filename or folder))  # not the temporary name
        what = f"{path} ({error.strerror or first_line(error)})"
        raise StoppedError(f"cannot read or write {what}; {hint()}") from error


def lock_run_folder(folder: Path) -> contextlib.AbstractContextManager:
    """Lock a run folder for this process and return the open lock file; the lock ends with the process or the file.

    Of several processes of one run the first locks it, and the others get a context without effect. Raises
    RunFolderError where another process has it. A dead process has none, whatever file it left.
    """
    if not is_first_process():
        return contextlib.nullcontext()
    try:
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the run
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be locked ({error.strerror})") from error
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of forked workers
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read(100).strip() or "another process"
            raise RunFolderError(f"{folder}: is being trained by {holder}; wait for it, or stop it first") from error
        print(f"warning: {folder} cannot be locked ({error.strerror}): do not resume it twice at the same time")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def publish_best(folder: Path, n_epochs: int) -> None:
    """Let the best checkpoints that wait take their places, now that last.pth.tar holds their epoch too.

    n_epochs: that it holds. A checkpoint of a later epoch, which will be trained again, is dropped.
    """
    for waiting in folder.glob("checkpoint*.next"):
        if waiting.name.endswith(f".{n_epochs}.next"):
            os.replace(waiting, folder / waiting.name.removesuffix(f".{n_epochs}.next"))
        else:
            waiting.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run folder, which is locked."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` when the block ends well: readers see the old or the new one whole."""
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def current_umask() -> int:
    """Return the process's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_flags(folder: Path, flags: Mapping[str, object]) -> None:
    """Write all flags as hypa.pkl, a pickled dict of plain values, and as readable Parameter_Info.txt."""
    with replaced_file(folder / "hypa.pkl") as file:
        pickle.dump(dict(flags), file)
    width = max(len(name) for name in flags)
    with replaced_file(folder / "Parameter_Info.txt", "w") as file:
        for name, value in flags.items():
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            file.write(f"{name:<{width}}  {shown}\n")


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values (dict, list, str, numbers) and refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> None:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class Run:
    """A stored run: its folder, its flags, and the rows of log_val_Class.csv, at least one, epochs ascending."""

    folder: Path
    flags: dict[str, object]
    val_rows: list[dict[str, float]]


def read_run(folder: Path) -> Run:
    """Read a run folder; no code in its files is executed. Raises RunFolderError that says what is wrong with it."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder")
    for name in ("hypa.pkl", "log_val_Class.csv"):
        if not (folder / name).is_file():
            scored = "; no epoch has been scored yet?" if name.endswith("csv") else ""
            raise RunFolderError(f"{folder}: holds no {name}{scored}")
    try:
        with open(folder / "hypa.pkl", "rb") as file:
            flags = PlainUnpickler(file).load()
        if not isinstance(flags, dict) or not isinstance(flags.get("dataset"), str):
            raise ValueError("no flags of a run")
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise RunFolderError(f"{folder}: hypa.pkl cannot be read ({first_line(error)})") from error
    try:
        table = pd.read_csv(folder / "log_val_Class.csv")
        recalls = [name for name in table if name.endswith("Recall @ 1")]
        table = table.dropna(subset=["Epochs", *recalls]).astype(float).astype({"Epochs": int})
    except (OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{folder}: log_val_Class.csv cannot be read ({first_line(error)})") from error
    if not recalls or table.empty:
        raise RunFolderError(f"{folder}: log_val_Class.csv holds no Recall @ 1")
    return Run(folder, flags, table.to_dict("records"))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file by column name; a new file gets the row's names as header. None is an empty cell.

    Raises ValueError where the row has columns that the file does not have.
    """
    if not path.exists():
        with replaced_file(path, "w") as file:  # never seen without its header
            csv.writer(file, lineterminator="\n").writerows([list(row), list(row.values())])
        return
    with open(path, "r+", newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file anew: what append_row makes of the rows one after the other. Without rows there is no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with replaced_file(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(
    path: Path,
    network: torch.nn.Module,
    flags: Mapping[str, object],
    progress: Mapping[str, object],
    training: Mapping[str, object] | None = None,
) -> None:
    """Write {"state_dict", "flags", "progress"}; tensors and plain values only, for torch.load(weights_only=True).

    training: all else that is needed to resume, stored as "training".
    """
    content = {"state_dict": network.state_dict(), "flags": dict(flags), "progress": dict(progress)}
    whole = io.BytesIO()  # a full disk is an OSError of the file then, not whatever the archive's writer makes of it
    torch.save(content if training is None else content | {"training": dict(training)}, whole)
    with replaced_file(path) as file:
        file.write(whole.getbuffer())


def random_states(device: torch.device) -> dict[str, object]:
    """Return the states of all random number generators as plain values, for set_random_states.

    device: the one that the run draws on.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    """Continue all random number generators where random_states found them, on this device."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0], device)


def write_summary(
    path: Path,
    initial: Mapping[str, float],
    history: Sequence[Mapping[str, float]],
    seconds: float,
    spent: Mapping[str, float],
    paper: Mapping[str, float],
) -> str:
    """Write the best value of each score with its epoch, the last, that before training and the paper's; how far the
    run is, where its seconds went, and its folder. Returns the text.

    initial: scores before training. history: the rows of log_val_Class.csv so far, at least one. spent: activity to
    seconds. paper: published scores, as far as there are any. A score that was left out of all rows is left out here.
    """
    scores = [name for name in history[-1] if name not in ("Epochs", "Time")]
    scores = [name for name in scores if any(row[name] is not None for row in history)]
    width = max(len(name) for name in scores)
    lines = [f"{'score':<{width}}    best  epoch    last  before training"]
    lines[0] += "   paper  best - paper" if paper else ""
    for name in scores:
        known = [row for row in history if row[name] is not None]
        best = max(known, key=lambda row: row[name])
        last = "     -" if history[-1][name] is None else f"{history[-1][name]:.4f}"
        line = f"{name:<{width}}  {best[name]:.4f}  {best['Epochs']:5d}  {last}  {initial[name]:15.4f}"
        if name in paper:
            line += f"  {paper[name]:.4f}  {best[name] - paper[name]:+12.4f}"
        lines.append(line)
    lines += ["paper: MIC with margin loss, ResNet50 (arXiv 1909.11574)"] if paper else []
    parts = {**spent, "all else": max(seconds - sum(spent.values()), 0.0)}
    lines += [
        f"epochs done: {history[-1]['Epochs'] + 1}",
        f"seconds: {seconds:.1f}",
        f"of these: {', '.join(f'{activity} {value:.1f}' for activity, value in parts.items())}",
        f"run folder: {path.parent}",
    ]
    text = "\n".join(lines) + "\n"
    with replaced_file(path, "w") as file:
        file.write(text)
    return text


def kmeans(points: np.ndarray, n_clusters: int, seed: int, n_iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Cluster with faiss; all points take part.

    points: (N, D), made float32. n_clusters: at most N.
    Returns labels (N,) int64 in [0, n_clusters), some possibly unused, and the squared distances (N,) float32 of the
    points to their centres, whose sum is the inertia. Raises ValueError for more clusters than points.
    """
    if n_clusters > len(points):
        raise ValueError(f"{n_clusters} clusters for {len(points)} points")
    points = np.ascontiguousarray(points, dtype=np.float32)
    clustering = faiss.Kmeans(
        points.shape[1],
        n_clusters,
        niter=n_iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    with all_cores():
        clustering.train(points)
        squared_distances, nearest = clustering.index.search(points, 1)
    return nearest[:, 0].astype(np.int64), squared_distances[:, 0]


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let faiss use the cores of the processes of this machine, which wait for this one."""
    n_threads = faiss.omp_get_max_threads()
    if launched_processes() > 1:  # for each of which torchrun allows one thread
        faiss.omp_set_num_threads(n_cores())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(n_threads)


def draw_progress(
    path: Path,
    train_rows: Sequence[Mapping[str, float]],
    val_rows: Sequence[Mapping[str, float]],
    title: str,
    *,
    best: int,
    mined_before: Sequence[int] = (),
    rate_steps: Sequence[int] = (),
) -> None:
    """Draw the logged history as SVG: each part of the loss in a panel of its own left, test scores right.

    best: which of val_rows is of the best epoch. mined_before, rate_steps: the epochs that begin with new mined labels,
    and with another learning rate. All are marked.
    """
    names = [name for name in train_rows[0] if name.endswith("Loss") and name != "Train Loss"]
    parts = [name for name in names if any(row[name] is not None for row in train_rows)]
    best_row = val_rows[best]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.8, 6.4))
        losses = figure.add_gridspec(max(len(parts), 1), 1, left=0.075, right=0.41, bottom=0.16, top=0.86, hspace=0.4)
        scores = figure.add_gridspec(1, 1, left=0.47, right=0.86, bottom=0.16, top=0.86)
        axes = [figure.add_subplot(place) for place in losses]
        for i, (axis, name) in enumerate(zip(axes, parts)):
            draw_curves(axis, train_rows, [name], first_style=i)
            axis.set_title(f"{name.lower().capitalize()} in training", loc="left", fontsize=11)
            if i < len(parts) - 1:
                axis.set_xticks([])
        score_axis = figure.add_subplot(scores[0])
        draw_curves(score_axis, val_rows, [name for name in val_rows[0] if name not in ("Epochs", "Time")])
        lines = sorted(score_axis.lines, key=lambda line: -line.get_ydata()[-1])
        score_axis.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False)
        score_axis.set(ylim=(0, 1))
        score_axis.set_title("Scores on the test classes", loc="left", fontsize=11)
        last = max(train_rows[-1]["Epochs"], val_rows[-1]["Epochs"])
        marks = [mark_epochs(axis, last, mined_before, rate_steps, best_row["Epochs"]) for axis in (*axes, score_axis)][
            -1
        ]
        score_axis.plot(best_row["Epochs"], best_row["Recall @ 1"], **BEST_MARK)
        for axis in (axes[-1], score_axis):
            axis.set_xlabel("epoch")
        figure.legend(handles=marks, loc="lower center", ncols=len(marks), frameon=False)
        best_text = f"Recall @ 1 {best_row['Recall @ 1']:.4f} in the best epoch, {best_row['Epochs']}"
        figure.suptitle(f"{shortened(title, 80)}\n{best_text}", parse_math=False, fontsize=12, y=0.98)
        save_svg(figure, path)


def mark_epochs(
    axis: matplotlib.axes.Axes, last: int, mined_before: Sequence[int], rate_steps: Sequence[int], best: int
) -> list[Line2D]:
    """Mark epochs up to the last one on an axis, see draw_progress; return the marks that are there, for a legend."""
    axis.set_xlim(-0.7, last + 0.7)
    marks = []
    for epochs, label, style, side in [
        (mined_before, "mined labels renewed", {"color": "#999933", "linestyle": "dashed"}, -0.004),
        (rate_steps, "learning rate lowered", {"color": "black", "linestyle": "dotted"}, 0.004),
    ]:
        # Beside each other where both happen
        places = [epoch - 0.5 + side * (last + 1) for epoch in epochs if epoch <= last + 1]
        width, low = (1.2 if len(places) < 20 else 0.6), (0 if len(places) <= 40 else 0.96)  # many: short, at the top
        axis.vlines(places, low, 1, **style, linewidth=width, zorder=0, transform=axis.get_xaxis_transform())
        marks += [Line2D([], [], **style, linewidth=1.2, label=label)] if places else []
    axis.axvline(best, color="#e69f00", linewidth=5, alpha=0.3, zorder=0)
    return [*marks, Line2D([], [], **BEST_MARK, label="best epoch")]


def draw_curves(
    axis: matplotlib.axes.Axes, rows: Sequence[Mapping[str, float]], names: Sequence[str], first_style: int = 0
) -> None:
    """Draw the columns `names` of the rows over their epochs, told apart by colour and marker."""
    markers, colours = "osD^vP*X", COLOUR_CYCLE.by_key()["color"]
    for i, name in enumerate(names, start=first_style):
        known = [(row["Epochs"], row[name]) for row in rows if row[name] is not None]
        if known:
            look = {"color": colours[i % len(colours)], "marker": markers[i % len(markers)], "markersize": 4}
            axis.plot(*zip(*known), label=name, markevery=max(1, len(known) // 25), **look)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(4))  # ticks take most of the time of a plot
    axis.grid(axis="y", alpha=0.25)


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure."""
    with replaced_file(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_probe(path: Path, rows: Sequence[Mapping[str, float]], title: str) -> None:
    """Draw the rows of log_probe.csv as SVG: what can be read from which embedding."""
    panels = {
        "Class, read from an embedding": ("Class from Shared", "Class from Class", "Class by chance"),
        "Mined label, read from an embedding": ("Mined from Class", "Mined from Shared", "Mined by chance"),
    }
    labels = ("from the other embedding: should be low", "from its own", "by chance")
    looks = [("#d55e00", "-", "o"), ("#0072b2", "--", "s"), ("0.3", ":", "")]
    epochs = [row["Epochs"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.1))
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.24, top=0.83, wspace=0.18)
        figure.suptitle(shortened(title, 80), parse_math=False, fontsize=12)
        for axis, (panel, names) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
            for name, label, (colour, line, marker) in zip(names, labels, looks, strict=True):
                axis.plot(epochs, [row[name] for row in rows], line, color=colour, marker=marker, markersize=4,
                          markevery=max(1, len(rows) // 25), label=label)  # fmt: skip
            axis.set_title(panel, loc="left", fontsize=11)
            axis.set(ylim=(0, 1.02), xlim=(-0.7, epochs[-1] + 0.7), xlabel="epoch")
            axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            axis.grid(axis="y", alpha=0.25)
        figure.axes[0].set_ylabel("accuracy")
        figure.legend(handles=figure.axes[0].lines, loc="lower center", ncols=3, frameon=False)
        save_svg(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, in the format of the path's ending; without the date, so that the same one is the same file."""
    with replaced_file(path) as file:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)


def draw_comparison(path: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw Recall@1 over the epochs, a line for the mean of each setting in a band of one standard deviation.

    curves: setting to (epochs (E,), recall (runs, E)). The format is that of the path's ending.
    """
    markers, styles = "osD^vP*X", ("-", "--", ":", "-.")
    with matplotlib.rc_context({"svg.hashsalt": "mic", "font.size": 11, "axes.prop_cycle": COLOUR_CYCLE}):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axis = figure.subplots()
        for i, (setting, (epochs, recalls)) in enumerate(curves.items()):
            mean, spread = recalls.mean(0), recalls.std(0, ddof=1) if len(recalls) > 1 else np.zeros(len(epochs))
            label = f"{shortened(setting, 70)} ({len(recalls)} run{'s' if len(recalls) > 1 else ''})"
            (line,) = axis.plot(
                epochs, mean, styles[i // 8 % 4], marker=markers[i % 8], markersize=4, label=label.replace("$", r"\$")
            )
            axis.fill_between(epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.set(xlabel="epoch", ylabel="Recall @ 1 on the test classes")
        axis.set_title("mean over runs, band: one standard deviation", fontsize=10)
        axis.legend(fontsize=9)
        save_figure(figure, path)


TILE = 128
"""Side of an image on a contact sheet, in pixels."""

BORDER = (1 - 224 / 256) / 2
"""What evaluation crops from each side of an image."""

FRAMES = {"query": ("#333333", ""), "same": ("#009e73", "✓"), "other": ("#d55e00", "✗"), "plain": ("#999999", "")}
"""Kind of a tile to the colour of its frame and its mark; the frame of "other" is dashed."""


class Tile(NamedTuple):
    """An image of a contact sheet, (H, W, 3) uint8, drawn as evaluation crops it; the text below; a kind of FRAMES."""

    image: np.ndarray
    caption: str
    kind: str


def draw_ablation(
    path: Path, flag: str, values: Sequence[str], lines: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draw Recall@1 over the values of a flag: the mean of the runs in a band of one standard deviation, runs as dots.

    values: of the flag as they are typed, in the order in which they are drawn at equal distances. lines: name to
    {value: Recall@1 of each run}; a name that starts with "paper" is drawn as published numbers. The format is that of
    the path's ending.
    """
    with matplotlib.rc_context(STYLE):
        below, height = 0.6 + 0.25 * len(lines), 4.6 + 0.25 * len(lines)  # inches: for the legend
        figure = Figure(figsize=(8.4, height))
        axis = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.97, top=1 - 0.35 / height, bottom=below / height)
        colours, markers = COLOUR_CYCLE.by_key()["color"], "osD^vP*X"
        for i, (name, points) in enumerate(lines.items()):
            places = [place for place, value in enumerate(values) if value in points]
            runs = [np.asarray(points[values[place]]) for place in places]
            look = {"color": colours[i % 8], "marker": markers[i % 8], "linestyle": ("-", ":")[i % 2]}
            look["markersize"] = (9, 5)[i % 2]  # where two lines coincide both are seen
            look |= {"color": "0.35", "linestyle": "--", "marker": "x"} if name.startswith("paper") else {}
            axis.plot(
                places, [recalls.mean() for recalls in runs], **look, label=shortened(name, 90).replace("$", r"\$")
            )
            if max(map(len, runs)) > 1:
                spread = [recalls.std(ddof=1) if len(recalls) > 1 else 0 for recalls in runs]
                low, high = ([r.mean() + side * d for r, d in zip(runs, spread)] for side in (-1, 1))
                axis.fill_between(places, low, high, color=look["color"], alpha=0.15, linewidth=0)
                dots = [(place, recall) for place, recalls in zip(places, runs) for recall in recalls]
                axis.scatter(*zip(*dots), s=12, color=look["color"], alpha=0.6, zorder=3)
        axis.set_xticks(range(len(values)), values)
        axis.set(xlabel=f"--{flag}", ylabel="Recall @ 1 on the test classes")
        axis.set_title("mean over runs, band: one standard deviation, dots: runs", loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        figure.legend(loc="lower center", frameon=False)
        save_figure(figure, path)


def draw_differences(
    path: Path, points: Mapping[str, Mapping[str, Mapping[str, tuple[np.ndarray, float, float]]]], reference: str
) -> None:
    """Draw the differences of settings to a reference: a panel for each score, a row for each setting.

    points: {score: {setting: {"best" or "last" (epoch): (differences of the seeds (n,), low, high)}}}, low to high
    being the confidence interval of their mean. The format is that of the path's ending.
    """
    settings = list(dict.fromkeys(setting for rows in points.values() for setting in rows))
    looks = {"last": ("#0072b2", "o", -0.13), "best": ("#d55e00", "D", 0.13)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 + 2.9 * len(points), 1.6 + 0.75 * len(settings)), layout="constrained")
        axes = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
        for axis, (score, rows) in zip(axes, points.items()):
            axis.axvline(0, color="0.4", linewidth=1)
            for at, (colour, marker, shift) in looks.items():
                shown = [
                    (place, rows[setting][at]) for place, setting in enumerate(settings) if at in rows.get(setting, ())
                ]
                for place, (values, low, high) in shown:
                    axis.plot([low, high], [place + shift] * 2, color=colour, linewidth=2)
                    axis.scatter(values, [place + shift] * len(values), s=9, color=colour, alpha=0.45)
                means = [values.mean() for _, (values, _, _) in shown]
                places = [place + shift for place, _ in shown]
                axis.plot(means, places, marker, color=colour, markersize=6, label=f"{at} epoch", linestyle="none")
            axis.set(xlabel=f"difference in {score}", ylim=(len(settings) - 0.5, -0.5))
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.tick_params(axis="x", labelsize=9)
            axis.grid(alpha=0.3, axis="x")
        # Wrapped between flags, not between a flag and its value
        unbroken = [shortened(setting, 240).replace(" ", "\N{NO-BREAK SPACE}") for setting in settings]
        breakable = [setting.replace(",\N{NO-BREAK SPACE}", ", ") for setting in unbroken]
        wrapped = [textwrap.wrap(setting, 40, break_on_hyphens=False) for setting in breakable]
        names = ["\n".join(lines).replace("$", r"\$") for lines in wrapped]
        axes[0].set_yticks(range(len(settings)), names, fontsize=8)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
        title = f"Differences to the setting of {shortened(Path(reference).name, 60)}, same seeds; bars: 95 % interval"
        figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=9)
        save_figure(figure, path)


def draw_recoveries(
    path: Path,
    read: Callable[[int], np.ndarray],
    embeddings: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str = "",
    is_query: np.ndarray | None = None,
    n_queries: int = 10,
    n_neighbours: int = 5,
) -> None:
    """Draw test images and their nearest neighbours as a PNG: a contact sheet to check a run by eye.

    read: maps an index to an (H, W, 3) uint8 image. embeddings: (N, D). labels: (N,). is_query: (N,) bool, the images
    that are searched in the others; None: each is searched in all others. Queries are spread evenly over the set, the
    same for every embedding. A neighbour of the query's class has a solid green frame and a tick, one of another class
    a dashed orange frame and a cross.
    """
    queries = np.arange(len(labels)) if is_query is None else np.flatnonzero(is_query)
    n_gallery = len(labels) - (1 if is_query is None else len(queries))
    n_queries, n_neighbours = min(n_queries, len(queries)), min(n_neighbours, n_gallery)
    queries = queries[np.linspace(0, len(queries) - 1, n_queries).round().astype(int)]
    distances = (embeddings**2).sum(1) - 2 * embeddings[queries] @ embeddings.T  # squared, less the query's own norm
    distances[np.arange(n_queries), queries] = np.inf
    if is_query is not None:
        distances[:, is_query] = np.inf
    neighbours = np.argsort(distances, axis=1, kind="stable")[:, :n_neighbours]
    rows = [[Tile(read(query), class_names[labels[query]], "query")] for query in queries]
    for row, query, found in zip(rows, queries, neighbours, strict=True):
        for index in found:
            kind = "same" if labels[index] == labels[query] else "other"
            row.append(Tile(read(index), class_names[labels[index]], kind))
    legend = "left: query;  ✓ solid: of its class;  ✗ dashed: of another class"
    draw_sheet(path, [line for line in (title, legend) if line], [""] * len(rows), rows)


def draw_sheet(path: Path, lines: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[Tile]]) -> None:
    """Draw captioned and framed images as a PNG, row by row, each behind its heading of one line or several.

    Drawn with Pillow, in a twentieth of the time that Matplotlib needs for as many images. lines: text above all rows.
    """
    edge, step, row_height, font = 16, TILE + 18, TILE + 36, sheet_font(13)
    heading_width = max(multiline_width(heading, font) for heading in headings)
    left, top = edge + (heading_width + edge if heading_width else 0), edge + 26 * len(lines)
    text_width = max(multiline_width(line, sheet_font(17)) for line in lines)
    width = int(max(left + step * max(map(len, rows)), text_width + 2 * edge))
    sheet = Image.new("RGB", (width, top + row_height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        pen.text((edge, edge / 2 + 26 * i), drawable(line), "black", sheet_font(17))
    for i, (heading, row) in enumerate(zip(headings, rows, strict=True)):
        y = top + row_height * i
        pen.multiline_text((edge, y + TILE // 2), heading, "black", font, anchor="lm", spacing=6)
        for j, tile in enumerate(row):
            draw_tile(sheet, pen, (left + step * j, y), tile, font)
    with replaced_file(path) as file:
        sheet.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)  # as small as by default, in half the time


def draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], tile: Tile, font: ImageFont.FreeTypeFont
) -> None:
    """Draw one image on a sheet with its frame, mark and caption; place: its upper left corner."""
    x, y = map(int, place)
    colour, mark = FRAMES[tile.kind]
    image = ImageOps.fit(Image.fromarray(tile.image), (TILE, TILE), Image.Resampling.BICUBIC, bleed=BORDER)
    sheet.paste(image, (x, y))
    pen.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=colour, width=5)
    if tile.kind == "other":
        for gap in range(12, TILE, 24):
            for box in ((gap, -2, gap + 9, 2), (gap, TILE - 3, gap + 9, TILE + 1)):
                pen.rectangle((x + box[0], y + box[1], x + box[2], y + box[3]), "white")
                pen.rectangle((x + box[1], y + box[0], x + box[3], y + box[2]), "white")
    if mark:
        pen.rectangle((x, y, x + 24, y + 24), colour)
        pen.text((x + 12, y + 12), mark, "white", sheet_font(19), anchor="mm")
    text_colour = "black" if tile.kind == "plain" else colour
    pen.text((x + TILE // 2, y + TILE + 15), fitted(tile.caption, TILE + 12, font), text_colour, font, anchor="mm")


@functools.cache
def sheet_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of contact sheets, that Matplotlib brings."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def multiline_width(text: str, font: ImageFont.FreeTypeFont) -> float:
    """Return the width of a text in pixels."""
    return max(font.getlength(drawable(line)) for line in text.split("\n"))


def fitted(name: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Return a name as one line, cut to a width in pixels."""
    name = " ".join(drawable(name).split())
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}…") > width:
        name = name[:-1]
    return f"{name}…"


def drawable(text: str) -> str:
    """Return a text without what no font can draw: half characters of names that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def shortened(name: str, length: int = 20) -> str:
    """Return a name cut to `length` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def missing_for_graphs() -> list[str]:
    """Return what has to be installed before draw_graph works, in words."""
    package = [] if importlib.util.find_spec("graphviz") else ["the Python package graphviz (pip install graphviz)"]
    program = [] if shutil.which("dot") else ["the program dot of Graphviz (https://graphviz.org/download)"]
    return package + program


def missing_for_tensorboard() -> list[str]:
    """Return what has to be installed before opened_board works, in words."""
    is_there = importlib.util.find_spec("tensorboard") is not None
    return [] if is_there else ["the Python package tensorboard (pip install tensorboard)"]


@contextlib.contextmanager
def opened_board(folder: Path | None, first_step: int) -> Iterator["SummaryWriter | None"]:
    """Open TensorBoard's event files in a folder; None where the folder is None.

    first_step: what the folder holds of this step and later ones, of a run that was interrupted, is dropped.
    """
    if folder is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first_step) as board:
        yield board


def add_to_board(
    board: "SummaryWriter | None",
    step: int,
    rows: Mapping[str, Mapping[str, float | None]],
    pictures: Sequence[Path] = (),
) -> None:
    """Write rows of logs, by the name of their group, and PNG files to TensorBoard; nothing where there is no board."""
    if board is None:
        return
    for group, row in rows.items():
        for name, value in row.items():
            if value is not None and name not in ("Epochs", "Before Epoch"):
                board.add_scalar(f"{group}/{name}", value, step)
    for path in pictures:
        with Image.open(path) as picture:
            board.add_image(path.stem, np.asarray(picture), step, dataformats="HWC")
    board.flush()  # it is to be there when last.pth.tar holds its epoch


def draw_graph(nodes: Mapping[str, tuple[str, Sequence[str]]], edges: Sequence[tuple[str, str]], title: str) -> bytes:
    """Draw boxes and arrows with Graphviz and return the SVG; missing_for_graphs tells whether that is possible.

    nodes: name to (kind, lines of text), the first line in bold; kinds are data, layer and head. edges: (name, name).
    Raises GraphError where the program dot fails.
    """
    import graphviz

    colours = {"data": "#ffffff", "layer": "#dbe9f6", "head": "#fde5cc"}
    graph = graphviz.Digraph(graph_attr={"label": graphviz.escape(title), "labelloc": "t", "ranksep": "0.3"})
    graph.attr("graph", fontname="Helvetica")
    graph.attr("node", shape="box", style="filled,rounded", fontname="Helvetica", fontsize="11", margin="0.15,0.06")
    for name, (kind, lines) in nodes.items():
        first, *others = (html.escape(line) for line in lines)
        graph.node(name, f"<{'<br/>'.join([f'<b>{first}</b>', *others])}>", fillcolor=colours[kind])
    graph.edges(edges)
    try:
        return graph.pipe(format="svg", quiet=True)
    except (graphviz.CalledProcessError, graphviz.ExecutableNotFound) as error:
        raise GraphError(
            f"--make_graph: Graphviz's program dot fails; mend it, or leave the flag out ({error})"
        ) from error
