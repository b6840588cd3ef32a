"""Keep decoded images in memory."""

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
"""Memory cgroups by controller name, "" for version 2: (mount point, the names that left_in_cgroup takes)."""


def image_views(flat: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return views of the images in a flat array, without copying.

    Args:
        flat: uint8, the pixels of N images one after the other.
        sizes: (N, 2) int64, heights and widths.

    Returns:
        (N,) objects, each an image (H, W, 3) uint8.
    """
    images = np.empty(len(sizes), dtype=object)
    stops = np.cumsum(3 * sizes.prod(1))
    for i, ((height, width), stop) in enumerate(zip(sizes, stops)):
        images[i] = flat[stop - 3 * height * width : stop].reshape(height, width, 3)
    return images


def cached(image_sets: Mapping[str, ImageSet], n_copies: int = 1) -> dict[str, ImageSet]:
    """Decode image sets into memory that forked loader workers share.

    Args:
        image_sets: {split: images}.
        n_copies: number of processes on this machine that do this at the same time, each into memory of its own.

    Raises:
        InputError: the images do not fit into the free memory, or one cannot be decoded.
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
    """Return the bytes of memory that this process may still use; None if the system does not say.

    This is the smallest of what is free on the machine and what the limits of its cgroup and all outer ones leave.
    Containers and job schedulers set such limits.

    Args:
        root: folder that holds proc and sys.
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
                group = PurePosixPath(group.lstrip("/"))  # in a container, outer groups may be missing
                free += [left_in_cgroup(root / mount / above, *names) for above in (group, *group.parents)]
    return min((n_bytes for n_bytes in free if n_bytes is not None), default=None)


def left_in_cgroup(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Return the bytes that the limit of a cgroup leaves; None if it has no limit.

    Cached pages of files count as free.

    Args:
        folder: folder of the cgroup.
        limit: name of the file that holds the limit.
        used: name of the file that holds the memory in use.
        cached: name of the line in memory.stat that counts cached pages.
    """
    with contextlib.suppress(OSError, ValueError):  # the limit may be "max"
        n_cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[cached]
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(n_cached)
    return None
