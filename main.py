"""Train MIC: deep metric learning with mined interclass characteristics (Roth, Brattoli, Ommer, ICCV 2019).

This file holds the flags, the mining of shared labels, the training epoch, and `train`, which runs it all.
"""

import argparse
import contextlib
import functools
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import auxiliaries
import datasets
import evaluate
import losses
import netlib
from data.cache import cached
from data.images import VALIDATION, ImageSet, digest, fingerprints, hold_out_classes
from data.published import K_VALS, PUBLISHED
from report import page, sheets
from run import options
from run.checkpoint import StoredRun
from run.folder import Run
from run.history import History, Row, row_text, strongest_factor
from run.options import FRACTION, NOT_NEGATIVE, PATH, POSITIVE, PROBABILITY, SEED, TASKS, name_of, whole
from run.provenance import as_text, provenance, warning_of_threads
from support import errors, output, packages, processes
from support.errors import DivergedError, InputError, OneLineParser, counted
from support.files import write_file
from support.output import Progress, clock, log

DIRECTIONS = ("Class-Shared", "Shared-Class")
CLUSTER_MODES = ("no_norm", "mean", "mstd")
LOSS_READ_INTERVAL = 20
"""Read the losses every 20 steps; each read waits for the device."""

SMALLEST_SCALE = 2.0**-14
"""If float16 gradients still overflow at a loss scale below this, training has diverged."""


