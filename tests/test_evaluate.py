"""Scores against golden values and naive loops; feature extraction; the command."""

import pickle
from pathlib import Path

import layouts
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run, write_class_folders
from PIL import Image

import auxiliaries
import datasets
import evaluate
import netlib

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["metrics_a", "metrics_b"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as values:
        return dict(values)


@pytest.mark.parametrize("block_size", [7, 256])
def test_recall_golden(golden, block_size):
    k_vals = golden["k_vals"].tolist()
    scores = evaluate.retrieval_scores(golden["embeddings"], golden["labels"], k_vals, block_size=block_size)
    assert [scores[f"Recall @ {k}"] for k in k_vals] == pytest.approx(golden["recall"].tolist(), abs=1e-12)


def test_clustering_scores_golden(golden):
    nmi, f1 = evaluate.clustering_scores(golden["labels"], golden["cluster_labels"])
    assert nmi == pytest.approx(float(golden["nmi"]), abs=1e-6)
    assert f1 == pytest.approx(float(golden["f1"]), abs=1e-6)


K_VALS = [1, 2, 5, 1000]


def naive_scores(embeddings, labels, is_query=None):
    """Sort all distances in float64, other classes first where they tie."""
    points = embeddings.astype(np.float64)
    everyone = np.arange(len(labels))
    queries = everyone if is_query is None else np.flatnonzero(is_query)
    sums = dict.fromkeys([*(f"Recall @ {k}" for k in K_VALS), "mAP @ R", "R-Precision"], 0.0)
    for i in queries:
        gallery = everyone[everyone != i] if is_query is None else np.flatnonzero(~is_query)
        distances = ((points[gallery] - points[i]) ** 2).sum(1)
        order = np.lexsort([labels[gallery] == labels[i], distances])
        hits = (labels[gallery] == labels[i])[order]
        n_wanted = int(hits.sum())
        for k in K_VALS:
            sums[f"Recall @ {k}"] += hits[:k].any()
        for place in range(n_wanted):
            sums["mAP @ R"] += hits[place] * hits[: place + 1].mean() / n_wanted
            sums["R-Precision"] += hits[place] / n_wanted
    return {name: total / len(queries) for name, total in sums.items()}


def points_of_kind(kind, rng):
    """Return (embeddings, labels) of a kind that makes the order of distances hard to tell in float32."""
    labels = rng.integers(0, 12, 90)
    if kind == "random":
        embeddings = rng.normal(size=(90, 5))
    elif kind == "clustered":  # by class, all of them far from the origin
        embeddings = 50 + rng.normal(size=(12, 6))[labels] + 1e-4 * rng.normal(size=(90, 6))
    elif kind == "duplicated":
        embeddings = rng.integers(-2, 3, (90, 3))
    elif kind == "collinear":
        embeddings = np.outer(rng.integers(-40, 40, 90), [1, 2, -1])
    elif kind == "identical":
        embeddings = np.ones((90, 4))
    elif kind == "almost the same":  # the float32 product of the raw points would tell nothing
        embeddings = 1 + 1e-5 * rng.integers(-8, 8, (90, 4))
    elif kind == "one far point":  # the others are all but the same beside it
        embeddings = 1e-6 * rng.normal(size=(90, 4))
        embeddings[7] = 1e3
    elif kind == "many scales":
        embeddings = rng.normal(size=(90, 4)) * 10.0 ** rng.integers(-6, 4, (90, 1))
    elif kind == "single images":
        labels = rng.permutation(np.minimum(np.arange(90), 60))
        embeddings = rng.normal(size=(90, 4))
    else:  # one class is most of the set
        labels = np.where(rng.random(90) < 0.8, 3, labels)
        embeddings = rng.normal(size=(90, 4))
    return embeddings.astype(np.float32), labels


KINDS = [
    "random",
    "clustered",
    "duplicated",
    "collinear",
    "identical",
    "almost the same",
    "one far point",
    "many scales",
    "single images",
    "one class",
]


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("few", [0, 512])  # nearer points are counted, or listed
@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree_with_sorting_all_distances(kind, few, with_gallery, monkeypatch):
    monkeypatch.setattr(evaluate, "FEW", few)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        embeddings, labels = points_of_kind(kind, rng)
        is_query = rng.random(len(labels)) < 0.4 if with_gallery else None
        expected = naive_scores(embeddings, labels, is_query)
        for block_size in (1, 17, 256):
            scores = evaluate.retrieval_scores(embeddings, labels, K_VALS, is_query=is_query, block_size=block_size)
            assert scores == pytest.approx(expected, abs=1e-12), f"{kind}, seed {seed}, blocks of {block_size}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_crowd_at_one_distance_is_scored_alike(kind, monkeypatch):
    monkeypatch.setattr(evaluate, "CROWD", -1000)  # so that every query takes the way for crowds
    embeddings, labels = points_of_kind(kind, np.random.default_rng(5))
    scores = evaluate.retrieval_scores(embeddings, labels, K_VALS, block_size=32)
    assert scores == pytest.approx(naive_scores(embeddings, labels), abs=1e-12)


def test_large_sets_search_groups_of_points():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 300, 1500)
    embeddings = rng.normal(size=(300, 8))[labels] + 0.6 * rng.normal(size=(1500, 8))
    embeddings = embeddings.astype(np.float32)
    queries, gallery = np.arange(1500), np.argsort(labels, kind="stable")
    assert evaluate.ClassSearch(embeddings, labels, queries, gallery, "cpu", 256).group > 1
    scores = evaluate.retrieval_scores(embeddings, labels, K_VALS)
    assert 0.2 < scores["mAP @ R"] < 0.9
    assert scores == pytest.approx(naive_scores(embeddings, labels), abs=1e-12)


