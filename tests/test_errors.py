"""What ends a program or troubles it: signals, images and workers that go, an output that cannot be written."""

import contextlib
import io
import os
import pickle
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    At,
    act_in_a_worker,
    as_bitmap,
    run,
    run_and_act,
    run_and_act_in_a_worker,
    run_in_process,
    small_flags,
    write_class_folders,
)

from run.history import History
from support.errors import InputError, first_line, stop_reason


def assert_tells_how_to_go_on(error, beginning, path):
    """See that one line says why a run stopped and which command goes on with it; return the command's flags."""
    assert error.startswith(f"main.py: stopped{beginning}"), error
    assert error.count("\n") == 1, error
    command = shlex.split(error.split("last complete epoch saved; resume with: ")[1])
    assert command == ["python", "main.py", "--resume", str(path)]
    return command[2:]


BITMAP = "4.bmp"


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
    path = tmp_path / "with space" / "tiny" / "run"
    argv = small_flags(with_bitmap, tmp_path / "with space", "--kernels", 2, "--eval_every", 1)
    log = path / "last.pth.tar"
    process = run_in_process(run_and_act_in_a_worker, argv, BITMAP, log, partial(tell, signum))
    assert process.returncode == 128 + signum, process.stderr
    assert_tells_how_to_go_on(process.stderr, f" by {signum.name}; ", path)


def signal_all_in_a_worker(log):
    """Let the first worker that reads the bitmap after a log was written send SIGTERM to all processes of its group."""
    act_in_a_worker(BITMAP, Path(log), partial(os.killpg, 0, signal.SIGTERM))


