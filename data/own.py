"""One's own images, in three layouts: a list images.csv, class folders, or class folders to train and to test on."""

import os
import posixpath
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.files import Survey, listing, normal_form, survey
from data.images import ImageSet, Splits
from data.tables import levels_of, read_factors, read_table, require
from support.errors import InputError, counted, first_few

AT_LEAST = "at least 4 are needed: 2 to train, 2 to test"
HALVES = "the first half of the classes trains, the rest tests"
GIVEN_SPLITS = ({"train", "test"}, {"train", "query", "gallery"})
OTHER_WORDS = {"training": "train", "testing": "test", "valid": "val", "validation": "val"}
"""Words for a split in a list that stand for another one."""


class Entry(NamedTuple):
    """An image of a data set: its path below the folder, its class, and train, test, query or gallery.

    The split is empty for all images where the first half of the classes is to train.
    """

    path: str
    class_name: str
    split: str


def layouts_in(root: Path) -> list[str]:
    """Return which layouts a folder holds, the one that counts first: "images.csv", "images", "train and test"."""
    is_there = {
        "images.csv": os.path.lexists(root / "images.csv"),
        "images": any(listing(root / "images")),
        "train and test": os.path.isdir(root / "train") and os.path.isdir(root / "test"),
    }
    return [layout for layout, is_true in is_there.items() if is_true]


def read_own(root: Path) -> Splits:
    """Read a folder in the first of the three layouts that it holds. Raises InputError."""
    layout = layouts_in(root)[0]
    return read_image_list(root) if layout == "images.csv" else read_folders(root, layout.split(" and "))


def read_folders(root: Path, folders: Sequence[str] = ("images",)) -> Splits:
    """Read class folders: root/images/<class>/<image>, or root/train/<class>/<image> and root/test/<class>/<image>.

    Of images the first half of the classes, sorted by name, trains; of an odd number the test side has one more. train
    and test may have classes in common. Known characteristics are those of root/factors.csv.

    Raises:
        InputError: for too few classes, files that cannot be read, or a malformed factors.csv.
    """
    found = survey(root, first=folders)
    require_sound(root, found, folders)
    require_class_folders(root, found, folders)
    images = []
    for path in found.images:
        top, *inside = path.split("/")
        if top in folders and len(inside) == 2:
            images.append(Entry(path, inside[0], "" if top == "images" else top))
    images.sort(key=lambda image: (image.class_name, image.path))
    factors = {}
    if os.path.lexists(root / "factors.csv"):
        factors = read_factors(root / "factors.csv", [image.path.removeprefix("images/") for image in images])
    layout = " and ".join(f"{root / folder}/<class>/<image>" for folder in folders)
    return make_splits(root, images, factors, layout, left_out_of_folders(found, folders))


def require_sound(root: Path, found: Survey, folders: Sequence[str]) -> None:
    """Raise InputError for dead links, pointers of Git LFS and unreadable folders in some folders of root."""
    for names, noun, advice in (
        (found.dead, "dead link", "mend or remove them"),
        (found.pointers, "Git LFS pointer", "fetch the images that they stand for with git lfs pull"),
        (found.unread, "unreadable folder", "make them readable"),
    ):
        bad = [name for name in names if name.split("/")[0] in folders]
        if bad:
            raise InputError(f"{root}: {counted(len(bad), noun)}: {first_few(bad)}; {advice}")


def require_class_folders(root: Path, found: Survey, folders: Sequence[str]) -> None:
    """Raise InputError where folders hold their images one level too high, or too low."""
    n_direct, below = Counter(), defaultdict(list)
    for path in found.images:
        parts = path.split("/")
        if len(parts) > 3:
            below["/".join(parts[:2])].append(parts[-2])
        n_direct["/".join(parts[:-1])] += 1
    below = {name: classes for name, classes in below.items() if name.split("/")[0] in folders}
    if any(not n_direct[name] for name in below):
        nested = sorted(name for name in below if n_direct[name] < len(below[name]))  # not by a stray image
        named = f"{counted(len(nested), 'class folder')} with images in subfolders only: {first_few(nested)}"
        if {"images/train", "images/training"} & {name.lower() for name in nested}:
            where = f"{root}, which is to have a name of your own"
            raise InputError(f"{root / 'images'}: {named}; if that is a split, move all that it holds up to {where}")
        where = " and ".join(str(root / top) for top in sorted({name.split("/")[0] for name in nested}))
        classes = counted(len(set().union(*(below[name] for name in nested))), "class")
        raise InputError(
            f"{where}: {named}; move the images up into the class folders, or the subfolders up into {where} if "
            f"they are the classes ({classes})"
        )
    for folder in folders:
        if not any(name.startswith(f"{folder}/") for name in n_direct) and (folder != "images" or n_direct[folder]):
            flat = [name for name in found.images if posixpath.dirname(name) == folder]
            holds = f"{counted(len(flat), 'image')} without class folders: {first_few(flat)}" if flat else "no images"
            to_do = f"put them into {folder}/<class>/, or {list_advice(root, found)}"
            if folder == "test":
                target = shlex.quote(str(root / "images"))
                to_do += f"; or, to train on the first half of the classes and test on the rest, ln -s train {target}"
            raise InputError(f"{root / folder}: {holds}; {to_do}")


