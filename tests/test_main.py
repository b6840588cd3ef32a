"""Mining, the training epoch, and whole runs as a user starts them."""

import functools
import pickle
from pathlib import Path
from xml.etree import ElementTree

import layouts
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import parse, run, write_class_folders
from PIL import Image

import auxiliaries
import datasets
import evaluate
import losses
import main
import netlib

GradScaler = torch.amp.GradScaler
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
}
MINING_FILES = {
    "log_mining.csv", "mined_clusters.png", "sample_recoveries_Shared.png", "log_probe.csv", "InfoPlot_Probe.svg"
}  # fmt: skip


@pytest.mark.parametrize("mode", main.CLUSTER_MODES)
def test_standardisation_per_class(mode):
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 0, 1, 2, 0])
    features = (rng.normal(size=(6, 5)) + labels[:, None]).astype(np.float32)
    result = main.standardise_per_class(features, labels, mode)
    for label in range(3):
        members = features[labels == label]
        expected = members
        if mode != "no_norm":
            expected = members - members.mean(0)
        if mode == "mstd":
            expected = expected / members.std(0) if len(members) > 1 else np.zeros_like(members)
        np.testing.assert_allclose(result[labels == label], expected, rtol=1e-4, atol=1e-6)


def test_task_schedule_has_the_stated_rates_and_depends_on_seed_and_epoch():
    schedule = main.draw_task_schedule([1, 0.3], 20_000, seed=1, epoch=0)
    assert schedule[:, 0].all()
    assert schedule[:, 1].mean() == pytest.approx(0.3, abs=0.015)
    assert not main.draw_task_schedule([1, 0], 100, seed=1, epoch=0)[:, 1].any()
    again, other = (main.draw_task_schedule([1, 0.3], 20_000, seed=1, epoch=epoch) for epoch in (0, 1))
    assert (again == schedule).all()
    assert (other != schedule).any()


def read_logs(folder):
    """All CSV files of a run without their Time columns."""
    return {path.name: pd.read_csv(path).drop(columns="Time") for path in sorted(folder.glob("*.csv"))}


@pytest.fixture
def tiny_run(class_folders, run_main):
    return lambda *flags: run_main("--dataset", "tiny", "--source_path", class_folders, *flags)


