"""Runs that are killed, told to stop, or cannot write, and how they go on."""

import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal, run, run_in_process, write_class_folders

import auxiliaries
import evaluate
import main


def flags_of(source, folder, *more):
    """Return the command line of a small run that mines after every epoch."""
    base = "--dataset tiny --arch googlenet --img_size 32 --bs 8 --cs_per_bs 2 2 --n_epochs 3 --kernels 0 --lr 1e-3 "
    base += "--adv_weights 50 "
    base += "--shared_num_classes 3 --cluster_update_freq 0 --not_pretrained --scheduler exp --gamma 0.9 --savename run"
    return [*base.split(), "--source_path", str(source), "--save_path", str(folder), *map(str, more)]


def be_killed(argv, owner, function, call, action):
    """Run main, and send this process or a worker a signal at the call-th call of a function of a module or class."""
    owner = pkgutil.resolve_name(owner)
    original, calls, first_process = getattr(owner, function), 0, os.getpid()

    def spy(*args, **kwargs):
        nonlocal calls
        if action == "SIGKILL of a worker" and os.getpid() == first_process:
            return original(*args, **kwargs)
        calls += 1
        if calls == call:
            if action == "half a file":
                with auxiliaries.replaced_file(args[0]) as file:
                    file.write(b"half of it")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), getattr(signal, action.split()[0]))
        return original(*args, **kwargs)

    setattr(owner, function, spy)
    run(argv)


def killed_run(argv, owner, function, call, action="SIGKILL"):
    """Run main in a process of its own that is sent a signal at the call-th call of a function."""
    return run_in_process(be_killed, argv, owner, function, call, action)