def get_args_parser() -> OneLineParser:
    """Build the parser of all flags. `options.resolve` uses it to read a command line."""
    pair = {"nargs": 2, "metavar": ("CLASS", "SHARED")}
    published = [f"{name} {options.shown(info.k_vals)}" for name, info in PUBLISHED.items() if info.k_vals != K_VALS]
    parser = OneLineParser(
        prog="main.py",
        description="Train MIC: deep metric learning with mined interclass characteristics.",
        epilog="CLASS SHARED: two values, the first for the Class task, the second for the Shared (interclass) task.",
        formatter_class=options.FlagHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("data and network").add_argument
    add("--dataset", default="cub200", metavar="NAME", help="a published data set: "
        f"{', '.join(PUBLISHED)}; shapes: the built-in rendered set; any other NAME: your own images in "
        "SOURCE_PATH/NAME, as images/<class>/<image>, as train/<class>/<image> and test/<class>/<image>, or as a list "
        "images.csv, see docs/data.md")
    add("--arch", type=name_of(netlib.BACKBONES, "timm/"), default="resnet50", metavar="NAME", help="backbone: "
        f"{', '.join(netlib.BACKBONES)}, or timm/NAME for any model of the package timm, with or without the tag of "
        "its weights")
    add("--not_pretrained", action="store_true", help="start from random weights instead of ImageNet's; needs a "
        "larger --lr, about 1e-3")
    add("--weights", type=PATH, metavar="FILE", help="start from this file instead of downloading weights: a state "
        "dict of the backbone or a checkpoint of this program, also as .safetensors; heads of matching size are loaded "
        "as well")
    add("--bn", choices=["frozen", "train"], help="frozen: BatchNorm keeps its pretrained statistics; train: it "
        "normalises by each batch and updates them (default: frozen with pretrained weights, else train)")
    add("--img_size", type=whole(32, 4096), default=224, metavar="PIXELS", help="side of the square network input; "
        "smaller is faster; evaluation resizes images to 256/224 of it and crops the centre")
    add("--k_vals", type=whole(1), nargs="+", metavar="K", help="values of k for Recall@k; 1 is always added, because "
        f"it picks the best epoch (default: {', '.join(published)}, others {options.shown(K_VALS)})")
    add("--cache", choices=["none", "ram"], default="none", help="ram: keep decoded images in memory; use it "
        "when decoding is the bottleneck and the images fit; does not change results")

    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=whole(1), default=130, metavar="N", help="number of epochs; an epoch is (training images / "
        "bs) iterations")
    add("--kernels", type=whole(0), default=8, metavar="N", help="data loader workers of each process, capped at its "
        "share of the CPU cores; 0 loads in the process itself; does not change results")
    add("--seed", type=SEED, default=1, help="random seed; on the CPU, the same seed and number of threads repeat a "
        "run exactly")
    add("--amp", choices=["none", *netlib.AMP_TYPES], default="none", help="precision of the network; none: float32; "
        "bf16: autocast to bfloat16, which is faster and takes less memory on GPUs that support it; fp16: the same "
        "with float16 and a gradient scaler, for other GPUs")
    add("--tf32", action="store_true", help="allow TF32: float32 products and convolutions round their inputs to 10 "
        "bits of mantissa, which is faster; needs an NVIDIA GPU of 2020 or later")
    add("--compile", action="store_true", help="compile the network with torch.compile: takes minutes at the start, "
        "then makes steps faster")
    add("--eval_every", type=whole(1), default=1, metavar="N", help="score the test classes after every Nth epoch and "
        "after the last; raise it when scoring takes long")
    add("--fast_eval", action="store_true", help="compute NMI and F1, which need a slow k-means, only after every "
        "tenth epoch (or the next one that is scored) and the last; NMI and F1 of other epochs stay empty in the CSV")
    add("--eval_shared", action="store_true", help="also score the Shared embedding at each evaluation, into "
        "log_val_Shared.csv; doubles the time for scores, but images are embedded only once")
    add("--val_classes", type=FRACTION, default=0.0, metavar="FRACTION", help="hold out this fraction of the training "
        "classes (the last ones) and score them too, in columns Val ...; use it to choose flags without the test "
        "classes")
    add("--select", choices=["test", "val"], default="test", help="classes whose Recall @ 1 picks the best epoch; "
        "test: the test classes, as in the paper; val: those that --val_classes holds out")

    add = parser.add_argument_group("optimiser and schedule").add_argument
    add("--scheduler", choices=["step", "exp", "none"], default="step", help="when to multiply the learning rates "
        "by --gamma; step: at the epochs in --tau; exp: after every epoch; none: never")
    add("--gamma", type=POSITIVE, default=0.3, help="factor of the scheduler; closer to 1 lowers the "
        "learning rates more slowly")
    add("--tau", type=whole(1), nargs="+", default=[80], metavar="EPOCH", help="epochs, counted from 0, at "
        "which the step scheduler lowers the learning rates; scale them with --n_epochs")
    add("--decay", type=NOT_NEGATIVE, default=4e-4, help="weight decay of the network; higher regularises more")
    add("--lr", type=POSITIVE, default=1e-5, help="Adam learning rate of the network and the projection networks; "
        "random weights need about 1e-3")

    add = parser.add_argument_group("tasks and batches").add_argument
    add("--task_p", type=PROBABILITY, default=[1.0, 0.8], **pair, help="probability that a task takes a step in an "
        "iteration; 1 0 trains the Class task only and mines nothing, but keeps the adversarial term; for the plain "
        "baseline give --adv_weights 0 as well")
    add("--shared_gradient", choices=["backbone", "head"], default="backbone", help="what the Shared task trains; "
        "backbone: its head and the backbone, as published; head: its head only")
    add("--bs", type=whole(2), default=112, metavar="B", help="batch size, a multiple of each value of --cs_per_bs; "
        "lower it if memory runs out")
    add("--cs_per_bs", type=whole(1), default=[4, 4], **pair, help="images of each class (or mined cluster) in a "
        "batch; marginloss and triplet need at least 2; with 1 (always for proxynca) all images are shuffled instead")
    add("--flip", choices=["class", "both", "none"], default="class", help="tasks whose training images are flipped "
        "left to right at random; class: the Class task, as published; none: for letters, traffic signs and other "
        "images whose mirror image means something else")
    add("--embed_sizes", type=whole(2, 65536), default=[128, 128], **pair, help="dimensions of the embeddings")

    add = parser.add_argument_group("losses").add_argument
    add("--losses", type=name_of(losses.LOSSES, "pml/"), default=["marginloss", "marginloss"], **pair,
        help=f"loss: {', '.join(losses.LOSSES)}, or pml/NAME for a loss of the package "
        "pytorch-metric-learning, with that package's defaults")
    add("--sampling", choices=list(losses.SAMPLERS), default=["distance", "distance"], **pair,
        help=f"how triplets are picked: {', '.join(losses.SAMPLERS)}; not used by proxynca and pml/NAME")
    add("--proxy_lr", type=POSITIVE, default=[1e-5, 1e-5], **pair, help="learning rate of the proxies of proxynca, and "
        "of the parameters of pml/NAME")
    add("--beta", type=POSITIVE, default=[1.2, 1.2], **pair, help="margin loss: initial boundary between the "
        "distances of positive and negative pairs")
    add("--beta_lr", type=NOT_NEGATIVE, default=[5e-4, 5e-4], **pair, help="margin loss: learning rate of beta; 0 "
        "keeps beta fixed")
    add("--nu", type=NOT_NEGATIVE, default=[0.0, 0.0], **pair, help="margin loss: weight of the regularisation of "
        "beta")
    add("--margin", type=NOT_NEGATIVE, default=[0.2, 0.2], **pair, help="margin of the margin loss (in distances), of "
        "the triplet loss (in squared distances) and of semihard sampling")

    add = parser.add_argument_group("adversarial term").add_argument
    add("--adversarial", choices=DIRECTIONS, nargs="+", default=["Class-Shared"], metavar="TARGET-SOURCE",
        help="directions of the adversarial term: Class-Shared, Shared-Class, or both; each needs a weight in "
        "--adv_weights")
    add("--adv_weights", type=NOT_NEGATIVE, nargs="+", default=[2500.0], metavar="WEIGHT", help="weight of each "
        "direction; a higher one decorrelates the embeddings more, 0 switches the direction off")
    add("--adv_dim", type=whole(1, 65536), default=512, metavar="N", help="hidden width of the projection network")

    add = parser.add_argument_group("mining of shared labels").add_argument
    add("--shared_num_classes", type=whole(2), default=30, metavar="N", help="number of mined clusters; "
        "choose fewer for a small data set")
    add("--cluster_update_freq", type=whole(0), default=3, metavar="F", help="re-mine every F+1 epochs, as the "
        "published code counts; 0: every epoch")
    add("--cluster_mode", choices=CLUSTER_MODES, default="mean", help="how features are standardised within each class "
        "before the first clustering; no_norm: not at all; mean: subtract the mean, as in the published code; mstd: "
        "also divide by the standard deviation, as in the paper's figure")
    add("--random_cluster_pick_p", type=PROBABILITY, default=0.2, metavar="P", help="probability that an image of a "
        "Shared batch is replaced by one of a random cluster, under the same label; higher relies less on the mined "
        "labels")

    group = parser.add_argument_group("machine and files")
    add = group.add_argument
    add("--gpu", type=whole(0), default=0, metavar="ID", help="number of the GPU to use; "
        "without a GPU, the run uses the CPU")
    add("--savename", default="", metavar="NAME", help="name of the run folder; if empty, it is made of dataset, arch "
        "and start time; an existing name gets a counter, nothing is overwritten")
    start = group.add_mutually_exclusive_group().add_argument
    start("--resume", type=PATH, metavar="RUN", help="resume the run in this folder as if it had not been interrupted; "
        f"it keeps its flags, only {options.GIVEN_ANEW} may change")
    start("--go_on", action="store_true", help="resume the run named --savename if it exists, otherwise start it; a "
        "run with other flags is refused, a run without a complete epoch starts anew")
    add("--tensorboard", action="store_true", help="also write all logs and contact sheets for TensorBoard, to the "
        "folder tensorboard of the run; needs the package tensorboard")
    add("--make_graph", action="store_true", help="also draw the network, to network.svg; needs the packages torchview "
        "and graphviz, and the program dot")
    add("--source_path", type=PATH, default="./Datasets", metavar="FOLDER", help="folder that holds the data sets")
    add("--save_path", type=PATH, default="./Training_Results", metavar="FOLDER", help="folder of the "
        "runs: each has FOLDER/DATASET/NAME")
    # fmt: on
    return parser


