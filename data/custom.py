"""Users' own data sets, in three layouts: a list images.csv, class folders, or a train and a test folder with these."""

import os
import posixpath
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.files import Survey, listing, normal_form, survey
from data.images import ImageSet, Splits
from data.tables import levels_of, read_factors, read_table, require
from support.errors import InputError, counted, first_few

AT_LEAST = "at least 4 are needed: 2 to train, 2 to test"
HALVES = "the first half of the classes trains, the rest tests"
GIVEN_SPLITS = ({"train", "test"}, {"train", "query", "gallery"})
SPLIT_SYNONYMS = {"training": "train", "testing": "test", "valid": "val", "validation": "val"}

IMAGE_COLUMNS = ["image", "class", "split"]
"""Columns that say where an image lies below the data set's folder, its class, and its split.

The split is train, test, query or gallery; it is empty for all images if the first half of the classes is to train.
"""

NOT_READABLE = {
    "dead link": "repair or remove them",
    "Git LFS pointer": "fetch the images that they stand for with git lfs pull",
    "unreadable folder": "make them readable",
}
"""What to do about an entry that cannot be read where an image or a class folder is expected."""


def layouts_in(root: Path) -> list[str]:
    """Return the layouts that a folder holds, in order of preference: "images.csv", "images", "train and test"."""
    is_there = {
        "images.csv": os.path.lexists(root / "images.csv"),
        "images": any(listing(root / "images")),
        "train and test": os.path.isdir(root / "train") and os.path.isdir(root / "test"),
    }
    return [layout for layout, is_true in is_there.items() if is_true]


def read_custom(root: Path) -> Splits:
    """Read a folder in the first of the three layouts that it holds.

    Raises:
        InputError: see read_image_list and read_folders.
    """
    layout = layouts_in(root)[0]
    return read_image_list(root) if layout == "images.csv" else read_folders(root, layout.split(" and "))


def read_folders(root: Path, folders: Sequence[str] = ("images",)) -> Splits:
    """Read class folders, and known characteristics from root/factors.csv if it exists.

    In root/images/<class>/<image>, the first half of the classes, sorted by name, trains; of an odd number of classes
    the test side gets one more. root/train/<class>/<image> and root/test/<class>/<image> are taken as given, and may
    have classes in common.

    Raises:
        InputError: there are too few classes, files cannot be read, or factors.csv is malformed.
    """
    found = survey(root, first=folders)
    require_readable(root, found, folders)
    require_class_folders(root, found, folders)
    rows = []
    for path in found["image"]:
        top, *inside = path.split("/")
        if top in folders and len(inside) == 2:
            rows.append((path, inside[0], "" if top == "images" else top))
    images = pd.DataFrame(sorted(rows, key=lambda row: (row[1], row[0])), columns=IMAGE_COLUMNS)
    factors = pd.DataFrame(index=images.index)
    if os.path.lexists(root / "factors.csv"):
        factors = read_factors(root / "factors.csv", images["image"].str.removeprefix("images/").tolist())
    layout = " and ".join(f"{root / folder}/<class>/<image>" for folder in folders)
    return make_splits(root, images, factors, layout, left_out_of_folders(found, folders))


def require_readable(root: Path, found: Survey, folders: Sequence[str]) -> None:
    """Check that the given folders of root hold no dead link, Git LFS pointer or unreadable folder.

    Raises:
        InputError: they hold one; see NOT_READABLE.
    """
    for kind, to_do in NOT_READABLE.items():
        names = [name for name in found[kind] if name.split("/")[0] in folders]
        if names:
            raise InputError(f"{root}: {counted(len(names), kind)}: {first_few(names)}; {to_do}")


