"""Data sets: split readers, decoding and transforms, class-balanced batches, and the built-in rendered set.

A reader turns a folder into an ImageSet to train on and the test sets by name. Labels and folders are sorted, so that
runs repeat.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

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
        super().__init__(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


class PixelStore:
    """Decoded images of any size, one after the other in one flat array.

    flat: (sum of H * W * 3) uint8. sizes: (N, 2) int64 heights and widths. Indexing gives an (H, W, 3) view.
    """

    def __init__(self, flat: np.ndarray, sizes: np.ndarray):
        self.flat, self.sizes = flat, sizes
        self.ends = np.cumsum(3 * sizes.prod(1))

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
    image is searched in all others.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    pixels: np.ndarray | PixelStore | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    is_query: np.ndarray | None = None

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
        with contextlib.suppress(RuntimeError):
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


def cached(images: ImageSet, kind: str, folder: Path, name: str) -> ImageSet:
    """Return the images with all of them decoded, so that reading one costs nothing; the pixels are the same.

    kind: "none" changes nothing; "ram" keeps them in memory, which forked workers share; "disk" keeps them in a
    memory-mapped file of `folder`, called after `name`, that later runs reuse until an image file changes.
    Raises DatasetError when they do not fit, or when an image cannot be decoded.
    """
    if kind == "none" or images.pixels is not None:
        return images
    path = folder / f"decoded_{name}_{fingerprint(images.names)}.bin"
    if kind == "disk" and path.exists() and path.with_suffix(".npy").exists():
        return replace(images, pixels=PixelStore(np.memmap(path, np.uint8, "c"), np.load(path.with_suffix(".npy"))))
    with ThreadPoolExecutor() as pool:
        sizes = np.array(list(pool.map(image_size, images.names)), dtype=np.int64)
        n_bytes = int(3 * sizes.prod(1).sum())
        free = free_memory() if kind == "ram" else free_space(folder)
        if free is not None and n_bytes > 0.9 * free:
            raise DatasetError(
                f"--cache {kind}: the decoded {name} images take {n_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
                f"are free{'' if kind == 'ram' else f' in {folder}'}; use --cache {'disk' if kind == 'ram' else 'none'}"
            )
        temporary = path.with_suffix(f".{os.getpid()}.part")
        flat = np.empty(n_bytes, np.uint8) if kind == "ram" else np.memmap(temporary, np.uint8, "w+", shape=n_bytes)
        store = PixelStore(flat, sizes)

        def fill(index: int) -> None:
            """Decode an image into its place."""
            store[index][:] = read_image(images.names[index]).permute(1, 2, 0).numpy()

        try:
            list(tqdm(pool.map(fill, range(len(images))), f"decoding {name}", len(images), unit="img", disable=None))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if kind == "disk":
        flat.flush()
        temporary_sizes = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary_sizes, sizes)
        temporary_sizes.rename(path.with_suffix(".npy"))
        temporary.rename(path)
        remove_stale_caches(folder, name, path)
    return replace(images, pixels=store)


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


def image_size(path: str) -> tuple[int, int]:
    """Return (height, width) from an image file's header. Raises DatasetError that names the file."""
    with opened_image(path) as image:
        return image.height, image.width


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still take, None where the system does not say."""
    limits = []
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        limits.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # of a container or a job; "max" is none
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=None)


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, which is made. Raises DatasetError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise DatasetError(f"--cache disk: cannot create {folder} ({error.strerror}); see --save_path") from error


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
    """

    def __init__(self, batch_size: int, images_per_class: int, seed: tuple[int, ...], random_pick_p: float = 0.0):
        if batch_size % images_per_class:
            raise ValueError(f"batch size {batch_size} is not a multiple of {images_per_class} images per class")
        self.batch_size, self.images_per_class = batch_size, images_per_class
        self.seed, self.random_pick_p = seed, random_pick_p
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
            yield [(*self._maybe_replaced(next(stream), members, rng), int(seed)) for seed in seeds]

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
) -> DataLoader:
    """Return a loader of (images (B, 3, S, S) uint8, labels (B,) int64).

    With a batch_sampler (training) the workers live as long as the loader; without one all images come once, in order,
    `batch_size` at a time.
    """
    # Its own generator: else each pass would take a number from the one that the losses draw from
    loading = {"num_workers": n_workers, "pin_memory": pin_memory, "generator": torch.Generator()}
    if n_workers and sys.platform == "linux":
        loading["multiprocessing_context"] = "fork"  # shares decoded images with the workers instead of copying them
    if batch_sampler is None:
        return DataLoader(dataset, batch_size, **loading)
    return DataLoader(dataset, batch_sampler=batch_sampler, persistent_workers=n_workers > 0, **loading)


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
    try:
        for root in candidates:
            if any((root / landmark).exists() for landmark in known.landmarks):
                return root
    except OSError as error:
        raise DatasetError(f"--dataset {name}: cannot look into {root} ({error.strerror})") from error
    lines = [f"no images of --dataset {name} in --source_path {source_path}"]
    lines.append(f"looked for  {known.layout} in {' or '.join(map(str, candidates))}")
    present = [folder for folder in (*candidates, source_path) if folder.is_dir()]
    found = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines.append(f"found       {found or f'no folder {source_path}'}")
    lines += [f"to do       {advice}" for advice in advise(known, name, source_path, present)]
    if known.url:
        lines.append(f"get it at   {known.url}")
    raise DatasetError("\n  ".join(lines))


