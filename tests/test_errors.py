"""What ends a program or troubles it: signals, images and workers that go, an output that cannot be written."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pandas as pd
import pytest
from conftest import (
    ALONE,
    ROOT,
    At,
    act_at,
    as_bitmap,
    run,
    run_and_act,
    run_in_process,
    small_flags,
    write_class_folders,
)

from run.errors import InputError, first_line, stop_reason


def assert_tells_how_to_go_on(error, beginning, path):
    """See that one line says why a run stopped and which command goes on with it; return the command's flags."""
    assert error.startswith(f"main.py: stopped{beginning}"), error
    assert error.count("\n") == 1, error
    command = shlex.split(error.split("the last complete epoch is safe; go on with: ")[1])
    assert command == ["python", "main.py", "--resume", str(path)]
    return command[2:]


SCORED = At("os.rename", "log_val_Class.csv")


def act_in_a_worker(act):
    """Let the next process that reads the bitmap act: a loader's worker of this one."""
    act_at([At("open", "4.bmp")], act)


@pytest.fixture
def with_bitmap(class_folders):
    """The data set "tiny", one of whose training images is a bitmap; returns the source path."""
    as_bitmap(class_folders / "tiny" / "images" / "class_01" / "4.jpg")
    return class_folders


def tell_owner(signum):
    """Send a signal to the process that started this one."""
    os.kill(os.getppid(), signum)


def tell_owner_again_and_again(signum):
    """Send a signal to the process that started this one, as long as both live."""
    owner = os.getppid()

    def tell():
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(owner, signum)
                time.sleep(0.001)

    threading.Thread(target=tell, daemon=True).start()


@pytest.mark.parametrize(
    ("signum", "tell"), [(signal.SIGTERM, tell_owner_again_and_again), (signal.SIGINT, tell_owner)]
)
def test_a_signal_stops_a_run_with_a_command_to_go_on(with_bitmap, tmp_path, signum, tell):
    argv = small_flags(with_bitmap, tmp_path / "with space", "--kernels", 2, "--eval_every", 1)
    process = run_in_process(run_and_act, argv, [SCORED], partial(act_in_a_worker, partial(tell, signum)))
    assert process.returncode == 128 + signum, process.stderr
    assert_tells_how_to_go_on(process.stderr, f" by {signum.name}: ", tmp_path / "with space" / "tiny" / "run")


def signal_all_in_a_worker():
    """Let the next worker that reads the bitmap send SIGTERM to all processes of its group, after the first scores."""
    act_at([SCORED], partial(act_in_a_worker, partial(os.killpg, 0, signal.SIGTERM)))


