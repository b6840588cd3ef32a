"""Users' own data sets in three layouts: what is read, what is left out and named, what is refused."""

import os
import re
import shutil
import subprocess
import unicodedata

import numpy as np
import pytest
import torch
from conftest import write_class_folders
from PIL import Image

import datasets
from data.files import survey
from data.images import describe_change, fingerprints
from support.errors import InputError

LAYOUTS = ("images", "train and test", "list of paths", "list of a flat folder")


def message_of(source, name="mine"):
    with pytest.raises(InputError) as error:
        datasets.load_dataset(name, source)
    return str(error.value)


def write_list(root, *lines, separator=",", encoding="utf-8", newline="\n"):
    """Write root/images.csv, whose lines are given with commas."""
    text = newline.join(line.replace(",", separator) for line in lines) + newline
    (root / "images.csv").write_bytes(text.encode(encoding))


def picture(path, kind=None):
    """Write a small image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), len(str(path)) % 250, dtype=np.uint8)).save(path, kind)


def write_as(root, layout):
    """Write the same images and split in a layout; the third image of each class is dark, all others are light."""
    write_class_folders(root, per_class=(3, 4, 3, 5, 3))
    images = sorted((root / "images").glob("*/*"))
    names = {path: f"{path.parent.name}/{path.name}" for path in images}
    split = {path: "train" if path.parent.name < "class_02" else "test" for path in images}
    light = {path: "light" if path.name != "2.jpg" else "dark" for path in images}
    if layout == "images":
        lines = ["image,light", *(f"{names[path]},{light[path]}" for path in images)]
        (root / "factors.csv").write_text("\n".join(lines))
    elif layout == "train and test":
        lines = ["image,light", *(f"{split[path]}/{names[path]},{light[path]}" for path in images)]
        for path in images:
            (root / split[path] / path.parent.name).mkdir(parents=True, exist_ok=True)
            path.rename(root / split[path] / names[path])
        shutil.rmtree(root / "images")
        (root / "factors.csv").write_text("\n".join(lines[:1] + lines[:0:-1]))
    elif layout == "list of paths":
        write_list(root, "image,class,light", *(f"{names[p]},{p.parent.name},{light[p]}" for p in reversed(images)))
    else:
        flat = {path: path.with_name(f"{path.parent.name}_{path.name}") for path in images}
        flat = {path: root / new.name for path, new in flat.items()}
        for path in images:
            path.rename(flat[path])
        shutil.rmtree(root / "images")
        rows = [f"{flat[p].name},{p.parent.name},{split[p].upper()},{light[p]}" for p in images]
        write_list(root, "image,class,split,light", *rows, separator=";", encoding="utf-16", newline="\r\n")
    return root


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_same_images_and_split_are_read_from_every_layout(tmp_path, layout):
    """In the same order, so that runs on them are equal, and as no change to a stored run."""
    sets, known = [], []
    for name in ("images", layout):
        train, tests = datasets.load_dataset("tiny", write_as(tmp_path / name / "tiny", name).parent)
        assert train.factors["light"].tolist() == [1, 1, 0, 1, 1, 0, 1]
        sets.append((train, tests["test"]))
        known.append(fingerprints({"train": train, **tests}))
    assert sets[0][0].layout != sets[1][0].layout
    for one, another in zip(*sets):
        assert one.class_names == another.class_names
        assert one.labels.tolist() == another.labels.tolist()
        assert one.factors["light"].tolist() == another.factors["light"].tolist()
        assert all(torch.equal(one.read(i), another.read(i)) for i in range(len(one)))
    if layout != "list of a flat folder":  # whose files have other names
        assert describe_change(*known) is None


def test_a_list_with_queries_and_a_gallery(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2, 2, 3, 3))
    rows = [f"images/class_{c:02d}/{i}.jpg,{c:03d}" for c, n in enumerate((2, 2, 3, 3)) for i in range(n)]
    words = ["train"] * 4 + ["Query", " gallery", "VAL", "gallery", "QUERY", "val"]
    rows = [f"{row},{word}" for row, word in zip(rows, words)]
    write_list(root, "image,class,split", *rows, "images/gone.jpg,003,valid")  # need not be there
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert train.class_names == ["000", "001"]  # text, not numbers
    assert tests["test"].class_names == ["002", "003"]
    assert tests["test"].is_query.tolist() == [True, False, False, True]
    assert train.left_out == ("3 rows of val: images/class_02/2.jpg, images/class_03/2.jpg, images/gone.jpg",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with its mark"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_list_is_read_as_spreadsheets_write_it(tmp_path, encoding, separator):
    root = tmp_path / "mine"
    names = {"Zoë/a b.jpg": "NA", "Zoë/c.jpg": "001", "b'1,2;3.jpg": "N/A", "d.jpg": "1"}
    for name in names:
        picture(root / unicodedata.normalize("NFD", name))
    quoted = [f'"{unicodedata.normalize("NFC", name)}"|"{label}"' for name, label in names.items()]
    text = "\r\n".join(["image|class|", *[f"{line}|" for line in quoted], "||", ""]).replace("|", separator)
    code, *marked = encoding.split(" with")
    (root / "images.csv").write_bytes(("\ufeff" * bool(marked) + text).encode(code))
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert [train.class_names, tests["test"].class_names] == [["001", "1"], ["N/A", "NA"]]
    assert all(os.path.isfile(name) for name in [*train.names, *tests["test"].names])
    assert train.left_out == ()


LINES = (
    "image,class,split,light",
    *(f"class_{c:02d}/{i}.jpg,c{c},{'train' if c < 2 else 'test'},{i}" for c in range(4) for i in range(2)),
)


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (1, "name,class,split,light", r"row 1: expected image and class, .*; found 'name,class,split,light'"),
        (1, "image,class,light,light", r"row 1: the column 'light' cannot be read: rename it or leave it out"),
        (1, ",image,class,light", r"row 1: the column '' cannot be read: rename it or leave it out"),
        (1, "image,class,split,Class", r"row 1: the column 'class' cannot be read"),
        (4, "class_01/0.jpg,c1", r"a split that is none of .* in row 4 \(\)"),
        (4, "class_01/0.jpg,c1,train,0,1", r"cannot be read \(Expected 4 fields in line 4, saw 5\)"),
        (4, "class_01/7.jpg,c1,train,0", r"1 of 8 listed images not on disk in row 4 \(class_01/7\.jpg\); give paths"),
        (4, "/data/0.jpg,c1,train,0", r"1 of 8 listed images not on disk in row 4 \(/data/0\.jpg\); give paths below"),
        (4, "../images/class_01/0.jpg,c1,train,0", r"1 of 8 listed images not on disk"),
        (4, "./class_00//1.jpg,c1,train,0", r"an image listed twice in row 3 \(.*\), row 4 \(images/class_00/1\.jpg\)"),
        (4, "class_01/0.jpg, ,train,0", r"no class in row 4 \(images/class_01/0\.jpg\)"),
        (4, ",c1,train,0", r"1 of 8 listed images not on disk in row 4 \(\)"),
        (4, "class_01/0.jpg,c1,trian,0", r"a split that is none of train, test, .* in row 4 \(trian\)"),
        (4, "class_01/note.txt,c1,train,0", r"a file that is no image in row 4 \(images/class_01/note\.txt\)"),
        (4, "class_01/._0.jpg,c1,train,0", r"a hidden file in row 4 \(images/class_01/\._0\.jpg\)"),
        (4, '"class_01/0.jpg,c1,train,0', r"cannot be read \(EOF inside string starting at row 3\)"),
        (
            4,
            "class_01/\xe9.jpg,c1,train,0",
            r"cannot be read \(.* for UTF-8\); save it in UTF-8, in Excel as .CSV UTF-8",
        ),
    ],
)
def test_faults_of_a_list_are_one_line_with_the_row(tmp_path, row, line, message):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    (root / "images" / "class_01" / "note.txt").touch()
    shutil.copy(root / "images" / "class_01" / "0.jpg", root / "images" / "class_01" / "._0.jpg")
    lines = [*LINES[: row - 1], line, *LINES[row:]]
    write_list(root, *lines, encoding="latin-1")
    error = message_of(tmp_path)
    assert re.match(rf"{re.escape(str(root / 'images.csv'))}(:|,) {message}", error), error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda line: line.replace("test", "train"),
            "the column split holds train; give train and test, or train, query",
        ),
        (lambda line: line.replace("c1", "c0"), "1 class to train; at least 2 are needed"),
        (
            lambda line: re.sub(r",(train|test|split)", "", line).replace("c3", "c2"),
            "3 classes with images; at least 4",
        ),
        (
            lambda line: line.replace(",c1,", ",,") + "\n" * (line == LINES[0]),
            "no class in row 5 (images/class_01/0.jpg), r",
        ),
        (lambda line: line if line == LINES[0] else "", "has no rows below its header"),
        (lambda line: line.replace(".jpg", ".jpeg"), "8 of 8 listed images not on disk in row 2 (class_00/0.jpeg)"),
    ],
)
def test_faults_of_a_whole_list(tmp_path, change, message):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    write_list(root, *map(change, LINES))
    error = message_of(tmp_path)
    assert message in error
    assert error.startswith(str(root / "images.csv"))


def test_a_list_and_factors_are_not_read_together(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    write_list(root, *LINES)
    (root / "factors.csv").touch()
    assert message_of(tmp_path).endswith("factors.csv: is not read beside images.csv; put its columns into images.csv")


def test_the_first_layout_counts_and_the_others_are_named(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 5)
    for split in ("train", "test", "val"):
        shutil.copytree(root / "images", root / split)
    train, _ = datasets.load_dataset("mine", tmp_path)
    assert train.layout.startswith(f"{root}/images/<class>/<image>, ")
    assert train.left_out == ("30 images outside images/: test/, train/, val/",)
    write_list(root, *(line.replace("class_", "train/class_") for line in LINES))
    train, _ = datasets.load_dataset("mine", tmp_path)
    assert train.layout == f"{root}/images.csv"
    assert "32 images not listed in images.csv: images/class_00/0.jpg, " in train.left_out[0]
    (root / "images.csv").unlink()
    shutil.rmtree(root / "images")
    (root / "images").mkdir()  # nothing to read in it
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert train.left_out == ("10 images outside train/ and test/: val/",)
    assert train.class_names == tests["test"].class_names
    assert "mine, test: 5 classes also in train: class_00, class_01, class_02, ..." in datasets.count_warnings(
        "mine", train, tests
    )


def test_no_layout_of_ones_own_is_read_under_a_published_or_the_built_in_name(tmp_path):
    for name in ("in-shop", "shapes"):
        write_class_folders(tmp_path / name, per_class=(2,) * 4)
    assert "no images of --dataset in-shop" in message_of(tmp_path, "in-shop")
    assert "is the built-in set, and" in message_of(tmp_path, "shapes")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def messy(root, layout):
    """Write class folders with all that people's folders hold besides, hidden files too."""
    write_class_folders(root, per_class=(3,) * 5)
    images = root / "images"
    jpeg = (images / "class_00" / "0.jpg").read_bytes()
    for name in ("class_00/LICENSE", "class_01/Makefile", "class_01/a.heic", "class_02/notes.txt", "README.md"):
        (images / name).write_text("P6 is what a text may begin with")
    for name in ("class_00/bare", "class_01/sub.glasses", "class_02/x.jpg~", "class_02/front/0.jpg",
                 "class_02/a/b/c/1.jpg",
                 "flat.jpg", "class_00/0.jpg~", "class_00/0.jpg_original", "class_00/0.JPG.bak", "class_01/1.bak",
                 "class_04/1.jpg.~1~",
                 "class_00/._0.jpg", ".DS_Store", "class_01/Icon\r", "class_03/@eaDir/0.jpg", "../cover.jpg",
                 "../val/class_09/1.jpg", "../.thumbnails/1.jpg", "../cover.jpg.bak"):  # fmt: skip
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(jpeg)
    (images / "class_00" / "0.jpg").rename(images / "class_00" / "0.JPG")
    (images / "empty" / "below").mkdir(parents=True)
    (images / "lost+found").mkdir()  # of a disk
    (images / "again").symlink_to(images / "class_04")
    (images / "class_03" / "tones.tif").write_bytes(b"II*\0")
    (images / "class_03" / "raw").write_bytes(b"II*\0")
    (root / "notes.csv").write_text(POINTER)
    if layout == "images.csv":
        listed = [path for path in sorted(images.glob("class_0?/?.[jJ]*")) if path.suffix.lower() == ".jpg"]
        write_list(root, "image,class", *(f"{path.relative_to(images)},{path.parent.name}" for path in listed))
    return root


