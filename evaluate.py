"""Evaluate embeddings: feature extraction, retrieval and clustering scores, and the nearest-neighbour probe.

The probe measures how well classes, mined labels and known factors can be read from each embedding. As a command:

python evaluate.py RUN [--checkpoint FILE] [--embedding Class|Shared] [--save_embeddings FILE.npz]
python evaluate.py RUN --embed FOLDER --save_embeddings FILE.npz [--embedding Class|Shared]
python evaluate.py RUN --page
python evaluate.py --compare RUN [RUN ...] [--over FLAG | --against RUN] [--csv FILE] [--plot FILE]
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor
from torch.utils.data import DataLoader

import auxiliaries
import datasets
import netlib
from data.custom import NOT_READABLE
from data.files import IMAGES, survey
from data.images import VALIDATION, ImageSet, describe_change, fingerprints, hold_out_classes
from data.locate import check_name
from run.checkpoint import complete_history
from run.history import History, Row, column, file_suffix, scores_of
from run.options import PATH, whole
from support import errors, files, output, processes, weights
from support.errors import DivergedError, InputError
from support.output import Progress, log

PROBE_IMAGES = 1000
"""Largest number of images of a set that are probed."""

MODES = {
    "score": ("checkpoint", "embedding", "save_embeddings", "gpu", "kernels", "dataset", "source_path"),
    "embed": ("checkpoint", "embedding", "save_embeddings", "gpu", "kernels", "embed"),
    "compare": ("compare", "over", "against", "csv", "plot"),
    "page": ("page",),
}
"""Modes of the command and the flags that each of them takes."""


@torch.inference_mode()
def extract_features(
    network: netlib.EmbeddingNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    outputs: Sequence[str],
    to_all: bool = True,
    what: str = "embedding",
) -> dict[str, np.ndarray | None]:
    """Embed every image of a loader, in its order, in evaluation mode.

    Afterwards the network is back in the mode it was in. With several processes, each embeds its shard.

    Args:
        loader: batches of images (B, 3, S, S) uint8 and labels; the labels are ignored.
        outputs: names that EmbeddingNetwork.forward takes.
        to_all: whether all processes get the features; False: the first process gets them, the others None.
        what: name of the activity in the progress display.

    Returns:
        {output: (N, D) float32}.

    Raises:
        DivergedError: features are not finite.
    """
    was_training, device = network.training, network.mean.device
    network.eval()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    sampler = getattr(loader, "sampler", ())
    try:
        with Progress(what, len(sampler)) as progress:
            computed = (network(images.to(device, non_blocking=True), outputs) for images, _ in loader)
            for batch in on_host(computed, auxiliaries.event_maker(device)):
                for name in outputs:
                    parts[name].append(batch[name])
                progress.update(len(batch[outputs[0]]))
    finally:
        network.train(was_training)
    features = {}
    for name in outputs:
        values = np.concatenate(parts.pop(name) or [np.empty((0, 0), dtype=np.float32)])
        if not np.isfinite(values).all():
            reason = ": training has diverged (try a lower --lr) or the weights it started from are damaged"
            if network.amp == "fp16" and all(values.isfinite().all() for values in network.state_dict().values()):
                reason = ": they exceed 65504, the largest float16 number; train with --amp bf16 or none"
            raise DivergedError(f"the network's {name} features are not finite{reason}")
        features[name] = processes.gather_rows(values, to_all)
    return features


def on_host(
    batches: Iterable[Mapping[str, Tensor]], new_event: Callable[[], torch.cuda.Event] | None
) -> Iterator[dict[str, np.ndarray]]:
    """Copy batches {name: (B, D)} to the host and yield them as arrays.

    Start each batch before yielding the one before it, so that a GPU never idles.

    Args:
        batches: batches that are computed when they are asked for.
        new_event: makes events of the GPU that computes the batches (see auxiliaries.event_maker); None on the CPU.
    """
    previous = None
    for batch in batches:
        copies = {name: values.to("cpu", non_blocking=new_event is not None) for name, values in batch.items()}
        current = copies, new_event and auxiliaries.recorded(new_event)
        if previous:
            yield awaited(*previous)
        previous = current
    if previous:
        yield awaited(*previous)


def awaited(copies: Mapping[str, Tensor], event: torch.cuda.Event | None) -> dict[str, np.ndarray]:
    """Wait until the GPU has reached the event recorded after the copies, then return the copies as arrays."""
    if event is None:
        return {name: values.numpy() for name, values in copies.items()}
    event.synchronize()
    # The GPU copied into page-locked memory. Copy once more to free that memory for the next batches
    return {name: values.numpy().copy() for name, values in copies.items()}


def retrieval_scores(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
    block_size: int = 256,
) -> dict[str, float]:
    """Score how well each query retrieves the points of its class by Euclidean distance.

    Recall @ k is the fraction of queries with a point of their class among their k nearest points. With R the number of
    positives of a query in the gallery, R-Precision is the fraction of positives among the R nearest points, and mAP @
    R the sum of the precisions at the ranks of these positives, divided by R. Distances that float32 cannot tell apart
    count against the query, so a collapsed embedding scores 0. A query without positives scores 0.

    Several processes share the queries.

    Args:
        embeddings: (N, D) float, finite.
        labels: (N,) int.
        k_vals: the k of Recall @ k.
        device: device that computes the distances.
        is_query: (N,) bool, the queries; all other points are the gallery. None: each point is a query, and all others
            are its gallery.
        block_size: queries processed at a time; memory grows with block_size * N.

    Returns:
        {"Recall @ k" for each k, "mAP @ R", "R-Precision"}.

    Reference:
        Musgrave et al., "A Metric Learning Reality Check", ECCV 2020.
    """
    is_gallery = np.ones(len(labels), dtype=bool) if is_query is None else ~is_query
    queries = np.flatnonzero(is_gallery if is_query is None else is_query)
    share = processes.shard(len(queries))
    points = torch.as_tensor(np.asarray(embeddings), device=device).double()
    points = points - points.mean(0)  # float32 products are most precise around the origin
    points = (points / points.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)).float()
    rows = [np.empty((0, 3))]
    queries, gallery = queries[share.start : share.stop], np.flatnonzero(is_gallery)
    with auxiliaries.full_precision_products(), Progress("searching", len(queries)) as progress:
        for block in metrics_per_query(points, labels, queries, gallery, block_size):
            rows.append(block)
            progress.update(len(block))
    first_hits, average_precisions, r_precisions = processes.gather_rows(np.concatenate(rows)).T
    recalls = {f"Recall @ {k}": float((first_hits < k).mean()) for k in k_vals}
    return recalls | {"mAP @ R": float(average_precisions.mean()), "R-Precision": float(r_precisions.mean())}


TIE = 3e-7
"""The closeness of a query x and a gallery point y in the unit ball is x.y - |y|^2/2; larger means nearer. Two values
that differ by less than TIE cannot be ordered reliably in float32.
"""


def metrics_per_query(
    points: Tensor, labels: np.ndarray, queries: np.ndarray, gallery: np.ndarray, block_size: int
) -> Iterator[np.ndarray]:
    """Compute the retrieval metrics of each query against the gallery, one block of queries at a time.

    A query never finds itself. In the comments Q is the number of queries, B that of a block, G the number of gallery
    points, and C the size of the largest class in the gallery.

    Args:
        points: (N, D) float32 in the unit ball.
        labels: (N,) int.
        queries: (Q,) indices of points.
        gallery: (G,) indices of points.
        block_size: B.

    Yields:
        (B, 3) for each block: rank of the first hit from 0, average precision at R, R-precision.
    """
    device = points.device
    gallery = gallery[np.argsort(labels[gallery], kind="stable")]  # the columns of a class are adjacent
    first, stop = (np.searchsorted(labels[gallery], labels[queries], side) for side in ("left", "right"))
    column_of = np.full(len(labels), -1)  # -1: not in the gallery
    column_of[gallery] = np.arange(len(gallery))
    n_positives = stop - first - (column_of[queries] >= 0)
    # (Q, 5), copied to the device once: point, first column and size of its class, own column, number of positives
    query_facts = np.stack([queries, first, stop - first, column_of[queries], n_positives], 1)
    query_facts = torch.as_tensor(query_facts, device=device)
    # (C,), relative to the first column of a class
    offsets = torch.arange((stop - first).max(initial=1), device=device)
    right = points[torch.as_tensor(gallery, device=device)]
    half_norms = right.square().sum(1) / 2
    buffer = torch.empty(min(block_size, len(queries)), len(gallery), device=device)
    for start in range(0, len(queries), block_size):
        block = query_facts[start : start + block_size]
        left, (first_columns, sizes, own_columns, n_wanted) = points[block[:, 0]], block[:, 1:].split(1, dim=1)
        # x.y - |y|^2/2 of each query x and gallery point y, (B, G): larger means nearer
        closeness = torch.addmm(half_norms, left, right.T, beta=-1, out=buffer[: len(block)])
        positives = take_out_positives(closeness, first_columns + offsets, sizes, own_columns)
        most = min(n_positives[start : start + block_size].max(initial=1), len(gallery))
        yield metrics_of_block(closeness, positives, n_wanted, most).cpu().numpy()


def take_out_positives(closeness: Tensor, columns: Tensor, sizes: Tensor, own_columns: Tensor) -> Tensor:
    """Move the closeness of each query's positives out of `closeness`, which keeps that of the negatives.

    Args:
        closeness: (B, G); changed in place: the query's class, including the query itself, becomes -inf.
        columns: (B, C) columns of the class; if it is smaller than C, the columns after its end are ignored.
        sizes: (B, 1) size of the class.
        own_columns: (B, 1) column of the query itself.

    Returns:
        (B, C) closeness to the positives, nearest first, padded with -inf. It is lowered by TIE, so that ties count
        against the query.
    """
    in_class = columns < columns[:, :1] + sizes
    # Columns after the end of the class repeat its first one. The clamp is for a class without gallery points, whose
    # first column may lie after the last one
    columns = torch.where(in_class, columns, columns[:, :1]).clamp_(max=closeness.shape[1] - 1)
    to_class = closeness.gather(1, columns)
    is_positive = in_class & (columns != own_columns)
    closeness.scatter_(1, columns, torch.where(sizes > 0, -torch.inf, to_class))
    return to_class.masked_fill_(~is_positive, -torch.inf).sub_(TIE).sort(dim=1, descending=True).values


def metrics_of_block(negatives: Tensor, positives: Tensor, n_positives: Tensor, most: int) -> Tensor:
    """Compute the retrieval metrics of each query from the closeness of its positives and negatives.

    Args:
        negatives: (B, G) closeness, -inf for points that are not negatives.
        positives: (B, C) closeness, nearest first.
        n_positives: (B, 1), R of each query.
        most: the largest R, at least 1 and at most G.

    Returns:
        (B, 3) float64: rank of the first hit from 0 (inf if there is none), average precision at R, R-precision.
    """
    # The nearest positive ranks behind all negatives that are at least as near
    first_hits = torch.where(n_positives[:, 0] > 0, count_at_least(negatives, positives[:, :1]), torch.inf)
    # The rank of the n-th positive is n plus the number of nearer negatives. It is enough to count the R nearest ones
    nearest = largest_values(negatives, most)
    nth = torch.arange(1, positives.shape[1] + 1, device=positives.device)
    ranks = nth + torch.searchsorted(-nearest, -positives, right=True)
    is_hit = ranks <= n_positives
    totals = [(is_hit * nth / ranks.double()).sum(1), is_hit.sum(1).double()]
    return torch.stack([first_hits, *(total / n_positives[:, 0].clamp_min(1) for total in totals)], 1)


def largest_values(rows: Tensor, k: int, group: int = 64) -> Tensor:
    """Return the k largest values of each of (B, N) rows, largest first.

    For long rows, search only the k groups of columns with the largest maxima: they hold all k values.
    """
    if rows.shape[1] < 4 * group * k:
        return rows.topk(k, dim=1).values
    n_grouped = rows.shape[1] // group * group
    groups = rows[:, :n_grouped].view(len(rows), -1, group)
    best = groups.amax(2).topk(k, dim=1).indices
    candidates = groups.gather(1, best[:, :, None].expand(-1, -1, group)).flatten(1)
    return torch.cat([candidates, rows[:, n_grouped:]], 1).topk(k, dim=1).values


def count_at_least(rows: Tensor, bounds: Tensor) -> Tensor:
    """Count, for each of (B, N) rows, the values not below the row's bound (B, 1); return (B,) int64."""
    if rows.device.type != "cpu":
        return (rows >= bounds).sum(1)
    # One row at a time stays in the processor's cache, and NumPy counts ten times as fast as torch's sum
    return torch.tensor([np.count_nonzero(row >= bound) for row, bound in zip(rows.numpy(), bounds.numpy())])