def advise(known: Published, name: str, source_path: Path, present: list[Path]) -> list[str]:
    """Return what to do about a data set that is not where it is expected, as far as its surroundings tell."""

    def is_marked(folder: Path) -> bool:
        """Tell whether a folder is the data set's."""
        return any((folder / landmark).exists() for landmark in known.landmarks)

    if is_marked(source_path):
        return [f"{source_path} is the data set itself: name it {name} and give its parent as --source_path"]
    for folder in present:
        for child in visible(folder, folders=True):
            if folder != source_path and is_marked(folder / child):  # beside it may lie another data set
                return [f"it lies one level off: rename or move {folder / child} to {source_path / name}"]
        archives = [file for file in visible(folder, folders=False) if file.endswith((".zip", ".tar", ".tgz", ".gz"))]
        if archives:
            return [f"unpack {folder / archives[0]}"]
    return ["give the folder that holds the data set's folder as --source_path"]


def visible(folder: Path, *, folders: bool) -> list[str]:
    """Return the sorted names of a folder's subfolders, or of its files, without hidden ones. Raises DatasetError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir() == folders)
    except OSError as error:
        raise DatasetError(f"cannot list the folder {folder} ({error.strerror})") from error


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    names = visible(folder, folders=True) + visible(folder, folders=False)
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises DatasetError when there are fewer than two classes
    with images on either side.
    """
    images = root / "images"
    per_class = {name: visible(images / name, folders=False) for name in visible(images, folders=True)}
    per_class = {name: [f"{name}/{file}" for file in files] for name, files in per_class.items() if files}
    if len(per_class) < 4:
        deeper = [
            f"{name}/{child}"
            for name in visible(images, folders=True)
            for child in visible(images / name, folders=True)
        ]
        hint = f"; images one level deeper, in {deeper[0]}? Move the class folders up" if deeper else ""
        raise DatasetError(
            f"{images} holds {len(per_class)} class folders with images; at least 4 are needed: 2 to train, 2 to test"
            f"{hint}"
        )
    return split_halves(images, per_class)


def split_halves(folder: Path, per_class: dict[str, list[str]]) -> Splits:
    """Return the first half of the classes to train and the rest to test; paths are relative to the folder."""
    names = list(per_class)
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


