"""Decoding, held-out classes, and what is said about images that changed."""

import io
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_flags, write_class_folders
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

import datasets
from data.cache import cached, image_views
from data.images import (
    ImageSet,
    decode,
    describe_change,
    digest,
    fingerprints,
    hold_out_classes,
    image_size,
    opened_image,
    read_image,
    split_jpeg,
    turned,
)
from support.errors import InputError


def read_with_pillow(path):
    """What read_image returns where there is no torchcodec."""
    with opened_image(path) as (image, orientation):
        return turned(decode(image), orientation)


def test_jpeg_pixels_are_those_of_pillow(tmp_path):
    path = str(write_class_folders(tmp_path) / "images" / "class_00" / "0.jpg")
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert (read_image(path).permute(1, 2, 0).numpy() == expected).all()
    assert image_size(path) == (40, 48)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("L", "CMYK") else "a.png")
    image.save(path)
    decoded = read_image(str(path))
    assert decoded.dtype == torch.uint8
    with Image.open(path) as stored:
        assert (decoded.permute(1, 2, 0).numpy() == np.asarray(stored.convert("RGB"))).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_keep_their_range(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp).save(path)
    assert (read_image(str(path)).numpy() == ramp >> 8).all()


@pytest.mark.parametrize("values", [np.float32([[0, 255]]), np.int32([[0, 1]])])
def test_images_whose_white_is_not_known_are_refused(tmp_path, values):
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(InputError) as error:
        read_image(str(path))
    assert f"cannot decode the image {path} (32 bits per channel have no fixed black" in str(error.value)


