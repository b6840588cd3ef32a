"""Published data sets and folders of one's own read as image sets, and what is wrong where they cannot be."""

import csv
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data.images import ImageSet, Splits
from run.errors import InputError, first_few

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
        if marks_in(root, known):
            return root
    present = [folder for folder in (*candidates, source) if os.path.isdir(folder)]
    found = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    places = (source, *candidates, *(root / mark for root in candidates for mark in known.landmarks))
    dead = [path for path in places if os.path.islink(path) and not os.path.exists(path)]
    mend = f"{dead[0]} is a dead link to {os.readlink(dead[0])}: mend it" if dead else ""
    lines = [
        f"no images of --dataset {name} in --source_path {source}",
        f"looked for  {known.layout} in {' or '.join(map(str, candidates))}",
        f"found       {found or f'no folder {source}'}",
        f"to do       {mend or advise(known, name, source, present)}",
    ]
    raise InputError("\n  ".join([*lines, f"get it at   {known.url}"] if known.url else lines))


def advise(known: Published, name: str, source: Path, present: list[Path]) -> str:
    """Return what to do about a data set that is not where it is expected, as far as its surroundings tell.

    present: folders that may hold it; the last may be `source` itself, in which other data sets may lie too.
    """
    target, here = source / name, source.absolute()
    marks = marks_in(source, known)
    if marks and {*PUBLISHED, *(other.archive for other in PUBLISHED.values())}.intersection(listing(source).folders):
        return f"{source} holds other data sets too: move {marks}, and the lists that belong to it, to {target}"
    if marks:
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    has_class_folders = known.layout.startswith("images/<class>")
    if has_class_folders and here.name == "images" and holds_classes(here):
        return f"{here} is the data set's folder of images: name {here.parent} {name}, and give {here.parent.parent}"
    for folder in present:
        children = [folder / child for child in listing(folder).folders] if folder != source else []
        for child in children:
            if marks_in(child, known):
                return f"it lies one level off: rename or move {child} to {target}"
        for place in (folder, *children):
            archives = [file for file in listing(place).files if file.lower().endswith(ARCHIVES)]
            if archives:
                return f"unpack {place / archives[0]}"
        if has_class_folders and folder != source and holds_classes(folder):
            return f"move the class folders from {folder} to {target / 'images'}"
    return "give the folder that holds the data set's folder as --source_path"


def marks_in(folder: Path, known: Published) -> str:
    """Return which landmarks of a data set a folder holds, as text; none is ""."""
    return " and ".join(mark for mark in known.landmarks if os.path.exists(folder / mark))


def holds_classes(folder: Path) -> bool:
    """Return whether subfolders of a folder hold images."""
    files = (file for child in listing(folder).folders for file in listing(folder / child).files)
    return any(file.lower().endswith(IMAGES) for file in files)


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    names = [name for names in listing(folder) for name in names]
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


class Listing(NamedTuple):
    """The sorted names in a folder, without hidden ones. dead_links: links to what is not there."""

    folders: list[str]
    files: list[str]
    dead_links: list[str]


def listing(folder: Path) -> Listing:
    """Return what a folder holds; pipes and sockets are neither files nor folders. Raises InputError."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
        return Listing(
            [entry.name for entry in entries if entry.is_dir()],
            [entry.name for entry in entries if entry.is_file()],
            [entry.name for entry in entries if entry.is_symlink() and not os.path.exists(entry)],
        )
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})") from error


def refuse_dead_links(where: Path, dead: list[str], n_names: int, what: str) -> None:
    """Raise InputError that names the first of some dead links, and says how many of how many names they are."""
    if dead:
        raise InputError(
            f"{where}: {len(dead)} of {n_names} {what} are dead links: {first_few(dead)}; mend or remove them"
        )


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises InputError when there are fewer than two classes
    with images on either side, or folders that would be classes if their images were in place.
    """
    images = root / "images"
    folders, files, dead = listing(images)
    refuse_dead_links(images, dead, len(folders) + len(dead), "class folders")
    inside = {name: listing(images / name) for name in folders}
    dead = [f"{name}/{link}" for name, found in inside.items() for link in found.dead_links]
    refuse_dead_links(images, dead, len(dead) + sum(len(found.files) for found in inside.values()), "images")
    empty = [name for name, found in inside.items() if not found.files]
    deeper = [f"{name}/{inside[name].folders[0]}" for name in empty if inside[name].folders]
    if deeper:
        raise InputError(
            f"{images}: {len(deeper)} of {len(folders)} class folders hold no images but folders, {first_few(deeper)}; "
            f"move the images to {images}/<class>/<image>"
        )
    if files and len(folders) < 4:
        raise InputError(f"{images} holds images of no class, {first_few(files)}; move each to {images}/<class>")
    per_class = {name: [f"{name}/{file}" for file in found.files] for name, found in inside.items()}
    train, tests = with_factors(root / "factors.csv", images, split_halves(images, images, per_class))
    note = f"{images}: {len(empty)} folders without images are no classes: {first_few(empty)}"
    return replace(train, warnings=(note,) if empty else ()), tests


