"""Load data sets by name, transform images, draw class-balanced batches, and feed them to the network.

As a command, report what a data set holds, or what is wrong with it, without training.
"""

import functools
import itertools
import os
import signal
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from data.custom import layouts_in
from data.files import normal_form
from data.images import NO_TORCHCODEC, ImageSet, Splits
from data.locate import check_name, locate
from data.published import dataset_info
from data.shapes import render_shapes
from support import processes
from support.errors import InputError, OneLineParser, counted, first_few, one_line_errors, set_up_output
from support.output import Progress, logged

SCORING_BATCH_SIZE = 112
"""Largest batch embedded without gradients. With several processes, all of --bs may be too much for one of them."""

Draw = tuple[int, int, int]
"""An image of a training batch: (index of the image, label to train it with, seed of its augmentation)."""


def load_dataset(name: str, source_path: str | Path) -> Splits:
    """Load the training images and the test sets of a data set; a single test set is called "test".

    Args:
        name: a published data set (see data.published), "shapes", or a folder in source_path (see data.custom).
        source_path: folder that holds the data sets.

    Raises:
        InputError: the data set cannot be read. If it is missing, the message has several lines of advice.
    """
    if name == "shapes":
        folder = Path(source_path) / name
        if layouts_in(folder):
            raise InputError(f"--dataset shapes: is the built-in set, and {folder} is a folder of yours: rename that")
        return render_shapes()
    published, root = dataset_info(name), locate(name, Path(source_path))
    train, tests = published.read(root)
    return replace(train, layout=train.layout or f"{published.layout} in {root}"), tests


def train_transform(img_size: int, flip: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the augmentation for training, a random resized crop and optionally a random flip.

    It maps (3, H, W) uint8 to (3, img_size, img_size) uint8.
    """
    return v2.Compose([v2.RandomResizedCrop(img_size, antialias=True), v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


def test_transform(img_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the transform for evaluation: resize the shorter side to 256/224 of img_size, then crop the centre.

    It maps (3, H, W) uint8 to (3, img_size, img_size) uint8.
    """
    return v2.Compose([v2.Resize(round(img_size * 256 / 224), antialias=True), v2.CenterCrop(img_size)])


class ImageDataset(Dataset):
    """The transformed images of a split. Its keys are draws in training, and indices in evaluation."""

    def __init__(self, images: ImageSet, transform: Callable[[torch.Tensor], torch.Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Draw | int) -> tuple[torch.Tensor, int]:
        """Return the image (3, S, S) uint8 and its label. The augmentation depends only on the seed of the draw."""
        index, label, seed = key if isinstance(key, tuple) else (key, int(self.images.labels[key]), 0)
        image = self.images.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class NamedDatasets(Dataset):
    """Several data sets in one, with keys (name of the data set, key of its item)."""

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, Draw | int]) -> tuple[torch.Tensor, int]:
        name, item = key
        return self.datasets[name][item]


