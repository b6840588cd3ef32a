"""Fonts for scripts that Matplotlib's own font, DejaVu Sans, does not cover: Chinese, Japanese, emoji."""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEFAULT_FONT = "DejaVu Sans"
USELESS = "Last Resort|Color Emoji"
"""Regular expression for names of unusable fonts: placeholders for every character, and pictures without outlines."""


def default_font() -> str:
    """Return the file of DejaVu Sans that comes with Matplotlib."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def characters_of(file: str) -> np.ndarray:
    """Return the code points that a font covers; empty if its file has gone since Matplotlib listed it."""
    try:
        return np.fromiter(FT2Font(file).get_charmap(), dtype=np.int64)
    except (OSError, RuntimeError):
        return np.empty(0, dtype=np.int64)


@functools.cache
def system_fonts() -> dict[str, tuple[str, np.ndarray]]:
    """Return one font of each family that Matplotlib knows, {family: (file, code points)}, plain and sans serif first.

    This opens all of them, which takes about a second, and is only called if a name needs it.
    """
    entries = [font for font in font_manager.fontManager.ttflist if not re.search(USELESS, font.name)]
    entries.sort(key=lambda font: (font.style != "normal", font.weight != 400, "Sans" not in font.name, font.fname))
    files: dict[str, str] = {}
    for font in entries:
        files.setdefault(font.name, font.fname)
    return {family: (file, characters_of(file)) for family, file in files.items()}


@functools.cache
def default_characters() -> frozenset[int]:
    """Return the code points of DejaVu Sans."""
    return frozenset(characters_of(default_font()).tolist())


@functools.cache
def font_of(character: str) -> tuple[str, str]:
    """Return family and file of the font for a character: DejaVu Sans if it covers the character or no font does."""
    if character.isprintable() and ord(character) not in default_characters():
        for family, (file, characters) in system_fonts().items():
            if ord(character) in characters:
                return family, file
    return DEFAULT_FONT, default_font()


def families_for(text: str) -> list[str]:
    """Return the font families for Matplotlib to try for a text, in order; empty if its own font is enough.

    The last family is for browsers that show an SVG, which may have fonts that this machine lacks.
    """
    others = dict.fromkeys(font_of(character)[0] for character in text if font_of(character)[0] != DEFAULT_FONT)
    return [DEFAULT_FONT, *others, "sans-serif"] if others else []


def parts_by_font(text: str) -> Iterator[tuple[str, str]]:
    """Split a text into parts with one font each; yield (file of the font, part)."""
    for file, characters in itertools.groupby(text, lambda character: font_of(character)[1]):
        yield file, "".join(characters)
