"""An image set, how an image file is decoded, and what tells two versions of a set apart."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import ExifTags, Image

from support.errors import InputError, counted, first_line

NO_TORCHCODEC = ""
"""Why torchcodec cannot be used; empty where it can."""

try:
    from torchcodec.decoders import decode_image
except Exception as error:  # it is missing, older than 0.16, or made for another torch
    decode_image, NO_TORCHCODEC = None, first_line(error)

COMPRESSED = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif")
"""Endings of formats in which another image has a file of another size."""

FLIPS = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}
"""By EXIF orientation: the dimensions along which a (3, H, W) image is flipped, once it stands upright."""

ON_THEIR_SIDE = (5, 6, 7, 8)
"""EXIF orientations whose images are stored with rows and columns exchanged."""

APP1, START_OF_SCAN = b"\xff\xe1", b"\xff\xda"
"""Markers in a JPEG of a segment that may hold EXIF or XMP, and of the first of its pixels."""

JPEG_FRAMES = {b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"}
"""Markers of the segment that holds the size of a baseline, extended or progressive JPEG."""

JPEG_SEGMENTS = JPEG_FRAMES | {bytes((0xFF, marker)) for marker in (0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE)}
"""Markers of the segments before the pixels but APP1: also tables, restart interval, other APPs and comment."""

VALIDATION = "Val"
"""Name of the held-out training classes among the test sets."""


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    names: N file paths, or names of rendered images. labels: (N,) int64 in [0, n_classes). class_names: one per class.
    pixels: decoded images, (N, H, W, 3) uint8 or (N,) views of any size; None where `names` are files to decode.
    factors: known characteristics shared across classes, name to (N,) int64 levels. is_query: (N,) bool of the images
    that are searched in the others, the gallery; None where each is searched in all others. layout: how the data set
    lies on disk, in words. left_out: what of it is not read, a line for each reason.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    pixels: np.ndarray | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    is_query: np.ndarray | None = None
    layout: str = ""
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> torch.Tensor:
        """Return image `index` as a (3, H, W) uint8 RGB tensor. Raises InputError when it cannot be decoded."""
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)
        return read_image(self.names[index])

    def classes(self, first: int, stop: int) -> "ImageSet":
        """Return the images of the classes from `first` up to `stop`; their labels count from 0."""
        chosen = np.flatnonzero((self.labels >= first) & (self.labels < stop))
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            labels=self.labels[chosen] - first,
            class_names=self.class_names[first:stop],
            pixels=None if self.pixels is None else self.pixels[chosen],
            factors={name: levels[chosen] for name, levels in self.factors.items()},
            is_query=None if self.is_query is None else self.is_query[chosen],
        )


Splits = tuple[ImageSet, dict[str, ImageSet]]
"""Training images, and the test sets by name: one that is called "test", or several that are scored separately."""


def hold_out_classes(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Return the images without the last classes, a fraction of all, and the images of those.

    Raises InputError where that leaves fewer than two classes on either side.
    """
    n_classes = len(images.class_names)
    n_held_out = round(fraction * n_classes)
    n_kept = n_classes - n_held_out
    if min(n_kept, n_held_out) < 2:
        held_out = f"holds out {n_held_out} of {n_classes} training classes"
        raise InputError(f"--val_classes {fraction}: {held_out}; at least 2 are needed to train and 2 to score on")
    return images.classes(0, n_kept), images.classes(n_kept, n_classes)


def read_image(path: str) -> torch.Tensor:
    """Decode an image file to a (3, H, W) uint8 RGB tensor.

    Turn it as its EXIF orientation says, put transparency on white, keep the upper 8 of 16 bits of grey and the first
    frame of an animation. torchcodec decodes JPEGs as Pillow does, in less time; Pillow decodes the rest.

    Raises:
        InputError: naming the file, where it cannot be decoded.
    """
    if decode_image is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # Pillow says better what is wrong with a file
            with open(path, "rb") as file:
                jpeg = split_jpeg(file.read())
            if jpeg is not None:
                content, info = jpeg
                return turned(decode_image(content, mode="RGB"), exif_orientation(info))
    with opened_image(path) as (image, orientation):
        return turned(decode(image), orientation)


def split_jpeg(content: bytes) -> tuple[bytes, dict[str, bytes]] | None:
    """Take EXIF out of a JPEG, because torchcodec would turn the image by its own reading of it, which is not Pillow's.

    Returns:
        The file without APP1 segments, and {"exif": data} as Pillow keeps it in Image.info, or {}. None for what is no
        JPEG, or no ordinary one, and where it has more pixels than Pillow reads: Pillow is to decode it, or refuse.
    """
    if not content.startswith(b"\xff\xd8"):
        return None
    kept, info, start = [content[:2]], {}, 2
    while (marker := content[start : start + 2]) != START_OF_SCAN:
        stop = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == APP1:
            if content.startswith(b"Exif\0\0", start + 4):
                if info:  # Pillow joins several
                    return None
                info["exif"] = content[start + 4 : stop]
        elif marker in JPEG_SEGMENTS:
            kept.append(content[start:stop])
        else:
            return None
        if marker in JPEG_FRAMES:
            height, width = (int.from_bytes(content[start + i : start + i + 2], "big") for i in (5, 7))
            if height * width > 2 * Image.MAX_IMAGE_PIXELS:
                return None
        start = stop
    is_whole = sum(map(len, kept)) == start
    return content if is_whole else b"".join([*kept, content[start:]]), info


