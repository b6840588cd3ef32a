"""Decoded images kept in memory, so that reading one costs nothing."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from data.images import ImageSet, image_size, read_image
from support.errors import InputError
from support.output import log

CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, none in version 2: the mount of a memory cgroup, and the arguments of left_in_cgroup."""


def image_views(flat: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) objects, the images (H, W, 3) uint8 that follow one another in a flat uint8 array, without copying.

    sizes: (N, 2) int64 heights and widths.
    """
    images = np.empty(len(sizes), dtype=object)
    stops = np.cumsum(3 * sizes.prod(1))
    for i, ((height, width), stop) in enumerate(zip(sizes, stops)):
        images[i] = flat[stop - 3 * height * width : stop].reshape(height, width, 3)
    return images


def cached(image_sets: Mapping[str, ImageSet], n_copies: int = 1) -> dict[str, ImageSet]:
    """Return image sets, by the names of their splits, decoded into memory that forked workers share.

    n_copies: how many processes of this machine do the same at the same time, each with memory of its own.
    Raises InputError when they do not all fit, before any is decoded, or when an image cannot be decoded.
    """
    paths = {split: images.names for split, images in image_sets.items() if images.pixels is None}
    pixels = {split: images.pixels for split, images in image_sets.items()}
    with ThreadPoolExecutor() as pool:
        sizes = {split: np.array(list(pool.map(image_size, paths[split])), np.int64) for split in paths}
        n_bytes = {split: int(3 * sizes[split].prod(1).sum()) for split in paths}
        needed, free = sum(n_bytes.values()) * n_copies, free_memory()
        size = f"{needed / 1e9:.1f} GB"
        if free is not None and needed > 0.9 * free:
            raise InputError(
                f"--cache ram: the decoded images take {size}, but only {free / 1e9:.1f} GB are free: leave it out"
            )
        log.info(f"--cache ram: the decoded images take {size} of memory")
        for split in paths:
            pixels[split] = image_views(np.empty(n_bytes[split], np.uint8), sizes[split])
            jobs = pool.map(decode_into, pixels[split], paths[split])
            list(tqdm(jobs, f"decoding {split}", len(paths[split]), unit="img", disable=None))
    return {split: replace(images, pixels=pixels[split]) for split, images in image_sets.items()}


def decode_into(pixels: np.ndarray, path: str) -> None:
    """Decode an image file into a (H, W, 3) uint8 array."""
    pixels[:] = read_image(path).permute(1, 2, 0).numpy()


def free_memory(root: str | Path = "/") -> int | None:
    """Return the bytes of memory that this process may still take, None where the system does not say.

    It is the least of what is free on the machine and what the limits of its cgroup and of those around it leave, as
    containers and job schedulers set them. root: the folder that holds proc and sys.
    """
    root, free = Path(root), []
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free.append(1024 * int(line.split()[1]))
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controller, group = line.split(":", 2)
            if controller in CGROUP_FILES:
                mount, *names = CGROUP_FILES[controller]
                group = PurePosixPath(group.lstrip("/"))  # a container may see only its own, on top
                free += [left_in_cgroup(root / mount / above, *names) for above in (group, *group.parents)]
    return min((n_bytes for n_bytes in free if n_bytes is not None), default=None)


def left_in_cgroup(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Return the bytes that a cgroup's limit leaves, None where it has none; cached pages of files count as left.

    limit, used: names of files. cached: name of a line in memory.stat.
    """
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        n_cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[cached]
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(n_cached)
    return None
