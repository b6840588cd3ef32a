"""The rendered data set."""

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from data.shapes import render_shapes


def test_shapes_are_as_described(shapes):
    train, test = shapes
    for images in shapes:
        assert images.pixels.shape == (24 * 24, 64, 64, 3)
        assert images.pixels.dtype == np.uint8
        assert np.bincount(images.labels).tolist() == [24] * 24
        assert {factor: levels.max() + 1 for factor, levels in images.factors.items()} == {
            "background": 6,
            "orientation": 4,
            "size": 3,
            "light": 4,
        }
        for factor, levels in images.factors.items():
            # Every class has each level equally often: the factor says nothing about the class
            assert normalized_mutual_info_score(images.labels, levels) < 1e-9, factor
    assert len(np.unique(np.concatenate([train.pixels, test.pixels]).reshape(1152, -1), axis=0)) == 1152
    assert not set(train.class_names) & set(test.class_names)
    assert not set(train.names) & set(test.names)


def test_shapes_render_the_same_every_time(shapes):
    again, _ = render_shapes()
    assert (again.pixels == shapes[0].pixels).all()


def test_backgrounds_are_seen_in_the_corners(shapes):
    corners = shapes[0].pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    levels = shapes[0].factors["background"]
    centres = np.stack([corners[levels == level].mean(0) for level in range(levels.max() + 1)])
    nearest = ((corners[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == levels).mean() > 0.95