def assert_same_run(one, other):
    """Compare logs but for times, and the weights and all else that training depends on, bit for bit."""
    for name in main.LOGS:
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            tables = [pd.read_csv(folder / name, dtype=str).drop(columns="Time") for folder in (one, other)]
            pd.testing.assert_frame_equal(*tables)
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        stored = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        for content in stored:
            for name in ("seconds", "spent"):
                content.get("training", {}).pop(name, None)
            for row in [row for rows in content["progress"].values() if isinstance(rows, list) for row in rows]:
                row.pop("Time")
            for flag in ("savename", "save_path", "n_epochs", "kernels"):
                content["flags"].pop(flag)
        assert_equal(*stored, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (source path, run folder)."""
    folder = tmp_path_factory.mktemp("whole")
    write_class_folders(folder / "source" / "tiny")
    return folder / "source", run(flags_of(folder / "source", folder))


@pytest.mark.parametrize(
    ("owner", "function", "call", "action"),
    [
        ("losses:MarginLoss", "forward", 5, "SIGKILL"),  # in training, of epoch 1
        ("evaluate", "score_set", 3, "SIGKILL"),  # in the evaluation of epoch 1, after its training row was written
        ("auxiliaries", "kmeans", 6, "SIGKILL"),  # in the mining after epoch 1
        ("auxiliaries", "save_checkpoint", 5, "half a file"),  # while last.pth.tar is written
        ("auxiliaries", "draw_progress", 2, "SIGKILL"),  # after the best checkpoint of epoch 1, before last.pth.tar
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, owner, function, call, action):
    source, expected = whole
    process = killed_run(flags_of(source, tmp_path), owner, function, call, action)
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "tiny" / "run"
    with open(folder / "log_train_Class.csv", "a") as file:
        file.write("7,torn li")
    assert run(["--resume", folder]) == folder
    assert_same_run(folder, expected)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--losses", "proxynca", "triplet", "--sampling", "distance", "semihard"],
        ["--losses", "triplet", "proxynca", "--adversarial", "Shared-Class", "Class-Shared", "--adv_weights", 5, 9],
        ["--sampling", "random", "semihard", "--nu", 0.1, 0.1, "--task_p", 0.7, 0.6, "--amp", "fp16"],
        ["--task_p", 1, 0, "--adv_weights", 0, "--scheduler", "none", "--eval_every", 2],
        ["--cluster_update_freq", 1, "--bn", "frozen", "--kernels", 2, "--cache", "ram", "--eval_shared"],
    ],
)
def test_all_that_has_state_is_resumed(whole, tmp_path, flags, monkeypatch):
    source, _ = whole
    expected = run(flags_of(source, tmp_path / "whole", *flags))
    original, calls = main.train_one_epoch, []

    def stop_in_epoch_2(*args):
        calls.append(args)
        if len(calls) == 2:
            raise auxiliaries.Interrupted(signal.SIGTERM, "")
        return original(*args)

    monkeypatch.setattr(main, "train_one_epoch", stop_in_epoch_2)
    with pytest.raises(SystemExit):
        run(flags_of(source, tmp_path / "cut", *flags))
    monkeypatch.undo()
    torch.rand(3), random.random()  # another process would have other states
    folder = run(["--resume", tmp_path / "cut" / "tiny" / "run"])
    assert_same_run(folder, expected)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_stop_with_one_line_and_a_command_to_go_on(whole, tmp_path, name, code):
    source, expected = whole
    argv = flags_of(source, tmp_path / "with space", "--kernels", 2)
    process = killed_run(argv, "losses:MarginLoss", "forward", 5, name)
    assert process.returncode == code
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"main.py: stopped by {name}: the last complete epoch is safe; go on with: ")
    folder = tmp_path / "with space" / "tiny" / "run"
    command = process.stderr.split("go on with: ")[1].strip()
    assert command == f"python main.py --resume '{folder}'"
    workers = subprocess.run(["pgrep", "--session", str(process.session)], capture_output=True, text=True)
    assert (workers.returncode, workers.stdout) == (1, "")  # none


def test_a_signal_to_all_processes_of_a_run_stops_with_one_line(whole, tmp_path):
    source, _ = whole
    argv = flags_of(source, tmp_path, "--kernels", 2, "--n_epochs", 500)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "tiny" / "run" / "log_val_Class.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert error.startswith("main.py: stopped by SIGTERM: the last complete epoch is safe; go on with: python main.py ")
    assert error.count("\n") == 1, error


def test_a_worker_that_dies_is_told_with_how_to_go_on(whole, tmp_path):
    # a worker of the training loader lives long enough to be asked for an 11th image, in epoch 1
    argv = flags_of(whole[0], tmp_path, "--kernels", 1)
    process = killed_run(argv, "datasets:ImageDataset", "__getitem__", 11, "SIGKILL of a worker")
    assert process.returncode == 1
    assert process.stderr.startswith("main.py: stopped: DataLoader worker (pid")
    assert "go on with: python main.py --resume" in process.stderr
    assert process.stderr.count("\n") == 1


def test_an_unforeseen_error_ends_the_process_while_workers_live(tmp_path):
    """Its traceback keeps the loader alive, whose workers the interpreter tells SIGTERM and then waits for."""
    write_class_folders(tmp_path / "tiny")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import datasets\n"
        f"images, _ = datasets.load_dataset('tiny', {str(tmp_path)!r})\n"
        "sampler = datasets.ClassBalancedBatchSampler(4, 2, seed=(1,))\n"
        "sampler.set_epoch(0, images.labels, 8)\n"
        "dataset = datasets.ImageDataset(images, datasets.train_transform(32, flip=True))\n"
        "loader = datasets.make_loader(dataset, batch_sampler=sampler, n_workers=2, pin_memory=False)\n"
        "for batch in loader:\n"
        "    raise KeyError('a bug')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert process.stderr.endswith("KeyError: 'a bug'\n")


def test_file_systems_without_locks_are_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(auxiliaries.fcntl, "lockf", refuse)
    auxiliaries.lock_run_folder(tmp_path).close()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_best_checkpoint_waits_for_its_epoch_to_be_safe(tmp_path):
    (tmp_path / "checkpoint.pth.tar").write_text("of epoch 0")
    (tmp_path / "checkpoint.pth.tar.3.next").write_text("of epoch 2, which will be trained again")
    auxiliaries.publish_best(tmp_path, 2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of epoch 0"]
    (tmp_path / "checkpoint.pth.tar.3.next").write_text("of epoch 2")
    auxiliaries.publish_best(tmp_path, 3)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of epoch 2"]


def test_a_signal_before_anything_is_stored(whole, tmp_path):
    source, _ = whole
    process = killed_run(flags_of(source, tmp_path), "evaluate", "score_set", 1, "SIGTERM")
    assert (process.returncode, process.stderr) == (143, "main.py: stopped by SIGTERM: nothing had been stored yet\n")


def test_a_finished_run_says_so_and_more_epochs_go_on(whole, tmp_path, capsys):
    source, expected = whole
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    before = (folder / "last.pth.tar").stat().st_mtime_ns
    run(["--resume", folder])
    assert f"{folder} is finished: 3 epochs are done" in capsys.readouterr().out
    assert (folder / "last.pth.tar").stat().st_mtime_ns == before
    run(["--resume", folder, "--n_epochs", 4, "--kernels", 1])
    assert_same_run(folder, run(flags_of(source, tmp_path, "--n_epochs", 4, "--kernels", 1)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1e-3"], "--lr: a resumed run keeps its flags"),
        (["--not_pretrained"], "--not_pretrained: a resumed run keeps its flags"),
        (["--n_epochs", "2"], "--n_epochs 2: the run has 3; give at least as many"),
        (["--source_path", "/nowhere"], "no images of --dataset tiny in --source_path /nowhere"),
    ],
)
def test_flags_that_change_the_result_are_refused(whole, flags, message, capsys):
    assert message in refused(capsys, "--resume", whole[1], *flags)


def refused(capsys, *argv):
    """Run main, which is to stop with exit code 2 and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("main.py: error: ")
    assert error.count("\n") == 1
    return error


def test_folders_that_hold_nothing_to_resume(whole, tmp_path, capsys):
    assert "no such run folder" in refused(capsys, "--resume", tmp_path / "absent")
    (tmp_path / "run").mkdir()
    assert "stopped before it had anything to resume" in refused(capsys, "--resume", tmp_path / "run")
    source, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(source, tmp_path / "source")
    next((tmp_path / "source" / "tiny" / "images" / "class_00").iterdir()).unlink()
    argv = ["--resume", tmp_path / "copy", "--source_path", tmp_path / "source"]
    assert "the run had 10 training images, now there are 9" in refused(capsys, *argv)


def test_damaged_checkpoints_are_refused_or_whole(whole, tmp_path, capsys, monkeypatch):
    """200 variants: each is refused with one line, or loads a file whose checksums are right."""
    good = (whole[1] / "last.pth.tar").read_bytes()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pth.tar"
    monkeypatch.setattr(main, "train_one_epoch", lambda *_: pytest.fail("nothing is left to train"))
    rng = random.Random(0)
    outcomes = {"refused": 0, "whole": 0}
    for i in range(100):
        damaged = bytearray(good)
        if i % 2:
            del damaged[rng.randrange(len(good)) :]
        else:
            place = rng.choice([rng.randrange(len(good)), rng.randrange(4000), len(good) - 1 - rng.randrange(20000)])
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        for command in (["main.py", "--resume", path.parent], ["evaluate.py", path]):
            outcomes[outcome(command, capsys, path)] += 1
    assert sum(outcomes.values()) == 200
    assert outcomes["refused"] > 150, outcomes


def outcome(command, capsys, path):
    """Run a command on a checkpoint; return whether it was refused, with one line, or went through."""
    capsys.readouterr()
    try:
        if command[0] == "main.py":
            run(command[1:])
        else:
            run(command[1:], evaluate)
    except SystemExit as stop:
        code = stop.code
    else:
        return "whole"
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith(f"{command[0]}: error: "), error
    assert error.count("\n") == 1, error
    return "refused"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("training",), None),
        (("training", "spent"), {"loading": 1.0}),
        (("progress", "probe_rows"), []),
        (("progress", "shared_rows"), [{"Epochs": 0}]),
        (("training", "epoch"), "1"),
        (("training", "epoch"), 1),
        (("training", "optimizer"), {}),
        (("training", "optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("training", "optimizer", "param_groups", 0, "lr"), "x"),
        (("training", "scheduler", "step"), 3),
        (("progress", "shared_labels"), torch.zeros(5, dtype=torch.int64)),
        (("progress", "shared_labels"), None),
        (("progress", "initial_scores"), {}),
        (("progress", "val_rows"), [{}]),
        (("training", "terms"), {}),
        (("training", "scheduler"), [1]),
        (("training", "random"), {"python": 3}),
        (("training", "random", "torch"), torch.zeros(3)),
        (("progress", "train_rows"), 7),
        (("progress", "shared_labels"), torch.full((10,), 99)),
        (("progress", "shared_labels"), torch.zeros(10)),
        (("flags", "lr"), "fast"),
        (("flags", "bs"), [8, 8]),
        (("flags", "embed_sizes"), [64, 64]),
        (("flags", "dataset"), 3.5),
        (("flags", "unheard_of"), 1),
        (("state_dict", "heads.Class.bias"), torch.zeros(3)),
    ],
)
def test_checkpoints_with_wrong_values_are_refused(whole, tmp_path, capsys, place, value):
    content = torch.load(whole[1] / "last.pth.tar", weights_only=True)
    content["training"]["epoch"] = 2  # so that there is something to go on with
    for name in ("train_rows", "val_rows", "probe_rows"):
        content["progress"][name].pop()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pth.tar")
    refused(capsys, "--resume", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"last.pth.tar", ".lock"}


