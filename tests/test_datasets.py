"""Readers, decoding, transforms, class-balanced batches and the rendered data set."""

import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
import torch
from conftest import write_class_folders
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.stats import binomtest, chisquare
from sklearn.metrics import normalized_mutual_info_score
from torchvision import transforms

import datasets


def test_first_half_of_the_classes_trains(tmp_path):
    root = write_class_folders(tmp_path / "cars196", per_class=(2, 1, 3, 2, 4))
    (root / "images" / "class_01" / "._0.jpg").write_bytes(b"litter")
    (root / "images" / ".hidden").mkdir()
    (root / "images" / "empty").mkdir()
    train, tests = datasets.load_dataset("cars196", tmp_path)
    test = tests[""]
    assert train.class_names == ["class_00", "class_01"]
    assert test.class_names == ["class_02", "class_03", "class_04"]
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    relative = [os.path.relpath(path, root / "images") for path in train.names]
    assert relative == ["class_00/0.jpg", "class_00/1.jpg", "class_01/0.jpg"]


def table_of(name, layout):
    return layouts.TABLE.get((name, layout)) or layouts.TABLE[name]


@pytest.mark.parametrize(("name", "layout"), layouts.LAYOUTS)
def test_layouts_are_read_as_the_table_says(tmp_path, name, layout):
    layouts.LAYOUTS[name, layout](tmp_path)
    train, tests = datasets.load_dataset(name, tmp_path)
    expected = table_of(name, layout)
    assert (train.class_names, train.labels.tolist()) == expected["train"]
    assert list(tests) == [split for split in expected if split not in ("train", "queries")]
    for split, images in tests.items():
        assert (images.class_names, images.labels.tolist()) == expected[split]
        queries = expected.get("queries")
        assert (images.is_query is None) if queries is None else images.is_query.tolist() == [bool(q) for q in queries]
    for images in (train, *tests.values()):
        assert len(images.names) == len(images.labels)
        assert all(images.read(i).dtype == torch.uint8 for i in range(len(images)))


def message_of(name, source):
    with pytest.raises(datasets.DatasetError) as error:
        datasets.load_dataset(name, source)
    return str(error.value)


@pytest.mark.parametrize("name", [*datasets.PUBLISHED, "mine"])
def test_a_missing_folder_is_diagnosed(tmp_path, name):
    (tmp_path / "something").mkdir()
    message = message_of(name, tmp_path)
    assert f"no images of --dataset {name} in --source_path {tmp_path}" in message
    assert f"looked for  {datasets.PUBLISHED[name].layout if name in datasets.PUBLISHED else 'images/'}" in message
    assert f"found       {tmp_path} holds something" in message
    assert "to do       give the folder that holds" in message
    assert ("get it at" in message) == (name in datasets.PUBLISHED)
    assert "no folder" in message_of(name, tmp_path / "absent")


@pytest.mark.parametrize("name", datasets.PUBLISHED)
def test_wrong_nesting_by_one_level_is_diagnosed(tmp_path, name):
    layouts.LAYOUTS[name, "readme"](tmp_path / "a")
    root = tmp_path / "a" / name
    assert f"{root} is the data set itself: name it {name}" in message_of(name, root)
    (tmp_path / "b" / name).mkdir(parents=True)
    deeper = root.rename(tmp_path / "b" / name / "deeper")
    assert f"rename or move {deeper} to {tmp_path / 'b' / name}" in message_of(name, tmp_path / "b")


def test_another_data_set_is_not_to_be_renamed(tmp_path):
    layouts.LAYOUTS["cars196", "readme"](tmp_path)
    assert "rename" not in message_of("cub200", tmp_path)


def test_class_folders_one_level_deeper_are_diagnosed(tmp_path):
    write_class_folders(tmp_path / "mine")
    images = tmp_path / "mine" / "images"
    images.rename(tmp_path / "images")
    images.mkdir()
    (tmp_path / "images").rename(images / "extracted")
    assert f"hold no images but folders, extracted/class_00; move the images to {images}/<class>" in message_of(
        "mine", tmp_path
    )


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "cub200").mkdir()
    (tmp_path / "cub200" / "CUB_200_2011.tgz").write_bytes(b"")
    assert f"unpack {tmp_path / 'cub200' / 'CUB_200_2011.tgz'}" in message_of("cub200", tmp_path)


def test_too_few_classes(tmp_path):
    write_class_folders(tmp_path / "few", per_class=(2, 2, 2))
    assert "holds 3 classes with images; at least 4 are needed" in message_of("few", tmp_path)


LIST_FILES = {
    "online_products": ("Info_Files/Ebay_train.txt", 3),
    "in-shop": ("Eval/list_eval_partition.txt", 4),
    "vehicle_id": ("train_test_split/test_list_1600.txt", 2),
}