def with_factors(path: Path, images: Path, splits: Splits) -> Splits:
    """Return image sets with the known characteristics of a file factors.csv, if there is one.

    Its columns: image, the path below the folder of images, and one for each characteristic, of any text. Raises
    InputError that names a malformed line, an image without a row, a row without an image, a column of one value.
    """
    if not path.is_file():
        return splits
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [(reader.line_num, row) for reader in [csv.reader(file)] for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    columns = lines[0][1] if lines else []
    is_distinct = len({*columns, "class", "Class", "Mined", ""}) == len(columns) + 4
    if columns[:1] != ["image"] or len(columns) < 2 or not is_distinct:
        raise InputError(
            f"{path}, line 1: expected image and a column for each characteristic, none called class, Class or Mined, "
            f"found {','.join(columns)[:80]!r}"
        )
    rows: dict[str, list[str]] = {}
    for number, row in lines[1:]:
        if len(row) != len(columns) or row[0] in rows:
            what = "an image that is named before" if row[0] in rows else f"{len(row)} values"
            raise InputError(f"{path}, line {number}: expected {','.join(columns)} of another image, found {what}")
        rows[row[0]] = row
    train, test = splits[0], splits[1][""]
    names = [os.path.relpath(name, images).replace(os.sep, "/") for name in (*train.names, *test.names)]
    for found, others, what in ((names, rows, "images have no row"), (rows, set(names), "rows name no image")):
        odd = [name for name in found if name not in others]
        if odd:
            raise InputError(f"{path}: {len(odd)} {what}: {first_few(odd)}")
    factors = {}
    for i, column in enumerate(columns[1:], start=1):
        values, factors[column] = np.unique([rows[name][i] for name in names], return_inverse=True)
        if len(values) < 2:
            raise InputError(f"{path}: the column {column} has one value, {str(values[0])!r}; leave it out")
    n_train = len(train)
    return (
        replace(train, factors={name: levels[:n_train] for name, levels in factors.items()}),
        {"": replace(test, factors={name: levels[n_train:] for name, levels in factors.items()})},
    )


def split_halves(source: Path, folder: Path, per_class: dict[str, list[str]]) -> Splits:
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
        class_names = [str(name) for name in np.atleast_1d(annotations["class_names"])]
        rows = np.atleast_1d(annotations["annotations"])
        files = [str(file) for file in rows["relative_im_path"]]
        labels = rows["class"].astype(int)
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as the annotations of CARS196 ({error})") from error
    if not labels.size or labels.min() < 1 or labels.max() > len(class_names):
        raise InputError(f"{path}: {len(class_names)} class names and {labels.size} labels that do not fit them")
    require_images(path, root, files)
    per_class: dict[str, list[str]] = {name: [] for name in class_names}
    for file, label in zip(files, labels):
        per_class[class_names[label - 1]].append(file)
    return split_halves(path, root, per_class)


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists, `image_id class_id super_class_id path` under a header."""
    images = root / "images" if os.path.isdir(root / "images") else root
    row = ("image_id class_id super_class_id path, ids as whole numbers", r"(\d+)\s+(\d+)\s+(\d+)\s+(.+)")
    header = ("the header image_id class_id super_class_id path", r"image_id\s+class_id\s+super_class_id\s+path")
    splits = []
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        _, *rows = read_list(path, row, header)
        splits.append(listed_split(path, images, [row[3] for row in rows], [row[1] for row in rows], are_numbers=True))
    return splits[0], {"": splits[1]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes: list_eval_partition.txt, a count, a header and `image_name item_id evaluation_status`."""
    images = root if os.path.isdir(root / "img") else root / "Img"
    path = first_existing(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    row = ("image_name item_id evaluation_status: train, query or gallery", r"(.+?)\s+(\S+)\s+(train|query|gallery)")
    header = ("the header image_name item_id evaluation_status", r"image_name\s+item_id\s+evaluation_status")
    (count,), _, *rows = read_list(path, row, ("the number of images", r"(\d+)"), header)
    train = [row for row in rows if row[2] == "train"]
    test = [row for row in rows if row[2] != "train"]
    for status in ("query", "gallery"):
        if not any(row[2] == status for row in test):
            raise InputError(f"{path}: lists no image with the status {status}")
    train_set, test_set = (
        listed_split(path, images, [row[0] for row in side], [row[1] for row in side]) for side in (train, test)
    )
    if number(count) != str(len(rows)):
        note = f"{path}: lists {len(rows)} images; its first line says {number(count)[:80]}"
        train_set = replace(train_set, warnings=(note,))
    return train_set, {"": replace(test_set, is_query=np.array([row[2] == "query" for row in test]))}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID: lists of `image_number vehicle_id`, one to train and three test sets scored separately."""
    row = ("image_number vehicle_id, ids as whole numbers", r"(\d+)\s+(\d+)")
    splits = {}
    for split, file in (("train", "train_list"), *((f"Set {i}", f"test_list_{800 * i}") for i in (1, 2, 3))):
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        rows = read_list(path, row)
        files = [f"image/{number(row[0]).zfill(7)}.jpg" for row in rows]
        splits[split] = listed_split(path, root, files, [row[1] for row in rows], are_numbers=True)
    return splits.pop("train"), splits


def number(digits: str) -> str:
    """Return digits without leading zeros. Ids stay text: int() refuses long ones, NumPy rounds those above 2^63."""
    return digits.lstrip("0") or "0"


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists. Raises InputError that says where else it lies."""
    for option in options:
        if os.path.isfile(root / option):
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    name = os.path.basename(options[0])
    places = (root.parent / name, *(path for depth in ("", "*/", "*/*/") for path in root.glob(depth + name)))
    elsewhere = [path for path in places if os.path.isfile(path)]
    advice = f"\n  to do       move {elsewhere[0]} to {root / options[0]}" if elsewhere else ""
    raise InputError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}{advice}")


def read_list(path: Path, row: tuple[str, str], *above: tuple[str, str]) -> list[tuple[str, ...]]:
    """Return the columns of each line of a list file, first of the lines above its rows, then of the rows.

    row, above: what such a line is, in words, and its pattern, whose groups are the columns. Blank lines are skipped.
    Raises InputError that names a line of another form.
    """
    try:
        # A mark that Windows' editors put first is dropped; names in another encoding come out as the disk has them
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [(place, line.strip()) for place, line in enumerate(file, start=1) if not line.isspace()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    matches = []
    for i, (place, line) in enumerate(lines):
        expected, pattern = above[i] if i < len(above) else row
        matches.append(re.fullmatch(pattern, line, re.ASCII))
        if matches[-1] is None:
            raise InputError(f"{path}, line {place}: expected {expected}, found {line[:80]!r}")
    if len(matches) <= len(above):
        raise InputError(f"{path}: holds no images")
    return [match.groups() for match in matches]


def listed_split(
    list_path: Path, folder: Path, files: list[str], ids: list[str], are_numbers: bool = False
) -> ImageSet:
    """Return the ImageSet of listed files below a folder; classes are the distinct ids, sorted as text or as numbers.

    Raises InputError when fewer than two classes or images that are not on disk are listed.
    """
    require_images(list_path, folder, files)
    ids = [number(digits) for digits in ids] if are_numbers else ids
    class_names = sorted(set(ids), key=(lambda digits: (len(digits), digits)) if are_numbers else None)
    if len(class_names) < 2:
        raise InputError(f"{list_path}: lists {len(class_names)} classes of a split; at least 2 are needed")
    label_of = {name: label for label, name in enumerate(class_names)}
    return ImageSet([os.path.join(folder, file) for file in files], np.array([label_of[i] for i in ids]), class_names)


def require_images(list_path: Path, folder: Path, files: list[str]) -> None:
    """Raise InputError that names the first listed files that are not on disk, and says how many there are."""
    parents = dict.fromkeys(os.path.dirname(file) for file in files)
    found = {parent: listing(folder / parent) for parent in parents if os.path.isdir(folder / parent)}
    on_disk = {(parent, name) for parent, inside in found.items() for name in inside.files}
    links = {(parent, name) for parent, inside in found.items() for name in inside.dead_links}
    missing = [file for file in files if os.path.split(file) not in on_disk]
    dead = [file for file in missing if os.path.split(file) in links]
    refuse_dead_links(folder, dead, len(files), f"images that {list_path} lists")
    if missing:
        raise InputError(
            f"{list_path}: {len(missing)} of {len(files)} listed images are not on disk below {folder}: "
            f"{first_few(missing)}"
        )
