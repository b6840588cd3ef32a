"""Find the folder of a data set, or say what is wrong if it is not there."""

import difflib
import os
import shlex
from collections import Counter
from pathlib import Path

from data.custom import AT_LEAST, HALVES, layouts_in, list_advice
from data.files import describe, listing, survey
from data.published import CUSTOM, PUBLISHED, DatasetInfo, dataset_info
from support.errors import InputError, counted, first_few

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".rar", ".7z")
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation", "dev")
"""Names, in lower case, that people give the folders of a split, the best one first."""


def check_name(name: str, source_path: str | Path, flag: str = "--dataset ") -> None:
    """Check that the name of a data set is a plain folder name.

    Args:
        flag: what precedes the name on the command line.

    Raises:
        InputError: the name is a path; the message says which flags were meant.
    """
    if name != ".." and Path(name).name == name != "":
        return
    path = os.path.expanduser(name)
    path = os.path.normpath(path if os.path.exists(path) else os.path.join(source_path, path))
    path = os.path.abspath(path) if os.path.basename(path) in ("", ".", "..") else path
    folder, plain_name = (shlex.quote(part or ".") for part in os.path.split(path))
    meant = f"{flag}{plain_name} --source_path {folder}"
    raise InputError(f"{flag}{name!r}: give a plain folder name, and where it lies: {meant}")


def locate(name: str, source: Path) -> Path:
    """Return the folder of a data set: source/name or, for a published set, the folder that its archive unpacks to.

    Args:
        name: name of the data set.
        source: folder that holds the data sets.

    Raises:
        InputError: there is none; the message has several lines: what was looked for, what was found, what to do.
    """
    info = dataset_info(name)
    archive = info.archive
    candidates = list(dict.fromkeys([source / name, source / name / archive, source / (archive or name)]))
    for root in candidates:
        if is_data_set(root, info):
            return root
    present = list(filter(os.path.isdir, [*candidates, source]))
    holds = "; ".join(f"{folder} holds {describe(folder)}" for folder in present[:2])
    lines = [
        f"no images of --dataset {name} in --source_path {source}",
        f"looked for  {info.layout} in {' or '.join(map(str, candidates))}",
        f"found       {holds or f'no folder {source}'}",
        f"to do       {advise(info, name, source, candidates, present)}",
    ]
    lines += [f"get it at   {info.url}"] if info.url else []
    raise InputError("\n  ".join(lines))


def is_data_set(folder: Path, info: DatasetInfo) -> bool:
    """Tell whether a folder holds a data set."""
    if info is CUSTOM:
        return bool(layouts_in(folder))
    return any(os.path.exists(folder / landmark) for landmark in info.landmarks)


def advise(info: DatasetInfo, name: str, source: Path, candidates: list[Path], present: list[Path]) -> str:
    """Return what to do about a data set that was not found.

    Args:
        info: what is known of the data set.
        name: its name.
        source: folder that holds the data sets.
        candidates: folders that were tried.
        present: those of the candidates and source that exist.
    """
    if is_data_set(source, info):
        return f"{source} is the data set itself: name it {name} and give its parent as --source_path"
    for root in candidates:
        for path in (root, *(root / landmark for landmark in info.landmarks)):
            if os.path.islink(path) and not os.path.exists(path):
                return f"repair the link {path}, which leads to {os.readlink(path)}: nothing is there"
    for folder in present:
        # What lies deeper in source may be other data sets
        advice = advise_on_images(folder, source / name, info) if folder != source else ""
        archives = [file for file in listing(folder)[1] if file.lower().endswith(ARCHIVES)]
        if advice or archives:
            return advice or f"unpack {folder / archives[0]}"
    near = [] if name in PUBLISHED else difflib.get_close_matches(name, [*PUBLISHED, "shapes"], 1)
    hint = f", or is --dataset {near[0]} meant?" if near else ""
    return f"give the folder that holds the data set's folder as --source_path{hint}"


def advise_on_images(root: Path, target: Path, info: DatasetInfo) -> str:
    """Return what to do with the images below a folder, judged by the depth at which most of them lie; "" without any.

    Args:
        root: the folder.
        target: folder in which the data set is expected.
        info: what is known of the data set.
    """
    found = survey(root)
    if found["unreadable folder"]:
        return f"make the folder {root / found['unreadable folder'][0]} readable"
    data_sets = [root / name for name in found["folder"] if is_data_set(root / name, info)]
    data_sets = [path for path in data_sets if not set(path.parents) & set(data_sets)]
    if len(data_sets) == 1:
        return f"it lies too deep: move what {data_sets[0]} holds to {target}"
    images = (*found["image"], *found["Git LFS pointer"], *found["dead link"])
    folders = [Path(name).parent.parts for name in images]
    if not folders or "<class>" not in info.layout:
        return ""
    depth = Counter(map(len, folders)).most_common(1)[0][0]
    folders = sorted({parts for parts in folders if len(parts) == depth})
    if info is CUSTOM:
        for parts in folders:
            for i, part in enumerate(parts[:-1]):
                if part.lower() in TRAIN:
                    return advise_on_split(root.joinpath(*parts[:i]), target)
    common = os.path.commonprefix(folders)
    base, classes = root.joinpath(*common), sorted({parts[-1] for parts in folders if parts})
    listed = f", or {list_advice(target, found)}" if info is CUSTOM else ""
    put = f"put the images into {target}/images/<class>/{listed}"
    if len(folders) == 1:
        return f"{base} holds {counted(len(found['image']), 'image')} without class folders: {put}"
    if len(classes) < 4:
        few = f"{base} holds {counted(len(classes), 'folder')} with images ({first_few(classes)})"
        return f"{few}: too few if they are the classes, {AT_LEAST}; if not, {put}"
    if len(common) == depth - 1:
        return f"move or link the class folders from {base} to {target / 'images'}"
    groups = sorted({str(Path(*parts[len(common) : -1])) for parts in folders})
    return (
        f"merge the contents of all {counted(len(groups), 'folder')} in {base} ({first_few(groups)}) into "
        f"{target / 'images'}: {counted(len(classes), 'class')}, if these are the classes; rename files that have the "
        "same name"
    )


def advise_on_split(base: Path, target: Path) -> str:
    """Return the commands that link the folders of a split under the names by which they are found.

    Args:
        base: folder that holds a folder to train on, and perhaps one to test on.
        target: folder of the data set.
    """
    folders = {name.lower(): name for name in listing(base)[0]}
    train = next(filter(None, map(folders.get, TRAIN)), None)
    test = next(filter(None, map(folders.get, TEST)), None)
    links = {"train": train, "test": test}
    held = first_few([name for name in links.values() if name])
    why = f"{base} holds {held}, but these folders have to be called train and test"
    if test is None:
        links, why = {"images": train}, f"{base} holds {train}, but nothing to test on; with this link {HALVES}"
    commands = [
        f"ln -s {shlex.quote(os.path.relpath(base / name, target))} {shlex.quote(str(target / link))}"
        for link, name in links.items()
        if base / name != target / link
    ]
    return f"{why}: {' && '.join(commands)}"