@pytest.mark.parametrize("name", LIST_FILES)
def test_list_files_that_are_missing_malformed_or_name_absent_images(tmp_path, name):
    layouts.LAYOUTS[name, "readme"](tmp_path)
    path, line = tmp_path / name / LIST_FILES[name][0], LIST_FILES[name][1]
    content = path.read_text()
    lines = content.splitlines()
    path.unlink()
    message = message_of(name, tmp_path)
    assert message.startswith(f"list file missing: looked for {path} or ")
    assert "holds" in message

    path.write_text("\n".join([*lines[: line - 1], "one", *lines[line:]]))
    assert f"{path}, line {line}: expected" in message_of(name, tmp_path)
    assert "found 'one'" in message_of(name, tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}, line 1: expected" in message_of(name, tmp_path)
    path.write_text("")
    assert f"{path}: holds no images" in message_of(name, tmp_path)

    path.write_text(content)
    train, tests = datasets.load_dataset(name, tmp_path)
    victims = (list(tests.values())[1] if name == "vehicle_id" else train).names[:4]
    for victim in victims:
        os.unlink(victim)
    message = message_of(name, tmp_path)
    assert f"{path}: 4 of " in message
    assert ", ...\n  get it at   http" in message
    assert os.path.basename(victims[0]) in message


def test_in_shop_status_and_online_products_ids_are_checked(tmp_path):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    path = tmp_path / "in-shop" / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("query", "probe", 1))
    message = message_of("in-shop", tmp_path)
    assert f"{path}, line 12: expected image_name item_id evaluation_status: train, query or gallery, found" in message
    path.write_text(path.read_text().replace("probe", "gallery").replace("query", "gallery"))
    assert "lists no image with the status query" in message_of("in-shop", tmp_path)
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    path = tmp_path / "online_products" / "Info_Files" / "Ebay_test.txt"
    path.write_text(path.read_text().replace(" 4 1 ", " four 1 ", 1))
    assert "line 2: expected image_id class_id super_class_id path, ids as whole numbers, found" in message_of(
        "online_products", tmp_path
    )


def test_annotations_of_cars_that_cannot_be_read(tmp_path):
    layouts.LAYOUTS["cars196", "official"](tmp_path)
    path = tmp_path / "cars196" / "cars_annos.mat"
    (tmp_path / "cars196" / "car_ims" / "000003.jpg").unlink()
    assert f"{path}: 1 of 16 listed images are not on disk" in message_of("cars196", tmp_path)
    path.write_bytes(b"nothing")
    assert f"{path}: cannot be read as the annotations" in message_of("cars196", tmp_path)
    path.unlink()
    assert f"list file missing: looked for {path}" in message_of("cars196", tmp_path)


def test_counts_that_differ_from_the_official_ones_are_warned_of(tmp_path, shapes):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    warnings = datasets.count_warnings("in-shop", *datasets.load_dataset("in-shop", tmp_path))
    assert "in-shop, query: 2 classes with 2 images; officially 3985 with 14218" in warnings
    assert "in-shop, gallery: 2 classes with 4 images; officially 3985 with 12612" in warnings
    assert "in-shop, all: 4 classes with 14 images; officially 7982 with 52712" in warnings
    assert datasets.count_warnings("shapes", shapes[0], {"": shapes[1]}) == []


