"""One's own images, in three layouts: a list images.csv, class folders, or class folders to train and to test on."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import Survey, class_folders, listing, normal_form, survey
from data.images import ImageSet, Splits
from data.tables import check_factor_names, levels_of, read_factors, read_table
from support.errors import InputError, counted, first_few

AT_LEAST = "at least 4 are needed: 2 to train, 2 to test"
HALVES = "the first half of the classes trains, the rest tests"
GIVEN_SPLITS = ({"train", "test"}, {"train", "query", "gallery"})


class Entry(NamedTuple):
    """An image of a data set: its path below the folder, with slashes, its class, and train, test, query or gallery."""

    path: str
    class_name: str
    split: str


def layouts_in(root: Path) -> list[str]:
    """Return which layouts a folder holds, the one that counts first: "images.csv", "images", "train and test"."""
    found = ["images.csv"] if os.path.lexists(root / "images.csv") else []
    found += ["images"] if os.path.exists(root / "images") else []
    return found + (["train and test"] if class_folders(root / "train") and class_folders(root / "test") else [])


def read_own(root: Path) -> Splits:
    """Read a folder in the first of the three layouts that it holds. Raises InputError."""
    readers: dict[str, Callable[[Path], Splits]] = {
        "images.csv": read_image_list,
        "images": read_class_folders,
        "train and test": read_split_folders,
    }
    return readers[layouts_in(root)[0]](root)


def read_class_folders(root: Path) -> Splits:
    """Read root/images/<class>/<image>: the first half of the classes, sorted by name, trains, the rest tests.

    Of an odd number of classes the test side has one more. Known characteristics are those of root/factors.csv.

    Raises:
        InputError: for fewer than four classes, files that cannot be read, or a malformed factors.csv.
    """
    listing(root / "images")
    found = survey(root, first=["images"])
    per_class, notes = files_by_class(root, found, ["images"])["images"], left_out_of_folders(found, ["images"])
    names = [name for name, files in per_class.items() if files]
    flat = [name for name in found.images if name.startswith("images/") and name.count("/") == 1]
    if flat and not names:
        raise InputError(
            f"{root / 'images'}: {counted(len(flat), 'image')} without class folders: {first_few(flat)}; put them into "
            f"images/<class>/, or list them with their classes in {root / 'images.csv'} if the set is your own"
        )
    if len(names) < 4:
        held = f"{root / 'images'}/<class>/<image> holds {counted(len(names), 'class')} with images; {AT_LEAST}"
        raise InputError("; ".join([held, *(f"left out: {note}" for note in notes)]))
    split_of = {name: "train" if i < len(names) // 2 else "test" for i, name in enumerate(names)}
    images = [Entry(file, name, split_of[name]) for name in names for file in per_class[name]]
    layout = f"{root / 'images'}/<class>/<image>, {HALVES}{beside(root)}"
    factors = factors_of(root, found, images, below="images/")
    return make_splits(root, images, factors, root / "factors.csv", layout, notes)


def read_split_folders(root: Path) -> Splits:
    """Read root/train/<class>/<image> and root/test/<class>/<image>, which may have classes in common.

    Known characteristics are those of root/factors.csv. Raises InputError as read_class_folders does.
    """
    folders = ["train", "test"]
    found = survey(root, first=folders)
    per_split = files_by_class(root, found, folders)
    images = [
        Entry(file, name, split)
        for split, per_class in per_split.items()
        for name, files in per_class.items()
        for file in files
    ]
    layout = f"{root / 'train'}/<class>/<image> and {root / 'test'}/<class>/<image>"
    factors = factors_of(root, found, images, below="")
    return make_splits(root, images, factors, root / "factors.csv", layout, left_out_of_folders(found, folders))


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
    columns, rows = read_table(path)
    places = {column.strip().lower(): i for i, column in reversed(list(enumerate(columns)))}
    if not {"image", "class"} <= places.keys() or not rows:
        raise InputError(
            f"{path}, row 1: expected the columns image and class, perhaps split, then known characteristics, and a "
            f"row for each image; found {','.join(columns)[:80]!r} and {counted(len(rows), 'row')} below"
        )
    listed, classes, given = (
        {n: row[places[column]] for n, row in rows.items()} if column in places else {}
        for column in ("image", "class", "split")
    )
    splits = splits_in_list(path, given) if given else {}
    chosen = [n for n in rows if splits.get(n) != "val"]
    classes = {n: name.strip() for n, name in classes.items()}
    require(path, "no class", [described(n, listed[n]) for n in chosen if not classes[n]])
    folder, files, found = find_listed(path, root, listed, chosen)
    chosen.sort(key=lambda n: (classes[n], files[n]))
    splits = splits or halves(path, [classes[n] for n in chosen], chosen)
    used = {places.get(column) for column in ("image", "class", "split")}
    columns = {i: column for i, column in enumerate(columns) if i not in used}
    check_factor_names(path, list(columns.values()))
    factors = levels_of({column: [rows[n][i] for n in chosen] for i, column in columns.items()})
    images = [Entry(files[n], classes[n], splits[n]) for n in chosen]
    read = {folder + files[n] for n in chosen}
    val = {folder + files[n]: None for n in files if splits[n] == "val"}
    notes = notes_on(
        {
            ("row", "of val"): [listed[n] for n in rows if splits[n] == "val"],
            ("image", "not listed in images.csv"): [n for n in found.images if n not in read and n not in val],
            ("copy", "of images beside them"): [name for name in found.copies if name not in read],
            ("other file", ""): [name for name in found.others if name != path.name],
            ("hidden file", ""): [name for name in found.hidden if name not in read],
        }
    )
    how = "split as its column says" if given else HALVES
    layout = f"{path}, {how}{beside(root, {name.split('/')[0] for name in read})}"
    return make_splits(root / folder, images, factors, path, layout, notes)


def halves(path: Path, classes: Sequence[str], rows: Sequence[int]) -> dict[int, str]:
    """Return train or test for the rows of a list: the first half of the classes, sorted by name, trains."""
    names = sorted(set(classes))
    if len(names) < 4:
        raise InputError(f"{path}: lists {counted(len(names), 'class')}; {AT_LEAST}")
    train = set(names[: len(names) // 2])
    return {n: "train" if name in train else "test" for n, name in zip(rows, classes)}


def find_listed(
    path: Path, root: Path, listed: Mapping[int, str], needed: Sequence[int]
) -> tuple[str, dict[int, str], Survey]:
    """Find the images of a list on disk, in any Unicode normal form.

    Args:
        listed: row number to path as in the list.
        needed: the rows whose images have to be there.

    Returns:
        The folder that the paths are below, "" for root or "images/"; row number to path below it, as on disk; what
        root holds.
    """
    require(path, "no image", [f"row {n}" for n in needed if not listed[n].strip()])
    wanted = {n: posixpath.normpath(name) for n, name in listed.items() if not name.startswith("/")}
    wanted = {n: name for n, name in wanted.items() if name.split("/")[0] not in (".", "..")}
    tops = {top for name in wanted.values() for top in (name.split("/")[0], "images")}
    found = survey(root, first=sorted(top for top in tops if os.path.isdir(root / top)))
    kinds = [found.others, found.hidden, found.copies, found.pointers, found.images]
    on_disk = {normal_form(name): name for names in kinds for name in names}

    def look_up(folder: str) -> dict[int, str]:
        """Return the paths of the files that there are, below the folder."""
        files = {}
        for n, name in wanted.items():
            same_name = on_disk.get(normal_form(folder + name))
            file = folder + name if os.path.isfile(root / folder / name) else same_name
            if file:
                files[n] = file.removeprefix(folder)
        return files

    folder, files = max(((folder, look_up(folder)) for folder in ("", "images/")), key=lambda pair: len(pair[1]))
    missing = [n for n in needed if n not in files]
    absolute = [described(n, listed[n]) for n in missing if re.match(r"/|[A-Za-z]:[/\\]", listed[n])]
    require(path, f"an absolute path, where one below {root} is expected,", absolute)
    require(path, "backslashes in place of slashes", [described(n, listed[n]) for n in missing if "\\" in listed[n]])
    if missing:
        first = first_few([described(n, listed[n]) for n in missing])
        count = f"{len(missing):,} of {counted(len(needed), 'listed image')}"
        raise InputError(f"{path}: {count} not on disk, neither below {root} nor below {root / 'images'}: {first}")
    first_row: dict[str, int] = {}
    twice = [f"row {first_row[f]} and row {n} ({f})" for n, f in files.items() if first_row.setdefault(f, n) != n]
    require(path, "an image listed twice", twice)
    others, pictures = set(found.others), {folder + files[n] for n in needed}
    no_images = [described(n, files[n]) for n in needed if folder + files[n] in others]
    require(path, "a file that is not read as an image", no_images)
    require_sound(root, found, pictures.__contains__)
    return folder, files, found


def splits_in_list(path: Path, cells: Mapping[int, str]) -> dict[int, str]:
    """Return train, test, query, gallery or val for each row of a list, by its number. Raises InputError."""
    splits = {n: cell.strip().lower() for n, cell in cells.items()}
    splits = {n: "val" if split in ("valid", "validation") else split for n, split in splits.items()}
    words = {*set.union(*GIVEN_SPLITS), "val"}
    unknown = [described(n, cells[n]) for n, split in splits.items() if split not in words]
    require(path, "a split that is none of train, test, query, gallery and val", unknown)
    given = set(splits.values()) - {"val"}
    if given not in GIVEN_SPLITS:
        raise InputError(
            f"{path}: the column split holds {', '.join(sorted(given)) or 'val only'}; give train and test, or train, "
            "query and gallery"
        )
    return splits


def described(number: int, cell: str) -> str:
    """Return a row of a list in words."""
    return f"row {number} ({cell})"


def require(path: Path, fault: str, rows: Sequence[str]) -> None:
    """Raise InputError where rows of a list have a fault."""
    if rows:
        n_rows = f" ({counted(len(rows), 'row')} in all)" if len(rows) > 3 else ""
        raise InputError(f"{path}: {fault} in {first_few(rows)}{n_rows}")


def require_sound(root: Path, found: Survey, is_read: Callable[[str], bool]) -> None:
    """Raise InputError for dead links, pointers of Git LFS and unreadable folders among what is read."""
    for names, noun, advice in (
        (found.dead, "dead link", "mend or remove them"),
        (found.pointers, "Git LFS pointer", "fetch the images that they stand for with git lfs pull"),
        (found.unread, "unreadable folder", "make them readable"),
    ):
        bad = [name for name in names if is_read(name)]
        if bad:
            raise InputError(f"{root}: {counted(len(bad), noun)}: {first_few(bad)}; {advice}")


def files_by_class(root: Path, found: Survey, folders: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return for folders of class folders the sorted images of each class, {folder: {class: [path below root]}}.

    Raises InputError for files that cannot be read, and for class folders that hold images in subfolders only.
    """
    require_sound(root, found, lambda name: name.split("/")[0] in folders)
    sorted_out: dict[str, dict[str, list[str]]] = {}
    for folder in folders:
        parts = [name.split("/") for name in found.folders if name.startswith(f"{folder}/")]
        per_class: dict[str, list[str]] = {names[1]: [] for names in parts if len(names) == 2}
        below = {}
        for path in found.images:
            top, *inside = path.split("/")
            if top == folder and len(inside) == 2:
                per_class[inside[0]].append(path)
            elif top == folder and len(inside) > 2:
                below.setdefault(inside[0], set()).add(inside[-2])
        nested = sorted(name for name in below if not per_class[name])
        splits = [name for name in ("train", "test", "val") if name in nested]
        if "train" in splits:
            them = "both" if len(splits) == 2 else "them"
            where = f"{root}, where a data set with a name of your own has them"
            raise InputError(f"{root / folder}: holds {' and '.join(splits)}; move {them} up into {where}")
        if nested:
            classes = set.union(*(below[name] for name in nested))
            raise InputError(
                f"{root / folder}: {counted(len(nested), 'class folder')} with images in subfolders only: "
                f"{first_few(nested)}; move the images up into the class folders, or the subfolders into "
                f"{root / folder} if they are the classes ({counted(len(classes), 'class')})"
            )
        sorted_out[folder] = dict(sorted(per_class.items()))
    return sorted_out