def test_a_whole_run_writes_every_file(tiny_run, capsys):
    folder = tiny_run("--arch", "resnet50", "--n_epochs", 3, "--kernels", 1)
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    logs = read_logs(folder)
    assert logs["log_train_Class.csv"]["Epochs"].tolist() == [0, 1, 2]
    assert list(logs["log_train_Class.csv"]) == [
        "Epochs", "Train Loss", "Class Loss", "Shared Loss", "Adversarial Loss"
    ]  # fmt: skip
    val = logs["log_val_Class.csv"]
    assert list(val) == ["Epochs", "NMI", "F1", "Recall @ 1", "Recall @ 2", "Recall @ 4", "Recall @ 8",
                         "mAP @ R", "R-Precision"]  # fmt: skip
    assert val["Epochs"].tolist() == [0, 1, 2]
    assert logs["log_mining.csv"]["Before Epoch"].tolist() == [0, 1, 2, 3]
    flags = pickle.loads((folder / "hypa.pkl").read_bytes())
    assert flags["arch"] == "resnet50"
    for name in ("InfoPlot_Class.svg", "InfoPlot_Probe.svg"):
        ElementTree.parse(folder / name)
    tile, edge, lines = auxiliaries.TILE, 16, 2 * 26
    for name in ("sample_recoveries.png", "sample_recoveries_Shared.png"):
        with Image.open(folder / name) as picture:
            assert picture.size == (edge + 6 * (tile + 18), edge + lines + 10 * (tile + 36))
    with Image.open(folder / "mined_clusters.png") as picture:
        assert picture.height == edge + lines + logs["log_mining.csv"]["Clusters"].iloc[-1] * (tile + 36)
    assert list(logs["log_mining.csv"]) == [
        "Before Epoch", "Inertia", "Clusters", "Empty", "Smallest", "Median", "Largest", "ARI with previous",
        "NMI class",
    ]  # fmt: skip
    assert logs["log_mining.csv"]["ARI with previous"].isna().tolist() == [True, False, False, False]
    assert logs["log_probe.csv"]["Epochs"].tolist() == [0, 1, 2]
    assert logs["log_probe.csv"].drop(columns="Epochs").stack().between(0, 1).all()
    printed = capsys.readouterr().out
    assert printed.endswith((folder / "Curr_Summary_Class.txt").read_text())
    assert printed.splitlines()[-1] == f"run folder: {folder}"
    assert printed.count("\nepoch ") == 3
    assert "CPU" in printed or "GPU" in printed

    # the checkpoint is the best epoch's network, and scores as logged
    stored = netlib.read_checkpoint(folder)
    best_epoch = stored["progress"]["val_rows"][-1]["Epochs"]
    assert best_epoch == val["Recall @ 1"].idxmax()
    assert stored["flags"] == flags
    assert len(stored["progress"]["shared_labels"]) == 10
    means = [value for name, value in stored["state_dict"].items() if name.endswith("running_mean")]
    assert flags["bn"] == "train"
    assert all((value != 0).any() for value in means)
    network = netlib.load(folder)
    test_images = datasets.load_dataset("tiny", flags["source_path"])[1][""]
    dataset = datasets.ImageDataset(test_images, datasets.test_transform(flags["img_size"]))
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=8)
    embeddings = evaluate.extract_features(network, loader, ["Class"])["Class"]
    scores = evaluate.score_set(embeddings, test_images.labels, flags["k_vals"], flags["seed"])
    row = val.loc[best_epoch]
    assert scores == pytest.approx({name: row[name] for name in scores}, abs=1e-12)


def test_fast_evaluation_leaves_cells_empty(tiny_run):
    folder = tiny_run("--arch", "googlenet", "--n_epochs", 12, "--fast_eval", "--task_p", 1, 0, "--adv_weights", 0)
    val = read_logs(folder)["log_val_Class.csv"]
    assert val.index[val["NMI"].notna()].tolist() == [9, 11]
    assert val.index[val["F1"].notna()].tolist() == [9, 11]
    assert val["Recall @ 1"].notna().all()
    summary = (folder / "Curr_Summary_Class.txt").read_text()
    best = val["NMI"].idxmax()
    assert f"NMI          {val['NMI'][best]:.4f}  {best:5d}" in summary


def test_the_shared_embedding_is_scored_and_all_goes_to_a_board_on_request(tiny_run, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = {}
    original = main.score_tests

    def spy(network, loaders, *rest):
        scores, embeddings = original(network, loaders, *rest)
        kept.update(embeddings[""], labels=loaders[""].dataset.images.labels)
        return scores, embeddings

    monkeypatch.setattr(main, "score_tests", spy)
    folder = tiny_run("--arch", "googlenet", "--eval_shared", "--tensorboard")
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"log_val_Shared.csv", "tensorboard"}
    logs = read_logs(folder)
    shared = logs["log_val_Shared.csv"]
    assert list(shared) == list(logs["log_val_Class.csv"])
    scores = evaluate.retrieval_scores(kept["Shared"], kept["labels"], [1, 2, 4, 8])
    assert scores == pytest.approx({name: shared[name].iloc[-1] for name in scores}, abs=1e-12)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    groups = {tag.split("/")[0] for tag in board.Tags()["scalars"]}
    assert groups == {"train", "val", "shared", "probe", "mining"}
    assert [event.step for event in board.Scalars("train/Class Loss")] == [0, 1]
    assert [event.step for event in board.Scalars("mining/Inertia")] == [0, 1, 2]
    recalls = [event.value for event in board.Scalars("val/Recall @ 1")]
    assert recalls == pytest.approx(logs["log_val_Class.csv"]["Recall @ 1"].tolist())
    assert set(board.Tags()["images"]) == {"sample_recoveries", "sample_recoveries_Shared", "mined_clusters"}


