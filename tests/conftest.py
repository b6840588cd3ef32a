"""Fixtures and helpers: small image folders, programs run as a user would, and processes of their own."""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from typing import NamedTuple

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several test processes on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import main

ROOT = Path(__file__).resolve().parent.parent
# Processes begin as copies of one that has main imported, which takes seconds; it finds main where the tests are run
# from the top folder, and otherwise each imports it anew
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["main"])


class Ended(NamedTuple):
    """How a process ended. Those that it started are of the session of this number."""

    returncode: int
    stderr: str
    session: int


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


def call_in_session(stderr, function, args):
    """Call a function in a session of its own, its errors written to a file."""
    os.setsid()
    with open(stderr, "wb", 0) as file, open(os.devnull, "wb", 0) as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(file.fileno(), 2)
    call_like_new(function, *args)


def run_in_process(function, *args, timeout=300):
    """Call a function of a module in a new process that has main imported.

    Not for what happens when Python itself shuts down: such a process ends without.
    """
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        process = FORKSERVER.Process(target=call_in_session, args=(stderr, function, args))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                pytest.fail(f"not ended after {timeout} s: {stderr.read_text()}")
        finally:  # after Ctrl-C too, which does not reach another session
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        return Ended(process.exitcode, stderr.read_text(), process.pid)


def parse(*flags, program=main):
    """Return the checked arguments of a command line of main or evaluate."""
    parser = program.get_args_parser()
    return program.check_args(parser.parse_args([str(flag) for flag in flags]), parser)


def run(argv, program=main):
    """Run main or evaluate with a command line; main returns the run folder."""
    return program.main(parse(*argv, program=program))


def write_class_folders(root, per_class=(5, 5, 5, 5), size=40):
    """Write root/images/class_i/j.jpg: noise around a colour of the class."""
    rng = np.random.default_rng(0)
    for label, n_images in enumerate(per_class):
        folder = root / "images" / f"class_{label:02d}"
        folder.mkdir(parents=True)
        colour = rng.uniform(60, 190, 3)
        for i in range(n_images):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


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


@pytest.fixture
def class_folders(tmp_path):
    """A data set "tiny" of 4 classes of 5 images; returns the source path."""
    write_class_folders(tmp_path / "source" / "tiny")
    return tmp_path / "source"


@pytest.fixture
def run_main(tmp_path):
    """Run main with flags, small, with the smaller backbone and random weights; returns the run folder."""

    def run_small(*flags, not_pretrained=True):
        base = {"--arch": "googlenet", "--img_size": "32", "--bs": "8", "--cs_per_bs": "2 2", "--n_epochs": "2",
                "--kernels": "0", "--lr": "1e-3", "--shared_num_classes": "3", "--cluster_update_freq": "0",
                "--adv_weights": "50", "--savename": "run", "--save_path": str(tmp_path / "results")}  # fmt: skip
        argv = [str(flag) for flag in flags]
        for flag, values in base.items():
            if flag not in argv:
                argv += [flag, *values.split()]
        return run([*argv, "--not_pretrained"] if not_pretrained else argv)

    return run_small


@pytest.fixture(scope="session")
def shapes():
    """The built-in data set, (train, test)."""
    train, tests = datasets.render_shapes()
    return train, tests[""]