def test_map_at_r_is_that_of_pytorch_metric_learning():
    """Values of pytorch-metric-learning 2.9 (AccuracyCalculator, k="max_bin_count") for these points."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 6)
    embeddings = (rng.normal(size=(20, 4))[labels] + rng.normal(size=(120, 4))).astype(np.float32)
    scores = evaluate.retrieval_scores(embeddings, labels, [1])
    assert scores["mAP @ R"] == pytest.approx(0.10397222, abs=1e-6)
    assert scores["R-Precision"] == pytest.approx(0.15833333, abs=1e-6)
    assert scores["Recall @ 1"] == pytest.approx(0.19166667, abs=1e-6)


def test_recall_by_hand():
    # a duplicate of another class ties with the own class: no hit at 1; a class of one image never hits
    embeddings = np.array([[0.0], [0.0], [0.0], [9.0]], dtype=np.float32)
    scores = evaluate.retrieval_scores(embeddings, np.array([0, 0, 1, 2]), [1, 2, 3])
    assert scores == {"Recall @ 1": 0, "Recall @ 2": 0.5, "Recall @ 3": 0.5, "mAP @ R": 0, "R-Precision": 0}


def test_map_at_r_by_hand():
    # the query at 0 wants 2 points: the first comes at rank 1, the second at rank 3, beyond R
    embeddings = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    labels, is_query = np.array([0, 0, 1, 0]), np.array([True, False, False, False])
    scores = evaluate.retrieval_scores(embeddings, labels, [1], is_query=is_query)
    assert scores == {"Recall @ 1": 1.0, "mAP @ R": 0.5, "R-Precision": 0.5}


def test_f1_by_hand():
    # pairs: same class 1 + 3 = 4, same cluster 3 + 1 = 4, both 1 + 1 = 2
    labels = np.array([0, 0, 1, 1, 1])
    clusters = np.array([5, 5, 5, 7, 7])
    _, f1 = evaluate.clustering_scores(labels, clusters)
    assert f1 == pytest.approx(2 * 2 / (4 + 4))


def test_score_set_of_perfect_embeddings():
    labels = np.repeat(np.arange(4), 5)
    embeddings = np.eye(4, dtype=np.float32)[labels] + 1e-3 * np.random.default_rng(0).normal(size=(20, 4))
    scores = evaluate.score_set(embeddings.astype(np.float32), labels, [1, 2], seed=0)
    names = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "mAP @ R", "R-Precision"]
    assert scores == pytest.approx(dict.fromkeys(names, 1.0))
    without = evaluate.score_set(embeddings, labels, [1, 2], seed=0, with_clustering=False)
    assert without == scores | {"NMI": None, "F1": None}


def test_clusters_are_described_by_size_and_what_they_match():
    clusters = np.array([0, 0, 0, 4, 4, 2])
    classes, factors = np.array([0, 1, 2, 0, 1, 2]), {"light": np.array([1, 1, 1, 0, 0, 2])}
    row = evaluate.describe_clusters(clusters, 5, classes, factors)
    sizes = {"Clusters": 3, "Empty": 2, "Smallest": 1, "Median": 2.0, "Largest": 3, "ARI with previous": None}
    assert {name: row[name] for name in sizes} == sizes
    assert row["NMI light"] == pytest.approx(1.0)
    assert row["NMI class"] < 0.6
    # pairs of 15 together in the labels mined before: 2; now: 4; in both: 1, by chance 2 * 4 / 15, at most (2 + 4) / 2
    row = evaluate.describe_clusters(clusters, 5, classes, factors, previous=np.array([0, 0, 1, 2, 3, 2]))
    assert row["ARI with previous"] == pytest.approx((1 - 8 / 15) / (3 - 8 / 15))
    row = evaluate.describe_clusters(clusters, 5, classes, factors, previous=(clusters + 1) % 5)
    assert row["ARI with previous"] == 1.0  # other names for the same clusters


def test_clusters_are_shown_by_the_nearest_image_of_each_class():
    clusters = np.array([7, 7, 7, 7, 2, 2, 5])
    distances = np.array([0.3, 0.1, 0.2, 0.4, 0.1, 0.0, 0.0])
    classes = np.array([0, 1, 1, 2, 0, 0, 3])
    shown = evaluate.clusters_to_show(clusters, distances, classes, {})
    assert [caption for caption, _ in shown] == [
        "cluster 7\n4 images\n3 classes", "cluster 2\n2 images\n1 classes", "cluster 5\n1 images\n1 classes"
    ]  # fmt: skip
    assert [indices.tolist() for _, indices in shown] == [[1, 0, 3], [5], [6]]
    assert evaluate.clusters_to_show(clusters, distances, classes, {}, n_images=2)[0][1].tolist() == [1, 0]
    factors = {"light": np.array([1, 1, 1, 0, 0, 1, 1]), "size": np.array([0, 1, 0, 1, 0, 0, 1])}
    captions = [caption for caption, _ in evaluate.clusters_to_show(clusters, distances, classes, factors)]
    assert [caption.split("\n", 3)[3] for caption in captions] == [
        "75 % alike in\nlight", "100 % alike in\nsize", "100 % alike in\nsize"
    ]  # fmt: skip


def test_of_many_clusters_the_largest_middle_and_smallest_are_shown():
    clusters = np.repeat(np.arange(20), np.arange(20))  # cluster i has i images, cluster 0 none
    shown = evaluate.clusters_to_show(clusters, np.zeros(190), np.arange(190), {})
    assert [int(caption.split()[1]) for caption, _ in shown] == [19, 18, 17, 12, 11, 10, 9, 3, 2, 1]


def test_probe_by_hand():
    line = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [13.0]])
    classes, mined = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 0])
    # the nearest other points are 1, 0, 1, 4, 3, 4
    assert evaluate.nearest_neighbour_accuracy(line, classes, k=1) == pytest.approx(5 / 6)
    # the three nearest, and their vote: {1, 2, 3}: 1; {0, 2, 3}: 1; {1, 0, 3}: 0; {4, 5, 2}, {3, 5, 2}, {4, 3, 2}: 1
    assert evaluate.nearest_neighbour_accuracy(line, classes, k=3) == pytest.approx(3 / 6)
    # of two that tie the nearer; of the last three points: {4, 5}: 0; {3, 5}: 1; {4, 3}: 0
    assert evaluate.nearest_neighbour_accuracy(line[3:], mined[3:], k=2) == pytest.approx(1 / 3)
    scores = evaluate.probe_scores({"Class": line, "Shared": -line[::-1]}, classes, mined)
    assert list(scores) == [
        "Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared", "Class by chance",
        "Mined by chance",
    ]  # fmt: skip
    assert (scores["Class by chance"], scores["Mined by chance"]) == (4 / 6, 4 / 6)
    assert scores["Class from Class"] == 4 / 6  # of all five others: the class of the most, 1, for every point


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([24] * 24, [6] * 24),  # 144 of 576 images
        ([60] * 100, [10] * 100),  # 1,000 of 6,000
        ([5, 5], [5, 5]),
        ([5] * 3 + [1], [5] * 3),  # a class that cannot be found
        ([1] * 299 + [2, 2], [2, 2]),
        ([1] * 50, []),
    ],
)
def test_probe_takes_as_many_images_of_each_class(sizes, expected):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    chosen = evaluate.probe_subset(labels, seed=1)
    assert (np.diff(chosen) > 0).all()
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() == expected
    assert (evaluate.probe_subset(labels, seed=1) == chosen).all()


def test_probe_of_many_small_classes_takes_some_of_them_whole():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5000), 6))
    chosen, other = (evaluate.probe_subset(labels, seed) for seed in (1, 2))
    classes, counts = np.unique(labels[chosen], return_counts=True)
    assert (len(classes), set(counts)) == (200, {5})
    assert set(labels[other]) != set(classes)


@pytest.mark.parametrize("was_training", [True, False])
def test_features_come_in_order_and_the_mode_is_restored(shapes, was_training):
    torch.manual_seed(0)
    network = netlib.build_network("resnet50", {"Class": 4, "Shared": 3}, pretrained=False, freeze_batchnorm=False)
    network.train(was_training)
    images = datasets.ImageSet(shapes[0].names[:7], shapes[0].labels[:7], shapes[0].class_names, shapes[0].pixels[:7])
    dataset = datasets.ImageDataset(images, datasets.test_transform(32))
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=3)
    features = evaluate.extract_features(network, loader, ["Class", "Early"])
    assert network.training == was_training
    assert features["Class"].shape == (7, 4)
    assert features["Early"].shape == (7, 4096)
    network.eval()
    with torch.no_grad():
        expected = network(torch.stack([dataset[i][0] for i in range(7)]))["Class"]
    np.testing.assert_allclose(features["Class"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_are_refused(shapes):
    network = netlib.build_network("resnet50", {"Class": 4}, pretrained=False, freeze_batchnorm=False)
    torch.nn.init.constant_(network.heads["Class"].bias, torch.nan)
    dataset = datasets.ImageDataset(shapes[0], datasets.test_transform(32))
    loader = datasets.make_loader(torch.utils.data.Subset(dataset, [0, 1]), n_workers=0, pin_memory=False)
    with pytest.raises(evaluate.NonFiniteFeaturesError, match="Class features are not finite"):
        evaluate.extract_features(network, loader, ["Class"])


def test_queries_are_searched_in_the_gallery_only():
    # query 0 has its class in the gallery behind another class; query 1 lies on query 0, which is no gallery image
    embeddings = np.array([[0.0], [0.0], [1.0], [2.0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 0])
    is_query = np.array([True, True, False, False])
    scores = evaluate.retrieval_scores(embeddings, labels, [1, 2], is_query=is_query)
    assert (scores["Recall @ 1"], scores["Recall @ 2"]) == (0.0, 1.0)


def command(*flags):
    """Run evaluate.py as a user would."""
    run(flags, evaluate)


def refused(capsys, *flags):
    """Run evaluate.py, which is to stop with exit code 2 and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("evaluate.py: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A stored run of two epochs on a data set "tiny"."""
    folder = tmp_path_factory.mktemp("stored")
    write_class_folders(folder / "source" / "tiny")
    return small_run(folder, "run", "--seed", 5)


def small_run(folder, name, *flags):
    """Train on the data set "tiny" in folder/source and return the run folder."""
    base = "--dataset tiny --img_size 32 --bs 8 --cs_per_bs 2 2 --n_epochs 2 --kernels 0 --lr 1e-3 --adv_weights 50 "
    base += (
        f"--shared_num_classes 3 --not_pretrained --source_path {folder}/source --save_path {folder} --savename {name}"
    )
    return run([*base.split(), *flags])


def read_table(printed):
    """Return {score: (now, logged)} from what the command printed."""
    rows = [line.split("  ") for line in printed.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows if len(row) > 1}


def test_a_stored_run_scores_as_logged_to_the_last_digit(stored, capsys):
    command(stored)
    table = read_table(capsys.readouterr().out)
    log = pd.read_csv(stored / "log_val_Class.csv", dtype=str)
    best = log.iloc[log["Recall @ 1"].astype(float).idxmax()]
    for name in ("NMI", "F1", "Recall @ 1", "Recall @ 8", "mAP @ R", "R-Precision"):
        assert table[name] == [best[name], best[name]]


def test_a_checkpoint_file_and_the_shared_embedding(stored, capsys):
    command(stored / "checkpoint.pth.tar", "--embedding", "Shared")
    printed = capsys.readouterr().out
    assert "Shared embedding of 10 tiny images" in printed
    assert "logged" not in printed
    command(stored, "--checkpoint", "checkpoint.pth.tar")
    assert "Class embedding of 10 tiny images" in capsys.readouterr().out


def test_embeddings_are_stored_for_other_tools(stored, tmp_path, capsys):
    command(stored, "--save_embeddings", tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as kept:
        assert kept["embeddings"].shape == (10, 128)
        np.testing.assert_allclose(np.linalg.norm(kept["embeddings"], axis=1), 1, rtol=1e-5)
        assert kept["labels"].tolist() == [0] * 5 + [1] * 5
        assert all(Path(path).is_file() for path in kept["paths"])
        scores = evaluate.retrieval_scores(kept["embeddings"], kept["labels"], [1])
    capsys.readouterr()
    command(stored)
    assert read_table(capsys.readouterr().out)["Recall @ 1"][0] == repr(scores["Recall @ 1"])
    assert "exists already" in refused(capsys, stored, "--save_embeddings", tmp_path / "e.npz")


def test_each_test_set_is_scored_with_its_own_checkpoint(tmp_path, run_main, capsys):
    layouts.LAYOUTS["vehicle_id", "readme"](tmp_path / "source")
    flags = ["--n_epochs", 1, "--bs", 4, "--shared_num_classes", 2]
    folder = run_main("--dataset", "vehicle_id", "--source_path", tmp_path / "source", *flags)
    capsys.readouterr()
    command(folder, "--save_embeddings", tmp_path / "e.npz")
    printed, log = capsys.readouterr().out, pd.read_csv(folder / "log_val_Class.csv")
    for i, part in enumerate(printed.split(str(folder))[1:], start=1):
        assert part.startswith(f"/checkpoint_set{i}.pth.tar")
        assert read_table(part)["NMI"][0] == repr(float(log[f"Set {i} NMI"][0]))
        assert (tmp_path / f"e_set{i}.npz").exists()
    assert i == 3


def test_unusable_checkpoints_are_one_line(stored, tmp_path, capsys):
    good = (stored / "checkpoint.pth.tar").read_bytes()
    path = tmp_path / "checkpoint.pth.tar"
    contents = torch.load(stored / "checkpoint.pth.tar", weights_only=True)

    path.write_bytes(good[: len(good) // 2])
    assert str(path) in refused(capsys, path)
    torch.save(contents | {"flags": Path("x")}, path)
    assert str(path) in refused(capsys, path)
    torch.save(contents | {"flags": contents["flags"] | {"arch": "googlenet"}}, path)
    assert "resnet50" in refused(capsys, path)
    for flag, value in [("img_size", "64"), ("bs", -1), ("k_vals", [0]), ("amp", "int3"), ("seed", None)]:
        torch.save(contents | {"flags": contents["flags"] | {flag: value}}, path)
        assert f"its flags hold no usable {flag}" in refused(capsys, path)
    assert "no such run folder" in refused(capsys, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(capsys, tmp_path / "empty")
    assert "no images of --dataset" in refused(capsys, stored, "--source_path", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b"], "2 runs; give one to score, or --compare"),
        (["a", "--csv", "t.csv"], "--csv: goes only with --compare"),
        (["a", "--over", "seed"], "--over: goes only with --compare"),
        (["a", "--compare", "--checkpoint", "x"], "--checkpoint: does not go with --compare"),
        (["a", "--compare", "--plot", "x.jpeg"], "ends in .svg, .png or .pdf"),
        (["a", "--save_embeddings", "x.txt"], "ends in .npz"),
        (["a", "--save_embeddings", "nowhere/x.npz"], "there is no folder nowhere"),
        (["a", "--kernels", "-1"], "give 0 or more"),
        (["nowhere", "--compare"], "no run to read among nowhere"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    assert message in refused(capsys, *flags)


def write_run(folder, recalls, **flags):
    """Write what --compare reads of a run; recalls are those of epochs 0, 1, ..."""
    folder.mkdir(parents=True)
    defaults = {"dataset": "cub200", "seed": 1, "adv_weights": [2500.0], "savename": folder.name}
    auxiliaries.write_flags(folder, defaults | flags)
    for epoch, recall in enumerate(recalls):
        row = {"Epochs": epoch, "Time": 1.5, "NMI": recall / 2, "Recall @ 1": recall}
        auxiliaries.append_row(folder / "log_val_Class.csv", row)


def test_comparison_by_hand(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a1", [0.2, 0.6, 0.4])
    write_run(tmp_path / "runs" / "a2", [0.2, 0.3, 0.5], seed=2, kernels=0)
    write_run(tmp_path / "runs" / "b1", [0.1, 0.2], adv_weights=[0.0])
    (tmp_path / "runs" / "c").mkdir()
    write_run(tmp_path / "runs" / "d", [0.5])
    with open(tmp_path / "runs" / "d" / "hypa.pkl", "wb") as file:
        pickle.dump({"dataset": Path("x")}, file)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.png"
    command("--compare", tmp_path / "runs", tmp_path / "nowhere", "--csv", csv, "--plot", plot)
    printed = capsys.readouterr().out
    for folder, reason in [
        ("runs/c", "holds no hypa.pkl"),
        ("runs/d", "hypa.pkl cannot be read"),
        ("nowhere", "no such"),
    ]:
        assert any(line.startswith(f"skipped {tmp_path}/{folder}: {reason}") for line in printed.splitlines())
    table = pd.read_csv(csv).set_index(["run", "adv_weights", "at"])

    def cell(run, weight, at, column="Recall @ 1"):
        (value,) = table.sort_index().loc[[(run, weight, at)], column]
        return value

    assert cell("a1", 2500, "best") == 0.6
    assert cell("a1", 2500, "best", "epoch") == 1
    assert cell("a1", 2500, "last") == 0.4
    assert cell("a1", 2500, "last", "epochs done") == 3
    assert cell("mean of 2", 2500, "best") == pytest.approx(0.55)
    assert cell("mean of 2", 2500, "best", "NMI") == pytest.approx(0.275)
    assert cell("standard deviation", 2500, "best") == pytest.approx(0.1 / 2**0.5)
    assert cell("mean of 2", 2500, "last") == pytest.approx(0.45)
    assert cell("gap to the paper", 2500, "best") == pytest.approx(0.55 - 0.661)
    assert cell("gap to the paper", 0, "last") == pytest.approx(0.2 - 0.661)
    assert "mean of 1" not in printed
    assert table.sort_index().loc["paper: MIC + margin", "Recall @ 1"].item() == 0.661
    with Image.open(plot) as picture:
        assert picture.width > 500


def test_recall_over_a_flag_by_hand(tmp_path, capsys):
    for seed, recalls in [(1, [0.5, 0.6, 0.4]), (2, [0.5, 0.8])]:
        write_run(tmp_path / "runs" / f"c30_{seed}", recalls, shared_num_classes=30, seed=seed)
    write_run(tmp_path / "runs" / "c4_1", [0.3], shared_num_classes=4)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    command("--compare", tmp_path / "runs", "--over", "shared_num_classes", "--csv", csv, "--plot", plot)
    printed = capsys.readouterr().out.split("Recall @ 1 over --shared_num_classes")[1].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in printed[2:]}
    assert list(rows) == ["4", "5", "10", "20", "30", "50", "100", "150", "200", "250", "300"]
    assert rows["4"] == ["0.3000", "0.3000"]
    assert rows["5"] == ["0.6040"]  # the paper's
    assert " ".join(rows["30"]) == "0.7000 +- 0.1414 (2 runs) 0.6000 +- 0.2828 (2 runs) 0.6470"
    assert len(pd.read_csv(csv)) == 2 * (3 + 2 + 2) + 1  # runs, mean and deviation, gaps; the paper's row
    assert plot.read_text().count("<svg") == 1


def test_differences_are_paired_by_seed(tmp_path, capsys):
    plain, mic = [0.30, 0.50, 0.70], [0.34, 0.52, 0.77]
    for seed, (one, other) in enumerate(zip(plain, mic)):
        write_run(tmp_path / "runs" / f"plain{seed}", [0.9, one], seed=seed, adv_weights=[0.0], n_epochs=2)
        write_run(tmp_path / "runs" / f"mic{seed}", [0.9, other], seed=seed, n_epochs=2)
    write_run(tmp_path / "runs" / "mic8", [0.1, 0.1], seed=8, n_epochs=2)  # without a partner
    write_run(tmp_path / "runs" / "mic9", [0.9], seed=9, n_epochs=2)  # not through, nor is its partner
    write_run(tmp_path / "runs" / "plain9", [0.1], seed=9, adv_weights=[0.0], n_epochs=2)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    command("--compare", tmp_path / "runs", "--against", tmp_path / "runs" / "plain1", "--csv", csv, "--plot", plot)
    printed = capsys.readouterr().out
    table = pd.read_csv(csv, dtype={"seed": str})
    rows = table[table["run"].str.contains("difference|interval") & (table["at"] == "last")].set_index("run")
    assert list(rows.index) == ["difference, mean of 3", "95 % interval from", "95 % interval to"]
    assert set(rows["adv_weights"]) == {2500.0}  # none of the reference to itself
    # 0.04, 0.02, 0.07: mean 0.13 / 3, s = 0.0251661, t(0.975, 2) = 4.302653 from a table
    mean, half = 0.13 / 3, 4.302653 * 0.0251661 / 3**0.5
    expected = [mean, mean - half, mean + half]
    assert rows["Recall @ 1"].tolist() == pytest.approx(expected, abs=1e-6)
    assert rows["NMI"].tolist() == pytest.approx([value / 2 for value in expected], abs=1e-6)
    best = table[table["run"].str.contains("difference|interval") & (table["at"] == "best")]
    assert best["Recall @ 1"].tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert "difference, mean of 3" in printed
    assert "plain1" in plot.read_text()
    left_out = {line.split("/runs/")[1] for line in printed.splitlines() if line.startswith("left out")}
    assert left_out == {"mic8, no run to compare with has its seed", "mic9, 1 of 2 epochs", "plain9, 1 of 2 epochs"}
    message = refused(capsys, "--compare", tmp_path / "runs" / "mic0", "--against", tmp_path / "runs" / "plain1")
    assert "plain1: not the folder of one of the runs that are compared" in message
    assert "--against: goes only with --compare" in refused(capsys, "a", "--against", "b")
    command(
        "--compare", tmp_path / "runs" / "mic0", tmp_path / "runs" / "plain0", "--against", tmp_path / "runs/plain0"
    )
    printed = capsys.readouterr().out
    assert "difference, mean of 1" in printed
    assert "interval" not in printed  # of one difference
    (tmp_path / "p.svg").unlink()
    runs = [tmp_path / "runs" / name for name in ("mic8", "plain0")]
    command("--compare", *runs, "--against", runs[0], "--plot", plot)
    assert f"{tmp_path}/runs/plain0, no run to compare with has its seed" in capsys.readouterr().out
    assert "band: one standard deviation" in plot.read_text()  # the curves over the epochs


def test_differences_of_several_data_and_test_sets(tmp_path, capsys):
    for name, weights, gain in [("plain", [0.0], 0.0), ("mic", [9.0], 0.1)]:
        for seed in (1, 2):
            folder = tmp_path / "runs" / f"{name}_seed{seed}"
            folder.mkdir(parents=True)
            flags = {"dataset": "vehicle_id", "seed": seed, "adv_weights": weights, "savename": folder.name}
            auxiliaries.write_flags(folder, flags)
            row = {"Epochs": 0, "Time": 1.0, "Set 1 NMI": None, "Set 1 Recall @ 1": 0.5, "Set 2 Recall @ 1": 0.6 + gain}
            auxiliaries.append_row(folder / "log_val_Class.csv", row)
    write_run(tmp_path / "runs" / "other", [0.3], dataset="shapes")
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    command("--compare", tmp_path / "runs", "--against", tmp_path / "runs/plain_seed2", "--csv", csv, "--plot", plot)
    assert "no differences on shapes, of which it is no run" in capsys.readouterr().out
    table = pd.read_csv(csv)
    table = table[(table["run"] == "difference, mean of 2") & (table["at"] == "last")].set_index("test set")
    assert table["Recall @ 1"].to_dict() == {"Set 1": 0.0, "Set 2": pytest.approx(0.1)}
    assert "difference in Recall @ 1" in plot.read_text()
    assert "difference in NMI" not in plot.read_text()  # which some run lacks
    message = refused(capsys, "a", "--compare", "--against", "b", "--over", "seed")
    assert "--against: does not go with --over" in message


def test_a_reference_that_cannot_be_read_is_named(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [0.3])
    (tmp_path / "runs" / "broken").mkdir()
    message = refused(capsys, "--compare", tmp_path / "runs", "--against", tmp_path / "runs" / "broken")
    assert f"--against {tmp_path}/runs/broken: {tmp_path}/runs/broken: holds no hypa.pkl" in message


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_runs_with_and_without_classes_held_out_are_apart(tmp_path, capsys, names):
    write_run(tmp_path / "a", [0.3])
    write_run(tmp_path / "b", [0.4], val_classes=0.25, select="val")
    log = tmp_path / "b" / "log_val_Class.csv"
    log.write_text("Epochs,Time,NMI,Recall @ 1,Val Recall @ 1\n0,1,0.2,0.4,0.6\n1,1,0.2,0.5,0.55\n")
    csv = tmp_path / "t.csv"
    command("--compare", *(tmp_path / name for name in names), "--csv", csv)
    assert "mean of" not in capsys.readouterr().out
    table = pd.read_csv(csv)
    best = table[table["at"] == "best"].set_index(["run", "test set"])["Recall @ 1"]
    assert best.loc[[("b", "Val")]].tolist() == [0.6]
    assert ("a", "Val") not in best.index
    assert {best[name, where] for name, where in best.index if name == "b" and where != "Val"} == {0.4}


@pytest.mark.parametrize("n", [2, 5, 30])
def test_confidence_interval_holds_the_mean_in_95_of_100(n):
    values = np.random.default_rng(n).normal(0.3, 2.0, (n, 20_000))
    low, high = evaluate.confidence_interval(values)
    assert np.mean((low <= 0.3) & (high >= 0.3)) == pytest.approx(0.95, abs=0.006)


def test_a_run_without_the_shared_task_has_a_shared_embedding_of_size_0(tmp_path, capsys):
    write_run(tmp_path / "a", [0.3], embed_sizes=[128, 128], task_p=[1.0, 0.0], adv_weights=[0.0], dataset="shapes")
    write_run(tmp_path / "b", [0.4], embed_sizes=[128, 64], task_p=[1.0, 0.8], dataset="shapes")
    command("--compare", tmp_path / "a", tmp_path / "b", "--over", "embed_sizes")
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "   shapes best epoch shapes last epoch", "0             0.3000            0.3000",
        "64            0.4000            0.4000",
    ]  # fmt: skip
    assert "no run has this flag" in refused(capsys, "--compare", tmp_path / "a", "--over", "unheard_of")
    write_run(tmp_path / "c", [0.5], embed_sizes=[512, 64], task_p=[1.0, 0.8], dataset="shapes")
    write_run(tmp_path / "d", [0.6], embed_sizes=[128, 64], task_p=[1.0, 0.8], adv_weights=[1.0], dataset="shapes")
    run_lines = evaluate.ablation_lines(
        [auxiliaries.read_run(tmp_path / name) for name in "abcd"], "shapes", "", "embed_sizes"
    )
    assert {name: points for name, points in run_lines.items() if name.endswith("best epoch")} == {
        "shapes adv_weights 2500.0 embed_sizes of Class 128 best epoch": {"64": [0.4], "0": [0.3]},
        "shapes adv_weights 2500.0 embed_sizes of Class 512 best epoch": {"64": [0.5]},
        "shapes adv_weights 1.0 embed_sizes of Class 128 best epoch": {"64": [0.6], "0": [0.3]},
    }


def test_unfinished_runs_are_left_out_of_recall_over_a_flag(tmp_path, capsys):
    write_run(tmp_path / "runs" / "done", [0.5, 0.6], tau=[20, 35], n_epochs=2)
    write_run(tmp_path / "runs" / "failed", [0.1], tau=[20, 35], seed=2, n_epochs=2)
    command("--compare", tmp_path / "runs", "--over", "tau")
    printed = capsys.readouterr().out
    assert f"left out of --over: {tmp_path}/runs/failed, 1 of 2 epochs" in printed
    assert printed.splitlines()[-1].split() == ["20", "35", "0.6000", "0.6000"]


def test_runs_on_other_data_have_no_paper(tmp_path, capsys):
    write_run(tmp_path / "a", [0.25], dataset="shapes")
    command("--compare", tmp_path / "a")
    printed = capsys.readouterr().out
    assert "paper" not in printed
    assert "0.2500" in printed