def test_other_formats_under_the_name_of_jpeg(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((10, 20), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("animation.gif", "deep.png"):
        path = (tmp_path / name).rename(tmp_path / f"{name}.jpg")
        decoded = read_image(str(path))
        assert decoded.dtype == torch.uint8
        assert decoded.shape == (3, 10, 20)


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated", None])
def test_broken_images_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        content = (write_class_folders(tmp_path) / "images" / "class_00" / "0.jpg").read_bytes()[:700]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot decode .*broken\.jpg \(.+\); repair it or put it back") as error:
        read_image(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["array", "views"])
def test_classes_are_held_out_whole_and_relabelled(kind):
    labels = np.array([0, 1, 2, 3, 4, 4, 3, 2, 0])
    values = np.arange(9, dtype=np.uint8)
    pixels = values.repeat(3).reshape(9, 1, 1, 3)
    if kind == "views":
        pixels = image_views(values.repeat(3), np.ones((9, 2), int))
    images = ImageSet(list("abcdefghi"), labels, list("vwxyz"), pixels, {"light": labels * 2})
    kept, held = hold_out_classes(images, 0.4)
    assert (kept.names, kept.labels.tolist(), kept.class_names) == (list("abchi"), [0, 1, 2, 2, 0], list("vwx"))
    assert (held.names, held.labels.tolist(), held.class_names) == (list("defg"), [0, 1, 1, 0], list("yz"))
    assert [held.read(i).flatten().tolist() for i in range(4)] == [[i] * 3 for i in (3, 4, 5, 6)]
    assert held.factors["light"].tolist() == [6, 8, 8, 6]
    for fraction in (0.05, 0.2, 0.8, 0.99):
        with pytest.raises(InputError, match="--val_classes"):
            hold_out_classes(images, fraction)


def fingerprints_of(source):
    train, tests = datasets.load_dataset("tiny", source)
    return fingerprints({"train": train, **tests})


def test_the_same_images_elsewhere_are_no_change(class_folders, tmp_path):
    before = fingerprints_of(class_folders)
    assert {split: (known["images"], known["classes"]) for split, known in before.items()} == {
        "train": (10, 2), "test": (10, 2)
    }  # fmt: skip
    shutil.copytree(class_folders, tmp_path / "copy")
    now = fingerprints_of(tmp_path / "copy")
    assert describe_change(before, now) is None
    assert digest(before) == digest(now)
    assert len(digest(now)) == 12


def swap_classes(root):
    for old, new in (("class_00", "aside"), ("class_01", "class_00"), ("aside", "class_01")):
        (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("change", "described"),
    [
        (swap_classes, "training images: different files or class names"),
        (lambda root: (root / "class_03/1.jpg").unlink(), "test images: 10 in 2 classes then, 9 in 2 now"),
        (lambda root: (root / "class_01/1.jpg").write_bytes(b""), "training images: different files or class names"),
        (lambda root: (root / "class_01").rename(root / "a"), "training images: different files or class names"),
        (
            lambda root: shutil.copytree(root / "class_03", root / "class_04"),
            "test images: 10 in 2 classes then, 15 in 3 now",
        ),
    ],
)
def test_changed_images_are_described(class_folders, change, described):
    before = fingerprints_of(class_folders)
    change(class_folders / "tiny" / "images")
    now = fingerprints_of(class_folders)
    assert describe_change(before, now) == described
    assert digest(before) != digest(now)


def test_another_order_and_other_queries_are_changes(class_folders, shapes):
    train, _ = datasets.load_dataset("tiny", class_folders)
    before = fingerprints({"Set 1": train})
    swapped = replace(train, labels=1 - train.labels, class_names=train.class_names[::-1])
    assert describe_change(before, fingerprints({"Set 1": swapped})) is None  # the same classes under other numbers
    moved = replace(train, names=train.names[5:] + train.names[:5], labels=1 - train.labels)
    change = describe_change(before, fingerprints({"Set 1": moved}))
    assert change == "test images of Set 1: different files or class names"
    queries = replace(train, is_query=np.arange(10) == 7)
    other = replace(train, is_query=np.arange(10) == 8)
    assert "different files" in describe_change(fingerprints({"test": queries}), fingerprints({"test": other}))
    rendered = fingerprints({"train": shapes[0]})
    assert describe_change(rendered, fingerprints({"train": replace(shapes[0], pixels=shapes[0].pixels + 1)})) is None


def test_other_known_factors_are_a_change(class_folders):
    path = class_folders / "tiny" / "factors.csv"
    rows = [f"class_{label:02d}/{i}.jpg,{'abc'[i % 3]}" for label in range(4) for i in range(5)]

    def fingerprints_with(*lines):
        path.write_text("\n".join(["image,light", *lines]))
        return fingerprints_of(class_folders)

    before = fingerprints_with(*rows)
    assert describe_change(before, fingerprints_with(*rows[::-1])) is None
    others = fingerprints_with(*rows[:-1], "class_03/4.jpg,a")
    assert describe_change(before, others) == "the known characteristics have changed"
    assert digest(before) != digest(others)
    path.unlink()
    for pair in ((before, fingerprints_of(class_folders)), (fingerprints_of(class_folders), before)):
        assert describe_change(*pair) == "the known characteristics have changed"


def test_a_file_that_has_gone_is_named(class_folders):
    train, _ = datasets.load_dataset("tiny", class_folders)
    (class_folders / "tiny" / "images" / "class_01" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"cannot read the image .*class_01/1\.jpg \(No such file"):
        fingerprints({"train": train})


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 10))  # 9 is none
def test_images_are_turned_by_exif_with_every_decoder_and_in_the_size_too(tmp_path, suffix, orientation):
    """Red above, blue on the right; seen in the corner that the tag says the first row and column are in."""
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :, 0] = pixels[:, 12:, 2] = 255
    exif, path = Image.Exif(), str(tmp_path / f"turned.{suffix}")
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    turns = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.transpose(1, 0, 2)]
    turns += [lambda x: np.rot90(x, -1), lambda x: np.rot90(x.transpose(1, 0, 2), 2), np.rot90, lambda x: x]
    expected = turns[orientation - 1](pixels).astype(int)
    decoded = read_image(path)
    assert np.abs(decoded.permute(1, 2, 0).numpy() - expected).mean() < 10
    assert image_size(path) == expected.shape[:2]
    assert torch.equal(read_with_pillow(path), decoded)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