def list_advice(root: Path, found: Survey) -> str:
    """Return in words how to give the classes of images in a list, with a table that root holds already."""
    tables = [name for name in found.others if name.lower().endswith((".csv", ".tsv", ".xlsx"))]
    known = f" (made from {first_few(tables)}?)" if tables else ""
    return f"list them with their classes in {root / 'images.csv'}, whose first line is image,class{known}"


def left_out_of_folders(found: Survey, folders: Sequence[str]) -> tuple[str, ...]:
    """Return what is not read where these folders hold class folders, a line for each reason."""
    outside = [name for name in found.images if name.split("/")[0] not in folders]
    tops = sorted({name.split("/")[0] + "/" * ("/" in name) for name in outside})
    where = " and ".join(f"{folder}/" for folder in folders)
    inside = [name for name in found.images if name.split("/")[0] in folders]
    repeated = [name for name in found.repeated if name.split("/")[0] in folders]
    classes = [name for name in found.folders if name.count("/") == 1 and name.split("/")[0] in folders]
    empty = sorted({*classes} - {posixpath.dirname(name) for name in inside} - {*repeated})
    return (
        *note("image", f"outside {where}", outside, shown=tops),
        *note("folder", "without images", empty),
        *note("image", "in subfolders of class folders", [name for name in inside if name.count("/") > 2]),
        *note("image", "beside the class folders", [name for name in inside if name.count("/") == 1]),
        *note("folder", "that leads to images read already", repeated),
        *notes_on_others(found, {"factors.csv"}),
    )


def note(noun: str, reason: str, names: Sequence[str], shown: Sequence[str] = ()) -> list[str]:
    """Return a line on what is left out, or none. shown: what is named; by default the names themselves."""
    return [f"{counted(len(names), noun)} {reason}".strip() + f": {first_few(shown or names)}"] if names else []


def notes_on_others(found: Survey, read: set[str]) -> list[str]:
    """Return a line for each kind of file but images. read: paths that are not left out."""
    kinds = {
        ("copy", "of images beside them"): found.copies,
        ("other file", ""): found.others,
        ("hidden file", ""): found.hidden,
        ("dead link", ""): found.dead,
        ("Git LFS pointer", ""): found.pointers,
        ("unreadable folder", ""): found.unread,
    }
    lines = [note(*words, [name for name in names if name not in read]) for words, names in kinds.items()]
    return sum(lines, [])


def read_image_list(root: Path) -> Splits:
    """Read root/images.csv: columns image and class, perhaps split, and known characteristics.

    An image is a path below root, or, for the whole list, below root/images. Without a column split the first half of
    the classes, sorted by name, trains. Rows of val are left out.

    Raises:
        InputError: for a malformed list, a listed image that cannot be read, or too few classes.
    """
    path = root / "images.csv"
    if os.path.lexists(root / "factors.csv"):
        raise InputError(f"{root / 'factors.csv'}: is not read beside images.csv; put its columns into images.csv")
    table = read_table(path, ["image", "class"], ["split"])
    is_split = "split" in table
    table["split"] = splits_in_list(path, table["split"]) if is_split else ""
    table["class"] = table["class"].map(normal_form)
    is_val = table["split"] == "val"
    found, files = find_listed(path, root, table["image"], is_val)
    notes = (
        *note("row", "of val", table["image"][is_val].tolist()),
        *note("image", "not listed in images.csv", sorted({*found.images} - {*files})),
        *notes_on_others(found, {path.name, *files}),
    )
    table = table.assign(image=files)[~is_val].sort_values(["class", "image"])
    require(path, "no class", table["image"][table["class"] == ""])
    factors = levels_of(table.drop(columns=["image", "class", "split"]))
    images = [Entry(*row) for row in zip(table["image"], table["class"], table["split"])]
    return make_splits(root, images, factors, str(path), notes)


