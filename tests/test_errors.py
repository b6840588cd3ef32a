"""What ends a program or troubles it: signals, images and workers that go, an output that cannot be written."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ALONE, ROOT, run, run_in_process, small_flags, when, when_logged, write_class_folders

from run.errors import InputError, first_line, stop_reason


def processes_of(session):
    """Return the ids of the processes of a session."""
    found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr  # some, none
    return found.stdout.split()


def children_of(pid):
    """Return the ids of the processes that a process started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def assert_tells_how_to_go_on(error, beginning, path):
    """See that one line says why a run stopped and which command goes on with it; return the command's flags."""
    assert error.startswith(f"main.py: stopped{beginning}"), error
    assert error.count("\n") == 1, error
    command = shlex.split(error.split("the last complete epoch is safe; go on with: ")[1])
    assert command == ["python", "main.py", "--resume", str(path)]
    return command[2:]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_stops_a_run_with_a_command_to_go_on(class_folders, tmp_path, name, code):
    path = tmp_path / "with space" / "tiny" / "run"

    def tell(process):
        os.kill(process.pid, getattr(signal, name))
        while name == "SIGTERM" and process.is_alive():  # what is told again is not answered again
            time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    argv = small_flags(class_folders, tmp_path / "with space", "--kernels", 2, "--eval_every", 1)
    process = run_in_process(run, argv, meanwhile=when_logged(path, 1, tell, "log_val_Class.csv"))
    assert process.returncode == code, process.stderr
    assert_tells_how_to_go_on(process.stderr, f" by {name}: ", path)
    assert not processes_of(process.session)


def test_a_signal_to_all_processes_of_a_run_stops_with_one_line(class_folders, tmp_path):
    argv = small_flags(class_folders, tmp_path, *ALONE, "--kernels", 2, "--n_epochs", 500, "--eval_every", 1)
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    path = tmp_path / "tiny" / "run"
    while process.poll() is None and not (path / "log_val_Class.csv").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert_tells_how_to_go_on(error, " by SIGTERM: ", path)
    assert not processes_of(process.pid)


def test_a_signal_before_anything_is_stored_leaves_no_run(class_folders, tmp_path):
    argv = small_flags(class_folders, tmp_path / "results", "--go_on", "--arch", "resnet50", "--img_size", 128)
    taken = tmp_path / "results" / "tiny" / ".run.lock"  # is there as long as the start takes

    def stop(process):
        time.sleep(0.2)  # it may have made the file and not hold it yet
        os.kill(process.pid, signal.SIGTERM)

    process = run_in_process(run, argv, meanwhile=when(taken.exists, stop))
    assert (process.returncode, process.stderr) == (143, "main.py: stopped by SIGTERM: nothing had been stored yet\n")
    assert [path.name for path in taken.parent.iterdir()] == [taken.name]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_image_that_goes_or_breaks_stops_a_run_that_can_go_on(class_folders, tmp_path, n_workers):
    image, path = class_folders / "tiny" / "images" / "class_01" / "3.jpg", tmp_path / "tiny" / "run"
    good = image.read_bytes()

    def spoil(_):
        if n_workers:
            image.write_bytes(good[:400])
        else:
            image.unlink()

    argv = small_flags(class_folders, tmp_path, "--kernels", n_workers)
    process = run_in_process(run, argv, meanwhile=when_logged(path, 1, spoil))
    assert process.returncode == 1
    flags = assert_tells_how_to_go_on(process.stderr, f": cannot decode the image {image} (", path)
    image.write_bytes(good)
    run(flags)
    assert pd.read_csv(path / "log_train_Class.csv")["Epochs"].tolist() == [0, 1, 2]


def test_a_worker_that_dies_stops_a_run_that_can_go_on(class_folders, tmp_path):
    path = tmp_path / "tiny" / "run"

    def kill_workers(process):
        while process.is_alive():
            for child in children_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    argv = small_flags(class_folders, tmp_path, "--kernels", 1)
    process = run_in_process(run, argv, meanwhile=when_logged(path, 1, kill_workers))
    assert process.returncode == 1, process.stderr
    assert_tells_how_to_go_on(process.stderr, ": DataLoader worker ", path)


def command_line(program, *flags, redirection=""):
    """Run a program as a shell does, with its stdout redirected."""
    command = shlex.join([sys.executable, str(ROOT / program), *map(str, flags)])
    shell = ["bash", "-c", f"{command} {redirection}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(shell, capture_output=True, text=True, env=environment, timeout=120)


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
