"""Image sets: decoding image files, and detecting that a set has changed."""

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
"""Why torchcodec cannot be used; empty if it can."""

try:
    from torchcodec.decoders import decode_image
except Exception as error:  # it is missing, older than 0.16, or built for another torch
    decode_image, NO_TORCHCODEC = None, first_line(error)

COMPRESSED = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif")
"""Endings of compressed formats, in which different images hardly ever have files of equal size."""

FLIPS = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}
"""{EXIF orientation: dimensions along which to flip (3, H, W), after images ON_THEIR_SIDE are transposed}."""

ON_THEIR_SIDE = (5, 6, 7, 8)
"""EXIF orientations of images that are stored with rows and columns exchanged."""

APP1, START_OF_SCAN = b"\xff\xe1", b"\xff\xda"
"""JPEG markers: of a segment that may hold EXIF or XMP, and of the start of the pixels."""

JPEG_FRAMES = {b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"}
"""JPEG markers of the segment that holds the image size, for baseline, extended and progressive files."""

JPEG_SEGMENTS = JPEG_FRAMES | {bytes((0xFF, marker)) for marker in (0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE)}
"""JPEG markers of the segments, other than APP1, that ordinary files have before the pixels: tables, comments, ..."""

VALIDATION = "Val"
"""Name of the held-out training classes among the test sets."""


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    Attributes:
        names: N file paths, or names of rendered images.
        labels: (N,) int64 in [0, n_classes).
        class_names: a name for each class.
        pixels: decoded images, (N, H, W, 3) uint8, or (N,) objects (H, W, 3) of any size; None if `names` are files to
            decode.
        factors: known characteristics that classes share, {name: (N,) int64 levels}.
        is_query: (N,) bool, True for queries, False for the gallery in which their neighbours are searched; None if
            each image is a query and all others are its gallery.
        layout: description of how the data set lies on disk.
        left_out: a line for each reason why files of the data set are not read.
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
        """Return an image as a (3, H, W) uint8 RGB tensor.

        Raises:
            InputError: it cannot be decoded.
        """
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)
        return read_image(self.names[index])

    def classes(self, first: int, stop: int) -> "ImageSet":
        """Return the images of classes `first` to `stop` - 1, with labels from 0."""
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
"""Training images, and test sets by name: a single one called "test", or several that are scored separately."""