def test_command_prints_splits_and_checks_images(tmp_path, capsys):
    write_class_folders(tmp_path / "mine", per_class=(2, 5, 3, 1))
    assert datasets.main(["mine", "--source_path", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["train", "2", "7", "2,", "3,", "5"], ["test", "2", "4", "1,", "2,", "3"]]
    assert datasets.main(["mine", "--source_path", str(tmp_path), "--check"]) == 0
    assert "0 images cannot be decoded" in capsys.readouterr().out
    broken = tmp_path / "mine" / "images" / "class_01" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    assert datasets.main(["mine", "--source_path", str(tmp_path), "--check"]) == 2
    printed = capsys.readouterr().out
    assert f"cannot decode the image {broken}" in printed
    assert "1 images cannot be decoded" in printed
    assert datasets.main(["absent", "--source_path", str(tmp_path)]) == 2
    assert "no images of --dataset absent" in capsys.readouterr().err


def test_jpeg_pixels_are_those_of_pillow(tmp_path):
    root = write_class_folders(tmp_path / "set")
    path = str(root / "images" / "class_00" / "0.jpg")
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert (datasets.read_image(path).permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("L", "CMYK") else "a.png")
    image.save(path)
    decoded = datasets.read_image(str(path))
    assert decoded.dtype == torch.uint8
    with Image.open(path) as stored:
        assert (decoded.permute(1, 2, 0).numpy() == np.asarray(stored.convert("RGB"))).all()


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    decoded = datasets.read_image(str(tmp_path / "ramp.png"))
    assert (decoded[0].numpy() == ramp >> 8).all()


def test_other_formats_under_the_name_of_jpeg(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((10, 20), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("animation.gif", "deep.png"):
        path = (tmp_path / name).rename(tmp_path / f"{name}.jpg")
        decoded = datasets.read_image(str(path))
        assert decoded.dtype == torch.uint8
        assert decoded.shape == (3, 10, 20)


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(datasets.DatasetError) as error:
        datasets.read_image(str(tmp_path / "a.png"))
    assert str(error.value) == f"cannot decode the image {tmp_path / 'a.png'} (first line); repair or remove it"


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_broken_images_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        source = write_class_folders(tmp_path / "set") / "images" / "class_00" / "0.jpg"
        content = source.read_bytes()[:700]
    path.write_bytes(content)
    with pytest.raises(datasets.DatasetError, match=r"cannot decode the image .*broken\.jpg"):
        datasets.read_image(str(path))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_broken_image_in_a_loader_is_one_line(class_folders, n_workers):
    broken = class_folders / "tiny" / "images" / "class_00" / "3.jpg"
    broken.write_bytes(b"nothing")
    train, _ = datasets.load_dataset("tiny", class_folders)
    dataset = datasets.ImageDataset(train, datasets.test_transform(32))
    loader = datasets.make_loader(dataset, n_workers=n_workers, pin_memory=False, batch_size=4)
    with pytest.raises(datasets.DatasetError) as error:
        list(loader)
    assert str(error.value).startswith(f"cannot decode the image {broken} ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_pixels_are_the_same_and_are_read_once(class_folders, tmp_path, kind, monkeypatch):
    write_class_folders(class_folders / "more", per_class=(2, 3, 2, 2), size=51)
    small, _ = datasets.load_dataset("tiny", class_folders)
    large, _ = datasets.load_dataset("more", class_folders)
    images = replace(small, names=small.names[:3] + large.names, labels=np.zeros(3 + len(large), dtype=int))
    cached = datasets.cached([images], kind, tmp_path / "cache", ["train"])[0]
    monkeypatch.setattr(datasets, "read_image", None)
    kept = [cached.read(i) for i in range(len(images))]
    monkeypatch.undo()
    assert {tuple(image.shape) for image in kept} == {(3, 40, 48), (3, 51, 59)}
    assert all((image == images.read(i)).all() for i, image in enumerate(kept))
    assert datasets.cached([cached], kind, tmp_path / "cache", ["train"])[0] is cached


def test_disk_cache_is_reused_until_an_image_changes(class_folders, tmp_path, monkeypatch):
    images, _ = datasets.load_dataset("tiny", class_folders)
    datasets.cached([images], "disk", tmp_path / "cache", ["train"])[0]
    first = sorted(os.listdir(tmp_path / "cache"))
    assert len(first) == 2
    monkeypatch.setattr(datasets, "read_image", None)
    again = datasets.cached([images], "disk", tmp_path / "cache", ["train"])[0]
    monkeypatch.undo()
    assert (again.read(3) == images.read(3)).all()
    os.replace(images.names[0], images.names[3])
    changed = replace(images, names=images.names[1:], labels=images.labels[1:])
    rebuilt = datasets.cached([changed], "disk", tmp_path / "cache", ["train"])[0]
    second = sorted(os.listdir(tmp_path / "cache"))
    assert len(second) == 2
    assert second != first
    assert (rebuilt.read(2) == changed.read(2)).all()


def test_half_built_caches_of_killed_runs_are_removed_after_a_day(class_folders, tmp_path):
    images, _ = datasets.load_dataset("tiny", class_folders)
    killed, running = tmp_path / "decoded_train_0.1.part", tmp_path / "decoded_train_1.2.part"
    for path in (killed, running):
        path.touch()
    os.utime(killed, (0, 0))
    datasets.cached([images], "disk", tmp_path, ["train"])[0]
    assert not killed.exists()
    assert running.exists()


def test_two_runs_that_build_the_same_disk_cache_leave_a_whole_one(class_folders, tmp_path, monkeypatch):
    images, _ = datasets.load_dataset("tiny", class_folders)
    original, folder = datasets.read_image, tmp_path / "cache"

    def read_while_another_run_finishes(path):
        monkeypatch.setattr(datasets, "read_image", original)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        datasets.cached([images], "disk", folder, ["train"])[0]
        return original(path)

    class OneThread(datasets.ThreadPoolExecutor):
        def __init__(self):
            super().__init__(max_workers=1)

    monkeypatch.setattr(datasets, "ThreadPoolExecutor", OneThread)
    monkeypatch.setattr(datasets, "read_image", read_while_another_run_finishes)
    datasets.cached([images], "disk", folder, ["train"])[0]
    assert len(os.listdir(folder)) == 2
    monkeypatch.setattr(datasets, "read_image", None)
    again = datasets.cached([images], "disk", folder, ["train"])[0]
    monkeypatch.undo()
    assert all((again.read(i) == images.read(i)).all() for i in range(len(images)))


def test_caches_refuse_politely(class_folders, tmp_path, monkeypatch):
    images, _ = datasets.load_dataset("tiny", class_folders)
    monkeypatch.setattr(datasets, "free_memory", lambda: 50_000)
    with pytest.raises(datasets.DatasetError, match="--cache ram: the decoded images take 0.0 GB.*--cache disk"):
        datasets.cached([images], "ram", tmp_path, ["train"])[0]
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))
    with pytest.raises(datasets.DatasetError, match="--cache disk: .*use --cache none"):
        datasets.cached([images], "disk", tmp_path, ["train"])[0]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        datasets.DatasetError, match="--cache disk: the decoded images cannot be kept in .*/file/cache "
    ):
        datasets.cached([images], "disk", tmp_path / "file" / "cache", ["train"])[0]
    with open(images.names[4], "r+b") as file:
        file.truncate(700)
    for kind in ("ram", "disk"):
        with pytest.raises(datasets.DatasetError, match=f"cannot decode the image {images.names[4]}"):
            datasets.cached([images], kind, tmp_path / "cache", ["train"])[0]
    assert os.listdir(tmp_path / "cache") == []


def test_free_memory_is_told_on_linux():
    if os.path.exists("/proc/meminfo"):
        assert datasets.free_memory() > 2**20


def test_evaluation_transform_is_resize_and_centre_crop():
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8).repeat(2, 0))
    ours = datasets.test_transform(56)(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    pillow = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(pixels)
    difference = ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow).astype(int)
    assert ours.shape == (3, 56, 56)
    assert np.abs(difference).max() <= 2


