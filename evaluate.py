"""Feature extraction and scores of an embedding; as a command: score a stored run, or compare runs.

python evaluate.py RUN [--checkpoint FILE] [--embedding Class|Shared] [--save_embeddings FILE.npz]
python evaluate.py --compare RUN [RUN ...] [--over FLAG | --against RUN] [--csv FILE] [--plot FILE]
"""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student_t
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor
from torch.utils.data import DataLoader

import auxiliaries
import datasets
import netlib

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of rounding to float32."""


CROWD = 4096
"""Pairs of one query whose order is in doubt beyond which they are not compared one by one."""


FEW = 512
"""Points nearer than a query's first hit up to which they are listed; more are counted."""


class NonFiniteFeaturesError(auxiliaries.DivergedError):
    """The network's output is NaN or infinite; the message is one line for the user."""


def scoring_batch_size(bs: int) -> int:
    """Return how many images are embedded at a time outside of training: --bs, but no more than memory is sure to hold.

    With several processes --bs is the batch of all of them together.
    """
    return min(bs, 112)


@torch.inference_mode()
def extract_features(
    network: netlib.EmbeddingNetwork,
    loader: DataLoader,
    outputs: Sequence[str],
    amp: str = "none",
    everywhere: bool = True,
) -> dict[str, np.ndarray | None]:
    """Embed every image of a loader, in its order, in evaluation mode; the network's mode is restored.

    Of several processes each embeds the images of its own loader, which holds its share of them, and gets them all.
    outputs: names that EmbeddingNetwork.forward knows. amp: none, bf16 or fp16. everywhere: False leaves all features
    to the first process, and None to the others.
    Returns {output: (N, D) float32}. Raises NonFiniteFeaturesError.
    """
    was_training = network.training
    network.eval()
    device = network.mean.device
    n_images = len(loader.sampler)
    features = {name: np.empty((n_images, 0), dtype=np.float32) for name in outputs}
    done = 0

    def store(batch: Mapping[str, Tensor]) -> None:
        """Copy a batch's features behind those of the batches before it."""
        nonlocal done
        for name, values in batch.items():
            if done == 0:
                features[name] = np.empty((n_images, values.shape[1]), dtype=np.float32)
            features[name][done : done + len(values)] = values.cpu().numpy()
        done += len(values)

    try:
        waiting = None
        for images, _ in loader:
            images = images.to(device, non_blocking=True)
            with netlib.autocast(device, amp):
                batch = network(images, outputs)
            if waiting is not None:  # copied while a GPU computes the next batch
                store(waiting)
            waiting = batch
        if waiting is not None:
            store(waiting)
    finally:
        network.train(was_training)
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise NonFiniteFeaturesError(
                f"the network's {name} features are not finite: training has diverged (try a lower --lr) or the "
                "weights it started from are damaged"
            )
    return {name: auxiliaries.gather_rows(values, everywhere) for name, values in features.items()}


def retrieval_scores(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
    block_size: int = 256,
) -> dict[str, float]:
    """Score how well each query finds the points of its class by Euclidean distance, exactly.

    Recall @ k: the fraction of queries with a point of their class among their k nearest. With R the number of points
    to be found, R-Precision is the fraction of the query's R nearest that are of its class, and mAP @ R the mean of
    the precisions at the ranks of those, over R (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020). Where
    distances tie, points of other classes come first. A query whose class has nothing to be found scores 0.

    embeddings: (N, D) float, finite. labels: (N,) int. is_query: (N,) bool, the queries, which are searched in the
    other points; None: each point is searched in all others. block_size: queries at a time; memory grows with
    block_size * N. Several processes share the queries. Returns {"Recall @ k" for each k, "mAP @ R", "R-Precision"}.
    """
    labels, points = np.asarray(labels), np.asarray(embeddings)
    is_gallery = np.ones(len(labels), dtype=bool) if is_query is None else ~np.asarray(is_query)
    queries = np.flatnonzero(is_gallery if is_query is None else is_query)
    gallery = np.flatnonzero(is_gallery)
    gallery = gallery[np.argsort(labels[gallery], kind="stable")]  # a class is a run of neighbours in memory
    share = auxiliaries.own_share(len(queries))
    found = np.empty((len(share), 3))
    if len(share):
        search = ClassSearch(points, labels, queries[share.start : share.stop], gallery, device, block_size)
        parts = [torch.stack([values.double() for values in block], 1) for block in search.blocks(max(k_vals))]
        found = torch.cat(parts).cpu().numpy()
    first_hits, average_precisions, r_precisions = torch.from_numpy(auxiliaries.gather_rows(found)).unbind(1)
    recalls = {f"Recall @ {k}": (first_hits < k).double().mean().item() for k in k_vals}
    return recalls | {"mAP @ R": average_precisions.mean().item(), "R-Precision": r_precisions.mean().item()}


