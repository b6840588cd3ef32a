"""Published data sets and folders of one's own read as image sets, and what is wrong where they cannot be."""

import csv
import difflib
import os
from collections.abc import Mapping, Sequence
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
    known = known_of(name)
    candidates = list(dict.fromkeys([source / name, source / name / known.archive, source / (known.archive or name)]))
    for root in candidates:
        if is_data_set(root, known):
            return root
    present = [folder for folder in (*candidates, source) if os.path.isdir(folder)]
    found = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines = [
        f"no images of --dataset {name} in --source_path {source}",
        f"looked for  {known.layout} in {' or '.join(map(str, candidates))}",
        f"found       {found or f'no folder {source}'}",
        f"to do       {advise(known, name, source, candidates)}",
    ]
    raise InputError("\n  ".join([*lines, f"get it at   {known.url}"] if known.url else lines))


def advise(known: Published, name: str, source: Path, candidates: list[Path]) -> str:
    """Return what to do about a data set that is not where it is expected, in any of the candidates."""
    target = source / name
    if is_data_set(source, known):
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    for path in (path for root in candidates for path in (root, *(root / landmark for landmark in known.landmarks))):
        if os.path.islink(path) and not os.path.exists(path):
            return f"mend the link {path}, which leads to {os.readlink(path)}: nothing is there"
    for folder in (folder for folder in (*candidates, source) if os.path.isdir(folder)):
        try:
            files = listing(folder)[1]
        except InputError as error:
            return f"{error}: make it readable"
        below = folders_below(folder, 3) if folder != source else []  # there they may be other data sets
        archives = [file for file in files if file.lower().endswith(ARCHIVES)]
        if archives:
            return f"unpack {folder / archives[0]}"
        for deeper in below:
            if is_data_set(deeper, known):
                return f"it lies too deep: move what {deeper} holds to {target}"
        if known.layout.startswith("images/<class>"):
            roots = [root for root in (folder, *below) if has_class_folders(root)]
            flat = [root for root in below if any(map(is_image, readable(root)[1]))]
            if len(roots) > 1:
                return (
                    f"put the class folders of {first_few(list(map(str, roots)))} together in {target / 'images'}; "
                    "rename files where two have one name"
                )
            if roots:
                return f"move or link the class folders from {roots[0]} to {target / 'images'}"
            if flat:
                return f"{flat[0]} holds images without their classes: put them into {target / 'images'}/<class>"
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
    """Return the listing of a folder, nothing of one that cannot be read and lies beside what is looked for."""
    try:
        return listing(folder)
    except InputError:
        return [], []


def is_data_set(folder: Path, known: Published) -> bool:
    """Return whether a folder holds a landmark of a data set."""
    return any(os.path.exists(folder / landmark) for landmark in known.landmarks)


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    try:
        names = sum(listing(folder), [])
    except InputError as error:
        return f"what cannot be listed ({error.__cause__.strerror})"
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "nothing"


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of what a folder holds, folders and others, without hidden ones. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not is_hidden(entry.name)]
            # Of a link that leads to itself, entry.is_dir() would raise
            is_folder = {e.name: os.path.isdir(e.path) if e.is_symlink() else e.is_dir() for e in seen}
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})") from error
    names = sorted(is_folder)
    return [name for name in names if is_folder[name]], [name for name in names if not is_folder[name]]


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that disks and file servers make."""
    return name.startswith(".") or name in ("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX")


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image, see IMAGES."""
    ending = os.path.splitext(name)[1]
    return not ending or ending.lower() in IMAGES


