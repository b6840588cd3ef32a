"""Fixtures and helpers: small image folders, programs run as a user would, and processes of their own."""

import contextlib
import fnmatch
import functools
import multiprocessing
import os
import runpy
import select
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if os.environ.get("MIC_TEST_GPU") != "1":  # the tests are for the CPU, whatever else the machine has
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # here and in all processes that are started: they share few cores
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup makes pytest and all processes that are started ignore it

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import evaluate
import main
import netlib
from data.shapes import render_shapes
from run import options
from support import output

ROOT = Path(__file__).resolve().parent.parent
# Processes begin as copies of one that has main imported, which takes seconds; it finds main where the tests are run
# from the top folder, and otherwise each imports it anew
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["main"])


class SmallBackbone(torch.nn.Module):
    """A backbone that trains and is stored in no time; see netlib.BACKBONES."""

    out_features = 32
    unused_weights = ("fc.",)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential()
        for name, n_in, n_out, stride in (("early", 3, 16, 4), ("late", 16, 32, 2)):
            self.layers.add_module(name, torch.nn.Conv2d(n_in, n_out, 5, stride, 2, bias=False))
            self.layers.add_module(f"{name}_bn", torch.nn.BatchNorm2d(n_out))

    def forward(self, images, with_pooled=True):
        early = self.layers.early_bn(self.layers.early(images)).relu()
        if not with_pooled:
            return early, None
        return early, self.layers.late_bn(self.layers.late(early)).relu().mean((2, 3))


netlib.BACKBONES["small"] = SmallBackbone
output.log.setLevel("INFO")  # as in a run, for caplog
output.INTERVAL = 3600  # no line on the progress of a slow test stands between those that it looks at
ALONE = ("--arch", "googlenet")
"""For runs in programs that do not import this file, and so know no small backbone."""


HANG = 900
"""Seconds after which a process that has not ended fails its test; none takes nearly as long on a busy machine."""


class At(NamedTuple):
    """A point in a process, for the n-th time just before it does something with a file.

    event: "open", "os.rename" (a file takes the place of `name`), "os.mkdir", "os.scandir"; Python calls them audit
    events. name: of the file, without its folder; * stands for anything.
    """

    event: str
    name: str
    n: int = 1


class Ended(NamedTuple):
    """How a process ended, and what it and all that it started wrote on stderr."""

    returncode: int
    stderr: str


@pytest.fixture(scope="session", autouse=True)
def temporary_files_of_processes():
    """Collect what torchrun leaves, and processes that are killed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


def call_like_new(function, *args):
    """Call a function with NumPy's random state as new as in a process that is no copy."""
    np.random.seed()
    function(*args)


def act_at(points, act):
    """Let this process act where it comes by the last of some points, each of them after the one before.

    Processes that it forks from then on go on from where it is, each for itself.
    """
    ahead, n_passed = list(points), 0

    def watch(event, details):
        """Follow the points; details: of rename (old path, new path, ...), of others (path, ...)."""
        nonlocal n_passed
        if not ahead or event != ahead[0].event:
            return
        path = details[event == "os.rename"]
        if isinstance(path, (str, os.PathLike)) and fnmatch.fnmatchcase(os.path.basename(path), ahead[0].name):
            n_passed += 1
            if n_passed == ahead[0].n:
                del ahead[0]
                n_passed = 0
                if not ahead:
                    act()

    sys.addaudithook(watch)


def call_in_session(stderr, function, args):
    """Call a function in a session of its own, its errors written to a pipe."""
    os.setsid()
    with open(os.devnull, "wb", 0) as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    call_like_new(function, *args)


def read_to_end(pipe):
    """Return what comes out of a pipe until every process that could write to it has ended."""
    parts, deadline = [b""], time.monotonic() + HANG
    while len(parts) == 1 or parts[-1]:
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            pytest.fail(f"not ended after {HANG} s: {b''.join(parts).decode()}")
        parts.append(os.read(pipe.fileno(), 65536))
    return b"".join(parts).decode()


def run_in_process(function, *args):
    """Call a function of a module in a new process that has main imported; return how it ended.

    Waits until all that it started have ended too. Not for what happens when Python itself shuts down: such a process
    ends without.
    """
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=call_in_session, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        stderr = read_to_end(receiver)
        process.join()
    except BaseException:  # Ctrl-C too, which does not reach another session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.exitcode, stderr)


def act_in_a_worker(image, log, act):
    """Let the loader's worker act that is the first to read an image of this name once a run has written a log.

    Workers live through the run, so what is done when it writes the log does not reach them.
    """
    owner, is_first = os.getpid(), multiprocessing.get_context("fork").Lock()

    def watch(event, details):
        """Follow what is opened; details: (path, ...)."""
        is_read = event == "open" and os.path.basename(str(details[0])) == image
        if is_read and os.getpid() != owner and log.exists() and is_first.acquire(block=False):
            act()

    sys.addaudithook(watch)


def run_and_act_in_a_worker(argv, image, log, act):
    """Run main in this process; one of its workers acts, see act_in_a_worker."""
    act_in_a_worker(image, log, act)
    run(argv)