def find_listed(path: Path, root: Path, listed: pd.Series, is_val: pd.Series) -> tuple[Survey, pd.Series]:
    """Find the images of a list on disk, in any Unicode normal form.

    Args:
        path: of the list.
        root: the folder that the paths, or those behind images/, are below.
        listed: paths as in the list, by number of the row.
        is_val: whether a row is of val, whose image need not be there.

    Returns:
        What root holds; the paths below root, as on disk, missing ones as in the list.
    """
    wanted = listed.map(lambda name: normal_form(posixpath.normpath(name)))
    tops = {name.split("/")[0] for name in wanted} | {"images"}
    found = survey(root, first=sorted(top for top in tops - {"", ".", ".."} if os.path.isdir(root / top)))
    refused = {
        "a hidden file": found.hidden,
        "a file that is no image": found.others,
        "a dead link": found.dead,
        "a Git LFS pointer, to be fetched with git lfs pull,": found.pointers,
    }
    on_disk = {normal_form(name): name for names in (*refused.values(), found.copies, found.images) for name in names}
    in_root, in_images = (folder + wanted for folder in ("", "images/"))
    names = max(in_root, in_images, key=lambda names: names.isin(on_disk).sum())
    missing = listed[~names.isin(on_disk) & ~is_val]
    fault = f"{len(missing):,} of {counted(int((~is_val).sum()), 'listed image')} not on disk"
    require(path, fault, missing, f"; give paths below {root} or {root / 'images'}, with slashes")
    files = names.map(lambda name: on_disk.get(name, name))
    require(path, "an image listed twice", files[files.duplicated(keep=False)])
    for fault, bad in refused.items():
        require(path, fault, files[files.isin(bad) & ~is_val])
    return found, files


def splits_in_list(path: Path, cells: pd.Series) -> pd.Series:
    """Return train, test, query, gallery or val for each row of a list. Raises InputError."""
    splits = cells.str.lower().replace(OTHER_WORDS)
    known = [*set().union(*GIVEN_SPLITS), "val"]
    require(path, "a split that is none of train, test, query, gallery and val", cells[~splits.isin(known)])
    given = set(splits) - {"val"}
    if given not in GIVEN_SPLITS:
        raise InputError(
            f"{path}: the column split holds {', '.join(sorted(given)) or 'val only'}; give train and test, or train, "
            "query and gallery"
        )
    return splits


def make_splits(
    root: Path, images: Sequence[Entry], factors: Mapping[str, np.ndarray], layout: str, left_out: Sequence[str]
) -> Splits:
    """Return the image sets of images that are sorted by class and path.

    Args:
        root: the folder that their paths are below.
        images: all of them.
        factors: name to (N,) int64 levels of all images. One that has a single level on a side is left out.
        layout: what was read, in words.
        left_out: a line for each reason that leaves files out.

    Raises:
        InputError: for fewer than two classes to train or to test.
    """
    but = "".join(f"; left out: {line}" for line in left_out)
    names = sorted({image.class_name for image in images})
    is_training = np.array([image.split == "train" for image in images], dtype=bool)
    if not any(image.split for image in images):
        if len(names) < 4:
            raise InputError(f"{layout}: {counted(len(names), 'class')} with images; {AT_LEAST}{but}")
        first_half = set(names[: len(names) // 2])
        is_training = np.array([image.class_name in first_half for image in images])
        layout = f"{layout}, {HALVES}"
    sides = {"train": np.flatnonzero(is_training), "test": np.flatnonzero(~is_training)}
    useless = [name for name, levels in factors.items() if min(len(set(levels[side])) for side in sides.values()) < 2]
    left_out = (*left_out, *note("characteristic", "with one value in all images of a side", useless))
    sets = {}
    for name, side in sides.items():
        labels = [images[i].class_name for i in side]
        class_names = sorted(set(labels))
        if len(class_names) < 2:
            raise InputError(f"{layout}: {counted(len(class_names), 'class')} to {name}; at least 2 are needed{but}")
        is_query = np.array([images[i].split == "query" for i in side])
        sets[name] = ImageSet(
            names=[os.path.join(root, images[i].path) for i in side],
            labels=np.searchsorted(class_names, labels).astype(np.int64),
            class_names=class_names,
            factors={column: levels[side] for column, levels in factors.items() if column not in useless},
            is_query=is_query if is_query.any() else None,
            layout=layout,
            left_out=left_out,
        )
    return sets["train"], {"test": sets["test"]}