def image_size(path: str) -> tuple[int, int]:
    """Return (height, width) of the tensor that read_image returns, from the file's header. Raises InputError."""
    with opened_image(path) as (image, orientation):
        return (image.width, image.height) if orientation in ON_THEIR_SIDE else (image.height, image.width)


@contextlib.contextmanager
def opened_image(path: str) -> Iterator[tuple[Image.Image, int]]:
    """Open an image file with Pillow; yield it, not decoded yet, and the orientation to turn it by.

    Raises:
        InputError: naming the file, for whatever goes wrong while it is opened or used.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":  # Pillow turns it while it decodes it, by an orientation in XMP as well
                image.info.pop("xmp", None)
            yield image, 1 if image.format == "TIFF" else exif_orientation(image.info)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        raise InputError(f"cannot decode the image {path}: it has more than {limit}; shrink it") from error
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        reason = first_line(error).replace(f": {path!r}", "").replace(f" {path!r}", "")  # named once
        raise InputError(f"cannot decode the image {path} ({reason}); repair it or put it back") from error


def exif_orientation(info: Mapping[str, object]) -> int:
    """Return the EXIF orientation, 1 to 8, as Pillow reads it; 1 where there is none that it can read.

    Args:
        info: of an opened image, before it is decoded. An orientation in XMP, or behind the pixels of a PNG, does not
            count, for which Pillow would look if it were asked for that of the image itself.
    """
    exif = {key: info[key] for key in ("exif", "Raw profile type exif") if key in info}
    if not exif:
        return 1
    header = Image.new("1", (1, 1))
    header.info = exif
    with contextlib.suppress(Exception):  # damaged EXIF makes Pillow raise almost anything, and is no damaged image
        orientation = header.getexif().get(ExifTags.Base.Orientation)
        if orientation in FLIPS:
            return int(orientation)
    return 1


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Return (3, H, W) pixels turned and mirrored as an EXIF orientation says."""
    if orientation in ON_THEIR_SIDE:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(FLIPS[orientation]) if FLIPS[orientation] else pixels


def decode(image: Image.Image) -> torch.Tensor:
    """Decode an opened image of any format with Pillow to (3, H, W) uint8 RGB, not turned."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip 16 bits of grey
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, whose black and white are not known: save it with 8 or 16")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def fingerprints(image_sets: Mapping[str, ImageSet]) -> dict[str, dict[str, int | str]]:
    """Return what tells two versions of image sets apart: {set: {"images": number, "classes": number, "digest": ...}}.

    A file counts with its name, without folder, its size, class and place, and whether it is a query; an uncompressed
    one, whose size says nothing, with its bytes; rendered images with their names. Sets are called "train" and as the
    test sets; "factors" has the digest of a factors.csv. Raises InputError for a file that has gone.
    """
    described, factors = {}, []
    for split, images in image_sets.items():
        is_rendered, files = images.pixels is not None, hashlib.sha256()
        is_query = [None] * len(images) if images.is_query is None else images.is_query.tolist()
        for name, label, query in zip(images.names, images.labels, is_query):
            size, content = (None, b"") if is_rendered else file_identity(name)
            files.update(repr((os.path.basename(name), size, images.class_names[label], query)).encode() + content)
        described[split] = {"images": len(images), "classes": len(images.class_names), "digest": files.hexdigest()[:12]}
        if not is_rendered:
            factors += [[name, levels.tolist()] for name, levels in images.factors.items()]
    return described | ({"factors": {"digest": digest(factors)}} if factors else {})


def file_identity(path: str) -> tuple[int, bytes]:
    """Return the size of an image file and, if it is uncompressed, its digest. Raises InputError where it has gone."""
    try:
        if path.lower().endswith(COMPRESSED):
            return os.stat(path).st_size, b""
        with open(path, "rb") as file:
            return os.stat(path).st_size, hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"cannot read the image {path} ({error.strerror}); repair it or put it back") from error


def describe_change(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> str | None:
    """Return None where two `fingerprints` are equal, else a clause that says in which set they differ, and how."""
    for split in dict.fromkeys([*before, *now]):
        old, new = ({"images": 0, "classes": 0} | of.get(split, {}) for of in (before, now))
        if old == new:
            continue
        if split == "factors":
            return "the known factors in factors.csv are others"
        where = {"train": "training images", "test": "test images"}.get(split, f"test images of {split}")
        if (old["images"], old["classes"]) == (new["images"], new["classes"]):
            return f"{where}: as many, but other files"
        was = f"{old['images']:,} in {counted(old['classes'], 'class')} then"
        return f"{where}: {was}, {new['images']:,} in {new['classes']:,} now"
    return None


def digest(value: object) -> str:
    """Return 12 hex digits that stand for all of the fingerprints, or for another value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