def test_an_orientation_in_xmp_turns_no_image(tmp_path, suffix):
    xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    exif, png, path = Image.Exif(), PngImagePlugin.PngInfo(), str(tmp_path / f"xmp.{suffix}")
    exif[ExifTags.Base.Make] = "a camera"
    png.add_itxt("XML:com.adobe.xmp", xmp)
    more = {"png": {"pnginfo": png}, "tif": {"tiffinfo": {700: xmp.encode()}}}.get(suffix, {"xmp": xmp.encode()})
    Image.new("RGB", (30, 20)).save(path, **({} if suffix == "tif" else {"exif": exif}), **more)
    with Image.open(path) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == 6  # so Pillow reads it
    assert read_image(path).shape == read_with_pillow(path).shape == (3, *image_size(path)) == (3, 20, 30)


def random_exif(rng):
    """A block of EXIF of which each part has one chance in ten not to be as usual."""

    def mostly(usual, *others):
        return usual if rng.random() < 0.9 else others[rng.integers(len(others))]

    order = "<>"[rng.integers(2)]
    kind, count = mostly(3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 99), mostly(1, 0, 2, 3, 2**32 - 1)
    value = mostly(int(rng.integers(1, 9)), 0, 9, 65535)
    entries = [struct.pack(f"{order}HHIHH", 0x0112, kind, count, *mostly((value, 0), (0, value), (value, value)))]
    if rng.random() < 0.5:  # resolutions make Pillow look for an orientation while it opens the file
        entries += [struct.pack(f"{order}HHII", tag, 5, 1, 26) for tag in (0x011A, 0x011B)]
    rng.shuffle(entries)
    tiff = struct.pack(f"{order}2sHIH", mostly({"<": b"II", ">": b"MM"}[order], b"XX"), 42, mostly(8, 9, 500), 1)
    tiff = tiff[:8] + struct.pack(f"{order}H", mostly(len(entries), 0, 9)) + b"".join(entries) + bytes(20)
    letters = mostly(b"Exif\0\0", b"EXIF\0\0", b"Exif\0\1", b"exif\0\0", b"Exif\0", b"Exif\0\0Exif\0\0")
    return (letters + tiff)[: mostly(None, *range(0, 40, 3))]


def random_header(rng):
    """Segments between the start of a JPEG and its tables: mostly EXIF, in any order with XMP, another EXIF, JFIF."""
    orientation = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/>'
    xmp = (b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + orientation)
    jfif = (b"\xe0", b"JFIF\0\1\1\1\0\x48\0\x48\0\0")
    quoted = (b"\xed", b"Photoshop 3.0\0\xff\xe1\0\x0aExif\0\0II")
    optional = [segment for segment in (xmp, jfif, quoted, (b"\xe1", random_exif(rng))) if rng.random() < 0.4]
    segments = [(b"\xe1", random_exif(rng)), *optional]
    rng.shuffle(segments)
    return [b"\xff" + marker + struct.pack(">H", len(data) + 2) + data for marker, data in segments]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about broken EXIF