def clustering_scores(labels: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return (NMI, F1) of a clustering, from two label arrays (N,) int.

    NMI is normalised by the arithmetic mean. F1 is computed over pairs of points: same class against same cluster.
    """
    (_, same_cluster_only), (same_class_only, same_both) = pair_confusion_matrix(labels, clusters).tolist()
    nmi = float(normalized_mutual_info_score(labels, clusters))
    return nmi, 2 * same_both / max(2 * same_both + same_class_only + same_cluster_only, 1)


def score_set(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
    with_clustering: bool = True,
) -> dict[str, float | None]:
    """Score one test set: its retrieval_scores, and NMI and F1 of a k-means with as many clusters as classes.

    Args:
        embeddings: (N, D) float, finite.
        labels: (N,) int.
        k_vals: the k of Recall @ k.
        seed: seed of the k-means.
        device: device that computes the distances.
        is_query: see retrieval_scores.
        with_clustering: False skips the k-means; NMI and F1 are then None.
    """
    nmi = f1 = None
    if with_clustering:
        if processes.is_first():  # the other processes wait for the result
            clusters, _ = auxiliaries.kmeans(embeddings, len(np.unique(labels)), seed)
            nmi, f1 = clustering_scores(labels, clusters)
        nmi, f1 = processes.broadcast((nmi, f1))
    return {"NMI": nmi, "F1": f1} | retrieval_scores(embeddings, labels, k_vals, device, is_query)


def describe_clusters(
    clusters: np.ndarray,
    n_clusters: int,
    labels: np.ndarray,
    factors: Mapping[str, np.ndarray],
    previous: np.ndarray | None = None,
) -> dict[str, int | float | None]:
    """Describe mined labels: how many clusters have images, their sizes, and how they agree with other labels.

    Agreement is 1 for the same partition and 0 on average for random labels. It is the adjusted Rand index (ARI) with
    the previous labels, and the adjusted mutual information (AMI) with the class and known factors. NMI would mislead:
    it grows with the number of labels, to almost 0.5 for random labels of In-Shop's size.

    Args:
        clusters: (N,) int in [0, n_clusters).
        n_clusters: number of clusters, with or without images.
        labels: (N,) int, the classes.
        factors: factor name to (N,) int levels.
        previous: (N,) int labels of the mining before; None for the first mining.

    Returns:
        A value for each column of log_mining.csv that describes the clusters; sizes are those of clusters with images.
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
    } | {f"AMI {name}": float(adjusted_mutual_info_score(levels, clusters)) for name, levels in known.items()}


