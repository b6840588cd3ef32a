"""Run folder, logs, pictures, checkpoints and k-means."""

import os
import pickle
import random
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import auxiliaries


def test_seeds_repeat_all_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    auxiliaries.set_seeds(3)
    first = draw()
    auxiliaries.set_seeds(3)
    assert draw() == first
    auxiliaries.set_seeds(4)
    assert all(a != b for a, b in zip(draw(), first))


def test_run_folders_never_collide(tmp_path):
    names = [auxiliaries.make_run_folder(tmp_path / "results", "run").name for _ in range(3)]
    assert names == ["run", "run_1", "run_2"]


def test_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(auxiliaries.RunFolderError, match="--save_path"):
        auxiliaries.make_run_folder(tmp_path / "file", "run")


def test_run_folder_that_cannot_be_made_is_refused_early(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(auxiliaries.RunFolderError, match="is a file"):
        auxiliaries.check_run_folder(tmp_path / "file" / "below", "run")
    with pytest.raises(auxiliaries.RunFolderError, match="longer than 200 bytes"):
        auxiliaries.check_run_folder(tmp_path, "x" * 201)
    with pytest.raises(auxiliaries.RunFolderError, match="--save_path"):
        auxiliaries.check_run_folder(tmp_path / ("x" * 300), "run")
    auxiliaries.check_run_folder(tmp_path / "new" / "deeper", "run")
    assert os.listdir(tmp_path) == ["file"]


def test_replaced_file_keeps_the_old_one_on_failure(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), auxiliaries.replaced_file(path, "w") as file:  # noqa: PT012
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]
    with auxiliaries.replaced_file(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~auxiliaries.current_umask()


def test_flags_are_written_for_programs_and_people(tmp_path):
    flags = {"dataset": "shapes", "task_p": [1.0, 0.8], "weights": None}
    auxiliaries.write_flags(tmp_path, flags)
    assert pickle.loads((tmp_path / "hypa.pkl").read_bytes()) == flags
    assert (tmp_path / "Parameter_Info.txt").read_text() == "dataset  shapes\ntask_p   1.0 0.8\nweights  None\n"


def test_rows_are_appended_by_column_name(tmp_path):
    path = tmp_path / "log.csv"
    auxiliaries.append_row(path, {"Epochs": 0, "Train Loss": 1 / 3, "Shared Loss": None})
    assert len(pd.read_csv(path)) == 1
    auxiliaries.append_row(path, {"Shared Loss": 2.0, "Train Loss": 0.1, "Epochs": 1})
    table = pd.read_csv(path)
    assert table.columns.tolist() == ["Epochs", "Train Loss", "Shared Loss"]
    assert table["Train Loss"].tolist() == [1 / 3, 0.1]
    assert np.isnan(table["Shared Loss"][0])
    with pytest.raises(ValueError, match="other"):
        auxiliaries.append_row(path, {"Epochs": 2, "other": 1})


ROWS = [
    {"Epochs": 0, "Time": 1.0, "NMI": 0.5, "Recall @ 1": 0.3},
    {"Epochs": 2, "Time": 1.0, "NMI": 0.4, "Recall @ 1": 0.6},
    {"Epochs": 4, "Time": 1.0, "NMI": 0.45, "Recall @ 1": 0.2},
]


def test_summary_holds_best_last_and_initial_scores(tmp_path):
    auxiliaries.write_summary(tmp_path / "summary.txt", {"NMI": 0.1, "Recall @ 1": 0.05}, ROWS, seconds=12.34)
    lines = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert lines[1] == ["NMI", "0.5000", "0", "0.4500", "0.1000"]
    assert lines[2] == ["Recall", "@", "1", "0.6000", "2", "0.2000", "0.0500"]
    assert lines[3:] == [["epochs", "done:", "5"], ["seconds:", "12.3"]]


def test_checkpoint_is_plain_data(tmp_path):
    network = torch.nn.Linear(2, 2)
    progress = {"epoch": 3, "shared_labels": torch.arange(4), "val_rows": ROWS}
    auxiliaries.save_checkpoint(tmp_path / "checkpoint.pth.tar", network, {"arch": "resnet50"}, progress)
    stored = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert stored["flags"] == {"arch": "resnet50"}
    assert stored["progress"]["val_rows"] == ROWS
    assert (stored["state_dict"]["weight"] == network.weight).all()


def test_progress_plot_shows_losses_and_scores(tmp_path):
    train_rows = [{"Epochs": i, "Time": 1.0, "Train Loss": 1.0 / (i + 1), "Shared Loss": None} for i in range(5)]
    auxiliaries.draw_progress(tmp_path / "plot.svg", train_rows, ROWS, title="a run")
    text = "".join(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())
    comments = (tmp_path / "plot.svg").read_text()
    for label in ("Train Loss", "Recall @ 1", "NMI", "best epoch 2"):
        assert label in text or f"<!-- {label}" in comments or label in comments
    assert "<!-- Shared Loss -->" not in comments


def test_recoveries_show_queries_and_neighbours(tmp_path):
    embeddings = np.array([[0.0], [0.1], [5.0], [5.1]], dtype=np.float32)
    labels = np.array([0, 1, 2, 2])
    read_indices = []

    def read(index):
        read_indices.append(int(index))
        return np.full((8, 8, 3), 60 * index, dtype=np.uint8)

    auxiliaries.draw_recoveries(
        tmp_path / "sheet.png", read, embeddings, labels, ["a", "b", "a very long name of a class"], n_neighbours=2
    )
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 100
        assert picture.height > picture.width
    assert read_indices == [0, 1, 2, 3, 1, 2, 0, 2, 3, 1, 2, 1]


def test_kmeans_uses_all_points():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(4, 8))
    truth = np.repeat(np.arange(4), [300, 400, 350, 2000])
    points = (centres[truth] + 0.1 * rng.normal(size=(len(truth), 8))).astype(np.float32)
    labels, inertia = auxiliaries.kmeans(points, 4, seed=0)
    assert labels.dtype == np.int64
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    # with every point taking part the centres are the exact means of the clusters; faiss's default would subsample
    exact = sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum(dtype=np.float64) for c in range(4))
    assert inertia == pytest.approx(exact, rel=1e-4)


def test_kmeans_repeats_with_its_seed_and_checks_its_size():
    points = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    first, _ = auxiliaries.kmeans(points, 20, seed=1)
    again, _ = auxiliaries.kmeans(points, 20, seed=1)
    other, _ = auxiliaries.kmeans(points, 20, seed=2)
    assert (first == again).all()
    assert (first != other).any()
    with pytest.raises(ValueError, match="30 clusters for 20 points"):
        auxiliaries.kmeans(points[:20], 30, seed=0)


def test_kmeans_survives_duplicates():
    labels, _ = auxiliaries.kmeans(np.ones((50, 4), dtype=np.float32), 5, seed=0)
    assert labels.shape == (50,)
    assert ((labels >= 0) & (labels < 5)).all()