@pytest.mark.parametrize("layout", ["images", "images.csv"])
def test_images_and_what_is_left_out_are_all_that_find_finds(tmp_path, layout, capsys):
    root = messy(tmp_path / "mine", layout)
    assert datasets.main(["mine", "--source_path", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    n_read = sum(int(line.split()[2]) for line in lines if line.startswith(("train", "test")))
    left_out = [line.removeprefix("left out: ") for line in lines if line.startswith("left out: ")]
    n_left_out = sum(int(line.split()[0]) for line in left_out if "folder" not in line.split(":")[0].split()[1])
    found = subprocess.run(["find", root, "-type", "f"], capture_output=True, text=True, check=True).stdout
    n_found = found.replace("Icon\r", "Icon").count("\n")
    n_aside = 1 if layout == "images.csv" else 0  # the list itself
    assert n_read + n_left_out == n_found - n_aside, left_out
    if layout == "images":
        assert n_read == 15 + 4  # bare, sub.glasses, x.jpg~, tones.tif
        assert left_out == [
            "2 images outside images/: cover.jpg, val/",
            "1 folder without images: images/empty",
            "2 images in subfolders of class folders: images/class_02/a/b/c/1.jpg, images/class_02/front/0.jpg",
            "1 image beside the class folders: images/flat.jpg",
            "1 folder that leads to images read already: images/again",
            "6 backup copies: cover.jpg.bak, images/class_00/0.JPG.bak, images/class_00/0.jpg_original, ...",
            "6 other files: images/README.md, images/class_00/LICENSE, images/class_01/Makefile, ...",
            "5 hidden files: .thumbnails/1.jpg, images/.DS_Store, images/class_00/._0.jpg, ...",
            "1 Git LFS pointer: notes.csv",
        ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF"])
def test_a_file_without_an_ending_of_images_is_one_if_it_begins_like_one(tmp_path, kind):
    picture(tmp_path / "subject0.glasses", kind)
    picture(tmp_path / "subject0", kind)
    for other in ("BMP", "TIFF", "PPM"):  # whose first bytes texts and raw files have too
        picture(tmp_path / f"a.{other.lower()}", other)
        picture(tmp_path / f"raw.{other}x", other)
    (tmp_path / "LICENSE").write_text("BM, GIF or P6")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    found = survey(tmp_path)
    assert found["image"] == ["a.bmp", "a.ppm", "a.tiff", "subject0", "subject0.glasses"]
    assert found["other file"] == ["LICENSE", "photo.heic", "raw.BMPx", "raw.PPMx", "raw.TIFFx"]


@pytest.mark.parametrize("layout", ["images", "images.csv"])
def test_dead_links_and_pointers_of_git_lfs_are_counted_and_refused(tmp_path, layout):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    first, second = root / "images/class_00/0.jpg", root / "images/class_02/1.jpg"
    if layout == "images.csv":
        write_list(root, *LINES)
    for path in (first, second):
        path.write_text(POINTER)
    message = message_of(tmp_path)
    assert ("a Git LFS pointer, " if layout == "images.csv" else "2 Git LFS pointers: ") in message
    assert "git lfs pull" in message
    for path in (first, second):
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    message = message_of(tmp_path)
    assert ("a dead link in row 2 " if layout == "images.csv" else "2 dead links: ") in message
    assert all(f"{path.parent.name}/{path.name}" in message for path in (first, second))
    if layout == "images.csv":  # those that are not listed are left out
        write_list(root, *(line for line in LINES if "class_00/0" not in line and "class_02/1" not in line))
        train, _ = datasets.load_dataset("mine", tmp_path)
        assert train.left_out[-1] == "2 dead links: images/class_00/0.jpg, images/class_02/1.jpg"


def test_too_few_classes_are_told_with_what_was_left_out(tmp_path):
    images = write_class_folders(tmp_path / "mine", per_class=(2, 2, 2)) / "images"
    for path in images.glob("class_00/*.jpg"):
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        path.rename(path.with_suffix(".heic"))
    message = message_of(tmp_path)
    assert message.startswith(f"{images}/<class>/<image>: 2 classes with images; at least 4 are needed")
    assert "left out: 2 other files: images/class_00/0.heic, images/class_00/1.heic" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["images/Train/a/1", "images/valid/a/1", "images/Train/b/1"],
            "{0}/images: 2 class folders with images in subfolders only: images/Train, images/valid; if these are a "
            "split, move everything in {0}/images up into {0}, and rename that if it has the name of a published",
        ),
        (
            ["images/a/x/1", "images/a/y/1", "images/b/z/1", "images/c/1"],
            "{0}/images: 2 class folders with images in subfolders only: images/a, images/b; move the images up into "
            "the class folders, or the subfolders up into {0}/images if they are the classes (3 classes)",
        ),
        (
            ["train/g/a/1", "train/g/b/1", "train/h/c/1", "train/h/c/2", "train/h/1", "train/2", "test/g/d/1"],
            "{0}/test and {0}/train: 2 class folders with images in subfolders only: test/g, train/g; move "
            "the images up into the class folders, or the subfolders up into {0}/test and {0}/train if they are the",
        ),
        (
            ["images/1", "images/2"],
            "{0}/images: 2 images without class folders: images/1.gif, images/2.gif; put them into",
        ),
        (["images/1", "labels.csv"], "in {0}/images.csv, whose first line is image,class (made from labels.csv?)"),
        (
            ["train/a/1", "train/b/1", "test/1"],
            "{0}/test: 1 image without class folders: test/1.gif; put them into test/<",
        ),
        (
            ["train/a/1", "train/b/1", "test/empty/"],
            "{0}/test: no images; put them into test/<class>/, or list them with their classes in {0}/images.csv, "
            "whose first line is image,class; or, to train on the first half of the classes and test on the rest, "
            "ln -s train {0}/images",
        ),
    ],
)
def test_images_at_another_depth_of_a_layout_are_refused(tmp_path, files, message):
    root = tmp_path / "mine"
    for name in files:
        if name.endswith(("/", ".csv")):
            (root / name).mkdir(parents=True) if name.endswith("/") else (root / name).touch()
        else:
            picture(root / f"{name}.gif")
    assert message.format(root) in message_of(tmp_path)


