"""Images per second per core: the training loader against the plain pipeline, side by side in one run.

    python benchmarks/loading.py [--images FOLDER] [--seconds 3] [--n_images 32] [--per_pass 1024] [--entries 120053]

The plain pipeline is Pillow, RandomResizedCrop(224), flip, ToTensor and Normalize, and gives float32 tensors. Ours is
the training dataset of datasets.py, which gives uint8 tensors that are normalised on the device, with and without
--cache ram. Both are measured in a single process and thread, then in loaders with workers. Images are generated as
JPEGs of quality 90, with the 1/f amplitude spectrum of natural images, or taken from --images FOLDER. Also printed are
the time to read a generated online_products of 120,053 entries, the time to draw one epoch of its batches without
decoding, and the peak memory of the benchmark's own process, without its workers.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from data.cache import cached
from data.images import ImageSet, image_size
from support.errors import InputError

SIZES = ((500, 375), (1200, 900))
ENTRIES = 120_053
"""List entries of Online Products."""


def natural_image(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return noise with the 1/f amplitude spectrum of natural images, its channels correlated."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channels = []
    shared = rng.normal(size=(height, width))
    for _ in range(3):
        spectrum = np.fft.rfft2(0.8 * shared + 0.2 * rng.normal(size=(height, width))) / frequency
        spectrum[0, 0] = 0
        channel = np.fft.irfft2(spectrum, s=(height, width))
        channels.append(128 + 50 * channel / channel.std())
    return Image.fromarray(np.clip(np.stack(channels, 2), 0, 255).astype(np.uint8))


def is_image(path: Path) -> bool:
    """Tell whether Pillow opens a file."""
    try:
        image_size(str(path))
    except InputError:
        return False
    return True


class Plain(Dataset):
    """The usual pipeline: Pillow to a normalised float32 tensor."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


class OurDataset(Dataset):
    """Our training dataset, indexed as the batch samplers index it."""

    def __init__(self, images: ImageSet):
        self.dataset = datasets.ImageDataset(images, datasets.train_transform(224, flip=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.dataset[(index, 0, index)][0]


def per_second(passes: dict[str, Callable[[], int]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median images per second of each pass by the clock; rounds alternate between them."""
    rates: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + seconds * len(passes)
    while time.perf_counter() < end or len(next(iter(rates.values()))) < 3:
        for name, run in passes.items():
            start = clock()
            n_images = run()
            rates[name].append(n_images / (clock() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def compare(title: str, paths: list[str], seconds: float, per_pass: int) -> None:
    """Print images per second per core, and with workers, for one set of images."""
    images = ImageSet(paths, np.zeros(len(paths), dtype=np.int64), ["all"])
    sets = {"plain": Plain(paths), "ours": OurDataset(images)}
    sets["ours, ram cache"] = OurDataset(cached({"train": images})["train"])

    def one_by_one(dataset: Dataset) -> int:
        return sum(len(dataset[i][None]) for i in range(len(dataset)))

    rates = per_second({name: lambda d=d: one_by_one(d) for name, d in sets.items()}, seconds, time.process_time)
    n_pixels = sum(height * width for height, width in map(image_size, paths))
    bits = 8 * sum(map(os.path.getsize, paths)) / n_pixels
    print(f"\n{title}, {bits:.2f} bits per pixel: images per second of CPU time, one thread")
    for name, rate in rates.items():
        print(f"  {name:18} {rate:8.0f}  {rate / rates['plain']:5.2f} x plain", flush=True)
    for n_workers in (0, 1, 2):
        order = torch.arange(len(paths)).repeat(-(-per_pass // len(paths))).tolist()
        loaders = {
            name: DataLoader(
                d, 32, sampler=order, num_workers=n_workers, multiprocessing_context="fork" if n_workers else None
            )
            for name, d in sets.items()
        }
        rates = per_second({name: lambda x=x: sum(map(len, x)) for name, x in loaders.items()}, 0, time.perf_counter)
        shown = "  ".join(f"{name} {rate:.0f} ({rate / rates['plain']:.2f} x)" for name, rate in rates.items())
        print(f"  {n_workers} workers, images per second: {shown}", flush=True)


def measure_lists(folder: Path, n_entries: int) -> None:
    """Print time and memory of reading a generated online_products, and the time to draw an epoch's batches."""
    root = folder / "online_products"
    (root / "Info_Files").mkdir(parents=True)
    n_written = 0
    for split, *counts in (("train", 59_551, 11_318), ("test", 60_502, 11_316)):
        n_images, n_classes = (round(n * n_entries / ENTRIES) for n in counts)
        lines = ["image_id class_id super_class_id path"]
        for i in range(n_images):
            category = f"category_{i % 12}_final"
            path = root / "images" / category / f"{split}_{i}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            n_written += 1
            lines.append(f"{n_written} {i % n_classes + n_classes * (split == 'test') + 1} 1 {category}/{path.name}")
        (root / "Info_Files" / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    train, tests = datasets.load_dataset("online_products", folder)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    n_read = len(train) + len(tests["test"])
    print(f"\nreading online_products, {n_read} list entries: {seconds:.2f} s, {grown:.0f} MB more")
    sampler = datasets.ClassBalancedBatchSampler(112, 4, seed=(0, 0))
    sampler.set_epoch(0, train.labels, len(train) // 112)
    start = time.perf_counter()
    n_drawn = sum(map(len, sampler))
    print(f"one epoch of class-balanced batches, {n_drawn} entries, no decoding: {time.perf_counter() - start:.2f} s")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of images to load instead of generated ones")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per entry of the single-process tables")
    parser.add_argument("--n_images", type=int, default=32, help="how many images are generated of each size")
    parser.add_argument("--per_pass", type=int, default=1024, help="how many images a pass with workers loads")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="list entries of the generated online_products")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Pillow {Image.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure_lists(folder, args.entries)
        if args.images:
            paths = sorted(str(path) for path in Path(args.images).rglob("*") if path.is_file() and is_image(path))
            if not paths:
                parser.error(f"--images {args.images}: holds no image that Pillow opens")
            compare(args.images, paths, args.seconds, args.per_pass)
        for width, height in () if args.images else SIZES:
            paths = []
            for i in range(args.n_images):
                paths.append(str(folder / f"{width}_{i}.jpg"))
                natural_image(width, height, np.random.default_rng(i)).save(paths[-1], quality=90)
            compare(f"{width} x {height}", paths, args.seconds, args.per_pass)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of this process, without its workers: {peak:.0f} MB")


if __name__ == "__main__":
    main()