def load_data(args: argparse.Namespace, run: Run, pin_memory: bool) -> datasets.Loaders:
    """Load the data set and build the loaders of the training images and the test sets.

    With --cache ram all images are decoded here.

    Args:
        run: the run, which records the fingerprints of the images.
        pin_memory: whether loaders return batches in page-locked memory.

    Raises:
        InputError: the data are unusable, too few for the flags, differ between processes, or are not those that the
            resumed run was trained with.
    """
    train, tests = datasets.load_dataset(args.dataset, args.source_path)
    warnings = datasets.count_warnings(args.dataset, train, tests)
    image_sets = fingerprints({"train": train, **tests})
    if len(set(processes.all_gather(digest(image_sets)))) > 1:
        raise InputError(f"--source_path: the images of {args.dataset} differ between the processes")
    run.require_images(image_sets)
    if train.left_out:
        run.note(left_out="; ".join(train.left_out))
    if args.val_classes:
        train, tests[VALIDATION] = hold_out_classes(train, args.val_classes)
    too_large = f"is larger than the {len(train)} training images of {args.dataset}"
    if args.bs > len(train):
        fitting = min(24, len(train) // 4 * 4)
        raise InputError(f"--bs {args.bs} {too_large}; try --bs {fitting} --shared_num_classes {fitting // 4}")
    n_clustered = int((~left_out_of_mining(train.labels, args.cluster_mode)).sum())
    if args.task_p[1] > 0 and args.shared_num_classes > n_clustered:
        needed = " that are not alone in their class; the first clustering excludes the others"
        n_images = f"{n_clustered} training images of {args.dataset}{needed if n_clustered < len(train) else ''}"
        raise InputError(f"--shared_num_classes {args.shared_num_classes} is larger than the {n_images}")
    if args.cache == "ram":  # last, as decoding takes minutes
        tests = cached({"train": train, **tests}, processes.local_world_size())
        train = tests.pop("train")
    log.info("\n".join(datasets.summary_lines(train, tests)))
    for warning in [*warnings, *options.warnings_for(args, len(train.class_names))]:
        log.warning(warning)
    n_workers = auxiliaries.n_workers(args.kernels)
    a_process = " in each process" if processes.world_size() > 1 else ""
    log.info(f"loader workers: {n_workers}{a_process} (--kernels {args.kernels}; {auxiliaries.n_cores()} CPU cores)")
    return datasets.build_loaders(
        train,
        tests,
        options.per_task(args),
        probed=evaluate.probe_subset(train.labels, args.seed) if args.task_p[1] > 0 or train.factors else [],
        batch_size=args.bs,
        random_pick_p=args.random_cluster_pick_p,
        flip=args.flip,
        img_size=args.img_size,
        seed=args.seed,
        n_workers=n_workers,
        pin_memory=pin_memory,
    )


def build_network(args: argparse.Namespace, run: Run, device: torch.device) -> netlib.EmbeddingNetwork:
    """Build the network with the weights that a new run starts from; those of a resumed run are restored later."""
    with processes.rank_zero_first():  # so that only one process per machine downloads the weights
        network = netlib.build_network(
            args.arch,
            {name: task.embed_sizes for name, task in options.per_task(args).items()},
            pretrained=not args.not_pretrained and run.is_new,
            weights_file=args.weights if run.is_new else None,
            freeze_batchnorm=args.bn == "frozen",
            img_size=args.img_size,
            detached_heads=["Shared"] if args.shared_gradient == "head" else [],
        ).to(device)
    network.amp = args.amp
    run.note(started_from=network.started_from)
    if args.make_graph and run.is_new and run.writes:
        write_file(run.folder / "network.svg", packages.network_graph(network, args.img_size))
    return network


def build_objective(args: argparse.Namespace, images: ImageSet, device: torch.device) -> losses.Objective:
    """Build the losses of both tasks and the adversarial terms."""
    n_classes = {"Class": len(images.class_names), "Shared": args.shared_num_classes}
    directions = dict(zip(args.adversarial, args.adv_weights, strict=True))
    return losses.build_objective(options.per_task(args), n_classes, directions, args.adv_dim, args.lr).to(device)


def build_optimizer(
    args: argparse.Namespace, network: nn.Module, objective: losses.Objective
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build one Adam optimiser for the network and the objective's parameters, and its learning rate scheduler."""
    groups = [{"params": list(network.parameters()), "lr": args.lr, "weight_decay": args.decay}]
    optimizer = torch.optim.Adam(groups + objective.param_groups(), fused=True)
    if args.scheduler == "exp":
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, args.gamma)
    steps = args.tau if args.scheduler == "step" else []
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, args.gamma)