def test_augmentation_depends_on_the_seed_alone(shapes):
    dataset = datasets.ImageDataset(shapes[0], datasets.train_transform(48, flip=True))
    torch.manual_seed(0)
    first, label = dataset[(3, 17, 99)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again, _ = dataset[(3, 17, 99)]
    other, _ = dataset[(3, 17, 100)]
    assert label == 17
    assert first.dtype == torch.uint8
    assert (first == again).all()
    assert (first != other).any()
    torch.manual_seed(0)
    assert (torch.get_rng_state() == state).all()


def test_only_the_class_task_flips():
    image = torch.arange(64 * 64 * 3, dtype=torch.float).reshape(3, 64, 64) / 48
    ramp = datasets.ImageSet(["ramp"], np.zeros(1, int), ["a"], image.byte().permute(1, 2, 0).numpy()[None])
    ramp.pixels[:] = np.arange(64, dtype=np.uint8)[:, None] * 3

    def n_flipped(flip):
        dataset = datasets.ImageDataset(ramp, datasets.train_transform(32, flip))
        rows = [dataset[(0, 0, seed)][0][0, 16].int() for seed in range(200)]
        return sum(bool(row[0] > row[-1]) for row in rows)

    assert n_flipped(False) == 0
    assert binomtest(n_flipped(True), 200, 0.5).pvalue > 1e-3


def epoch_of(sampler, labels, epoch=0, n_batches=10):
    sampler.set_epoch(epoch, np.asarray(labels), n_batches)
    return list(sampler)


LABELS = np.repeat(np.arange(7), [9, 4, 12, 5, 4, 6, 1])


def test_batches_are_runs_of_one_class_without_repeats():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0))
    batches = epoch_of(sampler, LABELS, n_batches=50)
    assert len(batches) == len(sampler) == 50
    for batch in batches:
        for start in range(0, 16, 4):
            run = batch[start : start + 4]
            indices = [index for index, _, _ in run]
            assert len({label for _, label, _ in run}) == 1
            assert (LABELS[indices] == run[0][1]).all()
            assert len(set(indices)) == min(4, (run[0][1] == LABELS).sum())


def test_the_two_classes_before_are_not_drawn_and_the_others_evenly():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0))
    classes = [draw[1] for batch in epoch_of(sampler, LABELS, n_batches=3000) for draw in batch[::4]]
    assert all(c not in classes[max(i - 2, 0) : i] for i, c in enumerate(classes))
    assert chisquare(list(Counter(classes).values())).pvalue > 1e-3
    after = Counter(classes[i] for i in range(2, len(classes)) if set(classes[i - 2 : i]) == {0, 1})
    assert set(after) == {2, 3, 4, 5, 6}
    assert chisquare(list(after.values())).pvalue > 1e-3


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_few_classes_still_fill_batches(n_classes):
    sampler = datasets.ClassBalancedBatchSampler(6, 2, seed=(1, 0))
    batches = epoch_of(sampler, np.arange(12) % n_classes)
    assert {label for batch in batches for _, label, _ in batch} == set(range(n_classes))


