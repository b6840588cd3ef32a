"""Scores against golden values and naive loops; feature extraction."""

from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import evaluate
import netlib

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["metrics_a", "metrics_b"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as values:
        return dict(values)


@pytest.mark.parametrize("block_size", [7, 1024])
def test_recall_golden(golden, block_size):
    k_vals = golden["k_vals"].tolist()
    recalls = evaluate.recall_at_k(golden["embeddings"], golden["labels"], k_vals, block_size=block_size)
    assert list(recalls.values()) == pytest.approx(golden["recall"].tolist(), abs=1e-12)


def test_clustering_scores_golden(golden):
    nmi, f1 = evaluate.clustering_scores(golden["labels"], golden["cluster_labels"])
    assert nmi == pytest.approx(float(golden["nmi"]), abs=1e-6)
    assert f1 == pytest.approx(float(golden["f1"]), abs=1e-6)


def naive_recall(embeddings, labels, k):
    hits = 0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j: (((embeddings[i] - embeddings[j]) ** 2).sum(), labels[j] == labels[i]))
        hits += any(labels[j] == labels[i] for j in others[:k])
    return hits / len(labels)


@pytest.mark.parametrize("seed", range(5))
def test_recall_agrees_with_sorting_all_distances(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, 60)
    # whole numbers: many exact ties and duplicates, and exact arithmetic
    embeddings = rng.integers(-3, 4, (60, 3)).astype(np.float32)
    recalls = evaluate.recall_at_k(embeddings, labels, [1, 2, 5, 100], block_size=17)
    for k, value in recalls.items():
        assert value == pytest.approx(naive_recall(embeddings, labels, k), abs=1e-12)


def test_recall_by_hand():
    # a duplicate of another class ties with the own class: no hit at 1; a class of one image never hits
    embeddings = np.array([[0.0], [0.0], [0.0], [9.0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 2])
    recalls = evaluate.recall_at_k(embeddings, labels, [1, 2, 3])
    assert recalls == {1: 0.0, 2: 0.5, 3: 0.5}


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
    assert scores == pytest.approx({"NMI": 1.0, "F1": 1.0, "Recall @ 1": 1.0, "Recall @ 2": 1.0})


def test_clusters_are_described_by_size_and_what_they_match():
    clusters = np.array([0, 0, 0, 4, 4, 2])
    row = evaluate.describe_clusters(clusters, np.array([0, 1, 2, 0, 1, 2]), {"light": np.array([1, 1, 1, 0, 0, 2])})
    assert (row["Clusters"], row["Smallest"], row["Median"], row["Largest"]) == (3, 1, 2.0, 3)
    assert row["NMI light"] == pytest.approx(1.0)
    assert row["NMI class"] < 0.6


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
    assert evaluate.recall_at_k(embeddings, labels, [1, 2], is_query=is_query) == {1: 0.0, 2: 1.0}
    rng = np.random.default_rng(1)
    embeddings, labels = rng.normal(size=(80, 4)).astype(np.float32), rng.integers(0, 9, 80)
    is_query = rng.random(80) < 0.4
    hits = []
    for i in np.flatnonzero(is_query):
        gallery = sorted(np.flatnonzero(~is_query), key=lambda j, i=i: ((embeddings[i] - embeddings[j]) ** 2).sum())
        hits.append(labels[i] in labels[gallery[:3]])
    recalls = evaluate.recall_at_k(embeddings, labels, [3], is_query=is_query, block_size=7)
    assert recalls[3] == pytest.approx(np.mean(hits))
