"""Decoded images kept in memory or on disk, so that reading one costs nothing."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from data.images import ImageSet, file_status, image_size, read_image
from support.errors import InputError

CACHES = ("none", "ram", "disk")

CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where version 2 (no controller is named) and version 1 of cgroups say what memory is left; see left_in_cgroup."""


def image_views(flat: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) objects, the images (H, W, 3) uint8 that follow one another in a flat uint8 array, without copying.

    flat: in memory, or a file mapped with mode "c", as PyTorch warns of images that it must not write to. sizes: (N, 2)
    int64 heights and widths.
    """
    flat = np.asarray(flat)  # views of a memmap would each be one, and slower
    images = np.empty(len(sizes), dtype=object)
    stops = np.cumsum(3 * sizes.prod(1))
    for i, ((height, width), stop) in enumerate(zip(sizes, stops)):
        images[i] = flat[stop - 3 * height * width : stop].reshape(height, width, 3)
    return images


def cached(image_sets: Mapping[str, ImageSet], kind: str, folder: Path, n_copies: int = 1) -> dict[str, ImageSet]:
    """Return image sets, by the names of their splits, with all images decoded; the pixels are the same.

    kind: "none" changes nothing; "ram" keeps them in memory, which forked workers share; "disk" in memory-mapped files
    in `folder` that later runs reuse until an image file changes. n_copies: how many processes of this machine do the
    same at the same time, each with memory of its own.
    Raises InputError when they do not all fit, before any is decoded, or when an image cannot be decoded.
    """
    if kind == "none":
        return dict(image_sets)
    todo = {split: images.names for split, images in image_sets.items() if images.pixels is None}
    try:
        files = {split: cache_file(folder, split, names) for split, names in todo.items()} if kind == "disk" else {}
        kept = {split: images for split, file in files.items() if (images := read_store(*file)) is not None}
        missing = {split: names for split, names in todo.items() if split not in kept}
        with ThreadPoolExecutor() as pool:
            sizes = {split: np.array(list(pool.map(image_size, names)), np.int64) for split, names in missing.items()}
        if missing:
            require_room(kind, folder, sum(map(n_bytes, sizes.values())) * (n_copies if kind == "ram" else 1))
        for split, names in missing.items():
            if kind == "ram":
                kept[split] = image_views(np.empty(n_bytes(sizes[split]), np.uint8), sizes[split])
                decode_into(kept[split], names, split)
            else:
                kept[split] = write_store(*files[split], sizes[split], names, split)
    except OSError as error:
        raise InputError(
            f"--cache disk: the decoded images cannot be kept in {folder} ({error.strerror}); use --cache none, or "
            "another --save_path"
        ) from error
    return {split: replace(images, pixels=kept.get(split, images.pixels)) for split, images in image_sets.items()}


def n_bytes(sizes: np.ndarray) -> int:
    """Return the bytes that decoded images of some sizes, (N, 2), take."""
    return int(3 * sizes.prod(1).sum())


def require_room(kind: str, folder: Path, needed: int) -> None:
    """Print what decoded images take. Raises InputError where they do not fit in memory, or on the folder's disk."""
    if kind == "ram":
        free, where, instead = free_memory(), "of memory", "disk"
    else:
        folder.mkdir(parents=True, exist_ok=True)
        free, where, instead = shutil.disk_usage(folder).free, f"in {folder}", "none"
    size = f"{needed / 1e9:.1f} GB"
    if free is not None and needed > 0.9 * free:
        raise InputError(
            f"--cache {kind}: the decoded images take {size}, but only {free / 1e9:.1f} GB {where} are free; "
            f"use --cache {instead}"
        )
    print(f"--cache {kind}: the decoded images take {size} {where}")


def free_memory(root: str | Path = "/") -> int | None:
    """Return the bytes of memory that this process may still take, None where the system does not say.

    They are those free on the machine or, where that is less, left of a limit of its cgroup or of one around it, as
    containers and job schedulers set it. root: the folder that holds proc and sys.
    """
    root, free = Path(root), []
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            free += [1024 * int(line.split()[1])] if line.startswith("MemAvailable") else []
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controller, group = line.split(":", 2)
            if controller in CGROUP_FILES:
                mount, *names = CGROUP_FILES[controller]
                group = PurePosixPath(group.lstrip("/"))  # in a container it may not be there, but only its own, on top
                free += [left_in_cgroup(root / mount / above, *names) for above in (group, *group.parents)]
    return min((n_bytes for n_bytes in free if n_bytes is not None), default=None)


def left_in_cgroup(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Return the bytes that a cgroup's limit leaves, None where it has none; pages of files in memory count as left.

    limit, used: names of files. cached: name of a line in memory.stat.
    """
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        n_cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[cached]
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(n_cached)
    return None


def decode_into(images: np.ndarray, paths: list[str], split: str) -> None:
    """Decode images, each into its place, with a progress bar."""

    def decode(index: int) -> None:
        """Decode one image."""
        images[index][:] = read_image(paths[index]).permute(1, 2, 0).numpy()

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


def read_store(path: Path, fingerprint: str) -> np.ndarray | None:
    """Return the decoded images of a file, None where it is not there, not whole or of other image files."""
    try:
        sidecar = np.load(path.with_suffix(".npz"))
        if sidecar["fingerprint"] == fingerprint and path.stat().st_size == n_bytes(sidecar["sizes"]):
            return image_views(np.memmap(path, np.uint8, "c"), sidecar["sizes"])
    except Exception:  # damaged files make NumPy raise almost anything
        return None
    return None


def write_store(path: Path, fingerprint: str, sizes: np.ndarray, image_paths: list[str], split: str) -> np.ndarray:
    """Decode images into a file that takes its name once it is whole; return it mapped. Raises InputError, OSError."""
    for part in path.parent.glob("decoded_*.part"):  # of killed runs
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 24 * 3600:
                part.unlink()
    part = path.with_suffix(f".bin.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up kills the process at a later write
                os.posix_fallocate(file.fileno(), 0, n_bytes(sizes))
            file.truncate(n_bytes(sizes))
        flat = np.memmap(part, np.uint8, "r+")
        decode_into(image_views(flat, sizes), image_paths, split)
        flat.flush()
        # In this order a run killed in between leaves no fingerprint beside the pixels of other image files
        path.with_suffix(".npz").unlink(missing_ok=True)
        part.replace(path)
        np.savez(path.with_suffix(".npz"), sizes=sizes, fingerprint=fingerprint)
        return image_views(np.memmap(path, np.uint8, "c"), sizes)
    finally:
        part.unlink(missing_ok=True)