GROUPS = [*(f"round/{c}" for c in "abcd"), "hex/e", "triangle/f", "triangle/g", *(f"square/{c}" for c in "hijk")]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (GROUPS, "all 4 folders in {0} (hex, round, square, ...) into {0}/images: 11 classes, if these "),
        (["", *(f"g{i}/{c}{i}" for i in range(3) for c in "abc")], "contents of all 3 folders in {0} (g0, g1, g2)"),
        ([f"person{i}/view{j}" for i in range(6) for j in range(4)], "{0}/images: 4 classes, if these are the class"),
        ([f"v{i // 2}/images/{i}" for i in range(4)], "all 2 folders in {0} (v0/images, v1/images) into"),
        (["x/g/a", "x/g/b", "x/h/a"], "{0}/x holds 2 folders with images (a, b): too few if they are the classes"),
        (["a", "b", "c", "d"], "move or link the class folders from {0} to {0}/images"),
        (["x/a", "x/b", "x/c", "x/d", "x/e"], "move or link the class folders from {0}/x to {0}/images"),
        ([""], "{0} holds 2 images without class folders: put the images into {0}/images/<class>/, or list them with "
               "their classes in {0}/images.csv, whose first line is image,class"),
        (["data/train/a", "data/test/b"], "it lies too deep: move what {0}/data holds to {0}"),
        (["train/a", "val/a"], "{0} holds train, val, but these folders have to be called train and test: ln -s val"),
        (["x/train/a", "x/val/a"], "train and test: ln -s x/train {0}/train && ln -s x/val {0}/test"),
        (["training/a", "test/a"], "{0} holds training, test, but these folders have to be called train and test"),
        (["Train/g/a", "Test/g/a"], "train and test: ln -s Train {0}/train && ln -s Test {0}/test"),
        (["train/a", "train/b"], "{0} holds train, but nothing to test on; with this link the first half of the "
                                 "classes trains, the rest tests: ln -s train {0}/images"),
    ],
)  # fmt: skip
def test_images_in_no_layout_are_to_be_moved_linked_or_listed(tmp_path, folders, message):
    for folder in folders:
        for i in range(2):
            picture(tmp_path / "mine" / folder / f"{folder.replace('/', '_')}image.{i}", "GIF")
    assert message.format(tmp_path / "mine") in message_of(tmp_path)


