"""Train MIC: deep metric learning with mined interclass characteristics (Roth, Brattoli, Ommer, ICCV 2019)."""

import argparse
import contextlib
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import auxiliaries
import datasets
import evaluate
import losses
import netlib

TASKS = ("Class", "Shared")
DIRECTIONS = ("Class-Shared", "Shared-Class")
K_VALS = {"online_products": [1, 10, 100, 1000], "in-shop": [1, 10, 20, 30, 50], "vehicle_id": [1, 5]}
CLUSTER_MODES = ("no_norm", "mean", "mstd")
LOSS_READ_INTERVAL = 10
SMALLEST_SCALE = 2.0**-14
"""Scale of a float16 loss below which it is not the scale that makes gradients overflow."""
LAST_CHECKPOINT = "last.pth.tar"
LOGS = {
    "log_train_Class.csv": "train_rows",
    "log_val_Class.csv": "val_rows",
    "log_mining.csv": "mining_rows",
    "log_val_Shared.csv": "shared_rows",
    "log_probe.csv": "probe_rows",
}
"""The CSV files of a run folder, and what the checkpoint calls their rows."""


class NonFiniteLossError(auxiliaries.DivergedError):
    """A loss is NaN or infinite; the message is one line for the user."""


class FlagHelpFormatter(argparse.HelpFormatter):
    """Help at up to 100 columns that shows list defaults and pairs as they are typed."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(100, shutil.get_terminal_size((100, 24)).columns))

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {shown if shown != '' else 'empty'})"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if isinstance(action.metavar, tuple):
            return " ".join(action.metavar)
        return super()._format_args(action, default_metavar)


def number(kind: type, holds: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Return an argparse type: a finite number of `kind` for which `holds`; `wanted` says so in words."""

    def convert(text: str) -> float:
        """Return the number; see argparse."""
        try:
            value = kind(text)
            is_wanted = math.isfinite(value) and holds(value)
        except (ValueError, OverflowError):
            is_wanted = False
        if not is_wanted:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags; `check_args` resolves what it parsed."""
    count = number(int, lambda value: value >= 1, "a whole number of at least 1")
    count_or_zero = number(int, lambda value: value >= 0, "a whole number of at least 0")
    two_or_more = number(int, lambda value: value >= 2, "a whole number of at least 2")
    pixels = number(int, lambda value: value >= 32, "a whole number of at least 32")
    positive = number(float, lambda value: value > 0, "a number above 0")
    not_negative = number(float, lambda value: value >= 0, "a number of at least 0")
    seed = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
    probability = number(float, lambda value: 0 <= value <= 1, "a probability from 0 to 1")
    fraction = number(float, lambda value: 0 <= value < 1, "a fraction from 0 up to, but not including, 1")
    pair = {"nargs": "+", "metavar": ("CLASS", "SHARED")}

    parser = auxiliaries.OneLineParser(
        prog="main.py",
        description="Train MIC: deep metric learning with mined interclass characteristics.",
        epilog="CLASS SHARED are two values: one for the Class task, one for the Shared (interclass) task.",
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data and network").add_argument
    add("--dataset", default="cub200", metavar="NAME", help="cub200, cars196, online_products, in-shop, vehicle_id; "
        "shapes: the built-in rendered set; any other NAME: your folder SOURCE_PATH/NAME/images/<class>/<image>, the "
        "first half of the classes trains, the second half tests")  # fmt: skip
    add("--arch", default="resnet50", choices=list(netlib.BACKBONES), help="the backbone")
    add("--not_pretrained", action="store_true", help="start from random weights instead of ImageNet's")
    add("--weights", metavar="FILE", help="start from this torchvision state dict, checkpoint of this program or "
        ".safetensors instead of downloading weights; heads that it has in the right size are taken too")  # fmt: skip
    add("--bn", choices=["frozen", "train"], help="frozen: BatchNorm keeps its statistics, train: they follow the "
        "batches (default: frozen with pretrained weights, train with random ones)")  # fmt: skip
    add("--img_size", type=pixels, default=224, metavar="PIXELS", help="side of the square network input; smaller is "
        "faster; for evaluation images are resized to 256/224 of it, then cropped")  # fmt: skip
    add("--k_vals", type=count, nargs="+", metavar="K", help="the k of Recall@k; 1, which picks the best "
        "epoch, is always among them (default: online_products 1 10 100 1000, in-shop 1 10 20 30 50, vehicle_id 1 5, "
        "others 1 2 4 8)")  # fmt: skip

    add("--cache", choices=datasets.CACHES, default="none", help="keep decoded images: in memory, or in a file in "
        "SAVE_PATH/DATASET that later runs reuse; does not change results")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=count, default=130, metavar="N", help="epochs; each has (training images / bs) iterations")
    add("--kernels", type=count_or_zero, default=8, metavar="N", help="data loader workers, at most one per CPU core; "
        "0 loads in the main process; does not change results")  # fmt: skip
    add("--seed", type=seed, default=1, help="random seed; on the CPU the same seed repeats a run exactly")
    add("--amp", choices=["none", *netlib.AMP_TYPES], default="none", help="precision of the network: float32, or "
        "autocast to bfloat16, or to float16 with a gradient scaler (for GPUs without bfloat16): faster, less "
        "memory")  # fmt: skip
    add("--tf32", action="store_true", help="let float32 products and convolutions round their inputs to 10 bits of "
        "mantissa: faster; needs an NVIDIA GPU of 2020 or later")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network for training: minutes at the start, faster "
        "steps; where it does not work the run says so and goes on without")  # fmt: skip
    add("--eval_every", type=count, default=1, metavar="N", help="score the test classes after every N-th epoch, and "
        "after the last")  # fmt: skip
    add("--fast_eval", action="store_true", help="leave NMI and F1, which need a k-means with as many clusters as "
        "classes, out of all but every tenth epoch and the last: empty cells in the CSV")  # fmt: skip
    add("--eval_shared", action="store_true", help="also score the Shared embedding at each evaluation, to "
        "log_val_Shared.csv: takes as long again as scoring, but no second pass over the images")  # fmt: skip

    add("--val_classes", type=fraction, default=0.0, metavar="FRACTION", help="hold out this fraction of the training "
        "classes, the last ones, and score on them too, as Val: to choose flags by, where the test classes should not "
        "be")  # fmt: skip
    add("--select", choices=["test", "val"], default="test", help="the classes whose Recall @ 1 picks the best epoch: "
        "test as in the paper, val those that --val_classes holds out")  # fmt: skip

    add = parser.add_argument_group("optimiser and schedule").add_argument
    add("--scheduler", choices=["step", "exp", "none"], default="step", help="step: multiply the learning rates by "
        "gamma at each epoch of tau, exp: after every epoch, none: never")  # fmt: skip
    add("--gamma", type=positive, default=0.3, help="factor of the scheduler")
    add("--tau", type=count, nargs="+", default=[80], metavar="EPOCH", help="epochs of the step scheduler")
    add("--decay", type=not_negative, default=4e-4, help="weight decay of the network; higher regularises more")
    add("--lr", type=positive, default=1e-5, help="Adam learning rate of the network and the projection networks; "
        "random weights want about 1e-3")  # fmt: skip

    add = parser.add_argument_group("tasks and batches").add_argument
    add("--task_p", type=probability, default=[1.0, 0.8], **pair, help="probability that a task takes its step in an "
        "iteration; 1 0 trains on classes only and mines nothing")  # fmt: skip
    add("--bs", type=count, default=112, metavar="B", help="batch size, a multiple of each cs_per_bs")
    add("--cs_per_bs", type=count, default=[4, 4], **pair, help="images drawn per class (or mined cluster) in a batch; "
        "forced to 1 for proxynca")  # fmt: skip
    add("--embed_sizes", type=two_or_more, default=[128, 128], **pair, help="embedding dimensions")

    add = parser.add_argument_group("losses").add_argument
    add("--losses", choices=list(losses.LOSSES), default=["marginloss", "marginloss"], **pair,
        help=f"the task's loss: {', '.join(losses.LOSSES)}")  # fmt: skip
    add("--sampling", choices=list(losses.SAMPLERS), default=["distance", "distance"], **pair,
        help=f"how triplets are picked: {', '.join(losses.SAMPLERS)}; proxynca needs none")  # fmt: skip
    add("--proxy_lr", type=positive, default=[1e-5, 1e-5], **pair, help="learning rate of proxynca's proxies")
    add("--beta", type=positive, default=[1.2, 1.2], **pair, help="margin loss: initial class boundary between "
        "positive and negative distances")  # fmt: skip
    add("--beta_lr", type=not_negative, default=[5e-4, 5e-4], **pair, help="learning rate of beta; 0 keeps it fixed")
    add("--nu", type=not_negative, default=[0.0, 0.0], **pair, help="weight of beta's regularisation; higher pulls "
        "classes tighter")  # fmt: skip
    add("--margin", type=not_negative, default=[0.2, 0.2], **pair, help="margin of margin loss (distance), triplet "
        "loss (squared distance) and semihard sampling")  # fmt: skip

    add = parser.add_argument_group("adversarial term").add_argument
    add("--adversarial", choices=DIRECTIONS, nargs="+", default=["Class-Shared"], metavar="TARGET-SOURCE",
        help="directions to decorrelate: Class-Shared, Shared-Class, or both")  # fmt: skip
    add("--adv_weights", type=not_negative, nargs="+", default=[2500.0], metavar="WEIGHT", help="one weight per "
        "direction; higher drives the embeddings further apart, 0 leaves the direction out")  # fmt: skip
    add("--adv_dim", type=count, default=512, metavar="N", help="hidden width of the projection network")

    add = parser.add_argument_group("mining of shared labels").add_argument
    add("--shared_num_classes", type=two_or_more, default=30, metavar="N", help="number of mined clusters")
    add("--cluster_update_freq", type=count_or_zero, default=3, metavar="F", help="F epochs pass between two minings: "
        "labels change after epochs F, 2F+1, 3F+2, ...; 0: after every epoch")  # fmt: skip
    add("--cluster_mode", choices=CLUSTER_MODES, default="mean", help="what of each class is taken out before the "
        "first clustering: nothing, its mean, its mean and standard deviation (the paper's figure)")  # fmt: skip
    add("--random_cluster_pick_p", type=probability, default=0.2, metavar="P", help="probability that a Shared image "
        "is replaced by one of a random cluster under the same label; guards against a bad first mining")  # fmt: skip

    add = parser.add_argument_group("machine and files").add_argument
    add("--gpu", type=count_or_zero, default=0, metavar="ID", help="GPU to use; without any the run is on the CPU")
    add("--savename", default="", metavar="NAME", help="name of the run folder, by default dataset, arch and start "
        "time; an existing name gets a counter, nothing is overwritten")  # fmt: skip
    add("--resume", metavar="RUN", help="go on with the run in this folder as if it had not been interrupted, with its "
        "flags; only --kernels, --gpu, --source_path and a larger --n_epochs may be given anew")  # fmt: skip
    add("--go_on", action="store_true", help="with --savename: go on with the run of that name as with --resume, if "
        "there is one; one with other flags is refused")  # fmt: skip
    add("--tensorboard", action="store_true", help="also write the rows of all logs and the contact sheets for "
        "TensorBoard, to the run folder's tensorboard; needs the package tensorboard")  # fmt: skip
    add("--make_graph", action="store_true", help="also store a picture of the network, network.svg; needs graphviz")
    add("--source_path", default="./Datasets", metavar="FOLDER", help="folder that holds the dataset folders")
    add("--save_path", default="./Training_Results", metavar="FOLDER", help="runs go to SAVE_PATH/DATASET/NAME")
    return parser


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags with defaults that depend on others filled in; `parser.error` on flags that do not fit.

    With --resume they are those of the stored run, but for what may be given anew.
    """
    if args.resume is not None:
        return check_resumed(args, parser)
    args = argparse.Namespace(**vars(args))
    for flag in evaluate.PAIRS:
        values = getattr(args, flag)
        if len(values) != len(TASKS):
            shown = " ".join(map(str, values))
            parser.error(f"--{flag} {shown}: takes 2 values, for the Class and the Shared task; got {len(values)}")
    if not any(args.task_p):
        parser.error("--task_p 0 0: nothing would be trained; give at least one task a probability above 0")
    if len(set(args.adversarial)) != len(args.adversarial):
        parser.error(f"--adversarial {' '.join(args.adversarial)}: name each direction once")
    if len(args.adv_weights) != len(args.adversarial):
        parser.error(
            f"--adv_weights {' '.join(map(str, args.adv_weights))}: takes one weight per direction of --adversarial "
            f"({' '.join(args.adversarial)}); got {len(args.adv_weights)} for {len(args.adversarial)}"
        )
    for flag in ("dataset", "savename"):
        value = getattr(args, flag)
        if value in (".", "..") or Path(value).name != value or not value.isprintable() or len(value.encode()) > 200:
            parser.error(
                f"--{flag} {value!r}: give a plain folder name of up to 200 bytes; --source_path and --save_path "
                "take folders"
            )
    if not args.dataset:
        parser.error("--dataset '': give the name of a data set")
    if args.not_pretrained and args.weights is not None:
        parser.error(f"--weights {args.weights} contradicts --not_pretrained; give one of the two")
    if args.select == "val" and not args.val_classes:
        parser.error("--select val: there are no classes to select by; hold some out with --val_classes FRACTION")
    missing = auxiliaries.missing_for_graphs() if args.make_graph else []
    if missing:
        parser.error(f"--make_graph: install {' and '.join(missing)}, or leave it out")
    missing = auxiliaries.missing_for_tensorboard() if args.tensorboard else []
    if missing:
        parser.error(f"--tensorboard: install {' and '.join(missing)}, or leave it out")
    if args.go_on and not args.savename:
        parser.error("--go_on: give the name of the run to go on with, --savename NAME")

    args.cs_per_bs = [n if losses.needs_triplets(name) else 1 for n, name in zip(args.cs_per_bs, args.losses)]
    if args.bs < 2:
        parser.error(f"--bs {args.bs}: a batch needs at least 2 images")
    for task, name, images_per_class, p in zip(TASKS, args.losses, args.cs_per_bs, args.task_p):
        if p == 0:
            continue
        if losses.needs_triplets(name) and images_per_class < 2:
            parser.error(f"--cs_per_bs {images_per_class} for {task}: {name} needs at least 2 images per class")
        if args.bs % images_per_class:
            parser.error(f"--bs {args.bs} is not a multiple of --cs_per_bs {images_per_class} ({task})")
        if losses.needs_triplets(name) and args.bs < 2 * images_per_class:
            parser.error(f"--bs {args.bs} holds one class of --cs_per_bs {images_per_class}; {task} needs two or more")
    if args.bs % auxiliaries.launched_processes():
        parser.error(
            f"--bs {args.bs} is not divisible by the {auxiliaries.launched_processes()} processes that torchrun started"
        )
    args.k_vals = sorted({1, *(args.k_vals or K_VALS.get(args.dataset, [1, 2, 4, 8]))})
    args.bn = args.bn or ("train" if args.not_pretrained else "frozen")
    return run_to_go_on_with(args, parser) if args.go_on else args