def left_out_of_folders(found: Survey, folders: Sequence[str]) -> tuple[str, ...]:
    """Return what is not read where these folders hold class folders, a line for each reason."""

    def inside(names: Sequence[str], *depths: int) -> list[str]:
        """Return what lies in the folders, at these depths or at any."""
        inner = [name for name in names if name.split("/")[0] in folders]
        return [name for name in inner if not depths or min(name.count("/"), 3) in depths]

    holds = {name.rpartition("/")[0] for name in found.images}
    outside = [name for name in [*found.images, *found.copies] if name.split("/")[0] not in folders]
    tops = Counter(name.split("/")[0] + "/" * ("/" in name) for name in outside)
    empty = [n for n in found.folders if n.count("/") == 1 and n not in holds and n not in found.repeated]
    note = f"{counted(len(outside), 'image')} outside {' and '.join(f'{folder}/' for folder in folders)}: "
    note += first_few([f"{top} ({n})" if top.endswith("/") else top for top, n in sorted(tops.items())])
    return (note,) * bool(outside) + notes_on(
        {
            ("folder", "without images"): inside(empty),
            ("image", "in subfolders of class folders"): inside(found.images, 3),
            ("image", "beside the class folders"): inside(found.images, 1),
            ("copy", "of images beside them"): inside(found.copies),
            ("other file", ""): [name for name in found.others if name != "factors.csv"],
            ("hidden file", ""): found.hidden,
            ("folder", "that leads to images read already"): inside(found.repeated),
        }
    )


