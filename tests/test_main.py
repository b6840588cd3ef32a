"""Mining, the training epoch, and whole runs as a user starts them."""

import functools
import itertools
import pickle
import re
import shlex
import time
from pathlib import Path
from xml.etree import ElementTree

import layouts
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import ALONE, CPU_DIGITS, parse, read_logs, refused, run, small_flags, write_class_folders

import auxiliaries
import datasets
import evaluate
import losses
import main
import netlib
from data.images import ImageSet
from run import options
from run.checkpoint import LAST
from run.history import History
from support import output
from support.weights import read_checkpoint

RUN_FILES = {
    "checkpoint.pth.tar",
    "hypa.pkl",
    "log_train_Class.csv",
    "log_val_Class.csv",
    "log_mining.csv",
    "Parameter_Info.txt",
    "InfoPlot_Class.svg",
    "Curr_Summary_Class.txt",
    "sample_recoveries.png",
    "sample_recoveries_Shared.png",
    "mined_clusters.png",
    "log_probe.csv",
    "InfoPlot_Probe.svg",
    "last.pth.tar",
    ".lock",
    "log.txt",
    "page.html",
    "run.json",
    "mined",
    "mined_labels.npz",
}
MINING_FILES = {
    "mined", "mined_labels.npz", "log_mining.csv", "mined_clusters.png", "sample_recoveries_Shared.png",
    "log_probe.csv", "InfoPlot_Probe.svg",
}  # fmt: skip


@pytest.mark.parametrize("mode", main.CLUSTER_MODES)
def test_standardisation_per_class(mode):
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 0, 1, 2, 0])
    features = (rng.normal(size=(6, 5)) + labels[:, None]).astype(np.float32)
    result = main.standardise_per_class(features, labels, mode)
    for label in range(3):
        members = expected = features[labels == label]
        reference = members if len(members) > 1 else features  # nothing would be left of an image that is alone
        if mode != "no_norm":
            expected = members - reference.mean(0)
        if mode == "mstd":
            expected = expected / reference.std(0)
        np.testing.assert_allclose(result[labels == label], expected, rtol=1e-4, atol=1e-6)


def test_steps_have_the_stated_rates_and_depend_on_seed_and_epoch():
    task_p = {"Class": 1, "Shared": 0.3}
    steps = datasets.draw_steps(task_p, 20_000, seed=1, epoch=0)
    assert [iteration for iteration, task in steps if task == "Class"] == list(range(20_000))
    assert sum(task == "Shared" for _, task in steps) / 20_000 == pytest.approx(0.3, abs=0.015)
    assert sorted(steps) == steps  # Class goes first
    assert all(task == "Class" for _, task in datasets.draw_steps({"Class": 1, "Shared": 0}, 100, seed=1, epoch=0))
    again, other = (datasets.draw_steps(task_p, 20_000, seed=1, epoch=epoch) for epoch in (0, 1))
    assert again == steps
    assert other != steps