class ClassBalancedBatchSampler(BatchSampler):
    """Draw batches made of groups: `images_per_class` images of one class, then of another, as in the published code.

    Each class is drawn uniformly among all but the two before it. No image repeats within a group, unless the class is
    too small. With images_per_class 1, all images are shuffled instead. The order depends only on the seed and on the
    arguments of `set_epoch`.

    Args:
        batch_size: a multiple of images_per_class.
        images_per_class: images in a group.
        seed: integers; samplers with different seeds draw independently.
        random_pick_p: probability that an image is replaced by a random image of a random class under the same label.
        share: range of places in each batch that this process loads; None: all.
    """

    def __init__(
        self,
        batch_size: int,
        images_per_class: int,
        seed: tuple[int, ...],
        random_pick_p: float = 0.0,
        share: range | None = None,
    ):
        self.batch_size, self.images_per_class = batch_size, images_per_class
        self.seed, self.random_pick_p = seed, random_pick_p
        self.share = range(batch_size) if share is None else share
        self.set_epoch(0, np.empty(0, dtype=np.int64), 0)

    def set_epoch(self, epoch: int, labels: np.ndarray, n_batches: int) -> None:
        """Set the epoch, the labels (N,) int and the number of batches of the next pass."""
        self.epoch, self.labels, self.n_batches = epoch, labels, n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([*self.seed, self.epoch])
        order = np.argsort(self.labels, kind="stable")
        classes, starts = np.unique(self.labels[order], return_index=True)
        members = np.split(order, starts[1:])
        stream = self._shuffled(rng) if self.images_per_class == 1 else self._class_groups(members, classes, rng)
        for _ in range(self.n_batches):
            batch = []
            for seed in rng.integers(2**63, size=self.batch_size):
                index, label = next(stream)
                if self.random_pick_p and rng.random() < self.random_pick_p:
                    index = rng.choice(members[rng.integers(len(members))])
                batch.append((int(index), int(label), int(seed)))
            yield batch[self.share.start : self.share.stop]

    def _shuffled(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        while True:
            for index in rng.permutation(len(self.labels)):
                yield index, self.labels[index]

    def _class_groups(self, members: list, classes: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        n_excluded = min(2, len(classes) - 1)
        recent: list[int] = []
        while True:
            drawn = int(rng.integers(len(classes) - len(recent)))
            for earlier in sorted(recent):
                drawn += drawn >= earlier
            recent = [*recent, drawn][-n_excluded:] if n_excluded else []
            # No image twice if the class is large enough, otherwise as evenly as possible
            rounds = -(-self.images_per_class // len(members[drawn]))
            group = np.concatenate([rng.permutation(members[drawn]) for _ in range(rounds)])
            for index in group[: self.images_per_class]:
                yield index, classes[drawn]


def draw_steps(task_p: Mapping[str, float], n_iterations: int, seed: int, epoch: int) -> list[tuple[int, str]]:
    """Draw the steps of an epoch: each task takes a step in an iteration with its probability.

    Args:
        task_p: {task: probability}.
        n_iterations: number of iterations.
        seed: with the epoch, determines the result.
        epoch: number of the epoch.

    Returns:
        (iteration, task) of each step, in order.
    """
    tasks = list(task_p)
    rng = np.random.default_rng([seed, len(tasks), epoch])  # the samplers draw from [seed, 0 or 1, epoch]
    takes_step = rng.random((n_iterations, len(tasks))) < list(task_p.values())
    return [(int(iteration), tasks[task]) for iteration, task in np.argwhere(takes_step)]


class TaskBatchSampler(BatchSampler):
    """The batches of all tasks in the order of the training steps, so that the same workers load them all.

    A batch is a list of keys (task, draw), all of one task.
    """

    def __init__(self, samplers: Mapping[str, ClassBalancedBatchSampler]):
        self.samplers, self.steps = samplers, []

    def set_epoch(self, epoch: int, labels: Mapping[str, np.ndarray], steps: Sequence[tuple[int, str]]) -> None:
        """Set the epoch, the labels (N,) int of each task, and the steps of the next pass (see draw_steps)."""
        self.steps = [task for _, task in steps]
        for task, sampler in self.samplers.items():
            sampler.set_epoch(epoch, labels[task], self.steps.count(task))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[str, Draw]]]:
        batches = {task: iter(sampler) for task, sampler in self.samplers.items()}
        for task in self.steps:
            yield [(task, draw) for draw in next(batches[task])]


def make_loader(dataset: Dataset, *, n_workers: int, pin_memory: bool, **more: object) -> DataLoader:
    """Return a loader of images (B, 3, S, S) uint8 and labels (B,) int64.

    Args:
        dataset: the images.
        n_workers: number of worker processes; 0 loads in this process.
        pin_memory: return page-locked tensors, for a GPU.
        **more: further arguments of DataLoader, such as batch_size.
    """
    return DataLoader(
        dataset,
        **more,
        num_workers=n_workers,
        pin_memory=pin_memory,
        # By default, each pass would draw a number from the generator that the losses use
        generator=torch.Generator(),
        # Share decoded images with the workers instead of copying them
        multiprocessing_context="fork" if n_workers and sys.platform == "linux" else None,
        worker_init_fn=functools.partial(leave_signals_to_the_owner, os.getpid()),
    )


def leave_signals_to_the_owner(owner: int, _: int) -> None:
    """Set up a loader worker: ignore Ctrl-C, which its owner handles, and end on SIGTERM or when its owner dies.

    PyTorch also ends orphaned workers, but not if the owner is killed just after the fork.

    Args:
        owner: process id of the owner.
        _: number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGKILL"):
        # PyTorch's handler would print a message of its own, but the owner reports that /dev/shm is full
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        processes.die_with_parent(owner, signal.SIGKILL)


def decode_all(loader: DataLoader) -> None:
    """Decode every image of a loader once, so that a broken one is found before training."""
    if loader.dataset.images.pixels is None:
        with Progress("decoding", len(loader.sampler)) as progress:
            for images, _ in loader:
                progress.update(len(images))


class Pool:
    """The loader workers of a run, which all its passes over images share.

    The first pass starts them and `close` ends them. A new pass ends the one before it.

    Args:
        datasets: the data sets to load from, by name.
        n_workers: see make_loader.
        pin_memory: see make_loader.
    """

    def __init__(self, datasets: Mapping[str, Dataset], n_workers: int, pin_memory: bool):
        self.dataset, self.batches = NamedDatasets(datasets), iter(())
        self.loader = make_loader(
            self.dataset,
            n_workers=n_workers,
            pin_memory=pin_memory,
            batch_sampler=self,
            persistent_workers=n_workers > 0,
        )

    def __iter__(self) -> Iterator[list]:
        """Return the batches of keys of the current pass; the pool is the batch sampler of its loader."""
        return self.batches

    def load(self, batches: Iterable[list]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Begin a pass: load batches of keys (name, item) and yield images and labels as make_loader does.

        Raises:
            RuntimeError: another pass has begun since.
        """
        self.batches = ours = iter(batches)
        for loaded in self.loader:
            yield loaded
            if self.batches is not ours:
                raise RuntimeError("another pass has begun in this pool and ended this one")

    def close(self) -> None:
        """End the workers.

        PyTorch has no public method for it, and the traceback of an exception would keep them alive.
        """
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None


@dataclass(eq=False)
class PoolLoader:
    """A loader whose batches a pool loads; each iteration over it starts a new pass of the pool.

    Args:
        pool: the pool that loads the batches.
        batches: batches of keys (name, item).
        dataset: the data set that they are from.
    """

    pool: Pool
    batches: Sequence[list] | TaskBatchSampler
    dataset: Dataset

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.pool.load(self.batches)

    @property
    def sampler(self) -> list:
        """The keys of this process's images in order, under the name that DataLoader uses."""
        return list(itertools.chain.from_iterable(self.batches))


def in_order(pool: Pool, name: str, batch_size: int) -> PoolLoader:
    """Return a loader of this process's share of one data set, in order and in whole batches."""
    dataset = pool.dataset.datasets[name]
    keys = [(name, index) for index in processes.shard(len(dataset), batch_size)]
    return PoolLoader(pool, [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)], dataset)