class ClassSearch:
    """Searches queries in a gallery and tells where the points of their class come, without sorting the gallery.

    Distances are compared through float32 products of centred points, x.y - |y|^2/2 (closeness: larger is nearer),
    whose error is bounded; the pairs whose order that leaves in doubt are compared by their distances in float64.

    points: (N, D) float. labels: (N,) int. queries: (Q,) indices. gallery: (G,) indices, sorted by label; a query that
    is in it is not found by itself.
    """

    def __init__(
        self,
        points: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray,
        gallery: np.ndarray,
        device: torch.device | str,
        block_size: int,
    ):
        self.device, self.block_size = torch.device(device), block_size
        exact = torch.as_tensor(points, device=device).double()
        centred = exact - exact.mean(0)
        centred /= centred.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
        self.doubt = (1.5 * points.shape[1] + 40) * UNIT_ROUNDOFF  # of a closeness, for points in the unit ball
        to_gallery, to_queries = (torch.as_tensor(i, device=device) for i in (gallery, queries))
        self.exact_queries, self.exact_gallery = exact[to_queries], exact[to_gallery]
        class_labels, starts, sizes = np.unique(labels[gallery], return_index=True, return_counts=True)
        place = np.searchsorted(class_labels, labels[queries])
        known = class_labels[np.minimum(place, len(class_labels) - 1)] == labels[queries]
        place = np.where(known, place, 0)
        in_gallery = np.full(len(points), -1)
        in_gallery[gallery] = np.arange(len(gallery))
        self.own_place = torch.as_tensor(in_gallery[queries], device=device)  # -1: not in the gallery
        self.starts = torch.as_tensor(starts[place], device=device)
        self.sizes = torch.as_tensor(np.where(known, sizes[place], 0), device=device)
        self.n_wanted = self.sizes - (self.own_place >= 0).long()
        most_wanted = max(int(self.n_wanted.max()), 1)
        self.group = next(g for g in (64, 16, 4, 1) if g == 1 or len(gallery) // g >= 4 * most_wanted)
        n_padded = -(-len(gallery) // self.group) * self.group
        # One more dimension takes in the norms; padding is infinitely far
        self.right = torch.zeros(n_padded, points.shape[1] + 1, device=device)
        self.right[: len(gallery), :-1] = centred[to_gallery]
        self.right[:, -1] = -torch.inf
        self.right[: len(gallery), -1] = -centred[to_gallery].square().sum(1) / 2
        self.left = torch.ones(len(queries), points.shape[1] + 1, device=device)
        self.left[:, :-1] = centred[to_queries]

    def blocks(self, max_k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, block by block of queries, three (B,) tensors: the rank of the first hit, counted from 0, the average
        precision at R, and the R-precision. A rank of max_k or more need not be exact.
        """
        shape = (min(self.block_size, len(self.left)), len(self.right))
        buffer, mask = (torch.empty(shape, dtype=kind, device=self.device) for kind in (torch.float32, torch.bool))
        for start in range(0, len(self.left), self.block_size):
            block = torch.arange(start, min(start + self.block_size, len(self.left)), device=self.device)
            closeness = self.closeness(block, buffer)
            certain, rows, columns, values = self.candidates(closeness, mask, block, max_k)
            is_crowded = torch.bincount(rows, minlength=len(block)) > 4 * self.n_wanted[block] + CROWD
            crowded, kept = is_crowded.nonzero()[:, 0], ~is_crowded[rows]
            rows, is_own = self.ordered(block, rows[kept], columns[kept], values[kept])
            if len(crowded):
                certain[crowded] = 0
                more = self.nearest_of_crowded(block[crowded], max_k)
                rows = torch.cat([rows, crowded.repeat_interleave(more.shape[1])])
                rows, order = rows.sort(stable=True)
                is_own = torch.cat([is_own, more.flatten()])[order]
            yield self.ranks(block, certain, rows, is_own)

    def closeness(self, block: Tensor, buffer: Tensor) -> Tensor:
        """Return the (B, padded G) closeness of a block of queries, in the buffer; a query is far from itself."""
        with full_precision_products():
            closeness = torch.mm(self.left[block], self.right.T, out=buffer[: len(block)])
        own_place = self.own_place[block]
        found = own_place >= 0
        closeness[found.nonzero()[:, 0], own_place[found]] = -torch.inf
        return closeness

    def candidates(
        self, closeness: Tensor, mask: Tensor, block: Tensor, max_k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return which points have to be looked at closely: how many others are nearer for certain, and pairs.

        Returns (B,) counts of points of other classes that are nearer than the nearest of the query's class beyond
        doubt, and rows, columns and closeness of the pairs that come next. These hold the query's R nearest points,
        where one of its class can be among them, and the first of its class with all whose order to it is in doubt.
        mask: (B, padded G) bool, to work in.
        """
        wanted, sizes = self.n_wanted[block], self.sizes[block]
        offsets = torch.arange(max(int(sizes.max()), 1), device=self.device)
        own = (self.starts[block, None] + offsets).clamp_max(closeness.shape[1] - 1)
        best = closeness.gather(1, own).masked_fill(offsets >= sizes[:, None], -torch.inf).amax(1)
        # The R-th largest of the maxima of groups is at most the R-th largest of all
        maxima = closeness.view(len(block), -1, self.group).amax(2)
        largest = maxima.topk(max(int(wanted.max()), 1), dim=1).values
        bound = largest.gather(1, (wanted - 1).clamp_min(0)[:, None])[:, 0]
        is_reachable = (best >= bound - 2 * self.doubt) | (wanted == 0)
        low = torch.where(wanted == 0, torch.inf, torch.minimum(best, bound) - 2 * self.doubt)
        high = torch.where(is_reachable, torch.inf, best + 2 * self.doubt)
        is_open = torch.ge(closeness, low[:, None], out=mask[: len(block)])
        counts = count_rows(is_open)
        certain = torch.zeros_like(counts)
        deep = ((counts > FEW) & ~is_reachable).nonzero()[:, 0]
        if len(deep):  # the rest is told from the pairs' values
            is_certain = closeness[deep] > high[deep, None]
            certain[deep] = count_rows(is_certain)
            is_open[deep] = is_open[deep] & ~is_certain & (certain[deep, None] < max_k)
        rows, columns = positions(is_open)
        values = closeness[rows, columns]
        is_certain = values > high[rows]
        certain += torch.bincount(rows[is_certain], minlength=len(block))
        is_kept = ~is_certain & (certain[rows] < max_k)
        return certain, rows[is_kept], columns[is_kept], values[is_kept]

    def ordered(self, block: Tensor, rows: Tensor, columns: Tensor, closeness: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of pairs and whether they are of one class, row by row and nearest first.

        rows, columns, closeness: (P,). Pairs that follow each other within the error of closeness are in doubt if both
        kinds are among them; their order is that of the exact distances. Where these tie, other classes come first.
        """
        order = torch.argsort(closeness, descending=True, stable=True)
        order = order[torch.argsort(rows[order], stable=True)]
        rows, columns, closeness = rows[order], columns[order], closeness[order]
        is_own = self.is_own(block[rows], columns)
        if not len(rows):
            return rows, is_own
        is_next = (rows.diff() != 0) | (closeness.diff() < -2 * self.doubt)
        group = torch.cat([is_next.new_zeros(1), is_next]).cumsum(0)
        n_own = torch.bincount(group, is_own.double())
        in_doubt = ((n_own > 0) & (n_own < torch.bincount(group)))[group].nonzero()[:, 0]
        squared = self.squared_distances(block[rows[in_doubt]], columns[in_doubt])
        again = torch.argsort(is_own[in_doubt].byte(), stable=True)
        again = again[torch.argsort(squared[again], stable=True)]
        again = again[torch.argsort(group[in_doubt][again], stable=True)]
        is_own[in_doubt] = is_own[in_doubt][again]  # they stay in their row and group
        return rows, is_own

    def squared_distances(self, queries: Tensor, columns: Tensor, chunk: int = 16384) -> Tensor:
        """Return the (P,) squared distances of pairs in float64."""
        squared = torch.empty(len(columns), dtype=torch.float64, device=self.device)
        for start in range(0, len(columns), chunk):
            pairs = slice(start, start + chunk)
            squared[pairs] = (self.exact_queries[queries[pairs]] - self.exact_gallery[columns[pairs]]).square().sum(1)
        return squared

    def nearest_of_crowded(self, queries: Tensor, max_k: int) -> Tensor:
        """Return (C, n) whether queries' nearest points are of their class, nearest first, at least max_k or R of them.

        For queries among a great many points at almost the same distance (a collapsed embedding). All distances are
        computed in float64; where they tie, points of other classes come first.
        """
        left, right = self.exact_queries[queries], self.exact_gallery
        distances = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
        place = torch.arange(distances.shape[1], device=self.device)
        is_itself = place == self.own_place[queries, None]
        is_own = self.is_own(queries[:, None], place) & ~is_itself
        # The next smaller number: where distances tie, other classes come first
        distances = torch.where(is_own, distances, distances.nextafter(distances.new_tensor(-torch.inf)))
        distances[is_itself] = torch.inf
        n_nearest = min(max(max_k, int(self.n_wanted.max())), distances.shape[1])
        return is_own.gather(1, distances.topk(n_nearest, dim=1, largest=False).indices)

    def is_own(self, queries: Tensor, columns: Tensor) -> Tensor:
        """Tell which gallery columns are of the class of their query."""
        starts = self.starts[queries]
        return (columns >= starts) & (columns < starts + self.sizes[queries])

    def ranks(self, block: Tensor, certain: Tensor, rows: Tensor, is_own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (rank of first hit, average precision at R, R-precision), each (B,).

        certain: (B,), how many points of other classes come before the ordered pairs of a row. rows, is_own: (P,).
        """
        counts = torch.bincount(rows, minlength=len(block))
        first = counts.cumsum(0) - counts
        place = certain[rows] + torch.arange(len(rows), device=self.device) - first[rows]
        n_own = is_own.long().cumsum(0)
        before = torch.cat([n_own.new_zeros(1), n_own])[first]
        rows, place, n_own = rows[is_own], place[is_own], (n_own - before[rows])[is_own]
        never = torch.iinfo(place.dtype).max
        first_hits = torch.full_like(block, never).scatter_reduce(0, rows, place, "amin")
        is_found = place < self.n_wanted[block[rows]]
        zeros = torch.zeros(len(block), dtype=torch.float64, device=self.device)
        precisions = zeros.scatter_add(0, rows, is_found * n_own.double() / (place + 1))
        n_found = zeros.scatter_add(0, rows, is_found.double())
        wanted = self.n_wanted[block].clamp_min(1)
        return first_hits, precisions / wanted, n_found / wanted


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever --tf32 allows elsewhere."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def count_rows(mask: Tensor) -> Tensor:
    """Return how many values of each row of a (B, N) bool tensor are true, (B,) int64."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    return torch.tensor([np.count_nonzero(row) for row in mask.numpy()])  # 20 times as fast as the sum


def positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns where a (B, N) bool tensor is true, row by row."""
    if mask.device.type != "cpu":
        return mask.nonzero(as_tuple=True)
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))  # 10 times as fast as nonzero
    return flat // mask.shape[1], flat % mask.shape[1]


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
    clusters: np.ndarray,
    n_clusters: int,
    labels: np.ndarray,
    factors: Mapping[str, np.ndarray],
    previous: np.ndarray | None = None,
) -> dict[str, int | float | None]:
    """Describe mined labels: how many clusters have images and how many have none, the sizes of the former, agreement
    with the labels mined before (adjusted Rand index: 1 the same partition, 0 as by chance), and NMI with the class and
    known factors.

    clusters: (N,) int in [0, n_clusters). labels: (N,) int. factors: name to (N,) int levels, shared across classes.
    previous: (N,) int; None for the first mining.
    """
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 0]
    known = {"class": labels, **factors}
    return {
        "Clusters": len(sizes),
        "Empty": n_clusters - len(sizes),
        "Smallest": int(sizes.min()),
        "Median": float(np.median(sizes)),
        "Largest": int(sizes.max()),
        "ARI with previous": None if previous is None else float(adjusted_rand_score(previous, clusters)),
    } | {f"NMI {name}": float(normalized_mutual_info_score(values, clusters)) for name, values in known.items()}


