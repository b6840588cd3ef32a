"""CSV files as spreadsheets write them, and the known characteristics in them."""

import codecs
import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.files import normal_form
from support.errors import InputError, counted, first_few

RESERVED = ("", "class", "Class", "Mined")
"""Names that no characteristic may have, as logs use them for something else."""


def read_table(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """Read a CSV file: UTF-8, or UTF-16 with its mark, with commas, semicolons or tabs.

    Returns:
        The header, and the cells of the other rows by their number in a spreadsheet, where the header is row 1. Empty
        rows, and columns at the end that have neither a name nor values, are left out.

    Raises:
        InputError: where the file cannot be read, or a row is not as long as the header.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        first_line, _, below = text.partition("\n")
        delimiter = max(",;\t", key=first_line.count)
        if first_line.lower().startswith("sep=") and len(first_line.strip()) == 5:  # for spreadsheets only
            text, delimiter = below, first_line[4]
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    header, *rows = records or [[]]
    numbered = {number: row for number, row in enumerate(rows, start=2) if any(row)}
    while header and not header[-1].strip() and not any(any(row[len(header) - 1 :]) for row in numbered.values()):
        header = header[:-1]
    numbered = {n: row if any(row[len(header) :]) else row[: len(header)] for n, row in numbered.items()}
    uneven = [f"row {n} ({row[0]})" for n, row in numbered.items() if len(row) != len(header)]
    if uneven:
        raise InputError(f"{path}: {counted(len(uneven), 'row')} not as long as the first: {first_few(uneven)}")
    return header, numbered


def read_factors(path: Path, names: Sequence[str], left_out: Collection[str]) -> dict[str, np.ndarray]:
    """Read the known characteristics of N images from a factors.csv.

    Args:
        names: paths of the images as in the column `image`, in any Unicode normal form.
        left_out: paths of other files, which may have a row too.

    Returns:
        For each other column (N,) int64 levels.

    Raises:
        InputError: for a malformed file, an image without a row, a row without an image.
    """
    columns, rows = read_table(path)
    if columns[:1] != ["image"] or len(columns) < 2:
        raise InputError(
            f"{path}, row 1: expected image and a column for each characteristic; found {','.join(columns)[:80]!r}"
        )
    check_factor_names(path, columns[1:])
    row_of, by_form, repeated = {}, {}, []
    for row in rows.values():
        if row[0] in row_of:
            repeated.append(row[0])
        row_of[row[0]] = by_form[normal_form(row[0])] = row
    found = [row_of.get(name) or by_form.get(normal_form(name)) for name in names]
    known = {normal_form(name) for name in [*names, *left_out]}
    faults = {
        ("image", "with several rows"): repeated,
        ("image", "without a row"): [name for name, row in zip(names, found) if row is None],
        ("row", "without an image"): sorted(row[0] for form, row in by_form.items() if form not in known),
    }
    for (noun, fault), images in faults.items():
        if images:
            raise InputError(f"{path}: {counted(len(images), noun)} {fault}: {first_few(images)}")
    return levels_of({column: [row[i] for row in found] for i, column in enumerate(columns[1:], start=1)})


def check_factor_names(path: Path, names: Sequence[str]) -> None:
    """Raise InputError for names of characteristics that are missing, given twice, or taken."""
    for name in names:
        if name.strip() in RESERVED or names.count(name) > 1:
            raise InputError(
                f"{path}, row 1: the column {name!r} cannot be a characteristic; give each another name, none "
                "of class, Class and Mined"
            )


def levels_of(values: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return characteristics, each N texts, as (N,) int64 levels, numbered in the order of the texts."""
    return {name: np.unique(texts, return_inverse=True)[1] for name, texts in values.items()}
