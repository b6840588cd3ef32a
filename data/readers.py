"""Published data sets and folders of one's own read as image sets, and what is wrong where they cannot be."""

import csv
import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.io import loadmat

from data.images import ImageSet, Splits
from data.published import PUBLISHED, Published, known_of
from support.errors import InputError, first_few, first_line

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".avif")
"""Endings of images; a file without an ending is an image too, as in the published layout of CUB200."""


def locate(name: str, source: Path) -> Path:
    """Return the folder of a data set: source/name, or for a published set also its archive's folder, there or in it.

    Raises InputError that says, in several lines, what was looked for, what was found and what to do.
    """
    published = known_of(name)
    archive = published.archive
    candidates = list(dict.fromkeys([source / name, source / name / archive, source / (archive or name)]))
    for root in candidates:
        if is_data_set(root, published):
            return root
    present = list(filter(os.path.isdir, [*candidates, source]))
    holds = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines = [
        f"no images of --dataset {name} in --source_path {source}",
        f"looked for  {published.layout} in {' or '.join(map(str, candidates))}",
        f"found       {holds or f'no folder {source}'}",
        f"to do       {advise(published, name, source, candidates, present)}",
    ]
    if published.url:
        lines.append(f"get it at   {published.url}")
    raise InputError("\n  ".join(lines))


def advise(published: Published, name: str, source: Path, candidates: list[Path], present: list[Path]) -> str:
    """Return what to do about a data set that is in none of the candidates; present: those and source that exist."""
    if is_data_set(source, published):
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    for root in candidates:
        for path in (root, *(root / landmark for landmark in published.landmarks)):
            if os.path.islink(path) and not os.path.exists(path):
                return f"mend the link {path}, which leads to {os.readlink(path)}: nothing is there"
    for folder in present:
        try:
            files = listing(folder)[1]
        except InputError as error:
            return f"{error}: make it readable"
        archives = [file for file in files if file.lower().endswith(ARCHIVES)]
        if archives:
            return f"unpack {folder / archives[0]}"
        below = folders_below(folder, 3) if folder != source else []  # there they may be other data sets
        for deeper in below:
            if is_data_set(deeper, published):
                return f"it lies too deep: move what {deeper} holds to {source / name}"
        if published.layout.startswith("images/<class>"):
            images = source / name / "images"
            roots = [root for root in (folder, *below) if has_class_folders(root)]
            flat = [root for root in below if any(map(is_image, readable(root)[1]))]
            if len(roots) > 1:
                several = first_few(list(map(str, roots)))
                return f"put the class folders of {several} together in {images}; rename files where two have one name"
            if roots:
                return f"move or link the class folders from {roots[0]} to {images}"
            if flat:
                return f"{flat[0]} holds images without their classes: put them into {images}/<class>"
    near = [] if name in PUBLISHED else difflib.get_close_matches(name, [*PUBLISHED, "shapes"], 1)
    hint = f", or is --dataset {near[0]} meant?" if near else ""
    return f"give the folder that holds the data set's folder as --source_path{hint}"


def folders_below(root: Path, depth: int) -> list[Path]:
    """Return the folders below a folder, nearest first, down to a depth."""
    children = [root / name for name in readable(root)[0]]
    return children + [path for child in children if depth > 1 for path in folders_below(child, depth - 1)]


def has_class_folders(root: Path) -> bool:
    """Tell whether four folders or more in a folder, no runs, hold images, which train and test folders do not."""
    inside = [readable(root / name)[1] for name in readable(root)[0]]
    return sum(any(map(is_image, files)) and "hypa.pkl" not in files for files in inside) >= 4


def readable(folder: Path) -> tuple[list[str], list[str]]:
    """Return the listing of a folder; of one that cannot be read, nothing."""
    try:
        return listing(folder)
    except InputError:
        return [], []


def is_data_set(folder: Path, published: Published) -> bool:
    """Tell whether a folder holds a landmark of a data set."""
    return any(os.path.exists(folder / landmark) for landmark in published.landmarks)


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    try:
        names = sum(listing(folder), [])
    except InputError as error:
        return f"what cannot be listed ({error.__cause__.strerror})"
    return first_few(names, 5) if names else "nothing"


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of what a folder holds, folders and others, without hidden ones. Raises InputError."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})") from error
    folders = {name for name in names if os.path.isdir(folder / name)}
    return sorted(folders), [name for name in names if name not in folders]


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that disks and file servers make."""
    return name.startswith(".") or name in ("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX")


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image, see IMAGES."""
    ending = os.path.splitext(name)[1]
    return not ending or ending.lower() in IMAGES


