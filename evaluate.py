"""Feature extraction and scores: Recall@k, NMI and F1 of an embedding."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch.utils.data import DataLoader

import auxiliaries
from netlib import EmbeddingNetwork, autocast


class NonFiniteFeaturesError(FloatingPointError):
    """The network's output is NaN or infinite; the message is one line for the user."""


@torch.inference_mode()
def extract_features(
    network: EmbeddingNetwork, loader: DataLoader, outputs: Sequence[str], amp: str = "none"
) -> dict[str, np.ndarray]:
    """Embed every image of a loader, in its order, in evaluation mode; the network's mode is restored.

    outputs: names that EmbeddingNetwork.forward knows. amp: none, bf16 or fp16.
    Returns {output: (N, D) float32}. Raises NonFiniteFeaturesError.
    """
    was_training = network.training
    network.eval()
    device = network.mean.device
    features: dict[str, np.ndarray] = {}
    done = 0
    try:
        for images, _ in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, amp):
                batch = network(images, outputs)
            for name, values in batch.items():
                if name not in features:
                    features[name] = np.empty((len(loader.dataset), values.shape[1]), dtype=np.float32)
                features[name][done : done + len(images)] = values.cpu().numpy()
            done += len(images)
    finally:
        network.train(was_training)
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise NonFiniteFeaturesError(
                f"the network's {name} features are not finite: training has diverged (try a lower --lr) or the "
                "weights it started from are damaged"
            )
    return features


def recall_at_k(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    device: torch.device | str = "cpu",
    block_size: int = 1024,
    is_query: np.ndarray | None = None,
) -> dict[int, float]:
    """Return, for each k, the fraction of queries with a point of their class among their k nearest points.

    embeddings: (N, D) float, Euclidean distances. labels: (N,) int. is_query: (N,) bool, the queries, which are
    searched in the other points; None: each point is searched in all others. Works from the rank of the first hit, in
    blocks of `block_size` queries; another point at the very distance of the first hit counts as nearer. A query whose
    class has no other point never hits.
    """
    queries = gallery = torch.as_tensor(embeddings, device=device)
    query_classes = gallery_classes = torch.as_tensor(labels, device=device)
    if is_query is not None:
        chosen = torch.as_tensor(is_query, device=device)
        queries, query_classes, gallery, gallery_classes = (
            values[mask] for mask in (chosen, ~chosen) for values in (queries, query_classes)
        )
    half_squared_norms = gallery.square().sum(1) / 2
    ranks = []
    for start in range(0, len(queries), block_size):
        # x.y - |y|^2/2 orders the points y by their distance to x, nearest first from the top
        closeness = queries[start : start + block_size] @ gallery.T - half_squared_norms
        if is_query is None:
            rows = torch.arange(len(closeness), device=device)
            closeness[rows, rows + start] = -torch.inf
        same = query_classes[start : start + block_size, None] == gallery_classes
        first_hit = closeness.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        rank = ((closeness >= first_hit) & ~same).sum(1)
        never = torch.iinfo(rank.dtype).max
        ranks.append(torch.where(first_hit[:, 0] == -torch.inf, never, rank))
    ranks = torch.cat(ranks)
    return {k: (ranks < k).double().mean().item() for k in k_vals}


def clustering_scores(labels: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return (NMI, F1) of a clustering, both label arrays (N,) int.

    NMI has the arithmetic mean as normalisation. F1 is over pairs of points in the same class and in the same cluster.
    """
    table = contingency_matrix(labels, clusters, sparse=True, dtype=np.int64)
    same_both = count_pairs(table.data)
    same_class = count_pairs(np.asarray(table.sum(1)))
    same_cluster = count_pairs(np.asarray(table.sum(0)))
    nmi = float(normalized_mutual_info_score(labels, clusters))
    return nmi, 2 * same_both / max(same_class + same_cluster, 1)


def count_pairs(sizes: np.ndarray) -> int:
    """Return how many unordered pairs of points share a group, for groups of these sizes."""
    return int((sizes * (sizes - 1) // 2).sum())


def describe_clusters(
    clusters: np.ndarray, labels: np.ndarray, factors: Mapping[str, np.ndarray]
) -> dict[str, int | float]:
    """Describe mined labels: how many clusters have images, their sizes, and NMI with the class and known factors.

    clusters, labels: (N,) int. factors: name to (N,) int levels, shared across classes.
    """
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 0]
    known = {"class": labels, **factors}
    return {
        "Clusters": len(sizes),
        "Smallest": int(sizes.min()),
        "Median": float(np.median(sizes)),
        "Largest": int(sizes.max()),
    } | {f"NMI {name}": float(normalized_mutual_info_score(values, clusters)) for name, values in known.items()}


def score_set(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
) -> dict[str, float]:
    """Score one test set: Recall of every image against all others, or of the queries against the gallery.

    embeddings: (N, D) float. labels: (N,) int. is_query: (N,) bool or None, see recall_at_k; the clustering is of all
    images. seed: of the k-means, which has as many clusters as there are classes.
    Returns {"NMI", "F1", "Recall @ k" for each k}.
    """
    clusters, _ = auxiliaries.kmeans(embeddings, len(np.unique(labels)), seed)
    nmi, f1 = clustering_scores(labels, clusters)
    recalls = recall_at_k(embeddings, labels, k_vals, device, is_query=is_query)
    return {"NMI": nmi, "F1": f1} | {f"Recall @ {k}": value for k, value in recalls.items()}