class Loaders(NamedTuple):
    """The loaders of a run; in each process they load its shard.

    Attributes:
        pool: the workers that load everything.
        sampler: draws `batches`.
        batches: the batches of an epoch's training steps.
        train_in_order: all training images in order.
        tests: each test set in order, by name.
        probe: the probed training images in order.
    """

    pool: Pool
    sampler: TaskBatchSampler
    batches: PoolLoader
    train_in_order: PoolLoader
    tests: dict[str, PoolLoader]
    probe: PoolLoader

    @property
    def images(self) -> ImageSet:
        """The training images."""
        return self.train_in_order.dataset.images

    @property
    def test_images(self) -> dict[str, ImageSet]:
        """The images of each test set."""
        return {name: loader.dataset.images for name, loader in self.tests.items()}


def build_loaders(
    train: ImageSet,
    tests: Mapping[str, ImageSet],
    tasks: Mapping[str, Namespace],
    *,
    probed: Sequence[int],
    batch_size: int,
    random_pick_p: float,
    flip: str,
    img_size: int,
    seed: int,
    n_workers: int,
    pin_memory: bool,
) -> Loaders:
    """Build all loaders of a run.

    Args:
        train: the training images.
        tests: the test sets by name.
        tasks: {task: its flags}, see options.PAIRS.
        probed: indices of the training images for the probe.
        batch_size: images in a training batch.
        random_pick_p: for the Shared task, see ClassBalancedBatchSampler.
        flip: tasks whose training images are flipped at random: "class", "both" or "none".
        img_size: side of the square network input in pixels.
        seed: seed of all draws.
        n_workers: see make_loader.
        pin_memory: see make_loader.
    """
    plain = ImageDataset(train, test_transform(img_size))
    sets: dict[str, Dataset] = {"train": plain, "probe": Subset(plain, probed)}
    for name, images in tests.items():
        sets[f"tests, {name}"] = ImageDataset(images, test_transform(img_size))
    samplers, share = {}, processes.shard(batch_size)
    for i, (name, task) in enumerate(tasks.items()):
        if task.task_p > 0:
            pick_p = random_pick_p if name == "Shared" else 0.0
            samplers[name] = ClassBalancedBatchSampler(batch_size, task.cs_per_bs, (seed, i), pick_p, share)
            flips = flip == "both" or (flip == "class" and name == "Class")
            sets[name] = ImageDataset(train, train_transform(img_size, flips))
    pool, sampler = Pool(sets, n_workers, pin_memory), TaskBatchSampler(samplers)
    size = min(batch_size, SCORING_BATCH_SIZE)
    return Loaders(
        pool=pool,
        sampler=sampler,
        batches=PoolLoader(pool, sampler, pool.dataset),
        train_in_order=in_order(pool, "train", size),
        tests={name: in_order(pool, f"tests, {name}", size) for name in tests},
        probe=in_order(pool, "probe", size),
    )


