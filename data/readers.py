"""Published data sets and folders of one's own read as image sets, and what is wrong where they cannot be."""

import csv
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from data.images import ImageSet, Splits
from run.errors import InputError, first_few, first_line

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Published:
    """What is known of a published data set.

    archive: folder that its official archive unpacks to. landmarks: any of these paths marks the data set's folder.
    layout: what is expected there, in words. counts: split to (classes, images) as published.
    """

    archive: str
    landmarks: tuple[str, ...]
    layout: str
    url: str
    counts: dict[str, tuple[int, int]]


PUBLISHED = {
    "cub200": Published(
        "CUB_200_2011",
        ("images",),
        "images/<class>/<image>",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        {"all": (200, 11788)},
    ),
    "cars196": Published(
        "cars196",
        ("images", "car_ims"),
        "images/<class>/<image>, or car_ims/<image> with cars_annos.mat",
        "http://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {"all": (196, 16185)},
    ),
    "online_products": Published(
        "Stanford_Online_Products",
        ("images", "Info_Files", "Ebay_train.txt"),
        "images/<category>/<image> and Info_Files/Ebay_train.txt, Ebay_test.txt, or all of them in one folder",
        "https://cvgl.stanford.edu/projects/lifted_struct",
        {"all": (22634, 120053), "train": (11318, 59551), "test": (11316, 60502)},
    ),
    "in-shop": Published(
        "In-shop Clothes Retrieval Benchmark",
        ("img", "Img/img"),
        "img/... or Img/img/..., and Eval/list_eval_partition.txt",
        "http://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        {"all": (7982, 52712), "train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
    ),
    "vehicle_id": Published(
        "VehicleID_V1.0",
        ("image",),
        "image/<number>.jpg and train_test_split/train_list.txt, test_list_800.txt, ...",
        "https://www.pkuml.org/resources/pku-vehicleid.html",
        {"train": (13164, 110178), "Set 1": (800, 6493), "Set 2": (1600, 13377), "Set 3": (2400, 19777)},
    ),
}


def locate(name: str, source: Path) -> Path:
    """Return the folder of a data set: source/name, or for a published set also its archive's folder, there or in it.

    Raises InputError that says, in several lines, what was looked for, what was found and what to do.
    """
    known = PUBLISHED.get(name, Published(name, ("images",), "images/<class>/<image>", "", {}))
    candidates = list(dict.fromkeys([source / name, source / name / known.archive, source / known.archive]))
    for root in candidates:
        if is_data_set(root, known):
            return root
    present = [folder for folder in (*candidates, source) if os.path.isdir(folder)]
    found = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines = [
        f"no images of --dataset {name} in --source_path {source}",
        f"looked for  {known.layout} in {' or '.join(map(str, candidates))}",
        f"found       {found or f'no folder {source}'}",
        f"to do       {advise(known, name, source, present)}",
    ]
    raise InputError("\n  ".join([*lines, f"get it at   {known.url}"] if known.url else lines))


def advise(known: Published, name: str, source: Path, present: list[Path]) -> str:
    """Return what to do about a data set that is not where it is expected. present: folders that may hold it."""
    target = source / name
    if is_data_set(source, known):
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    for folder in present:
        folders, files = listing(folder)
        archives = [file for file in files if file.lower().endswith(ARCHIVES)]
        if archives:
            return f"unpack {folder / archives[0]}"
        if folder == source:  # its folders may be other data sets
            continue
        for child in folders:
            if is_data_set(folder / child, known):
                return f"it lies one level off: rename or move {folder / child} to {target}"
        has_images = any(file.lower().endswith(IMAGES) for child in folders for file in listing(folder / child).files)
        if has_images and known.layout.startswith("images/<class>"):
            return f"move the class folders from {folder} to {target / 'images'}"
    return "give the folder that holds the data set's folder as --source_path"


def is_data_set(folder: Path, known: Published) -> bool:
    """Return whether a folder holds a landmark of a data set."""
    return any(os.path.exists(folder / landmark) for landmark in known.landmarks)


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    names = [name for names in listing(folder) for name in names]
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


class Listing(NamedTuple):
    """The sorted names in a folder, without hidden ones. files: all but folders, dead links too."""

    folders: list[str]
    files: list[str]