def hold_out_classes(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Split off the last classes.

    Args:
        images: the training images.
        fraction: fraction of the classes to hold out.

    Returns:
        The images of the other classes, and those of the held-out classes.

    Raises:
        InputError: fewer than two classes would be left, or held out.
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

    Turn it by its EXIF orientation, put transparency on white, and keep the upper 8 of 16 bits of grey and the first
    frame of an animation. torchcodec decodes JPEGs to the same pixels as Pillow, but faster; Pillow decodes the rest.

    Raises:
        InputError: it cannot be decoded; the message names the file.
    """
    if decode_image is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # Pillow explains better what is wrong
            with open(path, "rb") as file:
                jpeg = split_jpeg(file.read())
            if jpeg is not None:
                content, info = jpeg
                return turned(decode_image(content, mode="RGB"), exif_orientation(info))
    with opened_image(path) as (image, orientation):
        return turned(decode(image), orientation)


def split_jpeg(content: bytes) -> tuple[bytes, dict[str, bytes]] | None:
    """Remove EXIF from the content of a JPEG file, because torchcodec and Pillow disagree on when to turn by it.

    Returns:
        The content without APP1 segments, and {"exif": data} as in Pillow's Image.info, or {} without EXIF. None if
        Pillow has to decode the file or to refuse it: it is not an ordinary JPEG, or has too many pixels.
    """
    if not content.startswith(b"\xff\xd8"):
        return None
    kept, info, start = [content[:2]], {}, 2
    while (marker := content[start : start + 2]) != START_OF_SCAN:
        stop = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == APP1:
            if content.startswith(b"Exif\0\0", start + 4):
                if info:  # Pillow joins several EXIF segments
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
    """Return (height, width) of the tensor that read_image would return, from the header of the file.

    Raises:
        InputError: the header cannot be read.
    """
    with opened_image(path) as (image, orientation):
        return (image.width, image.height) if orientation in ON_THEIR_SIDE else (image.height, image.width)


@contextlib.contextmanager
def opened_image(path: str) -> Iterator[tuple[Image.Image, int]]:
    """Open an image file with Pillow; yield the image, not decoded yet, and its EXIF orientation.

    Raises:
        InputError: anything goes wrong while the image is opened or used; the message names the file.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":  # Pillow turns it while decoding, even by an orientation in XMP alone
                image.info.pop("xmp", None)
            yield image, 1 if image.format == "TIFF" else exif_orientation(image.info)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        raise InputError(f"cannot decode the image {path}: it has more than {limit}; shrink it") from error
    except Exception as error:  # Pillow raises almost anything on damaged files
        reason = first_line(error).replace(f": {path!r}", "").replace(f" {path!r}", "")  # the message names it already
        raise InputError(f"cannot decode the image {path} ({reason}); repair it or put it back") from error


def exif_orientation(info: Mapping[str, object]) -> int:
    """Return the EXIF orientation, 1 to 8, as Pillow reads it; 1 if there is none.

    Only EXIF before the pixels counts. Once an image is decoded, Pillow also uses XMP, and EXIF after a PNG's pixels.

    Args:
        info: Image.info of an opened image that is not decoded yet.
    """
    exif = {key: info[key] for key in ("exif", "Raw profile type exif") if key in info}
    if not exif:
        return 1
    header = Image.new("1", (1, 1))
    header.info = exif
    # Pillow raises almost anything on damaged EXIF, but the image may be sound
    with contextlib.suppress(Exception):
        orientation = header.getexif().get(ExifTags.Base.Orientation)
        if orientation in FLIPS:
            return int(orientation)
    return 1


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn and mirror (3, H, W) pixels by an EXIF orientation."""
    if orientation in ON_THEIR_SIDE:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(FLIPS[orientation]) if FLIPS[orientation] else pixels


def decode(image: Image.Image) -> torch.Tensor:
    """Decode an image that Pillow has opened to (3, H, W) uint8 RGB, without turning it."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip 16 bits of grey
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits per channel have no fixed black and white: save it with 8 or 16")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def fingerprints(image_sets: Mapping[str, ImageSet]) -> dict[str, dict[str, int | str]]:
    """Describe image sets so that a change is detected later.

    The digest covers, for each file in order, its name without folder, size, class, and whether it is a query; for
    uncompressed files, whose size says nothing, also the content. A compressed file that is replaced by one of equal
    size goes unnoticed. For rendered images the digest covers their names.

    Args:
        image_sets: {split: images}.

    Returns:
        {split: {"images": number, "classes": number, "digest": text}}; with known characteristics, "factors" has their
        digest.

    Raises:
        InputError: a file has disappeared.
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
    """Return the size of an image file and, if it is uncompressed, its digest.

    Raises:
        InputError: the file has disappeared.
    """
    try:
        if path.lower().endswith(COMPRESSED):
            return os.stat(path).st_size, b""
        with open(path, "rb") as file:
            return os.stat(path).st_size, hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"cannot read the image {path} ({error.strerror}); repair it or put it back") from error


def describe_change(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> str | None:
    """Describe the first difference between two results of `fingerprints`; None if they are equal."""
    for split in dict.fromkeys([*before, *now]):
        old, new = ({"images": 0, "classes": 0} | sets.get(split, {}) for sets in (before, now))
        if old == new:
            continue
        if split == "factors":
            return "the known characteristics have changed"
        where = {"train": "training images", "test": "test images"}.get(split, f"test images of {split}")
        if (old["images"], old["classes"]) == (new["images"], new["classes"]):
            return f"{where}: different files or class names"
        was = f"{old['images']:,} in {counted(old['classes'], 'class')} then"
        return f"{where}: {was}, {new['images']:,} in {new['classes']:,} now"
    return None


def digest(value: object) -> str:
    """Return the hash, 12 hex digits, of all fingerprints, or of another value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
