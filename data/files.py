"""What lies below a folder: which files are images, which are not, and which cannot be read."""

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.errors import InputError, first_few

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".avif")
"""Endings of images. A file with another ending, or none, is an image if its first bytes say so."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
"""First bytes of JPEG, PNG and GIF. Those of BMP, PNM and TIFF begin texts and raw files of cameras too."""

LONGER_THAN_IMAGE = re.compile(f"(.*(?:{'|'.join(map(re.escape, sorted(IMAGES, key=len, reverse=True)))})).+", re.S)
"""A path that begins with that of an image."""

POINTER, POINTER_SIZE = b"version https://git-lfs", 1024
"""First bytes and largest size of what Git LFS leaves in place of a file that it has not fetched."""


@dataclass(frozen=True)
class Survey:
    """What lies below a folder: sorted paths from there, with slashes.

    images: files with an ending of images, and files whose first bytes are those of an image. copies: images without
    an ending of images beside their original, such as x.jpg~ and x.jpg. others: all other files. hidden: hidden files,
    and files in hidden folders. dead: links that lead nowhere. pointers: images that Git LFS has not fetched. folders:
    all folders that are not hidden. repeated: folders that lead to a folder that was read already. unread: folders
    that cannot be read.
    """

    images: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    pointers: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def survey(root: Path, first: Sequence[str] = ()) -> Survey:
    """Return what lies below a folder.

    Linked folders count, but none is read twice: folders go before links to them, and both before hidden folders.

    first: folders in root that are read with all their links before the others.
    """
    found, seen, links, hidden_folders, unknown = Survey(), set(), [], [], []

    def visit(folder: str, in_hidden: bool) -> None:
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in seen:
            found.repeated.append(folder)
            return
        seen.add(real)
        try:
            entries = list(os.scandir(path))
        except OSError:
            found.unread.append(folder)
            return
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name in first:
                continue
            is_link, hides = entry.is_symlink(), in_hidden or is_hidden(entry.name)
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                if hides and not in_hidden:
                    hidden_folders.append(name)
                elif is_link:
                    links.append((name, in_hidden))
                else:
                    found.folders.extend([] if in_hidden else [name])
                    visit(name, in_hidden)
            elif os.path.isfile(entry.path) if is_link else entry.is_file():  # no pipe, which would be waited for
                if hides:
                    found.hidden.append(name)
                elif has_image_ending(entry.name):
                    (found.pointers if is_pointer(entry) else found.images).append(name)
                else:
                    unknown.append(name)
            elif is_link and not hides:
                found.dead.append(name)

    found.folders.extend(first)
    waiting = [*first, ""]
    while waiting or hidden_folders:
        in_hidden = not waiting
        visit((waiting or hidden_folders).pop(0), in_hidden)
        while links:
            name, in_hidden = links.pop(0)
            found.folders.extend([] if in_hidden else [name])
            visit(name, in_hidden)
    named = {name.lower() for name in found.images}
    with ThreadPoolExecutor() as pool:
        for name, is_an_image in zip(unknown, pool.map(begins_like_an_image, [os.path.join(root, n) for n in unknown])):
            kind = found.others if not is_an_image else found.copies if is_copy(name, named) else found.images
            kind.append(name)
    for names in vars(found).values():
        names.sort()
    return found


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of what a folder holds, folders and others, without hidden ones. Raises InputError."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise InputError(f"cannot list the folder {folder} ({error.strerror})") from error
    folders = {name for name in names if os.path.isdir(folder / name)}
    return sorted(folders), [name for name in names if name not in folders]


def readable(folder: Path) -> tuple[list[str], list[str]]:
    """Return the listing of a folder, or nothing where it cannot be read."""
    try:
        return listing(folder)
    except InputError:
        return [], []


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    try:
        names = sum(listing(folder), [])
    except InputError as error:
        return f"what cannot be listed ({error.__cause__.strerror})"
    return first_few(names, 5) if names else "nothing"


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that hold images and are no run folders."""
    names = []
    for name in readable(folder)[0]:
        files = readable(folder / name)[1]
        by_ending = any(map(has_image_ending, files))
        if "hypa.pkl" not in files and (by_ending or any(begins_like_an_image(folder / name / file) for file in files)):
            names.append(name)
    return names


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that operating systems and file servers make."""
    return name.startswith(".") or name in (
        "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "Icon\r"
    )  # fmt: skip


def has_image_ending(name: str) -> bool:
    """Tell whether a file's name ends like that of an image, see IMAGES."""
    return name.lower().endswith(IMAGES)


def begins_like_an_image(path: str | Path) -> bool:
    """Tell whether a file begins like a JPEG, PNG, GIF, WebP or AVIF; one that cannot be read does not."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        return False
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_avif = start[4:8] == b"ftyp" and (b"avif" in start[8:] or b"avis" in start[8:])
    return start.startswith(SIGNATURES) or is_webp or is_avif


def is_pointer(entry: os.DirEntry) -> bool:
    """Tell whether a file is a pointer of Git LFS."""
    try:
        if entry.stat().st_size >= POINTER_SIZE:
            return False
        with open(entry.path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def is_copy(path: str, images: Collection[str]) -> bool:
    """Tell whether an image is a copy beside its original: x.jpg~, x.jpg_original, x.jpg.bak or x.bak beside x.jpg.

    images: the paths with an ending of images, in lower case.
    """
    stem, ending = os.path.splitext(path.lower())
    if ending in (".bak", ".old", ".orig") and any(stem + known in images for known in IMAGES):
        return True
    longer = LONGER_THAN_IMAGE.fullmatch(path.lower())
    return longer is not None and longer[1] in images


def normal_form(name: str) -> str:
    """Return a name in Unicode's composed form, in which names compare equal whichever program has written them."""
    return unicodedata.normalize("NFC", name)