def test_a_whole_run_writes_every_file(tiny_run, capsys):
    folder = tiny_run("--eval_every", 1, "--n_epochs", 3, "--kernels", 1)
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    logs = read_logs(folder)
    assert logs["log_train_Class.csv"]["Epochs"].tolist() == [0, 1, 2]
    val = logs["log_val_Class.csv"]
    assert val["Epochs"].tolist() == [0, 1, 2]
    assert logs["log_mining.csv"]["Before Epoch"].tolist() == [0, 1, 2]
    kept = pickle.loads((folder / "hypa.pkl").read_bytes())
    assert kept["arch"] == "small"
    assert len(kept["images"]) == 12
    for name in ("InfoPlot_Class.svg", "InfoPlot_Probe.svg"):
        ElementTree.parse(folder / name)
    assert logs["log_mining.csv"]["ARI with previous"].isna().tolist() == [True, False, False]
    assert logs["log_probe.csv"]["Epochs"].tolist() == [0, 1, 2]
    assert logs["log_probe.csv"].drop(columns="Epochs").stack().between(0, 1).all()
    printed = capsys.readouterr().out
    assert printed.endswith((folder / "Curr_Summary_Class.txt").read_text())
    assert printed.splitlines()[-1] == f"run folder: {folder}"
    assert printed.count("\nepoch ") == 3
    assert "CPU" in printed or "GPU" in printed

    # the checkpoint is that of the best epoch
    stored = read_checkpoint(folder)
    best_epoch = stored["progress"]["rows"]["val"][-1]["Epochs"]
    assert best_epoch == val["Recall @ 1"].idxmax()
    (start,) = kept.pop("provenance")
    assert start["command"].startswith("python main.py --eval_every 1 --n_epochs 3 --kernels 1 --dataset tiny")
    assert start["torch"] == str(torch.__version__)
    assert (stored["flags"], stored["provenance"]) == (kept, [start])
    mined = stored["progress"]["mined_labels"]
    assert mined.shape == (best_epoch + 1, 10)
    history = np.load(folder / "mined_labels.npz")
    assert history["epochs"].tolist() == [0, 1, 2]
    assert np.array_equal(history["labels"][: best_epoch + 1], mined)
    assert [path.rsplit("/", 2)[1] for path in history["paths"]] == 5 * ["class_00"] + 5 * ["class_01"]
    assert sorted(path.name for path in (folder / "mined").iterdir()) == [f"before_epoch_{i:04d}.jpg" for i in range(3)]

    # what was printed is kept, from the first line to the last
    assert (folder / "log.txt").read_text() == printed
    means = [value for name, value in stored["state_dict"].items() if name.endswith("running_mean")]
    assert kept["bn"] == "train"
    assert all((value != 0).any() for value in means)


def test_a_run_that_logged_nmi_of_its_minings_goes_on_with_ami(tiny_run):
    """As runs of the version before did: what they logged stays."""
    folder = tiny_run("--n_epochs", 1)
    stored = torch.load(folder / "last.pth.tar", weights_only=True)
    for row in stored["progress"]["rows"]["mining"]:
        row["NMI class"] = row.pop("AMI class")
    torch.save(stored, folder / "last.pth.tar")
    run(["--resume", folder, "--n_epochs", 2])
    log = read_logs(folder)["log_mining.csv"]
    assert log["NMI class"].notna().tolist() == [True, False]
    assert log["AMI class"].notna().tolist() == [False, True]
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert f"<dd>{log['AMI class'].iloc[-1]:z.3f}<small>at the last mining; – at the first" in page
    assert "NMI class" not in page


def test_fast_evaluation_leaves_cells_empty(tiny_run, capsys):
    """Every tenth epoch, or the next that is scored, and the last have all scores."""
    folder = tiny_run("--n_epochs", 21, "--fast_eval", "--eval_every", 4, "--task_p", 1, 0, "--adv_weights", 0)
    val = read_logs(folder)["log_val_Class.csv"]
    assert val["Epochs"].tolist() == [3, 7, 11, 15, 19, 20]
    for name in ("NMI", "F1"):
        assert val["Epochs"][val[name].notna()].tolist() == [11, 19, 20]
    assert val["Recall @ 1"].notna().all()
    (before,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("before training")]
    assert "NMI" not in before
    (row,) = [line for line in (folder / "Curr_Summary_Class.txt").read_text().splitlines() if line.startswith("NMI")]
    assert row.split()[-1] == "-"  # before training
    assert row.split()[2] == str(val["Epochs"][val["NMI"].idxmax()])