def clusters_to_show(
    clusters: np.ndarray,
    squared_distances: np.ndarray,
    labels: np.ndarray,
    factors: Mapping[str, np.ndarray],
    n_rows: int = 10,
    n_images: int = 8,
) -> list[tuple[str, np.ndarray]]:
    """Return caption and images of clusters, largest first: all, or of many the largest, smallest and middle ones.

    Of each cluster the images nearest to its centre, each of another class. The caption has the cluster's size, its
    number of classes, and where there are factors the one that most images have in common beyond what is so in all.
    clusters, labels: (N,) int. squared_distances: (N,) of the images to the centre of their cluster. factors: name to
    (N,) int levels. Returns (caption, indices (at most n_images,)) for at most n_rows clusters.
    """
    sizes = np.bincount(clusters)
    ordered = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    if len(ordered) > n_rows:
        n_ends = n_rows // 3
        start = (len(ordered) - n_rows) // 2 + n_ends
        ordered = np.concatenate([ordered[:n_ends], ordered[start : start + n_rows - 2 * n_ends], ordered[-n_ends:]])
    shown = []
    for cluster in ordered:
        members = np.flatnonzero(clusters == cluster)
        members = members[np.argsort(squared_distances[members], kind="stable")]
        first_of_class = np.sort(np.unique(labels[members], return_index=True)[1])
        caption = f"cluster {cluster}\n{len(members)} images\n{len(first_of_class)} classes"
        shares = {name: largest_share(levels[members]) - largest_share(levels) for name, levels in factors.items()}
        if shares:
            name = max(shares, key=shares.get)
            caption += f"\n{100 * largest_share(factors[name][members]):.0f} % alike in\n{name}"
        shown.append((caption, members[first_of_class[:n_images]]))
    return shown


def largest_share(labels: np.ndarray) -> float:
    """Return the share of the most frequent of some labels (N,) int: the accuracy of always guessing it."""
    return float(np.bincount(labels).max() / len(labels))


PROBE_IMAGES = 1000
"""Most training images that a probe embeds."""


