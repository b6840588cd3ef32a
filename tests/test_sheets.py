"""Contact sheets: which images they show, where, and in which frames."""

import numpy as np
from PIL import Image

from data.images import ImageSet
from report import sheets
from run.history import History

N = 7
"""Images of the sets below; image i is of the grey 30 * i."""


def grey_images(labels, names, **more):
    """Return N images, each of one grey."""
    pixels = np.stack([np.full((8, 8, 3), 30 * i, dtype=np.uint8) for i in range(N)])
    return ImageSet([""] * N, np.array(labels), names, pixels=pixels, **more)


def tiles(path, left=sheets.EDGE, n_lines=2):
    """Return (kind, image) of the tiles of a sheet, row by row: by the frame's colour and the grey within."""
    kinds = {colour: kind for kind, (colour, _) in sheets.FRAMES.items()}
    with Image.open(path) as sheet:
        rows = []
        for y in range(sheets.EDGE + sheets.LINE * n_lines, sheet.height, sheets.TILE + 36):
            places = range(left, sheet.width - sheets.TILE + 1, sheets.TILE + 18)
            frames = ["#{:02x}{:02x}{:02x}".format(*sheet.getpixel((x - 1, y - 1))) for x in places]
            greys = [sheet.getpixel((x + sheets.TILE // 2, y + sheets.TILE // 2))[0] for x in places]
            rows.append([(kinds[frame], grey // 30) for frame, grey in zip(frames, greys) if frame in kinds])
    return rows


def test_recoveries_show_queries_and_their_nearest_neighbours(tmp_path):
    embeddings = np.array([[0.0], [0.1], [5.0], [5.2], [9.0], [9.3], [9.7]], dtype=np.float32)
    images = grey_images([0, 1, 2, 2, 3, 3, 0], ["a", "b", "a very long name of a class", "d"])
    sheets.draw_recoveries(tmp_path / "sheet.png", images, embeddings, "a title", n_queries=4, n_neighbours=2)
    assert tiles(tmp_path / "sheet.png") == [
        [("query", 0), ("other", 1), ("other", 2)],
        [("query", 3), ("same", 2), ("other", 4)],
        [("query", 4), ("same", 5), ("other", 6)],
        [("query", 6), ("other", 5), ("other", 4)],
    ]


def test_recoveries_search_queries_in_the_gallery_only(tmp_path):
    embeddings = np.arange(N, dtype=np.float32)[:, None]
    is_query = np.array([True, True, False, False, False, True, False])
    images = grey_images([0, 1, 0, 1, 1, 1, 1], ["a", "b"], is_query=is_query)
    sheets.draw_recoveries(tmp_path / "sheet.png", images, embeddings, "a title")
    assert tiles(tmp_path / "sheet.png") == [
        [("query", 0), ("same", 2), ("other", 3), ("other", 4), ("other", 6)],
        [("query", 1), ("other", 2), ("same", 3), ("same", 4), ("same", 6)],
        [("query", 5), ("same", 4), ("same", 6), ("same", 3), ("other", 2)],
    ]


def test_recoveries_take_queries_that_something_can_be_found_for_unless_there_are_none(tmp_path):
    embeddings = np.arange(N, dtype=np.float32)[:, None]
    images = grey_images([0, 1, 2, 2, 3, 4, 5], list("abcdef"))
    sheets.draw_recoveries(tmp_path / "sheet.png", images, embeddings, "a title", n_neighbours=1)
    assert tiles(tmp_path / "sheet.png") == [[("query", 2), ("other", 1)], [("query", 3), ("same", 2)]]
    is_query = np.arange(N) % 2 == 0
    images = grey_images([0, 0, 1, 2, 3, 3, 0], list("abcd"), is_query=is_query)
    sheets.draw_recoveries(tmp_path / "sheet.png", images, embeddings, "a title", n_neighbours=1)
    assert [row[0] for row in tiles(tmp_path / "sheet.png")] == [("query", 0), ("query", 4), ("query", 6)]
    sheets.draw_recoveries(tmp_path / "sheet.png", grey_images(range(N), list("abcdefg")), embeddings, "a title")
    assert len(tiles(tmp_path / "sheet.png")) == N


def test_images_that_took_no_part_in_a_mining_are_not_shown():
    clusters, classes = np.array([1, 1, 0, 0, 0, 2]), np.arange(6)
    distances = np.array([0.2, 0.1, np.nan, 0.4, 0.3, np.nan])
    shown = sheets.clusters_to_show(clusters, distances, classes, {"light": np.array([0, 0, 1, 1, 0, 1])})
    assert [(caption.split("\n")[:3], indices.tolist()) for caption, indices in shown] == [
        (["cluster 0", "2 images", "2 classes"], [4, 3]),
        (["cluster 1", "2 images", "2 classes"], [1, 0]),
    ]


def test_mined_clusters_have_a_row_each_and_say_what_they_are(tmp_path):
    images = grey_images([0, 1, 1, 2, 0, 0, 3], ["a", "b", "c", "d"], factors={"light": np.arange(N) % 2})
    mined, distances = np.array([7, 7, 7, 7, 2, 2, 5]), np.array([0.3, 0.1, 0.2, 0.4, 0.1, 0.0, 0.0])
    history = History(tmp_path, {}, rows={"mining": [{"Before Epoch": 4}]})
    (path,) = sheets.draw_mining(history, images, mined, distances)
    left = int(2 * sheets.EDGE + max(sheets.text_width(line, 13) for line in ("cluster 7", "4 images", "3 classes")))
    assert (tmp_path / "mined/before_epoch_0004.jpg").exists()
    assert tiles(path, left) == [
        [("plain", 1), ("plain", 0), ("plain", 3)], [("plain", 5)], [("plain", 6)]
    ]  # fmt: skip


def test_clusters_are_shown_by_the_nearest_image_of_each_class():
    clusters = np.array([7, 7, 7, 7, 2, 2, 5])
    distances = np.array([0.3, 0.1, 0.2, 0.4, 0.1, 0.0, 0.0])
    classes = np.array([0, 1, 1, 2, 0, 0, 3])
    shown = sheets.clusters_to_show(clusters, distances, classes, {})
    assert [caption for caption, _ in shown] == [
        "cluster 7\n4 images\n3 classes", "cluster 2\n2 images\n1 class", "cluster 5\n1 image\n1 class"
    ]  # fmt: skip
    assert [indices.tolist() for _, indices in shown] == [[1, 0, 3], [5], [6]]
    assert sheets.clusters_to_show(clusters, distances, classes, {}, n_images=2)[0][1].tolist() == [1, 0]
    factors = {"light": np.array([1, 1, 1, 0, 0, 0, 0]), "size": np.array([0, 1, 2, 3, 0, 0, 1])}
    captions = [caption for caption, _ in sheets.clusters_to_show(clusters, distances, classes, factors)]
    assert captions[2] == "cluster 5\n1 image\n1 class"  # a single image is alike in everything
    many = [np.repeat(values, 100) for values in (clusters, distances, classes)]
    factors = {name: np.repeat(levels, 100) for name, levels in factors.items()}
    captions = [caption for caption, _ in sheets.clusters_to_show(*many, factors)]
    assert [caption.split("\n", 3)[3] for caption in captions[:2]] == [
        "75 % alike in\nlight", "100 % alike in\nsize"
    ]  # fmt: skip


def test_captions_name_a_factor_only_where_it_is_more_alike_than_in_random_images():
    rng = np.random.default_rng(0)
    factors = {"photo": np.arange(2000) % 50, "light": rng.integers(4, size=2000)}
    clusters = rng.integers(10, size=2000)
    clusters[(factors["light"] == 2) & (clusters != 3)] = 4
    shown = sheets.clusters_to_show(clusters, np.zeros(2000), np.arange(2000), factors)
    named = {int(caption.split()[1]): caption.split("\n")[3:] for caption, _ in shown}
    assert named[4][1] == "light"
    clusters = rng.integers(10, size=2000)
    shown = sheets.clusters_to_show(clusters, np.zeros(2000), np.arange(2000), factors)
    assert [caption.split("\n")[3:] for caption, _ in shown] == 10 * [[]]


def test_of_many_clusters_the_largest_middle_and_smallest_are_shown():
    clusters = np.repeat(np.arange(20), np.arange(20))  # cluster i has i images, cluster 0 none
    shown = sheets.clusters_to_show(clusters, np.zeros(190), np.arange(190), {})
    assert [int(caption.split()[1]) for caption, _ in shown] == [19, 18, 17, 12, 11, 10, 9, 3, 2, 1]


def test_captions_are_one_line_that_fits_whatever_the_name(tmp_path):
    images = grey_images([0] * N, ["two\nlines, \udcff and very long indeed"])
    tile = sheets.read_tile(images, 0, "other")
    assert tile.caption == "two lines, ? an…"
    sheets.save(sheets.draw_sheet(["title"], ["a\nb"], [[tile, tile]]), tmp_path / "sheet.png")
    Image.open(tmp_path / "sheet.png").verify()


def test_a_small_set_shows_no_image_as_its_own_neighbour(tmp_path):
    sheets.draw_recoveries(
        tmp_path / "sheet.png", grey_images([0] * N, ["a"]), np.arange(N, dtype=np.float32)[:, None], "", 1, N
    )
    assert sorted(grey for _, grey in tiles(tmp_path / "sheet.png")[0]) == list(range(N))