def run_to_go_on_with(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags that resume the run of this name, or these flags where there is none.

    Where a run was stopped before it had stored anything, the one that took its place has a counter behind its name.
    `parser.error` where the run has other flags.
    """
    parent, of_name = Path(args.save_path) / args.dataset, re.compile(rf"{re.escape(args.savename)}(_\d+)?")
    folders = sorted(path.parent for path in parent.glob(f"*/{LAST_CHECKPOINT}") if of_name.fullmatch(path.parent.name))
    try:
        flags = {folder: netlib.read_checkpoint(folder / LAST_CHECKPOINT)["flags"] for folder in folders}
    except netlib.WeightsError as error:
        parser.error(f"--go_on: {error}")
    folder = next((folder for folder in folders if flags[folder].get("savename") == args.savename), None)
    if folder is None:
        return args
    stored = flags[folder]
    wanted = kept_flags(args)
    other = [flag for flag in wanted if flag not in (*RESUMABLE, "save_path") and stored.get(flag) != wanted[flag]]
    if other or args.n_epochs < stored.get("n_epochs", 0):
        was = " ".join(f"--{flag} {evaluate.shown_flag(stored.get(flag))}" for flag in other or ["n_epochs"])
        parser.error(f"--go_on: {folder} is a run with {was}; give these, or another --savename or --save_path")
    return argparse.Namespace(**vars(args) | {"resume": str(folder), "go_on": False})


RESUMABLE = ("resume", "kernels", "gpu", "source_path", "n_epochs")


def check_resumed(args: argparse.Namespace, parser: auxiliaries.OneLineParser) -> argparse.Namespace:
    """Return the flags of the run that --resume names, checked like typed ones, with those that are given anew."""
    anew = [flag for flag in vars(args) if flag in parser.given]
    for flag in anew:
        if flag not in RESUMABLE:
            parser.error(
                f"--{flag}: a resumed run keeps its flags; only --kernels, --gpu, --source_path and a larger "
                "--n_epochs may be given anew"
            )
    if Path(args.resume).name == LAST_CHECKPOINT:
        args.resume = str(Path(args.resume).parent)
    path = Path(args.resume) / LAST_CHECKPOINT
    try:
        flags = netlib.read_checkpoint(path)["flags"]
    except netlib.WeightsError as error:
        hint = "" if path.exists() else "; it was stopped before it had anything to resume, or is no run folder"
        parser.error(f"--resume {args.resume}: {error}{hint}")
    again = get_args_parser()
    again.prog = f"main.py: error: {path}, its flags"
    typed = []
    for flag, value in flags.items():
        if value is True:
            typed.append(f"--{flag}")
        elif isinstance(value, list):
            typed += [f"--{flag}", *map(str, value)]
        elif value is not None and value is not False and flag != "resume":
            typed.append(f"--{flag}={value}")
    typed = again.parse_args([flag for flag in typed if flag != "--make_graph"])  # the picture has been drawn
    resumed = check_args(typed, again)
    resumed.make_graph = flags.get("make_graph") is True
    if "n_epochs" in anew and args.n_epochs < resumed.n_epochs:
        parser.error(f"--n_epochs {args.n_epochs}: the run has {resumed.n_epochs}; give at least as many to resume it")
    resumed.resume = args.resume
    for flag in anew:
        setattr(resumed, flag, getattr(args, flag))
    return resumed


def check_sizes(args: argparse.Namespace, n_images: int) -> None:
    """Raise DatasetError where the flags do not fit the number of training images."""
    too_large = f"is larger than the {n_images} training images of {args.dataset}"
    if args.bs > n_images:
        raise datasets.DatasetError(f"--bs {args.bs} {too_large}")
    if args.task_p[TASKS.index("Shared")] and args.shared_num_classes > n_images:
        raise datasets.DatasetError(f"--shared_num_classes {args.shared_num_classes} {too_large}")


def build_loaders(
    args: argparse.Namespace,
    train_images: datasets.ImageSet,
    test_sets: Mapping[str, datasets.ImageSet],
    pin_memory: bool,
) -> tuple[dict[str, datasets.ClassBalancedBatchSampler], dict[str, DataLoader], dict[str, DataLoader]]:
    """Return batch samplers and training loaders, each by task, and loaders of all images in order.

    The latter are called "train" and by the names of the test sets; "probe" has the part of the training images that
    disentanglement is probed on. Each of several processes loads its share.
    """
    loading = {"n_workers": auxiliaries.n_workers(args.kernels), "pin_memory": pin_memory}
    replacement = {"Class": 0.0, "Shared": args.random_cluster_pick_p}
    samplers, train_loaders = {}, {}
    for i, task in enumerate(TASKS):
        samplers[task] = datasets.ClassBalancedBatchSampler(
            args.bs,
            args.cs_per_bs[i],
            seed=(args.seed, i),
            random_pick_p=replacement[task],
            share=auxiliaries.own_share(args.bs),
        )
        transform = datasets.train_transform(args.img_size, flip=task == "Class")
        dataset = datasets.ImageDataset(train_images, transform)
        train_loaders[task] = datasets.make_loader(dataset, batch_sampler=samplers[task], **loading)
    ordered_loaders = {}
    for split, images in {"train": train_images, **test_sets}.items():
        dataset = datasets.ImageDataset(images, datasets.test_transform(args.img_size))
        ordered_loaders[split] = ordered_loader(dataset, evaluate.scoring_batch_size(args.bs), loading)
    probed = Subset(ordered_loaders["train"].dataset, evaluate.probe_subset(train_images.labels, args.seed))
    ordered_loaders["probe"] = ordered_loader(probed, evaluate.scoring_batch_size(args.bs), loading)
    return samplers, train_loaders, ordered_loaders


def ordered_loader(dataset: Dataset, batch_size: int, loading: Mapping[str, object]) -> DataLoader:
    """Return a loader of all items once, in order, or of the process's share of them in whole batches."""
    share = auxiliaries.own_share(len(dataset), batch_size) if auxiliaries.n_processes() > 1 else None
    return datasets.make_loader(dataset, batch_size=batch_size, share=share, **loading)


def build_objective(
    args: argparse.Namespace, n_classes: Mapping[str, int]
) -> tuple[dict[str, nn.Module], dict[str, tuple[nn.Module, float]]]:
    """Return the loss of each task and, for each adversarial direction with a weight, (term, weight)."""
    criteria = {
        task: losses.build_loss(
            args.losses[i],
            args.sampling[i],
            n_classes=n_classes[task],
            embed_size=args.embed_sizes[i],
            margin=args.margin[i],
            beta=args.beta[i],
            beta_lr=args.beta_lr[i],
            nu=args.nu[i],
            proxy_lr=args.proxy_lr[i],
        )
        for i, task in enumerate(TASKS)
    }
    embed_sizes = dict(zip(TASKS, args.embed_sizes, strict=True))
    adversaries = {}
    for direction, weight in zip(args.adversarial, args.adv_weights, strict=True):
        if weight > 0:
            target, source = direction.split("-")
            term = losses.AdversarialLoss(embed_sizes[target], embed_sizes[source], args.adv_dim, lr=args.lr)
            adversaries[direction] = (term, weight)
    return criteria, adversaries


def build_optimizer(
    args: argparse.Namespace, network: nn.Module, terms: Sequence[nn.Module]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    """Return one Adam over the network and all that the terms train, and its scheduler, None for `none`."""
    groups = [{"params": list(network.parameters()), "lr": args.lr, "weight_decay": args.decay}]
    for term in terms:
        groups += term.param_groups()
    optimizer = torch.optim.Adam(groups, fused=True)
    if args.scheduler == "none":
        return optimizer, None
    if args.scheduler == "exp":
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, args.gamma)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, args.tau, args.gamma)