def test_order_depends_on_seed_and_epoch_only():
    def draws(seed, epoch):
        return epoch_of(datasets.ClassBalancedBatchSampler(8, 4, seed=(seed, 0)), LABELS, epoch)

    sampler = datasets.ClassBalancedBatchSampler(8, 4, seed=(1, 0))
    later = [epoch_of(sampler, LABELS, epoch) for epoch in range(3)][2]
    assert later == draws(1, 2)
    assert draws(1, 0) != draws(1, 1)
    assert draws(1, 0) != draws(2, 0)


def test_one_image_per_class_shuffles_all_images():
    sampler = datasets.ClassBalancedBatchSampler(10, 1, seed=(1, 0))
    drawn = [draw for batch in epoch_of(sampler, LABELS, n_batches=4) for draw in batch]
    assert len({index for index, _, _ in drawn}) == 40
    assert all(LABELS[index] == label for index, label, _ in drawn)
    assert [index for index, _, _ in drawn] != sorted(index for index, _, _ in drawn)


def test_replaced_images_keep_their_label_at_the_stated_rate():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0), random_pick_p=0.2)
    drawn = [draw for batch in epoch_of(sampler, LABELS, n_batches=1000) for draw in batch]
    labels = np.array([label for _, label, _ in drawn])
    sources = LABELS[[index for index, _, _ in drawn]]
    # a replacement comes from any of the 7 clusters with equal chance, so also from its own
    assert binomtest(int((labels != sources).sum()), len(drawn), 0.2 * 6 / 7).pvalue > 1e-3
    counts = np.bincount(sources[labels != sources], minlength=7)
    assert chisquare(counts).pvalue > 1e-3


def test_gaps_in_the_labels_are_harmless():
    labels = np.array([0, 0, 5, 5, 9, 9, 2, 2])
    drawn = [draw for batch in epoch_of(datasets.ClassBalancedBatchSampler(4, 2, seed=(0,)), labels) for draw in batch]
    assert {label for _, label, _ in drawn} == {0, 2, 5, 9}


def test_batch_size_must_fit():
    with pytest.raises(ValueError, match="not a multiple"):
        datasets.ClassBalancedBatchSampler(10, 4, seed=(0,))


def test_workers_change_nothing(shapes):
    dataset = datasets.ImageDataset(shapes[0], datasets.train_transform(32, flip=True))
    passes = []
    for n_workers in (0, 2):
        sampler = datasets.ClassBalancedBatchSampler(8, 4, seed=(1, 0), random_pick_p=0.5)
        loader = datasets.make_loader(dataset, n_workers=n_workers, pin_memory=False, batch_sampler=sampler)
        batches = []
        for epoch in range(2):
            sampler.set_epoch(epoch, shapes[0].labels, 3)
            batches += list(loader)
        passes.append(batches)
    assert len(passes[0]) == len(passes[1]) == 6
    for (images, labels), (other_images, other_labels) in zip(*passes):
        assert (images == other_images).all()
        assert (labels == other_labels).all()


def test_shapes_are_as_described(shapes):
    train, test = shapes
    for images in shapes:
        assert images.pixels.shape == (24 * 24, 64, 64, 3)
        assert images.pixels.dtype == np.uint8
        assert np.bincount(images.labels).tolist() == [24] * 24
        for factor, levels in images.factors.items():
            # every class has each level equally often: the factor says nothing about the class
            assert normalized_mutual_info_score(images.labels, levels) < 1e-9, factor
    assert len(np.unique(np.concatenate([train.pixels, test.pixels]).reshape(1152, -1), axis=0)) == 1152
    assert not set(train.class_names) & set(test.class_names)


def test_shapes_render_the_same_every_time(shapes):
    again, _ = datasets.render_shapes()
    assert (again.pixels == shapes[0].pixels).all()


