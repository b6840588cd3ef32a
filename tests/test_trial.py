"""The trial of a run's flags."""

import re
import time
from pathlib import Path

import pytest
import torch
from conftest import At, killed_run, refused, run, small_flags

from run import trial
from support import output

SECONDS = {"start": 5.0, "training": 0.01, "embedding": 0.001, "mining": 2.0, "evaluation": 4.0, "storing": 0.5}
SECONDS |= {"drawing": 3.0}
COUNTS = {"epochs": 10, "trained": 9_000, "evaluations": 5, "minings": 3, "train": 1_000, "test": 2_000}


def test_a_whole_run_is_the_sum_of_its_parts():
    assert trial.seconds_by_activity(SECONDS, COUNTS) == {
        "training": pytest.approx(90),
        "evaluation": pytest.approx(6 * (2 + 4)),  # one of them before training
        "mining": pytest.approx(3 * (1 + 2)),
        "all else": pytest.approx(5 + 11 * 0.5),
        "drawing": pytest.approx(5 * 3),
    }
    often = trial.seconds_by_activity(SECONDS, COUNTS | {"evaluations": 100, "minings": 0})
    assert often["drawing"] == pytest.approx(0.03 * (90 + 101 * 6 + 10.5) + 3)  # as a share of the run


def test_the_forecast_says_speeds_memory_disk_and_time(tmp_path):
    (tmp_path / "mined").mkdir()
    (tmp_path / "mined" / "before_epoch_0000.jpg").write_bytes(bytes(20_000_000))
    (tmp_path / "last.pth.tar").write_bytes(bytes(100_000_000))
    lines = trial.report_lines(SECONDS, COUNTS, tmp_path, torch.device("cpu"))
    assert lines[:4] == [
        "training: 100 images/s, 900 images an epoch",
        "embedding: 1,000 images/s",
        "mining: 2.0 s, embedding 1,000 images apart",
        "evaluation: 4.0 s, embedding 2,000 images apart; drawing 3.0 s",
    ]
    assert re.fullmatch(r"peak memory: this process \d\.\d\d GB", lines[4])
    assert lines[5:] == [
        "disk: 0.16 GB for the run folder",  # two more minings
        "whole run: 0:02:40 for 10 epochs (training 0:01:30, evaluation 0:00:36, mining 0:00:09, all else 0:00:10, "
        "drawing 0:00:15)",
    ]


def test_the_rate_has_settled_when_two_looks_in_succession_agree(monkeypatch, capsys):
    now = iter([0.0, 9.0, 11.0, 12.0, 13.05])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timer = trial.StepTimer()
    for _ in range(3):
        timer.update(10)
        timer.show({})
    timer.update(10)
    with pytest.raises(trial.Settled):
        timer.show({})
    assert timer.seconds == pytest.approx([0.9, 0.2, 0.1, 0.105])
    assert capsys.readouterr().out.count("images/s in training") == 4


@pytest.mark.parametrize("more", [[], ["--task_p", 1, 0, "--adv_weights", 0, "--eval_shared"]])
def test_a_trial_tells_what_the_run_will_take_and_leaves_nothing(class_folders, tmp_path, capsys, more):
    path = run(small_flags(class_folders, tmp_path / "results", "--trial", *more))
    printed = capsys.readouterr().out
    assert re.search(r"\nwhole run: 0:\d\d:\d\d for 3 epochs \(training ", printed)
    assert not (tmp_path / "results").exists()
    assert path == Path(tmp_path, "results", "tiny", ".trial_run")


def test_a_trial_that_is_killed_leaves_no_run(class_folders, tmp_path, capsys):
    argv = small_flags(class_folders, tmp_path / "results", "--trial")
    killed_run(argv, At("os.rename", "last.pth.tar"))
    assert [path.name for path in (tmp_path / "results" / "tiny").iterdir()] == [".trial_run"]
    folder = run(small_flags(class_folders, tmp_path / "results", "--go_on"))
    assert folder.name == "run"
    assert "resumed" not in capsys.readouterr().out


def test_a_slow_trial_without_a_terminal_goes_on(class_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "INTERVAL", 0)
    run(small_flags(class_folders, tmp_path, "--trial"))
    assert "\nwhole run: " in capsys.readouterr().out


def test_a_trial_is_of_a_new_run(class_folders, tmp_path, capsys):
    error = refused(capsys, small_flags(class_folders, tmp_path, "--trial", "--go_on"))
    assert "--go_on: not allowed with argument --trial" in error
    error = refused(capsys, ["--trial", "--resume", tmp_path])
    assert "--resume: not allowed with argument --trial" in error
    images = class_folders / "tiny" / "images"
    (images / "class_00" / "0.jpg").write_bytes(b"broken")
    assert "cannot decode the image" in refused(capsys, small_flags(class_folders, tmp_path / "results", "--trial"))
    assert not (tmp_path / "results").exists()