def probe_subset(labels: np.ndarray, seed: int, images_per_class: int = 5) -> np.ndarray:
    """Return the training images that disentanglement is probed on: sorted indices, the same for the same seed.

    A quarter of the images, at least 100 and at most PROBE_IMAGES: about equally many of each class. Where that would
    be fewer than images_per_class it is so many of a random choice of classes, as a class is found by its own images
    only. Classes with a single image in the choice are left out: none may remain. labels: (N,) int in [0, n_classes).
    """
    n_images, n_classes = min(PROBE_IMAGES, max(100, len(labels) // 4)), int(labels.max()) + 1
    rng = np.random.default_rng([seed, PROBE_IMAGES])
    order, place = rng.permutation(len(labels)), rng.permutation(n_classes)
    place[np.bincount(labels, minlength=n_classes) < 2] += n_classes  # a class of one comes last
    place = place.argsort().argsort()
    order = order[np.argsort(place[labels[order]], kind="stable")]  # class by class
    sizes = np.bincount(place[labels], minlength=n_classes)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = order[rank < max(images_per_class, n_images // n_classes)][:n_images]
    return np.sort(chosen[np.bincount(labels[chosen])[labels[chosen]] > 1])


def nearest_neighbour_accuracy(embeddings: np.ndarray, labels: np.ndarray, k: int = 5) -> float:
    """Return the fraction of points whose label is the most frequent among their k nearest other points.

    Where labels tie, the one that comes first among the nearest counts. embeddings: (N, D) float, N of some 1,000.
    labels: (N,) int.
    """
    points = torch.as_tensor(embeddings).double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(min(k, len(labels) - 1), largest=False, sorted=True).indices.numpy()
    found = labels[nearest]
    votes = (found[:, :, None] == found[:, None, :]).sum(2)
    return float((found[np.arange(len(found)), votes.argmax(1)] == labels).mean())


def probe_scores(embeddings: Mapping[str, np.ndarray], classes: np.ndarray, mined: np.ndarray) -> dict[str, float]:
    """Return how well class and mined label are read from the embeddings, by nearest_neighbour_accuracy.

    Each point is read from the others. The adversarial term is to push "Class from Shared" and "Mined from Class" down
    to what is right by chance, by always guessing the most frequent label. embeddings: "Class" and "Shared" to (N, D).
    classes, mined: (N,) int.
    """
    readable = {
        f"{what} from {name}": nearest_neighbour_accuracy(embeddings[name], labels)
        for what, labels, names in (("Class", classes, ("Shared", "Class")), ("Mined", mined, ("Class", "Shared")))
        for name in names
    }
    order = ("Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared")
    chance = {"Class by chance": largest_share(classes), "Mined by chance": largest_share(mined)}
    return {name: readable[name] for name in order} | chance


def score_set(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
    with_clustering: bool = True,
) -> dict[str, float | None]:
    """Score one test set: every image searched in all others, or the queries in the gallery.

    embeddings: (N, D) float. labels: (N,) int. is_query: (N,) bool or None, see retrieval_scores; the clustering is of
    all images. seed: of the k-means, which has as many clusters as there are classes. with_clustering: False leaves
    NMI and F1 out, as None. Returns {"NMI", "F1"} and what retrieval_scores returns.
    """

    def cluster() -> tuple[float, float]:
        """Return NMI and F1 of a k-means."""
        clusters, _ = auxiliaries.kmeans(embeddings, len(np.unique(labels)), seed)
        return clustering_scores(labels, clusters)

    nmi, f1 = auxiliaries.computed_by_first(cluster) if with_clustering else (None, None)
    return {"NMI": nmi, "F1": f1} | retrieval_scores(embeddings, labels, k_vals, device, is_query)


VALIDATION = "Val"
"""Name of the set of training classes that are held out, among the test sets."""


def file_suffix(test_set: str) -> str:
    """Return what a test set's name adds to file names: "_set1" for "Set 1", nothing for the only one, ""."""
    return f"_{test_set.lower().replace(' ', '')}" if test_set else ""


def scores_of_set(row: Mapping[str, float | None], test_set: str) -> dict[str, float | None]:
    """Return the scores of one test set, under their plain names, of a row of log_val_Class.csv."""
    prefix = f"{test_set} " if test_set else ""
    others = ("Epochs", "Time") if test_set else ("Epochs", "Time", *(n for n in row if n.startswith(f"{VALIDATION} ")))
    return {name[len(prefix) :]: value for name, value in row.items() if name.startswith(prefix) and name not in others}


def scores_line(scores: Mapping[str, float | None]) -> str:
    """Return scores as one line of text; those that were left out are not in it."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)


STORED_FLAGS = {"dataset": str, "source_path": str, "img_size": int, "bs": int, "amp": str, "seed": int, "kernels": int}


def stored_flags(stored: Mapping[str, Mapping], path: str | Path) -> dict:
    """Return the flags of a checkpoint that scoring needs. Raises WeightsError where one is missing or wrong."""
    flags = dict(stored["flags"])
    wrong = [name for name, kind in STORED_FLAGS.items() if type(flags.get(name)) is not kind]
    wrong += [name for name in ("img_size", "bs") if name not in wrong and not 0 < flags[name] < 2**16]
    wrong += ["amp"] if flags.get("amp") not in ("none", *netlib.AMP_TYPES) else []
    k_vals = flags.get("k_vals")
    if not isinstance(k_vals, list) or not k_vals or not all(type(k) is int and k > 0 for k in k_vals):
        wrong.append("k_vals")
    if wrong:
        raise netlib.WeightsError(f"{path}: its flags hold no usable {', '.join(dict.fromkeys(wrong))}")
    return flags


def score_run(args: argparse.Namespace) -> None:
    """Score the checkpoints of a run on their test sets, print what comes out beside what the run logged, and store
    the embeddings where asked for. Raises DatasetError, WeightsError, RunFolderError, NonFiniteFeaturesError.
    """
    run = Path(args.runs[0])
    found = [run] if run.is_file() else sorted(run.glob("checkpoint*.pth.tar"))
    if args.checkpoint:
        found = [run / args.checkpoint if (run / args.checkpoint).is_file() else Path(args.checkpoint)]
    if not run.exists():
        raise netlib.WeightsError(f"{run}: no such run folder or checkpoint file")
    if not found:
        raise netlib.WeightsError(f"{run}: holds no checkpoint*.pth.tar; give a run folder or a checkpoint file")
    flags = stored_flags(netlib.read_checkpoint(found[0]), found[0])
    dataset, source = args.dataset or flags["dataset"], args.source_path or flags["source_path"]
    train_images, test_sets = datasets.load_dataset(dataset, source)
    held_out = flags.get("val_classes", 0.0)
    if isinstance(held_out, float) and 0 < held_out < 1 and not args.dataset:
        test_sets = {**test_sets, VALIDATION: datasets.hold_out_classes(train_images, held_out)[1]}
    if args.save_embeddings:
        for path in (embeddings_path(args.save_embeddings, name) for name in test_sets):
            if path.exists():
                raise auxiliaries.RunFolderError(f"--save_embeddings: {path} exists already; nothing is overwritten")
    device = auxiliaries.pick_device(args.gpu)
    for name, images in test_sets.items():
        own = run / f"checkpoint{file_suffix(name)}.pth.tar"
        path = own if own in found else found[0]
        stored = netlib.read_checkpoint(path)
        flags = stored_flags(stored, path)
        loader = datasets.make_loader(
            datasets.ImageDataset(images, datasets.test_transform(flags["img_size"])),
            batch_size=scoring_batch_size(flags["bs"]),
            n_workers=auxiliaries.n_workers(flags["kernels"] if args.kernels is None else args.kernels),
            pin_memory=device.type == "cuda",
        )
        auxiliaries.set_seeds(flags["seed"])
        auxiliaries.set_tf32(flags.get("tf32") is True and device.type == "cuda", device)
        network = netlib.load(path).to(device)
        embeddings = extract_features(network, loader, [args.embedding], flags["amp"])[args.embedding]
        scores = score_set(embeddings, images.labels, flags["k_vals"], flags["seed"], device, images.is_query)
        is_as_logged = args.embedding == "Class" and dataset == flags["dataset"]
        print(f"{path}, {args.embedding} embedding of {len(images)} {dataset} images{f', {name}' if name else ''}")
        print_scores(scores, last_scored(stored["progress"]) if is_as_logged else {}, name)
        if args.save_embeddings:
            save_embeddings(embeddings_path(args.save_embeddings, name), embeddings, images)


def last_scored(progress: Mapping) -> dict:
    """Return the last row of log_val_Class.csv that a checkpoint's progress holds, the epoch it was kept for."""
    rows, trained = progress.get("val_rows"), progress.get("train_rows")
    if not isinstance(trained, list) or not isinstance(rows, list) or not rows or not isinstance(rows[-1], dict):
        return {}
    return rows[-1] if rows[-1].get("Epochs") == len(trained) - 1 else {}  # else it has been trained on since


def print_scores(scores: Mapping[str, float], row: Mapping[str, float | None], test_set: str) -> None:
    """Print scores with all their digits, beside those that the run logged, if it did."""
    logged = scores_of_set(row, test_set)
    width = max(map(len, scores))
    print(f"{'score':<{width}}  {'now':<20}" + (f"  logged in epoch {row.get('Epochs')}" if logged else ""))
    for name, value in scores.items():
        then = logged.get(name)
        print(f"{name:<{width}}  {value!r:<20}  {'' if then is None else then}".rstrip())


def embeddings_path(path: str, test_set: str) -> Path:
    """Return the file that a test set's embeddings go to."""
    return Path(path).with_name(f"{Path(path).stem}{file_suffix(test_set)}.npz")


def save_embeddings(path: Path, embeddings: np.ndarray, images: datasets.ImageSet) -> None:
    """Store embeddings (N, D) float32, labels (N,), paths (N,), class_names and is_query (N,) as .npz."""
    is_query = np.ones(len(images), dtype=bool) if images.is_query is None else images.is_query
    with auxiliaries.replaced_file(path) as file:
        np.savez(
            file,
            embeddings=embeddings,
            labels=images.labels,
            paths=np.array(images.names),
            class_names=np.array(images.class_names),
            is_query=is_query,
        )
    print(f"stored {path}")


PAPER = {
    "cub200": {"": {"Recall @ 1": 0.661, "Recall @ 2": 0.768, "Recall @ 4": 0.856, "NMI": 0.697}},
    "cars196": {"": {"Recall @ 1": 0.826, "Recall @ 2": 0.891, "Recall @ 4": 0.932, "NMI": 0.684}},
    "online_products": {"": {"Recall @ 1": 0.772, "Recall @ 10": 0.894, "Recall @ 100": 0.956, "NMI": 0.900}},
    "in-shop": {"": {"Recall @ 1": 0.882, "Recall @ 10": 0.970, "Recall @ 30": 0.980, "Recall @ 50": 0.988}},
    "vehicle_id": {
        "Set 1": {"Recall @ 1": 0.869, "Recall @ 5": 0.934},
        "Set 3": {"Recall @ 1": 0.820, "Recall @ 5": 0.910},
    },
}
"""Scores of MIC with margin loss in the paper's tables, by data set and test set (Roth et al., ICCV 2019)."""


def paper_scores(dataset: str) -> dict[str, float]:
    """Return the paper's scores of a data set by the columns of log_val_Class.csv; nothing for others than the five."""
    of_sets = PAPER.get(dataset, {})
    return {f"{name} {score}".strip(): value for name, scores in of_sets.items() for score, value in scores.items()}


PAIRS = ("task_p", "cs_per_bs", "embed_sizes", "losses", "sampling", "proxy_lr", "beta", "beta_lr", "nu", "margin")
"""Flags with a value for the Class and one for the Shared task."""

NO_SETTING = ("seed", "savename", "save_path", "source_path", "gpu", "kernels", "cache", "make_graph", "resume")
NO_SETTING += ("eval_shared", "tensorboard")
"""Flags in which runs of one setting may differ."""


def compare_runs(args: argparse.Namespace) -> None:
    """Print a table of stored runs for each data set and test set; write the CSV and the plot that are asked for.

    Raises RunFolderError where no run can be read, or not the one of --against.
    """
    runs, skipped = [], {}
    for folder in {path.resolve(): path for root in args.runs for path in run_folders(Path(root))}.values():
        try:
            runs.append(auxiliaries.read_run(folder))
        except auxiliaries.RunFolderError as error:
            skipped[folder.resolve()] = str(error)
    for reason in skipped.values():
        print(f"skipped {reason}")
    if not runs:
        raise auxiliaries.RunFolderError(f"--compare: no run to read among {', '.join(map(str, args.runs))}")
    reference = Path(args.against).resolve() if args.against else None
    if reference and reference not in [run.folder.resolve() for run in runs]:
        why = skipped.get(reference, "not the folder of one of the runs that are compared")
        raise auxiliaries.RunFolderError(f"--against {args.against}: {why}")
    finished = finished_runs(runs, args.over) if args.over else []
    tables, curves, lines, differences = [], {}, {}, {}
    for dataset in dict.fromkeys(run.flags["dataset"] for run in runs):
        of_dataset = [run for run in runs if run.flags["dataset"] == dataset]
        if reference:
            name_unpaired(of_dataset, setting_of(reference, of_dataset), f"--against {args.against}", dataset)
        for test_set in test_set_names(row for run in of_dataset for row in run.val_rows[:1]):
            compared = [run for run in of_dataset if test_set in test_set_names(run.val_rows[:1])]
            base = setting_of(reference, compared)
            table, more_curves, more_differences = compare_setting(compared, dataset, test_set, base)
            curves |= more_curves
            differences |= more_differences
            through = [run for run in compared if run in finished]
            lines |= ablation_lines(through, dataset, test_set, args.over) if through else {}
            shown = table.drop(columns=["data set", "test set"])
            shown = shown.apply(lambda column: column.map(lambda value: shown_cell(value, column.name)))
            print(f"\n{dataset} {test_set}".rstrip())
            print(shown.to_string(index=False))
            tables.append(table)
    if args.csv:
        with auxiliaries.replaced_file(Path(args.csv), "w") as file:
            pd.concat(tables).to_csv(file, index=False)
    if args.over:
        values = sorted({value for points in lines.values() for value in points}, key=by_number)
        print(f"\nRecall @ 1 over --{args.over}, mean and standard deviation over runs")
        print(ablation_table(lines, values).to_string())
    points = points_to_draw(differences)
    if args.plot and args.over:
        auxiliaries.draw_ablation(Path(args.plot), args.over, values, lines)
    elif args.plot and points:
        auxiliaries.draw_differences(Path(args.plot), points, args.against)
    elif args.plot:
        auxiliaries.draw_comparison(Path(args.plot), curves)


def differing_flags(runs: Sequence[auxiliaries.Run]) -> list[str]:
    """Return the flags that make settings of runs: those in which they differ; having one and not having it differs."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in NO_SETTING)
    return [name for name in names if len({shown_flag(run.flags.get(name)) for run in runs}) > 1]


def setting_of(folder: Path | None, runs: Sequence[auxiliaries.Run]) -> list[auxiliaries.Run]:
    """Return those of the runs that have the setting of the run in a folder; none where it is not among them."""
    groups = grouped_by_setting(runs, differing_flags(runs)).values()
    return next((group for group in groups if folder in [run.folder.resolve() for run in group]), [])


def name_unpaired(
    runs: Sequence[auxiliaries.Run], reference: Sequence[auxiliaries.Run], flag: str, dataset: str
) -> None:
    """Print which runs of a data set have no part in the differences to the reference runs, and why."""
    if not reference:
        print(f"{flag}: no differences on {dataset}, of which it is no run")
        return
    seeds = {run.flags.get("seed", "") for run in reference if is_finished(run)}
    others = [run for run in runs if run not in reference]
    for run in runs:
        if not is_finished(run):
            print(f"left out of the differences: {run.folder}, {epochs_done(run)} of {run.flags['n_epochs']} epochs")
        elif run in others and run.flags.get("seed", "") not in seeds:
            print(f"left out of the differences: {run.folder}, no run to compare with has its seed")
    if not others:
        print(f"{flag}: no differences on {dataset}, where all runs have its setting")


def finished_runs(runs: Sequence[auxiliaries.Run], flag: str) -> list[auxiliaries.Run]:
    """Return the runs that have a flag and are through with their epochs; the others are named.

    Raises RunFolderError where there is none.
    """
    finished = []
    for run in runs:
        if flag not in run.flags:
            print(f"left out of --over: {run.folder}, which has no flag {flag}")
        elif not is_finished(run):
            print(f"left out of --over: {run.folder}, {epochs_done(run)} of {run.flags['n_epochs']} epochs")
        else:
            finished.append(run)
    if not finished:
        raise auxiliaries.RunFolderError(f"--over {flag}: no run has this flag and is through with its epochs")
    return finished


def run_folders(root: Path) -> list[Path]:
    """Return a run folder itself, or the folders in a folder of runs."""
    if (root / "hypa.pkl").exists() or not root.is_dir():
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")) or [root]


def best_index(rows: Sequence[Mapping[str, float]], test_set: str, select: str) -> int:
    """Return which row of log_val_Class.csv is of the epoch whose checkpoint is kept for a test set.

    The first one with the highest Recall@1 on that set or, where select is "val", on the classes held out.
    """
    name = f"{VALIDATION if select == 'val' else test_set} Recall @ 1".strip()
    return max(range(len(rows)), key=lambda index: rows[index][name])


def test_set_names(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of the test sets that have scores in some rows of log_val_Class.csv."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("Recall @ 1"))
    return [name.removesuffix("Recall @ 1").strip() for name in names]


def compare_setting(
    runs: Sequence[auxiliaries.Run], dataset: str, test_set: str, base: Sequence[auxiliaries.Run] = ()
) -> tuple[pd.DataFrame, dict[str, tuple[np.ndarray, np.ndarray]], dict[str, dict[str, pd.DataFrame]]]:
    """Return the table of one test set, for each setting (epochs (E,), Recall @ 1 (n runs, E)) by its name, and for
    each other setting than that of the base runs at "best" and "last" the differences to these, (seeds, scores).

    The table has two rows for each run, at its best epoch and at its last; mean and standard deviation over the runs of
    a setting, that differ in the seed only; the differences to the base runs, paired by seed; the paper's row; and the
    gap to it.
    """
    differing = differing_flags(runs)
    rows, curves, differences = [], {}, {}
    paper = PAPER.get(dataset, {}).get(test_set, {})
    for setting, members in grouped_by_setting(runs, differing).items():
        flags = dict(zip(differing, setting, strict=True))
        label = ", ".join([f"{dataset} {test_set}".rstrip(), *(f"{name} {value}" for name, value in flags.items())])
        head = {"data set": dataset, "test set": test_set, "run": "", **flags, "seed": ""}
        for at in ("best", "last"):
            scored = [scored_at(run, test_set, at) for run in members]
            frame = pd.DataFrame([scores for _, scores in scored], dtype=float)
            for i, (run, (row, _)) in enumerate(zip(members, scored, strict=True)):
                own = {"run": run.folder.name, "seed": run.flags.get("seed", ""), "at": at}
                done = {"epoch": row["Epochs"], "epochs done": epochs_done(run)}
                rows.append(head | own | done | dict(frame.loc[i]))
            means = frame.mean(skipna=False)
            if len(members) > 1:
                rows.append(head | {"run": f"mean of {len(members)}", "at": at} | dict(means))
                rows.append(head | {"run": "standard deviation", "at": at} | dict(frame.std(skipna=False)))
            if base and members != base:
                of_seeds = paired_differences(members, base, test_set, at)
                differences.setdefault(f"{series_name(members)}{label}", {})[at] = of_seeds
                rows += [head | {"run": name, "at": at} | dict(row) for name, row in difference_rows(of_seeds).items()]
            if paper:
                gap = {name: means[name] - value for name, value in paper.items() if name in means}
                rows.append(head | {"run": "gap to the paper", "at": at} | gap)
        epochs = sorted(set.intersection(*({row["Epochs"] for row in run.val_rows} for run in members)))
        recalls = [
            [scores_of_set(row, test_set)["Recall @ 1"] for row in run.val_rows if row["Epochs"] in epochs]
            for run in members
        ]
        curves[label] = (np.array(epochs), np.array(recalls))
    if paper:
        rows.append({"data set": dataset, "test set": test_set, "run": "paper: MIC + margin"} | paper)
    return pd.DataFrame(rows).dropna(axis=1, how="all"), curves, differences


def series_name(runs: Sequence[auxiliaries.Run]) -> str:
    """Return what the names of the runs of a setting have before "_seed1", "_seed2" ..., and a comma; "" without it."""
    stems = {re.sub(r"_seed\d+(_\d+)?$", "", run.folder.name) for run in runs}
    return f"{stems.pop()}, " if len(stems) == 1 and "_seed" in runs[0].folder.name else ""


def scored_at(run: auxiliaries.Run, test_set: str, at: str) -> tuple[dict, dict[str, float | None]]:
    """Return a run's row of log_val_Class.csv at its "best" epoch or its "last", and the scores of a test set in it."""
    index = best_index(run.val_rows, test_set, run.flags.get("select", "test")) if at == "best" else -1
    return run.val_rows[index], scores_of_set(run.val_rows[index], test_set)


def is_finished(run: auxiliaries.Run) -> bool:
    """Return whether a run is through with its epochs; one that does not tell how many it has is."""
    return epochs_done(run) == run.flags.get("n_epochs", epochs_done(run))


def epochs_done(run: auxiliaries.Run) -> int:
    """Return how many epochs of a run were through when it was scored last."""
    return run.val_rows[-1]["Epochs"] + 1


def paired_differences(
    runs: Sequence[auxiliaries.Run], reference: Sequence[auxiliaries.Run], test_set: str, at: str
) -> pd.DataFrame:
    """Return the differences of the scores of runs to those of reference runs of the same seed, (seeds, scores).

    Runs of a seed have the first weights and the order of the images in common. Runs that are not through with their
    epochs have no part in the differences.
    """

    def by_seed(some: Sequence[auxiliaries.Run]) -> pd.DataFrame:
        """Return the scores of each seed; should there be several runs of one, their mean."""
        finished = [run for run in some if is_finished(run)]
        scores = pd.DataFrame([scored_at(run, test_set, at)[1] for run in finished], dtype=float)
        return scores.groupby([run.flags.get("seed", "") for run in finished]).mean() if finished else scores

    own, others = by_seed(runs), by_seed(reference)
    seeds = own.index.intersection(others.index)
    return own.loc[seeds] - others.loc[seeds]


def difference_rows(differences: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the rows that --against adds for differences (seeds, scores), by their names; none without a seed."""
    n = len(differences)
    if n == 0:
        return {}
    rows = {f"difference, mean of {n}": differences.mean(skipna=False)}
    if n > 1:
        low, high = confidence_interval(differences.to_numpy())
        rows["95 % interval from"] = pd.Series(low, differences.columns)
        rows["95 % interval to"] = pd.Series(high, differences.columns)
    return rows


def points_to_draw(
    differences: Mapping[str, Mapping[str, pd.DataFrame]],
) -> dict[str, dict[str, dict[str, tuple[np.ndarray, float, float]]]]:
    """Return what auxiliaries.draw_differences draws: {score: {setting: {"best" or "last": (values, low, high)}}}.

    The interval is empty, from the mean to the mean, where there is one seed. A score that some seed lacks is left out.
    """
    points: dict[str, dict[str, dict[str, tuple[np.ndarray, float, float]]]] = {}
    for setting, ats in differences.items():
        for at, frame in ats.items():
            for score in [name for name in ("Recall @ 1", "NMI", "mAP @ R") if name in frame]:
                values = frame[score].to_numpy()
                if len(values) and not np.isnan(values).any():
                    low, high = confidence_interval(values) if len(values) > 1 else (values[0], values[0])
                    points.setdefault(score, {}).setdefault(setting, {})[at] = (values, float(low), float(high))
    return points


def confidence_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the confidence interval of the mean of values (n, ...), by Student's t; n is at least 2.

    mean -+ t * s / sqrt(n), t the quantile (1 + level) / 2 of Student's distribution with n - 1 degrees of freedom, s
    the standard deviation.
    """
    n = len(values)
    half = student_t.ppf((1 + level) / 2, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return values.mean(0) - half, values.mean(0) + half


PAPER_ABLATIONS = {
    "shared_num_classes": {
        "cub200": {"5": 0.604, "10": 0.612, "20": 0.636, "30": 0.647, "50": 0.641, "100": 0.633, "150": 0.621,
                   "200": 0.599, "250": 0.602, "300": 0.587},
        "cars196": {"5": 0.770, "10": 0.769, "20": 0.781, "30": 0.786, "50": 0.796, "100": 0.798, "150": 0.805,
                    "200": 0.805, "250": 0.801, "300": 0.800},
        "online_products": {"5": 0.728, "10": 0.731, "20": 0.730, "30": 0.738, "50": 0.741, "100": 0.742,
                            "150": 0.740, "200": 0.745, "250": 0.744, "300": 0.742},
    },
    "cluster_update_freq": {
        "cub200": {"1": 0.647, "50": 0.628},
        "cars196": {"1": 0.800, "50": 0.783},
        "online_products": {"1": 0.741, "50": 0.730},
    },
    "embed_sizes": {
        "cub200": {"0": 0.636, "64": 0.647, "128": 0.657, "256": 0.666, "512": 0.670, "1024": 0.667},
        "cars196": {"0": 0.796, "64": 0.817, "128": 0.828, "256": 0.842, "512": 0.850, "1024": 0.845},
    },
}  # fmt: skip
"""Recall@1 over a flag, by data set, read off the paper's plots, +-0.002; of the update interval its ends only."""


def ablated_value(run: auxiliaries.Run, flag: str) -> str:
    """Return a run's value of a flag as it is typed; of a pair that of the Shared task.

    A run without the Shared task has a Shared embedding of size 0.
    """
    if flag == "embed_sizes" and run.flags.get("task_p", [1])[-1] == 0:
        return "0"
    value = run.flags[flag]
    value = value[-1] if flag in PAIRS else value
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return f"{value:g}" if isinstance(value, float) else shown_flag(value)


def ablation_lines(
    runs: Sequence[auxiliaries.Run], dataset: str, test_set: str, flag: str
) -> dict[str, dict[str, list[float]]]:
    """Return lines of Recall@1 over a flag, {name: {value of the flag: of each run}}: at the best epoch, at the last,
    and the paper's where there is one. Runs that differ in other flags than this one and the seed are in other lines.
    """

    def setting(run: auxiliaries.Run, also_left_out: Sequence[str] = ()) -> dict[str, str]:
        """Return what a run's line is for: its other flags, and the Class task's value of this one."""
        left_out = (flag, *NO_SETTING, *also_left_out)
        own = {name: shown_flag(value) for name, value in run.flags.items() if name not in left_out}
        return own | ({f"{flag} of Class": str(run.flags[flag][0])} if flag in PAIRS else {})

    # A run without the Shared task, of an embedding of size 0, belongs to every line
    bases = [run for run in runs if flag == "embed_sizes" and ablated_value(run, flag) == "0"]
    others = [run for run in runs if run not in bases] or bases
    names = dict.fromkeys(name for run in others for name in setting(run))
    differing = [name for name in names if len({setting(run).get(name) for run in others}) > 1]
    groups: dict[tuple, list[auxiliaries.Run]] = {}
    for run in others:
        groups.setdefault(tuple(setting(run).get(name) for name in differing), []).append(run)
    lines: dict[str, dict[str, list[float]]] = {}
    for values, members in groups.items():
        shared = ("task_p", "adv_weights")
        joined = [run for run in bases if setting(run, shared) == setting(members[0], shared)]
        shown = [f"{name} {value}" for name, value in zip(differing, values, strict=True)]
        for at in ("best epoch", "last epoch"):
            points = lines.setdefault(" ".join(filter(None, [dataset, test_set, *shown, at])), {})
            for run in [*members, *(run for run in joined if run not in members)]:
                best = best_index(run.val_rows, test_set, run.flags.get("select", "test"))
                row = run.val_rows[best if at == "best epoch" else -1]
                points.setdefault(ablated_value(run, flag), []).append(scores_of_set(row, test_set)["Recall @ 1"])
    paper = PAPER_ABLATIONS.get(flag, {}).get(dataset)
    return lines | ({f"paper, {dataset}": {x: [y] for x, y in paper.items()}} if paper and not test_set else {})


def by_number(value: str) -> tuple[float, str]:
    """Return the key that sorts values of a flag: numbers by size, then words."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def ablation_table(lines: Mapping[str, Mapping[str, Sequence[float]]], values: Sequence[str]) -> pd.DataFrame:
    """Return a table of ablation_lines as text: a row for each value of the flag, a column for each line."""
    return pd.DataFrame(
        {name: [mean_and_spread(points.get(value, [])) for value in values] for name, points in lines.items()},
        index=list(values),
    )


def mean_and_spread(recalls: Sequence[float]) -> str:
    """Return the mean of some runs as text, with standard deviation and number where there are several."""
    if not len(recalls):
        return ""
    spread = f" +- {np.std(recalls, ddof=1):.4f} ({len(recalls)} runs)" if len(recalls) > 1 else ""
    return f"{np.mean(recalls):.4f}{spread}"


def grouped_by_setting(
    runs: Sequence[auxiliaries.Run], differing: Sequence[str]
) -> dict[tuple[str, ...], list[auxiliaries.Run]]:
    """Return the runs of each setting of the differing flags."""
    groups: dict[tuple[str, ...], list[auxiliaries.Run]] = {}
    for run in runs:
        groups.setdefault(tuple(shown_flag(run.flags.get(name)) for name in differing), []).append(run)
    return groups


def shown_flag(value: object) -> str:
    """Return a flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def shown_cell(value: object, column: str) -> str:
    """Return a table's cell as text: whole epochs, scores with four digits, nothing for what is not there."""
    if not isinstance(value, float):
        return str(value)
    return "" if np.isnan(value) else f"{value:.0f}" if column in ("epoch", "epochs done") else f"{value:.4f}"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = auxiliaries.OneLineParser(
        prog="evaluate.py",
        description="Score a stored run, with the flags it was trained with, or compare stored runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, or a checkpoint file; with --compare any number of run "
        "folders, or folders that hold them")  # fmt: skip
    add("--compare", action="store_true", help="print a table of stored runs: the flags in which they differ, scores "
        "at the best and at the last epoch, mean and standard deviation over seeds, the paper's numbers")  # fmt: skip
    add("--over", metavar="FLAG", help="with --compare: also print Recall @ 1 over this flag, beside the paper's curve "
        "where there is one, and draw it with --plot; of a pair the Shared task's value counts")  # fmt: skip
    add("--against", metavar="RUN", help="with --compare: also give the differences of each setting to that of this "
        "run, one of those compared, over runs of the same seed, with 95 %% confidence intervals, and draw them with "
        "--plot")  # fmt: skip
    add("--csv", metavar="FILE", help="with --compare: also write the table to FILE")
    add("--plot", metavar="FILE", help="with --compare: draw Recall @ 1 over the epochs, or what --over or --against "
        "ask for (.svg, .png or .pdf)")  # fmt: skip
    add("--checkpoint", metavar="FILE", help="score this checkpoint of the run instead of the best one")
    add("--dataset", metavar="NAME", help="score on the test classes of another data set")
    add("--source_path", metavar="FOLDER", help="folder that holds the dataset folders, where it has moved")
    add("--embedding", choices=["Class", "Shared"], default="Class", help="which embedding to score (default: Class)")
    add("--save_embeddings", metavar="FILE.npz", help="store embeddings, labels, paths and class names")
    add("--gpu", type=int, default=0, metavar="ID", help="GPU to use; without any the CPU (default: 0)")
    add("--kernels", type=int, metavar="N", help="data loader workers (default: as in the run)")
    return parser


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags; `parser.error` on flags that do not fit together or files that exist already."""
    only = {
        "compare": ["over", "against", "csv", "plot"],
        "score": ["checkpoint", "dataset", "source_path", "save_embeddings", "kernels"],
    }
    for flag in only["score" if args.compare else "compare"]:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag}: {'does not go with' if args.compare else 'goes only with'} --compare")
    if auxiliaries.launched_processes() > 1:
        parser.error("runs as one process: start it with python, not with torchrun")
    if not args.compare and len(args.runs) > 1:
        parser.error(f"{len(args.runs)} runs; give one to score, or --compare for several")
    for flag in ("csv", "plot", "save_embeddings"):
        value = getattr(args, flag)
        if value is not None and Path(value).exists():
            parser.error(f"--{flag} {value}: exists already; nothing is overwritten")
        if value is not None and not Path(value).absolute().parent.is_dir():
            parser.error(f"--{flag} {value}: there is no folder {Path(value).parent}")
    if args.against is not None and args.over is not None:
        parser.error("--against: does not go with --over; compare twice")
    if args.against == "":
        parser.error("--against '': give the folder of one of the runs")
    if args.plot and Path(args.plot).suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot {args.plot}: give a file name that ends in .svg, .png or .pdf")
    if args.save_embeddings and Path(args.save_embeddings).suffix != ".npz":
        parser.error(f"--save_embeddings {args.save_embeddings}: give a file name that ends in .npz")
    if args.kernels is not None and args.kernels < 0:
        parser.error(f"--kernels {args.kernels}: give 0 or more")
    return args


USER_ERRORS = (
    datasets.DatasetError,
    netlib.WeightsError,
    auxiliaries.RunFolderError,
    auxiliaries.GraphError,
    auxiliaries.DeviceError,
)


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn errors that the user can mend into one line on stderr.

    The exit code is 2 for bad input, 1 for a run that cannot go on, 128 and the signal's number for one that is told to
    stop.
    """
    try:
        yield
    except USER_ERRORS as error:
        # A missing data set is diagnosed in several lines, which `python datasets.py` prints as they are
        message = "; ".join(" ".join(line.split()) for line in str(error).splitlines())
        tell(f"{prog}: error: {message}")
        sys.exit(2)
    except (auxiliaries.DivergedError, auxiliaries.StoppedError) as error:
        tell(f"{prog}: stopped: {error}", is_cause_known=not isinstance(error, auxiliaries.LostProcessError))
        sys.exit(1)
    except auxiliaries.Interrupted as error:
        tell(f"{prog}: stopped by {signal.Signals(error.signum).name}: {error}", is_cause_known=False)
        sys.exit(128 + error.signum)


def tell(line: str, is_cause_known: bool = True) -> None:
    """Print a line on stderr; of several processes one does."""
    if auxiliaries.may_tell(is_cause_known):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@one_line_errors("evaluate.py")
@auxiliaries.signals_stop("before it was done")
def main(args: argparse.Namespace) -> None:
    """Score a run or compare runs, with flags that `check_args` has seen."""
    try:
        if args.compare:
            compare_runs(args)
        else:
            score_run(args)
    except auxiliaries.RunFolderError:
        raise
    except OSError as error:
        reason = error.strerror or auxiliaries.first_line(error)
        raise auxiliaries.RunFolderError(f"cannot read or write {error.filename or 'a file'} ({reason})") from error


if __name__ == "__main__":
    args_parser = get_args_parser()
    main(check_args(args_parser.parse_args(), args_parser))
