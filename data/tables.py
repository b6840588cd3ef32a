"""CSV files as spreadsheets write them, and the known characteristics in them."""

import codecs
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.files import normal_form
from support.errors import InputError, counted, first_few, first_line

RESERVED = ("", "class", "Class", "Mined")
"""Names that no characteristic may have, as logs use them for something else."""


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file: UTF-8, or UTF-16 with its mark, with commas, semicolons or tabs.

    Args:
        path: of the file.
        required: columns that it has to have, in any case of letters.
        optional: columns that it may have besides; all others are known characteristics.

    Returns:
        Texts by column and number of the row in a spreadsheet, where the header is row 1. Spaces around texts, and rows
        and columns without any text, are left out; cells that a short row lacks are empty.

    Raises:
        InputError: for a file that is no such table.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        # Without empty lines left out, numbers of rows are those of the spreadsheet
        layout = {"sep": separator, "header": None, "keep_default_na": False, "skip_blank_lines": False}
        table = pd.read_csv(io.StringIO(text), dtype=str, **layout)
    except UnicodeDecodeError as error:
        excel = 'save it in UTF-8, in Excel as "CSV UTF-8 (Comma delimited)" and not as "CSV"'
        raise InputError(f"{path}: cannot be read ({error.reason} for UTF-8); {excel}") from error
    except (OSError, ValueError) as error:  # of rows that are longer than the first, quotes that do not end, no rows
        reason = first_line(error).removeprefix("Error tokenizing data. C error: ")
        raise InputError(f"{path}: cannot be read ({reason})") from error
    table = table.set_axis(table.index + 1).fillna("").apply(lambda cells: cells.str.strip())
    table = table.loc[(table != "").any(axis=1), (table != "").any()]
    names, rows = table.iloc[0].tolist(), table.iloc[1:]
    columns = [name.lower() if name.lower() in (*required, *optional) else name for name in names]
    if not set(required) <= set(columns):
        more = "".join(f", perhaps {name}," for name in optional) + " and known characteristics"
        raise InputError(f"{path}, row 1: expected {' and '.join(required)}{more}; found {','.join(names)[:80]!r}")
    for name in columns:
        if columns.count(name) > 1 or (name in RESERVED and name not in required):
            raise InputError(f"{path}, row 1: the column {name!r} cannot be read: rename it or leave it out")
    if rows.empty:
        raise InputError(f"{path}: has no rows below its header")
    return rows.set_axis(columns, axis=1)


def require(path: Path, fault: str, cells: pd.Series, hint: str = "") -> None:
    """Raise InputError where rows of a table have a fault. cells: of these rows, by number."""
    if len(cells):
        rows = first_few([f"row {n} ({cell})" for n, cell in cells.items()])
        n_rows = f" ({counted(len(cells), 'row')})" if len(cells) > 3 else ""
        raise InputError(f"{path}: {fault} in {rows}{n_rows}{hint}")


def read_factors(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the known characteristics of N images from a factors.csv.

    Args:
        path: of the file.
        names: paths of the images as in the column `image`, in any Unicode normal form.

    Returns:
        For each other column (N,) int64 levels.

    Raises:
        InputError: for a malformed file, or an image without a row or with several.
    """
    table = read_table(path, ["image"])
    keys = table["image"].map(normal_form)
    require(path, "an image listed twice", table["image"][keys.duplicated(keep=False)])
    row_of = {key: i for i, key in enumerate(keys)}
    missing = [name for name in names if normal_form(name) not in row_of]
    if missing:
        raise InputError(f"{path}: {counted(len(missing), 'image')} without a row: {first_few(missing)}")
    return levels_of(table.drop(columns="image").iloc[[row_of[normal_form(name)] for name in names]])


def levels_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the columns of a table, N texts each, as (N,) int64 levels, numbered in the order of the texts."""
    return {name: np.unique(table[name].tolist(), return_inverse=True)[1] for name in table}