@pytest.mark.parametrize("put", ["a link", "a pointer"])
def test_what_stands_for_images_counts_as_images_in_the_advice(tmp_path, put):
    for folder in GROUPS:
        path = tmp_path / "mine" / folder / "1.png"
        path.parent.mkdir(parents=True)
        path.symlink_to("nowhere") if put == "a link" else path.write_text(POINTER)
    assert "merge the contents of all 4 folders" in message_of(tmp_path)


def test_a_link_to_train_as_test_is_read(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    (root / "images").rename(root / "train")
    (root / "test").symlink_to("train")
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert (len(train), len(tests["test"]), train.left_out) == (8, 8, ())


def test_spellings_of_a_class_that_differ_in_capitals_are_warned_of(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    classes = [
        "Kiwi",
        unicodedata.normalize("NFC", "Äpfel"),
        unicodedata.normalize("NFD", "Äpfel"),
        "kiwi",
        "fig",
        "nut",
    ]
    names = [f"class_{c:02d}/{i}.jpg" for c in range(4) for i in range(2)]
    write_list(root, "image,class", *(f"{name},{label}" for name, label in zip(names, classes)))
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert train.class_names + tests["test"].class_names == ["Kiwi", "fig", "kiwi", "nut", "Äpfel"]
    assert datasets.count_warnings("mine", train, tests) == [
        "mine: classes that differ in capital letters only: Kiwi and kiwi; are they the same?"
    ]


def test_characteristics_with_one_value_on_a_side_are_left_out(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    write_list(root, *(line.replace(",0", ",1") if "test" in line else line for line in LINES))
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert train.factors == tests["test"].factors == {}
    assert train.left_out == ("1 characteristic with one value in all training or all test images: light",)


def test_levels_are_numbered_over_all_splits_and_what_is_left_out_is_no_change(tmp_path):
    root = write_class_folders(tmp_path / "mine", per_class=(2,) * 4)
    lines = [line.replace(",0", ",c").replace(",1", ",b") if "test" in line else line for line in LINES]
    write_list(root, *(line.replace(",0", ",a").replace(",1", ",b") for line in lines))
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert train.factors["light"].tolist() == [0, 1, 0, 1]
    assert tests["test"].factors["light"].tolist() == [2, 1, 2, 1]
    (root / "README").touch()
    again, _ = datasets.load_dataset("mine", tmp_path)
    assert again.left_out != train.left_out
    assert describe_change(fingerprints({"train": train}), fingerprints({"train": again})) is None


def test_the_summary_names_queries_that_cannot_be_found(tmp_path, capsys):
    root = write_class_folders(tmp_path / "mine", per_class=(1, 3, 1, 2, 2))
    words = ["train"] * 4 + ["query", "query", "query", "gallery", "query"]
    names = [f"class_{c:02d}/{i}.jpg,{c}" for c, n in enumerate((1, 3, 1, 2, 2)) for i in range(n)]
    write_list(root, "image,class,split", *(f"{name},{word}" for name, word in zip(names, words)))
    assert datasets.main(["mine", "--source_path", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "train: 1 image with no other image of the class; classes: 0",
        "test: 3 images with no other image of the class in the gallery; classes: 2, 3",
    ]


def write_factors(root, change=lambda lines: lines):
    """Write a data set of 4 classes of 3 images and its factors.csv, changed; return the source path."""
    write_class_folders(root / "mine", per_class=(3,) * 4)
    lines = ["image,light,split"]
    lines += [
        f"class_{c:02d}/{i}.jpg,{('left', 'right')[i % 2]},{('hand', 'a box')[c % 2]}"
        for c in range(4)
        for i in range(3)
    ]
    (root / "mine" / "factors.csv").write_text("\n".join(change(lines)) + "\n")
    return root


def test_known_characteristics_are_read_in_any_order(tmp_path):
    source = write_factors(tmp_path, lambda lines: [lines[0], *lines[:0:-1], ""])
    train, tests = datasets.load_dataset("mine", source)
    for images in (train, tests["test"]):
        assert {name: levels.tolist() for name, levels in images.factors.items()} == {
            "light": [0, 1, 0] * 2,  # left, right
            "split": [1] * 3 + [0] * 3,  # a hand, a box
        }
    assert "known characteristics: light, split" in datasets.summary_lines(train, tests)
    (tmp_path / "mine" / "factors.csv").unlink()
    assert datasets.load_dataset("mine", source)[0].factors == {}


def test_known_characteristics_match_in_any_unicode_form_and_may_name_what_is_left_out(tmp_path):
    root = write_factors(tmp_path) / "mine"
    (root / "images" / "class_00").rename(root / "images" / unicodedata.normalize("NFD", "Ärger"))
    (root / "images" / "class_01" / "more").mkdir()
    shutil.copy(root / "images" / "class_01" / "0.jpg", root / "images" / "class_01" / "more" / "9.jpg")
    path = root / "factors.csv"
    path.write_text(path.read_text().replace("class_00", "Ärger") + "class_01/more/9.jpg,left,hand\n")
    train, _ = datasets.load_dataset("mine", tmp_path)
    assert train.factors["light"].tolist() == [0, 1, 0] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-2], "2 images without a row: class_03/1.jpg, class_03/2.jpg"),
        (lambda lines: [*lines, lines[1]], "an image listed twice in row 2 (class_00/0.jpg), row 14 (class_00/0.jpg)"),
        (lambda lines: ["image,light,class", *lines[1:]], "row 1: the column 'class' cannot be read"),
        (lambda lines: [], "cannot be read"),
    ],
)
def test_faults_of_known_characteristics_are_one_line(tmp_path, change, message):
    error = message_of(write_factors(tmp_path, change))
    assert error.startswith(f"{tmp_path}/mine/factors.csv")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("kind", ["a dead link", "a folder"])