def test_every_way_of_reading_turns_a_jpeg_as_pillow_reads_its_exif(tmp_path, capsys):
    """400 generated headers: the order of segments, byte order, type, count, value, truncation, letters."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=100)
    body, paths, expected = buffer.getvalue()[20:], [], []  # without its own JFIF segment
    for i in range(400):
        header = random_header(rng)
        exif_only = io.BytesIO(b"".join([b"\xff\xd8", *(s for s in header if b"ns.adobe" not in s), body]))
        with Image.open(exif_only) as image:
            try:
                pixels = ImageOps.exif_transpose(image)
            except Exception:  # what Pillow cannot read turns nothing
                pixels = image
            expected.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        paths.append(str(tmp_path / f"{i}.jpg"))
        Path(paths[-1]).write_bytes(b"".join([b"\xff\xd8", *header, body]))
    as_stored = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert 100 < sum(torch.equal(image, as_stored) for image in expected) < 300
    assert len({image.numpy().tobytes() for image in expected}) == 8
    kept = cached({"train": ImageSet(paths, np.zeros(400, dtype=int), ["a"])})["train"]
    for i, path in enumerate(paths):
        assert image_size(path) == expected[i].shape[1:], path
        for pixels in (read_image(path), read_with_pillow(path), kept.read(i)):
            assert torch.equal(pixels, expected[i]), path


def test_torchcodec_gets_all_of_an_ordinary_jpeg_but_its_exif_and_xmp():
    exif, files = Image.Exif(), []
    exif[ExifTags.Base.Orientation] = 6
    for more in ({}, {"exif": exif, "xmp": b"<x/>"}):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20)).save(buffer, "JPEG", **more)
        files.append(buffer.getvalue())
    assert len(files[1]) > len(files[0])
    assert split_jpeg(files[0]) == (files[0], {})
    assert split_jpeg(files[1]) == (files[0], {"exif": exif.tobytes()})


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_of_too_many_pixels_is_to_be_shrunk_with_every_way_of_reading(tmp_path, suffix, capsys):
    path = tmp_path / f"giant.{suffix}"
    Image.new("RGB", (24, 16)).save(path)
    content = bytearray(path.read_bytes())
    if suffix == "jpg":
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", 10_000, 17_896)
    else:
        content[16:24] = struct.pack(">II", 17_896, 10_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    images = ImageSet([str(path)], np.zeros(1, dtype=int), ["a"])
    for read in (read_image, read_with_pillow, image_size, lambda path: cached({"train": images})):
        with pytest.raises(InputError, match=r"giant\..*: it has more than 178,956,970 pixels; shrink it$"):
            read(str(path))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "palette.png", "a.gif"])
def test_transparency_is_put_on_white(tmp_path, name):
    image = Image.new("RGBA", (20, 10), (200, 0, 0, 255))
    image.paste((0, 0, 255, 0), (10, 0, 20, 10))  # blue that is not to be seen
    image = image.quantize() if name.startswith("palette") else image
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    decoded = read_image(str(tmp_path / name))
    assert (decoded[:, :, 10:] == 255).all()
    assert (decoded[:, :, :10] == torch.tensor([200, 0, 0])[:, None, None]).all()
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "shade.png")
    assert read_image(str(tmp_path / "shade.png")).flatten().tolist() == [204] * 3


@pytest.mark.parametrize("name", ["animation.gif", "animation.webp", "animation.png"])
def test_of_an_animation_the_first_frame_counts(tmp_path, name):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    decoded = read_image(str(tmp_path / name))
    assert decoded.shape == (3, 10, 20)
    assert (decoded[0] > 250).all()
    assert (decoded[2] < 5).all()


@pytest.mark.parametrize("suffix", ["bmp", "tif", "ppm"])
def test_an_uncompressed_file_of_the_same_size_is_a_change(class_folders, suffix):
    for path in (class_folders / "tiny" / "images").glob("*/*"):
        with Image.open(path) as image:
            image.save(path.with_suffix(f".{suffix}"))
        path.unlink()
    before, path = fingerprints_of(class_folders), class_folders / "tiny" / "images" / "class_01" / f"1.{suffix}"
    size = path.stat().st_size
    Image.new("RGB", (48, 40), "red").save(path)
    assert path.stat().st_size == size
    assert describe_change(before, fingerprints_of(class_folders)) == "training images: different files or class names"


def test_a_run_without_torchcodec_says_so(class_folders, tmp_path):
    flags = small_flags(class_folders, tmp_path, "--arch", "googlenet", "--n_epochs", 1, "--task_p", 1, 0)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torchcodec'] = None; import main; "
    done = subprocess.run([sys.executable, "-c", f"{code}main.main({flags})"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("torchcodec cannot be used (") == 1


def test_an_orientation_that_stands_behind_the_pixels_of_a_png_turns_neither_image_nor_size(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "late.png"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    end = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert read_image(str(path)).shape == (3, *image_size(str(path))) == (3, 20, 30)