def count_warnings(name: str, train: ImageSet, tests: Mapping[str, ImageSet]) -> list[str]:
    """Return warnings about a data set.

    They are about counts that differ from the published ones, classes in training and test, classes that differ only in
    upper and lower case, images listed twice, and a missing torchcodec.
    """
    sets, warnings = {"train": train, **tests}, []
    counts = {split: row[:2] for split, row in split_table(train, tests).items()}
    counts["all"] = sum(len(images.class_names) for images in sets.values()), sum(map(len, sets.values()))
    for split, official in dataset_info(name).counts.items():
        if counts[split] != official:
            n_classes, n_images = counts[split]
            found = f"{counted(n_classes, 'class')} with {counted(n_images, 'image')}"
            warnings.append(f"{name}, {split}: {found}; officially {official[0]:,} with {official[1]:,}")
    for split, images in sets.items():
        both = sorted(set(images.class_names).intersection(train.class_names))
        if both and images is not train:
            warnings.append(f"{name}, {split}: {counted(len(both), 'class')} also in train: {first_few(both)}")
        n_twice = len(images) - len(set(images.names))
        if n_twice:
            warnings.append(f"{name}, {split}: {counted(n_twice, 'image')} listed before in the same split")
    spellings = defaultdict(set)
    for class_name in {class_name for images in sets.values() for class_name in images.class_names}:
        spellings[normal_form(class_name).casefold()].add(class_name)
    alike = sorted(" and ".join(sorted(names)) for names in spellings.values() if len(names) > 1)
    if alike:
        warnings.append(f"{name}: classes that differ in capital letters only: {first_few(alike)}; are they the same?")
    if NO_TORCHCODEC and train.pixels is None:
        warnings.append(f"torchcodec cannot be used ({NO_TORCHCODEC}): Pillow decodes JPEGs, at about half the speed")
    return warnings