def require_class_folders(root: Path, found: Survey, folders: Sequence[str]) -> None:
    """Check that each of the given folders of root holds class folders with images directly in them.

    Raises:
        InputError: images lie one level too high or too low.
    """
    paths = [path.split("/") for path in found["image"] if path.split("/")[0] in folders]
    with_images = {"/".join(parts[:-1]) for parts in paths}
    subfolders: dict[str, set[str]] = {}  # of class folders with images in subfolders only
    for parts in paths:
        class_folder = "/".join(parts[:2])
        if len(parts) > 3 and class_folder not in with_images:
            subfolders.setdefault(class_folder, set()).add(parts[-2])
    if subfolders:
        nested = sorted(subfolders)
        named = f"{counted(len(nested), 'class folder')} with images in subfolders only: {first_few(nested)}"
        if {"images/train", "images/training"} & {name.lower() for name in nested}:
            raise InputError(
                f"{root / 'images'}: {named}; if these are a split, move everything in {root / 'images'} up into "
                f"{root}, and rename that if it has the name of a published data set"
            )
        tops = sorted({name.split("/")[0] for name in nested})
        where = " and ".join(str(root / top) for top in tops)
        classes = counted(len(set().union(*subfolders.values())), "class")
        raise InputError(
            f"{where}: {named}; move the images up into the class folders, or the subfolders up into {where} if "
            f"they are the classes ({classes})"
        )
    for folder in folders:
        has_classes = any(name.startswith(f"{folder}/") for name in with_images)
        if not has_classes and (folder != "images" or folder in with_images):
            flat = [name for name in found["image"] if posixpath.dirname(name) == folder]
            holds = f"{counted(len(flat), 'image')} without class folders: {first_few(flat)}" if flat else "no images"
            to_do = f"put them into {folder}/<class>/, or {list_advice(root, found)}"
            if folder == "test":
                target = shlex.quote(str(root / "images"))
                to_do += f"; or, to train on the first half of the classes and test on the rest, ln -s train {target}"
            raise InputError(f"{root / folder}: {holds}; {to_do}")


def list_advice(root: Path, found: Survey) -> str:
    """Return advice to list images with their classes; it names tables in root from which the list could be made."""
    tables = [name for name in found["other file"] if name.lower().endswith((".csv", ".tsv", ".xlsx"))]
    made_from = f" (made from {first_few(tables)}?)" if tables else ""
    return f"list them with their classes in {root / 'images.csv'}, whose first line is image,class{made_from}"


def left_out_of_folders(found: Survey, folders: Sequence[str]) -> tuple[str, ...]:
    """Return a line for each reason why files are left out when the class folders in `folders` are read."""
    outside, too_deep, too_high, class_folders = [], [], [], set()
    for path in found["image"]:
        top, *inside = path.split("/")
        if top not in folders:
            outside.append(f"{top}/" if inside else top)
        elif len(inside) == 2:
            class_folders.add(posixpath.dirname(path))
        else:
            (too_high if len(inside) == 1 else too_deep).append(path)
    repeated = [name for name in found["repeated folder"] if name.split("/")[0] in folders]
    empty = [name for name in found["folder"] if name.count("/") == 1 and name.split("/")[0] in folders]
    where = " and ".join(f"{folder}/" for folder in folders)
    return (
        *note("image", outside, f" outside {where}"),
        *note("folder", sorted({*empty} - class_folders - {*repeated}), " without images"),
        *note("image", too_deep, " in subfolders of class folders"),
        *note("image", too_high, " beside the class folders"),
        *note("folder", repeated, " that leads to images read already"),
        *notes_on_others(found, {"factors.csv"}),
    )


def note(noun: str, names: Sequence[str], reason: str = "") -> list[str]:
    """Return a line on things that are left out; none if there are no names.

    Args:
        noun: what they are, in the singular.
        names: a name for each of them; repeated ones are shown once.
        reason: follows the noun.
    """
    return [f"{counted(len(names), noun)}{reason}: {first_few(sorted({*names}))}"] if names else []


def notes_on_others(found: Survey, read: set[str]) -> list[str]:
    """Return a line for each kind of other files and folders that are left out, without the paths in `read`."""
    kinds = ("backup copy", "other file", "hidden file", *NOT_READABLE)
    lines = []
    for kind in kinds:
        lines += note(kind, [name for name in found[kind] if name not in read])
    return lines


def read_image_list(root: Path) -> Splits:
    """Read root/images.csv, with the columns image and class, optionally split, and known characteristics.

    Image paths are relative to root, or all of them to root/images. Without the column split, the first half
    of the classes, sorted by name, trains. Rows of the split val are left out.

    Raises:
        InputError: the list is malformed, a listed image cannot be read, or there are too few classes.
    """
    path = root / "images.csv"
    if os.path.lexists(root / "factors.csv"):
        raise InputError(f"{root / 'factors.csv'}: is not read beside images.csv; put its columns into images.csv")
    table = read_table(path, ["image", "class"], ["split"])
    table["split"] = splits_in_list(path, table["split"]) if "split" in table else ""
    table["class"] = table["class"].map(normal_form)
    is_val = table["split"] == "val"
    found, files = find_listed(path, root, table["image"], is_val)
    left_out = (
        *note("row", table["image"][is_val].tolist(), " of val"),
        *note("image", sorted({*found["image"]} - {*files}), " not listed in images.csv"),
        *notes_on_others(found, {path.name, *files}),
    )
    images = table.assign(image=files)[~is_val].sort_values(["class", "image"])
    require(path, "no class", images["image"][images["class"] == ""])
    return make_splits(root, images, images.drop(columns=IMAGE_COLUMNS), str(path), left_out)


