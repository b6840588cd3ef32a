"""A run on disk: killed and resumed, its images and flags, lock, logs, checkpoints and summary."""

import errno
import functools
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ALONE,
    At,
    as_bitmap,
    assert_equal,
    assert_same_run,
    held_run,
    killed_run,
    refused,
    run,
    run_and_act,
    run_in_process,
    small_flags,
    write_class_folders,
)

from run.folder import Run
from run.history import History
from support import files
from support.errors import InputError
from support.weights import read_checkpoint

BASE = ["--scheduler", "exp", "--gamma", 0.9, "--seed", 2, "--eval_every", 1]
FILES_OF_A_REFUSED_RESUME = {
    "last.pth.tar",
    "hypa.pkl",
    "Parameter_Info.txt",
    ".lock",
    "log.txt",
    "page.html",
    "InfoPlot_Class.svg",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on classes that are hard to tell apart: (source path, run folder)."""
    top = tmp_path_factory.mktemp("whole")
    images = write_class_folders(top / "source" / "tiny", contrast=0.1) / "images"
    for name in ("class_01", "class_03"):  # one that trains, one that tests
        as_bitmap(images / name / "4.jpg")
    return top / "source", run(small_flags(top / "source", top, *BASE))


@pytest.fixture
def content(whole):
    """What last.pth.tar of the uninterrupted run holds, as if one epoch were left to train."""
    content = torch.load(whole[1] / "last.pth.tar", weights_only=True)
    content["training"]["epoch"] = 2
    return content


def stored_run(path, content):
    """Make a run folder that holds last.pth.tar and its flags."""
    path.mkdir(parents=True)
    torch.save(content, path / "last.pth.tar")
    History(path, content["flags"]).write_flags()
    return path


def linked_run(whole, path):
    """Make a run folder that holds nothing but the last.pth.tar and the flags of the uninterrupted run."""
    path.mkdir(parents=True)
    for name in ("last.pth.tar", "hypa.pkl"):
        os.link(whole[1] / name, path / name)
    return path


@pytest.mark.parametrize(
    "points",
    [
        [At("os.rename", "log_train_Class.csv", 2), At("open", "4.bmp")],  # in the evaluation of epoch 1
        [At("os.rename", "log_val_Class.csv", 2), At("open", "4.bmp")],  # while it is probed
        [At("os.rename", "InfoPlot_Class.svg", 2)],  # while epoch 1 is drawn
        [At("os.rename", "log_mining.csv", 3), At("open", ".mined_clusters.png.*.tmp")],  # mined before epoch 2
        [At("os.rename", "before_epoch_0002.jpg")],  # before its contact sheet has its name
        [At("os.rename", "last.pth.tar", 2)],  # its file for epoch 2 is written, and has not its name yet
        [At("os.rename", "run.json", 3)],  # before the state after epoch 2 has its name
    ],
    ids=["evaluates", "probes", "draws", "mined", "sheet", "last", "state"],
)
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, points):
    source, expected = whole
    killed_run(small_flags(source, tmp_path, *BASE), *points)
    path = tmp_path / "tiny" / "run"
    with open(path / "log_train_Class.csv", "a") as file:
        file.write("7,torn li")
    assert run(["--resume", path]) == path
    assert_same_run(path, expected)
    assert not list(path.glob(".*.tmp"))
    history = History.read(path)
    assert (history.state, history.epoch, history.reason) == ("finished", 3, "")
    starts = pickle.loads((path / "hypa.pkl").read_bytes())["provenance"]
    assert starts == read_checkpoint(path, "last.pth.tar")["provenance"]
    assert [start["command"].split()[2] for start in starts] == [small_flags(source, tmp_path, *BASE)[0], "--resume"]
    log = (path / "log.txt").read_text()  # of both starts, from the first line to the last
    assert log.startswith("device: ")
    assert log.count("\ndevice: ") == 1
    assert "\nresumed: " in log
    assert log.endswith(f"run folder: {path}\n")


def test_a_run_that_goes_on_with_another_number_of_threads_says_so(tiny_run, capsys):
    folder, n_threads = tiny_run("--n_epochs", 1, "--task_p", 1, 0), torch.get_num_threads()
    warned = []
    for n_epochs, n in ((2, n_threads), (3, n_threads + 1), (4, n_threads + 1)):
        capsys.readouterr()
        torch.set_num_threads(n)
        try:
            run(["--resume", folder, "--n_epochs", n_epochs])
        finally:
            torch.set_num_threads(n_threads)
        warned.append(capsys.readouterr().out.count(f"; set OMP_NUM_THREADS={n_threads} to keep them\n"))
    assert warned == [0, 1, 0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--losses", "proxynca", "triplet", "--sampling", "distance", "semihard", "--task_p", 1, 0.5, "--bs", 4],
        ["--adv_weights", 0, "--task_p", 1, 0.5, "--bs", 4],  # heads and betas take no part in half of the steps
        ["--losses", "triplet", "proxynca", "--adversarial", "Shared-Class", "Class-Shared", "--adv_weights", 5, 9],
        ["--sampling", "random", "semihard", "--nu", 0.1, 0.1, "--task_p", 1, 0.6, "--amp", "fp16"],
        ["--task_p", 1, 0, "--adv_weights", 0, "--scheduler", "step", "--tau", 1, "--eval_every", 2],
        ["--cluster_update_freq", 1, "--bn", "frozen", "--kernels", 1, "--cache", "ram", "--eval_shared"],
    ],
)
def test_all_that_has_state_is_resumed(whole, tmp_path, flags):
    argv = [*flags, "--n_epochs", 2, *(BASE if "--scheduler" not in flags else [])]
    expected = run(small_flags(whole[0], tmp_path / "whole", *argv))
    path = tmp_path / "cut" / "tiny" / "run"
    killed_run(small_flags(whole[0], tmp_path / "cut", *argv), At("os.rename", "log_train_Class.csv", 2))
    assert torch.load(path / "last.pth.tar", weights_only=True)["training"]["epoch"] == 1
    torch.rand(3), random.random(), np.random.rand()  # another process would have other states
    assert_same_run(run(["--resume", path]), expected)


def test_a_checkpoint_of_an_earlier_version_has_mined_for_an_epoch_that_is_due(whole, tmp_path, capsys):
    path = tmp_path / "tiny" / "run"
    killed_run(small_flags(whole[0], tmp_path, *BASE), At("os.rename", "log_train_Class.csv", 2))
    stored = torch.load(path / "last.pth.tar", weights_only=True)
    assert stored["training"]["epoch"] == len(stored["progress"]["mined_labels"]) == 1
    stored["progress"]["rows"]["mining"] = History.read(path).rows["mining"]
    stored["progress"]["mined_labels"] = torch.from_numpy(np.load(path / "mined_labels.npz")["labels"])
    torch.save(stored, path / "last.pth.tar")
    (path / "run.json").unlink()
    run(["--resume", path])
    assert_same_run(path, whole[1])
    assert re.findall(r"mined for epoch (\d)", capsys.readouterr().out) == ["2"]


def test_a_finished_run_says_so_and_goes_on_with_flags_given_anew(whole, tmp_path, capsys):
    source, expected = whole
    path = run(small_flags(source, tmp_path, *BASE, "--n_epochs", 2))
    before = (path / "last.pth.tar").stat().st_mtime_ns
    capsys.readouterr()
    run(["--resume", path, "--lr", "1e-3", "--k_vals", 8, 4, 2, "--savename", "run"])  # its own, as they were given
    assert f"{path} is finished after 2 epochs" in capsys.readouterr().out
    assert (path / "last.pth.tar").stat().st_mtime_ns == before
    shutil.copytree(source, tmp_path / "moved")
    anew = ["--n_epochs", 3, "--kernels", 1, "--gpu", 0, "--source_path", tmp_path / "moved", "--cache", "ram"]
    run(["--resume", path / "last.pth.tar", *anew])
    assert_same_run(path, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--seed", "1", "--bn", "frozen"],
            "run is a run with --bn train, not --bn frozen; --seed 2, not --seed 1; only --gpu, --kernels, --cache, ",
        ),
        (["--eval_shared"], "run is a run with no --eval_shared, not --eval_shared; only --gpu"),
        (["--save_path", "elsewhere"], ", not --save_path elsewhere; only --gpu"),
        (["--n_epochs", "2"], "run is a run with --n_epochs 3, not --n_epochs 2; only --gpu"),
        (["--go_on"], "argument --go_on: not allowed with argument --resume"),
        (["--n_epochs", "4", "--source_path", "/nowhere"], "no images of --dataset tiny in --source_path /nowhere"),
    ],
)
def test_flags_that_change_the_result_are_refused(whole, flags, message, capsys):
    assert message in refused(capsys, ["--resume", whole[1], *flags])


def test_other_images_are_refused_though_there_are_as_many(whole, tmp_path, capsys):
    images = shutil.copytree(whole[0], tmp_path / "source") / "tiny" / "images"
    shutil.copy(images / "class_00" / "0.jpg", images / "class_01" / "3.jpg")
    resumed, named = (linked_run(whole, tmp_path / top / "run") for top in ("resumed", "tiny"))
    for path, argv in (
        (resumed, ["--resume", resumed, "--source_path", tmp_path / "source"]),
        (named, small_flags(tmp_path / "source", tmp_path, *BASE, "--go_on")),
    ):
        error = refused(capsys, [*argv, "--n_epochs", 4])
        message = "the images are not those that it was trained with (training images: different files or class names"
        assert f"--resume {path}: {message}" in error
        assert {file.name for file in path.iterdir()} <= FILES_OF_A_REFUSED_RESUME


def test_folders_that_hold_nothing_to_resume(whole, tmp_path, capsys, content):
    assert "no such folder" in refused(capsys, ["--resume", tmp_path / "absent"])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "last.pth.tar").touch()
    assert f"; there are runs in it: {tmp_path}/runs/a" in refused(capsys, ["--resume", tmp_path / "runs"])
    (tmp_path / "run").mkdir()
    assert "it has no complete epoch, or is not a run folder" in refused(capsys, ["--resume", tmp_path / "run"])
    shutil.copy(whole[1] / "checkpoint.pth.tar", tmp_path / "run" / "last.pth.tar")
    assert "holds a network without the state of its training" in refused(capsys, ["--resume", tmp_path / "run"])
    content["flags"]["arch"] = "resnet50"
    other_network = stored_run(tmp_path / "arch", content)
    assert "last.pth.tar: does not hold the training state of" in refused(capsys, ["--resume", other_network])
    assert {file.name for file in other_network.iterdir()} <= FILES_OF_A_REFUSED_RESUME


def test_pickled_objects_are_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "hypa.pkl").write_bytes(pickle.dumps({"dataset": Bomb()}))
    (tmp_path / "log_val_Class.csv").write_text("Epochs,Recall @ 1\n0,0.5\n")
    with pytest.raises(InputError, match=r"hypa\.pkl cannot be read \(it asks for posix\.mkdir\)"):
        History.read(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_damaged_checkpoints_are_refused_or_whole(whole, tmp_path):
    """Truncated or with a bit flipped: refused with one line, or a file whose checksums are right."""
    rng, path, refusals = random.Random(0), tmp_path / "last.pth.tar", []
    good, expected = (whole[1] / path.name).read_bytes(), read_checkpoint(whole[1], path.name)
    for i in range(60):
        damaged = bytearray(good)
        if i % 2:
            del damaged[rng.randrange(len(good)) :]
        else:
            places = [rng.randrange(len(good)), rng.randrange(4000), len(good) - 1 - rng.randrange(20000)]
            damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_equal(read_checkpoint(path), expected, f"try {i}")
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 45
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refusals)


def assert_refused_while_held(argv, point, path):
    """See that of two runs with one command line the second is refused while the first trains, which goes on."""
    with held_run(argv, point) as first:
        second = run_in_process(run, argv)
    refusal = f"main.py: error: {path}: is being trained by another process; wait for it, or stop it first\n"
    assert second == (2, refusal)
    assert first.result() == (0, "")


def test_only_one_of_two_resumes_goes_on(whole, tmp_path):
    path = linked_run(whole, tmp_path / "run")
    (path / ".lock").touch()  # of a dead process: no hindrance
    assert_refused_while_held(["--resume", path, "--n_epochs", 4], At("os.rename", "hypa.pkl"), path)
    assert pd.read_csv(path / "log_train_Class.csv")["Epochs"].tolist() == list(range(4))


def test_of_two_starts_of_one_name_the_second_is_refused(whole, tmp_path):
    path = tmp_path / "tiny" / "run"
    argv = small_flags(whole[0], tmp_path, *BASE, "--go_on")
    assert_refused_while_held(argv, At("open", "4.bmp"), path)  # before there is a checkpoint to go on from
    assert {entry.name for entry in (tmp_path / "tiny").iterdir()} == {"run", "index.html"}
    assert_same_run(path, whole[1])


def test_a_name_goes_on_where_its_run_stopped(whole, tmp_path, capsys, content):
    source, expected = whole
    named, top = small_flags(source, tmp_path, *BASE, "--go_on"), tmp_path / "tiny"
    content["flags"] |= {"savename": "run_7", "lr": 0.5}
    stored_run(top / "run_7", content)  # of another name that looks like it
    (top / "run").mkdir()
    os.link(expected / "checkpoint.pth.tar", top / "run" / "checkpoint.pth.tar")  # what is left of a run stays as it is
    killed_run(named, At("os.rename", "log_train_Class.csv", 2))
    for flags, message in [
        (["--lr", "1e-4"], "run_1 is a run with --lr 0.001, not --lr 0.0001; give its flags, or another --savename"),
        (["--n_epochs", "2"], "run_1 is a run with --n_epochs 3, not --n_epochs 2; give its flags"),
    ]:
        assert message in refused(capsys, [*named, *flags])
    assert run([*named, "--kernels", 1]) == top / "run_1"
    assert_same_run(top / "run_1", expected)
    capsys.readouterr()
    run(named)
    assert "run_1 is finished after 3 epochs" in capsys.readouterr().out
    assert sorted(path.name for path in top.iterdir()) == ["index.html", "run", "run_1", "run_7"]
    assert [path.name for path in (top / "run").iterdir()] == ["checkpoint.pth.tar"]


def interrupt():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "point",
    [
        At("os.scandir", "class_03"),
        At("os.mkdir", "run"),
        At("open", ".hypa.pkl.*.tmp"),
        At("open", "4.bmp"),
        At("open", ".last.pth.tar.*.tmp"),
    ],
)
def test_a_signal_before_anything_is_stored_leaves_no_folder_that_the_run_made(whole, tmp_path, point):
    (tmp_path / "results").mkdir()
    argv = small_flags(whole[0], tmp_path / "results" / "deeper", *BASE, "--go_on")
    ended = run_in_process(run_and_act, argv, [point], interrupt)
    assert ended == (143, "main.py: stopped by SIGTERM; no epoch was complete: nothing is saved\n")
    assert not list((tmp_path / "results").iterdir())


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_in_its_folder(whole, tmp_path, capsys):
    path, argv = tmp_path / "tiny" / "run", small_flags(whole[0], tmp_path, *BASE)
    killed_run(argv, At("open", ".last.pth.tar.*.tmp"))
    assert (path / "log_train_Class.csv").exists()
    assert run([*argv, "--go_on"]) == path
    assert_same_run(path, whole[1])
    (tmp_path / "tiny" / "notes").mkdir()  # is no run's
    (tmp_path / "tiny" / "notes" / "hypa.pkl").touch()
    assert run([*argv, "--savename", "notes", "--go_on", "--n_epochs", 1]).name == "notes_1"
    assert [entry.name for entry in (tmp_path / "tiny" / "notes").iterdir()] == ["hypa.pkl"]
    (path / "last.pth.tar").unlink()  # to save space: what is left of a run is the user's
    kept = sorted(entry.name for entry in path.iterdir())
    assert "larger than" in refused(capsys, [*argv, "--go_on", "--bs", 100])
    assert sorted(entry.name for entry in path.iterdir()) == kept
    killed_run([*argv, "--savename", "other"], At("open", ".last.pth.tar.*.tmp"))
    assert run([*argv, "--savename", "other", "--n_epochs", 1]).name == "other_1"  # a new run takes no folder over


def run_where_files_cannot(event, argv):
    """Run main where the system refuses an operation on files."""

    def refuse(happened, args):
        if happened == event:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    sys.addaudithook(refuse)
    run(argv)


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [("os.rename", 1, "/hypa.pkl (Function not implemented)"), ("fcntl.flock", 2, " cannot lock files (Function")],
)
def test_what_a_file_system_cannot_do_is_told_when_the_folder_is_made(whole, tmp_path, event, code, message):
    argv = small_flags(whole[0], tmp_path / "results", *BASE)
    ended = run_in_process(run_where_files_cannot, event, argv)
    assert ended.returncode == code, ended.stderr
    assert f"{tmp_path}/results/tiny/run" in ended.stderr
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_name_goes_on_with_a_run_from_before_a_flag_was_there(whole, tmp_path, capsys):
    stored = torch.load(whole[1] / "last.pth.tar", weights_only=True)
    del stored["flags"]["shared_gradient"], stored["flags"]["flip"]
    stored_run(tmp_path / "tiny" / "run", stored)
    named = small_flags(whole[0], tmp_path, *BASE, "--go_on", "--n_epochs", 4)
    for argv in (named, ["--resume", tmp_path / "tiny" / "run"]):
        message = "is a run with --shared_gradient backbone, not --shared_gradient head; "
        assert message in refused(capsys, [*argv, "--shared_gradient", "head"])
        assert "is a run with --flip class, not --flip none" in refused(capsys, [*argv, "--flip", "none"])
    run(named)
    assert "resumed: 3 of 4 epochs are done\n" in capsys.readouterr().out


def run_on_full_disk(argv, points, size):
    """Run main where files do not grow beyond a size once it has come by some points."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    run_and_act(argv, points, limit)


@pytest.mark.parametrize(
    ("file", "points", "size"),
    [
        ("last.pth.tar", [At("open", ".last.pth.tar.*.tmp", 2)], 500_000),  # part of the second one
        ("run.json", [At("os.rename", "last.pth.tar"), At("open", ".run.json.*.tmp")], 0),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path, file, points, size):
    process = run_in_process(run_on_full_disk, small_flags(whole[0], tmp_path, *BASE), points, size)
    path = tmp_path / "tiny" / "run"
    reason = f"main.py: stopped: cannot read or write {path}/{file} (File too large)"
    assert process == (1, f"{reason}; last complete epoch saved; resume with: python main.py --resume {path}\n")
    assert not list(path.glob(".*.tmp"))
    assert torch.load(path / "last.pth.tar", weights_only=True)["training"]["epoch"] == 1
    assert size == 0 or History.read(path).reason.startswith("cannot read or write")
    run(["--resume", path])
    assert_same_run(path, whole[1])


def test_a_run_that_is_stopped_before_it_is_restored_stays_as_it_was(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole[1], path)
    before = {name: (path / name).read_bytes() for name in ("page.html", "run.json", "hypa.pkl")}
    argv = ["--resume", path, "--n_epochs", 4]
    ended = run_in_process(run_and_act, argv, [At("open", "4.bmp")], interrupt)
    assert ended == (143, f"main.py: stopped by SIGTERM; resume with: python main.py --resume {path}\n")
    assert {name: (path / name).read_bytes() for name in before} == before


def test_a_folder_that_goes_away_is_told(whole, tmp_path):
    path = tmp_path / "tiny" / "run"
    move = functools.partial(path.rename, tmp_path / "elsewhere")
    argv, point = small_flags(whole[0], tmp_path, *BASE), At("os.rename", "log_train_Class.csv")
    process = run_in_process(run_and_act, argv, [point], move)
    assert process.returncode == 1
    assert process.stderr.startswith(f"main.py: stopped: cannot read or write {path}/"), process.stderr
    assert process.stderr.endswith(" (No such file or directory); no epoch was complete: nothing is saved\n")
    assert process.stderr.count("\n") == 1
    assert not path.exists()


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(whole, tmp_path, capsys):
    argv = small_flags(whole[0], tmp_path, *ALONE, "--task_p", 1, 1, "--scheduler", "exp", "--gamma", 1e9, "--lr", 1e-5)
    error = refused(capsys, argv, code=1)
    path = tmp_path / "tiny" / "run" / "last.pth.tar"
    assert re.match(r"main\.py: stopped: the .*(loss is nan|not finite).*: training has diverged", error)
    epoch = re.search(rf"; diverged in epoch (\d); {path} holds the state before that epoch\n$", error)[1]
    stored = torch.load(path, weights_only=True)
    assert stored["training"]["epoch"] == int(epoch) > 0
    assert all(value.isfinite().all() for value in stored["state_dict"].values())


def spoil_logs(path):
    """Do to logs what spreadsheets, editors and scripts do."""
    for name, change in {
        "log_train_Class.csv": lambda text: "",
        "log_val_Class.csv": lambda text: "\ufeff" + text,
        "log_probe.csv": lambda text: text.replace(",", ";"),
    }.items():
        (path / name).write_text(change((path / name).read_text()))
    (path / "log_mining.csv").unlink()


def test_logs_that_are_spoilt_during_a_run_are_whole_at_its_end(whole, tmp_path):
    path, end_of_epoch_0 = tmp_path / "tiny" / "run", At("os.rename", "last.pth.tar")
    argv = small_flags(whole[0], tmp_path, *BASE)
    process = run_in_process(run_and_act, argv, [end_of_epoch_0], functools.partial(spoil_logs, path))
    assert process == (0, "")
    assert_same_run(path, whole[1])


def test_a_resumed_run_adds_its_time_and_drops_a_boards_later_steps(whole, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "tiny" / "run"
    killed_run(small_flags(whole[0], tmp_path, *BASE, "--tensorboard"), At("os.rename", "log_val_Class.csv", 2))
    before = torch.load(path / "last.pth.tar", weights_only=True)["training"]
    assert before["epoch"] == 1  # the board has epoch 1 too
    run(["--resume", path])
    after = torch.load(path / "last.pth.tar", weights_only=True)["training"]
    assert all(after["spent"][activity] > seconds > 0 for activity, seconds in before["spent"].items())
    assert after["seconds"] > before["seconds"]
    board = EventAccumulator(str(path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/Class Loss")] == [0, 1, 2]
    assert [event.step for event in board.Scalars("mining/Inertia")] == [0, 1, 2]


def test_runs_of_one_name_get_counters(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = [paths[-1] for paths in pool.map(lambda _: files.make_folder(tmp_path / "results" / "run"), range(16))]
    assert {path.name for path in made} == {"run", *(f"run_{i}" for i in range(1, 16))}


def test_a_folder_that_cannot_be_made_is_refused_early(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--save_path: cannot make the folder .*/file/below/run \(Not a directory\)"):
        files.make_folder(tmp_path / "file" / "below" / "run")
    assert os.listdir(tmp_path) == ["file"]


def test_replaced_file_keeps_the_old_one_on_failure(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as full, files.replaced_file(path, "w") as file:  # noqa: PT012
        file.write("half")
        raise OSError(28, "No space left on device")
    assert full.value.filename == str(path)
    assert (os.listdir(tmp_path), path.read_text()) == (["kept.txt"], "old")
    with files.replaced_file(path, "w") as file:
        file.write("new")
    (tmp_path / "plain.txt").touch()
    assert path.read_text() == "new"
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_the_time_left_is_that_of_the_epochs_of_this_start_and_of_the_minings_due(tmp_path, monkeypatch):
    flags = {"n_epochs": 10, "task_p": [1.0, 0.8], "cluster_update_freq": 3}
    run = Run(tmp_path, flags, defaults={}, provenance={}, stored=None, may_restart=False)
    run.history.rows["mining"] = [{"Before Epoch": epoch, "Time": 7.0} for epoch in (0, 4)]
    run.timing_start, run.stopwatch.seconds["mining"] = (100.0, 5, 20.0), 30.0
    monkeypatch.setattr(time, "monotonic", lambda: 170.0)
    assert run.seconds_left(5) is None
    assert run.seconds_left(7) == pytest.approx(60 / 2 * 3 + 7)  # 60 s of training in 2 epochs, 3 epochs, 1 mining
    assert run.seconds_left(8, 0.5) == pytest.approx(60 / 3.5 * 1.5 + 7)
    assert run.seconds_left(9) == pytest.approx(60 / 4)
