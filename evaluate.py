"""What an embedding is worth: feature extraction, retrieval and clustering scores, the probe.

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
"""Most images of a set that are probed."""

MODES = {
    "score": ("checkpoint", "embedding", "save_embeddings", "gpu", "kernels", "dataset", "source_path"),
    "embed": ("checkpoint", "embedding", "save_embeddings", "gpu", "kernels", "embed"),
    "compare": ("compare", "over", "against", "csv", "plot"),
    "page": ("page",),
}
"""What the command does, and the flags of each."""


@torch.inference_mode()
def extract_features(
    network: netlib.EmbeddingNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    outputs: Sequence[str],
    amp: str = "none",
    to_all: bool = True,
    what: str = "embedding",
) -> dict[str, np.ndarray | None]:
    """Embed every image of a loader, in its order, in evaluation mode; the network's mode is restored.

    Each process embeds its shard, and all of them get the features. outputs: names that EmbeddingNetwork.forward takes.
    amp: none, bf16 or fp16. to_all: False gives the features to the first process, and None to the others. what: said
    on the progress. Returns {output: (N, D) float32}. Raises DivergedError where they are not finite.
    """
    was_training, device = network.training, network.mean.device
    network.eval()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    sampler = getattr(loader, "sampler", ())
    try:
        with Progress(what, len(sampler)) as progress:
            computed = (embed_batch(network, images, outputs, amp) for images, _ in loader)
            for batch in on_host(computed, auxiliaries.gpu_events(device)):
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
            if amp == "fp16" and all(values.isfinite().all() for values in network.state_dict().values()):
                reason = ", though its weights are: float16 ends at 65504; train with --amp bf16 or none"
            raise DivergedError(f"the network's {name} features are not finite{reason}")
        features[name] = processes.gather_rows(values, to_all)
    return features


def embed_batch(
    network: netlib.EmbeddingNetwork, images: Tensor, outputs: Sequence[str], amp: str
) -> dict[str, Tensor]:
    """Return the outputs {name: (B, D)} of a batch of images (B, 3, S, S), on the network's device."""
    device = network.mean.device
    with netlib.autocast(device, amp):
        return network(images.to(device, non_blocking=True), outputs)


def on_host(
    batches: Iterable[Mapping[str, Tensor]], new_event: Callable[[], torch.cuda.Event] | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches {name: (B, D)} as arrays, each after the next one has been started, so that a GPU never idles.

    Args:
        batches: each is started by asking for it.
        new_event: of the GPU that computes them, see auxiliaries.gpu_events; None for the CPU.
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
    """Return copies on the host as arrays, once the GPU has passed the event behind them."""
    if event is None:
        return {name: values.numpy() for name, values in copies.items()}
    event.synchronize()
    # Copied once more: what a GPU copies to is page-locked memory, which the next batches are to take again
    return {name: values.numpy().copy() for name, values in copies.items()}


def retrieval_scores(
    embeddings: np.ndarray,
    labels: np.ndarray,
    k_vals: Sequence[int],
    device: torch.device | str = "cpu",
    is_query: np.ndarray | None = None,
    block_size: int = 256,
) -> dict[str, float]:
    """Score how well each query finds the points of its class by Euclidean distance.

    Recall @ k: the fraction of queries with a point of their class among their k nearest. With R the number of
    positives in the gallery, R-Precision is the fraction of positives among the R nearest, and mAP @ R the sum of the
    precisions at their ranks, over R (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020). Where distances
    tie within float32, negatives come first: a collapsed embedding scores 0. A query without positives scores 0.

    embeddings: (N, D) float, finite. labels: (N,) int. is_query: (N,) bool, the queries, which are searched in the
    other points; None: each point is searched in all others. block_size: queries at a time; memory grows with
    block_size * N. Several processes share the queries. Returns {"Recall @ k" for each k, "mAP @ R", "R-Precision"}.
    """
    is_gallery = np.ones(len(labels), dtype=bool) if is_query is None else ~is_query
    queries = np.flatnonzero(is_gallery if is_query is None else is_query)
    share = processes.shard(len(queries))
    points = torch.as_tensor(np.asarray(embeddings), device=device).double()
    points = points - points.mean(0)  # around the origin, float32 products tell distances apart best
    points = (points / points.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)).float()
    rows = [np.empty((0, 3))]
    queries, gallery = queries[share.start : share.stop], np.flatnonzero(is_gallery)
    with auxiliaries.full_precision_products(), Progress("searching", len(queries)) as progress:
        for block in class_ranks(points, labels, queries, gallery, block_size):
            rows.append(block)
            progress.update(len(block))
    first_hits, average_precisions, r_precisions = processes.gather_rows(np.concatenate(rows)).T
    recalls = {f"Recall @ {k}": float((first_hits < k).mean()) for k in k_vals}
    return recalls | {"mAP @ R": float(average_precisions.mean()), "R-Precision": float(r_precisions.mean())}


