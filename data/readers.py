"""Readers of the published data sets, by the lists that come with them."""

import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.io import loadmat

from data.custom import AT_LEAST, read_folders
from data.files import describe
from data.images import ImageSet, Splits
from support.errors import InputError, counted, first_few, first_line


def read_cars(root: Path) -> Splits:
    """Read CARS196 from class folders, or from car_ims and cars_annos.mat of the official archive, in its order.

    Raises:
        InputError: files are missing or damaged, or there are too few classes.
    """
    if os.path.isdir(root / "images"):
        return read_folders(root)
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
    names = [name for name in class_names if per_class[name]]
    if len(names) < 4:
        raise InputError(f"{path} holds {counted(len(names), 'class')} with images; {AT_LEAST}")
    images = ImageSet(
        names=[os.path.join(root, file) for name in names for file in per_class[name]],
        labels=np.repeat(np.arange(len(names)), [len(per_class[name]) for name in names]),
        class_names=names,
    )
    half = len(names) // 2
    return images.classes(0, half), {"test": images.classes(half, len(names))}


def read_online_products(root: Path) -> Splits:
    """Read Stanford Online Products by its two lists; only their classes and paths are used.

    Raises:
        InputError: files are missing or damaged.
    """
    images = root / "images" if os.path.isdir(root / "images") else root
    splits = {}
    for split in ("train", "test"):
        path = first_existing(root, f"Info_Files/Ebay_{split}.txt", f"Ebay_{split}.txt")
        table = read_list(path, {"image_id": int, "class_id": int, "super_class_id": int, "path": str})
        splits[split] = listed_split(path, images, table["path"], table["class_id"])
    return splits["train"], {"test": splits["test"]}


def read_in_shop(root: Path) -> Splits:
    """Read In-Shop Clothes by its list, whose first line is a count.

    Raises:
        InputError: files are missing or damaged.
    """
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
    """Read PKU VehicleID by its lists, which have no headers: one to train, and three test sets.

    Raises:
        InputError: files are missing or damaged.
    """
    splits = {}
    lists = {"train": "train_list", "Set 1": "test_list_800", "Set 2": "test_list_1600", "Set 3": "test_list_2400"}
    for split, file in lists.items():
        path = first_existing(root, f"train_test_split/{file}.txt", f"{file}.txt")
        table = read_list(path, {"image_number": int, "vehicle_id": int}, names=["image_number", "vehicle_id"])
        files = [f"image/{number:07d}.jpg" for number in table["image_number"]]
        splits[split] = listed_split(path, root, files, table["vehicle_id"])
    return splits.pop("train"), splits


def first_existing(root: Path, *options: str) -> Path:
    """Return the first of some files below root that exists.

    Raises:
        InputError: none does.
    """
    for option in options:
        if os.path.isfile(root / option):
            return root / option
    looked_for = " or ".join(str(root / option) for option in options)
    raise InputError(f"list file missing: looked for {looked_for}; {root} holds {describe(root)}")


def read_list(path: Path, columns: dict[str, type], **layout: object) -> pd.DataFrame:
    """Read a list file with columns separated by spaces.

    Args:
        path: the file.
        columns: {name: type} of all columns.
        **layout: arguments of pandas.read_csv for files that do not begin with a line of these names.

    Raises:
        InputError: the file is something else.
    """
    expected = f"{path}: expected complete rows of {' '.join(columns)}"
    layout |= {"sep": r"\s+", "index_col": False, "quoting": csv.QUOTE_NONE}
    try:  # file names that are not UTF-8 keep their bytes
        table = pd.read_csv(path, dtype=columns, encoding_errors="surrogateescape", **layout)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{expected} ({first_line(error)})") from error
    if list(table.columns) != list(columns) or table.empty or table.isna().any(axis=None):
        raise InputError(f"{expected}, found {counted(len(table), 'row')} of {' '.join(table.columns)[:80]!r}")
    return table


def listed_split(list_path: Path, folder: Path, files: Sequence[str], ids: Sequence[str] | Sequence[int]) -> ImageSet:
    """Return the image set of a list; its classes are the distinct ids, sorted.

    Args:
        list_path: the list, for messages.
        folder: folder that the files are below.
        files: paths of N images.
        ids: class id of each image.

    Raises:
        InputError: a file is missing, or there are fewer than two classes.
    """
    require_images(list_path, folder, files)
    class_ids, labels = np.unique(np.array(ids), return_inverse=True)
    if len(class_ids) < 2:
        raise InputError(f"{list_path}: lists {counted(len(class_ids), 'class')} of a split; at least 2 are needed")
    return ImageSet([os.path.join(folder, file) for file in files], labels, [str(name) for name in class_ids])


def require_images(list_path: Path, folder: Path, files: Sequence[str]) -> None:
    """Check that all listed files exist.

    Raises:
        InputError: some do not.
    """
    missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        count = f"{len(missing)} of {len(files)} listed images are not on disk"
        raise InputError(f"{list_path}: {count} below {folder}: {first_few(missing)}")
