"""Scores against golden values, naive loops and by hand; feature extraction."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import datasets
import evaluate
import netlib
from data.images import ImageSet
from support.errors import DivergedError

GOLDEN = Path(__file__).parent / "golden"
K_VALS = [1, 2, 5, 1000]


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
    """Return (embeddings, labels) whose distances are easy or hard to tell apart in float32."""
    labels = rng.integers(0, 12, 90)
    embeddings = rng.normal(size=(90, 5))
    if kind == "unit sphere":
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    elif kind == "clustered":  # by class, all of them far from the origin
        embeddings = 50 + rng.normal(size=(12, 6))[labels] + 1e-4 * rng.normal(size=(90, 6))
    elif kind == "overlapping":
        embeddings = rng.normal(size=(12, 6))[labels] + rng.normal(size=(90, 6))
    elif kind == "duplicated":
        embeddings = rng.integers(-2, 3, (90, 3))
    elif kind == "almost the same":  # the float32 product of the raw points would tell nothing
        embeddings = 1 + 1e-4 * rng.normal(size=(90, 4))
    elif kind == "single images":
        labels = rng.permutation(np.minimum(np.arange(90), 60))
    elif kind == "one class":  # is most of the set
        labels = np.where(rng.random(90) < 0.8, 3, labels)
    return embeddings.astype(np.float32), labels


KINDS = ["random", "unit sphere", "clustered", "overlapping", "duplicated", "almost the same", "single images",
         "one class"]  # fmt: skip


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree_with_sorting_all_distances(kind, with_gallery):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        embeddings, labels = points_of_kind(kind, rng)
        is_query = rng.random(len(labels)) < 0.4 if with_gallery else None
        expected = naive_scores(embeddings, labels, is_query)
        for block_size in (1, 17, 256):
            scores = evaluate.retrieval_scores(embeddings, labels, K_VALS, is_query=is_query, block_size=block_size)
            assert scores == pytest.approx(expected, abs=1e-3), f"{kind}, seed {seed}, blocks of {block_size}"


@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
def test_a_large_set_agrees_at_any_scale(scale):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 200, 1500)
    embeddings = (rng.normal(size=(200, 8))[labels] + 0.6 * rng.normal(size=(1500, 8))).astype(np.float32)
    scores = evaluate.retrieval_scores(scale * embeddings, labels, K_VALS)
    assert 0.2 < scores["mAP @ R"] < 0.9
    assert scores == pytest.approx(naive_scores(embeddings, labels), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e6])
def test_a_collapsed_embedding_scores_0(value):
    labels = np.repeat(np.arange(9), 10)
    for is_query in (None, np.arange(90) % 2 == 0):
        scores = evaluate.retrieval_scores(np.full((90, 7), value), labels, [1, 2, 8], is_query=is_query)
        assert scores == dict.fromkeys(scores, 0.0)
    # only those that are almost one point: what float32 cannot tell counts as a tie
    almost = value + 1e-12 * np.random.default_rng(0).normal(size=(90, 7))
    almost[0] = value + 1
    assert evaluate.retrieval_scores(almost, labels, [1])["Recall @ 1"] < 0.02


def test_scores_of_pytorch_metric_learning():
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


def test_queries_are_searched_in_the_gallery_only():
    # query 0 has its class in the gallery behind another class; query 1 lies on query 0, which is no gallery image
    embeddings = np.array([[0.0], [0.0], [1.0], [2.0]], dtype=np.float32)
    labels, is_query = np.array([0, 0, 1, 0]), np.array([True, True, False, False])
    scores = evaluate.retrieval_scores(embeddings, labels, [1, 2], is_query=is_query)
    assert (scores["Recall @ 1"], scores["Recall @ 2"]) == (0.0, 1.0)


def test_f1_by_hand():
    # pairs: same class 1 + 3 = 4, same cluster 3 + 1 = 4, both 1 + 1 = 2
    _, f1 = evaluate.clustering_scores(np.array([0, 0, 1, 1, 1]), np.array([5, 5, 5, 7, 7]))
    assert f1 == pytest.approx(2 * 2 / (4 + 4))
    assert evaluate.clustering_scores(np.arange(4), np.arange(4))[1] == 0  # no pairs at all


def test_score_set_of_perfect_embeddings():
    labels = np.repeat(np.arange(4), 5)
    embeddings = np.eye(4, dtype=np.float32)[labels] + 1e-3 * np.random.default_rng(0).normal(size=(20, 4))
    scores = evaluate.score_set(embeddings.astype(np.float32), labels, [1, 2], seed=0)
    names = ["NMI", "F1", "Recall @ 1", "Recall @ 2", "mAP @ R", "R-Precision"]
    assert scores == pytest.approx(dict.fromkeys(names, 1.0))
    without = evaluate.score_set(embeddings, labels, [1, 2], seed=0, with_clustering=False)
    assert without == scores | {"NMI": None, "F1": None}


@pytest.mark.parametrize(("n_images", "n_classes", "n_clusters"), [(2588, 400, 15), (805, 10, 15), (400, 400, 8)])
def test_random_labels_agree_with_nothing_however_many_there_are(n_images, n_classes, n_clusters):
    """NMI of the first is 0.26; the last is a factor with a level of its own for each image."""
    rng = np.random.default_rng(0)
    labels, clusters = np.arange(n_images) % n_classes, rng.integers(n_clusters, size=n_images)
    row = evaluate.describe_clusters(clusters, n_clusters, labels, {"photo": labels, "mined": clusters})
    assert row["AMI class"] == row["AMI photo"] == pytest.approx(0, abs=0.02)
    assert row["AMI mined"] == pytest.approx(1)


def test_clusters_are_described_by_size_and_what_they_match():
    clusters = np.array([0, 0, 0, 4, 4, 2])
    classes, factors = np.array([0, 1, 2, 0, 1, 2]), {"light": np.array([1, 1, 1, 0, 0, 2])}
    row = evaluate.describe_clusters(clusters, 5, classes, factors)
    sizes = {"Clusters": 3, "Empty": 2, "Smallest": 1, "Median": 2.0, "Largest": 3, "ARI with previous": None}
    assert {name: row[name] for name in sizes} == sizes
    assert row["AMI light"] == pytest.approx(1.0)
    assert row["AMI class"] < 0.1
    # pairs of 15 together in the labels mined before: 2; now: 4; in both: 1, by chance 2 * 4 / 15, at most (2 + 4) / 2
    row = evaluate.describe_clusters(clusters, 5, classes, factors, previous=np.array([0, 0, 1, 2, 3, 2]))
    assert row["ARI with previous"] == pytest.approx((1 - 8 / 15) / (3 - 8 / 15))
    row = evaluate.describe_clusters(clusters, 5, classes, factors, previous=(clusters + 1) % 5)
    assert row["ARI with previous"] == 1.0  # other names for the same clusters


def test_probe_by_hand():
    line = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [13.0]])
    classes, mined = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 0])
    # the nearest other points are 1, 0, 1, 4, 3, 4
    assert evaluate.nearest_neighbour_accuracy(line, classes, k=1) == pytest.approx(5 / 6)
    # the three nearest, and their vote: {1, 2, 3}: 1; {0, 2, 3}: 1; {1, 0, 3}: 0; {4, 5, 2}, {3, 5, 2}, {4, 3, 2}: 1
    assert evaluate.nearest_neighbour_accuracy(line, classes, k=3) == pytest.approx(3 / 6)
    # of two that tie the nearer; of the last three points: {4, 5}: 0; {3, 5}: 1; {4, 3}: 0
    assert evaluate.nearest_neighbour_accuracy(line[3:], mined[3:], k=2) == pytest.approx(1 / 3)
    labels = {"Class": classes, "Mined": mined, "light": mined[::-1]}
    scores = evaluate.probe_scores({"Class": line, "Shared": -line[::-1]}, labels)
    assert list(scores) == [
        "Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared", "light from Class",
        "light from Shared", "Class by chance", "Mined by chance", "light by chance",
    ]  # fmt: skip
    assert scores["light from Shared"] == evaluate.nearest_neighbour_accuracy(line, mined)
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


def test_probe_of_all_sets_takes_the_labels_of_the_images_it_reads(shapes):
    torch.manual_seed(0)
    network = netlib.build_network("googlenet", {"Class": 4, "Shared": 3}, pretrained=False, freeze_batchnorm=False)
    train, test = (images.classes(0, 5) for images in shapes)  # 120 images each
    sets = {"test": test, "Set 1": replace(test.classes(0, 3), factors={}), "Set 2": alone(test)}
    make = partial(datasets.make_loader, n_workers=0, pin_memory=False, batch_size=40)
    whole, *tests = (
        make(datasets.ImageDataset(images, datasets.test_transform(32))) for images in (train, *sets.values())
    )
    tests = dict(zip(sets, tests))
    chosen, chosen_of_test = (evaluate.probe_subset(images.labels, 1) for images in (train, test))
    part = make(Subset(whole.dataset, chosen))
    of_run = datasets.Loaders(None, None, None, train_in_order=whole, tests=tests, probe=part)
    mined, tasks = np.arange(120) % 7, ["Class", "Shared"]
    embeddings = evaluate.embed_sets(network, tests, tasks)
    found = evaluate.probe_sets(network, of_run, mined, embeddings, 1)
    features, read = evaluate.extract_features(network, part, tasks), evaluate.nearest_neighbour_accuracy
    assert found["Class from Shared"] == read(features["Shared"], train.labels[chosen])
    assert found["Mined from Class"] == read(features["Class"], mined[chosen])
    assert found["size from Shared"] == read(features["Shared"], train.factors["size"][chosen])
    features = {task: values[chosen_of_test] for task, values in embeddings["test"].items()}
    assert found["Test Class from Class"] == read(features["Class"], test.labels[chosen_of_test])
    assert found["Test light from Shared"] == read(features["Shared"], test.factors["light"][chosen_of_test])
    assert not [name for name in found if name.startswith("Set ") or name == "Test Mined from Class"]


def alone(images):
    """Return the first image of each class, with its factors."""
    first = np.unique(images.labels, return_index=True)[1]
    return ImageSet([images.names[i] for i in first], np.arange(len(first)), images.class_names, images.pixels[first],
                    {name: levels[first] for name, levels in images.factors.items()})  # fmt: skip


@pytest.mark.parametrize("was_training", [True, False])
def test_features_come_in_order_and_the_mode_is_restored(shapes, was_training):
    torch.manual_seed(0)
    network = netlib.build_network("googlenet", {"Class": 4, "Shared": 3}, pretrained=False, freeze_batchnorm=False)
    network.train(was_training)
    images = ImageSet(shapes[0].names[:7], shapes[0].labels[:7], shapes[0].class_names, shapes[0].pixels[:7])
    dataset = datasets.ImageDataset(images, datasets.test_transform(32))
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=3)
    features = evaluate.extract_features(network, loader, ["Class", "Early"])
    assert network.training == was_training
    assert {name: values.shape for name, values in features.items()} == {"Class": (7, 4), "Early": (7, 3072)}
    network.eval()
    with torch.no_grad():
        expected = network(torch.stack([dataset[i][0] for i in range(7)]))["Class"]
    np.testing.assert_allclose(features["Class"], expected.numpy(), rtol=1e-4, atol=1e-5)


class LoudBackbone(torch.nn.Module):
    """A backbone whose features are larger than float16 can hold."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Conv2d(3, 4, 1)
        torch.nn.init.constant_(self.layers.weight, 3e4)

    def forward(self, images, with_pooled=True):
        maps = self.layers(images)
        return maps, maps.mean((2, 3))


@pytest.mark.parametrize("output", ["Pooled", "Class"])
def test_features_beyond_float16_are_told_from_weights_that_are_damaged(output):
    network = netlib.EmbeddingNetwork(LoudBackbone(), {"Class": 3}, freeze_batchnorm=False)
    batches = [(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(2))]
    for network.amp in ("none", "bf16"):
        assert np.isfinite(evaluate.extract_features(network, batches, [output])[output]).all()
    network.amp = "fp16"
    beyond = f"{output} features are not finite: they exceed 65504, the largest float16 number; train with --amp bf16"
    with pytest.raises(DivergedError, match=beyond):
        evaluate.extract_features(network, batches, [output])
    network.backbone.layers.weight.data[0] = torch.nan
    for network.amp in ("none", "fp16"):
        with pytest.raises(DivergedError, match="training has diverged"):
            evaluate.extract_features(network, batches, [output])
