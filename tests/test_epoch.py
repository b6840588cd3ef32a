"""When a run is drawn, and the lines that the demo ends with."""

import itertools
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import At, killed_run, run, small_flags

from data.images import ImageSet
from report import epoch
from run.folder import Run


@pytest.mark.parametrize(
    ("of_background", "found"), [(0.8, "mined: the background"), (0.3, "mined: nothing clear, most the background")]
)
def test_the_demo_ends_with_what_was_learned_what_to_look_at_and_what_to_try(of_background, found):
    mined = {"Before Epoch": 4, "AMI class": 0.36, "AMI size": -0.01, "AMI background": of_background}
    rows = {"mining": [mined], "val": [{"Recall @ 1": 0.8}]}
    lines = epoch.lesson(rows, {"Recall @ 1": 0.25}, Path("my runs/demo")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["learned", "look at", "try next"]
    assert "is 0.80, before training 0.25" in lines[0]
    assert f"{found} (AMI of the labels with it {of_background:.2f}, with the class 0.36)" in lines[0]
    assert "my runs/demo/page.html" in lines[1]
    assert "demo --task_p 1 0 --adv_weights 0" in lines[2]
    assert shlex.split(lines[2])[-2:] == ["--compare", "my runs"]  # it can be pasted
    rows["mining"] = [{"Before Epoch": 4, "NMI class": 0.36, "NMI size": 0.5}]  # resumed from the version before
    assert "mined" not in epoch.lesson(rows, {"Recall @ 1": 0.25}, Path("demo")).splitlines()[0]


def reported(folder, share, epochs=2):
    """Return a Report of a run of 10 epochs whose drawing has taken a share of its time, and the file that it draws."""
    folder.mkdir(exist_ok=True)
    train = [{"Epochs": i, "Time": 1.0, "Class Loss": 0.5} for i in range(epochs)]
    val = [{"Epochs": i, "Time": 1.0, "NMI": 0.5, "Recall @ 1": 0.9 - 0.01 * i} for i in range(epochs)]
    rows = {"train": train, "val": val, "mining": [], "probe": []}
    drawn = {"rows": rows, "folder": folder, "minings": [], "n_epochs": 10, "writes": True, "can_go_on": True}
    told = {"best_indices": lambda: {"test": 0}, "share_of": lambda activity: share, "show": lambda *more: None}
    report = epoch.Report(SimpleNamespace(**drawn, **told), {}, [])
    report.write_page = lambda state, reason: (folder / state).write_text(reason)
    report.is_behind = False
    return report, folder / "InfoPlot_Class.svg"


@pytest.mark.parametrize(
    ("share", "epochs", "is_new_mining", "is_drawn"),
    [(0.01, 2, False, True), (0.2, 2, False, False), (0.2, 2, True, True), (0.2, 10, False, True)],
)
def test_plots_are_drawn_while_that_takes_little_time_after_a_mining_and_in_the_end(
    tmp_path, share, epochs, is_new_mining, is_drawn
):
    report, plot = reported(tmp_path / "run", share, epochs)
    report.is_new_mining = is_new_mining
    report.evaluated({}, {})
    assert plot.exists() == is_drawn


def test_what_cannot_be_drawn_is_a_warning_said_once(tmp_path, capsys):
    report, plot = reported(tmp_path / "run", share=0.0)
    report.run.minings, report.run.rows["probe"] = [np.zeros(4)], [{"Epochs": 0, "Time": 1.0, "Class by chance": "?"}]
    images = ImageSet([""] * 4, np.array([0, 0, 1, 1]), ["a", "b"], pixels=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    for name in ("InfoPlot_Class.svg", "mined_clusters.png", "sample_recoveries.png"):
        (tmp_path / "run" / name).mkdir()
    report.run.best_indices = lambda: {"test": 1}
    for before_epoch in (0, 1):
        report.mined(before_epoch, images, np.array([0, 1, 0, 1]), np.zeros(4))
        report.evaluated({"test": images}, {"test": dict.fromkeys(("Class", "Shared"), np.eye(4))})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].removeprefix(f"{tmp_path}/run/") for line in lines] == [
        "mined_clusters.png", "sample_recoveries.png", "InfoPlot_Class.svg", "InfoPlot_Probe.svg"
    ]  # fmt: skip
    assert lines[0].endswith("mined_clusters.png: cannot be written (Is a directory); training goes on without it")
    assert "cannot be drawn (ValueError: could not convert string to float" in lines[3]
    assert (tmp_path / "run" / "sample_recoveries_Shared.png").is_file()


def test_what_was_put_off_is_drawn_when_the_run_is_stopped(tmp_path):
    report, plot = reported(tmp_path / "run", share=0.2)
    with pytest.raises(OSError, match="No space left"), report:  # noqa: PT012
        report.evaluated({}, {})
        assert not plot.exists()
        raise OSError(28, "No space left")
    assert plot.exists()
    assert (tmp_path / "run" / "stopped").read_text() == "cannot read or write a file or stdout (No space left)"


def test_what_a_killed_run_had_drawn_of_later_epochs_is_drawn_anew_when_the_resumed_one_stops(class_folders, tmp_path):
    argv = small_flags(class_folders, tmp_path, "--eval_every", 1, "--n_epochs", 4)
    killed_run(argv, At("os.rename", "last.pth.tar", 3))  # after the evaluation of epoch 1 and a mining
    folder = tmp_path / "tiny" / "run"
    before = {name: (folder / name).stat().st_mtime_ns for name in ("InfoPlot_Class.svg", "mined_clusters.png")}
    assert (folder / "mined" / "before_epoch_0002.jpg").exists()
    killed_run(["--resume", folder], At("os.rename", "log_train_Class.csv", 2))  # on its way to epoch 1
    assert not (folder / "mined" / "before_epoch_0002.jpg").exists()
    assert (folder / "mined_clusters.png").stat().st_mtime_ns > before["mined_clusters.png"]
    assert run(["--resume", folder]) == folder
    assert (folder / "InfoPlot_Class.svg").stat().st_mtime_ns > before["InfoPlot_Class.svg"]


def test_a_clock_that_is_set_back_makes_no_duration_negative(tiny_run, monkeypatch, capsys):
    clock, hours = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() - 3600 * next(hours))  # an hour at every look
    folder = tiny_run("--n_epochs", 2, "--eval_every", 1)
    run(["--resume", folder, "--n_epochs", 3])
    times = {path.name: pd.read_csv(path)["Time"] for path in folder.glob("*.csv")}
    assert all((seconds >= 0).all() for seconds in times.values())
    stored = torch.load(folder / "last.pth.tar", weights_only=True)["training"]
    assert stored["seconds"] >= times["log_train_Class.csv"].sum()
    assert min(stored["spent"].values()) >= 0
    lines = re.findall(r"^epoch \d .*  (\S+) s, (\S+) left$", capsys.readouterr().out, re.M)
    assert len(lines) == 3
    assert not [line for line in lines if "-" in "".join(line)]


def test_the_time_left_is_that_of_the_epochs_that_this_process_has_trained(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 160.0)
    resumed = SimpleNamespace(training_since=(100.0, 5), n_epochs=10)
    assert Run.seconds_left(resumed, 7) == pytest.approx(90)
    assert Run.seconds_left(resumed, 7, 0.5) == pytest.approx(60)
    assert Run.seconds_left(resumed, 5) is None
    assert Run.seconds_left(SimpleNamespace(training_since=None, n_epochs=10), 3) is None