def test_pickled_objects_are_not_executed(whole, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    content = torch.load(whole[1] / "last.pth.tar", weights_only=True)
    (tmp_path / "run").mkdir()
    torch.save(content | {"training": Bomb()}, tmp_path / "run" / "last.pth.tar")
    assert "pickled object" in refused(capsys, "--resume", tmp_path / "run")
    assert not (tmp_path / "exploded").exists()


def test_only_one_process_resumes(whole, tmp_path):
    source, _ = whole
    process = killed_run(flags_of(source, tmp_path), "losses:MarginLoss", "forward", 3)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "tiny" / "run"
    assert "process" in (folder / ".lock").read_text()  # of a dead process: no hindrance
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_in_process(run, ["--resume", folder]), range(2)))
    assert sorted(process.returncode for process in both) == [0, 2], both
    (refusal,) = [process.stderr for process in both if process.returncode == 2]
    assert "is being trained by process" in refusal
    assert refusal.count("\n") == 1
    assert pd.read_csv(folder / "log_train_Class.csv")["Epochs"].tolist() == [0, 1, 2]


def run_on_full_disk(argv):
    """Run main where no file grows over a megabyte."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    run(argv)


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path):
    """The limit on file sizes lets the logs grow but no checkpoint be written."""
    source, expected = whole
    process = killed_run(flags_of(source, tmp_path), "losses:MarginLoss", "forward", 5)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "tiny" / "run"
    good = (folder / "last.pth.tar").read_bytes()
    process = run_in_process(run_on_full_disk, ["--resume", folder])
    assert process.returncode == 1
    assert process.stderr.startswith("main.py: stopped: cannot read or write ")
    assert "File too large" in process.stderr
    assert process.stderr.count("\n") == 1
    assert (folder / "last.pth.tar").read_bytes() == good
    run(["--resume", folder])
    assert_same_run(folder, expected)


@pytest.mark.parametrize("action", ["delete", "no disk"])
def test_a_folder_that_goes_away_or_cannot_be_written_is_told(whole, tmp_path, action, monkeypatch, capsys):
    source, _ = whole
    folder, original = tmp_path / "tiny" / "run", main.train_one_epoch

    def spoil_after(*args):
        averages = original(*args)
        if action == "delete":
            shutil.rmtree(folder)
        else:
            monkeypatch.setattr(auxiliaries, "append_row", read_only)
        return averages

    def read_only(path, row):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(main, "train_one_epoch", spoil_after)
    with pytest.raises(SystemExit) as stop:
        run(flags_of(source, tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith(f"main.py: stopped: cannot read or write {folder}/log_train_Class.csv")
    assert error.count("\n") == 1
    if action == "no disk":
        assert torch.load(folder / "last.pth.tar", weights_only=True)["training"]["epoch"] == 0


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(whole, tmp_path, capsys, monkeypatch):
    source, _ = whole
    original, calls = main.losses.MarginLoss.forward, []

    def diverge(self, *args):
        calls.append(1)
        return original(self, *args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(main.losses.MarginLoss, "forward", diverge)
    with pytest.raises(SystemExit) as stop:
        run(flags_of(source, tmp_path, "--task_p", 1, 1))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "the Shared loss is nan in epoch 1 at iteration 0" in error
    stored = torch.load(tmp_path / "tiny" / "run" / "last.pth.tar", weights_only=True)
    assert stored["training"]["epoch"] == 1
    assert all(value.isfinite().all() for value in stored["state_dict"].values())


def test_a_name_goes_on_where_its_run_stopped(whole, tmp_path, capsys):
    source, expected = whole
    named = flags_of(source, tmp_path, "--go_on")
    shutil.copytree(expected, tmp_path / "tiny" / "run_7")  # of another name that looks like it
    content = torch.load(expected / "last.pth.tar", weights_only=True)
    content["flags"] |= {"savename": "run_7", "lr": 0.5}
    torch.save(content, tmp_path / "tiny" / "run_7" / "last.pth.tar")
    stopped_early = tmp_path / "tiny" / "run"
    stopped_early.mkdir(parents=True)  # before anything was stored: it stays as it is
    process = killed_run(named, "losses:MarginLoss", "forward", 5)
    assert process.returncode == -signal.SIGKILL
    for flags, message in [
        (["--lr", "1e-4"], "run_1 is a run with --lr 0.001; give these, or another --savename or --save_path"),
        (["--n_epochs", "2"], "run_1 is a run with --n_epochs 3"),
    ]:
        assert message in refused(capsys, *named, *flags)
    assert run([*named, "--kernels", 1]) == tmp_path / "tiny" / "run_1"
    assert_same_run(tmp_path / "tiny" / "run_1", expected)
    assert not list(stopped_early.iterdir())
    capsys.readouterr()
    run(named)
    assert "run_1 is finished: 3 epochs are done" in capsys.readouterr().out
    assert len(list((tmp_path / "tiny").iterdir())) == 3
    assert "--go_on: give the name" in refused(capsys, "--dataset", "tiny", "--go_on")


def test_a_resumed_run_adds_its_time_and_drops_a_boards_later_steps(whole, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source, _ = whole
    original = auxiliaries.publish_best

    def stop_after_mining(folder, epoch):  # last.pth.tar holds epoch 1, the board epoch 2 and a mining after it
        if epoch == 2:
            shutil.copy(tmp_path / "last", folder / "last.pth.tar")
            raise auxiliaries.Interrupted(signal.SIGTERM, "")
        shutil.copy(folder / "last.pth.tar", tmp_path / "last")
        original(folder, epoch)

    monkeypatch.setattr(auxiliaries, "publish_best", stop_after_mining)
    with pytest.raises(SystemExit):
        run(flags_of(source, tmp_path, "--tensorboard"))
    monkeypatch.undo()
    spent = torch.load(tmp_path / "last", weights_only=True)["training"]["spent"]
    assert all(spent[activity] > 0 for activity in auxiliaries.ACTIVITIES)
    folder = run(["--resume", tmp_path / "tiny" / "run"])
    after = torch.load(folder / "last.pth.tar", weights_only=True)["training"]["spent"]
    assert all(after[activity] > spent[activity] for activity in auxiliaries.ACTIVITIES)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/Class Loss")] == [0, 1, 2]
    assert [event.step for event in board.Scalars("mining/Inertia")] == [0, 1, 2, 3]


def test_two_runs_of_one_name_get_two_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: auxiliaries.make_run_folder(tmp_path, "run"), range(16)))
    assert len(set(folders)) == 16


def test_random_states_are_plain_and_restored():
    cpu = torch.device("cpu")
    before = auxiliaries.random_states(cpu)
    assert set(json.loads(json.dumps({name: before[name] for name in ("python", "numpy")}))) == {"python", "numpy"}
    drawn = random.random(), torch.rand(2).tolist()
    auxiliaries.set_random_states(before, cpu)
    assert (random.random(), torch.rand(2).tolist()) == drawn
