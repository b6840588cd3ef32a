"""Data sets: split readers, decoding and transforms, class-balanced batches, and the built-in rendered set.

A reader turns a folder into an ImageSet to train on and the test sets by name. Labels and folders are sorted, so that
runs repeat.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from skimage.color import hsv2rgb
from skimage.draw import polygon
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # deprecated there since 0.29; Pillow gives the same pixels, more slowly
    decode_image = None

Draw = tuple[int, int, int]
"""One image of a batch: (image index, label it is trained with, seed of its augmentation)."""


class DatasetError(ValueError):
    """A data set is missing, unusable or holds an image that cannot be read; the message is for the user.

    It is one line, but for a missing data set, whose diagnosis has several.
    """

    def __init__(self, message: str):
        # A DataLoader worker's error arrives as "Caught ... Original Traceback ... DatasetError: message".
        super().__init__(printable(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1]))


def printable(text: str) -> str:
    """Return a text with the bytes of file names that are not in the system's encoding spelt out."""
    return text.encode(errors="backslashreplace").decode()


def first_few(names: Sequence[str]) -> str:
    """Return the first three of some names as text."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


class PixelStore:
    """Decoded images of any size, one after the other in one flat array.

    flat: (sum of H * W * 3) uint8, or the path of a file that holds it and is mapped into memory: spawned workers
    are then given its path instead of a copy. sizes: (N, 2) int64 heights and widths. Indexing gives an (H, W, 3) view.
    """

    def __init__(self, flat: np.ndarray | Path, sizes: np.ndarray):
        self.path = flat if isinstance(flat, Path) else None
        self.flat, self.sizes = flat if self.path is None else np.memmap(flat, np.uint8, "c"), sizes
        self.ends = np.cumsum(3 * sizes.prod(1))

    def __reduce__(self) -> tuple:
        return PixelStore, (self.flat if self.path is None else self.path, self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        height, width = self.sizes[index]
        return self.flat[self.ends[index] - 3 * height * width : self.ends[index]].reshape(height, width, 3)


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    names: N file paths, or names of rendered images. labels: (N,) int64 in [0, n_classes). class_names: one per class.
    pixels: decoded images, (N, H, W, 3) uint8 or a PixelStore; None where `names` are files to decode.
    factors: known characteristics shared across classes, name to (N,) int64 levels; empty for photographs.
    is_query: (N,) bool for a test set whose queries are searched in the other images, its gallery; None where each
    image is searched in all others. warnings: what its reader found odd, a line each.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    pixels: np.ndarray | PixelStore | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    is_query: np.ndarray | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> torch.Tensor:
        """Return image `index` as a (3, H, W) uint8 RGB tensor. Raises DatasetError when it cannot be decoded."""
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)
        return read_image(self.names[index])


def read_image(path: str) -> torch.Tensor:
    """Decode an image file to a (3, H, W) uint8 RGB tensor.

    JPEG goes through torchvision's decoder (the pixels of Pillow in less time), everything else, and what that decoder
    refuses, through Pillow. Raises DatasetError that names the file.
    """
    if decode_image is not None and path.lower().endswith((".jpg", ".jpeg")):
        # Pillow reads more kinds of JPEG, and says better what is wrong with the others
        with contextlib.suppress(RuntimeError, UnicodeEncodeError):  # the latter: names that are not UTF-8
            image = decode_image(path, mode=ImageReadMode.RGB)
            if image.dtype == torch.uint8 and image.shape[:-2] == (3,):  # not so for other formats under that name
                return image
    with opened_image(path) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which convert would clip to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@contextlib.contextmanager
def opened_image(path: str) -> Iterator[Image.Image]:
    """Open an image file with Pillow. Raises DatasetError that names the file for whatever goes wrong with it."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DatasetError(f"cannot decode the image {path} ({reason}); repair or remove it") from error


def cached(
    image_sets: Sequence[ImageSet], kind: str, folder: Path, names: Sequence[str], n_copies: int = 1
) -> list[ImageSet]:
    """Return image sets with all images decoded, so that reading one costs nothing; the pixels are the same.

    kind: "none" changes nothing; "ram" keeps them in memory, which forked workers share; "disk" keeps them in
    memory-mapped files of `folder`, called after `names`, that later runs reuse until an image file changes. n_copies:
    how many processes of this machine do the same at the same time, each with memory of its own.
    Raises DatasetError when they do not all fit, before any is decoded, or when an image cannot be decoded.
    """
    decoded = list(image_sets)
    todo = [i for i, images in enumerate(decoded) if images.pixels is None and kind != "none"]
    paths = {i: folder / f"decoded_{names[i]}_{fingerprint(decoded[i].names)}.bin" for i in todo}
    for i in todo if kind == "disk" else ():
        decoded[i] = replace(decoded[i], pixels=open_store(paths[i], len(decoded[i])))
    todo = [i for i in todo if decoded[i].pixels is None]
    if not todo:
        return decoded
    with ThreadPoolExecutor() as pool:
        sizes = {i: np.array(list(pool.map(image_size, decoded[i].names)), dtype=np.int64) for i in todo}
    n_bytes = sum(int(3 * of_set.prod(1).sum()) for of_set in sizes.values())
    require_room(kind, folder, n_bytes * (n_copies if kind == "ram" else 1))
    for i in todo:
        if kind == "ram":
            store = PixelStore(np.empty(int(3 * sizes[i].prod(1).sum()), np.uint8), sizes[i])
            decode_into(store, decoded[i].names, names[i])
        else:
            store = write_store(paths[i], sizes[i], decoded[i].names, names[i])
        decoded[i] = replace(decoded[i], pixels=store)
    return decoded