def run_script(path, argv, folder, output):
    """Run a program from its file as if it had been started in a folder; what it prints goes to another file."""
    os.chdir(folder)
    sys.argv = [str(path), *map(str, argv)]
    with open(output, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")


def run_and_act(argv, points, act):
    """Run main in this process, which acts where it comes by the last of some points."""
    act_at(points, act)
    run(argv)


def killed_run(argv, *points):
    """Run main in a process of its own that is killed at the last of some points."""
    process = run_in_process(run_and_act, argv, points, functools.partial(signal.raise_signal, signal.SIGKILL))
    assert process.returncode == -signal.SIGKILL, process.stderr


def hold(reached, go_on):
    """Tell that a point is reached, and wait."""
    reached.set()
    assert go_on.wait(HANG)


@contextlib.contextmanager
def held_run(argv, *points):
    """Run main in a process of its own, held at the last of some points while the block runs.

    Yields the future of how it ends.
    """
    reached, go_on = FORKSERVER.Event(), FORKSERVER.Event()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run_in_process, run_and_act, argv, points, functools.partial(hold, reached, go_on))
        ended.add_done_callback(lambda _: reached.set())  # it never came there
        try:
            assert reached.wait(HANG)
            assert not ended.done(), ended.result()
            yield ended
        finally:
            go_on.set()


def epochs_logged(folder, log="log_train_Class.csv"):
    """Return how many rows a log of a run has, 0 where there is none yet."""
    path = folder / log
    return path.read_text().count("\n") - 1 if path.exists() else 0


def parse(*argv):
    """Return the checked arguments of a command line of main."""
    parser = main.get_args_parser()
    return options.check(parser.parse_args([str(flag) for flag in argv]), parser)


def run(argv, program=main):
    """Run main or evaluate with a command line; main returns the run folder."""
    return program.main([str(flag) for flag in argv])


def refused(capsys, argv, program=main, code=2):
    """Run a program that is to stop with an exit code and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(argv, program)
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert not [
        process for process in multiprocessing.active_children() if process.daemon
    ]  # no worker outlives its run
    name = {main: "main.py", evaluate: "evaluate.py"}[program]
    assert error.startswith(f"{name}: error: " if code == 2 else f"{name}: stopped"), error
    assert error.count("\n") == 1, error
    return error


def write_class_folders(root, per_class=(5, 5, 5, 5), size=40, contrast=1.0):
    """Write root/images/class_i/j.jpg: noise around a colour of the class; without contrast all classes are alike."""
    rng = np.random.default_rng(0)
    for label, n_images in enumerate(per_class):
        folder = root / "images" / f"class_{label:02d}"
        folder.mkdir(parents=True)
        colour = 125 + contrast * (rng.uniform(60, 190, 3) - 125)
        for i in range(n_images):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def images(size, n=2):
    """Return n random images as a network takes them."""
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_bitmap(image):
    """Write an image anew as BMP, which Pillow opens whatever reads others: At("open", ...) sees it."""
    with Image.open(image) as picture:
        picture.save(image.with_suffix(".bmp"))
    image.unlink()


def small_flags(source, folder, *more):
    """Return the command line of a small run on "tiny" that mines after every epoch; flags in `more` win."""
    base = {"--dataset": "tiny", "--arch": "small", "--img_size": "32", "--bs": "8", "--cs_per_bs": "2 2",
            "--n_epochs": "3", "--eval_every": "3", "--kernels": "0", "--lr": "1e-3", "--shared_num_classes": "3",
            "--cluster_update_freq": "0", "--adv_weights": "50", "--savename": "run"}  # fmt: skip
    argv = [str(flag) for flag in more]
    for flag, values in base.items():
        if flag not in argv:
            argv += [flag, *values.split()]
    pretrained = [] if "--weights" in argv else ["--not_pretrained"]
    return [*argv, *pretrained, "--source_path", str(source), "--save_path", str(folder)]


def read_logs(folder):
    """Return all CSV files of a run without their Time columns."""
    return {path.name: pd.read_csv(path).drop(columns="Time") for path in sorted(folder.glob("*.csv"))}


def assert_equal(one, other, where):
    """Compare nested plain values and tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{where}, {i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


CPU_DIGITS = pytest.mark.skipif(torch.cuda.is_available(), reason="compares last digits, which only a CPU repeats")


def assert_same_run(one, other):
    """Compare logs but for times, what was mined, and weights and all else that training depends on, bit for bit."""
    if torch.cuda.is_available():
        pytest.skip(CPU_DIGITS.kwargs["reason"])
    for pattern in ("*.csv", "mined*", "mined/*"):
        assert {path.name for path in one.glob(pattern)} == {path.name for path in other.glob(pattern)}
    if (one / "mined_labels.npz").exists():
        minings = [np.load(folder / "mined_labels.npz") for folder in (one, other)]
        for name in ("labels", "epochs"):
            assert_equal(*(mining[name].tolist() for mining in minings), f"mined_labels.npz: {name}")
    for path in one.glob("*.csv"):
        tables = [pd.read_csv(folder / path.name, dtype=str).drop(columns="Time") for folder in (one, other)]
        pd.testing.assert_frame_equal(*tables)
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        stored = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        for content in stored:
            content.pop("provenance")
            for part in ("seconds", "spent"):
                content.get("training", {}).pop(part, None)
            for row in [row for rows in content["progress"]["rows"].values() for row in rows]:
                row.pop("Time")
            for flag in (*options.MACHINE, *options.OUTPUT, "n_epochs"):
                content["flags"].pop(flag, None)
        assert_equal(*stored, name)


@contextlib.contextmanager
def one_thread():
    """Let this process compute as those that torchrun starts do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def class_folders(tmp_path):
    """A data set "tiny" of 4 classes of 5 images; returns the source path."""
    write_class_folders(tmp_path / "source" / "tiny")
    return tmp_path / "source"


@pytest.fixture
def tiny_run(class_folders, tmp_path):
    """Run main with flags, small, on "tiny"; returns the run folder."""
    return lambda *more: run(small_flags(class_folders, tmp_path / "results", *more))


@pytest.fixture(scope="session")
def shapes():
    """The built-in data set, (train, test)."""
    train, tests = render_shapes()
    return train, tests["test"]