def notes_on(left_out: Mapping[tuple[str, str], Sequence[str]]) -> tuple[str, ...]:
    """Return a line for each reason that leaves something out, {(noun, reason): names}."""
    return tuple(
        f"{counted(len(names), noun)} {reason}".strip() + f": {first_few(names)}"
        for (noun, reason), names in left_out.items()
        if names
    )


def beside(root: Path, used: Collection[str] = ()) -> str:
    """Return a clause that names the layouts that a folder holds beside the one that counts.

    used: folders in root with images that are read.
    """
    others = [layout for layout in layouts_in(root)[1:] if not {*layout.split(" and ")} & {*used}]
    return f"; {' and '.join(others)} beside it: not read" if others else ""


def factors_of(root: Path, found: Survey, images: Sequence[Entry], below: str) -> dict[str, np.ndarray]:
    """Return the known characteristics in root/factors.csv, see read_factors; none where there is no such file.

    below: the folder, with its slash, that the file's paths are below.
    """
    path = root / "factors.csv"
    if not os.path.lexists(path):
        return {}
    read = {image.path for image in images}
    names = [image.path.removeprefix(below) for image in images]
    left_out = [name.removeprefix(below) for name in [*found.images, *found.copies, *found.hidden] if name not in read]
    return read_factors(path, names, left_out)