TIE = 3e-7
"""Difference of x.y - |y|^2/2, for points in the unit ball, that float32 cannot be trusted to tell."""


def class_ranks(
    points: Tensor, labels: np.ndarray, queries: np.ndarray, gallery: np.ndarray, block_size: int
) -> Iterator[np.ndarray]:
    """Rank the points of each query's class among all others, a block of queries at a time.

    No query finds itself. In the comments Q is the number of queries, B of those in a block, G of gallery points, and C
    the size of the largest class in the gallery.

    Args:
        points: (N, D) float32 in the unit ball.
        labels: (N,) int.
        queries: (Q,) indices of points.
        gallery: (G,) indices of points.
        block_size: B.

    Yields:
        (B, 3) of a block: rank of the first hit from 0, average precision at R, R-precision.
    """
    device = points.device
    gallery = gallery[np.argsort(labels[gallery], kind="stable")]  # columns: the points of a class stand together
    first, stop = (np.searchsorted(labels[gallery], labels[queries], side) for side in ("left", "right"))
    column_of = np.full(len(labels), -1)  # -1: not in the gallery
    column_of[gallery] = np.arange(len(gallery))
    n_positives = stop - first - (column_of[queries] >= 0)
    # Of each query: point, first column and size of its class, own column, number of positives; copied once, (Q, 5)
    described = np.stack([queries, first, stop - first, column_of[queries], n_positives], 1)
    described = torch.as_tensor(described, device=device)
    offsets = torch.arange((stop - first).max(initial=1), device=device)  # (C,) from the first column of a class
    right = points[torch.as_tensor(gallery, device=device)]
    half_norms = right.square().sum(1) / 2
    buffer = torch.empty(min(block_size, len(queries)), len(gallery), device=device)
    for start in range(0, len(queries), block_size):
        block = described[start : start + block_size]
        left, (first_columns, sizes, own_columns, n_wanted) = points[block[:, 0]], block[:, 1:].split(1, dim=1)
        # x.y - |y|^2/2 of each query x and gallery point y, (B, G): the larger, the nearer
        closeness = torch.addmm(half_norms, left, right.T, beta=-1, out=buffer[: len(block)])
        positives = take_out_positives(closeness, first_columns + offsets, sizes, own_columns)
        most = min(n_positives[start : start + block_size].max(initial=1), len(gallery))
        yield rank_among(closeness, positives, n_wanted, most).cpu().numpy()


def take_out_positives(closeness: Tensor, columns: Tensor, sizes: Tensor, own_columns: Tensor) -> Tensor:
    """Return the closeness to each query's positives, (B, C), nearest first and then -inf, and leave the negatives.

    It is lowered by TIE, so that ties count against the query.

    Args:
        closeness: (B, G); the query's class, with the query itself, becomes -inf.
        columns: (B, C) of the class, which ends before where it is smaller than C.
        sizes: (B, 1) of the class.
        own_columns: (B, 1) of the query itself.
    """
    in_class = columns < columns[:, :1] + sizes
    # Behind its end the first column stands again; a class without points in the gallery may begin behind the last one
    columns = torch.where(in_class, columns, columns[:, :1]).clamp_(max=closeness.shape[1] - 1)
    to_class = closeness.gather(1, columns)
    is_positive = in_class & (columns != own_columns)
    closeness.scatter_(1, columns, torch.where(sizes > 0, -torch.inf, to_class))
    return to_class.masked_fill_(~is_positive, -torch.inf).sub_(TIE).sort(dim=1, descending=True).values