def test_the_shared_embedding_is_scored_and_all_goes_to_a_board_on_request(tiny_run, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tiny_run("--eval_shared", "--eval_every", 1, "--tensorboard", "--n_epochs", 2)
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"log_val_Shared.csv", "tensorboard"}
    logs = read_logs(folder)
    shared = logs["log_val_Shared.csv"]
    assert list(shared) == list(logs["log_val_Class.csv"])
    best = read_checkpoint(folder)["progress"]["rows"]["val"][-1]["Epochs"]
    capsys.readouterr()
    run([folder, "--embedding", "Shared"], evaluate)
    printed = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[3:]]
    assert {name: float(value) for name, value in printed} == pytest.approx(
        shared.loc[best].drop("Epochs").to_dict(), abs=1e-12
    )
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    groups = {tag.split("/")[0] for tag in board.Tags()["scalars"]}
    assert groups == {"train", "val", "shared", "probe", "mining"}
    assert [event.step for event in board.Scalars("train/Class Loss")] == [0, 1]
    assert [event.step for event in board.Scalars("mining/Inertia")] == [0, 1, 2]
    recalls = [event.value for event in board.Scalars("val/Recall @ 1")]
    assert recalls == pytest.approx(logs["log_val_Class.csv"]["Recall @ 1"].tolist())
    assert set(board.Tags()["images"]) == {"sample_recoveries", "sample_recoveries_Shared", "mined_clusters"}


@CPU_DIGITS
def test_same_seed_same_run_whatever_the_workers_and_the_cache_and_another_seed_another(tiny_run):
    first = tiny_run("--seed", 3)
    again = tiny_run("--seed", 3, "--kernels", 2, "--cache", "ram")
    other = tiny_run("--seed", 4)
    assert [folder.name for folder in (first, again, other)] == ["run", "run_1", "run_2"]
    for name, table in read_logs(first).items():
        pd.testing.assert_frame_equal(table, read_logs(again)[name], check_exact=True)
    assert not read_logs(first)["log_train_Class.csv"].equals(read_logs(other)["log_train_Class.csv"])


def test_baseline_mines_nothing_and_loads_no_shared_batch(tiny_run):
    folder = tiny_run("--task_p", 1, 0, "--adv_weights", 0)
    assert {path.name for path in folder.iterdir()} == RUN_FILES - MINING_FILES
    log = read_logs(folder)["log_train_Class.csv"]
    assert log["Shared Loss"].isna().all()
    assert log["Adversarial Loss"].isna().all()
    assert (log["Train Loss"] == log["Class Loss"]).all()