@pytest.mark.parametrize("name", ["factors.csv", "images.csv"])
def test_a_table_that_cannot_be_read_is_not_left_out(tmp_path, name, kind):
    path = write_factors(tmp_path) / "mine" / "factors.csv"
    path.unlink()
    path = path.with_name(name)
    if kind == "a dead link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
    assert message_of(tmp_path).startswith(f"{path}: cannot be read (")


def test_linked_folders_count_once_and_where_they_are_read_first(tmp_path):
    """Class folders may be links into a folder that is read later, or into a hidden one."""
    pool = write_class_folders(tmp_path / "mine" / "all", per_class=(2,) * 4) / "images"
    pool.rename(tmp_path / "mine" / "all" / "pool")
    (tmp_path / "mine" / "images").symlink_to(tmp_path / "mine" / "all" / "pool")
    (tmp_path / "mine" / "other").symlink_to(write_class_folders(tmp_path / "outside"))  # not followed
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert (len(train), len(tests["test"]), train.left_out) == (4, 4, ())
    (tmp_path / "mine" / "all" / "pool").rename(tmp_path / "mine" / ".pool")
    (tmp_path / "mine" / "images").unlink()
    (tmp_path / "mine" / "images").mkdir()
    for folder in (tmp_path / "mine" / ".pool").iterdir():
        (tmp_path / "mine" / "images" / folder.name).symlink_to(folder)
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert (len(train), len(tests["test"]), train.left_out) == (4, 4, ())
