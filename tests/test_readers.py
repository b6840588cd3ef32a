"""Folders and lists read as image sets, and what a user is told of data sets that cannot be."""

import os
import shutil

import layouts
import numpy as np
import pytest
import torch
from conftest import write_class_folders
from scipy.io import loadmat, savemat

import datasets
from data.files import survey
from data.published import PUBLISHED, dataset_info
from support.errors import InputError

LIST_FILES = {
    "online_products": ("Info_Files/Ebay_train.txt", 3),
    "in-shop": ("Eval/list_eval_partition.txt", 4),
    "vehicle_id": ("train_test_split/test_list_1600.txt", 2),
}
"""A list file of each data set, and the number of one of its rows."""


def message_of(name, source):
    with pytest.raises(InputError) as error:
        datasets.load_dataset(name, source)
    return str(error.value)


@pytest.mark.parametrize(("name", "layout"), layouts.LAYOUTS)
def test_layouts_are_read_as_the_table_says(tmp_path, name, layout):
    layouts.LAYOUTS[name, layout](tmp_path)
    train, tests = datasets.load_dataset(name, tmp_path)
    expected = layouts.TABLE.get((name, layout)) or layouts.TABLE[name]
    assert (train.class_names, train.labels.tolist()) == expected["train"]
    assert list(tests) == [split for split in expected if split not in ("train", "queries")]
    queries = expected.get("queries")
    for split, images in tests.items():
        assert (images.class_names, images.labels.tolist()) == expected[split]
        assert (images.is_query is None) if queries is None else images.is_query.tolist() == [bool(q) for q in queries]
    for images in (train, *tests.values()):
        assert len(images.names) == len(images.labels)
        assert images.labels.dtype == np.int64
        assert all(images.read(i).dtype == torch.uint8 for i in range(len(images)))


def test_first_half_of_the_classes_trains(tmp_path):
    images = write_class_folders(tmp_path / "cars196", per_class=(2, 1, 3, 2, 4)) / "images"
    (images / "class_01" / "._0.jpg").write_bytes(b"litter")
    (images / ".hidden").mkdir()
    (images / "empty").mkdir()
    train, tests = datasets.load_dataset("cars196", tmp_path)
    assert train.class_names == ["class_00", "class_01"]
    assert tests["test"].class_names == ["class_02", "class_03", "class_04"]
    assert train.labels.tolist() == [0, 0, 1]
    assert tests["test"].labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert train.names == [str(images / file) for file in ("class_00/0.jpg", "class_00/1.jpg", "class_01/0.jpg")]


def write_ids(source, old, new):
    """Replace the ids of one class in the training list of Online Products."""
    path = source / "online_products" / "Info_Files" / "Ebay_train.txt"
    path.write_text(path.read_text().replace(f" {old} 1 ", f" {new} 1 "))


def test_ids_are_numbers(tmp_path):
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    write_ids(tmp_path, 1, "0020")
    assert datasets.load_dataset("online_products", tmp_path)[0].class_names == ["3", "20"]
    layouts.LAYOUTS["vehicle_id", "readme"](tmp_path)
    path = tmp_path / "vehicle_id" / "train_test_split" / "train_list.txt"
    path.write_text(path.read_text().replace("0000002", "002").replace("0000003", "000000003"))
    train, _ = datasets.load_dataset("vehicle_id", tmp_path)
    assert [os.path.basename(name) for name in train.names[1:3]] == ["0000002.jpg", "0000003.jpg"]


@pytest.mark.parametrize("number", [2**64, 10**20, "9" * 5000])
def test_ids_that_are_too_long_do_not_merge(tmp_path, number):
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    write_ids(tmp_path, 1, number)
    message = message_of("online_products", tmp_path)
    assert "Ebay_train.txt: expected complete rows of image_id class_id" in message
    assert "\n" not in message


def test_images_below_a_folder_are_found_in_linked_folders_too(tmp_path):
    for name in ("mine/a/1.JPG", "mine/notes.txt", "mine/.hidden/2.jpg", "mine/._1.jpg", "elsewhere/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "dead.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "mine" / "pipe.png")
    found = survey(tmp_path / "mine")
    assert {kind: names for kind, names in found.items() if names} == {
        "image": ["a/1.JPG", "linked/b/3.png"],
        "other file": ["notes.txt"],
        "hidden file": ["._1.jpg", ".hidden/2.jpg"],
        "dead link": ["dead.png"],
        "folder": ["a", "linked", "linked/b"],
        "repeated folder": ["again"],
    }