def rank_among(negatives: Tensor, positives: Tensor, n_positives: Tensor, most: int) -> Tensor:
    """Return (B, 3) float64: rank of the first hit from 0, inf for none, average precision at R, R-precision.

    Args:
        negatives: (B, G) closeness, -inf for what is none.
        positives: (B, C) closeness, nearest first.
        n_positives: (B, 1), R of each query.
        most: the largest of them, at least 1 and at most G.
    """
    # All negatives at least as near as the nearest positive come before it
    first_hits = torch.where(n_positives[:, 0] > 0, count_at_least(negatives, positives[:, :1]), torch.inf)
    # The n-th positive has rank n plus the number of nearer negatives, of which the R nearest are enough
    nearest = largest_values(negatives, most)
    nth = torch.arange(1, positives.shape[1] + 1, device=positives.device)
    ranks = nth + torch.searchsorted(-nearest, -positives, right=True)
    is_hit = ranks <= n_positives
    totals = [(is_hit * nth / ranks.double()).sum(1), is_hit.sum(1).double()]
    return torch.stack([first_hits, *(total / n_positives[:, 0].clamp_min(1) for total in totals)], 1)


def largest_values(rows: Tensor, k: int, group: int = 64) -> Tensor:
    """Return the k largest values of each of (B, N) rows, largest first.

    Of long rows only the k groups of columns with the largest maxima are searched.
    """
    if rows.shape[1] < 4 * group * k:
        return rows.topk(k, dim=1).values
    n_grouped = rows.shape[1] // group * group
    groups = rows[:, :n_grouped].view(len(rows), -1, group)
    best = groups.amax(2).topk(k, dim=1).indices
    candidates = groups.gather(1, best[:, :, None].expand(-1, -1, group)).flatten(1)
    return torch.cat([candidates, rows[:, n_grouped:]], 1).topk(k, dim=1).values


def count_at_least(rows: Tensor, bounds: Tensor) -> Tensor:
    """Return how many values of each of (B, N) rows are no less than the row's bound (B, 1); (B,) int64."""
    if rows.device.type != "cpu":
        return (rows >= bounds).sum(1)
    # A row at a time stays in the processor's cache, and NumPy counts ten times as fast as torch's sum
    return torch.tensor([np.count_nonzero(row >= bound) for row, bound in zip(rows.numpy(), bounds.numpy())])