def test_backgrounds_are_seen_in_the_corners(shapes):
    corners = shapes[0].pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    levels = shapes[0].factors["background"]
    centres = np.stack([corners[levels == level].mean(0) for level in range(levels.max() + 1)])
    nearest = ((corners[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == levels).mean() > 0.95


def test_class_folders_that_would_vanish_are_told(tmp_path):
    images = write_class_folders(tmp_path / "mine", per_class=(2,) * 6) / "images"
    (images / "empty").mkdir()
    splits = datasets.load_dataset("mine", tmp_path)
    assert datasets.count_warnings("mine", *splits) == [f"{images}: 1 folders without images are no classes: empty"]
    (images / "class_01").rename(images / "class_01_")
    (images / "class_01").mkdir()
    (images / "class_01_").rename(images / "class_01" / "sub")
    message = message_of("mine", tmp_path)
    assert f"{images}: 1 of 7 class folders hold no images but folders, class_01/sub; move the images" in message
    (images / "gone").symlink_to(tmp_path / "nowhere")
    assert f"{images}: 1 of 8 class folders are dead links: gone; mend or remove" in message_of("mine", tmp_path)


def test_dead_links_and_pipes_are_no_images(tmp_path):
    folder = write_class_folders(tmp_path / "mine") / "images" / "class_00"
    os.mkfifo(folder / "pipe.jpg")
    assert len(datasets.load_dataset("mine", tmp_path)[0]) == 10
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert "1 of 21 images are dead links: class_00/gone.jpg; mend or remove" in message_of("mine", tmp_path)
    layouts.LAYOUTS["vehicle_id", "readme"](tmp_path)
    path = tmp_path / "vehicle_id" / "image" / "0000002.jpg"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    message = message_of("vehicle_id", tmp_path)
    assert f"1 of 8 images that {path.parent.parent}/train_test_split/train_list.txt lists are dead links" in message


@pytest.mark.parametrize("name", ["online_products", "in-shop"])
def test_a_header_that_is_not_there_is_told(tmp_path, name):
    layouts.LAYOUTS[name, "readme"](tmp_path)
    path = tmp_path / name / LIST_FILES[name][0]
    lines = path.read_text().splitlines()
    header = 0 if name == "online_products" else 1
    path.write_text("\n".join(lines[:header] + lines[header + 1 :]))
    message = f"{path}, line {header + 1}: expected the header {' '.join(lines[header].split())}, found"
    assert message in message_of(name, tmp_path)
    path.write_text("\n\n".join(lines))  # blank lines count for nothing, but for the number of a line
    datasets.load_dataset(name, tmp_path)
    path.write_text("\n\n".join([*lines, "one"]))
    assert f"{path}, line {2 * len(lines) + 1}: expected" in message_of(name, tmp_path)


def test_the_count_of_in_shop_is_compared(tmp_path):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    path = tmp_path / "in-shop" / "Eval" / "list_eval_partition.txt"
    content = path.read_text()
    path.write_text(content.replace("14", "15", 1))
    warnings = datasets.count_warnings("in-shop", *datasets.load_dataset("in-shop", tmp_path))
    assert f"{path}: lists 14 images; its first line says 15" in warnings
    path.write_text(content.split("\n", 1)[1])
    assert f"{path}, line 1: expected the number of images, found 'image_name" in message_of("in-shop", tmp_path)


def test_classes_on_both_sides_and_images_listed_twice_are_warned_of(tmp_path):
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    path = tmp_path / "online_products" / "Info_Files" / "Ebay_test.txt"
    row = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + f"{row}\n99 3 1 bicycle_final/3_0.JPG\n")
    warnings = datasets.count_warnings("online_products", *datasets.load_dataset("online_products", tmp_path))
    assert "online_products, test: 1 classes are trained on too: 3" in warnings
    assert "online_products, test: 1 of 10 images are listed before in the same split" in warnings


def test_list_files_with_spaces_marks_and_other_encodings(tmp_path):
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    for name, old, file in (("online_products", "3_0.JPG", LIST_FILES["online_products"][0]),
                            ("in-shop", "00_1_front.jpg", LIST_FILES["in-shop"][0])):  # fmt: skip
        path = tmp_path / name / file
        old = next(tmp_path.glob(f"{name}/**/{old}"))
        new = os.fsencode(old.parent) + b"/a \xe9  b.jpg"
        os.rename(old, new)
        tail = os.fsencode(old.relative_to(tmp_path / name / ("images" if name == "online_products" else "")))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(tail, os.path.dirname(tail) + b"/a \xe9  b.jpg"))
        train, tests = datasets.load_dataset(name, tmp_path)
        images = [images for images in (train, *tests.values()) if os.fsdecode(new) in images.names][0]
        assert images.read(images.names.index(os.fsdecode(new))).shape == (3, 40, 44)
        os.unlink(new)
        message_of(name, tmp_path).encode()  # can be printed