def tiny_parts(class_folders, *more):
    """Return flags, a network and loaders of the training images of "tiny"."""
    args = parse(*small_flags(class_folders, ".", *more))
    train, tests = datasets.load_dataset("tiny", class_folders)
    loaders = datasets.build_loaders(
        train, tests, options.per_task(args), probed=[], batch_size=args.bs, random_pick_p=args.random_cluster_pick_p,
        flip=args.flip, img_size=args.img_size, seed=args.seed, n_workers=0, pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = dict(zip(options.TASKS, args.embed_sizes))
    return args, netlib.build_network(args.arch, sizes, pretrained=False, freeze_batchnorm=False), loaders


def test_labels_are_mined_from_early_features_once_and_then_from_the_shared_embedding(class_folders):
    args, network, loaders = tiny_parts(class_folders, "--embed_sizes", 8, 6, "--cluster_mode", "mean")
    features = evaluate.extract_features(network, loaders.train_in_order, ["Early", "Shared"])
    early, classes = features["Early"].copy(), loaders.train_in_order.dataset.images.labels
    for label in range(2):  # the class means are taken out of the early features, and of nothing else
        early[classes == label] -= early[classes == label].mean(0, dtype=np.float64)
    for is_first_time, points in ((True, early), (False, features["Shared"])):
        mined, squared_distances = main.mine_labels(args, network, loaders.train_in_order, is_first_time)
        expected, distances = auxiliaries.kmeans(points, 3, seed=1)
        assert mined.tolist() == expected.tolist()
        np.testing.assert_allclose(squared_distances, distances, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", main.CLUSTER_MODES)
def test_images_alone_in_their_class_take_no_part_in_the_first_clustering(mode):
    """20 classes, alternately of 10 images and of 1; features are near one of 8 points, whatever the class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), [10, 1] * 10)
    kinds = rng.integers(8, size=len(labels))
    features = (5 * rng.normal(size=(8, 16))[kinds] + rng.normal(size=(len(labels), 16))).astype(np.float32)
    alone = (labels % 2) == 1
    left_out = main.left_out_of_mining(labels, mode)
    assert left_out.tolist() == (alone & (mode != "no_norm")).tolist()
    assert not main.left_out_of_mining(labels[~alone], mode).any()
    points = main.standardise_per_class(features, labels, mode)
    mined, squared_distances = auxiliaries.kmeans(points, 8, 1, left_out=left_out)
    took_part = np.ones(len(labels), dtype=bool) if mode == "no_norm" else ~alone
    expected, distances = auxiliaries.kmeans(points[took_part], 8, 1)
    assert mined[took_part].tolist() == expected.tolist()
    np.testing.assert_array_equal(squared_distances[took_part], distances)
    assert np.isnan(squared_distances[~took_part]).all()
    centres = np.stack([points[took_part][expected == c].mean(0) for c in range(8)])
    nearest = np.square(points[:, None] - centres).sum(2).argmin(1)
    assert (mined == nearest)[~took_part].all()
    assert len(set(mined[alone])) > 3


def test_a_run_says_how_many_images_took_no_part_in_its_first_clustering(tmp_path, capsys):
    write_class_folders(tmp_path / "source" / "tiny", per_class=(4, 1, 5, 1, 4, 4, 1, 4))
    folder = run(small_flags(tmp_path / "source", tmp_path / "results", "--n_epochs", 1))
    line = "alone in their class: 2 images took no part in this clustering, as subtracting the class mean"
    assert capsys.readouterr().out.count(line) == 1
    assert read_logs(folder)["log_mining.csv"]["Inertia"].notna().all()
    assert np.load(folder / "mined_labels.npz")["labels"].shape[1] == 11
    flags = small_flags(tmp_path / "source", tmp_path / "results", "--shared_num_classes", 10)
    message = "--shared_num_classes 10 is larger than the 9 training images of tiny that are not alone in their class"
    assert message in refused(capsys, flags)
    assert not (tmp_path / "results" / "tiny" / "run_1").exists()


@pytest.mark.parametrize(("flip", "flipped"), [("class", ["Class"]), ("both", ["Class", "Shared"]), ("none", [])])
def test_the_tasks_whose_images_are_flipped(flip, flipped):
    """All images grow lighter to the right, whatever is cropped out of them."""
    args = parse("--flip", flip, "--bs", 40, "--img_size", 32)
    pixels = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8)[None, None, :, None], (8, 40, 48, 3))
    images = ImageSet([str(i) for i in range(8)], np.arange(8) // 4, ["a", "b"], pixels=pixels.copy())
    loaders = datasets.build_loaders(
        images, {"test": images}, options.per_task(args), probed=[], batch_size=40, random_pick_p=0, flip=args.flip,
        img_size=32, seed=1, n_workers=0, pin_memory=False,
    )  # fmt: skip
    loaders.sampler.set_epoch(0, dict.fromkeys(options.TASKS, images.labels), list(enumerate(options.TASKS)))
    for task, (batch, _) in zip(options.TASKS, loaders.batches, strict=True):
        n_flipped = int((batch[:, 0, 0, 0].int() > batch[:, 0, 0, -1].int()).sum())
        assert 8 < n_flipped < 32 if task in flipped else n_flipped == 0, task


def test_without_a_terminal_the_epochs_say_how_far_they_are(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(output, "INTERVAL", 0)
    folder = tiny_run("--n_epochs", 2, "--lr", "1e-5")
    printed = capsys.readouterr().out
    for what in ("embedding", "mining", "searching", "epoch 0", "epoch 1"):
        assert re.search(rf"^{what}: \d+% of \d+ images, [\d,]+ images/s.*, left: 0:00:\d\d", printed, re.M), what
    assert re.search(r"^mining: 100% of .*, left: 0:00:00$", printed, re.M)
    assert re.search(r"^epoch 1: .*, Class [\d.]+, Class-Shared -[\d.]+.*, left of the run: 0:00:\d\d$", printed, re.M)
    losses, end = r"Train Loss [-\d.]+  Class Loss .*  Learning Rate 1e-05", r"[\d.]+ s, 0:00:\d\d left"
    scores = r"NMI [\d.]+ .*  Recall @ 1 [\d.]+ .*  \(best Recall @ 1: [\d.]+ in epoch 1\)"
    unscored, scored = re.findall("^epoch .* left$", printed, re.M)
    assert re.fullmatch(f"epoch 0  {losses}  {end}", unscored)
    assert re.fullmatch(f"epoch 1  {losses}  {scores}  {end}", scored)
    assert (folder / "log.txt").read_text() == printed


def test_batches_carry_the_labels_of_their_task_and_shared_ones_images_of_random_clusters(class_folders):
    _, _, loaders = tiny_parts(class_folders, "--random_cluster_pick_p", 1)
    labels = {"Class": loaders.train_in_order.dataset.images.labels, "Shared": (np.arange(10) + 1) % 3}
    steps = ["Class", "Shared", "Shared", "Class"]
    loaders.sampler.set_epoch(0, labels, list(enumerate(steps)))
    batches = list(loaders.sampler)
    assert [{task for task, _ in batch} for batch in batches] == [{task} for task in steps]
    assert {task for batch in batches for task, (i, label, _) in batch if labels[task][i] != label} == {"Shared"}
    for batch, (images, loaded) in zip(batches, loaders.batches, strict=True):
        assert images.shape == (8, 3, 32, 32)
        assert loaded.tolist() == [label for _, (_, label, _) in batch]


def test_labels_scores_and_learning_rate_change_at_their_intervals(tiny_run):
    more = ("--cluster_update_freq", 1, "--eval_every", 2, "--lr", 1e-3, "--tau", 1, 3, "--gamma", 0.5)
    logs = read_logs(tiny_run("--n_epochs", 5, *more))
    assert logs["log_mining.csv"]["Before Epoch"].tolist() == [0, 2, 4]
    assert logs["log_val_Class.csv"]["Epochs"].tolist() == [1, 3, 4]
    assert (logs["log_train_Class.csv"]["Learning Rate"] / 1e-3).tolist() == pytest.approx([1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (["--scheduler", "step", "--tau", 1, 3, "--gamma", 0.5], [1, 0.5, 0.5, 0.25]),
        (["--scheduler", "exp", "--gamma", 0.5], [1, 0.5, 0.25, 0.125]),
        (["--scheduler", "none"], [1, 1, 1, 1]),
    ],
)
def test_learning_rate_schedules(scheduler, expected):
    args = parse("--lr", 1, "--beta_lr", 2, 2, *scheduler)
    objective = losses.build_objective(
        options.per_task(args), {"Class": 3, "Shared": 3}, {"Class-Shared": 1.0}, args.adv_dim, args.lr
    )
    optimizer, schedule = main.build_optimizer(args, torch.nn.Linear(2, 2), objective)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [4e-4, 0, 0, 1e-6]
    rates = []
    for _ in expected:
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, np.outer(expected, [1, 2, 2, 1]))


def test_a_data_set_with_queries_trains_and_is_scored(tmp_path):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path / "source")
    more = ["--dataset", "in-shop", "--n_epochs", 1, "--bs", 4, "--k_vals", 1, 2, "--shared_num_classes", 2]
    folder = run(small_flags(tmp_path / "source", tmp_path / "results", *more))
    scores = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "mAP @ R", "R-Precision"]
    assert list(read_logs(folder)["log_val_Class.csv"]) == ["Epochs", *scores]
    assert {path.name for path in folder.iterdir()} == RUN_FILES


def test_known_factors_are_read_from_the_class_embedding_of_a_plain_baseline_too(tmp_path):
    write_class_folders(tmp_path / "tiny")
    images = sorted((tmp_path / "tiny" / "images").glob("*/*"))
    lines = [f"{path.parent.name}/{path.name},{'left' if i % 2 else 'right'}" for i, path in enumerate(images)]
    (tmp_path / "tiny" / "factors.csv").write_text("\n".join(["image,light", *lines]))
    flags = ("--task_p", 1, 0, "--adv_weights", 0, "--n_epochs", 1)
    probe = read_logs(run(small_flags(tmp_path, tmp_path / "results", *flags)))["log_probe.csv"]
    columns = ["Class from Class", "light from Class", "Class by chance", "light by chance"]
    assert list(probe) == ["Epochs", *columns, *(f"Test {column}" for column in columns)]


@pytest.mark.parametrize(("directions", "trains_backbone"), [((0,), False), ((500,), True)])
def test_shared_gradient_head_leaves_the_backbone_to_the_adversarial_term(tiny_run, directions, trains_backbone):
    flags = ["--shared_gradient", "head", "--task_p", 0, 1, "--bn", "frozen", "--adv_weights", *directions]
    states = [read_checkpoint(tiny_run(*flags, "--n_epochs", n), LAST)["state_dict"] for n in (1, 2)]
    changed = {name.split(".")[0] for name in states[0] if not torch.equal(*(state[name] for state in states))}
    assert ("backbone" in changed) == trains_backbone
    assert not torch.equal(*(state["heads.Shared.weight"] for state in states))


def test_weights_that_hold_nan_are_told_before_training(class_folders, tmp_path, capsys):
    state = torchvision.models.googlenet(init_weights=False, aux_logits=False).state_dict()
    state["conv1.conv.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    argv = small_flags(class_folders, tmp_path / "results", *ALONE, "--weights", tmp_path / "nan.pth")
    assert "features are not finite" in refused(capsys, argv, code=1)
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_is_trained_on_with_weights(tiny_run):
    first = tiny_run("--n_epochs", 1)
    again = tiny_run("--n_epochs", 1, "--lr", "1e-12", "--weights", first / "checkpoint.pth.tar")
    before, after = (read_checkpoint(folder) for folder in (first, again))
    assert after["flags"]["bn"] == "frozen"
    for name, value in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], value, atol=1e-6, rtol=1e-6)
    row, start = before["progress"]["rows"]["val"][-1], after["progress"]["initial_scores"]
    assert start == pytest.approx({name: row[name] for name in start}, abs=1e-9)


def test_make_graph_draws_the_network_into_the_run_folder(tiny_run):
    pytest.importorskip("torchview")
    folder = tiny_run("--n_epochs", 1, "--make_graph")
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"network.svg"}
    assert b"<svg" in (folder / "network.svg").read_bytes()


def test_compile_that_cannot_compile_is_refused_before_the_folder_is_made(class_folders, tmp_path, capsys, monkeypatch):
    def without_headers(*_):
        raise RuntimeError("C++ compile error\n\nOutput:\na.cpp:1:10: fatal error: Python.h: No such file or directory")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_headers))
    error = refused(capsys, small_flags(class_folders, tmp_path / "results", "--compile"))
    assert "--compile: torch.compile cannot be used here (a.cpp:1:10: fatal error: Python.h: No such file" in error
    assert not (tmp_path / "results").exists()


def test_compile_changes_no_key_of_the_checkpoint(tiny_run, monkeypatch):
    more = ["--bn", "frozen", "--n_epochs", 1]
    plain = tiny_run(*more)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the C++ takes minutes
    compiled = tiny_run(*more, "--compile")
    before, after = (read_checkpoint(folder)["state_dict"] for folder in (plain, compiled))
    assert list(before) == list(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-5)
    for name, table in read_logs(plain).items():
        pd.testing.assert_frame_equal(table, read_logs(compiled)[name], rtol=1e-3)


@pytest.fixture
def eight_classes(tmp_path):
    """A data set "eight" of 8 classes of 5 images, 4 of which train; returns the command line of a run on it."""
    write_class_folders(tmp_path / "held" / "eight", per_class=(5,) * 8)
    return lambda *more: small_flags(tmp_path / "held", tmp_path / "results", "--dataset", "eight", *more)


def test_classes_held_out_are_scored_and_neither_trained_on_nor_mined(eight_classes, capsys):
    folder = run(eight_classes("--val_classes", 0.5, "--n_epochs", 2, "--eval_every", 1))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] + line.split()[-3:] for line in printed[5:8]] == [
        ["train", "2", "10", "class_00", "to", "class_01"],
        ["test", "4", "20", "class_04", "to", "class_07"],
        ["Val", "2", "10", "class_02", "to", "class_03"],
    ]
    assert len(torch.load(folder / "last.pth.tar", weights_only=True)["progress"]["mined_labels"][0]) == 10
    scores = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "Recall @ 4", "Recall @ 8", "mAP @ R", "R-Precision"]
    assert list(read_logs(folder)["log_val_Class.csv"]) == ["Epochs", *scores, *(f"Val {score}" for score in scores)]
    run([folder], evaluate)
    of_test, of_val = capsys.readouterr().out.split("Class embedding of 10 eight images, Val")  # 2 classes of 5
    assert "Class embedding of 20 eight images" in of_test
    best = read_logs(folder)["log_val_Class.csv"].iloc[read_checkpoint(folder)["progress"]["rows"]["val"][-1]["Epochs"]]
    for printed, prefix in ((of_test, ""), (of_val, "Val ")):
        (line,) = [line for line in printed.splitlines() if line.startswith("Recall @ 1")]
        assert [float(value) for value in line.split()[-2:]] == [best[f"{prefix}Recall @ 1"]] * 2
    assert {path.name for path in folder.iterdir()} == RUN_FILES


def test_the_best_epoch_is_that_of_the_classes_it_is_selected_by(tmp_path):
    write_class_folders(tmp_path / "tiny", per_class=(5,) * 8, contrast=0)
    held_out = ("--val_classes", 0.5, "--n_epochs", 4, "--eval_every", 1, "--select", "val")
    folder = run(small_flags(tmp_path, tmp_path / "results", *held_out))
    recalls = read_logs(folder)["log_val_Class.csv"]["Val Recall @ 1"]
    assert recalls.nunique() > 1  # else the test tells nothing
    rows = read_checkpoint(folder)["progress"]["rows"]
    assert len(rows["train"]) - 1 == recalls.idxmax()
    assert rows["val"][-1]["Val Recall @ 1"] == recalls.max()


@pytest.mark.parametrize(
    ("with_background", "found"),
    [(0.8, "mined: the background"), (0.3, "mined: nothing clear, closest is the background")],
)
def test_the_demo_ends_with_what_was_learned_what_to_look_at_and_what_to_try(with_background, found):
    mined = {"Before Epoch": 4, "AMI class": 0.36, "AMI size": -0.01, "AMI background": with_background}
    history = History(Path("my runs/demo"), {}, rows={"mining": [mined], "val": [{"Recall @ 1": 0.8}]})
    history.initial_scores = {"Recall @ 1": 0.25}
    lines = main.demo_summary(history).splitlines()
    assert [line.split(":")[0] for line in lines] == ["learned", "look at", "try next"]
    assert "is 0.80, before training 0.25" in lines[0]
    assert f"{found} (AMI of the labels with it {with_background:.2f}, with the class 0.36)" in lines[0]
    assert "my runs/demo/page.html" in lines[1]
    assert "demo --task_p 1 0 --adv_weights 0" in lines[2]
    assert shlex.split(lines[2])[-2:] == ["--compare", "my runs"]  # it can be pasted
    history.rows["mining"] = [{"Before Epoch": 4, "NMI class": 0.36, "NMI size": 0.5}]  # of an earlier version
    assert "mined" not in main.demo_summary(history).splitlines()[0]


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