def test_a_signal_to_all_processes_of_a_run_stops_with_one_line(with_bitmap, tmp_path):
    code = "import runpy, sys, test_errors; test_errors.signal_all_in_a_worker(); del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = small_flags(with_bitmap, tmp_path, "--kernels", 2, "--eval_every", 1)
    process = subprocess.run(
        [sys.executable, "-c", code, ROOT / "main.py", *argv],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == 143, process.stderr
    assert_tells_how_to_go_on(process.stderr, " by SIGTERM: ", tmp_path / "tiny" / "run")


@pytest.mark.parametrize("point", [At("os.scandir", "class_03"), At("os.mkdir", "run")], ids=["reads", "makes folder"])
def test_a_signal_before_anything_is_stored_leaves_no_run(class_folders, tmp_path, point):
    argv = small_flags(class_folders, tmp_path / "results", "--go_on")
    process = run_in_process(run_and_act, argv, [point], partial(signal.raise_signal, signal.SIGTERM))
    assert process == (143, "main.py: stopped by SIGTERM: nothing had been stored yet\n")
    assert os.listdir(tmp_path / "results" / "tiny") == [".run.lock"]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_image_that_goes_or_breaks_stops_a_run_that_can_go_on(class_folders, tmp_path, n_workers):
    image, path = class_folders / "tiny" / "images" / "class_01" / "3.jpg", tmp_path / "tiny" / "run"
    good = image.read_bytes()
    spoil = partial(image.write_bytes, good[:400]) if n_workers else image.unlink
    argv = small_flags(class_folders, tmp_path, "--kernels", n_workers)
    process = run_in_process(run_and_act, argv, [At("os.rename", "log_train_Class.csv")], spoil)
    assert process.returncode == 1
    flags = assert_tells_how_to_go_on(process.stderr, f": cannot decode the image {image} (", path)
    image.write_bytes(good)
    run(flags)
    assert pd.read_csv(path / "log_train_Class.csv")["Epochs"].tolist() == [0, 1, 2]


def test_a_worker_that_dies_stops_a_run_that_can_go_on(with_bitmap, tmp_path):
    die = partial(act_in_a_worker, partial(signal.raise_signal, signal.SIGKILL))
    argv = small_flags(with_bitmap, tmp_path, "--kernels", 1)
    process = run_in_process(run_and_act, argv, [At("os.rename", "log_train_Class.csv")], die)
    assert process.returncode == 1, process.stderr
    assert_tells_how_to_go_on(process.stderr, ": DataLoader worker ", tmp_path / "tiny" / "run")


def command_line(program, *flags, redirection=""):
    """Run a program as a shell does, with its stdout redirected."""
    command = shlex.join([sys.executable, str(ROOT / program), *map(str, flags)])
    shell = ["bash", "-c", f"{command} {redirection}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(shell, capture_output=True, text=True, env=environment)


def test_a_run_prints_and_writes_names_in_any_encoding(tmp_path):
    images = write_class_folders(tmp_path / "Bücher" / "tiny") / "images"
    (images / "class_03").rename(images / "straße")
    (images / "空").mkdir()  # is warned of
    argv = small_flags(tmp_path / "Bücher", tmp_path / "é", *ALONE, "--n_epochs", 1, "--task_p", 1, 0)
    done = command_line("main.py", *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 folders without images are no classes: \\u7a7a\n" in done.stdout
    assert done.stdout.endswith("\\xe9/tiny/run\n")
    assert "epochs done: 1\n" in (tmp_path / "é" / "tiny" / "run" / "Curr_Summary_Class.txt").read_text()


def test_evaluate_is_a_program_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command_line("evaluate.py", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evaluate.py: error: nowhere: no such run folder or checkpoint file\n"
    assert not list(tmp_path.iterdir())


def test_a_run_whose_output_is_closed_goes_on(class_folders, tmp_path):
    flags = (*ALONE, "--n_epochs", 1, "--task_p", 1, 0)
    done = command_line("main.py", *small_flags(class_folders, tmp_path / "results", *flags), redirection=">&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "epochs done: 1\n" in (tmp_path / "results" / "tiny" / "run" / "Curr_Summary_Class.txt").read_text()


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", "No space left on device"), ("| true", "Broken pipe")]
)
def test_output_that_cannot_be_written_ends_a_run_with_one_line(class_folders, tmp_path, redirection, reason):
    done = command_line("main.py", *small_flags(class_folders, tmp_path / "results", *ALONE), redirection=redirection)
    assert done.stderr == f"main.py: stopped: cannot read or write a file or stdout ({reason})\n"


def test_reasons_are_one_line_that_names_the_file():
    unwritten = OSError(28, "No space left on device", "/runs/a/last.pth.tar")
    assert stop_reason(unwritten) == "cannot read or write /runs/a/last.pth.tar (No space left on device)"
    of_worker = InputError("Caught InputError in DataLoader worker process 0.\nTraceback\nInputError: bad image\n")
    assert stop_reason(of_worker) == "bad image"
    assert stop_reason(InputError("no file:\n  look  there")) == "no file:; look there"
    assert stop_reason(KeyError("a bug")) is None
    assert first_line(KeyError()) == "KeyError"
