"""Decoded images in memory: the same pixels, refused where they do not fit."""

import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_class_folders
from PIL import ExifTags, Image

import datasets
from data.cache import cached, free_memory, image_views
from data.images import ImageSet, hold_out_classes
from support.errors import InputError


@pytest.fixture
def images(class_folders):
    """Ten training images of two classes."""
    return datasets.load_dataset("tiny", class_folders)[0]


def test_views_share_the_memory_of_the_flat_array():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, (7, 2))
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    flat = np.concatenate([image.ravel() for image in images])
    views = image_views(flat, sizes)
    assert all((views[i] == images[i]).all() and np.shares_memory(views[i], flat) for i in range(7))


def test_cached_pixels_are_the_same_and_need_no_file(class_folders, caplog):
    write_class_folders(class_folders / "more", per_class=(2, 3, 2, 2), size=51)
    small, large = (datasets.load_dataset(name, class_folders)[0] for name in ("tiny", "more"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20), "red").save(large.names[0], exif=exif)
    images = replace(small, names=small.names[:3] + large.names, labels=np.arange(8) % 4, class_names=list("abcd"))
    expected = [images.read(i) for i in range(8)]
    kept = cached({"train": images})["train"]
    assert "--cache ram: the decoded images take 0.0 GB" in caplog.text
    for name in images.names:
        os.unlink(name)
    assert all((kept.read(i) == image).all() for i, image in enumerate(expected))
    held_out = hold_out_classes(kept, 0.5)[1]
    assert all((held_out.read(i) == expected[j]).all() for i, j in enumerate((2, 3, 6, 7)))
    assert cached({"train": kept})["train"].pixels is kept.pixels


def test_what_does_not_fit_is_refused(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")  # 10 kB, of which 15,000 decoded are 3.6 TB
    half = ImageSet([str(tmp_path / "large.png")] * 7500, np.zeros(7500, dtype=int), ["a"])
    with pytest.raises(InputError, match=r"--cache ram: the decoded images take 3645\.0 GB, but only .* GB are free"):
        cached({"train": half, "test": half})


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="free memory is not known here")
def test_each_process_needs_memory_of_its_own(images):
    assert free_memory() > 2**20
    with pytest.raises(InputError, match="--cache ram: the decoded images take 57600"):
        cached({"train": images}, n_copies=10**9)


def test_an_image_that_cannot_be_decoded_is_named(images):
    with open(images.names[4], "r+b") as file:
        file.truncate(700)
    with pytest.raises(InputError, match=f"cannot decode the image {images.names[4]}"):
        cached({"train": images})
    os.unlink(images.names[4])
    with pytest.raises(InputError, match=f"the image {images.names[4]}"):
        cached({"train": images})


def write_cgroup(folder, limit, used, cached, is_first_version=False):
    """Write the files of a cgroup that tell of its memory; version 1 has other names than version 2."""
    names = ("memory.max", "memory.current", "inactive_file")
    if is_first_version:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 6\n{names[2]} {cached}\n")


def test_free_memory_is_what_the_machine_and_all_cgroups_around_the_process_leave(tmp_path):
    assert free_memory(tmp_path) is None
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(tmp_path) == 4_096_000
    groups, top = tmp_path / "proc" / "self" / "cgroup", tmp_path / "sys" / "fs" / "cgroup"
    groups.write_text("0::/job/step: 1\n")
    write_cgroup(top / "job" / "step: 1", "max", 500, 100)
    assert free_memory(tmp_path) == 4_096_000
    write_cgroup(top / "job", 1_000_000, 900_000, 300_000)
    assert free_memory(tmp_path) == 400_000
    write_cgroup(top / "job" / "step: 1", 100_000, 500, 100)
    assert free_memory(tmp_path) == 99_600
    groups.write_text("0::/of/the/host\n")  # as a container sees it, whose own cgroup is on top
    write_cgroup(top, 20_000, 5_000, 0)
    assert free_memory(tmp_path) == 15_000
    groups.write_text("11:cpu,cpuacct:/a\n4:memory:/docker/b\n1:name=systemd:/c\n0::/\n")
    write_cgroup(top, "max", 5_000, 0)
    write_cgroup(top / "memory", 2**63 - 4096, 7_000, 0, is_first_version=True)
    assert free_memory(tmp_path) == 4_096_000
    write_cgroup(top / "memory" / "docker" / "b", 60_000, 50_000, 25_000, is_first_version=True)
    assert free_memory(tmp_path) == 35_000
