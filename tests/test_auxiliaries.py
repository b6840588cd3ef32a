"""Run folder, logs, pictures, checkpoints and k-means."""

import os
import pickle
import random
import re
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


def test_summary_holds_scores_gap_to_the_paper_times_and_folder(tmp_path):
    initial, spent = {"NMI": 0.1, "Recall @ 1": 0.05}, {"loading": 1.0, "training": 7.06}
    path = tmp_path / "summary.txt"
    text = auxiliaries.write_summary(path, initial, ROWS, 12.34, spent, paper={"Recall @ 1": 0.661})
    assert path.read_text() == text
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "score best epoch last before training paper best - paper"
    assert lines[1].split() == ["NMI", "0.5000", "0", "0.4500", "0.1000"]
    assert lines[2].split() == ["Recall", "@", "1", "0.6000", "2", "0.2000", "0.0500", "0.6610", "-0.0610"]
    assert lines[3] == "paper: MIC with margin loss, ResNet50 (arXiv 1909.11574)"
    assert lines[4:6] == ["epochs done: 5", "seconds: 12.3"]
    assert lines[6:] == ["of these: loading 1.0, training 7.1, all else 4.3", f"run folder: {tmp_path}"]
    assert "paper" not in auxiliaries.write_summary(path, initial, ROWS, 12.34, spent, paper={})


def test_time_within_time_counts_once(monkeypatch):
    now = iter(range(0, 100, 10))  # ten seconds pass between two looks at the clock
    monkeypatch.setattr(auxiliaries.time, "perf_counter", lambda: next(now))
    stopwatch = auxiliaries.Stopwatch()
    with stopwatch.measure("training"):
        batches = iter(auxiliaries.TimedLoader(["batch"], stopwatch))
        assert next(batches) == "batch"
    assert stopwatch.seconds == {"loading": 20, "training": 30, "mining": 0, "evaluation": 0, "drawing": 0}


def test_checkpoint_is_plain_data(tmp_path):
    network = torch.nn.Linear(2, 2)
    progress = {"epoch": 3, "shared_labels": torch.arange(4), "val_rows": ROWS}
    auxiliaries.save_checkpoint(tmp_path / "checkpoint.pth.tar", network, {"arch": "resnet50"}, progress)
    stored = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert stored["flags"] == {"arch": "resnet50"}
    assert stored["progress"]["val_rows"] == ROWS
    assert (stored["state_dict"]["weight"] == network.weight).all()


def test_progress_plot_shows_losses_and_scores(tmp_path):
    train_rows = [
        {"Epochs": i, "Time": 1.0, "Class Loss": 1.0 / (i + 1), "Shared Loss": None, "Adversarial Loss": -i}
        for i in range(5)
    ]
    path = tmp_path / "plot.svg"
    auxiliaries.draw_progress(path, train_rows, ROWS, title="a $run", best=1, mined_before=[0, 4], rate_steps=[3, 9])
    texts = svg_texts(path)
    assert texts.count("epoch") == 2
    assert {"Class loss in training", "Adversarial loss in training", "NMI", "Recall @ 1", "best epoch"} <= set(texts)
    assert {"a $run", "Recall @ 1 0.6000 in the best epoch, 2", "mined labels renewed", "learning rate lowered"} <= set(
        texts
    )
    assert "Shared loss in training" not in texts
    assert panels(path) == 3
    auxiliaries.draw_progress(path, train_rows, ROWS, title="a run", best=0, rate_steps=[9])
    assert not {"mined labels renewed", "learning rate lowered"} & set(svg_texts(path))