def probe_subset(labels: np.ndarray, seed: int) -> np.ndarray:
    """Choose the images of a set that are probed; the same seed gives the same choice.

    Take a quarter of the images, at least 100 and at most PROBE_IMAGES, about equally many of each class. If that is
    fewer than five per class, take five of each of some randomly chosen classes instead. Drop classes with only one
    chosen image, which has no neighbour of its class.

    Args:
        labels: (N,) int in [0, n_classes).
        seed: seed of the choice.

    Returns:
        Sorted indices, int64.
    """
    n_images, n_classes = min(PROBE_IMAGES, max(100, len(labels) // 4)), int(labels.max()) + 1
    n_per_class = max(5, n_images // n_classes)
    rng = np.random.default_rng([seed, PROBE_IMAGES])
    images, classes = rng.permutation(len(labels)), rng.permutation(n_classes).argsort()
    members = {label: [] for label in classes}
    for image in images:
        members[labels[image]].append(image)
    chosen: list[int] = []
    for label in classes:
        of_class = members[label][: min(n_per_class, n_images - len(chosen))]
        if len(of_class) > 1:
            chosen += of_class
    return np.sort(chosen).astype(np.int64)


def nearest_neighbour_accuracy(embeddings: np.ndarray, labels: np.ndarray, k: int = 5) -> float:
    """Return the fraction of points whose label is the most frequent one among their k nearest other points.

    Ties between labels go to the label of the nearest point.

    Args:
        embeddings: (N, D) float, with N of about 1,000.
        labels: (N,) int.
        k: number of neighbours.
    """
    points = torch.as_tensor(embeddings).double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(min(k, len(labels) - 1), largest=False, sorted=True).indices.numpy()
    labels_nearby = labels[nearest]
    votes = (labels_nearby[:, :, None] == labels_nearby[:, None, :]).sum(2)
    return float((labels_nearby[np.arange(len(labels_nearby)), votes.argmax(1)] == labels).mean())


def probe_scores(embeddings: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Measure how well labels can be read from the embeddings, by nearest_neighbour_accuracy.

    The adversarial term should push "Class from Shared" and "Mined from Class" down to chance. Of known factors, the
    Class embedding should lose them and the Shared embedding should hold them.

    Args:
        embeddings: "Class" and, if it is trained, "Shared" to (N, D).
        labels: "Class", "Mined" if labels are mined, and the known factors, each to (N,) int.

    Returns:
        {"label from embedding": accuracy}, and {"label by chance": accuracy of always guessing the most frequent
        label}.
    """
    pairs = [("Class", "Shared"), ("Mined", "Class"), ("Class", "Class"), ("Mined", "Shared")]
    pairs += [(name, task) for name in labels for task in ("Class", "Shared") if name not in ("Class", "Mined")]
    scores = {}
    for name, task in pairs:
        if name in labels and task in embeddings:
            scores[f"{name} from {task}"] = nearest_neighbour_accuracy(embeddings[task], labels[name])
    for name, values in labels.items():
        scores[f"{name} by chance"] = float(np.bincount(values).max() / len(values))
    return scores


def probe_sets(
    network: netlib.EmbeddingNetwork,
    loaders: datasets.Loaders,
    mined: np.ndarray | None,
    test_embeddings: Mapping[str, Mapping[str, np.ndarray]],
    seed: int,
) -> dict[str, float]:
    """Return the probe_scores of training images, and of each test set whose factors are known.

    Args:
        loaders: the loaders, with the probed training images.
        mined: labels (N,) of all training images; None if none are mined: the Shared head is then not probed.
        test_embeddings: {test set: {task: (N, D)}}.
        seed: seed of probe_subset.
    """
    tasks = ["Class"] if mined is None else ["Class", "Shared"]
    images, chosen = loaders.images, loaders.probe.dataset.indices
    labels = {"Class": images.labels} | ({} if mined is None else {"Mined": mined}) | images.factors
    embeddings = extract_features(network, loaders.probe, tasks)
    scores = probe_scores(embeddings, {name: values[chosen] for name, values in labels.items()})
    for test_set, images in loaders.test_images.items():
        chosen = probe_subset(images.labels, seed) if images.factors else []
        if len(chosen):
            labels = {name: values[chosen] for name, values in ({"Class": images.labels} | images.factors).items()}
            embeddings = {task: test_embeddings[test_set][task][chosen] for task in tasks}
            for name, value in probe_scores(embeddings, labels).items():
                scores[f"{test_set.capitalize()} {name}"] = value
    return scores


def embed_sets(
    network: netlib.EmbeddingNetwork, loaders: Mapping[str, DataLoader], tasks: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the embeddings of test sets, {test set: {task: (N, D)}}; see extract_features."""
    return {name: extract_features(network, loader, tasks) for name, loader in loaders.items()}


def score_sets(
    task: str,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    tests: Mapping[str, ImageSet],
    k_vals: Sequence[int],
    seed: int,
    device: torch.device,
    with_clustering: bool,
) -> Row:
    """Score one task's embedding on each test set separately; return the scores by log column (see score_set)."""
    row = {}
    for name, images in tests.items():
        points = embeddings[name][task]
        scores = score_set(points, images.labels, k_vals, seed, device, images.is_query, with_clustering)
        row |= {column(name, score): value for score, value in scores.items()}
    return row


def score_run(args: argparse.Namespace) -> None:
    """Score each test set with its best checkpoint, print the logged scores beside it, and store embeddings if asked.

    Raises:
        InputError: the data set or a checkpoint cannot be used, or a file to store exists already.
    """
    run = Path(args.run[0])
    checkpoints = weights.checkpoints_of(run, args.checkpoint)
    read = functools.cache(weights.read_checkpoint)
    stored = read(checkpoints[0])
    flags = stored["flags"]
    dataset = args.dataset or flags["dataset"]
    train_images, tests = datasets.load_dataset(dataset, args.source_path or flags["source_path"])
    splits = dict(tests)
    if flags["val_classes"] and not args.dataset:
        splits["train"] = train_images
        tests[VALIDATION] = hold_out_classes(train_images, flags["val_classes"])[1]
    npz_files = {}
    if args.save_embeddings:
        path = Path(args.save_embeddings)
        npz_files = {name: path.with_stem(path.stem + file_suffix(name)) for name in tests}
    for path in npz_files.values():
        if path.exists():
            raise InputError(f"--save_embeddings: {path} exists already; nothing is overwritten")
    device, amp = prepare(flags, args.gpu)
    if dataset == flags["dataset"]:
        then, now = stored["progress"]["contents"], fingerprints(splits)
        change = describe_change({name: then.get(name, {}) for name in splits}, {name: now[name] for name in splits})
        if change:
            log.warning(f"the images have changed since the run was scored: {change}; logged scores are from before")
    for name, images in tests.items():
        best = run / f"checkpoint{file_suffix(name)}.pth.tar"
        checkpoint = best if best in checkpoints else checkpoints[0]
        embeddings = embed(checkpoint, read(checkpoint), images, args.embedding, args.kernels, device, amp)
        scores = score_set(embeddings, images.labels, flags["k_vals"], flags["seed"], device, images.is_query)
        set_name = "" if name == "test" else f", {name}"
        n_images = errors.counted(len(images), f"{dataset} image")
        print(f"{checkpoint}, {args.embedding} embedding of {n_images}{set_name}")
        rows = read(checkpoint)["progress"]["rows"]
        # Logged scores are of the Class embedding, and comparable only if no epoch was trained after the evaluation
        is_logged = rows["val"] and rows["val"][-1]["Epochs"] == len(rows["train"]) - 1
        is_logged = is_logged and args.embedding == "Class" and dataset == flags["dataset"]
        print_scores(scores, rows["val"][-1] if is_logged else {}, name)
        if name in npz_files:
            is_query = np.ones(len(images), dtype=bool) if images.is_query is None else images.is_query
            image_facts = {"labels": images.labels, "paths": images.names, "class_names": images.class_names}
            store(npz_files[name], embeddings, is_query=is_query, **image_facts)


def print_scores(scores: Mapping[str, float | None], row: Row, test_set: str) -> None:
    """Print scores with all their digits, beside those of a row of the run's log if there is one."""
    logged, width = scores_of(row, test_set), max(map(len, scores))
    lines = [("score", "now", f"logged in epoch {row['Epochs']}" if row else None)]
    lines += [(name, repr(value), logged.get(name)) for name, value in scores.items()]
    for name, now, then in lines:
        print(f"{name:<{width}}  {now:<20}  {'' if then is None else then}".rstrip())


def prepare(flags: Mapping[str, object], gpu: int) -> tuple[torch.device, str]:
    """Return the device and the amp mode for embedding: the run's own mode if the device supports it."""
    device = auxiliaries.pick_device(gpu)
    capability = auxiliaries.compute_capability(device)
    tf32, amp = auxiliaries.supported_precision(capability, flags["tf32"], flags["amp"])
    auxiliaries.set_precision(device, tf32, amp)
    return device, amp


def embed(
    checkpoint: Path,
    stored: Mapping[str, Mapping],
    images: ImageSet,
    embedding: str,
    n_workers: int | None,
    device: torch.device,
    amp: str,
) -> np.ndarray:
    """Embed images with the network of a checkpoint, as its run embeds test images.

    Args:
        checkpoint: path of the checkpoint, for messages.
        stored: content of the checkpoint.
        embedding: Class or Shared.
        n_workers: loader workers; None: as in the run.
        device: see prepare.
        amp: see prepare.

    Returns:
        (N, D) float32.

    Raises:
        InputError: the network or an image cannot be read.
        DivergedError: embeddings are not finite.
    """
    flags = stored["flags"]
    if embedding == "Shared" and not flags["task_p"][1] and not any(flags["adv_weights"]):
        log.warning(f"{checkpoint}: the Shared embedding was not trained in this run")
    loader = datasets.make_loader(
        datasets.ImageDataset(images, datasets.test_transform(flags["img_size"])),
        batch_size=min(flags["bs"], datasets.SCORING_BATCH_SIZE),
        n_workers=auxiliaries.n_workers(flags["kernels"] if n_workers is None else n_workers),
        pin_memory=device.type == "cuda",
    )
    auxiliaries.set_seeds(flags["seed"])
    network = netlib.rebuild(stored, checkpoint).to(device)
    network.amp = amp
    return extract_features(network, loader, [embedding])[embedding]


def embed_folder(args: argparse.Namespace) -> None:
    """Store the embeddings and paths of all images below a folder, in any layout.

    Exits with code 1, after the rest is stored, if something cannot be read.

    Raises:
        InputError: there is nothing to embed, or the checkpoint cannot be used.
    """
    root = Path(args.embed)
    found = survey(root)
    lost = {kind: found[kind] for kind in NOT_READABLE}
    for noun, names in {"other file": found["other file"], **lost}.items():
        if names:
            paths = [os.path.join(root, name) for name in names]
            print(f"skipped {errors.counted(len(names), noun)}: {errors.first_few(paths)}")
    paths = [os.path.join(root, name) for name in sorted([*found["image"], *found["backup copy"]])]
    if not paths:
        raise InputError(f"--embed {root}: no images ({', '.join(IMAGES)}) in this folder or below it")
    checkpoint = weights.checkpoints_of(Path(args.run[0]), args.checkpoint)[0]
    stored = weights.read_checkpoint(checkpoint)  # first, as decoding takes long
    device, amp = prepare(stored["flags"], args.gpu)
    reasons = datasets.decoding_errors([ImageSet(paths, np.zeros(len(paths), dtype=np.int64), [""])])
    lost["broken image"] = broken = [reason for reason in reasons if reason is not None]
    sound = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    print(*broken, sep="\n", end="\n" * bool(broken))
    if sound:
        images = ImageSet(sound, np.zeros(len(sound), dtype=np.int64), [""])
        embeddings = embed(checkpoint, stored, images, args.embedding, args.kernels, device, amp)
        store(Path(args.save_embeddings), embeddings, paths=sound)
    missing = ", ".join(errors.counted(len(names), noun) for noun, names in lost.items() if names)
    if missing:
        done = f"finished, {errors.counted(len(sound), 'image')} stored" if sound else "nothing to store"
        print(f"evaluate.py: {done}; left out: {missing}, see above", file=sys.stderr)
        sys.exit(1)


def draw_page(folder: Path) -> None:
    """Redraw page and plots of a stored run.

    Raises:
        InputError: the run cannot be read.
    """
    from report import page  # imported here, so that scoring need not load Matplotlib

    history = History.read(folder)
    if not history.written:
        complete_history(history)
    page.draw_plots(history)
    page.write_page(history)
    page.write_index(folder.absolute())
    print(f"page: {folder / 'page.html'}")


def store(path: Path, embeddings: np.ndarray, **image_facts: Sequence) -> None:
    """Store embeddings (N, D) float32, and facts of the images such as labels and paths, as .npz."""
    with files.replaced_file(path) as file:
        np.savez(file, embeddings=embeddings, **image_facts)
    print(f"stored {path}: {errors.counted(len(embeddings), 'embedding')}")


def get_args_parser() -> errors.OneLineParser:
    """Build the parser of the command."""
    parser = errors.OneLineParser(
        prog="evaluate.py",
        description="Score a stored run with the flags it was trained with, embed images, or compare stored runs.",
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("run", type=PATH, nargs="+", metavar="RUN", help="a run folder or a checkpoint file; with --compare, any "
        "number of run folders, or folders that hold them")

    add = parser.add_argument_group("to score one run").add_argument
    add("--checkpoint", type=PATH, metavar="FILE", help="score this checkpoint of the run instead of the best one")
    add("--dataset", metavar="NAME", help="score on the test classes of another data set")
    add("--source_path", type=PATH, metavar="FOLDER", help="folder that holds the data "
        "sets, if it has moved since training")
    add("--embedding", choices=["Class", "Shared"], help="embedding to score or to store (default: Class)")
    add("--save_embeddings", type=PATH, metavar="FILE.npz", help="also store embeddings, labels, "
        "paths, class names and is_query in this file; those of the sets Val, Set 1, ... go to FILE_val.npz, ...")
    add("--embed", type=PATH, metavar="FOLDER", help="instead of scoring, embed all images below FOLDER, in any "
        "layout, and store embeddings and paths in the file of --save_embeddings")
    add("--gpu", type=whole(0), metavar="ID", help="number of the GPU to use; without a GPU, the CPU is "
        "used (default: 0)")
    add("--kernels", type=whole(0), metavar="N", help="data loader workers; does not change results "
        "(default: as in the run)")

    add = parser.add_argument_group("to draw one run").add_argument
    add("--page", action="store_true", default=None, help="redraw page.html and the plots of a stored run, for example "
        "one of an earlier version")

    add = parser.add_argument_group("to compare runs").add_argument
    add("--compare", action="store_true", default=None, help="print a table of stored runs, grouped into "
        "settings (runs that differ only in the seed): scores at the best and at the last epoch, mean and standard "
        "deviation over seeds, the paper's numbers")
    add("--over", metavar="FLAG", help="also print Recall @ 1 as a function of this flag, next to the paper's curve "
        "if there is one; --plot draws it; if the flag is a pair, the Shared task's value is used")
    add("--against", type=PATH, metavar="RUN", help="also print the differences of every other setting's scores to "
        "those of RUN's setting: mean over pairs of equal seed, with a 95 %% confidence interval; --plot draws them; a "
        "setting is all runs that differ only in the seed, and RUN must be among the runs compared")
    add("--csv", type=PATH, metavar="FILE", help="also write the table to FILE, with a column for each flag that "
        "differs")
    add("--plot", type=PATH, metavar="FILE", help="draw Recall @ 1 over the epochs, or what --over or --against prints "
        "(.svg, .png or .pdf)")
    # fmt: on
    return parser


def check_args(args: argparse.Namespace, parser: errors.OneLineParser) -> None:
    """Exit with `parser.error` if flags do not fit together or a file cannot be written."""
    mode = next((mode for mode in ("compare", "page", "embed") if getattr(args, mode) is not None), "score")
    for flag, value in vars(args).items():
        if value is not None and flag not in ("run", *MODES[mode]):
            parser.error(f"--{flag}: {'goes only with --compare' if mode == 'score' else f'does not go with --{mode}'}")
    if processes.world_size() > 1:
        parser.error("runs as one process: start it with python, not with torchrun")
    if not args.compare and len(args.run) > 1:
        parser.error(f"{len(args.run)} runs; give one, or --compare for several")
    if args.against is not None and args.over is not None:
        parser.error("--against: does not go with --over; compare twice")
    if mode == "embed" and args.save_embeddings is None:
        parser.error("--embed: give --save_embeddings FILE.npz")
    for flag, endings in {"csv": [], "plot": [".svg", ".png", ".pdf"], "save_embeddings": [".npz"]}.items():
        if getattr(args, flag) is None:
            continue
        path = Path(getattr(args, flag))
        if endings and path.suffix not in endings:
            parser.error(f"--{flag} {path}: give a file name that ends in {' or '.join(endings)}")
        if path.exists():
            parser.error(f"--{flag} {path}: exists already; nothing is overwritten")
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            parser.error(f"--{flag} {path}: there is no folder {path.parent} that can be written to")
    if args.csv and args.plot and os.path.realpath(args.csv) == os.path.realpath(args.plot):
        parser.error(f"--csv {args.csv} --plot {args.plot}: are the same file")
    if args.dataset is not None:
        check_name(args.dataset, args.source_path or "./Datasets")


@output.logged()
@errors.stop_on_signals()
@errors.one_line_errors("evaluate.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Score, embed, draw or compare runs, as a command line asks."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(args, parser)
    args.gpu, args.embedding = args.gpu or 0, args.embedding or "Class"
    if args.compare:
        from report import compare  # imported here, so that scoring need not load Matplotlib

        compare.compare_runs(args.run, over=args.over, against=args.against, csv=args.csv, plot=args.plot)
    elif args.page:
        draw_page(Path(args.run[0]))
    elif args.embed is not None:
        embed_folder(args)
    else:
        score_run(args)


if __name__ == "__main__":
    errors.set_up_output()
    main()