def standardise_per_class(features: np.ndarray, labels: np.ndarray, mode: str) -> np.ndarray:
    """Take class information out of features before the first clustering (MIC paper, section 3.2).

    features: (N, D) float32. labels: (N,) int in [0, n_classes). mode: no_norm, mean (subtract the class's mean), or
    mstd (and divide by the class's standard deviation per dimension; a dimension that does not vary becomes 0).
    """
    if mode == "no_norm":
        return features
    standardised = np.empty_like(features)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        centred = features[members] - features[members].mean(0, dtype=np.float64)
        if mode == "mstd":
            deviation = features[members].std(0, dtype=np.float64)
            centred = np.where(deviation > 1e-6, centred / np.maximum(deviation, 1e-6), 0)
        standardised[members] = centred
    return standardised


def mine_labels(
    network: netlib.EmbeddingNetwork,
    loader: DataLoader,
    class_labels: np.ndarray,
    *,
    is_first: bool,
    cluster_mode: str,
    n_clusters: int,
    seed: int,
    amp: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster all training images; return labels (N,) int64 in [0, n_clusters), and squared distances to their centres.

    The first time by early features standardised per class, later by the Shared embedding as it is (MIC paper,
    section 3.2). loader: the training images in order. class_labels: (N,) int.
    """
    name = "Early" if is_first else "Shared"
    features = evaluate.extract_features(network, loader, [name], amp, everywhere=False)[name]

    def cluster() -> tuple[np.ndarray, np.ndarray]:
        """Return labels and squared distances; only the first process has the features."""
        standardised = standardise_per_class(features, class_labels, cluster_mode) if is_first else features
        return auxiliaries.kmeans(standardised, n_clusters, seed)

    return auxiliaries.computed_by_first(cluster)


def draw_task_schedule(task_p: Sequence[float], n_iterations: int, seed: int, epoch: int) -> np.ndarray:
    """Return (n_iterations, 2) bool: whether each task takes its step, drawn from the seed and the epoch alone."""
    rng = np.random.default_rng([seed, len(TASKS), epoch])
    return rng.random((n_iterations, len(TASKS))) < np.asarray(task_p)


def train_one_epoch(
    network: nn.Module,
    criteria: Mapping[str, nn.Module],
    adversaries: Mapping[str, tuple[nn.Module, float]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loaders: Mapping[str, DataLoader],
    schedule: np.ndarray,
    amp: str,
    bar: tqdm,
    epoch: int,
) -> dict[str, float | None]:
    """Train one epoch and return the average losses, None for what took no step.

    adversaries: direction target-source to (term, weight). scaler: of the loss, for fp16; it leaves out steps whose
    gradients overflow. schedule: (iterations, 2) bool, which task takes its step; a task's loader holds exactly that
    many batches. bar: progress bar, told of every image and at times of the losses. epoch: for messages.
    Raises NonFiniteLossError that names the term, the task's step and the iteration.
    """
    network.train()
    device = next(network.parameters()).device
    weights = [values for term in criteria.values() for values in term.parameters()]
    weights += [values for adversary, _ in adversaries.values() for values in adversary.parameters()]
    meter = LossMeter(epoch)
    batches = {task: iter(loaders[task]) for task, takes_steps in zip(TASKS, schedule.any(0)) if takes_steps}
    for iteration, takes_step in enumerate(schedule):
        for task in (task for task, active in zip(TASKS, takes_step) if active):
            images, labels = (values.to(device, non_blocking=True) for values in next(batches[task]))
            with netlib.autocast(device, amp):
                embeddings = network(images, heads_used(task, adversaries))
            embeddings, labels = auxiliaries.gather_batch(embeddings, labels)
            terms = {task: criteria[task](embeddings[task], labels)}
            for direction, (adversary, weight) in adversaries.items():
                target, source = direction.split("-")
                terms[direction] = weight * adversary(embeddings[target], embeddings[source])
            loss = sum(terms.values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            auxiliaries.share_gradients(weights)
            scaler.step(optimizer)
            scaler.update()
            meter.add(iteration, task, terms)
            bar.update(len(labels))
        if iteration % LOSS_READ_INTERVAL == LOSS_READ_INTERVAL - 1 or iteration == len(schedule) - 1:
            bar.set_postfix(meter.read())
            if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
                raise NonFiniteLossError(
                    f"in epoch {epoch} up to iteration {iteration} the float16 gradients overflow at every step, "
                    "whatever their scale: try --amp bf16 or none, or a lower --lr"
                )
    return meter.averages()


def heads_used(task: str, adversaries: Mapping[str, object]) -> list[str] | None:
    """Return the heads that a task's loss needs: its own, or with an adversarial term all, None."""
    return None if adversaries else [task]


class LossMeter:
    """Sums loss terms by name; the values stay on the device until `read`, so that a step never waits for them."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.pending: list[tuple[int, str, str, torch.Tensor]] = []

    def add(self, iteration: int, task: str, terms: Mapping[str, torch.Tensor]) -> None:
        """Take the terms of one step."""
        self.pending += [(iteration, task, term, value.detach()) for term, value in terms.items()]
        self.counts["step"] = self.counts.get("step", 0) + 1

    def read(self) -> dict[str, str]:
        """Copy what is pending to the host and return the running averages as text. Raises NonFiniteLossError."""
        if self.pending:
            values = torch.stack([entry[3] for entry in self.pending]).tolist()
            for (iteration, task, term, _), value in zip(self.pending, values, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"the {term} loss is {value} in epoch {self.epoch} at iteration {iteration} ({task} step): "
                        "training has diverged; "
                        "try a lower --lr, or lower --adv_weights"
                    )
                self.sums[term] = self.sums.get(term, 0.0) + value
                self.counts[term] = self.counts.get(term, 0) + 1
            self.pending.clear()
        return {term: f"{total / self.counts[term]:.4g}" for term, total in self.sums.items()}

    def averages(self) -> dict[str, float | None]:
        """Return the averages of the epoch: of all per step, of each task per step of its own, adversarial per step."""
        self.read()
        n_steps = self.counts.get("step", 0)
        adversarial = sum(total for term, total in self.sums.items() if term in DIRECTIONS)
        averages = {"Train Loss": sum(self.sums.values()) / n_steps if n_steps else None}
        for task in TASKS:
            averages[f"{task} Loss"] = self.sums[task] / self.counts[task] if task in self.sums else None
        has_adversary = n_steps and any(term in DIRECTIONS for term in self.sums)
        return averages | {"Adversarial Loss": adversarial / n_steps if has_adversary else None}


def score_tests(
    network: netlib.EmbeddingNetwork,
    loaders: Mapping[str, DataLoader],
    args: argparse.Namespace,
    with_clustering: bool = True,
) -> tuple[dict[str, float | None], dict[str, dict[str, np.ndarray]]]:
    """Return the scores of the Class embedding on all test sets, and both embeddings: {test set: {task: (N, D)}}.

    loaders: of each test set in order, by its name, which stands before the names of its scores. with_clustering: see
    evaluate.score_set.
    """
    embeddings = {name: evaluate.extract_features(network, loader, TASKS, args.amp) for name, loader in loaders.items()}
    return score_embeddings("Class", embeddings, loaders, args, network.mean.device, with_clustering), embeddings


def score_embeddings(
    task: str,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    loaders: Mapping[str, DataLoader],
    args: argparse.Namespace,
    device: torch.device,
    with_clustering: bool,
) -> dict[str, float | None]:
    """Return the scores of one task's embedding on all test sets; see score_tests."""
    scores = {}
    for name, loader in loaders.items():
        images, of_task = loader.dataset.images, embeddings[name][task]
        of_set = evaluate.score_set(
            of_task, images.labels, args.k_vals, args.seed, device, images.is_query, with_clustering
        )
        scores |= {f"{name} {score}".strip(): value for score, value in of_set.items()}
    return scores


def evaluate_more(
    network: netlib.EmbeddingNetwork,
    args: argparse.Namespace,
    progress: Mapping[str, list],
    mined: np.ndarray | None,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    loaders: Mapping[str, DataLoader],
    with_clustering: bool,
) -> None:
    """Add to progress the rows that go with the last one of log_val_Class.csv: of log_val_Shared.csv and log_probe.csv.

    mined: (N,) int, the mined labels of all training images; None without mining, where there is no probe. Nor is there
    one where every class has a single image.
    embeddings: {test set: {task: (N, D)}}. loaders: of each test set and of "probe", a Subset of the training images.
    """
    epoch, start = progress["val_rows"][-1]["Epochs"], time.time()
    if args.eval_shared:
        test_loaders = {name: loaders[name] for name in embeddings}
        scores = score_embeddings("Shared", embeddings, test_loaders, args, network.mean.device, with_clustering)
        progress["shared_rows"].append({"Epochs": epoch, "Time": round(time.time() - start, 2)} | scores)
    subset = loaders["probe"].dataset
    if mined is not None and len(subset):
        start = time.time()
        probed = evaluate.extract_features(network, loaders["probe"], TASKS, args.amp)
        classes = subset.dataset.images.labels
        scores = evaluate.probe_scores(probed, classes[subset.indices], mined[subset.indices])
        progress["probe_rows"].append({"Epochs": epoch, "Time": round(time.time() - start, 2)} | scores)


def print_split(split: str, images: datasets.ImageSet) -> None:
    """Print the size of a split, and how many of its classes have a single image."""
    n_single = int((np.bincount(images.labels) == 1).sum())
    note = f" (classes with a single image, which has nothing to be found with: {n_single})" if n_single else ""
    print(f"{split}: {len(images)} images of {len(images.class_names)} classes{note}")


def print_mining(row: Mapping[str, float]) -> None:
    """Print what a mining found."""
    matches = ", ".join(f"{name[4:]} {value:.3f}" for name, value in row.items() if name.startswith("NMI "))
    print(
        f"mined for epoch {row['Before Epoch']}: {row['Clusters']} clusters of {row['Smallest']} to {row['Largest']} "
        f"images; NMI of the labels with {matches}"
    )


def kept_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return the flags that are kept with a run."""
    return {flag: value for flag, value in vars(args).items() if flag not in ("resume", "go_on")}


def read_training(path: Path, n_images: int, n_clusters: int, has_probe: bool) -> dict[str, dict]:
    """Read the checkpoint to resume from and return its content.

    n_images, n_clusters: of the training images now, and of mined labels, 0 without mining. has_probe: whether a probe
    was logged at each evaluation. Raises WeightsError where it holds no training to go on with, DatasetError where the
    images have changed.
    """
    stored = netlib.read_checkpoint(path)
    progress, training = stored["progress"], stored.get("training")
    labels = progress.get("shared_labels")
    rows = [progress.get(name) for name in LOGS.values()]
    n_scored = {"shared_rows": stored["flags"].get("eval_shared") is True, "probe_rows": has_probe}
    is_whole = (
        isinstance(training, dict)
        and isinstance(training.get("epoch"), int)
        and isinstance(training.get("seconds"), float)
        and isinstance(training.get("spent"), dict)
        and {name: type(seconds) for name, seconds in training["spent"].items()}
        == dict.fromkeys(auxiliaries.ACTIVITIES, float)
        and all(isinstance(some, list) and all(isinstance(row, dict) for row in some) for some in rows)
        and all(list(row) == list(some[0]) for some in rows for row in some)
        and len(rows[0]) == training["epoch"]
        and bool(rows[2]) == (n_clusters > 0)
        and all("Before Epoch" in row for row in rows[2])
        and isinstance(progress.get("initial_scores"), dict)
        and all(list(row) == ["Epochs", "Time", *progress["initial_scores"]] for row in rows[1])
        and all(len(progress[name]) == (len(rows[1]) if is_kept else 0) for name, is_kept in n_scored.items())
        and (labels is None) == (n_clusters == 0)
        and (labels is None or (isinstance(labels, torch.Tensor) and labels.dtype == torch.int64))
        and (labels is None or labels.shape == (training.get("n_images"),))
    )
    if not is_whole or (labels is not None and not bool(((labels >= 0) & (labels < n_clusters)).all())):
        raise netlib.WeightsError(f"{path}: holds no training to go on with")
    if training.get("n_images") != n_images:
        raise datasets.DatasetError(
            f"--resume: the run had {training.get('n_images')} training images, now there are {n_images}; give it the "
            "images it was trained with"
        )
    return stored


def restore(stored: Mapping, path: Path, modules: Mapping[str, nn.Module], others: Mapping) -> None:
    """Set modules, optimiser, scheduler, scaler and random states to what `record_training` stored.

    modules: "network" and "terms". others: "optimizer", "scheduler" and "scaler". Raises WeightsError where they do
    not fit.
    """
    training = stored["training"]
    try:
        modules["network"].load_state_dict(stored["state_dict"])
        modules["terms"].load_state_dict(training["terms"])
        for name, part in others.items():
            if part is not None:
                require_alike(part.state_dict(), training[name], name)
                part.load_state_dict(training[name])
        for parameter, state in others["optimizer"].state.items():
            if any(values.shape not in ((), parameter.shape) for values in state.values()):
                raise ValueError("the optimiser's averages have another shape than the weights")
        auxiliaries.set_random_states(training["random"], modules["network"].mean.device)
    except Exception as error:  # whatever stands in a file of the right form
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise netlib.WeightsError(f"{path}: holds no training of this run ({reason})") from error


def require_alike(own: object, stored: object, where: str) -> None:
    """Raise ValueError where a stored state has other keys or types than a fresh one; what is empty may be filled."""
    if type(own) is not type(stored):
        raise ValueError(f"{where} is {type(stored).__name__}, not {type(own).__name__}")
    if isinstance(own, dict) and own:
        if set(own) != set(stored):
            raise ValueError(f"{where} has other entries")
        for key, value in own.items():
            if value is not None:
                require_alike(value, stored[key], f"{where}: {key}")
    if isinstance(own, list):
        if len(own) != len(stored):
            raise ValueError(f"{where} has {len(stored)} entries, not {len(own)}")
        for one, other in zip(own, stored):
            require_alike(one, other, where)


def record_training(
    path: Path,
    modules: Mapping[str, nn.Module],
    others: Mapping,
    args: argparse.Namespace,
    progress: Mapping,
    position: Mapping[str, object],
) -> None:
    """Store all that `restore` needs.

    position: the epoch that comes next, n_images, the run's seconds so far, and what they were spent on.
    """
    states = {name: part.state_dict() for name, part in others.items() if part is not None}
    random_states = auxiliaries.random_states(modules["network"].mean.device)
    training = {"terms": modules["terms"].state_dict(), "random": random_states, **states, **position}
    auxiliaries.save_checkpoint(path, modules["network"], kept_flags(args), progress, training)


def last_rows(progress: Mapping[str, list], names: Sequence[str]) -> dict[str, Mapping[str, float | None]]:
    """Return the last row of some logs, by their names in progress less "_rows"; those without rows are left out."""
    return {name: progress[f"{name}_rows"][-1] for name in names if progress[f"{name}_rows"]}


def record_evaluation(
    folder: Path, network: nn.Module, args: argparse.Namespace, progress: Mapping, test_sets: Sequence[str]
) -> str:
    """Log the last evaluation; keep the checkpoint for a test set whose best epoch it is.

    progress: what the checkpoint keeps, with the rows of all logs so far. test_sets: their names.
    Returns the best Recall@1 of each test set as text.
    """
    for log in ("log_val_Class.csv", "log_val_Shared.csv", "log_probe.csv"):
        if progress[LOGS[log]]:
            auxiliaries.append_row(folder / log, progress[LOGS[log]][-1])
    best_lines = []
    for name in test_sets:
        best = progress["val_rows"][evaluate.best_index(progress["val_rows"], name, args.select)]
        best_lines.append(f"{name} {best[f'{name} Recall @ 1'.strip()]:.4f} in epoch {best['Epochs']}".strip())
        if best is progress["val_rows"][-1]:
            # It takes its place once last.pth.tar holds this epoch: until then the epoch may have to be trained again
            waiting = f"checkpoint{evaluate.file_suffix(name)}.pth.tar.{len(progress['train_rows'])}.next"
            auxiliaries.save_checkpoint(folder / waiting, network, kept_flags(args), progress)
    return ", ".join(best_lines)


def draw_evaluation(
    folder: Path,
    args: argparse.Namespace,
    progress: Mapping,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    test_loaders: Mapping[str, DataLoader],
) -> list[Path]:
    """Redraw the plots, and the contact sheets of a test set whose best epoch this is; return the contact sheets.

    embeddings: {test set: {task: (N, D)}}. test_loaders: of the sets to draw. The Shared embedding is shown where it is
    trained.
    """
    shown_tasks = TASKS if progress["mining_rows"] else TASKS[:1]
    sheets = []
    for name, loader in test_loaders.items():
        suffix, images = evaluate.file_suffix(name), loader.dataset.images
        title = f"{auxiliaries.shortened(folder.name, 50)} {name}".strip()
        also, rows = ("Epochs", "Time", f"{evaluate.VALIDATION} Recall @ 1"), progress["val_rows"]
        best = evaluate.best_index(rows, name, args.select)
        rows = [{key: row[key] for key in also if key in row} | evaluate.scores_of_set(row, name) for row in rows]
        if best == len(rows) - 1:
            for task in shown_tasks:
                sheets.append(folder / f"sample_recoveries{'' if task == 'Class' else f'_{task}'}{suffix}.png")
                auxiliaries.draw_recoveries(
                    sheets[-1],
                    pixels_of(images),
                    embeddings[name][task],
                    images.labels,
                    images.class_names,
                    title=f"{title}, epoch {rows[-1]['Epochs']}: nearest by the {task} embedding",
                    is_query=images.is_query,
                )
        auxiliaries.draw_progress(
            folder / f"InfoPlot_Class{suffix}.svg",
            progress["train_rows"],
            rows,
            title=title,
            best=best,
            mined_before=[row["Before Epoch"] for row in progress["mining_rows"]],
            rate_steps={"step": args.tau, "exp": range(1, args.n_epochs), "none": []}[args.scheduler],
        )
    if progress["probe_rows"]:
        auxiliaries.draw_probe(folder / "InfoPlot_Probe.svg", progress["probe_rows"], title=folder.name)
    return sheets


def draw_mining(
    folder: Path, before_epoch: int, images: datasets.ImageSet, mined: np.ndarray, squared_distances: np.ndarray
) -> Path:
    """Draw the mined clusters, mined_clusters.png, and return its path. See evaluate.clusters_to_show."""
    clusters = evaluate.clusters_to_show(mined, squared_distances, images.labels, images.factors)
    n_clusters, read = len(np.unique(mined)), pixels_of(images)
    which = "all" if len(clusters) == n_clusters else f"the {len(clusters)} largest, middle and smallest of"
    tiles = [
        [auxiliaries.Tile(read(index), images.class_names[images.labels[index]], "plain") for index in indices]
        for _, indices in clusters
    ]
    title = f"{auxiliaries.shortened(folder.name, 50)}: {which} {n_clusters} clusters mined before epoch {before_epoch}"
    note = "images nearest to the centre, each of another class: a row should have something in common"
    path = folder / "mined_clusters.png"
    auxiliaries.draw_sheet(path, [title, note], [caption for caption, _ in clusters], tiles)
    return path


def pixels_of(images: datasets.ImageSet) -> Callable[[int], np.ndarray]:
    """Return a function from an index to the image as it is, (H, W, 3) uint8."""
    return lambda index: images.read(index).permute(1, 2, 0).numpy()


@evaluate.one_line_errors("main.py")
@auxiliaries.signals_stop()
def main(args: argparse.Namespace) -> Path:
    """Train with flags that `check_args` resolved, and return the run folder."""
    with auxiliaries.process_group(), auxiliaries.resumable(Path(args.resume) if args.resume else None):
        return train(args)


def train(args: argparse.Namespace) -> Path:
    """Assemble all parts, start or resume the run, train it to its end, and return the run folder."""
    start, stopwatch = time.time(), auxiliaries.Stopwatch()
    is_first_process, n_processes = auxiliaries.is_first_process(), auxiliaries.n_processes()
    auxiliaries.set_seeds(args.seed)
    device = auxiliaries.pick_device(args.gpu)
    auxiliaries.set_tf32(args.tf32, device)

    parent = Path(args.resume).absolute().parent if args.resume else Path(args.save_path) / args.dataset
    savename = args.savename or f"{args.dataset}_{args.arch}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if args.resume:
        folder = Path(args.resume)
        lock = auxiliaries.lock_run_folder(folder)
    else:
        auxiliaries.check_run_folder(parent, savename)

    # Data
    train_images, test_sets = datasets.load_dataset(args.dataset, args.source_path)
    warnings = datasets.count_warnings(args.dataset, train_images, test_sets)
    set_names = list(test_sets)
    if args.val_classes:
        train_images, test_sets[evaluate.VALIDATION] = datasets.hold_out_classes(train_images, args.val_classes)
    check_sizes(args, len(train_images))
    if n_processes > 1:
        digest = datasets.contents_digest([train_images, *test_sets.values()])
        auxiliaries.require_same(digest, f"--source_path: the images of {args.dataset} differ between the processes")
    cache_names = ["train", *(evaluate.file_suffix(name)[1:] or "test" for name in test_sets)]
    with auxiliaries.first_process_first() if args.cache == "disk" else contextlib.nullcontext():
        train_images, *decoded = datasets.cached(
            [train_images, *test_sets.values()], args.cache, parent, cache_names, auxiliaries.local_processes()
        )
    test_sets = dict(zip(test_sets, decoded))
    print_split("train", train_images)
    for name, images in test_sets.items():
        print_split(name or "test", images)
    for warning in warnings:
        print(f"warning: {warning}")
    samplers, loaders, ordered_loaders = build_loaders(args, train_images, test_sets, device.type == "cuda")
    test_loaders = {name: ordered_loaders[name] for name in test_sets}
    drawn_loaders = {name: ordered_loaders[name] for name in set_names}

    stored = None
    if args.resume:
        n_clusters = args.shared_num_classes if args.task_p[TASKS.index("Shared")] > 0 else 0
        has_probe = n_clusters > 0 and len(ordered_loaders["probe"].dataset) > 0
        stored = read_training(folder / LAST_CHECKPOINT, len(train_images), n_clusters, has_probe)
        auxiliaries.require_same(
            (stored["training"]["epoch"], str(stored["training"]["seconds"])),
            f"--resume: {folder / LAST_CHECKPOINT} is not the same for all processes; wait until all machines see its "
            "last state",
        )
        start -= stored["training"]["seconds"]
        stopwatch.seconds = dict(stored["training"]["spent"])
        if stored["training"]["epoch"] >= args.n_epochs:
            print(f"{folder} is finished: {args.n_epochs} epochs are done; a larger --n_epochs goes on")
            return folder

    # Network
    with auxiliaries.first_process_first():  # it downloads the weights
        network = netlib.build_network(
            args.arch,
            dict(zip(TASKS, args.embed_sizes, strict=True)),
            pretrained=not args.not_pretrained and stored is None,
            weights_file=args.weights if stored is None else None,
            freeze_batchnorm=args.bn == "frozen",
        ).to(device)
    picture = None
    if args.make_graph and stored is None and is_first_process:
        picture = auxiliaries.draw_graph(*netlib.describe_graph(network, args.img_size), title=args.arch)
    if n_processes > 1:
        network = netlib.synchronise_batchnorm(network)
    if stored is None:
        with stopwatch.measure("evaluation"):
            initial_scores, _ = score_tests(network, test_loaders, args)
        print(f"before training  {evaluate.scores_line(initial_scores)}")
        progress = {"initial_scores": initial_scores, **{rows: [] for rows in LOGS.values()}}
    else:
        progress = stored["progress"]

    # First labels
    @stopwatch.measure("mining")
    def mine(before_epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mined labels and squared distances to their centres; add their row of log_mining.csv to progress."""
        mining_start = time.time()
        mined, squared_distances = mine_labels(
            network,
            ordered_loaders["train"],
            train_images.labels,
            is_first=before_epoch == 0,
            cluster_mode=args.cluster_mode,
            n_clusters=args.shared_num_classes,
            seed=args.seed,
            amp=args.amp,
        )
        row = {"Before Epoch": before_epoch, "Time": round(time.time() - mining_start, 2)}
        row["Inertia"] = float(squared_distances.sum(dtype=np.float64))
        row |= evaluate.describe_clusters(
            mined, args.shared_num_classes, train_images.labels, train_images.factors, labels.get("Shared")
        )
        progress["mining_rows"].append(row)
        print_mining(row)
        return mined, squared_distances

    is_mining = args.task_p[TASKS.index("Shared")] > 0
    labels = {"Class": train_images.labels}
    if stored is not None:
        labels |= {"Shared": progress["shared_labels"].numpy()} if is_mining else {}
    elif is_mining:
        labels["Shared"], squared_distances = mine(before_epoch=0)
    elif train_images.pixels is None:
        for _ in ordered_loaders["train"]:  # a broken image is to show now, not in the middle of a run
            pass

    # Losses
    n_classes = {"Class": len(train_images.class_names), "Shared": args.shared_num_classes}
    criteria, adversaries = build_objective(args, n_classes)
    terms = nn.ModuleList([*criteria.values(), *(term for term, _ in adversaries.values())]).to(device)

    # Optimiser
    optimizer, scheduler = build_optimizer(args, network, terms)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    trained = network
    if args.compile:
        image_shape = (args.bs // n_processes, 3, args.img_size, args.img_size)
        outputs = heads_used(TASKS[0] if args.task_p[0] else TASKS[1], adversaries)
        trained = netlib.compile_network(network, image_shape, args.amp, outputs)

    modules = {"network": network, "terms": terms}
    others = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}

    def summarise() -> str:
        """Write Curr_Summary_Class.txt and return its text."""
        path, paper = folder / "Curr_Summary_Class.txt", evaluate.paper_scores(args.dataset)
        scores = progress["initial_scores"], progress["val_rows"]
        return auxiliaries.write_summary(path, *scores, time.time() - start, stopwatch.seconds, paper)

    # Resume, or a new run folder: every image has been decoded by now, and the network has run
    auxiliaries.wait_for_all()
    if stored is not None:
        restore(stored, folder / LAST_CHECKPOINT, modules, others)
    else:
        folder = auxiliaries.computed_by_first(lambda: auxiliaries.make_run_folder(parent, savename))
        lock = auxiliaries.lock_run_folder(folder)
    if n_processes > 1:
        trained = netlib.distribute(trained, has_unused=not adversaries)
    print(f"run folder: {folder}")
    first_epoch = 0 if stored is None else stored["training"]["epoch"]
    board_folder = folder / "tensorboard" if args.tensorboard and is_first_process else None
    timed_loaders = {task: auxiliaries.TimedLoader(loader, stopwatch) for task, loader in loaders.items()}
    with lock, auxiliaries.resumable(folder), auxiliaries.opened_board(board_folder, first_epoch) as board:
        if is_first_process:
            auxiliaries.remove_leftovers(folder)
            auxiliaries.write_flags(folder, kept_flags(args))
            if picture is not None:
                with auxiliaries.replaced_file(folder / "network.svg") as file:
                    file.write(picture)
            for name, rows in LOGS.items():
                auxiliaries.write_rows(folder / name, progress[rows])
            if is_mining and stored is None:
                with stopwatch.measure("drawing"):
                    draw_mining(folder, 0, train_images, labels["Shared"], squared_distances)
            if is_mining and progress["mining_rows"][-1]["Before Epoch"] == first_epoch:  # a resumed board dropped it
                pictures = [path for path in [folder / "mined_clusters.png"] if path.exists()]
                auxiliaries.add_to_board(board, first_epoch, {"mining": progress["mining_rows"][-1]}, pictures)

        # Loop
        for epoch in range(first_epoch, args.n_epochs + 1):
            progress["shared_labels"] = torch.from_numpy(labels["Shared"]) if is_mining else None
            position = {"epoch": epoch, "n_images": len(train_images), "seconds": time.time() - start}
            position["spent"] = dict(stopwatch.seconds)
            if is_first_process:
                record_training(folder / LAST_CHECKPOINT, modules, others, args, progress, position)
                auxiliaries.publish_best(folder, epoch)
            if epoch == args.n_epochs:
                break
            epoch_start = time.time()
            schedule = draw_task_schedule(args.task_p, len(train_images) // args.bs, args.seed, epoch)
            for task in labels:
                samplers[task].set_epoch(epoch, labels[task], n_batches=int(schedule[:, TASKS.index(task)].sum()))
            bar = {"desc": f"epoch {epoch}", "total": args.bs * int(schedule.sum()), "unit": "img", "unit_scale": True}
            is_silent = None if is_first_process else True
            with stopwatch.measure("training"), tqdm(**bar, leave=False, disable=is_silent) as bar:
                averages = train_one_epoch(
                    trained, criteria, adversaries, optimizer, scaler, timed_loaders, schedule, args.amp, bar, epoch
                )
            progress["train_rows"].append({"Epochs": epoch, "Time": round(time.time() - epoch_start, 2)} | averages)
            if is_first_process:
                auxiliaries.append_row(folder / "log_train_Class.csv", progress["train_rows"][-1])
                auxiliaries.add_to_board(board, epoch, {"train": progress["train_rows"][-1]})

            if (epoch + 1) % args.eval_every == 0 or epoch == args.n_epochs - 1:
                eval_start = time.time()
                with_clustering = not args.fast_eval or (epoch + 1) % 10 == 0 or epoch == args.n_epochs - 1
                with stopwatch.measure("evaluation"):
                    scores, embeddings = score_tests(network, test_loaders, args, with_clustering)
                    progress["val_rows"].append({"Epochs": epoch, "Time": round(time.time() - eval_start, 2)} | scores)
                    evaluate_more(
                        network, args, progress, labels.get("Shared"), embeddings, ordered_loaders, with_clustering
                    )
                if is_first_process:
                    best = record_evaluation(folder, network, args, progress, set_names)
                    with stopwatch.measure("drawing"):
                        sheets = draw_evaluation(folder, args, progress, embeddings, drawn_loaders)
                    summarise()
                    auxiliaries.add_to_board(board, epoch, last_rows(progress, ("val", "shared", "probe")), sheets)
                    shown = f"{evaluate.scores_line(scores)}  (best Recall @ 1: {best})"
                    print(f"epoch {epoch}  {shown}  {time.time() - epoch_start:.1f} s")

            if is_mining and (epoch + 1) % (args.cluster_update_freq + 1) == 0:  # after the last epoch: for the log
                labels["Shared"], squared_distances = mine(before_epoch=epoch + 1)
                if is_first_process:
                    auxiliaries.append_row(folder / "log_mining.csv", progress["mining_rows"][-1])
                    with stopwatch.measure("drawing"):
                        picture = draw_mining(folder, epoch + 1, train_images, labels["Shared"], squared_distances)
                    auxiliaries.add_to_board(board, epoch + 1, last_rows(progress, ("mining",)), [picture])
            if scheduler is not None:
                scheduler.step()
        if is_first_process:
            print(summarise(), end="")
    return folder


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a killed run's output is whole where it goes to a file
    args_parser = get_args_parser()
    main(check_args(args_parser.parse_args(), args_parser))
