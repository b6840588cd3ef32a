"""Contact sheets, drawn with Pillow, which takes a twentieth of Matplotlib's time for as many images."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import ImageSet
from report import fonts
from report.plots import run_title, shortened, warned
from run.history import History, mining_sheet, neighbour_sheet
from support.errors import counted
from support.files import replaced_file

TILE, EDGE, LINE = 128, 16, 26
"""Side of an image, margin of a sheet, and height of a line of text above the images, in pixels."""

BORDER = (1 - 224 / 256) / 2
"""Fraction of an image that evaluation crops from each side."""

FRAMES = {"query": ("#333333", ""), "same": ("#009e73", "✓"), "other": ("#d55e00", "✗"), "plain": ("#999999", "")}
"""Colour of the frame and the mark of each kind of tile; the frame of "other" is dashed."""


class Tile(NamedTuple):
    """A tile of a contact sheet.

    Attributes:
        image: (H, W, 3) uint8; drawn as evaluation crops it.
        caption: text below the image.
        kind: a key of FRAMES.
    """

    image: np.ndarray
    caption: str
    kind: str


def draw_neighbours(
    history: History, tests: Mapping[str, ImageSet], embeddings: Mapping[str, Mapping[str, np.ndarray]]
) -> list[Path]:
    """Draw the nearest neighbours in each test set whose best epoch is the one scored last.

    Args:
        embeddings: {test set: {task: (N, D)}}; Shared is drawn only if labels were mined.

    Returns:
        The files that were drawn.
    """
    epoch, paths = history.rows["val"][-1]["Epochs"], []
    for name in history.improved_sets():
        for task in ("Class", "Shared") if history.rows["mining"] else ("Class",):
            path = neighbour_sheet(history.folder, name, task)
            title = f"{run_title(history, name)}, epoch {epoch}: nearest by the {task} embedding"
            with warned(path):
                draw_recoveries(path, tests[name], embeddings[name][task], title)
                paths.append(path)
    return paths


def draw_mining(history: History, images: ImageSet, mined: np.ndarray, squared_distances: np.ndarray) -> list[Path]:
    """Draw the last mining to mined_clusters.png, and to a file that later minings do not replace.

    Args:
        images: the training images.
        mined: labels (N,).
        squared_distances: (N,) to the centre of the cluster; NaN for images that are left out.

    Returns:
        mined_clusters.png, or nothing if it could not be drawn.
    """
    epoch, latest = history.mined_epochs[-1], history.folder / "mined_clusters.png"
    path = mining_sheet(history.folder, epoch)
    with warned(latest):
        path.parent.mkdir(exist_ok=True)
        clusters = clusters_to_show(mined, squared_distances, images.labels, images.factors)
        n_clusters = len(set(mined[~np.isnan(squared_distances)]))
        which = "all" if len(clusters) == n_clusters else f"{len(clusters)} (largest, middle, smallest) of"
        name = shortened(history.folder.name, 50)
        title = f"{name}: {which} {counted(n_clusters, 'cluster')} mined before epoch {epoch}"
        note = "images nearest to the centre, each of another class: a row should have something in common"
        rows = []
        for _, indices in clusters:
            rows.append([read_tile(images, index, "plain") for index in indices])
        sheet = draw_sheet([title, note], [caption for caption, _ in clusters], rows)
        save(sheet, path)
        save(sheet, latest)
        return [latest]
    return []


def draw_recoveries(
    path: Path, images: ImageSet, embeddings: np.ndarray, title: str, n_queries: int = 10, n_neighbours: int = 5
) -> None:
    """Draw test images, each with its nearest neighbours by embeddings (N, D), as a PNG to check a run by eye.

    Queries are searched in the gallery or, without one, among all other images. They are the same for every embedding,
    spread evenly over the images that have a positive (over all images if none has). A neighbour of the query's class
    has a solid green frame and a tick, one of another class a dashed orange frame and a cross.
    """
    queries = gallery = np.arange(len(images.labels))
    if images.is_query is not None:
        queries, gallery = np.flatnonzero(images.is_query), np.flatnonzero(~images.is_query)
    can_be_found = np.bincount(images.labels[gallery], minlength=len(images.class_names)) > (images.is_query is None)
    findable = queries[can_be_found[images.labels[queries]]]
    queries = findable if len(findable) else queries
    queries = queries[np.linspace(0, len(queries) - 1, min(n_queries, len(queries))).round().astype(int)]
    # squared distances, minus the query's squared norm
    distances = (embeddings[gallery] ** 2).sum(1) - 2 * embeddings[queries] @ embeddings[gallery].T
    distances[queries[:, None] == gallery] = np.inf
    neighbours = gallery[np.argsort(distances, axis=1, kind="stable")[:, :n_neighbours]]
    rows = []
    for query, nearest in zip(queries, neighbours, strict=True):
        kinds = ["same" if images.labels[index] == images.labels[query] else "other" for index in nearest]
        tiles = [read_tile(images, index, kind) for index, kind in zip(nearest, kinds) if index != query]
        rows.append([read_tile(images, query, "query"), *tiles])
    legend = "left: query;  ✓ solid: of its class;  ✗ dashed: of another class"
    save(draw_sheet([title, legend], [""] * len(rows), rows), path)


def clusters_to_show(
    clusters: np.ndarray,
    squared_distances: np.ndarray,
    labels: np.ndarray,
    factors: Mapping[str, np.ndarray],
    n_images: int = 8,
) -> list[tuple[str, np.ndarray]]:
    """Choose clusters and images to show, largest cluster first.

    Show all clusters or, if there are more than 10, the largest, middle and smallest ones; of each cluster the images
    nearest to its centre, no two of the same class. The caption gives the cluster's size and number of classes, and the
    known factor that stands out most. For each factor, take the share of the cluster's most frequent level minus
    chance_limit; the factor with the largest positive difference is named. The share alone would favour factors with
    few levels and, in small clusters, mere chance.

    Args:
        clusters: (N,) int.
        squared_distances: (N,) of the images to the centre of their cluster; images with NaN are left out.
        labels: (N,) int, the classes.
        factors: factor name to (N,) int levels.
        n_images: largest number of images of a cluster.

    Returns:
        (caption, indices (at most n_images,)) for at most 10 clusters.
    """
    is_clustered = ~np.isnan(squared_distances)
    sizes = np.bincount(clusters[is_clustered])
    ordered = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    if len(ordered) > 10:
        middle = len(ordered) // 2
        ordered = np.concatenate([ordered[:3], ordered[middle - 2 : middle + 2], ordered[-3:]])
    shown = []
    for cluster in ordered:
        members = np.flatnonzero(is_clustered & (clusters == cluster))
        members = members[np.argsort(squared_distances[members], kind="stable")]
        first_of_class = np.sort(np.unique(labels[members], return_index=True)[1])
        caption = f"cluster {cluster}\n{counted(len(members), 'image')}\n{counted(len(first_of_class), 'class')}"
        excess = {
            name: largest_share(levels[members]) - chance_limit(levels[is_clustered], len(members))
            for name, levels in factors.items()
        }
        name = max(excess, key=excess.get, default="")
        if excess.get(name, 0) > 0:
            caption += f"\n{100 * largest_share(factors[name][members]):.0f} % alike in\n{name}"
        shown.append((caption, members[first_of_class[:n_images]]))
    return shown


def largest_share(levels: np.ndarray) -> float:
    """Return the share of the most frequent of some levels (N,) int."""
    return np.bincount(levels).max() / len(levels)


def chance_limit(levels: np.ndarray, n_images: int) -> float:
    """Return a limit that the largest_share of random images rarely exceeds: mean plus three deviations of draws."""
    draws = np.random.default_rng(0).choice(levels, (20 + 500 // n_images, n_images))
    shares = [largest_share(draw) for draw in draws]
    return float(np.mean(shares) + 3 * np.std(shares))


def read_tile(images: ImageSet, index: int, kind: str) -> Tile:
    """Read the tile of an image; its caption is the class, as one line that fits and that can be encoded."""
    name = " ".join(images.class_names[images.labels[index]].encode(errors="replace").decode().split())
    caption = shortened(name, 16)
    while text_width(caption, 13) > TILE + 10:  # scripts such as Chinese are wider
        caption = shortened(name, len(caption) - 1)
    return Tile(images.read(index).permute(1, 2, 0).numpy(), caption, kind)


def draw_sheet(lines: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Draw rows of tiles, each after its heading of one or more lines; `lines` is the text above all rows."""
    step, row_height = TILE + 18, TILE + 36
    heading_width = max(text_width(line, 13) for heading in headings for line in heading.split("\n"))
    left, top = EDGE + (heading_width + EDGE if heading_width else 0), EDGE + LINE * len(lines)
    width = max(left + step * max(map(len, rows)), max(text_width(line, 17) for line in lines) + 2 * EDGE)
    sheet = Image.new("RGB", (int(width), top + row_height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw_text(pen, EDGE, EDGE / 2 + LINE * (i + 0.4), line, "black", 17)
    for i, (heading, row) in enumerate(zip(headings, rows, strict=True)):
        y = top + row_height * i
        heading_lines = heading.split("\n")
        for j, line in enumerate(heading_lines):
            draw_text(pen, EDGE, y + TILE / 2 + 19 * (j - (len(heading_lines) - 1) / 2), line, "black", 13)
        for j, tile in enumerate(row):
            draw_tile(sheet, pen, int(left + step * j), y, tile)
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet in the format of the path's suffix, .png or .jpg."""
    with replaced_file(path) as file:
        if path.suffix == ".jpg":
            sheet.save(file, "JPEG", quality=60)
        else:  # as small as with the defaults, in half the time
            sheet.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)


def draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, tile: Tile) -> None:
    """Draw a tile on a sheet with its frame, mark and caption; (x, y) is its upper left corner."""
    colour, mark = FRAMES[tile.kind]
    image = ImageOps.fit(Image.fromarray(tile.image), (TILE, TILE), Image.Resampling.BICUBIC, bleed=BORDER)
    sheet.paste(image, (x, y))
    pen.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=colour, width=5)
    if tile.kind == "other":
        for gap in range(12, TILE, 24):
            for near in (-2, TILE - 3):
                pen.rectangle((x + gap, y + near, x + gap + 9, y + near + 4), "white")
                pen.rectangle((x + near, y + gap, x + near + 4, y + gap + 9), "white")
    if mark:
        pen.rectangle((x, y, x + 24, y + 24), colour)
        draw_text(pen, x + 12 - text_width(mark, 19) / 2, y + 12, mark, "white", 19)
    text_colour = "black" if tile.kind == "plain" else colour
    draw_text(pen, x + (TILE - text_width(tile.caption, 13)) / 2, y + TILE + 15, tile.caption, text_colour, 13)


@functools.cache
def sheet_font(size: int, file: str) -> ImageFont.FreeTypeFont:
    """Load the font in a file."""
    return ImageFont.truetype(file, size)


def text_width(text: str, size: int) -> float:
    """Return the width in pixels of a text as draw_text draws it."""
    return sum(sheet_font(size, file).getlength(part) for file, part in fonts.parts_by_font(text))


def draw_text(pen: ImageDraw.ImageDraw, x: float, middle: float, text: str, colour: str, size: int) -> None:
    """Draw a line of text from x on, centred on the height `middle`, on one base line for all fonts it needs."""
    ascent, descent = sheet_font(size, fonts.default_font()).getmetrics()
    for file, part in fonts.parts_by_font(text):
        font = sheet_font(size, file)
        pen.text((x, middle + (ascent - descent) / 2), part, colour, font, anchor="ls")
        x += font.getlength(part)
