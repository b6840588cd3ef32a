"""The built-in rendered data set, with known characteristics that classes share."""

from collections.abc import Callable

import numpy as np
from skimage.color import hsv2rgb
from skimage.draw import polygon

from data.images import ImageSet, Splits

N_CLASSES, PER_CLASS, SIZE = 48, 24, 64
BACKGROUNDS = np.array(
    [[0.85, 0.35, 0.3], [0.3, 0.7, 0.35], [0.3, 0.4, 0.85], [0.9, 0.85, 0.4], [0.35, 0.3, 0.4], [0.85, 0.85, 0.85]]
)
FACTORS = {"background": len(BACKGROUNDS), "orientation": 4, "size": 3, "light": 4}
"""Characteristics that all classes share, and their numbers of levels."""


def render_shapes() -> Splits:
    """Render the built-in data set: 48 classes of 24 images of 64 x 64 pixels; the first half trains, the rest tests.

    A class is an outline with a two-colour stripe pattern. Each class has every level of every factor equally often,
    so a factor says nothing about the class.
    """
    pixels, levels = [], {factor: [] for factor in FACTORS}
    for label in range(N_CLASSES):
        rng = np.random.default_rng([2019, label])
        render = shape_class(rng)
        schedule = {factor: rng.permutation(np.arange(PER_CLASS) % n_levels) for factor, n_levels in FACTORS.items()}
        for i in range(PER_CLASS):
            pixels.append(render({factor: int(values[i]) for factor, values in schedule.items()}, rng))
        for factor, values in schedule.items():
            levels[factor].append(values)
    images = ImageSet(
        names=[f"shapes/{label:02d}/{i:02d}" for label in range(N_CLASSES) for i in range(PER_CLASS)],
        labels=np.repeat(np.arange(N_CLASSES), PER_CLASS),
        class_names=[f"{label:02d}" for label in range(N_CLASSES)],
        pixels=np.stack(pixels),
        factors={factor: np.concatenate(values) for factor, values in levels.items()},
        layout="rendered in memory; the first half of the classes trains, the rest tests",
    )
    return images.classes(0, N_CLASSES // 2), {"test": images.classes(N_CLASSES // 2, N_CLASSES)}


def shape_class(rng: np.random.Generator) -> Callable[[dict[str, int], np.random.Generator], np.ndarray]:
    """Draw a random class and return a function that renders images of it, (64, 64, 3) uint8.

    The function takes the level of each factor, and a generator for small variations.
    """
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    waves = np.arange(2, 7)
    amplitudes, phases = rng.normal(0, 0.22, 5) / np.sqrt(waves / 2), rng.uniform(0, 2 * np.pi, 5)
    radius = 1 + (amplitudes[:, None] * np.cos(waves[:, None] * angles + phases[:, None])).sum(0)
    radius = np.clip(radius, 0.35, None)
    radius /= radius.max()
    hue = rng.uniform()
    hues = np.array([hue, (hue + rng.uniform(0.2, 0.8)) % 1])
    colours = hsv2rgb(np.stack([hues, rng.uniform(0.6, 1, 2), rng.uniform(0.35, 1, 2)], axis=1))
    stripe_angle, stripes = rng.uniform(0, np.pi), rng.uniform(1.0, 4.0)

    def render(levels: dict[str, int], rng: np.random.Generator) -> np.ndarray:
        """Render one image."""
        size = 2 * SIZE  # render at twice the resolution and average at the end, for smooth edges
        turn = levels["orientation"] * np.pi / 2 + rng.normal(0, 0.12)
        scale = size * (0.28, 0.36, 0.44)[levels["size"]]
        centre = size / 2 + rng.normal(0, 0.03 * size, 2)
        y, x = (np.mgrid[:size, :size] - centre[:, None, None]) / scale
        along = x * np.cos(stripe_angle + turn) + y * np.sin(stripe_angle + turn)
        pattern = (np.sin(np.pi * stripes * along) > 0).astype(int)
        inside = polygon(
            centre[0] + scale * radius * np.sin(angles + turn),
            centre[1] + scale * radius * np.cos(angles + turn),
            (size, size),
        )
        canvas = np.tile(BACKGROUNDS[levels["background"]] + rng.normal(0, 0.03, 3), (size, size, 1))
        canvas[inside] = colours[pattern][inside]
        light = (levels["light"] + 0.5) * np.pi / 2 + rng.normal(0, 0.12)
        ramp = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        canvas *= (0.85 + 0.15 * (ramp[0] * np.sin(light) + ramp[1] * np.cos(light)))[:, :, None]
        canvas = canvas.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)) + rng.normal(0, 0.015, (SIZE, SIZE, 3))
        return (255 * np.clip(canvas, 0, 1)).round().astype(np.uint8)

    return render