def images_below(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted paths of the images below a folder, of all other files, and of folders that cannot be read.

    Linked folders count, hidden files and folders do not.
    """
    images, others, unread, seen = [], [], [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=lambda error: unread.append(error.filename)):
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not is_hidden(name)]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in seen]
        for path in (os.path.join(folder, name) for name in files if not is_hidden(name)):
            if os.path.isfile(path) or os.path.islink(path):  # no pipe, which would be waited for
                (images if is_image(path) else others).append(path)
    return sorted(images), sorted(others), sorted(map(str, unread))


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Raises InputError when there are fewer than two classes with
    images on either side, and as class_files and read_factors do.
    """
    images = root / "images"
    per_class, warnings = class_files(images)
    path = root / "factors.csv"
    factors = read_factors(path, [file for files in per_class.values() for file in files])
    try:
        train, tests = split_halves(f"{images}/<class>/<image>", images, per_class, factors)
    except InputError as error:
        raise InputError("; ".join([str(error), *warnings])) from error
    for column in factors:
        if 1 in (len(np.unique(images.factors[column])) for images in (train, tests["test"])):
            raise InputError(f"{path}: {column} has one value in all training or all test images; leave it out")
    return replace(train, warnings=warnings), tests


def class_files(images: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return the files <class>/<image> of each class folder, sorted, and warnings of what is left out.

    Raises InputError for dead links, folders that cannot be read, and class folders with images in subfolders only.
    """
    classes, files = listing(images)
    dead = [name for name in files if not os.path.exists(images / name)]
    if dead:
        raise InputError(f"{images}: {len(dead)} dead links: {first_few(dead)}; mend or remove them")
    paths, others, unread = images_below(images)
    if unread:
        raise InputError(f"{images}: {len(unread)} folders cannot be read: {first_few(unread)}; make them readable")
    per_class: dict[str, list[str]] = {name: [] for name in classes}
    below = []
    for path in map(Path, paths):
        name, *inside = path.relative_to(images).parts
        if len(inside) == 1:
            per_class[name].append(f"{name}/{path.name}")
        elif inside:
            below.append(name)
    empty = [name for name in classes if not per_class[name]]
    nested = sorted({*empty} & {*below})
    if nested:
        raise InputError(
            f"{images}: {len(nested)} class folders hold images in subfolders only: {first_few(nested)}; move the "
            f"images up into the class folders, or the subfolders into {images} if they are the classes"
        )
    beside = [file for file in files if is_image(file) and "." in file]
    others = [f"{path.parent.name}/{path.name}" for path in map(Path, others) if path.parent.parent == images]
    notes = [
        (empty, f"folders without images are no classes: {first_few(empty)}"),
        (below, f"images in subfolders of class folders are left out: in {first_few(sorted({*below}))}"),
        (beside, f"images beside the class folders are left out: {first_few(beside)}"),
        (others, f"files with an ending that is not read are left out: {first_few(others)}"),
    ]
    return per_class, tuple(f"{images}: {len(names)} {note}" for names, note in notes if names)


def read_factors(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return the known characteristics of N images, name to (N,) int64 levels; none where there is no factors.csv.

    names: <class>/<image>, as in the file's column image; each other column is a characteristic. Raises InputError for
    a malformed file, an image without a row, a row without an image.
    """
    if not os.path.lexists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), [row for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    taken = {"", "class", "Class", "Mined"}.intersection(columns) or len(set(columns)) < len(columns)
    if columns[:1] != ["image"] or len(columns) < 2 or taken:
        raise InputError(
            f"{path}, line 1: expected image and a column for each characteristic, none twice, without a name, or "
            f"called class, Class or Mined; found {','.join(columns)[:80]!r}"
        )
    row_of = {row["image"]: row for row in rows}
    faults = {
        "rows are not as long as the first": [row["image"] for row in rows if None in row or None in row.values()],
        "images have several rows": [row["image"] for row in rows if row is not row_of[row["image"]]],
        "images have no row": [name for name in names if name not in row_of],
        "rows name no image": sorted(row_of.keys() - names),
    }
    for fault, images in faults.items():
        if images:
            raise InputError(f"{path}: {len(images)} {fault}: {first_few(images)}")
    levels = {column: [row_of[name][column] for name in names] for column in columns[1:]}
    return {column: np.unique(values, return_inverse=True)[1] for column, values in levels.items()}


def split_halves(
    source: str | Path, folder: Path, per_class: dict[str, list[str]], factors: dict[str, np.ndarray]
) -> Splits:
    """Return the first half of the classes with images to train and the rest to test.

    source: what names the classes. per_class: paths below the folder. factors: levels of all images in turn. Raises
    InputError when there are fewer than two classes on either side.
    """
    names = [name for name, files in per_class.items() if files]
    if len(names) < 4:
        needed = "at least 4 are needed: 2 to train, 2 to test"
        raise InputError(f"{source} holds {len(names)} classes with images; {needed}")
    images = ImageSet(
        names=[os.path.join(folder, file) for name in names for file in per_class[name]],
        labels=np.repeat(np.arange(len(names)), [len(per_class[name]) for name in names]),
        class_names=names,
        factors=factors,
    )
    half = len(names) // 2
    return images.classes(0, half), {"test": images.classes(half, len(names))}


def read_cars(root: Path) -> Splits:
    """Read CARS196: class folders, or the official archive's car_ims and cars_annos.mat, in its order."""
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
    return split_halves(path, root, per_class, factors={})


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists, of which the classes and the paths count."""
    images = root / "images" if os.path.isdir(root / "images") else root
    splits = {}
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        table = read_list(path, {"image_id": int, "class_id": int, "super_class_id": int, "path": str})
        splits[split] = listed_split(path, images, table["path"], table["class_id"])
    return splits["train"], {"test": splits["test"]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes by its list, whose first line is a count; queries are searched in the gallery."""
    images = root if os.path.isdir(root / "img") else root / "Img"
    path = first_existing(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    table = read_list(path, {"image_name": str, "item_id": str, "evaluation_status": str}, skiprows=1)
    statuses = sorted(set(table["evaluation_status"]))
    if statuses != ["gallery", "query", "train"]:
        raise InputError(f"{path}: expected each status of train, query and gallery, found {first_few(statuses)}")
    is_train = table["evaluation_status"] == "train"
    training, testing = table[is_train], table[~is_train]
    train = listed_split(path, images, training["image_name"], training["item_id"])
    test = listed_split(path, images, testing["image_name"], testing["item_id"])
    is_query = testing["evaluation_status"] == "query"
    return train, {"test": replace(test, is_query=is_query.to_numpy())}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID by its lists without headers, one to train and three test sets that are scored separately."""
    splits = {}
    lists = {"train": "train_list", "Set 1": "test_list_800", "Set 2": "test_list_1600", "Set 3": "test_list_2400"}
    for split, file in lists.items():
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        table = read_list(path, {"image_number": int, "vehicle_id": int}, names=["image_number", "vehicle_id"])
        files = [f"image/{number:07d}.jpg" for number in table["image_number"]]
        splits[split] = listed_split(path, root, files, table["vehicle_id"])
    return splits.pop("train"), splits


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists. Raises InputError."""
    for option in options:
        if os.path.isfile(root / option):
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    raise InputError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}")


def read_list(path: Path, columns: dict[str, type], **layout: object) -> pd.DataFrame:
    """Return the rows of a list file, whose columns are separated by spaces. Raises InputError for other content.

    columns: name to type. layout: how the file begins, see pandas.read_csv; by default with a line of these names.
    """
    expected = f"{path}: expected complete rows of {' '.join(columns)}"
    layout |= {"sep": r"\s+", "index_col": False, "quoting": csv.QUOTE_NONE}
    try:  # names of files in another encoding are read as the disk has them
        table = pd.read_csv(path, dtype=columns, encoding_errors="surrogateescape", **layout)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{expected} ({first_line(error)})") from error
    is_too_long = (table.dtypes == "uint64").any()  # pandas 2 reads numbers of 2^63 and more
    if list(table.columns) != list(columns) or table.empty or table.isna().any(axis=None) or is_too_long:
        raise InputError(f"{expected}, found {len(table)} rows of {' '.join(table.columns)[:80]!r}")
    return table


def listed_split(list_path: Path, folder: Path, files: Sequence[str], ids: Sequence[str] | Sequence[int]) -> ImageSet:
    """Return the ImageSet of listed files below a folder; classes are the distinct ids, sorted. Raises InputError."""
    require_images(list_path, folder, files)
    class_ids, labels = np.unique(np.array(ids), return_inverse=True)
    if len(class_ids) < 2:
        raise InputError(f"{list_path}: lists {len(class_ids)} classes of a split; at least 2 are needed")
    return ImageSet([os.path.join(folder, file) for file in files], labels, [str(name) for name in class_ids])


def require_images(list_path: Path, folder: Path, files: Sequence[str]) -> None:
    """Raise InputError where listed files are not on disk."""
    missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        count = f"{len(missing)} of {len(files)} listed images are not on disk"
        raise InputError(f"{list_path}: {count} below {folder}: {first_few(missing)}")