def summary_lines(train: ImageSet, tests: Mapping[str, ImageSet]) -> list[str]:
    """Describe a data set: its layout, a table of its splits, images without a positive, and what was left out."""
    lines = [
        f"layout: {train.layout}",
        f"{'split':10} {'classes':>8} {'images':>8}  images per class: least, median, most; first and last class",
    ]
    for split, (classes, n_images, least, median, most, first, last) in split_table(train, tests).items():
        lines.append(f"{split:10} {classes:8} {n_images:8}  {least}, {median}, {most}; {first} to {last}")
    for split, images in {"train": train, **tests}.items():
        sizes, queries, where = np.bincount(images.labels) - 1, images.labels, ""
        if images.is_query is not None:
            sizes = np.bincount(images.labels[~images.is_query], minlength=len(images.class_names))
            queries, where = images.labels[images.is_query], " in the gallery"
        lost = queries[sizes[queries] == 0]
        if len(lost):
            found = f"{counted(len(lost), 'image')} with no other image of the class{where}"
            classes = first_few([images.class_names[label] for label in np.unique(lost)])
            lines.append(f"{split}: {found}; classes: {classes}")
    if train.factors:
        lines.append(f"known characteristics: {', '.join(train.factors)}")
    return lines + [f"left out: {note}" for note in train.left_out]


def split_table(train: ImageSet, tests: Mapping[str, ImageSet]) -> dict[str, tuple[int | str, ...]]:
    """Return {split: (classes, images, least, median and most images of a class, first class, last class)}.

    Queries and gallery count as splits.
    """
    labels = {}
    for split, images in {"train": train, **tests}.items():
        if images.is_query is None:
            labels[split] = images, images.labels
        else:
            labels["query"] = images, images.labels[images.is_query]
            labels["gallery"] = images, images.labels[~images.is_query]
    table = {}
    for split, (images, chosen) in labels.items():
        found, sizes = np.unique(chosen, return_counts=True)
        ends = images.class_names[found[0]], images.class_names[found[-1]]
        table[split] = (len(sizes), len(chosen), int(sizes.min()), int(np.median(sizes)), int(sizes.max()), *ends)
    return table


def decoding_errors(image_sets: Sequence[ImageSet]) -> list[str | None]:
    """Decode all images of some sets and return, for each in order, why it cannot be decoded; None if it can."""

    def error_of(images: ImageSet, index: int) -> str | None:
        try:
            images.read(index)
        except InputError as error:
            return str(error)
        return None

    sources = [(images, index) for images in image_sets for index in range(len(images))]
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(error_of, *zip(*sources))
        return list(tqdm(jobs, "decoding", len(sources), unit="img", disable=None))


def main(argv: list[str] | None = None) -> int:
    """Print what a data set holds and, with --check, which images are broken; return the exit code."""
    parser = OneLineParser(prog="datasets.py", description="Report what a data set holds, or what is wrong with it.")
    add = parser.add_argument
    add("name", help="name of the data set, as for main.py --dataset")
    add("--source_path", type=os.path.expanduser, default="./Datasets", help="folder that holds the data sets")
    add("--check", action="store_true", help="decode every image and list the broken ones")
    args = parser.parse_args(argv)
    try:
        check_name(args.name, args.source_path, flag="")
        train, tests = load_dataset(args.name, args.source_path)
    except InputError as error:
        print(f"datasets.py: error: {error}", file=sys.stderr)
        return 2
    print(*summary_lines(train, tests), sep="\n")
    for warning in count_warnings(args.name, train, tests):
        print(f"warning: {warning}")
    if not args.check:
        return 0
    broken = list(filter(None, decoding_errors([train, *tests.values()])))
    print(*broken, f"{counted(len(broken), 'image')} cannot be decoded", sep="\n")
    return 2 if broken else 0


if __name__ == "__main__":
    set_up_output()
    with logged(), one_line_errors("datasets.py"):
        sys.exit(main())
