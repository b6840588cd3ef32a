"""Where a data set lies, and what is wrong where it is not found."""

import difflib
import os
import shlex
from pathlib import Path

from data.files import class_folders, describe, listing, readable, survey
from data.own import AT_LEAST, layouts_in
from data.published import OWN, PUBLISHED, Published, published_info
from support.errors import InputError, counted, first_few

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
"""Names, in any case of letters, that people give the folders of a split."""


def check_name(name: str, source_path: str | Path, flag: str = "--dataset ") -> None:
    """Raise InputError where the name of a data set is a path, or can be no folder's name.

    flag: what stands before the name on the command line.
    """
    if name not in ("", ".", "..") and Path(name).name == name and len(os.fsencode(name)) <= 240:
        return
    path = Path(os.path.expanduser(name))
    if not name or len(os.fsencode(path.name)) > 240:
        raise InputError(f"{flag}{name!r}: give a plain folder name; --source_path is the folder that holds it")
    path = path if os.path.exists(path) else Path(source_path) / path
    path = path.absolute() if path.name in ("", "..") else path
    path = Path(os.path.normpath(path)) if path.is_absolute() else path
    meant = f"{flag}{shlex.quote(path.name)} --source_path {shlex.quote(str(path.parent))}"
    raise InputError(f"{flag}{name!r}: give a plain folder name, and where it lies: {meant}")


def locate(name: str, source: Path) -> Path:
    """Return the folder of a data set: source/name, or for a published set also its archive's folder, there or in it.

    Raises InputError that says, in several lines, what was looked for, what was found and what to do.
    """
    published = published_info(name)
    archive = published.archive
    candidates = list(dict.fromkeys([source / name, source / name / archive, source / (archive or name)]))
    for root in candidates:
        if is_data_set(root, published):
            return root
    if published is OWN:
        require_both_splits(source / name)
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


def is_data_set(folder: Path, published: Published) -> bool:
    """Tell whether a folder holds a data set."""
    if published is OWN:
        return bool(layouts_in(folder))
    return any(os.path.exists(folder / landmark) for landmark in published.landmarks)


def require_both_splits(root: Path) -> None:
    """Raise InputError where a folder holds class folders to train on, but none to test on that are called so."""
    folders = {name.lower(): name for name in readable(root)[0]}
    train, test, val = (
        next((root / folders[name] for name in names if name in folders), None) for names in SPLITS.values()
    )
    if train is None or not class_folders(train):
        return
    wanted = root / "test"
    if train.name != "train":
        raise InputError(f"{train}: the folder to train on has to be called train: {link(train.name, root / 'train')}")
    if test is not None and class_folders(test):
        raise InputError(f"{test}: the folder to test on has to be called test: {link(test.name, wanted)}")
    missing = f"there is no {wanted}" if test is None else f"{test} holds no class folders with images"
    if val is not None and class_folders(val):
        first = "" if test is None else f"rename {test.name}, and "
        to_do = f"{first}to test on {val.name} {link(val.name, wanted)}"
        raise InputError(f"{train} holds class folders, but {missing}; {to_do}")
    first = "" if test is None else f"put its images into {wanted}/<class>/; or "
    halves = f"to train on the first half of the classes and test on the rest {link('train', root / 'images')}"
    raise InputError(f"{train} holds class folders, but {missing}; {first}{halves}")


def link(target: str, path: Path) -> str:
    """Return in words how to make a link."""
    return f"link it: ln -s {shlex.quote(target)} {shlex.quote(str(path))}"


def advise(published: Published, name: str, source: Path, candidates: list[Path], present: list[Path]) -> str:
    """Return what to do about a data set that is in none of the candidates; present: those and source that exist."""
    if is_data_set(source, published):
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    for root in candidates:
        for path in (root, *(root / landmark for landmark in published.landmarks)):
            if os.path.islink(path) and not os.path.exists(path):
                return f"mend the link {path}, which leads to {os.readlink(path)}: nothing is there"
    images = source / name / "images"
    for folder in present:
        try:
            files = listing(folder)[1]
        except InputError as error:
            return f"{error}: make it readable"
        archives = [file for file in files if file.lower().endswith(ARCHIVES)]
        if archives:
            return f"unpack {folder / archives[0]}"
        if folder == source:  # what lies deeper may be other data sets
            if "<class>" in published.layout and len(class_folders(source)) >= 4:
                return f"move or link the class folders from {source} to {images}"
            continue
        for deeper in folders_below(folder, 3):
            if is_data_set(deeper, published):
                return f"it lies too deep: move what {deeper} holds to {source / name}"
            if published is OWN:
                require_both_splits(deeper)
        advice = advise_by_depth(folder, images, published) if "<class>" in published.layout else ""
        if advice:
            return advice
    near = [] if name in PUBLISHED else difflib.get_close_matches(name, [*PUBLISHED, "shapes"], 1)
    hint = f", or is --dataset {near[0]} meant?" if near else ""
    return f"give the folder that holds the data set's folder as --source_path{hint}"


def advise_by_depth(root: Path, images: Path, published: Published) -> str:
    """Return what to do with images that lie in a folder, as class folders, in groups of them, or without classes.

    Returns nothing where there are no images. images: where class folders are expected.
    """
    found = survey(root).images
    holders = sorted({tuple(name.split("/")[:-1]) for name in found})
    if not holders:
        return ""
    common = os.path.commonprefix(holders) if len(holders) > 1 else holders[0]
    base = root.joinpath(*common)
    holders = [holder[len(common) :] for holder in holders]
    listed = f", or list them with their classes in {images.with_name('images.csv')}" if published is OWN else ""
    direct = {holder[0] for holder in holders if len(holder) == 1}
    if len(direct) >= 4:
        return f"move or link the class folders from {base} to {images}"
    are_splits = {name.lower() for name in direct} <= {name for names in SPLITS.values() for name in names}
    if () in holders or (are_splits and len(direct) == len(holders)):
        where = f"{base} holds {counted(len(found), 'image')}"
        return f"{where} without class folders: put them into {images}/<class>/{listed}"
    classes = {holder[-1] for holder in holders}
    groups = sorted({base.joinpath(*holder[:-1]) for holder in holders})
    where = ", ".join(map(str, groups))
    if len(classes) < 4:
        few = f"{where} hold {counted(len(classes), 'folder')} with images ({first_few(sorted(classes))})"
        to_do = f"put the images into {images}/<class>/{listed}"
        return f"{few}: too few if they are the classes, {AT_LEAST}; if not, {to_do}"
    return (
        f"put the class folders of {where} together in {images}, {counted(len(classes), 'class')}; rename files where "
        "two have one name"
    )


def folders_below(root: Path, depth: int) -> list[Path]:
    """Return the folders below a folder, nearest first, down to a depth."""
    children = [root / name for name in readable(root)[0]]
    return children + [path for child in children if depth > 1 for path in folders_below(child, depth - 1)]