def images_below(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted paths of the images below a folder, in linked folders too, of all other files, and of folders
    that cannot be read.

    Hidden files and folders do not count.
    """
    images, others, unread, seen = [], [], [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=lambda error: unread.append(error.filename)):
        seen.add(os.path.realpath(folder))
        folders[:] = [
            name for name in folders if not is_hidden(name) and os.path.realpath(os.path.join(folder, name)) not in seen
        ]
        for path in (os.path.join(folder, name) for name in files if not is_hidden(name)):
            if os.path.isfile(path) or os.path.islink(path):  # no pipe, which would be waited for
                (images if is_image(path) else others).append(path)
    return sorted(images), sorted(others), sorted(map(str, unread))


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more; warnings say what is left out. Raises InputError when there
    are fewer than two classes with images on either side, images in subfolders of a class only, or dead links.
    """
    images = root / "images"
    folders, files = listing(images)
    dead = [name for name in files if not os.path.exists(images / name)]
    if dead:
        raise InputError(f"{images}: {len(dead)} dead links: {first_few(dead)}; mend or remove them")
    inside = {name: listing(images / name) for name in folders}
    per_class = {name: [f"{name}/{file}" for file in inside[name][1] if is_image(file)] for name in folders}
    warnings = left_out(images, files, inside)
    factors = read_factors(root / "factors.csv", [file for files in per_class.values() for file in files])
    try:
        train, tests = split_halves(f"{images}/<class>/<image>", images, per_class, factors)
    except InputError as error:
        raise InputError("; ".join([str(error), *warnings])) from error
    for column in factors:
        if 1 in (len(np.unique(images.factors[column])) for images in (train, tests["test"])):
            raise InputError(
                f"{root / 'factors.csv'}: {column} has one value in all training or all test images; leave it out"
            )
    return replace(train, warnings=warnings), tests


def left_out(images: Path, files: Sequence[str], inside: Mapping[str, tuple[list[str], list[str]]]) -> tuple[str, ...]:
    """Return warnings of what a folder of class folders holds that is read as no image of a class.

    files: beside the class folders. inside: the folders and files in each. Raises InputError where a class folder has
    images in its subfolders only.
    """
    below, unread = {}, []
    for name, (subfolders, _) in inside.items():
        for subfolder in subfolders:
            paths, _, unread_below = images_below(images / name / subfolder)
            below[name] = below.get(name, []) + paths
            unread += unread_below
    below = {name: paths for name, paths in below.items() if paths}
    empty = [name for name, (_, files) in inside.items() if not any(map(is_image, files))]
    nested = [name for name in empty if name in below]
    if nested:
        raise InputError(
            f"{images}: {len(nested)} class folders hold images in subfolders only: {first_few(nested)}; move the "
            f"images up into the class folders, or the subfolders into {images} if they are the classes"
        )
    others = [f"{name}/{file}" for name, (_, files) in inside.items() for file in files if not is_image(file)]
    beside = [file for file in files if is_image(file) and "." in file]
    n_below = sum(map(len, below.values()))
    notes = [
        (empty, f"{len(empty)} folders without images are no classes: {first_few(empty)}"),
        (below, f"{n_below} images in subfolders of class folders are left out: in {first_few(list(below))}"),
        (beside, f"{len(beside)} images beside the class folders are left out: {first_few(beside)}"),
        (others, f"{len(others)} files with an ending that is not read are left out: {first_few(others)}"),
        (unread, f"{len(unread)} folders cannot be read and are left out: {first_few(unread)}"),
    ]
    return tuple(f"{images}: {text}" for names, text in notes if names)


def read_factors(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return the known characteristics of N images, name to (N,) int64 levels; of a missing factors.csv none.

    Its columns: image, the path below the folder of images as in `names`, and one for each characteristic, of any text.
    Raises InputError for a malformed file, an image without a row, a row without an image.
    """
    if not os.path.lexists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), [row for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    are_distinct = len({*columns, "class", "Class", "Mined", ""}) == len(columns) + 4
    if columns[:1] != ["image"] or len(columns) < 2 or not are_distinct:
        raise InputError(
            f"{path}, line 1: expected image and a column for each characteristic, none twice, without a name, or "
            f"called class, Class or Mined; found {','.join(columns)[:80]!r}"
        )
    row_of = {row["image"]: row for row in rows}
    for odd, what in (
        ([row["image"] for row in rows if None in row or None in row.values()], "rows are not as long as the first"),
        ([row["image"] for row in rows if row is not row_of[row["image"]]], "images have several rows"),
        ([name for name in names if name not in row_of], "images have no row"),
        (sorted(row_of.keys() - names), "rows name no image"),
    ):
        if odd:
            raise InputError(f"{path}: {len(odd)} {what}: {first_few(odd)}")
    return {
        column: np.unique([row_of[name][column] for name in names], return_inverse=True)[1] for column in columns[1:]
    }


def split_halves(
    source: str | Path, folder: Path, per_class: dict[str, list[str]], factors: Mapping[str, np.ndarray] | None = None
) -> Splits:
    """Return the first half of the classes with images to train and the rest to test; paths are below the folder.

    source: what names the classes. factors: levels of all images in turn. Raises InputError when there are fewer than
    two classes on either side.
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
        factors=dict(factors or {}),
    )
    half = len(names) // 2
    return images.classes(0, half), {"test": images.classes(half, len(names))}


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
    """Read Stanford Online Products by its two lists, of which the classes and the paths count."""
    images = root / "images" if os.path.isdir(root / "images") else root
    columns = {"image_id": int, "class_id": int, "super_class_id": int, "path": str}
    splits = {}
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        table = read_list(path, columns)
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
    train, test = (
        listed_split(path, images, part["image_name"], part["item_id"]) for part in (table[is_train], table[~is_train])
    )
    is_query = (table["evaluation_status"] == "query")[~is_train]
    return train, {"test": replace(test, is_query=is_query.to_numpy())}


def read_vehicle_id(root: Path) -> Splits:
    """Read PKU VehicleID by its lists without headers, one to train and three test sets that are scored separately."""
    splits = {}
    for split, file in (("train", "train_list"), *((f"Set {i}", f"test_list_{800 * i}") for i in (1, 2, 3))):
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

    columns: name to type. layout: of what is above the rows, see pandas.read_csv; by default a line of their names.
    """
    expected = f"{path}: expected complete rows of {' '.join(columns)}"
    layout |= {"sep": r"\s+", "index_col": False, "quoting": csv.QUOTE_NONE}
    try:  # names of files in another encoding are read as the disk has them
        table = pd.read_csv(path, dtype=columns, encoding_errors="surrogateescape", **layout)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{expected} ({first_line(error)})") from error
    is_too_long = (table.dtypes == "uint64").any()  # older pandas reads numbers of 2^63 and more
    if list(table.columns) != list(columns) or table.empty or table.isna().any(axis=None) or is_too_long:
        raise InputError(f"{expected}, found {len(table)} rows of {' '.join(table.columns)[:80]!r}")
    return table


def listed_split(list_path: Path, folder: Path, files: Sequence[str], ids: Sequence[str] | Sequence[int]) -> ImageSet:
    """Return the ImageSet of listed files below a folder; classes are the distinct ids, sorted.

    Raises InputError when fewer than two classes or images that are not on disk are listed.
    """
    require_images(list_path, folder, files)
    class_ids, labels = np.unique(np.array(ids), return_inverse=True)
    if len(class_ids) < 2:
        raise InputError(f"{list_path}: lists {len(class_ids)} classes of a split; at least 2 are needed")
    return ImageSet([os.path.join(folder, file) for file in files], labels, [str(name) for name in class_ids])


def require_images(list_path: Path, folder: Path, files: Sequence[str]) -> None:
    """Raise InputError that names the first listed files that are not on disk, and says how many there are."""
    missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise InputError(
            f"{list_path}: {len(missing)} of {len(files)} listed images are not on disk below {folder}: "
            f"{first_few(missing)}"
        )