def test_a_signal_to_all_processes_of_a_run_stops_with_one_line(with_bitmap, tmp_path):
    log = tmp_path / "tiny" / "run" / "last.pth.tar"
    code = f"import runpy, sys, test_errors; test_errors.signal_all_in_a_worker({str(log)!r}); del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = small_flags(with_bitmap, tmp_path, "--kernels", 2, "--eval_every", 1)
    process = subprocess.run(
        [sys.executable, "-c", code, ROOT / "main.py", *argv],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == 143, process.stderr
    assert_tells_how_to_go_on(process.stderr, " by SIGTERM; ", tmp_path / "tiny" / "run")


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_image_that_goes_or_breaks_stops_a_run_that_can_go_on(class_folders, tmp_path, n_workers):
    image, path = class_folders / "tiny" / "images" / "class_01" / "3.jpg", tmp_path / "tiny" / "run"
    good = image.read_bytes()
    spoil = partial(image.write_bytes, good[:400]) if n_workers else image.unlink
    argv = small_flags(class_folders, tmp_path, "--kernels", n_workers)
    process = run_in_process(run_and_act, argv, [At("os.rename", "log_train_Class.csv", 2)], spoil)
    assert process.returncode == 1
    flags = assert_tells_how_to_go_on(process.stderr, f": cannot decode the image {image} (", path)
    image.write_bytes(good)
    run(flags)
    assert pd.read_csv(path / "log_train_Class.csv")["Epochs"].tolist() == [0, 1, 2]


def test_a_worker_that_dies_stops_a_run_that_can_go_on(with_bitmap, tmp_path):
    path = tmp_path / "tiny" / "run"
    argv = small_flags(with_bitmap, tmp_path, "--kernels", 1)
    die = partial(signal.raise_signal, signal.SIGKILL)
    process = run_in_process(run_and_act_in_a_worker, argv, BITMAP, path / "last.pth.tar", die)
    assert process.returncode == 1, process.stderr
    assert_tells_how_to_go_on(process.stderr, ": a loader worker has ended unexpectedly ", path)


def fail():
    raise KeyError("a bug")


def test_a_bug_keeps_its_traceback_and_is_followed_by_how_to_resume(class_folders, tmp_path):
    path, argv = tmp_path / "tiny" / "run", small_flags(class_folders, tmp_path)
    process = run_in_process(run_and_act, argv, [At("os.rename", "log_train_Class.csv", 2)], fail)
    assert process.returncode == 1
    resume = f"last complete epoch saved; resume with: python main.py --resume {path}"
    assert process.stderr.splitlines()[-2:] == ["KeyError: 'a bug'", resume]
    assert (path / "log.txt").read_text().splitlines()[-2:] == ["KeyError: 'a bug'", resume]
    assert History.read(path).reason == "a bug: KeyError, see log.txt"
    run(["--resume", path])
    assert History.read(path).state == "finished"


def command_line(program, *flags, redirection=""):
    """Run a program as a shell does, with its stdout redirected."""
    command = shlex.join([sys.executable, str(ROOT / program), *map(str, flags)])
    shell = ["bash", "-c", f"{command} {redirection}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(shell, capture_output=True, text=True, env=environment)


def test_a_run_prints_and_writes_names_in_any_encoding(tmp_path):
    images = write_class_folders(tmp_path / "Bücher" / "tiny") / "images"
    (images / "class_03").rename(images / "straße")
    (images / "空").mkdir()  # is named as left out
    argv = small_flags(tmp_path / "Bücher", tmp_path / "é", *ALONE, "--n_epochs", 1, "--task_p", 1, 0)
    done = command_line("main.py", *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out: 1 folder without images: images/\\u7a7a\n" in done.stdout
    assert done.stdout.endswith("\\xe9/tiny/run\n")
    page = (tmp_path / "é" / "tiny" / "run" / "page.html").read_text(encoding="utf-8")
    assert "left out: 1 folder without images: images/空" in page
    assert "epochs done: 1\n" in (tmp_path / "é" / "tiny" / "run" / "Curr_Summary_Class.txt").read_text()


def test_evaluate_is_a_program_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command_line("evaluate.py", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evaluate.py: error: nowhere: no such run folder or checkpoint file\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">/dev/full", "| true"])
def test_output_that_is_closed_or_cannot_be_written_ends_no_run(class_folders, tmp_path, redirection):
    argv = small_flags(class_folders, tmp_path, *ALONE, "--n_epochs", 1, "--task_p", 1, 0)
    done = command_line("main.py", *argv, redirection=f"{redirection}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "epochs done: 1\n" in (tmp_path / "tiny" / "run" / "log.txt").read_text()


def test_reasons_are_one_line_that_names_the_file():
    unwritten = OSError(28, "No space left on device", "/runs/a/last.pth.tar")
    assert stop_reason(unwritten) == "cannot read or write /runs/a/last.pth.tar (No space left on device)"
    of_worker = InputError("Caught InputError in DataLoader worker process 0.\nTraceback\nInputError: bad image\n")
    assert stop_reason(of_worker) == "bad image"
    assert stop_reason(InputError("no file:\n  look  there")) == "no file:; look there"
    assert stop_reason(KeyError("a bug")) is None
    assert first_line(KeyError()) == "KeyError"


def test_too_little_shared_memory_stops_a_run_that_can_go_on_without_workers(with_bitmap, tmp_path):
    argv = small_flags(with_bitmap, tmp_path, "--kernels", 1, "--img_size", 64, "--n_epochs", 2)
    # No file may be as large as a batch once something is stored, as where /dev/shm is too small
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    stored = tmp_path / "tiny" / "run" / "last.pth.tar"
    process = run_in_process(run_and_act_in_a_worker, argv, BITMAP, stored, limit)
    assert process.returncode == 1, process.stderr
    reason = (
        ": too little shared memory (/dev/shm) for the loader workers (File too large (27)): give --kernels 0, or in "
    )
    path = tmp_path / "tiny" / "run"
    flags = assert_tells_how_to_go_on(process.stderr, f"{reason}Docker --shm-size=1g; ", path)
    run([*flags, "--kernels", 0])
    assert pd.read_csv(path / "log_train_Class.csv")["Epochs"].tolist() == [0, 1]


def test_what_pytorch_says_of_little_shared_memory():
    text = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    )
    killed = RuntimeError(f"{text}shared memory. Please try to raise your shared memory limit.")
    ended = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    ended.__cause__ = killed
    in_worker = (
        "Caught RuntimeError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File x\n"
        "RuntimeError: unable to {} </torch_3619_1462362348_2>: No space left on device (28)\n"
    )
    full = [RuntimeError(in_worker.format(to)) for to in ("allocate shared memory(shm) for file", "write to file")]
    for error, cause in [
        (killed, "Bus error. "),
        (ended, "Bus error. "),
        *((error, "No space left") for error in full),
    ]:
        reason = stop_reason(error)
        assert reason.startswith(f"too little shared memory (/dev/shm) for the loader workers ({cause}"), reason
        assert reason.endswith("): give --kernels 0, or in Docker --shm-size=1g")
        assert "\n" not in reason


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_kernel_too_large_for_a_gpu_is_not_about_the_loader_workers(wrapped):
    text = "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block sizes may help."
    error = RuntimeError(f"No valid triton configs. OutOfMemoryError: {text}")
    if not wrapped:  # no RuntimeError, and known by its module only
        error = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})(text)
    reason = stop_reason(error)
    assert reason.startswith("--compile: torch.compile cannot be used here (")
    assert "shared memory, Required: 147456" in reason