def test_scores_of_some_epochs_only_are_drawn(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(auxiliaries, "save_svg", lambda figure, path: figures.append(figure))
    train_rows = [{"Epochs": i, "Time": 1.0, "Class Loss": 1.0} for i in range(100)]
    val_rows = [{"Epochs": i, "NMI": 0.9 if i % 10 == 9 else None, "Recall @ 1": 0.5} for i in range(100)]
    auxiliaries.draw_progress(tmp_path / "p", train_rows, val_rows, "a run", best=0, mined_before=range(0, 100, 4))
    lines = {line.get_label(): line for line in figures[0].axes[-1].lines}
    assert lines["NMI"].get_xdata().tolist() == list(range(9, 100, 10))
    assert lines["NMI"].get_markevery() == 1
    assert [text.get_text() for text in figures[0].axes[-1].get_legend().get_texts()] == ["NMI", "Recall @ 1"]


def test_one_epoch_is_one_tick(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(auxiliaries, "save_svg", lambda figure, path: figures.append(figure))
    rows = [{"Epochs": 0, "Time": 1.0, "Class Loss": 1.0}], [{"Epochs": 0, "Recall @ 1": 0.5}]
    auxiliaries.draw_progress(tmp_path / "p", *rows, "a run", best=0)
    axis = figures[0].axes[-1]
    assert [tick for tick in axis.get_xticks() if -0.7 <= tick <= 0.7] == [0]


def svg_texts(path):
    """Return the texts of an SVG file."""
    return [node.text for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def panels(path):
    """Return the number of axes that Matplotlib drew in an SVG file."""
    ids = [node.get("id") or "" for node in ElementTree.parse(path).iter()]
    return sum(re.fullmatch(r"axes_\d+", name) is not None for name in ids)


def test_legend_of_scores_covers_no_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(auxiliaries, "save_svg", lambda figure, path: figures.append(figure))
    train_rows = [{"Epochs": i, "Time": 1.0, "Class Loss": 1.0} for i in range(5)]
    auxiliaries.draw_progress(tmp_path / "plot.svg", train_rows, ROWS, title="a run", best=0)
    figures[0].draw_without_rendering()
    axis = figures[0].axes[-1]
    assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
    assert axis.get_legend().get_window_extent().x1 <= figures[0].bbox.x1


def test_probe_plot_has_a_panel_for_each_kind_of_label(tmp_path):
    names = ["Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared"]
    names += ["Class by chance", "Mined by chance"]
    auxiliaries.draw_probe(tmp_path / "plot.svg", [{"Epochs": 0, "Time": 1.0} | dict.fromkeys(names, 0.5)], "a run")
    assert panels(tmp_path / "plot.svg") == 2
    assert "by chance" in svg_texts(tmp_path / "plot.svg")


def test_ablation_plot_shows_every_value(tmp_path):
    lines = {"shapes best epoch": {"4": [0.5, 0.7], "16": [0.6]}, "paper, x": {"8": [0.4]}}
    auxiliaries.draw_ablation(tmp_path / "plot.svg", "shared_num_classes", ["4", "8", "16"], lines)
    assert {"4", "8", "16", "--shared_num_classes", "shapes best epoch", "paper, x"} <= set(
        svg_texts(tmp_path / "plot.svg")
    )
    auxiliaries.draw_ablation(tmp_path / "plot.png", "cluster_mode", ["mean"], {"shapes": {"mean": [0.5]}})
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 500


def test_difference_plot_has_a_panel_for_each_score_and_a_row_for_each_setting(tmp_path):
    of_setting = {"last": (np.array([0.1, 0.2]), -0.1, 0.4), "best": (np.array([0.1, 0.3]), 0.0, 0.4)}
    points = {"Recall @ 1": {"a": of_setting, "b": of_setting}, "NMI": {"a": {"last": of_setting["last"]}}}
    auxiliaries.draw_differences(tmp_path / "plot.svg", points, "runs/plain_seed1")
    assert panels(tmp_path / "plot.svg") == 2
    texts = svg_texts(tmp_path / "plot.svg")
    assert {"a", "b", "difference in Recall @ 1", "difference in NMI", "best epoch", "last epoch"} <= set(texts)
    assert any("plain_seed1" in text for text in texts)


def test_difference_plot_puts_bars_at_the_interval_and_marks_at_the_mean(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(auxiliaries, "save_figure", lambda figure, path: figures.append(figure))
    of_setting = {"last": (np.array([0.1, 0.3]), -0.1, 0.5), "best": (np.array([0.6, 0.8]), 0.4, 1.0)}
    auxiliaries.draw_differences(tmp_path / "plot.svg", {"NMI": {"a": of_setting}}, "plain")
    lines = [line.get_xydata().tolist() for line in figures[0].axes[0].lines]
    places = {}
    for name, low, mean, high in [("last", -0.1, 0.2, 0.5), ("best", 0.4, 0.7, 1.0)]:
        (bar,) = [line for line in lines if [x for x, _ in line] == [low, high]]
        (mark,) = [line for line in lines if len(line) == 1 and line[0][0] == pytest.approx(mean)]
        assert bar[0][1] == bar[1][1] == mark[0][1]
        places[name] = mark[0][1]
    assert places["last"] != places["best"]


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
        kinds = [[kind_of_tile(picture, row, column) for column in range(3)] for row in range(4)]
    assert kinds == [["query", "other", "other"]] * 2 + [["query", "same", "other"]] * 2
    assert read_indices == [0, 1, 2, 3, 1, 2, 0, 2, 3, 1, 2, 1]


def kind_of_tile(sheet, row, column, n_lines=1):
    """Return the kind of a tile on a sheet without headings, by the colour of its frame."""
    x, y = 16 + column * (auxiliaries.TILE + 18), 16 + 26 * n_lines + row * (auxiliaries.TILE + 36)
    colour = "#{:02x}{:02x}{:02x}".format(*sheet.getpixel((x - 1, y - 1)))
    return next(kind for kind, (of_frame, _) in auxiliaries.FRAMES.items() if of_frame == colour)


def test_sheets_survive_any_name(tmp_path):
    tile = auxiliaries.Tile(np.zeros((5, 9, 3), dtype=np.uint8), "two\nlines, \udcff and very long indeed", "other")
    auxiliaries.draw_sheet(tmp_path / "sheet.png", ["title \udcff"], ["a\nb"], [[tile, tile]])
    Image.open(tmp_path / "sheet.png").verify()
    font = auxiliaries.sheet_font(13)
    assert auxiliaries.fitted("short", 140, font) == "short"
    cut = auxiliaries.fitted("a very long name of a class", 100, font)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100


def test_kmeans_uses_all_points():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(4, 8))
    truth = np.repeat(np.arange(4), [300, 400, 350, 2000])
    points = (centres[truth] + 0.1 * rng.normal(size=(len(truth), 8))).astype(np.float32)
    labels, squared_distances = auxiliaries.kmeans(points, 4, seed=0)
    assert labels.dtype == np.int64
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    # with every point taking part the centres are the exact means of the clusters; faiss's default would subsample
    centres = np.stack([points[labels == c].mean(0, dtype=np.float64) for c in range(4)])
    np.testing.assert_allclose(squared_distances, ((points - centres[labels]) ** 2).sum(1), rtol=1e-2, atol=1e-3)
    assert squared_distances.sum() == pytest.approx(((points - centres[labels]) ** 2).sum(), rel=1e-4)


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
