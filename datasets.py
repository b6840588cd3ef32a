"""Data sets: split readers, decoding and transforms, class-balanced batches, and the built-in rendered set.

A reader turns a folder into two ImageSets, train and test. Every reader sorts, so that runs repeat.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.color import hsv2rgb
from skimage.draw import polygon
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms import v2

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # deprecated there since 0.29; Pillow gives the same pixels, more slowly
    decode_image = None

Draw = tuple[int, int, int]
"""One image of a batch: (image index, label it is trained with, seed of its augmentation)."""


class DatasetError(ValueError):
    """A data set is missing, unusable or holds an image that cannot be read; the message is one line for the user."""

    def __init__(self, message: str):
        # A DataLoader worker's error arrives as "Caught ... Original Traceback ... DatasetError: message".
        super().__init__(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    names: N file paths, or names of rendered images. labels: (N,) int64 in [0, n_classes). class_names: one per class.
    pixels: (N, H, W, 3) uint8 for images that live in memory, None where `names` are files to read.
    factors: known characteristics shared across classes, name to (N,) int64 levels; empty for photographs.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    pixels: np.ndarray | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)

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
        try:
            return decode_image(path, mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow reads more kinds of JPEG, and says better what is wrong with the others
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"cannot decode the image {path} ({error}); repair or remove it") from error


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
    if batch_sampler is None:
        return DataLoader(dataset, batch_size, **loading)
    return DataLoader(dataset, batch_sampler=batch_sampler, persistent_workers=n_workers > 0, **loading)


def visible(folder: Path, *, folders: bool) -> list[str]:
    """Return the sorted names of a folder's subfolders, or of its files, without hidden ones. Raises DatasetError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir() == folders)
    except OSError as error:
        raise DatasetError(f"cannot list the folder {folder} ({error.strerror})") from error


def read_class_folders(root: Path) -> tuple[ImageSet, ImageSet]:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises DatasetError when the folder is missing or there are
    fewer than two classes with images on either side.
    """
    images = root / "images"
    if not images.is_dir():
        found = "there is no such folder" if not root.is_dir() else f"it holds {describe(root)}"
        raise DatasetError(f"no images in {root}: expected {images}/<class>/<image>, but {found}; see --source_path")
    per_class = {name: visible(images / name, folders=False) for name in visible(images, folders=True)}
    per_class = {name: files for name, files in per_class.items() if files}
    if len(per_class) < 4:
        raise DatasetError(
            f"{images} holds {len(per_class)} class folders with images; at least 4 are needed: 2 to train, 2 to test"
        )
    class_names = list(per_class)
    half = len(class_names) // 2
    return tuple(folder_split(images, names, per_class) for names in (class_names[:half], class_names[half:]))


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    names = visible(folder, folders=True) + visible(folder, folders=False)
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


def folder_split(images: Path, class_names: list[str], per_class: dict[str, list[str]]) -> ImageSet:
    """Return the ImageSet of some class folders below `images`."""
    paths = [os.path.join(images, name, file) for name in class_names for file in per_class[name]]
    labels = np.repeat(np.arange(len(class_names)), [len(per_class[name]) for name in class_names])
    return ImageSet(paths, labels, class_names)


SHAPES_CLASSES, SHAPES_PER_CLASS, SHAPES_SIZE = 48, 24, 64
BACKGROUNDS = np.array(
    [[0.85, 0.35, 0.3], [0.3, 0.7, 0.35], [0.3, 0.4, 0.85], [0.9, 0.85, 0.4], [0.35, 0.3, 0.4], [0.85, 0.85, 0.85]]
)
SHAPES_FACTORS = {"background": len(BACKGROUNDS), "orientation": 4, "size": 3, "light": 4}


def render_shapes() -> tuple[ImageSet, ImageSet]:
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
    return tuple(
        ImageSet(
            names=[f"shapes/{label:02d}/{i:02d}" for label in half for i in range(SHAPES_PER_CLASS)],
            labels=np.repeat(np.arange(len(half)), SHAPES_PER_CLASS),
            class_names=[f"{label:02d}" for label in half],
            pixels=np.stack(pixels[half.start * SHAPES_PER_CLASS : half.stop * SHAPES_PER_CLASS]),
            factors={factor: np.concatenate(values[half.start : half.stop]) for factor, values in levels.items()},
        )
        for half in (range(SHAPES_CLASSES // 2), range(SHAPES_CLASSES // 2, SHAPES_CLASSES))
    )


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


NOT_AVAILABLE = ("online_products", "in-shop", "vehicle_id")


def load_dataset(name: str, source_path: str | Path) -> tuple[ImageSet, ImageSet]:
    """Return the train and the test split of a data set.

    name: "shapes" is rendered; any other name is a folder in source_path with images/<class>/<image>, cub200 and
    cars196 among them. Raises DatasetError.
    """
    if name in NOT_AVAILABLE:
        raise DatasetError(f"--dataset {name} is not available yet; cub200, cars196, shapes or a folder of yours are")
    if name == "shapes":
        return render_shapes()
    return read_class_folders(Path(source_path) / name)
