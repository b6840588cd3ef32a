"""Decoded images kept in memory or on disk, so that reading one costs nothing."""

import contextlib
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.images import ImageSet, file_status, image_size, read_image
from run.errors import InputError

CACHES = ("none", "ram", "disk")


class PixelStore:
    """Decoded images of any size in one flat array.

    flat: uint8, or the path of a file that is mapped into memory: spawned workers get the path instead of a copy.
    sizes: (N, 2) int64 heights and widths. starts: (N,) int64, where each image starts; None: one follows the other.
    An index gives an (H, W, 3) view, an array of indices a PixelStore of these images, without copying.
    """

    def __init__(self, flat: np.ndarray | Path, sizes: np.ndarray, starts: np.ndarray | None = None):
        # Mode "c": no write reaches the file, and PyTorch does not warn of an array that it must not write to
        self.flat = np.memmap(flat, np.uint8, "c") if isinstance(flat, Path) else flat
        self.sizes = sizes
        self.starts = np.cumsum(n_bytes := 3 * sizes.prod(1)) - n_bytes if starts is None else starts

    def __reduce__(self) -> tuple:
        flat = Path(self.flat.filename) if isinstance(self.flat, np.memmap) else self.flat
        return PixelStore, (flat, self.sizes, self.starts)

    def __getitem__(self, index: int | np.ndarray) -> "np.ndarray | PixelStore":
        if isinstance(index, np.ndarray):
            return PixelStore(self.flat, self.sizes[index], self.starts[index])
        (height, width), start = self.sizes[index], self.starts[index]
        return self.flat[start : start + 3 * height * width].reshape(height, width, 3)


def cached(image_sets: Mapping[str, ImageSet], kind: str, folder: Path, n_copies: int = 1) -> dict[str, ImageSet]:
    """Return image sets, by the names of their splits, with all images decoded; the pixels are the same.

    kind: "none" changes nothing; "ram" keeps them in memory, which forked workers share; "disk" in memory-mapped files
    in `folder` that later runs reuse until an image file changes. n_copies: how many processes of this machine do the
    same at the same time, each with memory of its own.
    Raises InputError when they do not all fit, before any is decoded, or when an image cannot be decoded.
    """
    todo = {split: images.names for split, images in image_sets.items() if images.pixels is None and kind != "none"}
    try:
        files = {split: cache_file(folder, split, names) for split, names in todo.items()} if kind == "disk" else {}
        stores = {split: store for split, file in files.items() if (store := open_store(*file))}
        missing = [split for split in todo if split not in stores]
        with ThreadPoolExecutor() as pool:
            sizes = {split: np.array(list(pool.map(image_size, todo[split])), np.int64) for split in missing}
        if missing:
            n_bytes = sum(int(3 * size.prod(1).sum()) for size in sizes.values())
            require_room(kind, folder, n_bytes * (n_copies if kind == "ram" else 1))
        for split in missing:
            if kind == "ram":
                stores[split] = PixelStore(np.empty(3 * sizes[split].prod(1).sum(), np.uint8), sizes[split])
                decode_into(stores[split], todo[split], split)
            else:
                stores[split] = write_store(*files[split], sizes[split], todo[split], split)
    except OSError as error:
        raise InputError(
            f"--cache disk: the decoded images cannot be kept in {folder} ({error.strerror}); use --cache none, or "
            "another --save_path"
        ) from error
    return {split: replace(images, pixels=stores.get(split, images.pixels)) for split, images in image_sets.items()}


def require_room(kind: str, folder: Path, n_bytes: int) -> None:
    """Print what decoded images take. Raises InputError where they do not fit in memory, or on the folder's disk."""
    if kind == "ram":
        free, where, instead = free_memory(), "of memory", "disk"
    else:
        folder.mkdir(parents=True, exist_ok=True)
        free, where, instead = shutil.disk_usage(folder).free, f"in {folder}", "none"
    size = f"{n_bytes / 1e9:.1f} GB"
    if free is not None and n_bytes > 0.9 * free:
        raise InputError(
            f"--cache {kind}: the decoded images take {size}, but only {free / 1e9:.1f} GB {where} are free; "
            f"use --cache {instead}"
        )
    print(f"--cache {kind}: the decoded images take {size} {where}")


def free_memory() -> int | None:
    """Return the bytes of memory that are free on this machine, None where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    return None


def decode_into(store: PixelStore, paths: list[str], split: str) -> None:
    """Decode images, each into its place, with a progress bar."""

    def decode(index: int) -> None:
        """Decode one image."""
        store[index][:] = read_image(paths[index]).permute(1, 2, 0).numpy()

    with ThreadPoolExecutor() as pool:
        jobs = pool.map(decode, range(len(paths)))
        list(tqdm(jobs, f"decoding {split or 'test'}", len(paths), unit="img", disable=None))


def cache_file(folder: Path, split: str, paths: list[str]) -> tuple[Path, str]:
    """Return the file for a split's decoded images, and the fingerprint of the image files.

    The file is called after the images' common folder, however that is spelt; the fingerprint is of the files' names
    in it, sizes and times of change. Raises InputError for a file that has gone.
    """
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    place = hashlib.sha256(os.fsencode(os.path.realpath(common))).hexdigest()[:12]
    fingerprint = hashlib.sha256()
    for path in paths:
        status = file_status(path)
        name = os.path.relpath(path, common)
        fingerprint.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return folder / f"decoded_{(split or 'test').lower().replace(' ', '')}_{place}.bin", fingerprint.hexdigest()


def open_store(path: Path, fingerprint: str) -> PixelStore | None:
    """Return the decoded images of a file, None where it is not there, not whole or of other image files."""
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        sidecar = np.load(path.with_suffix(".npz"))
        if sidecar["fingerprint"] == fingerprint and path.stat().st_size == 3 * sidecar["sizes"].prod(1).sum():
            return PixelStore(path, sidecar["sizes"])
    return None


def write_store(path: Path, fingerprint: str, sizes: np.ndarray, image_paths: list[str], split: str) -> PixelStore:
    """Decode images into a file that takes its name once it is whole; return it mapped. Raises InputError, OSError."""
    for part in path.parent.glob("decoded_*.part"):  # of killed runs
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 24 * 3600:
                part.unlink()
    pixels_part, sidecar_part = (path.with_suffix(f"{suffix}.{os.getpid()}.part") for suffix in (".bin", ".npz"))
    n_bytes = int(3 * sizes.prod(1).sum())
    try:
        with open(pixels_part, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up kills the process at a later write
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            file.truncate(n_bytes)
        flat = np.memmap(pixels_part, np.uint8, "r+")
        decode_into(PixelStore(flat, sizes), image_paths, split)
        flat.flush()
        with open(sidecar_part, "wb") as file:
            np.savez(file, sizes=sizes, fingerprint=fingerprint)
        # In this order a run killed in between leaves no fingerprint beside the pixels of other image files
        path.with_suffix(".npz").unlink(missing_ok=True)
        pixels_part.replace(path)
        sidecar_part.replace(path.with_suffix(".npz"))
        return PixelStore(path, sizes)
    finally:
        for part in (pixels_part, sidecar_part):
            part.unlink(missing_ok=True)