def find_listed(path: Path, root: Path, listed: pd.Series, is_val: pd.Series) -> tuple[Survey, pd.Series]:
    """Find the images of a list on disk, whatever the Unicode form of their names.

    Args:
        path: path of the list.
        root: folder of the data set; listed paths are relative to it or, all of them, to its folder images.
        listed: paths as in the list, by row number.
        is_val: whether a row is of the split val, whose images may be missing.

    Returns:
        What root holds, and the paths below root as on disk; those of missing images in normal form.

    Raises:
        InputError: an image is missing, listed twice, or not a readable image.
    """
    normal = listed.map(lambda name: normal_form(posixpath.normpath(name)))
    tops = {name.split("/")[0] for name in normal} | {"images"}
    found = survey(root, first=sorted(top for top in tops - {"", ".", ".."} if os.path.isdir(root / top)))
    refused = {
        "a hidden file": found["hidden file"],
        "a file that is no image": found["other file"],
        "a dead link": found["dead link"],
        "a Git LFS pointer, to be fetched with git lfs pull,": found["Git LFS pointer"],
    }
    usable = (*found["backup copy"], *found["image"])
    on_disk = {normal_form(name): name for names in (*refused.values(), usable) for name in names}
    in_root, in_images = (folder + normal for folder in ("", "images/"))
    names = max(in_root, in_images, key=lambda names: names.isin(on_disk).sum())
    missing = listed[~names.isin(on_disk) & ~is_val]
    fault = f"{len(missing):,} of {counted(int((~is_val).sum()), 'listed image')} not on disk"
    require(path, fault, missing, f"; give paths below {root} or {root / 'images'}, with slashes")
    files = names.map(lambda name: on_disk.get(name, name))
    require(path, "an image listed twice", files[files.duplicated(keep=False)])
    for fault, unusable in refused.items():
        require(path, fault, files[files.isin(unusable) & ~is_val])
    return found, files


def splits_in_list(path: Path, cells: pd.Series) -> pd.Series:
    """Return the split of each row of a list: train, test, query, gallery or val.

    Raises:
        InputError: a cell is none of these, or the splits do not go together.
    """
    splits = cells.str.lower().replace(SPLIT_SYNONYMS)
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
    root: Path, images: pd.DataFrame, factors: pd.DataFrame, layout: str, left_out: Sequence[str]
) -> Splits:
    """Build the image sets from a table. Leave out characteristics that are constant in training or in test.

    Args:
        root: folder that the images are below.
        images: one row per image, sorted by class and path; see IMAGE_COLUMNS.
        factors: known characteristics of the images, one column each.
        layout: description of what was read.
        left_out: a line for each reason why files were not read.

    Raises:
        InputError: there are fewer than two classes to train or to test.
    """
    but = "".join(f"; left out: {line}" for line in left_out)
    is_training = (images["split"] == "train").to_numpy()
    if not (images["split"] != "").any():
        classes = sorted({*images["class"]})
        if len(classes) < 4:
            raise InputError(f"{layout}: {counted(len(classes), 'class')} with images; {AT_LEAST}{but}")
        is_training = images["class"].isin(classes[: len(classes) // 2]).to_numpy()
        layout = f"{layout}, {HALVES}"
    sides = {"train": is_training, "test": ~is_training}
    all_levels = levels_of(factors)
    useless = []
    for name, levels in all_levels.items():
        if min(len({*levels[is_training]}), len({*levels[~is_training]})) < 2:
            useless.append(name)
    left_out = (*left_out, *note("characteristic", useless, " with one value in all training or all test images"))
    sets = {}
    for name, side in sides.items():
        class_names, labels = np.unique(images["class"][side].tolist(), return_inverse=True)
        if len(class_names) < 2:
            raise InputError(f"{layout}: {counted(len(class_names), 'class')} to {name}; at least 2 are needed{but}")
        is_query = (images["split"][side] == "query").to_numpy()
        sets[name] = ImageSet(
            names=[os.path.join(root, path) for path in images["image"][side]],
            labels=labels,
            class_names=class_names.tolist(),
            factors={factor: levels[side] for factor, levels in all_levels.items() if factor not in useless},
            is_query=is_query if is_query.any() else None,
            layout=layout,
            left_out=left_out,
        )
    return sets["train"], {"test": sets["test"]}