def test_classes_of_cars_without_annotations_are_left_out(tmp_path):
    layouts.LAYOUTS["cars196", "official"](tmp_path)
    path = tmp_path / "cars196" / "cars_annos.mat"
    content = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
    names = np.array(["Absent", *layouts.CARS], dtype=object).reshape(1, -1)
    for row in content["annotations"][0]:
        row["class"] += 1
    savemat(path, content | {"class_names": names})
    assert datasets.load_dataset("cars196", tmp_path)[0].class_names == layouts.CARS[:2]
    for row in content["annotations"][0]:
        row["class"] = np.minimum(row["class"], 4)
    savemat(path, content | {"class_names": names})
    assert f"{path} holds 3 classes with images; at least 4" in message_of("cars196", tmp_path)


@pytest.mark.parametrize("name", [*LIST_FILES, "cars196"])
def test_lists_that_lie_elsewhere_are_to_be_moved(tmp_path, name):
    layouts.LAYOUTS[name, "official" if name == "cars196" else "readme"](tmp_path)
    path = tmp_path / name / LIST_FILES.get(name, ("cars_annos.mat",))[0]
    (tmp_path / name / "a" / "b").mkdir(parents=True)
    elsewhere = path.rename(tmp_path / name / "a" / "b" / path.name)
    assert f"to do       move {elsewhere} to {path}\n  get it at   http" in message_of(name, tmp_path)
    if name != "cars196":
        elsewhere = elsewhere.rename(tmp_path / path.name)
        assert f"to do       move {elsewhere} to {path}\n" in message_of(name, tmp_path)


@pytest.mark.parametrize("name", ["img.zip", "img.7z", "img.RAR"])
def test_an_archive_one_level_deeper_is_to_be_unpacked(tmp_path, name):
    path = tmp_path / "in-shop" / "Img" / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert f"to do       unpack {path}" in message_of("in-shop", tmp_path)


def test_a_folder_of_several_data_sets_is_not_to_be_renamed(tmp_path):
    layouts.LAYOUTS["cars196", "official"](tmp_path)
    for part in ("car_ims", "cars_annos.mat"):
        (tmp_path / "cars196" / part).rename(tmp_path / part)
    (tmp_path / "cars196").rename(tmp_path / "cub200")
    message = message_of("cars196", tmp_path)
    assert f"move car_ims, and the lists that belong to it, to {tmp_path / 'cars196'}" in message
    assert "name it" not in message


@pytest.mark.parametrize("link", ["cub200", "cub200/images"])
def test_dead_links_at_the_top_are_told(tmp_path, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / link} is a dead link to {tmp_path / 'nowhere'}: mend it" in message_of("cub200", tmp_path)


def test_class_folders_out_of_place_are_to_be_moved(tmp_path, monkeypatch):
    layouts.LAYOUTS["cub200", "readme"](tmp_path)
    root = tmp_path / "cub200"
    message = f"{root / 'images'} is the data set's folder of images: name {root} cub200, and give {tmp_path}"
    assert message in message_of("cub200", root / "images")
    monkeypatch.chdir(root / "images")
    assert message in message_of("cub200", ".")
    (root / "images").rename(tmp_path / "classes")
    root.rmdir()
    (tmp_path / "classes").rename(root)
    assert f"move the class folders from {root} to {root / 'images'}" in message_of("cub200", tmp_path)
    flat = tmp_path / "flat" / "cub200" / "images"
    flat.mkdir(parents=True)
    (flat / "a.jpg").touch()
    assert f"{flat} holds images of no class, a.jpg; move each to {flat}/<class>" in message_of(
        "cub200", flat.parents[1]
    )


def test_folders_that_no_one_may_look_into(tmp_path, monkeypatch):
    (tmp_path / "cub200").mkdir()
    (tmp_path / "mine" / "locked").mkdir(parents=True)
    exists = Path.exists

    def refuse(path, **flags):
        if path.parent in (tmp_path / "cub200", tmp_path / "mine" / "locked"):
            raise PermissionError(13, "Permission denied")
        return exists(path, **flags)

    monkeypatch.setattr(Path, "exists", refuse)
    assert f"cannot look into the folder {tmp_path / 'cub200'} (Permission denied)" in message_of("cub200", tmp_path)
    assert f"cannot look into the folder {tmp_path / 'cub200'}" in message_of("absent", tmp_path / "cub200")
    assert "no images of --dataset mine" in message_of("mine", tmp_path)


def test_in_shop_under_the_name_of_its_archive(tmp_path):
    layouts.write_in_shop(tmp_path / "In-shop Clothes Retrieval Benchmark", "Img", "Eval")
    train, tests = datasets.load_dataset("in-shop", tmp_path)
    assert (train.class_names, train.labels.tolist()) == layouts.TABLE["in-shop"]["train"]
    assert tests[""].is_query.sum() == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "junk sizes", "empty sizes", "other sizes", "no sizes"])
