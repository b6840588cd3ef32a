"""Decoded images in memory and on disk: the same pixels, built once, refused where they do not fit."""

import multiprocessing
import os
import resource
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_class_folders
from PIL import Image

import datasets
from data.cache import cached, free_memory, image_views
from data.images import ImageSet, hold_out_classes
from support.errors import InputError


@pytest.fixture
def images(class_folders):
    """Ten training images of two classes."""
    return datasets.load_dataset("tiny", class_folders)[0]


def build(images, folder, kind="disk", **options):
    return cached({"train": images}, kind, folder, **options)["train"]


def assert_same_pixels(one, other):
    assert len(one) == len(other)
    assert all((one.read(i) == other.read(i)).all() for i in range(len(one)))


def test_views_share_the_memory_of_the_flat_array():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, (7, 2))
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    flat = np.concatenate([image.ravel() for image in images])
    views = image_views(flat, sizes)
    assert all((views[i] == images[i]).all() and np.shares_memory(views[i], flat) for i in range(7))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_pixels_are_the_same_and_need_no_file(class_folders, tmp_path, kind, capsys):
    write_class_folders(class_folders / "more", per_class=(2, 3, 2, 2), size=51)
    small, large = (datasets.load_dataset(name, class_folders)[0] for name in ("tiny", "more"))
    images = replace(small, names=small.names[:3] + large.names, labels=np.arange(8) % 4, class_names=list("abcd"))
    expected = [images.read(i) for i in range(8)]
    kept = build(images, tmp_path / "cache", kind)
    assert f"--cache {kind}: the decoded images take 0.0 GB" in capsys.readouterr().out
    for name in images.names:
        os.unlink(name)
    assert all((kept.read(i) == image).all() for i, image in enumerate(expected))
    held_out = hold_out_classes(kept, 0.5)[1]
    assert all((held_out.read(i) == expected[j]).all() for i, j in enumerate((2, 3, 6, 7)))
    assert build(kept, tmp_path / "cache", kind).pixels is kept.pixels


def test_no_cache_and_rendered_images_change_nothing(images, shapes, tmp_path):
    assert build(images, tmp_path / "cache", "none").pixels is None
    assert build(shapes[0], tmp_path / "cache").pixels is shapes[0].pixels
    assert not (tmp_path / "cache").exists()


def test_splits_have_files_of_their_own(images, tmp_path):
    sets = {"train": images, "": images, "Set 1": replace(images, names=images.names[::-1])}
    built = cached(sets, "disk", tmp_path / "cache")
    assert list(built) == list(sets)
    names = sorted(os.listdir(tmp_path / "cache"))
    assert [name.split("_")[1] for name in names] == ["set1", "set1", "test", "test", "train", "train"]
    assert {name.split(".")[1] for name in names} == {"bin", "npz"}
    for split, images in sets.items():
        assert_same_pixels(built[split], images)


def test_a_disk_cache_is_reused_however_the_folder_is_spelt(class_folders, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(class_folders)
    monkeypatch.chdir(tmp_path)
    inodes = set()
    for source in (class_folders, "source", "./source/../link"):
        images, _ = datasets.load_dataset("tiny", source)
        assert_same_pixels(build(images, tmp_path / "cache"), images)
        inodes.add(tuple((name, (tmp_path / "cache" / name).stat().st_ino) for name in os.listdir(tmp_path / "cache")))
    assert len(inodes) == 1


def test_a_changed_image_rebuilds_the_same_file_and_no_other(class_folders, images, tmp_path):
    write_class_folders(class_folders / "more")
    for name in ("tiny", "more"):
        first = build(datasets.load_dataset(name, class_folders)[0], tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(before) == 4
    os.replace(images.names[0], images.names[3])
    changed = replace(images, names=images.names[1:], labels=images.labels[1:])
    rebuilt = build(changed, tmp_path / "cache")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert set(after) == set(before)
    assert sum(after[name] != before[name] for name in after) == 2
    assert_same_pixels(rebuilt, changed)
    assert_same_pixels(first, datasets.load_dataset("more", class_folders)[0])


def test_an_image_of_the_same_size_is_a_change(tmp_path):
    path = tmp_path / "a.bmp"
    for time, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        Image.new("RGB", (5, 4), colour).save(path)
        os.utime(path, (time, time))
        kept = build(ImageSet([str(path)], np.zeros(1, dtype=int), ["a"]), tmp_path / "cache")
        assert (kept.pixels[0] == colour).all()


def test_half_built_caches_of_killed_runs_are_removed_after_a_day(images, tmp_path):
    killed, running = tmp_path / "decoded_train_0.bin.1.part", tmp_path / "decoded_train_1.npz.2.part"
    for path in (killed, running):
        path.touch()
    os.utime(killed, (0, 0))
    build(images, tmp_path)
    assert not killed.exists()
    assert running.exists()


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "cut sidecar", "junk sidecar", "empty sidecar", "other sidecar", "no sidecar"]
)
def test_damaged_disk_caches_are_rebuilt(images, tmp_path, damage):
    build(images, tmp_path)
    path = next(tmp_path.glob("*.npz" if "sidecar" in damage else "*.bin"))
    pixels = next(tmp_path.glob("*.bin"))
    whole = pixels.read_bytes()
    if damage == "other sidecar":
        np.savez(path, sizes=np.ones((3, 2), dtype=np.int64))
    elif damage == "no sidecar":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5] if "cut" in damage else b"junk" if "junk" in damage else b"")
    assert_same_pixels(build(images, tmp_path), images)
    assert pixels.read_bytes() == whole
    assert path.stat().st_size > 0


def build_and_compare(images, folder):
    assert_same_pixels(build(images, folder), images)


def test_processes_that_build_the_same_disk_cache_leave_a_whole_one(images, tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=build_and_compare, args=(images, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(os.listdir(tmp_path / "cache")) == 2
    build_and_compare(images, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_does_not_fit_is_refused(tmp_path, kind):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")  # 10 kB, of which 15,000 decoded are 3.6 TB
    half = ImageSet([str(tmp_path / "large.png")] * 7500, np.zeros(7500, dtype=int), ["a"])
    message = rf"--cache {kind}: the decoded images take 3645\.0 GB, but only .* GB .* free; use --cache "
    with pytest.raises(InputError, match=message + {"ram": "disk", "disk": "none"}[kind]):
        cached({"train": half, "": half}, kind, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="free memory is not known here")
def test_each_process_needs_memory_of_its_own(images, tmp_path):
    assert free_memory() > 2**20
    with pytest.raises(InputError, match="--cache ram: the decoded images take 57600"):
        build(images, tmp_path, "ram", n_copies=10**9)


def refusal(images, folder, kind="disk"):
    """Return the message of a cache that is refused and leaves nothing behind."""
    with pytest.raises(InputError) as error:
        build(images, folder, kind)
    assert not folder.is_dir() or os.listdir(folder) == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_disk_refuses_is_one_line(images, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(images, tmp_path / "file" / "cache")
    assert message.startswith(f"--cache disk: the decoded images cannot be kept in {tmp_path}/file/cache (Not a dir")
    assert message.endswith("; use --cache none, or another --save_path")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # stands for a disk that fills up
    try:
        assert "cannot be kept in" in refusal(images, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_an_image_that_cannot_be_decoded_is_named(images, tmp_path, kind):
    with open(images.names[4], "r+b") as file:
        file.truncate(700)
    assert f"cannot decode the image {images.names[4]}" in refusal(images, tmp_path / "cache", kind)
    os.unlink(images.names[4])
    assert f"the image {images.names[4]}" in refusal(images, tmp_path / "cache", kind)


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
