"""What lies below a folder: which files are images, which are not, and which cannot be read."""

import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.errors import first_few

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".avif")
"""Endings of images. A file with another ending, or none, is an image if its first bytes say so."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
"""First bytes of JPEG, PNG and GIF. Those of BMP, PNM and TIFF begin texts and raw files of cameras too."""

COPY = re.compile(r"(~|_original|\.(bak|old|orig|backup))$")
"""What a program adds to the name of a copy, in lower case."""

MADE_BY_SYSTEMS = ("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "Icon\r")
"""Names of files and folders that operating systems and file servers make; they count as hidden."""

POINTER, POINTER_SIZE = b"version https://git-lfs", 1024
"""First bytes and largest size of what Git LFS leaves in place of a file that it has not fetched."""


@dataclass(frozen=True)
class Survey:
    """What lies below a folder: sorted paths from there, with slashes.

    images: files with an ending of images, and files whose first bytes are those of an image. copies: images without
    an ending of images beside their original, such as x.jpg~ and x.jpg. others: all other files. hidden: hidden files,
    and files in hidden folders. dead: links that lead nowhere. pointers: files that Git LFS has not fetched. folders:
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

    Args:
        root: the folder.
        first: folders in root that are read with the folders that they link to, each by itself, before the others. No
            other folder is read twice, and of those no links. By default all of root is read with its links.
    """
    found, read_before, to_open = Survey(), set(), []
    for start in (*first, ""):
        seen, waiting = set() if start else read_before, [start]
        for folder in waiting:  # grows as it is read: folders nearer to the top go first
            path = os.path.join(root, folder)
            real = os.path.realpath(path)
            if real in seen:
                found.repeated.append(folder)
                continue
            seen.add(real)
            found.folders.extend([folder] if folder and not is_hidden(folder) else [])
            try:
                entries = list(os.scandir(path))
            except OSError:
                found.unread.append(folder)
                continue
            for entry in sorted(entries, key=lambda entry: (is_hidden(entry.name), entry.is_symlink(), entry.name)):
                name, is_link = f"{folder}/{entry.name}".lstrip("/"), entry.is_symlink()
                if not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                    to_open.extend([name] if add_file(found, name, entry) else [])
                elif name not in first and (start or not first or not is_link):
                    waiting.append(name)
        read_before |= seen
    add_by_first_bytes(found, root, to_open)
    for names in vars(found).values():
        names.sort()
    return found


def add_file(found: Survey, name: str, entry: os.DirEntry) -> bool:
    """Add a file to what was found; return True, and do not, where its first bytes are to say what it is."""
    is_link = entry.is_symlink()
    is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
    if not is_file:  # a pipe is nothing, as reading it would wait for a writer
        found.dead.extend([name] if is_link and not is_hidden(name) else [])
    elif is_hidden(name):
        found.hidden.append(name)
    elif has_image_ending(name) and entry.stat().st_size >= POINTER_SIZE:
        found.images.append(name)
    else:
        return True
    return False


def add_by_first_bytes(found: Survey, root: Path, names: Sequence[str]) -> None:
    """Add files that are small, or have no ending of images, to what was found."""
    with ThreadPoolExecutor() as pool:
        starts = dict(zip(names, pool.map(head, [os.path.join(root, name) for name in names])))
    found.pointers.extend(name for name in names if starts[name].startswith(POINTER))
    found.images.extend(name for name in names if has_image_ending(name) and not starts[name].startswith(POINTER))
    originals = {name.lower() for name in found.images} | {os.path.splitext(name.lower())[0] for name in found.images}
    for name in names:
        if has_image_ending(name) or starts[name].startswith(POINTER):
            continue
        original, n_marks = COPY.subn("", name.lower())
        if not begins_like_an_image(starts[name]):
            found.others.append(name)
        else:
            (found.copies if n_marks and original in originals else found.images).append(name)


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of what a folder holds, folders and others, without hidden ones; none if unreadable."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError:
        return [], []
    folders = [name for name in names if os.path.isdir(folder / name)]
    return folders, [name for name in names if name not in set(folders)]


def describe(folder: Path) -> str:
    """Return a few words on what a folder holds."""
    return first_few(sum(listing(folder), []), 5) or "nothing that can be listed"


def is_hidden(path: str) -> bool:
    """Tell whether a path leads to or through a hidden file or folder, or one that systems and file servers make."""
    return any(name.startswith(".") or name in MADE_BY_SYSTEMS for name in path.split("/"))


def has_image_ending(name: str) -> bool:
    """Tell whether a file's name ends like that of an image, see IMAGES."""
    return name.lower().endswith(IMAGES)


def head(path: str | Path) -> bytes:
    """Return the first bytes of a file, nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(32)
    except OSError:
        return b""


def begins_like_an_image(start: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a JPEG, PNG, GIF, WebP or AVIF."""
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_avif = start[4:8] == b"ftyp" and (b"avif" in start[8:] or b"avis" in start[8:])
    return start.startswith(SIGNATURES) or is_webp or is_avif


def normal_form(name: str) -> str:
    """Return a name in Unicode's composed form, in which names compare equal whichever program has written them."""
    return unicodedata.normalize("NFC", name)
