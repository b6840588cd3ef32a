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
"""Names that no characteristic may have, because logs use them for something else."""


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file in UTF-8, or in UTF-16 with a byte order mark, separated by commas, semicolons or tabs.

    Args:
        path: the file.
        required: columns that it must have, in upper or lower case.
        optional: columns that it may have; all others are known characteristics.

    Returns:
        Texts, without spaces around them; "" for missing cells. Rows are indexed by their number in a spreadsheet,
        where the header is row 1. Rows and columns without any text are dropped.

    Raises:
        InputError: the file is not such a table.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        # Keep blank lines for now, so that row numbers are those of the spreadsheet
        layout = {"sep": separator, "header": None, "keep_default_na": False, "skip_blank_lines": False}
        table = pd.read_csv(io.StringIO(text), dtype=str, **layout)
    except UnicodeDecodeError as error:
        excel = 'save it in UTF-8, in Excel as "CSV UTF-8 (Comma delimited)" and not as "CSV"'
        raise InputError(f"{path}: cannot be read ({error.reason} for UTF-8); {excel}") from error
    except (OSError, ValueError) as error:  # ValueError: rows longer than the first, unclosed quotes, or no rows
        reason = first_line(error).removeprefix("Error tokenizing data. C error: ")
        raise InputError(f"{path}: cannot be read ({reason})") from error
    table = table.set_axis(table.index + 1).fillna("").apply(lambda cells: cells.str.strip())
    table = table.loc[(table != "").any(axis=1), (table != "").any()]
    names, rows = table.iloc[0].tolist(), table.iloc[1:]
    columns = [name.lower() if name.lower() in (*required, *optional) else name for name in names]
    if not set(required) <= set(columns):
        others = "".join(f", optionally {name}," for name in optional) + " and known characteristics"
        raise InputError(f"{path}, row 1: expected {' and '.join(required)}{others}; found {','.join(names)[:80]!r}")
    for name in columns:
        if columns.count(name) > 1 or (name in RESERVED and name not in required):
            raise InputError(f"{path}, row 1: the column {name!r} cannot be read: rename it or leave it out")
    if rows.empty:
        raise InputError(f"{path}: has no rows below its header")
    return rows.set_axis(columns, axis=1)


def require(path: Path, fault: str, cells: pd.Series, hint: str = "") -> None:
    """Check that no row of a table has a fault.

    Args:
        path: file of the table.
        fault: description of the fault.
        cells: a cell of each row that has it, by row number.
        hint: what to do about it.

    Raises:
        InputError: some rows have it.
    """
    if len(cells):
        rows = first_few([f"row {n} ({cell})" for n, cell in cells.items()])
        n_rows = f" ({counted(len(cells), 'row')})" if len(cells) > 3 else ""
        raise InputError(f"{path}: {fault} in {rows}{n_rows}{hint}")


def read_factors(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """Read the known characteristics of N images from a factors.csv.

    Args:
        path: the file.
        names: paths of the images as in the column `image`, in any Unicode normal form.

    Returns:
        A row for each name, in order, and a column for each characteristic.

    Raises:
        InputError: the file is malformed, or an image has no row or several.
    """
    table = read_table(path, ["image"])
    keys = table["image"].map(normal_form)
    require(path, "an image listed twice", table["image"][keys.duplicated(keep=False)])
    needed = pd.Index(names).map(normal_form)
    missing = [name for name, is_there in zip(names, needed.isin(keys)) if not is_there]
    if missing:
        raise InputError(f"{path}: {counted(len(missing), 'image')} without a row: {first_few(missing)}")
    return table.set_index(keys).drop(columns="image").loc[needed].reset_index(drop=True)


def levels_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return each column of N texts as (N,) int64 levels, numbered in the order of the texts."""
    return {name: np.unique(table[name].tolist(), return_inverse=True)[1] for name in table}