def test_damaged_disk_caches_are_rebuilt(class_folders, tmp_path, damage):
    images, _ = datasets.load_dataset("tiny", class_folders)
    datasets.cached([images], "disk", tmp_path, ["train"])
    path = next(tmp_path.glob("*.npy" if "sizes" in damage else "*.bin"))
    whole = path.read_bytes()
    if damage == "other sizes":
        np.save(path, np.ones((3, 2), dtype=np.int64))
    elif damage == "no sizes":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-5], "junk sizes": b"junk"}.get(damage, b""))
    again = datasets.cached([images], "disk", tmp_path, ["train"])[0]
    assert all((again.read(i) == images.read(i)).all() for i in range(len(images)))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("refusing", ["os.posix_fallocate", "numpy.save", "pathlib.Path.rename"])
def test_a_disk_that_fills_up_or_refuses_is_one_line(class_folders, tmp_path, monkeypatch, refusing):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    images, _ = datasets.load_dataset("tiny", class_folders)
    monkeypatch.setattr(refusing, refuse)
    message = rf"--cache disk: .* cannot be kept in {tmp_path / 'cache'} \(No space left on device\); use --cache none"
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.cached([images], "disk", tmp_path / "cache", ["train"])
    assert os.listdir(tmp_path / "cache") == []


def test_the_space_of_a_disk_cache_is_taken_before_an_image_is_decoded(class_folders, tmp_path, monkeypatch):
    images, _ = datasets.load_dataset("tiny", class_folders)
    original, blocks = datasets.read_image, []

    def spy(path):
        blocks.append(next(tmp_path.glob("*.part")).stat().st_blocks)
        return original(path)

    monkeypatch.setattr(datasets, "read_image", spy)
    datasets.cached([images], "disk", tmp_path, ["train"])
    assert 512 * min(blocks) >= 10 * 3 * 40 * 48


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches_refuse_before_any_image_is_decoded(class_folders, tmp_path, kind, monkeypatch):
    train, tests = datasets.load_dataset("tiny", class_folders)
    monkeypatch.setattr(datasets, "free_memory", lambda: 100_000)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    monkeypatch.setattr(datasets, "read_image", None)
    with pytest.raises(datasets.DatasetError, match=f"--cache {kind}: the decoded images take"):
        datasets.cached([train, tests[""]], kind, tmp_path, ["train", "test"])  # either alone would fit


def test_a_disk_cache_goes_to_spawned_workers_by_its_path(class_folders, tmp_path):
    images, _ = datasets.load_dataset("tiny", class_folders)
    for _ in range(2):  # built, then reused
        store = datasets.cached([images], "disk", tmp_path, ["train"])[0].pixels
        sent = pickle.dumps(store)
        assert len(sent) < 2000 < store.flat.nbytes
        assert (pickle.loads(sent)[7] == store[7]).all()
    in_memory = datasets.cached([images], "ram", tmp_path, ["train"])[0].pixels
    assert (pickle.loads(pickle.dumps(in_memory))[7] == store[7]).all()


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_follows_control_groups(tmp_path, version):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    group = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    limit, used = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 90 kB\n")
    assert datasets.free_memory(tmp_path) == 90 * 1024
    write("proc/self/cgroup", "3:cpu:/other\n" + ("0::/job/step\n" if version == 2 else "4:memory:/job/step\n"))
    write(f"{group}/job/memory.{limit}", "50000\n")
    write(f"{group}/job/memory.{used}", "40000\n")
    write(f"{group}/job/memory.stat", "anon 5\ninactive_file 7000\n")
    write(f"{group}/job/step/memory.{limit}", "max\n" if version == 2 else "9223372036854771712\n")
    write(f"{group}/job/step/memory.{used}", "40000\n")
    write(f"{group}/job/step/memory.stat", "inactive_file 7000\n")
    assert datasets.free_memory(tmp_path) == 17_000


def test_classes_are_held_out_whole_and_relabelled():
    labels = np.array([0, 1, 2, 3, 4, 4, 3, 2, 0])
    images = datasets.ImageSet(
        list("abcdefghi"), labels, ["v", "w", "x", "y", "z"], np.arange(9).reshape(9, 1, 1, 1), {"light": labels * 2}
    )
    kept, held = datasets.hold_out_classes(images, 0.4)
    assert (kept.names, kept.labels.tolist(), kept.class_names) == (list("abchi"), [0, 1, 2, 2, 0], ["v", "w", "x"])
    assert (held.names, held.labels.tolist(), held.class_names) == (list("defg"), [0, 1, 1, 0], ["y", "z"])
    assert held.pixels.ravel().tolist() == [3, 4, 5, 6]
    assert held.factors["light"].tolist() == [6, 8, 8, 6]
    for fraction in (0.05, 0.2, 0.8, 0.99):
        with pytest.raises(datasets.DatasetError, match="--val_classes"):
            datasets.hold_out_classes(images, fraction)