def listing(folder: Path) -> Listing:
    """Return what a folder holds. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})") from error
    names = sorted(is_folder)
    return Listing([name for name in names if is_folder[name]], [name for name in names if not is_folder[name]])


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises InputError when there are fewer than two classes
    with images on either side, or dead links.
    """
    images = root / "images"
    folders, files = listing(images)
    per_class = {name: [f"{name}/{file}" for file in listing(images / name).files] for name in folders}
    dead = [name for name in files if not os.path.exists(images / name)]
    if dead:
        raise InputError(f"{images}: {len(dead)} dead links: {first_few(dead)}; mend or remove them")
    train, tests = split_halves(f"{images}/<class>/<image>", images, per_class)
    train, test = with_factors(root / "factors.csv", images, train, tests[""])
    empty = [name for name in folders if not per_class[name]]
    note = f"{images}: {len(empty)} folders without images are no classes: {first_few(empty)}"
    return replace(train, warnings=(note,) if empty else ()), {"": test}


def with_factors(path: Path, images: Path, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return image sets with the known characteristics of a file factors.csv, if there is one.

    Its columns: image, the path below the folder of images, and one for each characteristic, of any text. Raises
    InputError for a malformed file, an image without a row, a row without an image, a column of one value.
    """
    if not os.path.lexists(path):
        return train, test
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if columns[:1] != ["image"] or len(columns) < 2 or {"class", "Class", "Mined"}.intersection(columns):
        raise InputError(
            f"{path}, line 1: expected image and a column for each characteristic, none called class, Class or Mined, "
            f"found {','.join(columns)[:80]!r}"
        )
    names = [os.path.relpath(name, images).replace(os.sep, "/") for name in (*train.names, *test.names)]
    row_of = {row["image"]: row for row in rows}
    for odd, what in (
        ([row["image"] for row in rows if None in row or None in row.values()], "rows are not as long as the first"),
        ([row["image"] for row in rows if row is not row_of[row["image"]]], "images have several rows"),
        ([name for name in names if name not in row_of], "images have no row"),
        (sorted(row_of.keys() - names), "rows name no image"),
    ):
        if odd:
            raise InputError(f"{path}: {len(odd)} {what}: {first_few(odd)}")
    factors = {}
    for column in columns[1:]:
        values, factors[column] = np.unique([row_of[name][column] for name in names], return_inverse=True)
        if len(values) < 2:
            raise InputError(f"{path}: the column {column} has one value, {str(values[0])!r}; leave it out")
    return (
        replace(train, factors={name: levels[: len(train)] for name, levels in factors.items()}),
        replace(test, factors={name: levels[len(train) :] for name, levels in factors.items()}),
    )


def split_halves(source: str | Path, folder: Path, per_class: dict[str, list[str]]) -> Splits:
    """Return the first half of the classes with images to train and the rest to test; paths are below the folder.

    source: what names the classes. Raises InputError when there are fewer than two classes on either side.
    """
    names = [name for name, files in per_class.items() if files]
    if len(names) < 4:
        raise InputError(
            f"{source} holds {len(names)} classes with images; at least 4 are needed: 2 to train, 2 to test"
        )
    images = ImageSet(
        names=[os.path.join(folder, file) for name in names for file in per_class[name]],
        labels=np.repeat(np.arange(len(names)), [len(per_class[name]) for name in names]),
        class_names=names,
    )
    half = len(names) // 2
    return images.classes(0, half), {"": images.classes(half, len(names))}


def read_cars(root: Path) -> Splits:
    """Read CARS196: class folders, or the official archive's car_ims with the annotations in cars_annos.mat.

    The classes' order is that of the folders or of the file; the first half of those with images trains.
    """
    if os.path.isdir(root / "images"):
        return read_class_folders(root)
    path = first_existing(root, "cars_annos.mat", "../cars_annos.mat")
    try:
        annotations = loadmat(path, squeeze_me=True)
        class_names = [str(name) for name in annotations["class_names"]]
        per_class: dict[str, list[str]] = {name: [] for name in class_names}
        for row in annotations["annotations"]:
            per_class[class_names[row["class"] - 1]].append(str(row["relative_im_path"]))
    except Exception as error:  # damaged files make SciPy raise almost anything
        raise InputError(f"{path}: cannot be read as the annotations of CARS196 ({first_line(error)})") from error
    require_images(path, root, [file for files in per_class.values() for file in files])
    return split_halves(path, root, per_class)


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists, `image_id class_id super_class_id path` under a header."""
    images = root / "images" if os.path.isdir(root / "images") else root
    row = ("image_id class_id super_class_id path, ids as whole numbers", r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)")
    header = ("the header image_id class_id super_class_id path", r"image_id\s+class_id\s+super_class_id\s+path")
    splits = {}
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        _, *rows = read_list(path, row, header)
        splits[split] = listed_split(path, images, [row[3] for row in rows], [int(row[1]) for row in rows])
    return splits["train"], {"": splits["test"]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes: list_eval_partition.txt, a count, a header and `image_name item_id evaluation_status`."""
    images = root if os.path.isdir(root / "img") else root / "Img"
    path = first_existing(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    row = ("image_name item_id evaluation_status: train, query or gallery", r"(.+?)\s+(\S+)\s+(train|query|gallery)")
    header = ("the header image_name item_id evaluation_status", r"image_name\s+item_id\s+evaluation_status")
    (count,), _, *rows = read_list(path, row, ("the number of images", r"(\d+)"), header)
    for status in {"query", "gallery"}.difference(row[2] for row in rows):
        raise InputError(f"{path}: lists no image with the status {status}")
    train, test = (
        listed_split(path, images, [row[0] for row in side], [row[1] for row in side])
        for side in ([row for row in rows if row[2] == "train"], [row for row in rows if row[2] != "train"])
    )
    if int(count) != len(rows):
        train = replace(train, warnings=(f"{path}: lists {len(rows)} images; its first line says {int(count)}",))
    return train, {"": replace(test, is_query=np.array([row[2] == "query" for row in rows if row[2] != "train"]))}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID: lists of `image_number vehicle_id`, one to train and three test sets scored separately."""
    row = ("image_number vehicle_id, ids as whole numbers", r"(\d+)\s+(\d+)")
    splits = {}
    for split, file in (("train", "train_list"), *((f"Set {i}", f"test_list_{800 * i}") for i in (1, 2, 3))):
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        rows = read_list(path, row)
        files = [f"image/{int(number):07d}.jpg" for number, _ in rows]
        splits[split] = listed_split(path, root, files, [int(vehicle) for _, vehicle in rows])
    return splits.pop("train"), splits


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists. Raises InputError."""
    for option in options:
        if os.path.isfile(root / option):
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    raise InputError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}")


def read_list(path: Path, row: tuple[str, str], *above: tuple[str, str]) -> list[tuple[str, ...]]:
    """Return the columns of each line of a list file, first of the lines above its rows, then of the rows.

    row, above: what such a line is, in words, and its pattern, whose groups are the columns. Blank lines are skipped.
    Raises InputError that names a line of another form.
    """
    columns = []
    # A mark that Windows' editors put first is dropped; names in another encoding come out as the disk has them
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for place, line in enumerate(map(str.strip, file), start=1):
            if not line:
                continue
            expected, pattern = above[len(columns)] if len(columns) < len(above) else row
            match = re.fullmatch(pattern, line, re.ASCII)
            if match is None:
                raise InputError(f"{path}, line {place}: expected {expected}, found {line[:80]!r}")
            columns.append(match.groups())
    if len(columns) <= len(above):
        raise InputError(f"{path}: holds no images")
    return columns


def listed_split(list_path: Path, folder: Path, files: list[str], ids: list[str] | list[int]) -> ImageSet:
    """Return the ImageSet of listed files below a folder; classes are the distinct ids, sorted.

    Raises InputError when fewer than two classes or images that are not on disk are listed.
    """
    require_images(list_path, folder, files)
    class_ids, labels = np.unique(ids, return_inverse=True)
    if len(class_ids) < 2:
        raise InputError(f"{list_path}: lists {len(class_ids)} classes of a split; at least 2 are needed")
    return ImageSet([os.path.join(folder, file) for file in files], labels, [str(name) for name in class_ids])


def require_images(list_path: Path, folder: Path, files: list[str]) -> None:
    """Raise InputError that names the first listed files that are not on disk, and says how many there are."""
    missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise InputError(
            f"{list_path}: {len(missing)} of {len(files)} listed images are not on disk below {folder}: "
            f"{first_few(missing)}"
        )