@pytest.mark.parametrize("name", [*PUBLISHED, "mine"])
def test_a_missing_folder_is_diagnosed(tmp_path, name):
    (tmp_path / "something").mkdir()
    message = message_of(name, tmp_path)
    assert f"no images of --dataset {name} in --source_path {tmp_path}" in message
    assert f"looked for  {dataset_info(name).layout} in " in message
    assert f"found       {tmp_path} holds something" in message
    assert "to do       give the folder that holds" in message
    assert ("get it at" in message) == (name in PUBLISHED)
    assert "no folder" in message_of(name, tmp_path / "absent")


@pytest.mark.parametrize("name", PUBLISHED)
def test_wrong_nesting_by_one_level_is_diagnosed(tmp_path, name):
    layouts.LAYOUTS[name, "readme"](tmp_path / "a")
    root = tmp_path / "a" / name
    assert f"{root} is the data set itself: name it {name}" in message_of(name, root)
    (tmp_path / "b" / name).mkdir(parents=True)
    deeper = root.rename(tmp_path / "b" / name / "deeper")
    assert f"it lies too deep: move what {deeper} holds to {tmp_path / 'b' / name}" in message_of(name, tmp_path / "b")
    deepest = tmp_path / "b" / name / "once" / "again"
    deepest.parent.mkdir()
    deeper.rename(deepest)
    assert f"move what {deepest} holds to" in message_of(name, tmp_path / "b")


def test_other_data_sets_are_left_where_they_are(tmp_path):
    layouts.LAYOUTS["cars196", "readme"](tmp_path)
    assert "move" not in message_of("cub200", tmp_path)


@pytest.mark.parametrize("archive", ["cub200/CUB_200_2011.tgz", "cub200.RAR"])
def test_an_archive_is_to_be_unpacked(tmp_path, archive):
    (tmp_path / archive).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / archive).touch()
    assert f"to do       unpack {tmp_path / archive}" in message_of("cub200", tmp_path)
    write_class_folders(tmp_path / "cub200" / "unpacked")
    assert f"it lies too deep: move what {tmp_path}/cub200/unpacked holds" in message_of("cub200", tmp_path)


def test_class_folders_out_of_place_are_to_be_moved(tmp_path):
    layouts.LAYOUTS["cub200", "readme"](tmp_path)
    root = tmp_path / "cub200"
    (root / "images").rename(tmp_path / "classes")
    root.rmdir()
    (tmp_path / "classes").rename(root)
    assert f"move or link the class folders from {root} to {root / 'images'}" in message_of("cub200", tmp_path)


def test_cars_as_downloads_lay_them_out(tmp_path):
    root = tmp_path / "cars196"
    for half in ("train", "test"):
        write_class_folders(tmp_path / half)
        (root / f"cars_{half}").mkdir(parents=True)
        (tmp_path / half / "images" / "class_00").rename(root / f"cars_{half}" / f"cars_{half}")
    message = message_of("cars196", tmp_path)
    assert f"{root} holds 2 folders with images (cars_test, cars_train): too few" in message
    assert message.split("\n")[3].endswith(f"; if not, put the images into {root}/images/<class>/")
    shutil.rmtree(root)
    for half in ("train", "test"):
        (root / "car_data").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp_path / half)
        (write_class_folders(tmp_path / half) / "images").rename(root / "car_data" / half)
    halves = (
        f"merge the contents of all 2 folders in {root}/car_data (test, train) into {root}/images: 4 classes, if these"
    )
    assert halves in message_of("cars196", tmp_path)


@pytest.mark.parametrize("dead", ["cub200/images", "cub200"])
def test_a_dead_link_is_to_be_mended(tmp_path, dead):
    (tmp_path / dead).parent.mkdir(exist_ok=True)
    (tmp_path / dead).symlink_to("/nowhere")
    assert f"repair the link {tmp_path}/{dead}, which leads to /nowhere: nothing" in message_of("cub200", tmp_path)