def clustering_scores(labels: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return (NMI, F1) of a clustering, both label arrays (N,) int.

    NMI has the arithmetic mean as normalisation. F1 is over pairs of points in the same class and in the same cluster.
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
    """Return the retrieval_scores of one test set, and {"NMI", "F1"} of a k-means with as many clusters as classes.

    seed: of the k-means. with_clustering: False leaves NMI and F1 out, as None.
    """
    nmi = f1 = None
    if with_clustering:
        if processes.is_first():  # the others wait for it
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
    """Describe mined labels: numbers of clusters with images and without, sizes of the former, what they agree with.

    Agreement is 1 for the same partition and 0 on average for random labels: the adjusted Rand index with the labels
    mined before, adjusted mutual information (AMI) with class and known factors. NMI would not do: it grows
    with the number of labels, to almost 0.5 for random labels of In-Shop's size.

    clusters: (N,) int in [0, n_clusters). labels: (N,) int. factors: name to (N,) int levels. previous: (N,) int; None
    for the first mining.
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


def probe_subset(labels: np.ndarray, seed: int, images_per_class: int = 5) -> np.ndarray:
    """Return the images of a set that are probed: sorted indices, the same for the same seed.

    A quarter of the images, at least 100 and at most PROBE_IMAGES, about equally many of each class. Where that is
    fewer than images_per_class of each, images_per_class of random classes instead. Classes with a single image in the
    choice are left out: they have no neighbour to be read from. labels: (N,) int in [0, n_classes).
    """
    n_images, n_classes = min(PROBE_IMAGES, max(100, len(labels) // 4)), int(labels.max()) + 1
    n_per_class = max(images_per_class, n_images // n_classes)
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
    """Return the fraction of points whose label is the most frequent among their k nearest other points, of labels
    that tie the nearest. embeddings: (N, D) float, N of some 1,000. labels: (N,) int."""
    points = torch.as_tensor(embeddings).double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(min(k, len(labels) - 1), largest=False, sorted=True).indices.numpy()
    labels_nearby = labels[nearest]
    votes = (labels_nearby[:, :, None] == labels_nearby[:, None, :]).sum(2)
    return float((labels_nearby[np.arange(len(labels_nearby)), votes.argmax(1)] == labels).mean())


def probe_scores(embeddings: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return how well labels are read from the embeddings, by nearest_neighbour_accuracy, and by chance: by always
    guessing the most frequent label.

    The adversarial term is to push "Class from Shared" and "Mined from Class" down to chance; of known factors, Class
    is to lose them and Shared to hold them. embeddings: "Class" and, where it is trained, "Shared" to (N, D). labels:
    "Class", "Mined" where labels are mined, and the known factors to (N,) int.
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
    amp: str,
) -> dict[str, float]:
    """Return the probe_scores of training images, and of each test set whose factors are known.

    mined: labels of all training images (N,); None where none are mined, and the Shared head is neither trained nor
    probed. test_embeddings: {test set: {task: (N, D)}}.
    """
    tasks = ["Class"] if mined is None else ["Class", "Shared"]
    images, chosen = loaders.images, loaders.probe.dataset.indices
    labels = {"Class": images.labels} | ({} if mined is None else {"Mined": mined}) | images.factors
    embeddings = extract_features(network, loaders.probe, tasks, amp)
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
    network: netlib.EmbeddingNetwork, loaders: Mapping[str, DataLoader], tasks: Sequence[str], amp: str
) -> dict[str, dict[str, np.ndarray]]:
    """Return the embeddings of test sets, {test set: {task: (N, D)}}; see extract_features."""
    return {name: extract_features(network, loader, tasks, amp) for name, loader in loaders.items()}


def score_sets(
    task: str,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    tests: Mapping[str, ImageSet],
    k_vals: Sequence[int],
    seed: int,
    device: torch.device,
    with_clustering: bool,
) -> Row:
    """Return the scores of one task's embedding on each test set by itself, by column; see score_set."""
    row = {}
    for name, images in tests.items():
        points = embeddings[name][task]
        scores = score_set(points, images.labels, k_vals, seed, device, images.is_query, with_clustering)
        row |= {column(name, score): value for score, value in scores.items()}
    return row


def score_run(args: argparse.Namespace) -> None:
    """Score each test set with its best checkpoint beside what the run logged; store embeddings where asked for."""
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
            log.warning(f"not the images that the run was scored on: {change}; the logged scores are of those")
    for name, images in tests.items():
        best = run / f"checkpoint{file_suffix(name)}.pth.tar"
        checkpoint = best if best in checkpoints else checkpoints[0]
        embeddings = embed(checkpoint, read(checkpoint), images, args.embedding, args.kernels, device, amp)
        scores = score_set(embeddings, images.labels, flags["k_vals"], flags["seed"], device, images.is_query)
        of_set = "" if name == "test" else f", {name}"
        n_images = errors.counted(len(images), f"{dataset} image")
        print(f"{checkpoint}, {args.embedding} embedding of {n_images}{of_set}")
        rows = read(checkpoint)["progress"]["rows"]
        # The log has the scores of the Class embedding, unless the checkpoint has been trained on since
        is_logged = rows["val"] and rows["val"][-1]["Epochs"] == len(rows["train"]) - 1
        is_logged = is_logged and args.embedding == "Class" and dataset == flags["dataset"]
        print_scores(scores, rows["val"][-1] if is_logged else {}, name)
        if name in npz_files:
            is_query = np.ones(len(images), dtype=bool) if images.is_query is None else images.is_query
            of_images = {"labels": images.labels, "paths": images.names, "class_names": images.class_names}
            store(npz_files[name], embeddings, is_query=is_query, **of_images)


def print_scores(scores: Mapping[str, float | None], row: Row, test_set: str) -> None:
    """Print scores with all their digits, beside those of a row of the run's log, if there is one."""
    logged, width = scores_of(row, test_set), max(map(len, scores))
    lines = [("score", "now", f"logged in epoch {row['Epochs']}" if row else None)]
    lines += [(name, repr(value), logged.get(name)) for name, value in scores.items()]
    for name, now, then in lines:
        print(f"{name:<{width}}  {now:<20}  {'' if then is None else then}".rstrip())


def prepare(flags: Mapping[str, object], gpu: int) -> tuple[torch.device, str]:
    """Return the device, and the amp to embed with: that of a run of these flags where the device has it."""
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
    """Return the embeddings (N, D) float32 of images by the network of a checkpoint, as its run embeds test images.

    stored: what the checkpoint holds. embedding: Class or Shared. n_workers: of the loader; None: as in the run.
    device, amp: see prepare. Raises InputError and DivergedError.
    """
    flags = stored["flags"]
    if embedding == "Shared" and not flags["task_p"][1] and not any(flags["adv_weights"]):
        log.warning(f"{checkpoint}: the Shared embedding was not trained, it is random")
    loader = datasets.make_loader(
        datasets.ImageDataset(images, datasets.test_transform(flags["img_size"])),
        batch_size=min(flags["bs"], datasets.SCORING_BATCH_SIZE),
        n_workers=auxiliaries.n_workers(flags["kernels"] if n_workers is None else n_workers),
        pin_memory=device.type == "cuda",
    )
    auxiliaries.set_seeds(flags["seed"])
    network = netlib.rebuild(stored, checkpoint).to(device)
    return extract_features(network, loader, [embedding], amp)[embedding]


def embed_folder(args: argparse.Namespace) -> None:
    """Store the embeddings of every image below a folder, in any layout, and their paths.

    Exits with code 1 after the rest is stored where something cannot be read. Raises InputError.
    """
    root = Path(args.embed)
    found = survey(root)
    lost = {"dead link": found.dead, "Git LFS pointer": found.pointers, "unreadable folder": found.unread}
    for noun, names in {"other file": found.others, **lost}.items():
        if names:
            paths = [os.path.join(root, name) for name in names]
            print(f"skipped {errors.counted(len(names), noun)}: {errors.first_few(paths)}")
    paths = [os.path.join(root, name) for name in sorted([*found.images, *found.copies])]
    if not paths:
        raise InputError(f"--embed {root}: no folder with images ({', '.join(IMAGES)}) in it or below")
    checkpoint = weights.checkpoints_of(Path(args.run[0]), args.checkpoint)[0]
    stored = weights.read_checkpoint(checkpoint)  # what is wrong with it, or with the GPU, shows before decoding
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
        print(f"evaluate.py: {done}; left out: {missing}, named above", file=sys.stderr)
        sys.exit(1)


def draw_page(folder: Path) -> None:
    """Draw page and plots of a stored run anew. Raises InputError."""
    from report import page  # so that scoring loads no plotting

    history = History.read(folder)
    if not history.written:
        complete_history(history)
    page.draw_plots(history)
    page.write_page(history)
    page.draw_index(folder.absolute())
    print(f"page: {folder / 'page.html'}")


def store(path: Path, embeddings: np.ndarray, **of_images: Sequence) -> None:
    """Store embeddings (N, D) float32, and labels, paths and the like of the images, as .npz."""
    with files.replaced_file(path) as file:
        np.savez(file, embeddings=embeddings, **of_images)
    print(f"stored {path}: {errors.counted(len(embeddings), 'embedding')}")


def get_args_parser() -> errors.OneLineParser:
    """Return the parser of the command."""
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
        "paths and class names in this file")
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
    add("--compare", action="store_true", default=None, help="print a table of stored runs, named by the flags that "
        "differ: scores at the best and at the last epoch, mean and standard deviation over seeds, the paper's numbers")
    add("--over", metavar="FLAG", help="also print Recall @ 1 as a function of this flag, next to the paper's curve "
        "if there is one; --plot draws it; if the flag is a pair, the Shared task's value is used")
    add("--against", type=PATH, metavar="RUN", help="also print the differences of every setting to the setting of "
        "this run, which must be among those compared: means over runs of the same seed, with 95 %% confidence "
        "intervals; --plot draws them")
    add("--csv", type=PATH, metavar="FILE", help="also write the table to FILE, with a column for each flag that "
        "differs")
    add("--plot", type=PATH, metavar="FILE", help="draw Recall @ 1 over the epochs, or what --over or --against prints "
        "(.svg, .png or .pdf)")
    # fmt: on
    return parser


def check_args(args: argparse.Namespace, parser: errors.OneLineParser) -> None:
    """Exit with `parser.error` on flags that do not fit together and files that cannot be written."""
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
    if args.dataset is not None:
        try:
            check_name(args.dataset, args.source_path or "./Datasets")
        except InputError as error:
            parser.error(str(error))
    if args.csv and args.plot and os.path.realpath(args.csv) == os.path.realpath(args.plot):
        parser.error(f"--csv {args.csv} --plot {args.plot}: are the same file")


@output.logged()
@errors.signals_stop()
@errors.one_line_errors("evaluate.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Score a run or compare runs, as a command line asks."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(args, parser)
    args.gpu, args.embedding = args.gpu or 0, args.embedding or "Class"
    if args.compare:
        from report import compare  # so that scoring loads no plotting

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
