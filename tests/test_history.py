"""What a run has logged: rows, scores and files, and what is read back."""

import json
import pickle

import pandas as pd
import pytest

from run import history
from run.history import History
from support.errors import InputError

FLAGS = {"dataset": "vehicle_id", "n_epochs": 5, "task_p": [1.0, 0.8], "weights": None, "started_from": "nothing"}
ROWS = [
    {"Epochs": 0, "Time": 1.0, "Set 1 NMI": 0.5, "Set 1 Recall @ 1": 0.3, "Val Recall @ 1": 0.1},
    {"Epochs": 2, "Time": 1.0, "Set 1 NMI": None, "Set 1 Recall @ 1": 0.6, "Val Recall @ 1": 0.4},
    {"Epochs": 4, "Time": 1.0, "Set 1 NMI": 0.1 + 0.35, "Set 1 Recall @ 1": 0.6, "Val Recall @ 1": 0.5},
]


def test_columns_are_told_apart_by_their_test_set():
    assert history.test_sets_of(ROWS[0]) == ["Set 1", "Val"]
    assert history.scores_of(ROWS[0], "Set 1") == {"NMI": 0.5, "Recall @ 1": 0.3}
    alone = {"Epochs": 0, "Time": 1.0, "Recall @ 1": 0.5, "mAP @ R": 0.2, "Val Recall @ 1": 0.1}
    assert history.test_sets_of(alone) == ["test", "Val"]
    assert history.scores_of(alone, "test") == {"Recall @ 1": 0.5, "mAP @ R": 0.2}
    assert [history.column(name, "NMI") for name in ("test", "Set 1")] == ["NMI", "Set 1 NMI"]
    assert history.row_text(ROWS[1]) == "Set 1 Recall @ 1 0.6000  Val Recall @ 1 0.4000"


def test_the_best_epoch_is_the_first_with_the_highest_recall_of_the_classes_it_is_selected_by(tmp_path):
    run = History(tmp_path, dict(FLAGS), rows={"val": ROWS})
    assert (run.best_index("Set 1"), run.improved_sets()) == (1, [])
    run.flags["select"] = "val"
    assert (run.best_index("Set 1"), run.improved_sets()) == (2, ["Set 1"])


def test_the_summary_compares_best_and_last_with_before_training_and_the_paper(tmp_path):
    run = History(tmp_path, dict(FLAGS))
    run.rows["val"], run.initial_scores = ROWS, {"Set 1 NMI": 0.1, "Set 1 Recall @ 1": 0.05}
    run.spent, run.seconds, run.peak_memory = {"training": 2.0}, 3.0, {"process": 2.5e9}
    lines = [" ".join(line.split()) for line in run.summary().splitlines()]
    assert lines == [
        "score best epoch last before training paper best - paper",
        "Set 1 Recall @ 1 0.6000 2 0.6000 0.0500 0.8690 -0.2690",
        "Set 1 NMI 0.5000 0 0.4500 0.1000 - -",
        "Val Recall @ 1 0.5000 4 0.5000 - - -",
        "paper: MIC with margin loss, ResNet50 (arXiv 1909.11574)",
        "started from: nothing",
        "epochs done: 5",
        "seconds: 3.0",
        "of these: training 2.0, all else 1.0",
        "peak memory: process 2.50 GB",
        f"run folder: {tmp_path}",
    ]
    run.flags["dataset"] = "mine"
    assert "paper" not in run.summary()


def written_run(folder):
    """Write a run with some rows; return its history."""
    run = History(folder, dict(FLAGS), {"lr": 1e-5}, [{"command": "python main.py"}])
    run.rows |= {"val": ROWS, "train": [{"Epochs": 0, "Time": 1.0, "Class Loss": 0.1 + 0.2, "Shared Loss": None}]}
    run.rows["mining"] = [{"Before Epoch": 0, "Time": 0.5, "Clusters": 3, "ARI with previous": None}]
    run.epoch, run.seconds, run.spent, run.initial_scores = 1, 2.0, {"training": 1.5}, {"Set 1 NMI": None}
    run.write()
    return run


def test_what_is_read_is_what_was_written(tmp_path):
    run = written_run(tmp_path)
    assert vars(History.read(tmp_path)) == vars(run)
    assert pickle.loads((tmp_path / "hypa.pkl").read_bytes()) == FLAGS | {"provenance": run.provenance}
    text = (tmp_path / "Parameter_Info.txt").read_text()
    assert "task_p            1.0 0.8\n" in text
    assert "start 1, command  python main.py\n" in text
    assert pd.read_csv(tmp_path / "log_val_Class.csv")["Set 1 NMI"].isna().tolist() == [False, True, False]
    (tmp_path / "run.json").unlink()  # as runs of earlier versions
    assert (History.read(tmp_path).epoch, History.read(tmp_path).state) == (1, "stopped")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hypa.pkl", b"no pickle"),
        ("hypa.pkl", pickle.dumps({"dataset": "a"})),
        ("log_val_Class.csv", b"Epochs,Recall @ 1\nzero,one\n"),
        ("log_val_Class.csv", b"Epochs,Time\n0,1\n"),
        ("log_val_Class.csv", b"Epochs,Time,Recall @ 1\n0,1,\n"),
        ("log_train_Class.csv", b""),
        ("run.json", b"{"),
        ("run.json", json.dumps({"state": 1}).encode()),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content):
    written_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}: {name} cannot be read") as error:
        History.read(tmp_path)
    assert "\n" not in str(error.value)
