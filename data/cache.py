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

CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where version 2 (no controller is named) and version 1 of cgroups say what memory is left; see left_in_cgroup."""


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
    names = {split: images.names for split, images in image_sets.items() if images.pixels is None}
    with ThreadPoolExecutor() as pool:
        sizes = {split: np.array(list(pool.map(image_size, paths)), np.int64) for split, paths in names.items()}
    n_bytes = {split: int(3 * heights_widths.prod(1).sum()) for split, heights_widths in sizes.items()}
    needed, free = sum(n_bytes.values()) * n_copies, free_memory()
    size = f"{needed / 1e9:.1f} GB"
    if free is not None and needed > 0.9 * free:
        raise InputError(
            f"--cache ram: the decoded images take {size}, but only {free / 1e9:.1f} GB are free: leave it out"
        )
    print(f"--cache ram: the decoded images take {size} of memory")
    kept = {split: image_views(np.empty(n_bytes[split], np.uint8), sizes[split]) for split in names}
    for split, paths in names.items():
        decode_into(kept[split], paths, split)
    return {split: replace(images, pixels=kept.get(split, images.pixels)) for split, images in image_sets.items()}


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
        list(tqdm(jobs, f"decoding {split}", len(paths), unit="img", disable=None))
