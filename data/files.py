"""What a folder holds: which files are images, which are not, and which cannot be read."""

import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.errors import first_few

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".avif")
"""Endings of images. A file with another ending, or with none, is an image if its first bytes say so."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
"""First bytes of JPEG, PNG and GIF. BMP, PNM and TIFF are missing: text and camera raw files can begin like them."""

COPY = re.compile(r"((\.~\d+)?~|_original|\.(bak|old|orig|backup))+$")
"""Ends of the names, in lower case, that editors give to backup copies."""

MADE_BY_SYSTEMS = ("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "Icon\r")
"""Files and folders that operating systems and file servers create; they count as hidden."""

POINTER, POINTER_SIZE = b"version https://git-lfs", 1024
"""First bytes and largest size of the pointer that Git LFS leaves in place of a file it has not fetched."""

FILE_KINDS = ("image", "backup copy", "other file", "hidden file", "dead link", "Git LFS pointer")
FOLDER_KINDS = ("folder", "repeated folder", "unreadable folder")

Survey = dict[str, list[str]]
"""Sorted paths below a folder, with slashes, for each of FILE_KINDS and FOLDER_KINDS.

A backup copy is an image whose name, such as x.jpg~, has no image ending, beside its original x.jpg. A repeated folder
leads to one that was read already. Hidden files include all files in hidden folders. Pipes and devices are not listed.
"""


def survey(root: Path, first: Sequence[str] = ()) -> Survey:
    """List what a folder holds.

    Args:
        root: the folder.
        first: folders in root to read before the others, following all links in them. If any are given, links
            to folders elsewhere in root are not followed.
    """
    found: Survey = {kind: [] for kind in (*FILE_KINDS, *FOLDER_KINDS)}
    to_open, read_before = [], set()
    for start in (*first, ""):
        seen, waiting = set() if start else read_before, [start]
        for folder in waiting:  # grows while it is read, so folders near the top come first
            path = os.path.join(root, folder)
            real = os.path.realpath(path)
            if real in seen:
                found["repeated folder"].append(folder)
                continue
            seen.add(real)
            if folder and not is_hidden(folder):
                found["folder"].append(folder)
            try:
                entries = list(os.scandir(path))
                os.stat(os.path.join(path, "."))  # fails for a folder that can be listed but not entered
            except OSError:
                found["unreadable folder"].append(folder)
                continue
            for entry in sorted(entries, key=lambda entry: (is_hidden(entry.name), entry.is_symlink(), entry.name)):
                name, is_link = f"{folder}/{entry.name}".lstrip("/"), entry.is_symlink()
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    if name not in first and (start or not first or not is_link):
                        waiting.append(name)
                elif not (os.path.isfile(entry.path) if is_link else entry.is_file()):
                    if is_link and not is_hidden(name):  # pipes and devices are not listed
                        found["dead link"].append(name)
                elif is_hidden(name):
                    found["hidden file"].append(name)
                elif has_image_ending(name) and entry.stat().st_size > POINTER_SIZE:
                    found["image"].append(name)
                else:
                    to_open.append(name)
        read_before |= seen
    with ThreadPoolExecutor() as pool:
        for name, start in zip(to_open, pool.map(first_bytes, [os.path.join(root, name) for name in to_open])):
            found[kind_of_file(name, start)].append(name)
    images = {name.lower() for name in found["image"]}
    originals = images | {os.path.splitext(name)[0] for name in images}
    candidates = found["backup copy"]
    found["backup copy"] = [name for name in candidates if COPY.sub("", name.lower()) in originals]
    found["image"] += sorted({*candidates} - {*found["backup copy"]})
    return {kind: sorted(names) for kind, names in found.items()}


def kind_of_file(name: str, start: bytes) -> str:
    """Return the kind of a file that is not hidden, given its first bytes."""
    if start.startswith(POINTER):
        return "Git LFS pointer"
    if not has_image_ending(name) and not begins_like_an_image(start):
        return "other file"
    return "backup copy" if COPY.search(name.lower()) else "image"


def has_image_ending(name: str) -> bool:
    """Tell whether a file's name ends like that of an image."""
    return name.lower().endswith(IMAGES)


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in a folder, without hidden ones; none if unreadable."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError:
        return [], []
    folders = [name for name in names if os.path.isdir(folder / name)]
    return folders, [name for name in names if name not in set(folders)]


def describe(folder: Path) -> str:
    """Describe what a folder holds in a few words."""
    return first_few(sum(listing(folder), []), 5) or "nothing that can be listed"


def is_hidden(path: str) -> bool:
    """Tell whether a path leads to or through a hidden file or folder, or one of MADE_BY_SYSTEMS."""
    return any(name.startswith(".") or name in MADE_BY_SYSTEMS for name in path.split("/"))


def first_bytes(path: str) -> bytes:
    """Return the first bytes of a file; nothing if it cannot be read."""
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
    """Return a name in Unicode's composed form (NFC), so that equal names compare equal whatever wrote them."""
    return unicodedata.normalize("NFC", name)