def make_splits(
    root: Path,
    images: Sequence[Entry],
    factors: Mapping[str, np.ndarray],
    table: Path,
    layout: str,
    left_out: tuple[str, ...],
) -> Splits:
    """Return the image sets of images that are sorted by class and path.

    Args:
        factors: name to (N,) int64 levels of all images.
        table: the file that they come from.
        layout: what was read, in words.
        left_out: a line for each reason that leaves files out.

    Raises:
        InputError: where a split has fewer than two classes, or all its images have one level of a characteristic.
    """
    sets = {}
    for name in ("train", "test"):
        chosen = [i for i, image in enumerate(images) if (image.split == "train") == (name == "train")]
        class_names = sorted({images[i].class_name for i in chosen})
        if len(class_names) < 2:
            raise InputError(f"{layout}: {counted(len(class_names), 'class')} to {name}; at least 2 are needed")
        for column, levels in factors.items():
            if len(np.unique(levels[chosen])) == 1:
                side = "training" if name == "train" else "test"
                raise InputError(f"{table}: {column} has one value in all {side} images; leave it out")
        label_of = {class_name: label for label, class_name in enumerate(class_names)}
        is_query = np.array([images[i].split == "query" for i in chosen])
        sets[name] = ImageSet(
            names=[os.path.join(root, images[i].path) for i in chosen],
            labels=np.array([label_of[images[i].class_name] for i in chosen], dtype=np.int64),
            class_names=class_names,
            factors={column: levels[chosen] for column, levels in factors.items()},
            is_query=is_query if name == "test" and is_query.any() else None,
            layout=layout,
            left_out=left_out,
        )
    return sets["train"], {"test": sets["test"]}