def raised(function, *args):
    """Return the error that a call raises."""
    with pytest.raises((MemoryError, RuntimeError)) as error:
        function(*args)
    return error.value


def test_out_of_memory_is_one_line_that_names_what_needs_less():
    on_gpu = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3 is free."
    )
    errors = {
        "you tried to allocate 36028797018963968 bytes": raised(lambda: torch.empty(2**55, dtype=torch.uint8)),
        "Unable to allocate 32.0 PiB for an array": raised(np.empty, 2**55, np.uint8),
        "MemoryError)": raised(bytes, 2**60),
        "std::bad_alloc)": RuntimeError("std::bad_alloc"),
        "Cannot allocate memory)": OSError(12, "Cannot allocate memory"),  # where a worker is to start
        "CUDA out of memory. Tried to allocate 20.00 GiB)": torch.OutOfMemoryError(on_gpu),
    }
    for cause, error in errors.items():
        reason = stop_reason(error)
        assert reason.startswith(f"out of memory ({cause}"), reason
        assert reason.endswith("): free some; a new run takes less with a smaller --bs or --img_size")


def test_a_run_does_not_need_a_stdout_that_is_a_file(class_folders, tmp_path, monkeypatch):
    """As in a notebook, or where a caller keeps what is printed."""
    monkeypatch.setattr(sys, "argv", ["main.py", *small_flags(class_folders, tmp_path, "--n_epochs", 1)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert printed.getvalue().endswith(f"run folder: {tmp_path}/tiny/run\n")


def test_a_stdout_that_is_no_file_and_cannot_be_written_is_one_line(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["main.py", "--source_path", "nowhere"])
    with contextlib.redirect_stdout(Full()), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("main.py: error: no images of --dataset cub200 in --source_path nowhere; ")
    assert line.count("\n") == 1


def run_without_rights(program, *flags):
    """Run a program that may read only what its user may, as root may not either; return how it ended."""
    command = [sys.executable, str(ROOT / program), *map(str, flags)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and setpriv is missing")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_folder_beside_a_missing_data_set_need_not_be_readable(tmp_path):
    write_class_folders(tmp_path / "bird", per_class=(1, 1, 1, 1))
    (tmp_path / "private").mkdir(mode=0)
    done = run_without_rights("datasets.py", "birds", "--source_path", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[2] == f"  found       {tmp_path} holds bird, private"
    (tmp_path / "birds").mkdir(mode=0)
    done = run_without_rights("datasets.py", "birds", "--source_path", tmp_path)
    assert done.returncode == 2
    told = done.stderr.splitlines()[2:]
    assert told[0].startswith(f"  found       {tmp_path}/birds holds nothing that can be listed; {tmp_path} holds ")
    assert told[1] == f"  to do       make the folder {tmp_path}/birds readable"


def test_a_comparison_names_runs_that_may_not_be_read_and_leaves_them_out(tmp_path):
    for name in ("good", "hidden", "flags", "scores"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "hypa.pkl").write_bytes(pickle.dumps({"dataset": "tiny", "n_epochs": 1}))
        (tmp_path / "runs" / name / "log_val_Class.csv").write_text("Epochs,Time,Recall @ 1\n0,1,0.5\n")
    for path in ("hidden", "flags/hypa.pkl", "scores/log_val_Class.csv"):
        (tmp_path / "runs" / path).chmod(0)
    (tmp_path / "private").mkdir(mode=0)
    (tmp_path / "loop").symlink_to("loop")
    done = run_without_rights("evaluate.py", "--compare", *(tmp_path / name for name in ("private", "loop", "runs")))
    assert (done.returncode, done.stderr) == (0, "")
    skipped = [line.removeprefix(f"skipped {tmp_path}/") for line in done.stdout.splitlines() if "skipped" in line]
    assert sorted(line.split(" (")[0] for line in skipped) == [
        "loop: no such folder",
        "private: holds no hypa.pkl that can be read",
        "runs/flags: holds no hypa.pkl that can be read",
        "runs/hidden: holds no hypa.pkl that can be read",
        "runs/scores: log_val_Class.csv cannot be read",
    ]
    assert "good" in done.stdout