def standardise_per_class(features: np.ndarray, labels: np.ndarray, mode: str) -> np.ndarray:
    """Remove class information from features before the first clustering.

    The only image of a class would become exactly zero, so it is standardised by the statistics of all images instead.

    Args:
        features: (N, D) float32.
        labels: (N,) int in [0, n_classes).
        mode: "no_norm": change nothing; "mean": subtract the class mean; "mstd": also divide by the class standard
            deviation of each dimension, where a dimension that does not vary becomes 0.

    Returns:
        (N, D) float32.

    Reference:
        MIC paper, section 3.2.
    """
    if mode == "no_norm":
        return features
    standardised = np.empty_like(features)
    mean_of_all = features.mean(0, dtype=np.float64)
    deviation_of_all = features.std(0, dtype=np.float64) if mode == "mstd" else None
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        is_alone = len(members) == 1
        centred = features[members] - (mean_of_all if is_alone else features[members].mean(0, dtype=np.float64))
        if mode == "mstd":
            deviation = deviation_of_all if is_alone else features[members].std(0, dtype=np.float64)
            centred = np.where(deviation > 1e-6, centred / np.maximum(deviation, 1e-6), 0)
        standardised[members] = centred
    return standardised


def mine_labels(
    args: argparse.Namespace, network: netlib.EmbeddingNetwork, loader: DataLoader, is_first_time: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mine labels by clustering all training images.

    The first mining clusters early features, standardised per class; later ones cluster the Shared embedding.

    Args:
        loader: the training images in order.
        is_first_time: whether no labels have been mined yet.

    Returns:
        Labels (N,) int64 in [0, --shared_num_classes), and squared distances (N,) to the cluster centres, which are NaN
        for images excluded from the clustering (see left_out_of_mining).

    Reference:
        MIC paper, section 3.2.
    """
    output = "Early" if is_first_time else "Shared"
    features = evaluate.extract_features(network, loader, [output], to_all=False, what="mining")[output]
    clustered = left_out = None
    if processes.is_first():  # only this process has the features; the others wait for the labels
        if is_first_time:
            labels = loader.dataset.images.labels
            features = standardise_per_class(features, labels, args.cluster_mode)
            left_out = left_out_of_mining(labels, args.cluster_mode)
        clustered = auxiliaries.kmeans(features, args.shared_num_classes, args.seed, left_out=left_out)
    return processes.broadcast(clustered)


def left_out_of_mining(labels: np.ndarray, mode: str) -> np.ndarray:
    """Return a mask (N,) bool of the images excluded from the first clustering: those that are alone in their class.

    Subtracting the class mean turns each of them into zero, so together they would form a cluster of their own.

    Args:
        labels: (N,) int in [0, n_classes).
        mode: see standardise_per_class; "no_norm" excludes none.
    """
    return (np.bincount(labels) == 1)[labels] & (mode != "no_norm")


def renew_labels(
    args: argparse.Namespace,
    run: Run,
    network: netlib.EmbeddingNetwork,
    loader: DataLoader,
    previous: np.ndarray | None,
    epoch: int,
) -> np.ndarray:
    """Mine new labels before an epoch, then log and draw them.

    Each mining numbers its clusters anew. Beta and proxy i are kept and then belong to the new cluster i, as in the
    published code.

    Args:
        loader: the training images in order.
        previous: the labels (N,) so far; None for the first mining.
        epoch: the epoch that begins with the new labels.

    Returns:
        The labels (N,) int64 of the training images.
    """
    start, images = time.monotonic(), loader.dataset.images
    with run.stopwatch.measure("mining"):
        mined, squared_distances = mine_labels(args, network, loader, is_first_time=previous is None)
        facts = evaluate.describe_clusters(mined, args.shared_num_classes, images.labels, images.factors, previous)
        inertia = float(np.nansum(squared_distances, dtype=np.float64))
    run.log_mining(epoch, start, {"Inertia": inertia} | facts, mined, images.names)
    matches = ", ".join(f"{name[4:]} {value:z.3f}" for name, value in facts.items() if name.startswith("AMI "))
    log.info(
        f"mined for epoch {epoch}: {counted(facts['Clusters'], 'cluster')} of {facts['Smallest']} to "
        f"{facts['Largest']} images; AMI of the labels with {matches}"
    )
    n_left_out = int(np.isnan(squared_distances).sum())
    if n_left_out:
        log.info(
            f"alone in their class: {counted(n_left_out, 'image')} took no part in this clustering, as subtracting the "
            "class mean would make them zero; each has the label of the nearest centre"
        )
    with run.stopwatch.measure("drawing"):
        if run.writes:
            run.add_pictures(sheets.draw_mining(run.history, images, mined, squared_distances), epoch)
    return mined


def train_one_epoch(
    trained: nn.Module,
    objective: losses.Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    steps: Sequence[tuple[int, str]],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Progress,
) -> dict[str, float | None]:
    """Train one epoch and return the average losses; None for a loss that took no step.

    An iteration has up to two steps, Class then Shared. Each step takes its own batch and minimises the loss of its
    task plus the adversarial terms, which need both heads.

    Args:
        trained: the network as netlib.for_training returns it.
        scaler: scales the loss for fp16 and skips steps whose gradients overflow.
        steps: (iteration, task) of each step.
        batches: images (B, 3, S, S) uint8 and labels (B,) of each step.
        progress: counts the images and shows the losses now and then.

    Raises:
        DivergedError: a loss is not finite (the message names the term, iteration and task), or the float16 gradients
            overflow at every step (it names the iteration).
    """
    trained.train()
    device = next(trained.parameters()).device
    meter = auxiliaries.LossMeter()
    network = getattr(trained, "module", trained)  # in several processes, DistributedDataParallel wraps it
    idle_parameters = [*network.heads.parameters(), *objective.parameters()]
    for i, ((iteration, task), (images, labels)) in enumerate(zip(steps, batches, strict=True)):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        embeddings = trained(images, objective.heads(task))
        # Every process computes the loss of the whole batch. Gradients flow back through the gathered embeddings
        embeddings, labels = processes.gather_batch(embeddings, labels)
        terms = objective(task, embeddings, labels)
        scaler.scale(sum(terms.values())).backward()
        processes.share_gradients(objective.parameters())
        auxiliaries.fill_gradients(idle_parameters, optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # free the gradients now, as the next forward pass needs the memory
        meter.add(f"at iteration {iteration} ({task} step)", terms)
        progress.update(len(labels))
        if i % LOSS_READ_INTERVAL == LOSS_READ_INTERVAL - 1 or i == len(steps) - 1:
            progress.show(meter.read())
            if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
                raise DivergedError(
                    f"up to iteration {iteration} the float16 gradients overflow at every step, whatever their scale: "
                    "try --amp bf16 or none, or a lower --lr"
                )
    return meter.averages(len(steps), TASKS)


def score_before_training(
    args: argparse.Namespace, run: Run, network: netlib.EmbeddingNetwork, loaders: datasets.Loaders
) -> None:
    """Score the network before training."""
    with run.stopwatch.measure("evaluation"):
        embeddings = evaluate.embed_sets(network, loaders.tests, ["Class"])
        scoring = {"k_vals": args.k_vals, "seed": args.seed, "device": network.mean.device}
        scoring["with_clustering"] = not args.fast_eval
        run.history.initial_scores = evaluate.score_sets("Class", embeddings, loaders.test_images, **scoring)
    log.info(f"before training  {row_text(run.history.initial_scores)}")


def evaluate_epoch(
    args: argparse.Namespace,
    run: Run,
    network: netlib.EmbeddingNetwork,
    loaders: datasets.Loaders,
    mined: np.ndarray | None,
    epoch: int,
) -> None:
    """Score and probe the test sets, log the scores, save the best network and draw its nearest neighbours."""
    tenth_passed = (epoch + 1) // 10 > (epoch + 1 - args.eval_every) // 10  # a tenth epoch since the last scoring
    scoring = {"k_vals": args.k_vals, "seed": args.seed, "device": network.mean.device}
    scoring["with_clustering"] = not args.fast_eval or tenth_passed or epoch == args.n_epochs - 1
    tests = loaders.test_images
    with run.stopwatch.measure("evaluation"):
        start = time.monotonic()
        embeddings = evaluate.embed_sets(network, loaders.tests, TASKS)
        scores = evaluate.score_sets("Class", embeddings, tests, **scoring)
        run.log("val", epoch, start, scores)
        if args.eval_shared:
            start = time.monotonic()
            scores = evaluate.score_sets("Shared", embeddings, tests, **scoring)
            run.log("shared", epoch, start, scores)
        if len(loaders.probe.dataset):
            start = time.monotonic()
            accuracies = evaluate.probe_sets(network, loaders, mined, embeddings, args.seed)
            run.log("probe", epoch, start, accuracies)
    run.keep_best(network)
    with run.stopwatch.measure("drawing"):
        if run.writes:
            run.add_pictures(sheets.draw_neighbours(run.history, tests, embeddings), epoch)


def prepare_device(args: argparse.Namespace, is_resumed: bool) -> torch.device:
    """Seed all generators and return the run's device, set to the precision that the flags ask for.

    Raises:
        InputError: the device cannot be used, or lacks the precision.
    """
    auxiliaries.set_seeds(args.seed)
    device = auxiliaries.pick_device(args.gpu)
    capability = auxiliaries.compute_capability(device)
    auxiliaries.require_precision(capability, args.tf32, args.amp, is_resumed)
    hint = None if is_resumed else auxiliaries.precision_hint(capability, args.tf32, args.amp)
    if hint:
        log.info(hint)
    auxiliaries.set_precision(device, args.tf32, args.amp)
    if args.compile:
        netlib.try_compile(device)
    if warning := processes.warning_of_other_tasks():
        log.warning(warning)
    return device


def train(args: argparse.Namespace, argv: Sequence[str], stored: StoredRun | None) -> Path:
    """Start a new run or resume a stored one, train it to its end and return its folder.

    Args:
        argv: the command line, recorded with the run.
        stored: the run to resume; None for a new one.
    """
    device = prepare_device(args, is_resumed=stored is not None)
    started = provenance(argv, device, [args.arch, *args.losses])
    log.info(f"{as_text(started)}\ncommand: {started['command']}")
    run = Run(
        options.run_folder(args) if stored is None else stored.folder,
        options.stored_flags(args),
        defaults=options.defaults_of_changed(args, get_args_parser()),
        provenance=started,
        stored=stored,
        may_restart=args.go_on,
    )
    try:
        with run:
            if run.history.is_finished:
                n_done = counted(run.history.epoch, "epoch")
                log.info(f"{run.folder} is finished after {n_done}; to train longer, give a larger --n_epochs")
                return run.folder
            loaders = load_data(args, run, pin_memory=device.type == "cuda")
            run.stack.callback(loaders.pool.close)
            images = loaders.images
            network = build_network(args, run, device)
            objective = build_objective(args, images, device)
            optimizer, scheduler = build_optimizer(args, network, objective)
            scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
            trained = netlib.for_training(network, args.compile, has_unused_heads=not objective.adversaries)
            parts = {"objective": objective, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
            mined = None
            if run.is_new:
                score_before_training(args, run, network, loaders)
                if args.task_p[1] == 0:
                    datasets.decode_all(loaders.train_in_order)  # find broken images before training, as mining would
            else:
                mined = run.restore(network, parts, images.names)
                if warning := warning_of_threads(run.history.provenance):
                    log.warning(warning)
            log.info(f"run folder: {run.folder}")
            page.draw(run.history)
            run.start_timing()
            for epoch in range(run.history.epoch, args.n_epochs):
                if run.history.mining_is_due(epoch):
                    mined = renew_labels(args, run, network, loaders.train_in_order, mined, epoch)
                start = time.monotonic()
                steps = datasets.draw_steps(dict(zip(TASKS, args.task_p)), len(images) // args.bs, args.seed, epoch)
                loaders.sampler.set_epoch(epoch, {"Class": images.labels, "Shared": mined}, steps)
                batches = run.stopwatch.loading(loaders.batches, auxiliaries.event_maker(device))
                left = functools.partial(run.seconds_left, epoch)
                progress = Progress(f"epoch {epoch}", args.bs * len(steps), left)
                with run.stopwatch.measure("training"), progress:
                    averages = train_one_epoch(trained, objective, optimizer, scaler, steps, batches, progress)
                run.log("train", epoch, start, averages | {"Learning Rate": scheduler.get_last_lr()[0]})
                if (epoch + 1) % args.eval_every == 0 or epoch == args.n_epochs - 1:
                    evaluate_epoch(args, run, network, loaders, mined, epoch)
                scheduler.step()
                run.save(network, parts, epoch + 1)
                log.info(epoch_line(run, epoch, time.monotonic() - start))
                with run.stopwatch.measure("drawing"):
                    page.draw(run.history)
    finally:
        if run.is_new or run.is_resumable:  # do not touch a run that could not be restored
            page.draw(run.history)  # shows how the run ended, if its folder still exists
    log.info(run.history.summary())
    if args.dataset == "shapes" and mined is not None:
        log.info(demo_summary(run.history))
    return run.folder


def epoch_line(run: Run, epoch: int, seconds: float) -> str:
    """Return the log line of an epoch: losses, scores if there are any, seconds taken, and time left of the run."""
    rows, parts = run.history.rows, []
    if rows["val"] and rows["val"][-1]["Epochs"] == epoch:
        parts = [row_text(rows["val"][-1]), f"(best Recall @ 1: {run.history.best_line()})"]
    parts = [f"epoch {epoch}", row_text(rows["train"][-1]), *parts, f"{seconds:.1f} s"]
    return "  ".join(parts) + f", {clock(run.history.seconds_left)} left"


def what_was_mined(row: Row) -> str:
    """Return, as text, the known factor that a mining agrees with most; empty for a row of an older version."""
    factor = strongest_factor(row)
    if not factor:
        return ""
    with_factor, with_class = row[f"AMI {factor}"], row["AMI class"]
    is_clear = with_factor > max(with_class, 0.5)
    clear = f"the {factor}" if is_clear else f"nothing clear, closest is the {factor}"
    return f"; mined: {clear} (AMI of the labels with it {with_factor:z.2f}, with the class {with_class:z.2f})"


def demo_summary(history: History) -> str:
    """Return the three lines that end the demo: what was learned, what to look at, what to try next."""
    before, after = (row["Recall @ 1"] for row in (history.initial_scores, history.rows["val"][-1]))
    learned = f"learned: Recall@1 on classes never seen is {after:.2f}, before training {before:.2f}"
    return (
        f"{learned}{what_was_mined(history.rows['mining'][-1])}\n"
        f"look at: {history.folder / 'page.html'} in a browser; each row of mined clusters shows images of different "
        "classes: what they have in common was mined\n"
        "try next: the same without mining (add your own flags again): bash Result_Runs.sh demo --task_p 1 0 "
        "--adv_weights 0; then "
        f"python evaluate.py --compare {shlex.quote(str(history.folder.parent))}"
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Train with the flags of a command line and return the run folder."""
    argv = sys.argv[1:] if argv is None else argv
    locks = contextlib.ExitStack()
    with output.logged(), errors.stop_on_signals(), errors.one_line_errors("main.py"), locks:
        args, stored = options.resolve(argv, get_args_parser(), locks)
        with processes.connected():
            return train(args, argv, stored)


if __name__ == "__main__":
    errors.set_up_output()
    main()