def test_a_misspelt_data_set_is_told_its_name(tmp_path):
    assert "or is --dataset shapes meant?" in message_of("shape", tmp_path)
    assert "or is --dataset in-shop meant?" in message_of("inshop", tmp_path)


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
    rows = [*lines[: line - 1], "{}", *lines[line:]]
    for malformed in ("", "\xff\xfe\0", "\n".join(rows).format("1"), "\n".join(rows).format("1 2 3 4 5")):
        path.write_text(malformed, encoding="latin-1")
        message = message_of(name, tmp_path)
        assert message.startswith(f"{path}: expected complete rows of image_"), malformed
        assert "\n" not in message
    path.write_text(content)
    train, tests = datasets.load_dataset(name, tmp_path)
    victims = (tests["Set 2"] if name == "vehicle_id" else train).names[:4]
    for victim in victims:
        os.unlink(victim)
    message = message_of(name, tmp_path)
    assert f"{path}: 4 of " in message
    assert message.endswith(", ...")
    assert os.path.basename(victims[0]) in message


@pytest.mark.parametrize("name", ["online_products", "in-shop"])
def test_list_files_need_their_header(tmp_path, name):
    layouts.LAYOUTS[name, "readme"](tmp_path)
    path = tmp_path / name / LIST_FILES[name][0]
    lines = path.read_text().splitlines()
    path.write_text("\n\n".join(lines))  # blank lines count for nothing
    datasets.load_dataset(name, tmp_path)
    path.write_text("\n".join(lines[1:]))
    assert f"{path}: expected complete rows of image_" in message_of(name, tmp_path)


def test_status_and_ids_are_checked(tmp_path):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    path = tmp_path / "in-shop" / "Eval" / "list_eval_partition.txt"
    content = path.read_text()
    for other in ("probe", "gallery"):
        path.write_text(content.replace("query", other))
        message = f"{path}: expected each status of train, query and gallery, found gallery"
        assert message in message_of("in-shop", tmp_path)
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    path = tmp_path / "online_products" / "Info_Files" / "Ebay_test.txt"
    path.write_text(path.read_text().replace(" 4 1 ", " four 1 ", 1))
    message = "complete rows of image_id class_id super_class_id path (invalid literal for int() with base 10: 'four')"
    assert message in message_of("online_products", tmp_path)
    path.write_text("\n".join(row for row in path.read_text().splitlines() if " 4 1 " not in row and "four" not in row))
    assert f"{path}: lists 1 class of a split; at least 2 are needed" in message_of("online_products", tmp_path)


@pytest.mark.parametrize(("name", "old"), [("online_products", "3_0.JPG"), ("in-shop", "00_1_front.jpg")])
def test_list_files_with_marks_and_other_encodings(tmp_path, name, old):
    layouts.LAYOUTS[name, "readme"](tmp_path)
    path = tmp_path / name / LIST_FILES[name][0]
    old = next(tmp_path.glob(f"{name}/**/{old}"))
    new = os.fsencode(old.parent) + b"/\xe9.jpg"
    os.rename(old, new)
    listed = os.fsencode(old.relative_to(tmp_path / name / ("images" if name == "online_products" else "")))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(listed, os.path.dirname(listed) + b"/\xe9.jpg"))
    train, tests = datasets.load_dataset(name, tmp_path)
    images = next(images for images in (train, *tests.values()) if os.fsdecode(new) in images.names)
    assert images.read(images.names.index(os.fsdecode(new))).shape == (3, 40, 44)


def test_annotations_of_cars_that_cannot_be_read(tmp_path):
    layouts.LAYOUTS["cars196", "official"](tmp_path)
    path = tmp_path / "cars196" / "cars_annos.mat"
    (tmp_path / "cars196" / "car_ims" / "000003.jpg").unlink()
    assert f"{path}: 1 of 16 listed images are not on disk" in message_of("cars196", tmp_path)
    path.write_bytes(b"nothing")
    assert f"{path}: cannot be read as the annotations" in message_of("cars196", tmp_path)
    path.unlink()
    assert f"list file missing: looked for {path}" in message_of("cars196", tmp_path)


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
    for row in content["annotations"][0]:
        row["class"] = 9
    savemat(path, content | {"class_names": names})
    assert f"{path}: cannot be read as the annotations" in message_of("cars196", tmp_path)


def test_links_that_lead_nowhere_do_not_hide_the_diagnosis(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "others").mkdir()
    lines = message_of("tiny", tmp_path).splitlines()
    assert lines[2] == f"  found       {tmp_path} holds others, gone, loop"
    write_class_folders(tmp_path / "tiny")
    (tmp_path / "tiny" / "images" / "more").symlink_to("more")
    assert message_of("tiny", tmp_path).endswith("tiny: 1 dead link: images/more; repair or remove them")