def read_cars(root: Path) -> Splits:
    """Read CARS196: class folders, or the official archive's car_ims with the annotations in cars_annos.mat.

    The classes' order is that of the folders or of the file; the first half trains.
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
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        NotImplementedError,
        MatReadError,
        zlib.error,
    ) as error:
        raise DatasetError(f"{path}: cannot be read as the annotations of CARS196 ({error})") from error
    if len(class_names) < 4 or not labels.size or labels.min() < 1 or labels.max() > len(class_names):
        raise DatasetError(f"{path}: {len(class_names)} class names and {labels.size} labels that do not fit them")
    require_images(path, root, files)
    per_class: dict[str, list[str]] = {name: [] for name in class_names}
    for file, label in zip(files, labels):
        per_class[class_names[label - 1]].append(file)
    return split_halves(root, per_class)


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists, `image_id class_id super_class_id path` under a header."""
    images = root / "images" if (root / "images").is_dir() else root
    splits = []
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        rows = read_rows(path, 4, n_header_lines=1, integer_columns=(1,))
        splits.append(listed_split(path, images, [row[3] for row in rows], [int(row[1]) for row in rows]))
    return splits[0], {"": splits[1]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes: list_eval_partition.txt, a count, a header and `image_name item_id evaluation_status`."""
    images = root if (root / "img").is_dir() else root / "Img"
    path = first_existing(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    rows = read_rows(path, 3, n_header_lines=2)
    for i, (_, _, status) in enumerate(rows):
        if status not in ("train", "query", "gallery"):
            raise DatasetError(f"{path}, line {i + 3}: status {status!r} is not train, query or gallery")
    train = [row for row in rows if row[2] == "train"]
    test = [row for row in rows if row[2] != "train"]
    for status in ("query", "gallery"):
        if not any(row[2] == status for row in test):
            raise DatasetError(f"{path}: lists no image with the status {status}")
    train_set, test_set = (
        listed_split(path, images, [row[0] for row in side], [row[1] for row in side]) for side in (train, test)
    )
    return train_set, {"": replace(test_set, is_query=np.array([row[2] == "query" for row in test]))}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID: lists of `image_number vehicle_id`, one to train and three test sets scored separately."""
    splits = {}
    for split, file in (("train", "train_list"), *((f"Set {i}", f"test_list_{800 * i}") for i in (1, 2, 3))):
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        rows = read_rows(path, 2, integer_columns=(0, 1))
        files = [f"image/{int(row[0]):07d}.jpg" for row in rows]
        splits[split] = listed_split(path, root, files, [int(row[1]) for row in rows])
    return splits.pop("train"), splits


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists. Raises DatasetError."""
    for option in options:
        if (root / option).is_file():
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    raise DatasetError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}")


def read_rows(
    path: Path, n_columns: int, *, n_header_lines: int = 0, integer_columns: tuple[int, ...] = ()
) -> list[list[str]]:
    """Return the rows of a list file with columns between white space. Raises DatasetError that names a bad line."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = line.split()
                if number <= n_header_lines or not row:
                    continue
                if len(row) != n_columns or not all(row[i].isdecimal() for i in integer_columns):
                    wanted = f"{n_columns} columns" + (" with whole numbers for ids" if integer_columns else "")
                    raise DatasetError(f"{path}, line {number}: expected {wanted}, found {line.strip()[:80]!r}")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise DatasetError(f"{path}: holds no images")
    return rows


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
    on_disk: dict[str, set[str]] = {}
    missing = []
    for file in files:
        parent, name = os.path.split(file)
        if parent not in on_disk:
            path = folder / parent
            on_disk[parent] = set(visible(path, folders=False)) if path.is_dir() else set()
        if name not in on_disk[parent]:
            missing.append(file)
    if missing:
        raise DatasetError(
            f"{list_path}: {len(missing)} of {len(files)} listed images are not on disk below {folder}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )


def count_warnings(name: str, train: ImageSet, tests: dict[str, ImageSet]) -> list[str]:
    """Return a line for each count of a published data set that differs from the official one."""
    sets = split_table(train, tests)
    if len(tests) == 1:
        sets["all"] = (
            sum(len(images.class_names) for images in (train, *tests.values())),
            sum(len(images) for images in (train, *tests.values())),
        )
    expected = PUBLISHED[name].counts if name in PUBLISHED else {}
    return [
        f"{name}, {split}: {sets[split][0]} classes with {sets[split][1]} images; officially {classes} with {n_images}"
        for split, (classes, n_images) in expected.items()
        if sets[split][:2] != (classes, n_images)
    ]


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
    return READERS.get(name, read_class_folders)(locate(name, Path(source_path)))


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