def test_same_seed_same_run_whatever_the_workers_and_another_seed_another(tiny_run):
    first = tiny_run("--seed", 3)
    again = tiny_run("--seed", 3, "--kernels", 2)
    other = tiny_run("--seed", 4)
    assert [folder.name for folder in (first, again, other)] == ["run", "run_1", "run_2"]
    for name, table in read_logs(first).items():
        pd.testing.assert_frame_equal(table, read_logs(again)[name], check_exact=True)
    assert not read_logs(first)["log_train_Class.csv"].equals(read_logs(other)["log_train_Class.csv"])


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_cache_changes_no_digit(tiny_run, tmp_path, cache):
    arch = ("--arch", "googlenet")
    plain, cached = tiny_run(*arch), tiny_run(*arch, "--cache", cache, "--kernels", 1)
    for name, table in read_logs(plain).items():
        pd.testing.assert_frame_equal(table, read_logs(cached)[name], check_exact=True)
    files = list((tmp_path / "results" / "tiny").glob("decoded_*"))
    assert len(files) == (4 if cache == "disk" else 0)


def test_baseline_mines_nothing_and_loads_no_shared_batch(tiny_run, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("mining in a baseline run")

    asked = []
    monkeypatch.setattr(main, "mine_labels", forbidden)
    original = datasets.ImageDataset.__getitem__

    def spy(self, key):
        asked.append((key, len(self.transform.transforms)))
        return original(self, key)

    monkeypatch.setattr(datasets.ImageDataset, "__getitem__", spy)
    folder = tiny_run("--task_p", 1, 0, "--adv_weights", 0)
    assert {path.name for path in folder.iterdir()} == RUN_FILES - MINING_FILES
    train_draws = [steps for key, steps in asked if isinstance(key, tuple)]
    assert len(train_draws) == 2 * 8  # two epochs of one Class batch: nothing else is loaded for training
    assert set(train_draws) == {2}  # crop and flip: the Class transform
    log = read_logs(folder)["log_train_Class.csv"]
    assert log["Shared Loss"].isna().all()
    assert log["Adversarial Loss"].isna().all()
    assert (log["Train Loss"] == log["Class Loss"]).all()


def test_labels_are_mined_from_early_features_once_and_then_from_the_shared_embedding(tiny_run, monkeypatch):
    clustered = []
    original = auxiliaries.kmeans

    def spy(points, n_clusters, seed, **options):
        if n_clusters == 3:  # mining; the evaluation has 2 clusters
            clustered.append(points.copy())
        return original(points, n_clusters, seed, **options)

    monkeypatch.setattr(auxiliaries, "kmeans", spy)
    tiny_run("--arch", "resnet50", "--embed_sizes", 8, 6, "--cluster_mode", "mean")
    assert [points.shape for points in clustered] == [(10, 4096), (10, 6), (10, 6)]
    class_labels = np.repeat([0, 1], 5)
    for label in range(2):  # the class means are gone from the early features, and from nothing else
        np.testing.assert_allclose(clustered[0][class_labels == label].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(clustered[1], axis=1), 1, rtol=1e-5)


def test_batches_carry_the_labels_of_their_task(tiny_run, monkeypatch):
    class_labels = np.repeat([0, 1], 5)
    mined = [np.arange(10) % 3, (np.arange(10) + 1) % 3, np.arange(10) // 4]
    answers = iter(mined)
    monkeypatch.setattr(main, "mine_labels", lambda *_, **__: (next(answers), np.zeros(10, np.float32)))
    drawn = {"Class": [], "Shared": []}
    original = datasets.ImageDataset.__getitem__

    def spy(self, key):
        if isinstance(key, tuple):
            drawn["Class" if len(self.transform.transforms) == 2 else "Shared"].append(key)
        return original(self, key)

    monkeypatch.setattr(datasets.ImageDataset, "__getitem__", spy)
    tiny_run("--task_p", 1, 1, "--random_cluster_pick_p", 0)
    assert len(drawn["Class"]) == len(drawn["Shared"]) == 2 * 8
    assert all(class_labels[index] == label for index, label, _ in drawn["Class"])
    for epoch in range(2):
        assert all(mined[epoch][index] == label for index, label, _ in drawn["Shared"][8 * epoch : 8 * (epoch + 1)])


def test_random_cluster_picks_are_for_the_shared_task_only(class_folders):
    train, tests = datasets.load_dataset("tiny", class_folders)
    samplers, _, _ = main.build_loaders(parse("--random_cluster_pick_p", 0.35), train, tests, pin_memory=False)
    assert {task: sampler.random_pick_p for task, sampler in samplers.items()} == {"Class": 0.0, "Shared": 0.35}


def test_the_scheduler_steps_once_an_epoch(tiny_run, monkeypatch):
    rates = []
    original = main.train_one_epoch

    def spy(network, criteria, adversaries, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(network, criteria, adversaries, optimizer, *rest)

    monkeypatch.setattr(main, "train_one_epoch", spy)
    tiny_run("--n_epochs", 3, "--lr", "1e-3", "--tau", 1, 2, "--gamma", 0.5)
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_names_with_signs_of_mathematics(class_folders, run_main):
    images = class_folders / "tiny" / "images"
    (images / "class_03").rename(images / "cost $5 to_$9")
    folder = run_main("--dataset", "tiny", "--source_path", class_folders, "--savename", "a$^$ b", "--n_epochs", 1)
    assert folder.name == "a$^$ b"
    assert {path.name for path in folder.iterdir()} == RUN_FILES


def test_labels_change_at_the_update_interval(tiny_run):
    logs = read_logs(tiny_run("--n_epochs", 5, "--cluster_update_freq", 1, "--eval_every", 2))
    assert logs["log_mining.csv"]["Before Epoch"].tolist() == [0, 2, 4]
    assert logs["log_val_Class.csv"]["Epochs"].tolist() == [1, 3, 4]


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
    network = torch.nn.Linear(2, 2)
    criteria, adversaries = main.build_objective(args, {"Class": 3, "Shared": 3})
    terms = [*criteria.values(), *(term for term, _ in adversaries.values())]
    optimizer, schedule = main.build_optimizer(args, network, terms)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [4e-4, 0, 0, 1e-6]
    rates = []
    for _ in expected:
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    np.testing.assert_allclose(rates, np.outer(expected, [1, 2, 2, 1]))


def test_both_adversarial_directions_with_unequal_sizes(tiny_run):
    directions = ["--adversarial", "Class-Shared", "Shared-Class", "--adv_weights", 10, 20]
    folder = tiny_run(*directions, "--embed_sizes", 16, 24, "--amp", "bf16")
    assert (read_logs(folder)["log_train_Class.csv"]["Adversarial Loss"] < 0).all()


@pytest.mark.parametrize(("name", "layout"), layouts.LAYOUTS)
def test_every_data_set_trains_and_is_scored_with_its_protocol(tmp_path, run_main, name, layout):
    layouts.LAYOUTS[name, layout](tmp_path / "source")
    flags = ["--n_epochs", 1, "--bs", 4, "--k_vals", 1, 2, "--shared_num_classes", 2]
    folder = run_main("--dataset", name, "--source_path", tmp_path / "source", *flags)
    columns = list(read_logs(folder)["log_val_Class.csv"])
    scores = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "mAP @ R", "R-Precision"]
    if name != "vehicle_id":
        assert columns == ["Epochs", *scores]
        assert {path.name for path in folder.iterdir()} == RUN_FILES
        return
    assert columns == ["Epochs", *(f"Set {i} {score}" for i in (1, 2, 3) for score in scores)]
    files = {path.name for path in folder.iterdir()}
    for file in (
        "checkpoint{}.pth.tar", "InfoPlot_Class{}.svg", "sample_recoveries{}.png", "sample_recoveries_Shared{}.png"
    ):  # fmt: skip
        assert {file.format(f"_set{i}") for i in (1, 2, 3)} <= files
        assert file.format("") not in files


@pytest.fixture
def few_shapes(shapes, monkeypatch):
    """Make the built-in data set three classes a split."""
    small = [
        datasets.ImageSet(
            images.names[:72],
            images.labels[:72],
            images.class_names[:3],
            images.pixels[:72],
            {factor: levels[:72] for factor, levels in images.factors.items()},
        )
        for images in shapes
    ]
    monkeypatch.setattr(datasets, "render_shapes", lambda: (small[0], {"": small[1]}))


@pytest.mark.parametrize(
    ("loss", "sampling"),
    [("proxynca", "distance"), *((loss, s) for loss in ("marginloss", "triplet") for s in losses.SAMPLERS)],
)
def test_every_loss_and_sampling_trains_both_tasks(few_shapes, run_main, loss, sampling):
    pairs = ["--losses", loss, loss, "--sampling", sampling, sampling, "--task_p", 1, 1]
    folder = run_main("--dataset", "shapes", "--n_epochs", 1, *pairs)
    log = read_logs(folder)["log_train_Class.csv"]
    assert np.isfinite(log[["Class Loss", "Shared Loss"]].to_numpy()).all()


def test_tasks_may_differ_in_their_loss(few_shapes, run_main):
    pairs = ["--losses", "proxynca", "triplet", "--sampling", "distance", "semihard", "--task_p", 1, 1]
    folder = run_main("--dataset", "shapes", "--n_epochs", 1, *pairs)
    log = read_logs(folder)["log_train_Class.csv"]
    assert np.isfinite(log[["Class Loss", "Shared Loss"]].to_numpy()).all()


def test_shapes_log_how_mined_labels_match_the_known_factors(few_shapes, run_main):
    folder = run_main("--dataset", "shapes", "--n_epochs", 1, "--bs", 24, "--cs_per_bs", 4, 4)
    log = read_logs(folder)["log_mining.csv"]
    factors = ["NMI class", "NMI background", "NMI orientation", "NMI size", "NMI light"]
    assert list(log)[-5:] == factors
    assert log[factors].stack().between(0, 1).all()


def test_local_weights_are_used_and_freeze_batchnorm(class_folders, run_main, tmp_path):
    torch.manual_seed(9)
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    folder = run_main(
        "--dataset", "tiny", "--source_path", class_folders, "--weights", tmp_path / "weights.pth", "--lr", "1e-9",
        "--arch", "resnet50", not_pretrained=False,
    )  # fmt: skip
    stored = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    assert stored["flags"]["bn"] == "frozen"
    trained = stored["state_dict"]
    assert (trained["backbone.layers.bn1.running_mean"] == state["bn1.running_mean"]).all()
    torch.testing.assert_close(trained["backbone.layers.conv1.weight"], state["conv1.weight"], atol=1e-6, rtol=1e-6)


def test_a_non_finite_loss_stops_the_run_and_names_the_term(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(losses.AdversarialLoss, "forward", lambda self, target, source: target.sum() * torch.nan)
    with pytest.raises(SystemExit) as stop:
        tiny_run()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "the Class-Shared loss is nan in epoch 0 at iteration 0" in error
    assert error.count("\n") == 1


def test_weights_that_hold_nan_are_told_before_training(class_folders, run_main, tmp_path, capsys):
    state = torchvision.models.resnet50(weights=None).state_dict()
    state["conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(SystemExit) as stop:
        run_main(
            "--dataset", "tiny", "--source_path", class_folders, "--weights", tmp_path / "nan.pth",
            "--arch", "resnet50", not_pretrained=False,
        )  # fmt: skip
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "1 not finite: conv1.weight" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_last_step_that_diverges_is_told_at_the_evaluation(tiny_run, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny_run("--lr", "1e30", "--task_p", 1, 0, "--adv_weights", 0)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "not finite" in error or "loss is" in error
    assert error.count("\n") == 1


def test_float16_gradients_that_always_overflow_stop_the_run(tiny_run, monkeypatch, capsys):
    def forward(self, embeddings, labels):
        return (embeddings - embeddings.detach()).square().sum().sqrt()  # a finite value with a gradient that is not

    monkeypatch.setattr(losses.MarginLoss, "forward", forward)
    monkeypatch.setattr(main, "SMALLEST_SCALE", 2.0**16)
    with pytest.raises(SystemExit) as stop:
        tiny_run("--amp", "fp16", "--adv_weights", 0)
    assert stop.value.code == 1
    assert "float16 gradients overflow at every step" in capsys.readouterr().err


def test_best_checkpoint_is_by_recall_at_1(tiny_run, monkeypatch):
    recalls = iter([0.0, 0.4, 0.6, 0.6, 0.5])  # before training, then four epochs

    def score_set(*_):
        value = next(recalls)
        return {"NMI": 1 - value, "F1": 1 - value, "Recall @ 1": value}

    monkeypatch.setattr(evaluate, "score_set", score_set)
    saved = []
    original = auxiliaries.save_checkpoint

    def spy(path, network, flags, progress, *training):
        if path.name.startswith("checkpoint"):
            saved.append(progress["val_rows"][-1]["Epochs"])
        original(path, network, flags, progress, *training)

    monkeypatch.setattr(auxiliaries, "save_checkpoint", spy)
    tiny_run("--n_epochs", 4, "--arch", "googlenet")
    assert saved == [0, 1]


def test_frozen_batchnorm_keeps_every_statistic_and_trains_every_scale_and_shift(tiny_run):
    folder = tiny_run("--arch", "resnet50", "--bn", "frozen", "--n_epochs", 1, "--task_p", 1, 1)
    trained = torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    means = [value for name, value in trained.items() if name.endswith("running_mean")]
    variances = [value for name, value in trained.items() if name.endswith("running_var")]
    assert len(means) == len(variances) == 53
    assert all((value == 0).all() for value in means)
    assert all((value == 1).all() for value in variances)
    # zero_init_residual: a branch's scale and shift move from the second step on, once its last scale is off zero
    norms = {name for name in trained if ".bn" in name or ".downsample.1." in name}
    starts = {"weight": 1.0, "bias": 0.0}
    for name in norms:
        kind = name.rsplit(".", 1)[1]
        if kind in starts:
            start = 0.0 if kind == "weight" and ".bn3." in name else starts[kind]
            assert (trained[name] != start).any(), name


def test_googlenet_trains_and_is_loaded_again_in_two_lines(tiny_run, class_folders):
    folder = tiny_run("--arch", "googlenet", "--n_epochs", 1, "--embed_sizes", 16, 24)
    (folder / "hypa.pkl").write_bytes(b"must not be read")
    network = netlib.load(folder)
    test_images = datasets.load_dataset("tiny", class_folders)[1][""]
    dataset = datasets.ImageDataset(test_images, datasets.test_transform(32))
    with torch.no_grad():
        embeddings = network(torch.stack([dataset[i][0] for i in range(len(dataset))]))
    assert {task: tuple(values.shape) for task, values in embeddings.items()} == {"Class": (10, 16), "Shared": (10, 24)}
    flags = netlib.read_checkpoint(folder)["flags"]
    scores = evaluate.score_set(embeddings["Class"].numpy(), test_images.labels, flags["k_vals"], flags["seed"])
    row = read_logs(folder)["log_val_Class.csv"].loc[0]
    assert scores == pytest.approx({name: row[name] for name in scores}, abs=1e-9)


def test_a_checkpoint_is_trained_on_with_weights(tiny_run, class_folders, run_main):
    first = tiny_run("--arch", "googlenet", "--n_epochs", 1)
    again = run_main(
        "--dataset", "tiny", "--source_path", class_folders, "--arch", "googlenet", "--n_epochs", 1, "--lr", "1e-12",
        "--weights", first / "checkpoint.pth.tar", not_pretrained=False,
    )  # fmt: skip
    before, after = (netlib.read_checkpoint(folder) for folder in (first, again))
    assert after["flags"]["bn"] == "frozen"
    for name, value in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], value, atol=1e-6, rtol=1e-6)
    row, start = before["progress"]["val_rows"][-1], after["progress"]["initial_scores"]
    assert start == pytest.approx({name: row[name] for name in start}, abs=1e-9)


@pytest.mark.skipif(bool(auxiliaries.missing_for_graphs()), reason="needs graphviz")
def test_make_graph_draws_the_network_into_the_run_folder(tiny_run):
    folder = tiny_run("--arch", "googlenet", "--n_epochs", 1, "--make_graph")
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"network.svg"}
    texts = {node.text for node in ElementTree.parse(folder / "network.svg").iter() if node.tag.endswith("text")}
    assert {"googlenet", "images", "conv3", "192 x 8 x 8", "Early", "3072", "inception5b", "Class", "Shared"} <= texts


@pytest.mark.skipif(bool(auxiliaries.missing_for_graphs()), reason="needs graphviz")
def test_a_graphviz_that_fails_is_one_line_and_leaves_no_run_folder(tiny_run, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "bin" / "dot"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    with pytest.raises(SystemExit) as stop:
        tiny_run("--make_graph")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--make_graph: Graphviz's program dot fails" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tf32_without_a_gpu_is_refused(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny_run("--tf32")
    assert stop.value.code == 2
    assert "--tf32: needs an NVIDIA GPU of compute capability 8.0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("enabled", [False, True])
def test_tf32_is_set_for_products_and_convolutions(monkeypatch, enabled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    try:
        auxiliaries.set_tf32(enabled, torch.device("cuda", 0))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == enabled
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == enabled
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == enabled
    finally:
        auxiliaries.set_tf32(False, torch.device("cpu"))


def test_fp16_trains_with_a_gradient_scaler(tiny_run, monkeypatch):
    scales = []
    original = main.train_one_epoch

    def spy(network, criteria, adversaries, optimizer, scaler, *rest):
        scales.append(scaler.get_scale())
        before = network.heads["Class"].weight.clone()
        averages = original(network, criteria, adversaries, optimizer, scaler, *rest)
        moved = (network.heads["Class"].weight != before).any()
        assert moved == (scales[0] < 1e20)
        return averages

    monkeypatch.setattr(main, "train_one_epoch", spy)
    losses_of = {}
    for scale in (2.0**8, 2.0**126):  # the second overflows every gradient: no step is taken, and no loss suffers
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(GradScaler, init_scale=scale))
        scales.clear()
        folder = tiny_run("--arch", "googlenet", "--amp", "fp16", "--task_p", 1, 0)
        assert scales[0] == scale
        assert (scales[1] < scale) == (scale > 1e20)
        losses_of[scale] = read_logs(folder)["log_train_Class.csv"]
    assert all(np.isfinite(log["Train Loss"]).all() for log in losses_of.values())


def test_compile_changes_no_key_of_the_checkpoint(tiny_run, monkeypatch, capsys):
    flags = ["--arch", "googlenet", "--bn", "frozen", "--n_epochs", 1]
    plain = tiny_run(*flags)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = tiny_run(*flags, "--compile")
    assert "--compile: the network was compiled in" in capsys.readouterr().out
    before, after = (netlib.read_checkpoint(folder)["state_dict"] for folder in (plain, compiled))
    assert list(before) == list(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-5)
    for name, table in read_logs(plain).items():
        pd.testing.assert_frame_equal(table, read_logs(compiled)[name], rtol=1e-3)


@pytest.fixture
def eight_classes(tmp_path):
    """A data set "eight" of 8 classes of 5 images, 4 of which train; returns the source path."""
    write_class_folders(tmp_path / "held" / "eight", per_class=(5,) * 8)
    return tmp_path / "held"


def test_no_class_held_out_or_tested_is_trained_on_or_mined(eight_classes, run_main, monkeypatch, capsys):
    trained, mined, probed = set(), [], set()
    original, original_mining, original_subset = main.train_one_epoch, main.mine_labels, main.Subset

    def classes(dataset):
        return {Path(name).parent.name for name in dataset.images.names}

    def spy(network, criteria, adversaries, optimizer, scaler, loaders, *rest):
        for loader in loaders.values():
            images = loader.loader.dataset.images
            trained.update(images.names[index] for batch in loader.loader.batch_sampler for index, *_ in batch)
        return original(network, criteria, adversaries, optimizer, scaler, loaders, *rest)

    def spy_mining(network, loader, *rest, **more):
        mined.append(classes(loader.dataset))
        return original_mining(network, loader, *rest, **more)

    def spy_subset(dataset, indices):
        probed.update(classes(dataset))
        return original_subset(dataset, indices)

    monkeypatch.setattr(main, "train_one_epoch", spy)
    monkeypatch.setattr(main, "mine_labels", spy_mining)
    monkeypatch.setattr(main, "Subset", spy_subset)
    flags = ["--dataset", "eight", "--source_path", eight_classes, "--shared_num_classes", 3]
    folder = run_main(*flags, "--val_classes", 0.5)
    assert {Path(name).parent.name for name in trained} == {"class_00", "class_01"}
    assert mined
    assert all(names == {"class_00", "class_01"} for names in [*mined, probed])
    assert len(torch.load(folder / "last.pth.tar", weights_only=True)["progress"]["shared_labels"]) == 10
    scores = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "Recall @ 4", "Recall @ 8", "mAP @ R", "R-Precision"]
    assert list(read_logs(folder)["log_val_Class.csv"]) == ["Epochs", *scores, *(f"Val {score}" for score in scores)]
    capsys.readouterr()
    run([folder], evaluate)
    of_test, of_val = capsys.readouterr().out.split("Class embedding of 10 eight images, Val")  # 2 classes of 5
    assert "Class embedding of 20 eight images" in of_test
    best = read_logs(folder)["log_val_Class.csv"].iloc[0]
    for printed, prefix in ((of_test, ""), (of_val, "Val ")):
        (line,) = [line for line in printed.splitlines() if line.startswith("Recall @ 1")]
        assert [float(value) for value in line.split()[-2:]] == [best[f"{prefix}Recall @ 1"]] * 2
    assert {path.name for path in folder.iterdir()} == RUN_FILES


def test_the_best_epoch_is_that_of_the_classes_it_is_selected_by(eight_classes, run_main, monkeypatch):
    test_recalls, val_recalls = [0.1, 0.5, 0.7, 0.6], [0.1, 0.2, 0.3, 0.9]  # the first before training
    scores = iter([value for pair in 2 * list(zip(test_recalls, val_recalls)) for value in pair])
    monkeypatch.setattr(main.evaluate, "score_set", lambda *_: {"NMI": 0.5, "F1": 0.5, "Recall @ 1": next(scores)})
    flags = ["--dataset", "eight", "--source_path", eight_classes, "--val_classes", 0.5, "--n_epochs", 3]
    for select, best in (("test", 1), ("val", 2)):
        folder = run_main(*flags, "--select", select)
        stored = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
        assert len(stored["progress"]["train_rows"]) - 1 == best
        run = auxiliaries.read_run(folder)
        assert evaluate.best_index(run.val_rows, "", run.flags["select"]) == best
        assert evaluate.scores_of_set(run.val_rows[best], "")["Recall @ 1"] == test_recalls[best + 1]
        assert "Val Recall @ 1" not in evaluate.scores_of_set(run.val_rows[best], "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--select", "val"], "--select val: there are no classes to select by"),
        (["--val_classes", "0.9"], "--val_classes 0.9: holds out 4 of 4 training classes"),
        (["--val_classes", "1"], "is not a fraction from 0"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(eight_classes, run_main, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_main("--dataset", "eight", "--source_path", eight_classes, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()
