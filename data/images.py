"""An image set, how an image file is decoded, and what tells two versions of a set apart."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from support.errors import InputError, counted, first_line

NO_TORCHCODEC = ""
"""Why torchcodec cannot be used; empty where it can."""

try:
    from torchcodec.decoders import decode_image
except Exception as error:  # it is missing, older than 0.16, or made for another torch
    decode_image, NO_TORCHCODEC = None, first_line(error)

COMPRESSED = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif")
"""Endings of formats in which another image has a file of another size."""

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
    """Decode an image file to a (3, H, W) uint8 RGB tensor. Raises InputError that names the file.

    The image is turned as its EXIF orientation says, transparency is put on white, of 16 bits of grey the upper 8 are
    kept, of an animation the first frame. torchcodec decodes JPEGs as Pillow does, in less time; Pillow decodes the
    rest, and JPEGs that torchcodec refuses.
    """
    if decode_image is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # Pillow says better what is wrong with a file
            with open(path, "rb") as file:
                content = file.read()
            if content.startswith(b"\xff\xd8\xff"):  # a JPEG, whatever its name
                return decode_image(content, mode="RGB")
    return read_with_pillow(path)


def read_with_pillow(path: str) -> torch.Tensor:
    """Decode an image file of any format, see read_image."""
    with opened_image(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip 16 bits of grey
        elif image.mode in ("I", "F"):
            raise ValueError("32 bits per channel, whose black and white are not known: save it with 8 or 16")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def image_size(path: str) -> tuple[int, int]:
    """Return (height, width) from an image file's header, as read_image turns it. Raises InputError that names it."""
    with opened_image(path) as image:
        is_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        if is_on_its_side and image.format != "TIFF":  # whose size Pillow turns by itself
            return image.width, image.height
        return image.height, image.width


@contextlib.contextmanager
def opened_image(path: str) -> Iterator[Image.Image]:
    """Open an image file with Pillow. Raises InputError that names the file for whatever goes wrong with it."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and "Raw profile type exif" not in image.info:
                image.info.setdefault("exif", b"")  # else Pillow decodes it to look for one behind the pixels
            for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow takes an orientation from there too, torchcodec does not
                image.info.pop(name, None)
            image.getexif()  # is kept: what stands behind the pixels does not count
            yield image
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        reason = first_line(error).replace(f": {path!r}", "").replace(f" {path!r}", "")  # named once
        raise InputError(f"cannot decode the image {path} ({reason}); repair it or put it back") from error


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