def decode_into(store: PixelStore, paths: list[str], name: str) -> None:
    """Decode images, each into its place, with a progress bar that tells the set's name."""

    def fill(index: int) -> None:
        """Decode one image."""
        store[index][:] = read_image(paths[index]).permute(1, 2, 0).numpy()

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(fill, range(len(paths))), f"decoding {name}", len(paths), unit="img", disable=None))


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a DatasetError."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"--cache disk: the decoded images cannot be kept in {folder} ({error.strerror}); use --cache none, or "
            "another --save_path"
        ) from error


def open_store(path: Path, n_images: int) -> PixelStore | None:
    """Return the decoded images of a file and of the sizes beside it, None where the two are not there or not whole."""
    try:
        sizes = np.load(path.with_suffix(".npy"))
        is_whole = sizes.shape == (n_images, 2) and path.stat().st_size == 3 * sizes.prod(1).sum()
        return PixelStore(path, sizes) if is_whole else None
    except (OSError, ValueError, EOFError):
        return None


def write_store(path: Path, sizes: np.ndarray, image_paths: list[str], name: str) -> PixelStore:
    """Decode images into a file that takes its name once it is whole; return it mapped. Raises DatasetError."""
    temporary, temporary_sizes = (path.with_suffix(f".{os.getpid()}.{kind}") for kind in ("part", "npy"))
    n_bytes = int(3 * sizes.prod(1).sum())
    try:
        with cache_errors(path.parent):
            with open(temporary, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up kills the process at a later write
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                file.truncate(n_bytes)
            store = PixelStore(np.memmap(temporary, np.uint8, "r+"), sizes)
            decode_into(store, image_paths, name)
            store.flat.flush()
            np.save(temporary_sizes, sizes)
            temporary_sizes.rename(path.with_suffix(".npy"))
            temporary.rename(path)
            remove_stale_caches(path.parent, name, path)
    except BaseException:
        for unfinished in (temporary, temporary_sizes):
            with contextlib.suppress(OSError):
                unfinished.unlink()
        raise
    return open_store(path, len(sizes)) or store  # the latter where another run has replaced the file already


def remove_stale_caches(folder: Path, name: str, current: Path) -> None:
    """Remove cache files that `current` replaces, and what killed runs left half-built more than a day ago."""
    for stale in folder.glob(f"decoded_{name}_*.bin"):
        if stale != current:
            stale.unlink(missing_ok=True)
            stale.with_suffix(".npy").unlink(missing_ok=True)
    for unfinished in folder.glob(f"decoded_{name}_*.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - unfinished.stat().st_mtime > 24 * 3600:
                unfinished.unlink()


def fingerprint(paths: list[str]) -> str:
    """Return a digest of files' paths, sizes and times of change. Raises DatasetError for a file that is not there."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    except OSError as error:
        raise DatasetError(f"cannot read the image {path} ({error.strerror}); repair or remove it") from error
    return digest.hexdigest()[:16]


def contents_digest(image_sets: Sequence[ImageSet]) -> str:
    """Return a digest of the images' names, without their folders, and labels."""
    digest = hashlib.sha256()
    for images in image_sets:
        names = (os.path.basename(name).encode(errors="surrogateescape") for name in images.names)
        digest.update(b"\0".join(names) + images.labels.tobytes())
    return digest.hexdigest()


def image_size(path: str) -> tuple[int, int]:
    """Return (height, width) from an image file's header. Raises DatasetError that names the file."""
    with opened_image(path) as image:
        return image.height, image.width


def require_room(kind: str, folder: Path, n_bytes: int) -> None:
    """Raise DatasetError where decoded images do not fit in memory, or on the disk of a folder, which is made."""
    if kind == "ram":
        free = free_memory()
    else:
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
    if free is not None and n_bytes > 0.9 * free:
        where, instead = ("of memory", "disk") if kind == "ram" else (f"in {folder}", "none")
        raise DatasetError(
            f"--cache {kind}: the decoded images take {n_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB {where} are "
            f"free; use --cache {instead}"
        )


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may still take, None where the system does not say."""
    limits = []
    with contextlib.suppress(OSError, StopIteration), open(root / "proc/meminfo", encoding="ascii") as file:
        limits.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    groups = []  # of a container or a job: each limit on the way up holds
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, group in groups:
        if controllers not in ("", "memory"):
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        path = root / "sys/fs/cgroup" / controllers / group.strip("/")
        for folder in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # a limit "max" is none
                free = int((folder / f"memory.{limit}").read_text()) - int((folder / f"memory.{used}").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # what files were read lately is counted as used, and given back when it is needed
                limits.append(free + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return min(limits, default=None)


def train_transform(img_size: int, flip: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the training augmentation, uint8 to uint8 (3, img_size, img_size): random resized crop, optional flip."""
    steps = [v2.RandomResizedCrop(img_size, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip(0.5))
    return v2.Compose(steps)


def test_transform(img_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the evaluation transform, uint8 to uint8 (3, img_size, img_size): short side to 256/224 of it, centre."""
    return v2.Compose([v2.Resize(round(img_size * 256 / 224), antialias=True), v2.CenterCrop(img_size)])


class ImageDataset(Dataset):
    """The images of a split through a transform, all uint8: the network normalises on the device.

    An item is asked for by a Draw, or by a plain image index for evaluation. The mined-label view of the images is this
    same data set asked with draws whose labels are mined ones.
    """

    def __init__(self, images: ImageSet, transform: Callable[[torch.Tensor], torch.Tensor]):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Draw | int) -> tuple[torch.Tensor, int]:
        """Return (image (3, S, S) uint8, label). The augmentation depends on the draw's seed alone, on no worker."""
        index, label, seed = key if isinstance(key, tuple) else (key, int(self.images.labels[key]), 0)
        image = self.images.read(index)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        image = self.transform(image)
        torch.set_rng_state(state)
        return image, label


class ClassBalancedBatchSampler(BatchSampler):
    """Batches of class runs: `images_per_class` images of one class, then of the next (MIC's published batches).

    The next class is uniform among all but the two drawn just before it. Within a run no image repeats unless the
    class is too small. With images_per_class 1 all images are shuffled instead. The order depends on the seed and on
    what `set_epoch` is given, on nothing else.

    batch_size: a multiple of images_per_class. seed: integers that set this sampler's draws apart from others.
    random_pick_p: probability that an image is replaced by a random image of a random class while its label stays.
    share: which places of each batch are given out, for a process that loads a part of it; None: all.
    """

    def __init__(
        self,
        batch_size: int,
        images_per_class: int,
        seed: tuple[int, ...],
        random_pick_p: float = 0.0,
        share: range | None = None,
    ):
        if batch_size % images_per_class:
            raise ValueError(f"batch size {batch_size} is not a multiple of {images_per_class} images per class")
        self.batch_size, self.images_per_class = batch_size, images_per_class
        self.seed, self.random_pick_p = seed, random_pick_p
        self.share = range(batch_size) if share is None else share
        self.set_epoch(0, np.empty(0, dtype=np.int64), 0)

    def set_epoch(self, epoch: int, labels: np.ndarray, n_batches: int) -> None:
        """Name all that the next pass depends on: the epoch, the (N,) int labels and how many batches are wanted."""
        self.epoch, self.labels, self.n_batches = epoch, labels, n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([*self.seed, self.epoch])
        order = np.argsort(self.labels, kind="stable")
        classes, starts = np.unique(self.labels[order], return_index=True)
        members = np.split(order, starts[1:])
        stream = self._shuffled(rng) if self.images_per_class == 1 else self._class_runs(members, classes, rng)
        for _ in range(self.n_batches):
            seeds = rng.integers(2**63, size=self.batch_size)
            batch = [(*self._maybe_replaced(next(stream), members, rng), int(seed)) for seed in seeds]
            yield batch[self.share.start : self.share.stop]

    def _shuffled(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        while True:
            for index in rng.permutation(len(self.labels)):
                yield int(index), int(self.labels[index])

    def _class_runs(
        self, members: list[np.ndarray], classes: np.ndarray, rng: np.random.Generator
    ) -> Iterator[tuple[int, int]]:
        n_excluded = min(2, len(classes) - 1)
        recent: list[int] = []
        while True:
            drawn = int(rng.integers(len(classes) - len(recent)))
            for earlier in sorted(recent):
                drawn += drawn >= earlier
            recent = [*recent, drawn][-n_excluded:] if n_excluded else []
            for index in draw_run(members[drawn], self.images_per_class, rng):
                yield int(index), int(classes[drawn])

    def _maybe_replaced(
        self, draw: tuple[int, int], members: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[int, int]:
        if self.random_pick_p == 0 or rng.random() >= self.random_pick_p:
            return draw
        return int(rng.choice(members[rng.integers(len(members))])), draw[1]


def draw_run(members: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `size` of a class's images: none twice where the class is large enough, else as evenly as can be."""
    rounds = -(-size // len(members))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])[:size]


def make_loader(
    dataset: ImageDataset,
    *,
    n_workers: int,
    pin_memory: bool,
    batch_sampler: BatchSampler | None = None,
    batch_size: int = 1,
    share: range | None = None,
) -> DataLoader:
    """Return a loader of (images (B, 3, S, S) uint8, labels (B,) int64).

    With a batch_sampler (training) the workers live as long as the loader; without one all images, or those of a
    process's share, come once, in order, `batch_size` at a time.
    """
    # Its own generator: else each pass would take a number from the one that the losses draw from
    loading = {"num_workers": n_workers, "pin_memory": pin_memory, "generator": torch.Generator()}
    loading["worker_init_fn"] = leave_signals_to_the_owner
    if n_workers and sys.platform == "linux":
        loading["multiprocessing_context"] = "fork"  # shares decoded images with the workers instead of copying them
    if batch_sampler is None:
        return DataLoader(dataset, batch_size, sampler=share, **loading)
    return DataLoader(dataset, batch_sampler=batch_sampler, persistent_workers=n_workers > 0, **loading)


WORKER_GRACE = 3.0
"""Seconds that a loader worker that is told SIGTERM leaves its owner to stop it in order."""


def leave_signals_to_the_owner(_: int) -> None:
    """Let the owner, not its workers, answer what a terminal or a scheduler sends to all processes of a run.

    A worker ends by itself some seconds after SIGTERM: an interpreter that exits sends it and waits for the worker.
    """

    def end_later(*_: object) -> None:
        """End this process, quietly, if the owner has not done so by then."""
        timer = threading.Timer(WORKER_GRACE, os._exit, args=(0,))
        timer.daemon = True
        timer.start()

    signal.set_wakeup_fd(-1)  # the owner's, which is not to hear of the worker's signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


Splits = tuple[ImageSet, dict[str, ImageSet]]
"""Training images, and the test sets by name: one that is called "", or several that are scored separately."""


@dataclass(frozen=True)
class Published:
    """What is known of a published data set.

    archive: folder that its official archive unpacks to. landmarks: any of these paths marks the data set's folder.
    layout: what is expected there, in words. counts: split to (classes, images) as published.
    """

    archive: str
    landmarks: tuple[str, ...]
    layout: str
    url: str
    counts: dict[str, tuple[int, int]]


PUBLISHED = {
    "cub200": Published(
        "CUB_200_2011",
        ("images",),
        "images/<class>/<image>",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        {"all": (200, 11788)},
    ),
    "cars196": Published(
        "cars196",
        ("images", "car_ims"),
        "images/<class>/<image>, or car_ims/<image> with cars_annos.mat",
        "http://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {"all": (196, 16185)},
    ),
    "online_products": Published(
        "Stanford_Online_Products",
        ("images", "Info_Files", "Ebay_train.txt"),
        "images/<category>/<image> and Info_Files/Ebay_train.txt, Ebay_test.txt, or all of them in one folder",
        "https://cvgl.stanford.edu/projects/lifted_struct",
        {"all": (22634, 120053), "train": (11318, 59551), "test": (11316, 60502)},
    ),
    "in-shop": Published(
        "In-shop Clothes Retrieval Benchmark",
        ("img", "Img/img"),
        "img/... or Img/img/..., and Eval/list_eval_partition.txt",
        "http://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        {"all": (7982, 52712), "train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
    ),
    "vehicle_id": Published(
        "VehicleID_V1.0",
        ("image",),
        "image/<number>.jpg and train_test_split/train_list.txt, test_list_800.txt, ...",
        "https://www.pkuml.org/resources/pku-vehicleid.html",
        {"train": (13164, 110178), "Set 1": (800, 6493), "Set 2": (1600, 13377), "Set 3": (2400, 19777)},
    ),
}


def locate(name: str, source_path: Path) -> Path:
    """Return the folder of a data set in source_path. Raises DatasetError that says what was looked for and found.

    It is source_path/name, or for a published set also the folder of its official archive, there or in it.
    """
    known = PUBLISHED.get(name, Published(name, ("images",), "images/<class>/<image>", "", {}))
    candidates = list(
        dict.fromkeys([source_path / name, source_path / name / known.archive, source_path / known.archive])
    )
    for root in candidates:
        if is_marked(root, known):
            return root
    lines = [f"no images of --dataset {name} in --source_path {source_path}"]
    lines.append(f"looked for  {known.layout} in {' or '.join(map(str, candidates))}")
    present = [folder for folder in (*candidates, source_path) if os.path.isdir(folder)]
    found = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines.append(f"found       {found or f'no folder {source_path}'}")
    dead = [
        path
        for path in (source_path, *candidates, *(root / mark for root in candidates for mark in known.landmarks))
        if os.path.islink(path) and not os.path.exists(path)
    ]
    if dead:
        lines.append(f"to do       {dead[0]} is a dead link to {os.readlink(dead[0])}: mend it")
    else:
        lines.append(f"to do       {advise(known, name, source_path, present)}")
    if known.url:
        lines.append(f"get it at   {known.url}")
    raise DatasetError("\n  ".join(lines))


def is_marked(folder: Path, known: Published) -> bool:
    """Tell whether a folder is that of a data set. Raises DatasetError where the system does not let us look."""
    try:
        return any((folder / landmark).exists() for landmark in known.landmarks)
    except OSError as error:
        raise DatasetError(f"cannot look into the folder {folder} ({error.strerror})") from error


def advise(known: Published, name: str, source_path: Path, present: list[Path]) -> str:
    """Return what to do about a data set that is not where it is expected, as far as its surroundings tell."""
    target, here = source_path / name, source_path.absolute()
    if is_marked(source_path, known):
        known_folders = {*PUBLISHED, *(published.archive for published in PUBLISHED.values())}
        if known_folders.intersection(listing(source_path).folders):
            marks = " and ".join(mark for mark in known.landmarks if (source_path / mark).exists())
            return (
                f"{source_path} holds other data sets too: move {marks}, and the lists that belong to it, to {target}"
            )
        return f"{source_path} is the data set itself: name it {name} and give its parent as --source_path"
    takes_classes = known.layout.startswith("images/<class>")
    if takes_classes and here.name == "images" and holds_classes(here):
        return f"{here} is the data set's folder of images: name {here.parent} {name}, and give {here.parent.parent}"
    for folder in present:
        children = [folder / child for child in listing(folder).folders]
        for child in children if folder != source_path else ():  # beside it may lie another data set
            with contextlib.suppress(DatasetError):  # which no one may look into, and which is none then
                if is_marked(child, known):
                    return f"it lies one level off: rename or move {child} to {target}"
        for place in (folder, *(children if folder != source_path else ())):
            archives = [file for file in files_in(place) if file.lower().endswith(ARCHIVES)]
            if archives:
                return f"unpack {place / archives[0]}"
        if takes_classes and folder != source_path and holds_classes(folder):
            return f"move the class folders from {folder} to {target / 'images'}"
    return "give the folder that holds the data set's folder as --source_path"


ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def holds_classes(folder: Path) -> bool:
    """Tell whether subfolders of a folder hold images."""
    return any(file.lower().endswith(IMAGES) for child in listing(folder).folders for file in files_in(folder / child))


def files_in(folder: Path) -> list[str]:
    """Return the files of a folder, none where it cannot be listed."""
    with contextlib.suppress(DatasetError):
        return listing(folder).files
    return []


class Listing(NamedTuple):
    """The sorted names in a folder, without hidden ones. dead_links: links to what is not there."""

    folders: list[str]
    files: list[str]
    dead_links: list[str]


def listing(folder: Path) -> Listing:
    """Return what a folder holds; pipes and sockets are neither files nor folders. Raises DatasetError."""
    folders, files, dead = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif entry.is_symlink():
                    dead.append(entry.name)
    except OSError as error:
        raise DatasetError(f"cannot list the folder {folder} ({error.strerror})") from error
    return Listing(sorted(folders), sorted(files), sorted(dead))


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    names = [name for names in listing(folder) for name in names]
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises DatasetError when there are fewer than two classes
    with images on either side, or folders that would be classes if their images were in place.
    """
    images = root / "images"
    folders, files, dead = listing(images)
    require_no_dead_links(images, dead, len(folders) + len(dead), "class folders")
    inside = {name: listing(images / name) for name in folders}
    dead = [f"{name}/{link}" for name in folders for link in inside[name].dead_links]
    require_no_dead_links(images, dead, len(dead) + sum(len(found.files) for found in inside.values()), "images")
    deeper = [
        f"{name}/{inside[name].folders[0]}" for name in folders if inside[name].folders and not inside[name].files
    ]
    if deeper:
        raise DatasetError(
            f"{images}: {len(deeper)} of {len(folders)} class folders hold no images but folders, {first_few(deeper)}; "
            f"move the images to {images}/<class>/<image>"
        )
    if files and len(folders) < 4:
        raise DatasetError(f"{images} holds images of no class, {first_few(files)}; move each to {images}/<class>")
    empty = [name for name in folders if not inside[name].files]
    note = (f"{images}: {len(empty)} folders without images are no classes: {first_few(empty)}",) if empty else ()
    train, tests = split_halves(
        images, images, {name: [f"{name}/{file}" for file in inside[name].files] for name in folders}
    )
    return replace(train, warnings=note), tests


def require_no_dead_links(where: Path, dead: list[str], n_names: int, what: str) -> None:
    """Raise DatasetError that names the first of some dead links, and says how many of how many names they are."""
    if dead:
        raise DatasetError(
            f"{where}: {len(dead)} of {n_names} {what} are dead links: {first_few(dead)}; mend or remove them"
        )


def split_halves(source: Path, folder: Path, per_class: dict[str, list[str]]) -> Splits:
    """Return the first half of the classes with images to train and the rest to test; paths are below the folder.

    source: what names the classes. Raises DatasetError when there are fewer than two classes on either side.
    """
    per_class = {name: files for name, files in per_class.items() if files}
    names = list(per_class)
    if len(names) < 4:
        raise DatasetError(
            f"{source} holds {len(names)} classes with images; at least 4 are needed: 2 to train, 2 to test"
        )
    half = len(names) // 2
    train, test = (
        ImageSet(
            names=[os.path.join(folder, path) for name in side for path in per_class[name]],
            labels=np.repeat(np.arange(len(side)), [len(per_class[name]) for name in side]),
            class_names=side,
        )
        for side in (names[:half], names[half:])
    )
    return train, {"": test}


def hold_out_classes(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Return the training images without the last classes, and those: fraction of the classes, rounded.

    Raises DatasetError where that leaves fewer than two classes on either side.
    """
    n_classes = len(images.class_names)
    n_kept = n_classes - round(fraction * n_classes)
    if not 2 <= n_kept <= n_classes - 2:
        raise DatasetError(
            f"--val_classes {fraction}: holds out {n_classes - n_kept} of {n_classes} training classes; at least 2 are "
            "needed to train and 2 to score on"
        )
    return class_range(images, 0, n_kept), class_range(images, n_kept, n_classes)


def class_range(images: ImageSet, first: int, stop: int) -> ImageSet:
    """Return the images of the classes from first up to stop, whose labels then count from 0."""
    chosen = np.flatnonzero((images.labels >= first) & (images.labels < stop))
    return replace(
        images,
        names=[images.names[i] for i in chosen],
        labels=images.labels[chosen] - first,
        class_names=images.class_names[first:stop],
        pixels=None if images.pixels is None else images.pixels[chosen],
        factors={name: levels[chosen] for name, levels in images.factors.items()},
    )


def read_cars(root: Path) -> Splits:
    """Read CARS196: class folders, or the official archive's car_ims with the annotations in cars_annos.mat.

    The classes' order is that of the folders or of the file; the first half of those with images trains.
    """
    if (root / "images").is_dir():
        return read_class_folders(root)
    path = first_existing(root, "cars_annos.mat", "../cars_annos.mat")
    try:
        annotations = loadmat(path, squeeze_me=True)
        class_names = [str(name) for name in np.atleast_1d(annotations["class_names"])]
        rows = np.atleast_1d(annotations["annotations"])
        files = [str(file) for file in rows["relative_im_path"]]
        labels = rows["class"].astype(int)
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read as the annotations of CARS196 ({error})") from error
    if not labels.size or labels.min() < 1 or labels.max() > len(class_names):
        raise DatasetError(f"{path}: {len(class_names)} class names and {labels.size} labels that do not fit them")
    require_images(path, root, files)
    per_class: dict[str, list[str]] = {name: [] for name in class_names}
    for file, label in zip(files, labels):
        per_class[class_names[label - 1]].append(file)
    return split_halves(path, root, per_class)


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists, `image_id class_id super_class_id path` under a header."""
    images = root / "images" if (root / "images").is_dir() else root
    splits = []
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        _, rows = read_rows(path, r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)", "image_id class_id super_class_id path")
        splits.append(listed_split(path, images, [row[3] for row in rows], [int(row[1]) for row in rows]))
    return splits[0], {"": splits[1]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes: list_eval_partition.txt, a count, a header and `image_name item_id evaluation_status`."""
    images = root if (root / "img").is_dir() else root / "Img"
    path = first_existing(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    pattern = r"(.+?)\s+(\S+)\s+(train|query|gallery)"
    count, rows = read_rows(path, pattern, "image_name item_id evaluation_status", has_count=True)
    train = [row for row in rows if row[2] == "train"]
    test = [row for row in rows if row[2] != "train"]
    for status in ("query", "gallery"):
        if not any(row[2] == status for row in test):
            raise DatasetError(f"{path}: lists no image with the status {status}")
    train_set, test_set = (
        listed_split(path, images, [row[0] for row in side], [row[1] for row in side]) for side in (train, test)
    )
    if count != len(rows):
        note = f"{path}: lists {len(rows)} images; its first line says {count}"
        train_set = replace(train_set, warnings=(note,))
    return train_set, {"": replace(test_set, is_query=np.array([row[2] == "query" for row in test]))}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID: lists of `image_number vehicle_id`, one to train and three test sets scored separately."""
    splits = {}
    for split, file in (("train", "train_list"), *((f"Set {i}", f"test_list_{800 * i}") for i in (1, 2, 3))):
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        _, rows = read_rows(path, r"(\d+)\s+(\d+)", "image_number vehicle_id", has_header=False)
        files = [f"image/{int(row[0]):07d}.jpg" for row in rows]
        splits[split] = listed_split(path, root, files, [int(row[1]) for row in rows])
    return splits.pop("train"), splits


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists. Raises DatasetError."""
    for option in options:
        if (root / option).is_file():
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    name = os.path.basename(options[0])
    places = (root.parent / name, *(path for depth in ("", "*/", "*/*/") for path in root.glob(depth + name)))
    elsewhere = [path for path in places if path.is_file()]
    advice = f"\n  to do       move {elsewhere[0]} to {root / options[0]}" if elsewhere else ""
    raise DatasetError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}{advice}")


def read_rows(
    path: Path, pattern: str, columns: str, *, has_header: bool = True, has_count: bool = False
) -> tuple[int, list[tuple[str, ...]]]:
    """Return the rows of a list file, each the groups of a pattern, and the count above them, 0 where there is none.

    columns: their names, which the header must be. Blank lines are skipped. Raises DatasetError that names a bad line.
    """
    try:
        # A mark that Windows' editors put first is dropped; names in another encoding come out as the disk has them
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, start=1) if not line.isspace()]
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error
    wanted = [("the number of images", r"(\d+)")] if has_count else []
    wanted += [(f"the header {columns}", r"\s+".join(columns.split()))] if has_header else []
    n_above = len(wanted)
    row = f"{columns}, ids as whole numbers" if pattern.startswith(r"(\d") else f"{columns}: train, query or gallery"
    matches = []
    for i, (number, line) in enumerate(lines):
        what, form = wanted[i] if i < n_above else (row, pattern)
        matches.append(re.fullmatch(form, line, re.ASCII))
        if matches[-1] is None:
            raise DatasetError(f"{path}, line {number}: expected {what}, found {line[:80]!r}")
    if len(matches) <= n_above:
        raise DatasetError(f"{path}: holds no images")
    return int(matches[0][1]) if has_count else 0, [match.groups() for match in matches[n_above:]]


def listed_split(list_path: Path, folder: Path, files: list[str], ids: list) -> ImageSet:
    """Return the ImageSet of listed files below a folder; classes are the distinct ids, sorted.

    Raises DatasetError when fewer than two classes or images that are not on disk are listed.
    """
    require_images(list_path, folder, files)
    class_ids, labels = np.unique(np.array(ids), return_inverse=True)
    if len(class_ids) < 2:
        raise DatasetError(f"{list_path}: lists {len(class_ids)} classes of a split; at least 2 are needed")
    return ImageSet([os.path.join(folder, file) for file in files], labels, [str(value) for value in class_ids])


def require_images(list_path: Path, folder: Path, files: list[str]) -> None:
    """Raise DatasetError that names the first listed files that are not on disk, and says how many there are."""
    on_disk: dict[str, tuple[set[str], set[str]]] = {}
    missing, dead = [], []
    for file in files:
        parent, name = os.path.split(file)
        if parent not in on_disk:
            found = listing(folder / parent) if (folder / parent).is_dir() else Listing([], [], [])
            on_disk[parent] = set(found.files), set(found.dead_links)
        if name not in on_disk[parent][0]:
            (dead if name in on_disk[parent][1] else missing).append(file)
    require_no_dead_links(folder, dead, len(files), f"images that {list_path} lists")
    if missing:
        raise DatasetError(
            f"{list_path}: {len(missing)} of {len(files)} listed images are not on disk below {folder}: "
            f"{first_few(missing)}"
        )


def count_warnings(name: str, train: ImageSet, tests: dict[str, ImageSet]) -> list[str]:
    """Return a line for whatever is odd: counts of a published data set that differ from the official ones, classes
    that train and test, images that a split holds twice, and what the readers found."""
    sets = split_table(train, tests)
    if len(tests) == 1:
        sets["all"] = (
            sum(len(images.class_names) for images in (train, *tests.values())),
            sum(len(images) for images in (train, *tests.values())),
        )
    expected = PUBLISHED[name].counts if name in PUBLISHED else {}
    warnings = [
        f"{name}, {split}: {sets[split][0]} classes with {sets[split][1]} images; officially {classes} with {n_images}"
        for split, (classes, n_images) in expected.items()
        if sets[split][:2] != (classes, n_images)
    ]
    for split, images in {"train": train, **tests}.items():
        where = f"{name}, {split or 'test'}"
        both = sorted(set(images.class_names).intersection(train.class_names)) if images is not train else []
        if both:
            warnings.append(f"{where}: {len(both)} classes are trained on too: {first_few(both)}")
        n_twice = len(images) - len(set(images.names))
        if n_twice:
            warnings.append(f"{where}: {n_twice} of {len(images)} images are listed before in the same split")
        warnings += images.warnings
    return [printable(warning) for warning in warnings]


def split_table(train: ImageSet, tests: dict[str, ImageSet]) -> dict[str, tuple[int, ...]]:
    """Return split to (classes, images, least, median and most images of a class)."""
    splits = {"train": train.labels}
    for name, images in tests.items():
        if images.is_query is None:
            splits[name or "test"] = images.labels
        else:
            splits["query"], splits["gallery"] = images.labels[images.is_query], images.labels[~images.is_query]
    table = {}
    for name, labels in splits.items():
        sizes = np.unique(labels, return_counts=True)[1]
        table[name] = (len(sizes), len(labels), int(sizes.min()), int(np.median(sizes)), int(sizes.max()))
    return table


SHAPES_CLASSES, SHAPES_PER_CLASS, SHAPES_SIZE = 48, 24, 64
BACKGROUNDS = np.array(
    [[0.85, 0.35, 0.3], [0.3, 0.7, 0.35], [0.3, 0.4, 0.85], [0.9, 0.85, 0.4], [0.35, 0.3, 0.4], [0.85, 0.85, 0.85]]
)
SHAPES_FACTORS = {"background": len(BACKGROUNDS), "orientation": 4, "size": 3, "light": 4}


def render_shapes() -> Splits:
    """Render the built-in data set: 48 classes of 24 images, 64 x 64; the first half trains, the second half tests.

    A class is an object with its own outline and its own two-colour stripe pattern. Characteristics shared across the
    classes are known: background colour, orientation, size and direction of the light. Each class has every level of
    each factor equally often, so a factor says nothing about the class.
    """
    pixels, levels = [], {factor: [] for factor in SHAPES_FACTORS}
    for label in range(SHAPES_CLASSES):
        rng = np.random.default_rng([2019, label])
        draw_object = shape_class(rng)
        schedule = {
            factor: rng.permutation(np.arange(SHAPES_PER_CLASS) % n_levels)
            for factor, n_levels in SHAPES_FACTORS.items()
        }
        for i in range(SHAPES_PER_CLASS):
            pixels.append(draw_object({factor: int(values[i]) for factor, values in schedule.items()}, rng))
        for factor, values in schedule.items():
            levels[factor].append(values)
    train, test = (
        ImageSet(
            names=[f"shapes/{label:02d}/{i:02d}" for label in half for i in range(SHAPES_PER_CLASS)],
            labels=np.repeat(np.arange(len(half)), SHAPES_PER_CLASS),
            class_names=[f"{label:02d}" for label in half],
            pixels=np.stack(pixels[half.start * SHAPES_PER_CLASS : half.stop * SHAPES_PER_CLASS]),
            factors={factor: np.concatenate(values[half.start : half.stop]) for factor, values in levels.items()},
        )
        for half in (range(SHAPES_CLASSES // 2), range(SHAPES_CLASSES // 2, SHAPES_CLASSES))
    )
    return train, {"": test}


def shape_class(rng: np.random.Generator) -> Callable[[dict[str, int], np.random.Generator], np.ndarray]:
    """Draw a class, an outline and a stripe pattern, and return the function that renders one image of it.

    That function takes the level of each factor and a generator for small variations; it returns (64, 64, 3) uint8.
    """
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    waves = np.arange(2, 7)
    amplitudes, phases = rng.normal(0, 0.22, 5) / np.sqrt(waves / 2), rng.uniform(0, 2 * np.pi, 5)
    radius = 1 + (amplitudes[:, None] * np.cos(waves[:, None] * angles + phases[:, None])).sum(0)
    radius = np.clip(radius, 0.35, None)
    radius /= radius.max()
    hue = rng.uniform()
    hues = np.array([hue, (hue + rng.uniform(0.2, 0.8)) % 1])
    colours = hsv2rgb(np.stack([hues, rng.uniform(0.6, 1, 2), rng.uniform(0.35, 1, 2)], axis=1))
    stripe_angle, stripes = rng.uniform(0, np.pi), rng.uniform(1.0, 4.0)

    def render(levels: dict[str, int], rng: np.random.Generator) -> np.ndarray:
        """Render one image, (64, 64, 3) uint8."""
        size = 2 * SHAPES_SIZE  # twice the resolution, averaged down at the end, for smooth edges
        turn = levels["orientation"] * np.pi / 2 + rng.normal(0, 0.12)
        scale = size * (0.28, 0.36, 0.44)[levels["size"]]
        centre = size / 2 + rng.normal(0, 0.03 * size, 2)
        y, x = (np.mgrid[:size, :size] - centre[:, None, None]) / scale
        along = x * np.cos(stripe_angle + turn) + y * np.sin(stripe_angle + turn)
        pattern = (np.sin(np.pi * stripes * along) > 0).astype(int)
        inside = polygon(
            centre[0] + scale * radius * np.sin(angles + turn),
            centre[1] + scale * radius * np.cos(angles + turn),
            (size, size),
        )
        canvas = np.tile(BACKGROUNDS[levels["background"]] + rng.normal(0, 0.03, 3), (size, size, 1))
        canvas[inside] = colours[pattern][inside]
        light = (levels["light"] + 0.5) * np.pi / 2 + rng.normal(0, 0.12)
        ramp = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        canvas *= (0.85 + 0.15 * (ramp[0] * np.sin(light) + ramp[1] * np.cos(light)))[:, :, None]
        canvas = canvas.reshape(SHAPES_SIZE, 2, SHAPES_SIZE, 2, 3).mean((1, 3)) + rng.normal(
            0, 0.015, (SHAPES_SIZE, SHAPES_SIZE, 3)
        )
        return (255 * np.clip(canvas, 0, 1)).round().astype(np.uint8)

    return render


CACHES = ("none", "ram", "disk")
READERS = {
    "cub200": read_class_folders,
    "cars196": read_cars,
    "online_products": read_online_products,
    "in-shop": read_in_shop,
    "vehicle_id": read_vehicle_id,
}


def load_dataset(name: str, source_path: str | Path) -> Splits:
    """Return the training images and the test sets of a data set.

    name: a published data set of READERS; "shapes", which is rendered; any other name is a folder in source_path with
    images/<class>/<image>. Raises DatasetError.
    """
    if name == "shapes":
        return render_shapes()
    root = locate(name, Path(source_path))
    if name not in PUBLISHED:
        return read_class_folders(root)
    try:
        return READERS[name](root)
    except DatasetError as error:
        raise DatasetError(f"{error}\n  get it at   {PUBLISHED[name].url}") from error


def main(argv: list[str] | None = None) -> int:
    """Print what a data set holds, and with --check decode every image; return the exit code."""
    parser = argparse.ArgumentParser(description="Say what a data set holds, without training.")
    parser.add_argument("name", help="as for main.py --dataset")
    parser.add_argument("--source_path", default="./Datasets", help="folder that holds the dataset folders")
    parser.add_argument("--check", action="store_true", help="decode every image and list the broken ones")
    args = parser.parse_args(argv)
    try:
        train, tests = load_dataset(args.name, args.source_path)
    except DatasetError as error:
        print(f"datasets.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{'split':10} {'classes':>8} {'images':>8}  images per class: least, median, most")
    for split, (classes, n_images, least, median, most) in split_table(train, tests).items():
        print(f"{split:10} {classes:8} {n_images:8}  {least}, {median}, {most}")
    for warning in count_warnings(args.name, train, tests):
        print(f"warning: {warning}")
    if not args.check:
        return 0
    broken = list_broken([train, *tests.values()])
    print("\n".join([*broken, f"{len(broken)} images cannot be decoded"]))
    return 2 if broken else 0


def list_broken(image_sets: Sequence[ImageSet]) -> list[str]:
    """Decode every image, with a progress bar, and return the message of each that cannot be decoded."""

    def message(source: tuple[ImageSet, int]) -> str | None:
        """Return what is wrong with an image, None for a sound one."""
        try:
            source[0].read(source[1])
        except DatasetError as error:
            return str(error)
        return None

    sources = [(images, i) for images in image_sets for i in range(len(images))]
    with ThreadPoolExecutor() as pool:
        messages = list(tqdm(pool.map(message, sources), total=len(sources), unit="img", disable=None))
    return [text for text in messages if text is not None]


if __name__ == "__main__":
    sys.exit(main())
